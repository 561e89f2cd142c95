"""Estimators of a reward model's results, on cases whose answer is known."""

import itertools
import math

import numpy as np
import pytest

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


def test_probability_does_not_overflow():
    scores = np.array([-1e4, -2.0, 0.0, 2.0, 1e4])
    expected = [0.0, 1 / (1 + math.e**2), 0.5, 1 / (1 + math.e**-2), 1.0]
    np.testing.assert_allclose(probability(scores), expected, rtol=1e-12)


def test_ties_count_half():
    assert correct_pairs(np.array([2.0, -1.0, 0.0])).tolist() == [1.0, 0.0, 0.5]
    found = correct_labels(np.array([3.0, 3.0, -1.0, -1.0, 0.0]), np.array([1, 0, 1, 0, 1.0]))
    assert found.tolist() == [1.0, 0.0, 0.0, 1.0, 0.5]
    assert accuracy(np.array([1.0, 0.0, 0.5])) == 0.5
    assert accuracy(np.array([1.0, 0.0]), np.array([3.0, 1.0])) == 0.75


@pytest.mark.parametrize("seed", range(3))
def test_auc_is_the_share_of_ordered_pairs(seed):
    dice = np.random.default_rng(seed)
    scores = dice.integers(0, 6, 30).astype(float)  # many ties
    labels = dice.integers(0, 2, 30).astype(float)
    pairs = list(itertools.product(scores[labels == 1], scores[labels == 0]))
    expected = np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs])
    assert area_under_roc(scores, labels) == pytest.approx(expected)
    weights = dice.integers(0, 4, 30)
    repeated = area_under_roc(np.repeat(scores, weights), np.repeat(labels, weights))
    assert area_under_roc(scores, labels, weights.astype(float)) == pytest.approx(repeated)


def test_auc_needs_both_labels():
    assert area_under_roc(np.array([1.0, 2.0]), np.array([1.0, 1.0])) is None


def test_interval_resamples_prompts_not_rows():
    """50 prompts with 8 equal rows each know no more than 50 rows."""
    dice = np.random.default_rng(0)
    right = (dice.random(50) < 0.7).astype(float)
    single = bootstrap_interval(lambda w: accuracy(right, w), np.arange(50))
    rows, prompts = np.repeat(right, 8), np.repeat(np.arange(50), 8)
    grouped = bootstrap_interval(lambda w: accuracy(rows, w), prompts)
    assert grouped == pytest.approx(single)
    naive = bootstrap_interval(lambda w: accuracy(rows, w), np.arange(400))
    assert naive[1] - naive[0] < 0.5 * (grouped[1] - grouped[0])
    exact = 2 * 1.96 * math.sqrt(right.mean() * (1 - right.mean()) / 50)
    assert grouped[1] - grouped[0] == pytest.approx(exact, rel=0.1)
    assert bootstrap_interval(lambda w: accuracy(rows, w), np.zeros(400, dtype=int)) is None


def test_interval_covers_the_truth():
    covered = 0
    for seed in range(60):
        rows = (np.random.default_rng(seed).random(80) < 0.7).astype(float)
        low, high = bootstrap_interval(lambda w, r=rows: accuracy(r, w), np.arange(80))
        covered += low <= 0.7 <= high
    assert covered >= 51  # of 57 expected; 51 is three standard deviations below


def test_reliability_table():
    predicted = np.array([0.05, 0.15, 0.15, 0.5, 0.95, 1.0])
    observed = np.array([0.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    table = reliability(predicted, observed, 5)
    assert [row["count"] for row in table] == [3, 0, 1, 0, 2]
    assert table[0]["predicted"] == pytest.approx(0.35 / 3)
    assert table[0]["observed"] == pytest.approx(1 / 3)
    assert table[1]["predicted"] is None and table[1]["observed"] is None
    assert (table[4]["from"], table[4]["to"]) == pytest.approx((0.8, 1.0))
    gaps = [abs(0.35 / 3 - 1 / 3), 0.5, 0.025]
    expected = (3 * gaps[0] + 1 * gaps[1] + 2 * gaps[2]) / 6
    assert calibration_error(table) == pytest.approx(expected)


def test_calibrated_scores_have_a_small_error_and_overconfident_ones_a_known_one():
    dice = np.random.default_rng(0)
    truth = dice.random(200_000)
    outcomes = (dice.random(200_000) < truth).astype(float)
    assert calibration_error(reliability(truth, outcomes, 10)) < 0.01
    sure = np.full(200_000, 0.99)  # says 99 %, is right half the time
    assert calibration_error(reliability(sure, outcomes, 10)) == pytest.approx(0.49, abs=0.01)


def test_bins_from_one_half():
    table = reliability(np.array([0.5, 0.74, 0.76, 1.0]), np.ones(4), 2, low=0.5)
    assert [row["count"] for row in table] == [2, 2]


def test_correlations():
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert correlation(x, x**3)["spearman"] == pytest.approx(1.0)
    assert correlation(x, x**3)["pearson"] == pytest.approx(np.corrcoef(x, x**3)[0, 1])
    assert correlation(x, -x) == {"pearson": pytest.approx(-1.0), "spearman": pytest.approx(-1.0)}
    assert correlation(x, np.ones(4)) == {"pearson": None, "spearman": None}
    # ties share the mean rank: ranks 0.5, 0.5, 2, 3 against 0, 1, 2, 3
    tied = correlation(np.array([1.0, 1.0, 2.0, 3.0]), x)["spearman"]
    assert tied == pytest.approx(np.corrcoef([0.5, 0.5, 2, 3], [0, 1, 2, 3])[0, 1])
