"""Which answers are kept, and the first reason why another is not. A pure function of the samples
and the fields: with other thresholds the same samples make other data. One row at a time: all
answers together may be more than fits in memory.

    drop what was cut by the cap, could not be verified, is wrong, is not in the format,
    repeats itself, has code blocks, long paragraphs or mixed languages in the reasoning,
    shares ten words in a row with the evaluation, or repeats another answer to its prompt;
    of the rest keep all, or some of each prompt.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_engine.data import Row
from grpo_engine.filters import ChainFilters, Decontamination, without_duplicates
from grpo_engine.rejection.config import SampleConfig
from grpo_engine.rejection.draw import Draw
from grpo_engine.rejection.verify import RIGHT, Findings
from grpo_engine.rewards.format import has_r1_format, has_readable_format
from grpo_engine.rewards.judge import question_text
from grpo_engine.sampling.samples import Cell

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
class Answers:
    """The answers to one row, and what has become of them: those still in, in their order, and the
    first reason against each of the others. Texts are those of the candidates, and of what was
    rejected after it had been changed; the others are in the samples."""

    row: Row
    cells: list[Cell]
    candidates: dict[Cell, Candidate] = field(default_factory=dict)
    reasons: dict[Cell, str] = field(default_factory=dict)
    notes: dict[Cell, str] = field(default_factory=dict)
    texts: dict[Cell, str] = field(default_factory=dict)

    def reject(self, candidate: Candidate, reason: str, note: str | None = None) -> None:
        assert reason in REASONS, reason
        self.candidates.pop(candidate.cell, None)
        self.reasons[candidate.cell] = reason
        if candidate.completion != candidate.draw.completion:
            self.texts[candidate.cell] = candidate.completion
        if note:
            self.notes[candidate.cell] = note

    def rejected_rows(self, samples: Mapping[Cell, Draw]) -> Iterator[dict[str, Any]]:
        """The lines of ``rejected.jsonl``; ``samples`` have the texts as they were drawn."""
        for cell in self.cells:
            if cell not in self.reasons:
                continue
            generator, row, sample = cell
            text = self.texts.get(cell)
            line = {
                "reason": self.reasons[cell],
                "domain": self.row["domain"],
                "row": row,
                "sample": sample,
                "generator": generator,
                "completion": samples[cell].completion if text is None else text,
            }
            if cell in self.notes:
                line["note"] = self.notes[cell]
            yield line


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
            max_off_script_characters=config.max_off_script_characters,
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


def select(row: Row, draws: Sequence[Draw], rules: Rules) -> Answers:
    """The answers to one row, those candidates that are to be kept."""
    answers = Answers(row, [draw.cell for draw in draws])
    for draw in draws:
        candidate = Candidate(row, draw, draw.completion)
        if draw.truncated:
            answers.reject(candidate, TRUNCATED)
            continue
        fault = rules.fault(row, draw.completion, draw.found, rules.config.answer_format)
        if fault is None:
            answers.candidates[draw.cell] = candidate
        else:
            answers.reject(candidate, fault, draw.found.failure)
    drop_duplicates(answers, rules.config, DUPLICATE)
    drop_surplus(answers, rules.config)
    return answers


def drop_duplicates(answers: Answers, config: SampleConfig, reason: str) -> None:
    """Reject answers that repeat an earlier one to the same prompt, whichever generator's."""
    candidates = list(answers.candidates.values())
    first = set(
        without_duplicates(
            [one.completion for one in candidates], max_overlap=config.max_duplicate_overlap
        )
    )
    for place, candidate in enumerate(candidates):
        if place not in first:
            answers.reject(candidate, reason)


def drop_surplus(answers: Answers, config: SampleConfig) -> None:
    """Keep at most ``max_per_prompt``."""
    if config.max_per_prompt is None:
        return
    candidates = list(answers.candidates.values())
    places = list(range(len(candidates)))
    if config.keep == "random":
        row = answers.row["row"]
        random.Random(f"kept answers {config.seed} {row}").shuffle(places)
    else:
        places.sort(key=lambda place: candidates[place].draw.length)
    for place in places[config.max_per_prompt :]:
        answers.reject(candidates[place], SURPLUS)


def in_batches(
    rows: Iterable[Answers],
    size: int,
    change: Callable[[list[tuple[Answers, Candidate]]], None],
) -> Iterator[Answers]:
    """``rows`` in their order, each after ``change`` has had all its candidates; it is given
    ``size`` at a time, of several rows where one has fewer."""
    waiting: deque[Answers] = deque()
    batch: list[tuple[Answers, Candidate]] = []
    for answers in rows:
        waiting.append(answers)
        for candidate in list(answers.candidates.values()):
            batch.append((answers, candidate))
            if len(batch) == size:
                change(batch)
                batch = []
        while waiting and not (batch and waiting[0] is batch[0][0]):
            yield waiting.popleft()
    if batch:
        change(batch)
    yield from waiting
