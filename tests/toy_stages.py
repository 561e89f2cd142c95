"""Stages small enough to test the pipeline with: each trains or writes in a fraction of a second,
from its inputs alone, and can be killed between any two of its steps."""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from grpo_engine.checkpoint import find_checkpoint, list_checkpoints, save_checkpoint
from grpo_engine.interrupt import Interrupt, StopRequested
from grpo_engine.pipeline.stages import StageKind
from grpo_engine.run_folder import clear_run
from grpo_engine.settings import Settings
from grpo_engine.types import UserError


class ToyConfig(Settings):
    stage: ClassVar[str] = "toy"
    model: str = "base"
    extras: dict[str, str] = {}
    value: str = Field("", description="'refused' is what the stage itself refuses")
    chat_template: str | None = None
    max_steps: int = Field(3, ge=1)
    save_steps: int = 1
    seed: int = 0
    device: str = "cpu"
    output_dir: str
    signal_at: str = Field("", description="step:signal[:marker], once while marker is not there")
    exit_with: int = 0
    RESUMABLE_FIELDS: ClassVar[frozenset[str]] = frozenset(
        {"output_dir", "save_steps", "device", "max_steps", "signal_at", "exit_with"}
    )


def content(path: str) -> str:
    """What the toy reads of an input: the text of a file, the state of a checkpoint, the word."""
    place = Path(path)
    if (place / "state.txt").is_file():
        return (place / "state.txt").read_text()
    return place.read_text() if place.is_file() else path


def note_call(config: Settings, what: str) -> None:
    """One line a call, beside the stages' folders."""
    folder = Path(config.output_dir)
    with (folder.parent / "calls.txt").open("a") as calls:
        calls.write(f"{folder.name} {what}\n")


def calls(output_dir: Path) -> list[str]:
    path = output_dir / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def send_signal(spec: str, step: int) -> None:
    at, _, rest = spec.partition(":")
    name, _, marker = rest.partition(":")
    if not spec or int(at) != step or (marker and Path(marker).exists()):
        return
    if marker:
        Path(marker).touch()
    os.kill(os.getpid(), getattr(signal, name))
    time.sleep(0.05)


def train_toy(config, *, recipe=None, resume=None, overwrite=False, dry_run=False) -> int:
    """State = hash(state, inputs, value, seed, step), a checkpoint a step: like a real stage it
    must not depend on whether it was interrupted."""
    if config.value == "refused":
        raise UserError(f"--value {config.value}: not today")
    if dry_run:
        print("a plan")
        return 0
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        clear_run(folder)
    if list_checkpoints(folder) and resume is None:
        raise UserError(f"--output_dir {folder}: already holds a run")
    step, state = 0, ""
    if resume is not None:
        checkpoint = find_checkpoint(Path(resume), print)
        step, state = int(checkpoint.name.split("-")[1]), content(str(checkpoint))
    note_call(config, f"from {step}")
    inputs = [content(config.model), *(content(v) for v in config.extras.values())]
    with Interrupt() as interrupt, (folder / "metrics.jsonl").open("a") as metrics:
        while step < config.max_steps:
            send_signal(config.signal_at, step)
            try:
                interrupt.check()
            except StopRequested:
                return interrupt.exit_code
            step += 1
            parts = [state, *inputs, config.value, str(config.seed), str(step)]
            state = hashlib.sha256("\0".join(parts).encode()).hexdigest()

            def write(partial: Path, state: str = state) -> None:
                (partial / "state.txt").write_text(state)
                (partial / "trainer").mkdir()
                (partial / "trainer" / "when.txt").write_text(str(time.time_ns()))

            save_checkpoint(folder, step, write, keep=2)
            metrics.write(json.dumps({"step": step, "num_tokens": 10 * step}) + "\n")
        send_signal(config.signal_at, step)
    return config.exit_with


class DataConfig(Settings):
    stage: ClassVar[str] = "toydata"
    model: str = "base"
    rows: int = Field(2, ge=1)
    seed: int = 0
    device: str = "cpu"
    output_dir: str
    raises: str = ""
    reward_funcs: list[str] = []
    reward_args: dict[str, dict[str, str]] = {}
    reward_domains: dict[str, list[str]] = {}
    judge: str | None = None
    judge_options: dict[str, str] = {}
    edit_file: str | None = None


def write_data(config, *, overwrite=False, dry_run=False) -> int:
    """Rows that depend on the model and the seed; goes on where it stopped."""
    if dry_run:
        if config.raises == "UserError":
            raise UserError("no rows today")
        return 0
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "data.jsonl"
    if overwrite:
        path.unlink(missing_ok=True)
    there = path.read_text().splitlines() if path.exists() else []
    note_call(config, f"from {len(there)}")
    if config.raises:
        raise {"UserError": UserError, "KeyError": KeyError}[config.raises]("no rows today")
    edits = Path(config.edit_file) if config.edit_file else None
    if edits is not None:
        path.unlink(missing_ok=True)
        done = edits.exists()
        status = "finished" if done else "awaiting_edits"
        (folder / "manifest.json").write_text(json.dumps({"status": status}))
        if done:
            path.write_text(edits.read_text())
        else:
            edits.write_text('{"row": "to be edited"}\n')
        return 0
    with path.open("a") as file:
        for number in range(len(there), config.rows):
            drawn = hashlib.sha256(f"{content(config.model)} {config.seed} {number}".encode())
            file.write(json.dumps({"row": drawn.hexdigest()}) + "\n")
    (folder / "metrics_of_data.json").write_text(str(time.time_ns()))
    return 0


KINDS = {
    "toy": StageKind("toy_stages:ToyConfig", "toy_stages:train_toy", trains=True),
    "toydata": StageKind(
        "toy_stages:DataConfig",
        "toy_stages:write_data",
        product=("data.jsonl",),
        written=frozenset({"edit_file"}),
    ),
}


def main(arguments: list[str]) -> int:
    """``grpo-engine r1 ARGUMENTS`` with the toy stages."""
    from grpo_engine.cli import main as command
    from grpo_engine.pipeline import stages

    stages.STAGES.update(KINDS)
    return command(["r1", *arguments])


if __name__ == "__main__":
    # The classes must be those that the registry imports by name; where PYTHONSAFEPATH is set, a
    # script's folder is not on sys.path.
    sys.path.insert(0, str(Path(__file__).parent))
    import toy_stages

    sys.exit(toy_stages.main(sys.argv[1:]))
