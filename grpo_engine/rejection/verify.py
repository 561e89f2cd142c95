"""Right or wrong: by the rewards that apply to a row, or by a model that compares the answer with
the reference ("feeding the ground-truth and model predictions into DeepSeek-V3 for judgment", v1
2.3.3; its prompt is v2 Listing 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from grpo_engine.data import Row, columns_of
from grpo_engine.manifest import package_versions
from grpo_engine.prepare import check_rewards, listed, sandbox_tier
from grpo_engine.progress import say
from grpo_engine.rejection.config import JUDGE_SAMPLING, SampleConfig
from grpo_engine.rewards import RewardPool, RewardReport, RewardSpec
from grpo_engine.rewards.answers import text_after_thinking
from grpo_engine.rewards.judge import ChatModel, correctness, prompt_hash, question_text
from grpo_engine.rewards.registry import rules_sha256, source_sha256
from grpo_engine.rewards.scores import FAILURES
from grpo_engine.types import UserError

PACKAGES = ("math-verify", "reasoning-gym")
RIGHT, WRONG, NO_ANSWER, UNVERIFIED = "right", "wrong", "no_answer", "unverified"


@dataclass(frozen=True)
class Findings:
    """What is known of one answer.

    ``rewards`` and ``outcomes``: of each reward; no score where one does not apply to the row.
    ``asked``: whether it went to the judge; ``judged``: what that said, None for no verdict.
    ``failure``: why there is none, or what went wrong in the first reward that failed.
    """

    rewards: dict[str, float | None] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)
    asked: bool = False
    judged: bool | None = None
    failure: str | None = None

    @property
    def by_rule(self) -> bool:
        """Whether a reward has said anything, be it that it failed."""
        scored = any(score is not None for score in self.rewards.values())
        return scored or bool(FAILURES & set(self.outcomes.values()))

    def verdict(self, min_reward: float | Mapping[str, float]) -> str:
        """right, wrong, no_answer (wrong, and nothing is marked as the answer), or unverified."""
        if FAILURES & set(self.outcomes.values()) or (self.asked and self.judged is None):
            return UNVERIFIED
        if not self.by_rule and not self.asked:
            return UNVERIFIED
        least = min_reward
        if not isinstance(least, Mapping):
            least = dict.fromkeys(self.rewards, least)
        scores = [(score, least[name]) for name, score in self.rewards.items() if score is not None]
        if all(score >= wanted for score, wanted in scores) and self.judged is not False:
            return RIGHT
        return NO_ANSWER if NO_ANSWER in self.outcomes.values() else WRONG


class Verifier:
    """The rewards and the judge of ``config``. Raises UserError for what cannot work on ``rows``.

    Args:
        judge: loaded and checked; None without one.
        stack: closes the reward workers.
    """

    def __init__(
        self, config: SampleConfig, rows: list[Row], judge: ChatModel | None, stack: ExitStack
    ) -> None:
        self.config = config
        specs = [_spec(function, config) for function in config.reward_funcs]
        self.tier = sandbox_tier(specs)
        self.judge = judge
        self.pool: RewardPool | None = None
        if specs:
            self.pool = RewardPool(
                specs,
                num_workers=config.reward_workers,
                timeout_s=config.reward_timeout,
                max_error_rate=1.0,  # counted over all samples, by the loop
            )
            stack.enter_context(self.pool)
            _check_names(config, [spec.name for spec in specs])
        if judge is not None:
            _check_references(rows, only_judge=not specs or config.judge_rows == "all")
        elif self.pool is not None:
            check_rewards(self.pool, rows)
        _check_verifiable(rows, specs, judge)

    def identity(self) -> dict[str, Any]:
        """What the findings come from."""
        config = self.config
        versions = package_versions()
        found: dict[str, Any] = {
            "reward_funcs": config.reward_funcs,
            "reward_args": config.reward_args,
            "reward_domains": config.reward_domains,
            "timeout_s": config.reward_timeout,
            "rules_sha256": rules_sha256(),
            **{name: versions[name] for name in PACKAGES if name in versions},
        }
        sources = {one: source_sha256(one) for one in config.reward_funcs if ":" in one}
        if sources:  # another program, other verdicts
            found["reward_sources"] = sources
        if self.judge is not None:
            found["judge"] = self.judge.identity
            found["judge_prompt"] = prompt_hash("correctness")
            found["judge_rows"] = config.judge_rows
            for name in JUDGE_SAMPLING:  # where it is not what it was before there was a choice
                if getattr(config, name) != SampleConfig.model_fields[name].default:
                    found[name] = getattr(config, name)
        if self.tier is not None:
            found["sandbox"] = self.tier
        return found

    def examine(
        self, rows: Sequence[Row], prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Findings]:
        """The findings on one answer to each of ``rows``; ``prompts``: as the model saw them."""
        found = self._by_rule(rows, prompts, completions)
        if self.judge is None:
            return found
        every = self.config.judge_rows == "all"
        places = [
            place
            for place, row in enumerate(rows)
            if row.get("solution") is not None and (every or not found[place].by_rule)
        ]
        answers = {
            place: (text_after_thinking(completions[place]) or "").strip() for place in places
        }
        shown = [place for place in places if answers[place]]
        verdicts = correctness(
            self.judge,
            [question_text(rows[place]["prompt"]) for place in shown],
            [str(rows[place]["solution"]) for place in shown],
            [answers[place] for place in shown],
            seed=self.config.seed,
            temperature=self.config.judge_temperature,
            max_tokens=self.config.judge_max_tokens,
            attempts=self.config.judge_attempts,
        )
        said = dict(zip(shown, verdicts, strict=True))
        for place in places:
            found[place] = self._judged(found[place], said, place)
        return found

    def _judged(self, found: Findings, said: Mapping[int, bool | None], place: int) -> Findings:
        verdict = said.get(place, False)  # an answer that never came is wrong, unasked
        outcome = "none" if verdict is None else "ok" if place in said else NO_ANSWER
        failure = found.failure
        if verdict is None:
            failure = failure or self.judge.first_failure or "the judge gave no readable verdict"
        return Findings(found.rewards, {**found.outcomes, "judge": outcome}, True, verdict, failure)

    def _by_rule(
        self, rows: Sequence[Row], prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Findings]:
        if self.pool is None or not rows:
            return [Findings() for _ in rows]
        report = self.pool.score(prompts, completions, columns_of(rows))
        return [_findings(report, place) for place in range(len(rows))]


def _spec(function: str, config: SampleConfig) -> RewardSpec:
    spec = RewardSpec.named(function, **config.reward_args.get(function, {}))
    domains = config.reward_domains.get(function)
    return spec if domains is None else replace(spec, domains=tuple(domains))


def _findings(report: RewardReport, place: int) -> Findings:
    outcomes = {name: of_each[place] for name, of_each in report.outcome_of.items()}
    failed = [name for name, outcome in outcomes.items() if outcome in FAILURES]
    return Findings(
        {name: scores[place] for name, scores in report.scores.items()},
        outcomes,
        failure=f"{failed[0]}: {report.first_errors.get(failed[0])}" if failed else None,
    )


def _check_names(config: SampleConfig, names: list[str]) -> None:
    if isinstance(config.min_reward, Mapping) and set(config.min_reward) != set(names):
        raise UserError(
            f"--min_reward {dict(config.min_reward)}: wanted one for each of {', '.join(names)}"
        )


def _check_verifiable(rows: list[Row], specs: list[RewardSpec], judge: ChatModel | None) -> None:
    """Answers that nothing can verify would be drawn for nothing."""
    for spec in specs:
        if not any(spec.applies(row) for row in rows):
            say(f"reward {spec.name!r} applies to no row: it is for {', '.join(spec.domains)}")
    idle = [
        row["row"]
        for row in rows
        if not any(spec.applies(row) for spec in specs)
        and (judge is None or row.get("solution") is None)
    ]
    without = "no reward applies" + (
        "" if judge is None else " and there is no solution to judge by"
    )
    if len(idle) == len(rows):
        domains = sorted({row["domain"] for row in rows})
        raise UserError(f"--reward_domains: to every row ({', '.join(domains)}) {without}")
    if idle:
        say(f"to {listed(idle)} {without}: their answers will be rejected as unverified")


def _check_references(rows: list[Row], *, only_judge: bool) -> None:
    """The judge compares with a reference: a row that nothing else verifies needs one."""
    bare = [row["row"] for row in rows if row.get("solution") is None]
    if only_judge and len(bare) == len(rows):
        raise UserError("--judge: no row has a solution to compare an answer with")
    if bare:
        say(f"judge: {listed(bare)} without a solution cannot be judged")
