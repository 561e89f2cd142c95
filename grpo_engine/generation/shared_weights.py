"""Weights in memory that two processes share: the trainer publishes them, an engine reads them and
writes into the same memory what it has read.

The memory is an anonymous file (memfd) of the trainer, which an engine on this host opens by the
path ``/proc/<trainer>/fd/<number>``. It has no name that could be left behind: the kernel frees it
when the trainer and the readers have closed it, however they ended. And it is not bounded by the
size of /dev/shm, 64 MB in a container unless its owner asked for more. Both processes must belong
to one user and see one /proc.

Layout: MAGIC, length of the header; the header (JSON: version, one line per tensor, where the reply
slots are); the tensors, aligned; one reply slot for each rank of the engine. Slots of ranks that
there are not cost nothing: pages that nobody touches do not exist.

The engine answers with a checksum of each tensor, computed from the bytes that it hands to its
model. It cannot echo the trainer's: those are not in the memory.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

MAGIC = b"grpo-engine-2\n\0\0"  # 16 bytes
ALIGNMENT = 64
PAGE = 4096
MAX_RANKS = 1024
CHECKSUM_WORDS = {"cpu": 1 << 18, "cuda": 1 << 24}  # at a time: fits a cache; few launches
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class TensorPlace:
    """Where one tensor lies in the memory."""

    name: str
    dtype: str  # "bfloat16"
    shape: tuple[int, ...]
    offset: int  # bytes

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def view(self, memory: mmap.mmap) -> Tensor:
        """The tensor itself, over the shared bytes."""
        dtype = getattr(torch, self.dtype)
        if not self.numel:
            return torch.empty(self.shape, dtype=dtype)
        flat = torch.frombuffer(memory, dtype=dtype, count=self.numel, offset=self.offset)
        return flat.view(self.shape)


@dataclass(frozen=True)
class Reply:
    """What one rank of an engine says that it has loaded."""

    rank: int
    ranks: int
    version: int
    checksums: dict[str, str]  # by name
    finest: str | None = None  # dtype of the parameters that it loaded them into: "bfloat16"


def checksum(tensor: Tensor) -> str:
    """Two 64-bit sums of the tensor's bytes, read as integers w_i: of w_i and of (2 i + 1) w_i,
    modulo 2^64. Exact on every device and in any order of summation. A change of one word always
    shows (in the first sum), two words that changed places do in the second; other damage goes
    unseen with a chance of about 2^-64. It is no protection against an adversary."""
    words = _words(tensor)
    size = CHECKSUM_WORDS["cuda" if words.is_cuda else "cpu"]
    odd = torch.arange(1, 2 * min(size, max(1, len(words))), 2, device=words.device)
    parts = [torch.stack([w.sum(), (w * odd[: len(w)]).sum()]) for w in words.split(size) if len(w)]
    plain = weighted = 0
    for number, (s, t) in enumerate(torch.stack(parts).tolist() if parts else []):
        plain += s
        weighted += t + 2 * number * size * s
    return f"{plain % 2**64:016x}{weighted % 2**64:016x}"


def _words(tensor: Tensor) -> Tensor:
    """The bytes as [n] int64, zeros at the end where they do not fill a word."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    rest = -flat.numel() % 8
    if rest or flat.storage_offset() % 8 or flat.data_ptr() % 8:
        flat = torch.cat([flat, flat.new_zeros(rest)])
    return flat.view(torch.int64)


def total_checksum(checksums: Mapping[str, str]) -> str:
    """One SHA-256 over names and checksums, in the order of the names."""
    lines = "".join(f"{name} {checksums[name]}\n" for name in sorted(checksums))
    return hashlib.sha256(lines.encode()).hexdigest()


class PublishedWeights:
    """The trainer's end. Copies ``tensors`` into new shared memory, one at a time, floating ones as
    ``dtype``. ``path`` is for the engine; ``checksums`` are of what was published; ``rounded``
    says whether that is in another dtype than the trainer's own.

    Args:
        adapter_config: where these are a LoRA adapter, the text of peft's adapter_config.json.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        version: int,
        *,
        dtype: torch.dtype | None = None,
        adapter_config: str | None = None,
    ) -> None:
        self.version = version
        cast = {
            name: dtype if dtype and tensor.is_floating_point() else tensor.dtype
            for name, tensor in tensors.items()
        }
        self.rounded = any(cast[name] != tensor.dtype for name, tensor in tensors.items())
        places, end = [], 0
        for name, tensor in tensors.items():
            places.append(TensorPlace(name, _dtype_name(cast[name]), tuple(tensor.shape), end))
            end += -(-tensor.numel() * cast[name].itemsize // ALIGNMENT) * ALIGNMENT
        self._slot = -(-(PAGE + 96 * len(places)) // PAGE) * PAGE
        header, places, self._replies = _header(places, end, version, self._slot, adapter_config)
        self._fd = os.memfd_create("grpo-engine-weights", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, self._replies + MAX_RANKS * self._slot)
            os.pwrite(self._fd, header, 0)
            self.checksums = self._write(tensors, places)
        except BaseException:
            self.close()
            raise
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        self.nbytes = end

    def _write(self, tensors: Mapping[str, Tensor], places: list[TensorPlace]) -> dict[str, str]:
        memory = mmap.mmap(self._fd, self._replies)
        checksums = {}
        for place in places:
            source = tensors[place.name].detach().to(getattr(torch, place.dtype))
            checksums[place.name] = checksum(source)
            place.view(memory).copy_(source)
        return checksums

    def replies(self) -> list[Reply]:
        """What the ranks of the engine have answered so far, in the order of the ranks."""
        found = []
        for rank in range(MAX_RANKS):
            start = self._replies + rank * self._slot
            (length,) = _LENGTH.unpack(os.pread(self._fd, _LENGTH.size, start))
            if length:
                text = os.pread(self._fd, length, start + _LENGTH.size)
                found.append(Reply(**json.loads(text)))
            elif rank == 0 or rank >= found[0].ranks:
                break
        return found

    def close(self) -> None:
        """Let go of the memory; an engine that is reading it still may go on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class ReceivedWeights:
    """The engine's end of the memory at ``path``. Iterating yields (name, tensor): the shared bytes
    themselves, to be copied before the next update.

    Raises RuntimeError where ``path`` is not, or no longer, the memory of ``version``.
    """

    def __init__(self, path: str, version: int) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise RuntimeError(
                f"the trainer's weights cannot be opened ({error}): the engine must run on the "
                "trainer's host, as the same user, and see the same /proc"
            ) from error
        try:
            self._memory = mmap.mmap(self._fd, 0)
            header = self._read_header(path)
        except BaseException:
            os.close(self._fd)
            raise
        self.version: int = header["version"]
        if self.version != version:
            raise RuntimeError(
                f"{path} holds the weights of version {self.version}, not of {version}"
            )
        self.adapter_config: str | None = header["adapter_config"]
        self._replies, self._slot = header["replies"], header["slot"]
        self.places = [
            TensorPlace(n, d, tuple(shape), offset) for n, d, shape, offset in header["tensors"]
        ]
        self.checksums: dict[str, str] = {}

    def _read_header(self, path: str) -> dict[str, Any]:
        start = len(MAGIC) + _LENGTH.size
        if self._memory[: len(MAGIC)] != MAGIC:
            raise RuntimeError(f"{path} does not hold weights of grpo-engine {MAGIC!r}")
        (length,) = _LENGTH.unpack(self._memory[len(MAGIC) : start])
        return json.loads(self._memory[start : start + length])

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for place in self.places:
            tensor = place.view(self._memory)
            self.checksums[place.name] = checksum(tensor)
            yield place.name, tensor

    def reply(self, rank: int = 0, ranks: int = 1, finest: torch.dtype | None = None) -> None:
        """Tell the trainer what was read. To be called once all of it has been loaded."""
        values = {"rank": rank, "ranks": ranks, "version": self.version}
        values["finest"] = None if finest is None else _dtype_name(finest)
        text = json.dumps({**values, "checksums": self.checksums}).encode()
        if rank >= MAX_RANKS or len(text) + _LENGTH.size > self._slot:
            raise RuntimeError(f"no room for the reply of rank {rank} ({len(text)} bytes)")
        start = self._replies + rank * self._slot
        os.pwrite(self._fd, text, start + _LENGTH.size)
        os.pwrite(self._fd, _LENGTH.pack(len(text)), start)

    def close(self) -> None:
        """The memory itself goes with the last tensor that was taken from it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def write_adapter(received: ReceivedWeights, folder: Path) -> None:
    """The two files of a peft adapter, as vLLM reads them, from published ones."""
    if received.adapter_config is None:
        raise ValueError("these weights are those of a whole model, not of an adapter")
    tensors = {name: tensor.clone() for name, tensor in received}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(received.adapter_config)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _header(
    places: list[TensorPlace], size: int, version: int, slot: int, adapter_config: str | None
) -> tuple[bytes, list[TensorPlace], int]:
    """The file's beginning, the places with their offsets in the file, where the replies start."""
    longest = PAGE + sum(len(p.name) + 256 + 24 * len(p.shape) for p in places)
    start = -(-(longest + len(adapter_config or "") * 6) // PAGE) * PAGE
    moved = [TensorPlace(p.name, p.dtype, p.shape, start + p.offset) for p in places]
    replies = -(-(start + size) // PAGE) * PAGE
    values = {
        "version": version,
        "replies": replies,
        "slot": slot,
        "adapter_config": adapter_config,
        "tensors": [(p.name, p.dtype, p.shape, p.offset) for p in moved],
    }
    text = json.dumps(values).encode()
    return MAGIC + _LENGTH.pack(len(text)) + text, moved, replies
