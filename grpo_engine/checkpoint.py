"""Checkpoints that are whole or not there, and are checked before they are trusted.

A checkpoint is written to a hidden sibling folder, every file is fsynced, ``checkpoint.json`` (size
and sha256 of each file) is written last, and one rename publishes it: a kill at any moment leaves
the previous checkpoint as it was. Checksums are verified on load because torch, safetensors and DCP
all load a file with a flipped bit without complaint. A bad checkpoint is renamed
``checkpoint-N.bad`` and the newest valid one is used, loudly.

Layout: a Hugging Face model folder that ``from_pretrained`` and vLLM load as is, and ``trainer/``
beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_engine.types import UserError

SEAL = "checkpoint.json"
_NAME = re.compile(r"checkpoint-(\d+)$")


class DamagedCheckpoint(Exception):
    """The folder is not a whole, unaltered checkpoint; the message says what is wrong with which
    file."""


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest(file)
        )


def _digest(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_step(path: Path) -> int:
    match = _NAME.search(path.name)
    if match is None:
        raise UserError(f"--resume {path}: the folder's name is not checkpoint-<step>")
    return int(match[1])


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Published checkpoints, oldest first, checked or not."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and _NAME.search(p.name)]
    return sorted(found, key=checkpoint_step)


def save_checkpoint(output_dir: Path, step: int, write: Callable[[Path], None], keep: int) -> Path:
    """Publish ``checkpoint-<step>`` with what ``write(folder)`` puts there, then delete the oldest
    beyond ``keep``.

    A checkpoint of this step that is already there and whole is left alone. The newest valid one is
    never deleted: pruning happens only after the new one is published.
    """
    final = output_dir / f"checkpoint-{step}"
    if final.exists():
        try:
            verify_checkpoint(final)
            return final
        except DamagedCheckpoint:
            quarantine(final)
    partial = output_dir / f".partial-checkpoint-{step}"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    write(partial)
    _seal(partial, step)
    os.rename(partial, final)
    _fsync(output_dir)
    others = [path for path in list_checkpoints(output_dir) if path != final]
    for old in others[: max(0, len(others) - (keep - 1))]:
        shutil.rmtree(old)
    for leftover in output_dir.glob(".partial-checkpoint-*"):
        shutil.rmtree(leftover)
    return final


def _seal(folder: Path, step: int) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in files:
        _fsync(path)
    entries = {
        str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": file_sha256(p)}
        for p in files
    }
    seal = folder / SEAL
    seal.write_text(json.dumps({"step": step, "files": entries}, indent=1))
    _fsync(seal)
    for directory in {folder, *(p.parent for p in files)}:
        _fsync(directory)


def verify_checkpoint(folder: Path) -> None:
    """Raise ``DamagedCheckpoint`` unless every file is there with its recorded size and sha256."""
    seal = folder / SEAL
    if not seal.is_file():
        raise DamagedCheckpoint(f"{SEAL} is missing")
    try:
        entries = json.loads(seal.read_text())["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{SEAL} cannot be read ({error})") from error
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{name} is missing")
        size = path.stat().st_size
        if size != entry["size"]:
            raise DamagedCheckpoint(f"{name} has {size} bytes, {entry['size']} were written")
        if file_sha256(path) != entry["sha256"]:
            raise DamagedCheckpoint(f"{name} does not have the sha256 it was written with")


def quarantine(folder: Path, suffix: str = "bad") -> Path:
    """Rename a checkpoint out of the way (never delete it) and return its new path."""
    target = folder.with_name(f"{folder.name}.{suffix}")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.{suffix}{number}")
    os.rename(folder, target)
    return target


def set_aside_later(output_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints after ``step``: a run resumed there makes its own."""
    return [
        quarantine(path, "superseded")
        for path in list_checkpoints(output_dir)
        if checkpoint_step(path) > step
    ]


def find_checkpoint(path: Path, say: Callable[[str], None]) -> Path:
    """The checkpoint to resume from: ``path`` itself, or the newest valid one of the run folder
    ``path``.

    Raises ``UserError`` when there is none; a damaged checkpoint named explicitly is an error and
    is left as it is, a damaged one met while looking for the newest is quarantined and reported
    through ``say``.
    """
    if not path.is_dir():
        raise UserError(f"--resume {path}: no such folder")
    if _NAME.search(path.name):
        try:
            verify_checkpoint(path)
        except DamagedCheckpoint as damage:
            raise UserError(f"--resume {path}: the checkpoint is damaged: {damage}") from damage
        return path
    damaged = []
    for folder in reversed(list_checkpoints(path)):
        try:
            verify_checkpoint(folder)
        except DamagedCheckpoint as damage:
            damaged.append((folder, damage))
            continue
        for bad, damage in damaged:
            say(f"{bad.name} is damaged ({damage}); moved to {quarantine(bad).name}")
        return folder
    if damaged:
        newest, damage = damaged[0]
        raise UserError(f"--resume {path}: no valid checkpoint; {newest.name} is damaged: {damage}")
    raise UserError(f"--resume {path}: there is no checkpoint in this folder")
