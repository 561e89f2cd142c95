"""What can be wrong with the settings of a stage beyond its own fields, found before any stage
runs: the names and arguments of rewards, judges and generated data, and options that contradict
each other. No row is made, no model loaded and no endpoint asked. Of a JSONL file the first row is
read, which shows a wrong column; one that is not there is left to ``freshness.missing_files``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_engine.chat.load import check_chat_model
from grpo_engine.config import MODEL_REWARDS
from grpo_engine.data import check_source, load_rows, read_rows
from grpo_engine.pipeline.config import read_reference
from grpo_engine.pipeline.stages import Stage
from grpo_engine.prepare import check_loss_options
from grpo_engine.rewards import BUILT_IN, RewardPool, RewardSpec
from grpo_engine.rewards.registry import check_reward, source_file
from grpo_engine.scenarios import Mixture, with_reward_domains
from grpo_engine.types import UserError

SOURCE_FIELDS = ("dataset", "eval_dataset", "data", "decontaminate")  # and NAME_args
SOURCE_LISTS = ("general_dataset", "general_eval_dataset")


def check_settings(stages: list[Stage]) -> None:
    """Raises ``UserError`` naming the first stage with a mistake."""
    known: set[str] = set()  # rewards that were found in order
    for stage in stages:
        try:
            for source, args in _sources(stage.config):
                if read_reference(source) is None:
                    check_source(source, args=args)
            _check_first_rows(stage.config)
            _check_device(stage.config)
            _check_rewards(stage.config, known)
            for field in ("judge", "rewrite"):
                _check_chat_model(stage.config, field)
            if stage.config.stage == "grpo":
                check_loss_options(stage.config)
                Mixture.of(stage.config, bool(stage.config.general_dataset))
        except UserError as error:
            raise UserError(f"stage {stage.name}: {error}") from error


def check_chat_templates(stages: list[Stage], chosen: list[Stage], *, offline: bool) -> None:
    """``UserError`` where a stage of ``chosen`` renders prompts as ``chat`` and its model comes
    from one without a chat template, which would show when the stage is reached: after all of
    R1-Zero, say. Loads tokenizers alone, ``offline`` those that are on this machine."""
    from grpo_engine.models.load import has_chat_template

    of_name, found = {stage.name: stage for stage in stages}, {}
    for stage in chosen:
        base = _base_of_chat(stage, of_name)
        if base is None:
            continue
        if base not in found:
            found[base] = has_chat_template(base, offline=offline)
        if found[base] is False:
            raise UserError(
                f"stage {stage.name}: prompt_template 'chat': the tokenizer of {base!r} has no "
                "chat template; give the SFT before it one (chat_template: FILE.jinja), or use "
                "another prompt_template"
            )


def _base_of_chat(stage: Stage, of_name: dict[str, Stage]) -> str | None:
    """The model that gives ``stage`` its chat template; None where it uses none, or a stage on the
    way to it sets one."""
    if getattr(stage.config, "prompt_template", None) != "chat":
        return None
    while getattr(stage.config, "chat_template", None) is None:
        model = getattr(stage.config, "model", None)
        reference = read_reference(model)
        if reference is None:
            return model
        stage = of_name[reference.stage]
    return None


def _sources(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every source of rows that the settings name, with its arguments."""
    for name in SOURCE_FIELDS:
        source = getattr(config, name, None)
        if source is not None:
            yield source, getattr(config, f"{name}_args")
    for name in SOURCE_LISTS:
        given = getattr(config, name, None)
        if isinstance(given, str):  # of sample: one source
            yield given, config.general_args
        elif given:
            yield from ((one.source, one.args) for one in given)


def _check_first_rows(config: Any) -> None:
    """Of JSONL files: what is wrong with all their rows shows in the first one, and not only when
    their stage is reached."""
    names = ("prompt_column", "solution_column")
    columns = {name: getattr(config, name) for name in names if hasattr(config, name)}
    for name in SOURCE_FIELDS:
        source = getattr(config, name, None)
        if source is None or not _is_jsonl(source):
            continue
        options = {"args": getattr(config, f"{name}_args"), "limit": 1}
        options["split"] = getattr(config, f"{name}_split", None)
        if config.stage in ("sft", "distill"):
            from grpo_engine.demonstrations import load_demonstrations

            load_demonstrations(config, source, **options)
        elif name in ("dataset", "eval_dataset"):
            load_rows(source, **options, **columns)
        else:
            read_rows(source, **options)
    for name in SOURCE_LISTS:
        given = getattr(config, name, None) or []
        for one in [given] if isinstance(given, str) else given:
            if isinstance(one, str):  # of sample
                if _is_jsonl(one):
                    read_rows(one, args=config.general_args, split=config.general_split, limit=1)
            elif _is_jsonl(one.source):
                options = {"args": one.args, "split": one.split, "limit": 1}
                load_rows(one.source, prompt_column=one.prompt_column, **options)


def _is_jsonl(source: str) -> bool:
    return source.endswith(".jsonl") and Path(source).expanduser().exists()


def _check_device(config: Any) -> None:
    """Whether it could be one. A plan may be for another machine."""
    name = getattr(config, "device", "auto")
    if name != "auto" and re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")


def _check_rewards(config: Any, known: set[str]) -> None:
    functions = list(getattr(config, "reward_funcs", ()))
    specs = [_spec(config, function) for function in functions]
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise UserError(f"reward_funcs: names must differ, got {', '.join(names)}")
    if getattr(config, "eval_dataset", None) and hasattr(config, "eval_reward"):
        names = {name for spec in specs for name in (spec.name, spec.function)}
        if config.eval_reward not in names:
            specs.append(_spec(config, config.eval_reward))
    for spec in specs:
        if repr(spec) not in known and spec.function not in MODEL_REWARDS:
            _check_reward(spec)
            known.add(repr(spec))
    if functions:
        with_reward_domains(specs, config.reward_domains)


def _spec(config: Any, function: str) -> RewardSpec:
    name = function.rpartition(":")[2]
    args = config.reward_args.get(function) or config.reward_args.get(name) or {}
    batched = function in getattr(config, "batched_reward_funcs", ())
    return RewardSpec(name, function, args=args, batched=batched)


def _check_reward(spec: RewardSpec) -> None:
    if spec.function in BUILT_IN or ":" not in spec.function:
        check_reward(spec)
    elif _is_there(spec.function):  # a user's code is not run in this process
        RewardPool([spec], num_workers=1).close()


def _check_chat_model(config: Any, field: str) -> None:
    spec = getattr(config, field, None)
    if spec is None or read_reference(spec) or (field, spec) == ("rewrite", "template"):
        return
    if _is_there(spec):
        check_chat_model(spec, **getattr(config, f"{field}_options"))


def _is_there(spec: str) -> bool:
    """Not where ``file.py:function`` names a file that is still missing."""
    is_file = spec.rpartition(":")[0].endswith(".py") and not Path(spec).is_dir()
    return not is_file or source_file(spec).is_file()
