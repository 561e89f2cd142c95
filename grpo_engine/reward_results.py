"""``results.json`` of a reward model: how it does on held-out rows, at one step.

Accuracy with its interval, whether its probabilities can be trusted (reliability table, expected
calibration error), and how far it pays for length, the best known way to please a reward model.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from grpo_engine.calibration import (
    accuracy,
    area_under_roc,
    bootstrap_interval,
    calibration_error,
    correct_labels,
    correct_pairs,
    correlation,
    probability,
    reliability,
)
from grpo_engine.judged_rows import JudgedRows

RESULTS_FILE = "results.json"
HISTOGRAM_BINS = 24


def reward_results(scores: np.ndarray, rows: JudgedRows, *, bins: int) -> dict[str, Any]:
    """``scores`` [R * A] fp64, raw, in the order of the rows' sequences."""
    common = {
        "rows": len(rows),
        "prompts": int(rows.prompt_numbers.max()) + 1,
        "scores": {"mean": float(scores.mean()), "std": float(scores.std())},
    }
    measured = _pairs(scores, rows, bins) if rows.labels is None else _labels(scores, rows, bins)
    return common | measured


def correct_rows(scores: np.ndarray, rows: JudgedRows) -> np.ndarray:
    """[R] 1 where the model agrees with the row, 0 where not, 0.5 where it is undecided."""
    if rows.labels is not None:
        return correct_labels(scores, rows.labels)
    chosen, rejected = scores.reshape(-1, 2).T
    return correct_pairs(chosen - rejected)


def _pairs(scores: np.ndarray, rows: JudgedRows, bins: int) -> dict[str, Any]:
    """A pair's prediction is the chance of the answer the model prefers, at least one half; it is
    observed if that answer is the chosen one."""
    margins = np.subtract(*scores.reshape(-1, 2).T)
    correct = correct_rows(scores, rows)
    table = reliability(probability(np.abs(margins)), correct, bins, low=0.5)
    return {
        "accuracy": _accuracy(correct, rows),
        "margin": {
            "mean": float(margins.mean()),
            "std": float(margins.std()),
            "histogram": _histogram(margins),
        },
        "calibration": {
            "predicted": "probability of the answer that the model prefers",
            "observed": "that answer is the chosen one",
            "error": calibration_error(table),
            "table": table,
        },
        "length": {**_length(scores, rows), **_length_of_pairs(margins, correct, rows)},
    }


def _labels(scores: np.ndarray, rows: JudgedRows, bins: int) -> dict[str, Any]:
    labels = rows.labels
    table = reliability(probability(scores), labels, bins)
    area = area_under_roc(scores, labels)
    interval = None
    if area is not None:
        interval = bootstrap_interval(
            lambda weights: area_under_roc(scores, labels, weights), rows.prompt_numbers
        )
    return {
        "accuracy": _accuracy(correct_rows(scores, rows), rows),
        "auc": {"value": area, "ci95": interval},
        "safe_share": float(labels.mean()),
        "margin": {"histogram": _histogram(scores[labels == 1], scores[labels == 0])},
        "calibration": {
            "predicted": "probability of safe",
            "observed": "labelled safe",
            "error": calibration_error(table),
            "table": table,
        },
        "length": _length(scores, rows),
    }


def _accuracy(correct: np.ndarray, rows: JudgedRows) -> dict[str, Any]:
    return {
        "value": accuracy(correct),
        "ci95": bootstrap_interval(lambda weights: accuracy(correct, weights), rows.prompt_numbers),
    }


def _histogram(*groups: np.ndarray) -> dict[str, Any]:
    """Counts of each group over the same intervals."""
    whole = np.concatenate(groups)
    low, high = min(whole.min(), 0.0), max(whole.max(), 0.0)
    edges = np.linspace(low, high if high > low else low + 1.0, HISTOGRAM_BINS + 1)
    return {
        "edges": edges.tolist(),
        "counts": [np.histogram(group, edges)[0].tolist() for group in groups],
    }


def _length(scores: np.ndarray, rows: JudgedRows) -> dict[str, Any]:
    return {
        "mean_tokens": float(rows.answer_lengths.mean()),
        "score_correlation": correlation(scores, rows.answer_lengths.astype(np.float64)),
    }


def _length_of_pairs(margins: np.ndarray, correct: np.ndarray, rows: JudgedRows) -> dict[str, Any]:
    """What a judge would reach that always takes the longer answer, and whether the model still
    finds the chosen one where it is the shorter."""
    longer_by = np.subtract(*rows.answer_lengths.reshape(-1, 2).T).astype(np.float64)
    longer, shorter = longer_by > 0, longer_by < 0
    return {
        "margin_correlation": correlation(margins, longer_by),
        "accuracy_of_the_longer": accuracy(correct_pairs(longer_by)),
        "accuracy_where_chosen_is_longer": accuracy(correct[longer]) if longer.any() else None,
        "accuracy_where_chosen_is_shorter": accuracy(correct[shorter]) if shorter.any() else None,
        "chosen_longer_share": float(longer.mean()),
        "chosen_shorter_share": float(shorter.mean()),
    }
