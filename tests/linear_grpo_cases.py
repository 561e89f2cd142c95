"""What the tests of linear_grpo_loss share: batches, options, the comparison with the reference."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from grpo_engine.kernels import (
    grpo_loss_ref,
    linear_grpo_loss,
    linear_grpo_loss_ref,
    linear_logprobs_ref,
    token_logprobs_ref,
)
from grpo_engine.kernels.testing import assert_accurate

VARIANTS = {
    "grpo": {},
    "paper": {"epsilon": 10.0, "beta": 0.04},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28, "delta": 3.0},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 50},
    "bnpo": {"loss_type": "bnpo", "beta": 0.1, "kl_estimator": "k2"},
    "cispo": {"loss_type": "cispo", "is_correction": "token_truncate"},
    "sapo": {"loss_type": "sapo", "beta": 0.1, "kl_bias_correction": True},
    "luspo": {"loss_type": "luspo", "delta": 4.0},
    "entropy": {"entropy_coef": 0.05, "is_correction": "token_mask"},
    "gspo": {"loss_type": "gspo", "epsilon": 3e-3, "entropy_coef": 0.01},
    "vespo": {"loss_type": "vespo"},
    "sequence_mask": {"is_correction": "sequence_mask", "beta": 0.1},
}
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
TOKEN_LEVEL = [name for name in VARIANTS if name not in ("gspo", "vespo", "sequence_mask")]


def make_batch(num_tokens, vocab, width, device, dtype=torch.float32):
    """A packed batch: the positional arguments and the per-token keyword arguments."""
    generator = torch.Generator().manual_seed(num_tokens * 1000 + vocab)
    hidden = torch.randn(num_tokens, width, generator=generator).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) * 3 / width**0.5).to(dtype)
    token_ids = torch.randint(0, vocab, (num_tokens,), generator=generator)
    logprobs = linear_logprobs_ref(hidden, weight, token_ids)
    near = lambda: logprobs + 0.3 * torch.randn(num_tokens, generator=generator)  # noqa: E731
    old_logprobs, ref_logprobs, sampler_logprobs = near(), near(), near()
    advantages = torch.randn(num_tokens, generator=generator)
    fields = {
        "cu_seqlens": torch.tensor([0, num_tokens // 3, num_tokens // 2, num_tokens]),
        "loss_mask": torch.arange(num_tokens) % 5 != 2,
        "ref_logprobs": ref_logprobs,
        "sampler_logprobs": sampler_logprobs,
    }
    positional = (hidden, weight, token_ids, old_logprobs, advantages)
    return (
        [tensor.to(device) for tensor in positional],
        {name: tensor.to(device) for name, tensor in fields.items()},
    )


def run(op, positional, fields, *, dtype=None, bias=None, **options):
    """(loss, logprobs, metrics, gradients of hidden, weight[, bias]); fp64 if ``dtype`` is."""

    def cast(tensor):
        is_vector = tensor.dtype == torch.float32 and dtype == torch.float64
        return tensor.double() if is_vector else tensor

    hidden, weight, token_ids, old_logprobs, advantages = positional
    leaves = [
        tensor.detach().to(dtype or tensor.dtype).requires_grad_()
        for tensor in (hidden, weight, bias)
        if tensor is not None
    ]
    loss, metrics, logprobs = op(
        leaves[0],
        leaves[1],
        token_ids,
        None if old_logprobs is None else cast(old_logprobs),
        cast(advantages),
        bias=leaves[2] if bias is not None else None,
        **{name: cast(value) for name, value in fields.items()},
        **options,
    )
    assert not logprobs.requires_grad
    return loss.detach(), logprobs, metrics.to_dict(), torch.autograd.grad(loss, leaves)


def eager_linear_grpo(hidden, weight, token_ids, old_logprobs, advantages, **options):
    """What a trainer writes without kernels: the head's GEMM at its dtype, the loss in fp32."""
    logits = torch.nn.functional.linear(hidden, weight, options.pop("bias", None)).float()
    logprobs, entropy = token_logprobs_ref(logits, token_ids, return_entropy=True)
    if not options.get("entropy_coef"):
        entropy = None
    loss, metrics = grpo_loss_ref(logprobs, old_logprobs, advantages, entropy=entropy, **options)
    return loss, metrics, logprobs.detach()


def check_against_reference(shape, dtype, device, **options) -> None:
    positional, fields = make_batch(*shape, device, dtype)
    loss, logprobs, metrics, grads = run(linear_grpo_loss, positional, fields, **options)
    truth = run(linear_grpo_loss_ref, positional, fields, dtype=torch.float64, **options)
    eager = run(eager_linear_grpo, positional, fields, **options)
    torch.testing.assert_close(loss.double(), truth[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logprobs.double(), truth[1], rtol=0, atol=1e-5)
    assert metrics == pytest.approx(truth[2], rel=1e-5, abs=1e-5)
    for name, ours, plain, true in zip(
        ("hidden", "weight"), grads, eager[3], truth[3], strict=True
    ):
        assert ours.dtype == dtype
        floor = 1e-5 if dtype == torch.float32 else 1e-6
        assert_accurate(name, ours, plain, true, dtype=dtype, floor=floor)


def profile_call(call) -> tuple[int, int]:
    """(bytes of the largest single allocation, number of matrix products) inside ``call``."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.events()
    counts = Counter(event.name for event in events)
    largest = max(event.self_cpu_memory_usage for event in events)
    return largest, counts["aten::mm"] + counts["aten::addmm"] + counts["aten::addmm_"]
