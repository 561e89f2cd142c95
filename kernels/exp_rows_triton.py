"""Triton kernel of exp_rows.py: one program reads a row of fp32 logits once, and writes it in half.

Everything that needs the whole row (its sums, whether the prior was right, the redoing where it was
not) stays in the one program: no second launch, no flag that the host would have to read.
"""

from __future__ import annotations

from grpo_engine.kernels.common import jit, tl
from grpo_engine.kernels.vocab_rows_triton import _load_logits, _log1p, _online_sums

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
    BLOCK_V: tl.constexpr,
):
    """Writes unit * e_k * slope_k for k != y, e_k = exp(d_k), d_k = (l_k - origin) / T + anchor;
    returns the sums of e_k and (with entropy) of e_k d_k over k != y."""
    # a partial sum per place of a block, added up once: the loop has no barrier
    others = tl.zeros([BLOCK_V], dtype=tl.float32)
    weighted = tl.zeros([BLOCK_V], dtype=tl.float32)
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
        if HAS_SOFTCAP:
            capped = logits / softcap
            exps *= 1.0 - capped * capped
        # y itself is left to the caller: two stores to one address would race
        tl.store(out_ptr + offs_v, (exps * unit).to(out_ptr.dtype.element_ty), mask=is_other)
    return tl.sum(others, axis=0), tl.sum(weighted, axis=0)


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
    if HAS_ROW_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row)
    inv_temperature = 1.0 / temperature
    row_ptr = logits_ptr + row * stride_logits_n
    token = tl.load(token_ids_ptr + row).to(tl.int64)
    in_range = (token >= 0) & (token < V)
    token_logit = _load_logits(
        row_ptr, bias_ptr, token, in_range, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP
    )
    prior = tl.load(prior_ptr + row)

    # With the prior as log-probability of y, d_y is the prior itself and total is near 1.
    token_shifted = prior
    others = tl.full([], 0.0, dtype=tl.float32)
    weighted = tl.full([], 0.0, dtype=tl.float32)
    is_sane = tl.abs(prior) < float("inf")
    if is_sane:
        others, weighted = _write_exps(
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
            BLOCK_V,
        )
    total = others + tl.exp(token_shifted)
    is_right = is_sane & (total > least_total) & (total < most_total)  # a NaN is neither
    if not is_right:
        row_max, sums, _ = _online_sums(
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
            BLOCK_V,
        )
        token_shifted = (token_logit - row_max) * inv_temperature
        anchor = -tl.log(sums + tl.exp(token_shifted))
        token_shifted += anchor
        others, weighted = _write_exps(
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
            BLOCK_V,
        )
    token_exp = tl.exp(token_shifted)
    total = others + token_exp

    # where y dominates, log1p keeps what 1 + others would round away
    odds = others / tl.where(token_exp > 0.0, token_exp, 1.0)
    log_total = tl.log(total)
    logprob = tl.where(others < token_exp, -_log1p(odds), token_shifted - log_total)
    agreed = tl.minimum(agree_base + agree_slope * tl.abs(prior), agree_most)
    confirmed = is_right & (tl.abs(logprob - prior) <= agreed)
    logprob = tl.where(confirmed, prior, logprob)
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
