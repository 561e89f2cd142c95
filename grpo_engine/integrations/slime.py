"""slime: its policy loss on our kernel.

    --loss-type custom_loss
    --custom-loss-function-path grpo_engine.integrations.slime.loss

slime computes the log-probabilities from its Megatron logits; the clipped loss and the KL term are
ours, in one launch. slime's reducer is linear, so its weights are its own gradient: normalisation,
masks and context parallelism stay slime's. What slime's loss does beyond that is refused: entropy
bonus, sampler corrections, off-policy sequence masks, GSPO and CISPO.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_engine.integrations.contract import Unsupported
from grpo_engine.kernels import grpo_loss

REFUSED = {  # the value under which slime's loss has nothing more to do
    "entropy_coef": 0.0,
    "use_tis": False,
    "get_mismatch_metrics": False,
    "use_opsm": False,
    "use_unbiased_kl": False,
    "custom_pg_loss_reducer_function_path": None,
}
KL = {"k1": "k1", "k2": "k2", "k3": "k3", "low_var_kl": "k3"}


def loss(
    args: Any,
    batch: dict[str, Any],
    logits: Tensor,
    sum_of_sample_mean: Callable[[Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """slime's custom loss: (loss, metrics), both as its reducer sums them."""
    from slime.backends.megatron_utils.loss import get_log_probs_and_entropy

    for name, harmless in REFUSED.items():
        value = getattr(args, name, harmless)
        if value != harmless:
            raise Unsupported(f"{name}={value!r}: use --loss-type policy_loss")
    if getattr(args, "advantage_estimator", "grpo") in ("gspo", "cispo"):
        raise Unsupported(f"advantage_estimator={args.advantage_estimator!r}: token ratios only")
    beta = args.kl_loss_coef if args.use_kl_loss else 0.0
    if beta and args.kl_loss_type not in KL:
        raise Unsupported(f"kl_loss_type={args.kl_loss_type!r}: k1, k2, k3 or low_var_kl")
    _, found = get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=False,
        max_seq_lens=batch.get("max_seq_lens"),
    )
    log_probs = torch.cat(found["log_probs"]).float()
    from_sampler = getattr(args, "use_rollout_logprobs", False)
    old = _joined(batch["rollout_log_probs" if from_sampler else "log_probs"])
    value, metrics = grpo_loss(
        log_probs,
        old,
        _joined(batch["advantages"]),
        loss_mask=_weights(sum_of_sample_mean, log_probs),
        ref_logprobs=_joined(batch["ref_log_probs"]) if beta else None,
        loss_type="dapo",
        denominator=1.0,
        epsilon=args.eps_clip,
        epsilon_high=args.eps_clip_high,
        delta=args.eps_clip_c,
        beta=beta,
        kl_estimator=KL[args.kl_loss_type] if beta else "k3",
    )
    names = {"pg_clipfrac": "clip_region"} | ({"kl_loss": "kl"} if beta else {})
    logged = {name: metrics[ours] * metrics["tokens"] for name, ours in names.items()}
    return value, {"loss": value.detach(), **logged}


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).detach().float()


def _weights(reduce: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """What the reducer multiplies each token by: the gradient of a linear function."""
    with torch.enable_grad():
        at = torch.zeros_like(like, requires_grad=True)
        (weights,) = torch.autograd.grad(reduce(at), at)
    return weights
