"""slime: its policy loss on our kernel.

    --loss-type custom_loss
    --custom-loss-function-path grpo_engine.integrations.slime.loss

slime computes the log-probabilities from its Megatron logits, over a top-p sampler's kept tokens
where it replays them; the clipped loss and the KL term are ours, in one launch. slime's reducer is
linear, so its weights are its own gradient: normalisation, masks and context parallelism stay
slime's. What slime's loss does beyond that is refused: entropy bonus, sampler corrections,
off-policy sequence masks, score centering, REINFORCE, GSPO and CISPO.
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
    "use_score_centering": False,
    "pg_loss_type": None,
}
KL = {"k1": "k1", "k2": "k2", "k3": "k3", "low_var_kl": "k3"}
LOW_VAR_KL_MAX = 10.0  # slime's bound of it, with no gradient beyond


def loss(
    args: Any,
    batch: dict[str, Any],
    logits: Tensor,
    sum_of_sample_mean: Callable[[Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """slime's custom loss: (loss, metrics), both as its reducer sums them."""
    from slime.backends.megatron_utils import loss as theirs

    for name, harmless in REFUSED.items():
        value = getattr(args, name, harmless)
        if value != harmless:
            raise Unsupported(f"{name}={value!r}: use --loss-type policy_loss")
    if getattr(args, "advantage_estimator", "grpo") in ("gspo", "cispo"):
        raise Unsupported(f"advantage_estimator={args.advantage_estimator!r}: token ratios only")
    beta = args.kl_loss_coef if args.use_kl_loss else 0.0
    if beta and args.kl_loss_type not in KL:
        raise Unsupported(f"kl_loss_type={args.kl_loss_type!r}: k1, k2, k3 or low_var_kl")
    least = 1 + args.eps_clip_high
    if args.eps_clip_c is not None and args.eps_clip_c < least:
        raise Unsupported(
            f"eps_clip_c={args.eps_clip_c!r} must be >= 1 + eps_clip_high = {least:g}"
        )
    log_probs = _log_probs(theirs, args, batch, logits)
    if not log_probs.numel():  # a shard without responses: zero, but of the model's graph
        zero = 0 * logits.sum()
        names = ("loss", "pg_clipfrac") + (("kl_loss",) if beta else ())
        return zero, dict.fromkeys(names, zero.detach())
    from_sampler = getattr(args, "use_rollout_logprobs", False)
    old = batch.get("rollout_log_probs" if from_sampler else "log_probs")  # none: on-policy
    if from_sampler and not old:
        raise ValueError("use_rollout_logprobs=True needs rollout_log_probs in the batch")
    weights = _weights(sum_of_sample_mean, log_probs)
    ref, beyond = None, 0.0
    if beta:
        ref = _joined(batch["ref_log_probs"])
        if args.kl_loss_type == "low_var_kl":
            ref, beyond = _bounded(ref, log_probs.detach(), weights)
    value, metrics = grpo_loss(
        log_probs,
        _joined(old) if old else None,
        _joined(batch["advantages"]),
        loss_mask=weights,
        ref_logprobs=ref,
        loss_type="dapo",
        denominator=1.0,
        epsilon=args.eps_clip,
        epsilon_high=args.eps_clip_high,
        delta=args.eps_clip_c,
        beta=beta,
        kl_estimator=KL[args.kl_loss_type] if beta else "k3",
    )
    value = value + beta * beyond
    logged = {"loss": value.detach(), "pg_clipfrac": metrics["clip_region"] * metrics["tokens"]}
    if beta:
        logged["kl_loss"] = metrics["kl"] * metrics["tokens"] + beyond
    return value, logged


def _log_probs(theirs: Any, args: Any, batch: dict[str, Any], logits: Tensor) -> Tensor:
    """The current log-probabilities [N] fp32, by slime's own function as slime's own loss calls it,
    whose arguments and results have changed with its releases."""
    more = {"max_seq_lens": batch["max_seq_lens"]} if "max_seq_lens" in batch else {}
    if hasattr(theirs, "get_rollout_top_p_logprob_kwargs"):
        more |= theirs.get_rollout_top_p_logprob_kwargs(args, batch)
    found = theirs.get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=False,
        **more,
    )
    found = found[1] if isinstance(found, tuple) else found
    return torch.cat(found["log_probs"]).float()


def _bounded(ref: Tensor, current: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(ref, made equal to the current where the KL term is beyond its bound, the bound's sum)."""
    gap = ref - current
    beyond = gap.exp() - gap - 1 > LOW_VAR_KL_MAX
    return torch.where(beyond, current, ref), LOW_VAR_KL_MAX * (weights * beyond).sum()


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).detach().float()


def _weights(reduce: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """What the reducer multiplies each token by: the gradient of a linear function."""
    with torch.enable_grad():
        at = torch.zeros_like(like, requires_grad=True)
        (weights,) = torch.autograd.grad(reduce(at), at)
    return weights
