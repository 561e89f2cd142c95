"""The reward for multiple choice: 1 when the letter marked in a completion is the right one.

The letter counts where an answer counts (``answers.py``): boxed, in ``<answer>``, or in a line
"ANSWER: C", after the thinking. "C", "(C)", "C) Paris" and "C. Paris" name the choice C; a marked
answer that names no choice, or several at once ("(A) or (B)"), is no answer, and two marked answers
with different letters are wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_engine.rewards.answers import completion_text, marked_answers, text_after_thinking
from grpo_engine.types import UserError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MARKUP = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}|[*_`$]")
_NAMED = re.compile(
    r"(?:answer\s*:\s*)?(?:\(([A-Z])\)(?:[.:]|\s|$)|([A-Z])(?:[).:]|$))(?P<rest>.*)", re.IGNORECASE
)
_ANOTHER = re.compile(r"\b[A-Z]\)|\([A-Z]\b")


def chosen_letters(
    completion: Any, num_choices: int, *, thinking_prefilled: bool = False
) -> list[str]:
    """The letters that ``completion`` marks as its answer, without repeats; empty if none."""
    tail = text_after_thinking(completion_text(completion), thinking_prefilled)
    found = marked_answers(tail) if tail is not None else None
    letters = []
    for answer in found or []:
        plain = _MARKUP.sub(lambda group: group[1] or "", answer).strip()
        named = _NAMED.fullmatch(" ".join(plain.split()))
        if named is None or _ANOTHER.search(named["rest"]):
            continue
        letter = (named[1] or named[2]).upper()
        if letter in LETTERS[:num_choices] and letter not in letters:
            letters.append(letter)
    return letters


def _judge(
    completion: Any, row: Mapping[str, Any], *, thinking_prefilled: bool = False
) -> tuple[float | None, str]:
    solution, count = row["solution"], row["num_choices"]
    if not isinstance(count, int) or solution not in list(LETTERS[:count]):
        return None, "gold_invalid"
    letters = chosen_letters(completion, count, thinking_prefilled=thinking_prefilled)
    return float(letters == [solution]), "ok" if letters else "no_answer"


def choice_reward(
    completions: Sequence[Any],
    solution: Sequence[str],
    num_choices: Sequence[int],
    *,
    thinking_prefilled: bool = False,
    **_: Any,
) -> list[float | None]:
    """1.0 / 0.0 for the right letter / anything else; None where ``solution`` is no letter of the
    ``num_choices`` choices (TRL signature). Raises UserError for unequal lengths."""
    if not len(completions) == len(solution) == len(num_choices):
        raise UserError(
            f"choice reward: {len(completions)} completions, {len(solution)} solutions and "
            f"{len(num_choices)} num_choices"
        )
    return [
        _judge(
            completion,
            {"solution": letter, "num_choices": count},
            thinking_prefilled=thinking_prefilled,
        )[0]
        for completion, letter, count in zip(completions, solution, num_choices, strict=True)
    ]


choice_reward.judge = _judge
choice_reward.required_columns = ("solution", "num_choices")
