"""Words of reflection in answers (v2, C.2), and an answer that looks back and corrects itself."""

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
RULE = (
    "a right answer that writes an equation, then a word of the list, then the same left side with "
    "another result"
)

_WORDS = re.compile(
    rf"\b(?:{'|'.join(PAPER_WORDS)})\b|{'|'.join(CHINESE_WORDS)}", flags=re.IGNORECASE
)
# What an equation is written with; a run of it is cut at ends of sentences and between two numbers.
_RUN = re.compile(r"[-−0-9.+*×/÷= ]{5,}")
_CUT = re.compile(r"\.(?= |$)|(?<=[0-9]) +(?=[0-9])")
_LONGEST = 200  # characters of an equation
_NUMBER = r"[-−]? ?[0-9]+(?:\.[0-9]+)?"
_SUM = re.compile(rf"{_NUMBER}(?: ?[-−+*×/÷] ?{_NUMBER})+")  # of at least one operator
_RESULT = re.compile(_NUMBER)


def reflective_words(text: str) -> Counter[str]:
    """How often each word of the list stands in ``text``; letters count in either case."""
    return Counter(found.lower() for found in _WORDS.findall(text))


def correction(text: str) -> tuple[str, str, str] | None:
    """(the first equation, the word, the equation that replaces it) where ``text`` first looks back
    and changes a result; None where it does not."""
    words = [(found.start(), found.group()) for found in _WORDS.finditer(text)]
    starts = [at for at, _ in words]
    results: dict[str, tuple[int, str, str]] = {}
    for start, equation in _equations(text) if words else ():
        left, right = (re.sub(" ", "", part).replace("−", "-") for part in equation.split("="))
        before = results.get(left)
        if before is not None and before[1] != right:
            last = bisect_left(starts, start) - 1  # the last word before this equation
            if last >= 0 and starts[last] > before[0]:
                return before[2], words[last][1], equation
        results[left] = (start, right, equation)
    return None


def _equations(text: str) -> Iterator[tuple[int, str]]:
    """(where, "9 + 8 = 17") of each sum with one result, in time linear in the text."""
    for run in _RUN.finditer(text):
        body, begin = run.group(), 0
        cuts = [(cut.start(), cut.end()) for cut in _CUT.finditer(body)]
        for end, following in (*cuts, (len(body), 0)):
            piece = body[begin:end]
            left, equals, right = piece.partition("=")
            short = len(piece) <= _LONGEST
            if short and _SUM.fullmatch(left.strip()) and _RESULT.fullmatch(right.strip()):
                yield run.start() + begin, piece.strip()
            begin = following


@dataclass(frozen=True)
class Moment:
    """An answer that corrects itself: the sample, its step, and what it changed."""

    step: int
    held_out: bool
    sample: Mapping[str, Any]
    first: str
    word: str
    second: str


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
    first in the file."""
    for held_out, kept in ((True, evals), (False, samples)):
        for step in sorted(kept, reverse=True):
            for sample in kept[step]:
                if is_right(sample):
                    changed = correction(str(sample.get("completion", "")))
                    if changed is not None:
                        return Moment(step, held_out, sample, *changed)
    return None


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
