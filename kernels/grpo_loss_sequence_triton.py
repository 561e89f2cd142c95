"""Triton kernel of the GRPO loss for options where one token's loss depends on its whole sequence.

One program a sequence, which sweeps its tokens twice (statistics; loss, direct gradient and the
gradient of the sequence's ratio) and, for sequence ratios, a third time to spread the latter.
"""

from __future__ import annotations

from grpo_engine.kernels.common import jit, tl
from grpo_engine.kernels.grpo_loss_terms_triton import (
    _inverse,
    _mask_of,
    _sampler_difference,
    _sampler_weight,
    _store_partials,
    _token_terms,
    _within,
)


@jit
def _fill_nan(
    grad_ptr, start, length, num_tokens, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Gradients of tokens that no sequence covers: loud, where checking cu_seqlens would be a
    host sync."""
    for begin in range(0, length, BLOCK):
        lanes = begin + tl.arange(0, BLOCK)
        nan = tl.full([BLOCK], float("nan"), tl.float32)
        tl.store(grad_ptr + start + lanes, nan, mask=lanes < length)
        if HAS_ENTROPY:
            tl.store(grad_ptr + num_tokens + start + lanes, nan, mask=lanes < length)


@jit(do_not_specialize=["num_tokens"])
def _sequence_kernel(
    # outputs; the gradients of the entropy follow those of the log-probabilities
    grad_ptr, partial_ptr,
    # inputs
    x_ptr, old_ptr, adv_ptr, mask_ptr, ref_ptr, sampler_ptr, entropy_ptr,
    cu_seqlens_ptr, denominator_ptr,
    # scalars
    denominator, ratio_low, ratio_high, delta, beta, is_low, is_high, entropy_coef,
    tau_pos, tau_neg, k_pos, lambda_pos, k_neg, lambda_neg, ratio_min, cap,
    # shapes
    num_tokens,
    # constexprs
    LOSS: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr, IS: tl.constexpr,
    SEQUENCE_RATIO: tl.constexpr, SEQUENCE_IS: tl.constexpr,
    WEIGHTS: tl.constexpr, ADVANTAGES: tl.constexpr, HAS_DENOMINATOR: tl.constexpr,
    HAS_SEQUENCES: tl.constexpr, HAS_MASK: tl.constexpr, HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr, HAS_SAMPLER: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first, end = row * 0, row * 0 + num_tokens
    if HAS_SEQUENCES:
        end = tl.minimum(tl.load(cu_seqlens_ptr + row + 1).to(tl.int64), end)
        first = tl.load(cu_seqlens_ptr + row).to(tl.int64)
        before = tl.where(row == 0, first, 0).to(tl.int32)
        after = tl.where(row == tl.num_programs(0) - 1, num_tokens - end, 0).to(tl.int32)
        _fill_nan(grad_ptr, row * 0, before, num_tokens, HAS_ENTROPY, BLOCK)
        _fill_nan(grad_ptr, end, after, num_tokens, HAS_ENTROPY, BLOCK)
    length = (end - first).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], tl.float32)

    # Sweep 1: the sequence's token count, log-ratios and sampler difference.
    count, log_ratios, differences, log_ws = zero, zero, zero, zero
    for start in range(0, length, BLOCK):
        offs = first + start + lanes
        m = _mask_of(mask_ptr, offs, start + lanes < length, HAS_MASK)
        live = m != 0
        x = tl.load(x_ptr + offs, mask=live, other=0.0)
        old = x
        if HAS_OLD:
            old = tl.load(old_ptr + offs, mask=live, other=0.0)
        count += m
        log_ratios += m * (x - old)
        if SEQUENCE_IS:
            difference, _ = _sampler_difference(x, old, sampler_ptr, offs, live)
            differences += m * difference
        if LOSS == "vespo":
            log_w = _within(x - old, -cap, cap)
            if IS != "none":
                difference, _ = _sampler_difference(x, old, sampler_ptr, offs, live)
                is_weight, _ = _sampler_weight(difference, is_low, is_high, cap, IS)
                log_w += tl.log(_within(is_weight, ratio_min, tl.exp(cap)))
            log_ws += m * log_w
    count_sum = tl.sum(count, 0)
    per_count = _inverse(count_sum)
    sequence_log_ratio = tl.sum(log_ratios, 0) * per_count
    sequence_difference = tl.sum(differences, 0)
    sequence_log_w = tl.sum(log_ws, 0)

    if HAS_DENOMINATOR:
        denominator = tl.load(denominator_ptr).to(tl.float32)
    scale = 1.0 / denominator
    if WEIGHTS == "mean":
        scale = per_count / denominator

    # Sweep 2: losses, metrics, and the gradient that does not go through the sequence's ratio.
    loss, tokens, through, kl, entropy, ratio, approx_kl = zero, zero, zero, zero, zero, zero, zero
    low, high, region, gap, weight, cut, unscored = zero, zero, zero, zero, zero, zero, zero
    phi = zero
    for start in range(0, length, BLOCK):
        offs = first + start + lanes
        inside = start + lanes < length
        m = _mask_of(mask_ptr, offs, inside, HAS_MASK)
        if ADVANTAGES == "token":
            adv = tl.load(adv_ptr + offs, mask=m != 0, other=0.0)
        else:
            adv = zero + tl.load(adv_ptr + row)
        (
            tokens_i, loss_i, direct_i, through_i,
            kl_i, entropy_i, ratio_i, approx_kl_i, low_i, high_i, region_i,
            gap_i, weight_i, cut_i, unscored_i, phi_i,
        ) = _token_terms(
            grad_ptr + num_tokens,
            x_ptr, old_ptr, ref_ptr, sampler_ptr, entropy_ptr,
            m, adv, m * scale,
            sequence_log_ratio, sequence_difference, sequence_log_w,
            ratio_low, ratio_high, delta, beta, is_low, is_high, entropy_coef,
            tau_pos, tau_neg, k_pos, lambda_pos, k_neg, lambda_neg, ratio_min, cap,
            offs, inside,
            LOSS, KL, KL_RATIO, IS, SEQUENCE_RATIO, SEQUENCE_IS,
            HAS_OLD, HAS_REF, HAS_SAMPLER, HAS_ENTROPY,
        )  # fmt: skip
        if SEQUENCE_RATIO:
            through += through_i
        else:
            direct_i += through_i
        tl.store(grad_ptr + offs, direct_i, mask=inside)
        loss += loss_i
        tokens += tokens_i
        kl += kl_i
        entropy += entropy_i
        ratio += ratio_i
        approx_kl += approx_kl_i
        low += low_i
        high += high_i
        region += region_i
        gap += gap_i
        weight += weight_i
        cut += cut_i
        unscored += unscored_i
        phi += phi_i
    _store_partials(
        partial_ptr, row, loss, tokens, kl, entropy, ratio, approx_kl, low, high, region,
        gap, weight, cut, unscored, phi, ROW,
    )  # fmt: skip

    # Sweep 3: d(mean log-ratio)/dx is m / count, the same total for every token of the sequence.
    if SEQUENCE_RATIO:
        tl.debug_barrier()  # sweep 2's stores of grad are read back below
        share = tl.sum(through, 0) * per_count
        for start in range(0, length, BLOCK):
            offs = first + start + lanes
            inside = start + lanes < length
            m = _mask_of(mask_ptr, offs, inside, HAS_MASK)
            direct = tl.load(grad_ptr + offs, mask=inside, other=0.0)
            tl.store(grad_ptr + offs, direct + share * m, mask=inside)
