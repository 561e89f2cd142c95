"""What a pipeline left behind: which checkpoint made which data, which data made which checkpoint.

``manifest.json`` in a pipeline's folder has an entry for each stage: its settings, its inputs
(where they came from, sha256), its outputs (sha256), when it ran and how it ended. ``read`` returns
it as objects; the pipeline itself reads and writes it through ``Lineage``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from grpo_engine.checkpoint import SEAL, DamagedCheckpoint, file_sha256
from grpo_engine.metrics import write_atomically
from grpo_engine.types import UserError

MANIFEST_FILE = "manifest.json"
VERB = "r1"
HASHES_FILE = ".file-hashes.json"
RUNNING = "running"
WAITING = "waiting for a person"
# A stage that has come to an end of some kind; any other was killed.
ENDS = ("finished", "stopped", "failed", WAITING)


@dataclass
class Input:
    """What a stage read. ``stage`` made it, and ``path`` is relative to the pipeline's folder;
    None: it came from outside, and ``path`` is as in the settings."""

    path: str
    sha256: str
    stage: str | None = None


@dataclass
class Output:
    """A file or checkpoint (relative to the stage's folder) when the stage finished."""

    sha256: str
    bytes: int


@dataclass
class Session:
    """One start of a stage. ``finished`` is None where the process was killed."""

    started: str
    finished: str | None = None
    seconds: float = 0.0
    exit_code: int | None = None
    code_version: str | None = None


@dataclass
class StageRecord:
    """A stage as the manifest has it. ``settings`` are those that decide what it makes, references
    as written; ``inputs`` go by the field (``dataset``, ``reward_models.helpful``) they stand in.
    ``tokens``: ``generated`` and ``trained`` where the stage's own files say so."""

    name: str
    kind: str
    status: str = RUNNING
    settings: dict[str, Any] = field(default_factory=dict)
    settings_sha256: str = ""
    seed: int | None = None
    inputs: dict[str, Input] = field(default_factory=dict)
    outputs: dict[str, Output] = field(default_factory=dict)
    product: str | None = None
    sessions: list[Session] = field(default_factory=list)
    steps: int | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    error: str | None = None

    @property
    def started(self) -> str | None:
        return self.sessions[0].started if self.sessions else None

    @property
    def finished(self) -> str | None:
        return self.sessions[-1].finished if self.sessions else None

    @property
    def seconds(self) -> float:
        """Wall time of all its sessions; one that was killed counts as 0."""
        return sum(session.seconds for session in self.sessions)

    @property
    def exit_code(self) -> int | None:
        return self.sessions[-1].exit_code if self.sessions else None

    def values(self) -> dict[str, Any]:
        """The manifest's entry; ``from_values`` reads it."""
        plain = _plain(self)
        named = {"started": self.started, "finished": self.finished}
        named |= {"seconds": round(self.seconds, 1), "exit_code": self.exit_code}
        return {"name": plain.pop("name"), "kind": plain.pop("kind"), **named, **plain}

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> StageRecord:
        known = {f.name for f in fields(cls)}
        record = cls(**{name: value for name, value in values.items() if name in known})
        record.inputs = {name: Input(**value) for name, value in record.inputs.items()}
        record.outputs = {name: Output(**value) for name, value in record.outputs.items()}
        record.sessions = [Session(**value) for value in record.sessions]
        return record


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


@dataclass
class PipelineRecord:
    """A pipeline's folder. ``stages`` are those of its YAML, in order, with ``None`` for one that
    has never run; ``values`` is the manifest as it is (recipe, versions, host, seed, status)."""

    folder: Path
    values: dict[str, Any]
    stages: dict[str, StageRecord | None]

    @property
    def status(self) -> str:
        return self.values.get("status", RUNNING)

    def ran(self) -> Iterator[StageRecord]:
        """The stages that have run or begun to, in order."""
        yield from (record for record in self.stages.values() if record is not None)

    def edges(self) -> Iterator[tuple[str, str, str, str]]:
        """(stage, what it made, stage that used it, in which field), in order of use."""
        for record in self.ran():
            for name, used in record.inputs.items():
                if used.stage is not None:
                    yield used.stage, used.path.partition("/")[2], record.name, name

    def folder_of(self, name: str) -> Path:
        return self.folder / name

    def product_of(self, name: str) -> Path | None:
        """The checkpoint or file that stage ``name`` made; None while it has made none."""
        record = self.stages.get(name)
        if record is None or record.product is None:
            return None
        return self.folder / name / record.product


def read(folder: str | Path) -> PipelineRecord:
    """The pipeline in ``folder``, finished or not. ``UserError`` where there is none, or its
    manifest is damaged."""
    folder = Path(folder)
    values = read_values(folder)
    if values is None:
        raise UserError(f"{folder}: there is no {MANIFEST_FILE} of a pipeline")
    return PipelineRecord(folder, values, {n: _record(r) for n, r in values["stages"].items()})


def _record(values: dict[str, Any]) -> StageRecord | None:
    return StageRecord.from_values(values) if "settings" in values else None


def read_values(folder: Path) -> dict[str, Any] | None:
    """manifest.json of the pipeline in ``folder``; None if there is none. ``UserError`` for a
    folder that holds another kind of run."""
    path = folder / MANIFEST_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise UserError(f"{folder}: is not a folder, or lies in a file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(values, dict) or values.get("verb") != VERB or "stages" not in values:
        raise UserError(f"{folder}: holds another run, not a pipeline of grpo-engine {VERB}")
    return values


class Lineage:
    """The manifest of the pipeline in ``folder``, while it runs. ``records`` also keeps stages that
    the YAML no longer has (as ``former_stages``), so that one that comes back is found again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        values = read_values(folder) or {}
        listed = {**values.pop("former_stages", {}), **values.pop("stages", {})}
        self.records = {
            name: StageRecord.from_values(entry)
            for name, entry in listed.items()
            if "settings" in entry
        }
        self.values: dict[str, Any] = values
        self.hashes = FileHashes(folder / HASHES_FILE)

    def write(self, stages: dict[str, str], **values: Any) -> None:
        """``stages``: name and kind of each stage of the YAML, in order."""
        self.values.update(values)
        listed = {
            name: self.records[name].values()
            if name in self.records
            else {"name": name, "kind": kind, "status": "not begun"}
            for name, kind in stages.items()
        }
        former = {n: record.values() for n, record in self.records.items() if n not in stages}
        whole = {"verb": VERB, **self.values, "stages": listed}
        if former:
            whole["former_stages"] = former
        text = json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(self.folder / MANIFEST_FILE, text)
        self.hashes.save()


# -- content hashes --------------------------------------------------------------------------------


class FileHashes:
    """sha256 of files, remembered by size and time of last change, as git does: a checkpoint is
    read once, not at every start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._changed = False
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # it can always be made again
            known = None
        self._known: dict[str, list[Any]] = known if isinstance(known, dict) else {}

    def save(self) -> None:
        if self._changed:
            kept = {name: entry for name, entry in self._known.items() if Path(name).exists()}
            write_atomically(self.path, json.dumps(kept))
            self._changed = False

    def file(self, path: Path) -> str:
        stat = path.stat()
        key, seen = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
        known = self._known.get(key)
        if not isinstance(known, list) or len(known) != 3 or known[:2] != seen:
            known = self._known[key] = [*seen, file_sha256(path)]
            self._changed = True
        return known[2]

    def content(self, path: Path) -> str:
        """Of a file its sha256; of a folder one hash over the names and contents of its files.

        A checkpoint counts as the model it holds: ``trainer/`` and the seal are left out, so the
        same weights are the same input. Raises ``DamagedCheckpoint`` for one that is not as it was
        sealed, ``FileNotFoundError`` for what is not there."""
        if path.is_file():
            return self.file(path)
        if not path.is_dir():
            raise FileNotFoundError(path)
        sealed = self._sealed(path) if (path / SEAL).is_file() else None
        digest = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            name = file.relative_to(path).as_posix()
            if name == SEAL or any(part.startswith(".") for part in Path(name).parts):
                continue
            one = self.file(file)
            if sealed is not None and name in sealed and one != sealed.pop(name):
                raise DamagedCheckpoint(f"{name} does not have the sha256 it was written with")
            if sealed is None or not name.startswith("trainer/"):
                digest.update(f"{name}\0{one}\n".encode())
        if sealed:
            raise DamagedCheckpoint(f"{next(iter(sealed))} is missing")
        return digest.hexdigest()

    @staticmethod
    def _sealed(path: Path) -> dict[str, str]:
        try:
            listed = json.loads((path / SEAL).read_text(encoding="utf-8"))["files"]
            return {name: entry["sha256"] for name, entry in listed.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpoint(f"{SEAL} cannot be read ({error})") from error


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
