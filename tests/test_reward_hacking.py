"""The reward-hacking monitor on made-up histories: what it must say, and what it must not."""

import numpy as np
import pytest

from grpo_engine.config import build_config
from grpo_engine.history import EVALUATIONS, History
from grpo_engine.metrics import MetricsLog, read_metrics
from grpo_engine.reward_hacking import MIN_RISE, PREFERENCES, hacking_warnings
from grpo_engine.settings import load_recipe
from grpo_engine.train import train_grpo

HELPFUL = PREFERENCES[0]


def rows_of(accuracies, scores, *, key=HELPFUL, spread=1.0, samples=256, every=10, total=None):
    """One row a step, an evaluation each ``every`` steps; ``scores[i]`` is None where the reward
    did not apply in the steps before evaluation i."""
    rows, spread_key = [], key.removesuffix("/mean") + ("_std" if key == "reward" else "/std")
    for number, (accuracy, score) in enumerate(zip(accuracies, scores, strict=True)):
        for step in range(max(0, (number - 1) * every + 1), number * every + 1):
            row = {"step": step, "loss": 0.1}
            if score is not None and step % 2 == 0:  # a rollout has two steps
                row |= {key: score, spread_key: spread}
            if total is not None:
                row |= {"reward": total[number], "reward_std": 0.5}
            rows.append(row)
        rows[-1] |= {"eval/accuracy": accuracy, "eval/num_samples": float(samples)}
    return rows


def warnings_of(rows):
    """(step, sentence) of every warning of a run that writes ``rows``."""
    history, found = History(), []
    for row in rows:
        found += [(row["step"], sentence) for sentence in hacking_warnings(row, history)]
        history.append(row)
    return found


RISING = [0.1 * i for i in range(12)]
FALLING = [0.6, 0.6, 0.6, 0.58, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2]
FLAT = [0.6] * 12


def test_reward_up_and_accuracy_down_is_named_with_its_numbers():
    found = warnings_of(rows_of(FALLING, RISING))
    assert found and all(sentence.startswith("reward-hacking: ") for _, sentence in found)
    step, sentence = found[-1]
    assert step == 110
    assert "reward 'helpful' rose 0.100 -> 1.000" in sentence  # of the windows 0-2 and 9-11
    assert "held-out accuracy fell 60.0% -> 25.0%" in sentence
    assert "steps 0 to 20 and 90 to 110" in sentence
    assert found[0][0] > 50  # not before two windows of three evaluations


@pytest.mark.parametrize("key", [*PREFERENCES, "reward"])
def test_each_reward_model_is_watched_and_the_whole_reward_without_one(key):
    assert warnings_of(rows_of(FALLING, RISING, key=key))


@pytest.mark.parametrize(
    ("accuracies", "scores"),
    [
        (FLAT, RISING),  # the reward rises, accuracy does not move
        (FALLING[::-1], RISING),  # both rise: this is learning
        (FALLING, RISING[::-1]),  # both fall: bad, but not this
        (FALLING, [0.5] * 12),  # accuracy falls, the reward stands still
        ([0.6, 0.6, 0.6, 0.6, 0.6, 0.1, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6], RISING),  # one bad sample
        ([0.6, 0.6, 0.6, 0.59, 0.58, 0.57] + [0.57] * 6, RISING),  # within the noise of 256
        (FALLING[3:7] + [0.1], [0.5 * i for i in range(5)]),  # too few evaluations to say
        (FALLING, [0.02 * s for s in RISING]),  # a rise that is nothing beside the spread
        (FALLING, [None] * 12),  # no reward model, and no reward logged
    ],
)
def test_what_is_no_reward_hacking(accuracies, scores):
    assert warnings_of(rows_of(accuracies, scores)) == []


def test_a_total_that_jumps_when_a_reward_model_joins_is_no_rise():
    """Accuracy fell long before; then the reward model joins and adds 3 to the total."""
    accuracies = [0.6, 0.6, 0.6] + [0.3] * 9
    scores = [None] * 6 + [3.0] * 6
    total = [0.6] * 6 + [3.6] * 6
    assert warnings_of(rows_of(accuracies, scores, total=total)) == []
    # That the total alone would have been taken for a rise:
    assert warnings_of(rows_of(accuracies, total, key="reward"))


def test_a_reward_model_that_joins_late_is_compared_from_there():
    accuracies = [0.6] * 8 + [0.5, 0.4, 0.3, 0.2]
    scores = [None] * 5 + [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
    found = warnings_of(rows_of(accuracies, scores))
    assert found[-1][0] == 110 and "rose 0.000 -> 1.000" in found[-1][1]


def test_the_rise_is_measured_against_the_spread_over_completions():
    for spread, expected in ((0.9 / MIN_RISE * 0.99, True), (0.9 / MIN_RISE * 1.01, False)):
        rows = rows_of(FALLING, [0.1, 0.1, 0.1, *RISING[3:9], 1.0, 1.0, 1.0], spread=spread)
        assert any(step == 110 for step, _ in warnings_of(rows)) is expected


def test_a_small_held_out_set_is_given_its_uncertainty():
    """0.60 to 0.40 is four standard errors of 256 problems, and not of 16."""
    accuracies = [0.6] * 6 + [0.4] * 6
    assert warnings_of(rows_of(accuracies, RISING, samples=256))
    assert warnings_of(rows_of(accuracies, RISING, samples=16)) == []
    assert warnings_of(rows_of(accuracies, RISING, samples=0)) == []


def test_false_alarms_are_rare_when_accuracy_only_scatters():
    """Forty evaluations of a policy that does not change, under a reward that rises and rises."""
    alarms = 0
    for seed in range(100):
        dice = np.random.default_rng(seed)
        history = History()
        for number in range(40):
            row = {
                "step": 10 * number,
                HELPFUL: 0.1 * number,
                "rewards/helpful/std": 1.0,
                "eval/accuracy": dice.binomial(200, 0.6) / 200,
                "eval/num_samples": 200.0,
            }
            alarms += bool(hacking_warnings(row, history))
            history.append(row)
    assert alarms <= 5  # of 4,000 evaluations


def test_rows_without_an_evaluation_say_nothing():
    history = History(rows_of(FALLING, RISING))
    assert hacking_warnings({"step": 111, HELPFUL: 2.0}, history) == []
    assert hacking_warnings({"step": 111, "eval/accuracy": None}, history) == []


def test_the_history_of_a_resumed_run_knows_the_same_evaluations(tmp_path):
    rows = rows_of(FALLING, RISING)
    with MetricsLog(tmp_path) as log:
        for row in rows[:-1]:
            log.write(row)
        expected = hacking_warnings(rows[-1], log.history)
    with MetricsLog(tmp_path, resume_step=rows[-2]["step"]) as log:
        assert hacking_warnings(rows[-1], log.history) == expected != []


def test_evaluations_are_remembered_longer_than_rows_and_bounded():
    """Evaluations 200 steps apart: the rows between them are long forgotten."""
    found = warnings_of(rows_of(FALLING, RISING, every=200))
    assert found[-1][0] == 2200
    history = History()
    for step in range(EVALUATIONS + 10):
        history.append({"step": step, "eval/accuracy": 0.5})
    assert len(history.evaluations) == EVALUATIONS and history.evaluations[0].step == 10


def test_looking_at_a_row_does_not_put_it_into_the_history():
    rows = rows_of(FALLING, RISING)
    history = History(rows[:-1])
    before = len(history.evaluations)
    hacking_warnings(rows[-1], history)
    assert len(history.evaluations) == before
    history.append(rows[-1])
    assert history.evaluations[-1].rewards[HELPFUL] == pytest.approx(RISING[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("reward", "hacked"), [("short", True), ("accuracy", False)])
def test_a_real_run_that_pays_for_brevity_is_caught(tmp_path, reward, hacked):
    """The miniature, paid for short answers, learns to guess; paid for right ones, it does not."""
    pytest.importorskip("reasoning_gym")
    (tmp_path / "reward.py").write_text(
        "def short(prompts, completions, **columns):\n"
        "    return [1 / (1 + len(text) / 40) for text in completions]\n"
    )
    changes = {
        "reward_funcs": [f"{tmp_path / 'reward.py'}:short" if hacked else reward],
        "prompts_per_generation": 8,
        "num_generations": 8,
        "max_steps": 18,
        "eval_steps": 3,
        "eval_temperature": 1.0,
        "eval_top_p": 1.0,
        "save_steps": 18,
        "output_dir": str(tmp_path / "run"),
        "device": "cpu",
    }
    assert train_grpo(build_config(load_recipe("r1-zero-miniature") | changes)) == 0
    warned = {
        row["step"]
        for row in read_metrics(tmp_path / "run")
        for sentence in row.get("warnings", ())
        if sentence.startswith("reward-hacking: the reward rose")
    }
    assert (18 in warned) is hacked and bool(warned) is hacked
