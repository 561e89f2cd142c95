"""The accuracy reward for mathematics: 1 when the marked answer equals the reference, else 0.

Exact comparison first (``exact.py``: microseconds, no dependency), structure second (tuples, lists,
equations, units, words: ``notation.py``), Math-Verify last and only inside a killable worker
(``symbolic.py``). Conventions, so that nobody has to guess:

* Marker: ``\\boxed{}``, ``<answer>``, or a line ``Answer:``, after the last ``</think>``. An open
  think block, an open box or no marker is *no answer*. With several different marked answers all
  of them must be right.
* Percent: the sign is a unit. ``50%`` equals ``50%``, ``50`` and ``0.5``; ``50`` does not equal
  ``0.5``.
* A unit on one side only is ignored (``5 apples`` is ``5``); two different ones are never equal
  (``5 km`` and ``5 m``, ``5 apples`` and ``5 pears``). Magnitudes are multiplied in; words that
  change a number otherwise ("5 squared", "5 plus seven") leave no number. A numeral with a base
  equals only the same numeral with that base; base ten may be left out.
* Equations: ``x=5`` and ``=5`` answer ``5`` and the other way round; ``x=5`` is not ``y=5``. A
  numeric equation must be true: ``2+2=5`` is not ``5``. ``5=`` is malformed and wrong. Against
  ``x=1, y=2`` the order of ``1, 2`` counts.
* An expression is its value: ``2+3`` is ``5``.
* Against a number that is read exactly, only an answer that names a function or constant
  (``\\sqrt{}``, ``\\pi``, ``log``) is compared symbolically. Anything else that is no exact number,
  malformed or with free variables, is wrong, whether or not Math-Verify is installed.
* ``(a, b)`` and ``[a, b]`` are ordered; ``\\{a, b\\}`` is not; a bare list ``a, b`` is unordered
  against a bare list or a set, ordered against a bracket. ``;`` separates like ``,``.
* Words are compared as words, never as products of letters. ``\\ldots`` must be repeated literally.
* A reference may be bare, boxed (the last box counts), or end in GSM8K's ``#### 72``. One that does
  not parse or does not equal itself gives None: the completion is not judged at all.
* An answer too large to be compared (``(10^7)!`` against ``\\sqrt{2}``) is wrong.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, Protocol

from grpo_engine.rewards import notation
from grpo_engine.rewards.answers import (
    MAX_ANSWER_CHARS,
    MAX_DISTINCT_ANSWERS,
    boxed_answers,
    completion_text,
    marked_answers,
    text_after_thinking,
)
from grpo_engine.rewards.exact import exact_value
from grpo_engine.rewards.quantities import Quantity, split_unit, units_conflict
from grpo_engine.rewards.symbolic import MathVerify, require_math_verify
from grpo_engine.types import UserError

_TWO_NUMBERS = re.compile(r"\d \d")
_CLOCK = re.compile(r"0?(\d{1,2}:\d\d(?::\d\d)?)")
_ELLIPSIS = re.compile(r"\\[lcd]?dots|\.\.\.|\u2026")
_RELATION = re.compile(r"[<>]|\\(?:l|g)(?:e|eq|t)(?![a-zA-Z])|\\cup|\\infty")


class Symbolic(Protocol):
    """What the comparison asks for when exact reading is not enough."""

    def parses(self, gold: str) -> bool: ...

    def equal(self, gold: str, answer: str) -> bool: ...


class NeedsSymbolicError(Exception):
    """Raised outside a worker where a worker would compare symbolically."""


class _Deferred:
    def parses(self, gold: str) -> bool:
        raise NeedsSymbolicError(gold)

    def equal(self, gold: str, answer: str) -> bool:
        raise NeedsSymbolicError(gold, answer)


def judge_answer(
    text: str, solution: Any, symbolic: Symbolic, *, thinking_prefilled: bool = False
) -> tuple[float | None, str]:
    """(score, outcome) of one completion; outcome is ok, no_answer, too_long, resource_limit or
    gold_invalid (and in a worker that is killed, time_limit).

    The reference is checked first, so that an unusable one gives None to every completion of its
    group, also to those without an answer.
    """
    gold = _gold(solution)
    if gold is None or not _gold_is_valid(gold, symbolic):
        return None, "gold_invalid"
    tail = text_after_thinking(text, thinking_prefilled)
    answers = marked_answers(tail) if tail is not None else None
    if answers is None:
        return 0.0, "no_answer"
    if any(len(answer) > MAX_ANSWER_CHARS for answer in answers):
        return 0.0, "too_long"
    if len(answers) > MAX_DISTINCT_ANSWERS:
        return 0.0, "ok"
    try:
        right = all(_equal(gold, _normalise(answer), symbolic) for answer in answers)
    except (MemoryError, RecursionError, OverflowError):  # the reference alone was no such burden
        return 0.0, "resource_limit"
    return float(right), "ok"


_normalise = lru_cache(maxsize=8192)(notation.normalise)


def _gold(solution: Any) -> str | None:
    """The reference answer in normal spelling; None when there is none."""
    if isinstance(solution, bool) or not isinstance(solution, (str, int, float)):
        return None
    text = str(solution)
    if "####" in text:
        text = text.rpartition("####")[2]
    boxes = boxed_answers(text)
    if boxes is None:
        return None
    text = boxes[-1] if boxes else text
    return _normalise(text) or None if len(text) <= MAX_ANSWER_CHARS else None


def _value(quantity: Quantity) -> Fraction | None:
    """The exact number in it, a percent sign aside; ``[5]`` is 5."""
    number = quantity.number.removesuffix("%")
    if number.startswith("[") and number.endswith("]"):
        number = number[1:-1]
    value = exact_value(number)
    return None if value is None else value * quantity.scale


@lru_cache(maxsize=8192)
def _readable_without_symbols(gold: str) -> bool:
    quantity = split_unit(gold)
    return (
        _value(quantity) is not None
        or _CLOCK.fullmatch(quantity.number) is not None
        or notation.plain_words(gold) is not None
        or bool(_ELLIPSIS.search(gold))
    )


def _gold_is_valid(gold: str, symbolic: Symbolic) -> bool:
    if _readable_without_symbols(gold):
        return True
    container = notation.split_container(gold)
    if container is not None:
        return bool(container.items) and all(
            _gold_is_valid(item, symbolic) for item in container.items
        )
    name, *value = notation.equation_sides(gold)
    if len(value) == 1 and notation.is_variable(name):
        return _gold_is_valid(value[0], symbolic)
    return symbolic.parses(split_unit(gold).number)


def _equal(gold: str, answer: str, symbolic: Symbolic) -> bool:
    if gold == answer:
        return True
    if not answer or _ELLIPSIS.search(gold) or _ELLIPSIS.search(answer):
        return False
    gold_items, answer_items = notation.split_container(gold), notation.split_container(answer)
    if None not in (_value(split_unit(gold)), _value(split_unit(answer))):
        gold_items = answer_items = None  # 1,234 is a number here, not a list
    bare = any(items is not None and not items.kind for items in (gold_items, answer_items))
    if not bare and ("=" in gold or "=" in answer):
        return _equal_equations(gold, answer, symbolic)
    if gold_items or answer_items:
        return _equal_containers(gold, answer, gold_items, answer_items, symbolic)
    return _equal_values(gold, answer, symbolic)


def _equal_containers(
    gold: str,
    answer: str,
    gold_items: notation.Container | None,
    answer_items: notation.Container | None,
    symbolic: Symbolic,
) -> bool:
    if gold_items is None or answer_items is None:
        single, container = (gold, answer_items) if gold_items is None else (answer, gold_items)
        if container.kind == "{" and len(container.items) == 1:  # {5} is 5, {{5}} is not
            if notation.split_container(container.items[0]):
                return False
            pair = (single, container.items[0])
            return _equal_values(*(pair if gold_items is None else pair[::-1]), symbolic)
        # Math-Verify takes the list 1, 3 for the interval (1, 3).
        may_be_interval = container.kind in ("(", "[") and _RELATION.search(single) is not None
        return may_be_interval and symbolic.equal(gold, answer)
    kinds = {gold_items.kind, answer_items.kind}
    if len(gold_items.items) != len(answer_items.items):
        return False
    names = sorted(map(notation.number_of_names, (gold_items.items, answer_items.items)))
    names_matter = names[0] == 0 and names[1] > 1  # "x=1, y=2" against "1, 2"
    if kinds <= {"{", ""} and not names_matter:
        return _same_members(gold_items.items, answer_items.items, symbolic)
    if len(kinds) == 1 or "" in kinds or names_matter:
        pairs = zip(gold_items.items, answer_items.items, strict=True)
        return all(_equal(one, other, symbolic) for one, other in pairs)
    return False


def _same_members(gold: list[str], answer: list[str], symbolic: Symbolic) -> bool:
    remaining = list(gold)
    for item in answer:
        # Literal matches first: they cost nothing and are never wrong.
        candidates = [item] if item in remaining else remaining
        match = next((one for one in candidates if _equal(one, item, symbolic)), None)
        if match is None:
            return False
        remaining.remove(match)
    return True


def _equal_equations(gold: str, answer: str, symbolic: Symbolic) -> bool:
    gold_sides, answer_sides = notation.equation_sides(gold), notation.equation_sides(answer)
    name = gold_sides[0] if len(gold_sides) == 2 and notation.is_variable(gold_sides[0]) else None
    if len(answer_sides) > 1 and name == answer_sides[0]:
        return _equal_to_chain(gold_sides[1], answer_sides, symbolic)
    if len(answer_sides) == 1 and name is not None:
        return _equal(gold_sides[1], answer, symbolic)
    if len(gold_sides) == 2:
        both_named = name is not None and notation.is_variable(answer_sides[0])
        if both_named and exact_value(gold_sides[1]) is not None:
            return False
        return symbolic.equal(gold, answer)
    if len(gold_sides) == 1 and len(answer_sides) > 1:
        return _equal_to_chain(gold, answer_sides, symbolic)
    return _equal_values(gold, answer, symbolic)


def _equal_to_chain(gold: str, sides: list[str], symbolic: Symbolic) -> bool:
    """Whether ``a = b = ... = z`` answers ``gold``, and its constants are equal to each other."""
    value = _equation_value(sides)
    constants = [side for side in sides if side != value and notation.is_constant(side)]
    return (
        value is not None
        and _equal(gold, value, symbolic)
        and all(_equal(value, side, symbolic) for side in constants)
    )


def _equation_value(sides: list[str]) -> str | None:
    """What ``a = b = ... = z`` answers: the number in it, else ``z``; None if it is false."""
    values = {side: _value(split_unit(side)) for side in sides}
    numbers = [side for side in sides if values[side] is not None]
    if len({values[side] for side in numbers}) > 1:
        return None
    if not numbers:
        return sides[-1] if any(char.isalpha() for char in sides[0]) else None
    if any(values[side] is None and not any(map(str.isalpha, side)) for side in sides):
        return None  # "3+=5"
    return numbers[-1]


def _equal_values(gold: str, answer: str, symbolic: Symbolic) -> bool:
    gold_part = split_unit(gold)
    gold_value = _value(gold_part)
    answer_part = split_unit(answer, letters=gold_value is not None)
    if units_conflict(gold_part.unit, answer_part.unit):
        return False
    answer_value = _value(answer_part)
    if gold_value is not None and answer_value is not None:
        if gold_value == answer_value:
            return True
        percents = gold_part.number.endswith("%"), answer_part.number.endswith("%")
        if percents == (True, False):
            return gold_value == 100 * answer_value
        return percents == (False, True) and 100 * gold_value == answer_value
    clocks = [_CLOCK.fullmatch(part.number) for part in (gold_part, answer_part)]
    if all(clocks):
        return clocks[0][1] == clocks[1][1]
    if clocks[0]:
        return False
    gold_words, answer_words = notation.plain_words(gold), notation.plain_words(answer)
    if gold_words is not None and answer_words is not None:
        return gold_words == answer_words
    if any(words is not None and len(words) > 1 for words in (gold_words, answer_words)):
        return False
    if _TWO_NUMBERS.search(gold_part.number) or _TWO_NUMBERS.search(answer_part.number):
        return False  # "1 2" is neither 12 nor 2
    if gold_part.scale != answer_part.scale:
        return False
    if gold_value is not None and not notation.may_denote_number(answer_part.number):
        return False
    if answer_value is not None and not notation.may_denote_number(gold_part.number):
        return False
    return symbolic.equal(gold_part.number, answer_part.number)


_standalone: dict[str, Any] = {}
_standalone_lock = threading.Lock()


def _standalone_pool() -> Any:
    """The pool behind ``accuracy_reward`` when it is called outside a ``RewardPool``."""
    from grpo_engine.rewards.pool import RewardPool, RewardSpec

    with _standalone_lock:
        pool = _standalone.get("pool")
        if pool is None or not pool.belongs_to_this_process():
            spec = RewardSpec("accuracy", "accuracy")
            pool = _standalone["pool"] = RewardPool([spec], max_error_rate=1.0)
        return pool


def accuracy_reward(
    completions: Sequence[Any],
    solution: Sequence[Any],
    *,
    thinking_prefilled: bool = False,
    **_: Any,
) -> list[float | None]:
    """1.0 / 0.0 for a right / wrong or missing answer; None where it could not be judged.

    TRL signature, usable alone and from any thread: comparisons that need symbolic work run in
    worker processes with a deadline of 5 s each; one that is killed gives 0.0 where the answer was
    to blame, None where the reference was. Raises UserError only for a caller's mistake: unequal
    lengths, or math-verify missing where it is needed.
    """
    if len(completions) != len(solution):
        raise UserError(
            f"accuracy reward: {len(completions)} completions but {len(solution)} solutions"
        )
    texts = [completion_text(completion) for completion in completions]
    scores: list[float | None] = []
    deferred = []
    for index, (text, gold) in enumerate(zip(texts, solution, strict=True)):
        try:
            score, _reason = judge_answer(
                text, gold, _Deferred(), thinking_prefilled=thinking_prefilled
            )
        except NeedsSymbolicError:
            score = None
            deferred.append(index)
        scores.append(score)
    if deferred:
        require_math_verify()
        # The pool's workers know nothing of the prefill, so they get the text with its think tag.
        prefix = "<think>" if thinking_prefilled else ""
        report = _standalone_pool().score(
            prompts=[""] * len(deferred),
            completions=[prefix + texts[index] for index in deferred],
            columns={"solution": [solution[index] for index in deferred]},
        )
        for index, score in zip(deferred, report.scores["accuracy"], strict=True):
            scores[index] = score
    return scores


def unusable_solutions(solutions: Sequence[Any]) -> list[int]:
    """Indices of the references that do not parse or do not equal themselves.

    Worth calling once when a data set is loaded: every completion for such a row would score None.
    Raises UserError when math-verify is missing and a reference needs it.
    """
    scores = accuracy_reward([rf"\boxed{{{_gold(one) or ''}}}" for one in solutions], solutions)
    return [index for index, score in enumerate(scores) if score != 1.0]


def _judge(
    completion: Any, row: Mapping[str, Any], *, thinking_prefilled: bool = False
) -> tuple[float | None, str]:
    return judge_answer(
        completion_text(completion),
        row["solution"],
        MathVerify(),
        thinking_prefilled=thinking_prefilled,
    )


# A worker calls this instead: same verdict, with the reason, symbolic work done on the spot.
accuracy_reward.judge = _judge
accuracy_reward.required_columns = ("solution",)
