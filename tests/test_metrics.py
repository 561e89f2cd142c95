from __future__ import annotations

import json
import math

import numpy as np
import pytest

from grpo_engine.history import HISTORY_ROWS, History
from grpo_engine.metrics import (
    CompletionsLog,
    MetricsLog,
    Stopwatch,
    health_warnings,
    list_completions,
    read_jsonl,
    read_metrics,
)
from grpo_engine.types import Rollout, UserError


def rules(row, history=()):
    return [sentence.split(":")[0] for sentence in health_warnings(row, list(history))]


def make_rollout(**changes):
    fields = {
        "row": {"solution": 12},
        "prompt": "5+7=?",
        "prompt_ids": [1, 2],
        "completion": "十二 \u2028 12",
        "completion_ids": [3, 4, 5],
        "sampler_logprobs": [-0.1] * 3,
        "finish_reason": "stop",
        "group": 0,
        "rewards": {"accuracy": 1.0, "code": None},
        "reward": 1.0,
        "advantage": 0.5,
    }
    return Rollout(**{**fields, **changes})


def test_rows_are_strict_json_and_nonfinite_values_are_named(tmp_path):
    with MetricsLog(tmp_path) as log:
        row = {
            "step": 1,
            "loss": math.nan,
            "kl": -math.inf,
            "reward": np.float32(0.5),
            "nested": {"x": math.inf},
        }
        written = log.write(row)
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(token):
        raise AssertionError(f"bare {token} in the file")

    parsed = json.loads(text, parse_constant=refuse)
    assert parsed == written
    assert parsed["loss"] is None and parsed["kl"] is None and parsed["reward"] == 0.5
    assert parsed["nonfinite"] == ["kl", "loss", "nested.x"]


def test_each_row_is_on_disk_as_soon_as_written(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (0, 1, 2):
        log.write({"step": step})
        assert [r["step"] for r in read_metrics(tmp_path)] == list(range(step + 1))
    log.close()


def test_steps_must_grow_and_values_must_be_host_numbers(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write({"step": 3})
        with pytest.raises(ValueError, match="above the last one written, 3; got 3"):
            log.write({"step": 3})
        with pytest.raises(TypeError, match="integer, got None"):
            log.write({"reward": 1.0})
        with pytest.raises(TypeError, match="'loss': cannot write a object"):
            log.write({"step": 4, "loss": object()})
    assert [r["step"] for r in read_metrics(tmp_path)] == [3]


def test_resume_drops_later_rows_and_a_torn_last_line(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(6):
            log.write({"step": step, "reward": step / 10})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "rew')
    with MetricsLog(tmp_path, resume_step=3) as log:
        assert [r["step"] for r in log.history] == [0, 1, 2, 3]
        log.write({"step": 4, "reward": 9.0})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["reward"]) for r in rows] == [
        (0, 0.0),
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 9.0),
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]  # no draft left behind


def test_a_fresh_run_refuses_an_old_runs_folder(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write({"step": 7})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="already holds metrics up to step 7"):
        MetricsLog(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_reader_tolerates_only_the_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert [r["step"] for r in read_metrics(path)] == [0, 1]
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2 is not valid JSON"):
        read_metrics(path)
    path.write_text('{"step": 0}\n{"st\n')  # ended by a newline: not a torn write
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)
    path.write_text('{"step": 0}\n[1]\n')
    with pytest.raises(UserError, match="line 2 is not a JSON object but list"):
        read_metrics(path)
    path.write_text('{"reward": 0}\n')
    with pytest.raises(UserError, match="no integer step"):
        read_metrics(path)
    with pytest.raises(UserError, match="no file"):
        read_metrics(tmp_path / "absent.jsonl")


def test_a_line_torn_inside_a_character_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes('{"step": 0}\n{"step": 1, "x": "汉'.encode()[:-1])
    assert [r["step"] for r in read_metrics(path)] == [0]


def test_completions_round_trip_and_resume(tmp_path):
    log = CompletionsLog(tmp_path)
    log.write_rollouts(10, [make_rollout(), make_rollout(reward=None, row={})])
    log.write_rollouts(20, [make_rollout()])
    log.write_eval(20, [{"index": 0, "prompt": "p", "completion": "c", "correct": 1}])
    first, second = read_jsonl(tmp_path / "completions" / "step-000010.jsonl")
    assert (
        first["completion"] == "十二 \u2028 12" and first["length"] == 3 and first["solution"] == 12
    )
    assert first["rewards"] == {"accuracy": 1.0, "code": None}
    assert second["reward"] is None and "solution" not in second
    CompletionsLog(tmp_path, resume_step=15)
    assert [step for step, _ in list_completions(tmp_path, "step")] == [10]
    assert list_completions(tmp_path, "eval") == []


def test_stopwatch_splits_without_counting_twice():
    now = [0.0]
    syncs = []
    watch = Stopwatch(synchronize=lambda: syncs.append(now[0]), clock=lambda: now[0])
    with watch.phase("update"):
        now[0] += 1.0
        with watch.phase("reward"):
            now[0] += 2.0
        now[0] += 4.0
    now[0] += 8.0
    assert watch.lap() == {"time/update": 5.0, "time/reward": 2.0, "time/step": 15.0}
    with pytest.raises(RuntimeError), watch.phase("generate"):
        now[0] += 1.0
        raise RuntimeError
    assert watch.lap() == {"time/generate": 1.0, "time/step": 1.0}
    assert len(syncs) >= 4


def test_truncation_rules():
    assert rules({"step": 1, "completions/clipped_ratio": 0.09}) == []
    (sentence,) = health_warnings(
        {"step": 1, "completions/clipped_ratio": 0.25, "completions/max_length": 96}, []
    )
    assert sentence.startswith("truncation: 25.0%") and "96 tokens" in sentence
    assert "cut before their answer was complete score as wrong" in sentence
    early = [{"completions/clipped_ratio": 0.0, "reward": 0.8}] * 5
    late = [{"completions/clipped_ratio": 0.05, "reward": 0.6}] * 5
    assert rules(late[-1], early + late[:-1]) == ["truncation-rising"]
    assert rules(early[-1], late + early[:-1]) == []  # truncation falling, reward rising
    steady = [{**row, "reward": 0.8} for row in late]
    assert rules(steady[-1], early + steady[:-1]) == []  # truncation rising, reward not falling
    # rollout-level keys are absent from most rows: the windows count rows that carry them
    sparse = [r for pair in zip(early + late, [{"loss": 1.0}] * 10, strict=True) for r in pair]
    assert rules(sparse[-2], sparse[:-2]) == ["truncation-rising"]


def test_collapse_is_named_from_length_and_accuracy_together():
    key = "rewards/accuracy_reward/mean"
    good = [{"completions/mean_length": 80.0, key: 0.7, "reward": 1.2}] * 6
    bad = [{"completions/mean_length": 30.0, key: 0.2, "reward": 1.2}] * 6
    assert rules(bad[-1], good + bad[:-1]) == ["collapse"]
    shorter_but_right = [{**row, key: 0.7} for row in bad]
    assert rules(shorter_but_right[-1], good + shorter_but_right[:-1]) == []


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"grad_norm": math.inf}, "non-finite"),
        ({"grad_norm": None, "nonfinite": ["grad_norm"]}, "non-finite"),
        ({"rewards/math/error_rate": 0.5}, "reward-errors"),
        ({"frac_reward_zero_std": 1.0, "reward": 0.0}, "dead-groups"),
        ({"kl": 3.0}, "kl"),
        ({"sampling/logp_difference_mean": 0.3}, "sampler-mismatch"),
        ({"sampling/importance_sampling_ratio_mean": 0.5}, "sampler-mismatch"),
    ],
)
def test_single_row_rules(row, rule):
    assert rules({"step": 4, **row}) == [rule]


def test_rules_against_history():
    calm = [{"kl": 0.01, "entropy": 1.0}] * 10
    assert rules({"kl": 0.2, "entropy": 1.0}, calm) == ["kl"]
    assert rules({"kl": 0.05, "entropy": 1.0}, calm) == []
    assert rules({"kl": 0.01, "entropy": 0.04}, calm) == ["entropy"]
    assert rules({"kl": 0.01, "entropy": 0.06}, calm) == []


def test_a_slow_collapse_is_seen_after_the_start_is_forgotten():
    """A long run: entropy, length and accuracy sink too slowly for the rows in memory to show."""
    key, history, warned = "rewards/accuracy/mean", History(), set()
    for step in range(12 * HISTORY_ROWS):
        left = 0.999**step
        row = {
            "step": step,
            "entropy": max(0.02, left),
            "completions/mean_length": 20 + 80 * left,
            key: left,
        }
        warned |= set(rules(row, list(history)))
        history.append(row)
    assert warned == {"entropy", "collapse"}
    assert len(history) == len(list(history)) == HISTORY_ROWS + 1  # bounded
    assert history[-1] is row
    last = health_warnings(row, history)
    assert any("down from 99.8" in sentence or "down from 100" in sentence for sentence in last)
    assert any("entropy: 0.02 nats per token, down from 0.998" in sentence for sentence in last)


def test_the_start_and_the_best_of_a_run_survive_a_resume(tmp_path):
    key = "rewards/accuracy/mean"
    good = {"entropy": 1.0, "completions/mean_length": 80.0, key: 0.7}
    bad = {"entropy": 0.01, "completions/mean_length": 30.0, key: 0.2}
    with MetricsLog(tmp_path) as log:
        for step in range(HISTORY_ROWS + 20):
            log.write({"step": step, **(good if step < 10 else bad)})
    with MetricsLog(tmp_path, resume_step=HISTORY_ROWS + 19) as log:
        assert rules(bad, log.history) == ["collapse", "entropy"]
    assert rules(bad, list(log.history)[1:]) == []  # the summary is what knows


def test_a_batch_nobody_could_score_is_not_called_equal_rewards():
    (sentence,) = health_warnings({"step": 4, "frac_reward_zero_std": 1.0}, [])
    assert sentence.startswith("unscored: no completion of this batch could be scored")


def test_reward_errors_name_the_first_message():
    row = {"rewards/math/error_rate": 0.5, "rewards/math/first_error": "ValueError:\n  no gold"}
    (sentence,) = health_warnings(row, [])
    assert "failed on 50.0% of completions (the first: ValueError: no gold);" in sentence


def test_a_healthy_row_says_nothing():
    row = {
        "step": 9,
        "loss": 0.01,
        "grad_norm": 0.7,
        "kl": 0.02,
        "entropy": 0.8,
        "reward": 1.1,
        "completions/clipped_ratio": 0.01,
        "rewards/accuracy/mean": 0.5,
        "rewards/accuracy/error_rate": 0.0,
        "frac_reward_zero_std": 0.2,
        "sampling/logp_difference_mean": 1e-4,
        "sampling/importance_sampling_ratio_mean": 1.0,
    }
    assert health_warnings(row, [row] * 20) == []
