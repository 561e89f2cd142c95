"""What an evaluation keeps of each answer."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_engine.sampling.samples import Cell


@dataclass(frozen=True)
class Sample:
    """One answer of the model, judged."""

    row: int
    sample: int
    seed: int
    completion: str
    length: int  # tokens, the end-of-sequence one included
    finish_reason: str
    answers: list[str] | None  # as marked in the completion; None where it marks none
    score: float | None  # None: could not be judged
    outcome: str  # of the reward: ok, no_answer, timeout, error ...
    judge: str = ""  # hash of what judged it

    @property
    def cell(self) -> Cell:
        return self.row, self.sample

    @property
    def right(self) -> bool:
        return self.score == 1.0

    @property
    def unjudged(self) -> bool:
        return self.score is None
