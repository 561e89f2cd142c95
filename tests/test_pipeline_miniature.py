"""The real stages in a pipeline: a quick one, and (slow) all of DeepSeek-R1's with a few steps
each, also killed on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from grpo_engine import lineage
from grpo_engine.cli import main
from grpo_engine.models.general import tasks

ALL_STAGES = Path(__file__).with_name("all_stages.yaml")
NAMES = [stage["name"] for stage in yaml.safe_load(ALL_STAGES.read_text())["stages"]]


def results(folder):
    """Hash of every stage's result. An evaluation's names the path of its model."""
    found = {r.name: r.outputs[r.product].sha256 for r in lineage.read(folder).ran()}
    for name in [name for name in found if name.startswith("eval-")]:
        values = json.loads((folder / name / "results.json").read_text())
        found[name] = (values["correct"], values["length"])
    return found


def test_fine_tuning_then_evaluation(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "1 + 2 =", "completion": "<think> 1+2=3. </think> <answer> 3 </answer>"}
    rows.write_text((json.dumps(row) + "\n") * 8)
    (tmp_path / "problems.jsonl").write_text('{"prompt": "1 + 2 =", "answer": "3"}\n' * 2)
    pipeline = {
        "stage": "r1",
        "output_dir": str(tmp_path / "run"),
        "device": "cpu",
        "prompt_template": "r1-zero",
        "stages": [
            {
                "name": "tune",
                "stage": "sft",
                "dataset": str(rows),
                "max_steps": 2,
                "sequences_per_step": 4,
                "max_length": 128,
                "max_tokens_per_microbatch": 512,
            },
            {
                "name": "judge-it",
                "stage": "eval",
                "model": "{tune}",
                "data": str(tmp_path / "problems.jsonl"),
                "num_samples": 2,
                "max_prompt_length": 64,
                "max_completion_length": 32,
            },
        ],
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(pipeline))
    command = ["r1", "--config", str(path)]
    assert main(command) == 0
    record = lineage.read(tmp_path / "run")
    assert list(record.edges()) == [("tune", "checkpoint-2", "judge-it", "model")]
    assert record.stages["tune"].inputs["dataset"].path == str(rows)
    assert record.stages["tune"].tokens["trained"] > 0
    drawn = (tmp_path / "run" / "judge-it" / "samples.jsonl").read_text().splitlines()
    lengths = sum(json.loads(line)["length"] for line in drawn)
    assert record.stages["judge-it"].tokens == {"generated": lengths}
    # the model that was evaluated is the one that was made
    made = json.loads((tmp_path / "run" / "tune" / "manifest.json").read_text())["outputs"]
    used = json.loads((tmp_path / "run" / "judge-it" / "manifest.json").read_text())["inputs"]
    assert made["model"]["weights_sha256"] == used["model"]["weights_sha256"]
    said = capsys.readouterr().out
    assert "{tune}" in said and "pass@1" in said and "2 x 2" in said  # the stage table
    assert main([*command, "--judge-it.max_completion_length", "16"]) == 0
    said = capsys.readouterr()
    assert "[1/2] tune: unchanged, checkpoint-2" in said.out
    assert "judge-it: runs again: max_completion_length is 16, was 32" in said.err


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Harmful prompts with a good and a bad answer: what the safety labels are put on."""
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    rows = [
        {"prompt": prompt, "good": f"<think> No. </think> {answer}", "bad": f"<think></think>{bad}"}
        for task in tasks()
        if task.kind == "harm"
        for prompt, answer, bad in zip(
            task.wordings, task.answers * 9, task.wrong * 9, strict=False
        )
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(folder, answers, *flags):
    program = [sys.executable, "-m", "grpo_engine.cli", "r1", "--config", str(ALL_STAGES)]
    return [*program, "--output_dir", str(folder), "--safety-labels.dataset", str(answers), *flags]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, answers):
    folder = tmp_path_factory.mktemp("all") / "run"
    done = subprocess.run(command(folder, answers), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_every_stage_of_r1(finished):
    record = lineage.read(finished)
    assert [r.name for r in record.ran()] == NAMES
    assert {r.status for r in record.ran()} == {"finished"}
    assert record.status == "finished"
    used = {(source, user) for source, _, user, _ in record.edges()}
    assert used == {
        ("r1-zero", "cold-start-data"),
        ("cold-start-data", "cold-start-sft"),
        ("cold-start-sft", "reasoning-rl"),
        ("reasoning-rl", "rejection-sampling"),
        ("rejection-sampling", "r1-sft"),
        ("r1-sft", "helpful-pairs"),
        ("r1-sft", "safety-labels"),
        ("r1-sft", "helpful-rm"),
        ("helpful-pairs", "helpful-rm"),
        ("r1-sft", "safety-rm"),
        ("safety-labels", "safety-rm"),
        ("r1-sft", "all-scenario-rl"),
        ("helpful-rm", "all-scenario-rl"),
        ("safety-rm", "all-scenario-rl"),
        ("rejection-sampling", "distill"),
        ("r1-zero", "eval-r1-zero"),
        ("all-scenario-rl", "eval-all-scenario-rl"),
        ("distill", "eval-distill"),
    }
    # cold start and the second fine-tuning are of the base, as in the paper
    for name in ("cold-start-sft", "r1-sft"):
        assert record.stages[name].inputs["model"].path == "miniature"
    for source, made, user, name in record.edges():
        kept = record.stages[source].outputs[made].sha256
        assert record.stages[user].inputs[name].sha256 == kept
    for name in NAMES:
        stage = record.stages[name]
        wanted = {"trained"} if stage.steps else {"generated"}
        if name != "safety-labels":  # its answers were given
            assert wanted <= {key for key, value in stage.tokens.items() if value > 0}, name


@pytest.mark.slow
def test_again_nothing_runs_and_a_change_runs_what_depends_on_it(finished, answers, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    done = subprocess.run(command(folder, answers), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": unchanged, ") == len(NAMES)
    flag = ("--helpful-rm.margin", "0.1")
    done = subprocess.run(
        command(folder, answers, *flag), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    again = {name for name in NAMES if f"{name}: unchanged" not in done.stdout}
    assert again == {"helpful-rm", "all-scenario-rl", "eval-all-scenario-rl"}
    before, after = results(finished), results(folder)
    assert {n for n in NAMES if before[n] != after[n]} <= again
    assert before["all-scenario-rl"] != after["all-scenario-rl"]


@pytest.mark.slow
def test_killed_in_every_stage_it_comes_out_the_same(finished, answers, tmp_path):
    """SIGKILL soon after each stage has begun, and go on: to the bit what it is undisturbed."""
    folder = tmp_path / "run"
    for name in NAMES:
        log = (tmp_path / "log.txt").open("w")
        child = subprocess.Popen(
            command(folder, answers), stdout=log, stderr=log, start_new_session=True
        )
        try:
            wait_for(tmp_path / "log.txt", f"] {name}: ", child)
            time.sleep(1.2)
        finally:
            os.killpg(child.pid, signal.SIGKILL)  # its reward workers too, as an OOM kill would not
            child.wait()
    done = subprocess.run(command(folder, answers), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(folder) == results(finished)
    assert not list(folder.glob("*.superseded*"))


def wait_for(log, words, child):
    deadline = time.monotonic() + 600
    while words not in log.read_text():
        assert child.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
