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

from rich.console import Console
from rich.markdown import Markdown
from transformers.utils import logging as transformers_logging

from grpo_engine.chat.cache import ReplyCache
from grpo_engine.checkpoint import file_sha256
from grpo_engine.evaluation.folder import check_folder, check_same_inputs
from grpo_engine.evaluation.run import now, progress_bar
from grpo_engine.evaluation.samples import SAMPLES_FILE, SampleFile
from grpo_engine.interrupt import Interrupt, StopRequested
from grpo_engine.manifest import Manifest
from grpo_engine.metrics import write_atomically
from grpo_engine.progress import say
from grpo_engine.rejection.config import SampleConfig
from grpo_engine.rejection.draw import Draw
from grpo_engine.rejection.edits import check_edit_file
from grpo_engine.rejection.plan import (
    inputs_of,
    inputs_of_samples,
    manifest_values,
    plan_text,
    prepare,
)
from grpo_engine.rejection.work import DATA_FILE, REJECTED_FILE, STATISTICS_FILES, Work
from grpo_engine.rewards import RewardError
from grpo_engine.settings import config_text
from grpo_engine.types import UserError

REPLIES_FILE = "replies.jsonl"
MADE = (DATA_FILE, REJECTED_FILE, *STATISTICS_FILES)
FILES = ("config.yaml", "manifest.json", SAMPLES_FILE, REPLIES_FILE, *MADE)
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
    transformers_logging.disable_progress_bar()  # they would tear the live screen
    folder = Path(config.output_dir)
    with Interrupt() as interrupt, ExitStack() as stack:
        sources = {name: getattr(config, name) for name in SOURCES}
        check_folder(folder, overwrite, sources, verb="sample", files=FILES)
        check_sources(folder, sources)
        check_edit_file(config.edit_file)
        work = prepare(config, stack)
        if not overwrite:
            check_same_inputs(folder, inputs_of_samples(work))
        if dry_run:
            print(plan_text(work))
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        samples = stack.enter_context(
            SampleFile(folder, work.drawing.key_of, empty=overwrite, kind=Draw)
        )
        for name in MADE if not overwrite else (*MADE, REPLIES_FILE):
            (folder / name).unlink(missing_ok=True)
        for model in work.chat_models:
            model.cache = ReplyCache(folder / REPLIES_FILE)
        manifest = Manifest(folder, manifest_values(work, recipe))
        manifest.update(status="running", started=now(), finished=None)
        write_atomically(folder / "config.yaml", config_text(config))
        return finish(work, samples, interrupt, manifest)


def check_sources(folder: Path, sources: Mapping[str, str | None]) -> None:
    """UserError for an input that this run would write over."""
    own = {(folder / name).resolve() for name in FILES}
    for name, source in sources.items():
        if source and Path(source).expanduser().resolve() in own:
            raise UserError(f"--{name} {source}: is a file that this run writes")


def finish(work: Work, samples: SampleFile, interrupt: Interrupt, manifest: Manifest) -> int:
    """Sample and make the data, to an end of some kind; write them if all samples are there."""
    folder, code, status, files = Path(work.config.output_dir), 1, "failed", None
    try:
        with progress_bar() as bar:
            files = work.make(samples, interrupt, bar)
        for name, text in (files or {}).items():
            write_atomically(folder / name, text)
        if files is None:
            code, status = 0, AWAITING_EDITS
        elif work.kept:
            code, status = 0, "finished"
    except StopRequested:
        code, status = interrupt.exit_code, "stopped"
    except (RewardError, FloatingPointError) as error:
        say(f"stopped: {error}")
    finally:
        outputs = {
            name: {"sha256": file_sha256(folder / name)}
            for name in (SAMPLES_FILE, *MADE)
            if (folder / name).exists()
        }
        manifest.update(status=status, finished=now(), inputs=inputs_of(work), outputs=outputs)
    if files is not None:
        Console().print(Markdown(files["statistics.md"]))
        print(f"data: {folder / DATA_FILE}")
        if not work.kept:
            say(f"no answer was kept: see {folder / REJECTED_FILE}")
    elif code:
        total = sum(1 for _ in work.drawing.cells())
        kept = min(len(samples.samples), total)
        say(f"{kept} of {total} samples are kept in {folder}; the same command goes on from there")
    return code
