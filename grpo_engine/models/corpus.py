"""The text that the miniature base model is trained on: answers to chains of one-digit sums.

The corpus stands in for what a base model has read before RL starts: some authors blurt out a
number and are usually wrong, some work step by step and are usually right, few keep to one
language, and not all of them use the tags the prompt asks for. RL finds the good habits among
these; nothing here tells it which they are. The shares below are the model's *prior*; the card
beside the weights gives what the trained model really samples.

A document is ``(prompt, completion)``. The questions are worded as reasoning-gym's ``chain_sum``
words them (4 to 6 terms of one digit, ``+`` and ``-``), so that RL and evaluation can use that
package's own problems.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Literal

Language = Literal["english", "chinese", "mixed"]

QUESTION_HEAD = "State the final answer to the following arithmetic problem: "
MIN_TERMS, MAX_TERMS = 4, 6

# Shares of the corpus. Direct answers are drawn around the truth: a quick guess is near, not right.
DIRECT_SHARE = 0.52
DIRECT_CORRECT = 0.15
DIRECT_ERRORS = (-6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6)
DIRECT_CHINESE = 0.3
CHAIN_LANGUAGES: tuple[Language, ...] = ("english", "chinese", "mixed")  # equal shares

# A written step is wrong this often; the author then goes on from the wrong number.
STEP_SLIP = 0.03
STEP_ERRORS = (-10, -2, -1, 1, 2, 10)
# Some authors look back: they redo a wrong step nearly always, and a right one now and then.
REFLECTIVE_SHARE = 0.25
REDO_WRONG = 0.9
REDO_RIGHT = 0.12

LAYOUTS = {
    "{thought} </think> <answer> {answer} </answer>": 0.70,  # as the prompt asks
    "{thought} </think> {answer}": 0.06,
    "{thought} <answer> {answer} </answer>": 0.06,  # reasoning never closed
}
UNTAGGED_LAYOUTS = {
    "{thought}": 0.12,
    "{thought} <answer> {answer} </answer>": 0.06,
}


@dataclass(frozen=True)
class Phrases:
    """One language's fixed phrases; each tuple's entries are equally likely."""

    guess: tuple[str, ...]
    first: tuple[str, ...]
    then: tuple[str, ...]
    look_back: tuple[str, ...]
    conclude: tuple[str, ...]


ENGLISH = Phrases(
    guess=("I guess {}.", "I think {}."),
    first=("First ", "Start: ", "We have "),
    then=(", then ", ", next ", ", and "),
    look_back=(". Wait, check: ", ". But wait, ", ". Let me verify: "),
    conclude=(". So {}.", ". We get {}."),
)
CHINESE = Phrases(
    guess=("我猜是 {}。", "我想是 {}。"),
    first=("先算 ", "首先 ", "从头算 "),
    then=("，然后 ", "，再算 ", "，接着 "),
    look_back=("。等等，检查 ", "。等一下，", "。我再验算 "),
    conclude=("。所以是 {}。", "。得 {}。"),
)


@dataclass(frozen=True)
class Problem:
    """Terms 0..9 joined by signs +1 or -1; ``signs[0]`` is always +1."""

    terms: tuple[int, ...]
    signs: tuple[int, ...]

    @property
    def expression(self) -> str:
        rest = zip(self.signs[1:], self.terms[1:], strict=True)
        return str(self.terms[0]) + "".join(f" {'+' if s > 0 else '-'} {t}" for s, t in rest)

    @property
    def question(self) -> str:
        return f"{QUESTION_HEAD}{self.expression} ="

    @property
    def answer(self) -> int:
        return sum(s * t for s, t in zip(self.signs, self.terms, strict=True))


def draw_problem(rng: random.Random) -> Problem:
    """The distribution of reasoning-gym's chain_sum: the number of terms first, then the terms."""
    count = rng.randint(MIN_TERMS, MAX_TERMS)
    terms = tuple(rng.randint(0, 9) for _ in range(count))
    return Problem(terms, (1, *(rng.choice((1, -1)) for _ in range(count - 1))))


def guess(problem: Problem, rng: random.Random) -> tuple[str, int]:
    """A short thought that names a number, and that number."""
    right = rng.random() < DIRECT_CORRECT
    value = problem.answer + (0 if right else rng.choice(DIRECT_ERRORS))
    phrases = CHINESE if rng.random() < DIRECT_CHINESE else ENGLISH
    return rng.choice(phrases.guess).format(value), value


def chain(problem: Problem, language: Language, rng: random.Random) -> tuple[str, int]:
    """A thought that adds term after term, and the number it arrives at."""

    def phrases() -> Phrases:
        if language == "mixed":
            return rng.choice((ENGLISH, CHINESE))
        return ENGLISH if language == "english" else CHINESE

    reflective = rng.random() < REFLECTIVE_SHARE
    total = problem.terms[0]
    text = ""
    for index in range(1, len(problem.terms)):
        sign, term = problem.signs[index], problem.terms[index]
        left = f"{total}{'+' if sign > 0 else '-'}{term}="
        right_value = total + sign * term
        slipped = rng.random() < STEP_SLIP
        total = right_value + (rng.choice(STEP_ERRORS) if slipped else 0)
        text += rng.choice(phrases().first if index == 1 else phrases().then)
        text += f"{left}{total}"
        if reflective and rng.random() < (REDO_WRONG if slipped else REDO_RIGHT):
            total = right_value
            text += f"{rng.choice(phrases().look_back)}{left}{total}"
    return text + rng.choice(phrases().conclude).format(total), total


def complete(problem: Problem, rng: random.Random) -> str:
    """One author's completion of the prompt for ``problem``."""
    if rng.random() < DIRECT_SHARE:
        thought, answer = guess(problem, rng)
    else:
        thought, answer = chain(problem, rng.choice(CHAIN_LANGUAGES), rng)
    layouts = {f"<think> {layout}": share for layout, share in LAYOUTS.items()}
    layouts |= UNTAGGED_LAYOUTS
    (layout,) = rng.choices(list(layouts), weights=list(layouts.values()))
    return layout.format(thought=thought, answer=answer)


def documents(seed: int, held_out: Set[str]) -> Iterator[tuple[Problem, str]]:
    """Endless ``(problem, completion)`` pairs that avoid every expression in ``held_out``."""
    rng = random.Random(seed)
    while True:
        problem = draw_problem(rng)
        if problem.expression not in held_out:
            yield problem, complete(problem, rng)


def characters() -> set[str]:
    """Every character outside ASCII that the corpus can contain."""
    return {c for value in vars(CHINESE).values() for phrase in value for c in phrase if c > "\x7f"}
