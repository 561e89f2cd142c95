"""The run around the samples: check everything, draw, make the results, say how it ended. The same
command goes on where it was stopped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers.utils import logging as transformers_logging

from grpo_engine.checkpoint import file_sha256
from grpo_engine.generation.build import LOG_FILE, sampler_words
from grpo_engine.interrupt import Interrupt, StopRequested
from grpo_engine.manifest import Manifest, code_version, machine, package_versions
from grpo_engine.metrics import write_atomically
from grpo_engine.progress import say, wants_screen
from grpo_engine.rewards import RewardError
from grpo_engine.sampling.folder import check_folder, check_same_inputs
from grpo_engine.sampling.samples import SAMPLES_FILE
from grpo_engine.settings import SamplerConfig, config_text
from grpo_engine.types import GeneratorError

ERRORS_COUNT_FROM = 32
FAILURES = (RewardError, GeneratorError, FloatingPointError)


class SampledRun(ABC):
    """One run of a verb with everything loaded and checked.

    Attributes:
        results: the files it makes of the samples. Those of an earlier run are removed first.
        replies: files of chat models' replies, which the next run takes over.
        own: other files of its own.
    """

    verb: ClassVar[str]
    results: ClassVar[tuple[str, ...]]
    replies: ClassVar[tuple[str, ...]] = ()
    own: ClassVar[tuple[str, ...]] = ("config.yaml", "manifest.json", LOG_FILE, SAMPLES_FILE)
    config: Any

    @classmethod
    def files(cls) -> tuple[str, ...]:
        return (*cls.own, *cls.replies, *cls.results)

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @abstractmethod
    def inputs_of_samples(self) -> dict[str, dict[str, Any]]:
        """What the samples come from, by content: others make another run."""

    def inputs(self) -> dict[str, dict[str, Any]]:
        """All that the results come from."""
        return self.inputs_of_samples()

    @abstractmethod
    def plan(self) -> list[tuple[str, str]]:
        """What a dry run prints: (name, words) of each line."""

    @abstractmethod
    def open_files(self, stack: ExitStack, *, empty: bool) -> None:
        """Lock the folder and read what is there; ``empty``: throw it away. Raises UserError."""

    @abstractmethod
    def make(self, interrupt: Interrupt, bar: Bar) -> str:
        """Draw what is missing and write the results. Returns the run's status: "failed" where
        they are of no use."""

    @abstractmethod
    def show(self) -> None:
        """Print what ``make`` has come to."""

    @abstractmethod
    def kept(self) -> str:
        """What a run that did not come to its end leaves for the next."""

    def account(self) -> dict[str, Any]:
        """More for the manifest of a run that has ended."""
        return {}


def run_sampled(
    kind: type[SampledRun],
    config: SamplerConfig,
    prepare: Callable[[ExitStack], SampledRun],
    sources: Mapping[str, str | None],
    *,
    recipe: str | None,
    overwrite: bool,
    dry_run: bool,
) -> int:
    """Run a verb, and return the process's exit code. ``prepare`` loads and checks everything;
    ``sources``: the inputs that are files, by field. Raises ``UserError`` for bad input, before
    anything is written."""
    transformers_logging.disable_progress_bar()  # they would tear the live screen
    folder = Path(config.output_dir)
    with Interrupt() as interrupt, ExitStack() as stack:
        check_folder(folder, overwrite, sources, verb=kind.verb, files=kind.files())
        run = prepare(stack)
        if not overwrite:
            check_same_inputs(folder, run.inputs_of_samples())
        if dry_run:
            sampler = [] if config.generator == "hf" else [("sampler", sampler_words(config))]
            for name, words in [*run.plan(), *sampler]:
                print(f"{name:<12} {words}")
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        run.open_files(stack, empty=overwrite)  # locked before anything is removed
        for name in kind.results:  # perhaps of other settings
            (folder / name).unlink(missing_ok=True)
        manifest = Manifest(folder, manifest_values(run, recipe))
        manifest.update(status="running", started=now(), finished=None)
        write_atomically(folder / "config.yaml", config_text(config))
        return finish(run, interrupt, manifest)


def finish(run: SampledRun, interrupt: Interrupt, manifest: Manifest) -> int:
    """Draw and make to an end of some kind."""
    folder, code, status, made = run.folder, 1, "failed", False
    try:
        with progress_bar() as bar:
            status = run.make(interrupt, bar)
        code, made = int(status == "failed"), True
    except StopRequested:
        code, status = interrupt.exit_code, "stopped"
    except FAILURES as error:
        say(f"stopped: {error}")
    finally:
        outputs = {
            name: {"sha256": file_sha256(folder / name)}
            for name in (SAMPLES_FILE, *run.results)
            if (folder / name).exists()
        }
        manifest.update(
            status=status, finished=now(), inputs=run.inputs(), outputs=outputs, **run.account()
        )
    if made:
        run.show()
    else:
        say(f"{run.kept()} in {folder}; the same command goes on from there")
    return code


def manifest_values(run: SampledRun, recipe: str | None) -> dict[str, Any]:
    return {
        "verb": run.verb,
        "stage": run.verb,
        "name": run.folder.name,
        "recipe": recipe,
        "code_version": code_version(),
        "seed": run.config.seed,
        "inputs": run.inputs(),
        "versions": package_versions(),
        "host": machine(),
    }


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# -- how far, and how well -------------------------------------------------------------------------


@contextmanager
def progress_bar() -> Iterator[Bar]:
    """A bar on a terminal; elsewhere disabled, and ``Count`` prints lines."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, disable=not wants_screen(console)) as bar:
        yield bar


class Count:
    """How many of ``total`` are done: a line of ``bar``, or printed where that is disabled."""

    def __init__(self, bar: Bar, name: str, total: int) -> None:
        self.bar, self.name = bar, name
        self.task = bar.add_task(name, total=total)

    def advance(self, count: int, *, quiet: bool = False) -> None:
        self.bar.advance(self.task, count)
        if self.bar.disable and not quiet:
            task = self.bar.tasks[self.task]
            say(f"{task.completed:.0f} of {task.total:.0f} {self.name}")


@dataclass
class ErrorBudget:
    """How much of the work may fail before the run ends. The first few do not count: a batch may
    be a single answer.

    Args:
        field, allowed: the setting and its value, a share of all.
        what: what a failure is, as in "samples could not be judged".
        default: the first failure where nobody said what it was.
    """

    field: str
    allowed: float
    what: str
    default: str | None = None
    done: int = 0
    failed: int = 0
    first: str | None = None

    def add(self, done: int, failed: int, first: str | None = None) -> None:
        self.done += done
        self.failed += failed
        self.first = self.first or first

    def check(self, total: int = ERRORS_COUNT_FROM) -> None:
        """RewardError if too large a share has failed; ``total``: how much work there is in
        all."""
        enough = self.done >= min(ERRORS_COUNT_FROM, total)
        if enough and self.failed > self.allowed * self.done:
            raise RewardError(
                f"{self.failed} of {self.done} {self.what}, more than {self.field}="
                f"{self.allowed:g} allows; the first failure: {self.first or self.default}"
            )
