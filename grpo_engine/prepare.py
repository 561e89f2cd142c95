"""Everything a run needs, loaded and checked before anything is written: each mistake of the user's
is found here, as one ``UserError`` line."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grpo_engine.config import MODEL_REWARDS, GRPOConfig, RowSource
from grpo_engine.data import check_prompt_lengths, load_rows, without_overlap
from grpo_engine.generation.build import check_generator, generator_inputs, open_generator
from grpo_engine.grpo import GRPORun
from grpo_engine.held_out import HeldOut
from grpo_engine.kernels import make_loss_options
from grpo_engine.learner import load_policy
from grpo_engine.manifest import rows_sha256, weights_sha256
from grpo_engine.policy import Policy
from grpo_engine.progress import say
from grpo_engine.rewards import BUILT_IN, RewardPool, RewardSpec, unusable_solutions
from grpo_engine.rewards.model import ScalarModel
from grpo_engine.rewards.sandbox import find_sandbox
from grpo_engine.rewards.sandbox_run import SandboxError
from grpo_engine.rollouts import Prompt
from grpo_engine.scenarios import Mixture, check_domains, with_domains, with_reward_domains
from grpo_engine.scoring import ModelReward
from grpo_engine.templates import render_prompt
from grpo_engine.types import UserError

# Built-in rewards that must know whether the prompt has opened the think tag.
THINKING_PREFILLED = (
    *("accuracy", "choice", "code", "format", "format_r1"),
    *("judge", "reasoning_gym"),
)


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


@dataclass
class Rows:
    """The rows of a run: to train on, general ones to join them late, and held-out ones of both
    kinds."""

    train: list[dict[str, Any]]
    general: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    held_out_general: list[dict[str, Any]] = field(default_factory=list)

    def inputs(self, config: GRPOConfig) -> dict[str, dict[str, Any]]:
        """``manifest.json``'s account of them."""

        def named(sources: list[RowSource]) -> str:
            return ", ".join(source.source for source in sources)

        kinds = {
            "dataset": (config.dataset, self.train),
            "general_dataset": (named(config.general_dataset), self.general),
            "eval_dataset": (config.eval_dataset, self.held_out),
            "general_eval_dataset": (named(config.general_eval_dataset), self.held_out_general),
        }
        return {
            name: {"source": source, "rows": len(rows), "sha256": rows_sha256(rows)}
            for name, (source, rows) in kinds.items()
            if rows
        }


def load_data(config: GRPOConfig) -> Rows:
    """No prompt to train on is a held-out one. With ``reward_domains`` each row has a domain."""
    columns = {"prompt_column": config.prompt_column, "solution_column": config.solution_column}
    train = load_rows(
        config.dataset,
        args=config.dataset_args,
        split=config.dataset_split,
        limit=config.dataset_limit,
        **columns,
    )
    rows = Rows(train, general_rows(config.general_dataset))
    rows.held_out_general = general_rows(config.general_eval_dataset)
    if config.eval_dataset:
        rows.held_out = load_rows(
            config.eval_dataset,
            args=config.eval_dataset_args,
            split=config.eval_dataset_split,
            limit=config.eval_limit,
            **columns,
        )
        for kind, words in (("train", "training"), ("general", "general")):
            if not getattr(rows, kind):
                continue
            held_out = [*rows.held_out, *rows.held_out_general]
            kept, dropped = without_overlap(getattr(rows, kind), held_out)
            setattr(rows, kind, kept)
            if dropped:
                say(f"{dropped} {words} rows have a held-out prompt and are left out")
    if config.reward_domains:
        rows.train = with_domains(rows.train, config.dataset, default=config.dataset_domain)
    return rows


def general_rows(sources: list[RowSource]) -> list[dict[str, Any]]:
    rows = []
    for source in sources:
        found = load_rows(
            source.source,
            args=source.args,
            split=source.split,
            limit=source.limit,
            prompt_column=source.prompt_column,
        )
        rows += with_domains(
            found, source.source, column=source.domain_column, default=source.domain
        )
    return rows


def check_rewards(pool: RewardPool, rows: list[dict[str, Any]]) -> None:
    """Every column a reward needs must be there, and every reference answer usable, in the rows it
    applies to."""
    for spec, required in zip(pool.rewards, pool.required_columns, strict=True):
        mine = {number: row for number, row in enumerate(rows, start=1) if spec.applies(row)}
        if not mine:  # held-out rows need not be of its domains
            continue
        for name in required:
            missing = [number for number, row in mine.items() if row.get(name) is None]
            if len(missing) == len(mine):
                columns = sorted({key for row in mine.values() for key in row})
                raise UserError(
                    f"reward {spec.name!r} needs the column {name!r}; "
                    f"the rows have {', '.join(columns)}"
                )
            if missing:
                say(
                    f"reward {spec.name!r}: {listed(missing)} without {name!r} get no score from it"
                )
        if spec.function == "accuracy":
            numbers, solutions = list(mine), [row.get("solution") for row in mine.values()]
            bad = [numbers[index] for index in unusable_solutions(solutions)]
            if len(bad) == len(mine):
                raise UserError(
                    f"reward 'accuracy': no row has a usable solution; row {numbers[0]} has "
                    f"{solutions[0]!r:.80}"
                )
            if bad:
                say(f"reward 'accuracy': {listed(bad)} have a solution that cannot be read")


def listed(numbers: list[int]) -> str:
    """``3 rows (2, 5, 9)``, with at most five numbers."""
    shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return f"{len(numbers)} rows ({shown})"


def check_model(config: GRPOConfig, policy: Policy) -> None:
    """Prompt and completion must fit the model's positions, its head the loss options."""
    longest = max(config.completion_caps().values())
    limit = getattr(policy.text_config, "max_position_embeddings", None)
    if limit is not None and config.max_prompt_length + longest > limit:
        raise UserError(
            f"--max_completion_length {longest}: with max_prompt_length {config.max_prompt_length} "
            f"it passes the {limit} positions of {config.model}"
        )
    bias = policy.head.bias
    if config.sparse_delta is not None and bias is not None and bias.requires_grad:
        raise UserError(
            f"--sparse_delta {config.sparse_delta}: does not go with a head that has a bias, and "
            f"that of {config.model} has one"
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
    config: GRPOConfig, function: str, weight: float, think_is_open: bool
) -> RewardSpec:
    spec = RewardSpec.named(function, weight)
    given = [config.reward_args[n] for n in {spec.name, function} if n in config.reward_args]
    if len(given) > 1:
        raise UserError(f"reward_args: {spec.name!r} and {function!r} are the same reward")
    args = dict(given[0]) if given else {}
    if think_is_open and function in THINKING_PREFILLED:
        args["thinking_prefilled"] = True
    return replace(spec, args=args, batched=function in config.batched_reward_funcs)


def sandbox_tier(specs: list[RewardSpec]) -> str | None:
    """The sandbox that programs will run in, None where no reward runs any. UserError where there
    is none: every score would fail."""
    runs = [spec for spec in specs if spec.function in ("code", BUILT_IN["code"])]
    if not runs:
        return None
    try:
        weaker = any(spec.args.get("allow_rlimits_only") for spec in runs)
        tier = find_sandbox(allow_rlimits_only=weaker).tier
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


def check_loss_options(config: GRPOConfig) -> None:
    """Contradictory loss options are an input error now, not an exception in the first step."""
    try:
        options = make_loss_options(**config.loss_options())
    except ValueError as error:
        raise UserError(str(error)) from error
    if config.sparse_delta is None:
        return
    for refused, what in (
        (options.entropy_coef != 0, f"entropy_coef {config.entropy_coef}"),
        (options.needs_sequence_pass, "a loss or is_correction over whole sequences"),
        (config.top_p < 1, f"top_p {config.top_p}"),
        (config.top_k > 0, f"top_k {config.top_k}"),
    ):
        if refused:
            raise UserError(f"--sparse_delta {config.sparse_delta}: does not go with {what}")


def build_rewards(
    config: GRPOConfig, rows: list[dict[str, Any]], opened: bool, stack: ExitStack
) -> tuple[RewardPool | None, list[ModelReward]]:
    """The rewards by rule (None: there are none) and by reward models, for the training ``rows``.
    ``opened``: the prompts end in an opened think tag."""
    specs = [
        reward_spec(config, function, weight, opened)
        for function, weight in zip(config.reward_funcs, config.weights, strict=True)
    ]
    names = [spec.name for spec in specs]  # a pool sees those of the rules only
    if len(set(names)) < len(names):
        raise UserError(f"reward_funcs: names must differ, got {', '.join(names)}")
    specs = with_reward_domains(specs, config.reward_domains)
    check_domains(specs, rows)
    rules = [spec for spec in specs if spec.function not in MODEL_REWARDS]
    pool = stack.enter_context(reward_pool(config, rules, config.reward_workers)) if rules else None
    if pool is not None:
        check_rewards(pool, rows)
    return pool, reward_models(config, [spec for spec in specs if spec not in rules], opened)


def reward_models(config: GRPOConfig, specs: list[RewardSpec], opened: bool) -> list[ModelReward]:
    """The saved reward models behind ``specs``, loaded. UserError where one is of another kind."""
    models = []
    for spec in specs:
        folder = getattr(config, f"{spec.function}_model")
        try:
            model = ScalarModel.load(
                folder,
                device=config.device,
                dtype="bfloat16" if config.bf16 else "float32",
                score_scale=getattr(config, f"{spec.function}_scale"),
            )
        except UserError as error:
            raise UserError(f"--{spec.function}_model {folder!r}: {error}") from error
        if model.card.kind != spec.function:
            raise UserError(
                f"--{spec.function}_model {folder}: is a reward model of kind {model.card.kind!r}"
            )
        for name, parameter in model.network.model.named_parameters():
            if not bool(parameter.isfinite().all()):  # said now, not when general prompts join
                raise UserError(f"--{spec.function}_model {folder}: {name} is not finite")
        source = {"path": folder, "weights_sha256": weights_sha256(model.network.model)}
        models.append(ModelReward(spec, model, opened, source))
    return models


def build_run(
    config: GRPOConfig, checkpoint: Path | None, stack: ExitStack
) -> tuple[GRPORun, HeldOut | None, dict[str, Any]]:
    """Load model, data and rewards; everything the user can have wrong is found here. The third
    value is ``manifest.json``'s account of the inputs."""
    rows = load_data(config)
    Mixture.of(config, bool(rows.general))  # found out before any model is loaded
    policy = load_policy(config, checkpoint)
    check_model(config, policy)
    check_generator(config, policy)
    prompts = load_prompts(config, policy.tokenizer, rows.train)
    general = load_prompts(config, policy.tokenizer, rows.general) if rows.general else []
    opened = think_tag_is_open([*prompts, *general])
    pool, models = build_rewards(config, [*rows.train, *rows.general], opened, stack)
    held_out = build_held_out(config, policy, rows, pool, models, stack)
    judges = [judge for judge in (pool, held_out and held_out.pool) if judge]
    tier = sandbox_tier([spec for judge in judges for spec in judge.rewards])
    generator = stack.enter_context(open_generator(config, policy))
    reference = reference_policy(config, policy, checkpoint)
    inputs = rows.inputs(config)
    base = policy if checkpoint is None or policy.adapter is not None else reference
    if base is not None:
        inputs["model"] = {"path": config.model, "weights_sha256": weights_sha256(base.model)}
    inputs |= {f"{reward.spec.function}_model": reward.source for reward in models}
    if tier is not None:
        inputs["sandbox"] = {"tier": tier}
    if engine := generator_inputs(config):
        inputs["generator"] = engine
    run = GRPORun(
        config, policy, reference, generator, pool, prompts, general=general, models=models
    )
    stack.callback(run.close)
    if checkpoint is not None:
        run.read_checkpoint(checkpoint)
    return run, held_out, inputs


def build_held_out(
    config: GRPOConfig,
    policy: Policy,
    rows: Rows,
    pool: RewardPool | None,
    models: list[ModelReward],
    stack: ExitStack,
) -> HeldOut | None:
    """The held-out evaluation, None without rows. Its judge is the pool of the training rewards
    where ``eval_reward`` is one of them and applies to every row."""
    if not rows.held_out:
        return None
    prompts = load_prompts(config, policy.tokenizer, rows.held_out)
    training = [] if pool is None else pool.rewards
    known = {s.name: s for s in training} | {s.function: s for s in training}
    spec, judge = known.get(config.eval_reward), pool
    if spec is None or spec.domains is not None:
        opened = think_tag_is_open(prompts)
        spec = spec or reward_spec(config, config.eval_reward, 1.0, opened)
        spec = replace(spec, domains=None)  # held-out rows need no domain
        judge = stack.enter_context(reward_pool(config, [spec], 1))
    check_rewards(judge, rows.held_out)
    general = []
    if rows.held_out_general:
        general = load_prompts(config, policy.tokenizer, rows.held_out_general)
        check_held_out_general(models, rows.held_out_general)
    return HeldOut(config, prompts, judge, spec.name, general=general, models=models)


def check_held_out_general(models: list[ModelReward], rows: list[dict[str, Any]]) -> None:
    """UserError for held-out general rows that no reward model scores."""
    for number, row in enumerate(rows, start=1):
        if not any(model.spec.applies(row) for model in models):
            raise UserError(
                f"general_eval_dataset: no reward model is for the domain {row['domain']!r} of row "
                f"{number}"
            )
