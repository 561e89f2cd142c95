"""A pass over the rows of a head that count, in chunks: which rows, in which order, and the GEMM
that makes their logits.

Three ways to leave rows out (masked rows in forward, rows without a gradient in backward):

* portable path: their numbers are read, and the pass has one place for each row that stays;
* CUDA, compacted: the rows that stay come first and the device alone knows how many. Every chunk is
  launched, and live_gemm.py does no work past the count. No host sync;
* CUDA, not compacted: places are rows; rows that do not count enter the GEMMs as zeros and the
  passes over their logits are skipped.

Batch invariance. A BLAS chooses its kernel, hence the order of a sum, by the number of rows: the
same row gives other bits in another batch. With ``batch_invariant`` CUDA takes live_gemm.py's fixed
tiles. A CPU multiplies blocks of 32 rows, the last one filled up with zeros, by 1,024 columns: the
shape of a product never changes, and what may is where in the block a row stands. That is tried
once for each shape (one row at all 32 places must give the same bits 32 times); should a BLAS fail,
each row is multiplied alone, out of one buffer, which cannot depend on its neighbours. The fold
needs blocks too: torch splits the sum of a lone row between threads.

Measured (CPU, one thread of a shared EPYC, fp32, best of 7 and 4 interleaved): a forward pass with
the option against one without, N=20,000 D=128 V=131 40 against 32 ms, N=256 D=576 V=49,152 515
against 483 ms. A lone row costs a block. Not yet timed on a device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from grpo_engine.kernels.common import use_triton
from grpo_engine.kernels.exact_logits import corrected, exact_stats, shard_shifts
from grpo_engine.kernels.head_chunks import (
    HeadGrads,
    Workspace,
    chunk_hidden,
    head_chunk_backward,
    raw_logits,
)
from grpo_engine.kernels.live_gemm import LiveRows, live_logits, live_rows
from grpo_engine.kernels.logprobs import check_row_values
from grpo_engine.kernels.top_logits import TopLogits
from grpo_engine.kernels.vocab_parallel import (
    VocabShards,
    fold_shard,
    merge_shards,
    shards_for_forward,
)
from grpo_engine.kernels.vocab_rows import (
    LogitOptions,
    RowGrads,
    RowStats,
    apply_logit_options,
    fold_rows,
    shift_rows,
)

# Rows and columns of a batch-invariant product on a CPU. 32 rows fill the vectors of the
# elementwise operations after it; more would cost a lone row more, and gain little.
BLOCK_ROWS = 32
BLOCK_COLUMNS = 1024


@dataclass(frozen=True)
class HeadPass:
    """One pass of P places over N rows. P = N on CUDA, the number of live rows on a CPU."""

    hidden: torch.Tensor  # [N, D], in the order of the rows, as is ``visited``
    weight: torch.Tensor  # [V, D]
    visited: torch.Tensor | None  # [N] bool: the rows that have a place; None: all
    token_ids: torch.Tensor  # [P], in the order of the pass, as are all below; with ``shards``
    # counted from the first row of ``weight``
    options: LogitOptions
    mask: torch.Tensor | None = None  # [P] bool: False at a place that does not count
    order: torch.Tensor | None = None  # [P] int64: the row at each place; None: places are rows
    live: LiveRows | None = None  # the same order, for live_gemm.py (CUDA, compacted)
    batch_invariant: bool = False
    shards: VocabShards | None = None  # ``weight`` is this rank's of several

    @classmethod
    def make(
        cls,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        token_ids: torch.Tensor,
        options: LogitOptions,
        visited: torch.Tensor | None,
        *,
        compact: bool,
        batch_invariant: bool = False,
        shards: VocabShards | None = None,
    ) -> HeadPass:
        """A pass over the rows ``visited``. ``compact`` is for the Triton path."""
        if batch_invariant:
            hidden, weight = plain_layout(hidden), plain_layout(weight)
        if shards is not None:
            token_ids = shards.local_ids(token_ids)
        places = cls(
            hidden,
            weight,
            None,
            token_ids,
            options,
            batch_invariant=batch_invariant,
            shards=shards,
        ).narrow(visited, compact=compact)[0]
        return replace(places, visited=visited)

    @classmethod
    def forward(
        cls,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        token_ids: torch.Tensor,
        options: LogitOptions,
        row_mask: torch.Tensor | None,
        *,
        compact: bool,
        batch_invariant: bool,
        tp_group: str | None,
        pass_name: str,
        **facts: object,
    ) -> HeadPass:
        """``make`` for a forward pass. What its rows hold is checked, and with ``tp_group`` agreed
        on by the ranks, ``facts`` included."""
        how = {"compact": compact, "batch_invariant": batch_invariant}
        shards = shards_for_forward(
            tp_group, pass_name, hidden, weight, token_ids, options, row_mask, **how, **facts
        )
        vocab = weight.shape[0] if shards is None else shards.vocab
        check_live_rows(token_ids, options.row_temperature, row_mask, vocab)
        return cls.make(hidden, weight, token_ids, options, row_mask, **how, shards=shards)

    def narrow(
        self, kept: torch.Tensor | None, *, compact: bool
    ) -> tuple[HeadPass, torch.Tensor | None]:
        """(the pass over the places ``kept`` [P] bool, their numbers in this one or None for all of
        them). ``visited`` does not follow."""
        if kept is None:
            return self, None
        if not use_triton(self.hidden):
            if bool(kept.all()):
                return self, None
            mask, picks, live = None, kept.nonzero().squeeze(1), None
        elif compact:
            index, count = live_rows(kept)
            picks = index.long()
            mask = torch.arange(len(kept), device=kept.device) < count
            live = LiveRows(index if self.order is None else self.order[picks].int(), count)
        else:
            return replace(self, mask=kept if self.mask is None else kept & self.mask), None
        return (
            replace(
                self,
                token_ids=self.token_ids[picks],
                options=self.options.rows(picks),
                mask=mask,
                order=picks if self.order is None else self.order[picks],
                live=live,
            ),
            picks,
        )

    @property
    def places(self) -> int:
        return self.token_ids.shape[0]

    @property
    def hidden_grad_dtype(self) -> torch.dtype:
        """Of d hidden [N, D], which is added up over the ranks in fp32."""
        return self.hidden.dtype if self.shards is None else torch.float32

    @property
    def chunk_multiple(self) -> int:
        """What the rows of a workspace must be a multiple of."""
        return BLOCK_ROWS if self.batch_invariant and not use_triton(self.hidden) else 1

    def workspace(self, *, for_gradient: bool) -> Workspace:
        return Workspace.make(
            self.hidden,
            self.weight.shape[0],
            for_gradient=for_gradient,
            multiple=self.chunk_multiple,
            widest=None if self.shards is None else max(self.shards.sizes),
        )

    def chunks(self, rows_per_chunk: int) -> Iterator[slice]:
        """Slices of the places."""
        for start in range(0, self.places, rows_per_chunk):
            yield slice(start, min(start + rows_per_chunk, self.places))

    def rows_of(self, chunk: slice) -> slice | torch.Tensor:
        """The rows at the places of ``chunk``; compacted, the places themselves, which is what
        ``HeadGrads.add`` wants."""
        return chunk if self.order is None or self.live is not None else self.order[chunk]

    def take(self, field: torch.Tensor) -> torch.Tensor:
        """A field [N] in the order of the pass; 0 at places that do not count."""
        taken = field if self.order is None else field[self.order]
        return taken if self.mask is None else torch.where(self.mask, taken, 0.0)

    def take_grads(self, grads: RowGrads) -> RowGrads:
        return RowGrads(*(None if field is None else self.take(field) for field in grads))

    def take_stats(self, stats: RowStats) -> RowStats:
        return stats if self.order is None else stats.rows(self.order)

    def put_back(self, stats: RowStats, want_entropy: bool) -> RowStats:
        """Statistics in the order of the pass -> in the order of the rows, 0 where not visited."""
        if self.order is None:
            return stats
        if self.live is None:
            rows = RowStats.zeros(self.hidden, self.hidden.shape[0], want_entropy)
            rows.put(self.order, stats)
            return rows
        place = (self.visited.cumsum(0) - 1).clamp_(min=0)
        return RowStats(
            *(torch.where(self.visited, f[place], 0.0) if f.numel() else f for f in stats)
        )

    def hidden_rows(self, chunk: slice) -> torch.Tensor:
        """[C, D] of the chunk; anything at places that do not count."""
        return self.hidden[chunk if self.order is None else self.order[chunk]]

    def chunk_hidden(self, chunk: slice) -> torch.Tensor:
        """What the chunk's GEMMs take for ``hidden``: its rows, or all of [N, D] compacted."""
        if self.live is not None:
            return self.hidden
        return chunk_hidden(self.hidden, self.rows_of(chunk), self.mask)

    def logits(self, chunk: slice, work: Workspace) -> torch.Tensor:
        """Raw logits [C, V] fp32 of the chunk, in ``work.logits``; C is filled up to whole blocks
        where the portable path is batch-invariant."""
        rows = chunk.stop - chunk.start
        out = work.logits[: -(-rows // self.chunk_multiple) * self.chunk_multiple]
        if self.live is not None:
            return live_logits(out, self.hidden, self.weight, self.live, chunk.start)
        hidden = self.chunk_hidden(chunk)
        if not self.batch_invariant:
            return raw_logits(hidden, self.weight, out)
        if use_triton(hidden):
            return live_logits(out, hidden, self.weight, None, 0)
        return invariant_logits(hidden, self.weight, out)

    def fold(self, chunk: slice, work: Workspace, want_entropy: bool) -> RowStats:
        """Statistics of the chunk, whose logits (CPU: what the gradient continues from) are left in
        ``work``. Every forward pass of a head makes them here."""
        rows, logits = chunk.stop - chunk.start, self.logits(chunk, work)
        ids, options = self.token_ids[chunk], self.options.rows(chunk)
        mask = None if self.mask is None else self.mask[chunk]
        hidden = self.hidden_rows(chunk)
        if len(logits) > rows:
            fill = torch.arange(len(logits), device=ids.device).clamp_(max=rows - 1)
            ids, options, hidden = ids[fill], options.rows(fill), hidden[fill]
        scratch, top = work.dlogits[: len(logits)], TopLogits()
        exact = (top, hidden, self.weight, options, mask)
        if self.shards is None:
            stats = fold_rows(logits, scratch, ids, options, want_entropy, mask, top)
            stats = exact_stats(stats, *exact)
        else:
            part = fold_shard(logits, scratch, ids, options, want_entropy, mask, top)
            stats = merge_shards(part, self.shards, ids, options, want_entropy, mask)
            shifts = self.shards.gather(shard_shifts(stats, *exact))
            stats = corrected(stats, *shifts.double().sum(0))
        return stats.rows(slice(0, rows))

    def backward(
        self, chunk: slice, work: Workspace, stats: RowStats, grads: RowGrads, into: HeadGrads
    ) -> None:
        """Recompute the chunk's logits and add its gradients; ``stats`` and ``grads`` [P] are in
        the order of the pass."""
        logits, options = self.logits(chunk, work), self.options.rows(chunk)
        if not use_triton(logits):
            apply_logit_options(logits, options)
            shift_rows(logits, work.dlogits[: len(logits)], options, stats.row_max[chunk])
        head_chunk_backward(
            self.rows_of(chunk),
            work,
            self.chunk_hidden(chunk),
            self.weight,
            self.token_ids[chunk],
            options,
            stats.rows(chunk),
            grads.rows(chunk),
            None if self.mask is None else self.mask[chunk],
            into,
            self.live,
        )

    def finish(self, into: HeadGrads) -> None:
        """After the last chunk. With shards: d hidden, until now of this rank's columns alone."""
        if self.shards is not None:
            self.shards.add_up(into.hidden)


# ---- Batch invariance ----------------------------------------------------------------------------


def plain_layout(matrix: torch.Tensor) -> torch.Tensor:
    """``matrix`` as a product finds it in any other call: rows without gaps, at an address that 16
    divides. Kernels are chosen by that, too."""
    if matrix.is_contiguous() and matrix.data_ptr() % 16 == 0:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def invariant_logits(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """hidden [C, D] @ weight.T [D, V] in fp32 into ``out``, C rounded up to whole blocks; a row's
    bits do not depend on the others nor on its place."""
    rows = out.new_zeros(out.shape[0], hidden.shape[1])
    rows[: len(hidden)] = hidden
    threads = torch.get_num_threads()
    for first in range(0, weight.shape[0], BLOCK_COLUMNS):
        columns = slice(first, first + BLOCK_COLUMNS)
        part = weight[columns].float()
        if block_is_uniform(*part.shape, threads):
            for start in range(0, len(out), BLOCK_ROWS):
                block = slice(start, start + BLOCK_ROWS)
                torch.mm(rows[block], part.t(), out=out[block, columns])
        else:
            _logits_row_by_row(rows, part, out[:, columns])
    return out


@functools.lru_cache(maxsize=256)
def block_is_uniform(columns: int, width: int, threads: int) -> bool:
    """Whether this machine's BLAS gives a row the same bits at every place of a block."""
    values = torch.Generator().manual_seed(0)
    made = torch.empty(1 + columns, width, dtype=torch.float32, device="cpu")
    row, weight = made.normal_(generator=values).split((1, columns))
    product = row.repeat(BLOCK_ROWS, 1) @ weight.t()
    return torch.equal(product, product[:1].expand_as(product))


def _logits_row_by_row(rows: torch.Tensor, part: torch.Tensor, out: torch.Tensor) -> None:
    """One product a row, each out of and into the same memory."""
    row, product = rows.new_empty(rows.shape[1]), out.new_empty(part.shape[0])
    for i in range(len(rows)):
        out[i] = torch.mv(part, row.copy_(rows[i]), out=product)


# ---- Checks --------------------------------------------------------------------------------------


def check_live_rows(
    token_ids: torch.Tensor,
    row_temperature: torch.Tensor | None,
    row_mask: torch.Tensor | None,
    vocab: int,
) -> None:
    """``check_row_values`` for the rows of ``row_mask`` (CPU only)."""
    if token_ids.is_cuda:
        return
    if row_mask is not None:
        token_ids = token_ids[row_mask]
        row_temperature = None if row_temperature is None else row_temperature[row_mask]
    check_row_values(token_ids, row_temperature, vocab)
