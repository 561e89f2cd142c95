"""What can be wrong with the settings of a stage beyond its own fields, found before any stage
runs: the names and arguments of rewards, judges and generated data, and options that contradict
each other. No row is made, no model loaded and no endpoint asked; a file that is not there is left
to ``freshness.missing_files``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_engine.chat.load import check_chat_model
from grpo_engine.config import MODEL_REWARDS
from grpo_engine.data import check_source
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
            _check_rewards(stage.config, known)
            for field in ("judge", "rewrite"):
                _check_chat_model(stage.config, field)
            if stage.config.stage == "grpo":
                check_loss_options(stage.config)
                Mixture.of(stage.config, bool(stage.config.general_dataset))
        except UserError as error:
            raise UserError(f"stage {stage.name}: {error}") from error


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


def _check_rewards(config: Any, known: set[str]) -> None:
    functions = list(getattr(config, "reward_funcs", ()))
    specs = [_spec(config, function) for function in functions]
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
