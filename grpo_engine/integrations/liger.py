"""Liger-Kernel's GRPO signatures on our kernels, for code that was written for Liger 0.8.

    from grpo_engine.integrations.liger import LigerFusedLinearGRPOLoss, triton_grpo_loss

Liger itself is not needed. Loss, gradients and metrics are Liger's. Refused are luspo where Liger's
average counts padding (token ratios, a KL term or per-token sampler ratios), ``reduce=False``, and
a ``delta`` below 1 + epsilon_high. ``compiled`` and ``chunk_size``, which say how Liger works and
not what it computes, have no effect.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from grpo_engine.integrations.contract import Unsupported
from grpo_engine.integrations.head import in_one_dtype
from grpo_engine.integrations.padded import flat, padded_grpo_loss, row_bounds
from grpo_engine.kernels import LossMetrics, linear_grpo_loss, linear_logprobs, token_logprobs
from grpo_engine.kernels.loss_options import CLIPPED_LOSSES, VESPO_RATIO_MIN

PER_TOKEN = ("dapo", "cispo", "vespo")  # normalised by the tokens of the whole batch


class LigerFusedLinearGRPOLoss(nn.Module):
    """``liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss``: the same arguments and results."""

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        self.use_ref_model, self.temperature = use_ref_model, temperature
        self.options = {
            "beta": beta,
            "epsilon": epsilon_low,
            "epsilon_high": epsilon_high,
            "loss_type": loss_type,
            "max_completion_length": max_completion_length,
            "importance_level": importance_sampling_level,
            "sapo_temperature_pos": sapo_temperature_pos,
            "sapo_temperature_neg": sapo_temperature_neg,
            # Liger looks at it there alone
            "delta": delta if loss_type in CLIPPED_LOSSES else None,
            "kl_bias_correction": use_bias_correction_kl,
            "vespo_k_pos": vespo_k_pos,
            "vespo_lambda_pos": vespo_lambda_pos,
            "vespo_k_neg": vespo_k_neg,
            "vespo_lambda_neg": vespo_lambda_neg,
        }

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, (KL mean if beta, clip ratio)); hidden states [B, T, H], the rest [B, T] or [B].

        ``vllm_is_ratio`` [B], [B, 1] or [B, T] must be 1 on padding, as TRL makes it.
        """
        if self.use_ref_model and ref_per_token_logps is None and ref_input is None:
            raise ValueError(
                "use_ref_model=True needs ref_per_token_logps or ref_input; both are None"
            )
        if self.use_ref_model and ref_per_token_logps is None:
            ref_per_token_logps = _reference(
                ref_input, ref_weight, ref_bias, selected_token_ids, self.temperature
            )
        shape = tuple(attention_mask.shape)
        loss_args, options = _loss_arguments(
            self.options,
            shape,
            attention_mask,
            advantages,
            old_per_token_logps,
            ref_per_token_logps if self.use_ref_model else None,
            vllm_is_ratio,
            num_items_in_batch,
        )
        old, per_token, ref, sampler = (flat(x, shape) for x in loss_args)
        hidden, weight, bias = in_one_dtype(_input, lin_weight, bias)
        loss, metrics, _ = linear_grpo_loss(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            selected_token_ids.reshape(-1),
            old,
            per_token,
            bias=bias,
            temperature=self.temperature,
            row_mask=(attention_mask != 0).reshape(-1),
            cu_seqlens=row_bounds(*shape, hidden.device),
            ref_logprobs=ref,
            sampler_logprobs=sampler,
            **options,
        )
        return loss, tuple(_metrics(metrics, self.options["beta"], loss))


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: Tensor | float | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[Tensor, list[Tensor]]:
    """``liger_kernel.transformers.grpo_loss.triton_grpo_loss`` with ``reduce=True``.

    logits [B, L + 1, V], of which the last row of each sequence predicts nothing; the rest [B, L].
    With ``inplace`` the gradient is written over ``logits``. Returns (loss, [KL mean if beta, clip
    ratio]). Runs on a CPU, too, and for any L (Liger's grid ends at 65,535).
    """
    if not reduce:
        raise Unsupported("reduce=False: our loss comes reduced; pass reduce=True")
    batch, length = completion_ids.shape
    if completion_mask is None:
        completion_mask = torch.ones_like(completion_ids)
    if beta and ref_logp is None:
        raise ValueError(f"beta={beta!r} needs ref_logp, which is None")
    if loss_type == "dr_grpo" and max_completion_length is None:
        max_completion_length = length
    ids = functional.pad(completion_ids, (0, 1))
    logprobs = token_logprobs(
        logits.reshape(-1, logits.shape[-1]),
        ids.reshape(-1),
        temperature=temperature,
        inplace_backward=inplace and logits.requires_grad,
    ).view(batch, length + 1)[:, :length]
    loss_args, options = _loss_arguments(
        {
            "beta": beta,
            "epsilon": eps_low,
            "epsilon_high": eps_high,
            "loss_type": loss_type,
            "max_completion_length": max_completion_length,
            "importance_level": importance_sampling_level,
            "sapo_temperature_pos": sapo_temperature_pos,
            "sapo_temperature_neg": sapo_temperature_neg,
            "delta": delta,
            "kl_bias_correction": use_bias_correction_kl,
            "vespo_k_pos": vespo_k_pos,
            "vespo_lambda_pos": vespo_lambda_pos,
            "vespo_k_neg": vespo_k_neg,
            "vespo_lambda_neg": vespo_lambda_neg,
        },
        (batch, length),
        completion_mask,
        advantages,
        old_logp,
        ref_logp,
        vllm_is_ratio,
        num_items_in_batch,
    )
    old, per_token, ref, sampler = loss_args
    loss, metrics = padded_grpo_loss(
        logprobs,
        old,
        per_token,
        completion_mask,
        ref_logprobs=ref,
        sampler_logprobs=sampler,
        **options,
    )
    return loss, _metrics(metrics, beta, loss)


def _loss_arguments(
    options: dict,
    shape: tuple[int, int],
    mask: Tensor,
    advantages: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    ratio: Tensor | None,
    num_items: Tensor | float | None,
) -> tuple[tuple[Tensor | None, ...], dict]:
    """((old, advantages [B, T], ref, sampler), the options of ``grpo_loss``)."""
    loss_type, beta = options["loss_type"], options["beta"]
    sequence = options["importance_level"] == "sequence"
    if sequence and loss_type in ("cispo", "sapo", "vespo"):
        raise ValueError(f"importance_sampling_level='sequence' is not for loss_type={loss_type!r}")
    ratio = ratio[:, None] if ratio is not None and ratio.ndim == 1 else ratio
    per_token_ratio = ratio is not None and ratio.shape[1] != 1
    if loss_type == "luspo" and (not sequence or beta or per_token_ratio):
        raise Unsupported(
            "loss_type='luspo' averages padding in Liger here; use "
            "importance_sampling_level='sequence' with beta=0 and one sampler ratio a sequence"
        )
    options = dict(options)
    if ref is None:
        options["beta"] = 0.0  # the reference is the policy itself: KL 0, without gradient
    if loss_type in PER_TOKEN:
        options["denominator"] = _tokens(mask, num_items)
    advantages = advantages[:, None].expand(shape)
    sampler = None
    if ratio is not None and loss_type == "vespo":
        if old is None:
            raise Unsupported("loss_type='vespo' with vllm_is_ratio needs old log-probabilities")
        options |= {"is_correction": "token_truncate", "is_clip": (0.0, None)}
        sampler = old - _token_logs(ratio, mask)
    elif ratio is not None:
        advantages = advantages * ratio
    return (old, advantages, ref, sampler), options


def _token_logs(ratio: Tensor, mask: Tensor) -> Tensor:
    """Logarithms [B, T] of sampler ratios; that of a whole sequence stands at its first token."""
    logs = ratio.log().clamp(math.log(VESPO_RATIO_MIN), 20.0)
    if ratio.shape[1] == mask.shape[1]:
        return logs
    first = (mask != 0) & ((mask != 0).cumsum(1) == 1)
    return torch.where(first, logs, 0.0)


def _tokens(mask: Tensor, num_items: Tensor | float | None) -> Tensor:
    """Liger's normaliser of dapo: tokens of the batch a rank, at least 1."""
    distributed = dist.is_available() and dist.is_initialized()
    if num_items is None:
        tokens = (mask != 0).sum().float()
        if distributed:
            dist.all_reduce(tokens)
    else:
        tokens = torch.as_tensor(num_items, dtype=torch.float32, device=mask.device)
    return (tokens / (dist.get_world_size() if distributed else 1)).clamp(min=1.0)


def _metrics(metrics: LossMetrics, beta: float, loss: Tensor) -> list[Tensor]:
    zero = torch.zeros_like(loss.detach())
    kl = [metrics["kl"] if "kl" in metrics.names else zero] if beta else []
    return [*kl, metrics["clip_region"] if "clip_region" in metrics.names else zero]


@torch.no_grad()
def _reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: float,
) -> Tensor:
    hidden, weight, bias = in_one_dtype(hidden, weight, bias)
    logprobs = linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        token_ids.reshape(-1),
        bias=bias,
        temperature=temperature,
    )
    return logprobs.view(token_ids.shape)
