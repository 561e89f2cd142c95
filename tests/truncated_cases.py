"""What the tests of kept sets share: the sets, torch's own head over them, three-way accuracy."""

from __future__ import annotations

import torch
from head_cases import run

from grpo_engine.kernels import linear_logprobs, linear_logprobs_ref, token_logprobs_ref
from grpo_engine.kernels.testing import assert_accurate
from grpo_engine.kernels.truncated_mask import kept_bits, kept_mask

FORMS = ("ids", "ids64", "mask", "bits")


def make_kept(token_ids, vocab, num_kept):
    """[N, K] int32: the token and others without repeats, at random places, about a third of a row
    (not the token) replaced by -1."""
    g = torch.Generator().manual_seed(len(token_ids) + vocab + num_kept)
    rows = []
    for token in token_ids.tolist():
        ids = torch.randperm(vocab, generator=g)
        ids = torch.cat([torch.tensor([token]), ids[ids != token]])[:num_kept]
        gone = (torch.rand(num_kept, generator=g) < 0.3) & (ids != token)
        row = torch.where(gone, -1, ids)
        rows.append(row[torch.randperm(num_kept, generator=g)])
    kept = torch.stack(rows) if rows else torch.empty(0, num_kept)
    return kept.to(token_ids.device, torch.int32)


def in_form(ids, vocab, form):
    if form.startswith("ids"):
        return ids.long() if form == "ids64" else ids
    mask = kept_mask(ids, vocab)
    return mask if form == "mask" else kept_bits(mask)


def eager_truncated(hidden, weight, token_ids, *, kept, bias=None, row_mask=None, **options):
    """What a trainer writes without kernels: the head's GEMM at its dtype, then fp32."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    logits = logits * (options.pop("logit_scale", None) or 1.0)
    cap = options.pop("logit_softcap", None)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logits = logits.masked_fill(~kept_mask(kept, len(weight)), -torch.inf)
    outputs = token_logprobs_ref(logits, token_ids, **options)
    if row_mask is not None:
        outputs = tuple(torch.where(row_mask, output, 0.0) for output in outputs)
    return outputs


def check_three_ways(hidden, weight, bias, token_ids, dtype, **options):
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    inputs = (hidden, weight, token_ids, bias)
    outputs, grads = run(linear_logprobs, *inputs, **options)
    true_outputs, true_grads = run(linear_logprobs_ref, *inputs, dtype=torch.float64, **options)
    _, eager_grads = run(eager_truncated, *inputs, **options)
    for output, truth in zip(outputs, true_outputs, strict=True):
        assert output.dtype == torch.float32
        torch.testing.assert_close(output.double(), truth, rtol=0, atol=1e-5)
    names = ("hidden", "weight", "bias")
    for name, ours, other, truth in zip(names, grads, eager_grads, true_grads, strict=False):
        assert ours.dtype == dtype
        floor = 1e-5 if dtype == torch.float32 else 1e-6
        assert_accurate(name, ours, other, truth, dtype=dtype, floor=floor)
