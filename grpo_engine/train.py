"""A GRPO run from configuration to report: logging, evaluating, saving, stopping, resuming."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from grpo_engine.checkpoint import find_checkpoint, save_checkpoint, set_aside_later
from grpo_engine.config import GRPOConfig, config_text
from grpo_engine.grpo import GRPORun, RunAborted
from grpo_engine.held_out import HeldOut
from grpo_engine.interrupt import Interrupt, StopRequested
from grpo_engine.lora import base_tensors
from grpo_engine.manifest import Manifest, code_version, machine, package_versions
from grpo_engine.metrics import CompletionsLog, MetricsLog, health_warnings, write_atomically
from grpo_engine.prepare import (
    build_run,
    check_loss_options,
    check_output_dir,
    check_resumable,
    check_same_inputs,
    clear_run,
    run_folder,
    say,
)
from grpo_engine.progress import Progress
from grpo_engine.report import write_report
from grpo_engine.rewards import RewardError
from grpo_engine.types import Rollout


class Session:
    """A run with its logs, screen and signals: every step ends up on the screen, in metrics.jsonl
    and, in time, in a checkpoint."""

    def __init__(
        self, run: GRPORun, held_out: HeldOut | None, interrupt: Interrupt, screen: Progress
    ) -> None:
        self.run, self.held_out, self.interrupt, self.screen = run, held_out, interrupt, screen
        self.folder = Path(run.config.output_dir)
        self.log: MetricsLog | None = None
        self.completions: CompletionsLog | None = None
        self.saved_step = run.step  # 0, or that of the checkpoint the run was resumed from
        self.sample: Rollout | None = None  # shown on the screen

    def open_logs(self, resume_step: int | None) -> None:
        """On resume the last row is dropped and written again if its evaluation was cut off."""
        self.completions = CompletionsLog(self.folder, resume_step)
        self.log = MetricsLog(self.folder, resume_step)
        last = self.log.history[-1] if self.log.history else None
        if resume_step is None:
            if self.held_out:
                with self._saved_on_the_way_out():
                    self._record({"step": 0})
        elif (
            last
            and last["step"] == resume_step
            and self._evaluation_due()
            and "eval/accuracy" not in last
        ):
            self.log.close()
            self.log = MetricsLog(self.folder, resume_step - 1)
            self._record(last)

    def train(self) -> None:
        """Run to ``max_steps``. Whatever ends the sampling of a rollout, the last finished step is
        saved: sampling changes no state. Steps that were not finite are never saved."""
        run, config = self.run, self.run.config
        while run.step < config.max_steps:
            with self._saved_on_the_way_out():
                self.interrupt.check()
                if run.arrays is None:
                    self._next_rollout()
            row = run.update()
            with self._saved_on_the_way_out():
                self._record(row)
            if run.step % config.save_steps == 0:
                self.save()
        self.save()

    @contextmanager
    def _saved_on_the_way_out(self) -> Iterator[None]:
        """Around what samples and scores, between two updates."""
        try:
            yield
        except BaseException as error:
            self.save()
            if isinstance(error, (RewardError, FloatingPointError)):
                raise RunAborted(f"after step {self.run.step}: {error}") from error
            raise

    def _next_rollout(self) -> None:
        run, config = self.run, self.run.config
        with self.interrupt.abortable():
            rollouts, arrays, rows = run.rollout()
        if not arrays.counted.any():
            raise RewardError(f"no answer of the rollout could be scored ({unscored(rows)})")
        every = config.log_completions_steps
        if run.step == 0 or run.step // every != (run.step - config.updates_per_rollout) // every:
            self.completions.write_rollouts(run.step + 1, rollouts)
        self.sample = rollouts[0]
        run.begin(arrays, rows)

    def _evaluation_due(self) -> bool:
        config, step = self.run.config, self.run.step
        return self.held_out is not None and (
            step % config.eval_steps == 0 or step == config.max_steps
        )

    def _record(self, row: dict[str, Any]) -> None:
        """Evaluate if it is time, then write the row, also if the evaluation was cut or failed."""
        stop = None
        if self._evaluation_due():
            try:
                with self.interrupt.abortable():
                    metrics, samples = self.held_out.evaluate(self.run)
                self.completions.write_eval(self.run.step, samples)
                row = row | metrics
            except (StopRequested, RewardError, FloatingPointError) as error:
                stop = error
            row["time/eval"] = self.run.watch.lap().get("time/eval", 0.0)
        row["wall"] = time.time()
        warnings = health_warnings(row, list(self.log.history))
        if warnings:
            row["warnings"] = warnings
        self.screen.update(self.log.write(row), sample=self.sample)
        if stop:
            raise stop

    def save(self) -> None:
        """Publish a checkpoint of this step, once; none before the first step or after a skipped
        update. Raises RunAborted instead of saving weights that are not finite."""
        run, config = self.run, self.run.config
        if run.step in (0, self.saved_step) or run.skipped_in_a_row:
            return
        bad = run.policy.first_not_finite()
        if bad is not None:
            raise RunAborted(f"step {run.step}: {bad} is not finite; this step was not saved")
        keep = config.save_total_limit
        path = save_checkpoint(self.folder, run.step, run.write_checkpoint, keep)
        self.saved_step = run.step
        run.watch.lap()  # not part of the next step's time
        self.screen.message(f"saved {path}")


def unscored(rows: dict[str, Any]) -> str:
    """The outcomes of a rollout's rewards, for an error message."""
    rates = [f"{key} {value:.0%}" for key, value in rows.items() if key.endswith("_rate") and value]
    errors = [str(value) for key, value in rows.items() if key.endswith("/first_error")]
    return "; ".join(rates + errors) or "no reward function applies to its rows"


def train_grpo(
    config: GRPOConfig,
    *,
    recipe: str | None = None,
    resume: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> int:
    """Train, log, checkpoint and report one GRPO run; returns the process's exit code.

    ``resume``: a run's folder or one of its checkpoints. Raises ``UserError`` for bad input, before
    anything is written.
    """
    transformers_logging.disable_progress_bar()  # they would tear the live screen
    check_loss_options(config)
    checkpoint = None
    if resume is not None:
        folder = run_folder(resume)
        config = config.model_copy(update={"output_dir": str(folder)})
        check_resumable(config, folder)
        checkpoint = find_checkpoint(Path(resume), say)
    folder = Path(config.output_dir)
    with Interrupt() as interrupt, ExitStack() as stack:
        check_output_dir(config, resuming=resume is not None, overwrite=overwrite)
        run, held_out, inputs = build_run(config, checkpoint, stack)
        if checkpoint is None:
            values = manifest_values(config, recipe, inputs)
        else:
            values = check_same_inputs(folder, inputs)
            resumed = {"at": now(), "from": checkpoint.name}
            if "sandbox" in inputs:  # found out anew: it may be another machine
                resumed["sandbox"] = inputs["sandbox"]
            values["resumed"] = [*values.get("resumed", []), resumed]
        if dry_run:
            print(plan_text(run, held_out))
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            clear_run(folder)
        if checkpoint is not None:
            for path in set_aside_later(folder, run.step):
                say(f"a later checkpoint is set aside as {path.name}")
        write_atomically(folder / "config.yaml", config_text(config))
        screen = stack.enter_context(
            Progress(screen_summary(config, recipe, run), config.max_steps, first_step=run.step)
        )
        session = Session(run, held_out, interrupt, screen)
        return finish(session, Manifest(folder, values), checkpoint)


def finish(session: Session, manifest: Manifest, checkpoint: Path | None) -> int:
    """Train to an end of some kind, then write how it ended and the report."""
    manifest.update(status="running", finished=None)
    code, status, line = 1, "failed", ""
    try:
        session.open_logs(None if checkpoint is None else session.run.step)
        session.train()
        code, status = 0, "finished"
        line = f"finished {session.run.step} steps"
    except StopRequested:
        code, status = session.interrupt.exit_code, "stopped"
        line = f"stopped after step {session.run.step}"
        if session.saved_step:
            line += f"; continue with: grpo-engine grpo --resume {session.folder}"
    except RunAborted as error:
        line = f"stopped: {error}"
    finally:
        manifest.update(status=status, finished=now(), steps=session.run.step)
        if session.log is not None:
            session.log.close()
    report = write_report(session.folder)
    session.screen.message(line)
    session.screen.message(f"report: {report}")
    return code


def manifest_values(
    config: GRPOConfig, recipe: str | None, inputs: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": Path(config.output_dir).name,
        "recipe": recipe,
        "started": now(),
        "finished": None,
        "code_version": code_version(),
        "seed": config.seed,
        "inputs": inputs,
        "versions": package_versions(),
        "host": machine(),
    }


def screen_summary(config: GRPOConfig, recipe: str | None, run: GRPORun) -> dict[str, Any]:
    outputs = f"{config.prompts_per_generation} x {config.num_generations}"
    return {
        "recipe": recipe or "-",
        "model": config.model,
        "device": run.policy.device.type,
        "outputs per rollout": outputs,
        "folder": config.output_dir,
    }


def plan_text(run: GRPORun, held_out: HeldOut | None) -> str:
    """What a dry run prints: everything was loaded and checked, nothing is written."""
    config = run.config
    parameters = sum(p.numel() for _, p in base_tensors(run.policy.model.named_parameters()))
    trained = sum(p.numel() for p in run.policy.weights().values())
    outputs = config.prompts_per_generation * config.num_generations
    rollouts = -(-config.max_steps // config.updates_per_rollout)
    lines = {
        "model": f"{config.model}, {parameters:,} weights, {run.policy.dtype}, {run.policy.device}",
        "trained": f"{trained:,} weights" + (" (LoRA)" if config.lora_r else ""),
        "data": f"{len(run.prompts)} prompts from {config.dataset}",
        "held out": f"{len(held_out.prompts) if held_out else 0} prompts",
        "rollout": f"{config.prompts_per_generation} prompts x {config.num_generations} = "
        f"{outputs} outputs of at most {config.max_completion_length} tokens",
        "steps": f"{config.max_steps}: {rollouts} rollouts x {config.updates_per_rollout} updates "
        f"of {outputs // config.steps_per_generation} outputs",
        "epochs": f"{rollouts * config.prompts_per_generation / len(run.prompts):.2f}",
        "reference": "none"
        if run.reference is None
        else f"replaced every {config.ref_model_sync_steps} steps",
    }
    return "\n".join(f"{name:<10} {text}" for name, text in lines.items())


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
