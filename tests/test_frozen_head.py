"""linear_logprobs with a frozen head: entropy and lse out of the same two GEMMs."""

from __future__ import annotations

import pytest
import torch
from head_cases import DTYPES, TRITON_DTYPES, all_options, check_three_ways, make_head, run

from grpo_engine.kernels import linear_logprobs

SIZES = (21, 301, 16)


def some_rows(device):
    """Rows with a gradient: neither all, nor a block of them."""
    return torch.arange(SIZES[0], device=device) % 4 != 2


def check_metrics(dtype, device, **how) -> None:
    """Outputs are those of the general path, and the gradients too, whichever of them arrive."""
    hidden, weight, bias, token_ids = make_head(*SIZES, device)
    hidden, weight, bias = (t.to(dtype) for t in (hidden, weight, bias))
    options = {**all_options(SIZES[0], device), **how, "live": some_rows(device)}
    inputs = (hidden, weight, token_ids, bias)
    check_three_ways(hidden, weight, bias, token_ids, dtype, needs="hidden", **options)
    outputs, _ = run(linear_logprobs, *inputs, needs="hidden", **options)
    expected, _ = run(linear_logprobs, *inputs, needs="hidden weight", **options)
    for ours, theirs in zip(outputs, expected, strict=True):
        assert torch.equal(ours, theirs)

    def grad_of(names: str, asked: str) -> torch.Tensor:
        leaf = hidden.detach().clone().requires_grad_()
        extras = {f"return_{name}": name in asked for name in ("entropy", "lse")}
        made = linear_logprobs(leaf, weight, token_ids, bias=bias, **extras, **how)
        made = dict(zip(asked.split(), made if isinstance(made, tuple) else (made,), strict=True))
        return torch.autograd.grad(sum(made[name].sum() for name in names.split()), leaf)[0]

    alone = grad_of("logprobs", "logprobs")
    for asked in ("logprobs entropy", "logprobs lse", "logprobs entropy lse"):
        assert torch.equal(grad_of("logprobs", asked), alone)
    everything = "logprobs entropy lse"
    parts = [grad_of(name, everything) for name in everything.split()]
    assert all(bool(part.abs().sum() > 0) for part in parts)
    tolerance = 4 * torch.finfo(dtype).eps
    total = grad_of(everything, everything).float()
    assert (sum(part.float() for part in parts) - total).norm() <= tolerance * total.norm()


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy_and_lse(dtype, batch_invariant, device) -> None:
    check_metrics(dtype, device, batch_invariant=batch_invariant)


@pytest.mark.triton
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_entropy_and_lse_triton(dtype, compact, device) -> None:
    check_metrics(dtype, device, compact_rows=compact)
