"""The format rewards: R1-Zero's ``<think> ... </think> <answer> ... </answer>`` and nothing else,
and the readable one of the later stages, ``<think> ... </think> summary`` (v1, section 2.3.1).

Whitespace policy: blanks and newlines are allowed before ``<think>``, between the two blocks, and
after ``</answer>``; nothing else may stand there. The answer must hold a character that can be
seen: no whitespace, no control or format character (a zero-width space). The thinking may be empty:
a reward for its mere presence would make answers longer by construction, and then a growing
response length would say nothing about reasoning.

One pass over the tags, no regular expression over the text between them: the regexes in
circulation accept trailing text or a second answer because ``.*`` and ``$`` mean less than they
seem.

In the readable format the summary is whatever follows the reasoning; it may hold answer tags or a
box. It must hold a character that can be seen and no think tag.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from grpo_engine.rewards.answers import completion_text

_TAG = re.compile(r"</?(?:think|answer)>")
_BLANKS = "\u115f\u1160\u2800\u3164\uffa0\u034f"  # Hangul fillers, empty Braille, a joiner
_ORDER = ["<think>", "</think>", "<answer>", "</answer>"]


def has_r1_format(text: str, *, thinking_prefilled: bool = False) -> bool:
    """Whether ``text`` is exactly one think block followed by exactly one non-empty answer block.

    ``thinking_prefilled``: the prompt already ended in ``<think>``; the completion must then not
    repeat it.
    """
    if thinking_prefilled:
        text = "<think>" + text
    tags = list(_TAG.finditer(text))
    if [tag.group() for tag in tags] != _ORDER:
        return False
    think, think_end, answer, answer_end = tags
    outside = (
        text[: think.start()],
        text[think_end.end() : answer.start()],
        text[answer_end.end() :],
    )
    return not any(part.strip() for part in outside) and _has_visible(
        text[answer.end() : answer_end.start()]
    )


def _has_visible(text: str) -> bool:
    """Whether a character is neither a separator nor invisible (Unicode categories Z and C, and
    the fillers and blanks that are counted as letters and symbols)."""
    return any(unicodedata.category(one)[0] not in "ZC" and one not in _BLANKS for one in text)


def format_reward(
    completions: list[Any], *, thinking_prefilled: bool = False, **_: Any
) -> list[float]:
    """1.0 for each completion in the R1-Zero format, else 0.0 (TRL signature)."""
    return [
        float(has_r1_format(completion_text(completion), thinking_prefilled=thinking_prefilled))
        for completion in completions
    ]


def has_readable_format(text: str, *, thinking_prefilled: bool = False) -> bool:
    """Whether ``text`` is exactly one think block followed by a summary that is not empty."""
    if thinking_prefilled:
        text = "<think>" + text
    tags = [tag for tag in _TAG.finditer(text) if "think" in tag.group()]
    if [tag.group() for tag in tags] != _ORDER[:2]:
        return False
    think, think_end = tags
    return not text[: think.start()].strip() and _has_visible(text[think_end.end() :])


def format_r1_reward(
    completions: list[Any], *, thinking_prefilled: bool = False, **_: Any
) -> list[float]:
    """1.0 for each completion in the readable R1 format, else 0.0 (TRL signature)."""
    return [
        float(
            has_readable_format(completion_text(completion), thinking_prefilled=thinking_prefilled)
        )
        for completion in completions
    ]
