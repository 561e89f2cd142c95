"""What a sampler with top-k and top-p keeps of each row: the ``kept`` of truncated.py.

Order of operations, that of vLLM's and Hugging Face transformers' samplers: divide by the
temperature; keep the ``top_k`` largest; softmax over those, add up from the smallest, and drop an
id while the sum up to and including it is at most 1 - top_p (in fp32, as they do). The likeliest id
always stays.

Ties. Exactly ``top_k`` ids are kept, where both of those samplers keep every id that equals the
k-th; which of several equal ones goes is torch.topk's choice. At the boundary of top-p, equal
logits go in the order of a sort, as there. With distinct logits the sets are the same.

A kept set belongs to the logits it was made from. Where the sampler can report its own
(``return_sampling_mask`` of vLLM and SGLang), pass that: recomputed from other numerics or from a
policy that has moved, an id near the boundary falls on the other side, and so may the token itself.
"""

from __future__ import annotations

import numbers

import torch

from grpo_engine.kernels.common import check_float
from grpo_engine.kernels.head_chunks import check_half_gemm, raw_logits
from grpo_engine.kernels.linear_logprobs import check_head
from grpo_engine.kernels.logprobs import check_row_temperature, split_temperature
from grpo_engine.kernels.truncated_mask import kept_bits
from grpo_engine.kernels.vocab_rows import LogitOptions, apply_logit_options, row_chunks

# Elements of logits that are sorted at a time: 64 MB in fp32, and some four times that to sort.
SORT_ELEMENTS = 1 << 24


@torch.no_grad()
def kept_by_sampler_ref(
    logits: torch.Tensor,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    temperature: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """Specification of ``kept_by_sampler``, a row and an id at a time; in fp64 for fp64 logits,
    else fp32. It reads values on the host."""
    num_rows, vocab = logits.shape
    _check_truncation(top_k, top_p, vocab)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    scaled = wide / (temperature[:, None] if torch.is_tensor(temperature) else temperature)
    mask = torch.zeros(num_rows, vocab, dtype=torch.bool, device=logits.device)
    out = torch.full((num_rows, top_k or 1), -1, dtype=torch.int32, device=logits.device)
    for n in range(num_rows):
        likeliest_first = scaled[n].argsort(descending=True, stable=True).tolist()
        candidates = likeliest_first[:top_k] if top_k else likeliest_first
        p = scaled[n][candidates].softmax(0)
        below = torch.zeros_like(p[0])  # what this id and all less likely ones hold
        for place in reversed(range(len(candidates))):
            below = below + p[place]
            if place == 0 or top_p == 1 or below > 1 - top_p:
                mask[n, candidates[place]] = True
        kept = [k for k in candidates if mask[n, k]]
        if 0 < top_k < vocab:
            out[n, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
    return out if 0 < top_k < vocab else kept_bits(mask)


@torch.no_grad()
def linear_kept_by_sampler_ref(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    temperature: float | torch.Tensor = 1.0,
    bias: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float | None = None,
) -> torch.Tensor:
    """Specification of ``linear_kept_by_sampler``: [N, V] logits in fp64 for fp64 inputs, else
    fp32, then ``kept_by_sampler_ref``."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(wide) @ weight.to(wide).T
    if bias is not None:
        logits = logits + bias.to(wide)
    if logit_scale is not None:
        logits = logits * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return kept_by_sampler_ref(logits, top_k=top_k, top_p=top_p, temperature=temperature)


@torch.no_grad()
def kept_by_sampler(
    logits: torch.Tensor,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    temperature: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """The ids that top-k and then top-p keep of each row of ``logits`` [N, V].

    Args:
        logits: fp32, bf16 or fp16; before the temperature.
        top_k: 0 keeps all.
        top_p: in (0, 1]; 1 keeps all.
        temperature: a float or an [N] tensor, > 0. It changes top-p alone.

    Returns:
        With 0 < ``top_k`` < V, ids [N, top_k] int32, likeliest first, -1 after the last; otherwise,
        as their number is not bounded, bits [N, ceil(V / 8)] uint8. Both go to ``kept`` of
        ``linear_logprobs``; see the file for ties.

    Raises:
        ValueError: wrong shape, dtype or option, or options that keep everything.
    """
    check_float("logits", logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape [N, V] with V > 0, got {list(logits.shape)}")
    (num_rows, vocab), device = logits.shape, logits.device
    _check_truncation(top_k, top_p, vocab)
    scalar, per_row = split_temperature(temperature, num_rows, device)
    check_row_temperature(per_row)
    options = LogitOptions(scalar, per_row)
    out = _empty_kept(num_rows, vocab, top_k, device)
    for index in row_chunks(num_rows, max(1, SORT_ELEMENTS // vocab)):
        out[index] = _kept_of_chunk(logits[index].float(), options.rows(index), top_k, top_p)
    return out


@torch.no_grad()
def linear_kept_by_sampler(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    temperature: float | torch.Tensor = 1.0,
    bias: torch.Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float | None = None,
) -> torch.Tensor:
    """``kept_by_sampler`` of the head ``weight`` [V, D] on ``hidden`` [N, D], a chunk of logits
    at a time; the options of the head are those of ``linear_logprobs``."""
    tokens = torch.empty(hidden.shape[:1], dtype=torch.int64, device=hidden.device)
    check_head(hidden, weight, tokens, bias, logit_softcap, logit_scale, None, None)
    (num_rows, _), vocab = hidden.shape, weight.shape[0]
    _check_truncation(top_k, top_p, vocab)
    scalar, per_row = split_temperature(temperature, num_rows, hidden.device)
    check_row_temperature(per_row)
    options = LogitOptions(
        scalar,
        per_row,
        bias,
        1.0 if logit_scale is None else float(logit_scale),
        None if logit_softcap is None else float(logit_softcap),
    )
    out = _empty_kept(num_rows, vocab, top_k, hidden.device)
    check_half_gemm(hidden)
    chunk_rows = min(num_rows, max(1, SORT_ELEMENTS // vocab))
    buffer = torch.empty(chunk_rows, vocab, dtype=torch.float32, device=hidden.device)
    for index in row_chunks(num_rows, max(1, chunk_rows)):
        rows = hidden[index]
        logits = apply_logit_options(raw_logits(rows, weight, buffer[: len(rows)]), options)
        out[index] = _kept_of_chunk(logits, options.rows(index), top_k, top_p)
    return out


def _check_truncation(top_k: int, top_p: float, vocab: int) -> None:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k must be an integer >= 0 (0 keeps all), got {top_k!r}")
    if isinstance(top_p, bool) or not isinstance(top_p, numbers.Real) or not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p!r}")
    if top_p == 1 and not 0 < top_k < vocab:
        raise ValueError(
            f"top_k={top_k} and top_p={top_p} keep all {vocab} ids: leave kept out instead"
        )


def _empty_kept(num_rows: int, vocab: int, top_k: int, device: torch.device) -> torch.Tensor:
    if 0 < top_k < vocab:
        return torch.empty(num_rows, top_k, dtype=torch.int32, device=device)
    return torch.empty(num_rows, -(-vocab // 8), dtype=torch.uint8, device=device)


def _kept_of_chunk(
    logits: torch.Tensor, options: LogitOptions, top_k: int, top_p: float
) -> torch.Tensor:
    """Ids [C, top_k] int32 or bits of fp32 logits [C, V] before the temperature."""
    vocab = logits.shape[1]
    scaled = logits / options.temperature_column()
    if 0 < top_k < vocab:
        values, ids = scaled.topk(top_k, dim=1)
        kept = _above_top_p(values.flip(1), top_p).flip(1)
        return torch.where(kept, ids, -1).to(torch.int32)
    values, ids = scaled.sort(dim=1)
    return kept_bits(
        torch.empty_like(ids, dtype=torch.bool).scatter_(1, ids, _above_top_p(values, top_p))
    )


def _above_top_p(ascending: torch.Tensor, top_p: float) -> torch.Tensor:
    """[C, K] bool: which of the logits, smallest first, top-p keeps."""
    if top_p == 1:
        return torch.ones_like(ascending, dtype=torch.bool)
    kept = ascending.softmax(1).cumsum(1) > 1 - top_p
    kept[:, -1] = True
    return kept
