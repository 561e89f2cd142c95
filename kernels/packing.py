"""Packed rows: which sequences share a micro-batch, and laying them one after another.

A micro-batch of S sequences is a row of N = sum(lengths) tokens without padding; ``cu_seqlens[s]``
is the row of sequence s's first token. A padded batch would compute S * max(lengths) tokens.

:func:`plan_batches` runs on the host (csrc/planner.cpp). :func:`pack_rollouts` makes, in one pass
over all fields, what a training step needs: token ids, positions, segment ids and any per-token or
per-sequence field. Sources may be ragged, padded, reordered or scattered; all are described by one
address per (field, sequence), 8 bytes, so there is no index tensor over tokens and nothing is read
back from the device: lengths are known on the host, because the sampler returned them.

Bytes moved: each field once in and once out, the floor. On CUDA one launch writes all fields
(csrc/packing.cu); host sequences going to a CUDA device are packed in pinned memory and cross the
bus in one copy. Packing carries no gradient.
"""

from __future__ import annotations

import cmath
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from grpo_engine import _C
from grpo_engine.kernels.ragged import (
    MAX_TOKENS,
    HostInts,
    Layout,
    Ragged,
    Source,
    check_element,
    host_ints,
)

_ALIGNMENT = 128  # of each output, in bytes: a cache line, and what 16-byte stores need


@dataclass(frozen=True)
class PackedBatch:
    """S sequences, N tokens. The tensors are on one device, ``lengths`` on the host."""

    token_ids: Tensor  # [N], dtype of the source (int64 from lists)
    position_ids: Tensor  # [N] int64, 0 .. length-1 within each sequence
    segment_ids: Tensor  # [N] int32, index of the sequence in this batch
    cu_seqlens: Tensor  # [S+1] int32
    max_seqlen: int
    lengths: tuple[int, ...]  # [S]
    fields: dict[str, Tensor] = field(default_factory=dict)  # name -> [N]

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]


# --- planning -------------------------------------------------------------------------------------


def plan_batches(
    lengths: HostInts,
    max_tokens: int,
    *,
    num_ranks: int = 1,
    method: Literal["best_fit", "lpt", "kk"] = "best_fit",
    equal_counts: bool = True,
) -> list[list[list[int]]]:
    """Spread sequences over ranks and, on each rank, over chunks of at most ``max_tokens`` tokens.

    Returns ``plan[rank][chunk] -> indices into lengths``: every index once; within a rank the
    heaviest chunk first, within a chunk the longest sequence first. The same arguments give the
    same plan.

    ``best_fit`` is DeepSeek-R1's scheme (arXiv 2501.12948v2, B.1): the global batch sorted by
    length, dealt to the ranks, Best-Fit into chunks; it makes the fewest chunks. ``lpt`` (longest
    processing time first) and ``kk`` (Karmarkar-Karp) even out the tokens of ranks and chunks
    instead, over about 2 % more chunks.

    With ``equal_counts`` all ranks get the same number of chunks, as collective calls require: a
    rank short of chunks halves its heaviest ones, and when no chunk with two sequences is left it
    gets empty chunks (``[]``), for which it must still join the collectives.

    Raises ValueError naming the value: a sequence longer than ``max_tokens`` or of negative length,
    ``max_tokens`` below 1, ``num_ranks`` outside 1 .. 2^20, an unknown method.
    """
    for name, value in (("max_tokens", max_tokens), ("num_ranks", num_ranks)):
        if abs(value) >= 2**63:  # pybind11 would answer with the types of all arguments
            raise ValueError(f"{name} must be an int64, got {value}")
    # The plan of 100,000 sequences is some 10,000 lists, and so many new containers would have the
    # garbage collector walk every object of the process: 80 ms of a 40 ms call.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _C.plan_batches(
            host_ints("lengths", lengths), max_tokens, num_ranks, method, equal_counts
        )
    finally:
        if collecting:
            gc.enable()


def completion_rows(prompt_lengths: HostInts, completion_lengths: HostInts) -> Tensor:
    """Packed rows whose hidden state predicts a completion token: [M] int64 on the CPU, ascending.

    Sequence s is its prompt followed by its completion; row t predicts the token of row t + 1, so
    the rows run from the prompt's last token to the completion's last but one. M =
    sum(completion_lengths).

    Raises ValueError for differing numbers of sequences, negative lengths, or a completion after an
    empty prompt (nothing predicts its first token).
    """
    prompts = host_ints("prompt_lengths", prompt_lengths)
    completions = host_ints("completion_lengths", completion_lengths)
    if prompts.size != completions.size:
        raise ValueError(
            f"prompt_lengths has {prompts.size} sequences, completion_lengths {completions.size}"
        )
    for name, lengths in (("prompt_lengths", prompts), ("completion_lengths", completions)):
        if lengths.size and lengths.min() < 0:
            raise ValueError(f"{name}[{lengths.argmin()}] = {lengths.min()} is negative")
    orphans = np.flatnonzero((prompts == 0) & (completions > 0))
    if orphans.size:
        raise ValueError(f"prompt_lengths[{orphans[0]}] = 0: nothing predicts its first token")
    ends = np.cumsum(prompts + completions)
    first_rows = ends - completions - 1
    completion_starts = np.cumsum(completions) - completions
    offsets = np.arange(completions.sum()) - np.repeat(completion_starts, completions)
    return torch.from_numpy(np.repeat(first_rows, completions) + offsets)


# --- packing --------------------------------------------------------------------------------------


def pack_rollouts_ref(
    sequences: Ragged,
    fields: Mapping[str, Ragged] | None = None,
    *,
    per_sequence: Mapping[str, Sequence[float] | Tensor] | None = None,
    lengths: HostInts | None = None,
    offsets: HostInts | None = None,
    order: HostInts | None = None,
    device: torch.device | str | None = None,
) -> PackedBatch:
    """:func:`pack_rollouts` as a chain of torch operations, field by field."""
    layout = Layout.of(sequences, lengths, offsets, order)
    device = layout.target(device)
    counts = torch.from_numpy(layout.packed_lengths)
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    segments = torch.repeat_interleave(counts)

    def gather(name: str, values: Ragged) -> Tensor:
        source = layout.source(name, values)
        slices = source.slices(layout.lengths)
        return torch.cat([source.tensors[0][:0], *(slices[i] for i in layout.order)])

    def broadcast(name: str, values: Sequence[float] | Tensor) -> Tensor:
        one_each = layout.sequence_source(name, values).tensors[0]
        return one_each[torch.from_numpy(layout.order)[segments].to(one_each.device)]

    out = {name: gather(name, values) for name, values in (fields or {}).items()}
    out |= {name: broadcast(name, values) for name, values in (per_sequence or {}).items()}
    return PackedBatch(
        token_ids=gather("sequences", sequences).to(device),
        position_ids=(torch.arange(len(segments)) - cu_seqlens[segments]).to(device),
        segment_ids=segments.to(device, torch.int32),
        cu_seqlens=cu_seqlens.to(device, torch.int32),
        max_seqlen=layout.max_seqlen,
        lengths=tuple(counts.tolist()),
        fields={name: values.to(device) for name, values in out.items()},
    )


def pack_rollouts(
    sequences: Ragged,
    fields: Mapping[str, Ragged] | None = None,
    *,
    per_sequence: Mapping[str, Sequence[float] | Tensor] | None = None,
    lengths: HostInts | None = None,
    offsets: HostInts | None = None,
    order: HostInts | None = None,
    device: torch.device | str | None = None,
) -> PackedBatch:
    """Lay sequences and their fields one after another, without padding, in one pass.

    ``sequences`` holds token ids: a list of S sequences; a flat tensor [T] with ``offsets`` [S+1];
    or a right-padded tensor [S, L] with ``lengths`` [S]. ``fields`` maps names to per-token values
    of the same lengths in any of these forms (flat: all tokens in the order of ``sequences``);
    ``per_sequence`` maps names to S values, each repeated for its sequence's tokens. Elements of 1,
    2, 4 or 8 bytes; Python numbers become int64, float32 or bool. Tensors must be where the
    sequences are; Python numbers and arrays are sent there.

    ``order`` picks the sequences to pack and their order, for instance one chunk of
    :func:`plan_batches`; default all. ``device`` is where the batch is wanted; default where the
    sequences are. CUDA tensors are packed by one launch on the current stream, host values in host
    memory and, for a CUDA ``device``, sent in one copy. No host sync either way: ``lengths``,
    ``offsets`` and ``order`` must be on the host.

    Raises ValueError naming the field and value for lengths that disagree, a field on another
    device or with gradients, an element size or type that cannot be packed, an ``order`` that names
    no sequence, or a batch of 2^31 tokens; RuntimeError if CUDA tensors meet an extension that was
    built without CUDA.
    """
    layout = Layout.of(sequences, lengths, offsets, order)
    target = layout.target(device)
    named = {**(fields or {}), **(per_sequence or {})}
    if len(named) != len(fields or {}) + len(per_sequence or {}):
        raise ValueError(f"{sorted({*fields} & {*per_sequence})} in both fields and per_sequence")

    tokens = layout.source("sequences", sequences)
    if tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
        raise ValueError(f"sequences must hold token ids, got {tokens.dtype}")
    columns = [
        _Column(tokens.dtype, _C.PER_TOKEN, tokens),
        _Column(torch.int64, _C.POSITION, None),
        _Column(torch.int32, _C.SEGMENT, None),
    ]
    for name, values in (fields or {}).items():
        source = layout.source(name, values)
        columns.append(_Column(source.dtype, _C.PER_TOKEN, source))
    for name, values in (per_sequence or {}).items():
        source = layout.sequence_source(name, values)
        columns.append(_Column(source.dtype, _C.PER_SEQUENCE, source))

    token_ids, position_ids, segment_ids, *packed, cu_seqlens = _pack(columns, layout, target)
    return PackedBatch(
        token_ids=token_ids,
        position_ids=position_ids,
        segment_ids=segment_ids,
        cu_seqlens=cu_seqlens,
        max_seqlen=layout.max_seqlen,
        lengths=tuple(layout.packed_lengths.tolist()),
        fields=dict(zip(named, packed, strict=True)),
    )


@dataclass(frozen=True)
class _Column:
    """One output of a packing pass."""

    dtype: torch.dtype
    kind: int  # _C.PER_TOKEN, ...
    source: Source | None  # None: generated


def _pack(columns: list[_Column], layout: Layout, target: torch.device) -> list[Tensor]:
    """Run one packing pass. Returns the columns and, last, cu_seqlens, all on ``target``.

    One allocation, the arena, holds the plan (csrc/packing.h) and then the outputs: on the host it
    crosses to a CUDA target as a whole.
    """
    num_tokens, num_sequences = int(layout.packed_lengths.sum()), layout.order.size
    plan = np.zeros(len(columns) * (3 + num_sequences) + num_sequences // 2 + 1, dtype=np.int64)
    described = plan[: 3 * len(columns)].reshape(-1, 3)
    sources = plan[3 * len(columns) :][: len(columns) * num_sequences].reshape(len(columns), -1)
    cu_seqlens = plan[(3 + num_sequences) * len(columns) :].view(np.int32)[: num_sequences + 1]
    np.cumsum(layout.packed_lengths, out=cu_seqlens[1:])

    starts, end = [], _aligned(plan.nbytes)
    for column in columns:
        starts.append(end)
        end += _aligned(num_tokens * column.dtype.itemsize)
    on_cuda = layout.device.type == "cuda"
    arena = torch.empty(
        end,
        dtype=torch.uint8,
        device=layout.device,
        pin_memory=target.type == "cuda" and not on_cuda,
    )
    for row, column, start in zip(range(len(columns)), columns, starts, strict=True):
        described[row] = arena.data_ptr() + start, column.kind, column.dtype.itemsize
        if column.source is not None:
            sources[row] = column.source.addresses()[layout.order]

    host_plan = torch.from_numpy(plan).view(torch.uint8)
    if on_cuda:
        _require_cuda_build()
        arena[: plan.nbytes].copy_(host_plan.pin_memory(), non_blocking=True)
        stream = torch.cuda.current_stream(layout.device).cuda_stream
        _C.pack_cuda(
            arena.data_ptr(), len(columns), num_sequences, num_tokens, layout.device.index, stream
        )
    else:
        arena[: plan.nbytes] = host_plan
        _C.pack_cpu(arena.data_ptr(), len(columns), num_sequences, num_tokens)
    arena = arena.to(target, non_blocking=True)
    cu_start = cu_seqlens.ctypes.data - plan.ctypes.data
    return [
        *(
            _carve(arena, start, c.dtype, num_tokens)
            for start, c in zip(starts, columns, strict=True)
        ),
        _carve(arena, cu_start, torch.int32, num_sequences + 1),
    ]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _carve(arena: Tensor, start: int, dtype: torch.dtype, count: int) -> Tensor:
    # Not a view: views of one arena would share its version counter, and changing one field in
    # place would make autograd reject the others that it saved.
    return torch.empty(0, dtype=dtype, device=arena.device).set_(
        arena.untyped_storage(), start // dtype.itemsize, (count,)
    )


def _require_cuda_build() -> None:
    if not _C.built_with_cuda:
        raise RuntimeError(
            "CUDA tensors need grpo_engine._C with CUDA, and this one is CPU-only: reinstall "
            "grpo-engine with GRPO_ENGINE_CUDA=1 where nvcc is found"
        )


# --- unpacking ------------------------------------------------------------------------------------


def unpack_ref(
    packed: Tensor,
    cu_seqlens: Tensor,
    *,
    padded: bool = False,
    pad_value: float = 0,
    lengths: HostInts | None = None,
    max_seqlen: int | None = None,
) -> list[Tensor] | Tensor:
    """:func:`unpack` as a chain of torch operations."""
    counts, width = _unpack_layout(packed, cu_seqlens, lengths, max_seqlen)
    pieces = list(packed.split(counts))
    if not padded:
        return pieces
    _bits(pad_value, packed.dtype)
    rows = [
        torch.nn.functional.pad(piece, (0, width - len(piece)), value=pad_value) for piece in pieces
    ]
    return torch.stack(rows) if rows else packed.new_empty(0, width)


def unpack(
    packed: Tensor,
    cu_seqlens: Tensor,
    *,
    padded: bool = False,
    pad_value: float = 0,
    lengths: HostInts | None = None,
    max_seqlen: int | None = None,
) -> list[Tensor] | Tensor:
    """Take a packed field [N] apart: S views of it, or with ``padded`` one tensor [S, max_seqlen].

    Padding is on the right, ``pad_value``, written in the same pass. ``max_seqlen`` defaults to the
    longest sequence. Pass ``lengths`` (:attr:`PackedBatch.lengths`) to spare CUDA tensors the host
    sync that reading ``cu_seqlens`` costs: the rows are then taken from ``lengths``, and the values
    of a CUDA ``cu_seqlens`` are not looked at.

    Raises ValueError naming the value for a field that is not one-dimensional or carries gradients,
    ``cu_seqlens`` that does not ascend from 0 to N or, on the CPU, contradicts ``lengths``, lengths
    that do not add up to N, a sequence longer than ``max_seqlen``, or a pad value the dtype cannot
    hold; RuntimeError as :func:`pack_rollouts`.
    """
    counts, width = _unpack_layout(packed, cu_seqlens, lengths, max_seqlen)
    if not padded:
        return list(packed.split(counts))
    packed = packed.contiguous()
    offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    if packed.is_cuda:
        offsets = offsets.pin_memory().to(packed.device, non_blocking=True)
    out = torch.empty(len(counts), width, dtype=packed.dtype, device=packed.device)
    job = _C.Unpack(
        destination=out.data_ptr(),
        packed=packed.data_ptr(),
        num_tokens=len(packed),
        cu_seqlens=offsets.data_ptr(),
        num_sequences=len(counts),
        row_length=width,
        element_size=packed.element_size(),
        pad_bits=_bits(pad_value, packed.dtype),
    )
    if packed.is_cuda:
        _require_cuda_build()
        stream = torch.cuda.current_stream(packed.device).cuda_stream
        _C.unpack_cuda(job, packed.device.index, stream)
    else:
        _C.unpack_cpu(job)
    return out


def _unpack_layout(
    packed: Tensor, cu_seqlens: Tensor, lengths: HostInts | None, max_seqlen: int | None
) -> tuple[list[int], int]:
    """Lengths on the host and the padded width."""
    if packed.ndim != 1:
        raise ValueError(f"packed must be one-dimensional, got shape {tuple(packed.shape)}")
    check_element("packed", packed)
    if cu_seqlens.ndim != 1 or cu_seqlens.device != packed.device:
        raise ValueError(
            f"cu_seqlens must be one-dimensional on {packed.device}, got shape "
            f"{tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or len(cu_seqlens) == 0:
        raise ValueError(
            f"cu_seqlens must be int32 or int64 [S+1], got {cu_seqlens.dtype} "
            f"{tuple(cu_seqlens.shape)}"
        )
    if len(packed) > MAX_TOKENS:
        raise ValueError(f"packed has {len(packed)} tokens; cu_seqlens is int32")
    bounds = cu_seqlens.tolist() if lengths is None or not cu_seqlens.is_cuda else None
    if bounds is not None:
        _check_bounds(bounds, len(packed))
    if lengths is None:
        counts = [end - start for start, end in pairwise(bounds)]
    else:
        counts = _checked_lengths(
            host_ints("lengths", lengths).tolist(), cu_seqlens, bounds, packed
        )
    longest = max(counts, default=0)
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(f"max_seqlen = {max_seqlen}, but a sequence has {longest} tokens")
    return counts, longest if max_seqlen is None else max_seqlen


def _check_bounds(bounds: list[int], num_tokens: int) -> None:
    for s, (start, end) in enumerate(pairwise(bounds)):
        if end < start:
            raise ValueError(f"cu_seqlens[{s + 1}] = {end} is below cu_seqlens[{s}] = {start}")
    if bounds[0] != 0 or bounds[-1] != num_tokens:
        raise ValueError(
            f"packed has {num_tokens} tokens, but cu_seqlens runs from {bounds[0]} to {bounds[-1]}"
        )


def _checked_lengths(
    lengths: list[int], cu_seqlens: Tensor, bounds: list[int] | None, packed: Tensor
) -> list[int]:
    """``lengths``, which fit ``packed`` and, where they are known, the ``bounds``."""
    for s, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"lengths[{s}] = {length} is negative")
    if len(lengths) != len(cu_seqlens) - 1 or sum(lengths) != len(packed):
        raise ValueError(
            f"packed has {len(packed)} tokens and cu_seqlens {len(cu_seqlens)} entries; "
            f"the {len(lengths)} lengths add up to {sum(lengths)}"
        )
    if bounds is not None:
        for s, (length, (start, end)) in enumerate(zip(lengths, pairwise(bounds), strict=True)):
            if length != end - start:
                raise ValueError(
                    f"lengths[{s}] = {length}, but by cu_seqlens sequence {s} has {end - start}"
                )
    return lengths


def _bits(value: float, dtype: torch.dtype) -> int:
    """The element ``value`` of ``dtype`` as the low bytes of an int64.

    Integers must be kept exactly; floats may be rounded, but a finite one must stay finite.
    """
    error = ValueError(f"pad_value = {value} is not a value of {dtype}")
    try:
        element = torch.tensor([value], dtype=dtype)
    except (RuntimeError, OverflowError, ValueError, TypeError) as cause:
        raise error from cause
    kept = element.item()
    inexact = dtype.is_floating_point or dtype.is_complex
    both_nan = value != value and kept != kept
    if not (
        kept == value or both_nan or (inexact and cmath.isfinite(value) and cmath.isfinite(kept))
    ):
        raise error
    raw = element.view(torch.uint8).numpy().tobytes()
    return int.from_bytes(raw.ljust(8, b"\0"), "little", signed=True)
