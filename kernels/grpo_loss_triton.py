"""Triton kernels of the GRPO loss: two launches, whatever the options.

`_token_kernel` (programs over blocks of tokens) or, where one token's loss depends on its whole
sequence, `_sequence_kernel` (grpo_loss_sequence_triton.py) writes gradients and one row of partial
sums a program; both call the one `_token_terms` (grpo_loss_terms_triton.py). `_reduce_kernel` adds
the rows in a fixed order and, where the normaliser is a sum over all tokens, divides by it.

Mask, advantages [N] or [S] and denominator are read as they come. A program of `_token_kernel`
finds the sequences of its block by binary search in `cu_seqlens`, and for a mean over a sequence
counts the masks of each of them anew: a byte a token out of the cache instead of another launch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_engine.kernels.common import LAUNCH_OPTIONS, jit, on_device_of_first, tl, triton
from grpo_engine.kernels.grpo_loss_sequence_triton import _sequence_kernel
from grpo_engine.kernels.grpo_loss_terms_triton import (
    _inverse,
    _mask_of,
    _store_partials,
    _token_terms,
)
from grpo_engine.kernels.loss_options import (
    CLIPPED_LOSSES,
    LOG_RATIO_MAX,
    NUM_METRICS,
    SEQUENCE_MEAN_LOSSES,
    VESPO_RATIO_MIN,
    LossOptions,
    default_denominator,
)

TOKEN_BLOCK = 256
SEQUENCE_BLOCK = 512
NUM_WARPS = 4
PARTIALS = NUM_METRICS + 1  # the loss, then the metrics
PARTIAL_ROW = 16  # floats from one row of partial sums to the next
REDUCE_ROWS = 256
assert PARTIALS <= PARTIAL_ROW


# ---- Which sequence, which weight ----------------------------------------------------------------


@jit
def _sequence_of(position, cu_seqlens_ptr, num_sequences, search_steps):
    """Number of the sequence that holds the token at `position`; `num_sequences` past the last."""
    low = position * 0
    high = low + num_sequences
    for _ in range(search_steps):
        middle = (low + high) // 2
        inside = middle < num_sequences
        ended = tl.load(cu_seqlens_ptr + middle + 1, mask=inside, other=0) <= position
        searching = low < high
        low = tl.where(searching & ended, middle + 1, low)
        high = tl.where(searching & (ended == 0), middle, high)
    return low


@jit
def _mean_weights(
    m, offs, first, mask_ptr, cu_seqlens_ptr, num_tokens, num_sequences, search_steps,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """m / (its sum over the token's sequence), 0 where that is 0, of the block from `first` on. A
    token that no sequence covers gets NaN: loud, where checking cu_seqlens would be a host sync."""
    offs, first = offs.to(tl.int32), first.to(tl.int32)
    last = tl.minimum(first + BLOCK, num_tokens) - 1
    lowest = _sequence_of(first, cu_seqlens_ptr, num_sequences, search_steps)
    highest = _sequence_of(last, cu_seqlens_ptr, num_sequences, search_steps)
    w = tl.full([BLOCK], float("nan"), tl.float32)
    for s in range(lowest, highest + 1):
        exists = s < num_sequences
        start = tl.load(cu_seqlens_ptr + s, mask=exists, other=0).to(tl.int32)
        end = tl.load(cu_seqlens_ptr + s + 1, mask=exists, other=0).to(tl.int32)
        end = tl.minimum(end, num_tokens)
        count = 0.0
        for begin in range(start, end, BLOCK):
            lanes = begin + tl.arange(0, BLOCK)
            count += tl.sum(_mask_of(mask_ptr, lanes, lanes < end, HAS_MASK), 0)
        w = tl.where((offs >= start) & (offs < end), m * _inverse(count), w)
    return w


# ---- First launch: gradients and partial sums ----------------------------------------------------


@jit(do_not_specialize=["num_tokens", "num_sequences", "search_steps"])
def _token_kernel(
    # outputs; the gradients of the entropy follow those of the log-probabilities
    grad_ptr, partial_ptr,
    # inputs
    x_ptr, old_ptr, adv_ptr, weight_ptr, mask_ptr, ref_ptr, sampler_ptr, entropy_ptr,
    cu_seqlens_ptr, denominator_ptr,
    # scalars
    denominator, ratio_low, ratio_high, delta, beta, is_low, is_high, entropy_coef,
    tau_pos, tau_neg, k_pos, lambda_pos, k_neg, lambda_neg, ratio_min, cap,
    # shapes
    num_tokens, num_sequences, search_steps,
    # constexprs
    LOSS: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr, IS: tl.constexpr,
    WEIGHTS: tl.constexpr, ADVANTAGES: tl.constexpr, HAS_DENOMINATOR: tl.constexpr,
    HAS_SEQUENCES: tl.constexpr, HAS_MASK: tl.constexpr, HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr, HAS_SAMPLER: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = row * BLOCK
    offs = first + tl.arange(0, BLOCK)
    inside = offs < num_tokens
    m = _mask_of(mask_ptr, offs, inside, HAS_MASK)
    live = m != 0

    if WEIGHTS == "given":
        w = tl.load(weight_ptr + offs, mask=live, other=0.0)
    else:
        if HAS_DENOMINATOR:
            denominator = tl.load(denominator_ptr).to(tl.float32)
        w = m
        if WEIGHTS == "mean":
            w = _mean_weights(
                m, offs, first, mask_ptr, cu_seqlens_ptr, num_tokens, num_sequences, search_steps,
                HAS_MASK, BLOCK,
            )  # fmt: skip
        w = w / denominator

    if ADVANTAGES == "token":
        adv = tl.load(adv_ptr + offs, mask=live, other=0.0)
    else:
        s = offs.to(tl.int32) * 0
        if HAS_SEQUENCES:
            s = _sequence_of(offs.to(tl.int32), cu_seqlens_ptr, num_sequences, search_steps)
        adv = tl.load(adv_ptr + s, mask=live & (s < num_sequences), other=float("nan"))

    (
        tokens, loss, direct, by_log_ratio,
        kl, entropy, ratio, approx_kl, low, high, region, gap, weight, cut, unscored, phi,
    ) = _token_terms(
        grad_ptr + num_tokens,
        x_ptr, old_ptr, ref_ptr, sampler_ptr, entropy_ptr,
        m, adv, w,
        0.0, 0.0, 0.0,
        ratio_low, ratio_high, delta, beta, is_low, is_high, entropy_coef,
        tau_pos, tau_neg, k_pos, lambda_pos, k_neg, lambda_neg, ratio_min, cap,
        offs, inside,
        LOSS, KL, KL_RATIO, IS, False, False, HAS_OLD, HAS_REF, HAS_SAMPLER, HAS_ENTROPY,
    )  # fmt: skip
    tl.store(grad_ptr + offs, direct + by_log_ratio, mask=inside)
    _store_partials(
        partial_ptr, row, loss, tokens, kl, entropy, ratio, approx_kl, low, high, region,
        gap, weight, cut, unscored, phi, ROW,
    )  # fmt: skip


# ---- Second launch: the sums ---------------------------------------------------------------------


@jit(do_not_specialize=["num_rows", "num_tokens"])
def _reduce_kernel(
    # outputs; the gradients are read as well
    loss_ptr, metric_ptr, grad_ptr,
    # inputs
    partial_ptr,
    # shapes
    num_rows, num_tokens,
    # constexprs
    NORMALISE: tl.constexpr, GRADS: tl.constexpr,
    PARTIALS: tl.constexpr, ROW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of the partial rows, in the same order in every program; with NORMALISE each divides
    its block of the gradients by the mask's, the first one the loss."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, ROW)
    sums = tl.zeros([ROWS, ROW], tl.float32)
    for start in range(0, num_rows, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        there = (rows < num_rows)[:, None] & (columns < PARTIALS)[None, :]
        sums += tl.load(partial_ptr + rows[:, None] * ROW + columns[None, :], mask=there, other=0.0)
    totals = tl.sum(sums, 0)
    scale = 1.0
    if NORMALISE != "none":
        tokens = tl.sum(tl.where(columns == 1, totals, 0.0), 0)
        if NORMALISE == "mean":
            scale = _inverse(tokens)
        else:
            scale = 1.0 / tl.where(tokens < 1.0, 1.0, tokens)
        offs = program * BLOCK + tl.arange(0, BLOCK)
        inside = offs < num_tokens
        for _ in tl.static_range(GRADS):
            grad = tl.load(grad_ptr + offs, mask=inside, other=0.0)
            tl.store(grad_ptr + offs, grad * scale, mask=inside)
            offs += num_tokens
    if program == 0:
        tl.store(loss_ptr + columns, totals * scale, mask=columns == 0)
        is_metric = (columns > 0) & (columns < PARTIALS)
        tl.store(metric_ptr + columns - 1, totals, mask=is_metric)


# ---- Launchers -----------------------------------------------------------------------------------


@jit
def _sequence_weights_kernel(out_ptr, mask_ptr, cu_seqlens_ptr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_seqlens_ptr + row).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + row + 1).to(tl.int64) - first).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        counts += tl.load(mask_ptr + first + start + lanes, mask=start + lanes < length, other=0.0)
    count = tl.sum(counts, 0)
    per_count = tl.where(count > 0, 1.0 / tl.where(count > 0, count, 1.0), 0.0)
    for start in range(0, length, BLOCK):
        inside = start + lanes < length
        m = tl.load(mask_ptr + first + start + lanes, mask=inside, other=0.0)
        tl.store(out_ptr + first + start + lanes, m * per_count, mask=inside)


@on_device_of_first
def sequence_mean_weights_triton(mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """mask [N] fp32 / (its sum over the token's sequence), 0 where that is 0. A token that no
    sequence covers gets NaN: loud, where checking cu_seqlens would be a host sync."""
    out = torch.full_like(mask, math.nan)
    _sequence_weights_kernel[(cu_seqlens.shape[0] - 1,)](
        out,
        mask,
        cu_seqlens.contiguous(),
        BLOCK=SEQUENCE_BLOCK,
        num_warps=NUM_WARPS,
        **LAUNCH_OPTIONS,
    )
    return out


@on_device_of_first
def loss_and_grad_triton(
    x: Tensor,
    old: Tensor | None,
    adv: Tensor,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    ref: Tensor | None,
    sampler: Tensor | None,
    entropy: Tensor | None,
    options: LossOptions,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`loss_and_grad` of grpo_loss.py: two launches where every input is contiguous."""
    num_tokens, o = x.shape[0], options
    num_sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    grads = x.new_empty(1 if entropy is None else 2, num_tokens)
    loss, metric_sums = x.new_empty(()), x.new_empty(NUM_METRICS)
    if num_tokens == 0:
        return loss.zero_(), grads, metric_sums.zero_()
    by_sequence = o.needs_sequence_pass
    num_rows = num_sequences if by_sequence else triton.cdiv(num_tokens, TOKEN_BLOCK)
    partials = x.new_empty(num_rows, PARTIAL_ROW)
    how = weighting(o, weights is not None, cu_seqlens is not None, denominator is not None)
    if denominator is None:
        denominator = default_denominator(o, num_sequences) or 1.0
    if isinstance(denominator, Tensor) and denominator.device != x.device:
        denominator = denominator.item()  # on the CPU: no sync
    has_tensor = isinstance(denominator, Tensor)

    def given(tensor: Tensor | None) -> Tensor:
        return x if tensor is None else tensor.contiguous()  # a pointer that nobody reads

    x = x.contiguous()
    flags = constexprs(
        o,
        how,
        by_token=adv.shape == (num_tokens,),
        denominator=has_tensor,
        sequences=cu_seqlens is not None,
        mask=mask is not None,
        old=old is not None,
        ref=ref is not None,
        sampler=sampler is not None,
        entropy=entropy is not None,
    )
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    optional = [given(tensor) for tensor in (mask, ref, sampler, entropy, cu_seqlens)]
    optional.append(denominator if has_tensor else x)
    scalars = (1.0 if has_tensor else float(denominator), *kernel_scalars(o))
    outputs = (grads, partials)
    launch = {"num_warps": NUM_WARPS, **LAUNCH_OPTIONS}
    inputs = (x, given(old), adv.contiguous())
    if by_sequence:
        _sequence_kernel[(num_rows,)](
            *outputs, *inputs, *optional, *scalars, num_tokens, **flags, **launch
        )
    else:
        shapes = (num_tokens, num_sequences, num_sequences.bit_length())
        _token_kernel[(num_rows,)](
            *outputs, *inputs, given(weights), *optional, *scalars, *shapes, **flags, **launch
        )
    normalise = how.removeprefix("total ") if how.startswith("total") else "none"
    _reduce_kernel[(1 if normalise == "none" else triton.cdiv(num_tokens, TOKEN_BLOCK),)](
        loss,
        metric_sums,
        grads,
        partials,
        num_rows,
        num_tokens,
        **reduce_constexprs(normalise, grads.shape[0]),
        **launch,
    )
    return loss, grads, metric_sums


def weighting(o: LossOptions, given: bool, sequences: bool, denominator: bool) -> str:
    """What a token's weight is before the denominator: the one "given", the "mask", its share of
    the sequence ("mean"); or the mask, divided in the second launch by its sum over all tokens,
    with a single sequence ("total mean") or where there is no denominator ("total tokens")."""
    if given:
        return "given"
    if o.loss_type in SEQUENCE_MEAN_LOSSES:
        return "mean" if sequences or o.needs_sequence_pass else "total mean"
    by_tokens = not denominator and default_denominator(o, 1) is None
    return "total tokens" if by_tokens else "mask"


def kernel_scalars(o: LossOptions) -> tuple[float, ...]:
    ratio_high = o.epsilon_high if o.loss_type == "cispo" else 1 + o.epsilon_high
    return (
        1 - o.epsilon, ratio_high, o.delta, o.beta, *o.is_clip, o.entropy_coef,
        o.sapo_temperature_pos, o.sapo_temperature_neg, o.vespo_k_pos, o.vespo_lambda_pos,
        o.vespo_k_neg, o.vespo_lambda_neg, VESPO_RATIO_MIN, LOG_RATIO_MAX,
    )  # fmt: skip


def constexprs(
    o: LossOptions,
    how: str,
    *,
    by_token: bool,
    denominator: bool,
    sequences: bool,
    mask: bool,
    old: bool,
    ref: bool,
    sampler: bool,
    entropy: bool,
) -> dict[str, object]:
    """Compile-time arguments: which formula and which inputs. Everything numeric stays run-time."""
    level, _, correction = (o.is_correction or "none_none").partition("_")
    by_sequence = o.needs_sequence_pass
    flags = {
        "LOSS": "clip" if o.loss_type in CLIPPED_LOSSES else o.loss_type,
        "KL": o.kl_estimator if ref else "none",
        "KL_RATIO": ref and o.kl_bias_correction,
        "IS": correction,
        "WEIGHTS": "mask" if how.startswith("total") else how,
        "ADVANTAGES": "token" if by_token else "sequence",
        "HAS_DENOMINATOR": denominator,
        "HAS_SEQUENCES": sequences,
        "HAS_MASK": mask,
        "HAS_OLD": old,
        "HAS_REF": ref,
        "HAS_SAMPLER": sampler,
        "HAS_ENTROPY": entropy,
        "ROW": PARTIAL_ROW,
        "BLOCK": SEQUENCE_BLOCK if by_sequence else TOKEN_BLOCK,
    }
    if by_sequence:
        flags["SEQUENCE_RATIO"] = o.importance_level == "sequence"
        flags["SEQUENCE_IS"] = level == "sequence"
    return flags


def reduce_constexprs(normalise: str, grads: int) -> dict[str, object]:
    return {
        "NORMALISE": normalise,
        "GRADS": grads,
        "PARTIALS": PARTIALS,
        "ROW": PARTIAL_ROW,
        "ROWS": REDUCE_ROWS,
        "BLOCK": TOKEN_BLOCK,
    }
