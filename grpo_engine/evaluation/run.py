"""An evaluation from configuration to ``results.json``: draw, judge, keep, and go on where it was
stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers.utils import logging as transformers_logging

from grpo_engine.evaluation.config import EvalConfig
from grpo_engine.evaluation.folder import (
    RESULTS_FILE,
    check_folder,
    check_same_inputs,
    identity,
)
from grpo_engine.evaluation.problems import Problems, count_overlap, load_problems
from grpo_engine.evaluation.results import figures, results_table, warnings
from grpo_engine.evaluation.samples import (
    SAMPLES_FILE,
    Cell,
    Sample,
    SampleFile,
    fingerprint,
    plan_batches,
)
from grpo_engine.generation.hf import HFGenerator
from grpo_engine.interrupt import Interrupt, StopRequested
from grpo_engine.manifest import (
    Manifest,
    code_version,
    machine,
    package_versions,
    rows_sha256,
    weights_sha256,
)
from grpo_engine.metrics import write_atomically
from grpo_engine.policy import Policy
from grpo_engine.prepare import load_prompts, sandbox_tier, think_tag_is_open
from grpo_engine.progress import say, wants_screen
from grpo_engine.rewards import RewardError, RewardPool, RewardSpec
from grpo_engine.rewards.answers import marked_answers, text_after_thinking
from grpo_engine.rewards.choice import chosen_letters
from grpo_engine.rollouts import Prompt, derive_seed
from grpo_engine.settings import config_text
from grpo_engine.types import GenerationRequest, SamplingParams, UserError

ERRORS_COUNT_FROM = 32  # samples


def run_eval(
    config: EvalConfig,
    *,
    recipe: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> int:
    """Evaluate, and return the process's exit code. A folder with samples of the same evaluation is
    continued. Raises ``UserError`` for bad input, before anything is written."""
    transformers_logging.disable_progress_bar()  # they would tear the live screen
    folder = Path(config.output_dir)
    with Interrupt() as interrupt, ExitStack() as stack:
        sources = {"data": config.data, "check_overlap": config.check_overlap}
        check_folder(folder, overwrite, sources)
        evaluation = prepare(config, stack)
        if not overwrite:
            check_same_inputs(folder, evaluation.inputs)
        if dry_run:
            print(evaluation.plan_text())
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        samples = stack.enter_context(SampleFile(folder, evaluation.key_of, empty=overwrite))
        manifest = Manifest(folder, manifest_values(evaluation, recipe))
        manifest.update(status="running", started=now(), finished=None)
        write_atomically(folder / "config.yaml", config_text(config))
        (folder / RESULTS_FILE).unlink(missing_ok=True)  # perhaps of fewer samples
        return finish(evaluation, samples, interrupt, manifest)


@dataclass
class Evaluation:
    """Everything loaded: the loop is ``sample``."""

    config: EvalConfig
    problems: Problems
    prompts: list[Prompt]
    policy: Policy
    generator: HFGenerator
    pool: RewardPool
    think_is_open: bool
    inputs: dict[str, Any]
    left_out: dict[str, list[int]]
    overlap: dict[str, Any] | None

    def __post_init__(self) -> None:
        config = self.config
        self.sampling = SamplingParams(
            config.max_completion_length, config.temperature, config.top_p, config.top_k
        )
        self.identity = identity(self.inputs)
        self.first_error: str | None = None  # of the judge
        self.of_row = {prompt.row["row"]: prompt for prompt in self.prompts}

    def seed(self, cell: Cell) -> int:
        return derive_seed(self.config.seed, "evaluation", *cell)

    def key_of(self, cell: Cell) -> str | None:
        """What the tokens of a sample depend on, and what its verdict does."""
        prompt = self.of_row.get(cell[0])
        if prompt is None:
            return None
        return fingerprint(self.identity, prompt.token_ids, self.seed(cell))

    def batches(self) -> Iterator[list[tuple[int, int]]]:
        config = self.config
        return plan_batches(
            [len(prompt.token_ids) for prompt in self.prompts],
            config.num_samples,
            config.max_completion_length,
            max_rows=config.generation_batch_size,
            max_tokens=config.generation_batch_tokens,
        )

    def sample(self, samples: SampleFile, interrupt: Interrupt, bar: Bar) -> None:
        """Draw and judge what is not there yet, batch by batch."""
        total = len(self.prompts) * self.config.num_samples
        task = bar.add_task("samples", total=total)
        for batch in self.batches():
            cells = [(self.prompts[problem].row["row"], number) for problem, number in batch]
            missing = [cell for cell in cells if cell not in samples.samples]
            if missing:
                with interrupt.abortable():
                    judged = self.judge(missing, self.draw(missing))
                self.check_errors([*samples.samples.values(), *judged], total)
                samples.append(judged, [self.notes(cell) for cell in missing])
            bar.advance(task, len(cells))
            if missing and bar.disable:
                say(f"{bar.tasks[0].completed:.0f} of {total} samples")

    def draw(self, cells: list[Cell]) -> list[tuple[str, int, str]]:
        """(text, tokens, finish reason) of each cell."""
        requests = [
            GenerationRequest(self.of_row[cell[0]].token_ids, self.seed(cell)) for cell in cells
        ]
        drawn = []
        for one in self.generator.generate(requests, self.sampling):
            ids = one.completion_ids
            text_ids = ids[:-1] if one.finish_reason == "stop" else ids
            text = self.policy.tokenizer.decode(text_ids, skip_special_tokens=False)
            drawn.append((text, len(ids), one.finish_reason))
        return drawn

    def judge(self, cells: list[Cell], drawn: list[tuple[str, int, str]]) -> list[Sample]:
        rows = [self.of_row[row].row for row, _ in cells]
        names = {name for row in rows for name in row}
        report = self.pool.score(
            [self.of_row[row].text for row, _ in cells],
            [text for text, _, _ in drawn],
            {name: [row.get(name) for row in rows] for name in names},
        )
        [reward] = self.pool.rewards
        self.first_error = self.first_error or report.first_errors.get(reward.name)
        verdicts = zip(report.scores[reward.name], report.outcome_of[reward.name], strict=True)
        return [
            Sample(
                row=cell[0],
                sample=cell[1],
                seed=self.seed(cell),
                completion=text,
                length=length,
                finish_reason=reason,
                answers=None if outcome == "no_answer" else self.answers(text, row),
                score=score,
                outcome=outcome,
            )
            for cell, row, (text, length, reason), (score, outcome) in zip(
                cells, rows, drawn, verdicts, strict=True
            )
        ]

    def check_errors(self, judged: list[Sample], total: int) -> None:
        """RewardError if too large a share of all samples so far could not be judged. The first few
        do not count: a batch may be a single sample."""
        failed, allowed = sum(one.unjudged for one in judged), self.config.max_reward_error_rate
        if len(judged) >= min(ERRORS_COUNT_FROM, total) and failed > allowed * len(judged):
            raise RewardError(
                f"{failed} of {len(judged)} samples could not be judged, more than "
                f"max_reward_error_rate={allowed:g} allows; the first failure: {self.first_error}"
            )

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
        row = self.of_row[cell[0]].row
        shown = ("solution", "choice_order", *(("prompt",) if cell[1] == 0 else ()))
        return {name: row[name] for name in shown if name in row and _is_plain(row[name])}

    def results(self, samples: SampleFile) -> dict[str, Any]:
        """The contents of results.json: no times, no places, so that a repetition can be compared
        byte by byte."""
        config = self.config
        drawn = [
            [samples.samples[prompt.row["row"], number] for number in range(config.num_samples)]
            for prompt in self.prompts
        ]
        config_values = config.model_dump(mode="json", exclude={"output_dir"})
        return {
            "model": config.model,
            "data": config.data,
            "task": self.problems.task,
            "num_problems": len(drawn),
            "num_samples": config.num_samples,
            **figures(self.problems.task, drawn, config.resolved_ks()),
            "overlap": self.overlap,
            "left_out": self.left_out,
            "rows": [prompt.row["row"] for prompt in self.prompts],  # in the order of "correct"
            "inputs": self.inputs,
            "config": config_values,
            "code_version": code_version(),
            "versions": package_versions(),
        }

    def plan_text(self) -> str:
        config, total = self.config, len(self.prompts) * self.config.num_samples
        lines = {
            "model": f"{config.model}, {self.policy.dtype}, {self.policy.device}",
            "data": f"{len(self.prompts)} problems ({self.problems.task}) from {config.data}",
            "samples": f"{config.num_samples} a problem, {total} in all, of at most "
            f"{config.max_completion_length} tokens",
            "batches": f"{sum(1 for _ in self.batches())}",
            "k": ", ".join(map(str, config.resolved_ks())),
            "prompt": json.dumps(self.prompts[0].text, ensure_ascii=False),
        }
        return "\n".join(f"{name:<10} {text}" for name, text in lines.items())


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, list))


def prepare(config: EvalConfig, stack: ExitStack) -> Evaluation:
    """Load problems, model and rewards; everything the user can have wrong is found here."""
    problems = load_problems(config)
    overlap = count_overlap(config, problems)
    policy = Policy.load(config.model, dtype=config.dtype, device=config.device, trainable=False)
    suffix = config.prompt_suffix
    if suffix is None and config.prompt_template == "chat":
        suffix = problems.kind.suffix
    prompts = load_prompts(
        config.model_copy(update={"prompt_suffix": suffix}), policy.tokenizer, problems.rows
    )
    check_context(config, policy, prompts)
    kept = {prompt.row["row"] for prompt in prompts}
    opened = think_tag_is_open(prompts)
    spec = RewardSpec.named(problems.kind.reward, thinking_prefilled=opened)
    tier = sandbox_tier([spec])
    pool = RewardPool(
        [spec],
        num_workers=config.reward_workers,
        timeout_s=config.reward_timeout,
        max_error_rate=1.0,  # counted over all batches, in check_errors
    )
    stack.enter_context(pool)
    generator = HFGenerator(
        policy,
        max_batch_size=config.generation_batch_size,
        max_batch_tokens=config.generation_batch_tokens,
    )
    stack.callback(generator.close)
    inputs = inputs_of(config, problems, prompts, policy, spec)
    if tier is not None:
        inputs["judge"]["sandbox"] = tier
    long = [row["row"] for row in problems.rows if row["row"] not in kept]
    left_out = {"unusable_rows": problems.unusable, "long_prompts": long}
    return Evaluation(
        config, problems, prompts, policy, generator, pool, opened, inputs, left_out, overlap
    )


def inputs_of(
    config: EvalConfig,
    problems: Problems,
    prompts: list[Prompt],
    policy: Policy,
    spec: RewardSpec,
) -> dict[str, Any]:
    """What the samples and their verdicts come from, by content. A change in any of it makes
    another evaluation."""
    versions = package_versions()
    judge = {name: versions[name] for name in ("math-verify", "reasoning-gym") if name in versions}
    texts = [[prompt.row["row"], prompt.text] for prompt in prompts]
    return {
        "model": {
            "path": config.model,
            "weights_sha256": weights_sha256(policy.model),
            "dtype": config.dtype,
            "end_ids": list(policy.eos_ids),
        },
        "data": {
            "source": config.data,
            "rows": len(prompts),
            "columns": problems.columns,
            "sha256": rows_sha256([prompt.row for prompt in prompts]),
        },
        "prompts": {"sha256": fingerprint(texts), "template": config.prompt_template},
        "sampling": {
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "max_completion_length": config.max_completion_length,
            "seed": config.seed,
        },
        "judge": {
            "reward": spec.function,
            "thinking_prefilled": spec.args["thinking_prefilled"],
            "timeout_s": config.reward_timeout,
            **judge,
        },
    }


def check_context(config: EvalConfig, policy: Policy, prompts: list[Prompt]) -> None:
    """The longest prompt and its completion must fit the model's positions."""
    limit = getattr(policy.text_config, "max_position_embeddings", None)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if limit is not None and longest + config.max_completion_length > limit:
        raise UserError(
            f"--max_completion_length {config.max_completion_length}: with the longest prompt "
            f"({longest} tokens) it passes the {limit} positions of {config.model}"
        )


def manifest_values(evaluation: Evaluation, recipe: str | None) -> dict[str, Any]:
    return {
        "verb": "eval",
        "name": Path(evaluation.config.output_dir).name,
        "recipe": recipe,
        "code_version": code_version(),
        "seed": evaluation.config.seed,
        "inputs": evaluation.inputs,
        "versions": package_versions(),
        "host": machine(),
    }


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def finish(
    evaluation: Evaluation, samples: SampleFile, interrupt: Interrupt, manifest: Manifest
) -> int:
    """Sample to an end of some kind; write the results if all samples are there."""
    folder, code, status = Path(evaluation.config.output_dir), 1, "failed"
    total = len(evaluation.prompts) * evaluation.config.num_samples
    try:
        with progress_bar() as bar:
            evaluation.sample(samples, interrupt, bar)
        results = evaluation.results(samples)
        write_atomically(folder / RESULTS_FILE, json.dumps(results, indent=1) + "\n")
        code, status = 0, "finished"
    except StopRequested:
        code, status = interrupt.exit_code, "stopped"
    except (RewardError, FloatingPointError) as error:
        say(f"stopped: {error}")
    finally:
        outputs = {
            name: {"sha256": sha256((folder / name).read_bytes()).hexdigest()}
            for name in (SAMPLES_FILE, RESULTS_FILE)
            if (folder / name).exists()
        }
        manifest.update(status=status, finished=now(), outputs=outputs)
    if status == "finished":
        show(results, folder)
    else:
        kept = min(len(samples.samples), total)
        say(f"{kept} of {total} samples are kept in {folder}; the same command goes on from there")
    return code


@contextmanager
def progress_bar() -> Iterator[Bar]:
    """A bar on a terminal; elsewhere disabled, and the loop prints a line a batch."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, disable=not wants_screen(console)) as bar:
        yield bar


def show(results: dict[str, Any], folder: Path) -> None:
    console = Console()
    print(
        f"{results['model']} on {results['data']}: {results['num_problems']} problems x "
        f"{results['num_samples']} samples"
    )
    console.print(results_table(results))
    for sentence in warnings(results):
        console.print(f"! {sentence}", style="yellow", markup=False)
    print(f"results: {folder / RESULTS_FILE}")
