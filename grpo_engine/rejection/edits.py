"""The human hand in the cold start: the candidates as a JSONL file, which a person edits, and the
same file read back. A line may be changed in its ``completion``, given ``"drop": true``, or
deleted; anything else that has changed is a mistake, and named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_engine.data import read_rows
from grpo_engine.evaluation.samples import fingerprint
from grpo_engine.metrics import write_atomically
from grpo_engine.rejection.select import Candidate
from grpo_engine.types import UserError

_OWN = ("id", "completion", "drop")


@dataclass(frozen=True)
class Edits:
    """``texts``: the completion of each candidate as the file has it, None where it was dropped."""

    texts: list[str | None]
    changed: int
    dropped: int

    def counts(self) -> dict[str, int]:
        return {"candidates": len(self.texts), "edited": self.changed, "dropped": self.dropped}


def edit_line(candidate: Candidate) -> dict[str, Any]:
    """What the person sees of a candidate. ``id`` names the very text that was offered."""
    row, draw = candidate.row, candidate.draw
    shown = {
        "prompt": row["prompt"],
        "solution": row.get("solution"),
        "domain": row["domain"],
        "row": draw.row,
        "sample": draw.sample,
        "generator": draw.generator,
    }
    shown = {name: value for name, value in shown.items() if value is not None}
    known = fingerprint(candidate.cell, candidate.completion)[:16]
    return {"id": known, **shown, "completion": candidate.completion}


def write_candidates(path: Path, candidates: Sequence[Candidate]) -> None:
    """The file for the person, one line a candidate. UserError where it cannot be written."""
    lines = [json.dumps(edit_line(one), ensure_ascii=False) + "\n" for one in candidates]
    try:
        write_atomically(path, "".join(lines))
    except OSError as error:
        raise UserError(f"--edit_file {path}: cannot be written ({error.strerror})") from error


def read_edits(path: Path, candidates: Sequence[Candidate]) -> Edits:
    """The person's version of ``candidates``. Raises UserError naming file and line for a line that
    is none of them, is there twice, or has other changes than it may."""
    offered = {edit_line(one)["id"]: edit_line(one) for one in candidates}
    texts: dict[str, str | None] = {}
    # An empty file means that every candidate was dropped.
    lines = read_rows(str(path)) if path.stat().st_size else []
    for number, line in enumerate(lines, start=1):
        where = f"--edit_file {path}: line {number}"
        name = line.get("id")
        if not isinstance(name, str) or name not in offered:
            raise UserError(
                f"{where}: id {name!r:.40} is none of this run's candidates; move the file away "
                "to have them written anew"
            )
        if name in texts:
            raise UserError(f"{where}: id {name!r} is there twice")
        for column, value in offered[name].items():
            if column not in _OWN and column in line and line[column] != value:
                raise UserError(f"{where}: {column!r} was changed; only completion may be")
        completion, drop = line.get("completion"), line.get("drop", False)
        if not isinstance(drop, bool):
            raise UserError(f"{where}: drop must be true or false, got {drop!r:.40}")
        if not drop and (not isinstance(completion, str) or not completion.strip()):
            raise UserError(f"{where}: completion must be a text, got {completion!r:.40}")
        texts[name] = None if drop else completion
    edited = [texts.get(name) for name in offered]
    pairs = list(zip(edited, offered.values(), strict=True))
    return Edits(
        edited,
        changed=sum(text is not None and text != line["completion"] for text, line in pairs),
        dropped=sum(text is None for text in edited),
    )


def check_edit_file(config_value: str | None) -> None:
    """What can be wrong before there are candidates: the file's name and its folder."""
    if config_value is None:
        return
    path = Path(config_value).expanduser()
    if path.suffix != ".jsonl" or path.is_dir():
        raise UserError(f"--edit_file {config_value}: wanted the name of a .jsonl file")
    if not path.exists() and not path.absolute().parent.is_dir():
        raise UserError(f"--edit_file {config_value}: its folder does not exist")
