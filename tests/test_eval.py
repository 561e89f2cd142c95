"""grpo-engine eval from end to end: the same figures however it was stopped, every kind of task,
and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_model import make_tiny_model

from grpo_engine.cli import main
from grpo_engine.evaluation import problems as problems_module
from grpo_engine.evaluation import run as run_module
from grpo_engine.evaluation.config import build_eval_config
from grpo_engine.evaluation.problems import Kind
from grpo_engine.evaluation.run import Evaluation, run_eval
from grpo_engine.models import MINIATURE

SUMS = {
    "model": "miniature",
    "data": "reasoning_gym:chain_sum",
    "data_args": "{seed: 1000512, size: 3, min_terms: 4, max_terms: 6, min_digits: 1, "
    "max_digits: 1}",
    "prompt_template": "r1-zero",
    "num_samples": 4,
    "max_completion_length": 64,
    "generation_batch_size": 2,
    "reward_workers": 1,
    "device": "cpu",
}


def flags(folder, **changes):
    values = {**SUMS, **changes, "output_dir": folder}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def evaluate(folder, *switches, **changes):
    return main(["eval", *flags(folder, **changes), *switches])


def results_of(folder):
    return json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))


def lines_of(folder):
    return (Path(folder) / "samples.jsonl").read_text(encoding="utf-8").splitlines()


def refused(capsys, code):
    assert code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("grpo-engine: error: ")
    return last


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An evaluation nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert evaluate(folder) == 0
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def drawn(monkeypatch):
    """The cells that are drawn from here on."""
    cells = []
    draw = Evaluation.draw

    def counted(self, missing):
        cells.extend(missing)
        return draw(self, missing)

    monkeypatch.setattr(Evaluation, "draw", counted)
    return cells


def test_an_evaluation_leaves_what_it_promises(whole, capsys):
    found, rows = results_of(whole), [json.loads(line) for line in lines_of(whole)]
    assert found["num_problems"] == 3 and found["task"] == "reasoning_gym" and len(rows) == 12
    assert len({row["seed"] for row in rows}) == len({row["key"] for row in rows}) == 12
    right = dict.fromkeys(range(1, 4), 0)
    for row in rows:
        right[row["row"]] += row["score"] == 1.0
        assert row["solution"] and row["length"] <= 64
    assert found["correct"] == list(right.values()) and 0 < sum(found["correct"]) < 12
    assert found["pass@1"]["value"] == sum(right.values()) / 12
    assert list(found["pass@k"]) == list(found["cons@k"]) == ["1", "2", "4"]
    assert found["config"]["temperature"] == 0.6 and "output_dir" not in found["config"]
    manifest = json.loads((whole / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["status"] == "finished" and manifest["verb"] == "eval"
    assert set(manifest["outputs"]) == {"results.json", "samples.jsonl"}
    assert (whole / "config.yaml").is_file()


def test_killed_and_continued_it_ends_the_same_to_the_bit(whole, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "grpo_engine.cli", "eval", *flags(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (folder / "samples.jsonl").exists() and len(lines_of(folder)) >= 3:
            process.kill()
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL and not (folder / "results.json").exists()
    path = folder / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-5])  # as if the kill had come in the middle of a write
    assert evaluate(folder) == 0
    for name in ("results.json", "samples.jsonl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_interrupted_it_keeps_what_it_has(whole, tmp_path, monkeypatch, capsys):
    judge, calls = Evaluation.judge, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return judge(self, *args)

    monkeypatch.setattr(Evaluation, "judge", interrupted)
    assert evaluate(tmp_path / "run") == 130
    assert "2 of 12 samples are kept" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["status"] == "stopped" and not (tmp_path / "run" / "results.json").exists()
    assert lines_of(tmp_path / "run") == lines_of(whole)[:2]
    assert evaluate(tmp_path / "run") == 0
    assert (tmp_path / "run" / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def test_more_samples_reuse_the_earlier_ones(whole, tmp_path, drawn):
    folder = tmp_path / "run"
    assert evaluate(folder, num_samples=2) == 0
    two = (folder / "results.json").read_bytes()
    assert {number for _, number in drawn} == {0, 1}
    drawn.clear()
    assert evaluate(folder) == 0
    assert {number for _, number in drawn} == {2, 3} and len(drawn) == 6
    for name in ("results.json", "samples.jsonl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    drawn.clear()
    assert evaluate(folder, num_samples=2) == 0
    assert not drawn and (folder / "results.json").read_bytes() == two


def test_stopped_while_drawing_more_it_leaves_no_results_of_fewer(copied, monkeypatch):
    monkeypatch.setattr(Evaluation, "judge", lambda *_: signal.raise_signal(signal.SIGINT))
    assert evaluate(copied, num_samples=8) == 130
    assert len(lines_of(copied)) == 12 and not (copied / "results.json").exists()


def test_the_seed_of_a_sample_does_not_depend_on_the_batch(whole, tmp_path):
    assert evaluate(tmp_path / "run", generation_batch_size=16) == 0
    drawn = [sorted(lines, key=cell) for lines in map(parsed, (whole, tmp_path / "run"))]
    for one, other in zip(*drawn, strict=True):
        assert (one["seed"], one["completion"]) == (other["seed"], other["completion"])


def parsed(folder):
    return [json.loads(line) for line in lines_of(folder)]


def cell(row):
    return row["row"], row["sample"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 0.7}, ["sampling temperature 0.6", "0.7"]),
        ({"seed": 1}, ["sampling seed 0", "1"]),
        ({"max_completion_length": 65}, ["sampling max_completion_length 64"]),
        ({"prompt_template": "none"}, ["prompts sha256"]),
        ({"task": "math"}, ["data columns"]),
        ({"data_limit": 2}, ["data rows 3", "2"]),
    ],
)
def test_other_inputs_are_refused_in_one_line(copied, capsys, changes, words):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    line = refused(capsys, evaluate(copied, **changes))
    assert all(word in line for word in [*words, "--overwrite"]), line
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def test_the_same_weights_elsewhere_are_the_same_model_and_others_are_not(
    copied, tmp_path, capsys, drawn
):
    shutil.copytree(MINIATURE, tmp_path / "moved")
    assert evaluate(copied, model=tmp_path / "moved") == 0 and not drawn
    other = make_tiny_model(tmp_path / "other")
    line = refused(capsys, evaluate(copied, model=other, prompt_template="none"))
    assert "model weights_sha256" in line


def test_overwrite_begins_anew(copied, drawn):
    assert evaluate(copied, "--overwrite", num_samples=1, seed=5) == 0
    assert len(drawn) == 3 == len(lines_of(copied)) and results_of(copied)["num_samples"] == 1


def test_dry_run_writes_nothing_and_prints_the_plan(tmp_path, capsys):
    assert evaluate(tmp_path / "run", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "3 problems (reasoning_gym)" in out and "4 a problem, 12 in all" in out
    assert not (tmp_path / "run").exists()


# --- every kind of task, with scripted answers --------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def scripted(tiny, tmp_path, monkeypatch):
    """Evaluate rows with these completions in place of the model's; the results and samples."""

    def run(rows, completions, **values):
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        texts = dict(completions)
        monkeypatch.setattr(
            Evaluation, "draw", lambda self, cells: [(texts[one], 5, "stop") for one in cells]
        )
        settings = {
            "model": str(tiny),
            "data": str(data),
            "prompt_template": "none",
            "num_samples": 2,
            "max_completion_length": 8,
            "max_prompt_length": 500,
            "reward_workers": 1,
            "device": "cpu",
            "output_dir": str(tmp_path / "run"),
            **values,
        }
        code = run_eval(build_eval_config(settings))
        return code, (results_of(tmp_path / "run") if code == 0 else None)

    return run


def test_mathematics(scripted):
    rows = [{"problem": "1/2 as a decimal?", "answer": "#### 0.5"}, {"problem": "?", "answer": 7}]
    texts = {
        (1, 0): r"so \boxed{\frac12}",
        (1, 1): "<answer>0.50</answer>",
        (2, 0): "Answer: 8",
        (2, 1): "it is 7",
    }
    code, found = scripted(rows, texts.items())
    assert code == 0 and found["task"] == "math" and found["correct"] == [2, 0]
    assert found["cons@k"]["2"]["value"] == 0.5
    assert found["rates"]["no_answer"] == {"count": 1, "share": 0.25}


def test_multiple_choice(scripted, tmp_path):
    rows = [{"question": "which?", "choices": ["x", "y", "z"], "answer": "y"}]
    texts = {(1, number): f"ANSWER: {letter}" for number, letter in enumerate("ABC")}
    code, found = scripted(rows, texts.items(), num_samples=3)
    assert code == 0 and found["task"] == "choice" and found["correct"] == [1]
    assert found["pass@k"]["2"]["value"] == pytest.approx(2 / 3)
    [order] = {tuple(row["choice_order"]) for row in parsed(tmp_path / "run")}
    [right] = [row for row in parsed(tmp_path / "run") if row["score"] == 1.0]
    assert order["ABC".index(right["answers"][0])] == 1


def test_code(scripted, tmp_path):
    cases = [{"input": "2\n", "output": "4\n"}]
    rows = [{"prompt": "double", "tests": {"type": "stdio", "cases": cases}}]
    texts = {
        (1, 0): "```python\nprint(2 * int(input()))\n```",
        (1, 1): "```python\nprint(2)\n```",
        (1, 2): "no program",
    }
    code, found = scripted(rows, texts.items(), num_samples=3)
    assert code == 0 and found["correct"] == [1] and found["cons@k"] is None
    assert found["rates"]["outcomes"] == {"no_answer": 1, "ok": 2}
    assert found["inputs"]["judge"]["sandbox"]


def test_reasoning_gym_rows_from_a_file_and_a_prefilled_think_tag(scripted):
    pytest.importorskip("reasoning_gym")
    from grpo_engine.data import read_rows

    rows = read_rows("reasoning_gym:chain_sum", args={"seed": 3, "size": 1})
    right = rows[0]["solution"]
    texts = {
        (1, 0): f"hm</think><answer>{right}</answer>",
        (1, 1): f"<answer>{right}</answer>",  # still thinking
    }
    code, found = scripted(rows, texts.items(), response_prefix="<think>")
    assert code == 0 and found["task"] == "reasoning_gym" and found["correct"] == [1]
    assert found["rates"]["no_answer"]["count"] == 1
    assert found["inputs"]["judge"]["thinking_prefilled"] is True


@pytest.fixture
def failing_judge(tmp_path, monkeypatch):
    """Judges "right" and "wrong", raises at "crash" and does not come back from "hang"."""
    path = tmp_path / "judge.py"
    path.write_text(
        "import time\n"
        "def judge(completions, thinking_prefilled=False, **_):\n"
        "    [word] = completions\n"
        "    if word == 'crash': raise RuntimeError('no verdict')\n"
        "    if word == 'hang': time.sleep(60)\n"
        "    return [float(word == 'right')]\n"
    )
    kinds = {"math": Kind(f"{path}:judge", None)}
    monkeypatch.setattr(problems_module, "KINDS", kinds)


def test_failed_verdicts_are_counted_and_bounded(scripted, failing_judge, tmp_path, capsys):
    words = ["right", "crash", "hang", "wrong"]
    texts = {(1, number): word for number, word in enumerate(words)}
    code, found = scripted(
        [{"problem": "?", "answer": "1"}], texts.items(), num_samples=4, reward_timeout=1.0
    )
    assert code == 0 and found["pass@1"] == {"value": 0.25, "ci95": None, "bounds": [0.25, 0.75]}
    rates = found["rates"]
    assert [rates[name]["count"] for name in ("unjudged", "timeout", "verifier_error")] == [2, 1, 1]
    out = capsys.readouterr().out
    assert "2 of 4 samples could not be judged" in out and "pass@4" in out and "25.0 %" in out
    assert [row["outcome"] for row in parsed(tmp_path / "run")] == ["ok", "error", "timeout", "ok"]


def test_a_later_judge_judges_again_without_the_model(
    scripted, failing_judge, tmp_path, monkeypatch, capsys
):
    rows, words = [{"problem": "?", "answer": "1"}], {(1, 0): "right", (1, 1): "wrong"}
    assert scripted(rows, words.items())[1]["correct"] == [1]
    folder, judge = tmp_path / "run", tmp_path / "judge.py"
    before = (folder / "samples.jsonl").read_bytes()
    first = judge.read_text()
    monkeypatch.setattr(run_module, "rules_sha256", lambda: "later")

    judge.write_text(first.replace("[word] = completions", "1 / 0"))
    assert scripted(rows, {}.items())[0] == 1
    assert "2 of 2 samples could not be judged" in capsys.readouterr().err
    assert (folder / "samples.jsonl").read_bytes() == before

    judge.write_text(first.replace("word == 'right'", "word != ''"))
    code, found = scripted(rows, {}.items())  # no word is there to be drawn
    assert code == 0 and found["correct"] == [2]
    assert "judging 2 samples again" in capsys.readouterr().err
    assert scripted(rows, words.items(), output_dir=str(tmp_path / "fresh"))[0] == 0
    for name in ("results.json", "samples.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    assert scripted(rows, {}.items())[0] == 0 and "again" not in capsys.readouterr().err


def test_a_judge_that_fails_on_most_ends_the_evaluation(scripted, failing_judge, tmp_path, capsys):
    texts = {(1, number): "crash" for number in range(2)}
    code, _ = scripted([{"problem": "?", "answer": "1"}], texts.items())
    assert code == 1 and not (tmp_path / "run" / "results.json").exists()
    err = capsys.readouterr().err
    assert "2 of 2 samples could not be judged" in err and "no verdict" in err
    assert "1 of 2 samples are kept" in err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["status"] == "failed"


def test_truncated_samples_are_counted(tmp_path, tiny):
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"problem": "1+1=", "answer": "2"}) + "\n")
    assert (
        evaluate(
            tmp_path / "run",
            model=tiny,
            data=data,
            data_args="{}",
            prompt_template="none",
            max_completion_length=2,
        )
        == 0
    )
    rates = results_of(tmp_path / "run")["rates"]
    assert rates["truncated"]["count"] >= 3 and rates["no_answer"]["count"] == 4


def test_a_chat_template_gets_the_suffix_of_the_task(tmp_path, tiny, capsys):
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"problem": "1+1=", "answer": "2"}) + "\n")
    values = {"model": model, "data": data, "data_args": "{}", "prompt_template": "chat"}
    assert evaluate(tmp_path / "run", "--dry-run", **values) == 0
    assert r"<user>1+1=\nPlease reason step by step" in capsys.readouterr().out
    assert evaluate(tmp_path / "run", "--dry-run", **values, prompt_suffix="") == 0
    assert '"<user>1+1="' in capsys.readouterr().out


# --- what the user can get wrong ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": "absent.jsonl"}, ["absent.jsonl"]),
        ({"data": "{}/broken.jsonl"}, ["broken.jsonl:2"]),
        ({"model": "{}/absent"}, ["absent"]),
        ({"prompt_template": "chat"}, ["chat template"]),
        ({"max_completion_length": 600}, ["--max_completion_length 600", "512"]),
        ({"max_prompt_length": 2}, ["max_prompt_length=2"]),
        ({"device": "cuda:7"}, ["cuda:7"]),
        ({"output_dir": "{}/training"}, ["--output_dir", "another run"]),
        ({"output_dir": "{}/broken.jsonl"}, ["--output_dir", "not a folder"]),
        ({"check_overlap": "absent.jsonl"}, ["absent.jsonl"]),
        ({"recipe": "r1-zero"}, ["--recipe r1-zero"]),
        ({"dataset": "x"}, ["--dataset", "data"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_are_one_line(tmp_path, tiny, capsys, changes, words):
    (tmp_path / "good.jsonl").write_text(json.dumps({"prompt": "1+1=", "solution": "2"}) + "\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "answer": "1"}\n{"prompt": \n')
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "manifest.json").write_text('{"recipe": null}')
    values = {
        "model": tiny,
        "data": tmp_path / "good.jsonl",
        "prompt_template": "none",
        "max_completion_length": 4,
        "device": "cpu",
        "output_dir": tmp_path / "run",
        **{name: str(value).replace("{}", str(tmp_path)) for name, value in changes.items()},
    }
    argv = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    line = refused(capsys, main(["eval", *argv]))
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_overwrite_never_deletes_an_input(copied, capsys):
    data = copied / "samples.jsonl"
    line = refused(capsys, evaluate(copied, "--overwrite", data=data, data_args="{}"))
    assert "would delete --data" in line and data.read_bytes()


def test_help_lists_every_field(capsys):
    assert main(["eval", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--num_samples (16)" in out and "--data (required)" in out
    assert "grpo-engine eval" in out and os.linesep in out
