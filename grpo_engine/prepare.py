"""Everything a run needs, loaded and checked before anything is written: each mistake of the user's
is found here, as one ``UserError`` line."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_engine.config import GRPOConfig, build_config, load_yaml
from grpo_engine.data import check_prompt_lengths, load_rows, without_overlap
from grpo_engine.generation.hf import HFGenerator
from grpo_engine.grpo import GRPORun
from grpo_engine.held_out import HeldOut
from grpo_engine.kernels import make_loss_options
from grpo_engine.lora import LoraOptions
from grpo_engine.manifest import rows_sha256, weights_sha256
from grpo_engine.policy import Policy
from grpo_engine.rewards import BUILT_IN, RewardPool, RewardSpec, unusable_solutions
from grpo_engine.rewards.sandbox import find_sandbox
from grpo_engine.rewards.sandbox_run import SandboxError
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
    "max_reward_error_rate",
    "max_tokens_per_microbatch",
    "generation_batch_size",
    "device",
}
RUN_FILES = ("config.yaml", "metrics.jsonl", "manifest.json", "report.html", "completions")


def check_output_dir(config: GRPOConfig, *, resuming: bool, overwrite: bool) -> None:
    """Refuse to write over another run or to delete an input, and fail now rather than at the first
    checkpoint if the folder cannot be written to. Leaves nothing behind."""
    folder = Path(config.output_dir)
    made: list[Path] = []
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output_dir {folder}: exists and is not a folder")
        files = run_files(folder)
        if files and not resuming and not overwrite:
            raise UserError(
                f"--output_dir {folder}: already holds a run; continue it with --resume, or "
                "replace it with --overwrite"
            )
        for name in ("model", "dataset", "eval_dataset") if overwrite else ():
            source = Path(getattr(config, name) or "").expanduser().resolve()
            if any(source.is_relative_to(file.resolve()) for file in files):
                raise UserError(f"--overwrite: would delete --{name} {getattr(config, name)}")
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"--output_dir {folder}: not writable ({error.strerror})") from error
    finally:
        for path in made:
            if path.is_dir():
                path.rmdir()


def run_files(folder: Path) -> list[Path]:
    """What a run has left in ``folder``."""
    found = [folder / name for name in RUN_FILES if (folder / name).exists()]
    return found + sorted(folder.glob("checkpoint-*"))


def clear_run(folder: Path) -> None:
    """Remove an earlier run's files (and nothing else) from ``folder``."""
    for path in run_files(folder):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


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
        # A chat template writes the special tokens itself; otherwise the tokenizer adds its own.
        ids = tokenizer(text, add_special_tokens=config.prompt_template != "chat")["input_ids"]
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


def check_rewards(pool: RewardPool, rows: list[dict[str, Any]]) -> None:
    """Every column a reward needs must be there, and every reference answer usable."""
    for spec, required in zip(pool.rewards, pool.required_columns, strict=True):
        for name in required:
            missing = [n for n, row in enumerate(rows, start=1) if row.get(name) is None]
            if len(missing) == len(rows):
                columns = sorted({key for row in rows for key in row})
                raise UserError(
                    f"reward {spec.name!r} needs the column {name!r}; "
                    f"the rows have {', '.join(columns)}"
                )
            if missing:
                say(
                    f"reward {spec.name!r}: {listed(missing)} without {name!r} get no score from it"
                )
        if spec.function == "accuracy":
            bad = [n + 1 for n in unusable_solutions([row.get("solution") for row in rows])]
            if len(bad) == len(rows):
                raise UserError(
                    f"reward 'accuracy': no row has a usable solution; row 1 has "
                    f"{rows[0].get('solution')!r:.80}"
                )
            if bad:
                say(f"reward 'accuracy': {listed(bad)} have a solution that cannot be read")


def listed(numbers: list[int]) -> str:
    """``3 rows (2, 5, 9)``, with at most five numbers."""
    shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return f"{len(numbers)} rows ({shown})"


def check_context(config: GRPOConfig, policy: Policy) -> None:
    """Prompt and completion must fit the model's positions."""
    longest = max(config.completion_caps().values())
    limit = getattr(policy.text_config, "max_position_embeddings", None)
    if limit is not None and config.max_prompt_length + longest > limit:
        raise UserError(
            f"--max_completion_length {longest}: with max_prompt_length {config.max_prompt_length} "
            f"it passes the {limit} positions of {config.model}"
        )


def load_policy(config: GRPOConfig, checkpoint: Path | None, *, trainable: bool = True) -> Policy:
    """The policy to train. A checkpoint of a LoRA run holds merged weights: its policy begins as
    the base again, and ``GRPORun.read_checkpoint`` loads the adapter."""
    lora = None
    if config.lora_r is not None:
        lora = LoraOptions(
            config.lora_r, config.lora_alpha, config.lora_target_modules, config.seed
        )
    return Policy.load(
        config.model if checkpoint is None or lora else str(checkpoint),
        device=config.device,
        attention=config.attention,
        gradient_checkpointing=config.gradient_checkpointing,
        trainable=trainable,
        lora=lora,
    )


def reference_policy(config: GRPOConfig, policy: Policy, checkpoint: Path | None) -> Policy | None:
    """The frozen policy of the KL term: the weights the run began with. A checkpoint brings later
    ones."""
    if not config.beta:
        return None
    if checkpoint is None or policy.adapter is not None:
        return policy.frozen_copy()
    return load_policy(config, None, trainable=False)


def think_tag_is_open(prompts: list[Prompt]) -> bool:
    """Whether the prompts end in an opened think tag, as some chat templates' do. UserError if only
    some do: the format reward could not know which."""
    opened = [prompt.text.rstrip().endswith("<think>") for prompt in prompts]
    if any(opened) and not all(opened):
        raise UserError(
            f"prompt_template: prompt {opened.index(False) + 1} does not end in <think>, others do"
        )
    return opened[0]


def reward_spec(
    function: str, weight: float, think_is_open: bool, batched: bool = False
) -> RewardSpec:
    spec = RewardSpec.named(function, weight)
    if think_is_open and function in ("accuracy", "format", "reasoning_gym"):
        spec = RewardSpec.named(function, weight, thinking_prefilled=True)
    return replace(spec, batched=batched)


def sandbox_tier(specs: list[RewardSpec]) -> str | None:
    """The sandbox that programs will run in, None where no reward runs any. UserError where there
    is none: every score would fail."""
    if not any(spec.function in ("code", BUILT_IN["code"]) for spec in specs):
        return None
    try:
        tier = find_sandbox().tier
    except SandboxError as error:
        raise UserError(f"reward 'code': {error}") from error
    say(f"reward 'code' runs programs in the sandbox tier {tier!r}")
    return tier


def reward_pool(config: GRPOConfig, specs: list[RewardSpec], workers: int) -> RewardPool:
    return RewardPool(
        specs,
        num_workers=workers,
        timeout_s=config.reward_timeout,
        max_error_rate=config.max_reward_error_rate,
    )


def say(words: str) -> None:
    print(f"grpo-engine: {words}", file=sys.stderr)


def run_folder(path: str) -> Path:
    """The run's folder, given it or one of its checkpoints."""
    folder = Path(path)
    return folder.parent if folder.name.startswith("checkpoint-") else folder


def saved_config(folder: str) -> dict[str, Any]:
    """The resolved configuration of the run (or checkpoint) in ``folder``."""
    path = run_folder(folder)
    if not path.is_dir():
        raise UserError(f"--resume {folder}: no such folder")
    if not (path / "config.yaml").is_file():
        raise UserError(f"--resume {folder}: there is no config.yaml of a run in {path}")
    return load_yaml(str(path / "config.yaml"))


def check_resumable(config: GRPOConfig, folder: Path) -> None:
    """A run continues only as itself: fields that change what it computes must be as they were."""
    saved = build_config(saved_config(str(folder)))
    allowed = set(RESUMABLE_FIELDS)
    if saved.lr_scheduler_type != "constant":
        allowed.discard("max_steps")  # the schedule ends there
    before = saved.model_dump()
    for name, value in config.model_dump().items():
        if name not in allowed and before[name] != value:
            raise UserError(
                f"--{name} {value!r}: the run in {folder} was started with {before[name]!r}; "
                "resume with that, or start a new run in another output_dir"
            )


def check_same_inputs(folder: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the run in ``folder``. UserError if its data or base model have changed."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        before = manifest["inputs"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--resume {folder}: manifest.json cannot be read ({error!r})") from error
    for name, now in inputs.items():
        for key in ("sha256", "weights_sha256"):
            if key in now and now[key] != before.get(name, {}).get(key):
                source = now.get("source", now.get("path"))
                raise UserError(
                    f"--{name} {source}: its content has changed since the run began "
                    f"({key} {now[key][:12]}, then {str(before.get(name, {}).get(key))[:12]})"
                )
    return manifest


def check_loss_options(config: GRPOConfig) -> None:
    """Contradictory loss options are an input error now, not an exception in the first step."""
    try:
        make_loss_options(**config.loss_options())
    except ValueError as error:
        raise UserError(str(error)) from error


def build_run(
    config: GRPOConfig, checkpoint: Path | None, stack: ExitStack
) -> tuple[GRPORun, HeldOut | None, dict[str, Any]]:
    """Load model, data and rewards; everything the user can have wrong is found here. The third
    value is ``manifest.json``'s account of the inputs."""
    policy = load_policy(config, checkpoint)
    check_context(config, policy)
    rows, eval_rows = load_data(config)
    prompts = load_prompts(config, policy.tokenizer, rows)
    opened = think_tag_is_open(prompts)
    specs = [
        reward_spec(function, weight, opened, function in config.batched_reward_funcs)
        for function, weight in zip(config.reward_funcs, config.weights, strict=True)
    ]
    pool = stack.enter_context(reward_pool(config, specs, config.reward_workers))
    check_rewards(pool, rows)
    held_out = None
    if eval_rows:
        known = {s.name: s for s in specs} | {s.function: s for s in specs}
        spec, judge = known.get(config.eval_reward), pool
        if spec is None:
            spec = reward_spec(config.eval_reward, 1.0, opened)
            judge = stack.enter_context(reward_pool(config, [spec], 1))
        check_rewards(judge, eval_rows)
        eval_prompts = load_prompts(config, policy.tokenizer, eval_rows)
        held_out = HeldOut(config, eval_prompts, judge, spec.name)
        specs = [*specs, spec]
    tier = sandbox_tier(specs)
    generator = HFGenerator(
        policy,
        max_batch_size=config.generation_batch_size,
        max_batch_tokens=config.generation_batch_tokens,
    )
    stack.callback(generator.close)
    reference = reference_policy(config, policy, checkpoint)
    inputs = {"dataset": {"source": config.dataset, "rows": len(rows), "sha256": rows_sha256(rows)}}
    if eval_rows:
        source = config.eval_dataset
        hashed = rows_sha256(eval_rows)
        inputs["eval_dataset"] = {"source": source, "rows": len(eval_rows), "sha256": hashed}
    base = policy if checkpoint is None or policy.adapter is not None else reference
    if base is not None:
        inputs["model"] = {"path": config.model, "weights_sha256": weights_sha256(base.model)}
    if tier is not None:
        inputs["sandbox"] = {"tier": tier}
    run = GRPORun(config, policy, reference, generator, pool, prompts)
    if checkpoint is not None:
        run.read_checkpoint(checkpoint)
    return run, held_out, inputs
