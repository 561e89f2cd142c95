"""Our wrappers under Liger's signatures against Liger's own code."""

from __future__ import annotations

import inspect

import pytest
import torch

from grpo_engine.integrations.contract import Unsupported
from grpo_engine.integrations.liger import LigerFusedLinearGRPOLoss, triton_grpo_loss
from grpo_engine.kernels.common import interpreting

pytestmark = pytest.mark.skipif(interpreting(), reason="compares the portable path")

LENGTHS, WIDTH, HIDDEN, VOCAB = (7, 12, 1, 9), 12, 16, 50
LIGER_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")


@pytest.fixture(scope="module")
def liger():
    pytest.importorskip("liger_kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Theirs

    return Theirs


def case(hidden_size: int = HIDDEN) -> dict[str, torch.Tensor]:
    shape = (len(LENGTHS), WIDTH)
    weight = torch.randn(VOCAB, hidden_size)
    hidden, ids = torch.randn(*shape, hidden_size), torch.randint(0, VOCAB, shape)
    logits = hidden @ weight.T / 1.3
    now = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    return {
        "_input": hidden,
        "lin_weight": weight,
        "selected_token_ids": ids,
        "attention_mask": (torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]).long(),
        "advantages": torch.randn(len(LENGTHS)),
        "old_per_token_logps": now + 0.2 * torch.randn(shape),
        "ref_per_token_logps": now + 0.2 * torch.randn(shape),
    }


def compare(theirs, inputs: dict, **options) -> None:
    options = {"compiled": False, "temperature": 1.3, "max_completion_length": 20} | options
    results = []
    for kind in (theirs, LigerFusedLinearGRPOLoss):
        leaves = {
            name: inputs[name].clone().requires_grad_()
            for name in ("_input", "lin_weight", "bias")
            if name in inputs
        }
        loss, metrics = kind(**options)(**inputs | leaves)
        results.append([loss, *torch.autograd.grad(loss, list(leaves.values())), *metrics])
    assert results[0][1].abs().max() > 1e-4
    assert len(results[0]) == len(results[1])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LIGER_LOSSES)
def test_loss_types(liger, loss_type: str, level: str, beta: float):
    if level == "sequence" and loss_type in ("cispo", "sapo", "vespo"):
        pytest.skip("Liger refuses it")
    options = {"loss_type": loss_type, "importance_sampling_level": level, "beta": beta}
    compare(liger, case(), epsilon_high=1.1 if loss_type == "cispo" else 0.1, **options)


OPTIONS = {
    "on-policy": {},
    "two-sided": {"delta": 1.3},
    "corrected kl": {"beta": 0.2, "use_bias_correction_kl": True},
    "no reference": {"beta": 0.2, "use_ref_model": False},
    "given tokens": {},
    "bias": {},
    "reference from hidden states": {"beta": 0.2},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("loss_type", LIGER_LOSSES)
def test_options(liger, loss_type: str, name: str):
    inputs = case()
    if name == "on-policy":
        del inputs["old_per_token_logps"]
    if name == "given tokens":
        inputs["num_items_in_batch"] = torch.tensor(77)
    if name == "bias":
        inputs["bias"] = torch.randn(VOCAB)
    if name == "reference from hidden states":
        del inputs["ref_per_token_logps"]
        inputs["ref_input"] = inputs["_input"] + 0.1 * torch.randn_like(inputs["_input"])
        inputs["ref_weight"] = inputs["lin_weight"]
    compare(liger, inputs, loss_type=loss_type, **OPTIONS[name])


@pytest.mark.parametrize("loss_type", LIGER_LOSSES)
def test_rows_without_tokens(liger, loss_type: str):
    inputs = case()
    inputs["attention_mask"][1] = 0
    compare(liger, inputs, loss_type=loss_type, beta=0.1)
    inputs["attention_mask"][:] = 0
    loss, metrics = LigerFusedLinearGRPOLoss(loss_type=loss_type, max_completion_length=9)(**inputs)
    assert loss == 0 and not any(metrics)


def test_autocast_multiplies_in_the_autocast_dtype(liger):
    inputs, results = case(), []
    for kind in (liger, LigerFusedLinearGRPOLoss):
        leaf = inputs["_input"].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = kind(compiled=False, beta=0.1)(**inputs | {"_input": leaf})
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    (expected, expected_grad), (found, grad) = results
    halves = {name: inputs[name].bfloat16() for name in ("_input", "lin_weight")}
    in_half, _ = LigerFusedLinearGRPOLoss(beta=0.1)(**inputs | halves)
    exact, _ = LigerFusedLinearGRPOLoss(beta=0.1)(**inputs)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(found, in_half, rtol=1e-5, atol=1e-7)
    assert (found - exact).abs() > 100 * (found - in_half).abs() + 1e-6
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)
    scale = expected_grad.abs().max().item()
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=0.1 * scale)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, WIDTH)], ids=str)
@pytest.mark.parametrize("loss_type", [*LIGER_LOSSES, "luspo"])
def test_sampler_ratio(liger, loss_type: str, shape):
    inputs = case()
    ratio = (0.3 * torch.randn(shape)).exp()
    if len(shape) == 2 and shape[1] == WIDTH:
        ratio = ratio.where(inputs["attention_mask"] != 0, 1.0)
    inputs["vllm_is_ratio"] = ratio
    options = {"loss_type": loss_type, "beta": 0.0}
    if loss_type == "luspo":
        options["importance_sampling_level"] = "sequence"
        if shape == (4, WIDTH):
            with pytest.raises(Unsupported, match="padding"):
                LigerFusedLinearGRPOLoss(**options)(**inputs)
            return
    compare(liger, inputs, **options)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("loss_type", LIGER_LOSSES)
def test_loss_from_logits(liger, loss_type: str, inplace: bool):
    """Liger's Triton op needs a GPU; its chunked loss with the identity as head is the same."""
    inputs = case()
    logits = torch.nn.functional.pad(inputs["_input"] @ inputs["lin_weight"].T, (0, 0, 0, 1))
    options = {"loss_type": loss_type, "beta": 0.1, "temperature": 1.3, "max_completion_length": 20}
    head = logits[:, :-1].clone().requires_grad_()
    given = inputs | {"_input": head, "lin_weight": torch.eye(VOCAB)}
    expected, metrics = liger(compiled=False, epsilon_high=0.4, **options)(**given)
    expected.backward()
    leaf = logits.clone().requires_grad_()
    loss, found = triton_grpo_loss(
        leaf * 1,
        inputs["old_per_token_logps"],
        inputs["ref_per_token_logps"],
        inputs["selected_token_ids"],
        inputs["advantages"],
        inputs["attention_mask"],
        inplace=inplace,
        reduce=True,
        **options,
    )
    loss.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad[:, :-1], head.grad, rtol=1e-4, atol=1e-6)
    assert not leaf.grad[:, -1].any()
    for ours, theirs in zip(found, metrics, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_signatures_are_ligers(liger):
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss as theirs

    pairs = (
        (theirs, triton_grpo_loss),
        (liger.__init__, LigerFusedLinearGRPOLoss.__init__),
        (liger.forward, LigerFusedLinearGRPOLoss.forward),
    )
    for expected, found in pairs:
        expected, found = (inspect.signature(f).parameters for f in (expected, found))
        assert [(p.name, p.default) for p in expected.values()] == [
            (p.name, p.default) for p in found.values()
        ]


def test_what_is_refused():
    inputs = case()
    rows = (inputs["old_per_token_logps"], None, inputs["selected_token_ids"])
    logits = torch.randn(4, WIDTH + 1, VOCAB)
    with pytest.raises(Unsupported, match="reduce=False"):
        triton_grpo_loss(logits, *rows, inputs["advantages"])
    with pytest.raises(ValueError, match="beta=0.04 needs ref_logp"):
        triton_grpo_loss(logits, *rows, inputs["advantages"], reduce=True)
    with pytest.raises(ValueError, match="delta=1.3 has no meaning"):
        triton_grpo_loss(
            *(logits, *rows, inputs["advantages"]),
            beta=0.0,
            delta=1.3,
            loss_type="cispo",
            reduce=True,
        )
    with pytest.raises(Unsupported, match="luspo"):
        LigerFusedLinearGRPOLoss(loss_type="luspo")(**inputs)
    with pytest.raises(ValueError, match="use_ref_model=True needs"):
        LigerFusedLinearGRPOLoss()(**inputs | {"ref_per_token_logps": None})
