"""What only a GPU can show: no host sync, chunks that do not matter, more than 2^31 logits."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch

from grpo_engine.kernels import (
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logprobs,
    token_logprobs,
    token_logprobs_ref,
)

pytestmark = pytest.mark.gpu
CHUNKS = importlib.import_module("grpo_engine.kernels.head_chunks")
N, V, D = 300, 1009, 64


def make_inputs(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda")

    hidden, weight = normal(N, D).to(dtype), (normal(V, D) * 3 / D**0.5).to(dtype)
    token_ids = torch.randint(0, V, (N,), device="cuda")
    logprobs = linear_logprobs(hidden, weight, token_ids)
    leaves = {
        "logits": (normal(N, V) * 3).to(dtype),
        "hidden": hidden,
        "weight": weight,
        "logprobs": logprobs.clone(),
    }
    return {name: tensor.requires_grad_() for name, tensor in leaves.items()} | {
        "token_ids": token_ids,
        "old_logprobs": logprobs + 0.3 * normal(N),
        "ref_logprobs": logprobs + 0.3 * normal(N),
        "advantages": normal(N),
        "loss_mask": torch.arange(N, device="cuda") % 5 != 2,
        "cu_seqlens": torch.tensor([0, 100, 100, N], device="cuda"),
    }


def _token_logprobs(x):
    outputs = token_logprobs(x["logits"], x["token_ids"], return_entropy=True, return_lse=True)
    return outputs, (x["logits"],)


def _linear_logprobs(x):
    leaves = (x["hidden"], x["weight"])
    outputs = linear_logprobs(*leaves, x["token_ids"], return_entropy=True, row_mask=x["loss_mask"])
    return outputs, leaves


def _loss_fields(x):
    names = ("ref_logprobs", "loss_mask", "cu_seqlens")
    return {"beta": 0.1, **{name: x[name] for name in names}}


def _grpo_loss(x, **options):
    positional = (x["logprobs"], x["old_logprobs"], x["advantages"])
    return grpo_loss(*positional, **_loss_fields(x), **options)[:1], (x["logprobs"],)


def _linear_grpo_loss(x, **options):
    leaves = (x["hidden"], x["weight"])
    positional = (x["token_ids"], x["old_logprobs"], x["advantages"])
    loss, _, logprobs = linear_grpo_loss(*leaves, *positional, **_loss_fields(x), **options)
    return (loss, logprobs), leaves


OPS: dict[str, Callable] = {
    "token_logprobs": _token_logprobs,
    "linear_logprobs": _linear_logprobs,
    **{f"grpo_loss-{t}": lambda x, t=t: _grpo_loss(x, loss_type=t) for t in ("grpo", "dapo")},
    "grpo_loss-gspo": lambda x: _grpo_loss(x, loss_type="gspo"),
    "linear_grpo_loss": _linear_grpo_loss,
    "linear_grpo_loss-gspo": lambda x: _linear_grpo_loss(x, loss_type="gspo"),
}


def outputs_and_gradients(op: str, x: dict) -> list[torch.Tensor]:
    outputs, leaves = OPS[op](x)
    active = [output for output in outputs if output.requires_grad]
    ones = [torch.ones_like(output) for output in active]
    return [*outputs, *torch.autograd.grad(active, leaves, ones)]


def without_syncs(call: Callable[[], object]) -> None:
    """Run ``call`` once to compile, then with every host sync an error."""
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_no_host_sync(op: str, dtype: torch.dtype) -> None:
    x = make_inputs(dtype)
    without_syncs(lambda: outputs_and_gradients(op, x))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_equal_groups_without_host_sync(scale: str) -> None:
    rewards = torch.rand(64, device="cuda")
    without_syncs(lambda: group_advantages(rewards, 8, scale=scale))
    expected = group_advantages(rewards.cpu(), 8, scale=scale)
    torch.testing.assert_close(group_advantages(rewards, 8, scale=scale).cpu(), expected)
    ids = torch.arange(64, device="cuda") // 8
    torch.testing.assert_close(group_advantages(rewards, ids, scale=scale).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["linear_logprobs", "linear_grpo_loss", "linear_grpo_loss-gspo"])
def test_chunks_change_nothing(op: str, dtype: torch.dtype, monkeypatch) -> None:
    x = make_inputs(dtype)
    whole = outputs_and_gradients(op, x)
    monkeypatch.setattr(CHUNKS, "CUDA_WORKSPACE_BYTES", 1)
    assert CHUNKS.chunk_rows(x["hidden"], V) == 128 < N
    chunked = outputs_and_gradients(op, x)
    for got, expected in zip(chunked[:-2], whole[:-2], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    tolerance = max(1e-5, torch.finfo(dtype).eps)
    for got, expected in zip(chunked[-2:], whole[-2:], strict=True):
        assert (got - expected).float().norm() <= tolerance * expected.float().norm()


@pytest.mark.parametrize("takes_half", [True, False])
def test_d_weight_with_and_without_the_newest_addmm(takes_half: bool, monkeypatch) -> None:
    if takes_half and not CHUNKS.ADDMM_TAKES_HALF:
        pytest.skip(f"torch {torch.__version__} has no addmm of half matrices into fp32")
    monkeypatch.setattr(CHUNKS, "ADDMM_TAKES_HALF", takes_half)
    a, b = (torch.randn(shape, device="cuda").bfloat16() for shape in ((V, N), (N, D)))
    total = torch.ones(V, D, device="cuda")
    CHUNKS.add_half_mm(total, a, b)
    torch.testing.assert_close(total.double(), 1 + a.double() @ b.double(), rtol=1e-5, atol=1e-4)


def test_more_than_2_to_the_31_logits() -> None:
    """14,200 rows of 151,936: the last rows lie beyond what 32 bits can address."""
    num_rows, vocab = 14200, 151936
    assert num_rows * vocab > 2**31
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of free GPU memory")
    logits = torch.randn(num_rows, vocab, device="cuda", dtype=torch.bfloat16).requires_grad_()
    token_ids = torch.randint(0, vocab, (num_rows,), device="cuda")
    logprobs = token_logprobs(logits, token_ids)
    (grad,) = torch.autograd.grad(logprobs.sum(), logits)
    for rows in (slice(0, 4), slice(-4, None)):
        part = logits.detach()[rows].clone().requires_grad_()
        alone = token_logprobs(part, token_ids[rows])
        (grad_alone,) = torch.autograd.grad(alone.sum(), part)
        assert torch.equal(logprobs[rows], alone) and torch.equal(grad[rows], grad_alone)
        truth = token_logprobs_ref(part.detach().double(), token_ids[rows])
        torch.testing.assert_close(alone.double(), truth, rtol=0, atol=1e-5)
