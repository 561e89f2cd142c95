"""Which answers are kept, and the first reason why another is not. A pure function of the samples
and the fields: with other thresholds the same samples make other data.

    drop what was cut by the cap, could not be verified, is wrong, is not in the format,
    repeats itself, has code blocks, long paragraphs or mixed languages in the reasoning,
    shares ten words in a row with the evaluation, or repeats another answer to its prompt;
    of the rest keep all, or some of each prompt.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grpo_engine.data import Row
from grpo_engine.evaluation.samples import Cell
from grpo_engine.filters import ChainFilters, Decontamination, without_duplicates
from grpo_engine.rejection.config import SampleConfig
from grpo_engine.rejection.draw import Draw
from grpo_engine.rejection.verify import RIGHT, Findings
from grpo_engine.rewards.format import has_r1_format, has_readable_format
from grpo_engine.rewards.judge import question_text

TRUNCATED, DUPLICATE, SURPLUS = "truncated", "duplicate", "surplus"
FAULTS = (
    "unverified",
    "no_answer",
    "wrong",
    "bad_format",
    "repetition",
    "code_block",
    "long_paragraph",
    "mixed_language",
    "contaminated",
)
REWRITE, EDIT, REMOVED = "rewrite_", "edit_", "removed_by_editor"
# In the order in which they are looked for.
REASONS = (
    TRUNCATED,
    *FAULTS,
    DUPLICATE,
    SURPLUS,
    f"{REWRITE}failed",
    *(REWRITE + fault for fault in FAULTS),
    f"{REWRITE}{DUPLICATE}",
    REMOVED,
    *(EDIT + fault for fault in FAULTS),
)
_FORMATS = {"readable": has_readable_format, "r1-zero": has_r1_format}


@dataclass(frozen=True)
class Candidate:
    """An answer on its way into the data: ``completion`` may have been rewritten or edited."""

    row: Row
    draw: Draw
    completion: str
    edited: bool = False

    @property
    def cell(self) -> Cell:
        return self.draw.cell


@dataclass
class Rejections:
    """The first reason against each rejected answer, and the text it was found in."""

    reasons: dict[Cell, str] = field(default_factory=dict)
    texts: dict[Cell, str] = field(default_factory=dict)
    notes: dict[Cell, str] = field(default_factory=dict)

    def add(self, candidate: Candidate, reason: str, note: str | None = None) -> None:
        assert reason in REASONS, reason
        self.reasons[candidate.cell] = reason
        self.texts[candidate.cell] = candidate.completion
        if note:
            self.notes[candidate.cell] = note


class Rules:
    """What a kept answer must satisfy."""

    def __init__(self, config: SampleConfig, tests: Decontamination | None) -> None:
        self.config, self.tests = config, tests
        self.filters = ChainFilters(
            min_language_share=config.min_language_share,
            max_paragraph_words=config.max_paragraph_words,
            code_blocks=config.code_blocks,
            max_repeated_share=config.max_repeated_share,
            ngram_size=config.ngram_size,
        )

    def fault(self, row: Row, completion: str, found: Findings, form: str) -> str | None:
        """The first of ``FAULTS`` that the answer has; ``form`` is "readable", "r1-zero" or
        "none"."""
        verdict = found.verdict(self.config.min_reward)
        if verdict != RIGHT:
            return verdict
        if form != "none" and not _FORMATS[form](completion):
            return "bad_format"
        fault = self.filters.first_fault(
            completion, prompt=question_text(row["prompt"]), language=row.get("language")
        )
        if fault is None and self.tests is not None and self.tests.matches(completion):
            return "contaminated"
        return fault

    def is_test_question(self, row: Row) -> bool:
        return self.tests is not None and self.tests.matches(question_text(row["prompt"]))


def select(
    draws: Iterable[tuple[Row, Draw]], rules: Rules, rejected: Rejections
) -> list[Candidate]:
    """The answers to keep, in the order given; the others are added to ``rejected``."""
    good = []
    for row, draw in draws:
        candidate = Candidate(row, draw, draw.completion)
        if draw.truncated:
            rejected.add(candidate, TRUNCATED)
            continue
        fault = rules.fault(row, draw.completion, draw.found, rules.config.answer_format)
        if fault is None:
            good.append(candidate)
        else:
            rejected.add(candidate, fault, draw.found.failure)
    return capped(distinct(good, rules.config, rejected, DUPLICATE), rules.config, rejected)


def by_row(candidates: Sequence[Candidate]) -> dict[int, list[Candidate]]:
    groups: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.row["row"], []).append(candidate)
    return groups


def distinct(
    candidates: Sequence[Candidate], config: SampleConfig, rejected: Rejections, reason: str
) -> list[Candidate]:
    """Without answers that repeat an earlier one to the same prompt, whichever generator's."""
    kept = []
    for group in by_row(candidates).values():
        first = without_duplicates(
            [one.completion for one in group], max_overlap=config.max_duplicate_overlap
        )
        for place, candidate in enumerate(group):
            if place in first:
                kept.append(candidate)
            else:
                rejected.add(candidate, reason)
    return kept


def capped(
    candidates: Sequence[Candidate], config: SampleConfig, rejected: Rejections
) -> list[Candidate]:
    """At most ``max_per_prompt`` of each prompt, in their order."""
    if config.max_per_prompt is None:
        return list(candidates)
    kept = []
    for row, group in by_row(candidates).items():
        places = list(range(len(group)))
        if config.keep == "random":
            random.Random(f"kept answers {config.seed} {row}").shuffle(places)
        else:
            places.sort(key=lambda place: group[place].draw.length)
        chosen = set(places[: config.max_per_prompt])
        for place, candidate in enumerate(group):
            if place in chosen:
                kept.append(candidate)
            else:
                rejected.add(candidate, SURPLUS)
    return kept


def verified_again(
    candidates: Sequence[Candidate],
    texts: Sequence[str],
    found: Sequence[Findings],
    rules: Rules,
    rejected: Rejections,
    stage: str,
) -> list[Candidate]:
    """The candidates with their new ``texts``, those left out that have a fault now: a rewriter or
    an editor may change the answer. ``stage``: REWRITE or EDIT, before the reason."""
    kept = []
    for candidate, text, one in zip(candidates, texts, found, strict=True):
        changed = replace(candidate, completion=text, edited=candidate.edited or stage == EDIT)
        fault = rules.fault(candidate.row, text, one, "readable")
        if fault is None:
            kept.append(changed)
        else:
            rejected.add(changed, stage + fault, one.failure)
    return kept


def rejected_rows(draws: Iterable[tuple[Row, Draw]], rejected: Rejections) -> list[dict[str, Any]]:
    """The lines of ``rejected.jsonl``."""
    lines = []
    for row, draw in draws:
        if draw.cell not in rejected.reasons:
            continue
        line = {
            "reason": rejected.reasons[draw.cell],
            "domain": row["domain"],
            "row": draw.row,
            "sample": draw.sample,
            "generator": draw.generator,
            "completion": rejected.texts[draw.cell],
        }
        if draw.cell in rejected.notes:
            line["note"] = rejected.notes[draw.cell]
        lines.append(line)
    return lines
