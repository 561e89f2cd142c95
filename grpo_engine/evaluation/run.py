"""An evaluation from configuration to ``results.json``: draw, judge, keep, and go on where it was
stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bar

from grpo_engine.evaluation.config import EvalConfig
from grpo_engine.evaluation.problems import Problems, count_overlap, load_problems
from grpo_engine.evaluation.results import figures, results_table, warnings
from grpo_engine.evaluation.samples import Sample
from grpo_engine.interrupt import Interrupt
from grpo_engine.manifest import code_version, package_versions, rows_sha256
from grpo_engine.metrics import write_atomically
from grpo_engine.prepare import load_prompts, sandbox_tier, think_tag_is_open
from grpo_engine.progress import say
from grpo_engine.rewards import RewardPool, RewardSpec
from grpo_engine.rewards.answers import marked_answers, text_after_thinking
from grpo_engine.rewards.choice import chosen_letters
from grpo_engine.rewards.registry import rules_sha256
from grpo_engine.sampling.folder import identity
from grpo_engine.sampling.model import Drawn, SamplingModel
from grpo_engine.sampling.run import Count, ErrorBudget, SampledRun, run_sampled
from grpo_engine.sampling.samples import Cell, SampleFile, fingerprint
from grpo_engine.sampling.series import Series, draw_missing

RESULTS_FILE = "results.json"


def run_eval(
    config: EvalConfig,
    *,
    recipe: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> int:
    """Evaluate, and return the process's exit code. A folder with samples of the same evaluation is
    continued. Raises ``UserError`` for bad input, before anything is written."""
    return run_sampled(
        Evaluation,
        config,
        lambda stack: prepare(config, stack),
        {"data": config.data, "check_overlap": config.check_overlap},
        recipe=recipe,
        overwrite=overwrite,
        dry_run=dry_run,
    )


@dataclass
class Evaluation(SampledRun):
    """Everything loaded: the loop is ``sample``."""

    verb = "eval"
    results = (RESULTS_FILE,)

    config: EvalConfig
    problems: Problems
    series: Series
    model: SamplingModel
    pool: RewardPool
    think_is_open: bool
    sources: dict[str, Any]
    left_out: dict[str, list[int]]
    overlap: dict[str, Any] | None

    def __post_init__(self) -> None:
        config = self.config
        self.identity = identity(self.inputs_of_samples())
        self.judged_by = fingerprint(self.sources["judge"])
        self.errors = ErrorBudget(
            "max_reward_error_rate", config.max_reward_error_rate, "samples could not be judged"
        )
        self.total = len(self.series.prompts) * config.num_samples
        self.samples: SampleFile | None = None
        self.found: dict[str, Any] = {}  # results.json

    def inputs_of_samples(self) -> dict[str, dict[str, Any]]:
        """Without the judge: an answer that is there can be judged again."""
        return {group: one for group, one in self.sources.items() if group != "judge"}

    def inputs(self) -> dict[str, dict[str, Any]]:
        return self.sources

    def key_of(self, cell: Cell) -> str | None:
        """What the tokens of a sample depend on, and what the right answer is."""
        return self.series.key(cell, self.identity)

    def open_files(self, stack: ExitStack, *, empty: bool) -> None:
        self.samples = stack.enter_context(
            SampleFile(self.folder, self.key_of, kind=Sample, empty=empty, work="evaluation")
        )

    def make(self, interrupt: Interrupt, bar: Bar) -> str:
        self.judge_again(interrupt)
        self.sample(interrupt, bar)
        self.found = self.figures()
        write_atomically(self.folder / RESULTS_FILE, json.dumps(self.found, indent=1) + "\n")
        return "finished"

    def judge_again(self, interrupt: Interrupt) -> None:
        """Where another judge, or an earlier version of it, has judged what is there."""
        there = self.samples.samples
        if all(one.judge == self.judged_by for one in there.values()):
            return
        say(f"judging {len(there)} samples again: their verdicts are of another judge or version")
        errors = replace(self.errors)

        def judged(samples: list[Sample]) -> list[Sample]:
            drawn = [Drawn(one.completion, one.length, one.finish_reason) for one in samples]
            with interrupt.abortable():
                again = self.judge([one.cell for one in samples], drawn)
            errors.add(len(again), sum(one.unjudged for one in again), self.errors.first)
            errors.check(len(there))
            return again

        self.samples.rewrite(self.config.generation_batch_size, judged)

    def sample(self, interrupt: Interrupt, bar: Bar) -> None:
        """Draw and judge what is not there yet, batch by batch."""
        count = Count(bar, "samples", self.total)
        for sample in self.samples.samples.values():
            self.errors.add(1, sample.unjudged)
        batches = draw_missing(self.series, self.samples, self.judged, interrupt, note=self.notes)
        for cells, drawn in batches:
            count.advance(cells, quiet=not drawn)

    def judged(self, cells: list[Cell]) -> list[Sample]:
        judged = self.judge(cells, self.draw(cells))
        self.errors.add(len(judged), sum(one.unjudged for one in judged))
        self.errors.check(self.total)
        return judged

    def draw(self, cells: list[Cell]) -> list[Drawn]:
        return self.model.draw(self.series, cells)

    def judge(self, cells: list[Cell], drawn: Sequence[Drawn]) -> list[Sample]:
        prompts = [self.series.prompt(cell) for cell in cells]
        rows = [prompt.row for prompt in prompts]
        names = {name for row in rows for name in row}
        report = self.pool.score(
            [prompt.text for prompt in prompts],
            [text for text, _, _ in drawn],
            {name: [row.get(name) for row in rows] for name in names},
        )
        [reward] = self.pool.rewards
        self.errors.add(0, 0, report.first_errors.get(reward.name))
        verdicts = zip(report.scores[reward.name], report.outcome_of[reward.name], strict=True)
        return [
            Sample(
                row=cell[0],
                sample=cell[1],
                seed=self.series.seed(cell),
                completion=text,
                length=length,
                finish_reason=reason,
                answers=None if outcome == "no_answer" else self.answers(text, row),
                score=score,
                outcome=outcome,
                judge=self.judged_by,
            )
            for cell, row, (text, length, reason), (score, outcome) in zip(
                cells, rows, drawn, verdicts, strict=True
            )
        ]

    def answers(self, text: str, row: dict[str, Any]) -> list[str] | None:
        if self.problems.task == "code":
            return None  # the program is in the completion, and programs do not vote
        if self.problems.task == "choice":
            count, opened = row["num_choices"], self.think_is_open
            return chosen_letters(text, count, thinking_prefilled=opened) or None
        tail = text_after_thinking(text, self.think_is_open)
        return marked_answers(tail) if tail is not None else None

    def notes(self, cell: Cell) -> dict[str, Any]:
        """For the reader of samples.jsonl."""
        row = self.series.prompt(cell).row
        shown = ("solution", "choice_order", *(("prompt",) if cell[1] == 0 else ()))
        return {name: row[name] for name in shown if name in row and _is_plain(row[name])}

    def figures(self) -> dict[str, Any]:
        """The contents of results.json: no times, no places, so that a repetition can be compared
        byte by byte."""
        config, samples = self.config, self.samples.samples
        rows = [prompt.row["row"] for prompt in self.series.prompts]
        drawn = [
            # The figures need no text, and all of it may not fit in memory.
            [replace(samples[row, n], completion="") for n in range(config.num_samples)]
            for row in rows
        ]
        return {
            "model": config.model,
            "data": config.data,
            "task": self.problems.task,
            "num_problems": len(drawn),
            "num_samples": config.num_samples,
            **figures(self.problems.task, drawn, config.resolved_ks()),
            "overlap": self.overlap,
            "left_out": self.left_out,
            "rows": rows,  # in the order of "correct"
            "inputs": self.sources,
            "config": config.model_dump(mode="json", exclude={"output_dir"}),
            "code_version": code_version(),
            "versions": package_versions(),
        }

    def plan(self) -> list[tuple[str, str]]:
        config, prompts, policy = self.config, self.series.prompts, self.model.policy
        samples = (
            f"{config.num_samples} a problem, {self.total} in all, of at most "
            f"{config.max_completion_length} tokens"
        )
        return [
            ("model", f"{config.model}, {policy.dtype}, {policy.device}"),
            ("data", f"{len(prompts)} problems ({self.problems.task}) from {config.data}"),
            ("samples", samples),
            ("batches", f"{sum(1 for _ in self.series.batches())}"),
            ("k", ", ".join(map(str, config.resolved_ks()))),
            ("prompt", json.dumps(prompts[0].text, ensure_ascii=False)),
        ]

    def show(self) -> None:
        console, found = Console(), self.found
        print(
            f"{found['model']} on {found['data']}: {found['num_problems']} problems x "
            f"{found['num_samples']} samples"
        )
        console.print(results_table(found))
        for sentence in warnings(found):
            console.print(f"! {sentence}", style="yellow", markup=False)
        print(f"results: {self.folder / RESULTS_FILE}")

    def kept(self) -> str:
        there = min(len(self.samples.samples), self.total)
        return f"{there} of {self.total} samples are kept"


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, list))


def prepare(config: EvalConfig, stack: ExitStack) -> Evaluation:
    """Load problems, model and rewards; everything the user can have wrong is found here."""
    problems = load_problems(config)
    overlap = count_overlap(config, problems)
    model = SamplingModel(config.model, config)
    stack.callback(model.close)
    suffix = config.prompt_suffix
    if suffix is None and config.prompt_template == "chat":
        suffix = problems.kind.suffix
    prompts = load_prompts(
        config.model_copy(update={"prompt_suffix": suffix}), model.policy.tokenizer, problems.rows
    )
    series = Series("evaluation", config, prompts)
    model.check_positions(series)
    kept = {prompt.row["row"] for prompt in prompts}
    opened = think_tag_is_open(prompts)
    spec = RewardSpec.named(problems.kind.reward, thinking_prefilled=opened)
    tier = sandbox_tier([spec])
    pool = RewardPool(
        [spec],
        num_workers=config.reward_workers,
        timeout_s=config.reward_timeout,
        max_error_rate=1.0,  # counted over all batches, by ``errors``
    )
    stack.enter_context(pool)
    inputs = inputs_of(config, problems, series, model, spec)
    if tier is not None:
        inputs["judge"]["sandbox"] = tier
    long = [row["row"] for row in problems.rows if row["row"] not in kept]
    left_out = {"unusable_rows": problems.unusable, "long_prompts": long}
    return Evaluation(config, problems, series, model, pool, opened, inputs, left_out, overlap)


def inputs_of(
    config: EvalConfig,
    problems: Problems,
    series: Series,
    model: SamplingModel,
    spec: RewardSpec,
) -> dict[str, Any]:
    """What the samples and their verdicts come from, by content. A change in any of it but the
    judge makes another evaluation."""
    versions = package_versions()
    judge = {name: versions[name] for name in ("math-verify", "reasoning-gym") if name in versions}
    rows = [prompt.row for prompt in series.prompts]
    return {
        "model": model.inputs(),
        "data": {
            "source": config.data,
            "rows": len(rows),
            "columns": problems.columns,
            "sha256": rows_sha256(rows),
        },
        "prompts": {"sha256": series.prompts_sha256(), "template": config.prompt_template},
        "sampling": series.inputs(),
        "judge": {
            "reward": spec.function,
            "thinking_prefilled": spec.args["thinking_prefilled"],
            "timeout_s": config.reward_timeout,
            "rules_sha256": rules_sha256(),
            **judge,
        },
    }
