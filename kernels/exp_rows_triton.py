"""Triton kernel of exp_rows.py: one program reads a row of fp32 logits once, and writes it in half.

Everything that needs the whole row (its sums, whether the prior was right, the redoing where it was
not) stays in the one program: no second launch, no flag that the host would have to read.
"""

from __future__ import annotations

from grpo_engine.kernels.common import jit, tl
from grpo_engine.kernels.vocab_rows_triton import (
    _load_logits,
    _log1p,
    _online_sums,
    _row_start,
    _store_top,
)

# (BLOCK_V, num_warps) by compute capability: 8 logits a thread and as many partial sums, no spills
# (tests/test_aot.py). Not yet timed on a device.
EXP_BLOCKS = {80: (1024, 4), 90: (1024, 4), 100: (1024, 4)}


@jit
def _write_exps(
    out_ptr,
    row_ptr,
    bias_ptr,
    token,
    origin,
    anchor,
    inv_temperature,
    logit_scale,
    softcap,
    unit,
    V,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_TOP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Writes unit * e_k * slope_k for k != y, e_k = exp(d_k), d_k = (l_k - origin) / T + anchor;
    returns the sums of e_k and (with entropy) of e_k d_k over k != y, and (with top) what
    ``_online_sums`` does."""
    # a partial sum per place of a block, added up once: the loop has no barrier
    others = tl.zeros([BLOCK_V], dtype=tl.float32)
    weighted = tl.zeros([BLOCK_V], dtype=tl.float32)
    best = tl.full([BLOCK_V], -float("inf"), dtype=tl.float32)
    best_start = tl.zeros([BLOCK_V], dtype=tl.int32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        logits = _load_logits(
            row_ptr, bias_ptr, offs_v, mask_v, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP
        )
        is_other = mask_v & (offs_v != token)
        shifted = (logits - origin) * inv_temperature + anchor
        exps = tl.where(is_other, tl.exp(shifted), 0.0)
        others += exps
        if WITH_ENTROPY:
            weighted += tl.where(exps > 0.0, exps * shifted, 0.0)
        if WITH_TOP:
            candidates = tl.where(is_other, logits, -float("inf"))
            best_start = tl.where(candidates > best, start, best_start)
            best = tl.maximum(best, candidates)
        if HAS_SOFTCAP:
            capped = logits / softcap
            exps *= 1.0 - capped * capped
        # y itself is left to the caller: two stores to one address would race
        tl.store(out_ptr + offs_v, (exps * unit).to(out_ptr.dtype.element_ty), mask=is_other)
    return tl.sum(others, axis=0), tl.sum(weighted, axis=0), best, best_start


@jit
def _agreed(logprob, prior, base, slope, most):
    """Whether they are the same number but for rounding (exp_rows.py)."""
    return tl.abs(logprob - prior) <= tl.minimum(base + slope * tl.abs(prior), most)


@jit
def _exp_rows_kernel(
    # outputs
    exps_ptr,  # [N, V]
    logprobs_ptr,  # [N] fp32, as are the next four
    entropy_ptr,
    total_ptr,
    others_ptr,
    at_token_ptr,
    safe_ptr,  # [N] bytes
    top_ids_ptr,  # [N, 1 + TOP] int32
    top_values_ptr,  # [N, 1 + TOP] fp32
    # inputs
    logits_ptr,  # [N, V]
    token_ids_ptr,  # [N]
    bias_ptr,  # [V]
    temperature_ptr,  # [N]
    row_mask_ptr,  # [N] bytes
    prior_ptr,  # [N] fp32
    # scalars
    temperature,
    logit_scale,
    softcap,
    unit,
    least_total,
    most_total,
    agree_base,
    agree_slope,
    agree_most,
    # shapes
    V,
    # strides
    stride_exps_n,
    stride_logits_n,
    # constexprs
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ROW_TEMPERATURE: tl.constexpr,
    HAS_ROW_MASK: tl.constexpr,
    SKIP_MASKED: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # N * V passes 2^31 at 14,134 rows of 151,936
    out_ptr = exps_ptr + row * stride_exps_n
    if HAS_ROW_MASK:  # noqa: SIM102 - `and` would load the mask where there is none
        if tl.load(row_mask_ptr + row) == 0:
            if not SKIP_MASKED:
                zeros = tl.zeros([BLOCK_V], dtype=exps_ptr.dtype.element_ty)
                for start in range(0, V, BLOCK_V):
                    offs_v = start + tl.arange(0, BLOCK_V)
                    tl.store(out_ptr + offs_v, zeros, mask=offs_v < V)
            tl.store(logprobs_ptr + row, 0.0)
            tl.store(total_ptr + row, 1.0)
            tl.store(others_ptr + row, 0.0)
            tl.store(at_token_ptr + row, 0.0)
            tl.store(safe_ptr + row, 0)
            if WITH_ENTROPY:
                tl.store(entropy_ptr + row, 0.0)
            return
    row_ptr, temperature, inv_temperature, token, in_range, token_logit = _row_start(
        row,
        logits_ptr,
        token_ids_ptr,
        bias_ptr,
        temperature_ptr,
        temperature,
        logit_scale,
        softcap,
        V,
        stride_logits_n,
        HAS_BIAS,
        HAS_SOFTCAP,
        HAS_ROW_TEMPERATURE,
    )
    prior = tl.load(prior_ptr + row)

    # With the prior as log-probability of y, d_y is the prior itself and total is near 1.
    token_shifted = prior
    others = tl.full([], 0.0, dtype=tl.float32)
    weighted = tl.full([], 0.0, dtype=tl.float32)
    best = tl.full([BLOCK_V], -float("inf"), dtype=tl.float32)
    best_start = tl.zeros([BLOCK_V], dtype=tl.int32)
    is_sane = tl.abs(prior) < float("inf")
    if is_sane:
        others, weighted, best, best_start = _write_exps(
            out_ptr,
            row_ptr,
            bias_ptr,
            token,
            token_logit,
            prior,
            inv_temperature,
            logit_scale,
            softcap,
            unit,
            V,
            HAS_BIAS,
            HAS_SOFTCAP,
            WITH_ENTROPY,
            TOP > 0,
            BLOCK_V,
        )
    total = others + tl.exp(token_shifted)
    is_right = is_sane & (total > least_total) & (total < most_total)  # a NaN is neither
    if not is_right:
        row_max, sums, _, _, _ = _online_sums(
            row_ptr,
            bias_ptr,
            token,
            token_logit,
            inv_temperature,
            logit_scale,
            softcap,
            V,
            HAS_BIAS,
            HAS_SOFTCAP,
            False,
            False,
            BLOCK_V,
        )
        token_shifted = (token_logit - row_max) * inv_temperature
        anchor = -tl.log(sums + tl.exp(token_shifted))
        token_shifted += anchor
        others, weighted, best, best_start = _write_exps(
            out_ptr,
            row_ptr,
            bias_ptr,
            token,
            row_max,
            anchor,
            inv_temperature,
            logit_scale,
            softcap,
            unit,
            V,
            HAS_BIAS,
            HAS_SOFTCAP,
            WITH_ENTROPY,
            TOP > 0,
            BLOCK_V,
        )
    token_exp = tl.exp(token_shifted)
    total = others + token_exp

    # where y dominates, log1p keeps what 1 + others would round away
    odds = others / tl.where(token_exp > 0.0, token_exp, 1.0)
    log_total = tl.log(total)
    logprob = tl.where(others < token_exp, -_log1p(odds), token_shifted - log_total)
    if TOP == 0:  # else the logprob is not final: exact_logits.py compares it
        agreed = is_right & _agreed(logprob, prior, agree_base, agree_slope, agree_most)
        logprob = tl.where(agreed, prior, logprob)
    # An id outside [0, V) cannot raise from here without a host sync: it gives NaN.
    tl.store(logprobs_ptr + row, tl.where(in_range, logprob, float("nan")))
    tl.store(total_ptr + row, total)
    tl.store(others_ptr + row, others)
    tl.store(safe_ptr + row, (is_right == 0).to(tl.uint8))
    if WITH_ENTROPY:
        weighted += tl.where(token_exp > 0.0, token_exp * token_shifted, 0.0)
        tl.store(entropy_ptr + row, log_total - weighted / total)
    at_token = -others * unit
    if HAS_SOFTCAP:
        capped_token = token_logit / softcap
        at_token *= 1.0 - capped_token * capped_token
    tl.store(at_token_ptr + row, at_token)
    tl.store(out_ptr + token, at_token.to(exps_ptr.dtype.element_ty), mask=in_range)
    if TOP > 0:
        _store_top(
            top_ids_ptr + row * (1 + TOP),
            top_values_ptr + row * (1 + TOP),
            token,
            in_range,
            token_logit,
            best,
            best_start,
            BLOCK_V,
            TOP,
        )
