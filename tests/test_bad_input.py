"""What a user can get wrong: one line naming field and value, exit code 2, nothing written over."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_model import make_tiny_model

from grpo_engine.cli import main


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "model")
    make_tiny_model(folder / "mute", tokenizer=False)
    (folder / "good.jsonl").write_text(json.dumps({"prompt": "1+1=", "solution": "2"}) + "\n")
    (folder / "empty.jsonl").write_text("\n")
    (folder / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (folder / "column.jsonl").write_text(json.dumps({"question": "1+1="}) + "\n")
    (folder / "unsolved.jsonl").write_text(json.dumps({"prompt": "1+1="}) + "\n")
    (folder / "file").write_text("not a folder")
    return folder


def flags(inputs: Path, output_dir: Path | str, **changes) -> list[str]:
    values = {
        "model": inputs / "model",
        "dataset": inputs / "good.jsonl",
        "prompt_template": "none",
        "reward_funcs": '["accuracy"]',
        "prompts_per_generation": 1,
        "num_generations": 2,
        "steps_per_generation": 1,
        "max_prompt_length": 8,
        "max_completion_length": 4,
        "max_steps": 1,
        "device": "cpu",
        "output_dir": output_dir,
        **changes,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def refused(capsys, argv: list[str]) -> str:
    assert main(["grpo", *argv]) == 2
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert out == "" and "Traceback" not in err and last.startswith("grpo-engine: error: ")
    return last


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": "absent.jsonl"}, ["absent.jsonl"]),
        ({"dataset": "{}/empty.jsonl"}, ["empty.jsonl", "empty"]),
        ({"dataset": "{}/broken.jsonl"}, ["broken.jsonl:2"]),
        ({"dataset": "{}/column.jsonl"}, ["prompt", "question"]),
        ({"dataset": "reasoning_gym:chain_some"}, ["chain_some", "chain_sum"]),
        ({"dataset": "reasoning_gym:chain_sum", "dataset_args": "{min_term: 2}"}, ["min_term"]),
        ({"model": "{}/absent"}, ["absent"]),
        ({"model": "{}/mute"}, ["mute", "tokenizer"]),
        ({"device": "cuda:7"}, ["cuda:7"]),
        ({"max_prompt_length": 2}, ["max_prompt_length=2", "4 tokens"]),
        ({"num_generations": 1}, ["num_generations", "1"]),
        ({"temperature": 0}, ["temperature", "0"]),
        ({"reward_funcs": '["acuracy"]'}, ["acuracy", "accuracy"]),
        ({"reward_funcs": '["nowhere.py:f"]'}, ["nowhere.py"]),
        ({"prompt_template": "chat"}, ["chat template"]),
        ({"delta": 1.0}, ["delta", "1.0"]),
        (
            {"max_completion_length": 600, "max_tokens_per_microbatch": 700},
            ["max_completion_length", "512"],
        ),
        ({"output_dir": "{}/file"}, ["output_dir", "file"]),
        ({"output_dir": "/proc/nowhere/run"}, ["output_dir", "/proc/nowhere/run", "not writable"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refused_with_one_line_and_nothing_written(inputs, tmp_path, capsys, changes, words):
    changes = {name: str(value).replace("{}/", f"{inputs}/") for name, value in changes.items()}
    changes.setdefault("output_dir", tmp_path / "run")
    message = refused(capsys, flags(inputs, **changes))
    for word in words:
        assert word in message, message
    assert not (tmp_path / "run").exists()


def test_a_reward_that_needs_a_missing_column(inputs, tmp_path, capsys):
    message = refused(capsys, flags(inputs, tmp_path / "run", dataset=inputs / "unsolved.jsonl"))
    assert "accuracy" in message and "solution" in message
    assert not (tmp_path / "run").exists()


def test_an_earlier_run_is_not_written_over(inputs, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    message = refused(capsys, flags(inputs, tmp_path))
    assert "--overwrite" in message and "--resume" in message
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_resume_from_nothing_from_damage_and_as_another_run(inputs, tmp_path, capsys):
    assert "absent" in refused(capsys, ["--resume", str(tmp_path / "absent")])
    run = tmp_path / "run"
    assert main(["grpo", *flags(inputs, run)]) == 0
    capsys.readouterr()
    message = refused(capsys, ["--resume", str(run), "--learning_rate", "0.5"])
    assert "learning_rate" in message and "0.5" in message
    weights = run / "checkpoint-1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = refused(capsys, ["--resume", str(run), "--max_steps", "2"])
    assert "checkpoint-1" in message and "model.safetensors" in message
    shutil.rmtree(run / "checkpoint-1")
    assert "no checkpoint" in refused(capsys, ["--resume", str(run)])


def test_overwrite_does_not_delete_its_own_input(inputs, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["grpo", *flags(inputs, run)]) == 0
    capsys.readouterr()
    argv = flags(inputs, run, model=run / "checkpoint-1")
    message = refused(capsys, [*argv, "--overwrite"])
    assert "--overwrite" in message and "checkpoint-1" in message
    assert (run / "checkpoint-1" / "model.safetensors").exists()


def test_resume_notices_that_the_data_changed(inputs, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    shutil.copy(inputs / "good.jsonl", rows)
    run = tmp_path / "run"
    assert main(["grpo", *flags(inputs, run, dataset=rows)]) == 0
    capsys.readouterr()
    rows.write_text(json.dumps({"prompt": "2+2=", "solution": "4"}) + "\n")
    message = refused(capsys, ["--resume", str(run), "--max_steps", "2"])
    assert "rows.jsonl" in message and "changed" in message
    assert (run / "checkpoint-1").is_dir()


def test_resume_in_another_folder_is_refused(inputs, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["grpo", *flags(inputs, run)]) == 0
    capsys.readouterr()
    message = refused(capsys, ["--resume", str(run), "--output_dir", str(tmp_path / "other")])
    assert "output_dir" in message and "other" in message
    assert main(["grpo", "--resume", "--output_dir", str(run), "--max_steps", "2"]) == 0


def test_no_usable_solution_is_an_error(inputs, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1+1=", "solution": ""}) + "\n")
    message = refused(capsys, flags(inputs, tmp_path / "run", dataset=rows))
    assert "accuracy" in message and "solution" in message
    assert not (tmp_path / "run").exists()


def test_dates_and_numbers_are_text_where_text_is_wanted(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["grpo", *flags(inputs, "2026-11-20"), "--dry-run"]) == 0


def test_config_that_is_not_text(tmp_path, capsys):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    assert "c.yaml" in refused(capsys, ["--config", str(tmp_path / "c.yaml")])


def test_dry_run_writes_nothing(inputs, tmp_path, capsys):
    assert main(["grpo", *flags(inputs, tmp_path / "run"), "--dry-run"]) == 0
    assert "1 prompts x 2 = 2 outputs" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
