"""How good scores are at telling right from wrong, and how far their probabilities can be trusted.

All estimators take a weight for each row; the bootstrap draws weights. The unit of resampling is
the prompt: several answers to one prompt are not independent evidence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

DRAWS = 2000  # of the bootstrap


def probability(scores: np.ndarray) -> np.ndarray:
    """The logistic function, without overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(scores, dtype=np.float64)))


def accuracy(correct: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Weighted mean of ``correct`` (1, 0, or 0.5 for a tie)."""
    return float(np.average(correct, weights=weights))


def correct_pairs(margins: np.ndarray) -> np.ndarray:
    """1 where the chosen answer scored higher, 0 where lower, 0.5 where equal."""
    return (np.sign(margins) + 1) / 2


def correct_labels(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """1 where the score has the label's sign (positive: safe), 0.5 at a score of exactly 0."""
    return (np.sign(scores) * (2 * labels - 1) + 1) / 2


def area_under_roc(
    scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> float | None:
    """The chance that a row of label 1 scores above one of label 0, ties counting half (Mann and
    Whitney). None where a label does not occur."""
    weights = np.ones(len(scores)) if weights is None else weights
    _, rank = np.unique(scores, return_inverse=True)
    positive = np.bincount(rank, weights * labels)
    negative = np.bincount(rank, weights * (1 - labels))
    pairs = positive.sum() * negative.sum()
    if not pairs:
        return None
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / pairs)


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float | None], groups: np.ndarray, seed: int = 0
) -> list[float] | None:
    """95 % percentile interval of ``statistic(weights)``, resampling groups of rows.

    ``groups`` [R]: the group of each row, numbered from 0. A draw in which the statistic is
    undefined (None) is left out. None for a single group: it has no spread.
    """
    count = int(groups.max()) + 1
    if count < 2:
        return None
    dice = np.random.default_rng(seed)
    values = []
    for _ in range(DRAWS):
        drawn = np.bincount(dice.integers(0, count, count), minlength=count).astype(np.float64)
        value = statistic(drawn[groups])
        if value is not None:
            values.append(value)
    if not values:
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]


def reliability(
    predicted: np.ndarray, observed: np.ndarray, bins: int, low: float = 0.0
) -> list[dict[str, Any]]:
    """The reliability table: ``bins`` equal intervals of [``low``, 1], each with its count, mean
    predicted probability and observed frequency (None where it is empty)."""
    edges = np.linspace(low, 1.0, bins + 1)
    place = np.clip(np.searchsorted(edges, predicted, side="right") - 1, 0, bins - 1)
    table = []
    for number in range(bins):
        inside = place == number
        count = int(inside.sum())
        table.append(
            {
                "from": float(edges[number]),
                "to": float(edges[number + 1]),
                "count": count,
                "predicted": float(predicted[inside].mean()) if count else None,
                "observed": float(observed[inside].mean()) if count else None,
            }
        )
    return table


def calibration_error(table: list[dict[str, Any]]) -> float:
    """Expected calibration error: mean over rows of |predicted - observed| of their interval."""
    filled = [row for row in table if row["count"]]
    total = sum(row["count"] for row in filled)
    return sum(row["count"] * abs(row["predicted"] - row["observed"]) for row in filled) / total


def correlation(x: np.ndarray, y: np.ndarray) -> dict[str, float | None]:
    """Pearson's and Spearman's; None where one side does not vary."""
    return {"pearson": _pearson(x, y), "spearman": _pearson(_ranks(x), _ranks(y))}


def _pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place]
