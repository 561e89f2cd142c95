"""The folder of a run that goes on where it stopped: what it may hold, and whether its samples are
of the same run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_engine.run_folder import check_writable
from grpo_engine.types import UserError


def check_folder(
    folder: Path,
    overwrite: bool,
    sources: Mapping[str, str | None],
    *,
    verb: str,
    files: Sequence[str],
) -> None:
    """Refuse a folder that holds something other than the ``files`` of a run of ``verb``, holds an
    input (``sources``: by field) to be deleted, or cannot be written to. Leaves nothing behind."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: exists and is not a folder")
    there = [name for name in (*files, "metrics.jsonl") if _is_filled(folder / name)]
    if "metrics.jsonl" in there or (there and not _is_run_of(verb, folder)):
        raise UserError(f"--output_dir {folder}: holds another run ({', '.join(there)})")
    own = {(folder / file).resolve() for file in files}
    for name, source in sources.items() if overwrite else ():
        if source and Path(source).expanduser().resolve() in own:
            raise UserError(f"--overwrite: would delete --{name} {source}")
    check_writable(folder)


def _is_filled(path: Path) -> bool:
    """An empty file is what a run stopped at its very beginning leaves."""
    return path.exists() and path.stat().st_size > 0


def read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"--output_dir {folder}: manifest.json cannot be read ({error})") from error


def _is_run_of(verb: str, folder: Path) -> bool:
    manifest = read_manifest(folder)
    return manifest is not None and manifest.get("verb") == verb


def check_same_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    """UserError naming the first input that is not what the samples in ``folder`` came from."""
    manifest = read_manifest(folder)
    if manifest is None:
        return
    then = {group: members for group, members in manifest["inputs"].items() if group in inputs}
    before, after = (_flat(identity(one)) for one in (then, inputs))
    for name in {**before, **after}:
        if before.get(name) != after.get(name):
            raise UserError(
                f"--output_dir {folder}: its samples have {name} {_short(before.get(name))}, now "
                f"it is {_short(after.get(name))}; take another folder or --overwrite"
            )


def identity(inputs: dict[str, Any]) -> dict[str, Any]:
    """``inputs`` without the places they were found at: what counts is the content."""
    plain = json.loads(json.dumps(inputs))
    return {
        group: {name: value for name, value in members.items() if name not in ("path", "source")}
        for group, members in plain.items()
    }


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{group} {name}": value
        for group, members in values.items()
        for name, value in members.items()
    }


def _short(value: Any) -> str:
    return repr(value)[:60]
