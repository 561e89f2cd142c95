"""Finding the final answer in a completion.

Only text after the last ``</think>`` counts, and only what is marked: ``\\boxed{...}``,
``<answer>...</answer>``, or a line ``Answer: ...``. "Any number in the text" is never an answer: a
policy under training learns within hours to write every number it can think of.

All scans are linear in the length of the completion.
"""

from __future__ import annotations

import re
from typing import Any

MAX_ANSWER_CHARS = 2000
MAX_DISTINCT_ANSWERS = 4
_MAX_NESTED_BOXES = 8

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ANSWER_LINE = re.compile(r"\banswer\s*[:\uff1a][ \t]*([^\n]*)", re.IGNORECASE)
_EMPHASIS = re.compile(r"\*\*([^*]+)\*\*|`([^`]+)`")


def completion_text(completion: Any) -> str:
    """The text of a completion: a string, or the last message of a TRL conversation."""
    if isinstance(completion, str):
        return completion
    return completion[-1]["content"]


def text_after_thinking(text: str, thinking_prefilled: bool = False) -> str | None:
    """The part of ``text`` that may hold the answer; None when a think block is still open.

    ``thinking_prefilled``: the prompt itself ended in ``<think>``, so the completion starts inside
    the block.
    """
    head, closed, tail = text.rpartition("</think>")
    if "<think>" in tail:
        return None
    if not closed and thinking_prefilled:
        return None
    return tail


def boxed_answers(text: str) -> list[str] | None:
    """Contents of every outermost ``\\boxed{...}``, in order, boxes within taken off; None when one
    is never closed."""
    found = []
    position = 0
    while box := _BOX.search(text, position):
        end = _closing_brace(text, box.end())
        if end is None:
            return None
        found.append(_unboxed(text[box.end() : end]).strip())
        position = end + 1
    return found


def _unboxed(content: str) -> str:
    """``\\boxed{x=\\boxed{5}}`` holds ``x=5``."""
    for _ in range(_MAX_NESTED_BOXES if len(content) <= MAX_ANSWER_CHARS else 0):
        box = _BOX.search(content)
        end = None if box is None else _closing_brace(content, box.end())
        if end is None:
            break
        content = content[: box.start()] + content[box.end() : end] + content[end + 1 :]
    return content


def _closing_brace(text: str, start: int) -> int | None:
    """Index of the brace that closes the group whose content starts at ``start``."""
    depth = 1
    position = start
    while position < len(text):
        char = text[position]
        if char == "\\":
            position += 1  # \{ and \} are characters, not groups
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None


def marked_answers(text: str) -> list[str] | None:
    """Every marked answer in ``text`` (already cut to what follows the thinking), without repeats.

    ``<answer>`` blocks and boxes count together: a completion that boxes one value and tags another
    has given two answers. ``Answer:`` lines count only when there is neither. None when nothing
    is marked, or a box or an answer tag is left open.
    """
    boxes = boxed_answers(text)
    if boxes is None:
        return None
    blocks = _answer_blocks(text)
    if blocks is None:
        return None
    found = boxes + [block for block in blocks if not _BOX.search(block)]
    if not found:
        found = [_strip_markup(line) for line in _ANSWER_LINE.findall(text)]
    distinct = list(dict.fromkeys(answer for answer in found if answer))
    return distinct or None


def _answer_blocks(text: str) -> list[str] | None:
    pieces = text.split("<answer>")[1:]
    blocks = []
    for piece in pieces:
        content, closed, _ = piece.partition("</answer>")
        if not closed:
            return None
        content = content.strip()
        emphasised = _EMPHASIS.fullmatch(content)
        blocks.append((emphasised[1] or emphasised[2]).strip() if emphasised else content)
    return blocks


def _strip_markup(line: str) -> str:
    """``**Answer:** 42.**`` and the like: Markdown emphasis and a full stop are not the answer."""
    line = line.strip().strip("*_` \t")
    return line[:-1].rstrip() if line.endswith(".") else line
