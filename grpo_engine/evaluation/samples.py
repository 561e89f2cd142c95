"""``samples.jsonl``: every sample with its verdict, appended batch by batch, and at the same time
the cache from which a stopped evaluation goes on.

A line carries a key: a hash of all that its tokens depend on (weights, prompt, sampling, seed). A
batch is drawn again as a whole if its lines were cut short, because the composition of a batch
moves the rounding of its matrix products: so the continued evaluation equals the uninterrupted one
to the bit.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from grpo_engine.types import UserError

Cell = tuple[Any, ...]  # of a sample: (row number in the data, sample number)
SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True)
class Sample:
    """One answer of the model, judged."""

    row: int
    sample: int
    seed: int
    completion: str
    length: int  # tokens, the end-of-sequence one included
    finish_reason: str
    answers: list[str] | None  # as marked in the completion; None where it marks none
    score: float | None  # None: could not be judged
    outcome: str  # of the reward: ok, no_answer, timeout, error ...

    @property
    def cell(self) -> Cell:
        return self.row, self.sample

    @property
    def right(self) -> bool:
        return self.score == 1.0

    @property
    def unjudged(self) -> bool:
        return self.score is None


def fingerprint(*parts: Any) -> str:
    """128 bits that depend on every part (plain data) and on nothing else."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def plan_batches(
    lengths: Sequence[int], num_samples: int, max_new: int, *, max_rows: int, max_tokens: int
) -> Iterator[list[tuple[int, int]]]:
    """Batches of (problem, sample) indices, the same for every ``num_samples`` as far as they go.

    ``lengths``: of the prompts, in tokens. Sample numbers come in blocks 0, 1, 2-3, 4-7, 8-15 ...,
    so that 64 samples begin with the very batches of 16 (after a number that is no power of two
    the rest of its last block is drawn apart, and equals one draw up to rounding). Within a block,
    prompts of like length together and the samples of one prompt side by side (they share its
    prefix).
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start, stop = 0, 1
    while start < num_samples:
        batch: list[tuple[int, int]] = []
        for problem in order:
            for sample in range(start, min(stop, num_samples)):
                width = lengths[batch[0][0] if batch else problem] + max_new
                if batch and (len(batch) == max_rows or (len(batch) + 1) * width > max_tokens):
                    yield batch
                    batch = []
                batch.append((problem, sample))
        yield batch
        start, stop = stop, 2 * stop


class SampleFile(AbstractContextManager):
    """The samples in ``folder``. Entering reads and locks the file; what a kill has cut off at its
    end is dropped.

    ``key_of(cell)`` is the key a sample of this evaluation must have, None for a row that is not
    part of it. ``empty`` throws away what is there. ``kind`` is what a line holds: a dataclass
    with ``row``, ``sample`` and ``cell``. Raises UserError for a sample of another evaluation, a
    damaged file, or one that another process is writing.
    """

    def __init__(
        self,
        folder: Path,
        key_of: Callable[[Cell], str | None],
        *,
        empty: bool = False,
        kind: type = Sample,
    ) -> None:
        self.path, self.key_of, self.empty = folder / SAMPLES_FILE, key_of, empty
        self.kind = kind
        self.samples: dict[Cell, Any] = {}

    def __enter__(self) -> SampleFile:
        self._file = open(self.path, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(0 if self.empty else self._read())
        except BlockingIOError:
            self._file.close()
            work = "evaluation" if self.kind is Sample else "process"
            raise UserError(f"--output_dir {self.path.parent}: another {work} is at it") from None
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read(self) -> int:
        """Take in the samples; where the last whole batch ends, in bytes."""
        self._file.seek(0)
        end = position = 0
        batch: list[Any] = []
        name = None
        for number, line in enumerate(self._file, start=1):
            position += len(line)
            if not line.endswith(b"\n"):
                break  # the kill came in the middle of a line
            values = self._parsed(line, number)
            if name is not None and values["batch"] != name:
                raise UserError(f"{self.path}:{number}: the batch before it is incomplete")
            name = values["batch"]
            batch.append(self._checked(values, number))
            if len(batch) == values["batch_size"]:
                self.samples |= {one.cell: one for one in batch}
                batch, name, end = [], None, position
        return end

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            values = json.loads(line)
        except ValueError as error:
            raise UserError(f"{self.path}:{number}: not valid JSON ({error})") from None
        wanted = {"key", "batch", "batch_size", *(one.name for one in fields(self.kind))}
        if not isinstance(values, dict) or not wanted <= set(values):
            raise UserError(f"{self.path}:{number}: not a sample of this kind of run")
        return values

    def _checked(self, values: dict[str, Any], number: int) -> Any:
        sample = self.kind(**{one.name: values[one.name] for one in fields(self.kind)})
        cell = sample.cell
        if self.key_of(cell) != values["key"]:
            raise UserError(
                f"{self.path}:{number}: drawn from another model, prompt, seed or sampling than "
                f"--output_dir {self.path.parent} is now asked for; replace it with --overwrite"
            )
        if cell in self.samples:
            where = f"row {sample.row} sample {sample.sample}"
            raise UserError(f"{self.path}:{number}: {where} is there twice")
        return sample

    def append(self, batch: Sequence[Any], notes: Sequence[dict[str, Any]] | None = None) -> None:
        """Add the samples of one batch and force them to the disk. ``notes`` are columns for the
        reader that the evaluation itself does not need."""
        keys = [self.key_of(one.cell) for one in batch]
        name = {"batch": fingerprint(keys), "batch_size": len(batch)}
        rows = zip(keys, batch, notes or [{}] * len(batch), strict=True)
        lines = [
            json.dumps({"key": key, **asdict(one), **note, **name}, ensure_ascii=False) + "\n"
            for key, one, note in rows
        ]
        self._file.seek(0, os.SEEK_END)
        # Lone surrogates cannot be written as UTF-8; a byte-level tokenizer never decodes to one.
        self._file.write("".join(lines).encode("utf-8", "replace"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.samples |= {one.cell: one for one in batch}
