"""Fine-tuning: the loss is torch's cross-entropy, packing does not change it, and runs resume bit
for bit."""

import json
import math
import os
import re
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
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_engine.checkpoint import list_checkpoints, verify_checkpoint
from grpo_engine.cli import main
from grpo_engine.metrics import read_metrics
from grpo_engine.policy import Policy
from grpo_engine.settings import build_config
from grpo_engine.sft import SFTRun, adapt, read_rows_of, run_sft, tokenized
from grpo_engine.sft_config import DistillConfig, SFTConfig

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}<eos>{% endif %}.{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROWS = [{"prompt": f"{i}+{i}=", "completion": f"{2 * i}" + "?" * (i % 4)} for i in range(10)]
HELD_OUT = [{"prompt": f"{i}-{i}=", "completion": "0"} for i in range(5)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "model")
    (folder / "chat.jinja").write_text(CHAT)
    for name, rows in (("rows", ROWS), ("held_out", HELD_OUT)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    talk = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "so?"},
        {"role": "assistant", "content": "yes."},
    ]
    (folder / "talks.jsonl").write_text(
        "".join(json.dumps({"messages": talk[:end], "domain": "math"}) + "\n" for end in (2, 4))
    )
    return folder


def settings(inputs: Path, output_dir: Path, **changes):
    """Seven steps of four rows: two and a half epochs of ten, and three rows more."""
    return {
        "model": str(inputs / "model"),
        "dataset": str(inputs / "rows.jsonl"),
        "prompt_template": "none",
        "max_length": 32,
        "max_tokens_per_microbatch": 64,
        "sequences_per_step": 4,
        "num_train_epochs": 2.7,
        "learning_rate": 3e-3,
        "save_steps": 3,
        "device": "cpu",
        "output_dir": str(output_dir),
    } | changes


def config_of(inputs, output_dir=Path("unused"), **changes) -> SFTConfig:
    return build_config(settings(inputs, output_dir, **changes), SFTConfig)


def make_run(inputs, **changes) -> SFTRun:
    config = config_of(inputs, **changes)
    policy = Policy.load(config.model, device="cpu")
    adapt(config, policy)
    rows = read_rows_of(config, "dataset", None)
    return SFTRun(config, policy, tokenized(config, policy, rows, config.dataset)[0])


def gradients(run: SFTRun, chosen: np.ndarray) -> tuple[float, dict[str, torch.Tensor]]:
    loss, _ = run._gradients(chosen)
    found = {n: p.grad.clone() for n, p in run.policy.model.named_parameters()}
    run.optimizer.zero_grad(set_to_none=True)
    return loss, found


def assert_same_gradients(one, other, tolerance=2e-6):
    assert one.keys() == other.keys()
    for name in one:
        scale = one[name].abs().max().clamp_min(1e-8)
        assert (one[name] - other[name]).abs().max() / scale < tolerance, name


def cross_entropy(run: SFTRun, chosen: np.ndarray) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean over the learned tokens with torch alone: the model's own logits, row by row."""
    rows, model = run.rows, run.policy.model
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in chosen:
        ids = rows.token_ids[rows.offsets[row] : rows.offsets[row + 1]].long()
        labels = torch.where(torch.from_numpy(rows.learned_of(row)), ids, -100)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        total = total + torch.nn.functional.cross_entropy(
            logits[:-1].double(), labels[1:], ignore_index=-100, reduction="sum"
        )
        count += int((labels != -100).sum())
    loss = total / count
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.item(), found


# -- the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"completion_only_loss": False},
        {"dataset": "talks.jsonl", "prompt_template": "chat", "chat_template": "chat.jinja"},
    ],
    ids=["completions", "all-tokens", "conversations"],
)
def test_loss_and_gradient_are_torchs_cross_entropy(inputs, changes):
    changes = {
        name: str(inputs / value) if str(value).endswith(("jsonl", "jinja")) else value
        for name, value in changes.items()
    }
    run = make_run(inputs, max_length=64, **changes)
    chosen = np.arange(len(run.rows))
    loss, found = gradients(run, chosen)
    expected, truth = cross_entropy(run, chosen)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert_same_gradients(truth, found, tolerance=5e-6)
    assert run.mean_loss(run.rows) == pytest.approx(expected, rel=1e-6)


def test_gradients_do_not_depend_on_the_packing(inputs):
    whole = make_run(inputs, max_tokens_per_microbatch=4096)
    cut = make_run(inputs, max_length=10, max_tokens_per_microbatch=10)
    chosen = np.arange(10)
    loss, expected = gradients(whole, chosen)
    cut_loss, found = gradients(cut, chosen)
    assert cut_loss == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(expected, found)
    assert cut.mean_loss(cut.rows) == pytest.approx(whole.mean_loss(whole.rows), rel=1e-6)


def test_the_same_loss_and_gradient_norm_as_trl(inputs, tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("WANDB_DISABLED", "true")
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=5,
        gradient_accumulation_steps=2,
        max_steps=1,
        learning_rate=1e-5,
        logging_steps=1,
        max_length=64,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(inputs / "model"),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(inputs / "model"),
    )
    trainer.train()
    theirs = trainer.state.log_history[0]
    run = make_run(inputs, sequences_per_step=10)
    row = run.update()
    assert row["num_tokens"] == theirs["num_tokens"]
    assert row["loss"] == pytest.approx(float(theirs["loss"]), rel=2e-4)
    assert row["grad_norm"] == pytest.approx(float(theirs["grad_norm"]), rel=1e-4)
    assert row["entropy"] == pytest.approx(float(theirs["entropy"]), rel=2e-2)


def test_every_row_is_seen_as_often_as_asked(inputs):
    run = make_run(inputs)
    assert run.total_steps == 7 and run.total_rows == 27
    steps = [run.chosen(step).tolist() for step in range(7)]
    assert [len(rows) for rows in steps] == [4] * 6 + [3]
    seen = sum(steps, [])
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert seen[:10] != seen[10:20] and len(set(seen[20:])) == 7
    assert [make_run(inputs, seed=1).chosen(s).tolist() for s in range(7)] != steps
    assert make_run(inputs, max_steps=3).total_steps == 3


# -- whole runs ------------------------------------------------------------------------------------


def curve(folder: Path) -> list[dict]:
    """The rows without what the clock decides."""
    timed = ("time/", "wall", "tokens_per_second")
    return [
        {k: v for k, v in row.items() if not k.startswith(timed)} for row in read_metrics(folder)
    ]


def assert_same_end(one: Path, other: Path, step: int) -> None:
    for name in ("model.safetensors", "trainer/optimizer.safetensors"):
        here, there = (load_file(folder / f"checkpoint-{step}" / name) for folder in (one, other))
        assert here.keys() == there.keys() and all(torch.equal(here[k], there[k]) for k in here)


def test_a_run_learns_its_rows_and_says_how_well(inputs, tmp_path):
    changes = {"num_train_epochs": 30, "eval_dataset": str(inputs / "rows.jsonl")}
    changes |= {"dataset": str(inputs / "held_out.jsonl"), "eval_steps": 10}
    assert run_sft(config_of(inputs, tmp_path, **changes)) == 0
    rows = read_metrics(tmp_path)
    assert rows[-1]["loss"] < 0.4 * rows[1]["loss"] and rows[-1]["epoch"] == 30.0
    assert rows[-1]["learning_rate"] < rows[1]["learning_rate"] == 3e-3
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 10, 20, 30, 38]
    policy = Policy.load(str(tmp_path / "checkpoint-38"), device="cpu")
    config = config_of(inputs, **changes)
    held_out = tokenized(config, policy, read_rows_of(config, "eval_dataset", None), "rows")[0]
    again = SFTRun(config, policy, held_out)
    assert rows[-1]["eval/loss"] == pytest.approx(
        cross_entropy(again, np.arange(len(held_out)))[0], rel=1e-6
    )
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["stage"], manifest["status"]) == ("sft", "finished")
    assert not (tmp_path / "completions").exists()
    page = (tmp_path / "report.html").read_text()
    said = re.sub(r"<[^>]+>|\s+", " ", page)
    assert "Held-out loss went from" in said and "Learning rate" in said
    assert "nats/token" in said and "reward" not in said.replace("reward_", "").lower()


def test_a_held_out_loss_that_rises_is_a_warning_and_a_falling_entropy_is_none(inputs, tmp_path):
    """The rows say "0", the held-out ones "zz": the better one is learned, the worse the other."""
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"prompt": "1*1=", "completion": "zz"}) + "\n")
    changes = {"dataset": str(inputs / "held_out.jsonl"), "eval_dataset": str(path)}
    changes |= {"eval_steps": 5, "max_steps": 40, "lr_scheduler_type": "constant"}
    changes |= {"learning_rate": 1e-2}
    folder = tmp_path / "run"
    assert run_sft(config_of(inputs, folder, **changes)) == 0
    rows = read_metrics(folder)
    assert rows[-1]["entropy"] < 0.1 * rows[1]["entropy"]
    losses = [(row["eval/loss"], row["step"]) for row in rows if "eval/loss" in row]
    over = [
        (loss, step)
        for n, (loss, step) in enumerate(losses)
        if n and loss > 1.05 * min(losses[:n])[0]
    ]
    assert over
    said = {row["step"]: row["warnings"] for row in rows if "warnings" in row}
    assert list(said) == [step for _, step in over]
    assert all(len(words) == 1 and words[0].startswith("overfitting: ") for words in said.values())
    best = min(losses)
    assert f"{best[0]:.3g} at step {best[1]}" in said[40][0]
    # a continued run remembers what was best before
    again = {**changes, "max_steps": 45}
    assert run_sft(config_of(inputs, folder, **again), resume=str(folder)) == 0
    assert f"{best[0]:.3g} at step {best[1]}" in read_metrics(folder)[-1]["warnings"][0]


@pytest.mark.parametrize(("stop", "lora"), [(3, None), (4, None), (3, 4)])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(inputs, tmp_path, stop, lora):
    """Both stops are inside an epoch; the schedule is the whole run's, so the first part is cut off
    by taking its later checkpoints away."""
    if lora:
        pytest.importorskip("peft")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    changes = {"eval_dataset": str(inputs / "held_out.jsonl"), "eval_steps": 2, "lora_r": lora}
    changes |= {"save_steps": 1, "save_total_limit": 9}
    for folder in (whole, cut):
        assert run_sft(config_of(inputs, folder, **changes)) == 0
    assert run_sft(config_of(inputs, cut, **changes), resume=str(cut / f"checkpoint-{stop}")) == 0
    assert curve(cut) == curve(whole) and len(curve(whole)) == 8
    assert_same_end(whole, cut, 7)
    assert (cut / "checkpoint-7.superseded").is_dir()


def test_a_longer_run_with_a_constant_rate_goes_on(inputs, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    constant = {"lr_scheduler_type": "constant"}
    assert run_sft(config_of(inputs, whole, **constant, num_train_epochs=2.8)) == 0
    assert run_sft(config_of(inputs, cut, **constant, num_train_epochs=1.2)) == 0
    assert run_sft(config_of(inputs, cut, **constant, num_train_epochs=2.8), resume=str(cut)) == 0
    assert curve(cut) == curve(whole)
    assert_same_end(whole, cut, 7)


def command(inputs, output_dir, verb="sft", **changes) -> list[str]:
    flags = [
        word
        for name, value in settings(inputs, output_dir, **changes).items()
        for word in (f"--{name}", str(value))
    ]
    return [sys.executable, "-m", "grpo_engine.cli", verb, *flags]


def started(argv, folder, rows):
    threads = str(torch.get_num_threads())  # as here: the order of sums hangs on their number
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONSAFEPATH": "1"}
    child = subprocess.Popen(argv, env=environment, cwd="/", stderr=subprocess.PIPE, text=True)
    metrics = folder / "metrics.jsonl"
    for _ in range(1200):
        found = metrics.exists() and metrics.read_text().count("\n") >= rows
        if found or child.poll() is not None:
            break
        time.sleep(0.05)
    return child


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_or_killed_run_ends_as_if_it_had_not_been(inputs, tmp_path, signum):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    changes = {"max_steps": 160, "save_steps": 15}
    child = started(command(inputs, cut, **changes), cut, rows=20)
    child.send_signal(signum)
    _, err = child.communicate(timeout=60)
    killed = signum == signal.SIGKILL
    assert child.returncode == (-9 if killed else 128 + signum), err
    newest = list_checkpoints(cut)[-1]
    verify_checkpoint(newest)
    if not killed:
        assert newest.name == f"checkpoint-{read_metrics(cut)[-1]['step']}"
    assert run_sft(config_of(inputs, cut, **changes), resume=str(cut)) == 0
    assert run_sft(config_of(inputs, whole, **changes)) == 0
    assert curve(cut) == curve(whole)
    assert_same_end(whole, cut, 160)


def test_what_the_model_is_given_stays_in_its_checkpoint(inputs, tmp_path):
    changes = {"prompt_template": "chat", "chat_template": str(inputs / "chat.jinja")}
    changes |= {"eos_token": "?", "max_position_embeddings": 2048, "max_steps": 1}
    assert run_sft(config_of(inputs, tmp_path, **changes)) == 0
    policy = Policy.load(str(tmp_path / "checkpoint-1"), device="cpu")
    question_mark = policy.tokenizer("?")["input_ids"]
    assert policy.tokenizer.eos_token == "?" and policy.eos_ids == (*question_mark, 1)
    assert policy.tokenizer.chat_template == CHAT
    assert policy.text_config.max_position_embeddings == 2048


def test_distillation_is_the_same_loop_with_its_own_numbers(inputs, tmp_path, capsys):
    config = build_config({"dataset": "x.jsonl"}, DistillConfig)
    assert (config.sequences_per_step, config.min_learning_rate) == (64, pytest.approx(1e-5))
    argv = command(inputs, tmp_path, verb="distill", max_steps=2)[3:]
    assert main(argv) == 0
    assert (tmp_path / "config.yaml").read_text().startswith("stage: distill\n")
    assert main(["sft", "--resume", str(tmp_path)]) == 2
    assert "these are settings of grpo-engine distill, not of sft" in capsys.readouterr().err


def test_the_plan_of_a_dry_run(inputs, tmp_path, capsys):
    changes = {"dataset": str(inputs / "talks.jsonl"), "eval_dataset": inputs / "held_out.jsonl"}
    changes |= {"prompt_template": "chat", "chat_template": inputs / "chat.jinja"}
    changes |= {"max_length": 64}
    argv = command(inputs, tmp_path / "run", **changes)[3:]
    assert main([*argv, "--dry-run"]) == 0
    out = capsys.readouterr().out
    # <user>1+1.<assistant>2<eos> has 23 tokens; .<user>so?.<assistant>yes.<eos> 27 more.
    for words in (
        *("2 rows from", "73 in a pass, 9 of them learned", "the longest 50", "5 rows"),
        *("2 of 4 rows", "2.50", "3.0 packed rows a step, 76.0% of their 64", "domains    math 2"),
    ):
        assert words in out, (words, out)
    assert not (tmp_path / "run").exists()


def test_held_out_prompts_are_not_trained_on(inputs, tmp_path, capsys):
    rows = [*ROWS, *HELD_OUT[:2]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"dataset": tmp_path / "rows.jsonl", "eval_dataset": inputs / "held_out.jsonl"}
    assert main([*command(inputs, tmp_path / "run", **changes)[3:], "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "2 training rows have a held-out prompt and are left out" in err
    assert "10 rows from" in out


def test_long_rows_are_counted_aloud(inputs, tmp_path, capsys):
    changes = {"max_length": 7, "long_rows": "skip"}
    assert main([*command(inputs, tmp_path / "run", **changes)[3:], "--dry-run"]) == 0
    out, err = capsys.readouterr()
    longer = sum(len(row["prompt"] + row["completion"]) + 1 > 7 for row in ROWS)
    assert f"{longer} rows longer than max_length=7 are left out" in err and longer
    assert f"{10 - longer} rows from" in out


def test_steps_that_are_not_finite_stop_the_run(inputs, tmp_path, capsys, monkeypatch):
    broken = SFTRun._gradients
    monkeypatch.setattr(SFTRun, "_gradients", lambda *args: (math.nan, broken(*args)[1]))
    assert run_sft(config_of(inputs, tmp_path)) == 1
    assert "not finite 3 times in a row" in capsys.readouterr().out
    assert not list_checkpoints(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["status"] == "failed"


def test_bf16_and_gradient_checkpointing(inputs, tmp_path):
    changes = {"bf16": True, "gradient_checkpointing": True, "max_steps": 2}
    assert run_sft(config_of(inputs, tmp_path, **changes)) == 0
    exact = make_run(inputs).update()["loss"]
    assert read_metrics(tmp_path)[0]["loss"] == pytest.approx(exact, rel=1e-2)


# -- what a user can get wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": "absent.jsonl"}, ["absent.jsonl"]),
        ({"eval_dataset": "absent.jsonl"}, ["absent.jsonl"]),
        ({"model": "{}/absent"}, ["absent"]),
        ({"max_length": 600, "max_tokens_per_microbatch": 500}, ["max_tokens_per_microbatch=500"]),
        ({"max_length": 5}, ["row 1", "6 tokens", "max_length=5"]),
        ({"max_length": 4, "long_rows": "truncate"}, ["every row", "max_length=4"]),
        ({"max_position_embeddings": 5}, ["--max_length 32", "5 positions"]),
        ({"num_train_epochs": 0}, ["num_train_epochs", "0"]),
        ({"sequences_per_step": 0}, ["sequences_per_step", "0"]),
        ({"min_learning_rate": 1}, ["min_learning_rate=1.0", "learning_rate=0.003"]),
        ({"eos_token": "<|im_end|>"}, ["--eos_token '<|im_end|>'", "not one token"]),
        ({"chat_template": "absent.jinja"}, ["--chat_template absent.jinja", "cannot be read"]),
        ({"prompt_template": "chat"}, ["chat template"]),
        ({"prompt_column": "question"}, ["'question'", "columns"]),
        ({"lora_alpha": 3}, ["lora_alpha=3"]),
        ({"output_dir": "/proc/nowhere/run"}, ["output_dir", "not writable"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refused_with_one_line_and_nothing_written(inputs, tmp_path, capsys, changes, words):
    changes = {name: str(value).replace("{}/", f"{inputs}/") for name, value in changes.items()}
    argv = command(inputs, changes.pop("output_dir", tmp_path / "run"), **changes)[3:]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    message = err.strip().splitlines()[-1]
    assert out == "" and "Traceback" not in err and message.startswith("grpo-engine: error: ")
    for word in words:
        assert word in message, message
    assert not (tmp_path / "run").exists()


def test_a_run_continues_only_as_itself(inputs, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text((inputs / "rows.jsonl").read_text())
    run = tmp_path / "run"
    assert run_sft(config_of(inputs, run, dataset=str(rows))) == 0
    capsys.readouterr()
    for flags, words in (
        (["--num_train_epochs", "9"], "num_train_epochs"),
        (["--seed", "9"], "--seed 9: the run in"),
    ):
        assert main(["sft", "--resume", str(run), *flags]) == 2
        assert words in capsys.readouterr().err
    rows.write_text(json.dumps(ROWS[0]) + "\n")
    assert main(["sft", "--resume", str(run)]) == 2
    assert "its content has changed" in capsys.readouterr().err


def test_the_manifest_names_the_model_as_the_next_stage_will(inputs, tmp_path):
    pytest.importorskip("peft")
    for lora in (None, 4):
        first, second = tmp_path / f"first{lora}", tmp_path / f"second{lora}"
        assert run_sft(config_of(inputs, first, max_steps=3, lora_r=lora)) == 0
        made = json.loads((first / "manifest.json").read_text())["outputs"]["model"]
        assert made["path"] == "checkpoint-3"
        model = str(first / made["path"])
        assert run_sft(config_of(inputs, second, max_steps=1, model=model)) == 0
        used = json.loads((second / "manifest.json").read_text())["inputs"]["model"]
        assert used == {"path": model, "weights_sha256": made["weights_sha256"]}
