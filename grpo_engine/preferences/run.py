"""Preference data from configuration to ``pairs.jsonl`` or ``safety.jsonl``: answer, judge, keep
what is clear, and go on where it was stopped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bar

from grpo_engine.chat.cache import ReplyCache
from grpo_engine.data import Row
from grpo_engine.interrupt import Interrupt
from grpo_engine.metrics import write_atomically
from grpo_engine.preferences.answers import (
    Answer,
    SampledAnswer,
    Sampler,
    dataset_input,
    given_answers,
    load_questions,
    usable_answers,
)
from grpo_engine.preferences.config import PreferencesConfig
from grpo_engine.preferences.labels import LabelledAnswer, label_answers, label_rows
from grpo_engine.preferences.pairs import (
    JudgedPair,
    balanced_lengths,
    judge_pairs,
    pair_rows,
    plan_pairs,
    verdict_values,
)
from grpo_engine.preferences.statistics import as_markdown, label_figures, pair_figures, warnings
from grpo_engine.progress import say
from grpo_engine.rewards.judge import ChatModel, load_chat_model, prompt_hash
from grpo_engine.sampling.run import Count, ErrorBudget, SampledRun, run_sampled
from grpo_engine.sampling.samples import SampleFile, locked
from grpo_engine.types import UserError

REPLIES_FILE, LOCK_FILE = "replies.jsonl", ".lock"
PRODUCTS = {"helpful": "pairs.jsonl", "safety": "safety.jsonl"}
QUESTIONS = {"helpful": "pairwise", "safety": "safety"}


def run_preferences(
    config: PreferencesConfig,
    *,
    recipe: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> int:
    """Make the data, and return the process's exit code. The same call goes on where one was
    stopped: answers and replies of the judge are kept as they come, so nothing is paid for twice.
    Raises ``UserError`` for bad input, before anything is written."""
    return run_sampled(
        Preferences,
        config,
        lambda stack: prepare(config, stack),
        {"dataset": config.dataset, "judge": config.resolved_judge[0].rpartition(":")[0]},
        recipe=recipe,
        overwrite=overwrite,
        dry_run=dry_run,
    )


@dataclass
class Preferences(SampledRun):
    """Everything loaded: the loop is ``judged``."""

    verb = "preferences"
    results = ("pairs.jsonl", "safety.jsonl", "ties.jsonl", "statistics.json", "statistics.md")
    replies = (REPLIES_FILE,)

    config: PreferencesConfig
    rows: list[Row]
    sampler: Sampler | None  # None: the answers are given
    judge: ChatModel
    sources: dict[str, Any]  # what the answers come from
    samples: SampleFile | None = None
    dropped: Counter[str] = field(default_factory=Counter)  # answers, by reason
    unpaired: Counter[str] = field(default_factory=Counter)  # pairs, by reason
    answers: int = 0  # sampled or given, before any is dropped
    lonely: int = 0  # prompts without a pair (helpful) or an answer (safety) to judge
    figures: dict[str, Any] = field(default_factory=dict)  # statistics.json

    def __post_init__(self) -> None:
        self.errors = ErrorBudget(
            "max_judge_error_rate",
            self.config.max_judge_error_rate,
            "judgements came without a verdict",
            default="its replies cannot be read",
        )

    def inputs_of_samples(self) -> dict[str, dict[str, Any]]:
        return self.sources

    def open_files(self, stack: ExitStack, *, empty: bool) -> None:
        """Given answers have no file of samples to lock."""
        if self.sampler is not None:
            self.samples = stack.enter_context(
                SampleFile(self.folder, self.sampler.key_of, kind=SampledAnswer, empty=empty)
            )
        else:
            stack.enter_context(locked(self.folder / LOCK_FILE))
        if empty:
            (self.folder / REPLIES_FILE).unlink(missing_ok=True)
        self.judge.cache = ReplyCache(self.folder / REPLIES_FILE)

    def make(self, interrupt: Interrupt, bar: Bar) -> str:
        self.figures = self.write(self.judged(interrupt, bar))
        return "finished" if self.figures["kept"] else "failed"

    def usable(self) -> list[tuple[Row, list[Answer]]]:
        """Every row with the answers that can be judged."""
        found = []
        for row in self._answered_rows():
            if self.samples is None:
                completions = [(text, False) for text in given_answers(row, self.config)]
            else:
                drawn = [
                    self.samples.samples[row["row"], number]
                    for number in range(self.config.num_samples)
                ]
                completions = [(one.completion, one.finish_reason == "length") for one in drawn]
            self.answers += len(completions)
            found.append((row, usable_answers(completions, self.config, self.dropped)))
        return found

    def _answered_rows(self) -> list[Row]:
        if self.sampler is None:
            return self.rows
        return [prompt.row for prompt in self.sampler.series.prompts]

    def judged(self, interrupt: Interrupt, bar: Bar) -> list[JudgedPair] | list[LabelledAnswer]:
        """Answer every prompt, then judge the answers."""
        if self.sampler is not None:
            count = Count(bar, "answers", self.sampler.total)
            for answers, drawn in self.sampler.sample(self.samples, interrupt):
                count.advance(answers, quiet=not drawn)
        if self.config.kind == "helpful":
            pairs = []
            for row, answers in self.usable():
                found = plan_pairs(row, answers, self.config, self.unpaired)
                self.lonely += not found
                pairs += found
            batches, total, name = judge_pairs(self.judge, pairs, self.config), len(pairs), "pairs"
        else:
            usable = self.usable()
            self.lonely = sum(not answers for _, answers in usable)
            flat = [(row, answer) for row, answers in usable for answer in answers]
            batches = label_answers(self.judge, flat, self.config)
            total, name = len(flat), "responses"
        count, judged = Count(bar, name, total), []
        while True:
            with interrupt.abortable():
                batch = next(batches, None)
            if batch is None:
                return judged
            judged += batch
            for one in batch:
                self.errors.add(len(one.judgements), one.judgements.count(None))
            self.errors.first = self.judge.first_failure
            self.errors.check(total * self.config.resolved_judgements)
            count.advance(len(batch))

    def write(self, judged: list[Any]) -> dict[str, Any]:
        """The results in ``output_dir``; returns the figures."""
        config, folder = self.config, self.folder
        if config.kind == "helpful":
            clear, ties = pair_rows(judged, config)
            kept = balanced_lengths(clear, config)
            self.unpaired.update(length_balance=len(clear) - len(kept))
            figures = pair_figures(judged, kept, ties, config)
        else:
            kept, ties = label_rows(judged)
            figures = label_figures(judged, kept, ties)
        figures = {
            "kind": config.kind,
            "scope": config.resolved_scope,
            "prompts": len(self._answered_rows()),
            "answers": self.answers,
            "answers_left_out": _counts(self.dropped),
            "pairs_left_out": _counts(self.unpaired),
            "prompts_without_anything_to_judge": self.lonely,
            **figures,
        }
        write_rows(folder / PRODUCTS[config.kind], kept)
        write_rows(folder / "ties.jsonl", ties)
        write_atomically(folder / "statistics.json", json.dumps(figures, indent=1) + "\n")
        write_atomically(folder / "statistics.md", as_markdown(figures))
        return figures

    def inputs(self) -> dict[str, dict[str, Any]]:
        config = self.config
        judged_by = {
            **self.judge.place,
            **self.judge.identity,
            "prompt": prompt_hash(QUESTIONS[config.kind]),
            "temperature": config.judge_temperature,
            "max_tokens": config.judge_max_tokens,
            "attempts": config.judge_attempts,
            "judgements": config.resolved_judgements,
            "scope": config.resolved_scope,
        }
        if config.kind == "helpful":
            judged_by["verdict_values"] = verdict_values(config)
        return {**self.sources, "judge": judged_by}

    def account(self) -> dict[str, Any]:
        """What the judge had to do in this call."""
        judge = self.judge
        usage = {"asked": judge.asked, "recalled": judge.recalled, "failed": dict(judge.failed)}
        return {"judge_usage": usage}

    def plan(self) -> list[tuple[str, str]]:
        config, prompts = self.config, len(self._answered_rows())
        answers = f"given, in {', '.join(config.answer_columns)}"
        if self.sampler is not None:
            answers = (
                f"{config.num_samples} a prompt from {config.model}, of at most "
                f"{config.max_completion_length} tokens, {prompts * config.num_samples} in all"
            )
            most = config.num_samples
        else:
            most = max(len(given_answers(row, config)) for row in self.rows)
        of = "responses"
        if config.kind == "helpful":
            most, of = min(config.pairs_per_prompt, most * (most - 1) // 2), "pairs"
        questions = prompts * most * config.resolved_judgements
        asked = (
            f"at most {questions} ({prompts * most} {of} x {config.resolved_judgements}), each "
            f"answered in at most {config.judge_max_tokens} tokens"
        )
        return [
            ("kind", f"{config.kind}, the judge sees the {config.resolved_scope}"),
            ("prompts", f"{prompts} from {config.dataset}"),
            ("answers", answers),
            ("judge", ", ".join(str(value) for value in self.judge.place.values())),
            ("questions", asked),
        ]

    def show(self) -> None:
        console, figures = Console(), self.figures
        judged = figures.get("pairs_judged", figures.get("answers_judged"))
        place = self.folder / PRODUCTS[self.config.kind]
        print(f"{figures['kept']} of {judged} judged are kept: {place}")
        for sentence in warnings(figures):
            console.print(f"! {sentence}", style="yellow", markup=False)
        if not figures["kept"]:
            files = (str(self.folder / name) for name in ("statistics.md", "ties.jsonl"))
            say(f"nothing was kept: see {' and '.join(files)}")

    def kept(self) -> str:
        return "answers and replies so far are kept"


def prepare(config: PreferencesConfig, stack: ExitStack) -> Preferences:
    """Load prompts, judge and model; everything the user can have wrong is found here."""
    rows = load_questions(config)
    sampler = None
    inputs = {"dataset": dataset_input(config, rows)}
    if config.answer_columns:
        given = [len(given_answers(row, config)) for row in rows]
        needed = 2 if config.kind == "helpful" else 1
        if max(given) < needed:
            raise UserError(
                f"--answer_columns {config.answer_columns}: no row has {needed} answers; "
                f"row 1 has {given[0]}"
            )
    name, options = config.resolved_judge
    judge = load_chat_model(name, **options)
    stack.callback(judge.close)
    judge.check()
    if not config.answer_columns:
        sampler = Sampler(config, rows)
        stack.callback(sampler.model.close)
        inputs |= sampler.inputs
    return Preferences(config, rows, sampler, judge, inputs)


def _counts(counter: Counter[str]) -> dict[str, int]:
    return {reason: count for reason, count in sorted(counter.items()) if count}


def write_rows(path: Path, rows: list[Mapping[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    write_atomically(path, "".join(lines))
