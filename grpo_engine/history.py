"""What a run remembers of its own metrics, in bounded memory however long it is."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

HISTORY_ROWS = 512  # latest rows kept
WINDOW = 5  # rows in a window
EVALUATIONS = 512  # latest held-out evaluations kept
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


@dataclass(frozen=True)
class Evaluation:
    """A held-out evaluation, and the rewards of the training rows since the one before it.

    ``rewards[key]`` is the mean of ``key`` (``reward`` or ``rewards/<name>/mean``) over those rows,
    ``spreads[key]`` the mean of its standard deviation over completions.
    """

    step: int
    accuracy: float
    samples: int  # judged, in this evaluation
    rewards: Mapping[str, float] = field(default_factory=dict)
    spreads: Mapping[str, float] = field(default_factory=dict)


class Evaluations(Sequence):
    """The latest held-out evaluations of a run, oldest first."""

    def __init__(self) -> None:
        self._kept: deque[Evaluation] = deque(maxlen=EVALUATIONS)
        self._since: dict[str, list[float]] = {}

    def append(self, row: Mapping[str, Any]) -> None:
        for key in row:
            value = finite_number(row, key)
            if value is not None and (key in ("reward", "reward_std") or _is_reward(key)):
                self._since.setdefault(key, []).append(value)
        accuracy = finite_number(row, "eval/accuracy")
        if accuracy is None:
            return
        means = {key: fmean(values) for key, values in self._since.items()}
        self._since = {}
        evaluation = Evaluation(
            step=row["step"],
            accuracy=accuracy,
            samples=int(finite_number(row, "eval/num_samples") or 0),
            rewards={k: v for k, v in means.items() if not k.endswith("std")},
            spreads={
                key: means[spread]
                for key in means
                if (spread := key.removesuffix("/mean") + _spread_of(key)) in means
            },
        )
        self._kept.append(evaluation)

    def copy(self) -> Evaluations:
        """With what has come in since the last evaluation."""
        twin = Evaluations()
        twin._kept = self._kept.copy()
        twin._since = {key: list(values) for key, values in self._since.items()}
        return twin

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        return list(self._kept)[index]


def _is_reward(key: str) -> bool:
    return key.startswith("rewards/") and key.endswith(("/mean", "/std"))


def _spread_of(key: str) -> str:
    return "_std" if key == "reward" else "/std"


class History(Sequence):
    """The latest ``HISTORY_ROWS`` rows of a run; once older ones had to go, a summary before them.

    The summary is a row with ``start/<key>``, the mean of the first WINDOW values, and
    ``best/<key>``, the highest mean of WINDOW values in a row, for the keys that are
    compared with the whole run. ``evaluations`` are remembered beside the rows."""

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        self.evaluations = Evaluations()
        self._latest: deque[dict[str, Any]] = deque(maxlen=HISTORY_ROWS)
        self._windows: dict[str, deque[float]] = {}
        self._summary: dict[str, Any] = {}
        self._forgetful = False
        for row in rows:
            self.append(row)

    def append(self, row: dict[str, Any]) -> None:
        self._forgetful = self._forgetful or len(self._latest) == HISTORY_ROWS
        self._latest.append(row)
        self.evaluations.append(row)
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
