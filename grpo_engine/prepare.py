"""Everything a run needs, loaded and checked before anything is written: each mistake of the user's
is found here, as one ``UserError`` line."""

from __future__ import annotations

import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from grpo_engine.config import GRPOConfig, build_config, load_yaml
from grpo_engine.data import check_prompt_lengths, load_rows, without_overlap
from grpo_engine.generation.hf import HFGenerator
from grpo_engine.grpo import GRPORun
from grpo_engine.held_out import HeldOut
from grpo_engine.kernels import make_loss_options
from grpo_engine.manifest import rows_sha256, weights_sha256
from grpo_engine.policy import Policy
from grpo_engine.rewards import RewardPool, RewardSpec
from grpo_engine.rollouts import Prompt
from grpo_engine.templates import render_prompt
from grpo_engine.types import UserError

# Fields that may change between a run and its continuation; another change would be another run.
RESUMABLE_FIELDS = {
    "output_dir",
    "max_steps",
    "save_steps",
    "save_total_limit",
    "log_completions_steps",
    "eval_steps",
    "reward_workers",
    "reward_timeout",
    "max_tokens_per_microbatch",
    "generation_batch_size",
    "device",
}
RUN_FILES = ("config.yaml", "metrics.jsonl", "manifest.json", "report.html", "completions")


def check_output_dir(folder: Path, *, resuming: bool, overwrite: bool) -> None:
    """Refuse to write over another run, and fail now rather than at the first checkpoint if the
    folder cannot be written to. Leaves nothing behind."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: exists and is not a folder")
    holds_run = any((folder / name).exists() for name in RUN_FILES) or any(
        folder.glob("checkpoint-*")
    )
    if holds_run and not resuming and not overwrite:
        raise UserError(
            f"--output_dir {folder}: already holds a run; continue it with --resume, or replace it "
            "with --overwrite"
        )
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"--output_dir {folder}: not writable ({error.strerror})") from error
    finally:
        for path in made:
            if path.is_dir():
                path.rmdir()


def clear_run(folder: Path) -> None:
    """Remove an earlier run's files (and nothing else) from ``folder``."""
    for path in [folder / name for name in RUN_FILES] + list(folder.glob("checkpoint-*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def load_prompts(config: GRPOConfig, tokenizer: Any, rows: list[dict[str, Any]]) -> list[Prompt]:
    prompts = []
    for row in rows:
        text = render_prompt(
            row,
            config.prompt_template,
            tokenizer,
            system_prompt=config.system_prompt,
            suffix=config.prompt_suffix,
            few_shot=config.few_shot,
            response_prefix=config.response_prefix,
        )
        # A template is the whole prompt: the tokenizer's own special tokens come only with "none".
        ids = tokenizer(text, add_special_tokens=config.prompt_template == "none")["input_ids"]
        prompts.append(Prompt(row=row, text=text, token_ids=ids))
    lengths = [len(prompt.token_ids) for prompt in prompts]
    kept = check_prompt_lengths(lengths, config.max_prompt_length, policy=config.long_prompts)
    if len(kept) < len(prompts):
        say(
            f"{len(prompts) - len(kept)} prompts are longer than max_prompt_length and are left out"
        )
    return [prompts[index] for index in kept]


def load_data(config: GRPOConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training rows and held-out rows (none without ``eval_dataset``), no prompt in common."""
    columns = {"prompt_column": config.prompt_column, "solution_column": config.solution_column}
    rows = load_rows(
        config.dataset,
        args=config.dataset_args,
        split=config.dataset_split,
        limit=config.dataset_limit,
        **columns,
    )
    if not config.eval_dataset:
        return rows, []
    held_out = load_rows(
        config.eval_dataset,
        args=config.eval_dataset_args,
        split=config.eval_dataset_split,
        limit=config.eval_limit,
        **columns,
    )
    rows, dropped = without_overlap(rows, held_out)
    if dropped:
        say(f"{dropped} training rows have a held-out prompt and are left out")
    return rows, held_out


def check_columns(pool: RewardPool, rows: list[dict[str, Any]]) -> None:
    for spec, required in zip(pool.rewards, pool.required_columns, strict=True):
        for name in required:
            for number, row in enumerate(rows, start=1):
                if row.get(name) is None:
                    raise UserError(
                        f"reward {spec.name!r} needs the column {name!r}; row {number} has "
                        f"{', '.join(sorted(k for k, v in row.items() if v is not None))}"
                    )


def check_context(config: GRPOConfig, policy: Policy) -> None:
    """Prompt and completion must fit the model's positions."""
    longest = max(config.completion_caps().values())
    limit = getattr(policy.text_config, "max_position_embeddings", None)
    if limit is not None and config.max_prompt_length + longest > limit:
        raise UserError(
            f"--max_completion_length {longest}: with max_prompt_length {config.max_prompt_length} "
            f"it passes the {limit} positions of {config.model}"
        )


def load_policy(config: GRPOConfig, source: str) -> Policy:
    return Policy.load(
        source,
        device=config.device,
        attention=config.attention,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def reference_policy(config: GRPOConfig, policy: Policy, checkpoint: Path | None) -> Policy | None:
    """The frozen policy of the KL term: the weights the run began with. A checkpoint brings later
    ones."""
    if not config.beta:
        return None
    return (policy if checkpoint is None else load_policy(config, config.model)).frozen_copy()


def reward_spec(config: GRPOConfig, function: str, weight: float = 1.0) -> RewardSpec:
    """The built-in rewards must know when the prompt has already opened the think tag."""
    opened = "<think>" in (config.response_prefix or "")
    if opened and function in ("accuracy", "format", "reasoning_gym"):
        return RewardSpec.named(function, weight, thinking_prefilled=True)
    return RewardSpec.named(function, weight)


def reward_pool(config: GRPOConfig, specs: list[RewardSpec], workers: int) -> RewardPool:
    return RewardPool(
        specs,
        num_workers=workers,
        timeout_s=config.reward_timeout,
        max_error_rate=config.max_reward_error_rate,
    )


def say(words: str) -> None:
    print(f"grpo-engine: {words}", file=sys.stderr)


def saved_config(folder: str) -> dict[str, Any]:
    """The resolved configuration of the run (or checkpoint) in ``folder``."""
    path = Path(folder)
    if path.name.startswith("checkpoint-"):
        path = path.parent
    if not (path / "config.yaml").is_file():
        raise UserError(f"--resume {folder}: there is no config.yaml of a run in {path}")
    return load_yaml(str(path / "config.yaml"))


def check_resumable(config: GRPOConfig, folder: Path) -> None:
    """A run continues only as itself: fields that change what it computes must be as they were."""
    saved = build_config(saved_config(str(folder))).model_dump()
    for name, value in config.model_dump().items():
        if name not in RESUMABLE_FIELDS and saved[name] != value:
            raise UserError(
                f"--{name} {value!r}: the run in {folder} was started with {saved[name]!r}; "
                "resume with that, or start a new run in another output_dir"
            )


def check_loss_options(config: GRPOConfig) -> None:
    """Contradictory loss options are an input error now, not an exception in the first step."""
    try:
        make_loss_options(
            loss_type=config.loss_type,
            importance_level=config.importance_sampling_level,
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
            delta=config.delta,
            beta=config.beta,
            kl_estimator=config.kl_estimator,
            kl_bias_correction=config.use_bias_correction_kl,
            is_correction=config.is_correction,
            is_clip=config.is_clip,
            entropy_coef=config.entropy_coef,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def build_run(
    config: GRPOConfig, checkpoint: Path | None, stack: ExitStack
) -> tuple[GRPORun, HeldOut | None, dict[str, Any]]:
    """Load model, data and rewards; everything the user can have wrong is found here."""
    policy = load_policy(config, str(checkpoint) if checkpoint else config.model)
    rows, eval_rows = load_data(config)
    sources = {"dataset": (config.dataset, rows), "eval_dataset": (config.eval_dataset, eval_rows)}
    inputs = {"model": {"path": config.model, "weights_sha256": weights_sha256(policy.model)}} | {
        name: {"source": source, "rows": len(some), "sha256": rows_sha256(some)}
        for name, (source, some) in sources.items()
        if some
    }
    prompts = load_prompts(config, policy.tokenizer, rows)
    specs = [
        reward_spec(config, function, weight)
        for function, weight in zip(config.reward_funcs, config.weights, strict=True)
    ]
    pool = stack.enter_context(reward_pool(config, specs, config.reward_workers))
    check_columns(pool, rows)
    held_out = None
    if eval_rows:
        known = config.eval_reward in [spec.name for spec in specs]
        judge = (
            pool
            if known
            else stack.enter_context(
                reward_pool(config, [reward_spec(config, config.eval_reward)], 1)
            )
        )
        check_columns(judge, eval_rows)
        held_out = HeldOut(config, load_prompts(config, policy.tokenizer, eval_rows), judge)
    check_context(config, policy)
    generator = HFGenerator(policy, max_batch_size=config.generation_batch_size)
    stack.callback(generator.close)
    run = GRPORun(
        config, policy, reference_policy(config, policy, checkpoint), generator, pool, prompts
    )
    if checkpoint is not None:
        run.read_checkpoint(checkpoint)
    return run, held_out, inputs
