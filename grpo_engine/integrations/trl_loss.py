"""``GRPOTrainer._compute_loss`` of TRL on our loss, with TRL's metrics.

TRL's factors of the policy term alone (off-policy sequence mask, high-entropy mask, the sampler
correction that TRL has already computed) go into the advantages, of which the policy term of every
loss type is a multiple. Where no factor depends on this forward pass, the loss is made inside it
(``FusedRequest``); otherwise the log-prob op first, then the loss on [B, T].

Two differences, beyond any sane run: log-ratios above 20 are capped in the exponential, and an
option of TRL that contradicts another (delta below 1 + epsilon_high) is refused.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from grpo_engine.integrations.contract import Unsupported
from grpo_engine.integrations.padded import padded_grpo_loss
from grpo_engine.integrations.trl_head import FusedRequest
from grpo_engine.kernels.loss_options import CLIPPED_LOSSES, METRICS, VESPO_RATIO_MIN

MODEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
VESPO = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
SAPO = ("sapo_temperature_pos", "sapo_temperature_neg")
PER_WINDOW = ("grpo", "sapo", "bnpo", "dr_grpo", "luspo")  # divided by accumulation steps


def compute_loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """The scalar that TRL's ``_compute_loss`` returns, for any of its loss types and options."""
    mode = "train" if trainer.model.training else "eval"
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    batch = _batch(trainer, inputs, mask)
    options = loss_options(trainer, mask, inputs.get("num_items_in_batch"), mode)
    if one_pass(trainer):
        logps, entropies = None, None
        request = FusedRequest(
            scored=inputs["completion_mask"] != 0,
            loss_mask=mask != 0,
            old_logprobs=batch["old_logprobs"],
            advantages=(batch["advantages"] * batch["weights"]).expand(mask.shape).float(),
            ref_logprobs=batch["ref_logprobs"],
            sampler_logprobs=batch["sampler_logprobs"],
            options=options,
        )
        with request:
            logps, _, aux_loss = _forward(trainer, model, inputs, compute_entropy=False)
        loss, sums = request.loss_through(logps), request.metrics.sums
        entropy_sum = sums[METRICS.index("entropy")]
    else:
        logps, entropies, aux_loss = _forward(trainer, model, inputs, compute_entropy=True)
        entropy_mask = _entropy_mask(trainer, entropies, mask)
        weights = batch["weights"] * _off_policy_mask(trainer, inputs, logps, batch, mask)
        if entropy_mask is not None:
            weights = weights * entropy_mask
        loss, metrics = padded_grpo_loss(
            logps,
            batch["old_logprobs"],
            batch["advantages"],
            mask,
            policy_weights=weights.expand(mask.shape),
            ref_logprobs=batch["ref_logprobs"],
            sampler_logprobs=batch["sampler_logprobs"],
            **options,
        )
        sums, entropy_sum = metrics.sums, (entropies.detach() * mask).sum()
        loss = _with_entropy_bonus(trainer, loss, entropies, mask, entropy_mask, mode)
    if trainer.aux_loss_enabled:
        loss = loss + trainer.router_aux_loss_coef * aux_loss / _accumulation(trainer, mode)
        gathered = trainer.accelerator.gather_for_metrics(aux_loss)
        trainer._metrics[mode]["aux_loss"].append(gathered.mean().item())
    _log(trainer, mode, inputs, logps.detach(), batch, mask, sums, entropy_sum)
    return loss


def one_pass(trainer: Any) -> bool:
    """Whether the loss can be made inside the model's forward pass.

    Not where a factor of it needs all log-probabilities or entropies first, and not where Python
    side effects of that pass are lost (torch.compile).
    """
    return not (
        trainer.off_policy_mask_threshold is not None
        or trainer.top_entropy_quantile < 1.0
        or trainer._entropy_bonus_enabled
        or trainer.args.torch_compile
    )


def loss_options(trainer: Any, mask: Tensor, num_items: Tensor | None, mode: str) -> dict[str, Any]:
    """TRL's options as those of ``grpo_loss``, the denominator included."""
    args, loss_type = trainer.args, trainer.loss_type
    level = trainer.importance_sampling_level
    if loss_type == "vespo" and level == "sequence":  # weighs sequences anyway
        if trainer.beta and args.use_bias_correction_kl:
            raise Unsupported(
                "importance_sampling_level='sequence' with loss_type='vespo' and a bias-corrected "
                "KL term; use importance_sampling_level='token'"
            )
        level = "token"
    corrects = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    return {
        "loss_type": loss_type,
        "importance_level": level,
        "epsilon": trainer.epsilon_low,
        "epsilon_high": trainer.epsilon_high,
        "delta": args.delta if loss_type in CLIPPED_LOSSES else None,
        "beta": trainer.beta,
        "kl_bias_correction": bool(args.use_bias_correction_kl),
        "is_correction": "token_truncate" if loss_type == "vespo" and corrects else None,
        "is_clip": (0.0, None),  # TRL has bounded the ratio already
        "denominator": _denominator(trainer, mask, num_items, mode),
        **{name: getattr(args, name) for name in (*SAPO, *VESPO)},
    }


def _accumulation(trainer: Any, mode: str) -> float:
    return float(trainer.current_gradient_accumulation_steps) if mode == "train" else 1.0


def _denominator(trainer: Any, mask: Tensor, num_items: Tensor | None, mode: str) -> float | Tensor:
    batch, steps = mask.shape[0], _accumulation(trainer, mode)
    if trainer.loss_type == "bnpo":
        return mask.sum().clamp(min=1.0) * steps
    if trainer.loss_type == "dr_grpo":
        return batch * trainer.max_completion_length * steps
    if trainer.loss_type in PER_WINDOW:
        return batch * steps
    items = num_items.clamp(min=1.0) / trainer.accelerator.num_processes
    return items * steps / trainer.args.steps_per_generation if mode == "train" else items


def _batch(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> dict[str, Tensor | None]:
    """What the loss takes beside log-probabilities; ``weights`` of the policy term [B, 1 or T]."""
    advantages = inputs["advantages"]
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    old, ref = inputs.get("old_per_token_logps"), None
    weights, sampler = torch.ones_like(advantages[:, :1]), None
    if trainer.beta:
        ref = inputs["ref_per_token_logps"].float()
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        ratio = inputs["importance_sampling_ratio"].float()
        if trainer.loss_type != "vespo":
            weights = ratio
        else:  # enters the sequence's ratio: as log-probabilities of the sampler
            if old is None:
                raise Unsupported("loss_type='vespo' with a sampler correction needs old log-probs")
            low = math.log(VESPO_RATIO_MIN)
            sampler = old - ratio.log().clamp(low, 20.0).expand(mask.shape)
    return {
        "advantages": advantages,
        "weights": weights,
        "old_logprobs": None if old is None else old.float(),
        "ref_logprobs": ref,
        "sampler_logprobs": sampler,
    }


def _forward(trainer: Any, model: Any, inputs: dict[str, Any], compute_entropy: bool):
    """(log-probabilities [B, T], entropies or None, auxiliary loss or None)."""
    prompt, completion = inputs["prompt_ids"], inputs["completion_ids"]
    return trainer._get_per_token_logps_and_entropies(
        model,
        torch.cat([prompt, completion], dim=1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        completion.shape[1],
        compute_entropy=compute_entropy,
        compute_aux_loss=trainer.aux_loss_enabled,
        **{name: inputs.get(name) for name in MODEL_INPUTS},
    )


def _entropy_mask(trainer: Any, entropies: Tensor, mask: Tensor) -> Tensor | None:
    if trainer.top_entropy_quantile >= 1.0:
        return None
    return trainer.get_high_entropy_mask(entropies, mask, 1 - trainer.top_entropy_quantile)


def _off_policy_mask(
    trainer: Any, inputs: dict[str, Any], logps: Tensor, batch: dict, mask: Tensor
) -> Tensor | float:
    """DeepSeek-V3.2's, [B, 1 or T] of 0 and 1; against the sampler's log-probs if there are any."""
    if trainer.off_policy_mask_threshold is None:
        return 1.0
    old = logps.detach() if batch["old_logprobs"] is None else batch["old_logprobs"]
    return trainer.get_off_policy_mask(
        advantages=batch["advantages"],
        per_token_logps=logps,
        sampling_per_token_logps=inputs.get("sampling_per_token_logps", old),
        mask=mask,
        off_policy_threshold=trainer.off_policy_mask_threshold,
    )


def _with_entropy_bonus(
    trainer: Any,
    loss: Tensor,
    entropies: Tensor,
    mask: Tensor,
    entropy_mask: Tensor | None,
    mode: str,
) -> Tensor:
    """The loss less the bonus: the token mean of the entropy whatever the loss type, as in TRL."""
    if not trainer._entropy_bonus_enabled:
        return loss
    accelerator, metrics = trainer.accelerator, trainer._metrics[mode]
    steps = _accumulation(trainer, mode)
    active = mask if entropy_mask is None else mask * entropy_mask
    entropy_sum, tokens = (entropies * active).sum(), active.sum()
    coef = trainer.entropy_coef
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        coef = 0.0
    policy_loss = loss.detach() * (steps if trainer.loss_type in PER_WINDOW else 1.0)
    metrics["policy_loss"].append(accelerator.gather(policy_loss).nanmean().item())
    loss = loss - coef * entropy_sum / tokens.clamp(min=1.0) / steps
    if mode == "train" and trainer.use_adaptive_entropy:
        _adapt_entropy_coef(trainer, torch.stack([entropy_sum, tokens]).detach())
    if mode == "train" and accelerator.sync_gradients:
        metrics["entropy_coef"].append(trainer.entropy_coef)
    return loss


def _adapt_entropy_coef(trainer: Any, sums: Tensor) -> None:
    """TRL's controller: one step of the coefficient at the end of each accumulation window."""
    before, args = trainer._entropy_window_stats, trainer.args
    trainer._entropy_window_stats = sums if before is None else before + sums
    if not trainer.accelerator.sync_gradients:
        return
    total = trainer.accelerator.reduce(trainer._entropy_window_stats, reduction="sum")
    entropy = (total[0] / total[1].clamp(min=1.0)).item()
    if entropy <= args.entropy_target:
        coef = min(trainer.entropy_coef + args.entropy_coef_delta, args.entropy_coef_max)
    else:
        coef = max(trainer.entropy_coef - args.entropy_coef_delta, args.entropy_coef_min)
    trainer.entropy_coef, trainer._last_world_entropy = coef, entropy
    trainer._entropy_window_stats = None


# ---- Metrics -------------------------------------------------------------------------------------


@torch.no_grad()
def _log(
    trainer: Any,
    mode: str,
    inputs: dict[str, Any],
    logps: Tensor,
    batch: dict[str, Tensor | None],
    mask: Tensor,
    sums: Tensor,
    entropy_sum: Tensor,
) -> None:
    """TRL's metrics by TRL's names, with one reduction and one sync for the means."""
    metrics, accelerator = trainer._metrics[mode], trainer.accelerator
    tokens = mask.sum().float()
    totals = {"entropy": (entropy_sum.float(), tokens)}
    if trainer.beta:
        totals["kl"] = (sums[METRICS.index("kl")], tokens)
    bounds = _bounds(trainer, inputs, logps, batch, mask)
    for name, held in bounds.items():
        per_sequence = held.shape[1] == 1
        count = torch.full_like(tokens, held.shape[0]) if per_sequence else tokens
        totals[name] = (held.sum() if per_sequence else (held * mask).sum(), count)
    pairs = torch.stack([torch.stack(pair) for pair in totals.values()])
    pairs = accelerator.reduce(pairs, reduction="sum")
    means = (pairs[:, 0] / pairs[:, 1].clamp(min=1.0)).tolist()
    for name, mean in zip(totals, means, strict=True):
        metrics[name].append(mean)
    for name, end in (("low", "min"), ("high", "max")):
        if f"clip_ratio/{name}_mean" in bounds:
            held = bounds[f"clip_ratio/{name}_mean"]
            held = held.squeeze(1) if held.shape[1] == 1 else (held * mask).sum(-1) / mask.sum(-1)
            found = accelerator.gather(held)
            found = found[~found.isnan()]
            extreme = getattr(found, end)().item() if found.numel() else math.nan
            metrics[f"clip_ratio/{name}_{end}"].append(extreme)


def _bounds(
    trainer: Any, inputs: dict[str, Any], logps: Tensor, batch: dict, mask: Tensor
) -> dict[str, Tensor]:
    """Which ratios lie beyond a bound, 0 or 1, [B, T] or [B, 1]; vespo: its weights."""
    old, advantages = batch["old_logprobs"], batch["advantages"]
    log_ratio = torch.zeros_like(logps) if old is None else logps - old
    if trainer.loss_type == "vespo":
        phi = trainer.get_gamma_weights(
            advantages=advantages,
            log_ratio_per_token=log_ratio,
            mask=mask,
            importance_sampling_ratio=inputs.get("importance_sampling_ratio"),
            **{name.removeprefix("vespo_"): getattr(trainer.args, name) for name in VESPO},
        )
        return {"vespo/phi_seq_mean": phi}
    if trainer.importance_sampling_level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0))[:, None]
    ratio = log_ratio.exp()
    if trainer.loss_type == "cispo":
        return {"cispo_clip_ratio": ((ratio > trainer.epsilon_high) & (advantages > 0)).float()}
    if trainer.loss_type not in CLIPPED_LOSSES:
        return {}
    if trainer.args.delta is not None:
        ratio = ratio.clamp(max=trainer.args.delta)
    low = (ratio < 1 - trainer.epsilon_low) & (advantages < 0)
    high = (ratio > 1 + trainer.epsilon_high) & (advantages > 0)
    found = {"low": low, "high": high, "region": low | high}
    return {f"clip_ratio/{name}_mean": held.float() for name, held in found.items()}
