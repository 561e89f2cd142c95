"""A training run of any stage from configuration to report: logging, evaluating, saving, stopping,
resuming. A stage brings its ``Session`` (what it learns and how it is shown) to ``run_stage``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, Protocol

from transformers.utils import logging as transformers_logging

from grpo_engine.checkpoint import find_checkpoint, save_checkpoint, set_aside_later
from grpo_engine.interrupt import Interrupt, StopRequested
from grpo_engine.learner import Learner, RunAborted
from grpo_engine.lora import base_tensors
from grpo_engine.manifest import (
    Manifest,
    code_version,
    machine,
    package_versions,
    weights_sha256,
)
from grpo_engine.metrics import CompletionsLog, MetricsLog, health_warnings, write_atomically
from grpo_engine.progress import FIGURES, Figure, Progress, counted, say
from grpo_engine.report import write_report
from grpo_engine.reward_hacking import hacking_warnings
from grpo_engine.run_folder import (
    check_output_dir,
    check_resumable,
    check_same_inputs,
    clear_run,
    run_folder,
)
from grpo_engine.settings import TrainConfig, config_text
from grpo_engine.types import Rollout


class Evaluation(Protocol):
    """What a stage measures on held-out rows."""

    def evaluate(self, run: Learner) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """({"eval/...": value}, rows for completions/eval-N.jsonl; none = no such file)."""


class Session:
    """A run with its logs, screen and signals: every step ends up on the screen, in metrics.jsonl
    and, in time, in a checkpoint.

    A stage's own session says how it is shown (``summary``, ``plan``) and may do something
    ``before_update``.
    """

    # What ends a run without being the user's mistake, besides RunAborted.
    FAILURES: ClassVar[tuple[type[Exception], ...]] = (FloatingPointError,)
    FIGURES: ClassVar[tuple[Figure, ...]] = FIGURES  # what the screen shows of a row

    def __init__(self, run: Learner, held_out: Evaluation | None) -> None:
        self.run, self.held_out = run, held_out
        self.folder = Path(run.config.output_dir)
        self.log: MetricsLog | None = None
        self.completions: CompletionsLog | None = None
        self.saved_step = run.step  # 0, or that of the checkpoint the run was resumed from
        self.sample: Rollout | None = None  # shown on the screen
        self.interrupt: Interrupt
        self.screen: Progress

    def summary(self) -> dict[str, Any]:
        """The header of the screen, beside recipe, model, device and folder."""
        return {}

    def plan(self) -> dict[str, str]:
        """What a dry run prints, beside the model: everything was loaded and checked."""
        return {}

    def before_update(self) -> None:
        """Called before each update. May be cut short by a signal, and is then done again, so it
        leaves the run unchanged until it is through."""

    def versions(self) -> dict[str, str]:
        """For the manifest: of what the run has found itself connected to."""
        return {}

    def warnings(self, row: dict[str, Any]) -> list[str]:
        """What looks wrong in a row, before it is written."""
        history = self.log.history
        return [*health_warnings(row, list(history)), *hacking_warnings(row, history)]

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
            and not any(key.startswith("eval/") for key in last)
        ):
            self.log.close()
            self.log = MetricsLog(self.folder, resume_step - 1)
            self._record(last)

    def train(self) -> None:
        """Run to the last step. Whatever ends what comes before an update, the last finished step
        is saved: only an update changes the run. Steps that were not finite are never saved."""
        run = self.run
        while run.step < run.total_steps:
            with self._saved_on_the_way_out():
                self.interrupt.check()
                self.before_update()
            row = run.update()
            with self._saved_on_the_way_out():
                self._record(row)
            if run.step % run.config.save_steps == 0:
                self.save()
        self.save()

    @contextmanager
    def _saved_on_the_way_out(self) -> Iterator[None]:
        """Around what samples and scores, between two updates."""
        try:
            yield
        except BaseException as error:
            self.save()
            if isinstance(error, self.FAILURES):
                raise RunAborted(f"after step {self.run.step}: {error}") from error
            raise

    def _evaluation_due(self) -> bool:
        step = self.run.step
        last = step == self.run.total_steps
        return self.held_out is not None and (step % self.run.config.eval_steps == 0 or last)

    def _record(self, row: dict[str, Any]) -> None:
        """Evaluate if it is time, then write the row, also if the evaluation was cut or failed."""
        stop = None
        if self._evaluation_due():
            try:
                with self.interrupt.abortable():
                    metrics, samples = self.held_out.evaluate(self.run)
                if samples:
                    self.completions.write_eval(self.run.step, samples)
                row = row | metrics
            except (StopRequested, *self.FAILURES) as error:
                stop = error
            lap = self.run.watch.lap()  # weights for the sampler included
            row["time/eval"] = sum(seconds for key, seconds in lap.items() if key != "time/step")
        row["wall"] = time.time()
        if warnings := self.warnings(row):
            row["warnings"] = warnings
        self.screen.update(self.log.write(row), sample=self.sample)
        if stop:
            raise stop

    def save(self) -> None:
        """Publish a checkpoint of this step, once; none before the first step or after a skipped
        update. Raises RunAborted instead of saving weights that are not finite."""
        run = self.run
        if run.step in (0, self.saved_step) or run.skipped_in_a_row:
            return
        bad = run.policy.first_not_finite()
        if bad is not None:
            raise RunAborted(f"step {run.step}: {bad} is not finite; this step was not saved")
        keep = run.config.save_total_limit
        path = save_checkpoint(self.folder, run.step, run.write_checkpoint, keep)
        self.saved_step = run.step
        run.watch.lap()  # not part of the next step's time
        self.screen.message(f"saved {path}")


# (config, checkpoint to resume from, stack of what is to be closed) -> (session, manifest's inputs)
Build = Callable[[Any, Path | None, ExitStack], tuple[Session, dict[str, Any]]]


def run_stage(
    config: TrainConfig,
    build: Build,
    *,
    recipe: str | None = None,
    resume: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> int:
    """Train, log, checkpoint and report one run; returns the process's exit code.

    ``build`` loads model and rows and finds everything the user can have wrong. ``resume``: a run's
    folder or one of its checkpoints. Raises ``UserError`` for bad input, before anything is
    written.
    """
    transformers_logging.disable_progress_bar()  # they would tear the live screen
    checkpoint = None
    if resume is not None:
        folder = run_folder(resume)
        config = config.model_copy(update={"output_dir": str(folder)})
        check_resumable(config, folder)
        checkpoint = find_checkpoint(Path(resume), say)
    folder = Path(config.output_dir)
    with Interrupt() as interrupt, ExitStack() as stack:
        check_output_dir(config, resuming=resume is not None, overwrite=overwrite)
        session, inputs = build(config, checkpoint, stack)
        if checkpoint is None:
            values = manifest_values(config, recipe, inputs)
        else:
            values = resumed_values(folder, checkpoint, inputs)
        if dry_run:
            print(plan_text(session))
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            clear_run(folder)
        if checkpoint is not None:
            for path in set_aside_later(folder, session.run.step):
                say(f"a later checkpoint is set aside as {path.name}")
        write_atomically(folder / "config.yaml", config_text(config))
        session.interrupt = interrupt
        session.screen = stack.enter_context(
            Progress(
                screen_summary(session, recipe),
                session.run.total_steps,
                first_step=session.run.step,
                figures=session.FIGURES,
            )
        )
        return finish(session, Manifest(folder, values), checkpoint)


def finish(session: Session, manifest: Manifest, checkpoint: Path | None) -> int:
    """Train to an end of some kind, then write how it ended and the report."""
    manifest.update(status="running", finished=None, outputs={})
    run, folder = session.run, session.folder
    code, status, line = 1, "failed", ""
    try:
        session.open_logs(None if checkpoint is None else run.step)
        session.train()
        code, status = 0, "finished"
        line = f"finished {counted(run.step, 'step')}"
        if session.saved_step == run.step:  # not after a last update that was skipped
            manifest.update(outputs={"model": saved_model(session)})
    except StopRequested:
        code, status = session.interrupt.exit_code, "stopped"
        line = f"stopped after step {run.step}"
        if session.saved_step:
            line += f"; continue with: grpo-engine {run.config.stage} --resume {folder}"
    except RunAborted as error:
        line = f"stopped: {error}"
    finally:
        versions = {**manifest.values.get("versions", {}), **session.versions()}
        manifest.update(status=status, finished=now(), steps=run.step, versions=versions)
        if session.log is not None:
            session.log.close()
    report = write_report(folder)
    session.screen.message(line)
    session.screen.message(f"report: {report}")
    return code


def saved_model(session: Session) -> dict[str, str]:
    """What the run made, as the manifest of a later stage names its model."""
    policy = session.run.policy
    merged = None if policy.adapter is None else policy.adapter.merged_state_dict()
    return {
        "path": f"checkpoint-{session.run.step}",
        "weights_sha256": weights_sha256(policy.model, merged),
    }


def manifest_values(
    config: TrainConfig, recipe: str | None, inputs: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": Path(config.output_dir).name,
        "stage": config.stage,
        "recipe": recipe,
        "started": now(),
        "finished": None,
        "code_version": code_version(),
        "seed": config.seed,
        "inputs": inputs,
        "versions": package_versions(),
        "host": machine(),
    }


def resumed_values(folder: Path, checkpoint: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the run that is continued. UserError if its inputs have changed."""
    values = check_same_inputs(folder, inputs)
    resumed = {"at": now(), "from": checkpoint.name}
    for name in ("sandbox", "generator"):  # found out anew: it may be another machine
        if name in inputs:
            resumed[name] = inputs[name]
    return values | {"resumed": [*values.get("resumed", []), resumed]}


def screen_summary(session: Session, recipe: str | None) -> dict[str, Any]:
    config = session.run.config
    return {
        "recipe": recipe or "-",
        "model": config.model,
        "device": session.run.policy.device.type,
        **session.summary(),
        "folder": config.output_dir,
    }


def plan_text(session: Session) -> str:
    """What a dry run prints: everything was loaded and checked, nothing is written."""
    policy, config = session.run.policy, session.run.config
    parameters = sum(p.numel() for _, p in base_tensors(policy.model.named_parameters()))
    trained = sum(p.numel() for p in policy.weights().values())
    lines = {
        "model": f"{config.model}, {parameters:,} weights, {policy.dtype}, {policy.device}",
        "trained": f"{trained:,} weights" + (" (LoRA)" if config.lora_r else ""),
        **session.plan(),
    }
    return "\n".join(f"{name:<10} {text}" for name, text in lines.items())


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
