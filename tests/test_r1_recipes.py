"""What the recipes of the whole pipeline must hold so that its report can show what the paper's
does."""

import json
from pathlib import Path

import pytest
import yaml

from grpo_engine.data import load_rows
from grpo_engine.pipeline.config import read_pipeline, read_reference
from grpo_engine.pipeline.outcome import measured_tokens
from grpo_engine.pipeline.stages import STAGES, build

ROOT = Path(__file__).resolve().parents[1]


def recipe_file(name: str) -> Path:
    return ROOT / "grpo_engine" / "recipes" / f"{name}.yaml"


def stages_of(recipe: str, kind: str) -> list[dict]:
    found = yaml.safe_load(recipe_file(recipe).read_text("utf-8"))["stages"]
    return [stage for stage in found if stage["stage"] == kind]


def last_rl(recipe: str) -> dict:
    if recipe == "r1-all-scenarios":  # the stage alone
        return yaml.safe_load(recipe_file(recipe).read_text("utf-8"))
    [stage] = [s for s in stages_of(recipe, "grpo") if s["name"] == "all-scenario-rl"]
    return stage


@pytest.mark.parametrize("recipe", ["miniature", "r1", "r1-all-scenarios"])
def test_the_last_stage_scores_held_out_general_prompts(recipe):
    stage = last_rl(recipe)
    trained = {source["source"] for source in stage["general_dataset"]}
    held_out = stage["general_eval_dataset"]
    assert held_out and stage["eval_dataset"]
    for one in held_out:
        assert one["source"] not in trained or one["args"]["held_out"] is True


@pytest.mark.parametrize("name", ["general_dataset", "general_eval_dataset", "eval_dataset"])
def test_the_last_stage_alone_has_the_rows_it_has_in_the_pipeline(name):
    assert last_rl("r1-all-scenarios")[name] == last_rl("r1")[name]


def test_the_miniature_s_held_out_prompts_are_of_both_kinds_and_never_trained_on():
    stage = last_rl("miniature")
    rows = [
        load_rows(source["source"], args=source.get("args"))
        for (source,) in (stage["general_dataset"], stage["general_eval_dataset"])
    ]
    trained, held_out = ({row["prompt"] for row in some} for some in rows)
    assert trained and held_out and not trained & held_out
    assert {row["preference"] for row in rows[1]} == {"helpful", "safety"}


@pytest.mark.parametrize("recipe", ["miniature", "r1"])
def test_a_recipe_is_the_pipeline_of_the_paper(recipe):
    """v2 figure 2: what each stage begins with, learns from and is rewarded for."""
    values = yaml.safe_load(recipe_file(recipe).read_text("utf-8"))
    made = {s.name: s.config for s in build(read_pipeline(values, (), STAGES), STAGES)}
    base = values["model"]
    begins = {
        "r1-zero": base,
        "cold-start-data": "{r1-zero}",
        "cold-start-sft": base,
        "reasoning-rl": "{cold-start-sft}",
        "rejection-sampling": "{reasoning-rl}",
        "r1-sft": base,  # not with what reasoning RL has made
        "all-scenario-rl": "{r1-sft}",
        "distill": made["student-rl"].model,  # the same student, by RL alone
    }
    assert {name: made[name].model for name in begins} == begins
    assert made["student-rl"].model not in (base, *(f"{{{name}}}" for name in made))
    learns = {
        "cold-start-sft": "cold-start-data",
        "r1-sft": "rejection-sampling",
        "helpful-rm": "helpful-pairs",
        "safety-rm": "safety-labels",
        "distill": "rejection-sampling",
    }
    for name, source in learns.items():
        assert read_reference(made[name].dataset).stage == source
    for name in ("r1-zero", "student-rl"):
        assert made[name].prompt_template == "r1-zero"
        assert "language" not in made[name].reward_funcs
    reasoning, last = made["reasoning-rl"], made["all-scenario-rl"]
    assert {"accuracy", "language"} <= set(reasoning.reward_funcs)
    assert (reasoning.epsilon, reasoning.beta, reasoning.reward_weights) == (10, 0.001, None)
    assert {"accuracy", "format_r1", "language", "helpful", "safety"} <= set(last.reward_funcs)
    assert (last.epsilon, last.temperature, last.reward_weights) == (10, 0.7, None)
    assert (last.helpful_model, last.safety_model) == ("{helpful-rm}", "{safety-rm}")
    assert 0 < last.preference_steps < last.max_steps
    assert not {"format_r1", "language"} & set(last.reward_domains)  # they apply to every row
    for kind, scope, judgements in (("helpful", "summary", 4), ("safety", "response", 1)):
        data = made["helpful-pairs" if kind == "helpful" else "safety-labels"]
        assert (data.kind, data.resolved_scope, data.resolved_judgements) == (
            kind,
            scope,
            judgements,
        )
        trained = made[f"{kind}-rm"]
        assert (trained.kind, trained.judged_scope) == (kind, scope)
    assert made["helpful-pairs"].min_difference == 1.0


def test_the_miniature_s_evaluations_draw_enough_for_a_chart_of_votes():
    evaluations = stages_of("miniature", "eval")
    assert len(evaluations) >= 9
    for stage in evaluations:
        assert stage["num_samples"] >= 8, stage["name"]
        assert stage["data_limit"] * stage["num_samples"] <= 1024  # no dearer than 512 x 2
        assert stage["data_args"]["size"] >= stage["data_limit"]


@pytest.mark.parametrize("recipe", ["miniature", "r1"])
def test_the_readable_format_is_rewarded_on_every_row(recipe):
    stage = last_rl(recipe)
    assert "format_r1" in stage["reward_funcs"] and "format_r1" not in stage["reward_domains"]


def test_held_out_curves_of_r1_are_sampled_as_the_paper_evaluates():
    shared = yaml.safe_load(recipe_file("r1").read_text("utf-8"))
    assert (shared["eval_temperature"], shared["eval_top_p"]) == (0.6, 0.95)
    for stage in stages_of("r1", "grpo"):
        assert not {"eval_temperature", "eval_top_p"} & stage.keys()


def test_held_out_evaluations_count_as_generated_tokens(tmp_path):
    settings = {"prompts_per_generation": 4, "num_generations": 8}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    held_out = {"eval/mean_length": 10.5, "eval/num_answers": 2.0}
    general = {"eval/general/mean_length": 5.0, "eval/general/num_answers": 3.0}
    rows = [
        {"step": 0, **held_out, **general},
        {"step": 1, "completions/mean_length": 2.0, "num_tokens": 70},
        {"step": 2, "num_tokens": 90, **held_out},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert measured_tokens(tmp_path) == {"generated": 4 * 8 * 2 + 21 + 15 + 21, "trained": 90}


@pytest.mark.parametrize(
    "row", ["HumanEval-Mul", "test-time scaling", "`grpo_update`", "beam search", "cons@16"]
)
def test_the_papers_checklist_has_a_line(row):
    text = (ROOT / "PAPER.md").read_text("utf-8")
    assert sum(line.startswith("|") and row in line for line in text.splitlines()) == 1
