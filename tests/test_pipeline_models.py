"""A pipeline's models are looked at before its first stage runs: that they are there, and of the
kind that their field is for."""

import json
from pathlib import Path

import pytest
import yaml
from tiny_model import make_tiny_model

from grpo_engine.cli import main
from grpo_engine.pipeline.config import place_of, read_pipeline
from grpo_engine.pipeline.stages import STAGES, build
from grpo_engine.types import UserError

PAIRS = {"stage": "reward-model", "dataset": "pairs.jsonl"}
RL = {
    "stage": "grpo",
    "dataset": "rows.jsonl",
    "reward_funcs": ["accuracy", "helpful", "safety"],
    "reward_domains": {"accuracy": ["math"], "helpful": ["chat"], "safety": ["chat"]},
    "dataset_domain": "math",
    "general_dataset": [{"source": "rows.jsonl", "domain": "chat"}],
    "helpful_model": "{helpful-rm}",
    "safety_model": "{safety-rm}",
}
LISTED = [
    {"name": "tune", "stage": "sft", "dataset": "rows.jsonl"},
    {"name": "helpful-rm", "model": "{tune}", "kind": "helpful", **PAIRS},
    {"name": "safety-rm", "model": "{helpful-rm}", "kind": "safety", **PAIRS},
    {"name": "rl", **RL},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with data, a language model and a helpful reward model in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "pairs.jsonl"):
        (tmp_path / name).write_text('{"prompt": "1", "completion": "1", "solution": "1"}\n')
    make_tiny_model(tmp_path / "lm")
    write_reward_model(tmp_path / "rm", "helpful")
    return tmp_path


def write_reward_model(path, kind):
    """What a plan reads of one."""
    path.mkdir(parents=True)
    values = json.loads((Path.cwd() / "lm" / "config.json").read_text())
    values["architectures"] = ["Qwen2ForSequenceClassification"]
    (path / "config.json").write_text(json.dumps(values))
    (path / "reward_model.json").write_text(json.dumps({"kind": kind, "scope": "response"}))


def r1(*flags, **fields):
    """Exit code of ``grpo-engine r1`` with ``fields`` in its last stage."""
    values = {
        "stages": [*LISTED[:-1], {**LISTED[-1], **fields}],
        "model": "lm",
        "prompt_template": "none",
    }
    with open("pipeline.yaml", "w") as file:
        yaml.safe_dump(values, file)
    return main(["r1", "--config", "pipeline.yaml", "--output_dir", "run", *flags])


WRONG = {
    "a language model": (
        {"helpful_model": "{tune}"},
        "--helpful_model {tune}: a stage of sft gives a model there, wanted a reward model",
    ),
    "its data": (
        {"helpful_model": "{helpful-rm}/metrics.jsonl"},
        "a stage of reward-model gives data there, wanted a reward model",
    ),
    "the other kind": (
        {"safety_model": "{helpful-rm}"},
        "--safety_model {helpful-rm}: the stage helpful-rm trains a reward model of kind 'helpful'",
    ),
    "the other kind's checkpoint": (
        {"helpful_model": "{safety-rm}/checkpoint-3"},
        "the stage safety-rm trains a reward model of kind 'safety'",
    ),
    "a policy that is a reward model": (
        {"model": "{helpful-rm}"},
        "--model {helpful-rm}: a stage of reward-model gives a reward model there, wanted a model",
    ),
    "the other kind, from outside": (
        {"safety_model": "rm"},
        "--safety_model rm: is a reward model of kind 'helpful'",
    ),
    "a language model, from outside": (
        {"helpful_model": "lm"},
        "--helpful_model lm: reward model lm: there is no reward_model.json in it",
    ),
    "a policy that is a reward model, from outside": (
        {"model": "rm"},
        "--model rm: holds a reward model, wanted a model",
    ),
}


@pytest.mark.parametrize("flags", [(), ("--dry-run",)], ids=["run", "dry run"])
@pytest.mark.parametrize("name", WRONG)
def test_a_model_of_another_kind_is_refused_before_anything_runs(folder, capsys, name, flags):
    fields, words = WRONG[name]
    assert r1(*flags, **fields) == 2
    error = capsys.readouterr().err
    assert error.startswith("grpo-engine: error: stage rl: ") and words in error
    assert error.count("\n") == 1 and not (folder / "run").exists()


def test_models_of_the_right_kind_pass(folder, capsys):
    write_reward_model(folder / "outside" / "checkpoint-4", "safety")
    assert r1("--dry-run", helpful_model="rm", safety_model="outside") == 0
    assert r1("--dry-run", helpful_model="{helpful-rm}/checkpoint-3") == 0


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("model", "./lmm"),
        ("model", "models/a/lm"),
        ("model", "rows.jsonl"),
        ("helpful_model", "rmm"),
        ("safety_model", "runs/safety"),
    ],
)
def test_a_model_that_is_not_there_is_missed_by_the_plan(folder, capsys, field, text):
    assert r1("--dry-run", **{field: text}) == 0
    assert f"not there yet: {text} (for rl)" in capsys.readouterr().out
    assert r1(**{field: text}) == 2
    assert f"stage rl: --{field} {text}: no such folder" in capsys.readouterr().err
    assert not (folder / "run").exists()


def test_a_path_to_what_a_stage_will_make_is_to_be_a_reference(folder, capsys):
    assert r1(model="run/tune/checkpoint-9") == 2
    assert "refer to it as {tune}/..." in capsys.readouterr().err


def test_what_may_be_a_hugging_face_id_is_not_looked_for(folder, capsys):
    assert r1("--dry-run", model="someone/their-model") == 0
    assert "not there yet: someone" not in capsys.readouterr().out


def test_a_reward_of_ones_own_may_take_any_model(folder):
    """What its arguments are for, nobody but the reward knows."""
    last = {**RL, "name": "rl", "reward_funcs": [*RL["reward_funcs"], "mine.py:mine"]}
    for value in ("{tune}", "{helpful-rm}", "accounts/x/models/y"):
        last["reward_args"] = {"mine": {"model": value}}
        values = {"stages": [*LISTED[:-1], last], "model": "lm", "prompt_template": "none"}
        build(read_pipeline(values, (), STAGES), STAGES)
    last["reward_args"] = {"mine": {"model": "{tune}/metrics.jsonl"}}
    with pytest.raises(UserError, match="gives data there, wanted a model"):
        build(read_pipeline(values, (), STAGES), STAGES)


def test_what_fields_are_for():
    places = {
        "model": "model",
        "generators.0.model": "model",
        "helpful_model": "reward model",
        "reward_args.judge.chat_model": "any model",
        "judge_options.model": "any model",
        "general_dataset.0.source": "data",
        "eval_dataset": "data",
        "learning_rate": None,
    }
    assert {path: place_of(path) for path in places} == places
