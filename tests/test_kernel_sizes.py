"""Real vocabularies, many rows and long sequences, at the smallest of everything else; and old
log-probabilities recomputed in another chunking and packing."""

from __future__ import annotations

import importlib

import pytest
import torch

from grpo_engine.kernels import (
    grpo_loss,
    grpo_loss_ref,
    linear_grpo_loss,
    linear_grpo_loss_ref,
    linear_logprobs,
    linear_logprobs_ref,
    token_logprobs,
    token_logprobs_ref,
)
from grpo_engine.kernels.common import interpreting
from grpo_engine.kernels.testing import assert_accurate

pytestmark = pytest.mark.skipif(interpreting(), reason="the interpreter is too slow for these")
CHUNKS = importlib.import_module("grpo_engine.kernels.head_chunks")

# Llama 2, Llama 3, and a prime just below 2^17: no block divides it
VOCABULARIES = (32000, 128256, 131071)
WIDTH = 8


def make_head(num_rows: int, vocab: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    hidden = torch.randn(num_rows, WIDTH)
    weight = torch.randn(vocab, WIDTH)
    token_ids = torch.randint(0, vocab, (num_rows,))
    token_ids[0] = vocab - 1
    return hidden.to(device), weight.to(device), token_ids.to(device)


def run(op, *leaves: torch.Tensor, dtype: torch.dtype = torch.float32):
    """(outputs, gradients of the leaves) of ``op(*leaves)`` under a fixed weighting."""
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    output = op(*leaves)
    weights = torch.linspace(-1, 1, output.numel()).to(output).view_as(output)
    return output.detach(), torch.autograd.grad((output * weights).sum(), leaves)


def check_three_ways(op, reference, *leaves: torch.Tensor) -> None:
    """Values within 1e-5 of fp64; gradients, whose sums over V are GEMMs, as good as torch's."""
    output, grads = run(op, *leaves)
    _, plain = run(reference, *leaves)
    truth, true_grads = run(reference, *leaves, dtype=torch.float64)
    torch.testing.assert_close(output.double(), truth, rtol=0, atol=1e-5)
    for ours, eager, true in zip(grads, plain, true_grads, strict=True):
        assert_accurate("gradient", ours, eager, true, dtype=torch.float32, floor=1e-5)


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_token_logprobs_at_real_vocabularies(vocab: int, device) -> None:
    token_ids = make_head(3, vocab, device)[2]
    logits = (torch.randn(3, vocab) * 4).to(device)

    def call(op):
        return lambda logits: torch.cat(op(logits, token_ids, return_lse=True))

    check_three_ways(call(token_logprobs), call(token_logprobs_ref), logits)


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_linear_logprobs_at_real_vocabularies(vocab: int, device) -> None:
    hidden, weight, token_ids = make_head(3, vocab, device)

    def call(op):
        return lambda hidden, weight: op(hidden, weight, token_ids)

    check_three_ways(call(linear_logprobs), call(linear_logprobs_ref), hidden, weight)


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_linear_grpo_loss_at_real_vocabularies(vocab: int, device) -> None:
    hidden, weight, token_ids = make_head(3, vocab, device)
    advantages = torch.tensor([1.0, -0.5, 2.0], device=device)

    def call(op):
        def loss(hidden, weight):
            return op(hidden, weight, token_ids, None, advantages.to(hidden.dtype))[0]

        return loss

    check_three_ways(call(linear_grpo_loss), call(linear_grpo_loss_ref), hidden, weight)


@pytest.mark.parametrize(
    ("loss_type", "num_tokens", "bounds"),
    [
        ("grpo", 65537, [0, 1, 30000, 65537]),  # one more than a grid of 2^16 in y or z
        ("dapo", 65537, [0, 1, 30000, 65537]),
        ("grpo", 70000, [0, 70000]),
        ("gspo", 70000, [0, 70000]),
    ],
)
def test_many_tokens_and_one_long_sequence(loss_type, num_tokens, bounds, device) -> None:
    x = (-torch.rand(num_tokens) * 3).to(device)
    fields = {
        "cu_seqlens": torch.tensor(bounds, device=device),
        "ref_logprobs": x + 0.1 * torch.randn(num_tokens).to(device),
        "loss_mask": (torch.arange(num_tokens) % 7 != 3).to(device),
    }
    old = x + 0.2 * torch.randn(num_tokens).to(device)
    advantages = torch.randn(num_tokens).to(device)
    options = {"loss_type": loss_type, "beta": 0.04}
    metrics = {}

    def call(op):
        def loss(x):
            cast = {name: f.to(x) if f.is_floating_point() else f for name, f in fields.items()}
            value, metrics[op] = op(x, old.to(x), advantages.to(x), **cast, **options)
            return value

        return loss

    check_three_ways(call(grpo_loss), call(grpo_loss_ref), x)
    ours, truth = metrics[grpo_loss].to_dict(), metrics[grpo_loss_ref].to_dict()
    assert ours == pytest.approx(truth, rel=1e-5, abs=1e-6)


def test_old_logprobs_recomputed_alike_are_the_same_bits(device) -> None:
    """The same rows in the same chunks, in another call: the ratio of an on-policy step is 1."""
    hidden, weight, token_ids = make_head(96, 4001, device)
    with torch.no_grad():
        old = linear_logprobs(hidden, weight, token_ids)
    advantages = torch.ones(96, device=device)
    _, metrics, logprobs = linear_grpo_loss(hidden, weight, token_ids, old, advantages)
    assert torch.equal(logprobs, old)
    assert metrics.to_dict()["ratio_mean"] == 1.0 and metrics.to_dict()["approx_kl"] == 0.0


@pytest.mark.parametrize("chunk_rows", [7, 32])
def test_old_logprobs_recomputed_otherwise_stay_within_4e_6(chunk_rows, monkeypatch) -> None:
    """Other chunks, and rows packed in another order between other rows: |ratio - 1| <= 4e-6 for
    tokens that the policy sampled, the bound of the row-split tests. A BLAS picks its kernel by
    rows and threads, and near a logprob of -8 one unit of fp32 is already 9.5e-7."""
    hidden, weight = torch.randn(193, 64), torch.randn(301, 64) * 2 / 8
    token_ids = torch.softmax(hidden @ weight.T, -1).multinomial(1).squeeze(1)
    now = linear_logprobs(hidden, weight, token_ids)
    order = torch.randperm(193)
    monkeypatch.setattr(CHUNKS, "CPU_CHUNK_ROWS", (chunk_rows, chunk_rows))
    packed = linear_logprobs(hidden[order], weight, token_ids[order])
    old = torch.full_like(now, torch.nan).scatter_(0, order, packed)
    assert ((now.double() - old.double()).exp() - 1).abs().max() <= 4e-6


def test_rows_of_logits_packed_otherwise_are_the_same_bits(device) -> None:
    """token_logprobs sees each row alone, whatever stands beside it."""
    logits = (torch.randn(193, 4001) * 4).to(device)
    token_ids = torch.randint(0, 4001, (193,)).to(device)
    order = torch.randperm(193).to(device)
    now = token_logprobs(logits, token_ids)
    assert torch.equal(token_logprobs(logits[order], token_ids[order]), now[order])
