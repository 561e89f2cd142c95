"""Log-probabilities over a kept mask: the dense form of truncated.py, where the maths is.

The chunks and GEMMs of linear_logprobs (one forward, three backward). Each chunk of fp32 logits
[C, V] takes one more pass that sets what is not kept to -inf; bias, scale and softcap take passes
of their own before it, as a softcap inside the row kernels would make -inf finite again. Bytes on
CUDA at half inputs: those of linear_logprobs and 9 a logit more in forward and in backward (fp32
read and written, a byte of the mask); bits are unpacked a chunk at a time.
With a softcap, backward holds a second fp32 chunk for its slope and multiplies by it before
rounding.
"""

from __future__ import annotations

import torch

from grpo_engine.kernels.common import use_triton
from grpo_engine.kernels.exact_logits import exact_stats
from grpo_engine.kernels.head_chunks import (
    HeadGrads,
    Workspace,
    chunk_hidden,
    head_row_chunks,
    raw_logits,
    scale_for_half,
)
from grpo_engine.kernels.top_logits import TopLogits
from grpo_engine.kernels.truncated_ids import temperature_only
from grpo_engine.kernels.vocab_rows import (
    LogitOptions,
    RowGrads,
    RowStats,
    apply_logit_options,
    dlogits_rows,
    fold_rows,
    shift_rows,
)

_MINUS_INF_BITS = torch.tensor(-torch.inf).view(torch.int32).item()


def kept_mask(kept: torch.Tensor, vocab: int) -> torch.Tensor:
    """[N, V] bool of any form of ``kept`` (a bool mask is returned as it is)."""
    if kept.dtype == torch.bool:
        return kept
    if kept.dtype == torch.uint8:
        values = torch.arange(256, device=kept.device)[:, None]
        bits_of_byte = (values >> torch.arange(8, device=kept.device) & 1).to(torch.uint8)
        # looked up eight bytes at a time: shifting each bit out takes ten times as long on a CPU
        eight = bits_of_byte.view(torch.int64).index_select(0, kept.reshape(-1).int())
        return eight.view(torch.bool).view(kept.shape[0], -1)[:, :vocab]
    mask = torch.zeros(kept.shape[0], vocab + 1, dtype=torch.bool, device=kept.device)
    inside = (kept >= 0) & (kept < vocab)
    return mask.scatter_(1, kept.long().where(inside, vocab), True)[:, :vocab]


def kept_bits(mask: torch.Tensor) -> torch.Tensor:
    """[N, V] bool as bits, [N, ceil(V / 8)] uint8."""
    num_rows, vocab = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -vocab % 8)).view(num_rows, -1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.to(torch.uint8) << places).sum(-1, dtype=torch.uint8)


def mask_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    kept: torch.Tensor,
    options: LogitOptions,
    row_mask: torch.Tensor | None,
    want_entropy: bool,
) -> tuple[RowStats, torch.Tensor]:
    """Statistics of the rows, and a tensor without elements."""
    # the CPU path visits the unmasked rows only, the Triton path writes every row
    make_stats = RowStats.empty if row_mask is None or use_triton(hidden) else RowStats.zeros
    stats = make_stats(hidden, hidden.shape[0], want_entropy)
    work = Workspace.make(hidden, weight.shape[0], for_gradient=False)
    for index in head_row_chunks(hidden, work.rows, row_mask):
        rows, mask = hidden[index], kept_mask(kept[index], weight.shape[0])
        ids = _kept_tokens(token_ids, mask, index, row_mask)
        logits = raw_logits(rows, weight, work.logits[: len(rows)])
        top, row_options = TopLogits(), options.rows(index)
        chunk_mask = None if row_mask is None else row_mask[index]
        chunk = fold_rows(
            _keep(logits, mask, row_options),
            work.dlogits[: len(rows)],
            ids,
            temperature_only(row_options),
            want_entropy,
            chunk_mask,
            top,
        )
        stats.put(index, exact_stats(chunk, top, rows, weight, row_options, chunk_mask))
    return stats, hidden.new_empty(0, dtype=torch.float32)


def mask_backward(
    grads: RowGrads,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    kept: torch.Tensor,
    options: LogitOptions,
    row_mask: torch.Tensor | None,
    stats: RowStats,
    _: torch.Tensor,
    needs: tuple[bool, bool, bool],
) -> HeadGrads:
    """Gradients of hidden, weight and bias for those of the statistics."""
    into = HeadGrads.make(hidden, weight, needs, hidden.dtype)
    work = Workspace.make(hidden, weight.shape[0], for_gradient=True)
    live = None
    if not use_triton(hidden):
        live = grads.live() if row_mask is None else grads.live() & row_mask
    for index in head_row_chunks(hidden, work.rows, live):
        rows, mask = chunk_hidden(hidden, index, row_mask), kept_mask(kept[index], len(weight))
        ids = _kept_tokens(token_ids, mask, index, row_mask)
        logits = raw_logits(rows, weight, work.logits[: len(rows)])
        _keep(logits, mask, options.rows(index))
        dlogits, unscale = _chunk_dlogits(
            logits,
            work.dlogits[: len(rows)],
            ids,
            options.rows(index),
            stats.rows(index),
            grads.rows(index),
            None if row_mask is None else row_mask[index],
        )
        into.add(index, dlogits, rows, weight, unscale)
    return into


def _keep(logits: torch.Tensor, mask: torch.Tensor, options: LogitOptions) -> torch.Tensor:
    """Raw logits [C, V] to those before the temperature, -inf where not kept; in place."""
    apply_logit_options(logits, options)
    if logits.is_cuda:
        return torch.where(mask, logits, logits.new_full((), -torch.inf), out=logits)
    # 0 or -inf by its bits, and added: on a CPU where() takes ten times as long
    barrier = mask.to(torch.int32).sub_(1).bitwise_and_(_MINUS_INF_BITS)
    return logits.add_(barrier.view(torch.float32))


def _chunk_dlogits(
    logits: torch.Tensor,
    out: torch.Tensor,
    token_ids: torch.Tensor,
    options: LogitOptions,
    stats: RowStats,
    grads: RowGrads,
    row_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dL/d(raw logits) [C, V] in ``out``, and the factor it lacks; overwrites ``logits``."""
    grads, unscale = scale_for_half(grads, out.dtype)
    slope, cap = None, options.logit_softcap
    if cap is not None:
        # a masked logit has gradient 0; its -inf must not make that NaN
        slope = logits.clamp(min=-cap).div_(cap).square_().neg_().add_(1.0)
    if slope is None and options.logit_scale != 1.0:
        grads = RowGrads(*(None if g is None else g * options.logit_scale for g in grads))
    elif slope is not None:
        slope *= options.logit_scale
    options = temperature_only(options)
    if not use_triton(logits):
        shift_rows(logits, out, options, stats.row_max)
    target = logits if slope is not None and use_triton(logits) else out
    dlogits = dlogits_rows(target, logits, token_ids, options, stats, grads, row_mask)
    return (dlogits if slope is None else torch.mul(dlogits, slope, out=out)), unscale


def _kept_tokens(
    token_ids: torch.Tensor,
    mask: torch.Tensor,
    index: slice | torch.Tensor,
    row_mask: torch.Tensor | None,
) -> torch.Tensor:
    """The chunk's token ids, with -1, which gives NaN, for one that is not kept; on a CPU such a
    one raises ValueError."""
    ids, vocab = token_ids[index].long(), mask.shape[1]
    kept = mask.gather(1, ids.clamp(0, vocab - 1)[:, None])[:, 0] & (ids >= 0) & (ids < vocab)
    if not ids.is_cuda:
        bad = ~kept if row_mask is None else row_mask[index] & ~kept
        if bool(bad.any()):
            i = int(bad.int().argmax())
            row = int(torch.arange(len(token_ids))[index][i])
            raise ValueError(f"kept[{row}] is without the row's token_ids entry, {int(ids[i])}")
    return torch.where(kept, ids, -1)
