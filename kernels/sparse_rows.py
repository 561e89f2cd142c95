"""Rows of a head that touch few of its columns: dot products, and their gradients, entry by entry.

A row n of ``hidden`` [N, D] names K columns of the vocabulary, ``ids[n, :counts[n]]``. With
c = ``coef`` [N, K], the gradient of those columns' raw logits,

    logits[n, j] = <hidden[n], weight[ids[n, j]]>            gather_logits
    d hidden[n] = sum_j c[n, j] weight[ids[n, j]]            gather_grad_hidden
    d weight[v] = sum_{n, j: ids[n, j] = v} c[n, j] hidden[n]   add_sparse_grad_weight

An entry is padding where j >= counts[n] or its id is negative: it costs nothing and adds nothing.
An id may occur more than once in a row; each occurrence counts. A row without entries is not read,
so it may hold anything. An id >= V gives a logit of NaN and adds nothing to a gradient.

d weight without atomics. The entries are sorted by vocabulary id (stable, so within an id by row;
padding last) and cut into pieces of SEGMENT_PIECE. One program walks a piece in order. The sum of
an id whose first entry is in the piece goes to ``total``; the sum of an id that began in an earlier
piece goes to that piece's row of a buffer. A second kernel adds those rows to ``total``, piece
after piece. Each sum has one order, so two runs agree bit for bit, and an id that occurs in every
row is still spread over N / SEGMENT_PIECE programs: what remains serial of it is one addition a
piece. Where segments begin is read on the device; the host waits for nothing.

Bytes, with E entries that are not padding, weight and hidden of b bytes: gather_logits reads
E D b + N D b; gather_grad_hidden reads E D b and writes N D b'; add_sparse_grad_weight reads E D b,
reads and writes 8 D for each distinct id, sorts N K ids of 4 bytes, and takes N K / SEGMENT_PIECE
fp32 rows [D] of workspace (the sums that cross pieces). FLOP: 2 E D each. All accumulate in fp32.
On a CPU the same sums are made in torch over chunks of entries: sorted segments as well, since
``index_add_`` promises no order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import embedding_bag

from grpo_engine.kernels.common import (
    LAUNCH_OPTIONS,
    arch_choice,
    on_device_of_first,
    use_triton,
)
from grpo_engine.kernels.sparse_rows_triton import (
    GATHER_BLOCKS,
    SEGMENT_BLOCKS,
    SEGMENT_PIECE,
    _crossing_sums_kernel,
    _gather_grad_hidden_kernel,
    _gather_logits_kernel,
    _segment_sums_kernel,
)

# On a CPU: elements of the rows gathered at a time (2 MB in fp32, a cache).
CPU_GATHER_ELEMENTS = 1 << 19


@on_device_of_first
def gather_logits(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """Raw logits [N, K] fp32 of the columns ``ids`` [N, K] int32; -inf in the padding.

    ``hidden`` [N, D] and ``weight`` [V, D] of one dtype, contiguous along D; ``counts`` [N] int32.
    """
    if not use_triton(hidden):
        return _gather_logits_cpu(hidden, weight, ids, counts)
    (num_rows, num_entries), width = ids.shape, hidden.shape[1]
    out = torch.empty(num_rows, num_entries, dtype=torch.float32, device=hidden.device)
    if out.numel() == 0:
        return out
    block_k, block_d, num_warps = arch_choice(GATHER_BLOCKS, hidden)
    _gather_logits_kernel[(num_rows, -(-num_entries // block_k))](
        # output
        out,
        # inputs
        hidden,
        weight,
        ids,
        counts,
        # shapes
        weight.shape[0],
        width,
        num_entries,
        # strides
        hidden.stride(0),
        weight.stride(0),
        ids.stride(0),
        # constexprs
        BLOCK_K=block_k,
        BLOCK_D=block_d,
        num_warps=num_warps,
        **LAUNCH_OPTIONS,
    )
    return out


@on_device_of_first
def gather_grad_hidden(
    coef: torch.Tensor,
    ids: torch.Tensor,
    counts: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> None:
    """out[rows[n]] = sum_j coef[n, j] weight[ids[n, j]]; 0 for a row without entries.

    ``coef`` [N, K] fp32; ``out`` [*, D] of any float dtype, contiguous along D; ``rows`` [N] int32
    or int64 without repeats, negative: leave that row alone; None: row n goes to out[n].
    """
    if not use_triton(coef):
        _gather_grad_hidden_cpu(coef, ids, counts, weight, out, rows)
        return
    (num_rows, num_entries), width = ids.shape, weight.shape[1]
    if num_rows == 0:
        return
    block_k, block_d, num_warps = arch_choice(GATHER_BLOCKS, coef)
    _gather_grad_hidden_kernel[(num_rows, -(-width // block_d))](
        # output
        out,
        # inputs
        coef,
        ids,
        counts,
        weight,
        rows,
        # shapes
        weight.shape[0],
        width,
        num_entries,
        # strides
        out.stride(0),
        coef.stride(0),
        ids.stride(0),
        weight.stride(0),
        # constexprs
        HAS_ROWS=rows is not None,
        BLOCK_K=block_k,
        BLOCK_D=block_d,
        num_warps=num_warps,
        **LAUNCH_OPTIONS,
    )


@on_device_of_first
def add_sparse_grad_weight(
    total: torch.Tensor,
    coef: torch.Tensor,
    ids: torch.Tensor,
    counts: torch.Tensor,
    hidden: torch.Tensor,
) -> None:
    """total[v] += sum of coef[n, j] hidden[n] over the entries with ids[n, j] == v.

    ``total`` [V, D] fp32, contiguous along D. Rows of ids that do not occur are not touched.
    """
    if coef.numel() == 0:
        return
    sorted_ids, order = _sorted_entries(ids, counts, total.shape[0])
    if not use_triton(total):
        _add_segments_cpu(total, coef.reshape(-1), sorted_ids, order, ids.shape[1], hidden)
        return
    coef = coef.contiguous()  # ``order`` counts its entries row by row
    (vocab, width), num_entries = total.shape, coef.numel()
    block_d, num_warps = arch_choice(SEGMENT_BLOCKS, total)
    num_pieces = -(-num_entries // SEGMENT_PIECE)
    grid = (num_pieces, -(-width // block_d))
    crossing = torch.empty(num_pieces, width, dtype=torch.float32, device=total.device)
    _segment_sums_kernel[grid](
        # outputs
        total,
        crossing,
        # inputs
        sorted_ids,
        order,
        coef,
        hidden,
        # shapes
        vocab,
        width,
        ids.shape[1],
        num_entries,
        # strides
        total.stride(0),
        hidden.stride(0),
        # constexprs
        PIECE=SEGMENT_PIECE,
        BLOCK_D=block_d,
        num_warps=num_warps,
        **LAUNCH_OPTIONS,
    )
    _crossing_sums_kernel[grid](
        # output
        total,
        # inputs
        crossing,
        sorted_ids,
        # shapes
        vocab,
        width,
        num_entries,
        # strides
        total.stride(0),
        # constexprs
        PIECE=SEGMENT_PIECE,
        BLOCK_D=block_d,
        num_warps=num_warps,
        **LAUNCH_OPTIONS,
    )


def live_entries(ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """[N, K] bool: the entries that are not padding."""
    places = torch.arange(ids.shape[1], device=ids.device, dtype=counts.dtype)
    return (places < counts[:, None]) & (ids >= 0)


def _sorted_entries(
    ids: torch.Tensor, counts: torch.Tensor, vocab: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All N K entries by id: the ids [N K] ascending, ``vocab`` for what adds nothing, and the
    entry that each one was, n K + j."""
    keys = torch.where(live_entries(ids, counts), ids, vocab).clamp_(max=vocab)
    return torch.sort(keys.reshape(-1), stable=True)


# ---- Portable path -------------------------------------------------------------------------------


def _row_chunks(counts: torch.Tensor, num_entries: int, width: int) -> Iterator[torch.Tensor]:
    """Rows that have entries, as many at a time as CPU_GATHER_ELEMENTS gathers."""
    size = max(1, CPU_GATHER_ELEMENTS // max(1, num_entries * width))
    return iter(counts.nonzero()[:, 0].split(size))


def _gather_logits_cpu(hidden, weight, ids, counts) -> torch.Tensor:
    out = torch.full(ids.shape, -torch.inf)
    vocab, width = weight.shape
    if out.numel() == 0:
        return out
    for rows in _row_chunks(counts, ids.shape[1], width):
        chunk_ids = ids[rows]
        named = chunk_ids.clamp(0, vocab - 1).view(-1)
        gathered = weight.index_select(0, named).float().view(*chunk_ids.shape, width)
        logits = torch.bmm(gathered, hidden[rows].float()[:, :, None])[:, :, 0]
        logits.masked_fill_(chunk_ids >= vocab, torch.nan)
        out[rows] = logits.masked_fill_(~live_entries(chunk_ids, counts[rows]), -torch.inf)
    return out


def _gather_grad_hidden_cpu(coef, ids, counts, weight, out, rows) -> None:
    (num_rows, num_entries), (vocab, width) = ids.shape, weight.shape
    into = torch.arange(num_rows) if rows is None else rows.long()
    out[into[into >= 0]] = 0.0
    if num_entries == 0:
        return
    for index in _row_chunks(torch.where(into >= 0, counts, 0), num_entries, width):
        chunk_ids = ids[index]
        live = live_entries(chunk_ids, counts[index]) & (chunk_ids < vocab)
        lengths = live.sum(1)
        sums = _sums_of_rows(
            weight, chunk_ids[live].long(), lengths.cumsum(0) - lengths, coef[index][live]
        )
        out[into[index]] = sums.to(out.dtype)


def _add_segments_cpu(total, coef, sorted_ids, order, entries_per_row, hidden) -> None:
    vocab, width = total.shape
    end = int(torch.searchsorted(sorted_ids, vocab))
    step = max(1, CPU_GATHER_ELEMENTS // max(1, width))
    for start in range(0, end, step):
        part = slice(start, min(start + step, end))
        entries = order[part]
        places, starts = _segments(sorted_ids[part])
        total[places] += _sums_of_rows(hidden, entries // entries_per_row, starts, coef[entries])


def _sums_of_rows(
    source: torch.Tensor, rows: torch.Tensor, starts: torch.Tensor, factors: torch.Tensor
) -> torch.Tensor:
    """[B, D] fp32: sums of factors[i] source[rows[i]] over i from starts[b] up to starts[b + 1].

    One thread adds up a bag, in order.
    """
    if source.dtype != torch.float32:
        source, rows = source[rows].float(), torch.arange(len(rows))
    return embedding_bag(rows, source, starts, mode="sum", per_sample_weights=factors)


def _segments(sorted_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct values of an ascending tensor, and where each begins."""
    values, lengths = torch.unique_consecutive(sorted_ids, return_counts=True)
    return values.long(), lengths.cumsum(0) - lengths
