"""Triton kernels of vocab_rows.py: one program reads a row (fold) or a block of it (dlogits).

Sizes, temperature, scale and softcap are run-time arguments: no recompilation as N or they change.
The options that are off cost nothing: their code is compiled out.
"""

from __future__ import annotations

from grpo_engine.kernels.common import jit, tl

# (BLOCK_V, num_warps) by compute capability: 16 fp32 values a thread, no spills
# (tests/test_aot.py). Not yet timed on a device.
FOLD_BLOCKS = {80: (4096, 8), 90: (4096, 8), 100: (4096, 8)}
DLOGITS_BLOCKS = {80: (2048, 4), 90: (2048, 4), 100: (2048, 4)}


@jit
def _log1p(x):
    """log(1 + x) for x >= 0 (Kahan: the rounding of 1 + x is divided out again)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0 without cancellation (Kahan)."""
    u = tl.exp(x)
    log_u = tl.log(tl.where(u == 0.0, 1.0, u))
    ratio = x / tl.where(log_u == 0.0, 1.0, log_u)
    return tl.where(u == 0.0, 1.0, tl.where(u == 1.0, -x, (1.0 - u) * ratio))


@jit
def _tanh(x):
    """tanh to fp32 accuracy: the exponential form, and its series where that form cancels."""
    square = x * x
    series = 1.0 + square * (
        -0.33333333 + square * (0.13333333 + square * (-0.053968254 + square * 0.021869489))
    )
    decay = tl.exp(-2.0 * tl.abs(x))
    tail = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.3, x * series, tl.where(x < 0.0, -tail, tail))


@jit
def _load_logits(
    row_ptr,
    bias_ptr,
    offs_v,
    mask_v,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """softcap * tanh((logits + bias) * logit_scale / softcap) in fp32."""
    logits = tl.load(row_ptr + offs_v, mask=mask_v, other=-float("inf")).to(tl.float32)
    if HAS_BIAS:
        logits += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    logits *= logit_scale
    if HAS_SOFTCAP:
        logits = softcap * _tanh(logits / softcap)
    return logits


@jit
def _row_start(
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
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ROW_TEMPERATURE: tl.constexpr,
):
    """What a program reads of its row first: where its logits are, T, 1 / T, its token, whether
    that is in [0, V), and its logit."""
    temperature += tl.full([], 0.0, dtype=tl.float32)  # a tensor, for div_rn
    if HAS_ROW_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row)
    row_ptr = logits_ptr + row * stride_logits_n
    token = tl.load(token_ids_ptr + row).to(tl.int64)
    in_range = (token >= 0) & (token < V)
    token_logit = _load_logits(
        row_ptr, bias_ptr, token, in_range, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP
    )
    return row_ptr, temperature, 1.0 / temperature, token, in_range, token_logit


@jit
def _online_sums(
    row_ptr,
    bias_ptr,
    token,
    token_logit,
    inv_temperature,
    logit_scale,
    softcap,
    V,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_TOP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One read of a row: its maximum over all k; sums over k != y of e_k = exp(d_k) and (with
    entropy) of e_k d_k, where d_k = (l_k - maximum) / T; and (with top) the largest l_k, k != y,
    that was read at each place of a block, and the start of that block."""
    row_max = token_logit
    others = 0.0
    weighted = 0.0
    best = tl.full([BLOCK_V], -float("inf"), dtype=tl.float32)
    best_start = tl.zeros([BLOCK_V], dtype=tl.int32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        logits = _load_logits(
            row_ptr, bias_ptr, offs_v, mask_v, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP
        )
        # the padding is set to -inf here because softcap makes its -inf finite
        logits = tl.where(mask_v & (offs_v != token), logits, -float("inf"))
        if WITH_TOP:
            best_start = tl.where(logits > best, start, best_start)
            best = tl.where(logits > best, logits, best)
        new_max = tl.maximum(row_max, tl.max(logits, axis=0))
        origin = tl.where(new_max == -float("inf"), 0.0, new_max)
        shifted = (logits - origin) * inv_temperature
        exps = tl.exp(shifted)
        drop = tl.exp((row_max - origin) * inv_temperature)
        if WITH_ENTROPY:
            rebased = weighted + others * (row_max - origin) * inv_temperature
            weighted = tl.where(others == 0.0, 0.0, drop * rebased)
            weighted += tl.sum(exps * tl.where(exps > 0.0, shifted, 0.0), axis=0)
        others = others * drop + tl.sum(exps, axis=0)
        row_max = new_max
    return row_max, others, weighted, best, best_start


@jit
def _store_top(
    ids_ptr,
    values_ptr,
    token,
    in_range,
    token_logit,
    best,
    best_start,
    BLOCK_V: tl.constexpr,
    TOP: tl.constexpr,
):
    """A row of TopLogits (top_logits.py) from what ``_online_sums`` found at each place."""
    tl.store(ids_ptr, tl.where(in_range, token, -1).to(tl.int32))
    tl.store(values_ptr, token_logit)
    # one integer that orders by the logit and holds the column: fp32 bits above, made to order as
    # integers do, and 2^31 - 1 - column below
    bits = best.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    columns = best_start + tl.arange(0, BLOCK_V)
    keys = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - columns).to(tl.int64)
    for place in tl.static_range(TOP):
        key = tl.max(keys, axis=0)
        bits = (key >> 32).to(tl.int32)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        tl.store(ids_ptr + 1 + place, (0x7FFFFFFF - (key & 0x7FFFFFFF)).to(tl.int32))
        tl.store(values_ptr + 1 + place, bits.to(tl.float32, bitcast=True))
        keys = tl.where(keys == key, -0x7FFFFFFFFFFFFFFF, keys)


@jit
def _fold_rows_kernel(
    # outputs, [N] fp32
    logprobs_ptr,
    entropy_ptr,
    lse_ptr,
    row_max_ptr,
    log_sum_ptr,
    top_ids_ptr,  # [N, 1 + TOP] int32
    top_values_ptr,  # [N, 1 + TOP] fp32
    # inputs
    logits_ptr,  # [N, V]
    token_ids_ptr,  # [N]
    bias_ptr,  # [V]
    temperature_ptr,  # [N]
    row_mask_ptr,  # [N] bytes
    # scalars
    temperature,
    logit_scale,
    softcap,
    # shapes
    V,
    # strides
    stride_logits_n,
    # constexprs
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ROW_TEMPERATURE: tl.constexpr,
    HAS_ROW_MASK: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # N * V passes 2^31 at 14,134 rows of 151,936
    if HAS_ROW_MASK:  # noqa: SIM102 - `and` would load the mask where there is none
        if tl.load(row_mask_ptr + row) == 0:
            tl.store(logprobs_ptr + row, 0.0)
            tl.store(lse_ptr + row, 0.0)
            tl.store(row_max_ptr + row, 0.0)
            tl.store(log_sum_ptr + row, 0.0)
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
    row_max, others, weighted, best, best_start = _online_sums(
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
        WITH_ENTROPY,
        TOP > 0,
        BLOCK_V,
    )
    # a product with 1 / T would round twice, by 1e-6 for a token 15 nats down
    token_shifted = tl.div_rn(token_logit - row_max, temperature)
    token_exp = tl.exp(token_shifted)
    log_sum = tl.where(token_shifted == 0.0, _log1p(others), tl.log(others + token_exp))
    # An id outside [0, V) cannot raise from here without a host sync: it gives NaN.
    logprob = tl.where(in_range, token_shifted - log_sum, float("nan"))
    tl.store(logprobs_ptr + row, logprob)
    tl.store(lse_ptr + row, row_max * inv_temperature + log_sum)
    tl.store(row_max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)
    if WITH_ENTROPY:
        weighted += tl.where(token_exp > 0.0, token_exp * token_shifted, 0.0)
        tl.store(entropy_ptr + row, log_sum - weighted / (others + token_exp))
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


@jit
def _dlogits_rows_kernel(
    # output
    dlogits_ptr,  # [N, V]; may be logits_ptr itself
    # inputs
    logits_ptr,  # [N, V]
    token_ids_ptr,  # [N]
    bias_ptr,  # [V]
    temperature_ptr,  # [N]
    row_mask_ptr,  # [N] bytes
    logprobs_ptr,  # [N] fp32, as are all below
    entropy_ptr,
    row_max_ptr,
    log_sum_ptr,
    grad_logprobs_ptr,
    grad_entropy_ptr,
    grad_lse_ptr,
    # scalars
    temperature,
    logit_scale,
    softcap,
    # shapes
    V,
    # strides
    stride_dlogits_n,
    stride_logits_n,
    # constexprs
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ROW_TEMPERATURE: tl.constexpr,
    HAS_ROW_MASK: tl.constexpr,
    HAS_GRAD_ENTROPY: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
    SKIP_MASKED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    out_ptr = dlogits_ptr + row * stride_dlogits_n
    grad_logprob = tl.load(grad_logprobs_ptr + row)
    dead = grad_logprob == 0.0
    grad_entropy = 0.0
    grad_lse = 0.0
    if HAS_GRAD_ENTROPY:
        grad_entropy = tl.load(grad_entropy_ptr + row)
        dead = dead & (grad_entropy == 0.0)
    if HAS_GRAD_LSE:
        grad_lse = tl.load(grad_lse_ptr + row)
        dead = dead & (grad_lse == 0.0)
    if HAS_ROW_MASK:
        masked = tl.load(row_mask_ptr + row) == 0
        if SKIP_MASKED:  # noqa: SIM102 - a constexpr, then a value
            if masked:
                return
        dead = dead | masked
    if dead:
        zeros = tl.zeros([BLOCK_V], dtype=dlogits_ptr.dtype.element_ty)
        tl.store(out_ptr + offs_v, zeros, mask=mask_v)
        return

    if HAS_ROW_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row)
    inv_temperature = 1.0 / temperature
    token = tl.load(token_ids_ptr + row)
    logprob = tl.load(logprobs_ptr + row)
    row_max = tl.load(row_max_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    logits = _load_logits(
        logits_ptr + row * stride_logits_n,
        bias_ptr,
        offs_v,
        mask_v,
        logit_scale,
        softcap,
        HAS_BIAS,
        HAS_SOFTCAP,
    )
    log_p = (logits - row_max) * inv_temperature - log_sum
    p = tl.exp(log_p)
    slope = grad_lse - grad_logprob
    token_slope = grad_lse
    if HAS_GRAD_ENTROPY:
        entropy = tl.load(entropy_ptr + row)
        from_entropy = tl.where(p > 0.0, grad_entropy * (log_p + entropy), 0.0)
        slope -= from_entropy
        token_slope -= from_entropy
    at_token = grad_logprob * _one_minus_exp(logprob) + p * token_slope
    dlogits = tl.where(offs_v == token, at_token, p * slope) * inv_temperature
    if HAS_SOFTCAP:
        capped = logits / softcap
        dlogits *= 1.0 - capped * capped
    dlogits *= logit_scale
    tl.store(out_ptr + offs_v, dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask_v)
