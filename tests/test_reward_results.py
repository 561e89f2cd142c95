"""results.json of a reward model, on scores and rows whose figures are known."""

import json
import math

import numpy as np
import pytest
import torch

from grpo_engine.judged_rows import JudgedRows
from grpo_engine.reward_results import HISTOGRAM_BINS, correct_rows, reward_results


def pairs_of(lengths, prompts=None):
    """``lengths`` [R, 2] tokens of the chosen and the rejected answer, after prompts of 5."""
    lengths = np.asarray(lengths)
    count = len(lengths)
    return JudgedRows(
        token_ids=torch.zeros(int((lengths + 5).sum()), dtype=torch.int64),
        lengths=lengths.ravel() + 5,
        answer_lengths=lengths.ravel(),
        prompt_numbers=np.arange(count) if prompts is None else np.asarray(prompts),
        labels=None,
    )


def labels_of(labels, lengths):
    rows = pairs_of(np.stack([lengths, lengths], axis=1))
    return JudgedRows(
        token_ids=rows.token_ids,
        lengths=np.asarray(lengths) + 5,
        answer_lengths=np.asarray(lengths),
        prompt_numbers=rows.prompt_numbers,
        labels=np.asarray(labels, dtype=np.float64),
    )


def test_pairs():
    rows = pairs_of([[10, 5], [10, 5], [4, 8], [6, 6]], prompts=[0, 0, 1, 2])
    scores = np.array([3.0, 1.0, 2.0, 2.0, 1.0, 3.0, 4.0, 0.0])  # margins 2, 0, -2, 4
    found = reward_results(scores, rows, bins=5)
    assert correct_rows(scores, rows).tolist() == [1.0, 0.5, 0.0, 1.0]
    assert found["accuracy"]["value"] == 0.625
    low, high = found["accuracy"]["ci95"]
    assert 0.0 <= low < 0.625 < high <= 1.0
    assert (found["rows"], found["prompts"]) == (4, 3)
    assert found["margin"]["mean"] == 1.0
    length = found["length"]
    assert length["mean_tokens"] == pytest.approx(54 / 8)
    assert length["accuracy_of_the_longer"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert length["accuracy_where_chosen_is_longer"] == 0.75
    assert length["accuracy_where_chosen_is_shorter"] == 0.0
    assert (length["chosen_longer_share"], length["chosen_shorter_share"]) == (0.5, 0.25)
    expected = np.corrcoef([2.0, 0.0, -2.0, 4.0], [5, 5, -4, 0])[0, 1]
    assert length["margin_correlation"]["pearson"] == pytest.approx(expected)


def test_calibration_of_pairs_counts_the_preferred_answer():
    """A model that always says 75 % and is right on three pairs of four is calibrated."""
    margin = math.log(3)
    scores = np.array([[margin, 0.0]] * 75 + [[0.0, margin]] * 25).ravel()
    found = reward_results(scores, pairs_of([[3, 3]] * 100), bins=10)["calibration"]
    assert found["error"] == pytest.approx(0.0, abs=1e-9)
    filled = [row for row in found["table"] if row["count"]]
    assert [(row["count"], row["observed"]) for row in filled] == [(100, 0.75)]
    assert found["table"][0]["from"] == 0.5 and found["table"][-1]["to"] == 1.0
    # right every time, it was too modest by a quarter
    modest = np.array([[margin, 0.0]] * 100).ravel()
    found = reward_results(modest, pairs_of([[3, 3]] * 100), bins=10)["calibration"]
    assert found["error"] == pytest.approx(0.25)


def test_a_model_that_pays_for_length_is_found_out():
    dice = np.random.default_rng(0)
    lengths = dice.integers(1, 100, (200, 2))
    scores = lengths / 10 + dice.normal(0, 0.1, (200, 2))  # it reads nothing but the length
    found = reward_results(scores.ravel(), pairs_of(lengths), bins=10)
    assert found["length"]["score_correlation"]["spearman"] > 0.99
    assert found["length"]["margin_correlation"]["spearman"] > 0.99
    assert found["accuracy"]["value"] == pytest.approx(
        found["length"]["accuracy_of_the_longer"], abs=0.02
    )
    assert found["length"]["accuracy_where_chosen_is_shorter"] < 0.05
    blind = reward_results(dice.normal(size=400), pairs_of(lengths), bins=10)
    assert abs(blind["length"]["score_correlation"]["spearman"]) < 0.15


def test_labels():
    rows = labels_of([1, 1, 0, 0, 1], [3, 4, 5, 6, 7])
    scores = np.array([2.0, -1.0, -2.0, 1.0, 3.0])
    found = reward_results(scores, rows, bins=4)
    assert found["accuracy"]["value"] == pytest.approx(3 / 5)
    assert found["auc"]["value"] == pytest.approx(5 / 6)  # only -1 against 1 is out of order
    assert found["safe_share"] == 0.6
    assert "margin_correlation" not in found["length"]
    # 1/(1+e) = 0.27, 1/(1+e^2) = 0.12, and their opposites
    assert [row["count"] for row in found["calibration"]["table"]] == [1, 1, 1, 2]
    assert [row["observed"] for row in found["calibration"]["table"]] == [0.0, 1.0, 0.0, 1.0]


def test_held_out_answers_of_one_label_have_no_auc():
    found = reward_results(np.array([1.0, 2.0]), labels_of([1, 1], [3, 4]), bins=4)
    assert found["auc"] == {"value": None, "ci95": None}
    assert found["accuracy"]["value"] == 1.0


@pytest.mark.parametrize("scores", [[2.0, 1.0, 0.0, 1.0], [0.0] * 4, [-5.0, 1.0, -9.0, 3.0]])
def test_every_row_is_in_the_histogram_and_all_of_it_is_json(scores):
    found = reward_results(np.array(scores), pairs_of([[1, 2], [2, 1]]), bins=3)
    histogram = found["margin"]["histogram"]
    assert [sum(group) for group in histogram["counts"]] == [2]
    assert len(histogram["edges"]) == HISTOGRAM_BINS + 1
    assert histogram["edges"][0] <= 0.0 <= histogram["edges"][-1]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
