"""Which answers to one problem are the same vote.

Mathematics: by the verifier that judges them, so 1/2 and 0.5 vote together. Right answers equal the
reference, hence each other; wrong ones are compared among themselves, numbers by value and the rest
by the verifier, each with the first of every class. Elsewhere an answer's text is its vote: a
choice's letter, or the words of an answer to a reasoning_gym task (where several different answers
can be right). Programs have no equality that could be decided, so they do not vote.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from grpo_engine.evaluation.samples import Sample
from grpo_engine.rewards import accuracy_reward
from grpo_engine.rewards.exact import exact_value
from grpo_engine.rewards.notation import normalise
from grpo_engine.rewards.symbolic import math_verify_installed

RIGHT = "right"  # the class of the answers that equal the reference
_MAX_BITS = 6000  # of a number that is written out again to be compared
Ballot = list[Any]  # one vote a sample; None where it has no answer


class Votes:
    """The votes of all problems, and how they were compared."""

    def __init__(self, task: str, problems: Sequence[Sequence[Sample]]) -> None:
        self.task = task
        self.comparisons = self.failed_comparisons = 0
        self.ballots: list[Ballot] | None = None
        if task == "code":
            self.policy = "none: programs are not compared"
        elif task == "math":
            self.policy = "verifier" if math_verify_installed() else "number, else normalised text"
            self.ballots = self._mathematics(problems)
        else:
            self.policy = "letter" if task == "choice" else "number, else text; same verdict"
            self.ballots = [[_text_vote(one) for one in samples] for samples in problems]

    def _mathematics(self, problems: Sequence[Sequence[Sample]]) -> list[Ballot]:
        ballots = [[_maths_vote(one) for one in samples] for samples in problems]
        if not math_verify_installed():
            return ballots
        merged = self._merge([_comparable(ballot) for ballot in ballots])
        return [
            [same.get(vote, vote) for vote in ballot]
            for ballot, same in zip(ballots, merged, strict=True)
        ]

    def _merge(self, waiting: list[list[Any]]) -> list[dict[Any, Any]]:
        """{vote: the first vote that it equals}, by problem. Each round compares the first vote
        left of every problem with all others left, for all problems in one call."""
        merged: list[dict[Any, Any]] = [{} for _ in waiting]
        while any(len(votes) > 1 for votes in waiting):
            pairs = [
                (index, votes[0], other)
                for index, votes in enumerate(waiting)
                for other in votes[1:]
                if not _are_numbers(votes[0], other)
            ]
            verdicts = accuracy_reward(
                [f"<answer>{other[1]}</answer>" for _, _, other in pairs],
                [str(first[1]) for _, first, _ in pairs],
            )
            self.comparisons += len(pairs)
            # None: the first is no expression, or the comparison took too long. Not the same then.
            self.failed_comparisons += sum(verdict is None for verdict in verdicts)
            for (index, first, other), verdict in zip(pairs, verdicts, strict=True):
                if verdict == 1.0:
                    merged[index][other] = first
            waiting = [
                [vote for vote in votes[1:] if vote not in same]
                for votes, same in zip(waiting, merged, strict=True)
            ]
        return merged


def _maths_vote(sample: Sample) -> Any:
    if sample.right:
        return RIGHT
    if sample.answers is None:
        return None
    texts = sorted({normalise(answer) for answer in sample.answers})
    if sample.outcome != "ok" or len(texts) > 1:
        return ("text", *texts)  # several answers, or one that the verifier could not deal with
    value = exact_value(texts[0])
    return ("answer", texts[0]) if value is None else ("number", value)


def _comparable(ballot: Ballot) -> list[Any]:
    """The different wrong answers that the verifier can compare, in order of appearance."""
    return [
        vote
        for vote in dict.fromkeys(ballot)
        if vote is not None
        and (vote[0] == "answer" or (vote[0] == "number" and _bits(vote[1]) <= _MAX_BITS))
    ]


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _are_numbers(one: Any, other: Any) -> bool:
    return one[0] == other[0] == "number"


def _text_vote(sample: Sample) -> Any:
    if sample.answers is None:
        return None
    texts = [" ".join(answer.split()).casefold() for answer in sample.answers]
    values = [exact_value(text) for text in texts]
    votes = [text if value is None else value for text, value in zip(texts, values, strict=True)]
    return (sample.right, *sorted(votes, key=str))
