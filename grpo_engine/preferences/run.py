"""Preference data from configuration to ``pairs.jsonl`` or ``safety.jsonl``: answer, judge, keep
what is clear, and go on where it was stopped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bar
from transformers.utils import logging as transformers_logging

from grpo_engine.chat.cache import ReplyCache
from grpo_engine.data import Row
from grpo_engine.evaluation.folder import check_folder, check_same_inputs
from grpo_engine.evaluation.run import now, progress_bar
from grpo_engine.evaluation.samples import SAMPLES_FILE, SampleFile
from grpo_engine.interrupt import Interrupt, StopRequested
from grpo_engine.manifest import Manifest, code_version, machine, package_versions
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
from grpo_engine.settings import config_text
from grpo_engine.types import UserError

REPLIES_FILE = "replies.jsonl"
PRODUCTS = {"helpful": "pairs.jsonl", "safety": "safety.jsonl"}
RESULTS = ("pairs.jsonl", "safety.jsonl", "ties.jsonl", "statistics.json", "statistics.md")
FILES = ("config.yaml", "manifest.json", SAMPLES_FILE, REPLIES_FILE, *RESULTS)
ERRORS_COUNT_FROM = 32  # judgements
QUESTIONS = {"helpful": "pairwise", "safety": "safety"}


class JudgeErrors(Exception):
    """Too large a share of the judgements came without a verdict."""


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
    transformers_logging.disable_progress_bar()
    folder = Path(config.output_dir)
    with Interrupt() as interrupt, ExitStack() as stack:
        sources = {"dataset": config.dataset, "judge": config.judge.rpartition(":")[0]}
        check_folder(folder, overwrite, sources, verb=config.stage, files=FILES)
        stage = prepare(config, stack)
        if not overwrite:
            check_same_inputs(folder, stage.inputs)
        if dry_run:
            print(stage.plan_text())
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        stage.open_files(folder, stack, empty=overwrite)
        manifest = Manifest(folder, stage.manifest_values(recipe))
        manifest.update(status="running", started=now(), finished=None, outputs={})
        write_atomically(folder / "config.yaml", config_text(config))
        return finish(stage, interrupt, manifest)


@dataclass
class Preferences:
    """Everything loaded: the loop is ``judged``."""

    config: PreferencesConfig
    rows: list[Row]
    sampler: Sampler | None  # None: the answers are given
    judge: ChatModel
    inputs: dict[str, Any]  # what the answers come from
    samples: SampleFile | None = None
    dropped: Counter[str] = field(default_factory=Counter)  # answers, by reason
    unpaired: Counter[str] = field(default_factory=Counter)  # pairs, by reason
    answers: int = 0  # sampled or given, before any is dropped
    lonely: int = 0  # prompts without a pair (helpful) or an answer (safety) to judge
    asked: int = 0  # judgements
    unread: int = 0  # of those, without a verdict

    def open_files(self, folder: Path, stack: ExitStack, *, empty: bool) -> None:
        """Lock the samples before anything is removed: another process may be at work here."""
        if self.sampler is not None:
            self.samples = stack.enter_context(
                SampleFile(folder, self.sampler.key_of, empty=empty, kind=SampledAnswer)
            )
        for name in (*RESULTS, *((REPLIES_FILE,) if empty else ())):
            (folder / name).unlink(missing_ok=True)  # perhaps of other settings
        self.judge.cache = ReplyCache(folder / REPLIES_FILE)

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
        return [prompt.row for prompt in self.sampler.prompts]

    def judged(self, interrupt: Interrupt, bar: Bar) -> list[JudgedPair] | list[LabelledAnswer]:
        """Answer every prompt, then judge the answers."""
        if self.sampler is not None:
            total = len(self.sampler.prompts) * self.config.num_samples
            task = bar.add_task("answers", total=total)
            for count in self.sampler.sample(self.samples, interrupt):
                self._advance(bar, task, count, "answers")
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
        task, judged = bar.add_task(name, total=total), []
        while True:
            with interrupt.abortable():
                batch = next(batches, None)
            if batch is None:
                return judged
            judged += batch
            self._count_errors(batch, total)
            self._advance(bar, task, len(batch), name)

    def _advance(self, bar: Bar, task: Any, count: int, name: str) -> None:
        bar.advance(task, count)
        if bar.disable:
            say(f"{bar.tasks[task].completed:.0f} of {bar.tasks[task].total:.0f} {name}")

    def _count_errors(self, batch: list[JudgedPair] | list[LabelledAnswer], total: int) -> None:
        for one in batch:
            self.asked += len(one.judgements)
            self.unread += one.judgements.count(None)
        allowed = self.config.max_judge_error_rate
        enough = self.asked >= min(ERRORS_COUNT_FROM, total * self.config.resolved_judgements)
        if enough and self.unread > allowed * self.asked:
            first = self.judge.first_failure or "its replies cannot be read"
            raise JudgeErrors(
                f"{self.unread} of {self.asked} judgements came without a verdict, more than "
                f"max_judge_error_rate={allowed:g} allows; the first failure: {first}"
            )

    def write(self, judged: list[Any]) -> dict[str, Any]:
        """The results in ``output_dir``; returns the figures."""
        config, folder = self.config, Path(self.config.output_dir)
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

    def manifest_values(self, recipe: str | None) -> dict[str, Any]:
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
        return {
            "verb": config.stage,
            "stage": config.stage,
            "name": Path(config.output_dir).name,
            "recipe": recipe,
            "code_version": code_version(),
            "seed": config.seed,
            "inputs": {**self.inputs, "judge": judged_by},
            "versions": package_versions(),
            "host": machine(),
        }

    def usage(self) -> dict[str, Any]:
        """What the judge had to do in this call."""
        judge = self.judge
        return {"asked": judge.asked, "recalled": judge.recalled, "failed": dict(judge.failed)}

    def plan_text(self) -> str:
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
        lines = {
            "kind": f"{config.kind}, the judge sees the {config.resolved_scope}",
            "prompts": f"{prompts} from {config.dataset}",
            "answers": answers,
            "judge": ", ".join(str(value) for value in self.judge.place.values()),
            "questions": f"at most {questions} ({prompts * most} {of} x "
            f"{config.resolved_judgements}), each answered in at most "
            f"{config.judge_max_tokens} tokens",
        }
        return "\n".join(f"{name:<10} {text}" for name, text in lines.items())


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
    judge = load_chat_model(config.judge, **config.judge_options)
    stack.callback(judge.close)
    judge.check()
    if not config.answer_columns:
        sampler = Sampler.load(config, rows)
        stack.callback(sampler.generator.close)
        inputs |= sampler.inputs
    return Preferences(config, rows, sampler, judge, inputs)


def _counts(counter: Counter[str]) -> dict[str, int]:
    return {reason: count for reason, count in sorted(counter.items()) if count}


def write_rows(path: Path, rows: list[Mapping[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    write_atomically(path, "".join(lines))


def finish(stage: Preferences, interrupt: Interrupt, manifest: Manifest) -> int:
    """Judge to an end of some kind; write the results if every judgement is there."""
    folder, code, status = Path(stage.config.output_dir), 1, "failed"
    try:
        with progress_bar() as bar:
            judged = stage.judged(interrupt, bar)
        figures = stage.write(judged)
        if figures["kept"]:
            code, status = 0, "finished"
        show(figures, folder)
    except StopRequested:
        code, status = interrupt.exit_code, "stopped"
    except (JudgeErrors, FloatingPointError) as error:
        say(f"stopped: {error}")
    finally:
        outputs = {
            name: {"sha256": sha256((folder / name).read_bytes()).hexdigest()}
            for name in (SAMPLES_FILE, *RESULTS)
            if (folder / name).exists()
        }
        manifest.update(status=status, finished=now(), outputs=outputs, judge_usage=stage.usage())
    if status == "stopped" or not (folder / "statistics.json").exists():
        say(f"answers and replies so far are kept in {folder}; the same command goes on from there")
    return code


def show(figures: Mapping[str, Any], folder: Path) -> None:
    console = Console()
    product = PRODUCTS[figures["kind"]]
    judged = figures.get("pairs_judged", figures.get("answers_judged"))
    print(f"{figures['kept']} of {judged} judged are kept: {folder / product}")
    for sentence in warnings(figures):
        console.print(f"! {sentence}", style="yellow", markup=False)
    if not figures["kept"]:
        say(f"nothing was kept: see {folder / 'statistics.md'} and {folder / 'ties.jsonl'}")
