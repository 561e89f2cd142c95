"""The rewards of one rollout: rules in worker processes, reward models in this one.

As in the paper's infrastructure (v2, appendix B.1), rules are worked off asynchronously: from the
moment the sampler has finished a batch, while it draws the next one and while the reward models and
the old and reference log-probs have the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from grpo_engine.data import columns_of
from grpo_engine.rewards import BackgroundScoring, RewardPool, RewardReport, RewardSpec
from grpo_engine.rewards.scores import merged, weighted_totals
from grpo_engine.rollouts import Prompt, hand_out
from grpo_engine.types import Rollout


class Scorer(Protocol):
    """``rewards.model.ScalarModel``, as far as it is asked here."""

    def score(
        self, prompts: Sequence[Any], completions: Sequence[str], *, thinking_prefilled: bool
    ) -> list[float]: ...


@dataclass
class ModelReward:
    """A reward that a saved reward model gives to the rows of its domains.

    The model sees the row's own prompt, and of the completion what its kind judges: helpfulness the
    final summary, safety the whole response (v1, section 2.3.4).
    """

    spec: RewardSpec
    model: Scorer
    thinking_prefilled: bool
    source: dict[str, str] = field(default_factory=dict)  # for the manifest: path, weights' hash

    def report(self, rollouts: Sequence[Rollout]) -> RewardReport:
        """Scores in the order of ``rollouts``, None where the reward does not apply. A score that
        is not finite never comes to be one: the model raises FloatingPointError."""
        name, weight = self.spec.name, self.spec.weight
        members = [i for i, rollout in enumerate(rollouts) if self.spec.applies(rollout.row)]
        found = self.model.score(
            [rollouts[i].row["prompt"] for i in members],
            [rollouts[i].completion for i in members],
            thinking_prefilled=self.thinking_prefilled,
        )
        scores: list[float | None] = [None] * len(rollouts)
        outcome_of = ["none"] * len(rollouts)
        for member, score in zip(members, found, strict=True):
            scores[member], outcome_of[member] = score, "ok"
        return RewardReport(
            scores={name: scores},
            outcomes={name: Counter(ok=len(members))},
            first_errors={},
            seconds={},
            totals=weighted_totals({name: weight}, {name: scores}, {name: outcome_of}),
            outcome_of={name: outcome_of},
            weights={name: weight},
        )


class RolloutScoring:
    """The rewards of the ``num_generations`` outputs of each of ``prompts``, while they are
    sampled. A context manager: leaving it early gives up what is still being scored.

    ``pool`` is None where no reward is by rule.
    """

    def __init__(
        self,
        pool: RewardPool | None,
        models: Sequence[ModelReward],
        prompts: Sequence[Prompt],
        num_generations: int,
    ) -> None:
        self.models = models
        self.reports: list[RewardReport] = []
        self.rules: BackgroundScoring | None = None
        if pool is not None:
            repeated = [prompt for prompt in prompts for _ in range(num_generations)]
            columns = columns_of([prompt.row for prompt in repeated])
            self.rules = BackgroundScoring(pool, [prompt.text for prompt in repeated], columns)

    def add(self, members: Sequence[int], rollouts: Sequence[Rollout]) -> None:
        """Have some rollouts scored by rule. Raises RewardError once too many could not be."""
        if self.rules is not None:
            completions = [rollout.completion for rollout in rollouts]
            self.rules.add(members, completions, [rollout.completion_ids for rollout in rollouts])

    def ask_models(self, rollouts: Sequence[Rollout]) -> None:
        """Score all rollouts by the reward models, here and now."""
        self.reports = [model.report(rollouts) for model in self.models]

    def result(self, rollouts: Sequence[Rollout]) -> RewardReport:
        """Wait for the rules, then fill ``rewards`` and ``reward``, the weighted sum of rules and
        models, of all rollouts. See ``rollouts.score_rollouts``."""
        rules = [] if self.rules is None else [self.rules.result()]
        report = merged([*rules, *self.reports])
        hand_out(report, rollouts)
        return report

    def __enter__(self) -> RolloutScoring:
        return self

    def __exit__(self, *error: object) -> None:
        if self.rules is not None:
            self.rules.__exit__(*error)
