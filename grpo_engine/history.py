"""What a run remembers of its own metrics, in bounded memory however long it is."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

HISTORY_ROWS = 512  # latest rows kept
WINDOW = 5  # rows in a window
START, BEST = "start/", "best/"  # keys of the summary: first and highest mean of a window


def finite_number(row: Mapping[str, Any], key: str) -> float | None:
    """``row[key]`` where it is a finite number."""
    value = row.get(key)
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


def accuracy_keys(row: Mapping[str, Any]) -> list[str]:
    """The mean rewards in ``row`` that measure right answers."""
    return [
        key
        for key in row
        if key.startswith("rewards/") and "accuracy" in key and key.endswith("/mean")
    ]


class History(Sequence):
    """The latest ``HISTORY_ROWS`` rows of a run; once older ones had to go, a summary before them.

    The summary is a row with ``start/<key>``, the mean of the first WINDOW values, and
    ``best/<key>``, the highest mean of WINDOW values in a row, for the keys that are
    compared with the whole run."""

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        self._latest: deque[dict[str, Any]] = deque(maxlen=HISTORY_ROWS)
        self._windows: dict[str, deque[float]] = {}
        self._summary: dict[str, Any] = {}
        self._forgetful = False
        for row in rows:
            self.append(row)

    def append(self, row: dict[str, Any]) -> None:
        self._forgetful = self._forgetful or len(self._latest) == HISTORY_ROWS
        self._latest.append(row)
        for key in ("entropy", "completions/mean_length", *accuracy_keys(row)):
            value = finite_number(row, key)
            if value is None:
                continue
            window = self._windows.setdefault(key, deque(maxlen=WINDOW))
            window.append(value)
            if len(window) == WINDOW:
                mean = fmean(window)
                self._summary.setdefault(START + key, mean)
                self._summary[BEST + key] = max(mean, self._summary.get(BEST + key, mean))

    def _rows(self) -> list[dict[str, Any]]:
        return [self._summary, *self._latest] if self._forgetful else list(self._latest)

    def __len__(self) -> int:
        return len(self._latest) + self._forgetful

    def __getitem__(self, index: Any) -> Any:
        return self._rows()[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows())
