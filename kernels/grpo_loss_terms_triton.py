"""Formulas of the Triton kernels of the GRPO loss, on blocks of tokens in registers.

`_token_terms` is the whole of grpo_loss.py's maths; the kernels that call it are in
grpo_loss_triton.py. Of a masked token the mask is read and nothing else.
"""

from __future__ import annotations

from grpo_engine.kernels.common import jit, tl


@jit
def _mask_of(mask_ptr, offs, inside, HAS_MASK: tl.constexpr):
    """The loss mask of any dtype, as fp32; 1 without one, 0 outside."""
    if HAS_MASK:
        return tl.load(mask_ptr + offs, mask=inside, other=0).to(tl.float32)
    else:
        return inside.to(tl.float32)


@jit
def _inverse(count):
    """1 / count, and 0 of 0."""
    return tl.where(count > 0, 1.0 / tl.where(count > 0, count, 1.0), 0.0)


@jit
def _at_most(value, cap):
    return tl.where(value > cap, cap, value)  # keeps NaN, which tl.minimum would drop


@jit
def _within(value, low, high):
    return _at_most(tl.where(value < low, low, value), high)


@jit
def _scaled(coefficient, value):
    """coefficient * value, and 0 for a coefficient of 0 even where the value is infinite."""
    return tl.where(coefficient == 0.0, 0.0, coefficient * value)


@jit
def _policy_term(
    ratio, x, adv, ratio_low, ratio_high, delta, tau_pos, tau_neg, LOSS: tl.constexpr
):  # fmt: skip
    """(p, dp/d ratio, dp/dx at fixed ratio, held at the lower clip, held at the upper clip)."""
    zero = tl.zeros_like(ratio)
    if LOSS == "cispo":
        coefficient = -_at_most(ratio, ratio_high) * adv
        held_high = ((ratio > ratio_high) & (adv > 0)).to(tl.float32)
        return coefficient * x, zero, coefficient, zero, held_high
    elif LOSS == "sapo":
        tau = tl.where(adv > 0, tau_pos, tau_neg)
        gate = tl.sigmoid(tau * (ratio - 1))
        return gate * (-4 / tau) * adv, -4 * gate * (1 - gate) * adv, zero, zero, zero
    else:
        unclipped = _at_most(ratio, delta) * adv
        clipped = _within(ratio, ratio_low, ratio_high) * adv
        # The derivative of min(u, c) is that of the smaller; at a tie half of each, as
        # torch.minimum has it.
        share = tl.where(unclipped < clipped, 1.0, tl.where(unclipped == clipped, 0.5, 0.0))
        inside = ((ratio >= ratio_low) & (ratio <= ratio_high)).to(tl.float32)
        slope = share * (ratio <= delta).to(tl.float32) + (1 - share) * inside
        held_low = ((ratio < ratio_low) & (adv < 0)).to(tl.float32)
        held_high = ((ratio > ratio_high) & (adv > 0)).to(tl.float32)
        return -tl.minimum(unclipped, clipped), -adv * slope, zero, held_low, held_high


@jit
def _kl_term(gap, cap, KL: tl.constexpr):
    """(KL estimate, its derivative in x) from gap = ref - x."""
    if KL == "k1":
        return -gap, tl.full(gap.shape, 1.0, tl.float32)
    elif KL == "k2":
        return gap * gap / 2, -gap
    else:
        capped = _at_most(gap, cap)
        odds = tl.exp(capped)
        return odds - capped - 1, tl.where(gap > cap, 0.0, 1 - odds)


@jit
def _sampler_difference(x, old, sampler_ptr, offs, live):
    """(log(pi_old / pi_sampler), whether the sampler left the token unscored); 0 where unscored."""
    sampler = tl.load(sampler_ptr + offs, mask=live, other=0.0)
    unscored = sampler != sampler
    return tl.where(unscored | (live == 0), 0.0, old - sampler), unscored.to(tl.float32)


@jit
def _sampler_weight(log_weight, is_low, is_high, cap, IS: tl.constexpr):
    """(bounded weight, whether clipping or masking changed it) of log(pi_old / pi_sampler)."""
    raw = tl.exp(_at_most(log_weight, cap))
    outside = (raw < is_low) | (raw > is_high)
    if IS == "mask":
        return tl.where(outside, 0.0, raw), outside
    else:
        return _within(raw, is_low, is_high), outside


@jit
def _vespo_weight(log_w, adv, k_pos, lambda_pos, k_neg, lambda_neg, ratio_min, cap):
    """phi from the sum of the sequence's log-ratios."""
    log_w = _within(log_w, tl.log(ratio_min), cap)
    k = tl.where(adv >= 0, k_pos, k_neg)
    decay = tl.where(adv >= 0, lambda_pos, lambda_neg)
    return tl.exp(decay + k * log_w - decay * tl.exp(log_w))


@jit
def _token_terms(
    # outputs
    grad_entropy_ptr,
    # inputs
    x_ptr, old_ptr, ref_ptr, sampler_ptr, entropy_ptr,
    # of each token: mask, advantage, weight
    m, adv, w,
    # statistics of the token's sequence; read only under the SEQUENCE_ flags and for vespo
    sequence_log_ratio, sequence_difference, sequence_log_w,
    # scalars
    ratio_low, ratio_high, delta, beta, is_low, is_high, entropy_coef,
    tau_pos, tau_neg, k_pos, lambda_pos, k_neg, lambda_neg, ratio_min, cap,
    # which tokens
    offs, inside,
    # constexprs
    LOSS: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr, IS: tl.constexpr,
    SEQUENCE_RATIO: tl.constexpr, SEQUENCE_IS: tl.constexpr,
    HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
    HAS_SAMPLER: tl.constexpr, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """(mask, w l, w dl/dx at fixed ratio, w dl/d log ratio, then the metrics of
    loss_options.METRICS[1:])."""
    live = m != 0
    x = tl.load(x_ptr + offs, mask=live, other=0.0)
    adv = tl.where(live, adv, 0.0)
    w = tl.where(live, w, 0.0)
    zero = tl.zeros_like(x)

    old = x
    if HAS_OLD:
        old = tl.load(old_ptr + offs, mask=live, other=0.0)
    log_ratio = x - old
    capped = _at_most(log_ratio, cap)
    approx_kl = tl.exp(capped) - 1 - capped
    if SEQUENCE_RATIO:
        log_ratio = zero + sequence_log_ratio
    ratio = tl.exp(_at_most(log_ratio, cap))
    phi = zero
    if LOSS == "vespo":
        phi = _vespo_weight(
            zero + sequence_log_w, adv, k_pos, lambda_pos, k_neg, lambda_neg, ratio_min, cap
        )
        loss, by_ratio, direct, held_low, held_high = -phi * adv * x, zero, -phi * adv, zero, zero
    else:
        loss, by_ratio, direct, held_low, held_high = _policy_term(
            ratio, x, adv, ratio_low, ratio_high, delta, tau_pos, tau_neg, LOSS
        )

    difference, unscored, is_weight, is_cut = zero, zero, zero, zero
    if HAS_SAMPLER:
        difference, unscored = _sampler_difference(x, old, sampler_ptr, offs, live)
    if IS != "none":
        log_weight = difference
        if SEQUENCE_IS:
            log_weight = zero + sequence_difference
        is_weight, outside = _sampler_weight(log_weight, is_low, is_high, cap, IS)
        is_cut = outside.to(tl.float32)
        if LOSS != "vespo":
            loss, by_ratio, direct = loss * is_weight, by_ratio * is_weight, direct * is_weight

    kl = zero
    if HAS_REF:
        kl, kl_slope = _kl_term(tl.load(ref_ptr + offs, mask=live, other=0.0) - x, cap, KL)
        if KL_RATIO:
            by_ratio += _scaled(beta, kl)
            kl, kl_slope = kl * ratio, kl_slope * ratio
        loss += _scaled(beta, kl)
        direct += _scaled(beta, kl_slope)

    entropy = zero
    if HAS_ENTROPY:
        entropy = tl.load(entropy_ptr + offs, mask=live, other=0.0)
        loss -= _scaled(entropy_coef, entropy)
        tl.store(grad_entropy_ptr + offs, -entropy_coef * w, mask=inside)

    by_log_ratio = by_ratio * tl.where(log_ratio > cap, 0.0, ratio)
    return (
        m, w * loss, w * direct, w * by_log_ratio,
        m * kl, m * entropy, m * ratio, m * approx_kl,
        m * held_low, m * held_high, m * (held_low + held_high),
        m * tl.abs(difference), m * is_weight, m * is_cut, m * unscored, m * phi,
    )  # fmt: skip


@jit
def _store_partials(
    partial_ptr, row, loss, tokens, kl, entropy, ratio, approx_kl, low, high, region,
    gap, weight, cut, unscored, phi, ROW: tl.constexpr,
):  # fmt: skip
    partial_ptr += row * ROW
    tl.store(partial_ptr, tl.sum(loss, 0))
    tl.store(partial_ptr + 1, tl.sum(tokens, 0))
    tl.store(partial_ptr + 2, tl.sum(kl, 0))
    tl.store(partial_ptr + 3, tl.sum(entropy, 0))
    tl.store(partial_ptr + 4, tl.sum(ratio, 0))
    tl.store(partial_ptr + 5, tl.sum(approx_kl, 0))
    tl.store(partial_ptr + 6, tl.sum(low, 0))
    tl.store(partial_ptr + 7, tl.sum(high, 0))
    tl.store(partial_ptr + 8, tl.sum(region, 0))
    tl.store(partial_ptr + 9, tl.sum(gap, 0))
    tl.store(partial_ptr + 10, tl.sum(weight, 0))
    tl.store(partial_ptr + 11, tl.sum(cut, 0))
    tl.store(partial_ptr + 12, tl.sum(unscored, 0))
    tl.store(partial_ptr + 13, tl.sum(phi, 0))
