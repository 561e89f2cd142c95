"""A file of rows that is written as they come, and is not there before all of them are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any


class Draft(AbstractContextManager):
    """``path``, one JSON object a line. ``publish`` puts it in place in one step; leaving without
    that leaves what was there before. OSError where it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path, self._place = path, path.with_name(f".{path.name}.draft")

    def __enter__(self) -> Draft:
        self._file = open(self._place, "w", encoding="utf-8", errors="replace", newline="\n")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._place.unlink(missing_ok=True)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def rows(self) -> Iterator[dict[str, Any]]:
        """What has been written."""
        self._file.flush()
        with open(self._place, encoding="utf-8", newline="\n") as lines:
            for line in lines:
                yield json.loads(line)

    def publish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._place, self.path)
