"""LoRA: what the adapter adds, what stays frozen, what a checkpoint holds, and whole runs."""

import copy
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_model import make_tiny_model, run_settings
from transformers import AutoModelForCausalLM, GPT2Config

from grpo_engine.config import build_config
from grpo_engine.generation.hf import HFGenerator
from grpo_engine.grpo import GRPORun
from grpo_engine.lora import LoraOptions, read_adapter
from grpo_engine.metrics import read_metrics
from grpo_engine.policy import Policy, packing_error
from grpo_engine.rewards import RewardPool, RewardSpec
from grpo_engine.rollouts import Prompt
from grpo_engine.train import train_grpo
from grpo_engine.types import GenerationRequest, SamplingParams, UserError

if importlib.util.find_spec("peft") is None:
    pytest.skip("peft is not installed", allow_module_level=True)

REWARD = """
def share_of_a(prompts, completions, **columns):
    return [completion.count("a") / max(1, len(completion)) for completion in completions]
"""
FAMILIES = ["qwen2", "gpt2"]  # GPT-2 keeps its weights transposed


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(folder / "qwen2"))
    with torch.no_grad():  # frozen at its first size, the head could not prefer any token
        model.get_output_embeddings().weight.mul_(8)
    model.save_pretrained(folder / "qwen2")
    torch.manual_seed(0)
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=48, n_positions=64, eos_token_id=1)
    make_tiny_model(folder / "gpt2")  # for its tokenizer
    AutoModelForCausalLM.from_config(gpt2).save_pretrained(folder / "gpt2")
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"{i}+{i}=", "solution": str(2 * i)} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def load(inputs, family="qwen2", r=4, **options):
    return Policy.load(str(inputs / family), device="cpu", lora=LoraOptions(r, **options))


@torch.no_grad()
def move(policy, seed=0):
    """Stands for training: every trained parameter goes somewhere else."""
    drawn = torch.Generator().manual_seed(seed)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=drawn), alpha=0.1)


def row():
    return torch.randint(3, 40, (20,), generator=torch.Generator().manual_seed(0))


def hidden(policy):
    """One packed row of two sequences, 8 and 12 tokens."""
    positions = torch.cat([torch.arange(8), torch.arange(12)])
    return policy.hidden_states(row(), positions, torch.tensor([0, 8, 20]).int(), 12)


@torch.no_grad()
def logits(model):
    return model(input_ids=row()[None], use_cache=False).logits[0]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def settings(inputs: Path, output_dir: Path, **changes):
    reward = f"{inputs / 'reward.py'}:share_of_a"
    base = run_settings(inputs / "qwen2", inputs / "rows.jsonl", reward, output_dir)
    return base | {"learning_rate": 1e-2, "lora_r": 4} | changes


@pytest.fixture
def run(inputs):
    config = build_config(settings(inputs, Path("unused"), steps_per_generation=1))
    policy = load(inputs)
    prompts = [
        Prompt({"prompt": f"{i}="}, f"{i}=", policy.tokenizer(f"{i}=")["input_ids"])
        for i in range(8)
    ]
    pool = RewardPool([RewardSpec.named(config.reward_funcs[0])], num_workers=1)
    yield GRPORun(config, policy, policy.frozen_copy(), HFGenerator(policy), pool, prompts)
    pool.close()


# -- the adapter ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_nothing(inputs, family):
    base, policy = Policy.load(str(inputs / family), device="cpu"), load(inputs, family)
    assert torch.equal(hidden(policy), hidden(base))
    assert torch.equal(policy.head.weight, base.head.weight)
    trained = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert not policy.head.weight.requires_grad  # the fused loss then makes no gradient for it


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_adapter_runs_packed_and_changes_the_policy(inputs, family):
    policy = load(inputs, family)
    before = hidden(policy)
    move(policy)
    assert (hidden(policy) - before).abs().max() > 0.01
    assert packing_error(policy) < 1e-5


def test_gradient_checkpointing_gives_the_same_gradients(inputs):
    lora = LoraOptions(4)
    plain = load(inputs)
    checked = Policy.load(
        str(inputs / "qwen2"), device="cpu", gradient_checkpointing=True, lora=lora
    )
    for policy in (plain, checked):
        move(policy)
        hidden(policy).square().sum().backward()
    for name, parameter in plain.weights().items():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(checked.weights()[name].grad, parameter.grad)
    assert sum(p.grad is not None for p in plain.model.parameters()) == len(plain.weights())


def test_the_adapter_depends_on_its_seed_only(inputs):
    model = Policy.load(str(inputs / "qwen2"), device="cpu").model
    state = torch.get_rng_state()
    one = Policy(model, lora=LoraOptions(4, seed=1))
    one.frozen_copy()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    same, other = load(inputs, seed=1), load(inputs, seed=2)
    name = next(iter(one.weights()))
    assert torch.equal(one.weights()[name], same.weights()[name])
    assert not torch.equal(one.weights()[name], other.weights()[name])


def test_target_modules_and_alpha(inputs):
    policy = load(inputs, target_modules=["q_proj", "mlp.up_proj"], alpha=4)
    layers = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in policy.weights()}
    assert layers == {"q_proj", "up_proj"} and len(policy.weights()) == 2 * 2 * 2
    double = load(inputs, target_modules=["q_proj", "mlp.up_proj"])  # alpha = 2 r
    for each in (policy, double):
        move(each)
    path, layer = next(iter(policy.adapter.layers.items()))
    b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    torch.testing.assert_close(layer.get_delta_weight("default"), b @ a)
    torch.testing.assert_close(double.adapter.layers[path].get_delta_weight("default"), 2 * b @ a)


# -- the reference ----------------------------------------------------------------------------


def test_the_reference_is_the_base_until_it_is_refreshed(inputs):
    base, policy = Policy.load(str(inputs / "qwen2"), device="cpu"), load(inputs)
    reference = policy.frozen_copy()
    assert reference.model is policy.model
    move(policy)
    assert torch.equal(hidden(reference), hidden(base)) and reference.adapter.is_base
    with reference.active():
        assert torch.equal(logits(reference.model), logits(base.model))
    reference.copy_weights_from(policy)
    at_refresh = hidden(policy).detach()
    assert torch.equal(hidden(reference), at_refresh) and not reference.adapter.is_base
    move(policy, seed=1)
    assert torch.equal(hidden(reference), at_refresh)
    assert not torch.allclose(hidden(policy), at_refresh)


def test_a_pass_of_the_reference_leaves_the_policy_as_it_was(inputs):
    policy = load(inputs)
    move(policy)
    for reference in (policy.frozen_copy(), policy.frozen_copy()):
        want = hidden(policy)
        assert torch.equal(hidden(reference), want)
        assert not hidden(reference).requires_grad
        with pytest.raises(ZeroDivisionError), reference.active():
            raise ZeroDivisionError
        assert torch.equal(hidden(policy), want) and hidden(policy).requires_grad
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in policy.weights().values()}


def test_a_frozen_copy_can_be_sampled_from(inputs):
    base, policy = Policy.load(str(inputs / "qwen2"), device="cpu"), load(inputs)
    reference = policy.frozen_copy()
    move(policy)
    sampling = SamplingParams(max_completion_length=6)
    requests = [GenerationRequest([5, 6, 7], seed=s) for s in range(4)]
    of = {
        name: HFGenerator(p).generate(requests, sampling)
        for name, p in (("base", base), ("policy", policy), ("reference", reference))
    }
    assert of["reference"] == of["base"] != of["policy"]


# -- training ---------------------------------------------------------------------------------


def test_only_the_adapter_is_trained(run):
    before = copy.deepcopy(run.policy.model.state_dict())
    _, arrays, rows = run.rollout()
    assert torch.allclose(arrays.sampler_logprobs, arrays.ref_logprobs, atol=2e-5)
    run.begin(arrays, rows)
    assert run.update()["grad_norm"] > 0
    after = run.policy.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # In the first step B is zero, so A has no gradient yet.
    assert changed == {name for name in before if ".lora_B.default." in name}
    trained = run.optimizer.param_groups[0]["params"]
    assert {id(p) for p in trained} == {id(p) for p in run.policy.weights().values()}


def test_training_logprobs_are_the_samplers_after_the_adapter_has_moved(run):
    move(run.policy)
    run.config = run.config.model_copy(update={"steps_per_generation": 2})  # makes old_logprobs
    run.reference_step = -1  # the reference is no longer the policy
    _, arrays, _ = run.rollout()
    assert torch.allclose(arrays.old_logprobs, arrays.sampler_logprobs, atol=2e-5)
    assert (arrays.ref_logprobs - arrays.old_logprobs).abs().max() > 0.01


def test_training_raises_the_reward(inputs, tmp_path):
    config = build_config(settings(inputs, tmp_path, max_steps=16, steps_per_generation=1))
    assert train_grpo(config) == 0
    rewards = [row["reward"] for row in read_metrics(tmp_path)]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.05


@pytest.mark.parametrize("stop", [3, 4])  # before the reference is refreshed, and after
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(inputs, tmp_path, stop):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train_grpo(build_config(settings(inputs, whole))) == 0
    assert train_grpo(build_config(settings(inputs, cut, max_steps=stop))) == 0
    assert train_grpo(build_config(settings(inputs, cut)), resume=str(cut)) == 0
    clock = ("time/", "wall", "tokens_per_second", "update_tokens_per_second")
    expected, found = (
        [{k: v for k, v in row.items() if not k.startswith(clock)} for row in read_metrics(folder)]
        for folder in (whole, cut)
    )
    assert found == expected and found[-1]["kl"] > 0
    for name in (
        "model.safetensors",
        "adapter/adapter_model.safetensors",
        "trainer/optimizer.safetensors",
        "trainer/reference.safetensors",
    ):
        one, other = (load_file(folder / "checkpoint-6" / name) for folder in (whole, cut))
        assert_equal(one, other)
        assert name == "model.safetensors" or all("lora" in key for key in one)
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (whole, cut)]
    one, other = (m["inputs"]["model"]["weights_sha256"] for m in manifests)
    assert one == other  # of the base, whatever the adapter
    if stop == 4:  # just refreshed: reference and policy are one
        reference = load_file(cut / "checkpoint-4" / "trainer" / "reference.safetensors")
        assert_equal(reference, read_adapter(cut / "checkpoint-4" / "adapter"))


# -- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_is_an_ordinary_folder_with_the_live_logits(inputs, tmp_path, family):
    from peft import PeftModel

    policy = load(inputs, family)
    policy.frozen_copy()  # another adapter in the layers must not reach the file
    move(policy)
    before = copy.deepcopy(policy.model.state_dict())
    live = logits(policy.model)
    policy.save_pretrained(tmp_path)
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(tensor, before[name])

    original = load_file(inputs / family / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in original.items()}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(merged), live, rtol=0, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(inputs / family)
    assert (logits(base) - live).abs().max() > 0.01
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), live, rtol=0, atol=1e-5)


def test_a_bfloat16_base_keeps_an_fp32_adapter(inputs, tmp_path):
    policy = Policy.load(str(inputs / "qwen2"), dtype="bfloat16", device="cpu", lora=LoraOptions(4))
    move(policy)
    assert {p.dtype for p in policy.weights().values()} == {torch.float32}
    assert hidden(policy).dtype == torch.bfloat16
    policy.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    path, layer = next(iter(policy.adapter.layers.items()))
    truth = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
    assert torch.equal(saved[f"{path}.weight"], truth.float().bfloat16())


# -- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 0}, "--lora_r 0: "),
        ({"lora_r": None, "lora_alpha": 8}, "lora_alpha=8: has no meaning without lora_r"),
        (
            {"lora_r": None, "lora_target_modules": ["q_proj"]},
            "lora_target_modules=['q_proj']: has no meaning without lora_r",
        ),
    ],
)
def test_contradictions_are_one_line(inputs, changes, message):
    with pytest.raises(UserError) as caught:
        build_config(settings(inputs, Path("unused"), **changes))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["q_prj", "mlp", "lm_head", "embed_tokens", "norm", ""])
def test_a_layer_that_cannot_have_an_adapter_is_named(inputs, tmp_path, name):
    config = settings(inputs, tmp_path / "run", lora_target_modules=["q_proj", name])
    with pytest.raises(UserError) as caught:
        train_grpo(build_config(config))
    expected = f"lora_target_modules: {name!r} is no layer of Qwen2ForCausalLM that takes an"
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)
    assert "q_proj, up_proj, v_proj" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_no_target_module_at_all(inputs):
    with pytest.raises(UserError, match="lora_target_modules"):
        load(inputs, target_modules=[])


def test_a_frozen_policy_takes_no_adapter(inputs):
    with pytest.raises(ValueError, match="lora: trainable=False"):
        Policy.load(str(inputs / "qwen2"), device="cpu", trainable=False, lora=LoraOptions(4))


def test_without_peft_the_extra_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "peft" else found(n, *a)
    )
    with pytest.raises(UserError, match=r"lora_r=4: .* grpo-engine\[lora\]"):
        LoraOptions(4)


def test_a_resumed_run_keeps_its_rank(inputs, tmp_path):
    assert train_grpo(build_config(settings(inputs, tmp_path, max_steps=1))) == 0
    for changes, name in (({"lora_r": 8}, "lora_r"), ({"lora_r": None}, "lora_r")):
        with pytest.raises(UserError, match=f"--{name} .* was started with 4"):
            train_grpo(build_config(settings(inputs, tmp_path, **changes)), resume=str(tmp_path))
