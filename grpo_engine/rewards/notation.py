"""One spelling for one answer: LaTeX dressing off, containers and equations told apart.

Works on short answer strings, not on completions. Nothing here evaluates anything.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

_SUPERSCRIPTS = str.maketrans(
    "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079", "-0123456789"
)
_CHARACTERS: dict[int, int | None] = {
    **{0xFF01 + offset: 0x21 + offset for offset in range(94)},  # of a Chinese keyboard
    **dict.fromkeys((0x200B, 0x2060, 0xFEFF)),  # without width
}


def _fraction(character: re.Match[str]) -> str:
    numerator, _, denominator = unicodedata.normalize("NFKC", character[0]).partition("\u2044")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


_SUBSTITUTIONS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"[\u2212\u2013\u2014]"), "-"),
    (re.compile(r"[\u00bc-\u00be\u2150-\u215e]"), _fraction),
    (
        re.compile(r"[\u207b\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+"),
        lambda digits: f"^{{{digits[0].translate(_SUPERSCRIPTS)}}}",
    ),
    (re.compile(r"\u221a\s*(?:\(([^()]*)\)|(\d+|[a-zA-Z]))"), r"\\sqrt{\1\2}"),
    (re.compile(r"\u2264"), r"\\le "),
    (re.compile(r"\u2265"), r"\\ge "),
    (re.compile(r"\u222a"), r"\\cup "),
    (re.compile(r"\u2208"), r"\\in "),
    (re.compile(r"\u00d7"), r"\\times "),
    (re.compile(r"\u00f7"), r"\\div "),
    (re.compile(r"\u00b7"), r"\\cdot "),
    (re.compile(r"\u221e"), r"\\infty "),
    (re.compile(r"\u03c0|(?<![a-zA-Z\\])pi(?![a-zA-Z])"), r"\\pi "),
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\s*"), ""),
    # a second backslash in front: the end of a matrix row
    (re.compile(r"\\displaystyle(?![a-zA-Z])|(?<!\\)\\[!()\[\]]"), ""),
    (re.compile(r"\\langle(?![a-zA-Z])"), "("),
    (re.compile(r"\\rangle(?![a-zA-Z])"), ")"),
    (re.compile(r"\\\$|\$"), ""),
    (re.compile(r"(?<!\\)\\[,;: ]|(?<=.)~|\\q?quad(?![a-zA-Z])"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\lbrace(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\u00b0|\\degree(?![a-zA-Z])"), r"\\text{ deg}"),
    (re.compile(r"\\(?:mathrm|mbox|textrm|textbf|mathbf|textit|textnormal)(?=\s*\{)"), r"\\text"),
    (re.compile(r"(\\text\{[^{}]*)\}\s*\\text\{|(\\text\{ deg)\}\s*(?=[CF]$)"), r"\1\2 "),
    (re.compile(r"(\\text\{ deg [CF])$"), r"\1}"),
    (re.compile(r"\\text\s*\{\s*(?:and|or)\s*\}|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])"), ","),
    # brace-less shorthand: \frac43, \frac4{3}, \frac{4}3, \sqrt2
    (re.compile(r"\\frac\s*([0-9a-zA-Z])\s*(?=[0-9a-zA-Z{])"), r"\\frac{\1}"),
    (re.compile(r"(\\frac\s*\{[^{}]*\})\s*([0-9a-zA-Z])"), r"\1{\2}"),
    (re.compile(r"\\sqrt\s*([0-9a-zA-Z])"), r"\\sqrt{\1}"),
    (re.compile(r"\s+"), " "),
    (re.compile(r"\\log_(\d+) (?=\d)"), r"\\log_{\1}"),
    # a blank means something only between two digits ("3 1/2") or two words
    (re.compile(r"(?<![0-9a-zA-Z]) | (?![0-9a-zA-Z])|(?<=[0-9]) (?=[a-zA-Z]\b)"), ""),
    (re.compile(r"^([\"'])([^\"']*)\1$"), r"\2"),
    # "= 5" goes on from a left side that was not written again
    (re.compile(r"^=(?!=)"), ""),
]
_TEXT_GROUP = re.compile(r"\\text\{([^{}]*)\}")
_MEMBERSHIP = re.compile(r"[a-zA-Z]\\in(?![a-zA-Z])\s?(?P<rest>.+)")
_WORD = re.compile(r"(?<![a-zA-Z\\])[a-zA-Z]{3,}(?![a-zA-Z])")
_FUNCTION = re.compile(
    "(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|log|exp|sqrt|max|min|gcd|lcm|mod|det|abs|inf"
)

_VALUE_NAME = re.compile(
    r"(?:\\|(?<![a-zA-Z]))(?:(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|sqrt|pi|log|ln|lg|exp|[dt]?binom"
    r"|gcd|lcm|min|max|abs|floor|ceil|lfloor|lceil|l?vert|det|b?mod|inf|infty|sum|prod|int|lim)"
    r"(?![a-zA-Z])"
    r"|(?<![a-zA-Z\\])[ei]\^"
)
_DANGLING = re.compile(
    r"(?:^[*/^=]|[-+*/^=_])$|(?<![a-zA-Z])(?:log|ln|lg|exp|sqrt|sin|cos|tan|cot|sec|csc)$"
)


class Container(NamedTuple):
    """A top-level list of answers. ``kind`` is the bracket: "(", "[", "{" (a set) or "" (bare)."""

    kind: str
    items: list[str]


def normalise(text: str) -> str:
    """``text`` in one spelling: no dollar signs, sizing or spacing commands; braces filled in."""
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _SUBSTITUTIONS:
        text = pattern.sub(replacement, text)
    text = text.strip()
    if whole := _TEXT_GROUP.fullmatch(text):
        text = whole[1].strip()
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


def may_denote_number(text: str) -> bool:
    """Whether ``text``, which exact reading rejects, could still be a number: ``\\sqrt{2}\\pi``.

    Digits and signs that are no exact number ("5-"), free variables, relations and words cannot. A
    function or a constant must be named; then it is for the symbolic comparison to say.
    """
    if _DANGLING.search(text) or re.search(r"[<>=]", text):
        return False
    balanced = all(text.count(a) == text.count(b) for a, b in ("()", "[]", "{}"))
    return balanced and _VALUE_NAME.search(text) is not None


def is_constant(text: str) -> bool:
    """Whether ``text`` names a function or constant and has digits or \\pi, but no variable."""
    if not may_denote_number(text) or not re.search(r"\d|\\pi", text):
        return False
    rest = re.sub(r"\\(?:frac|cdot|times|div)(?![a-zA-Z])", "", _VALUE_NAME.sub("", text))
    return not re.search("[a-zA-Z]", rest)


def equation_sides(text: str) -> list[str]:
    """The sides of ``a = b = ...``; one element when ``text`` is no equation (``<=``, ``!=``)."""
    if "=" not in text or re.search(r"[<>!=]=|\\n(?:e|eq)(?![a-zA-Z])", text):
        return [text]
    sides = [side.strip() for side in text.split("=")]
    return sides if all(sides) else [text]


_NAME = r"\\?[a-zA-Z]+(?:_\{?\w+\}?)?'?(?:\([a-zA-Z]\))?"
_VARIABLE = re.compile(rf"{_NAME}|\({_NAME}(?:,{_NAME})+\)")


def is_variable(text: str) -> bool:
    """A name one may put before ``=``: ``x``, ``x_1``, ``f(x)``, ``\\theta``, ``AB``, ``(x,y)``."""
    return _VARIABLE.fullmatch(text) is not None


def number_of_names(items: list[str]) -> int:
    """How many different variables the equations among ``items`` name."""
    sides = [equation_sides(item) for item in items]
    return len({one[0] for one in sides if len(one) == 2 and is_variable(one[0])})


def split_container(text: str) -> Container | None:
    """The top-level items of a tuple, list, set or bare list, or None for a single value.

    ``(5)`` is a single value; ``[0, 1)``, unions and matrices are left to the symbolic comparison.
    A set may lack its backslashes: ``{1, 2}``.
    ``;`` separates like ``,``. ``a \\pm b`` is two answers.
    """
    membership = _MEMBERSHIP.fullmatch(text)
    if membership:
        text = membership["rest"]
    kind, inner = _outer_bracket(text)
    if kind == r"\{" or (kind and _top_level_items(inner)[1:]):
        return Container(kind[-1:], _with_both_signs(_top_level_items(inner)))
    items = _with_both_signs(_top_level_items(text))
    return Container("", items) if len(items) > 1 else None


def _outer_bracket(text: str) -> tuple[str, str]:
    """("(", inside) when one bracket pair encloses all of ``text``; ("", text) otherwise."""
    opening = {"(": ")", "[": "]", "{": "}"}
    if text.startswith(r"\{") and text.endswith(r"\}"):
        kind, inner = r"\{", text[2:-2]
    elif text[:1] in opening and text.endswith(opening[text[:1]]):
        kind, inner = text[0], text[1:-1]
    else:
        return "", text
    depth = 0
    for char in inner:
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return "", text
    return (kind, inner) if depth == 0 else ("", text)


def _top_level_items(text: str) -> list[str]:
    depth = 0
    items = [""]
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char in ",;" and depth == 0:
            items.append("")
        else:
            items[-1] += char
    return [item.strip() for item in items if item.strip()]


def _with_both_signs(items: list[str]) -> list[str]:
    signed = []
    for item in items:
        if item.count(r"\pm") == 1:
            signed += [item.replace(r"\pm", "+").removeprefix("+"), item.replace(r"\pm", "-")]
        else:
            signed.append(item)
    return signed


def plain_words(text: str) -> str | None:
    """The words of a textual answer ("East", "(B)"), lower case; None when it is mathematics."""
    bare = _TEXT_GROUP.sub(r"\1", text).strip().strip("\"'`.:")
    if re.fullmatch(r"\([a-zA-Z]\)|[a-zA-Z]\)?", bare):
        return bare.strip("()").lower()
    words = [word for word in _WORD.findall(bare) if not _FUNCTION.fullmatch(word.lower())]
    if not words or re.search(r"\\[a-zA-Z]", bare):
        return None
    return " ".join(bare.lower().split())
