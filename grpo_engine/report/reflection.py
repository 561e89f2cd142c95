"""Words of reflection in answers (v2, C.2), and an answer that looks back and corrects itself.

The paper's own aha moment (v1, Table 3) goes back to the start and changes no result: by the rule
it is none, and it is shown for its many words where no answer of a run corrects itself.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# v2 C.2, chosen there by three experts.
PAPER_WORDS = (
    *("wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate"),
    "check",
)
# Not in the paper: the same in Chinese.
CHINESE_WORDS = (
    *("等等", "等一下", "检查", "验算", "验证", "重新", "但是", "不过", "然而"),
    *("错误", "错了", "不对"),
)
# Of these, the words that take something back: between "x = 5" and "x = 7" a "but" may as well lead
# to a second solution.
_TAKING_BACK = {
    *("wait", "mistake", "retry", "error", "wrong"),
    *("等等", "等一下", "重新", "错误", "错了", "不对"),
}
RULE = (
    "a right answer that writes an equation, then a word of the list, then the same left side with "
    "another result"
)
FALLBACK = "the right answer with the most words of the list, at least {least} of them"
LEAST_WORDS = 2

_WORDS = re.compile(
    rf"\b(?:{'|'.join(PAPER_WORDS)})\b|{'|'.join(CHINESE_WORDS)}", flags=re.IGNORECASE
)
_LATEX = [
    (re.compile(r"\\(?:left|right|displaystyle|,|;|!|\(|\)|\[|\])|\$"), ""),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\[dt]?frac\{(\w{1,20})\}\{(\w{1,20})\}"), r"\1/\2"),
    (re.compile(r"\\[dt]?frac\{([^{}]{1,60})\}\{([^{}]{1,60})\}"), r"(\1)/(\2)"),
    (re.compile(r"\\sqrt\{([^{}]{1,60})\}"), r"sqrt(\1)"),
    (re.compile(r"\\(?:text|mathrm|boxed|mathbf)\{([^{}]{1,60})\}"), r"\1"),
    (re.compile(r"\^\{([^{}]{1,20})\}"), r"^(\1)"),
]
_WINDOW = 80  # longest left side, in characters
_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_BRACKET = r"\([^()=\n]{1,40}(?:\([^()=\n]{1,30}\)[^()=\n]{0,30}){0,2}\)"
_ATOM = (
    rf"(?:[-−] ?)?(?:(?:sqrt)?{_BRACKET}|{_NUMBER}(?: ?[A-Za-z]{{1,15}})?|[A-Za-z](?:_?[0-9])?)"
    rf"(?:\^(?:{_NUMBER}|[A-Za-z]|{_BRACKET}))?"
)
_LEFT = re.compile(rf"(?<![\w.)]){_ATOM}(?:(?: ?[-−+*×/÷] ?|(?=\()){_ATOM})* ?$")
_RIGHT = re.compile(rf" ?([-−]? ?{_NUMBER}(?:/{_NUMBER})?)(?! ?[-−+*×/÷=^(]|[0-9A-Za-z])")
_VARIABLE = re.compile("[A-Za-z](?:_?[0-9])?")
_OPERATOR = re.compile(r"(?<=[\w)]) ?[-−+*×/÷^(]")
_GOES_ON = tuple("=+-−*×/÷^√<>")  # before a left side: it is a part of a longer one


def reflective_words(text: str) -> Counter[str]:
    """How often each word of the list stands in ``text``; letters count in either case."""
    return Counter(found.lower() for found in _WORDS.findall(text))


def correction(text: str) -> tuple[str, str, str] | None:
    """(the first equation, the word, the equation that replaces it) where ``text`` first looks back
    and changes a result; None where it does not.

    An equation is a sum, product, ... with or without brackets, variables, units and LaTeX (shown
    without it), or a single variable, and one number on its right.
    """
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    words = [(found.start(), found.group()) for found in _WORDS.finditer(text)]
    starts = [at for at, _ in words]
    results: dict[str, tuple[int, str, str]] = {}
    for start, equation in _equations(text) if words else ():
        left, right = (_one_spelling(part) for part in equation.split("="))
        before = results.get(left)
        if before is not None and before[1] != right:
            last = bisect_left(starts, start) - 1  # the last word before this equation
            between = words[bisect_left(starts, before[0]) : last + 1]
            if _VARIABLE.fullmatch(left):
                between = [one for one in between if one[1].lower() in _TAKING_BACK]
            if between:
                return before[2], between[-1][1], equation
        results[left] = (start, right, equation)
    return None


def _one_spelling(side: str) -> str:
    for written, meant in ((" ", ""), ("−", "-"), ("×", "*"), ("÷", "/")):
        side = side.replace(written, meant)
    return side


def _equations(text: str) -> Iterator[tuple[int, str]]:
    """(where, "9 + 8 = 17") of each left side with one number, in time linear in the text."""
    at = text.find("=")
    while at >= 0:
        begin = max(0, at - _WINDOW)
        left, right = _LEFT.search(text[begin:at]), _RIGHT.match(text, at + 1)
        if left is not None and right is not None:
            start = begin + left.start()
            side = left.group().strip()
            whole = not text[max(0, start - 3) : start].rstrip().endswith(_GOES_ON)
            if whole and (_OPERATOR.search(side) or _VARIABLE.fullmatch(side)):
                yield start, text[start : right.end()].strip()
        at = text.find("=", at + 1)


@dataclass(frozen=True)
class Moment:
    """An answer that corrects itself: the sample, its step, and what it changed. Or, where none
    does, one with many words of reflection: ``changed`` is None."""

    step: int
    held_out: bool
    sample: Mapping[str, Any]
    changed: tuple[str, str, str] | None  # the first equation, the word, the second


def is_right(sample: Mapping[str, Any]) -> bool:
    """Of a held-out sample its verdict, of a training one its accuracy reward."""
    if "correct" in sample:
        return sample["correct"] == 1
    rewards = sample.get("rewards")
    return isinstance(rewards, Mapping) and rewards.get("accuracy") == 1


def find_moment(
    evals: Mapping[int, Sequence[Mapping[str, Any]]],
    samples: Mapping[int, Sequence[Mapping[str, Any]]],
) -> Moment | None:
    """By ``RULE``: of the latest step that has one, held-out answers before training ones, the
    first in the file. Where there is none, by ``FALLBACK``."""
    most, found = LEAST_WORDS - 1, None
    for held_out, kept in ((True, evals), (False, samples)):
        for step in sorted(kept, reverse=True):
            for sample in filter(is_right, kept[step]):
                text = str(sample.get("completion", ""))
                changed = correction(text)
                if changed is not None:
                    return Moment(step, held_out, sample, changed)
                words = reflective_words(text).total()
                if words > most:
                    most, found = words, Moment(step, held_out, sample, None)
    return found


def words_by_step(
    kept: Mapping[int, Sequence[Mapping[str, Any]]],
) -> dict[int, tuple[int, Counter[str]]]:
    """step -> (answers, words in all of them)."""
    found = {}
    for step, answers in sorted(kept.items()):
        words: Counter[str] = Counter()
        for sample in answers:
            words += reflective_words(str(sample.get("completion", "")))
        if answers:
            found[step] = (len(answers), words)
    return found
