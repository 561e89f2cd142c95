"""``samples.jsonl``: every sample with its verdict, appended batch by batch, and at the same time
the cache from which a stopped run goes on.

A line carries a key: a hash of all that its tokens depend on (weights, prompt, sampling, seed). A
batch is drawn again as a whole if its lines were cut short, because the composition of a batch
moves the rounding of its matrix products: so the continued run equals the uninterrupted one to the
bit. In memory is only where each line begins: a run may draw more text than fits there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any

from grpo_engine.types import UserError

Cell = tuple[Any, ...]  # of a sample: (row number in the data, sample number)
SAMPLES_FILE = "samples.jsonl"


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

    ``key_of(cell)`` is the key a sample of this run must have, None for a row that is not part of
    it. ``kind`` is what a line holds: a dataclass with ``row``, ``sample`` and ``cell``. ``empty``
    throws away what is there. Raises UserError for a sample of another run, a damaged file, or one
    that another process is writing (``work`` says what that does).

    Attributes:
        samples: by cell, in the order of the file; each is read from the disk when it is asked for.
    """

    def __init__(
        self,
        folder: Path,
        key_of: Callable[[Cell], str | None],
        *,
        kind: type,
        empty: bool = False,
        work: str = "process",
    ) -> None:
        self.path, self.key_of, self.empty = folder / SAMPLES_FILE, key_of, empty
        self.kind, self.work = kind, work
        self._names = [one.name for one in fields(kind)]
        self._offsets: dict[Cell, int] = {}
        self.samples: Mapping[Cell, Any] = _OnDisk(self._offsets, self._sample_at)

    def __enter__(self) -> SampleFile:
        self._file = open(self.path, "a+b")
        try:
            lock(self._file, self.path.parent, self.work)
            self._file.truncate(0 if self.empty else self._read())
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
        batch: dict[Cell, int] = {}
        lines, name = 0, None
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break  # the kill came in the middle of a line
            values = self._parsed(line, number)
            if name is not None and values["batch"] != name:
                raise UserError(f"{self.path}:{number}: the batch before it is incomplete")
            name, lines = values["batch"], lines + 1
            batch[self._checked(values, number).cell] = position
            position += len(line)
            if lines == values["batch_size"]:
                self._offsets |= batch
                batch, lines, name, end = {}, 0, None, position
        return end

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            values = json.loads(line)
        except ValueError as error:
            raise UserError(f"{self.path}:{number}: not valid JSON ({error})") from None
        wanted = {"key", "batch", "batch_size", *self._names}
        if not isinstance(values, dict) or not wanted <= set(values):
            raise UserError(f"{self.path}:{number}: not a sample of this kind of run")
        return values

    def _checked(self, values: dict[str, Any], number: int) -> Any:
        sample = self._sample(values)
        cell = sample.cell
        if self.key_of(cell) != values["key"]:
            raise UserError(
                f"{self.path}:{number}: drawn from another model, prompt, seed or sampling than "
                f"--output_dir {self.path.parent} is now asked for; replace it with --overwrite"
            )
        if cell in self._offsets:
            where = f"row {sample.row} sample {sample.sample}"
            raise UserError(f"{self.path}:{number}: {where} is there twice")
        return sample

    def _sample(self, values: Mapping[str, Any]) -> Any:
        return self.kind(**{name: values[name] for name in self._names})

    def _sample_at(self, offset: int) -> Any:
        self._file.seek(offset)
        return self._sample(json.loads(self._file.readline()))

    def append(self, batch: Sequence[Any], notes: Sequence[dict[str, Any]] | None = None) -> None:
        """Add the samples of one batch and force them to the disk. ``notes`` are columns for the
        reader that the run itself does not need."""
        keys = [self.key_of(one.cell) for one in batch]
        name = {"batch": fingerprint(keys), "batch_size": len(batch)}
        rows = zip(keys, batch, notes or [{}] * len(batch), strict=True)
        lines = [_line({"key": key, **asdict(one), **note, **name}) for key, one, note in rows]
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(b"".join(lines))
        self._file.flush()
        os.fsync(self._file.fileno())
        for one, line in zip(batch, lines, strict=True):
            self._offsets[one.cell] = offset
            offset += len(line)

    def rewrite(self, size: int, change: Callable[[list[Any]], list[Any]]) -> None:
        """Put what ``change`` makes of every ``size`` samples in their place. The file is the old
        one until the new one is whole."""
        path = self.path.with_suffix(".new")
        new = open(path, "w+b")  # noqa: SIM115 (takes the place of the file)
        try:
            lock(new, self.path.parent, self.work)
            self._file.seek(0)
            while lines := list(islice(self._file, size)):
                values = [json.loads(line) for line in lines]
                changed = change([self._sample(one) for one in values])
                pairs = zip(values, changed, strict=True)
                new.writelines(_line({**one, **asdict(sample)}) for one, sample in pairs)
            new.flush()
            os.fsync(new.fileno())
            os.replace(path, self.path)
        except BaseException:
            new.close()
            path.unlink(missing_ok=True)
            raise
        self._file.close()
        self._file = new
        self._offsets.clear()
        self._read()


def _line(values: dict[str, Any]) -> bytes:
    # Lone surrogates cannot be written as UTF-8; a byte-level tokenizer never decodes to one.
    return (json.dumps(values, ensure_ascii=False) + "\n").encode("utf-8", "replace")


class _OnDisk(Mapping):
    """{cell: sample} over the places of the samples in a file."""

    def __init__(self, offsets: Mapping[Cell, int], read: Callable[[int], Any]) -> None:
        self._offsets, self._read = offsets, read

    def __getitem__(self, cell: Cell) -> Any:
        return self._read(self._offsets[cell])

    def __contains__(self, cell: object) -> bool:
        return cell in self._offsets

    def __iter__(self) -> Iterator[Cell]:
        return iter(self._offsets)

    def __len__(self) -> int:
        return len(self._offsets)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the file ``path`` in a run's folder, made where there is none. See ``lock``."""
    with open(path, "ab") as file:
        lock(file, path.parent)
        yield


def lock(file: Any, folder: Path, work: str = "process") -> None:
    """Hold ``file``, open for writing, until it is closed. UserError where another process does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--output_dir {folder}: another {work} is at it") from None
