"""Reading a judge's reply. The verdict is read from its end only: before that a judge quotes what
it judges, and what it judges may hold verdicts of its own making. None where the end is unclear."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from typing import Any

VERDICTS = ("A>>B", "A>B", "A=B", "B>A", "B>>A")
SWAPPED = dict(zip(VERDICTS, reversed(VERDICTS), strict=True))
_LONGEST_TAIL = 20_000  # characters of a reply that are looked at
_MOST_BRACES = 200
_VERDICT = re.compile(r"\[\[\s*([AB])\s*(>>|>|=|<<|<)\s*([AB])\s*\]\]")
_BAD_ESCAPE = re.compile(r'\\(?:u(?![0-9a-fA-F]{4})|(?!["\\/bfnrtu]))')


def labelled(reply: str, key: str, labels: Mapping[str, bool]) -> bool | None:
    """What the JSON object that ends the reply has under ``key``: the value of one of ``labels``.

    Forgiven: text or a code fence around the object, bare line breaks and LaTeX in its strings,
    unescaped quotes in the analysis if the label ends the reply. Not forgiven: no or another
    label, a key that is there twice, several objects that disagree (one may be a quotation), an
    object cut short (what it quotes may end in a whole one).
    """
    text = _end_of(reply)
    opening = re.compile(rf'\{{\s*"(?:analysis|{re.escape(key)})"')
    last, start = _last_object(text)
    if last is None:
        ending = re.search(
            rf'"{re.escape(key)}"\s*:\s*"([A-Za-z ]+)"\s*\}}[\s`*]*\Z', text, re.IGNORECASE
        )
        if ending is None or len(opening.findall(text)) != 1:
            return None
        return labels.get(ending[1].strip().lower())
    before = _objects(text[:start], opening)
    if before is None:
        return None
    said = {str(one.get(key)).strip().lower() for one in (*before, last)}
    return labels.get(said.pop()) if len(said) == 1 else None


def pairwise_verdict(reply: str) -> str | None:
    """The verdict that ends the reply's last line that has words, one of ``VERDICTS``; None where
    there is none, or another one in the same line."""
    lines = [line for line in _end_of(reply).splitlines() if any(map(str.isalnum, line))]
    if not lines:
        return None
    last = html.unescape(lines[-1]).replace("\\", "")
    matches = list(_VERDICT.finditer(last))
    if not matches or any(map(str.isalnum, last[matches[-1].end() :])):
        return None
    verdicts = {_in_order(*match.groups()) for match in matches}
    return verdicts.pop() if len(verdicts) == 1 else None


def _in_order(first: str, sign: str, second: str) -> str | None:
    if first == second:
        return None
    if sign == "=":
        return "A=B"
    if "<" in sign:
        first, second, sign = second, first, sign.replace("<", ">")
    return f"{first}{sign}{second}"


def _end_of(reply: str) -> str:
    """The reply's end, without the reasoning of a judge that thinks; nothing if it still does."""
    _, _, said = reply.rpartition("</think>")
    if "<think>" in said:
        return ""
    return said[-_LONGEST_TAIL:]


def _last_object(text: str) -> tuple[dict[str, Any] | None, int]:
    """The JSON object that ends at the last closing brace, and where it starts."""
    end = text.rfind("}") + 1
    starts = [match.start() for match in re.finditer(r"\{", text[:end])]
    for start in reversed(starts[-_MOST_BRACES:]):
        found = _parsed(text[start:end])
        if found is not None:
            return found, start
    return None, 0


def _parsed(piece: str) -> dict[str, Any] | None:
    for written in (piece, _BAD_ESCAPE.sub(r"\\\g<0>", piece)):
        try:
            return json.loads(written, strict=False, object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError):
            continue
    return None


def _objects(text: str, opening: re.Pattern[str]) -> list[dict[str, Any]] | None:
    """The objects that begin with ``opening``; None if one of them does not end in ``text``."""
    found: list[dict[str, Any]] = []
    position = 0
    while match := opening.search(text, position):
        start = match.start()
        ends = [start + brace.end() for brace in re.finditer(r"\}", text[start:])]
        for end in ends[:_MOST_BRACES]:
            one = _parsed(text[start:end])
            if one is not None:
                found.append(one)
                position = end
                break
        else:
            return None
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A key given twice has no value: readers differ in which one they take."""
    names = [name for name, _ in pairs]
    return {name: value for name, value in pairs if names.count(name) == 1}
