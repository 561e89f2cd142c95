"""Finding a reward function and calling it for one completion, whatever its signature.

Three signatures are understood:

* TRL: ``fn(prompts, completions, **columns) -> list[float | None]``, called with lists of length 1;
* verl: ``compute_score(data_source, solution_str, ground_truth, extra_info) -> float | dict``;
* the built-ins' own ``judge(completion, row) -> (score, outcome)``, carried as an attribute,
  which can say *why* a completion scored as it did. A user's function may carry one too.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_engine.types import UserError

BUILT_IN = {
    "accuracy": "grpo_engine.rewards.math:accuracy_reward",
    "choice": "grpo_engine.rewards.choice:choice_reward",
    "code": "grpo_engine.rewards.code:code_reward",
    "format": "grpo_engine.rewards.format:format_reward",
    "format_r1": "grpo_engine.rewards.format:format_r1_reward",
    "judge": "grpo_engine.rewards.judge:judge_reward",
    "language": "grpo_engine.rewards.language:language_consistency_reward",
    "length": "grpo_engine.rewards.length:length_reward",
    "reasoning_gym": "grpo_engine.rewards.tasks:reasoning_gym_reward",
    "repetition": "grpo_engine.rewards.repetition:repetition_reward",
    "safety_judge": "grpo_engine.rewards.judge:safety_judge_reward",
}
_TRL_LISTS = ("prompts", "completions", "completion_ids")
_TRL_RESERVED = frozenset(("prompt", "completion", *_TRL_LISTS))


@dataclass(frozen=True)
class RewardSpec:
    """One reward of a run.

    ``function``: a name in ``BUILT_IN``, ``package.module:function`` or
    ``path/to/file.py:function``. ``args`` are passed to every call. ``batched`` hands a TRL
    function the whole list of completions in one call, for rewards that compare completions with
    each other; by default it is called once per completion, so that one hang costs one score.
    ``domains``: the reward applies to rows whose column ``domain`` is among them; None = to all.
    """

    name: str
    function: str
    weight: float = 1.0
    args: Mapping[str, Any] = field(default_factory=dict)
    batched: bool = False
    domains: tuple[str, ...] | None = None

    def applies(self, row: Mapping[str, Any]) -> bool:
        return self.domains is None or row.get("domain") in self.domains

    @classmethod
    def named(cls, function: str, weight: float = 1.0, **args: Any) -> RewardSpec:
        """A spec called after its function: ``accuracy`` or ``module:fn`` -> ``fn``."""
        return cls(function.rpartition(":")[2], function, weight, args)


@dataclass(frozen=True)
class Reward:
    """A loaded reward function. ``required_columns`` must be among the rows' columns."""

    name: str
    kind: str  # "judge", "trl" or "verl"
    function: Callable[..., Any]
    required_columns: tuple[str, ...]
    accepts: frozenset[str] | None  # parameter names; None = any column

    def call(
        self,
        prompt: Any,
        completion: Any,
        row: Mapping[str, Any],
        completion_ids: list[int] | None = None,
    ) -> tuple[Any, str]:
        """(score as returned, outcome) for one completion; whatever the function raises passes."""
        if self.kind == "judge":
            if any(row.get(name) is None for name in self.required_columns):
                return None, "none"  # a row of another kind in a mixed data set
            return self.function(completion, row)
        if self.kind == "verl":
            return self._call_verl(completion, row), "ok"
        columns = {name: [value] for name, value in row.items()}
        returned = self.call_batch([prompt], [completion], columns, [completion_ids])
        if len(returned) != 1:
            raise InvalidScoreError(f"returned {len(returned)} scores for 1 completion")
        return returned[0], "ok"

    def call_batch(
        self,
        prompts: list[Any],
        completions: list[Any],
        columns: Mapping[str, list[Any]],
        completion_ids: list[Any],
    ) -> list[Any]:
        """The raw scores of a TRL function for several completions."""
        arguments = {name: value for name, value in columns.items() if name not in _TRL_RESERVED}
        arguments["prompts"] = prompts
        arguments["completions"] = [
            _as_conversation(prompt, completion)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        if any(ids is not None for ids in completion_ids):
            arguments["completion_ids"] = completion_ids
        if self.accepts is not None:
            arguments = {name: arguments[name] for name in self.accepts if name in arguments}
        returned = self.function(**arguments)
        if inspect.isawaitable(returned):
            returned = asyncio.run(_result_of(returned))
        try:
            return list(returned)
        except TypeError:
            raise InvalidScoreError(f"returned {returned!r:.200}, not a list") from None

    def _call_verl(self, completion: Any, row: Mapping[str, Any]) -> Any:
        """verl keeps the reference in ``reward_model``; rows of ours keep it in ``solution``."""
        reference = row.get("reward_model") or {}
        arguments = {
            "data_source": row.get("data_source", row.get("task")),
            "solution_str": completion,
            "ground_truth": reference.get("ground_truth", row.get("solution")),
            "extra_info": row.get("extra_info"),
        }
        if self.accepts is not None:
            arguments = {name: arguments[name] for name in self.accepts if name in arguments}
        returned = self.function(**arguments)
        return returned.get("score") if isinstance(returned, dict) else returned


class InvalidScoreError(Exception):
    """A reward function did not return one finite number (or None) per completion."""


async def _result_of(awaitable: Any) -> Any:
    return await awaitable


def _as_conversation(prompt: Any, completion: Any) -> Any:
    """TRL gives conversational completions to conversational prompts."""
    if isinstance(prompt, list) and isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    return completion


def load_reward(spec: RewardSpec | str) -> Reward:
    """Import the function of ``spec`` and find out how to call it.

    Raises UserError when the function is not found, cannot be imported, takes neither signature, or
    does not know an argument of ``spec.args``.
    """
    if isinstance(spec, str):
        spec = RewardSpec.named(spec)
    reward, check = _found(spec)
    if check is not None:
        check(**spec.args)  # what the reward needs is there; UserError where not
    return reward


def check_reward(spec: RewardSpec) -> None:
    """What ``load_reward`` refuses by name, signature and arguments. The reward's own check, for
    which a judge is loaded or asked, is left out."""
    _found(spec)


def _found(spec: RewardSpec) -> tuple[Reward, Callable[..., None] | None]:
    """The reward of ``spec``, and its own check if it has one."""
    function = _find(spec)
    judge = getattr(function, "judge", None)
    kind, target = ("judge", judge) if judge is not None else (None, function)
    parameters = inspect.signature(target).parameters
    if kind is None:
        kind = _signature_kind(spec, parameters)
    if spec.batched and kind != "trl":
        raise UserError(f"reward {spec.name!r}: batched needs the TRL signature")
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    # Not left to **kwargs: a misspelt option would be swallowed there.
    unknown = [name for name in spec.args if name not in parameters]
    if unknown:
        raise UserError(f"reward {spec.name!r} has no argument {unknown[0]!r}")
    required = getattr(function, "required_columns", None)
    if required is None:
        required = _required_columns(kind, parameters, spec.args)
    reward = Reward(
        name=spec.name,
        kind=kind,
        function=functools.partial(target, **spec.args) if spec.args else target,
        required_columns=tuple(required),
        accepts=None if any_name else frozenset(parameters) - set(spec.args),
    )
    return reward, getattr(function, "check", None)


def _signature_kind(spec: RewardSpec, parameters: Mapping[str, Any]) -> str:
    if "solution_str" in parameters:
        return "verl"
    if "completions" in parameters:
        return "trl"
    raise UserError(
        f"reward {spec.name!r}: {spec.function} takes ({', '.join(parameters)}); wanted TRL's "
        "(prompts, completions, **columns) or verl's (data_source, solution_str, ground_truth, ...)"
    )


def _required_columns(
    kind: str, parameters: Mapping[str, inspect.Parameter], args: Mapping[str, Any]
) -> tuple[str, ...]:
    if kind != "trl":
        return ()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(
        name
        for name, parameter in parameters.items()
        if parameter.kind in named
        and parameter.default is inspect.Parameter.empty
        and name not in _TRL_LISTS
        and name not in args
    )


def _find(spec: RewardSpec) -> Callable[..., Any]:
    location = BUILT_IN.get(spec.function, spec.function)
    if ":" not in location:
        raise UserError(
            f"unknown reward {spec.function!r}: wanted one of {', '.join(BUILT_IN)}, "
            "'package.module:function' or 'path/to/file.py:function'"
        )
    return find_function(location, f"reward {spec.name!r}")


def find_function(location: str, wanted_as: str) -> Callable[..., Any]:
    """The function at ``package.module:function`` or ``path/to/file.py:function``. Raises UserError
    beginning with ``wanted_as``, what it was to be used as."""
    place, _, attribute = location.rpartition(":")
    if not place or not attribute:
        raise UserError(
            f"{wanted_as}: wanted 'package.module:function' or 'path/to/file.py:function', "
            f"got {location!r}"
        )
    try:
        module = _import_file(place) if place.endswith(".py") else importlib.import_module(place)
    except UserError as error:
        raise UserError(f"{wanted_as}: {error}") from None
    except Exception as error:
        raise UserError(
            f"{wanted_as}: cannot import {place!r}: {type(error).__name__}: {error}"
        ) from error
    function = functools.reduce(
        lambda owner, name: getattr(owner, name, None), attribute.split("."), module
    )
    if not callable(function):
        raise UserError(f"{wanted_as}: {place!r} has no function {attribute!r}")
    return function


def source_file(location: str) -> Path | None:
    """The file that ``package.module:function`` or ``path/to/file.py:function`` lies in, for
    ``file.py`` whether it is there or not; None where no module is found."""
    place = location.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place).expanduser()
    try:
        found = importlib.util.find_spec(place)
    except (ImportError, ValueError):  # its package is not there, or it is no module's name
        return None
    path = Path((found and found.origin) or "")
    return path if path.is_file() else None


def source_sha256(location: str) -> str | None:
    """Of the file that ``location`` lies in (``source_file``); None where there is none."""
    path = source_file(location)
    there = path is not None and path.is_file()
    return hashlib.sha256(path.read_bytes()).hexdigest() if there else None


def rules_sha256() -> str:
    """Of our own modules that verdicts come from."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _import_file(place: str) -> Any:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"file {place!r} does not exist")
    name = f"reward_file_{path.stem}_{abs(hash(path))}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickling look a module up by its name
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
