"""Sequences as callers hold them: a list of lists or tensors, one flat tensor, one padded tensor.

All forms come down to the same thing, the element at which each sequence starts, and are checked
here against the lengths; kernels/packing.py then moves bytes without looking again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

HostInts = Sequence[int] | np.ndarray | Tensor  # a CPU tensor
# S sequences: a list of lists, arrays or 1-D tensors; or one tensor, flat [T] or padded [S, L].
Ragged = Sequence[Sequence[float] | np.ndarray | Tensor] | np.ndarray | Tensor

MAX_TOKENS = 2**31 - 1  # cu_seqlens is int32, as attention kernels want it


def host_ints(name: str, values: HostInts) -> np.ndarray:
    if isinstance(values, Tensor) and values.is_cuda:
        raise ValueError(
            f"{name} is on {values.device}; it must be on the host: reading it would sync"
        )
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.int64)


@dataclass(frozen=True)
class Source:
    """Values of all S source sequences: one flat tensor, or a tensor for each sequence."""

    tensors: list[Tensor]
    starts: np.ndarray | None  # [S] element of the flat tensor at which each sequence starts

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    def addresses(self) -> np.ndarray:
        if self.starts is None:
            return np.array([tensor.data_ptr() for tensor in self.tensors], dtype=np.int64)
        return self.tensors[0].data_ptr() + self.starts * self.dtype.itemsize

    def slices(self, lengths: np.ndarray) -> list[Tensor]:
        if self.starts is None:
            return self.tensors
        bounds = zip(self.starts.tolist(), (self.starts + lengths).tolist(), strict=True)
        return [self.tensors[0][start:end] for start, end in bounds]


@dataclass(frozen=True)
class Layout:
    """Lengths of the source sequences, and which of them are packed in which order."""

    lengths: np.ndarray  # [number of source sequences] int64
    starts: np.ndarray  # of each sequence within a flat source
    num_flat: int  # elements of a flat source
    order: np.ndarray  # [S] int64
    packed_lengths: np.ndarray  # [S] int64
    device: torch.device  # of the sources

    @classmethod
    def of(
        cls,
        sequences: Ragged,
        lengths: HostInts | None,
        offsets: HostInts | None,
        order: HostInts | None,
    ) -> Layout:
        device = torch.device("cpu")
        if isinstance(sequences, (Tensor, np.ndarray)):
            counts, starts, num_flat = _tensor_layout(tuple(sequences.shape), lengths, offsets)
            if isinstance(sequences, Tensor):
                device = sequences.device
        else:
            if lengths is not None or offsets is not None:
                raise ValueError("lengths and offsets describe one tensor; a list needs neither")
            counts = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
            starts, num_flat = np.cumsum(counts) - counts, int(counts.sum())
            if len(sequences) > 0 and isinstance(sequences[0], Tensor):
                device = sequences[0].device
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"sequences are on {device}; only cpu and cuda can be packed")
        picked = np.arange(counts.size) if order is None else host_ints("order", order)
        outside = picked[(picked < 0) | (picked >= counts.size)]
        if outside.size:
            raise ValueError(f"order names sequence {outside[0]} of {counts.size}")
        packed_lengths = counts[picked]
        if packed_lengths.sum() > MAX_TOKENS:
            raise ValueError(f"{packed_lengths.sum()} tokens in one batch; cu_seqlens is int32")
        return cls(counts, starts, num_flat, picked, packed_lengths, device)

    @property
    def max_seqlen(self) -> int:
        return int(self.packed_lengths.max(initial=0))

    def target(self, device: torch.device | str | None) -> torch.device:
        """The device of the result, with its index."""
        target = self.device if device is None else torch.device(device)
        if target.type == "cuda" and target.index is None:
            target = torch.device("cuda", torch.cuda.current_device())
        if self.device.type == "cuda" and target != self.device:
            raise ValueError(f"sequences are on {self.device}; pack there, then move to {target}")
        return target

    def source(self, name: str, values: Ragged) -> Source:
        """Per-token values in any of the accepted forms, checked against the lengths."""
        if isinstance(values, (Tensor, np.ndarray)):
            return self._from_tensor(name, values)
        if len(values) != self.lengths.size:
            raise ValueError(
                f"{name} has {len(values)} entries for {self.lengths.size} sequences; values that "
                "are one per sequence go in per_sequence"
            )
        for i, (sequence, length) in enumerate(zip(values, self.lengths.tolist(), strict=True)):
            if not hasattr(sequence, "__len__"):
                raise ValueError(f"{name}[{i}] is one value, not {length}; use per_sequence")
            if len(sequence) != length:
                raise ValueError(f"{name}[{i}] has {len(sequence)} values for {length} tokens")
        if any(isinstance(sequence, (Tensor, np.ndarray)) for sequence in values):
            return self._from_pieces(name, values)
        flat = self._placed(name, list(chain.from_iterable(values)))
        return Source([flat], np.cumsum(self.lengths) - self.lengths)

    def sequence_source(self, name: str, values: Sequence[float] | np.ndarray | Tensor) -> Source:
        """One value a sequence."""
        tensor = self._placed(name, values)
        if tensor.shape != self.lengths.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} for {self.lengths.size} sequences"
            )
        return Source([tensor.contiguous()], np.arange(self.lengths.size))

    def _from_tensor(self, name: str, values: np.ndarray | Tensor) -> Source:
        tensor = self._placed(name, values)
        if tensor.ndim == 1 and len(tensor) == self.num_flat:
            return Source([tensor.contiguous()], self.starts)
        rows_fit = tensor.ndim == 2 and len(tensor) == self.lengths.size
        if rows_fit and tensor.shape[1] >= self.lengths.max(initial=0):
            starts = np.arange(self.lengths.size) * tensor.shape[1]
            return Source([tensor.contiguous().view(-1)], starts)
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; {self.lengths.size} sequences need "
            f"[{self.num_flat}] or [{self.lengths.size}, >= {self.lengths.max(initial=0)}]"
        )

    def _from_pieces(
        self, name: str, pieces: Sequence[Sequence[float] | np.ndarray | Tensor]
    ) -> Source:
        tensors = [self._placed(name, piece).contiguous() for piece in pieces]
        for i, tensor in enumerate(tensors):
            if tensor.ndim != 1 or tensor.dtype != tensors[0].dtype:
                raise ValueError(
                    f"{name}[{i}] has shape {tuple(tensor.shape)} and {tensor.dtype}; all must be "
                    f"one-dimensional and {tensors[0].dtype} as {name}[0]"
                )
        return Source(tensors, None)

    def _placed(self, name: str, values: Sequence[float] | np.ndarray | Tensor) -> Tensor:
        """On the sequences' device: Python numbers and arrays are sent, tensors must be there."""
        tensor = _as_tensor(name, values)
        check_element(name, tensor)
        if not isinstance(values, Tensor) and self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        if tensor.device != self.device:
            raise ValueError(f"{name} is on {tensor.device}, the sequences are on {self.device}")
        return tensor


def _tensor_layout(
    shape: tuple[int, ...], lengths: HostInts | None, offsets: HostInts | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Lengths, starts, flat size of one tensor: flat [T] + offsets, or padded [S, L] + lengths."""
    if len(shape) == 1 and offsets is not None and lengths is None:
        bounds = host_ints("offsets", offsets)
        counts = np.diff(bounds)
        if bounds.size == 0 or bounds[0] < 0 or (counts < 0).any() or bounds[-1] > shape[0]:
            raise ValueError(f"offsets must ascend within [0, {shape[0]}], got {bounds.tolist()}")
        return counts, bounds[:-1], shape[0]
    if len(shape) == 2 and lengths is not None and offsets is None:
        counts = host_ints("lengths", lengths)
        if counts.size != shape[0]:
            raise ValueError(f"lengths has {counts.size} entries for {shape[0]} sequences")
        wrong = np.flatnonzero((counts < 0) | (counts > shape[1]))
        if wrong.size:
            raise ValueError(f"lengths[{wrong[0]}] = {counts[wrong[0]]} outside [0, {shape[1]}]")
        return counts, np.cumsum(counts) - counts, int(counts.sum())
    raise ValueError(
        f"one tensor of sequences is flat with offsets or padded with lengths; got shape {shape}, "
        f"offsets {'given' if offsets is not None else 'missing'}, "
        f"lengths {'given' if lengths is not None else 'missing'}"
    )


def _as_tensor(name: str, values: Sequence[float] | np.ndarray | Tensor) -> Tensor:
    """Tensors and arrays as they are; Python numbers as int64, float32 or bool."""
    if isinstance(values, Tensor):
        return values
    array = np.asarray(values)
    if array.dtype.kind not in "iufb":
        raise ValueError(f"{name} must hold numbers, got {array.dtype}")
    if not isinstance(values, np.ndarray):
        kind = "i" if array.size == 0 else array.dtype.kind
        array = array.astype({"f": np.float32, "b": np.bool_}.get(kind, np.int64))
    if array.dtype.itemsize > 8:
        raise ValueError(f"{name} has elements of {array.dtype.itemsize} bytes ({array.dtype})")
    if not array.dtype.isnative:
        raise ValueError(f"{name} has dtype {array.dtype.str}, not this machine's byte order")
    if min(array.strides, default=0) < 0:
        raise ValueError(f"{name} has negative strides {array.strides}; copy it with .copy() first")
    return torch.from_numpy(array)


def check_element(name: str, tensor: Tensor) -> None:
    """What can be moved as bytes: 1, 2, 4 or 8 of them, outside autograd's sight."""
    if tensor.element_size() not in (1, 2, 4, 8):
        raise ValueError(f"{name} has elements of {tensor.element_size()} bytes ({tensor.dtype})")
    if tensor.requires_grad:
        raise ValueError(f"{name} requires grad, and packing carries none; detach() it first")
