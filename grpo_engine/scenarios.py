"""RL for all scenarios (DeepSeek-R1, v2 sections 3.2.1 and 3.2.2): which rewards a row gets, and
when general prompts join the reasoning ones.

    Reward           = Reward_reasoning + Reward_general + Reward_language     (8)
    Reward_reasoning = Reward_rule                                             (9)
    Reward_general   = Reward_reward_model + Reward_format                     (10)

The sum has no weights. A row is a reasoning row or a general one, never both, so each row has one
of the first two terms; each general row belongs to the data set of one reward model. Here every
row has a ``domain``, and ``reward_domains`` says which domains a reward applies to; a reward that
it does not name applies to every row.

General prompts, and with them the rewards of preference, come only in the last part of the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grpo_engine.config import GRPOConfig
from grpo_engine.data import PromptOrder
from grpo_engine.rewards import RewardSpec
from grpo_engine.types import UserError

Row = dict[str, Any]


# -- domains ---------------------------------------------------------------------------------------


def with_domains(
    rows: Sequence[Row], source: str, *, column: str = "domain", default: str | None = None
) -> list[Row]:
    """``rows`` with ``domain`` filled in: from ``column``, or ``default`` where a row has none.

    Raises UserError naming the first row that has neither, or a domain that is not a name.
    """
    filled = []
    for number, row in enumerate(rows, start=1):
        domain = row.get(column)
        domain = default if domain is None else domain
        if domain is None:
            raise UserError(
                f"{source}: row {number} has no {column!r}, and no domain is given for the source"
            )
        if not isinstance(domain, str) or not domain:
            raise UserError(f"{source}: row {number}: {column} {domain!r} is not a name")
        filled.append({**row, "domain": domain})
    return filled


def with_reward_domains(
    specs: Sequence[RewardSpec], reward_domains: Mapping[str, Sequence[str]]
) -> list[RewardSpec]:
    """``specs`` limited to the domains that ``reward_domains`` gives them by name or function."""
    known = {name for spec in specs for name in (spec.name, spec.function)}
    for name in reward_domains:
        if name not in known:
            rewards = ", ".join(spec.name for spec in specs)
            raise UserError(f"reward_domains: {name!r} is none of the rewards {rewards}")
    limited = []
    for spec in specs:
        given = [reward_domains[n] for n in {spec.name, spec.function} if n in reward_domains]
        if len(given) > 1:
            raise UserError(
                f"reward_domains: {spec.name!r} and {spec.function!r} are the same reward"
            )
        limited.append(replace(spec, domains=tuple(given[0])) if given else spec)
    return limited


def check_domains(specs: Sequence[RewardSpec], rows: Sequence[Row]) -> None:
    """Every domain that a reward names is one of the rows', and the other way round: a misspelt
    domain would otherwise train on format and language alone, without a word.

    Raises UserError. Nothing to check where no reward is limited to domains.
    """
    named = {domain for spec in specs for domain in spec.domains or ()}
    if not named:
        return
    present = Counter(row["domain"] for row in rows)
    shown = ", ".join(sorted(present))
    for spec in specs:
        for domain in spec.domains or ():
            if domain not in present:
                raise UserError(
                    f"reward_domains: {spec.name!r} is for the domain {domain!r}, which no row "
                    f"has; the rows have {shown}"
                )
    for domain, count in present.items():
        if domain not in named:
            raise UserError(
                f"reward_domains: no reward is for the domain {domain!r} of {count} rows; "
                f"there are rewards for {', '.join(sorted(named))}"
            )


# -- the mixture -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """How many reasoning and general prompts each rollout takes.

    ``first_general``: number of the first rollout with general prompts; None = there are none.
    """

    prompts: int  # a rollout
    general: int = 0  # of those, from ``first_general`` on
    first_general: int | None = None

    @classmethod
    def of(cls, config: GRPOConfig, general: bool) -> Mixture:
        """The mixture of a run, with ``general`` prompts or without. See ``planned``."""
        if not general:
            return cls(config.prompts_per_generation)
        return cls.planned(
            prompts=config.prompts_per_generation,
            share=config.general_share,
            max_steps=config.max_steps,
            updates_per_rollout=config.updates_per_rollout,
            preference_steps=config.preference_steps,
        )

    @classmethod
    def planned(
        cls,
        *,
        prompts: int,
        share: float,
        max_steps: int,
        updates_per_rollout: int,
        preference_steps: int | None,
    ) -> Mixture:
        """General prompts join with the first rollout whose updates all lie in the last
        ``preference_steps`` of ``max_steps`` steps (None: with the first of all), so never before
        that step; a rollout that straddles it is reasoning only.

        Raises UserError where ``share`` leaves no general prompt, or no rollout begins so late.
        """
        general = round(share * prompts)
        if general < 1:
            raise UserError(
                f"general_share={share}: of the {prompts} prompts of a rollout "
                "(prompts_per_generation) that leaves none general"
            )
        steps = max_steps if preference_steps is None else preference_steps
        if steps > max_steps:
            raise UserError(f"preference_steps={steps}: there are max_steps={max_steps} in all")
        first = -(-(max_steps - steps) // updates_per_rollout)
        if first * updates_per_rollout >= max_steps:
            raise UserError(
                f"preference_steps={steps}: no rollout begins that late; one begins every "
                f"{updates_per_rollout} steps (steps_per_generation x num_iterations) of "
                f"max_steps={max_steps}"
            )
        return cls(prompts, general, first)

    def counts(self, number: int) -> tuple[int, int]:
        """(reasoning, general) prompts of rollout ``number``."""
        joined = self.first_general is not None and number >= self.first_general
        return (self.prompts - self.general, self.general) if joined else (self.prompts, 0)

    def starts(self, number: int) -> tuple[int, int]:
        """How many (reasoning, general) prompts the rollouts before ``number`` took."""
        mixed = 0 if self.first_general is None else max(0, number - self.first_general)
        return self.prompts * number - self.general * mixed, self.general * mixed


class PromptStream:
    """The prompts of each rollout. A pure function of the rollout's number and the seeds, so a run
    resumes from a counter alone; reasoning prompts go on in their order when general ones join.

    ``reasoning`` and ``general`` are what the rows became (any type); the rows of all general
    sources count alike. Raises UserError where prompts of a kind are needed and there are none.
    """

    def __init__(
        self, mixture: Mixture, reasoning: Sequence[Any], general: Sequence[Any], seeds: Sequence
    ) -> None:
        self.mixture = mixture
        self.kinds = (reasoning, general)
        if mixture.first_general is not None and not general:
            raise UserError("general_dataset: there is no row")
        self.orders = [
            PromptOrder(len(prompts), seed) if prompts else None
            for prompts, seed in zip(self.kinds, seeds, strict=True)
        ]

    def rollout(self, number: int) -> list[Any]:
        """Reasoning prompts first, then general ones."""
        return [
            prompts[index]
            for prompts, order, start, count in zip(
                self.kinds,
                self.orders,
                self.mixture.starts(number),
                self.mixture.counts(number),
                strict=True,
            )
            if count
            for index in order.take(start, count)
        ]

    def epochs(self, rollouts: int) -> float:
        """How often a run of ``rollouts`` goes through the reasoning prompts."""
        return self.mixture.starts(rollouts)[0] / len(self.kinds[0])
