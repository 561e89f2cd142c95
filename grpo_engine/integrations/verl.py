"""verl >= 0.9 on our kernels.

verl finds this package through its plug-in group (``verl_plugin.py``) as soon as both are
installed: ``actor_rollout_ref.actor.policy_loss.loss_mode=grpo_engine`` is verl's "vanilla" loss
(asymmetric clip, dual clip, rollout weights, every ``loss_agg_mode``) in one launch with one host
sync. Entropy and KL terms stay verl's.

The log-prob op, which is where the memory goes, is chosen by the environment variable
``GRPO_ENGINE_VERL_LOGPROBS=1`` in all processes, or by ``patch_verl()`` in each. It stands behind
``model.use_fused_kernels=True`` in place of both of verl's backends, triton and torch.

Not supported, and refused: a head whose vocabulary is sharded over tensor-parallel ranks (verl
leaves the sum of d hidden over ranks to the layer below, ours makes it), reductions of the entropy,
and a ``clip_ratio_c`` below 1 + ``clip_ratio_high``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grpo_engine.integrations.contract import Unsupported, require
from grpo_engine.integrations.head import in_one_dtype
from grpo_engine.integrations.padded import padded_grpo_loss
from grpo_engine.kernels import linear_logprobs

LOSS_MODE = "grpo_engine"
LOGPROBS_VARIABLE = "GRPO_ENGINE_VERL_LOGPROBS"
OP = "linear_cross_entropy"
MODULE = "FusedLinearForPPO"
LOG_RATIO_MAX = 20.0  # verl's clamp of log-ratios, as the kernels'
_replaced: list[tuple[Any, str, Any]] = []  # (where, name, what was there) while patched


def register() -> None:
    """Offer ``loss_mode=grpo_engine`` to verl. Raises Unsupported if a patch point moved."""
    require("verl")
    from verl.trainer.ppo.core_algos import register_policy_loss

    register_policy_loss(LOSS_MODE)(policy_loss)


def patch_verl() -> None:
    """Put our log-prob op in place of verl's fused ones. Twice is once."""
    require("verl")
    import verl.utils.experimental.torch_functional as torch_functional
    import verl.utils.kernel.linear_cross_entropy as kernel

    unpatch_verl()
    for where, name, new in (
        (kernel, OP, linear_cross_entropy),
        (torch_functional, MODULE, FusedLinearForPPO),
    ):
        _replaced.append((where, name, getattr(where, name)))
        setattr(where, name, new)


def unpatch_verl() -> None:
    """Put back what ``patch_verl`` replaced."""
    while _replaced:
        where, name, before = _replaced.pop()
        setattr(where, name, before)


# ---- The loss ------------------------------------------------------------------------------------


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's ``compute_policy_loss_vanilla``: all tensors [B, T]; (loss, metrics)."""
    clip = config.clip_ratio
    low = clip if config.clip_ratio_low is None else config.clip_ratio_low
    high = clip if config.clip_ratio_high is None else config.clip_ratio_high
    dual = config.get("clip_ratio_c", 3.0)
    if dual < 1 + high:
        raise Unsupported(f"clip_ratio_c={dual!r} must be >= 1 + clip_ratio_high = {1 + high:g}")
    loss_type, denominator = _aggregation(
        loss_agg_mode, response_mask, **dict(config.global_batch_info)
    )
    loss, _ = padded_grpo_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        policy_weights=rollout_is_weights,
        loss_type=loss_type,
        denominator=denominator,
        epsilon=low,
        epsilon_high=high,
        delta=dual,
    )
    return loss, _metrics(log_prob, old_log_prob, advantages, response_mask, low, high, dual)


def _aggregation(
    mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
    loss_scale_factor: Any = None,
) -> tuple[str, Any]:
    """(loss type, denominator) of verl's ``agg_loss``."""
    if mode == "token-sum":
        return "dapo", 1.0 / dp_size
    total, name = batch_num_tokens, "batch_num_tokens"
    if mode != "token-mean":
        total, name = global_batch_size, "global_batch_size"
    if total is None and dp_size > 1:
        raise ValueError(f"loss_agg_mode={mode!r} with dp_size={dp_size} needs {name}, got None")
    if total is None:
        total = mask.sum() if mode == "token-mean" else (mask.sum(-1) > 0).sum()
    total = total / dp_size
    if mode == "token-mean" or mode == "seq-mean-token-sum":
        return "dapo", total
    if mode == "seq-mean-token-mean":
        return "grpo", total
    if mode == "seq-mean-token-sum-norm":
        return "dapo", total * (loss_scale_factor or mask.shape[-1])
    raise Unsupported(f"loss_agg_mode={mode!r} is not one of verl's")


@torch.no_grad()
def _metrics(
    log_prob: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    low: float,
    high: float,
    dual: float,
) -> dict[str, float]:
    """verl's three, with one sync."""
    log_ratio = (log_prob - old).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX)
    ratio, negative = log_ratio.exp(), advantages < 0
    clipped = ((ratio < 1 - low) & negative) | ((ratio > 1 + high) & (advantages > 0))
    values = {
        "actor/pg_clipfrac": clipped,
        "actor/ppo_kl": -log_ratio,
        "actor/pg_clipfrac_lower": (ratio > dual) & negative,
    }
    stacked = torch.stack([value.float() for value in values.values()])
    sums = torch.where(mask != 0, stacked, 0.0).flatten(1).sum(1)
    means = sums / (mask.sum() + 1e-8)
    return dict(zip(values, means.tolist(), strict=True))


# ---- The log-prob op -----------------------------------------------------------------------------


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """verl's Triton op: (log-probabilities, entropy), both fp32 [N] with gradient.

    hidden [..., D], weight [V, D], labels [...]; any D, also on a CPU (verl's needs D % 128 == 0
    and a GPU). The result is flat, as verl's is.
    """
    if reduction.lower() != "none":
        raise Unsupported(f"reduction={reduction!r}: only 'none', which is all that verl asks for")
    if dist_process_group is not None and dist_process_group.size() > 1:
        raise Unsupported(
            f"dist_process_group of {dist_process_group.size()} ranks: the head's vocabulary must "
            f"be whole on every rank; leave {LOGPROBS_VARIABLE} unset under tensor parallelism"
        )
    hidden, weight, _ = in_one_dtype(hidden, weight)
    return linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature=float(temperature),
        return_entropy=True,
    )


class FusedLinearForPPO(nn.Module):
    """verl's module of that name, on our op; ``chunk_size`` and ``impl_backend`` are verl's."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """(log-probabilities, entropy) fp32, the shape of ``input_ids``."""
        found = linear_cross_entropy(hidden_states, vocab_weights, input_ids, temperature)
        return tuple(x.view(input_ids.shape) for x in found)
