"""grpo-engine sample from end to end: only verified chains, the same bytes however it was stopped,
and what it refuses."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sample_cases import (
    MADE,
    flags,
    lines_of,
    manifest_of,
    refused,
    rows_of,
    sample,
    statistics_of,
    write,
)
from tiny_model import make_tiny_model

from grpo_engine.cli import main
from grpo_engine.rejection.draw import Drawing
from grpo_engine.rewards import accuracy_reward
from grpo_engine.rewards.format import has_readable_format

REWRITTEN = {
    "rewrite": "template",
    "readable_format": "<think> {reasoning} </think> {summary}",
    "keep": "random",
    "max_per_prompt": 1,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert sample(folder, **REWRITTEN) == 0
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def drawn(monkeypatch):
    """The cells that are drawn from here on."""
    cells = []
    generate = Drawing.generate

    def counted(self, generator, missing):
        cells.extend(missing)
        return generate(self, generator, missing)

    monkeypatch.setattr(Drawing, "generate", counted)
    return cells


def same_data(one, other, names=MADE):
    for name in names:
        assert (Path(one) / name).read_bytes() == (Path(other) / name).read_bytes(), name


# --- what it leaves -----------------------------------------------------------------------------


def test_only_verified_readable_chains_are_kept(whole):
    data = rows_of(whole)
    assert 0 < len(data) <= 6
    scores = accuracy_reward([row["completion"] for row in data], [row["solution"] for row in data])
    assert scores == [1.0] * len(data)
    assert all(has_readable_format(row["completion"]) for row in data)
    assert len({row["row"] for row in data}) == len(data), "one answer a prompt"


def test_a_row_says_where_it_comes_from(whole):
    samples = {(one["row"], one["sample"]): one for one in rows_of(whole, "samples.jsonl")}
    weights = manifest_of(whole)["inputs"]["generator sample"]["weights_sha256"]
    for row in rows_of(whole):
        assert row["source"] == "sampled" and row["generator"] == "sample"
        assert row["checkpoint"] == weights and row["domain"] == "math"
        origin = samples[row["row"], row["sample"]]["completion"]
        reasoning = row["completion"].removeprefix("<think> ").partition(" </think>")[0]
        assert reasoning in origin


def test_the_statistics_add_up(whole):
    found, rejected = statistics_of(whole), rows_of(whole, "rejected.jsonl")
    accepted = found["acceptance"]
    assert accepted["samples"] == 24 == len(lines_of(whole))
    assert accepted["kept"] + sum(accepted["rejected"].values()) == 24
    assert accepted["kept"] == len(rows_of(whole)) == found["table"]["total"]["samples"]
    counted = {}
    for line in rejected:
        counted[line["reason"]] = counted.get(line["reason"], 0) + 1
    assert counted == accepted["rejected"]
    assert accepted["by_domain"]["math"]["samples"] == 24
    assert sum(one["prompts"] for one in found["solve_rate"]["histogram"]) == 6
    drawn = sum(row["length"] for row in rows_of(whole, "samples.jsonl"))
    assert found["tokens"]["drawn"] == drawn
    page = (whole / "statistics.md").read_text(encoding="utf-8")
    assert (
        f"| **total** | {accepted['kept']} |" in page and "| **samples** | 24 | 100.0 % |" in page
    )


def test_the_manifest_names_inputs_and_outputs_by_hash(whole):
    manifest = manifest_of(whole)
    assert manifest["status"] == "finished" and manifest["verb"] == "sample"
    assert manifest["inputs"]["dataset"]["rows"] == 6
    assert set(manifest["outputs"]) == {"samples.jsonl", *MADE}
    for name, output in manifest["outputs"].items():
        assert hashlib.sha256((whole / name).read_bytes()).hexdigest() == output["sha256"]


def test_the_saved_configuration_makes_the_same_data(whole, tmp_path):
    from grpo_engine.rejection import SampleConfig, run_sample
    from grpo_engine.settings import build_config, load_yaml

    values = load_yaml(str(whole / "config.yaml")) | {"output_dir": str(tmp_path / "again")}
    assert run_sample(build_config(values, SampleConfig)) == 0
    same_data(whole, tmp_path / "again", (*MADE, "samples.jsonl"))


def test_another_seed_makes_other_data(whole, tmp_path):
    assert sample(tmp_path / "run", **REWRITTEN, seed=1) in (0, 1)
    one, other = (
        {(row["row"], row["sample"]): row["completion"] for row in rows_of(folder, "samples.jsonl")}
        for folder in (whole, tmp_path / "run")
    )
    assert one.keys() == other.keys()
    assert sum(one[cell] == other[cell] for cell in one) <= 2


# --- stopped and continued ------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [1, 3])
def test_killed_and_continued_it_ends_the_same_to_the_bit(whole, tmp_path, batches):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "grpo_engine.cli", "sample", *flags(folder, **REWRITTEN)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    path = folder / "samples.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and len(lines_of(folder)) >= 5 * (batches - 1) + 1:
            process.kill()
        time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL and not (folder / "data.jsonl").exists()
    path.write_bytes(path.read_bytes()[:-5])  # as if the kill had come in the middle of a write
    assert sample(folder, **REWRITTEN) == 0
    same_data(whole, folder, (*MADE, "samples.jsonl"))


@pytest.mark.parametrize(("where", "calls"), [("draw", 1), ("draw", 3), ("select", 1)])
def test_interrupted_it_says_so_and_goes_on(whole, tmp_path, monkeypatch, capsys, where, calls):
    from grpo_engine.rejection import work

    owner, name = (Drawing, "draw") if where == "draw" else (work, "select")
    original, count = getattr(owner, name), []

    def interrupted(*args):
        count.append(1)
        if len(count) == calls:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(owner, name, interrupted)
    assert sample(tmp_path / "run", **REWRITTEN) == 130
    assert "of 24 samples are kept" in capsys.readouterr().err
    assert manifest_of(tmp_path / "run")["status"] == "stopped"
    assert not (tmp_path / "run" / "data.jsonl").exists()
    assert not list((tmp_path / "run").glob(".*")), "nor a part of it"
    assert sample(tmp_path / "run", **REWRITTEN) == 0
    same_data(whole, tmp_path / "run", (*MADE, "samples.jsonl"))


def test_other_thresholds_need_no_new_samples(copied, whole, drawn, tmp_path):
    assert sample(copied, **{**REWRITTEN, "min_language_share": "null", "max_per_prompt": 4}) == 0
    assert not drawn and len(rows_of(copied)) > len(rows_of(whole))
    assert sample(copied, **REWRITTEN) == 0
    assert not drawn
    same_data(whole, copied)


def test_more_samples_reuse_the_earlier_ones(tmp_path, whole, drawn):
    folder = tmp_path / "run"
    assert sample(folder, **REWRITTEN, num_samples=2) == 0
    drawn.clear()
    assert sample(folder, **REWRITTEN) == 0
    assert {number for _, _, number in drawn} == {2, 3}
    same_data(whole, folder, (*MADE, "samples.jsonl"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 0.7}, ["generator sample temperature 1.0", "0.7"]),
        ({"seed": 1}, ["seed 0", "1"]),
        ({"reward_funcs": ["reasoning_gym"]}, ["verifier reward_funcs"]),
        ({"dataset_limit": 5}, ["dataset rows 6", "5"]),
        ({"prompt_template": "none"}, ["prompts_sha256"]),
    ],
)
def test_samples_of_another_run_are_refused(copied, capsys, changes, words):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    line = refused(capsys, sample(copied, **{**REWRITTEN, **changes}))
    assert all(word in line for word in [*words, "--overwrite"]), line
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def test_overwrite_begins_anew(copied, drawn):
    assert sample(copied, "--overwrite", **REWRITTEN, num_samples=1, seed=5) == 0
    assert len(drawn) == 6 == len(lines_of(copied))


# --- dry run, help, mistakes ----------------------------------------------------------------------


def test_a_dry_run_prints_the_budget_and_writes_nothing(tmp_path, capsys):
    edits = tmp_path / "edits.jsonl"
    assert sample(tmp_path / "run", "--dry-run", **REWRITTEN, edit_file=edits) == 0
    out = capsys.readouterr().out
    assert "6 x 4 = 24 samples" in out and f"at most {24 * 96:,} drawn" in out
    assert "by template, verified again" in out and "random, 1 a prompt" in out
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_field(capsys):
    assert main(["sample", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--num_samples (16)" in out and "--dataset (required)" in out
    assert main(["--help"]) == 0
    assert "grpo-engine sample" in capsys.readouterr().out


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "model")
    write(folder / "good.jsonl", {"prompt": "1+1=", "solution": "2"})
    write(folder / "bare.jsonl", {"prompt": "1+1="})
    write(folder / "unreadable.jsonl", {"prompt": "1+1=", "solution": "\\frac{"})
    write(folder / "klingon.jsonl", {"prompt": "1+1=", "solution": "2", "language": "xx"})
    write(folder / "chinese.jsonl", {"prompt": "一加一等于几？", "solution": "2", "language": "zh"})
    write(folder / "unanswered.jsonl", {"prompt": "hello"})
    write(folder / "talk.jsonl", {"messages": [{"role": "user", "content": "hello"}]})
    write(folder / "nothing.jsonl", {"text": "hello"})
    (folder / "broken.jsonl").write_text('{"prompt": "a", "solution": "1"}\n{"prompt": \n')
    (folder / "training").mkdir()
    (folder / "training" / "manifest.json").write_text('{"verb": "grpo"}')
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": "absent.jsonl"}, ["absent.jsonl"]),
        ({"dataset": "{}/broken.jsonl"}, ["broken.jsonl:2"]),
        ({"dataset": "{}/nothing.jsonl"}, ["'prompt'", "text"]),
        ({"dataset": "{}/bare.jsonl"}, ["'accuracy'", "'solution'"]),
        ({"dataset": "{}/unreadable.jsonl"}, ["'accuracy'", "frac"]),
        ({"dataset": "{}/klingon.jsonl"}, ["'xx'"]),
        ({"model": "{}/absent"}, ["absent"]),
        ({"prompt_template": "chat"}, ["chat template"]),
        ({"max_completion_length": 600}, ["--max_completion_length 600", "512"]),
        ({"max_prompt_length": 2}, ["max_prompt_length=2"]),
        ({"device": "cuda:7"}, ["cuda:7"]),
        ({"temperature": 0}, ["temperature", "0"]),
        ({"reward_funcs": "[]"}, ["reward_funcs=[]", "judge"]),
        ({"reward_funcs": '["acuracy"]'}, ["acuracy"]),
        ({"reward_funcs": '["accuracy", "accuracy"]'}, ["reward_funcs", "once"]),
        ({"min_reward": '{"format": 1.0}'}, ["--min_reward", "accuracy"]),
        ({"judge_rows": "all"}, ["judge_rows", "judge"]),
        ({"judge": "nowhere.py:f"}, ["nowhere.py"]),
        ({"judge": "{}/absent"}, ["absent"]),
        ({"min_language_share": 1.5}, ["--min_language_share", "1.5"]),
        ({"keep": "random"}, ["keep='random'", "max_per_prompt"]),
        ({"max_per_prompt": 2}, ["max_per_prompt=2", "all"]),
        ({"general_share": 0.5}, ["general_share=0.5", "general_dataset"]),
        ({"general_dataset": "absent.jsonl"}, ["absent.jsonl"]),
        ({"general_dataset": "{}/unanswered.jsonl"}, ["row 1", "'completion'"]),
        ({"general_dataset": "{}/talk.jsonl"}, ["row 1", "messages"]),
        ({"decontaminate": "{}/talk.jsonl"}, ["--decontaminate", "row 1", "messages"]),
        ({"readable_format": "<think>{reasoning}"}, ["readable_format", "{summary}"]),
        ({"summary_template": '{"en": "done"}'}, ["summary_template", "{answer}"]),
        (
            {
                "dataset": "{}/chinese.jsonl",
                "rewrite": "template",
                "summary_template": '{"en": "{answer}"}',
            },
            ["--summary_template", "'zh'", "row 1"],
        ),
        ({"rewrite": "nowhere.py:f"}, ["nowhere.py"]),
        ({"rewrite_examples": '[{"question": "a"}]'}, ["rewrite_examples", "thought_process"]),
        ({"generators": '[{"method": "few-shot"}]'}, ["'few-shot'", "few_shot"]),
        ({"generators": '[{"method": "guess"}]'}, ["--generators", "guess"]),
        ({"generators": "[{}, {}]"}, ["generators", "name"]),
        ({"edit_file": "{}/edits.txt"}, ["--edit_file", ".jsonl"]),
        ({"edit_file": "{}/absent/edits.jsonl"}, ["--edit_file", "folder"]),
        ({"output_dir": "{}/training"}, ["--output_dir", "another run"]),
        ({"output_dir": "{}/good.jsonl"}, ["--output_dir", "not a folder"]),
        ({"recipe": "r1-zero"}, ["r1-zero", "sample"]),
        ({"datasett": "x"}, ["--datasett", "dataset"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_are_one_line_and_write_nothing(inputs, tmp_path, capsys, changes, words):
    values = {
        "model": inputs / "model",
        "dataset": inputs / "good.jsonl",
        "dataset_args": "{}",
        "prompt_template": "none",
        "max_completion_length": 4,
        **{name: str(value).replace("{}/", f"{inputs}/") for name, value in changes.items()},
    }
    folder = values.pop("output_dir", tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in inputs.rglob("*")}
    line = refused(capsys, sample(folder, **values))
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()
    assert {path: path.stat().st_mtime_ns for path in inputs.rglob("*")} == before


def test_overwrite_never_deletes_an_input(copied, capsys):
    source = copied / "data.jsonl"
    line = refused(capsys, sample(copied, "--overwrite", dataset=source, dataset_args="{}"))
    assert "would delete --dataset" in line and source.read_bytes()


@pytest.mark.parametrize("name", ["general_dataset", "edit_file", "decontaminate"])
def test_no_input_is_written_over(copied, capsys, name):
    source = copied / "data.jsonl"
    before = source.read_bytes()
    line = refused(capsys, sample(copied, **REWRITTEN, **{name: source}))
    assert f"--{name}" in line and "this run writes" in line and source.read_bytes() == before


def test_every_recipe_of_samples_is_valid():
    from grpo_engine.rejection import SampleConfig
    from grpo_engine.settings import build_config, load_recipe, recipe_names

    assert {"cold-start-data", "rejection-sampling"} <= set(recipe_names("sample"))
    for name in recipe_names("sample"):
        build_config(load_recipe(name), SampleConfig)
    sft = build_config(load_recipe("rejection-sampling"), SampleConfig)
    assert sft.general_share == 0.25 and sft.decontaminate_words == 10
    cold = build_config(load_recipe("cold-start-data"), SampleConfig)
    names = {one.label: settings for one, settings in cold.resolved_generators()}
    assert list(names) == ["r1-zero", "few-shot", "direct"]
    assert names["r1-zero"].temperature == 1.0 and names["r1-zero"].prompt_template == "r1-zero"
    assert "verify" in names["direct"].prompt_suffix and names["direct"].model != cold.model
    assert json.loads(cold.model_dump_json())["rewrite"].startswith("http")
