"""Log-probabilities over kept ids [N, K]: the sparse form of truncated.py, where the maths is.

The K logits of a row are gathered dot products; bias, scale and softcap are applied to them in
torch, and the row kernels of vocab_rows.py take [N, K] for a vocabulary of K. The largest are
corrected as those of a whole vocabulary are (exact_logits.py). Backward: the same in
reverse, then the gathered and segmented sums of sparse_rows.py.
"""

from __future__ import annotations

import torch

from grpo_engine.kernels.common import use_triton
from grpo_engine.kernels.exact_logits import exact_stats
from grpo_engine.kernels.head_chunks import HeadGrads
from grpo_engine.kernels.sparse_rows import (
    add_sparse_grad_weight,
    gather_grad_hidden,
    gather_logits,
)
from grpo_engine.kernels.top_logits import TopLogits
from grpo_engine.kernels.vocab_rows import (
    LogitOptions,
    RowGrads,
    RowStats,
    dlogits_rows,
    fold_rows,
    shift_rows,
)


def ids_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    ids: torch.Tensor,
    options: LogitOptions,
    row_mask: torch.Tensor | None,
    want_entropy: bool,
) -> tuple[RowStats, torch.Tensor]:
    """Statistics of the rows, and the logits [N, K] fp32 before the temperature, -inf in the
    padding."""
    _check_ids(ids, token_ids, row_mask, weight.shape[0])
    logits = gather_logits(hidden, weight, ids, _counts(ids, row_mask))
    padding = logits == -torch.inf
    if options.bias is not None:
        logits += options.bias.float()[ids.long().clamp(0, weight.shape[0] - 1)]
    if options.logit_scale != 1.0:
        logits *= options.logit_scale
    if options.logit_softcap is not None:
        logits.div_(options.logit_softcap).tanh_().mul_(options.logit_softcap)
    logits.masked_fill_(padding, -torch.inf)  # a softcap makes it finite
    columns, top = _columns(ids, token_ids), TopLogits()
    after = temperature_only(options)
    if use_triton(hidden):
        stats = fold_rows(logits, logits, columns, after, want_entropy, row_mask, top)
        places = top.ids.clamp(0, ids.shape[1] - 1).long()
        top.ids = torch.where(top.ids < 0, -1, ids.gather(1, places))
        return exact_stats(stats, top, hidden, weight, options, row_mask), logits
    stats = RowStats.zeros(hidden, hidden.shape[0], want_entropy)
    index = _index_of(row_mask, hidden.shape[0])
    rows = logits[index]
    if len(rows):
        scratch, row_options = torch.empty_like(rows), options.rows(index)
        after = after.rows(index)
        chunk = fold_rows(rows, scratch, columns[index], after, want_entropy, None, top)
        top.ids = ids[index][top.rows, top.ids].long()
        stats.put(index, exact_stats(chunk, top, hidden[index], weight, row_options))
    return stats, logits


def ids_backward(
    grads: RowGrads,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    ids: torch.Tensor,
    options: LogitOptions,
    row_mask: torch.Tensor | None,
    stats: RowStats,
    logits: torch.Tensor,
    needs: tuple[bool, bool, bool],
) -> HeadGrads:
    """Gradients of hidden, weight and bias for those of the statistics."""
    live = grads.live() if row_mask is None else grads.live() & row_mask
    columns = _columns(ids, token_ids)
    coef = _dlogits(logits, columns, temperature_only(options), stats, grads, live)
    if options.logit_scale != 1.0:
        coef *= options.logit_scale
    if options.logit_softcap is not None:
        coef *= 1.0 - (logits / options.logit_softcap).square()  # NaN in padding, where none reads
    counts = _counts(ids, live)
    into = HeadGrads.make(hidden, weight, needs, hidden.dtype)
    if into.hidden is not None:
        gather_grad_hidden(coef, ids, counts, weight, into.hidden)
    if into.weight is not None:
        add_sparse_grad_weight(into.weight, coef, ids, counts, hidden)
    if into.bias is not None:
        ones = torch.ones(len(hidden), 1, device=hidden.device)
        add_sparse_grad_weight(into.bias[:, None], coef, ids, counts, ones)
    return into


def _dlogits(
    logits: torch.Tensor,
    columns: torch.Tensor,
    options: LogitOptions,
    stats: RowStats,
    grads: RowGrads,
    live: torch.Tensor,
) -> torch.Tensor:
    """dL/d logits [N, K] fp32; anything in the rows that are not ``live``."""
    coef = torch.empty_like(logits)
    if use_triton(logits):
        return dlogits_rows(coef, logits, columns, options, stats, grads, live)
    index = _index_of(live, len(logits))
    shifted, chunk, options = logits[index], stats.rows(index), options.rows(index)
    exps = torch.empty_like(shifted)
    shift_rows(shifted, exps, options, chunk.row_max)
    coef[index] = dlogits_rows(exps, shifted, columns[index], options, chunk, grads.rows(index))
    return coef


def temperature_only(options: LogitOptions) -> LogitOptions:
    """For logits to which the other options have been applied."""
    return LogitOptions(options.temperature, options.row_temperature)


def _index_of(live: torch.Tensor | None, num_rows: int) -> torch.Tensor:
    """Numbers of the live rows (a host sync on CUDA: CPU only). Indexing with it copies."""
    return torch.arange(num_rows) if live is None else live.nonzero()[:, 0]


def _counts(ids: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    """Entries of each row that are looked at: all, or none where ``live`` is False."""
    counts = torch.full(ids.shape[:1], ids.shape[1], dtype=torch.int32, device=ids.device)
    return counts if live is None else counts * live


def _columns(ids: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """[N] int64 place of each row's token among its kept ids; K where it is not there."""
    found = (ids == token_ids[:, None]) & (ids >= 0)
    return torch.where(found.any(1), found.int().argmax(1), ids.shape[1])


def _check_ids(
    ids: torch.Tensor, token_ids: torch.Tensor, row_mask: torch.Tensor | None, vocab: int
) -> None:
    """ValueError for values that the Triton path turns into NaN (CPU only)."""
    if ids.is_cuda:
        return
    live = _index_of(row_mask, len(ids))
    ids, token_ids = ids[live], token_ids[live]
    sorted_ids = ids.sort(dim=1).values
    again = (sorted_ids[:, 1:] == sorted_ids[:, :-1]) & (sorted_ids[:, 1:] >= 0)
    for bad, reason in (
        ((ids >= vocab).any(1), f"has an id out of [0, {vocab})"),
        (again.any(1), "has an id twice"),
        (_columns(ids, token_ids) == ids.shape[1], "is without the row's token_ids entry"),
    ):
        if bool(bad.any()):
            i = int(bad.int().argmax())
            raise ValueError(
                f"kept[{int(live[i])}] {reason}: {ids[i].tolist()}, token {int(token_ids[i])}"
            )
