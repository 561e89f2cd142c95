"""The folder of a run: what lies in it, what may be written to it, and whether it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_engine.settings import Settings, TrainConfig, build_config, load_yaml
from grpo_engine.types import UserError

RUN_FILES = (
    *("config.yaml", "metrics.jsonl", "manifest.json", "results.json", "report.html"),
    *("completions", "vllm.log"),
)

SOURCES = (
    *("model", "dataset", "eval_dataset", "chat_template"),
    *("general_dataset", "general_eval_dataset", "helpful_model", "safety_model"),
)


def check_output_dir(
    config: Settings,
    *,
    resuming: bool,
    overwrite: bool,
    sources: Sequence[str] = SOURCES,
) -> None:
    """Refuse to write over another run or to delete an input (the fields ``sources``), and fail now
    rather than at the first checkpoint if the folder cannot be written to. Leaves nothing
    behind."""
    folder = Path(config.output_dir)
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output_dir {folder}: exists and is not a folder")
        files = run_files(folder)
        if files and not resuming and not overwrite:
            raise UserError(
                f"--output_dir {folder}: already holds a run; continue it with --resume, or "
                "replace it with --overwrite"
            )
        for name in sources if overwrite else ():
            given = getattr(config, name, None) or ""
            for path in [row.source for row in given] if isinstance(given, list) else [given]:
                source = Path(path).expanduser().resolve()
                if any(source.is_relative_to(file.resolve()) for file in files):
                    raise UserError(f"--overwrite: would delete --{name} {path}")
    except OSError as error:
        raise UserError(f"--output_dir {folder}: not writable ({error.strerror})") from error
    check_writable(folder)


def check_writable(folder: Path) -> None:
    """UserError where no file can be made in ``folder``. Leaves nothing behind."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
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


def check_resumable(config: TrainConfig, folder: Path) -> None:
    """A run continues only as itself: fields that change what it computes must be as they were."""
    saved = build_config(saved_config(str(folder)), type(config))
    allowed = config.RESUMABLE_FIELDS
    if saved.length_is_fixed:
        allowed = allowed - config.LENGTH_FIELDS
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
