"""Which sampled answers are fit to learn from: the text filters of cold start and of rejection
sampling.

    cold start          readable: no repetition, no mixed languages             (v2 B.3.2)
    rejection sampling  no "mixed languages, long paragraphs, and code blocks"  (v1 2.3.3)
    evaluation          no training text shares 10 words in a row with a test   (v2 D.1)

The paper gives no threshold but the last; the others are fields with the defaults below. Whether
an answer is correct is for the rewards to say, not for these.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_engine.rewards.language import (
    measure_language,
    off_script_characters,
    prompt_language,
    split_thinking,
)
from grpo_engine.rewards.repetition import repeated_share
from grpo_engine.rewards.words import repetition_tokens
from grpo_engine.types import UserError

CODE_BLOCK = re.compile(r"^ {0,3}(?:```|~~~)", re.MULTILINE)
PARAGRAPH_BREAK = re.compile(r"\n[ \t]*\n")
_PUNCTUATION = re.compile(r"[^\w\s]+")


@dataclass(frozen=True)
class ChainFilters:
    """The limits of a readable answer; None (or True for ``code_blocks``) switches one off.

    ``min_language_share``: words of the target language / words of the reasoning, as in the
    language reward. ``max_off_script_characters``: letters in the whole answer that the target
    language is not written with, which sees the leak of a few characters in a long text.
    ``max_paragraph_words``: of the longest paragraph of the reasoning (text
    between empty lines); Chinese, Japanese and Thai count by character. ``code_blocks``: whether
    the reasoning may hold a fenced block. ``max_repeated_share``: of ``ngram_size``-word sequences
    in the whole answer that are there for the second time or more.
    """

    min_language_share: float | None = 0.95
    max_paragraph_words: int | None = 500
    code_blocks: bool = False
    max_repeated_share: float | None = 0.5
    ngram_size: int = 8
    max_off_script_characters: int | None = None

    def __post_init__(self) -> None:
        for name in ("min_language_share", "max_repeated_share"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name} must be in [0, 1], got {value}")
        for name in ("max_paragraph_words", "ngram_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be >= 1, got {value}")
        leaks = self.max_off_script_characters
        if leaks is not None and leaks < 0:
            raise UserError(f"max_off_script_characters must be >= 0, got {leaks}")

    def first_fault(
        self, completion: str, *, prompt: str = "", language: str | None = None
    ) -> str | None:
        """The name of the first filter that ``completion`` fails, None if it passes all:
        "repetition", "code_block", "long_paragraph" or "mixed_language".

        ``language``: ISO 639-1 code; None takes the prompt's, and without one the language is not
        judged. Raises UserError for an unknown language.
        """
        reasoning, _ = split_thinking(completion)
        repeated, longest = self.max_repeated_share, self.max_paragraph_words
        if repeated is not None and repeated_share(completion, self.ngram_size) > repeated:
            return "repetition"
        if not self.code_blocks and CODE_BLOCK.search(reasoning):
            return "code_block"
        if longest is not None and longest_paragraph(reasoning) > longest:
            return "long_paragraph"
        language = language or prompt_language(prompt)
        if self.min_language_share is not None and language is not None:
            share = measure_language(reasoning, language, prompt=prompt).share
            if share is not None and share < self.min_language_share:
                return "mixed_language"
        if self.max_off_script_characters is not None and language is not None:
            leaked = off_script_characters(completion, language, prompt=prompt)
            if leaked > self.max_off_script_characters:
                return "mixed_language"
        return None


def longest_paragraph(text: str) -> int:
    """Words of the longest paragraph; a text without empty lines is one paragraph."""
    return max(len(repetition_tokens(part)) for part in PARAGRAPH_BREAK.split(text))


def plain_words(text: str) -> list[str]:
    """Lower-cased words without punctuation: what two texts are compared by."""
    return repetition_tokens(_PUNCTUATION.sub(" ", text))


def without_duplicates(texts: Sequence[str], *, max_overlap: float = 1.0) -> list[int]:
    """Indices of the texts that repeat none before them, in order.

    Two texts repeat each other when their words agree, or, with ``max_overlap`` < 1, when the sets
    of their 5-word sequences overlap by more than that (intersection / union): every pair is
    compared, so pass the answers to one prompt, not a corpus.
    """
    if not 0 < max_overlap <= 1:
        raise UserError(f"max_overlap must be in (0, 1], got {max_overlap}")
    kept: list[int] = []
    seen: set[tuple[str, ...]] = set()
    shingles: list[frozenset[tuple[str, ...]]] = []
    for index, text in enumerate(texts):
        words = tuple(plain_words(text))
        if words in seen:
            continue
        if max_overlap < 1:
            mine = word_ngrams(words, 5)
            if any(_overlap(mine, other) > max_overlap for other in shingles):
                continue
            shingles.append(mine)
        seen.add(words)
        kept.append(index)
    return kept


def word_ngrams(words: Sequence[str], size: int) -> frozenset[tuple[str, ...]]:
    """The ``size``-word sequences of a text; a shorter text is one sequence of all its words."""
    if len(words) <= size:
        return frozenset([tuple(words)])
    return frozenset(zip(*(words[start:] for start in range(size)), strict=False))


def _overlap(one: frozenset[Any], other: frozenset[Any]) -> float:
    return len(one & other) / len(one | other)


class Decontamination:
    """Finds training texts that hold ``size`` consecutive words of a test text (v2 D.1: 10).

    A test text with fewer words is matched whole, if it has at least ``least`` of them: "2 + 2"
    would match half of all arithmetic.
    """

    def __init__(self, tests: Iterable[str], *, size: int = 10, least: int = 5) -> None:
        if not 1 <= least <= size:
            raise UserError(f"decontamination: wanted 1 <= least <= size, got {least} and {size}")
        self._by_length: dict[int, set[tuple[str, ...]]] = {}
        for test in tests:
            words = plain_words(test)
            if len(words) >= least:
                length = min(size, len(words))
                self._by_length.setdefault(length, set()).update(word_ngrams(words, length))

    def matches(self, text: str) -> bool:
        """Whether ``text`` holds a sequence of a test. One pass per length of sequence."""
        words = plain_words(text)
        return any(
            any(tuple(words[i : i + length]) in known for i in range(len(words) - length + 1))
            for length, known in self._by_length.items()
        )
