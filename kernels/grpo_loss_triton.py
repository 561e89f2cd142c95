"""Triton kernels of the GRPO loss; the formulas and what is saved are in `grpo_loss.py`.

`_token_kernel`: programs over blocks of tokens. `_sequence_kernel`: one program per sequence, for
options where one token's loss depends on its whole sequence; it sweeps its tokens twice
(statistics; loss, direct gradient and the gradient of the sequence's ratio) and, for sequence
ratios, a third time to spread the latter. Both call the one `_token_terms`, read a masked token's
mask and nothing else of it, and write one row of partial sums.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_engine.kernels.common import LAUNCH_OPTIONS, jit, on_device_of_first, tl, triton
from grpo_engine.kernels.loss_options import (
    CLIPPED_LOSSES,
    LOG_RATIO_MAX,
    NUM_METRICS,
    VESPO_RATIO_MIN,
    LossOptions,
)

TOKEN_BLOCK = 1024
SEQUENCE_BLOCK = 512
NUM_WARPS = 4
PARTIALS = NUM_METRICS + 1  # the loss, then the metrics


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
    x_ptr, old_ptr, adv_ptr, weight_ptr, mask_ptr, ref_ptr, sampler_ptr, entropy_ptr,
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
    m = tl.load(mask_ptr + offs, mask=inside, other=0.0)
    live = m != 0
    x = tl.load(x_ptr + offs, mask=live, other=0.0)
    adv = tl.load(adv_ptr + offs, mask=live, other=0.0)
    w = tl.load(weight_ptr + offs, mask=live, other=0.0)
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
    gap, weight, cut, unscored, phi, PARTIALS: tl.constexpr,
):  # fmt: skip
    partial_ptr += row * PARTIALS
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


@jit(do_not_specialize=["num_tokens"])
def _token_kernel(
    # outputs
    grad_ptr, grad_entropy_ptr, partial_ptr,
    # inputs
    x_ptr, old_ptr, adv_ptr, weight_ptr, mask_ptr, ref_ptr, sampler_ptr, entropy_ptr,
    # scalars
    ratio_low, ratio_high, delta, beta, is_low, is_high, entropy_coef,
    tau_pos, tau_neg, k_pos, lambda_pos, k_neg, lambda_neg, ratio_min, cap,
    # shapes
    num_tokens,
    # constexprs
    LOSS: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr, IS: tl.constexpr,
    HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
    HAS_SAMPLER: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    PARTIALS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = row * BLOCK + tl.arange(0, BLOCK)
    inside = offs < num_tokens
    (
        tokens, loss, direct, by_log_ratio,
        kl, entropy, ratio, approx_kl, low, high, region, gap, weight, cut, unscored, phi,
    ) = _token_terms(
        grad_entropy_ptr,
        x_ptr, old_ptr, adv_ptr, weight_ptr, mask_ptr, ref_ptr, sampler_ptr, entropy_ptr,
        0.0, 0.0, 0.0,
        ratio_low, ratio_high, delta, beta, is_low, is_high, entropy_coef,
        tau_pos, tau_neg, k_pos, lambda_pos, k_neg, lambda_neg, ratio_min, cap,
        offs, inside,
        LOSS, KL, KL_RATIO, IS, False, False, HAS_OLD, HAS_REF, HAS_SAMPLER, HAS_ENTROPY,
    )  # fmt: skip
    tl.store(grad_ptr + offs, direct + by_log_ratio, mask=inside)
    _store_partials(
        partial_ptr, row, loss, tokens, kl, entropy, ratio, approx_kl, low, high, region,
        gap, weight, cut, unscored, phi, PARTIALS,
    )  # fmt: skip


@jit
def _sequence_kernel(
    # outputs
    grad_ptr, grad_entropy_ptr, partial_ptr,
    # inputs
    x_ptr, old_ptr, adv_ptr, weight_ptr, mask_ptr, ref_ptr, sampler_ptr, entropy_ptr,
    cu_seqlens_ptr,
    # scalars
    ratio_low, ratio_high, delta, beta, is_low, is_high, entropy_coef,
    tau_pos, tau_neg, k_pos, lambda_pos, k_neg, lambda_neg, ratio_min, cap,
    # constexprs
    LOSS: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr, IS: tl.constexpr,
    SEQUENCE_RATIO: tl.constexpr, SEQUENCE_IS: tl.constexpr,
    HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
    HAS_SAMPLER: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    PARTIALS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_seqlens_ptr + row).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + row + 1).to(tl.int64) - first).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], tl.float32)

    # Sweep 1: the sequence's token count, log-ratios and sampler difference.
    count, log_ratios, differences, log_ws = zero, zero, zero, zero
    for start in range(0, length, BLOCK):
        offs = first + start + lanes
        m = tl.load(mask_ptr + offs, mask=start + lanes < length, other=0.0)
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
    per_count = tl.where(count_sum > 0, 1.0 / tl.where(count_sum > 0, count_sum, 1.0), 0.0)
    sequence_log_ratio = tl.sum(log_ratios, 0) * per_count
    sequence_difference = tl.sum(differences, 0)
    sequence_log_w = tl.sum(log_ws, 0)

    # Sweep 2: losses, metrics, and the gradient that does not go through the sequence's ratio.
    loss, tokens, through, kl, entropy, ratio, approx_kl = zero, zero, zero, zero, zero, zero, zero
    low, high, region, gap, weight, cut, unscored = zero, zero, zero, zero, zero, zero, zero
    phi = zero
    for start in range(0, length, BLOCK):
        offs = first + start + lanes
        inside = start + lanes < length
        (
            tokens_i, loss_i, direct_i, through_i,
            kl_i, entropy_i, ratio_i, approx_kl_i, low_i, high_i, region_i,
            gap_i, weight_i, cut_i, unscored_i, phi_i,
        ) = _token_terms(
            grad_entropy_ptr,
            x_ptr, old_ptr, adv_ptr, weight_ptr, mask_ptr, ref_ptr, sampler_ptr, entropy_ptr,
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
        gap, weight, cut, unscored, phi, PARTIALS,
    )  # fmt: skip

    # Sweep 3: d(mean log-ratio)/dx is m / count, the same total for every token of the sequence.
    if SEQUENCE_RATIO:
        tl.debug_barrier()  # sweep 2's stores of grad are read back below
        share = tl.sum(through, 0) * per_count
        for start in range(0, length, BLOCK):
            offs = first + start + lanes
            inside = start + lanes < length
            m = tl.load(mask_ptr + offs, mask=inside, other=0.0)
            direct = tl.load(grad_ptr + offs, mask=inside, other=0.0)
            tl.store(grad_ptr + offs, direct + share * m, mask=inside)


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
    w: Tensor,
    cu_seqlens: Tensor | None,
    m: Tensor,
    ref: Tensor | None,
    sampler: Tensor | None,
    entropy: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(loss, grad_logprobs [N], grad_entropy [N] | None, metric_sums [K]); all inputs contiguous
    fp32 [N]."""
    num_tokens = x.shape[0]
    o = options
    by_sequence = o.needs_sequence_pass
    if by_sequence and cu_seqlens is None:
        cu_seqlens = torch.arange(2, device=x.device, dtype=torch.int32) * num_tokens
    num_rows = cu_seqlens.shape[0] - 1 if by_sequence else triton.cdiv(num_tokens, TOKEN_BLOCK)
    # As in sequence_mean_weights_triton, what no sequence covers stays NaN.
    grad = torch.full_like(x, math.nan) if by_sequence else torch.empty_like(x)
    grad_entropy = None if entropy is None else torch.empty_like(x)
    if num_tokens == 0 or num_rows == 0:
        return x.new_zeros(()), grad.zero_(), grad_entropy, x.new_zeros(NUM_METRICS)
    partials = torch.empty(num_rows, PARTIALS, device=x.device, dtype=torch.float32)

    def given(tensor: Tensor | None) -> Tensor:
        return x if tensor is None else tensor  # a valid pointer that its HAS_ flag leaves unread

    fields = (x, given(old), adv, w, m, given(ref), given(sampler), given(entropy))
    ratio_high = o.epsilon_high if o.loss_type == "cispo" else 1 + o.epsilon_high
    scalars = (
        1 - o.epsilon, ratio_high, o.delta, o.beta, *o.is_clip, o.entropy_coef,
        o.sapo_temperature_pos, o.sapo_temperature_neg, o.vespo_k_pos, o.vespo_lambda_pos,
        o.vespo_k_neg, o.vespo_lambda_neg, VESPO_RATIO_MIN, LOG_RATIO_MAX,
    )  # fmt: skip
    outputs = (grad, given(grad_entropy), partials)
    flags = constexprs(
        o, old is not None, ref is not None, sampler is not None, entropy is not None, by_sequence
    )
    if by_sequence:
        _sequence_kernel[(num_rows,)](
            *outputs,
            *fields,
            cu_seqlens.contiguous(),
            *scalars,
            **flags,
            num_warps=NUM_WARPS,
            **LAUNCH_OPTIONS,
        )
    else:
        _token_kernel[(num_rows,)](
            *outputs, *fields, *scalars, num_tokens, **flags, num_warps=NUM_WARPS, **LAUNCH_OPTIONS
        )
    return partials[:, 0].sum(), grad, grad_entropy, partials[:, 1:].sum(0)


def constexprs(
    o: LossOptions,
    has_old: bool,
    has_ref: bool,
    has_sampler: bool,
    has_entropy: bool,
    by_sequence: bool,
) -> dict[str, object]:
    """Compile-time arguments: which formula and which inputs. Everything numeric stays run-time."""
    level, _, how = (o.is_correction or "none_none").partition("_")
    flags = {
        "LOSS": "clip" if o.loss_type in CLIPPED_LOSSES else o.loss_type,
        "KL": o.kl_estimator if has_ref else "none",
        "KL_RATIO": has_ref and o.kl_bias_correction,
        "IS": how,
        "HAS_OLD": has_old,
        "HAS_REF": has_ref,
        "HAS_SAMPLER": has_sampler,
        "HAS_ENTROPY": has_entropy,
        "PARTIALS": PARTIALS,
        "BLOCK": SEQUENCE_BLOCK if by_sequence else TOKEN_BLOCK,
    }
    if by_sequence:
        flags["SEQUENCE_RATIO"] = o.importance_level == "sequence"
        flags["SEQUENCE_IS"] = level == "sequence"
    return flags
