"""The length reward: DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo_engine.rewards.answers import completion_text
from grpo_engine.rewards.words import repetition_tokens
from grpo_engine.types import UserError


def length_reward(
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    max_length: int,
    cache: int,
    **_: Any,
) -> list[float]:
    """0 up to ``max_length - cache`` tokens, then linearly down to -1 at ``max_length`` (TRL
    signature).

    Lengths are those of ``completion_ids``. Without them words are counted, as in
    ``repetition_reward``: give both limits in words then. Raises UserError unless
    0 < cache <= max_length, and for unequal lengths.
    """
    if not 0 < cache <= max_length:
        raise UserError(
            f"length reward: wanted 0 < cache <= max_length, got cache={cache}, "
            f"max_length={max_length}"
        )
    if completion_ids is None:
        lengths = [len(repetition_tokens(completion_text(text))) for text in completions]
    elif len(completion_ids) != len(completions):
        raise UserError(
            f"length reward: {len(completions)} completions but {len(completion_ids)} "
            "completion_ids"
        )
    else:
        lengths = [len(ids) for ids in completion_ids]
    return [overlong_punishment(length, max_length, cache) for length in lengths]


def overlong_punishment(length: int, max_length: int, cache: int) -> float:
    """DAPO eq. 13 for one completion of ``length`` tokens."""
    excess = length - (max_length - cache)
    return -min(1.0, max(0, excess) / cache) if excess > 0 else 0.0
