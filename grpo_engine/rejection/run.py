"""From configuration to ``data.jsonl``:

for each generator, for each prompt: sample answers, verify them        (kept as they come)
select the right and readable ones, without duplicates
perhaps rewrite them in the readable format, and verify them again
perhaps let a person edit them, and verify them again
mix in rows of other tasks; count everything
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress as Bar

from grpo_engine.chat.cache import ReplyCache
from grpo_engine.interrupt import Interrupt
from grpo_engine.progress import say
from grpo_engine.rejection.config import SampleConfig
from grpo_engine.rejection.draw import Draw
from grpo_engine.rejection.edits import check_edit_file
from grpo_engine.rejection.plan import inputs_of, inputs_of_samples, plan, prepare
from grpo_engine.rejection.work import DATA_FILE, REJECTED_FILE, STATISTICS_FILES, Work
from grpo_engine.sampling.run import SampledRun, run_sampled
from grpo_engine.sampling.samples import SampleFile
from grpo_engine.types import UserError

REPLIES_FILE = "replies.jsonl"
SOURCES = ("dataset", "general_dataset", "decontaminate", "edit_file")
AWAITING_EDITS = "awaiting_edits"


def run_sample(
    config: SampleConfig,
    *,
    recipe: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> int:
    """Make the data, and return the process's exit code. A folder with samples of the same run is
    continued. Raises ``UserError`` for bad input, before anything is written."""
    sources = {name: getattr(config, name) for name in SOURCES}

    def load(stack: ExitStack) -> SampleRun:
        check_sources(Path(config.output_dir), sources)
        check_edit_file(config.edit_file)
        return SampleRun(config, prepare(config, stack))

    return run_sampled(
        SampleRun, config, load, sources, recipe=recipe, overwrite=overwrite, dry_run=dry_run
    )


class SampleRun(SampledRun):
    """``Work`` in its folder."""

    verb = "sample"
    results = (DATA_FILE, REJECTED_FILE, *STATISTICS_FILES)
    replies = (REPLIES_FILE,)

    def __init__(self, config: SampleConfig, work: Work) -> None:
        self.config, self.work = config, work
        self.samples: SampleFile | None = None
        self.page: str | None = None  # the statistics

    def inputs_of_samples(self) -> dict[str, dict[str, Any]]:
        return inputs_of_samples(self.work)

    def inputs(self) -> dict[str, dict[str, Any]]:
        return inputs_of(self.work)

    def plan(self) -> list[tuple[str, str]]:
        return plan(self.work)

    def open_files(self, stack: ExitStack, *, empty: bool) -> None:
        self.samples = stack.enter_context(
            SampleFile(self.folder, self.work.drawing.key_of, kind=Draw, empty=empty)
        )
        if empty:
            (self.folder / REPLIES_FILE).unlink(missing_ok=True)
        for model in self.work.chat_models:
            model.cache = ReplyCache(self.folder / REPLIES_FILE)

    def make(self, interrupt: Interrupt, bar: Bar) -> str:
        self.page = self.work.make(self.folder, self.samples, interrupt, bar)
        if self.page is None:
            return AWAITING_EDITS
        return "finished" if self.work.kept else "failed"

    def show(self) -> None:
        if self.page is None:
            return
        Console().print(Markdown(self.page))
        print(f"data: {self.folder / DATA_FILE}")
        if not self.work.kept:
            say(f"no answer was kept: see {self.folder / REJECTED_FILE}")

    def kept(self) -> str:
        total = sum(1 for _ in self.work.drawing.cells())
        return f"{min(len(self.samples.samples), total)} of {total} samples are kept"


def check_sources(folder: Path, sources: Mapping[str, str | None]) -> None:
    """UserError for an input that this run would write over."""
    own = {(folder / name).resolve() for name in SampleRun.files()}
    for name, source in sources.items():
        if source and Path(source).expanduser().resolve() in own:
            raise UserError(f"--{name} {source}: is a file that this run writes")
