"""Portable path of the GRPO loss: the formulas of `grpo_loss.py` as vectorised torch with explicit
derivatives.

Runs on CPU tensors, where a dozen elementwise passes over [N] are nothing beside the model's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_engine.kernels.common import check_no_gradient
from grpo_engine.kernels.loss_options import LOG_RATIO_MAX, METRICS, VESPO_RATIO_MIN, LossOptions


def float_mask(num_tokens: int, loss_mask: Tensor | None, device: torch.device) -> Tensor:
    if loss_mask is None:
        return torch.ones(num_tokens, dtype=torch.float32, device=device)
    return loss_mask.to(torch.float32)


def sequence_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Index [N] of the sequence that each token belongs to; empty sequences own no token."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums [S] fp32 of `values` [N] over each sequence, added in fp64; an empty sequence has 0."""
    offsets = cu_seqlens.long()
    sums = torch.segment_reduce(values.double(), "sum", offsets=offsets, axis=0, unsafe=True)
    return sums.float()


def check_advantages(
    advantages: Tensor, num_tokens: int, device: torch.device, cu_seqlens: Tensor | None
) -> None:
    """ValueError unless fp32 [N] or, one per sequence, [S], on `device` and without gradient."""
    if not isinstance(advantages, Tensor) or advantages.dtype != torch.float32:
        raise ValueError(
            f"advantages must be a float32 tensor, got {getattr(advantages, 'dtype', advantages)}"
        )
    if advantages.device != device:
        raise ValueError(f"advantages is on {advantages.device}, expected {device}")
    check_no_gradient(advantages=advantages)
    num_sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if advantages.shape not in ((num_tokens,), (num_sequences,)):
        raise ValueError(
            f"advantages must have shape [{num_tokens}] (per token) or [{num_sequences}] "
            f"(per sequence), got {list(advantages.shape)}"
        )


def per_token_advantages(advantages: Tensor, num_tokens: int, cu_seqlens: Tensor | None) -> Tensor:
    """Checked advantages [N] or [S] as [N] (N = S: as they are)."""
    if advantages.shape == (num_tokens,):
        return advantages
    if cu_seqlens is None:
        return advantages.expand(num_tokens)
    return advantages[sequence_ids(cu_seqlens, num_tokens)]


def _policy_term(log_ratio: Tensor, x: Tensor, adv: Tensor, o: LossOptions) -> tuple[Tensor, ...]:
    """(p, dp/d ratio, dp/dx at fixed ratio, held at the lower clip, held at the upper clip), each
    [N]."""
    ratio = log_ratio.clamp(max=LOG_RATIO_MAX).exp()
    zero = torch.zeros_like(ratio)
    if o.loss_type == "cispo":
        coefficient = -ratio.clamp(max=o.epsilon_high) * adv
        return (
            coefficient * x,
            zero,
            coefficient,
            zero,
            ((ratio > o.epsilon_high) & (adv > 0)).float(),
        )
    if o.loss_type == "sapo":
        tau = torch.where(adv > 0, o.sapo_temperature_pos, o.sapo_temperature_neg)
        gate = torch.sigmoid(tau * (ratio - 1))
        return gate * (-4 / tau) * adv, -4 * gate * (1 - gate) * adv, zero, zero, zero
    low, high = 1 - o.epsilon, 1 + o.epsilon_high
    unclipped, clipped = ratio.clamp(max=o.delta) * adv, ratio.clamp(low, high) * adv
    # The derivative of min(u, c) is that of the smaller; at a tie half of each, as torch.minimum
    # has it.
    share = torch.where(unclipped < clipped, 1.0, torch.where(unclipped == clipped, 0.5, 0.0))
    slope = share * (ratio <= o.delta) + (1 - share) * ((ratio >= low) & (ratio <= high))
    held_low, held_high = (ratio < low) & (adv < 0), (ratio > high) & (adv > 0)
    return (
        -torch.minimum(unclipped, clipped),
        -adv * slope,
        zero,
        held_low.float(),
        held_high.float(),
    )


def _vespo_weight(
    token_log_ratio: Tensor,
    is_weight: Tensor | None,
    adv: Tensor,
    m: Tensor,
    bounds: Tensor,
    sequence: Tensor,
    o: LossOptions,
) -> Tensor:
    """phi [N] of the ratio of each token's sequence, sampler correction included."""
    log_w = token_log_ratio.clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX)
    if is_weight is not None:
        log_w = log_w + is_weight.clamp(VESPO_RATIO_MIN, math.exp(LOG_RATIO_MAX)).log()
    log_w = segment_sum(log_w * m, bounds).clamp(math.log(VESPO_RATIO_MIN), LOG_RATIO_MAX)
    log_w, ratio = log_w[sequence], log_w.exp()[sequence]
    k = torch.where(adv >= 0, o.vespo_k_pos, o.vespo_k_neg)
    decay = torch.where(adv >= 0, o.vespo_lambda_pos, o.vespo_lambda_neg)
    return (decay + k * log_w - decay * ratio).exp()


def _kl_term(x: Tensor, ref: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """(KL estimate, its derivative in x), each [N]."""
    gap = ref - x
    if estimator == "k1":
        return -gap, torch.ones_like(gap)
    if estimator == "k2":
        return gap.square() / 2, -gap
    beyond = gap > LOG_RATIO_MAX
    gap = gap.clamp(max=LOG_RATIO_MAX)
    odds = gap.exp()
    return odds - gap - 1, torch.where(beyond, 0.0, 1 - odds)


def _sampler_weight(difference: Tensor, o: LossOptions) -> tuple[Tensor, Tensor]:
    """(weight, whether clipping or masking changed it) from log(pi_old / pi_sampler), each [N]."""
    raw = difference.clamp(max=LOG_RATIO_MAX).exp()
    low, high = o.is_clip
    outside = (raw < low) | (raw > high)
    bounded = (
        torch.where(outside, 0.0, raw) if o.is_correction.endswith("mask") else raw.clamp(low, high)
    )
    return bounded, outside.float()


def _sampler_terms(
    old: Tensor,
    sampler: Tensor,
    m: Tensor,
    bounds: Tensor | None,
    sequence: Tensor | None,
    o: LossOptions,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """(weight of the policy term, None without correction; metrics by name), each [N]."""
    unscored = sampler.isnan()
    difference = torch.where(unscored, 0.0, old - sampler)
    metrics = {
        "sampler_unscored": unscored.float(),
        "sampling_logp_difference": difference.abs(),
    }
    if o.is_correction is None:
        return None, metrics
    if o.is_correction.startswith("sequence"):
        difference = segment_sum(difference * m, bounds)[sequence]
    weight, metrics["is_truncated"] = _sampler_weight(difference, o)
    return weight, metrics | {"is_weight_mean": weight}


def loss_and_grad_torch(
    x: Tensor,
    old: Tensor | None,
    adv: Tensor,
    w: Tensor,
    cu_seqlens: Tensor | None,
    m: Tensor,
    ref: Tensor | None,
    sampler: Tensor | None,
    entropy: Tensor | None,
    o: LossOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """`loss_and_grad` of grpo_loss.py, from advantages, weights and mask [N] fp32."""
    live = m != 0  # masked tokens may hold anything, NaN included: a product with 0 would keep it
    x, old, adv, w, ref, sampler, entropy = (
        None if field is None else torch.where(live, field, 0.0)
        for field in (x, old, adv, w, ref, sampler, entropy)
    )
    zero = torch.zeros_like(x)
    sums = dict.fromkeys(METRICS, zero) | {"tokens": torch.ones_like(x)}
    bounds = sequence = None
    if o.needs_sequence_pass:
        bounds = (
            cu_seqlens if cu_seqlens is not None else torch.tensor([0, len(x)], device=x.device)
        )
        sequence = sequence_ids(bounds, len(x))
        counts = segment_sum(m, bounds)
        share = m / torch.where(counts > 0, counts, 1.0)[sequence]

    token_log_ratio = log_ratio = zero if old is None else x - old
    if o.importance_level == "sequence":
        log_ratio = segment_sum(token_log_ratio * share, bounds)[sequence]
    capped = token_log_ratio.clamp(max=LOG_RATIO_MAX)
    sums["approx_kl"] = capped.exp() - 1 - capped
    ratio = log_ratio.clamp(max=LOG_RATIO_MAX).exp()
    sums["ratio_mean"] = ratio

    weight = None
    if sampler is not None:
        anchor = x if old is None else old
        weight, metrics = _sampler_terms(anchor, sampler, m, bounds, sequence, o)
        sums |= metrics
    if o.loss_type == "vespo":
        phi = _vespo_weight(token_log_ratio, weight, adv, m, bounds, sequence, o)
        losses, by_ratio, direct, sums["phi_mean"] = -phi * adv * x, zero, -phi * adv, phi
    else:
        losses, by_ratio, direct, sums["clip_low"], sums["clip_high"] = _policy_term(
            log_ratio, x, adv, o
        )
        sums["clip_region"] = sums["clip_low"] + sums["clip_high"]
        if weight is not None:
            losses, by_ratio, direct = losses * weight, by_ratio * weight, direct * weight
    if ref is not None:
        kl, kl_slope = _kl_term(x, ref, o.kl_estimator)
        corrected = (kl * ratio, kl_slope * ratio) if o.kl_bias_correction else (kl, kl_slope)
        sums["kl"] = corrected[0]
        if o.beta:  # an infinite estimate that is only reported would make the loss 0 * inf
            by_ratio = by_ratio + o.beta * kl if o.kl_bias_correction else by_ratio
            losses, direct = losses + o.beta * corrected[0], direct + o.beta * corrected[1]
    if entropy is not None:
        losses = losses - o.entropy_coef * entropy if o.entropy_coef else losses
        sums["entropy"] = entropy

    by_log_ratio = w * by_ratio * torch.where(log_ratio > LOG_RATIO_MAX, 0.0, ratio)
    if o.importance_level == "sequence":
        by_log_ratio = segment_sum(by_log_ratio, bounds)[sequence] * share
    # not a matrix product: BLAS adds in order, which loses 8e-5 of a mean over 60,000 tokens
    metric_sums = (torch.stack([sums[name] for name in METRICS]) * m).sum(1)
    grads = [w * direct + by_log_ratio] + ([] if entropy is None else [w * -o.entropy_coef])
    return (w * losses).sum(), torch.stack(grads), metric_sums
