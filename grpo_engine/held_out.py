"""Held-out accuracy during a run, and what the reward models say of held-out general prompts."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from grpo_engine.config import GRPOConfig
from grpo_engine.grpo import GRPORun
from grpo_engine.rewards import RewardPool
from grpo_engine.rollouts import Prompt, sample_rollouts, score_rollouts
from grpo_engine.scoring import ModelReward
from grpo_engine.types import Rollout, SamplingParams


class HeldOut:
    """Accuracy on problems the policy is not trained on: the same problems and seeds every time.

    ``general`` prompts are answered too, and scored by ``models``.
    """

    def __init__(
        self,
        config: GRPOConfig,
        prompts: list[Prompt],
        pool: RewardPool,
        reward: str,
        *,
        general: Sequence[Prompt] = (),
        models: Sequence[ModelReward] = (),
    ) -> None:
        self.config, self.prompts, self.pool, self.reward = config, prompts, pool, reward
        self.general, self.models = general, models

    def evaluate(self, run: GRPORun) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """({"eval/accuracy", ...}, one row per problem). A problem whose reward could not be
        computed has ``correct`` None and is left out of the mean. ``eval/<name>`` is the mean score
        of a reward model on the general prompts of its domains."""
        config = self.config
        scores: dict[str, float] = {}
        run.sync_generator()
        with run.watch.phase("eval"):
            rollouts = self._answers(run, self.prompts, "eval")
            correct = score_rollouts(self.pool, rollouts).scores[self.reward]
            if self.general:
                general = self._answers(run, self.general, "general eval")
                lengths = [len(one.completion_ids) for one in general]
                scores["eval/general/mean_length"] = fmean(lengths)
                scores["eval/general/num_answers"] = float(len(lengths))
                for model in self.models:
                    found = model.report(general).scores[model.spec.name]
                    given = [score for score in found if score is not None]
                    if given:
                        scores[f"eval/{model.spec.name}"] = fmean(given)
        known = [c for c in correct if c is not None]
        lengths = [len(r.completion_ids) for r in rollouts]
        cut = [r.finish_reason == "length" for r in rollouts]
        metrics = {
            "eval/mean_length": sum(lengths) / len(lengths),
            "eval/clipped_ratio": sum(cut) / len(cut),
            "eval/num_samples": float(len(known)),
            "eval/num_answers": float(len(rollouts)),
            **scores,
        }
        if known:
            metrics["eval/accuracy"] = sum(known) / len(known)
        samples = [
            {
                "index": index,
                "prompt": r.prompt,
                "completion": r.completion,
                "correct": score,
                "finish_reason": r.finish_reason,
                "length": length,
                "solution": r.row.get(config.solution_column),
            }
            for index, (r, score, length) in enumerate(zip(rollouts, correct, lengths, strict=True))
        ]
        return metrics, samples

    def _answers(self, run: GRPORun, prompts: Sequence[Prompt], purpose: str) -> list[Rollout]:
        config = self.config
        sampling = SamplingParams(
            max_completion_length=config.completion_cap(run.step),
            temperature=config.eval_temperature,
            top_p=config.eval_top_p,
        )
        with run.autocast():
            return sample_rollouts(
                run.generator,
                run.policy.tokenizer,
                prompts,
                1,
                sampling,
                (config.seed, purpose),
            )
