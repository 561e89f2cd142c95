"""A GRPO run from configuration to report: logging, evaluating, saving, stopping, resuming."""

from __future__ import annotations

import time
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from grpo_engine.checkpoint import find_checkpoint, save_checkpoint
from grpo_engine.config import GRPOConfig, save_config
from grpo_engine.grpo import GRPORun, RunAborted
from grpo_engine.held_out import HeldOut
from grpo_engine.interrupt import Interrupt, StopRequested
from grpo_engine.manifest import Manifest, code_version, machine, package_versions
from grpo_engine.metrics import CompletionsLog, MetricsLog, health_warnings
from grpo_engine.prepare import (
    build_run,
    check_loss_options,
    check_output_dir,
    check_resumable,
    clear_run,
    say,
)
from grpo_engine.progress import Progress
from grpo_engine.report import write_report
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
        self.sample: Rollout | None = None  # shown on the screen

    def open_logs(self, resume_step: int | None) -> None:
        """On resume the last row is dropped and written again if its evaluation was cut off."""
        self.completions = CompletionsLog(self.folder, resume_step)
        self.log = MetricsLog(self.folder, resume_step)
        last = self.log.history[-1] if self.log.history else None
        if resume_step is None:
            if self.held_out:
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
        """Run to ``max_steps``. A stop request saves the last finished step and goes on up."""
        run, config = self.run, self.run.config
        try:
            while run.step < config.max_steps:
                self.interrupt.check()
                if run.arrays is None:
                    self._next_rollout()
                self._record(run.update())
                if run.step % config.save_steps == 0:
                    self.save()
        except (StopRequested, RunAborted):
            if run.step:
                self.save()
            raise
        self.save()

    def _next_rollout(self) -> None:
        run, config = self.run, self.run.config
        with self.interrupt.abortable():
            rollouts, arrays, rows = run.rollout()
        if run.rollouts_done % config.log_completions_steps == 0:
            self.completions.write_rollouts(run.step + 1, rollouts)
        self.sample = rollouts[0]
        run.begin(arrays, rows)

    def _evaluation_due(self) -> bool:
        config, step = self.run.config, self.run.step
        return self.held_out is not None and (
            step % config.eval_steps == 0 or step == config.max_steps
        )

    def _record(self, row: dict[str, Any]) -> None:
        """Evaluate if it is time, then write the row, also if a stop cuts the evaluation."""
        stop = None
        if self._evaluation_due():
            try:
                with self.interrupt.abortable():
                    metrics, samples = self.held_out.evaluate(self.run)
                self.completions.write_eval(self.run.step, samples)
                row = row | metrics
            except StopRequested as error:
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
        run, config = self.run, self.run.config
        path = save_checkpoint(self.folder, run.step, run.write_checkpoint, config.save_total_limit)
        run.watch.lap()  # not part of the next step's time
        self.screen.message(f"saved {path}")


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
    check_loss_options(config)
    checkpoint = None
    if resume is not None:
        checkpoint = find_checkpoint(Path(resume), say)
        config = config.model_copy(update={"output_dir": str(checkpoint.parent)})
        check_resumable(config, checkpoint.parent)
    folder = Path(config.output_dir)
    with Interrupt() as interrupt, ExitStack() as stack:
        check_output_dir(folder, resuming=resume is not None, overwrite=overwrite)
        run, held_out, inputs = build_run(config, checkpoint, stack)
        if dry_run:
            print(plan_text(run, held_out))
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            clear_run(folder)
        save_config(config, folder / "config.yaml")
        manifest = Manifest(folder, manifest_values(config, recipe, checkpoint, inputs))
        screen = stack.enter_context(
            Progress(screen_summary(config, recipe, run), config.max_steps, first_step=run.step)
        )
        session = Session(run, held_out, interrupt, screen)
        return finish(session, manifest, checkpoint)


def finish(session: Session, manifest: Manifest, checkpoint: Path | None) -> int:
    """Train to an end of some kind, then write how it ended and the report."""
    manifest.update(status="running")
    code, status, line = 1, "failed", ""
    try:
        session.open_logs(None if checkpoint is None else session.run.step)
        session.train()
        code, status = 0, "finished"
        line = f"finished {session.run.step} steps"
    except StopRequested:
        code, status = session.interrupt.exit_code, "stopped"
        again = f"grpo-engine grpo --resume {session.folder}"
        line = f"stopped after step {session.run.step}; continue with: {again}"
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
    config: GRPOConfig, recipe: str | None, checkpoint: Path | None, inputs: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": Path(config.output_dir).name,
        "recipe": recipe,
        "started": now(),
        "finished": None,
        "resumed_from": None if checkpoint is None else checkpoint.name,
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
    parameters = sum(p.numel() for p in run.policy.model.parameters())
    outputs = config.prompts_per_generation * config.num_generations
    rollouts = -(-config.max_steps // config.updates_per_rollout)
    lines = {
        "model": f"{config.model}, {parameters:,} weights, {run.policy.dtype}, {run.policy.device}",
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
