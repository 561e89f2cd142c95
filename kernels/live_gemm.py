"""GEMMs over the live rows of a pack, whose number only the device knows.

Maths. Of N packed rows those with a gradient are live; ``index`` lists them and ``count`` says how
many. For the C rows of a chunk that starts at ``start``, with n_i = index[start + i]:

    live_logits            out[i]    = hidden[n_i] @ weight.T
    live_grad_hidden       out[n_i]  = row_scale[i] * (dlogits[i] @ weight)
    live_add_grad_weight   total    += sum_i outer(dlogits[i], row_scale[i] * hidden[n_i])

and i ends at count - start. The launch covers all C rows; a tile past the count reads that number
and exits, so rows that are not live cost no FLOP and no host sync: 2 count D V FLOP each.

Batch invariance. A tile's shape, and the order in which its sum runs over D (or V), depend on the
dtype, the device and whether 16 divides D and V, never on the number of rows; no sum is split
between programs. A row of ``live_logits`` is therefore the same bits alone, among others, and
wherever it stands. cuBLAS chooses its kernel by shape and promises no such thing. ``rows=None`` is
that GEMM on all rows in order. Where 16 does not divide D or V, half inputs take small tiles.

Bytes: each input once from HBM as long as a group of tiles stays in L2, each output once; ``total``
is read and written (8 V D bytes a call). Sums are fp32; fp32 inputs are multiplied in IEEE
arithmetic, or in TF32 where ``torch.backends.cuda.matmul.allow_tf32``. ``row_scale`` multiplies
fp32 sums in ``live_grad_hidden``; in ``live_add_grad_weight`` it multiplies ``hidden``, and half
inputs are rounded once more.

On a CPU the live rows are taken by ``index_select`` and the products are torch's: the same
results, without the batch invariance.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_engine.kernels.common import (
    FLOAT_DTYPES,
    LAUNCH_OPTIONS,
    arch_choice,
    on_device_of_first,
    use_triton,
)
from grpo_engine.kernels.live_gemm_triton import (
    GROUP_TILES,
    HIDDEN_TILES,
    LOGITS_TILES,
    PLAIN_TILES,
    WEIGHT_TILES,
    Tile,
    _live_rows_gemm_kernel,
    _live_weight_gemm_kernel,
)

# On a CPU: rows of a half-precision weight that are widened to fp32 at a time.
CPU_VOCAB_TILE = 4096


class LiveRows(NamedTuple):
    """The live rows among N, both on the device: ``index`` [N] int32 holds their numbers, rising,
    then zeros; ``count`` [1] int32 is how many they are."""

    index: Tensor
    count: Tensor


def live_rows(live: Tensor) -> LiveRows:
    """The rows where ``live`` [N] bool is True, without a host sync."""
    if live.dtype != torch.bool or live.ndim != 1:
        raise ValueError(f"live must be [N] bool, got {list(live.shape)} {live.dtype}")
    num_rows = live.shape[0]
    count = live.sum(dtype=torch.int32).view(1)
    # a permutation: live rows first, so that no two rows are scattered to one place
    place = torch.where(live, live.cumsum(0) - 1, count + (~live).cumsum(0) - 1)
    numbers = torch.arange(num_rows, dtype=torch.int32, device=live.device)
    index = torch.zeros_like(numbers)
    index.scatter_(0, place, torch.where(live, numbers, 0))
    return LiveRows(index, count)


def live_rows_ref(live: Tensor) -> LiveRows:
    """Specification of ``live_rows``."""
    numbers = live.nonzero().squeeze(1).to(torch.int32)
    index = torch.zeros(live.shape[0], dtype=torch.int32, device=live.device)
    index[: len(numbers)] = numbers
    return LiveRows(index, index.new_tensor([len(numbers)]))


# ---- Launchers -----------------------------------------------------------------------------------


def live_logits(
    out: Tensor, hidden: Tensor, weight: Tensor, rows: LiveRows | None, start: int
) -> Tensor:
    """out[i] = hidden[rows.index[start + i]] @ weight.T for i < C with start + i < rows.count.

    Args:
        out: [C, V] fp32; its other rows stay as they are.
        hidden, weight: [N, D], [V, D] of one float dtype, the last axis contiguous.
        rows: the live rows; None: all of them in order.
        start: the first of the chunk's places in ``rows.index``.

    Returns ``out``. Raises ValueError for a shape, dtype, or stride that does not fit.
    """
    _check("out", out, (None, weight.shape[0]), (torch.float32,))
    _check("hidden", hidden, (None, weight.shape[1]), FLOAT_DTYPES)
    _check("weight", weight, (None, None), (hidden.dtype,))
    if use_triton(out):
        _launch_rows(out, hidden, weight, rows, start, None, None, transposed=True)
        return out
    index, count = _chunk_index(rows, start, len(out), len(hidden))
    if count:
        _wide_mm(out[:count], hidden.index_select(0, index), weight)
    return out


def live_grad_hidden(
    out: Tensor,
    dlogits: Tensor,
    weight: Tensor,
    rows: LiveRows | None,
    start: int,
    row_scale: Tensor | None = None,
    *,
    places: Tensor | None = None,
) -> None:
    """out[rows.index[start + i]] = row_scale[i] * (dlogits[i] @ weight), summed in fp32.

    Args:
        out: [N, D], any float dtype; rows that are not in the chunk stay as they are.
        dlogits: [C, V] float; on CUDA of ``weight``'s dtype.
        weight: [V, D] float.
        rows, start: as in ``live_logits``.
        row_scale: [C] fp32; None: 1.
        places: [N] int32: ``dlogits`` and ``row_scale`` of the i-th row stand at places[start + i]
            instead of i. None: at i.
    """
    _check("weight", weight, (None, None), FLOAT_DTYPES)
    _check("out", out, (None, weight.shape[1]), FLOAT_DTYPES)
    _check("dlogits", dlogits, (None, weight.shape[0]), _same_or_any(out, weight))
    _check_scale(row_scale, len(dlogits))
    if use_triton(out):
        _launch_rows(out, dlogits, weight, rows, start, row_scale, places, transposed=False)
        return
    index, count = _chunk_index(rows, start, len(dlogits), len(out))
    taken = slice(count) if places is None else places[start : start + count].long()
    dlogits = dlogits[taken]
    grad = torch.zeros(count, weight.shape[1])
    for tile in _vocab_tiles(weight):
        grad.addmm_(dlogits[:, tile].float(), weight[tile].float())
    if row_scale is not None:
        grad.mul_(row_scale[taken, None])
    out[index] = grad.to(out.dtype)


def live_add_grad_weight(
    total: Tensor,
    dlogits: Tensor,
    hidden: Tensor,
    rows: LiveRows | None,
    start: int,
    row_scale: Tensor | None = None,
    *,
    places: Tensor | None = None,
) -> None:
    """total += sum_i outer(dlogits[i], row_scale[i] * hidden[rows.index[start + i]]), in fp32.

    Args:
        total: [V, D] fp32.
        dlogits: [C, V] float; on CUDA of ``hidden``'s dtype.
        hidden: [N, D] float.
        rows, start, row_scale, places: as in ``live_grad_hidden``.
    """
    _check("hidden", hidden, (None, None), FLOAT_DTYPES)
    _check("total", total, (None, hidden.shape[1]), (torch.float32,))
    _check("dlogits", dlogits, (None, total.shape[0]), _same_or_any(total, hidden))
    _check_scale(row_scale, len(dlogits))
    if use_triton(total):
        _launch_weight(total, dlogits, hidden, rows, start, row_scale, places)
        return
    index, count = _chunk_index(rows, start, len(dlogits), len(hidden))
    taken = slice(count) if places is None else places[start : start + count].long()
    dlogits = dlogits[taken]
    wide = hidden.index_select(0, index).float()
    if row_scale is not None:
        wide.mul_(row_scale[taken, None])
    for tile in _vocab_tiles(total):
        total[tile].addmm_(dlogits[:, tile].float().t(), wide)


@on_device_of_first
def _launch_rows(out, a, weight, rows, start, row_scale, places, *, transposed) -> None:
    """``live_logits`` (``transposed``: weight.T) or ``live_grad_hidden``."""
    columns, terms = weight.shape if transposed else weight.shape[::-1]
    packed, chunk = (a, out) if transposed else (out, a)
    num_rows = min(len(chunk), len(rows.index if rows else packed) - start)
    if num_rows <= 0 or columns == 0:
        return
    aligned = _aligned(out, a, weight)
    tile = _tile(LOGITS_TILES if transposed else HIDDEN_TILES, aligned, weight)
    row_tiles = -(-num_rows // tile.m)
    _live_rows_gemm_kernel[(row_tiles * -(-columns // tile.n),)](
        # output
        out,
        # inputs
        a,
        weight,
        rows.index if rows else None,
        rows.count if rows else None,
        places,
        row_scale,
        # scalars
        start,
        # shapes
        num_rows,
        columns,
        terms,
        _group(row_tiles),
        # strides
        out.stride(0),
        a.stride(0),
        weight.stride(0),
        # constexprs
        HAS_ROWS=rows is not None,
        GATHER=transposed,
        HAS_PLACES=places is not None,
        SCATTER=not transposed,
        HAS_ROW_SCALE=row_scale is not None,
        B_TRANSPOSED=transposed,
        ALIGNED=aligned,
        **_tile_constexprs(tile, weight.dtype),
    )


@on_device_of_first
def _launch_weight(total, dlogits, hidden, rows, start, row_scale, places) -> None:
    vocab, width = total.shape
    num_rows = min(len(dlogits), len(rows.index if rows else hidden) - start)
    if num_rows <= 0 or not total.numel():
        return
    aligned = _aligned(total, dlogits, hidden)
    tile = _tile(WEIGHT_TILES, aligned, hidden)
    vocab_tiles = -(-vocab // tile.m)
    _live_weight_gemm_kernel[(vocab_tiles * -(-width // tile.n),)](
        # output
        total,
        # inputs
        dlogits,
        hidden,
        rows.index if rows else None,
        rows.count if rows else None,
        places,
        row_scale,
        # scalars
        start,
        # shapes
        num_rows,
        vocab,
        width,
        _group(vocab_tiles),
        # strides
        total.stride(0),
        dlogits.stride(0),
        hidden.stride(0),
        # constexprs
        HAS_ROWS=rows is not None,
        HAS_PLACES=places is not None,
        HAS_ROW_SCALE=row_scale is not None,
        ALIGNED=aligned,
        **_tile_constexprs(tile, hidden.dtype),
    )


def _aligned(out: Tensor, *inputs: Tensor) -> bool:
    """Whether half inputs may be read 16 elements at a time, whatever the number of rows."""
    return inputs[0].dtype != torch.float32 and all(
        tensor.data_ptr() % 16 == 0 and tensor.stride(0) % 16 == 0 and tensor.shape[1] % 16 == 0
        for tensor in (out, *inputs)
    )


def _tile(table: dict[int, Tile], aligned: bool, inputs: Tensor) -> Tile:
    return arch_choice(table, inputs) if aligned else PLAIN_TILES[inputs.element_size()]


def _tile_constexprs(tile: Tile, dtype: torch.dtype) -> dict:
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {
        "INPUT_PRECISION": "tf32" if tf32 else "ieee",
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **LAUNCH_OPTIONS,
    }


def _group(row_tiles: int) -> int:
    """Row tiles of a group: the tiles in groups of equal size, at most GROUP_TILES each."""
    return -(-row_tiles // -(-row_tiles // GROUP_TILES))


# ---- Portable path -------------------------------------------------------------------------------


def _chunk_index(
    rows: LiveRows | None, start: int, chunk: int, num_rows: int
) -> tuple[Tensor, int]:
    """([n] int64 row numbers of the chunk, n). Reads the count: CPU tensors only."""
    stop = min(start + chunk, num_rows if rows is None else int(rows.count))
    count = max(0, stop - start)
    index = torch.arange(start, start + count) if rows is None else rows.index[start:][:count]
    return index.long(), count


def _vocab_tiles(weight: Tensor) -> list[slice]:
    step = CPU_VOCAB_TILE if weight.dtype != torch.float32 else max(1, len(weight))
    return [slice(v, v + step) for v in range(0, len(weight), step)]


def _wide_mm(out: Tensor, hidden: Tensor, weight: Tensor) -> None:
    wide = hidden.float()
    for tile in _vocab_tiles(weight):
        out[:, tile] = wide @ weight[tile].float().t()


# ---- Checks --------------------------------------------------------------------------------------


def _same_or_any(out: Tensor, partner: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes that dlogits may have beside ``partner``."""
    return (partner.dtype,) if use_triton(out) else FLOAT_DTYPES


def _check(name: str, tensor: Tensor, shape: tuple, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.ndim != 2 or any(
        want not in (None, size) for want, size in zip(shape, tensor.shape, strict=True)
    ):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be one of {names}, got {tensor.dtype}")
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name} must be contiguous in its last axis, has {tensor.stride()}")


def _check_scale(row_scale: Tensor | None, chunk: int) -> None:
    if row_scale is None:
        return
    if row_scale.dtype != torch.float32 or row_scale.shape != (chunk,):
        raise ValueError(
            f"row_scale must be [{chunk}] float32, got {list(row_scale.shape)} {row_scale.dtype}"
        )
    if not row_scale.is_contiguous():
        raise ValueError(f"row_scale must be contiguous, has stride {row_scale.stride()}")
