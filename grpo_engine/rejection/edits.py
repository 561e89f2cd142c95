"""The human hand in the cold start: the candidates as a JSONL file, which a person edits, and the
same file read back. A line may be changed in its ``completion``, given ``"drop": true``, or
deleted; anything else that has changed is a mistake, and named."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from grpo_engine.data import Row, read_rows
from grpo_engine.rejection.drafts import Draft
from grpo_engine.rejection.select import Candidate
from grpo_engine.sampling.samples import fingerprint
from grpo_engine.types import UserError

_OWN = ("id", "completion", "drop")


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


def write_candidates(path: Path, candidates: Iterable[Candidate]) -> int:
    """The file for the person, one line a candidate; returns how many. UserError where it cannot be
    written."""
    count = 0
    with ExitStack() as stack:
        try:
            file = stack.enter_context(Draft(path))
        except OSError as error:
            raise UserError(f"--edit_file {path}: cannot be written ({error.strerror})") from error
        for one in candidates:
            file.write([edit_line(one)])
            count += 1
        file.publish()
    return count


class Edits:
    """The person's version of the candidates, which are offered to it one after the other.

    Raises UserError naming file and line for a line that is none of them, is there twice, or has
    other changes than it may.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offered = self.changed = self.dropped = 0
        self._lines: dict[str, tuple[int, Row]] = {}  # not taken yet, with their numbers
        # An empty file means that every candidate was dropped.
        lines = read_rows(str(path)) if path.stat().st_size else []
        for number, line in enumerate(lines, start=1):
            name = line.get("id")
            if not isinstance(name, str):
                raise self._not_ours(number, name)
            if name in self._lines:
                raise UserError(f"{self._where(number)}: id {name!r} is there twice")
            self._check(line, self._where(number))
            self._lines[name] = number, line

    def take(self, candidate: Candidate) -> str | None:
        """The text of the candidate as the file has it, None where it was dropped."""
        self.offered += 1
        offered = edit_line(candidate)
        number, line = self._lines.pop(offered["id"], (0, {"drop": True}))
        for column, value in offered.items():
            if column not in _OWN and column in line and line[column] != value:
                raise UserError(
                    f"{self._where(number)}: {column!r} was changed; only completion may be"
                )
        if line.get("drop", False):
            self.dropped += 1
            return None
        self.changed += line["completion"] != offered["completion"]
        return line["completion"]

    def check_all_taken(self) -> None:
        for name, (number, _) in self._lines.items():
            raise self._not_ours(number, name)

    def counts(self) -> dict[str, int]:
        return {"candidates": self.offered, "edited": self.changed, "dropped": self.dropped}

    def _where(self, number: int) -> str:
        return f"--edit_file {self.path}: line {number}"

    def _not_ours(self, number: int, name: Any) -> UserError:
        return UserError(
            f"{self._where(number)}: id {name!r:.40} is none of this run's candidates; move the "
            "file away to have them written anew"
        )

    @staticmethod
    def _check(line: Row, where: str) -> None:
        completion, drop = line.get("completion"), line.get("drop", False)
        if not isinstance(drop, bool):
            raise UserError(f"{where}: drop must be true or false, got {drop!r:.40}")
        if not drop and (not isinstance(completion, str) or not completion.strip()):
            raise UserError(f"{where}: completion must be a text, got {completion!r:.40}")


def check_edit_file(config_value: str | None) -> None:
    """What can be wrong before there are candidates: the file's name and its folder."""
    if config_value is None:
        return
    path = Path(config_value).expanduser()
    if path.suffix != ".jsonl" or path.is_dir():
        raise UserError(f"--edit_file {config_value}: wanted the name of a .jsonl file")
    if not path.exists() and not path.absolute().parent.is_dir():
        raise UserError(f"--edit_file {config_value}: its folder does not exist")
