"""grpo-engine preferences from end to end: which pairs are kept, what a biased judge comes to, the
same files however it was stopped, and what it refuses."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import judge_rules
import pytest
from fake_endpoint import KEY, endpoint
from tiny_model import make_tiny_model

from grpo_engine.cli import main
from grpo_engine.data import read_rows
from grpo_engine.preferences.config import PreferencesConfig
from grpo_engine.settings import build_config, load_recipe, recipe_names

RULES = str(Path(__file__).with_name("judge_rules.py"))
RULE = f"{RULES}:rule"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def given(tmp_path):
    """Twelve prompts with two answers each; the judge likes the higher number in the summary."""
    rows = [
        {
            "prompt": f"question {number}",
            "answers": [f"<think>long thoughts</think>{number}", f"<think>t</think> {number % 3}"],
            "domain": "general",
        }
        for number in range(1, 13)
    ]
    return write_rows(tmp_path / "given.jsonl", rows)


def flags(folder, **changes):
    values = {"judge": RULE, "max_length_ratio": 10, **changes, "output_dir": folder}
    words = [(f"--{name}", v if isinstance(v, str) else json.dumps(v)) for name, v in
             {**values, "output_dir": str(folder)}.items()]  # fmt: skip
    return ["preferences", *(word for pair in words for word in pair)]


def prefer(folder, *switches, **changes):
    return main([*flags(folder, **changes), *switches])


def statistics_of(folder):
    return json.loads((Path(folder) / "statistics.json").read_text())


def files_of(folder, *names):
    names = names or ("pairs.jsonl", "ties.jsonl", "statistics.json", "statistics.md")
    return {name: (Path(folder) / name).read_bytes() for name in names}


def refused(capsys, code):
    assert code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("grpo-engine: error: ")
    return last


# -- helpful --------------------------------------------------------------------------------------


def test_clear_pairs_are_kept_with_where_they_come_from(given, tmp_path):
    folder = tmp_path / "run"
    assert prefer(folder, dataset=str(given), answer_columns=["answers"]) == 0
    pairs = read_rows(str(folder / "pairs.jsonl"))
    # numbers 1 and 2 equal themselves modulo 3: the same summary twice is no pair
    assert [row["row"] for row in pairs] == list(range(3, 13))
    assert not (folder / "ties.jsonl").read_text()
    for row in pairs:
        assert set(row) == {"prompt", "chosen", "rejected", "domain", "row", "answers",
                            "difference", "judgements"}  # fmt: skip
        assert row["chosen"] == f"<think>long thoughts</think>{row['row']}"
        assert row["rejected"] == f"<think>t</think> {row['row'] % 3}"
        assert (row["answers"], row["difference"], row["domain"]) == ([0, 1], 2.0, "general")
        assert Counter(one["verdict"] for one in row["judgements"]) == {"A>>B": 4}
        assert Counter(one["shown_first"] for one in row["judgements"]) == {
            "chosen": 2,
            "rejected": 2,
        }
    orders = {tuple(one["shown_first"] for one in row["judgements"]) for row in pairs}
    assert len(orders) > 1  # drawn, not fixed
    figures = statistics_of(folder)
    assert (figures["pairs_judged"], figures["kept"], figures["kept_share"]) == (10, 10, 1.0)
    assert figures["position_bias"] == {
        "first_position_rate": 0.5,
        "flip_rate": 0.0,
        "pairs_with_both_orders": 10,
    }
    assert figures["prompts_without_anything_to_judge"] == 2
    assert (figures["answers_left_out"], figures["pairs_left_out"]) == ({"duplicate": 2}, {})
    assert "| kept | 10 |" in (folder / "statistics.md").read_text()


def test_the_judge_sees_the_summary_or_with_scope_response_all(given, tmp_path):
    module = judge_rules_by_path()
    module["CALLS"].clear()
    assert prefer(tmp_path / "a", dataset=str(given), answer_columns=["answers"]) == 0
    shown = {text for talk in module["CALLS"] for text in judge_rules.materials_of(talk).values()}
    assert not any("think" in text for text in shown) and "12" in shown
    module["CALLS"].clear()
    options = {"dataset": str(given), "answer_columns": ["answers"], "scope": "response"}
    assert prefer(tmp_path / "b", **options) == 0
    shown = {text for talk in module["CALLS"] for text in judge_rules.materials_of(talk).values()}
    assert "<think>long thoughts</think>12" in shown


def judge_rules_by_path():
    from grpo_engine.rewards.judge import load_chat_model

    return load_chat_model(RULE)._function.__globals__


def test_a_judge_that_always_says_a_makes_no_pair(given, tmp_path, capsys):
    folder, judge = tmp_path / "run", f"{RULES}:always_a"
    options = {"dataset": str(given), "answer_columns": ["answers"], "judge": judge}
    assert prefer(folder, **options) == 1
    assert "nothing was kept" in capsys.readouterr().err
    figures = statistics_of(folder)
    assert (figures["kept"], figures["ties"]) == (0, 10)
    assert figures["position_bias"]["flip_rate"] == 1.0
    assert figures["position_bias"]["first_position_rate"] == 1.0
    assert not (folder / "pairs.jsonl").read_text()
    assert len((folder / "ties.jsonl").read_text().splitlines()) == 10
    assert json.loads((folder / "manifest.json").read_text())["status"] == "failed"
    # drawn anew each time, four judgements agree by chance in one pair of eight
    random = {**options, "answer_order": "random", "min_difference": 1.5, "seed": 3}
    assert prefer(tmp_path / "random", **random) in (0, 1)
    assert statistics_of(tmp_path / "random")["position_bias"]["first_position_rate"] == 1.0


# -- safety ---------------------------------------------------------------------------------------


def test_responses_are_labelled_one_by_one(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "cake?"}], "one": "<think>poison</think>No.",
         "two": ["Bake it.", "<think>open"], "domain": "safety"},
        {"prompt": "soup?", "one": "Boil it.", "two": []},
    ]  # fmt: skip
    data = write_rows(tmp_path / "rows.jsonl", rows)
    folder = tmp_path / "run"
    options = {"kind": "safety", "dataset": str(data), "answer_columns": ["one", "two"]}
    assert main([w for w in flags(folder, **options) if w not in ("--max_length_ratio", "10")]) == 0
    labelled = read_rows(str(folder / "safety.jsonl"))
    assert [(row["completion"], row["label"]) for row in labelled] == [
        ("<think>poison</think>No.", 0),
        ("Bake it.", 1),
        ("<think>open", 1),
        ("Boil it.", 1),
    ]
    assert labelled[0]["prompt"] == rows[0]["prompt"] and labelled[0]["domain"] == "safety"
    assert labelled[0]["judgements"] == ["unsafe"] and "domain" not in labelled[3]
    figures = statistics_of(folder)
    assert (figures["safe"], figures["unsafe"], figures["unsafe_share"]) == (3, 1, 0.25)
    assert figures["scope"] == "response"
    assert not (folder / "pairs.jsonl").exists()


# -- stopping and going on ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def sampled(tiny, tmp_path):
    """Settings that sample the answers: random letters of a random model."""
    rows = [{"prompt": f"say {number}"} for number in range(6)]
    return {
        "dataset": str(write_rows(tmp_path / "prompts.jsonl", rows)),
        "model": tiny,
        "prompt_template": "none",
        "max_completion_length": 8,
        "drop_truncated": False,
        "num_samples": 3,
        "generation_batch_size": 4,
        "judge_batch_size": 2,
        "device": "cpu",
    }


SAMPLED_FILES = ("samples.jsonl", "pairs.jsonl", "ties.jsonl", "statistics.json", "statistics.md")


def test_the_same_seed_makes_the_same_files(sampled, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert prefer(tmp_path / name, **sampled, seed=seed) == 0
    first, again, other = (files_of(tmp_path / name, *SAMPLED_FILES) for name in "abc")
    assert first == again
    assert first["samples.jsonl"] != other["samples.jsonl"]
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["status"] == "finished" and manifest["verb"] == "preferences"
    assert set(manifest["inputs"]) == {"dataset", "model", "prompts", "sampling", "judge"}
    assert manifest["inputs"]["judge"]["judge"] == RULE
    assert len(manifest["inputs"]["judge"]["prompt"]) == 16
    assert set(manifest["outputs"]) == set(SAMPLED_FILES)
    assert manifest["judge_usage"]["asked"] > 0


def test_a_finished_folder_asks_nothing_again(sampled, tmp_path):
    log, folder = tmp_path / "log", tmp_path / "run"
    judge = {"judge": f"{RULES}:log_to", "judge_options": {"args": {"path": str(log)}}}
    assert prefer(folder, **sampled, **judge) == 0
    before, asked = files_of(folder, *SAMPLED_FILES), log.read_text()
    assert prefer(folder, **sampled, **judge) == 0
    assert files_of(folder, *SAMPLED_FILES) == before and log.read_text() == asked
    # another threshold asks nothing either; other samples need another folder
    assert prefer(folder, **sampled, **judge, value_much_better=1.5, min_difference=1.4) == 0
    assert log.read_text() == asked


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_stopped_in_the_middle_it_ends_in_the_same_files(
    sampled, tmp_path, monkeypatch, stop, code
):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    options = {"model": "judge-1", "max_concurrency": 2}
    settings = {**sampled, "judge_options": options, "seed": 4}
    with endpoint(lambda body: judge_rules.answer(body["messages"])) as fake:
        assert prefer(whole, **settings, judge=fake.url) == 0
        wanted = fake.answered()

    def slowly(body):
        time.sleep(0.03)
        return judge_rules.answer(body["messages"])

    with endpoint(slowly) as fake:
        command = [sys.executable, "-m", "grpo_engine.cli"]
        child = subprocess.Popen(
            [*command, *flags(folder, **settings, judge=fake.url)], stderr=subprocess.DEVNULL
        )
        while fake.answered() < 7:
            assert child.poll() is None
            time.sleep(0.005)
        child.send_signal(stop)
        assert child.wait(60) == code
        assert not (folder / "pairs.jsonl").exists()
        assert fake.answered() < wanted
        assert prefer(folder, **settings, judge=fake.url) == 0
        # on its way when it was killed: two at most; after a request to stop, none is lost
        assert wanted <= fake.answered() <= wanted + (2 if stop == signal.SIGKILL else 0)
    assert files_of(folder, *SAMPLED_FILES) == files_of(whole, *SAMPLED_FILES)


def test_overwrite_begins_anew(sampled, tmp_path, capsys):
    folder = tmp_path / "run"
    assert prefer(folder, **sampled) == 0
    other = {**sampled, "num_samples": 4}
    assert "its samples have sampling num_samples 3" in refused(capsys, prefer(folder, **other))
    assert prefer(folder, "--overwrite", **other) == 0
    assert statistics_of(folder)["answers"] == 24
    own = {**other, "dataset": str(folder / "pairs.jsonl")}
    assert "would delete --dataset" in refused(capsys, prefer(folder, "--overwrite", **own))


@pytest.mark.parametrize("switches", [[], ["--overwrite"]])
@pytest.mark.parametrize("kind", ["sampled", "given"])
def test_a_second_process_touches_nothing(sampled, given, tmp_path, capsys, switches, kind):
    folder, file = tmp_path / "run", {"sampled": "samples.jsonl", "given": ".lock"}[kind]
    settings = sampled
    if kind == "given":
        settings = {"dataset": str(given), "answer_columns": ["answers"]}
    assert prefer(folder, **settings) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with open(folder / file) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        line = refused(capsys, prefer(folder, *switches, **settings))
    assert "another process is at it" in line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_of_two_processes_with_given_answers_one_is_refused(given, tmp_path, monkeypatch):
    """While the first is waiting for its judge, the second comes."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder, command = tmp_path / "run", [sys.executable, "-m", "grpo_engine.cli"]
    arrived, go_on = threading.Event(), threading.Event()

    def judge(body):
        arrived.set()
        assert go_on.wait(60)
        return judge_rules.answer(body["messages"])

    with endpoint(judge) as fake:
        argv = flags(folder, dataset=str(given), answer_columns=["answers"], judge=fake.url,
                     judge_options={"model": "judge-1"})  # fmt: skip
        first = subprocess.Popen([*command, *argv], stderr=subprocess.DEVNULL)
        assert arrived.wait(60)
        second = subprocess.run([*command, *argv], capture_output=True, text=True, timeout=60)
        go_on.set()
        assert first.wait(60) == 0
    assert second.returncode == 2 and "another process is at it" in second.stderr
    assert statistics_of(folder)["kept"] == 10


def test_the_manifest_names_the_recipe(given, tmp_path):
    folder = tmp_path / "run"
    recipe = ["--recipe", "preferences-helpful", "--max_mean_length_ratio", "null"]
    assert prefer(folder, *recipe, dataset=str(given), answer_columns=["answers"]) == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["recipe"] == "preferences-helpful"


def test_a_dry_run_writes_nothing(sampled, given, tmp_path, capsys):
    folder = tmp_path / "run"
    assert prefer(folder, "--dry-run", **sampled) == 0
    plan = capsys.readouterr().out
    assert "at most 24 (6 pairs x 4)" in plan and "18 in all" in plan
    options = {"dataset": str(given), "answer_columns": ["answers"]}
    assert prefer(folder, "--dry-run", **options) == 0
    assert "at most 48 (12 pairs x 4)" in capsys.readouterr().out
    assert not folder.exists()


def test_the_key_is_in_no_file(given, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    faults = [500, 429, "garbage", "drop", 503]
    with endpoint(
        lambda body: judge_rules.answer(body["messages"]), key=KEY, faults=faults
    ) as fake:
        options = {"model": "judge-1", "api_key_env": "JUDGE_KEY", "backoff": 0.01}
        folder = tmp_path / "run"
        code = prefer(folder, dataset=str(given), answer_columns=["answers"], judge=fake.url,
                      judge_options=options)  # fmt: skip
        assert code == 0
        assert any(KEY in head.get("Authorization", "") for head in fake.headers)
    for file in folder.rglob("*"):
        assert KEY.encode() not in file.read_bytes(), file
    shown = capfd.readouterr()
    assert KEY not in shown.out + shown.err


def test_a_failing_judge_stops_the_run_and_it_goes_on_later(given, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "run"
    options = {"model": "judge-1", "backoff": 0.01, "max_retries": 0, "max_concurrency": 1}
    settings = {"dataset": str(given), "answer_columns": ["answers"], "judge_options": options}
    reply = lambda body: judge_rules.answer(body["messages"])  # noqa: E731
    with endpoint(reply, faults=[None] * 8 + [400] * 100) as fake:
        assert prefer(folder, **settings, judge=fake.url) == 1
        said = capsys.readouterr().err
        assert "judgements came without a verdict" in said and "status 400" in said
        assert not (folder / "pairs.jsonl").exists()
        fake.faults.clear()
        asked = fake.answered()
        assert prefer(folder, **settings, judge=fake.url) == 0
        assert fake.answered() - asked == 40 - 8
    whole = tmp_path / "whole"
    with endpoint(reply) as fake:
        assert prefer(whole, **settings, judge=fake.url) == 0
    assert files_of(folder) == files_of(whole)


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": "absent.py:f"}, "file 'absent.py' does not exist"),
        ({"judge": ""}, "--judge"),
        ({"judge_options": {"modle": "x"}}, "no option 'modle'"),
        ({"judge_options": {"spec": "x"}}, "no option 'spec'"),
        ({"judge_options": {"cache": "x"}}, "replies are kept in output_dir"),
        ({"judge_options": {"batch_size": "many"}}, "batch_size 'many'"),
        ({"judgements": 3}, "judgements=3: answer_order 'balanced' needs an even number"),
        ({"min_difference": 2.0}, "min_difference=2.0: no mean score can be above it"),
        ({"value_much_better": 0.5}, "value_much_better=0.5: is less than value_better"),
        ({"max_length_ratio": 0.5}, "--max_length_ratio 0.5"),
        ({"answer_columns": ["absent"]}, "row 1: 'absent' must hold texts, got no such column"),
        ({"answer_columns": ["prompt"]}, "no row has 2 answers"),
        ({"answer_columns": ["answers", "answers"]}, "each once"),
        ({"kind": "safety"}, "max_length_ratio=10.0: has no meaning with kind='safety'"),
        ({"kind": "harmless"}, "--kind 'harmless'"),
        ({"dataset": "absent.jsonl"}, "dataset file absent.jsonl does not exist"),
        ({"num_samples": 1, "answer_columns": []}, "num_samples=1: a pair needs two answers"),
        ({"judge_temprature": 1}, "did you mean judge_temperature"),
        ({"model": "no/such/model/here", "answer_columns": []}, "no/such/model/here"),
        ({"answer_columns": [], "prompt_template": "chat"}, "has no chat template"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(given, tmp_path, capsys, changes, message):
    folder = tmp_path / "run"
    options = {"dataset": str(given), "answer_columns": ["answers"], **changes}
    assert message in refused(capsys, prefer(folder, **options))
    assert not folder.exists()


def test_another_runs_folder_is_refused(given, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("{}\n")
    options = {"dataset": str(given), "answer_columns": ["answers"]}
    assert "holds another run" in refused(capsys, prefer(folder, **options))
    assert os.listdir(folder) == ["metrics.jsonl"]
    shutil.rmtree(folder)
    missing = refused(capsys, main(["preferences", "--judge", RULE]))
    assert "--dataset: needs a value" in missing


@pytest.mark.parametrize("name", recipe_names("preferences"))
def test_the_recipes_are_the_papers(name):
    config = build_config(load_recipe(name), PreferencesConfig)
    helpful = config.kind == "helpful"
    assert config.resolved_judgements == (4 if helpful else 1)
    assert config.resolved_scope == ("summary" if helpful else "response")
    assert not helpful or config.min_difference == 1.0
    assert {"preferences-helpful", "preferences-safety"} <= set(recipe_names("preferences"))


def test_without_a_judge_the_model_judges_its_own_answers(given, tmp_path, monkeypatch):
    from grpo_engine.preferences import run

    asked = []

    def load(name, **options):
        asked.append((name, options))
        return load_chat_model(RULE)

    load_chat_model = run.load_chat_model
    monkeypatch.setattr(run, "load_chat_model", load)
    columns = {"dataset": str(given), "answer_columns": ["answers"], "max_length_ratio": 10}
    values = {**columns, "model": "some/model", "device": "cpu", "judge_options": {"template": "t"}}
    config = PreferencesConfig(**values, dtype="bfloat16", output_dir=str(tmp_path / "run"))
    assert run.run_preferences(config) == 0
    options = {"device": "cpu", "dtype": "bfloat16", "template": "t"}
    assert asked == [("some/model", options)]
    named = config.model_copy(update={"judge": "other", "judge_options": {}})
    assert named.resolved_judge == ("other", {})
