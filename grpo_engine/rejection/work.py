"""The data from the samples: select, rewrite, have edited, mix, count. All of it can be done again
from the samples alone, so nothing of it is kept between runs but a chat model's replies.

It goes row by row, from the samples on the disk to the data there: no more texts are in memory than
those of one row and of the answers that are rewritten together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress as Bar

from grpo_engine.data import Row
from grpo_engine.interrupt import Interrupt
from grpo_engine.metrics import write_atomically
from grpo_engine.progress import say
from grpo_engine.rejection.config import SampleConfig
from grpo_engine.rejection.drafts import Draft
from grpo_engine.rejection.draw import Draw, Drawing
from grpo_engine.rejection.edits import Edits, write_candidates
from grpo_engine.rejection.generators import Generator
from grpo_engine.rejection.mix import General
from grpo_engine.rejection.readable import ChatRewriter, Rewriter
from grpo_engine.rejection.select import (
    DUPLICATE,
    EDIT,
    REMOVED,
    REWRITE,
    Answers,
    Candidate,
    Rules,
    drop_duplicates,
    in_batches,
    select,
)
from grpo_engine.rejection.statistics import POLICIES, Tally, domain_table, markdown
from grpo_engine.rejection.verify import RIGHT
from grpo_engine.rewards.judge import ChatModel
from grpo_engine.sampling.run import ErrorBudget
from grpo_engine.sampling.samples import Cell, SampleFile

DATA_FILE, REJECTED_FILE = "data.jsonl", "rejected.jsonl"
STATISTICS_FILES = ("statistics.json", "statistics.md")


@dataclass
class Work:
    """Everything loaded."""

    config: SampleConfig
    rows: dict[int, Row]  # by number
    generators: list[Generator]
    contaminated: set[int]  # rows that no answer is drawn for
    drawing: Drawing
    rules: Rules
    rewriter: Rewriter | None
    general: General | None
    chat_models: list[ChatModel]
    tokenizer: Any  # of the first generator's model
    tests_sha256: str | None  # of the questions that the data must not share words with
    tally: Tally = field(default_factory=Tally)
    counts: dict[str, Any] = field(default_factory=dict)  # of rewriting, editing and mixing
    kept: int = 0  # answers in the data

    def make(self, folder: Path, samples: SampleFile, interrupt: Interrupt, bar: Bar) -> str | None:
        """Write the data, and what belongs to it, to ``folder``. Returns the statistics as a page,
        None where a person is to edit first."""
        self.drawing.run(samples, interrupt, bar)
        path = Path(self.config.edit_file).expanduser() if self.config.edit_file else None
        if path is not None and not path.exists():
            with interrupt.abortable():
                self.offer(path, self.answers(samples.samples, None, bar))
            return None
        edits = None if path is None else Edits(path)
        with Draft(folder / DATA_FILE) as data, Draft(folder / REJECTED_FILE) as rejected:
            with interrupt.abortable():
                for answers in self.answers(samples.samples, edits, bar):
                    data.write(map(self.data_row, answers.candidates.values()))
                    rejected.write(answers.rejected_rows(samples.samples))
                    self.tally.settled(answers)
                    self.kept += len(answers.candidates)
                data.write(self.others())
                found = self.statistics(domain_table(data.rows(), self.tokenizer))
            data.publish()
            rejected.publish()
        page = markdown(found)
        write_atomically(
            folder / "statistics.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        )
        write_atomically(folder / "statistics.md", page)
        return page

    def answers(
        self, samples: Mapping[Cell, Draw], edits: Edits | None, bar: Bar
    ) -> Iterator[Answers]:
        """The answers to each row with what is to become of them, in the order of the rows."""
        found = self.selected(samples)
        if self.rewriter is not None:
            found = self.rewritten(found)
        if edits is not None:
            found = self.edited(found, edits)
        task = bar.add_task("rows", total=len(self.drawing.rows()))
        for answers in found:
            yield answers
            bar.advance(task)

    def selected(self, samples: Mapping[Cell, Draw]) -> Iterator[Answers]:
        for number in self.drawing.rows():
            draws = [samples[cell] for cell in self.drawing.cells_of(number)]
            right = [self.drawing.verdict_of(draw) == RIGHT for draw in draws]
            self.tally.drawn(number, right, sum(draw.length for draw in draws))
            yield select(self.rows[number], draws, self.rules)

    def rewritten(self, rows: Iterable[Answers]) -> Iterator[Answers]:
        """The candidates in the readable format, those rejected that could not be brought into it
        or are no longer right."""
        budget = ErrorBudget(
            "max_reward_error_rate",
            self.config.max_reward_error_rate,
            "answers could not be rewritten and verified",
        )

        def change(batch: Sequence[tuple[Answers, Candidate]]) -> None:
            self.rewrite(batch)
            failed = [
                answers.notes.get(candidate.cell)
                for answers, candidate in batch
                if self.is_failure(answers.reasons.get(candidate.cell))
            ]
            budget.add(len(batch), len(failed), next(filter(None, failed), None))
            budget.check()

        kept = 0
        for answers in in_batches(rows, self.config.rewrite_batch_size, change):
            drop_duplicates(answers, self.config, f"{REWRITE}{DUPLICATE}")
            kept += len(answers.candidates)
            yield answers
        budget.check(budget.done)
        self.counts["rewrite"] = {"candidates": budget.done, "kept": kept}

    def rewrite(self, batch: Sequence[tuple[Answers, Candidate]]) -> None:
        results = self.rewriter.rewrite(
            [one.row for _, one in batch], [one.completion for _, one in batch]
        )
        changed = []
        for (answers, candidate), result in zip(batch, results, strict=True):
            if result.completion is None:
                answers.reject(candidate, f"{REWRITE}failed", result.failure)
            else:
                changed.append((answers, replace(candidate, completion=result.completion)))
        self.verify_again(changed, REWRITE)

    def is_failure(self, reason: str | None) -> bool:
        """Whether a model or a reward has failed, rather than the answer; a template cannot."""
        machinery = [f"{REWRITE}unverified"]
        if isinstance(self.rewriter, ChatRewriter):
            machinery.append(f"{REWRITE}failed")
        return reason in machinery

    def offer(self, path: Path, rows: Iterable[Answers]) -> None:
        """Write the candidates for a person to edit."""
        count = write_candidates(
            path, (one for answers in rows for one in answers.candidates.values())
        )
        say(
            f"{count} candidates are in {path} to be edited; the same command goes on with what it "
            "then holds"
        )

    def edited(self, rows: Iterable[Answers], edits: Edits) -> Iterator[Answers]:
        """The candidates as the person left them; what was changed is verified again."""
        rejected = 0

        def change(batch: Sequence[tuple[Answers, Candidate]]) -> None:
            nonlocal rejected
            changed = []
            for answers, candidate in batch:
                text = edits.take(candidate)
                if text is None:
                    answers.reject(candidate, REMOVED)
                elif text != candidate.completion:
                    changed.append((answers, replace(candidate, completion=text, edited=True)))
            rejected += len(changed) - self.verify_again(changed, EDIT)

        yield from in_batches(rows, self.config.rewrite_batch_size, change)
        edits.check_all_taken()
        counts = edits.counts() | {"edited_and_rejected": rejected}
        self.counts["edits"] = counts
        say(
            "edits: "
            + ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in counts.items())
        )

    def verify_again(self, changed: Sequence[tuple[Answers, Candidate]], stage: str) -> int:
        """Take the candidates with their new texts, but for those that have a fault now: a rewriter
        or an editor may change the answer. ``stage``: REWRITE or EDIT, before the reason. Returns
        how many are taken."""
        candidates, generators = [one for _, one in changed], self.drawing.generators
        found = self.drawing.verifier.examine(
            [one.row for one in candidates],
            [generators[one.draw.generator].prompt(one.cell).text for one in candidates],
            [one.completion for one in candidates],
        )
        taken = 0
        for (answers, candidate), one in zip(changed, found, strict=True):
            fault = self.rules.fault(candidate.row, candidate.completion, one, "readable")
            if fault is None:
                answers.candidates[candidate.cell] = candidate
                taken += 1
            else:
                answers.reject(candidate, stage + fault, one.failure)
        return taken

    def others(self) -> list[Row]:
        """The rows that are mixed in."""
        self.counts["general"], rows = None, []
        if self.general is not None:
            rows, self.counts["general"] = self.general.mixed(self.kept)
        return rows

    def data_row(self, candidate: Candidate) -> Row:
        """A row to train on, and where it comes from."""
        row, draw = candidate.row, candidate.draw
        made = {"prompt": row["prompt"], "completion": candidate.completion}
        if isinstance(row.get("solution"), (str, int, float)):
            made["solution"] = row["solution"]
        made |= {
            "domain": row["domain"],
            "source": "sampled",
            "row": draw.row,
            "sample": draw.sample,
            "generator": draw.generator,
            "checkpoint": self.drawing.generators[draw.generator].model["weights_sha256"],
        }
        if self.config.edit_file is not None:
            made["edited"] = candidate.edited
        return made

    def statistics(self, table: dict[str, Any]) -> dict[str, Any]:
        """statistics.json: no times and no places, so that a repetition has the same bytes.
        ``table``: of the data."""
        prompted = {row for one in self.generators for row in one.of_row}
        tally = self.tally
        return {
            "table": table,
            "acceptance": tally.acceptance(),
            "solve_rate": tally.solve_rates(),
            "prompts": {
                "rows": len(self.rows),
                "too_long": len(self.rows) - len(prompted),
                "contaminated": len(self.contaminated),
                "sampled": len(tally.right),
                "with_kept_answers": tally.rows_with_kept,
            },
            "tokens": {"drawn": tally.tokens, "in_data": table["total"]["tokens"]},
            "general": self.counts.get("general"),
            "rewrite": self.counts.get("rewrite"),
            "edits": self.counts.get("edits"),
            "policies": POLICIES,
        }
