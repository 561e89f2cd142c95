"""A pipeline's mistakes are found before anything is displaced: by the plan where the settings
alone show them, else by the stage's own checks while all results are in their place."""

import json
import os
import shutil

import pytest
import yaml
from toy_pipeline import NAMES, called, finish, no_collecting, run

from grpo_engine import lineage
from grpo_engine.cli import main
from grpo_engine.interrupt import StopRequested
from grpo_engine.pipeline import run as pipeline_run
from grpo_engine.pipeline.config import read_pipeline
from grpo_engine.pipeline.stages import STAGES, build
from grpo_engine.types import UserError


@pytest.fixture(scope="module", autouse=True)
def _no_collecting():
    with no_collecting():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def again(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def contents(folder):
    """Every file under ``folder`` and what is in it."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- what only the stage itself finds --------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("zero.value=refused", "stage zero: --value refused: not today"),
        ("rl.value=refused", "stage rl: --value refused: not today"),
        ("reject.raises=UserError", "stage reject: no rows today"),
    ],
)
def test_a_mistake_leaves_finished_results_and_records_as_they_are(again, flag, words, overwrite):
    before = contents(again)
    with pytest.raises(UserError) as raised:
        run(again, flag, overwrite=overwrite, only=[flag.partition(".")[0]])
    assert str(raised.value) == words
    assert contents(again) == before
    assert sorted(p.name for p in again.iterdir() if p.is_dir()) == sorted(NAMES)
    if not overwrite:
        assert run(again) == 0 and called(again) == []


def test_nor_is_a_stage_lost_that_comes_after_others_that_ran(again):
    """Then the pipeline has begun, and its record says what failed."""
    before = contents(again / "final")
    with pytest.raises(UserError, match="stage final: --value refused"):
        run(again, "cold_data.rows=3", "final.value=refused")
    assert called(again) == ["cold-data", "cold-sft", "rl", "reject"]
    record = lineage.read(again)
    assert (record.status, record.stages["final"].status) == ("failed", "finished")
    assert contents(again / "final") == before
    assert not (again / "final.superseded").exists()


def test_an_unfinished_stage_is_not_displaced_either(tmp_path):
    folder = tmp_path / "run"
    assert run(folder, "cold_sft.exit_with=1") == 1
    before = contents(folder)
    with pytest.raises(UserError, match="stage cold-sft: --value refused"):
        run(folder, "cold_sft.value=refused")
    assert contents(folder) == before


def test_a_mistake_in_the_first_stage_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="stage zero: --value refused"):
        run(tmp_path / "deep" / "run", "zero.value=refused")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_alone_goes_on_after_a_mistake(again, tmp_path):
    """The mistake is not in its config.yaml."""
    assert run(again) == 0  # config.yaml has this folder's name now
    before = (again / "config.yaml").read_bytes()
    with pytest.raises(UserError):
        run(again, "zero.value=refused")
    assert (again / "config.yaml").read_bytes() == before
    assert run(again, "final.value=x") == 0
    assert yaml.safe_load((again / "config.yaml").read_text())["stages"][5]["value"] == "x"


def test_a_stop_while_a_stage_is_checked_displaces_nothing(again, monkeypatch):
    def stop(stage, config):
        raise StopRequested

    monkeypatch.setattr(pipeline_run, "validate_stage", stop)
    before = contents(again)
    assert run(again, "zero.value=x") == 0  # of a signal that the interrupt did not see
    assert contents(again) == before


def test_a_real_stage_checks_its_rows_before_its_results_are_displaced(tmp_path, capsys):
    row = {"prompt": "1 + 2 =", "completion": "<think> 1+2=3. </think> <answer> 3 </answer>"}
    rows, wrong = tmp_path / "rows.jsonl", tmp_path / "wrong.jsonl"
    rows.write_text((json.dumps(row) + "\n") * 8)
    wrong.write_text(json.dumps(row) + '\n{"prompt": "1 + 2 ="}\n')
    tune = {"name": "tune", "stage": "sft", "dataset": str(rows), "max_steps": 1}
    tune |= {"sequences_per_step": 4, "max_length": 128, "max_tokens_per_microbatch": 512}
    values = {"device": "cpu", "prompt_template": "r1-zero", "stages": [tune]}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(values))
    folder = tmp_path / "run"
    command = ["r1", "--config", str(tmp_path / "p.yaml"), "--output_dir", str(folder)]
    assert main(command) == 0
    before = contents(folder)
    capsys.readouterr()
    assert main([*command, "--tune.dataset", str(wrong)]) == 2
    said = capsys.readouterr()
    assert "stage tune: " in said.err and "completion" in said.err and "superseded" not in said.err
    assert contents(folder) == before
    assert main(["r1", "--output_dir", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "[1/1] tune: unchanged, checkpoint-1" in out
    # settings that are right displace it, and the plan of the check is not printed
    assert main([*command, "--tune.max_steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "packing" not in out and "checkpoint-2" in out
    assert (folder / "tune.superseded" / "checkpoint-1").is_dir()


# -- what the settings alone show ------------------------------------------------------------------

RL = {
    "stage": "grpo",
    "dataset": "reasoning_gym:chain_sum",
    "prompts_per_generation": 4,
    "num_generations": 4,
    "steps_per_generation": 2,
    "max_steps": 4,
    "ref_model_sync_steps": 4,
    "max_completion_length": 16,
    "reward_domains": {"accuracy": ["math"], "format": ["chat"]},
    "dataset_domain": "math",
    "general_dataset": [{"source": "miniature:prompts", "domain_column": "preference"}],
}
SAMPLE = {"stage": "sample", "dataset": "reasoning_gym:chain_sum", "judge_rows": "unscored"}
PREFER = {"stage": "preferences", "dataset": "miniature:prompts", "judge": "rules.py:judge"}
TUNE = {"stage": "sft", "dataset": "{draw}"}

MISTAKES = {
    "a task": ("--rl.dataset=reasoning_gym:chainsum", "task 'chainsum'; did you mean 'chain_sum'?"),
    "its option": ("--rl.dataset_args={min_term: 2}", "has no option 'min_term'"),
    "its value": ("--rl.dataset_args={min_terms: 9, max_terms: 2}", "max_terms=2, min_terms=9"),
    "held-out rows": ("--rl.eval_dataset=reasoning_gym:sums", "unknown reasoning_gym task 'sums'"),
    "toy rows": ("--rl.general_dataset=[{source: 'miniature:x'}]", "data source miniature:x"),
    "the mixture": ("--rl.general_share=0.001", "general_share=0.001: of the 4 prompts"),
    "its steps": ("--rl.preference_steps=9", "preference_steps=9: there are max_steps=4"),
    "a reward": ("--rl.reward_funcs=[accurcy]", "unknown reward 'accurcy'"),
    "whose domains": ("--rl.reward_domains={formt: [math]}", "'formt' is none of the rewards"),
    "its argument": ("--rl.reward_args={format: {x: 1}}", "reward 'format' has no argument 'x'"),
    "one's own": ("--rl.reward_funcs=[accuracy, format, 'rules.py:no']", "no function 'no'"),
    "its signature": ("--rl.reward_funcs=[accuracy, format, 'rules.py:judge']", "takes (conv"),
    "a module": ("--rl.reward_funcs=[accuracy, format, 'nomod:x']", "cannot import 'nomod'"),
    "the measure": (
        "--rl.eval_dataset=reasoning_gym:chain_sum --rl.eval_reward=accurasy",
        "unknown reward 'accurasy'",
    ),
    "loss options": (
        "--rl.sparse_delta=0.01 --rl.entropy_coef=0.1",
        "does not go with entropy_coef 0.1",
    ),
    "of sample": ("--draw.reward_funcs=[acuracy]", "stage draw: unknown reward 'acuracy'"),
    "its tests": ("--draw.decontaminate=reasoning_gym:x", "stage draw: unknown reasoning_gym"),
    "other rows": ("--draw.general_dataset=miniature:x", "stage draw: data source miniature:x"),
    "a judge": ("--prefer.judge=rules.py:judg", "judge 'rules.py:judg': 'rules.py' has no func"),
    "its options": ("--prefer.judge_options={url: x}", "judge 'rules.py:judge' has no option"),
    "one reward twice": ("--rl.reward_funcs=[accuracy, format, format]", "names must differ, got"),
    "a device": ("--draw.device=gpu", "stage draw: device must be auto, cpu, cuda or cuda:N"),
    "a chat template": (
        "--prefer.prompt_template=chat",
        "the tokenizer of 'miniature' has no chat",
    ),
    "its base's": (
        "--prefer.model={rl} --prefer.prompt_template=chat",
        "prefer: prompt_template 'c",
    ),
    # another data file: its first row
    "its columns": ("--rl.dataset=wrong.jsonl", "wrong.jsonl: row 1 has no column 'prompt'; col"),
    "no rows": ("--rl.eval_dataset=empty.jsonl", "stage rl: dataset empty.jsonl is empty"),
    "no JSON": ("--prefer.dataset=torn.jsonl", "stage prefer: torn.jsonl:1: not valid JSON"),
    "a folder": ("--draw.dataset=folder.jsonl", "stage draw: dataset file folder.jsonl does not"),
    "options of a file": ("--draw.dataset=rows.jsonl --draw.dataset_args={seed: 1}", "args does n"),
    "general prompts": (
        "--rl.general_dataset=[{source: wrong.jsonl, domain: chat}]",
        "stage rl: wrong.jsonl: row 1 has no column 'prompt'",
    ),
    "mixed-in rows": ("--draw.general_dataset=torn.jsonl", "stage draw: torn.jsonl:1: not valid"),
    "demonstrations": ("--tune.dataset=rows.jsonl", "stage tune: rows.jsonl: row 1 has no 'comp"),
    "of an endpoint": (
        "--draw.judge=http://localhost:1/v1 --draw.judge_options={modle: x}",
        "judge 'http://localhost:1/v1' has no option 'modle'",
    ),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.py").write_text(
        "def judge(conversations):\n    return ['']\n"
        "def reward(completions, **columns):\n    return [1.0]\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "solution": "2"}\n')
    (tmp_path / "wrong.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    (tmp_path / "torn.jsonl").write_text('{"prompt": "1+1=\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "folder.jsonl").mkdir()
    return tmp_path


def r1(*flags):
    stages = {"rl": RL, "draw": SAMPLE, "prefer": PREFER, "tune": TUNE}
    listed = [{"name": name, **fields} for name, fields in stages.items()]
    with open("p.yaml", "w") as file:
        yaml.safe_dump({"stages": listed, "prompt_template": "r1-zero"}, file)
    return main(["r1", "--config", "p.yaml", "--output_dir", "run", *flags])


@pytest.mark.parametrize("name", MISTAKES)
def test_the_plan_finds_a_mistake_in_the_settings(folder, capsys, name):
    flags, words = MISTAKES[name]
    flags = [f"--{flag}" for flag in flags.removeprefix("--").split(" --")]
    for switches in ((), ("--dry-run",)):
        assert r1(*flags, *switches) == 2
        error = capsys.readouterr().err
        assert error.startswith("grpo-engine: error: stage ") and words in error, error
        assert error.count("\n") == 1
    assert not (folder / "run").exists()


def test_the_plan_passes_what_is_right(folder, capsys):
    rewards = "--rl.reward_funcs=[accuracy, format, 'rules.py:reward']"
    rows = ("--rl.eval_dataset=rows.jsonl", "--prefer.dataset=rows.jsonl", "--device=cuda:1")
    judges = ("--draw.judge=http://localhost:1/v1", "--prefer.judge=some/model")
    assert r1("--dry-run", rewards, *rows, *judges) == 0
    out = capsys.readouterr().out
    assert "endpoints: http://localhost:1/v1 (for draw)" in out
    assert "more models: some/model (for prefer)" in out
    assert "what judges and rewriters read and write" in out
    assert not (folder / "run").exists()


def test_an_sft_may_bring_the_chat_template(folder, capsys):
    (folder / "chat.jinja").write_text("{{ messages[0]['content'] }}")
    after = {"name": "after", "stage": "eval", "model": "{tune}", "data": "rows.jsonl"}
    tune = {**TUNE, "name": "tune", "dataset": "later.jsonl", "chat_template": "chat.jinja"}
    command = ["r1", "--config", "p.yaml", "--output_dir", "run", "--dry-run"]
    for fields, code in ((tune, 0), (tune | {"chat_template": None}, 2)):
        pipeline = {"prompt_template": "chat", "stages": [fields, after]}
        (folder / "p.yaml").write_text(yaml.safe_dump(pipeline))
        assert main(command) == code
    assert "stage tune: prompt_template 'chat': the tokenizer of 'minia" in capsys.readouterr().err


def test_a_program_that_is_not_there_yet_is_missed_and_not_imported(folder, capsys):
    assert r1("--dry-run", "--prefer.judge=later.py:judge") == 0
    assert "not there yet: later.py:judge (for prefer)" in capsys.readouterr().out


# -- inputs by their field -------------------------------------------------------------------------


def rewrite(path, text):
    """Another content at another time, however coarse the clock of files is."""
    path.write_text(text)
    os.utime(path, ns=(path.stat().st_mtime_ns + 10**9,) * 2)


FIRST = "def f(completions=None, conversations=None, **_):\n    return [1.0]\n"
INPUTS = {
    "template": ("toy", {"chat_template": "mine.jinja"}, "mine.jinja"),
    "template of any name": ("toy", {"chat_template": "chat"}, "chat"),
    "reward of a file": ("toydata", {"reward_funcs": ["mine.py:f"]}, "mine.py"),
    "reward of a module": ("toydata", {"reward_funcs": ["inputs_mine:f"]}, "inputs_mine.py"),
    "judge of a module": ("toydata", {"judge": "inputs_mine:f"}, "inputs_mine.py"),
    "judge of a package": ("toydata", {"judge": "inputs_pack.mine:f"}, "inputs_pack/mine.py"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_a_file_counts_by_its_field_and_not_by_its_suffix(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "inputs_pack").mkdir()
    kind, fields, file = INPUTS[name]
    (tmp_path / file).write_text(FIRST)
    uses = {"model": "{a}"} if kind == "toy" else {"extras": {"dataset": "{a}"}}
    listed = [
        {"name": "a", "stage": kind, **fields},
        {"name": "b", "stage": "toy", **uses},
        {"name": "c", "stage": "toy"},
    ]
    run_folder = tmp_path / "run"
    assert run(run_folder, listed=listed) == 0
    assert called(run_folder) == ["a", "b", "c"]
    assert run(run_folder, listed=listed) == 0
    assert called(run_folder) == []
    rewrite(tmp_path / file, FIRST.replace("1.0", "2.0"))
    assert run(run_folder, listed=listed) == 0
    assert called(run_folder) == ["a"]  # the toy takes no notice of it, so b's input is the same


def test_another_function_of_the_same_file_is_another_judge(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FIRST + FIRST.replace("def f", "def g"))
    listed = [{"name": "a", "stage": "toydata", "judge": "mine.py:f"}]
    assert run(tmp_path / "run", listed=listed) == 0
    assert run(tmp_path / "run", "a.judge=mine.py:g", listed=listed) == 0
    assert called(tmp_path / "run") == ["a", "a"]


def test_a_template_may_move(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = [{"name": "a", "stage": "toy", "chat_template": "one"}]
    (tmp_path / "one").write_text("{{ x }}")
    assert run(tmp_path / "run", listed=listed) == 0
    (tmp_path / "one").rename(tmp_path / "two")
    with pytest.raises(UserError, match="stage a: --chat_template one: no such file"):
        run(tmp_path / "run", listed=listed)
    assert run(tmp_path / "run", "a.chat_template=two", listed=listed) == 0
    assert called(tmp_path / "run") == ["a"]


def test_what_is_no_input(tmp_path, monkeypatch):
    """A cache that the run itself writes, the functions of this package, and folders that have the
    name of a reward."""
    from grpo_engine.pipeline.freshness import outside_files

    monkeypatch.chdir(tmp_path)
    judge = {"chat_model": "http://localhost/v1", "cache": "replies.jsonl"}
    draw = {**SAMPLE, "name": "draw", "reward_funcs": ["judge"], "reward_args": {"judge": judge}}
    ours = "grpo_engine.rewards.judge_rubric:judge"
    prefer = {**PREFER, "name": "prefer", "judge": ours}
    draw["rewrite"] = "template"
    for name in ("judge", "template"):
        (tmp_path / name).mkdir()
    stages = build(read_pipeline({"stages": [draw, prefer]}, (), STAGES), STAGES)
    found = {name for stage in stages for name, _, _ in outside_files(stage)}
    assert found == {"model"}
