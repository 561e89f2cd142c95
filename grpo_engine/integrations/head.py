"""The language-model head as trainers hand it over: a module or its tensors, in mixed dtypes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from grpo_engine.integrations.contract import Unsupported


def weight_and_bias(lm_head: nn.Module | Tensor) -> tuple[Tensor, Tensor | None]:
    """Raises Unsupported for a head with an adapter, whose ``weight`` leaves the adapter out."""
    if isinstance(lm_head, Tensor):
        return lm_head, None
    if hasattr(lm_head, "base_layer"):
        raise Unsupported(
            f"the head is a {type(lm_head).__name__}, whose weight leaves its adapter out: take "
            "lm_head off the adapter's target_modules (modules_to_save works)"
        )
    return lm_head.weight, getattr(lm_head, "bias", None)


def in_one_dtype(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three in autocast's dtype where it is on, as ``torch.nn.Linear`` takes them, else in that
    of ``hidden``. The kernels themselves do not look at autocast."""
    device = hidden.device.type
    on = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if on else hidden.dtype
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
