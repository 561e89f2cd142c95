"""The YAML of a pipeline: fields shared by all stages, and the stages in the order they run.

    stage: r1
    output_dir: runs/r1          # each stage's folder is output_dir/<its name>
    seed: 0                      # every other field at the top is inherited by the stages that
    model: miniature             # have such a field and do not set it themselves
    stages:
      - name: r1-zero
        stage: grpo              # the verb; the other fields are its settings
        max_steps: 60
      - name: cold-start-data
        stage: sample
        model: "{r1-zero}"       # what that stage made: its newest checkpoint
      - name: cold-start-sft
        stage: sft
        dataset: "{cold-start-data}/data.jsonl"   # a file in that stage's folder

A reference is a whole value, and only to a stage further up. The base model is the ``model`` at the
top, so a stage without ``model`` starts from it.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from grpo_engine.config import MODEL_REWARDS
from grpo_engine.settings import apply_overrides
from grpo_engine.types import UserError

STAGE = "r1"
REWARD_MODEL_FIELDS = {f"{name}_model": name for name in MODEL_REWARDS}  # field -> kind
_DATA_FIELDS = ("data", "source", "decontaminate", "check_overlap")  # and all that end in dataset
_FILE_FIELDS = ("chat_template", "edit_file")
_CHAT_MODEL_FIELDS = ("judge", "rewrite")
_FUNCTION_FIELDS = ("reward_funcs", "eval_reward")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_REFERENCE = re.compile(r"\{([A-Za-z0-9][A-Za-z0-9_-]*)\}(?:/(.+))?")


class Reference(NamedTuple):
    """``{stage}/path``; ``path`` is "" for the stage's own result."""

    stage: str
    path: str

    def __str__(self) -> str:
        return f"{{{self.stage}}}" + (f"/{self.path}" if self.path else "")


def read_reference(value: Any) -> Reference | None:
    match = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
    return None if match is None else Reference(match[1], match[2] or "")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything that is neither a mapping nor a list."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{path}.{index}" if path else str(index))
    else:
        yield path, value


def references(fields: dict[str, Any]) -> dict[str, Reference]:
    """Of a stage's fields: where in them a reference stands, and which."""
    found = ((path, read_reference(value)) for path, value in leaves(fields))
    return {path: reference for path, reference in found if reference is not None}


@dataclass(frozen=True)
class StageEntry:
    """A stage as the YAML has it, ``kind`` being its verb: references are still text."""

    name: str
    kind: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class PipelineConfig:
    """``shared`` holds the other fields at the top; ``stages`` is in the order they run."""

    output_dir: Path
    stages: tuple[StageEntry, ...]
    shared: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """The YAML of this pipeline, flags included; reading it gives the same one."""
        values = {
            "stage": STAGE,
            "output_dir": str(self.output_dir),
            **self.shared,
            "stages": [{"name": s.name, "stage": s.kind, **s.fields} for s in self.stages],
        }
        return yaml.dump(
            values, Dumper=_WithoutAliases, sort_keys=False, allow_unicode=True, width=100
        )


class _WithoutAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def read_pipeline(
    values: dict[str, Any], overrides: Sequence[tuple[str, str]], kinds: dict[str, Any]
) -> PipelineConfig:
    """The pipeline in ``values``, with ``--field value`` and ``--stage.field value`` laid over it.

    ``kinds``: the registry (``stages.STAGES``). Everything that can be wrong with the list itself
    is found here, as one ``UserError`` line: names, kinds, references, flags of no stage. The
    fields of the stages are checked by ``stages.build``.
    """
    values = dict(values)
    verb = values.pop("stage", STAGE)
    if verb != STAGE:
        raise UserError(f"stage {verb!r}: these are settings of grpo-engine {verb}, not of {STAGE}")
    listed = values.pop("stages", None)
    if not isinstance(listed, list) or not listed:
        raise UserError(f"stages: wanted a list of stages, found {listed!r:.60}")
    stages = [_entry(number, raw, kinds) for number, raw in enumerate(listed, start=1)]
    _check_names([stage.name for stage in stages])
    stages, rest = _stage_overrides(stages, overrides, kinds)
    shared = _shared_overrides(values, rest, stages, kinds)
    _check_field_names("", shared)
    output_dir = shared.pop("output_dir", "runs/r1")
    if not isinstance(output_dir, str) or not output_dir:
        raise UserError(f"--output_dir {output_dir!r}: not a folder's name")
    _check_shared(shared, stages, kinds)
    _check_references(stages)
    return PipelineConfig(Path(output_dir), tuple(stages), shared)


def _entry(number: int, raw: Any, kinds: dict[str, Any]) -> StageEntry:
    if not isinstance(raw, dict):
        raise UserError(f"stages: number {number} is {raw!r:.60}, wanted name, stage and fields")
    fields = dict(raw)
    name, kind = fields.pop("name", None), fields.pop("stage", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(
            f"stages: number {number} has the name {name!r}; wanted letters, digits, - and _"
        )
    if kind not in kinds:
        raise UserError(f"stage {name}: stage: {kind!r}: there are {', '.join(kinds)}")
    if "output_dir" in fields:
        raise UserError(
            f"stage {name}: output_dir {fields['output_dir']!r}: a stage's folder is the "
            "pipeline's output_dir and the stage's name"
        )
    _check_field_names(f"stage {name}: ", fields)
    return StageEntry(name, kind, fields)


def _check_field_names(where: str, fields: dict[Any, Any]) -> None:
    for name, value in fields.items():
        if not isinstance(name, str):
            raise UserError(f"{where}{name!r}: {value!r:.60}: not the name of a field")


def flag_name(name: str) -> str:
    """As flags spell it: hyphens read as underscores."""
    return name.replace("-", "_")


def _check_names(names: list[str]) -> None:
    for flag, count in Counter(flag_name(name).lower() for name in names).items():
        if count > 1:
            same = [name for name in names if flag_name(name).lower() == flag]
            raise UserError(f"stages: {count} stages are named {', '.join(same)}")


def _stage_overrides(
    stages: list[StageEntry], overrides: Sequence[tuple[str, str]], kinds: dict[str, Any]
) -> tuple[list[StageEntry], list[tuple[str, str]]]:
    """The stages with the flags that name one of them, and the other flags."""
    of_stage: dict[str, list[tuple[str, str]]] = {flag_name(s.name): [] for s in stages}
    rest = []
    for name, text in overrides:
        head, dot, field_name = name.partition(".")
        if flag_name(head) not in of_stage:
            rest.append((name, text))
            continue
        if not dot or field_name in ("name", "stage", "output_dir"):
            raise UserError(f"--{name} {text}: wanted --{head}.<field of its settings> value")
        of_stage[flag_name(head)].append((field_name, text))
    changed = []
    for stage in stages:
        pairs = of_stage[flag_name(stage.name)]
        fields = apply_overrides(stage.fields, pairs, kinds[stage.kind].config_class())
        changed.append(StageEntry(stage.name, stage.kind, fields))
    return changed, rest


def _shared_overrides(
    values: dict[str, Any],
    pairs: Sequence[tuple[str, str]],
    stages: list[StageEntry],
    kinds: dict[str, Any],
) -> dict[str, Any]:
    names = [stage.name for stage in stages]
    for name, text in pairs:
        head, dot, _ = name.partition(".")
        if dot and head not in values and not _classes_with(head, stages, kinds):
            close = difflib.get_close_matches(head, [flag_name(n) for n in names], n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names)}"
            raise UserError(f"--{name} {text}: no such stage{hint}")
    for name, text in pairs:
        classes = _classes_with(name.partition(".")[0], stages, kinds)
        cls = classes[0] if classes else kinds[stages[0].kind].config_class()
        values = apply_overrides(values, [(name, text)], cls)
    return values


def _classes_with(name: str, stages: list[StageEntry], kinds: dict[str, Any]) -> list[Any]:
    classes = [kinds[stage.kind].config_class() for stage in stages]
    return [cls for cls in classes if name in cls.model_fields]


def _check_shared(shared: dict[str, Any], stages: list[StageEntry], kinds: dict[str, Any]) -> None:
    for name, value in shared.items():
        if not _classes_with(name, stages, kinds):
            known = {f for s in stages for f in kinds[s.kind].config_class().model_fields}
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"--{name} {value!r:.60}: no stage has such a field{hint}")
        if references({name: value}):
            raise UserError(f"--{name} {value!r}: a field of all stages cannot refer to one")


def _check_references(stages: list[StageEntry]) -> None:
    """Every reference must lead to a stage further up."""
    place = {stage.name: number for number, stage in enumerate(stages)}
    uses = {s.name: {r.stage for r in references(s.fields).values()} for s in stages}
    for number, stage in enumerate(stages):
        for path, reference in references(stage.fields).items():
            where = f"stage {stage.name}: --{path} {reference}"
            if reference.stage not in place:
                close = difflib.get_close_matches(reference.stage, place, n=1)
                hint = f"; did you mean {{{close[0]}}}?" if close else ""
                raise UserError(f"{where}: there is no such stage{hint}")
            if reference.stage == stage.name:
                raise UserError(f"{where}: refers to itself")
            if place[reference.stage] > number:
                round_trip = _path_between(uses, reference.stage, stage.name)
                if round_trip:
                    circle = " -> ".join([stage.name, *round_trip])
                    raise UserError(f"{where}: the stages go round in a circle, {circle}")
                raise UserError(f"{where}: that stage comes later; move it up")
            parts = Path(reference.path).parts
            if Path(reference.path).is_absolute() or ".." in parts:
                raise UserError(f"{where}: leads out of the stage's folder")
        for path, value in leaves(stage.fields):
            _check_whole(f"stage {stage.name}: --{path} {value}", path, value, place)
        _check_quoted(stage, place)


def _check_quoted(stage: StageEntry, names: Iterable[str]) -> None:
    """``model: {r1-zero}`` without quotes is a mapping to YAML."""
    for field_name, value in stage.fields.items():
        if isinstance(value, dict) and place_of(field_name) is not None:
            for name in value.keys() & set(names):
                if value == {name: None}:
                    raise UserError(
                        f"stage {stage.name}: --{field_name} {{{name}}}: wants quotes, "
                        f'"{{{name}}}"; YAML reads a mapping otherwise'
                    )


def _check_whole(where: str, path: str, value: Any, names: Iterable[str]) -> None:
    """In a field of models or data, a stage in braces that is no reference is a slip of the pen;
    elsewhere ({summary} of a template) it may be anything."""
    if place_of(path) is None or not isinstance(value, str) or read_reference(value) is not None:
        return
    bare = re.sub(r"[{}\s]", "", value).partition("/")[0]
    braces = "{" in value or "}" in value
    if any(f"{{{name}}}" in value or (braces and bare == name) for name in names):
        raise UserError(f"{where}: a reference is a whole value, {{stage}} or {{stage}}/file")


def place_of(path: str) -> str | None:
    """What the field ``path`` (``general_dataset.0.source``) is for: ``model``, ``reward model``,
    ``data`` or a ``file``; ``any model`` of a judge and among the arguments of a reward, which may
    want either; ``function`` of a reward, which is a name or a function of one's own."""
    name = path.rpartition(".")[2]
    if path in REWARD_MODEL_FIELDS:
        return "reward model"
    if path in _FILE_FIELDS:
        return "file"
    if path in _CHAT_MODEL_FIELDS:
        return "any model"
    if path.partition(".")[0] in _FUNCTION_FIELDS:
        return "function"
    if name == "model" or name.endswith("_model"):
        inner = path.partition(".")[0].endswith(("_args", "_options"))
        return "any model" if inner else "model"
    data = name in _DATA_FIELDS or name.endswith("dataset")
    return "data" if data else None


def _path_between(uses: dict[str, set[str]], start: str, end: str) -> list[str]:
    """Stages from ``start`` to ``end`` along ``uses``, both included; [] if there is no way."""
    open_paths, seen = [[start]], {start}
    while open_paths:
        path = open_paths.pop()
        for name in sorted(uses.get(path[-1], ())):
            if name == end:
                return [*path, name]
            if name not in seen:
                seen.add(name)
                open_paths.append([*path, name])
    return []
