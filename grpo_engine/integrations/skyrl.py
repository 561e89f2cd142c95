"""SkyRL 0.3: policy losses on our kernel, ``grpo_engine`` and ``grpo_engine_dual_clip``.

    from grpo_engine.integrations.skyrl import register
    register()          # in the entry point, before initialize_ray(cfg)

then ``trainer.algorithm.policy_loss_type=grpo_engine``. They are SkyRL's "regular" and "dual_clip".
SkyRL has already put the normaliser of ``loss_reduction`` into the advantages, so the loss is a sum
over tokens. Its off-policy corrections of the sampler's log-probabilities are refused. Not for its
fully asynchronous trainer, which refuses its own two because they need old log-probabilities, but
does not know ours.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo_engine.integrations.contract import Unsupported, require
from grpo_engine.integrations.padded import padded_grpo_loss

NAME = "grpo_engine"
CORRECTIONS = (
    "tis_ratio_type",
    "sequence_mask_metric",
    "outlier_token_is_threshold_low",
    "outlier_token_is_threshold_high",
    "token_mask_is_threshold_low",
    "token_mask_is_threshold_high",
)


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    *,
    dual_clip: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """SkyRL's ``ppo_policy_loss``; tensors [B, T]. (loss, {"clip_ratio": share of tokens})."""
    if rollout_logprobs is not None:
        for name in CORRECTIONS:
            value = getattr(config.off_policy_correction, name, None)
            if value is not None:
                raise Unsupported(
                    f"off_policy_correction.{name}={value!r}: use policy_loss_type=regular"
                )
    low, high = config.eps_clip_low, config.eps_clip_high
    if dual_clip and config.clip_ratio_c < 1 + high:
        raise Unsupported(
            f"clip_ratio_c={config.clip_ratio_c!r} must be >= 1 + eps_clip_high = {1 + high:g}"
        )
    mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
    loss, metrics = padded_grpo_loss(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        loss_type="dapo",
        epsilon=low,
        epsilon_high=high,
        delta=config.clip_ratio_c if dual_clip else None,
        denominator=1.0,
    )
    return loss, {"clip_ratio": metrics["clip_region"].item()}


def register() -> None:
    """Add both losses to SkyRL's registry. Twice is once.

    Raises:
        ImportError: SkyRL is not installed.
        Unsupported: a patch point of this SkyRL is not what was tested.
    """
    require("skyrl")
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry, register_policy_loss

    for name, dual_clip in ((NAME, False), (f"{NAME}_dual_clip", True)):
        if name not in PolicyLossRegistry.list_available():
            # not from the config, whose policy_loss_type a call's loss_fn overrides
            register_policy_loss(name)(partial(policy_loss, dual_clip=dual_clip))
