"""The pipeline itself: decide what has to be made, make it stage by stage, remember what made what.

    for stage in stages:                         # in the order of the YAML
        if settings, inputs and results are as they were: keep it
        else: set what lies there aside and run the stage, or go on where it stopped
        record inputs, outputs, tokens and time by hash in manifest.json

A stage runs in this process, as its verb does, and leaves nothing on the device when it returns.
Results are set aside only after the stage that is to replace them has checked its settings against
its inputs, and a command that fails before any stage has made anything leaves the folder as it was.
"""

from __future__ import annotations

import fcntl
import gc
import importlib.util
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib import import_module
from pathlib import Path

import torch

from grpo_engine.checkpoint import DamagedCheckpoint, list_checkpoints, quarantine
from grpo_engine.interrupt import Interrupt, StopRequested
from grpo_engine.lineage import (
    HASHES_FILE,
    MANIFEST_FILE,
    RUNNING,
    WAITING,
    Lineage,
    Output,
    Session,
    StageRecord,
    size_of,
)
from grpo_engine.manifest import code_version, machine, package_versions
from grpo_engine.metrics import strict_json, write_atomically
from grpo_engine.pipeline.checks import check_chat_templates, check_settings
from grpo_engine.pipeline.config import PipelineConfig, place_of
from grpo_engine.pipeline.freshness import (
    Freshness,
    Verdict,
    check_results_are_there,
    missing_files,
    outside_files,
)
from grpo_engine.pipeline.outcome import (
    figures_of,
    headline,
    measured_tokens,
    show_evaluations,
    steps_done,
    waits_for_a_person,
)
from grpo_engine.pipeline.stages import (
    Stage,
    StageKind,
    build,
    check_models,
    resolved_config,
    run_stage,
    validate_stage,
)
from grpo_engine.progress import clock, counted, say
from grpo_engine.session import now
from grpo_engine.settings import Settings
from grpo_engine.types import UserError

# Of a stage's folder: what is not a result of its own.
NOT_RESULTS = {"config.yaml", "manifest.json", "metrics.jsonl", "report.html"}
LOCK_FILE = ".lock"
OWN_FILES = ("config.yaml", MANIFEST_FILE, HASHES_FILE)  # the pipeline's own


def run_pipeline(
    config: PipelineConfig,
    kinds: dict[str, StageKind],
    *,
    recipe: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    only: Sequence[str] = (),
    from_stage: str | None = None,
    to_stage: str | None = None,
) -> int:
    """Run what has to run and return the exit code: 0, that of the stage that failed, or 130 / 143
    after a signal. The same call goes on where an earlier one stopped.

    ``only``, ``from_stage``, ``to_stage``: the other stages stay as they are. ``overwrite``: what
    is made again replaces what lies there, which otherwise is set aside, and an unfinished stage
    begins anew. Raises ``UserError`` for bad input, before anything is written.
    """
    stages = build(config, kinds)
    chosen = choose(stages, only, from_stage, to_stage)
    check_models(chosen)
    check_settings(chosen)
    check_chat_templates(stages, chosen, offline=dry_run)
    lineage = Lineage(config.output_dir)
    freshness = Freshness(stages, lineage)
    if dry_run:
        from grpo_engine.pipeline.plan import print_plan

        print_plan(config, stages, chosen, freshness)
        return 0
    check(config, stages, chosen, freshness)
    run = PipelineRun(config, stages, chosen, lineage, freshness, recipe, overwrite)
    with only_one(config.output_dir), Interrupt() as interrupt:
        return run.to_an_end(interrupt)


def choose(
    stages: list[Stage], only: Sequence[str], from_stage: str | None, to_stage: str | None
) -> list[Stage]:
    """The stages that may run."""
    names = [stage.name for stage in stages]
    for flag, wanted in (("only", only), ("from-stage", [from_stage]), ("to-stage", [to_stage])):
        for name in wanted:
            if name is not None and name not in names:
                raise UserError(f"--{flag} {name}: no such stage; there are {', '.join(names)}")
    if only and (from_stage or to_stage):
        raise UserError(f"--only {','.join(only)}: not together with --from-stage or --to-stage")
    if only:
        return [stage for stage in stages if stage.name in only]
    first = 0 if from_stage is None else names.index(from_stage)
    last = len(names) - 1 if to_stage is None else names.index(to_stage)
    if last < first:
        raise UserError(f"--to-stage {to_stage}: comes before --from-stage {from_stage}")
    return stages[first : last + 1]


def check(
    config: PipelineConfig, stages: list[Stage], chosen: list[Stage], freshness: Freshness
) -> None:
    """What can be known before the first stage runs: files from outside, and results of stages
    that this command leaves as they are, must be there."""
    folder = config.output_dir
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: exists and is not a folder")
    for stage in chosen:
        if stage.folder.exists() and not stage.folder.is_dir():
            raise UserError(f"stage {stage.name}: {stage.folder} exists and is not a folder")
        for name, text, path in outside_files(stage):
            inside = [s.name for s in stages if path.resolve().is_relative_to(s.folder.resolve())]
            if inside:
                raise UserError(
                    f"stage {stage.name}: --{name} {text}: lies in the folder of the stage "
                    f"{inside[0]}; refer to it as {{{inside[0]}}}/..."
                )
    for stage_name, files in missing_files(chosen).items():
        name, text = files[0]
        what = "folder" if place_of(name) in ("model", "reward model") else "file"
        raise UserError(f"stage {stage_name}: --{name} {text}: no such {what}")
    will_run = {stage.name for stage in chosen}
    for stage in chosen:
        for name, reference in stage.references.items():
            record = freshness.lineage.records.get(reference.stage)
            if reference.stage in will_run or (record and record.status == "finished"):
                continue
            raise UserError(
                f"stage {stage.name}: --{name} {reference}: the stage {reference.stage} has not "
                "finished, and this command leaves it as it is"
            )


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """One pipeline at a time in a folder. The lock goes with the process, however it ends."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("w")
    except OSError as error:
        for path in made:
            if path.is_dir():
                path.rmdir()
        raise UserError(f"--output_dir {folder}: not writable ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"--output_dir {folder}: another grpo-engine r1 is running there"
            ) from None
        try:
            yield
        finally:
            if made and [path.name for path in folder.iterdir()] == [LOCK_FILE]:
                (folder / LOCK_FILE).unlink()  # nothing has come of it
                for path in made:
                    path.rmdir()


class PipelineRun:
    """A pipeline on its way."""

    def __init__(
        self,
        config: PipelineConfig,
        stages: list[Stage],
        chosen: list[Stage],
        lineage: Lineage,
        freshness: Freshness,
        recipe: str | None,
        overwrite: bool,
    ) -> None:
        self.config, self.stages, self.chosen = config, stages, chosen
        self.lineage, self.freshness = lineage, freshness
        self.recipe, self.overwrite = recipe, overwrite
        self.listed = {stage.name: stage.kind_name for stage in stages}
        self.begun = time.monotonic()
        self.code_version = code_version()
        self.before = {name: _bytes_of(config.output_dir / name) for name in OWN_FILES}
        self.has_head = False  # see _write_head
        self.has_made = False  # a stage has written something

    def to_an_end(self, interrupt: Interrupt) -> int:
        """Run the stages, then write how it ended."""
        self._announce()
        code, status = 1, "failed"
        try:
            code = self._stages(interrupt)
            self._write_head()
            status = "finished" if code == 0 else "stopped" if code in (130, 143) else "failed"
            others = self._other_statuses()
            if status == "finished" and others:
                status = WAITING if WAITING in others else "partly finished"
        except StopRequested:
            code, status = interrupt.exit_code, "stopped"
            say(f"stopped; the same command goes on from there, in {self.config.output_dir}")
        except UserError:
            if not self.has_made:
                self._put_back()
            raise
        finally:
            if self.has_head:
                self.lineage.write(self.listed, status=status, finished=now())
                self._report()
        return code

    def _write_head(self) -> None:
        """config.yaml, and what the manifest says of the pipeline as a whole: once, before the
        first stage that begins."""
        if self.has_head:
            return
        self.has_head = True
        write_atomically(self.config.output_dir / "config.yaml", self.config.text())
        self.lineage.write(
            self.listed,
            name=self.config.output_dir.name,
            recipe=self.recipe,
            status=RUNNING,
            started=self.lineage.values.get("started") or now(),
            finished=None,
            seed=self.config.shared.get("seed", 0),
            code_version=self.code_version,
            versions=package_versions(),
            host=machine(),
        )

    def _put_back(self) -> None:
        """As if the command had not been given: the mistake is not what the folder goes on with."""
        self.has_head = False
        for name, content in self.before.items():
            path = self.config.output_dir / name
            if content is None:
                path.unlink(missing_ok=True)
            elif path.read_bytes() != content:
                path.write_bytes(content)

    def _announce(self) -> None:
        """What will run and why, one line each, before anything does."""
        chosen = {stage.name for stage in self.chosen}
        verdicts = self.freshness.verdicts(chosen)
        for name, verdict in verdicts.items():
            if name not in chosen:
                if verdict.action != "keep" and name in self.lineage.records:
                    say(f"{name}: stays as it is, though {verdict.reason}")
            elif verdict.action == "run" and name in self.lineage.records:
                say(f"{name}: runs again: {verdict.reason}")
            elif verdict.action == "resume":
                say(f"{name}: goes on: {verdict.reason}")
            elif verdict.action == "wait":
                say(f"{name}: runs again {verdict.reason}")
            elif verdict.note:
                say(f"{name}: kept, with {verdict.note}")

    def _stages(self, interrupt: Interrupt) -> int:
        places = {stage.name: number for number, stage in enumerate(self.stages, start=1)}
        for stage in self.chosen:
            interrupt.check()
            label = f"[{places[stage.name]}/{len(self.stages)}] {stage.name}"
            verdict = self.freshness.verdict(stage, set())
            if verdict.action == "keep":
                print(f"{label}: unchanged, {self._made(stage)}", flush=True)
                continue
            code = self._one(stage, verdict, label, interrupt)
            if code or self.lineage.records[stage.name].status == WAITING:
                return code
        show_evaluations(self.lineage.records, list(self.listed), self.config.output_dir)
        took = clock(time.monotonic() - self.begun)
        stages = counted(len(self.chosen), "stage")
        print(f"finished: {stages} in {took}, {self.config.output_dir}")
        return 0

    def _one(self, stage: Stage, verdict: Verdict, label: str, interrupt: Interrupt) -> int:
        """One stage, from its inputs to its record; returns its exit code."""
        check_results_are_there(stage, self.freshness.of_name)
        anew = verdict.action == "run" or self.overwrite
        config = resolved_config(stage, self.freshness.of_name)
        if anew and files_in(stage.folder):
            self._validate(stage, config, interrupt)
        self._write_head()
        record = self._begin(stage, anew)
        session, there = record.sessions[-1], files_in(stage.folder)
        elapsed = clock(time.monotonic() - self.begun)
        how = "" if anew else ", goes on where it stopped"
        print(f"{label}: {stage.kind_name}{how}, after {elapsed}", flush=True)
        started, code, status = time.monotonic(), 1, "failed"
        try:
            with interrupt.abortable():  # for the moments before and after the stage's own handlers
                name = f"{self.recipe or self.config.output_dir.name}/{stage.name}"
                code = run_stage(stage, config, overwrite=anew, label=name)
                _leave_the_device()
            status = {0: "finished", 130: "stopped", 143: "stopped"}.get(code, "failed")
            if code == 0 and waits_for_a_person(stage.folder):
                status = WAITING
            elif code == 0:
                self._record_results(stage, record)
        except UserError as error:
            code, status, record.error = 2, "failed", str(error)
            raise UserError(f"stage {stage.name}: {error}") from error
        except StopRequested:
            code, status = interrupt.exit_code, "stopped"
            raise
        except BaseException as error:
            record.error = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.has_made |= code != 2 or files_in(stage.folder) != there
            session.finished, session.exit_code = now(), code
            session.seconds = round(time.monotonic() - started, 3)
            record.status = status
            record.steps = steps_done(stage.folder)
            record.tokens = measured_tokens(stage.folder)
            self.lineage.write(self.listed)
        took = clock(record.seconds)
        if status == WAITING:
            print(f"{label}: waits for a person; the same command goes on", flush=True)
        elif code == 0:
            print(f"{label}: finished in {took}, {self._made(stage)}", flush=True)
        else:
            say(f"stage {stage.name} {status} with exit code {code} after {took}")
            say(f"the same command goes on from there, in {self.config.output_dir}")
        return code

    def _validate(self, stage: Stage, config: Settings, interrupt: Interrupt) -> None:
        """What the stage refuses is said while the results that it would displace are in their
        place. The model is loaded once more for it."""
        try:
            with interrupt.abortable():
                validate_stage(stage, config)
                _leave_the_device()
        except UserError as error:
            raise UserError(f"stage {stage.name}: {error}") from error
        interrupt.check()

    def _begin(self, stage: Stage, anew: bool) -> StageRecord:
        """The stage's record with a session more; what lies in the folder is set aside first where
        the stage begins anew."""
        records = self.lineage.records
        try:
            inputs = self.freshness.inputs(stage)
        except DamagedCheckpoint as damage:
            raise UserError(f"stage {stage.name}: an input is damaged: {damage}") from damage
        if anew:
            self._clear(stage)
            records[stage.name] = StageRecord(
                stage.name, stage.kind_name, seed=getattr(stage.config, "seed", None)
            )
        record = records[stage.name]
        record.settings = stage.content()
        text = strict_json(record.settings)
        record.settings_sha256 = sha256(text.encode()).hexdigest()
        record.inputs = inputs
        record.status, record.error = RUNNING, None
        record.sessions.append(Session(started=now(), code_version=self.code_version))
        self.lineage.write(self.listed)
        return record

    def _clear(self, stage: Stage) -> None:
        if not stage.folder.is_dir() or not any(stage.folder.iterdir()):
            return
        if self.overwrite:
            shutil.rmtree(stage.folder)
        else:
            say(f"{stage.name}: what was there is now {quarantine(stage.folder, 'superseded')}")

    def _record_results(self, stage: Stage, record: StageRecord) -> None:
        """Hash what the stage made; its product must be there."""
        product = stage.kind.result(stage.folder)
        if product is None:
            wanted = " or ".join(stage.kind.product) or "a checkpoint"
            raise UserError(f"has finished without {wanted} in {stage.folder}")
        record.product = product.name
        files = [p for p in stage.folder.iterdir() if p.is_file() and p.name not in NOT_RESULTS]
        made = [
            *list_checkpoints(stage.folder),
            *(p for p in sorted(files) if not p.name.startswith(".")),
        ]
        hashes = self.lineage.hashes
        record.outputs = {p.name: Output(hashes.content(p), size_of(p)) for p in made}

    def _made(self, stage: Stage) -> str:
        record = self.lineage.records[stage.name]
        words = headline(figures_of(stage.folder, record.product))
        return f"{record.product}" + (f" ({words})" if words else "")

    def _other_statuses(self) -> set[str | None]:
        """Those of the stages that are not finished; None for one that has never begun."""
        records = {name: self.lineage.records.get(name) for name in self.listed}
        return {r and r.status for r in records.values() if r is None or r.status != "finished"}

    def _report(self) -> None:
        """Also of a pipeline that failed; a report that cannot be written hides no error."""
        if importlib.util.find_spec("grpo_engine.report.pipeline") is None:
            return
        write = import_module("grpo_engine.report.pipeline").write_pipeline_report
        try:
            print(f"report: {write(self.config.output_dir)}", flush=True)
        except UserError as error:
            say(f"no report: {error}")


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of last change of every file."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = {str(path): path.stat() for path in found}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def _bytes_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _leave_the_device() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
