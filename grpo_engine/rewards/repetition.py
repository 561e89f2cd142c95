"""The repetition reward: a penalty for saying the same thing again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo_engine.rewards.answers import completion_text
from grpo_engine.rewards.words import repetition_tokens
from grpo_engine.types import UserError


def repetition_reward(
    completions: Sequence[Any], *, ngram_size: int = 3, max_penalty: float = -1.0, **_: Any
) -> list[float]:
    """``max_penalty`` * (1 - unique n-grams / n-grams) of each completion (TRL signature).

    0 for a text that never repeats ``ngram_size`` words, or has too few, and close to
    ``max_penalty`` for one that loops. Words are the lower-cased pieces between blanks; Chinese,
    Japanese and Thai count by character. Raises UserError if ``max_penalty`` > 0 or
    ``ngram_size`` < 1.
    """
    if max_penalty > 0:
        raise UserError(f"repetition reward: max_penalty must be <= 0, got {max_penalty}")
    if ngram_size < 1:
        raise UserError(f"repetition reward: ngram_size must be >= 1, got {ngram_size}")
    return [
        repeated_share(completion_text(completion), ngram_size) * max_penalty
        for completion in completions
    ]


def repeated_share(text: str, ngram_size: int) -> float:
    """1 - unique / total of the word n-grams of ``text``; 0 when there is none."""
    tokens = repetition_tokens(text)
    total = len(tokens) - ngram_size + 1
    if total < 1:
        return 0.0
    ngrams = zip(*(tokens[start:] for start in range(ngram_size)), strict=False)
    return 1 - len(set(ngrams)) / total
