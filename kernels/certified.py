"""Certified sparse backward: of each row of probabilities the few that matter, and what is lost.

A row of E (exp_rows.py) is the gradient of the raw logits but for one factor: dlogits = r E with
E_k = unit total p_k for k != y (times the slope of a softcap) and E_y = -unit others. On a policy
that is sure of itself nearly all of it is nearly zero. Of each row the smallest set

    kept = {y} and {k: E_k >= theta},   theta the largest with   sum_{E_k < theta} E_k <= budget,
    budget = delta (1 - 2^-16) unit total                    (entries that are equal stay together)

stays; a row that needs more than ``max_entries`` is dense. Sparse rows take the gathers and sorted
sums of sparse_rows.py, dense rows the GEMMs of live_gemm.py, compacted, without a host sync:

    dX_n = r_n sum_{k kept} E_nk W_k,    dW_k = sum_{n: k kept} r_n E_nk x_n

The certificate. ``dropped`` is the sum of what a sparse row drops over unit total, measured (on E
as it is written: in half each entry is rounded): at most delta, as the 2^-16 is more than the
rounding of the sums. The error of a row of dlogits is exactly what was dropped, e_n with
|e_n|_1 = |r_n| unit total dropped_n, and |r| unit total = |dL/d logprob| logit_scale / T. By the
triangle inequality

    |dX_n error|  <= |e_n|_1 max_k |W_k|,        |dW error|_F <= sum_n |e_n|_1 |x_n|

(Euclidean norms; e_n = 0 for dense rows), besides the rounding of the dense path itself. That is
``error_bounds``. Measured errors are far smaller: benchmarks/results/certified_sparse_cpu.md.

One-sided: what is dropped would have lowered the improbable tokens where y is raised, and raised
them where y is lowered; each row of dlogits sums to -r unit total dropped instead of 0. Giving the
dropped mass to the kept entries or to the token would restore the sum, and was worse in every error
measured (certified_sparse_cpu.json).

Finding theta without a sort. An entry below least = budget / (candidates - max_entries) hardly
matters to a row that can be sparse: at most max_entries of them stay, budget / 7 in all at
candidates = 8 max_entries. And were more than ``candidates`` entries above it, those dropped would
sum to more than the budget. So one read of the row adds up what lies below ``least`` (the tail) and
lists the rest; where the tail passes the budget or the list overflows the row is dense, and the
read ends there. (A row that is sparse at 6/7 delta is never taken for dense.) Among the candidates
theta is found exactly.

Bytes on CUDA: at most one read of E, 2 V a row at half inputs, less for a diffuse row; 8 bytes for
each candidate, and E once more there; sparse_rows.py's for the kept entries; the GEMMs' for the
dense rows. Not yet timed on a device. On a CPU, at D = 576 and V = 49,152, delta = 1e-3 takes 0.6
of the exact op's time at 0.2 to 0.7 nats of entropy and 1.03 at 1.8 (benchmarks/results).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_engine.kernels.certified_triton import (
    CANDIDATE_BLOCKS,
    CHOICE_WARPS,
    SPAN,
    _candidates_kernel,
    _choose_entries_kernel,
)
from grpo_engine.kernels.common import (
    LAUNCH_OPTIONS,
    arch_choice,
    block_size,
    on_device_of_first,
    use_triton,
)
from grpo_engine.kernels.exp_rows import ExpRows, exp_chunk_backward
from grpo_engine.kernels.head_chunks import HeadGrads, scale_for_half
from grpo_engine.kernels.head_pass import HeadPass
from grpo_engine.kernels.live_gemm import (
    LiveRows,
    live_add_grad_weight,
    live_grad_hidden,
    live_rows,
)
from grpo_engine.kernels.sparse_rows import add_sparse_grad_weight, gather_grad_hidden
from grpo_engine.kernels.vocab_rows import RowGrads

# More than the relative rounding of an fp32 sum over a vocabulary: V / 2048 additions in a row,
# then a tree.
ROUNDING_SHARE = 2.0**-16
MOST_ENTRIES = 128
# On a CPU: entries of E that are looked through at a time (2 MB, a cache).
CPU_ELEMENTS = 1 << 19


class Entries(NamedTuple):
    """What is kept of P rows, K = max_entries; nothing of a dense row."""

    ids: Tensor  # [P, K] int32
    coef: Tensor  # [P, K] fp32, dL/d raw logits
    counts: Tensor  # [P] int32
    dense: Tensor  # [P] bool
    dropped: Tensor  # [P] fp32, the share of the row's mass that was left out

    @classmethod
    def empty(cls, num_rows: int, max_entries: int, device: torch.device) -> Entries:
        def make(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            make(torch.int32, num_rows, max_entries),
            make(torch.float32, num_rows, max_entries),
            make(torch.int32, num_rows),
            make(torch.bool, num_rows),
            make(torch.float32, num_rows),
        )

    def rows(self, chunk: slice) -> Entries:
        return Entries(*(field[chunk] for field in self))


def check_sparse_options(delta: float, max_entries: int) -> None:
    """ValueError unless 0 < sparse_delta < 1 and 1 <= sparse_max_entries <= MOST_ENTRIES."""
    is_number = isinstance(delta, (int, float)) and not isinstance(delta, bool)
    if not (is_number and 0 < delta < 1):
        raise ValueError(f"sparse_delta must be a number in (0, 1) or None, got {delta!r}")
    is_int = isinstance(max_entries, int) and not isinstance(max_entries, bool)
    if not (is_int and 1 <= max_entries <= MOST_ENTRIES):
        raise ValueError(
            f"sparse_max_entries must be an int in [1, {MOST_ENTRIES}], got {max_entries!r}"
        )


def num_candidates(max_entries: int) -> int:
    """Places of a row's list: a power of two, at least 8 max_entries."""
    return block_size(max(256, 8 * max_entries), 8 * MOST_ENTRIES)


def select_entries_ref(
    rows: ExpRows, row_scale: Tensor, *, delta: float, max_entries: int
) -> Entries:
    """Specification of ``select_entries``, in fp64, a row at a time."""
    num_rows = len(row_scale)
    entries = Entries.empty(num_rows, max_entries, row_scale.device)
    for field in entries:
        field.zero_()
    for n in range(num_rows):
        if row_scale[n] == 0:
            continue
        exps, token = rows.exps[n].double(), int(rows.token_ids[n])
        exps[token] = torch.inf
        mass = rows.unit * rows.total[n].double()
        budget = delta * (1 - ROUNDING_SHARE) * mass
        least = budget / (num_candidates(max_entries) - max_entries)
        values = exps.sort()[0]
        num_dropped = int((values.cumsum(0) <= budget).sum())
        kept = exps >= values[num_dropped]
        below_least = torch.where(exps < least, exps, 0.0).sum()
        if kept.sum() > max_entries or not below_least <= budget:
            entries.dense[n] = True
            continue
        ids = kept.nonzero()[:, 0]
        coef = torch.where(ids == token, rows.at_token[n].double(), exps[ids])
        entries.ids[n, : len(ids)] = ids.int()
        entries.coef[n, : len(ids)] = (coef * row_scale[n].double()).float()
        entries.counts[n] = len(ids)
        entries.dropped[n] = torch.where(kept, 0.0, exps).sum() / mass
    return entries


def error_bounds(
    entries: Entries, size: Tensor, hidden: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Bounds that the certificate gives: of each row's |dX error| [C], and of |dW error|_F, 0-d.

    ``size`` [C] is |dL/d logprob| logit_scale / T of the rows, ``hidden`` [C, D].
    """
    lost = torch.where(entries.dense, 0.0, entries.dropped * size)  # |e_n|_1
    longest = weight.float().square().sum(1).max().sqrt()
    return lost * longest, (lost * hidden.float().square().sum(1).sqrt()).sum()


# ---- Selection -----------------------------------------------------------------------------------


def select_entries(rows: ExpRows, row_scale: Tensor, *, delta: float, into: Entries) -> None:
    """Choose the entries of a chunk of rows, at most K of each, and write them to ``into``.

    Args:
        rows: E [C, V] of the chunk, its sums and its tokens.
        row_scale: [C] fp32, ``rows.row_scale``; a row where it is 0 is neither sparse nor dense.
        delta: the share of a row's mass that may be dropped, in (0, 1).
    """
    budget_share = delta * (1 - ROUNDING_SHARE) * rows.unit
    if use_triton(rows.exps):
        _launch(rows.exps, rows, row_scale, budget_share, into)
        return
    step = max(1, CPU_ELEMENTS // rows.exps.shape[1])
    for start in range(0, len(row_scale), step):
        part = slice(start, start + step)
        _select_cpu(
            rows.exps[part],
            rows.token_ids[part],
            rows.total[part],
            row_scale[part],
            rows.at_token[part],
            budget_share,
            rows.unit,
            into.rows(part),
        )


@on_device_of_first
def _launch(
    exps: Tensor,
    rows: ExpRows,
    row_scale: Tensor,
    budget_share: float,
    into: Entries,
) -> None:
    (num_rows, vocab), max_entries = exps.shape, into.ids.shape[1]
    if num_rows == 0:
        return
    candidates = num_candidates(max_entries)
    ids = torch.empty(num_rows, candidates, dtype=torch.int32, device=exps.device)
    count = torch.empty(num_rows, dtype=torch.int32, device=exps.device)
    tail = torch.empty_like(row_scale)
    most, num_warps = arch_choice(CANDIDATE_BLOCKS, exps)
    _candidates_kernel[(num_rows,)](
        # outputs
        ids,
        count,
        tail,
        # inputs
        exps,
        rows.token_ids,
        rows.total,
        row_scale,
        # scalars
        budget_share,
        # shapes
        max_entries,
        vocab,
        # strides
        exps.stride(0),
        # constexprs
        CANDIDATES=candidates,
        SPAN=SPAN,
        BLOCK_V=block_size(vocab, most),
        num_warps=num_warps,
        **LAUNCH_OPTIONS,
    )
    _choose_entries_kernel[(num_rows,)](
        # outputs
        into.ids,
        into.coef,
        into.counts,
        into.dense.view(torch.uint8),
        into.dropped,
        # inputs
        ids,
        exps,
        rows.token_ids,
        count,
        tail,
        rows.total,
        rows.at_token,
        row_scale,
        # scalars
        budget_share,
        rows.unit,
        # shapes
        max_entries,
        # strides
        into.ids.stride(0),
        into.coef.stride(0),
        exps.stride(0),
        # constexprs
        CANDIDATES=candidates,
        num_warps=CHOICE_WARPS[candidates],
        **LAUNCH_OPTIONS,
    )


def _select_cpu(
    exps: Tensor,
    token_ids: Tensor,
    total: Tensor,
    row_scale: Tensor,
    at_token: Tensor,
    budget_share: float,
    unit: float,
    into: Entries,
) -> None:
    """Portable path: the same threshold from a sort of the candidates."""
    num_rows, max_entries = into.ids.shape
    live = row_scale != 0
    if not bool(live.any()):
        for field in (into.counts, into.dense, into.dropped):
            field.zero_()
        return
    candidates = num_candidates(max_entries)
    budget = total * budget_share
    is_candidate = exps >= (budget / (candidates - max_entries))[:, None]
    is_candidate.scatter_(1, token_ids[:, None].long(), True)
    tail = torch.where(is_candidate, 0.0, exps).sum(1)
    count = is_candidate.sum(1)
    possible = live & (count <= candidates) & (tail <= budget)  # a NaN is neither
    picked = possible.nonzero()[:, 0]
    row, ids = is_candidate[picked].nonzero(as_tuple=True)
    values = exps[picked][row, ids]
    is_token = ids == token_ids[picked][row]
    values[is_token] = torch.inf
    first = count[picked].cumsum(0) - count[picked]
    table = torch.full((len(picked), candidates), torch.inf)
    table[row, torch.arange(len(row)) - first[row]] = values
    ascending = table.sort(1)[0]
    below = tail[picked, None] + ascending.cumsum(1)
    num_below = (below <= budget[picked, None]).sum(1, keepdim=True)
    theta = ascending.gather(1, num_below)  # the token's infinity is never below
    dropped = ascending < theta
    num_kept, lost = torch.zeros_like(count), torch.zeros_like(tail)
    num_kept[picked] = count[picked] - dropped.sum(1)
    lost[picked] = tail[picked] + torch.where(dropped, ascending, 0.0).sum(1)
    sparse = possible & (num_kept <= max_entries)
    into.dense.copy_(live & ~sparse)
    into.counts.copy_(torch.where(sparse, num_kept, 0))
    into.dropped.copy_(torch.where(sparse, lost / (unit * total), 0.0))

    kept = (values >= theta[row, 0]) & sparse[picked][row]
    row, ids, values, is_token = picked[row[kept]], ids[kept], values[kept], is_token[kept]
    place = torch.arange(len(row)) - (into.counts.cumsum(0) - into.counts)[row]
    into.ids[row, place] = ids.int()
    into.coef[row, place] = torch.where(is_token, at_token[row], values) * row_scale[row]


# ---- Backward ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseBackward:
    """The gradients of a pass over the rows: ``add`` for every chunk, then ``finish`` once."""

    delta: float
    entries: Entries  # [P] places of the pass

    @classmethod
    def make(
        cls, head: HeadPass, delta: float | None, max_entries: int, any_gradient: bool
    ) -> SparseBackward | None:
        """None where the gradient is not to be sparse, or there is none."""
        if delta is None or not any_gradient:
            return None
        return cls(delta, Entries.empty(head.places, max_entries, head.hidden.device))

    def add(
        self,
        head: HeadPass,
        chunk: slice,
        rows: ExpRows,
        grad_logprobs: Tensor,
        into: HeadGrads,
    ) -> None:
        """Choose the entries of a chunk whose E is in the workspace, and add its dense rows."""
        scale, entries = rows.row_scale(grad_logprobs), self.entries.rows(chunk)
        select_entries(rows, scale, delta=self.delta, into=entries)
        if use_triton(head.hidden):
            _add_dense_rows(head, chunk, rows, scale, entries, into)
        elif bool(entries.dense.any()):
            grads = torch.where(entries.dense, grad_logprobs, 0.0)
            hidden = head.chunk_hidden(chunk)
            exp_chunk_backward(head.rows_of(chunk), rows, grads, hidden, head.weight, into)

    def finish(self, head: HeadPass, into: HeadGrads) -> None:
        """Add the sparse rows of all chunks; rows without a gradient become 0."""
        ids, coef, counts, dense, _ = self.entries
        if into.hidden is not None:
            target = head.order
            if target is None:
                target = torch.arange(head.places, device=ids.device)
            skipped = dense if head.live is None else dense | ~head.mask
            target = torch.where(skipped, -1, target)
            gather_grad_hidden(coef, ids, counts, head.weight, into.hidden, target)
        if into.weight is not None:
            hidden = head.hidden if head.order is None else head.hidden[head.order]
            add_sparse_grad_weight(into.weight, coef, ids, counts, hidden)


def head_metric_sums(sparse: SparseBackward | None, mask: Tensor | None, like: Tensor) -> Tensor:
    """[2] fp32, HEAD_METRICS of loss_options.py: sums over the places, weighted by ``mask`` [P]
    (None: 1); zeros where no gradient was made."""
    if sparse is None:
        return torch.zeros_like(like[:2])
    _, _, counts, dense, dropped = sparse.entries
    both = torch.stack((dropped, ((counts > 0) & ~dense).float()))
    return both.sum(1) if mask is None else (both * mask).sum(1)


def _add_dense_rows(
    head: HeadPass,
    chunk: slice,
    rows: ExpRows,
    scale: Tensor,
    entries: Entries,
    into: HeadGrads,
) -> None:
    """Both GEMMs of the dense rows (Triton path), whose number stays on the device. As in
    ``exp_chunk_backward`` E_y takes no part in dW's, where it would be rounded: it becomes the one
    entry of its row. ``rows.exps`` is used up."""
    places, count = live_rows(entries.dense)
    index = places + chunk.start if head.order is None else head.order[chunk][places.long()].int()
    live, exps = LiveRows(index, count), rows.exps
    (factor, *_), power = scale_for_half(RowGrads(scale), exps.dtype)
    if into.hidden is not None:
        live_grad_hidden(into.hidden, exps, head.weight, live, 0, scale, places=places)
    if into.weight is None:
        return
    ids = rows.token_ids.long().clamp(0, exps.shape[1] - 1)  # a row left out may have any id
    exps.scatter_(1, ids[:, None], 0.0)
    for field, values in ((entries.ids, ids.int()), (entries.coef, scale * rows.at_token)):
        field[:, 0] = torch.where(entries.dense, values, field[:, 0])
    entries.counts.copy_(torch.where(entries.dense, 1, entries.counts))
    total = into.weight if power is None else torch.zeros_like(into.weight)
    live_add_grad_weight(total, exps, head.hidden, live, 0, factor, places=places)
    if power is not None:
        into.weight.add_(total.mul_(power))
