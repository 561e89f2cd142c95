"""The pipeline's YAML and plan: names, references, flags, and every stage's settings before any
runs."""

import re

import pytest
import yaml
from toy_stages import KINDS

from grpo_engine import cli
from grpo_engine.pipeline.config import read_pipeline, read_reference
from grpo_engine.pipeline.stages import STAGES, build
from grpo_engine.settings import build_config, load_recipe, recipe_names
from grpo_engine.types import UserError


def pipeline(*stages, flags=(), **shared):
    return read_pipeline({**shared, "stages": list(stages)}, flags, KINDS)


def toy(name, **fields):
    return {"name": name, "stage": "toy", **fields}


def rows(name, **fields):
    return {"name": name, "stage": "toydata", **fields}


def test_references():
    assert read_reference("{r1-zero}") == ("r1-zero", "")
    assert read_reference("{cold_start}/a/b.jsonl") == ("cold_start", "a/b.jsonl")
    for text in ("{}", "see {x}", "{x}y", "{x}/", "{a b}", "x", "", 3, None, "{x} / y"):
        assert read_reference(text) is None


def test_shared_fields_reach_the_stages_that_have_them_and_do_not_set_them():
    made = pipeline(toy("a"), toy("b", seed=5), rows("c"), seed=3, value="v", output_dir="runs/x")
    first, second, third = (stage.config for stage in build(made, KINDS))
    assert (first.seed, second.seed, third.seed) == (3, 5, 3)
    assert (first.value, second.value) == ("v", "v")  # rows have no such field
    assert first.output_dir == "runs/x/a"


def test_flags_reach_one_stage_or_all():
    flags = [("r1_zero.max_steps", "9"), ("seed", "4"), ("r1_zero.extras.more", "text")]
    made = pipeline(toy("r1-zero", max_steps=2), toy("b", seed=1), flags=flags, seed=3)
    first, second = (stage.config for stage in build(made, KINDS))
    assert (first.max_steps, first.seed, first.extras) == (9, 4, {"more": "text"})
    assert (second.max_steps, second.seed) == (3, 1)


def test_text_fields_stay_text():
    made = pipeline(toy("a", model="x"), flags=[("a.value", "1e3"), ("model", "2024-01-01")])
    assert made.stages[0].fields["value"] == "1e3"
    assert made.shared["model"] == "2024-01-01"


def test_the_written_yaml_reads_back_the_same():
    fields = {"extras": {"d": "{a}/metrics.jsonl"}}
    made = pipeline(toy("a"), rows("b", model="{a}", rows=7), toy("c", **fields), seed=2)
    assert read_pipeline(yaml.safe_load(made.text()), (), KINDS) == made


WRONG = {
    "no stages": ({"stages": []}, "wanted a list of stages"),
    "another verb's file": (
        {"stage": "grpo", "stages": [toy("a")]},
        "settings of grpo-engine grpo",
    ),
    "no name": ({"stages": [{"stage": "toy"}]}, "number 1 has the name None"),
    "a name that is a path": ({"stages": [toy("a/b")]}, "has the name 'a/b'"),
    "unknown verb": ({"stages": [{"name": "a", "stage": "toi"}]}, "stage a: stage: 'toi'"),
    "two of a name": ({"stages": [toy("a-b"), toy("a_b")]}, "2 stages are named a-b, a_b"),
    "own folder": ({"stages": [toy("a", output_dir="x")]}, "stage a: output_dir 'x'"),
    "unknown reference": (
        {"stages": [toy("first"), toy("b", model="{frist}")]},
        "stage b: --model {frist}: there is no such stage; did you mean {first}?",
    ),
    "itself": ({"stages": [toy("a", model="{a}")]}, "stage a: --model {a}: refers to itself"),
    "later": (
        {"stages": [toy("a", model="{b}"), toy("b")]},
        "stage a: --model {b}: that stage comes later; move it up",
    ),
    "circle": (
        {"stages": [toy("a", model="{c}"), toy("b", model="{a}"), toy("c", model="{b}")]},
        "stage a: --model {c}: the stages go round in a circle, a -> c -> b -> a",
    ),
    "deep in a field": (
        {"stages": [toy("a", extras={"x": "{nowhere}/f"})]},
        "stage a: --extras.x {nowhere}/f: there is no such stage",
    ),
    "out of the folder": (
        {"stages": [toy("a"), toy("b", model="{a}/../x")]},
        "leads out of the stage's folder",
    ),
    "shared field of none": (
        {"sede": 1, "stages": [toy("a")]},
        "--sede 1: no stage has such a field; did you mean seed?",
    ),
    "shared reference": (
        {"model": "{a}", "stages": [toy("a")]},
        "a field of all stages cannot refer to one",
    ),
    "a field that is a number": ({"stages": [toy("a")], 5: "x"}, "5: 'x': not the name of a field"),
    "such a field of a stage": (
        {"stages": [{"name": "a", "stage": "toy", 5: "x"}]},
        "stage a: 5: 'x': not the name of a field",
    ),
    "no folder": ({"stages": [toy("a")], "output_dir": ""}, "--output_dir '': not a folder's name"),
    "a reference within a value": (
        {"stages": [toy("a"), toy("b", model="runs/{a}/checkpoint-3")]},
        "stage b: --model runs/{a}/checkpoint-3: a reference is a whole value",
    ),
    "spaces in a reference": (
        {"stages": [toy("a"), toy("b", model="{ a }")]},
        "stage b: --model { a }: a reference is a whole value",
    ),
    "a reference that is not closed": (
        {"stages": [toy("a"), toy("b", model="{a/checkpoint-3")]},
        "stage b: --model {a/checkpoint-3: a reference is a whole value",
    ),
    "a reference without quotes": (
        {"stages": [toy("a"), toy("b", model={"a": None})]},
        'stage b: --model {a}: wants quotes, "{a}"; YAML reads a mapping otherwise',
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_list_is_one_line(name):
    values, words = WRONG[name]
    with pytest.raises(UserError, match=re.escape(words)) as raised:
        read_pipeline(values, (), KINDS)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        (("b.max_steps", "3"), "--b.max_steps 3: no such stage; there are first-one"),
        (("first_noe.max_steps", "3"), "did you mean first_one?"),
        (("first_one", "3"), "--first_one 3: wanted --first_one.<field of its settings> value"),
        (("first_one.output_dir", "x"), "wanted --first_one.<field of its settings> value"),
        (("first_one.stage", "x"), "wanted --first_one.<field of its settings> value"),
        (("nothing", "3"), "--nothing 3: no stage has such a field"),
    ],
)
def test_a_flag_of_nothing_is_one_line(flag, words):
    with pytest.raises(UserError, match=re.escape(words)):
        pipeline(toy("first-one"), flags=[flag])


def test_settings_of_the_last_stage_are_checked_before_the_first_runs():
    listed = [toy(name) for name in "abcd"] + [toy("e", max_stepz=3)]
    with pytest.raises(UserError) as raised:
        build(pipeline(*listed), KINDS)
    assert str(raised.value) == (
        "stage e (5 of 5): --max_stepz 3: unknown field; did you mean max_steps?"
    )
    with pytest.raises(UserError, match=re.escape("stage b (2 of 2): --max_steps 0:")):
        build(pipeline(toy("a"), toy("b", max_steps=0)), KINDS)


def test_a_reference_must_be_to_something_the_stage_makes():
    with pytest.raises(UserError, match=re.escape("a stage of toydata makes data.jsonl")):
        build(pipeline(rows("a"), toy("b", model="{a}/date.jsonl")), KINDS)
    build(pipeline(toy("a"), toy("b", model="{a}/checkpoint-2")), KINDS)


TABLE_6 = {  # student: base, learning rate
    "qwen-1.5b": ("Qwen/Qwen2.5-Math-1.5B", 1e-4),
    "qwen-7b": ("Qwen/Qwen2.5-Math-7B", 8e-5),
    "qwen-14b": ("Qwen/Qwen2.5-14B", 7e-5),
    "qwen-32b": ("Qwen/Qwen2.5-32B", 6e-5),
    "llama-8b": ("meta-llama/Llama-3.1-8B", 5e-5),
    "llama-70b": ("meta-llama/Llama-3.3-70B-Instruct", 2e-5),
}


@pytest.mark.parametrize("name", TABLE_6)
def test_students_have_the_numbers_of_table_6(name):
    config = build_config(load_recipe(f"distill-{name}"), STAGES["distill"].config_class())
    assert (config.model, config.learning_rate) == TABLE_6[name]
    assert config.min_learning_rate == pytest.approx(config.learning_rate / 10)
    assert (config.sequences_per_step, config.max_length) == (64, 32768)
    assert config.lr_scheduler_type == "cosine" and 2 <= config.num_train_epochs <= 3


@pytest.mark.parametrize("name", [n for n in recipe_names() if n not in recipe_names("r1")])
def test_the_recipe_of_one_stage_is_valid(name):
    values = load_recipe(name)
    assert build_config(values, STAGES[values["stage"]].config_class()).stage == values["stage"]


@pytest.mark.parametrize("name", ["cold-start-sft", "r1-sft"])
def test_fine_tuning_has_the_numbers_of_the_paper(name):
    config = build_config(load_recipe(name), STAGES["sft"].config_class())
    assert config.model == "deepseek-ai/DeepSeek-V3-Base"  # the base, both times
    assert (config.learning_rate, config.min_learning_rate) == (5e-5, 5e-6)
    assert (config.sequences_per_step, config.max_length) == (128, 32768)
    assert config.lr_scheduler_type == "cosine" and 2 <= config.num_train_epochs <= 3


def test_a_model_is_no_data_and_data_no_model():
    base = {"model": "miniature", "dataset": "rows.jsonl"}
    tune = {"name": "tune", "stage": "sft", **base}
    draw = {"name": "draw", "stage": "sample", **base}
    for field, value, words in (
        ("dataset", "{tune}", "a stage of sft gives a model there, wanted data"),
        ("dataset", "{tune}/checkpoint-3", "a stage of sft gives a model there, wanted data"),
        ("model", "{draw}", "a stage of sample gives data there, wanted a model"),
        ("model", "{tune}/metrics.jsonl", "a stage of sft gives data there, wanted a model"),
    ):
        last = {**base, "name": "last", "stage": "sft", field: value}
        values = {"stages": [tune, draw, last]}
        with pytest.raises(UserError, match=re.escape(f"stage last: --{field} {value}: {words}")):
            build(read_pipeline(values, (), STAGES), STAGES)
    model = {**base, "name": "last", "stage": "sft", "chat_template": "{tune}"}
    with pytest.raises(UserError, match="a stage of sft gives a model there, wanted a file"):
        build(read_pipeline({"stages": [tune, model]}, (), STAGES), STAGES)
    judged = {"name": "last", "stage": "preferences", "dataset": "rows.jsonl", "judge": "{draw}"}
    with pytest.raises(UserError, match="a stage of sample gives data there, wanted a model"):
        build(read_pipeline({"stages": [draw, judged]}, (), STAGES), STAGES)
    right = {"name": "last", "stage": "sft", "model": "{tune}", "dataset": "{draw}"}
    build(read_pipeline({"stages": [tune, draw, right]}, (), STAGES), STAGES)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--only", ""], "--only : no such stage; there are tune"),
        (["--only", "tune", "--only", "tuna"], "--only tuna: no such stage"),
        (["--from-stage", ""], "--from-stage : no such stage"),
        (["--resume", "run"], "--resume run: r1 has no such flag; the same command goes on"),
        (["--output_dir", ""], "--output_dir '': not a folder's name"),
        (["--output_dir", "p.yaml"], "p.yaml: is not a folder"),
        (["--output_dir", "p.yaml/run"], "p.yaml/run: is not a folder"),
    ],
)
def test_a_wrong_flag_runs_nothing(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1", "completion": "1"}\n')
    tune = {"name": "tune", "stage": "sft", "dataset": "rows.jsonl", "prompt_template": "none"}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"stages": [tune]}))
    assert cli.main(["r1", "--config", "p.yaml", *flags]) == 2
    assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.yaml", "rows.jsonl"]


def test_braces_elsewhere_are_no_reference():
    template = {"en": "{summary} It is {answer}."}
    listed = [toy("summary"), toy("b", value="see {summary}"), toy("c", extras=template)]
    assert build(pipeline(*listed), KINDS)[2].config.extras == template


def test_the_registry_is_that_of_the_command_line():
    """A stage of a pipeline is a verb, with the same settings and the same function."""
    for name, kind in STAGES.items():
        verb = cli.STAGES[name]
        assert (kind.config, kind.run, kind.trains) == (verb.config, verb.run, verb.resumes), name
    assert set(STAGES) == set(cli.STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_what_the_registry_says_of_a_verb_is_so(name):
    kind = STAGES[name]
    cls = kind.config_class()
    assert cls.stage == name
    assert callable(kind.function())
    assert {"output_dir", "device"} <= set(cls.model_fields)
    assert kind.neutral | kind.written <= set(cls.model_fields)
    assert kind.trains == (not kind.product)
    assert not {"name", "stage"} & set(cls.model_fields), "the pipeline's own words"
