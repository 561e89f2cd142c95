"""Whole runs of reward-model training: what they learn, what they leave, and going on."""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from reward_model_cases import (
    answer,
    config_of,
    make_inputs,
    make_labels,
    make_pairs,
    make_run,
    settings,
    write_rows,
)
from safetensors.torch import load_file

from grpo_engine.checkpoint import list_checkpoints
from grpo_engine.learner import RunAborted
from grpo_engine.metrics import read_metrics
from grpo_engine.reward_model import (
    build_session,
    run_reward_model,
)
from grpo_engine.reward_model_config import RewardModelConfig
from grpo_engine.reward_network import RewardNetwork
from grpo_engine.rewards.model import ScalarModel, ScoreCard
from grpo_engine.settings import build_config
from grpo_engine.types import UserError


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("kind", ["helpful", "safety"])
def test_learns_a_separable_preference(inputs, tmp_path, kind, capsys):
    """From chance to nearly always right on held-out rows, in 24 steps."""
    make = make_pairs if kind == "helpful" else make_labels
    rows = write_rows(tmp_path / "rows.jsonl", make(200))
    config = config_of(inputs, tmp_path / "run", kind, dataset=str(rows), batch_size=16)
    config = config.model_copy(update={"num_train_epochs": 2, "save_steps": 100, "seed": 3})
    assert run_reward_model(config) == 0
    metrics = read_metrics(tmp_path / "run")
    assert 0.2 <= metrics[0]["eval/accuracy"] <= 0.8
    assert metrics[-1]["eval/accuracy"] >= 0.95
    assert metrics[-1]["margin"] > 1.0 and metrics[-1]["loss"] < 0.3

    results = json.loads((tmp_path / "run" / "results.json").read_text())
    low, high = results["accuracy"]["ci95"]
    assert low <= results["accuracy"]["value"] <= high
    assert results["rows"] == 50 and results["step"] == metrics[-1]["step"]
    assert sum(row["count"] for row in results["calibration"]["table"]) == 50
    if kind == "safety":
        assert results["auc"]["value"] > 0.95

    scorer = ScalarModel.load(tmp_path / "run", device="cpu")
    dice = random.Random(9)
    good = scorer.score(["7+7?"] * 10, [answer(dice, True) for _ in range(10)])
    bad = scorer.score(["7+7?"] * 10, [answer(dice, False) for _ in range(10)])
    assert min(good) > max(bad)
    assert scorer.card.accuracy == metrics[-1]["eval/accuracy"]
    if kind == "helpful":  # standardised on the training answers
        assert abs(np.mean(good + bad)) < 0.5 and 0.5 < np.std(good + bad) < 2
        assert scorer.score(["7+7?"], ["<think>unfinished"])[0] <= min(bad)
    else:
        assert all(0 <= score <= 1 for score in good + bad)


def test_the_reasoning_does_not_reach_a_helpful_model(inputs, tmp_path):
    """Two data sets that differ in their reasoning alone train the same weights."""
    rows = make_pairs(24)
    write_rows(tmp_path / "one.jsonl", rows)
    for row in rows:
        for side in ("chosen", "rejected"):
            row[side] = f"<think>{side} all along</think>" + row[side].rpartition("</think>")[2]
    write_rows(tmp_path / "two.jsonl", rows)
    weights = []
    for name in ("one", "two"):
        config = config_of(inputs, tmp_path / name, dataset=str(tmp_path / f"{name}.jsonl"))
        assert run_reward_model(config) == 0
        weights.append(weights_of(tmp_path / name))
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


def weights_of(folder):
    return load_file(list_checkpoints(folder)[-1] / "model.safetensors")


def rows_without_times(folder):
    timed = ("time/", "wall", "tokens_per_second")
    return [
        {k: v for k, v in row.items() if not k.startswith(timed)} for row in read_metrics(folder)
    ]


@pytest.mark.parametrize("kind", ["helpful", "safety"])
def test_resume_is_bit_for_bit(inputs, tmp_path, kind):
    changes = {"lr_scheduler_type": "constant", "num_train_epochs": 2, "weight_decay": 0.01}
    whole = config_of(inputs, tmp_path / "whole", kind, **changes)
    assert run_reward_model(whole) == 0
    cut = config_of(inputs, tmp_path / "cut", kind, **changes, max_steps=4)
    assert run_reward_model(cut) == 0
    assert list_checkpoints(tmp_path / "cut")[-1].name == "checkpoint-4"
    going_on = cut.model_copy(update={"max_steps": None})
    assert run_reward_model(going_on, resume=str(tmp_path / "cut")) == 0

    expected, found = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    last = [list_checkpoints(tmp_path / name)[-1] for name in ("whole", "cut")]
    states = [load_file(path / "trainer" / "optimizer.safetensors") for path in last]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    # the shorter run evaluates at its own last step too
    rows = rows_without_times(tmp_path / "cut")
    extra = {k for k in rows[4] if k.startswith("eval/")}
    rows[4] = {k: v for k, v in rows[4].items() if k not in extra}
    assert rows == rows_without_times(tmp_path / "whole")
    assert ScoreCard.read(last[0]) == ScoreCard.read(last[1])
    results = [(tmp_path / name / "results.json").read_text() for name in ("whole", "cut")]
    assert results[0] == results[1]


def test_results_go_back_with_the_run(inputs, tmp_path):
    """Resumed at its end it keeps them; from an earlier checkpoint those of later steps go."""
    config = config_of(inputs, tmp_path / "run", save_total_limit=9)
    assert run_reward_model(config) == 0
    whole = (tmp_path / "run" / "results.json").read_text()
    assert run_reward_model(config, resume=str(tmp_path / "run")) == 0
    assert (tmp_path / "run" / "results.json").read_text() == whole
    session, _ = build_session(config, tmp_path / "run" / "checkpoint-3", None)
    session.open_logs(3)
    assert not (tmp_path / "run" / "results.json").exists()
    session.log.close()
    assert run_reward_model(config, resume=str(tmp_path / "run" / "checkpoint-3")) == 0
    assert (tmp_path / "run" / "results.json").read_text() == whole


def test_a_schedule_that_ends_with_the_run_cannot_be_lengthened(inputs, tmp_path):
    config = config_of(inputs, tmp_path / "run", lr_scheduler_type="cosine", max_steps=2)
    assert run_reward_model(config) == 0
    with pytest.raises(UserError, match="max_steps"):
        run_reward_model(config.model_copy(update={"max_steps": 4}), resume=str(tmp_path / "run"))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on(inputs, tmp_path, signum):
    values = settings(inputs, tmp_path / "run", batch_size=2, num_train_epochs=40, save_steps=1000)
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "grpo_engine.cli", "reward-model", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") > 5):
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signum)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, out.decode()
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    step = int(checkpoint.name.partition("-")[2])
    assert read_metrics(tmp_path / "run")[-1]["step"] == step
    assert "grpo-engine reward-model --resume" in out.decode()

    config = build_config(values | {"max_steps": step + 2}, RewardModelConfig)
    assert run_reward_model(config, resume=str(tmp_path / "run")) == 0
    assert read_metrics(tmp_path / "run")[-1]["step"] == step + 2


def test_dry_run_prints_the_plan_and_writes_nothing(inputs, tmp_path, capsys):
    assert run_reward_model(config_of(inputs, tmp_path / "run"), dry_run=True) == 0
    out = capsys.readouterr().out
    for words in ("helpful, judged on the summary", "48 pairs", "16 pairs", "6 of 8 pairs"):
        assert words in out, out
    assert not (tmp_path / "run").exists()


def test_manifest_and_files(inputs, tmp_path):
    config = config_of(inputs, tmp_path / "run", num_train_epochs=1)
    assert run_reward_model(config, recipe="mine") == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["stage"] == "reward-model" and manifest["status"] == "finished"
    assert manifest["inputs"].keys() == {"dataset", "eval_dataset", "model"}
    assert manifest["inputs"]["dataset"]["rows"] == 48
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "metrics.jsonl", "results.json", "report.html"} <= names
    checkpoint = list_checkpoints(tmp_path / "run")[-1]
    assert manifest["outputs"]["model"]["path"] == checkpoint.name
    network = RewardNetwork.from_model(str(checkpoint), device="cpu")
    assert network.base_sha256 == manifest["outputs"]["model"]["weights_sha256"]
    samples = (tmp_path / "run" / "completions" / "eval-000006.jsonl").read_text().splitlines()
    assert len(samples) == 16 and json.loads(samples[0])["correct"] in (0.0, 1.0)


def test_a_damaged_checkpoint_does_not_score(inputs, tmp_path):
    assert run_reward_model(config_of(inputs, tmp_path / "run", max_steps=2)) == 0
    checkpoint = list_checkpoints(tmp_path / "run")[-1]
    weights = bytearray((checkpoint / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (checkpoint / "model.safetensors").write_bytes(weights)
    for folder in (tmp_path / "run", checkpoint):
        with pytest.raises(UserError, match="damaged.*model.safetensors"):
            ScalarModel.load(folder, device="cpu")
    assert checkpoint.is_dir()  # reading leaves it where it is


def test_the_seed_decides_head_order_and_held_out_rows(inputs):
    one, again, other = (
        build_session(config_of(inputs, seed=seed), None, None)[0] for seed in (1, 1, 2)
    )

    def made_of(session):
        run = session.run
        return [
            run.policy.model.score.weight.tolist(),
            run.batch(0).tolist(),
            run.rows.token_ids.tolist(),
        ]

    assert made_of(one) == made_of(again)
    assert all(mine != theirs for mine, theirs in zip(made_of(one), made_of(other), strict=True))


def test_overwrite_clears_the_results_of_the_old_run(inputs, tmp_path):
    assert run_reward_model(config_of(inputs, tmp_path / "run")) == 0
    config = config_of(inputs, tmp_path / "run", eval_share=0.0)
    with pytest.raises(UserError, match="already holds a run"):
        run_reward_model(config)
    assert run_reward_model(config, overwrite=True) == 0
    assert not (tmp_path / "run" / "results.json").exists()
    assert ScoreCard.read(list_checkpoints(tmp_path / "run")[-1]).accuracy is None


def test_held_out_rows_of_their_own(inputs, tmp_path):
    """Prompts that are also held out are not trained on."""
    held_out = write_rows(tmp_path / "held.jsonl", make_pairs(10, seed=5))
    config = config_of(inputs, tmp_path / "run", eval_dataset=str(held_out), eval_limit=8)
    session, given = build_session(config, None, None)
    assert given["dataset"]["rows"] == 64 - 8 and given["eval_dataset"]["rows"] == 8
    assert len(session.held_out.rows) == 8


def test_weights_that_are_not_finite_are_not_saved(inputs, tmp_path):
    config = config_of(inputs, tmp_path / "run", learning_rate=1e30, max_grad_norm=1e9)
    assert run_reward_model(config) == 1
    assert not list_checkpoints(tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "failed"


def test_three_gradients_in_a_row_that_are_not_finite_stop_the_run(inputs):
    run = make_run(inputs, make_pairs(40))
    with torch.no_grad():
        run.policy.model.score.weight.fill_(float("nan"))
    run.update(), run.update()
    with pytest.raises(RunAborted, match="not finite 3 times"):
        run.update()


def test_bf16_runs_on_cpu(inputs, tmp_path):
    config = config_of(inputs, tmp_path / "run", bf16=True, max_steps=2)
    assert run_reward_model(config) == 0
    assert all(t.dtype == torch.float32 for t in weights_of(tmp_path / "run").values())
