"""Training a reward model: losses, gradients, what it learns, and that it resumes bit for bit."""

import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_model import make_tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from grpo_engine.checkpoint import list_checkpoints
from grpo_engine.judged_rows import read_judged_rows, split_off
from grpo_engine.learner import RunAborted
from grpo_engine.metrics import read_metrics
from grpo_engine.reward_model import (
    RewardModelRun,
    build_session,
    pairwise_loss,
    pointwise_loss,
    run_reward_model,
    score_card,
    score_metrics,
)
from grpo_engine.reward_model_config import RewardModelConfig
from grpo_engine.reward_network import RewardNetwork
from grpo_engine.rewards.model import ScalarModel, ScoreCard
from grpo_engine.settings import build_config
from grpo_engine.types import UserError

GOOD, BAD = ("sure it is ", "here you go "), ("no idea ", "go away now ")


def chain(dice):
    return "".join(dice.choice("0123456789+= ") for _ in range(dice.randint(1, 12)))


def answer(dice, good):
    return f"<think>{chain(dice)}</think>{dice.choice(GOOD if good else BAD)}{dice.randint(0, 9)}"


def make_pairs(count, seed=0):
    """Kind answers are chosen; the reasoning says nothing."""
    dice = random.Random(seed)
    return [
        {"prompt": f"{i}+{i}?", "chosen": answer(dice, True), "rejected": answer(dice, False)}
        for i in range(count)
    ]


def make_labels(count, seed=0):
    dice = random.Random(seed)
    rows = []
    for i in range(count):
        safe = dice.random() < 0.6
        rows.append({"prompt": f"{i}+{i}?", "completion": answer(dice, safe), "label": int(safe)})
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "model")
    write_rows(folder / "helpful.jsonl", make_pairs(64))
    write_rows(folder / "safety.jsonl", make_labels(64))
    return folder


def settings(inputs: Path, output_dir: Path, kind: str = "helpful", **changes):
    return {
        "kind": kind,
        "model": str(inputs / "model"),
        "dataset": str(inputs / f"{kind}.jsonl"),
        "prompt_template": "none",
        "batch_size": 8,
        "max_length": 64,
        "max_tokens_per_microbatch": 256,
        "learning_rate": 3e-3,
        "eval_share": 0.25,
        "eval_steps": 3,
        "save_steps": 3,
        "device": "cpu",
        "output_dir": str(output_dir),
        **changes,
    }


def config_of(inputs, output_dir=Path("unused"), kind="helpful", **changes):
    return build_config(settings(inputs, output_dir, kind, **changes), RewardModelConfig)


def make_run(inputs, rows, kind="helpful", **changes) -> RewardModelRun:
    config = config_of(inputs, kind=kind, **changes)
    network = RewardNetwork.from_model(config.model, device="cpu", seed=1)
    card = score_card(config)
    judged, _ = read_judged_rows(rows, card, network, source="rows", max_length=64)
    return RewardModelRun(config, network, judged, card)


# -- losses ----------------------------------------------------------------------------------------


def test_pairwise_loss_is_minus_the_log_likelihood_of_bradley_and_terry():
    chosen = torch.tensor([1.5, -2.0, 40.0, -200.0], requires_grad=True)
    rejected = torch.tensor([0.5, 1.0, -40.0, 0.0], requires_grad=True)
    losses = pairwise_loss(chosen, rejected)
    expected = [math.log1p(math.exp(-1.0)), math.log1p(math.exp(3.0)), 0.0, 200.0]
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-6, atol=1e-30)
    losses.sum().backward()
    # d/d chosen = -(1 - P(chosen preferred)), and the opposite for rejected
    preferred = 1 / (1 + np.exp(-np.array([1.0, -3.0, 80.0, -200.0])))
    np.testing.assert_allclose(chosen.grad, preferred - 1, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(rejected.grad, -chosen.grad)


def test_margin_and_centering():
    chosen, rejected = torch.tensor([1.5]), torch.tensor([0.5])
    shifted = pairwise_loss(chosen, rejected, margin=0.7)
    assert shifted.item() == pytest.approx(math.log1p(math.exp(-0.3)), rel=1e-6)
    centred = pairwise_loss(chosen, rejected, centering=0.1)
    assert centred.item() == pytest.approx(math.log1p(math.exp(-1.0)) + 0.1 * 4.0, rel=1e-6)


def test_pointwise_loss_is_the_cross_entropy():
    scores = torch.tensor([2.0, 2.0, -1.0, -1.0, 90.0], requires_grad=True)
    labels = torch.tensor([1, 0, 1, 0, 0.0])
    losses = pointwise_loss(scores, labels)
    p = 1 / (1 + np.exp(-np.array([2.0, 2.0, -1.0, -1.0])))
    expected = [-math.log(p[0]), -math.log(1 - p[1]), -math.log(p[2]), -math.log(1 - p[3]), 90.0]
    np.testing.assert_allclose(losses.detach(), expected, rtol=1e-5)
    losses.sum().backward()
    np.testing.assert_allclose(scores.grad[:4], p - [1, 0, 1, 0], rtol=1e-5)


# -- gradients -------------------------------------------------------------------------------------


def gradients(run, batch):
    loss, metrics = run._gradients(batch)
    found = {n: p.grad.clone() for n, p in run.policy.weights().items() if p.grad is not None}
    run.optimizer.zero_grad(set_to_none=True)
    return loss, metrics, found


def assert_same_gradients(one, other, tolerance=2e-6):
    assert one.keys() == other.keys()
    for name in one:
        scale = one[name].abs().max().clamp_min(1e-8)
        assert (one[name] - other[name]).abs().max() / scale < tolerance, name


@pytest.mark.parametrize("kind", ["helpful", "safety"])
def test_loss_and_gradient_are_those_of_plain_torch(inputs, tmp_path, kind):
    """transformers' own model, padded, autograd through the formula as written."""
    rows = (make_pairs if kind == "helpful" else make_labels)(6)
    run = make_run(inputs, rows, kind, center_rewards_coefficient=0.05 * (kind == "helpful"))
    run.policy.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    def scores_of(column):
        texts = []
        for row in rows:
            text = row[column]
            if kind == "helpful":
                text = text.rpartition("</think>")[2]
            texts.append(row["prompt"] + text + tokenizer.eos_token)
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        return model(**inputs).logits[:, 0]

    if kind == "helpful":
        chosen, rejected = scores_of("chosen"), scores_of("rejected")
        likelihood = torch.exp(chosen) / (torch.exp(chosen) + torch.exp(rejected))
        expected = (-likelihood.log() + 0.05 * (chosen + rejected) ** 2).mean()
    else:
        safe = 1 / (1 + torch.exp(-scores_of("completion")))
        labels = torch.tensor([row["label"] for row in rows])
        expected = -torch.where(labels == 1, safe, 1 - safe).log().mean()
    expected.backward()
    wanted = {n: p.grad for n, p in model.named_parameters()}

    loss, _, found = gradients(run, np.arange(6))
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(found, wanted, tolerance=1e-5)


@pytest.mark.parametrize("kind", ["helpful", "safety"])
def test_gradients_do_not_depend_on_the_micro_batches(inputs, kind):
    rows = (make_pairs if kind == "helpful" else make_labels)(12)
    whole = make_run(inputs, rows, kind, max_tokens_per_microbatch=4096)
    cut = make_run(inputs, rows, kind, max_length=64, max_tokens_per_microbatch=128)
    batch = np.array([3, 0, 7, 11, 5])
    loss, metrics, expected = gradients(whole, batch)
    cut_loss, cut_metrics, found = gradients(cut, batch)
    assert cut_loss == pytest.approx(loss, rel=1e-5)
    assert cut_metrics == pytest.approx(metrics, rel=1e-4)
    assert_same_gradients(expected, found)


def test_metrics_of_a_batch():
    pairs = np.array([[1.0, 0.0], [2.0, 3.0], [5.0, 1.0], [0.0, 0.0]])
    assert score_metrics(pairs, None) == {
        "accuracy": 0.5,
        "margin": 1.0,
        "chosen_reward": 2.0,
        "rejected_reward": 1.0,
    }
    scores = np.array([[2.0], [-1.0], [-3.0]])
    both = score_metrics(scores, np.array([1.0, 1.0, 0.0]))
    assert both == {
        "accuracy": pytest.approx(2 / 3),
        "safe_reward": 0.5,
        "unsafe_reward": -3.0,
        "margin": 3.5,
    }
    assert "margin" not in score_metrics(scores, np.ones(3))


# -- rows and batches ------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "batch"), [(10, 4), (8, 4), (3, 8), (5, 1)])
def test_every_row_comes_once_an_epoch(inputs, rows, batch):
    run = make_run(inputs, make_pairs(rows), batch_size=batch, num_train_epochs=3)
    per_epoch = -(-rows // batch)
    assert run.total_steps == 3 * per_epoch
    epochs = [
        np.concatenate([run.batch(e * per_epoch + k) for k in range(per_epoch)]).tolist()
        for e in range(3)
    ]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert all(len(run.batch(k)) <= batch for k in range(run.total_steps))
    if rows > 4:
        assert epochs[0] != epochs[1]


def test_max_steps_cuts_the_epochs_short(inputs):
    assert make_run(inputs, make_pairs(20), max_steps=2).total_steps == 2
    assert make_run(inputs, make_pairs(20), max_steps=99).total_steps == 3


def test_a_prompt_is_on_one_side_only():
    rows = [{"prompt": f"p{i % 10}", "n": i} for i in range(50)]
    train, held_out = split_off(rows, 0.3, seed=0)
    assert len(train) + len(held_out) == 50
    assert len({row["prompt"] for row in held_out}) == 3
    assert not {row["prompt"] for row in held_out} & {row["prompt"] for row in train}
    shuffled = rows[::-1]
    again = split_off(shuffled, 0.3, seed=0)[1]
    assert {row["n"] for row in again} == {row["n"] for row in held_out}
    assert split_off(rows, 0.3, seed=1)[1] != held_out
    assert len(split_off(rows, 0.001, seed=0)[1]) == 5  # never none
    with pytest.raises(UserError, match="one prompt only"):
        split_off(rows[:1], 0.5, seed=0)


def test_lengths_of_answers_leave_the_prompt_out(inputs):
    rows = [{"prompt": "1+1?", "chosen": "abc", "rejected": "<think>xx</think> ab "}]
    run = make_run(inputs, rows)
    assert run.rows.answer_lengths.tolist() == [3, 2]
    assert run.rows.lengths.tolist() == [4 + 3 + 1, 4 + 2 + 1]


def test_rows_that_are_left_out(inputs):
    network = RewardNetwork.from_model(str(inputs / "model"), device="cpu")
    card = ScoreCard("helpful", "summary")
    rows = [
        {"prompt": "1", "chosen": "<think>a</think>same", "rejected": "<think>b</think>same"},
        {"prompt": "2", "chosen": "yes", "rejected": "no" * 30},
        {"prompt": "3", "chosen": "yes", "rejected": "no"},
    ]
    kept, left_out = read_judged_rows(
        rows,
        card,
        network,
        source="rows",
        max_length=20,
        long_rows="skip",
        unusable_rows="skip",
    )
    assert len(kept) == 1 and kept.lengths.tolist() == [5, 4]
    assert left_out == {"long_rows": 1, "unusable_rows": 1}
    with pytest.raises(UserError, match="row 1.*the same within scope 'summary'"):
        read_judged_rows(rows, card, network, source="rows", max_length=20)
    with pytest.raises(UserError, match="row 1.*62 tokens.*max_length=20"):
        read_judged_rows(rows[1:], card, network, source="rows", max_length=20)
    with pytest.raises(UserError, match="no row is left"):
        read_judged_rows(rows[1:2], card, network, source="rows", max_length=9, long_rows="skip")


def test_answers_as_messages_and_labels_as_words(inputs):
    network = RewardNetwork.from_model(str(inputs / "model"), device="cpu")

    def read(kind, row):
        card = ScoreCard(kind, "response")
        return read_judged_rows([row], card, network, source="rows", max_length=64)[0]

    message = [{"role": "assistant", "content": "yes"}]
    pair = read("helpful", {"prompt": "a", "chosen": message, "rejected": "no"})
    assert pair.lengths.tolist() == [5, 4]
    for label, value in (("safe", 1.0), ("unsafe", 0.0), (True, 1.0), (0, 0.0)):
        row = {"prompt": "a", "completion": "b", "label": label}
        assert read("safety", row).labels.tolist() == [value]


# -- whole runs ------------------------------------------------------------------------------------


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


def test_gradient_checkpointing_does_not_change_the_gradient(inputs):
    rows = make_pairs(6)
    plain = make_run(inputs, rows)
    saving = make_run(inputs, rows)
    saving.policy = RewardNetwork.from_model(
        str(inputs / "model"), device="cpu", seed=1, gradient_checkpointing=True
    )
    _, _, expected = gradients(plain, np.arange(6))
    saving._gradients(np.arange(6))
    found = {n: p.grad for n, p in saving.policy.weights().items()}
    assert_same_gradients(expected, found)
