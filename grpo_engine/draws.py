"""A rollout while it is sampled: now, or ahead, beside the updates on the one before it.

One step off (``rollouts_ahead: 1``): while the policy learns from rollout n, the engine samples
rollout n + 1 from the weights with which the learning from n began. So every rollout but the first
is exactly one behind, whatever is faster; which weights drew it goes with it into the metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread

from grpo_engine.rollouts import Prompt
from grpo_engine.scoring import RolloutScoring
from grpo_engine.types import Rollout, SamplingParams


@dataclass
class Draw:
    """One rollout to sample. ``scoring`` has the rules at work on what is finished of it."""

    number: int
    version: int  # optimiser steps that its weights have had
    prompts: Sequence[Prompt]
    sampling: SamplingParams
    scoring: RolloutScoring


class DrawAhead:
    """A ``Draw`` that ``sample`` works off in a thread of its own. The thread is a daemon, and ends
    when the generator is closed."""

    def __init__(self, draw: Draw, sample: Callable[[Draw], list[Rollout]]) -> None:
        self.draw = draw
        self._outcome: Future[list[Rollout]] = Future()
        self._thread = Thread(target=self._run, args=(sample,), name="rollout-ahead", daemon=True)
        self._thread.start()

    def _run(self, sample: Callable[[Draw], list[Rollout]]) -> None:
        try:
            self._outcome.set_result(sample(self.draw))
        except BaseException as error:  # told to whoever asks for the rollouts
            self._outcome.set_exception(error)

    def rollouts(self) -> list[Rollout]:
        """Waits for them. Raises what ended the sampling."""
        return self._outcome.result()

    def give_up(self) -> None:
        """After the generator was closed: wait for the thread, drop what was being scored."""
        self._thread.join()
        self.draw.scoring.__exit__()
