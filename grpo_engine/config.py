"""Configuration: one flat set of typed fields, from a recipe or YAML file, overridden by flags.

Names follow TRL where TRL has one. A wrong field or value raises ``UserError`` with one line that
names the field and the value. A leaf of the engine: imports only ``types``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from grpo_engine.types import UserError


class GRPOConfig(BaseModel):
    """Everything a GRPO run depends on; the resolved copy is saved as ``config.yaml``."""

    model_config = ConfigDict(
        extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    # --- what to train on -----------------------------------------------------------------------
    model: str = Field(
        "miniature",
        description="local folder, Hugging Face id, or 'miniature' / 'smollm2-135m-instruct'",
    )
    dataset: str = Field(
        "reasoning_gym:chain_sum",
        description="*.jsonl, *.parquet, Hugging Face id or folder, or reasoning_gym:<task>",
    )
    dataset_args: dict[str, Any] = Field(
        {}, description="arguments of the data source (reasoning_gym: seed, size, task options)"
    )
    dataset_split: str | None = Field(None, description="split of a Hugging Face dataset")
    dataset_limit: int | None = Field(None, ge=1, description="use only the first rows")
    prompt_column: str = Field(
        "prompt", description="column that holds the prompt (text or messages)"
    )
    solution_column: str = Field("solution", description="column that holds the ground truth")
    prompt_template: Literal["r1-zero", "chat", "none"] = Field(
        "r1-zero", description="how a row becomes the model's prompt"
    )
    system_prompt: str | None = Field(None, description="system message (template 'chat')")
    prompt_suffix: str | None = Field(
        None, description="text put behind every question (template 'chat')"
    )
    few_shot: list[dict[str, str]] = Field(
        [], description="{prompt, completion} examples shown as earlier turns (template 'chat')"
    )
    response_prefix: str | None = Field(
        None, description="text every answer is made to begin with, such as '<think>'"
    )
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

    batched_reward_funcs: list[str] = Field(
        [],
        description="those of reward_funcs (TRL signature) that compare completions with each "
        "other: one call for a whole rollout, within reward_timeout",
    )

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
    top_p: float = Field(1.0)
    top_k: int = Field(0, ge=0, description="0 = all")
    generation_batch_size: int = Field(512, ge=1, description="most sequences decoded at once")
    generation_batch_tokens: int = Field(
        1_048_576, ge=1, description="most tokens (prompts + caps) the sampler's cache may hold"
    )

    # --- update ---------------------------------------------------------------------------------
    max_steps: int = Field(10_400, ge=1, description="optimiser steps (paper: 10,400)")
    steps_per_generation: int = Field(
        16, ge=1, description="mini-batches a rollout is randomly split into (paper: 16)"
    )
    num_iterations: int = Field(1, ge=1, description="passes over each rollout (paper: 1)")
    max_tokens_per_microbatch: int = Field(
        40960, ge=1, description="packed tokens per forward pass"
    )
    learning_rate: float = Field(3e-6, gt=0)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    min_learning_rate: float = Field(0.0, ge=0, description="end of the linear / cosine schedule")
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)

    # --- LoRA (needs peft) ----------------------------------------------------------------------
    lora_r: int | None = Field(
        None, ge=1, description="rank of an adapter trained in place of the weights; null = none"
    )
    lora_alpha: int | None = Field(
        None, ge=1, description="the adapter counts lora_alpha / lora_r; default 2 x lora_r"
    )
    lora_target_modules: str | list[str] = Field(
        "all-linear", description="layers with an adapter: all-linear (but the head), or names"
    )

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
    ref_model_sync_steps: int | None = Field(
        400, ge=1, description="replace the reference by the policy every K steps; null = never"
    )

    # --- machine --------------------------------------------------------------------------------
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 ...")
    bf16: bool = Field(False, description="bf16 autocast over fp32 weights")
    attention: Literal["auto", "torch", "flash-attn", "buckets"] = Field(
        "auto",
        description="packed attention: torch varlen or flash-attn on CUDA, length buckets on CPU",
    )
    gradient_checkpointing: bool = False
    reward_workers: int = Field(2, ge=1)
    reward_timeout: float = Field(
        10.0, gt=0, description="seconds for one completion and one reward function"
    )
    max_reward_error_rate: float = Field(
        0.5, ge=0, le=1, description="share of failed reward calls in a rollout that stops the run"
    )

    # --- the run's folder -----------------------------------------------------------------------
    output_dir: str = "runs/grpo"
    seed: int = Field(0, ge=0)
    save_steps: int = Field(100, ge=1)
    save_total_limit: int = Field(2, ge=1)
    log_completions_steps: int = Field(10, ge=1)
    eval_dataset: str | None = Field(None, description="held-out rows; null = no evaluation")
    eval_dataset_args: dict[str, Any] = Field({})
    eval_dataset_split: str | None = None
    eval_limit: int | None = Field(200, ge=1)
    eval_steps: int = Field(50, ge=1)
    eval_temperature: float = 1.0
    eval_top_p: float = 1.0
    eval_reward: str = Field(
        "accuracy", description="the reward function whose mean is eval/accuracy"
    )

    @model_validator(mode="after")
    def _consistent(self) -> GRPOConfig:
        for problems in (
            self._sampling_problems,
            self._batch_problems,
            self._lora_problems,
            self._loss_problems,
        ):
            for problem in problems():
                raise ValueError(problem)
        return self

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

        truncated = self.top_p < 1 or self.top_k > 0
        if truncated and self.old_logprobs == "sampler" and self.updates_per_rollout > 1:
            yield (
                f"old_logprobs='sampler': with top_p={self.top_p}, top_k={self.top_k} the "
                "sampler's log-probs are of a truncated distribution, the trainer's are not; "
                "use 'recompute'"
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

    def _lora_problems(self) -> Iterator[str]:
        if self.lora_r is None:
            for name in ("lora_alpha", "lora_target_modules"):
                value = getattr(self, name)
                if value != type(self).model_fields[name].default:
                    yield f"{name}={value!r}: has no meaning without lora_r"

    def _loss_problems(self) -> Iterator[str]:
        weights, every = self.reward_weights, self.ref_model_sync_steps
        if weights is not None and len(weights) != len(self.reward_funcs):
            yield (
                f"reward_weights={weights}: {len(weights)} weights for "
                f"{len(self.reward_funcs)} reward_funcs"
            )
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
        if self.is_correction and self.old_logprobs == "sampler":
            yield (
                f"is_correction={self.is_correction!r}: compares old_logprobs with the sampler's, "
                "so it needs old_logprobs='recompute'"
            )
        if self.lr_scheduler_type == "constant" and self.min_learning_rate:
            yield (
                f"min_learning_rate={self.min_learning_rate}: has no meaning with "
                "lr_scheduler_type='constant'"
            )

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


def recipe_names() -> list[str]:
    folder = resources.files("grpo_engine") / "recipes"
    return sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )


def load_recipe(name: str) -> dict[str, Any]:
    path = resources.files("grpo_engine") / "recipes" / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"--recipe {name}: no such recipe; there are {', '.join(recipe_names())}")
    return _parse_yaml(path.read_text(encoding="utf-8"), f"recipe {name}")


def load_yaml(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({error})") from error
    return _parse_yaml(text, f"--config {path}")


def _parse_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{where}: must hold 'field: value' lines, found {type(values).__name__}")
    return values


def apply_overrides(values: dict[str, Any], overrides: list[tuple[str, str]]) -> dict[str, Any]:
    """Lay ``--field value`` pairs over ``values``; ``a.b`` reaches into a mapping; values are
    YAML."""
    merged = dict(values)
    for name, text in overrides:
        try:
            value = text if _is_text(name) and text != "null" else yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(
                f"--{name} {text}: not a valid value ({' '.join(str(error).split())})"
            ) from error
        head, _, rest = name.partition(".")
        if rest:
            inner = merged.get(head) or {}
            if not isinstance(inner, dict):
                raise UserError(
                    f"--{name} {text}: {head} is {inner!r}, which has no field {rest!r}"
                )
            merged[head] = {**inner, rest: value}
        else:
            merged[head] = value
    return merged


def _is_text(name: str) -> bool:
    """Whether the field holds text, which YAML would turn into a date or a number."""
    field = GRPOConfig.model_fields.get(name)
    return field is not None and field.annotation in (str, str | None)


def build_config(values: dict[str, Any]) -> GRPOConfig:
    """Validate; every problem becomes one ``UserError`` line naming field and value."""
    fields = GRPOConfig.model_fields
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"--{name} {values[name]!r}: unknown field{hint}")
    try:
        return GRPOConfig(**values)
    except ValidationError as error:
        first, *others = error.errors()
        field = str(first["loc"][0]) if first["loc"] else ""
        message = first["msg"].removeprefix("Value error, ")
        line = f"--{field} {first['input']!r}: {message}" if field else message
        more = f" (and {len(others)} more)" if others else ""
        raise UserError(line + more) from error


def config_text(config: GRPOConfig) -> str:
    """The resolved configuration as YAML; ``build_config`` reads it back the same."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
