"""A pipeline goes on where it, the caller, or its inputs have moved."""

import json
import shutil

import pytest
import yaml
from toy_stages import KINDS, calls

from grpo_engine import lineage
from grpo_engine.cli import main
from grpo_engine.pipeline.config import read_pipeline
from grpo_engine.pipeline.run import run_pipeline
from grpo_engine.types import UserError


def run(folder, listed, **options):
    values = {"output_dir": str(folder), "stages": listed}
    return run_pipeline(read_pipeline(values, (), KINDS), KINDS, **options)


def test_where_an_outside_file_lies_does_not_count(tmp_path):
    folder = tmp_path / "run"
    sources = [tmp_path / name for name in ("one.txt", "two.txt", "three.txt")]
    for source, text in zip(sources, "aab", strict=True):
        source.write_text(text)

    def listed(source):
        first = {"name": "a", "stage": "toy", "extras": {"dataset": str(source)}}
        return [first, {"name": "b", "stage": "toy", "model": "{a}"}, {"name": "c", "stage": "toy"}]

    assert run(folder, listed(sources[0])) == 0
    (folder / "calls.txt").unlink()
    sources[0].unlink()
    assert run(folder, listed(sources[1])) == 0  # the same under another name
    assert calls(folder) == []
    assert run(folder, listed(sources[2])) == 0
    assert [line.split()[0] for line in calls(folder)] == ["a", "b"]


def test_the_name_of_a_function_in_an_outside_file_counts(tmp_path):
    """``file.py:function`` is no place alone."""
    (tmp_path / "f.py").write_text("")
    listed = [{"name": "a", "stage": "toy", "extras": {"reward": f"{tmp_path}/f.py:one"}}]
    assert run(tmp_path / "run", listed) == 0
    listed[0]["extras"]["reward"] = f"{tmp_path}/f.py:two"
    before = calls(tmp_path / "run")
    assert run(tmp_path / "run", listed) == 0
    assert len(calls(tmp_path / "run")) == len(before) + 1


def test_a_stage_that_was_killed_goes_on_in_a_moved_folder(tmp_path, monkeypatch, capsys):
    """From a checkpoint, with settings that name the old places of its model and data."""
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "1 + 2 =", "completion": "<think> 1+2=3. </think> <answer> 3 </answer>"}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    tune = {"name": "tune", "stage": "sft", "dataset": "rows.jsonl", "max_steps": 2}
    tune |= {"sequences_per_step": 4, "max_length": 128, "save_steps": 1, "device": "cpu"}
    tune |= {"max_tokens_per_microbatch": 512, "prompt_template": "r1-zero"}
    pipeline = {"stages": [tune, {**tune, "name": "more", "model": "{tune}"}]}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(pipeline))
    assert main(["r1", "--config", "p.yaml", "--output_dir", "run"]) == 0
    whole = lineage.read("run").stages["more"].outputs["checkpoint-2"].sha256
    shutil.rmtree("run/more/checkpoint-2")
    values = json.loads((tmp_path / "run" / "manifest.json").read_text())
    values["stages"]["more"] |= {"status": "running", "outputs": {}, "product": None}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(values))
    (tmp_path / "sub").mkdir()
    (tmp_path / "run").rename(tmp_path / "sub" / "moved")
    (tmp_path / "rows.jsonl").rename(tmp_path / "sub" / "rows.jsonl")
    monkeypatch.chdir(tmp_path / "sub")
    capsys.readouterr()
    assert main(["r1", "--config", "../p.yaml", "--output_dir", "moved"]) == 0
    said = capsys.readouterr()
    assert "[1/2] tune: unchanged" in said.out
    assert "more: goes on: killed, not finished; from checkpoint-1" in said.err
    record = lineage.read("moved").stages["more"]
    assert record.outputs["checkpoint-2"].sha256 == whole
    settings = yaml.safe_load((tmp_path / "sub/moved/more/config.yaml").read_text())
    assert settings["model"] == "moved/tune/checkpoint-2"


def test_damaged_notes_of_hashes_are_made_again(tmp_path):
    listed = [{"name": "a", "stage": "toy"}, {"name": "b", "stage": "toy", "model": "{a}"}]
    assert run(tmp_path / "run", listed) == 0
    before = calls(tmp_path / "run")
    notes = tmp_path / "run" / ".file-hashes.json"
    for text in ("[1]", "{", json.dumps(dict.fromkeys(json.loads(notes.read_text()), 3))):
        notes.write_text(text)
        assert run(tmp_path / "run", listed) == 0
    assert calls(tmp_path / "run") == before


def test_a_file_in_the_place_of_a_stage_is_one_line(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_text("mine")
    with pytest.raises(UserError, match="stage a: .*run/a exists and is not a folder"):
        run(tmp_path / "run", [{"name": "a", "stage": "toy"}])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["a"]


def test_a_stage_left_as_it_is_makes_no_other_wait(tmp_path, capsys):
    listed = [{"name": "a", "stage": "toy"}, {"name": "b", "stage": "toy", "model": "{a}"}]
    assert run(tmp_path / "run", listed) == 0
    capsys.readouterr()
    listed[0]["seed"] = 3
    assert run(tmp_path / "run", listed, only=["b"]) == 0
    said = capsys.readouterr()
    assert "a: stays as it is, though seed is 3, was 0" in said.err
    assert "b: runs again" not in said.err and "b: unchanged" in said.out
