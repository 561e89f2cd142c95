"""The data from the samples: select, rewrite, have edited, mix, count. All of it can be done again
from the samples alone, so nothing of it is kept between runs but a chat model's replies."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress as Bar

from grpo_engine.data import Row
from grpo_engine.evaluation.samples import Cell, SampleFile
from grpo_engine.interrupt import Interrupt
from grpo_engine.progress import say
from grpo_engine.rejection.config import SampleConfig
from grpo_engine.rejection.draw import ERRORS_COUNT_FROM, Draw, Drawing
from grpo_engine.rejection.edits import read_edits, write_candidates
from grpo_engine.rejection.generators import Generator
from grpo_engine.rejection.mix import General
from grpo_engine.rejection.readable import ChatRewriter, Rewriter
from grpo_engine.rejection.select import (
    DUPLICATE,
    EDIT,
    REMOVED,
    REWRITE,
    Candidate,
    Rejections,
    Rules,
    distinct,
    rejected_rows,
    select,
    verified_again,
)
from grpo_engine.rejection.statistics import (
    POLICIES,
    acceptance,
    domain_table,
    markdown,
    solve_rates,
)
from grpo_engine.rejection.verify import RIGHT
from grpo_engine.rewards import RewardError
from grpo_engine.rewards.judge import ChatModel

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
    counts: dict[str, Any] = field(default_factory=dict)  # of rewriting and editing
    kept: int = 0  # answers in the data

    def make(self, samples: SampleFile, interrupt: Interrupt, bar: Bar) -> dict[str, str] | None:
        """The contents of the files to write, by name; None where a person is to edit first."""
        config, rejected = self.config, Rejections()
        self.drawing.run(samples, interrupt, bar)
        draws = [(self.rows[cell[1]], samples.samples[cell]) for cell in self.drawing.cells()]
        with interrupt.abortable():
            candidates = select(draws, self.rules, rejected)
            if self.rewriter is not None:
                candidates = self.rewritten(candidates, rejected, bar)
            if config.edit_file is not None:
                path = Path(config.edit_file).expanduser()
                if not path.exists():
                    write_candidates(path, candidates)
                    say(
                        f"{len(candidates)} candidates are in {path} to be edited; the same "
                        "command goes on with what it then holds"
                    )
                    return None
                candidates = self.edited(path, candidates, rejected)
            data = [self.data_row(candidate) for candidate in candidates]
            self.kept = len(data)
            general = None
            if self.general is not None:
                others, general = self.general.mixed(len(data))
                data += others
        self.counts["general"] = general
        found = self.statistics(draws, data, rejected)
        return {
            DATA_FILE: json_lines(data),
            REJECTED_FILE: json_lines(rejected_rows(draws, rejected)),
            "statistics.json": json.dumps(found, indent=1, ensure_ascii=False) + "\n",
            "statistics.md": markdown(found),
        }

    def rewritten(
        self, candidates: list[Candidate], rejected: Rejections, bar: Bar
    ) -> list[Candidate]:
        """The candidates in the readable format, those left out that could not be brought into it
        or are no longer right."""
        size = self.config.rewrite_batch_size
        kept: list[Candidate] = []
        failed: list[Cell] = []
        task = bar.add_task("rewritten", total=len(candidates))
        for start in range(0, len(candidates), size):
            batch = candidates[start : start + size]
            results = self.rewriter.rewrite(
                [one.row for one in batch], [one.completion for one in batch]
            )
            new = []
            for candidate, result in zip(batch, results, strict=True):
                if result.completion is None:
                    rejected.add(candidate, f"{REWRITE}failed", result.failure)
                else:
                    new.append((candidate, result.completion))
            kept += self.checked(new, rejected, REWRITE)
            failed += [one.cell for one in batch if self.is_failure(rejected, one)]
            done = start + len(batch)
            if done >= min(ERRORS_COUNT_FROM, len(candidates)):
                self.check_failures(failed, done, rejected)
            bar.advance(task, len(batch))
        kept = distinct(kept, self.config, rejected, f"{REWRITE}{DUPLICATE}")
        self.counts["rewrite"] = {"candidates": len(candidates), "kept": len(kept)}
        return kept

    def is_failure(self, rejected: Rejections, candidate: Candidate) -> bool:
        """Whether a model or a reward has failed, rather than the answer; a template cannot."""
        machinery = [f"{REWRITE}unverified"]
        if isinstance(self.rewriter, ChatRewriter):
            machinery.append(f"{REWRITE}failed")
        return rejected.reasons.get(candidate.cell) in machinery

    def check_failures(self, failed: list[Cell], done: int, rejected: Rejections) -> None:
        """RewardError if too large a share could not be rewritten or verified."""
        allowed = self.config.max_reward_error_rate
        if len(failed) > allowed * done:
            raise RewardError(
                f"{len(failed)} of {done} answers could not be rewritten and verified, more than "
                f"max_reward_error_rate={allowed:g} allows; the first failure: "
                f"{rejected.notes.get(failed[0])}"
            )

    def edited(
        self, path: Path, candidates: list[Candidate], rejected: Rejections
    ) -> list[Candidate]:
        """The candidates as the person left them; what was changed is verified again."""
        edits = read_edits(path, candidates)
        changed, kept = [], []
        for candidate, text in zip(candidates, edits.texts, strict=True):
            if text is None:
                rejected.add(candidate, REMOVED)
            elif text != candidate.completion:
                changed.append((candidate, text))
            else:
                kept.append(candidate)
        still_right = self.checked(changed, rejected, EDIT)
        counts = edits.counts() | {"edited_and_rejected": len(changed) - len(still_right)}
        self.counts["edits"] = counts
        say(
            "edits: "
            + ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in counts.items())
        )
        order = {candidate.cell: place for place, candidate in enumerate(candidates)}
        return sorted([*kept, *still_right], key=lambda one: order[one.cell])

    def checked(
        self, pairs: list[tuple[Candidate, str]], rejected: Rejections, stage: str
    ) -> list[Candidate]:
        candidates, texts = [one for one, _ in pairs], [text for _, text in pairs]
        prompts = [
            self.drawing.generators[one.draw.generator].of_row[one.draw.row].text
            for one in candidates
        ]
        found = self.drawing.verifier.examine([one.row for one in candidates], prompts, texts)
        return verified_again(candidates, texts, found, self.rules, rejected, stage)

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

    def statistics(
        self, draws: list[tuple[Row, Draw]], data: list[Row], rejected: Rejections
    ) -> dict[str, Any]:
        """statistics.json: no times and no places, so that a repetition has the same bytes."""
        right: dict[int, list[bool]] = {}
        for _, draw in draws:
            right.setdefault(draw.row, []).append(self.drawing.verdict_of(draw) == RIGHT)
        with_data = {row["row"] for row in data if row["source"] == "sampled"}
        table = domain_table(data, self.tokenizer)
        prompted = {row for one in self.generators for row in one.of_row}
        return {
            "table": table,
            "acceptance": acceptance(draws, rejected.reasons),
            "solve_rate": solve_rates(right),
            "prompts": {
                "rows": len(self.rows),
                "too_long": len(self.rows) - len(prompted),
                "contaminated": len(self.contaminated),
                "sampled": len(right),
                "with_kept_answers": len(with_data),
            },
            "tokens": {
                "drawn": sum(draw.length for _, draw in draws),
                "in_data": table["total"]["tokens"],
            },
            "general": self.counts.get("general"),
            "rewrite": self.counts.get("rewrite"),
            "edits": self.counts.get("edits"),
            "policies": POLICIES,
        }


def json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
