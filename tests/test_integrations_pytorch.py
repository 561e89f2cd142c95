"""The modules for a loop of one's own, against the same loss from materialised logits."""

from __future__ import annotations

import pytest
import torch
from example_plain_loop import train
from tiny_model import make_tiny_model
from transformers import AutoModelForCausalLM

from grpo_engine.integrations.contract import Unsupported
from grpo_engine.integrations.pytorch import (
    FusedGRPOLoss,
    FusedLogprobs,
    completion_hidden,
    logit_options,
)
from grpo_engine.kernels import grpo_loss_ref

BATCH, PROMPT, WIDTH, VOCAB = 3, 5, 7, 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), tokenizer=False)


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (BATCH, PROMPT + WIDTH))
    attention = torch.ones_like(ids)
    attention[0, :2] = 0  # a shorter prompt
    attention[1, -3:] = 0  # a shorter completion
    mask = attention[:, -WIDTH:].clone()
    mask[2, 3] = 0  # a tool's token
    return {"input_ids": ids, "attention_mask": attention, "mask": mask}


def logprobs_of(model, rows, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """From the model's own logits: log-probabilities and entropy [B, T]."""
    attention = rows["attention_mask"]
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    logits = model(rows["input_ids"], attention_mask=attention, position_ids=positions).logits
    log_p = (logits[:, -WIDTH - 1 : -1] / temperature).log_softmax(-1)
    chosen = log_p.gather(-1, rows["input_ids"][:, -WIDTH:, None]).squeeze(-1)
    return chosen, -(log_p.exp() * log_p).sum(-1)


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_logprobs_and_entropy_are_those_of_the_logits(model):
    rows = batch()
    expected = logprobs_of(model, rows, 0.7)
    hidden = completion_hidden(model, rows["input_ids"], rows["attention_mask"], WIDTH)
    op = FusedLogprobs.for_model(model, temperature=0.7, return_entropy=True)
    found = op(hidden, model.lm_head, rows["input_ids"][:, -WIDTH:], rows["mask"])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs * rows["mask"], rtol=1e-5, atol=1e-5)
    upstream = torch.randn(BATCH, WIDTH) * rows["mask"]
    ours = gradients(model, (found[0] * upstream + 0.3 * found[1] * upstream).sum())
    theirs = gradients(model, (expected[0] * upstream + 0.3 * expected[1] * upstream).sum())
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "grpo", "beta": 0.1},
        {"loss_type": "dr_grpo", "max_completion_length": 9, "epsilon_high": 0.3},
        {"loss_type": "gspo"},
        {"loss_type": "cispo", "is_correction": "token_truncate"},
    ],
    ids=lambda options: options["loss_type"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_loss_is_that_of_the_logits(model, options, packed: bool):
    rows = batch()
    chosen, _ = logprobs_of(model, rows, 1.0)
    old, ref, sampler = (chosen.detach() + 0.2 * torch.randn(BATCH, WIDTH) for _ in range(3))
    advantages = torch.randn(BATCH)
    expected, _ = grpo_loss_ref(
        chosen.reshape(-1),
        old.reshape(-1),
        advantages,
        cu_seqlens=torch.arange(BATCH + 1) * WIDTH,
        loss_mask=(rows["mask"] != 0).reshape(-1),
        ref_logprobs=ref.reshape(-1),
        sampler_logprobs=sampler.reshape(-1),
        **options,
    )
    hidden = completion_hidden(model, rows["input_ids"], rows["attention_mask"], WIDTH)
    fields = {"old_logprobs": old, "ref_logprobs": ref, "sampler_logprobs": sampler}
    ids, mask = rows["input_ids"][:, -WIDTH:], rows["mask"]
    if packed:
        fields = {name: x.reshape(-1) for name, x in fields.items()}
        fields["cu_seqlens"] = torch.arange(BATCH + 1) * WIDTH
        ids, mask, hidden = ids.reshape(-1), mask.reshape(-1), hidden.flatten(0, 1)
    found = FusedGRPOLoss(**options)(hidden, model.lm_head, ids, advantages, mask, **fields)
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-6)
    assert found.logprobs.shape == ids.shape
    masked = (chosen * rows["mask"]).reshape(ids.shape)
    torch.testing.assert_close(found.logprobs, masked, rtol=1e-5, atol=1e-5)
    theirs = gradients(model, expected)
    ours = gradients(model, found.loss)
    assert max(grad.abs().max() for grad in theirs.values()) > 1e-3
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def adapted(model, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["adapters", "whole head"],
)
def test_lora_through_pefts_wrapper(folder, options):
    """The wrapper's own base_model is another wrapper, whose forward returns logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=False)
    model, rows = adapted(model, **options), batch()
    expected, _ = logprobs_of(model, rows, 1.0)
    hidden = completion_hidden(model, rows["input_ids"], rows["attention_mask"], WIDTH)
    ids = rows["input_ids"][:, -WIDTH:]
    found = FusedLogprobs.for_model(model)(hidden, model.lm_head, ids, rows["mask"])
    torch.testing.assert_close(found, expected * rows["mask"], rtol=1e-5, atol=1e-5)
    upstream = torch.randn(BATCH, WIDTH) * rows["mask"]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in trained) == ("modules_to_save" in options)
    ours = torch.autograd.grad((found * upstream).sum(), list(trained.values()))
    theirs = torch.autograd.grad((expected * upstream).sum(), list(trained.values()))
    assert min(grad.abs().max() for grad in theirs) > 1e-5
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_what_the_fused_head_would_leave_out_is_refused(folder, model):
    rows = batch()
    arguments = (rows["input_ids"], rows["attention_mask"], WIDTH)
    untied = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=False)
    wrapped = adapted(untied, target_modules=["lm_head"])
    hidden = completion_hidden(wrapped, *arguments)
    for op in (FusedLogprobs(), FusedGRPOLoss()):
        with pytest.raises(Unsupported, match="take lm_head off the adapter's target_modules"):
            op(hidden, wrapped.lm_head, rows["input_ids"][:, -WIDTH:], torch.ones(BATCH))
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(Unsupported, match="PROMPT_TUNING"):
        completion_hidden(peft.get_peft_model(model, config), *arguments)


def test_autocast_and_checkpointing(model):
    """The head's products in bf16, as a Linear's; its inputs and gradients stay fp32."""
    rows = batch()
    model.gradient_checkpointing_enable()
    model.train()
    ids, advantages = rows["input_ids"][:, -WIDTH:], torch.randn(BATCH)
    loss_fn = FusedGRPOLoss(loss_type="dapo")
    with torch.autocast("cpu", torch.bfloat16):
        hidden = completion_hidden(model, rows["input_ids"], rows["attention_mask"], WIDTH)
        assert hidden.dtype == torch.float32
        found = loss_fn(hidden, model.lm_head, ids, advantages, rows["mask"])
        assert model.lm_head(hidden).dtype == torch.bfloat16
    halves = (hidden.detach().bfloat16(), model.lm_head.weight.detach().bfloat16())
    assert torch.equal(found.logprobs, FusedLogprobs()(*halves, ids, rows["mask"]))
    ours = gradients(model, found.loss)
    assert {grad.dtype for grad in ours.values()} == {torch.float32}
    hidden = completion_hidden(model, rows["input_ids"], rows["attention_mask"], WIDTH)
    exact = loss_fn(hidden, model.lm_head, ids, advantages, rows["mask"])
    torch.testing.assert_close(found.logprobs, exact.logprobs, rtol=0.02, atol=0.02)
    for name, grad in gradients(model, exact.loss).items():
        torch.testing.assert_close(ours[name], grad, rtol=0, atol=0.05 * grad.abs().max().item())


def test_the_example_trains(model):
    """Thirty lines, and the reward rises: the share of tokens that are one of ten."""
    torch.manual_seed(0)
    prompts = torch.randint(3, VOCAB, (4, PROMPT))
    curve = train(model, prompts, lambda ids: ((ids >= 3) & (ids < 13)).float().mean(1))
    assert sum(curve[:3]) / 3 < 0.4
    assert sum(curve[-3:]) / 3 > 0.8


def test_options_of_the_head_come_from_the_config():
    from transformers import CohereConfig, Gemma2Config, GraniteConfig

    class Model:
        def __init__(self, config):
            self.config = config

    assert logit_options(Model(Gemma2Config(final_logit_softcapping=30.0))) == {
        "logit_softcap": 30.0,
        "logit_scale": None,
    }
    assert logit_options(Model(CohereConfig(logit_scale=0.25)))["logit_scale"] == 0.25
    assert logit_options(Model(GraniteConfig(logits_scaling=8.0)))["logit_scale"] == 0.125


def test_wrong_options_and_shapes_are_named(model):
    with pytest.raises(ValueError, match="loss_type must be one of"):
        FusedGRPOLoss(loss_type="ppo")
    with pytest.raises(TypeError, match="epsilom"):
        FusedGRPOLoss(epsilom=0.2)
    ids = torch.randint(3, VOCAB, (2, 6))
    with pytest.raises(ValueError, match="num_completion must be between 1 and 5"):
        completion_hidden(model, ids, torch.ones_like(ids), 6)
    hidden = torch.randn(4, 32)
    with pytest.raises(ValueError, match="cu_seqlens"):
        FusedGRPOLoss()(hidden, model.lm_head, ids[0, :4], torch.ones(1))
    with pytest.raises(ValueError, match=r"expected \[B\]"):
        FusedGRPOLoss()(hidden.view(2, 2, 32), model.lm_head, ids[:, :2], torch.ones(3))
