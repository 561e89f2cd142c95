"""What the tests of the fused head share: inputs, the loss of plain torch, three-way accuracy."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from grpo_engine.kernels import linear_logprobs, linear_logprobs_ref, token_logprobs_ref
from grpo_engine.kernels.common import use_triton
from grpo_engine.kernels.testing import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not torch.cuda.is_available(), reason="Triton's interpreter has no bfloat16"
        ),
    ),
]
# What linear_logprobs returns, how strongly the loss weights it, its largest error
OUTPUTS = {"logprobs": (1.0, 1e-5), "entropy": (0.3, 1e-4), "lse": (0.2, 1e-5)}


def make_head(num_rows, vocab, width, device, spread=3.0):
    """hidden [N, D], weight [V, D], bias [V] and token_ids [N]; logits of standard deviation
    ``spread``."""
    generator = torch.Generator().manual_seed(num_rows * 1000 + vocab)
    hidden = torch.randn(num_rows, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) * spread / width**0.5
    bias = torch.randn(vocab, generator=generator)
    token_ids = torch.randint(0, vocab, (num_rows,), generator=generator)
    token_ids[:1] = vocab - 1
    return [tensor.to(device) for tensor in (hidden, weight, bias, token_ids)]


def all_options(num_rows, device):
    """Every option of the head at once, a third of the rows masked."""
    return {
        "temperature": torch.linspace(0.6, 1.5, num_rows, device=device),
        "logit_softcap": 20.0,
        "logit_scale": 0.8,
        "row_mask": torch.arange(num_rows, device=device) % 3 != 1,
    }


def eager_linear_logprobs(hidden, weight, token_ids, *, bias=None, row_mask=None, **options):
    """What a trainer writes without kernels: the head's GEMM at its dtype, then fp32."""
    how = ("compact_rows", "keep_probs", "batch_invariant")
    options = {name: value for name, value in options.items() if name not in how}
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    logits = logits * (options.pop("logit_scale", None) or 1.0)
    cap = options.pop("logit_softcap", None)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    outputs = token_logprobs_ref(logits, token_ids, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if row_mask is not None:
        outputs = tuple(torch.where(row_mask, output, 0.0) for output in outputs)
    return outputs


def row_weights(num_rows, live=None):
    """The loss's gradient of each row of logprobs, entropy and lse: signed, about 1; 0 where
    ``live`` [N] is False."""
    weights = torch.randn(3, num_rows, generator=torch.Generator().manual_seed(1))
    return (weights if live is None else weights * live.cpu()).unbind()


def run(
    op,
    hidden,
    weight,
    token_ids,
    bias=None,
    *,
    dtype=None,
    needs="hidden weight bias",
    returns="logprobs entropy lse",
    live=None,
    **options,
):
    """Outputs, and gradients of the inputs named in ``needs`` under a fixed weighting of the rows;
    rows outside ``live`` get a gradient of 0."""
    made = {}
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        leaf = None if tensor is None else tensor.detach().to(dtype or tensor.dtype)
        made[name] = leaf.requires_grad_() if leaf is not None and name in needs.split() else leaf
    outputs = op(
        made["hidden"],
        made["weight"],
        token_ids,
        bias=made["bias"],
        return_entropy="entropy" in returns,
        return_lse="lse" in returns,
        **options,
    )
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss, weights = 0.0, row_weights(len(hidden), live)
    for output, name, factors in zip(outputs, returns.split(), weights, strict=False):
        loss = loss + OUTPUTS[name][0] * (factors.to(output) * output).sum()
    leaves = [made[name] for name in needs.split() if made[name] is not None]
    return [output.detach() for output in outputs], torch.autograd.grad(loss, leaves)


def check_three_ways(hidden, weight, bias, token_ids, dtype, **options):
    """Outputs within their tolerance of fp64, gradients within 1.2 times torch's own error. On the
    Triton path kept probabilities are rounded to half, and so is g X: a quarter of eps more."""
    floor = 1e-5 if dtype == torch.float32 else 1e-6
    if options.get("keep_probs") and dtype != torch.float32 and use_triton(hidden):
        floor = torch.finfo(dtype).eps / 4
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    inputs = (hidden, weight, token_ids, bias)
    outputs, grads = run(linear_logprobs, *inputs, **options)
    true_outputs, true_grads = run(linear_logprobs_ref, *inputs, dtype=torch.float64, **options)
    _, eager_grads = run(eager_linear_logprobs, *inputs, **options)
    names = options.get("returns", "logprobs entropy lse").split()
    for name, output, truth in zip(names, outputs, true_outputs, strict=True):
        assert output.dtype == torch.float32
        torch.testing.assert_close(output.double(), truth, rtol=0, atol=OUTPUTS[name][1])
    names = options.get("needs", "hidden weight bias").split()
    for name, ours, eager, truth in zip(names, grads, eager_grads, true_grads, strict=False):
        assert ours.dtype == dtype
        assert_accurate(name, ours, eager, truth, dtype=dtype, floor=floor)
    return outputs, grads


def profile_call(call) -> tuple[int, int]:
    """(bytes of the largest single allocation, number of matrix products) inside ``call``."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.events()
    counts = Counter(event.name for event in events)
    largest = max(event.self_cpu_memory_usage for event in events)
    return largest, counts["aten::mm"] + counts["aten::addmm"] + counts["aten::addmm_"]
