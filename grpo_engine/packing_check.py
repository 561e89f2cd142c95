"""The proof that a model runs packed rows: some tokens packed, and one sequence at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from grpo_engine.types import UserError

# Largest packed-versus-alone difference that rounding explains, relative to the largest output.
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
# What a forward raises whose blocks do not know packed rows.
CANNOT = (TypeError, AttributeError, KeyError, IndexError, ValueError, NotImplementedError)


def require_packing(model: PreTrainedModel, measure: Callable[[], float], outputs: str) -> None:
    """UserError unless ``measure()`` finds that packed rows give what single ones give.

    Args:
        measure: the largest difference of the ``outputs`` (logits, scores), relative to the
            largest of them; NaN where one of them is.
    """
    name = type(model).__name__
    try:
        error = measure()
    except CANNOT as why:
        raise UserError(
            f"model: {name} cannot run packed rows ({type(why).__name__}: {why})"
        ) from why
    if math.isnan(error):
        weight = first_not_finite(model)
        if weight is not None:
            raise UserError(f"model: {weight} of {name} is not finite")
        raise UserError(f"model: {name} gives {outputs} that are not finite")
    limit = LIMITS.get(model.dtype, 1e-3)
    if not error <= limit:
        raise UserError(
            f"model: {name} gives other {outputs} for packed rows than for single ones "
            f"(relative difference {error:.1e}, limit {limit:.0e}); it cannot be trained here"
        )


@torch.no_grad()
def first_not_finite(model: PreTrainedModel, *, trained: bool = False) -> str | None:
    """Name of a parameter (``trained``: of those that take a gradient) with a NaN or infinity in
    it; None if all are finite."""
    for name, parameter in model.named_parameters():
        if (parameter.requires_grad or not trained) and not bool(parameter.isfinite().all()):
            return name
    return None
