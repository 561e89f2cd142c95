"""Triton kernel of exact_logits.py: one program a row, its few dot products in fp64."""

from __future__ import annotations

from grpo_engine.kernels.common import jit, tl
from grpo_engine.kernels.exp_rows_triton import _agreed
from grpo_engine.kernels.vocab_rows_triton import _log1p, _one_minus_exp

# (BLOCK_D, num_warps) by compute capability: 16 fp64 sums a thread. Not yet timed on a device.
EXACT_BLOCKS = {80: (128, 4), 90: (128, 4), 100: (128, 4)}


@jit
def _expm1(x):
    """exp(x) - 1: the series where that cancels."""
    series = x * (1.0 + x * (0.5 + x * (0.16666667 + x * (0.041666668 + x * 0.0083333338))))
    return tl.where(tl.abs(x) < 0.1, series, tl.exp(x) - 1.0)


@jit
def _tanh_fp64(x):
    decay = tl.exp(-2.0 * tl.abs(x))
    tail = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0.0, -tail, tail)


@jit(do_not_specialize=["stride_shifts_k"])
def _exact_rows_kernel(
    # outputs, [N] fp32
    shifts_ptr,  # [2, N], d_y and R; with it the next two are left as they are
    logprobs_ptr,  # read first, as is the next
    lse_ptr,
    # inputs
    top_ids_ptr,  # [N, 1 + TOP] int32
    top_values_ptr,  # [N, 1 + TOP] fp32
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V]
    temperature_ptr,  # [N]
    row_mask_ptr,  # [N] bytes
    prior_ptr,  # [N] fp32
    safe_ptr,  # [N] bytes
    # scalars
    temperature,
    logit_scale,
    softcap,
    least,
    agree_base,
    agree_slope,
    agree_most,
    # shapes
    D,
    # strides
    stride_shifts_k,
    stride_hidden_n,
    stride_weight_v,
    # constexprs
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ROW_TEMPERATURE: tl.constexpr,
    HAS_ROW_MASK: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_PRIOR: tl.constexpr,
    SHIFTS_ONLY: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if HAS_ROW_MASK:  # noqa: SIM102 - `and` would load the mask where there is none
        if tl.load(row_mask_ptr + row) == 0:
            return
    if HAS_ROW_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row)
    inv_temperature = 1.0 / temperature
    offs_k = tl.arange(0, 16)  # 1 + TOP of them are there
    top = row * (1 + TOP) + offs_k
    is_token = offs_k == 0
    ids = tl.load(top_ids_ptr + top, mask=offs_k <= TOP, other=-1).to(tl.int64)
    values = tl.load(top_values_ptr + top, mask=offs_k <= TOP, other=-float("inf"))
    if SHIFTS_ONLY:
        lse = tl.load(lse_ptr + row)
    else:
        logprob = tl.load(logprobs_ptr + row)
        lse = tl.load(top_values_ptr + row * (1 + TOP)) * inv_temperature - logprob
    p = tl.exp(values * inv_temperature - lse)
    finite = tl.abs(values) < float("inf")  # a NaN is not
    wanted = (ids >= 0) & finite & (is_token | (p > least))

    weight_ptrs = weight_ptr + tl.where(wanted, ids, 0)[:, None] * stride_weight_v
    hidden_ptr += row * stride_hidden_n
    sums = tl.zeros([16, BLOCK_D], dtype=tl.float64)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        hidden = tl.load(hidden_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float64)
        mask = wanted[:, None] & mask_d[None, :]
        weight = tl.load(weight_ptrs + offs_d[None, :], mask=mask, other=0.0).to(tl.float64)
        sums += hidden[None, :] * weight
    exact = tl.sum(sums, axis=1)
    if HAS_BIAS:
        exact += tl.load(bias_ptr + ids, mask=wanted, other=0.0).to(tl.float64)
    exact = exact * logit_scale
    if HAS_SOFTCAP:
        exact = softcap * _tanh_fp64(exact / softcap)
    shifts = tl.where(wanted, (exact - values.to(tl.float64)).to(tl.float32), 0.0) * inv_temperature
    weights = tl.where(wanted & ~is_token, p, 0.0)
    moved = tl.sum(weights * _expm1(shifts), axis=0)
    shift = tl.sum(tl.where(is_token, shifts, 0.0), axis=0)

    if SHIFTS_ONLY:
        tl.store(shifts_ptr + row, shift)
        tl.store(shifts_ptr + stride_shifts_k + row, moved)
    else:
        if HAS_LSE:
            token_p = tl.where(logprob <= 0.0, tl.exp(logprob), 0.0)  # a NaN: an id out of range
            lse_change = _log1p(token_p * _expm1(shift) + moved)
            tl.store(lse_ptr + row, tl.load(lse_ptr + row) + lse_change)
        change = _one_minus_exp(logprob) * _expm1(-shift) + tl.exp(-shift) * moved
        logprob -= _log1p(change)
        if HAS_PRIOR:
            prior = tl.load(prior_ptr + row)
            agreed = _agreed(logprob, prior, agree_base, agree_slope, agree_most)
            agreed = agreed & (tl.load(safe_ptr + row) == 0)
            logprob = tl.where(agreed, prior, logprob)
        tl.store(logprobs_ptr + row, logprob)
