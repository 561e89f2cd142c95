"""The loss on [B, T] tensors with a mask, the layout of the trainers that pad.

Rows are laid end to end, padding included: the kernels never read what the mask leaves out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_engine.kernels import LossMetrics, grpo_loss


def row_bounds(batch: int, width: int, device: torch.device) -> Tensor:
    """cu_seqlens [B + 1] int64 of B rows of T tokens."""
    return torch.arange(batch + 1, device=device) * width


def flat(x: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """[B], [B, 1] or [B, T] as fp32 [B T], without gradient; None stays None."""
    if x is None:
        return None
    x = x.detach().float()
    if x.ndim == 1:
        x = x[:, None]
    if x.ndim != 2 or x.shape[0] != shape[0] or x.shape[1] not in (1, shape[1]):
        raise ValueError(f"expected [B], [B, 1] or [B, T] with B, T = {shape}, got {list(x.shape)}")
    return x.expand(shape).reshape(-1)


def padded_grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    policy_weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    denominator: float | Tensor | None = None,
    **options,
) -> tuple[Tensor, LossMetrics]:
    """``grpo_loss`` of a padded batch.

    Args:
        logprobs: [B, T], with gradient; old_logprobs, ref_logprobs, sampler_logprobs: the same
            shape, taken without theirs.
        advantages: [B], [B, 1] or [B, T].
        mask: [B, T] bool or weights >= 0.
        policy_weights: >= 0, [B], [B, 1] or [B, T]: factors of the policy term alone, not of the
            KL term. They go into the advantages, of which the policy term of every loss type is a
            multiple; metrics that look at the sign of an advantage see 0 where a weight is 0.
        denominator, options: as in ``grpo_loss``.
    """
    shape = tuple(logprobs.shape)
    per_token = flat(advantages, shape)
    if policy_weights is not None:
        per_token = per_token * flat(policy_weights, shape)
    return grpo_loss(
        logprobs.float().reshape(-1),
        flat(old_logprobs, shape),
        per_token,
        cu_seqlens=row_bounds(*shape, logprobs.device),
        loss_mask=mask.reshape(-1) if mask.is_floating_point() else (mask != 0).reshape(-1),
        ref_logprobs=flat(ref_logprobs, shape),
        sampler_logprobs=flat(sampler_logprobs, shape),
        denominator=denominator,
        **options,
    )
