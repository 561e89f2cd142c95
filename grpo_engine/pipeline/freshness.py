"""Which stages have to run, and why: as a build system decides it, by content.

A finished stage is kept while its settings, the content of its inputs and its own results are as
they were. Another stage's result counts by its hash: made again and found the same, it invalidates
nothing further. What says only where files go and how the machine is used does not count
(``StageKind.neutral_fields``), nor does the version of the code, which the manifest records; of a
reward or a judge of one's own, ``module:function``, the file that it lies in does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grpo_engine.checkpoint import DamagedCheckpoint
from grpo_engine.lineage import ENDS, FileHashes, Input, Lineage, StageRecord
from grpo_engine.models.load import SHIPPED, looks_local
from grpo_engine.pipeline.config import Reference, leaves, place_of
from grpo_engine.pipeline.stages import Stage, referenced_path
from grpo_engine.rewards.registry import source_file
from grpo_engine.types import UserError

# What a string in a field that is not known to name a file must end with to be taken for one that
# has to be there: an argument of a reward, say.
FILE_SUFFIXES = (".jsonl", ".parquet", ".json", ".yaml", ".txt", ".py")


@dataclass(frozen=True)
class Verdict:
    """``keep`` a finished stage, ``resume`` an unfinished one, ``run`` from the beginning, or
    ``wait`` for a stage before it: then its inputs decide when it is reached. ``note``: for one
    that is kept."""

    action: Literal["keep", "resume", "run", "wait"]
    reason: str = ""
    note: str = ""


class Freshness:
    """Compares the stages with what the lineage says of the last time."""

    def __init__(self, stages: list[Stage], lineage: Lineage) -> None:
        self.stages, self.lineage = stages, lineage
        self.of_name = {stage.name: stage for stage in stages}
        self.hashes: FileHashes = lineage.hashes

    def verdicts(self, chosen: set[str]) -> dict[str, Verdict]:
        """Of every stage, before any of the ``chosen`` runs."""
        found: dict[str, Verdict] = {}
        for stage in self.stages:
            again = {name for name in chosen & set(found) if found[name].action != "keep"}
            found[stage.name] = self.verdict(stage, again)
        return found

    def verdict(self, stage: Stage, made_again: set[str]) -> Verdict:
        """``made_again``: stages before it that will run first."""
        record = self.lineage.records.get(stage.name)
        waits = [r.stage for r in stage.references.values() if r.stage in made_again]
        if record is None:
            left = stage.folder.is_dir() and any(stage.folder.iterdir())
            return Verdict("run", "its folder holds what no pipeline made" if left else "new")
        for change in self._changes(stage, record):
            return Verdict("run", change)
        if waits:
            return Verdict("wait", f"after {waits[0]}, unless that comes out the same")
        for name, change in self._input_changes(stage, record):
            return Verdict("resume" if name in stage.kind.written else "run", change)
        if record.status != "finished":
            ended = record.status if record.status in ENDS else "killed"
            return Verdict("resume", f"{ended}, not finished{_from_where(stage)}")
        return self._judge_results(stage, record)

    def _changes(self, stage: Stage, record: StageRecord) -> Iterator[str]:
        """What is different in the settings. A field that is new in the class since then has its
        default, or differs."""
        if stage.kind_name != record.kind:
            yield f"kind is {stage.kind_name}, was {record.kind}"
            return
        defaults = type(stage.config).model_fields
        by_content = _outside_before_and_now(stage, record)
        for name, value in stage.content().items():
            before = record.settings.get(name, _default(defaults[name]))
            if _without(value, name, by_content) != _without(before, name, by_content):
                yield f"{name} is {_short(value)}, was {_short(before)}"

    def _input_changes(self, stage: Stage, record: StageRecord) -> Iterator[tuple[str, str]]:
        """(field, what is different); those that the stage itself may write come last."""
        try:
            now = self.inputs(stage)
        except (FileNotFoundError, DamagedCheckpoint) as error:
            yield "", f"an input is not as it was ({error})"
            return
        written = stage.kind.written
        for name in sorted({*now, *record.inputs}, key=lambda name: (name in written, name)):
            before, after = record.inputs.get(name), now.get(name)
            if before is None or after is None or before.sha256 != after.sha256:
                path = (after or before).path
                yield name, f"the content of {name} {path} has changed"

    def _judge_results(self, stage: Stage, record: StageRecord) -> Verdict:
        edited = []
        for name, output in record.outputs.items():
            try:
                now = self.hashes.content(stage.folder / name)
            except FileNotFoundError:
                return Verdict("resume", f"its {name} is gone")
            except DamagedCheckpoint as damage:
                return Verdict("resume", f"its {name} is damaged: {damage}")
            if now != output.sha256:
                edited.append(name)
        note = f"{', '.join(edited)} edited since" if edited else ""
        return Verdict("keep", note=note)

    # -- inputs -------------------------------------------------------------------------------

    def inputs(self, stage: Stage) -> dict[str, Input]:
        """Every file and folder the stage reads, by the field it stands in. Raises
        ``FileNotFoundError`` for the result of a stage that is not there, ``DamagedCheckpoint`` for
        one that was altered."""
        found = {}
        for name, reference in stage.references.items():
            path = referenced_path(self.of_name[reference.stage], reference)
            if path is None or not path.exists():
                raise FileNotFoundError(f"{reference} is not there")
            place = path.relative_to(self.of_name[reference.stage].folder.parent).as_posix()
            found[name] = Input(place, self.hashes.content(path), reference.stage)
        for name, text, path in outside_files(stage):
            if path.exists():
                found[name] = Input(text, self.hashes.content(path))
        return found


def outside_files(stage: Stage) -> Iterator[tuple[str, str, Path]]:
    """(field, its text, path) of what the settings name outside the pipeline and can be looked at:
    local files and folders, the models in the package, the file that a function of one's own lies
    in. A file's name counts whether it is there or not, and so does a model's that can only be a
    folder; a Hugging Face id does not, nor does a cache, which is no input."""
    taken = stage.references
    for name, value in leaves(stage.content()):
        if name in taken or not isinstance(value, str) or not value or "\n" in value:
            continue
        if len(value) < 1024 and not name.endswith(".cache"):
            path = _outside_path(name, value)
            if path is not None:
                yield name, value, path


def _outside_path(name: str, text: str) -> Path | None:
    """Where what ``text`` in the field ``name`` names lies."""
    place, path = place_of(name), Path(text).expanduser()
    if text in SHIPPED and place in ("model", "any model"):
        return SHIPPED[text]
    if place == "file":
        return path
    if _is_own_function(name, text):
        return source_file(text)
    if text.endswith(FILE_SUFFIXES) and " " not in text and "://" not in text:
        return path
    word = place == "function" or (name, text) == ("rewrite", "template")  # no folder of that name
    folder = not word and (place is not None or "/" in text) and path.is_dir()
    return path if folder or _is_folder_of_model(name, text) else None


def _is_own_function(name: str, text: str) -> bool:
    """Whether ``text`` in the field ``name`` is a ``module:function`` or ``file.py:function``, and
    not one in this package, which goes by the version of the code."""
    module = text.rpartition(":")[0]
    if not module or "://" in text or " " in text or module.startswith("grpo_engine."):
        return False
    place = place_of(name)
    return module.endswith(".py") or (
        place in ("function", "any model") and not Path(text).is_dir()
    )


def _is_folder_of_model(name: str, text: str) -> bool:
    """Whether ``text`` in the field ``name`` can only be a local folder. A judge's model may also
    be any word that an endpoint knows."""
    place = place_of(name)
    is_local = looks_local(text) or Path(text).expanduser().is_file()
    return place == "reward model" or (place == "model" and is_local)


def missing_files(stages: list[Stage]) -> dict[str, list[tuple[str, str]]]:
    """Stage -> (field, text) of the files and models outside the pipeline that are not there."""
    found: dict[str, list[tuple[str, str]]] = {}
    for stage in stages:
        for name, text, path in outside_files(stage):
            is_there = path.is_dir() if _is_folder_of_model(name, text) else path.exists()
            if not is_there and name not in stage.kind.written:
                found.setdefault(stage.name, []).append((name, text))
    return found


def check_results_are_there(stage: Stage, of_name: dict[str, Stage]) -> None:
    """``UserError`` unless every result of another stage that ``stage`` reads is there."""
    for name, reference in stage.references.items():
        path = referenced_path(of_name[reference.stage], reference)
        if path is None or not path.exists():
            raise UserError(
                f"stage {stage.name}: --{name} {reference}: {describe(reference)} is not there; "
                f"run the stage {reference.stage} first"
            )


def _from_where(stage: Stage) -> str:
    if not stage.kind.trains:
        return ""
    checkpoint = stage.kind.result(stage.folder)
    return "; from its beginning" if checkpoint is None else f"; from {checkpoint.name}"


def describe(reference: Reference) -> str:
    return f"{reference.stage}'s {reference.path or 'result'}"


def _outside_before_and_now(stage: Stage, record: StageRecord) -> set[str]:
    """Fields whose model, data or file lay outside the pipeline and still do: where does not count,
    as what is in them is compared (``_input_changes``). Of a function the name counts as well."""
    known = {name for name, used in record.inputs.items() if used.stage is None}
    return {
        name
        for name, text, path in outside_files(stage)
        if name in known and place_of(name) is not None and path.exists()
        if not _is_own_function(name, text)
    }


def _without(value: Any, path: str, names: set[str]) -> Any:
    """``value`` at ``path`` of the settings, with None for what stands in the fields ``names``."""
    if isinstance(value, dict):
        return {key: _without(inner, f"{path}.{key}", names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without(inner, f"{path}.{n}", names) for n, inner in enumerate(value)]
    return None if path in names else value


def _default(field: Any) -> Any:
    value = None if field.is_required() else field.get_default(call_default_factory=True)
    return list(value) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
