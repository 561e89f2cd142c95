"""The fields of a GRPO run, on top of those of any training run (``settings``). A leaf."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from grpo_engine import settings
from grpo_engine.settings import PromptConfig, SamplerConfig, TrainConfig

# Rewards that a saved reward model gives, and the fields that name and scale it.
MODEL_REWARDS = ("helpful", "safety")
Scale = Literal["raw", "standardised", "probability"]


class RowSource(BaseModel):
    """One of several data sources. ``domain`` is that of rows without one in ``domain_column``."""

    model_config = ConfigDict(extra="forbid")

    source: str
    args: dict[str, Any] = {}
    split: str | None = None
    limit: int | None = Field(None, ge=1)
    prompt_column: str = "prompt"
    domain: str | None = None
    domain_column: str = "domain"


class GRPOConfig(PromptConfig, SamplerConfig, TrainConfig):
    """Everything a GRPO run depends on; the resolved copy is saved as ``config.yaml``."""

    stage: ClassVar[str] = "grpo"
    output_dir: str = Field("runs/grpo", description="the run's folder")

    # --- what to train on -----------------------------------------------------------------------
    dataset: str = Field(
        "reasoning_gym:chain_sum", description=TrainConfig.model_fields["dataset"].description
    )
    solution_column: str = Field("solution", description="column that holds the ground truth")
    long_prompts: Literal["error", "skip"] = Field(
        "error", description="rows whose prompt exceeds max_prompt_length"
    )
    reward_funcs: list[str] = Field(
        ["accuracy", "format"],
        min_length=1,
        description="built-in names, module:function, or file.py:function",
    )
    reward_weights: list[float] | None = Field(
        None, description="one weight a reward function; default 1 each (the paper's plain sum)"
    )
    reward_args: dict[str, dict[str, Any]] = Field(
        {},
        description="arguments of reward functions, by name, such as {judge: {chat_model: ...}}",
    )
    batched_reward_funcs: list[str] = Field(
        [],
        description="those of reward_funcs (TRL signature) that compare completions with each "
        "other: one call for a whole rollout, within reward_timeout",
    )

    # --- all scenarios (see grpo_engine.scenarios) ------------------------------------------------
    reward_domains: dict[str, list[str]] = Field(
        {},
        description="{reward: domains of the rows it applies to}; one that is not named applies to "
        "all rows",
    )
    dataset_domain: str | None = Field(
        None, description="domain of the rows of dataset that name none"
    )
    general_dataset: list[RowSource] = Field(
        [],
        description="sources of general prompts: {source, args, split, limit, prompt_column, "
        "domain, domain_column}; their rows count alike",
    )
    general_eval_dataset: list[RowSource] = Field(
        [],
        description="held-out general prompts, likewise; the reward models' mean scores of the "
        "answers are eval/helpful and eval/safety",
    )
    general_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of a rollout's prompts that are general, once they join (the paper does "
        "not report it; of its RL prompts 78K are general, 80K reasoning)",
    )
    preference_steps: int | None = Field(
        None,
        ge=1,
        description="general prompts, and with them the rewards of preference, only in the last K "
        "steps (paper: 400 of 1,700); null = in all",
    )
    helpful_model: str | None = Field(
        None, description="folder of the reward model behind the reward 'helpful'"
    )
    safety_model: str | None = Field(
        None, description="folder of the reward model behind the reward 'safety'"
    )
    helpful_scale: Scale | None = Field(
        None, description="scale of the scores; null = as saved with the model (not in the paper)"
    )
    safety_scale: Scale | None = Field(None, description="likewise")

    # --- rollout --------------------------------------------------------------------------------
    prompts_per_generation: int = Field(
        512, ge=1, description="prompts sampled per rollout (paper: 512)"
    )
    num_generations: int = Field(16, description="outputs per prompt, G (paper: 16)")
    max_prompt_length: int = Field(1024, ge=1, description="tokens")
    max_completion_length: int | dict[int, int] = Field(
        32768,
        description="tokens; {step: cap} raises it during the run (paper: {0: 32768, 8200: 65536})",
    )
    temperature: float = Field(
        1.0, description="sampling temperature, also of the training log-probs"
    )
    top_p: float = Field(
        1.0,
        description="below 1, and with top_k, all log-probs and the entropy are over the ids that "
        "a token was drawn from",
    )
    top_k: int = Field(0, ge=0, description="0 = all")
    generation_batch_size: int = Field(512, ge=1, description="most sequences decoded at once")
    generation_batch_tokens: int = Field(
        1_048_576,
        ge=1,
        description="most tokens (prompts + caps) the sampler's cache may hold (hf)",
    )
    rollouts_ahead: int = Field(
        0,
        ge=0,
        le=1,
        description="1: the engine samples the next rollout while the policy learns from this one, "
        "so each is sampled by weights one rollout old (generator vllm)",
    )

    # --- update ---------------------------------------------------------------------------------
    max_steps: int = Field(10_400, ge=1, description="optimiser steps (paper: 10,400)")
    steps_per_generation: int = Field(
        16, ge=1, description="mini-batches a rollout is randomly split into (paper: 16)"
    )
    num_iterations: int = Field(1, ge=1, description="passes over each rollout (paper: 1)")

    # --- loss (see grpo_engine.kernels.grpo_loss) ------------------------------------------------
    loss_type: Literal[
        "grpo", "dr_grpo", "dapo", "bnpo", "luspo", "cispo", "sapo", "vespo", "gspo"
    ] = "grpo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    epsilon: float = Field(0.2, gt=0)
    epsilon_high: float | None = Field(None, gt=0)
    delta: float | None = Field(None, gt=0)
    beta: float = Field(0.001, ge=0, description="KL coefficient (paper: 0.001)")
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    use_bias_correction_kl: bool = False
    entropy_coef: float = 0.0
    sapo_temperature_pos: float = Field(1.0, gt=0, description="loss sapo, advantage > 0")
    sapo_temperature_neg: float = Field(1.05, gt=0, description="loss sapo, advantage <= 0")
    vespo_k_pos: float = Field(
        2.0, ge=0, description="loss vespo, advantage >= 0: damps sequence ratios below 1"
    )
    vespo_lambda_pos: float = Field(
        3.0, ge=1e-4, description="loss vespo, advantage >= 0: damps sequence ratios above 1"
    )
    vespo_k_neg: float = Field(3.0, ge=0, description="loss vespo, advantage < 0")
    vespo_lambda_neg: float = Field(2.0, ge=1e-4, description="loss vespo, advantage < 0")
    scale_rewards: Literal["group", "batch", "none"] = "group"
    old_logprobs: Literal["recompute", "sampler"] = Field(
        "recompute",
        description="log-probs the ratio is taken against when a rollout gets more than one step",
    )
    is_correction: (
        Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None
    ) = None
    is_clip: tuple[float, float] = (0.0, 2.0)
    mask_truncated_completions: bool = Field(
        False, description="give completions cut by the cap no loss"
    )
    sparse_delta: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="drop at most this share of each token's probability from the head's gradient "
        "(certified sparse backward: cheaper where the policy is sure of itself); null = exact",
    )
    sparse_max_entries: int = Field(
        64, ge=1, le=128, description="a token that needs more entries than this is done exactly"
    )
    ref_model_sync_steps: int | None = Field(
        400, ge=1, description="replace the reference by the policy every K steps; null = never"
    )

    # --- reward workers -------------------------------------------------------------------------
    reward_workers: int = Field(2, ge=1)
    reward_timeout: float = Field(
        10.0, gt=0, description="seconds for one completion and one reward function"
    )
    max_reward_error_rate: float = Field(
        0.5, ge=0, le=1, description="share of failed reward calls in a rollout that stops the run"
    )

    # --- the run's folder -----------------------------------------------------------------------
    log_completions_steps: int = Field(10, ge=1)
    eval_temperature: float = 1.0
    eval_top_p: float = 1.0
    eval_reward: str = Field(
        "accuracy", description="the reward function whose mean is eval/accuracy"
    )

    RESUMABLE_FIELDS: ClassVar[frozenset[str]] = TrainConfig.RESUMABLE_FIELDS | {
        *("log_completions_steps", "generation_batch_size"),
        *("reward_workers", "reward_timeout", "max_reward_error_rate"),
        *SamplerConfig.model_fields,
    }

    def _problems(self) -> Iterator[str]:
        yield from self._sampling_problems()
        yield from self._batch_problems()
        yield from super()._problems()
        yield from self._loss_problems()
        yield from self._scenario_problems()

    def _sampling_problems(self) -> Iterator[str]:
        if self.num_generations < 2:
            yield (
                f"num_generations={self.num_generations}: must be >= 2; a group of one has no "
                "baseline, its advantage is always 0"
            )
        for name in ("temperature", "eval_temperature"):
            value = getattr(self, name)
            if not value > 0:
                yield f"{name}={value}: must be > 0; at 0 all answers are equal, without advantage"
        for name in ("top_p", "eval_top_p"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                yield f"{name}={value}: must be in (0, 1]"
        if self.rollouts_ahead:
            yield from self._ahead_problems()

    def _ahead_problems(self) -> Iterator[str]:
        if self.generator == "hf":
            yield (
                "rollouts_ahead=1: generator 'hf' samples with the weights that are being trained, "
                "so it cannot do so meanwhile; it needs generator 'vllm'"
            )
        if self.vllm_enable_sleep_mode:
            yield "rollouts_ahead=1: an engine that samples meanwhile cannot sleep"
        if self.is_correction is None and self.old_logprobs == "recompute":
            yield (
                "rollouts_ahead=1: the tokens come from older weights; is_correction or "
                "old_logprobs='sampler' must allow for that"
            )

    def _batch_problems(self) -> Iterator[str]:
        outputs = self.prompts_per_generation * self.num_generations
        if outputs % self.steps_per_generation:
            yield (
                f"steps_per_generation={self.steps_per_generation}: does not divide the {outputs} "
                f"outputs of a rollout (prompts_per_generation {self.prompts_per_generation} x "
                f"num_generations {self.num_generations})"
            )
        caps = self.completion_caps()
        if 0 not in caps:
            yield f"max_completion_length={caps}: the schedule needs an entry for step 0"
        if min(caps.values()) < 1:
            yield f"max_completion_length={self.max_completion_length}: must be >= 1"
        longest = self.max_prompt_length + max(caps.values())
        if longest > self.max_tokens_per_microbatch:
            yield (
                f"max_tokens_per_microbatch={self.max_tokens_per_microbatch}: one sequence may "
                f"have {longest} tokens (max_prompt_length + max_completion_length)"
            )

    def _loss_problems(self) -> Iterator[str]:
        weights, every = self.reward_weights, self.ref_model_sync_steps
        if weights is not None and len(weights) != len(self.reward_funcs):
            yield (
                f"reward_weights={weights}: {len(weights)} weights for "
                f"{len(self.reward_funcs)} reward_funcs"
            )
        for name in self.reward_args:
            if name in MODEL_REWARDS:
                yield f"reward_args: {name!r} is a reward model and takes none"
            functions = (*self.reward_funcs, self.eval_reward)
            if name not in functions and name not in [f.rpartition(":")[2] for f in functions]:
                yield f"reward_args: {name!r} is not among reward_funcs {self.reward_funcs}"
        for name in self.batched_reward_funcs:
            if name not in self.reward_funcs:
                yield (
                    f"batched_reward_funcs={self.batched_reward_funcs}: {name!r} is not among "
                    f"reward_funcs {self.reward_funcs}"
                )
        if every and self.beta and every % self.updates_per_rollout:
            yield (
                f"ref_model_sync_steps={every}: must be a multiple of the "
                f"{self.updates_per_rollout} steps of a rollout (steps_per_generation x "
                "num_iterations), so that one rollout has one reference"
            )
        if self.sparse_delta is None and self.sparse_max_entries != 64:
            yield (
                f"sparse_max_entries={self.sparse_max_entries}: has no meaning without sparse_delta"
            )
        if self.is_correction and self.old_logprobs == "sampler":
            yield (
                f"is_correction={self.is_correction!r}: compares old_logprobs with the sampler's, "
                "so it needs old_logprobs='recompute'"
            )

    def _scenario_problems(self) -> Iterator[str]:
        for name in MODEL_REWARDS:
            model = getattr(self, f"{name}_model")
            if name in self.reward_funcs and model is None:
                yield f"reward_funcs={self.reward_funcs}: {name!r} needs --{name}_model"
            if name not in self.reward_funcs:
                for field in (f"{name}_model", f"{name}_scale"):
                    if getattr(self, field) is not None:
                        yield f"{field}={getattr(self, field)!r}: {name!r} is not in reward_funcs"
        if self.eval_reward in MODEL_REWARDS:
            yield f"eval_reward={self.eval_reward!r}: a reward model is no measure of accuracy"
        for name, domains in self.reward_domains.items():
            if not domains or len(set(domains)) < len(domains):
                yield f"reward_domains: {name}: {domains}: wanted some domains, each once"
        if self.general_dataset and not self.reward_domains:
            yield "general_dataset: needs reward_domains, to say which rewards its rows get"
        if self.dataset_domain is not None and not self.reward_domains:
            yield f"dataset_domain={self.dataset_domain!r}: has no meaning without reward_domains"
        if self.general_eval_dataset and not (self.eval_dataset and self.general_dataset):
            yield "general_eval_dataset: needs eval_dataset and general_dataset"
        for name in ("general_share", "preference_steps"):
            value = getattr(self, name)
            if not self.general_dataset and value != type(self).model_fields[name].default:
                yield f"{name}={value}: has no meaning without general_dataset"

    @property
    def length_is_fixed(self) -> bool:
        """The last ``preference_steps`` are counted from the end too."""
        return super().length_is_fixed or self.preference_steps is not None

    def completion_caps(self) -> dict[int, int]:
        cap = self.max_completion_length
        return cap if isinstance(cap, dict) else {0: cap}

    def completion_cap(self, step: int) -> int:
        """``max_completion_length`` in force at ``step``."""
        caps = self.completion_caps()
        return caps[max(s for s in caps if s <= step)]

    def loss_options(self) -> dict[str, Any]:
        """The options of ``grpo_engine.kernels.grpo_loss``, under its names."""
        return {
            "loss_type": self.loss_type,
            "importance_level": self.importance_sampling_level,
            "epsilon": self.epsilon,
            "epsilon_high": self.epsilon_high,
            "delta": self.delta,
            "beta": self.beta,
            "kl_estimator": self.kl_estimator,
            "kl_bias_correction": self.use_bias_correction_kl,
            "is_correction": self.is_correction,
            "is_clip": self.is_clip,
            "entropy_coef": self.entropy_coef,
            "sapo_temperature_pos": self.sapo_temperature_pos,
            "sapo_temperature_neg": self.sapo_temperature_neg,
            "vespo_k_pos": self.vespo_k_pos,
            "vespo_lambda_pos": self.vespo_lambda_pos,
            "vespo_k_neg": self.vespo_k_neg,
            "vespo_lambda_neg": self.vespo_lambda_neg,
        }

    @property
    def updates_per_rollout(self) -> int:
        return self.steps_per_generation * self.num_iterations

    @property
    def weights(self) -> list[float]:
        return self.reward_weights or [1.0] * len(self.reward_funcs)


def build_config(values: dict[str, Any]) -> GRPOConfig:
    """The configuration of a GRPO run, validated. See ``settings.build_config``."""
    return settings.build_config(values, GRPOConfig)
