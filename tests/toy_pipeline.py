"""A pipeline of toy stages (toy_stages.py) and what its tests ask of it."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from toy_stages import KINDS, calls

from grpo_engine import lineage
from grpo_engine.pipeline.config import read_pipeline
from grpo_engine.pipeline.run import run_pipeline

# The paper's shape: two roads from the base, one of them through data of the other.
LISTED = [
    {"name": "zero", "stage": "toy"},
    {"name": "cold-data", "stage": "toydata", "model": "{zero}"},
    {"name": "cold-sft", "stage": "toy", "extras": {"dataset": "{cold-data}/data.jsonl"}},
    {"name": "rl", "stage": "toy", "model": "{cold-sft}"},
    {"name": "reject", "stage": "toydata", "model": "{rl}", "rows": 4},
    {"name": "final", "stage": "toy", "extras": {"dataset": "{reject}"}, "max_steps": 2},
    {"name": "student", "stage": "toy", "model": "small", "extras": {"dataset": "{reject}"}},
    {"name": "alone", "stage": "toy", "model": "small"},
]
NAMES = [stage["name"] for stage in LISTED]


def run(folder, *flags, listed=LISTED, kinds=KINDS, **options):
    """The exit code. ``flags``: ``stage.field=value``."""
    pairs = [tuple(flag.split("=", 1)) for flag in flags]
    values = {"output_dir": str(folder), "stages": listed}
    return run_pipeline(read_pipeline(values, pairs, kinds), kinds, **options)


def called(folder):
    """Stages that were called since the last look."""
    found = [line.split()[0] for line in calls(folder)]
    (folder / "calls.txt").unlink(missing_ok=True)
    return found


def results(folder):
    """Hash of every stage's result."""
    record = lineage.read(folder)
    return {r.name: r.outputs[r.product].sha256 for r in record.ran() if r.product}


@contextmanager
def no_collecting() -> Iterator[None]:
    """Toys leave nothing on a device, and walking torch's objects takes longer than all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda: 0)
        yield


def finish(folder: Path) -> Path:
    """A finished pipeline, to be copied."""
    assert run(folder) == 0
    assert called(folder) == NAMES
    return folder
