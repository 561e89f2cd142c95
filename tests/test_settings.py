"""What the configurations of all stages share: recipes by stage, flags, and one line a mistake."""

import pytest
import yaml
from pydantic import Field

from grpo_engine.cli import STAGES, main
from grpo_engine.config import GRPOConfig
from grpo_engine.evaluation.config import EvalConfig
from grpo_engine.settings import (
    Settings,
    TrainConfig,
    build_config,
    config_text,
    load_recipe,
    load_yaml,
    recipe_names,
)
from grpo_engine.sft_config import DistillConfig, SFTConfig
from grpo_engine.types import UserError

TRAINED = {"grpo": GRPOConfig, "sft": SFTConfig, "distill": DistillConfig}


def test_every_recipe_says_which_verb_it_is_for():
    by_stage = {load_recipe(name).get("stage") for name in recipe_names()}
    assert None not in by_stage and set(TRAINED) <= by_stage
    assert set(recipe_names("sft")) < set(recipe_names())
    assert recipe_names("report") == []


@pytest.mark.parametrize("stage", TRAINED)
def test_every_recipe_of_a_training_stage_is_valid(stage):
    assert recipe_names(stage)
    for name in recipe_names(stage):
        assert isinstance(build_config(load_recipe(name, stage), TRAINED[stage]), TrainConfig)


# arXiv 2501.12948v2, appendix B.4.2, and Table 6 with appendix B.4.3.
@pytest.mark.parametrize(
    ("stage", "name", "rate", "size"),
    [
        ("sft", "cold-start-sft", 5e-5, 128),
        ("sft", "r1-sft", 5e-5, 128),
        ("distill", "distill-qwen-1.5b", 1e-4, 64),
        ("distill", "distill-qwen-7b", 8e-5, 64),
        ("distill", "distill-qwen-14b", 7e-5, 64),
        ("distill", "distill-qwen-32b", 6e-5, 64),
        ("distill", "distill-llama-8b", 5e-5, 64),
        ("distill", "distill-llama-70b", 2e-5, 64),
    ],
)
def test_the_papers_numbers(stage, name, rate, size):
    config = build_config(load_recipe(name, stage), TRAINED[stage])
    assert config.learning_rate == rate and config.min_learning_rate == pytest.approx(rate / 10)
    assert (config.lr_scheduler_type, config.sequences_per_step) == ("cosine", size)
    assert (config.num_train_epochs, config.max_steps, config.max_length) == (2, None, 32_768)


def test_the_defaults_of_fine_tuning_are_the_papers():
    config = build_config({"dataset": "x"}, SFTConfig)
    cold_start = build_config(load_recipe("cold-start-sft"), SFTConfig)
    for name in ("learning_rate", "min_learning_rate", "sequences_per_step", "max_length"):
        assert getattr(config, name) == pytest.approx(getattr(cold_start, name))
    assert config.lr_scheduler_type == "cosine" and config.num_train_epochs == 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["grpo", "--recipe", "distill-qwen-1.5b"], ["distill-qwen-1.5b", "grpo-engine distill"]),
        (["sft", "--recipe", "r1-zero"], ["--recipe r1-zero", "grpo-engine grpo, not of sft"]),
        (["eval", "--recipe", "r1-sft"], ["--recipe r1-sft", "grpo-engine sft, not of eval"]),
        (["distill", "--recipe", "nope"], ["nope", "distill-llama-8b"]),
        (["sft", "--config", "{}"], ["stage 'grpo'", "not of sft"]),
        (["sft", "--model", "miniature"], ["--dataset: needs a value", "jsonl"]),
        (["sft"], ["sft: needs --recipe"]),
        (["sft", "--dataset", "x", "--sequence_per_step", "3"], ["sequences_per_step"]),
        (["eval", "--data", "x", "--resume", "y"], ["--resume", "unknown field"]),
        (["sft", "--resume"], ["--resume: name the run's folder"]),
    ],
)
def test_a_configuration_of_another_verb_is_refused(argv, words, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("stage: grpo\nmodel: miniature\n")
    assert main([word.replace("{}", str(tmp_path / "c.yaml")) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert all(word in err for word in words), err


@pytest.mark.parametrize("verb", STAGES)
def test_help_lists_every_field_with_its_default(verb, capsys):
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"grpo-engine {verb}" in out and "--output_dir" in out


@pytest.mark.parametrize("cls", [GRPOConfig, SFTConfig, DistillConfig, EvalConfig])
def test_saved_text_reads_back_the_same(cls):
    needed = {"grpo": {}, "eval": {"data": "x.jsonl"}}.get(cls.stage, {"dataset": "x.jsonl"})
    config = build_config({**needed, "output_dir": "2026-11-20"}, cls)
    text = config_text(config)
    assert text.startswith(f"stage: {cls.stage}\n")
    assert build_config(yaml.safe_load(text), cls) == config


class Example(Settings):
    stage = "example"
    name: str = Field(description="what it is called")
    count: int = Field(3, ge=1)
    note: str | None = None
    table: dict[str, int] = {}

    def _problems(self):
        yield from super()._problems()
        if self.count == 13:
            yield f"count={self.count}: brings bad luck"


def test_flags_are_yaml_but_text_stays_text():
    flags = [("name", "2026"), ("note", "null"), ("table.a", "1"), ("table.b", "2")]
    found = build_config({"note": "x", "table": {"a": 0}}, Example, flags)
    assert (found.name, found.note, found.table) == ("2026", None, {"a": 1, "b": 2})
    assert build_config({"name": "x", "stage": "example"}, Example).count == 3


@pytest.mark.parametrize(
    ("values", "flags", "message"),
    [
        ({}, [], "--name: needs a value (what it is called)"),
        ({"name": "a", "count": 0}, [], "--count 0: Input should be greater than or equal to 1"),
        ({"name": "a"}, [("count", "many")], "--count 'many': "),
        ({"name": "a", "cuont": 1}, [], "--cuont 1: unknown field; did you mean count?"),
        ({"name": "a", 5: "x"}, [], "5: 'x': not the name of a field"),
        ({"name": "a", True: 1}, [], "True: 1: not the name of a field"),
        ({"name": "a", "count": 13}, [], "count=13: brings bad luck"),
        ({"name": "a", "count": 3}, [("count.x", "1")], "--count.x 1: count is 3, which has no"),
        ({"count": 0}, [], "--name: needs a value (what it is called) (and 1 more)"),
        ({"name": "a"}, [("table", "{a: [1")], "--table {a: [1: not a valid value"),
        (
            {"name": "a", "stage": "grpo"},
            [],
            "stage 'grpo': these are settings of grpo-engine grpo, not of example",
        ),
    ],
)
def test_a_mistake_is_one_line_with_field_and_value(values, flags, message):
    with pytest.raises(UserError) as caught:
        build_config(values, Example, flags)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_field_that_stands_twice_is_named(tmp_path):
    """PyYAML would take the last one."""
    path = tmp_path / "twice.yaml"
    path.write_text("seed: 1\ntable: {a: 1, b: 2, a: 3}\n")
    with pytest.raises(UserError, match="not valid YAML: a stands there twice .*line 2, column 21"):
        load_yaml(str(path))
    # overriding what was merged is no mistake, in whatever order the mappings are made
    path.write_text("x: {y: {z: &z {<<: &w {a: 1, b: 2}, a: 3}}}\nc: {<<: *z, a: 4}\nd: *w\n")
    found = load_yaml(str(path))
    assert found["x"]["y"]["z"] == {"a": 3, "b": 2}
    assert (found["c"], found["d"]) == ({"a": 4, "b": 2}, {"a": 1, "b": 2})


@pytest.mark.parametrize(
    ("values", "rate"),
    [
        ({}, 5e-6),
        ({"learning_rate": 1e-3}, 1e-4),
        ({"min_learning_rate": 0.0}, 0.0),
        ({"lr_scheduler_type": "constant"}, 0.0),
        ({"lr_scheduler_type": "linear", "min_learning_rate": 1e-6}, 1e-6),
    ],
)
def test_the_end_of_the_schedule_is_a_tenth_unless_said(values, rate):
    config = build_config({"dataset": "x", **values}, SFTConfig)
    assert config.min_learning_rate == pytest.approx(rate)
