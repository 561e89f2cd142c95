"""What a plan says a stage will cost: against counts of what really happens, and against models
whose size is known."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_model import make_tiny_model
from torch.utils._device import _device_constructors
from toy_stages import KINDS
from transformers import DeepseekV3Config, Qwen2Config, Qwen2ForCausalLM

from grpo_engine.cli import main
from grpo_engine.config import GRPOConfig
from grpo_engine.evaluation.config import EvalConfig
from grpo_engine.generation.hf import GrowingLayer, HFGenerator
from grpo_engine.kernels import pack_rollouts
from grpo_engine.pipeline.budget import Budgets
from grpo_engine.pipeline.config import read_pipeline
from grpo_engine.pipeline.memory import (
    SAMPLING,
    STATIC,
    UPDATE,
    model_shape,
    sampling_memory,
    shape_of,
    training_memory,
)
from grpo_engine.pipeline.plan import count, size
from grpo_engine.pipeline.run import run_pipeline
from grpo_engine.pipeline.stages import STAGES, build
from grpo_engine.policy import Policy
from grpo_engine.reward_hacking import WINDOW
from grpo_engine.settings import recipe_names
from grpo_engine.types import GenerationRequest, SamplingParams


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """None here, in place of conftest's: under the meta device torch compares constructors with a
    list it has cached, and a poisoned torch.empty on it, or off it, would allocate 671B weights."""
    _device_constructors.cache_clear()


def qwen(width, inner, layers, heads, kv_heads, **more):
    return Qwen2Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **{"vocab_size": 1000, "tie_word_embeddings": True, "eos_token_id": 1, **more},
    )


# -- sizes of models -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        # the counts on their model cards' safetensors
        (qwen(1536, 8960, 28, 12, 2, vocab_size=151_936), 1_543_714_304),
        (
            qwen(3584, 18944, 28, 28, 4, vocab_size=152_064, tie_word_embeddings=False),
            7_615_616_512,
        ),
    ],
)
def test_known_models(config, parameters):
    assert shape_of(config).parameters == parameters


def test_deepseek_v3():
    """671B, as the paper says; its cache is of expanded heads, as transformers keeps it."""
    shape = shape_of(DeepseekV3Config())
    assert round(shape.parameters / 1e9) == 671
    assert shape.kv == 128 * (192 + 128)


def test_shapes_of_folders(tmp_path):
    folder = make_tiny_model(tmp_path / "tiny")
    model = Qwen2ForCausalLM.from_pretrained(folder)
    shape = model_shape(str(folder))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert model_shape("miniature").layers > 0
    assert "no config" in model_shape(str(tmp_path / "nothing"))
    assert "HF_HUB_OFFLINE is set" in model_shape("nobody/nothing")


# -- memory, against what is really held ---------------------------------------------------------


@pytest.mark.parametrize("shape", [(128, 512, 4, 4, 2), (96, 256, 6, 6, 6), (256, 1024, 3, 8, 2)])
def test_activations(shape):
    """Bytes that autograd keeps of a packed forward, beside the parameters."""
    config = qwen(*shape)
    policy = Policy(Qwen2ForCausalLM(config))
    packed = pack_rollouts([np.arange(256) % 1000 for _ in range(4)], {})
    parameters = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive: no address twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.hidden_states(packed.token_ids, packed.position_ids, packed.cu_seqlens, 256)
    estimate = training_memory(settings(1024, prompts_per_generation=64), shape_of(config)).terms[
        "activations"
    ]
    assert sum(size for size, _ in kept.values()) == pytest.approx(estimate, rel=0.1)


def test_cache(tmp_path, monkeypatch):
    """The cache holds at most what the plan says, and not less than half of it."""
    policy = Policy.load(str(make_tiny_model(tmp_path / "tiny")), trainable=False)
    layers, most = {}, 0
    update = GrowingLayer.update

    def watched(self, *args, **kwargs):
        nonlocal most
        result = update(self, *args, **kwargs)
        layers[id(self)] = self
        held = {t._keys.data_ptr(): t._keys.nbytes + t._values.nbytes for t in layers.values()}
        most = max(most, sum(held.values()))
        return result

    monkeypatch.setattr(GrowingLayer, "update", watched)
    config = EvalConfig(
        data="x",
        max_prompt_length=40,
        max_completion_length=60,
        generation_batch_size=8,
        num_samples=1,
    )
    monkeypatch.setattr(type(policy), "eos_ids", property(lambda self: ()))  # nobody stops early
    generator = HFGenerator(policy, max_batch_size=8)
    requests = [GenerationRequest([5 + n] * 40, n) for n in range(8)]
    generator.generate(requests, SamplingParams(60))
    estimate = sampling_memory(config, shape_of(policy.model.config)).terms["KV cache"]
    assert estimate / 2 <= most <= estimate


def settings(tokens, **more):
    values = {
        "prompts_per_generation": 4,
        "num_generations": 4,
        "steps_per_generation": 2,
        "max_prompt_length": 16,
        "max_completion_length": 16,
        "max_tokens_per_microbatch": tokens,
        "ref_model_sync_steps": 2,
    }
    return GRPOConfig(**values | more)


def test_terms_of_training():
    shape = shape_of(qwen(1536, 8960, 28, 12, 2, vocab_size=151_936))
    full = training_memory(settings(64), shape)
    weights = 4 * shape.parameters
    assert full.terms["weights"] == full.terms["reference"] == full.terms["gradients"] == weights
    assert full.terms["optimiser"] == 2 * weights
    assert full.peak == sum(full.terms[n] for n in STATIC if n in full.terms) + max(
        sum(full.terms[n] for n in SAMPLING), sum(full.terms[n] for n in UPDATE)
    )
    without = training_memory(settings(64, beta=0.0), shape)
    assert "reference" not in without.terms and without.peak == full.peak - weights
    half = training_memory(settings(64, bf16=True), shape)
    assert half.terms["bf16 copies"] == 2 * shape.parameters
    assert half.terms["activations"] == full.terms["activations"] // 2
    recomputed = training_memory(settings(64, gradient_checkpointing=True), shape)
    assert recomputed.terms["activations"] < full.terms["activations"] / 10
    adapter = training_memory(settings(64, lora_r=8), shape)
    assert "reference" not in adapter.terms
    assert adapter.terms["gradients"] == 4 * 8 * shape.linear
    two = training_memory(settings(64), shape, reward_models=2 * shape.parameters)
    assert two.peak == full.peak + 2 * weights


# -- tokens --------------------------------------------------------------------------------------


def budgets(folder, *stages, **shared):
    made = read_pipeline({"output_dir": str(folder), "stages": list(stages), **shared}, (), STAGES)
    return Budgets(build(made, STAGES)).found


def rl(name, **fields):
    values = settings(64).model_dump(exclude_unset=True)
    return {"name": name, "stage": "grpo", "max_steps": 6, **values, **fields}


def test_tokens_of_reinforcement(tmp_path):
    one = budgets(tmp_path, rl("a"))["a"]
    assert (one.steps, one.generated, one.trained) == (6, 3 * 16 * 16, 3 * 16 * 32)
    raised = budgets(tmp_path, rl("a", max_completion_length={0: 16, 4: 32}))["a"]
    assert raised.generated == 2 * 16 * 16 + 16 * 32
    twice = budgets(tmp_path, rl("a", num_iterations=2, ref_model_sync_steps=4))["a"]
    assert (twice.generated, twice.trained) == (2 * 16 * 16, 2 * 2 * 16 * 32)


def test_tokens_of_held_out_answers(tmp_path):
    """Before the first step, every eval_steps and at the end, each with the cap of its step."""
    sources = [tmp_path / f"{name}.jsonl" for name in ("held-out", "general")]
    for path in sources:
        path.write_text('{"prompt": "1+1", "solution": "2", "domain": "x"}\n' * 9)
    chosen = {"reward_domains": {"accuracy": ["math"], "format": ["x"]}, "dataset_domain": "math"}
    chosen |= {"general_dataset": [{"source": str(tmp_path / "more.jsonl"), "domain": "x"}]}
    chosen |= {"eval_dataset": str(sources[0]), "eval_limit": 5, "eval_steps": 4}
    plain = budgets(tmp_path, rl("a"))["a"]
    alone = budgets(tmp_path, rl("a", **chosen))["a"]
    assert (plain.held_out, alone.held_out) == (0, 3 * 5 * 16)  # steps 0, 4 and 6
    assert alone.generated == plain.generated + alone.held_out
    assert alone.trained == plain.trained
    chosen["general_eval_dataset"] = [{"source": str(sources[1]), "limit": 2}]
    both = budgets(tmp_path, rl("a", **chosen, max_completion_length={0: 16, 4: 32}))["a"]
    assert both.held_out == 7 * (16 + 32 + 32)
    # whose number is not known, they come on top
    chosen["general_eval_dataset"] = [{"source": "hub/x"}]
    more = budgets(tmp_path, rl("a", **chosen))["a"]
    assert (more.held_out, more.generated) == (None, plain.generated)


def test_an_evaluation_may_draw_more_at_a_time_than_a_rollout(tmp_path):
    path = tmp_path / "held-out.jsonl"
    path.write_text('{"prompt": "1+1", "solution": "2"}\n' * 40)  # a rollout has 16 outputs
    plain = budgets(tmp_path, rl("a"))["a"].memory.terms
    more = budgets(tmp_path, rl("a", eval_dataset=str(path)))["a"].memory.terms
    assert more["KV cache"] == plain["KV cache"] * 40 // 16
    few = budgets(tmp_path, rl("a", eval_dataset=str(path), eval_limit=3))["a"].memory.terms
    assert few == plain


@pytest.mark.parametrize(("kind", "answers"), [("helpful", 2), ("safety", 1)])
def test_tokens_of_reward_models(tmp_path, kind, answers):
    """One step holds both answers of each pair."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1"}\n' * 20)
    stage = {
        "name": "rm",
        "stage": "reward-model",
        "kind": kind,
        "dataset": str(tmp_path / "rows.jsonl"),
        "batch_size": 8,
        "max_length": 32,
        "max_tokens_per_microbatch": 100_000,
    }
    found = budgets(tmp_path, stage)["rm"]
    assert (found.steps, found.trained) == (3, 3 * 8 * 32 * answers)
    twice = budgets(tmp_path, {**stage, "max_length": 64})["rm"]
    assert twice.memory.terms["activations"] == 2 * found.memory.terms["activations"]
    layer = found.memory.terms["activations"] / (8 * 32 * answers)
    same = budgets(tmp_path, {**stage, "max_tokens_per_microbatch": 64})["rm"]
    assert same.memory.terms["activations"] == 64 * layer


def test_tokens_of_stages_whose_data_nobody_has_made(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1", "solution": "2"}\n' * 10)
    sample = {
        "name": "data",
        "stage": "sample",
        "model": "{zero}",
        "dataset": str(tmp_path / "prompts.jsonl"),
        "num_samples": 4,
        "max_prompt_length": 16,
        "max_completion_length": 48,
        "keep": "random",
        "max_per_prompt": 3,
    }
    tune = {
        "name": "tune",
        "stage": "sft",
        "dataset": "{data}",
        "sequences_per_step": 8,
        "num_train_epochs": 2,
    }
    found = budgets(tmp_path, rl("zero"), sample, tune, {**sample, "name": "b", "dataset": "hub/x"})
    assert (found["data"].generated, found["data"].rows) == (10 * 4 * 48, 30)
    assert found["tune"].steps == 8  # 2 x 30 rows, 8 a step
    assert found["tune"].trained == 8 * 8 * (16 + 48)
    assert found["b"].generated is None
    # once it is there, it is counted
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.jsonl").write_text('{"prompt": "1", "completion": "1"}\n' * 5)
    assert budgets(tmp_path, rl("zero"), sample, tune)["tune"].steps == 2


@pytest.mark.parametrize(("kind", "rows"), [("safety", 30), ("helpful", 20)])
def test_given_answers_are_not_generated(tmp_path, kind, rows):
    row = {"prompt": "1+1", "good": "2", "bad": ["3", "4"]}
    (tmp_path / "answers.jsonl").write_text((json.dumps(row) + "\n") * 10)
    labels = {"name": "labels", "stage": "preferences", "kind": kind, "judge": "x:y"}
    labels |= {"answer_columns": ["good", "bad"], "dataset": str(tmp_path / "answers.jsonl")}
    labels |= {"pairs_per_prompt": 2} if kind == "helpful" else {}
    found = budgets(tmp_path, labels)["labels"]
    assert (found.samples, found.generated, found.memory) == (False, None, None)
    assert found.rows == rows


def test_weights_come_from_the_first_model(tmp_path):
    found = budgets(tmp_path, rl("a"), rl("b", model="{a}"), rl("c", model="{b}"))
    assert found["c"].model == "miniature"
    assert found["c"].shape == model_shape("miniature")


# -- the plan on the screen ----------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names("r1"))
def test_recipes_validate_and_dry_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["r1", "--recipe", name, "--dry-run"]) == 0
    out = capsys.readouterr().out
    recipe = yaml.safe_load(Path(recipe_file(name)).read_text())
    for stage in recipe["stages"]:
        assert stage["name"] in out
    assert "\ntokens, " in out
    assert list(tmp_path.iterdir()) == []


def recipe_file(name):
    import grpo_engine

    return Path(grpo_engine.__file__).parent / "recipes" / f"{name}.yaml"


def test_the_r1_recipe_says_what_it_cannot_know(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["r1", "--recipe", "r1", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "size and memory unknown: deepseek-ai/DeepSeek-V3-Base" in out
    assert "not there yet: train.jsonl (for r1-zero, cold-start-data, reasoning-rl" in out
    assert re.search(
        r"\ntokens, known stages only: at most \d+ B generated, \d+ B trained on; ", out
    )
    assert "15 of 20 stages unknown, see ? above" in out
    judged = "rejection-sampling, helpful-pairs, safety-labels"
    assert f"endpoints: http://localhost:8000/v1 (for cold-start-data, {judged})" in out
    assert "more models: deepseek-ai/DeepSeek-V3-Base (for cold-start-data)" in out
    assert "stops at cold-start-data until a person has edited cold-start-edits.jsonl" in out
    assert "tokens that come on top: what judges and rewriters read and write\n" in out
    assert main(["r1", "--recipe", "r1"]) == 2
    assert "stage r1-zero: --dataset train.jsonl: no such file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_r1_recipe_has_the_papers_numbers(tmp_path, monkeypatch):
    """Section 11 of the fact sheet, row by row, where the paper reports a number."""
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(recipe_file("r1").read_text())
    made = {s.name: s.config for s in build(read_pipeline(recipe, (), STAGES), STAGES)}
    for name in ("r1-zero", "reasoning-rl", "all-scenario-rl", "student-rl"):
        config = made[name]
        assert config.prompts_per_generation * config.num_generations == 8192
        assert (config.num_generations, config.steps_per_generation) == (16, 16)
        assert (config.num_iterations, config.beta, config.ref_model_sync_steps) == (1, 0.001, 400)
        assert config.learning_rate == (2e-6 if name == "student-rl" else 3e-6)
        assert config.temperature == (0.7 if name == "all-scenario-rl" else 1.0)
    assert made["r1-zero"].max_completion_length == {0: 32768, 8200: 65536}
    assert made["r1-zero"].max_steps == 10_400
    assert made["reasoning-rl"].epsilon == made["all-scenario-rl"].epsilon == 10
    assert made["all-scenario-rl"].max_steps == 1700
    assert made["all-scenario-rl"].preference_steps == 400
    for name in ("cold-start-sft", "r1-sft"):
        config = made[name]
        assert config.model == "deepseek-ai/DeepSeek-V3-Base"  # the base, both times
        assert (config.learning_rate, config.min_learning_rate) == (5e-5, 5e-6)
        assert (config.sequences_per_step, config.max_length) == (128, 32768)
        assert config.lr_scheduler_type == "cosine" and 2 <= config.num_train_epochs <= 3
    student = made["distill"]
    assert (student.learning_rate, student.min_learning_rate) == (6e-5, 6e-6)
    assert student.sequences_per_step == 64
    for name in ("helpful-rm", "safety-rm"):
        config = made[name]
        assert (config.batch_size, config.learning_rate) == (256, 6e-6)
        assert (config.num_train_epochs, config.max_length) == (1, 8192)
    assert made["helpful-pairs"].judgements == 4 and made["helpful-pairs"].min_difference == 1.0
    evaluation = made["eval-all-scenario-rl"]
    assert (evaluation.temperature, evaluation.top_p) == (0.6, 0.95)
    assert (evaluation.num_samples, evaluation.max_completion_length) == (64, 32768)


def test_the_r1_recipe_lets_the_reward_hacking_monitor_speak(tmp_path, monkeypatch):
    """It compares two windows of held-out evaluations, and reward models join late."""
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(recipe_file("r1").read_text())
    stages = build(read_pipeline(recipe, (), STAGES), STAGES)
    learning = {s.name: s.config for s in stages if s.kind_name == "grpo"}
    assert len(learning) == 4
    assert {config.eval_dataset for config in learning.values()} == {"held-out.jsonl"}
    assert "#   held-out.jsonl " in recipe_file("r1").read_text()
    last = learning["all-scenario-rl"]
    assert last.preference_steps // last.eval_steps >= 2 * WINDOW


def test_the_r1_recipe_makes_its_cold_start_in_all_ways_of_the_paper():
    """Section B.3.2 and v1 2.3.1, as the recipe of that stage alone has it."""
    recipe = yaml.safe_load(recipe_file("r1").read_text())
    alone = yaml.safe_load(recipe_file("cold-start-data").read_text())
    [stage] = [s for s in recipe["stages"] if s["name"] == "cold-start-data"]
    for name in ("generators", "few_shot", "general_dataset", "edit_file", "rewrite"):
        assert stage[name] == alone[name], name
    assert [one["method"] for one in stage["generators"]] == ["r1-zero", "few-shot", "direct"]
    assert "#   trivial.jsonl " in recipe_file("r1").read_text()


def test_the_miniature_saves_and_replaces_its_reference_within_each_stage_of_rl():
    """So that a kill costs a few steps, and the reference moves as the paper's does."""
    recipe = yaml.safe_load(recipe_file("miniature").read_text())
    stages = build(read_pipeline(recipe, (), STAGES), STAGES)
    learning = [stage.config for stage in stages if stage.kind_name == "grpo"]
    assert len(learning) >= 5
    for config in learning:
        assert config.save_steps <= 20 < config.max_steps
        assert config.ref_model_sync_steps < config.max_steps


def test_a_bound_is_said_only_where_every_stage_has_one(tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1", "solution": "2"}\n' * 10)
    sample = {"name": "data", "stage": "sample", "dataset": str(tmp_path / "prompts.jsonl")}
    sample |= {"num_samples": 4, "max_completion_length": 48}
    unknown = {**sample, "name": "more", "dataset": "hub/x"}

    def planned(*stages):
        values = {"output_dir": str(tmp_path / "run"), "stages": list(stages)}
        assert run_pipeline(read_pipeline(values, (), STAGES), STAGES, dry_run=True) == 0
        return capsys.readouterr().out

    out = planned(sample, rl("zero"))
    assert f"tokens, at most: {count(10 * 4 * 48 + 3 * 16 * 16)} generated" in out
    assert "come on top" not in out
    out = planned(rl("zero", eval_dataset="hub/x", eval_limit=None))
    assert "tokens that come on top: held-out answers\n" in out
    out = planned(sample, unknown)
    assert "tokens, known stages only: at most 1.92 k generated, 0 trained on; 1 of 2 stages" in out


def test_a_wrong_field_in_a_late_stage_of_a_dry_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["r1", "--recipe", "r1", "--dry-run", "--all-scenario-rl.epsilon", "-1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("grpo-engine: error: stage all-scenario-rl (11 of 20): --epsilon -1")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "words"), [(None, "?"), (0, "0"), (999, "999"), (632_000, "632 k"), (671e9, "671 B")]
)
def test_counts(number, words):
    assert count(None if number is None else int(number)) == words


def test_sizes():
    assert [size(n) for n in (12, 1_500, 2_530_000, 1.2e12)] == [
        "12 B",
        "1.5 kB",
        "2.53 MB",
        "1.2 TB",
    ]


def test_toy_stages_have_no_budget(tmp_path):
    """A kind of stage that the plan knows nothing of is shown as unknown, not as free."""
    listed = [{"name": "a", "stage": "toy", "model": str(make_tiny_model(tmp_path / "m"))}]
    made = read_pipeline({"output_dir": str(tmp_path), "stages": listed}, (), KINDS)
    found = Budgets(build(made, KINDS)).found["a"]
    assert (found.generated, found.trained, found.memory) == (None, None, None)
    assert json.dumps(found.shape.parameters)
