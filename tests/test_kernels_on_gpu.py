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


def _logprobs_alone(x, **options):
    leaves = (x["hidden"], x["weight"])
    options.setdefault("row_mask", x["loss_mask"])
    return (linear_logprobs(*leaves, x["token_ids"], **options),), leaves


def _frozen_head(x, **options):
    head = (x["hidden"], x["weight"].detach(), x["token_ids"])
    outputs = linear_logprobs(*head, row_mask=x["loss_mask"], **options)
    return outputs if options else (outputs,), (x["hidden"],)


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
    "linear_logprobs-all rows": lambda x: _logprobs_alone(x, compact_rows=False),
    "linear_logprobs-live rows": lambda x: _logprobs_alone(x, row_mask=None, compact_rows=True),
    "linear_logprobs-kept": lambda x: _logprobs_alone(x, keep_probs=True),
    "linear_logprobs-kept, all rows": lambda x: _logprobs_alone(
        x, keep_probs=True, compact_rows=False
    ),
    "linear_logprobs-frozen": _frozen_head,
    "linear_logprobs-invariant": lambda x: _logprobs_alone(x, batch_invariant=True),
    **{f"grpo_loss-{t}": lambda x, t=t: _grpo_loss(x, loss_type=t) for t in ("grpo", "dapo")},
    "grpo_loss-gspo": lambda x: _grpo_loss(x, loss_type="gspo"),
    "grpo_loss-entropy": lambda x: _grpo_loss(x, entropy=x["old_logprobs"].abs(), entropy_coef=0.1),
    "linear_logprobs-frozen, entropy": lambda x: _frozen_head(x, return_entropy=True),
    "linear_grpo_loss": _linear_grpo_loss,
    "linear_grpo_loss-gspo": lambda x: _linear_grpo_loss(x, loss_type="gspo"),
    "linear_grpo_loss-live rows": lambda x: _linear_grpo_loss(x, compact_rows=True),
    "linear_grpo_loss-invariant": lambda x: _linear_grpo_loss(x, batch_invariant=True),
    "linear_grpo_loss-entropy": lambda x: _linear_grpo_loss(x, entropy_coef=0.01),
    "linear_grpo_loss-on policy": lambda x: _linear_grpo_loss(x | {"old_logprobs": None}),
    "linear_grpo_loss-sparse": lambda x: _linear_grpo_loss(x, sparse_delta=1e-2),
    "linear_logprobs-kept ids": lambda x: _logprobs_alone(x, kept=_kept_ids(x)),
    "linear_logprobs-kept mask": lambda x: _logprobs_alone(x, kept=_kept_mask(x)),
}
# Two leaves, and chunks of rows.
CHUNKED = [op for op in OPS if op.startswith("linear_") and "frozen" not in op and "ids" not in op]


ROW_FIELDS = ("token_ids", "old_logprobs", "ref_logprobs", "advantages", "loss_mask")


def _kept_ids(x):
    """[N, 4] ids: the token and three others."""
    others = torch.arange(1, 4, device="cuda")
    return torch.cat([x["token_ids"][:, None], (x["token_ids"][:, None] + others) % V], 1)


def _kept_mask(x):
    mask = torch.zeros(len(x["token_ids"]), V, dtype=torch.bool, device="cuda")
    return mask.scatter_(1, _kept_ids(x), True)


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


@pytest.mark.parametrize("op", OPS)
def test_no_recompilation_as_the_number_of_rows_changes(op: str, monkeypatch) -> None:
    runtime = pytest.importorskip("triton").knobs.runtime
    x = make_inputs()
    compiled = []
    monkeypatch.setattr(runtime, "jit_post_compile_hook", lambda **call: compiled.append(call))
    outputs_and_gradients(op, x)
    before = len(compiled)
    for rows in (1, 16, 33, 128, 257):
        part = {name: x[name][:rows].clone() for name in ROW_FIELDS if x[name] is not None}
        part["cu_seqlens"] = torch.tensor([0, rows // 2, rows], device="cuda")
        for name in ("hidden", "logits", "logprobs"):
            part[name] = x[name].detach()[:rows].clone().requires_grad_()
        outputs_and_gradients(op, x | part)
    assert len(compiled) == before


def test_no_recompilation_as_the_number_of_kept_ids_changes(monkeypatch) -> None:
    """Within one power of two."""
    runtime = pytest.importorskip("triton").knobs.runtime
    x, compiled = make_inputs(), []
    monkeypatch.setattr(runtime, "jit_post_compile_hook", lambda **call: compiled.append(call))
    counts = []
    for width in (32, 17, 19, 25, 31):
        kept = (x["token_ids"][:, None] + torch.arange(width, device="cuda")) % V
        inputs = (x["hidden"], x["weight"], x["token_ids"])
        linear_logprobs(*inputs, kept=kept.int()).sum().backward()
        counts.append(len(compiled))
    assert len(set(counts)) == 1


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_equal_groups_without_host_sync(scale: str) -> None:
    rewards = torch.rand(64, device="cuda")
    without_syncs(lambda: group_advantages(rewards, 8, scale=scale))
    expected = group_advantages(rewards.cpu(), 8, scale=scale)
    torch.testing.assert_close(group_advantages(rewards, 8, scale=scale).cpu(), expected)
    ids = torch.arange(64, device="cuda") // 8
    torch.testing.assert_close(group_advantages(rewards, ids, scale=scale).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", CHUNKED)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [D, D + 3])
def test_batch_invariance(width: int, dtype: torch.dtype, monkeypatch) -> None:
    """A row alone, among others, behind a mask and in other chunks: the same bits."""
    hidden = torch.randn(N, width, device="cuda").to(dtype)
    weight = (torch.randn(V, width, device="cuda") * 3 / width**0.5).to(dtype)
    token_ids = torch.randint(0, V, (N,), device="cuda")

    def stats(rows=slice(None), **options):
        options |= {"return_entropy": True, "return_lse": True, "batch_invariant": True}
        return torch.stack(linear_logprobs(hidden[rows], weight, token_ids[rows], **options))

    whole = stats()
    for rows in (slice(0, 1), slice(7, 8), slice(3, 150), slice(N - 1, N)):
        assert torch.equal(stats(rows), whole[:, rows])
    order = torch.randperm(N, device="cuda")
    assert torch.equal(stats(order), whole[:, order])
    mask = torch.arange(N, device="cuda") % 3 != 1
    for compact in (True, False):
        masked = stats(row_mask=mask, compact_rows=compact)
        assert torch.equal(masked, torch.where(mask, whole, 0.0))
    monkeypatch.setattr(CHUNKS, "CUDA_WORKSPACE_BYTES", 1)
    assert torch.equal(stats(), whole)


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
