"""What the rewards of one batch of completions came to, whoever worked them out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from grpo_engine.types import UserError

FAILURES = frozenset(("timeout", "error", "worker_death", "invalid_score"))
UNJUDGED = FAILURES | {"gold_invalid"}


class RewardError(UserError):
    """Too large a share of one batch could not be scored (see ``max_error_rate``)."""


@dataclass
class RewardReport:
    """Scores of one batch. ``scores[name][i]`` belongs to completion ``i``; None = no score.

    ``outcomes[name]`` counts the completions to which the reward applies by its domains.
    """

    scores: dict[str, list[float | None]]
    outcomes: dict[str, Counter[str]]
    first_errors: dict[str, str]  # by reward, of its first completion that failed, if any did
    seconds: dict[str, list[float]]  # time of each call, for percentiles
    totals: list[float | None]  # weighted sum; None = nothing applicable, or a reward failed
    outcome_of: dict[str, list[str]] = field(default_factory=dict)  # in the order of ``scores``
    weights: dict[str, float] = field(default_factory=dict)
    measures: dict[str, list[float]] = field(default_factory=dict)  # what rewards measured besides

    def error_rate(self, name: str) -> float:
        """Share of completions on which reward ``name`` failed."""
        counts = self.outcomes[name]
        return sum(counts[failure] for failure in FAILURES) / max(1, sum(counts.values()))

    def rates(self, name: str) -> dict[str, float]:
        """Share of completions for each outcome of ``name`` that occurred, except ok.

        The outcome ``error`` is called ``raised`` here: "error_rate" is the sum of all failures.
        """
        counts = self.outcomes[name]
        total = max(1, sum(counts.values()))
        return {
            "raised" if outcome == "error" else outcome: count / total
            for outcome, count in sorted(counts.items())
            if count and outcome != "ok"
        }


def weighted_totals(
    weights: Mapping[str, float],
    scores: Mapping[str, Sequence[float | None]],
    outcome_of: Mapping[str, Sequence[str]],
) -> list[float | None]:
    """The weighted sum over the rewards that apply; None when one failed or none applies.

    Leaving a failed reward out of the sum would count it as 0 and bias the group's baseline.
    """
    totals: list[float | None] = []
    for index in range(len(next(iter(scores.values()), ()))):
        total = None
        if not any(outcome_of[name][index] in UNJUDGED for name in weights):
            for name, weight in weights.items():
                score = scores[name][index]
                if score is not None:
                    total = (total or 0.0) + weight * score
        totals.append(total)
    return totals


def merged(reports: Sequence[RewardReport]) -> RewardReport:
    """Reports of different rewards on the same completions as one."""
    if len(reports) == 1:
        return reports[0]
    parts = ("scores", "outcomes", "first_errors", "seconds", "outcome_of", "weights", "measures")
    joined = {
        part: {name: value for r in reports for name, value in getattr(r, part).items()}
        for part in parts
    }
    totals = weighted_totals(joined["weights"], joined["scores"], joined["outcome_of"])
    return RewardReport(**joined, totals=totals)


def check_error_rate(
    name: str, failed: Counter[str], completions: int, max_error_rate: float, first_error: str
) -> None:
    """Raise RewardError when the failures ``failed`` (by outcome) of reward ``name`` are more than
    ``max_error_rate`` allows of the ``completions`` that it applies to."""
    if failed.total() <= max_error_rate * completions:
        return
    kinds = ", ".join(f"{outcome} {count}" for outcome, count in failed.most_common())
    raise RewardError(
        f"reward {name!r} failed on {failed.total()} of {completions} completions ({kinds}), more "
        f"than max_error_rate={max_error_rate:g} allows; the first failure: "
        f"{' '.join(first_error.split())}"
    )
