"""The fused ops for a training loop of one's own, in plain PyTorch or with a Hugging Face model.

    loss_fn = FusedGRPOLoss.for_model(model, temperature=1.0, epsilon=0.2, beta=0.0)
    hidden = completion_hidden(model, input_ids, attention_mask, num_completion)
    loss, metrics, logprobs = loss_fn(hidden, model.lm_head, completion_ids, advantages, mask)
    loss.backward()

Nothing of size [tokens, vocabulary] is ever made. Leave out ``old_logprobs`` while the policy that
sampled is still the one being trained; later updates on the same samples pass the ``logprobs`` that
the first returned. Under ``torch.autocast`` the head's products run in its dtype, as a Linear's do.

LoRA: ``model`` may be peft's wrapper; adapters of the head itself are refused. Several processes:
DistributedDataParallel averages gradients only of a forward that went through it, so let it wrap a
module whose forward makes these calls and returns the loss, not the model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from grpo_engine.integrations.contract import Unsupported
from grpo_engine.integrations.head import in_one_dtype, weight_and_bias
from grpo_engine.integrations.padded import flat, row_bounds
from grpo_engine.kernels import (
    LossMetrics,
    linear_grpo_loss,
    linear_logprobs,
    make_loss_options,
)


class FusedLoss(NamedTuple):
    """What ``FusedGRPOLoss`` returns."""

    loss: Tensor  # 0-d fp32, to call backward on
    metrics: LossMetrics  # to_dict() reads them: the only host sync
    logprobs: Tensor  # shape of token_ids, fp32, no gradient; 0 where the mask is


def logit_options(model: Any) -> dict[str, float | None]:
    """``logit_softcap`` and ``logit_scale`` of a Hugging Face causal LM, from its config.

    Cohere multiplies the logits by ``logit_scale``, Falcon-H1 by ``lm_head_multiplier``, Muse by
    ``output_multiplier``, HyperCLOVA X by ``logits_scaling``; Granite and MiniCPM3 divide by
    ``logits_scaling``. Gemma caps them by ``final_logit_softcapping``.
    """
    config = model.config.get_text_config()
    names = ("logit_scale", "lm_head_multiplier", "output_multiplier")
    scale = next((s for n in names if (s := getattr(config, n, None)) is not None), None)
    scaling = getattr(config, "logits_scaling", None)
    if scale is None and scaling is not None:
        scale = scaling if config.model_type == "hyperclovax" else 1 / scaling
    return {
        "logit_softcap": getattr(config, "final_logit_softcapping", None),
        "logit_scale": scale,
    }


def completion_hidden(
    model: Any, input_ids: Tensor, attention_mask: Tensor, num_completion: int
) -> Tensor:
    """Hidden states [B, T, D] of a Hugging Face causal LM that predict its last T tokens.

    Args:
        model: the whole causal LM, or peft's wrapper of it; only its backbone is run.
        input_ids, attention_mask: [B, L]: prompts padded on the left, completions on the right.
        num_completion: T, columns that belong to completions; 0 < T < L.

    Raises:
        ValueError: a T that leaves no prompt token to predict the first completion token from.
        Unsupported: a model in DistributedDataParallel, or with prompt learning.
    """
    length = input_ids.shape[1]
    if not 0 < num_completion < length:
        raise ValueError(
            f"num_completion must be between 1 and {length - 1} (input_ids has {length} columns), "
            f"got {num_completion}"
        )
    positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    states = _backbone(model)(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        use_cache=False,
        return_dict=True,
    ).last_hidden_state
    return states[:, -num_completion - 1 : -1]


def _backbone(model: Any) -> nn.Module:
    if isinstance(model, DistributedDataParallel):
        raise Unsupported(
            "the model is a DistributedDataParallel, which would not average these gradients: let "
            "it wrap a module whose forward calls completion_hidden and returns the loss"
        )
    if hasattr(model, "get_base_model"):  # peft's wrapper: adapters are inside, soft prompts not
        if model.active_peft_config.is_prompt_learning:
            raise Unsupported(f"{model.active_peft_config.peft_type}: prompts live in the wrapper")
        model = model.get_base_model()
    return model.base_model


class FusedLogprobs(nn.Module):
    """Log-probabilities of given tokens under a language-model head, without its logits.

    Args:
        temperature, logit_softcap, logit_scale: as in ``linear_logprobs``.
        return_entropy: also return the entropy of the full distribution, with gradient.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        logit_softcap: float | None = None,
        logit_scale: float | None = None,
        return_entropy: bool = False,
    ) -> None:
        super().__init__()
        self.options = {
            "temperature": temperature,
            "logit_softcap": logit_softcap,
            "logit_scale": logit_scale,
            "return_entropy": return_entropy,
        }

    @classmethod
    def for_model(cls, model: Any, **options) -> FusedLogprobs:
        """With the softcap and the scale that a Hugging Face model's config names."""
        return cls(**logit_options(model), **options)

    def forward(
        self,
        hidden: Tensor,
        lm_head: nn.Module | Tensor,
        token_ids: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """logprobs, or (logprobs, entropy): fp32, the shape of ``token_ids``; 0 where masked out.

        Args:
            hidden: [..., D]; row i predicts token i.
            lm_head: the head (its weight and bias are used) or its weight [V, D].
            token_ids: [...] integer.
            mask: [...]; tokens with 0 or False are left out of the work.
        """
        hidden, weight, bias = in_one_dtype(hidden, *weight_and_bias(lm_head))
        found = linear_logprobs(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            token_ids.reshape(-1),
            bias=bias,
            row_mask=None if mask is None else (mask != 0).reshape(-1),
            **self.options,
        )
        shape = token_ids.shape
        if self.options["return_entropy"]:
            return found[0].view(shape), found[1].view(shape)
        return found.view(shape)


class FusedGRPOLoss(nn.Module):
    """From hidden states and the language-model head to the loss, in one op of three GEMMs.

    Args:
        temperature, logit_softcap, logit_scale: of the head, as in ``linear_logprobs``.
        loss_options: as in ``grpo_loss``: loss_type, importance_level, epsilon, epsilon_high,
            delta, beta, kl_estimator, is_correction, is_clip, entropy_coef, ...

    Raises:
        ValueError, TypeError: an option that does not exist or contradicts another.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        logit_softcap: float | None = None,
        logit_scale: float | None = None,
        return_entropy: bool = False,
        **loss_options,
    ) -> None:
        super().__init__()
        make_loss_options(**loss_options)
        self.options = {
            "temperature": temperature,
            "logit_softcap": logit_softcap,
            "logit_scale": logit_scale,
            "return_entropy": return_entropy,
            **loss_options,
        }

    @classmethod
    def for_model(cls, model: Any, **options) -> FusedGRPOLoss:
        """With the softcap and the scale that a Hugging Face model's config names."""
        return cls(**logit_options(model), **options)

    def forward(
        self,
        hidden: Tensor,
        lm_head: nn.Module | Tensor,
        token_ids: Tensor,
        advantages: Tensor,
        mask: Tensor | None = None,
        *,
        old_logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        sampler_logprobs: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> FusedLoss:
        """Padded: a row a sequence. Packed: sequences end to end, with ``cu_seqlens``.

        Args:
            hidden: [B, T, D] or [N, D]; position i predicts token i.
            lm_head: the head (its weight and bias are used) or its weight [V, D].
            token_ids: [B, T] or [N] integer, of the completions.
            advantages: [B] or [B, T]; packed: [S] or [N].
            mask: shape of ``token_ids``; 0 or False drops a token (padding, tools).
            old_logprobs, ref_logprobs, sampler_logprobs, denominator: as in ``grpo_loss``, in the
                shape of ``token_ids``.
            cu_seqlens: [S + 1], packed only.
        """
        if token_ids.ndim == 2 and cu_seqlens is not None:
            raise ValueError("cu_seqlens goes with packed token_ids [N], got [B, T]")
        if token_ids.ndim == 1 and cu_seqlens is None:
            raise ValueError("packed token_ids [N] need cu_seqlens, which is None")
        shape = tuple(token_ids.shape)
        fields = (old_logprobs, ref_logprobs, sampler_logprobs)
        if token_ids.ndim == 2:
            cu_seqlens = row_bounds(*shape, token_ids.device)
            advantages = flat(advantages, shape)
            fields = tuple(flat(field, shape) for field in fields)
        hidden, weight, bias = in_one_dtype(hidden, *weight_and_bias(lm_head))
        loss, metrics, logprobs = linear_grpo_loss(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            token_ids.reshape(-1),
            fields[0],
            advantages,
            bias=bias,
            row_mask=None if mask is None else (mask != 0).reshape(-1),
            cu_seqlens=cu_seqlens,
            ref_logprobs=fields[1],
            sampler_logprobs=fields[2],
            denominator=denominator,
            **self.options,
        )
        return FusedLoss(loss, metrics, logprobs.view(shape))
