"""Specification of `grpo_loss` in plain torch: the formulas of `grpo_loss.py`, one sequence at a
time, derivatives by autograd. Tests hold every fast path against it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_engine.kernels.loss_options import (
    CLIPPED_LOSSES,
    LOG_RATIO_MAX,
    METRICS,
    VESPO_RATIO_MIN,
    LossMetrics,
    LossOptions,
    check_denominator,
    check_needed_fields,
    make_loss_options,
    metric_names,
    refuse_unknown_options,
)


def grpo_loss_ref(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    loss_mask: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    denominator: float | Tensor | None = None,
    **option_values,
) -> tuple[Tensor, LossMetrics]:
    """Specification of `grpo_loss`, same arguments: one sequence at a time, derivatives by
    autograd, in the dtype of `logprobs` (fp32 or fp64). Reads tensor values on the host; for tests
    and small inputs."""
    refuse_unknown_options("grpo_loss_ref", option_values)
    o = make_loss_options(**option_values)
    check_denominator(o, denominator)
    optional = {
        "ref_logprobs": ref_logprobs,
        "sampler_logprobs": sampler_logprobs,
        "entropy": entropy,
    }
    check_needed_fields(o, optional)
    num_tokens = logprobs.shape[0]
    ends = [0, num_tokens] if cu_seqlens is None else cu_seqlens.tolist()
    mask = torch.ones_like(logprobs) if loss_mask is None else loss_mask.to(logprobs.dtype)
    if advantages.shape[0] != num_tokens:
        lengths = torch.tensor(ends, device=logprobs.device).diff()
        advantages = advantages.repeat_interleave(lengths)
    num_sequences = len(ends) - 1
    if denominator is None:
        if o.loss_type in ("grpo", "sapo", "luspo"):
            denominator = num_sequences
        elif o.loss_type == "dr_grpo":
            denominator = num_sequences * o.max_completion_length
        else:
            denominator = max(mask.sum().item(), 1)

    loss = logprobs[:0].sum()  # 0 with a graph, also where every token is masked
    sums = {name: logprobs.new_zeros(()) for name in METRICS}
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        keep = mask[start:end] != 0  # masked tokens are cut out, so what they hold cannot matter
        if not keep.any():
            continue

        def cut(x: Tensor | None, start: int = start, end: int = end, keep: Tensor = keep):
            return None if x is None else x[start:end][keep]

        m = cut(mask)
        fields = (logprobs, old_logprobs, advantages, *optional.values())
        losses, per_token = _sequence_loss_ref(m, *map(cut, fields), o)
        scale = m.sum() if o.loss_type in ("grpo", "sapo") else 1.0
        loss = loss + (losses * m).sum() / scale / denominator
        for name, values in per_token.items():
            sums[name] = sums[name] + (values.detach() * m).sum()
    names = metric_names(
        o,
        has_ref=ref_logprobs is not None,
        has_entropy=entropy is not None,
        has_sampler=sampler_logprobs is not None,
    )
    return loss, LossMetrics(torch.stack([sums[name] for name in METRICS]), names)


def _sequence_loss_ref(
    m: Tensor,
    x: Tensor,
    old: Tensor | None,
    adv: Tensor,
    ref: Tensor | None,
    sampler: Tensor | None,
    entropy: Tensor | None,
    o: LossOptions,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses [T] and metrics {name: [T]} of the masked-in tokens of one sequence."""
    old = x.detach() if old is None else old
    log_ratio = x - old
    ratio = log_ratio.clamp(max=LOG_RATIO_MAX).exp()
    if o.importance_level == "sequence":
        mean = (log_ratio * m).sum() / m.sum()
        ratio = mean.clamp(max=LOG_RATIO_MAX).exp().expand_as(x)
    metrics = _ratio_metrics_ref(ratio, log_ratio, adv, o)
    weight = None
    if sampler is not None:
        metrics["sampler_unscored"] = sampler.isnan().to(x.dtype)
        difference = (old - sampler).detach().nan_to_num(nan=0.0)
        metrics["sampling_logp_difference"] = difference.abs()
    if o.is_correction is not None:
        if o.is_correction.startswith("sequence"):
            difference = (difference * m).sum().expand_as(x)
        raw = difference.clamp(max=LOG_RATIO_MAX).exp()
        low, high = o.is_clip
        outside = (raw < low) | (raw > high)
        is_masking = o.is_correction.endswith("mask")
        weight = raw.masked_fill(outside, 0.0) if is_masking else raw.clamp(low, high)
        metrics["is_weight_mean"] = weight
        metrics["is_truncated"] = outside.to(x.dtype)
    if o.loss_type == "vespo":
        phi = metrics["phi_mean"] = _vespo_weight_ref(log_ratio, weight, m, adv, o)
        losses = -phi * adv * x
    else:
        losses = _policy_loss_ref(ratio, x, adv, o)
        losses = losses if weight is None else losses * weight
    if ref is not None:
        gap = ref - x
        capped = gap.clamp(max=LOG_RATIO_MAX)
        kl = {"k1": -gap, "k2": gap.square() / 2, "k3": capped.exp() - capped - 1}[o.kl_estimator]
        kl = kl * ratio if o.kl_bias_correction else kl
        losses = losses + o.beta * kl if o.beta else losses  # 0 * inf is no part of the loss
        metrics["kl"] = kl
    if entropy is not None:
        losses = losses - o.entropy_coef * entropy if o.entropy_coef else losses
        metrics["entropy"] = entropy
    return losses, metrics


def _vespo_weight_ref(
    log_ratio: Tensor, is_weight: Tensor | None, m: Tensor, adv: Tensor, o: LossOptions
) -> Tensor:
    """phi [T] of one sequence: a gamma density's shape in its ratio w, 1 at w = 1; a constant."""
    log_w = log_ratio.detach().clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX)
    if is_weight is not None:
        log_w = log_w + is_weight.clamp(VESPO_RATIO_MIN, math.exp(LOG_RATIO_MAX)).log()
    log_w = (log_w * m).sum().clamp(math.log(VESPO_RATIO_MIN), LOG_RATIO_MAX)
    side = adv >= 0
    k = torch.full_like(adv, o.vespo_k_pos).where(side, o.vespo_k_neg)
    decay = torch.full_like(adv, o.vespo_lambda_pos).where(side, o.vespo_lambda_neg)
    return (decay + k * log_w - decay * log_w.exp()).exp()


def _ratio_metrics_ref(
    ratio: Tensor, token_log_ratio: Tensor, adv: Tensor, o: LossOptions
) -> dict[str, Tensor]:
    log_ratio = token_log_ratio.clamp(max=LOG_RATIO_MAX)
    metrics = {
        "tokens": torch.ones_like(ratio),
        "ratio_mean": ratio,
        "approx_kl": log_ratio.exp() - 1 - log_ratio,
    }
    if o.loss_type == "cispo":
        metrics["clip_high"] = ((ratio > o.epsilon_high) & (adv > 0)).to(ratio.dtype)
        metrics["clip_region"] = metrics["clip_high"]
    elif o.loss_type in CLIPPED_LOSSES:
        metrics["clip_low"] = ((ratio < 1 - o.epsilon) & (adv < 0)).to(ratio.dtype)
        metrics["clip_high"] = ((ratio > 1 + o.epsilon_high) & (adv > 0)).to(ratio.dtype)
        metrics["clip_region"] = metrics["clip_low"] + metrics["clip_high"]
    return metrics


def _policy_loss_ref(ratio: Tensor, x: Tensor, adv: Tensor, o: LossOptions) -> Tensor:
    if o.loss_type == "cispo":
        return -ratio.detach().clamp(max=o.epsilon_high) * adv * x
    if o.loss_type == "sapo":
        positive = torch.full_like(adv, o.sapo_temperature_pos)
        temperature = positive.where(adv > 0, o.sapo_temperature_neg)
        return -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * adv
    clipped = ratio.clamp(1 - o.epsilon, 1 + o.epsilon_high)
    return -torch.minimum(ratio.clamp(max=o.delta) * adv, clipped * adv)
