"""One chunk of rows of a vocabulary: logits to log-probabilities and back, on Triton or in torch.

The vocabulary work of every head kernel is here, once: ``fold_rows`` reads logits [N, V] and leaves
five numbers a row, ``dlogits_rows`` turns gradients of those numbers into gradients of the logits.
token_logprobs (logprobs.py) calls them on the whole matrix, linear_logprobs.py and linear_grpo.py
on the chunk of logits they have just computed. The maths is in the docstring of logprobs.py.

Bytes at logits of b bytes: fold reads V b a row; dlogits reads V b and writes V b'; one pass each.
The torch path makes 4 passes to fold (max, shift, exp, sum) and 1 more for the gradient, over a
chunk small enough to stay in cache; its gradient continues from the exponentials of the fold.
Entropy and softcap take one more buffer of the chunk's size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from grpo_engine.kernels.common import (
    LAUNCH_OPTIONS,
    arch_choice,
    block_size,
    on_device_of_first,
    use_triton,
)
from grpo_engine.kernels.top_logits import (
    LOG_LEAST,
    TOP,
    TopLogits,
    entries_above,
    span_maxima,
)
from grpo_engine.kernels.vocab_rows_triton import (
    DLOGITS_BLOCKS,
    FOLD_BLOCKS,
    _dlogits_rows_kernel,
    _fold_rows_kernel,
)

# exp() of this is 0 in fp32; stands in for log 0 where 0 * log 0 must be 0.
_LOG_ZERO = -1e4


@dataclass(frozen=True)
class LogitOptions:
    """From the raw logits of a head to the ones under the softmax, in this order:
    ``(logits + bias) * logit_scale``, ``softcap * tanh(. / softcap)``, ``/ temperature``."""

    temperature: float = 1.0
    row_temperature: torch.Tensor | None = None  # [N] fp32, replaces ``temperature``
    bias: torch.Tensor | None = None  # [V]
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def rows(self, index: slice | torch.Tensor) -> LogitOptions:
        """The same options for the rows in ``index``."""
        if self.row_temperature is None:
            return self
        return dataclasses.replace(self, row_temperature=self.row_temperature[index])

    def kernel_scalars(self) -> tuple[float, float, float]:
        """The scalar arguments of both Triton kernels, in order."""
        return float(self.temperature), float(self.logit_scale), float(self.logit_softcap or 0.0)

    def kernel_flags(self, row_mask: torch.Tensor | None) -> dict[str, bool]:
        """The constexprs of both Triton kernels that say which options are on."""
        return {
            "HAS_BIAS": self.bias is not None,
            "HAS_SOFTCAP": self.logit_softcap is not None,
            "HAS_ROW_TEMPERATURE": self.row_temperature is not None,
            "HAS_ROW_MASK": row_mask is not None,
        }

    def temperature_column(self) -> float | torch.Tensor:
        """The temperature as a float or an [N, 1] tensor, to divide [N, V] by."""
        if self.row_temperature is None:
            return self.temperature
        return self.row_temperature[:, None]


class RowStats(NamedTuple):
    """What a pass over the vocabulary leaves of each row; [N] fp32 each.

    ``entropy`` has no elements where it was not asked for; ``row_max`` is the largest logit before
    the temperature and ``log_sum`` the log of sum exp((logits - row_max) / temperature).
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor
    lse: torch.Tensor
    row_max: torch.Tensor
    log_sum: torch.Tensor

    @classmethod
    def empty(cls, like: torch.Tensor, num_rows: int, want_entropy: bool) -> RowStats:
        sizes = (num_rows, num_rows if want_entropy else 0, num_rows, num_rows, num_rows)
        return cls(*(like.new_empty(size, dtype=torch.float32) for size in sizes))

    @classmethod
    def zeros(cls, like: torch.Tensor, num_rows: int, want_entropy: bool) -> RowStats:
        return cls(*(field.zero_() for field in cls.empty(like, num_rows, want_entropy)))

    def rows(self, index: slice | torch.Tensor) -> RowStats:
        return RowStats(*(field[index] if field.numel() else field for field in self))

    def put(self, index: slice | torch.Tensor, chunk: RowStats) -> None:
        for field, values in zip(self, chunk, strict=True):
            if field.numel():
                field[index] = values


class RowGrads(NamedTuple):
    """dL/d of each output of a row, [N] fp32; None where that output was not used."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None = None
    lse: torch.Tensor | None = None

    def rows(self, index: slice | torch.Tensor) -> RowGrads:
        return RowGrads(*(None if field is None else field[index] for field in self))

    def live(self) -> torch.Tensor:
        """[N] bool: the rows with any non-zero gradient."""
        live = self.logprobs != 0
        for field in (self.entropy, self.lse):
            if field is not None:
                live |= field != 0
        return live


@on_device_of_first
def fold_rows(
    logits: torch.Tensor,
    scratch: torch.Tensor,
    token_ids: torch.Tensor,
    options: LogitOptions,
    want_entropy: bool,
    row_mask: torch.Tensor | None = None,
    top: TopLogits | None = None,
) -> RowStats:
    """Log-probabilities of one chunk of rows.

    On a CPU ``logits`` (fp32) and ``scratch`` (same shape) are overwritten with what
    ``dlogits_rows`` continues from; the Triton path reads ``logits`` and leaves ``scratch`` alone.
    ``top`` is filled where it is given (Triton path: but for rows outside ``row_mask``).
    """
    if not use_triton(logits):
        apply_logit_options(logits, options)
        return _fold_rows_cpu(logits, scratch, token_ids, options, want_entropy, top)
    num_rows, vocab = logits.shape
    stats = RowStats.empty(logits, num_rows, want_entropy)
    if num_rows == 0:
        return stats
    most, num_warps = arch_choice(FOLD_BLOCKS, logits)
    _fold_rows_kernel[(num_rows,)](
        # outputs
        *stats,
        *(top.outputs(logits, num_rows) if top else (None, None)),
        # inputs
        logits,
        token_ids,
        options.bias,
        options.row_temperature,
        None if row_mask is None else row_mask.view(torch.uint8),
        # scalars
        *options.kernel_scalars(),
        # shapes
        vocab,
        # strides
        logits.stride(0),
        # constexprs
        **options.kernel_flags(row_mask),
        WITH_ENTROPY=want_entropy,
        TOP=TOP if top else 0,
        BLOCK_V=block_size(vocab, most),
        num_warps=num_warps,
        **LAUNCH_OPTIONS,
    )
    return stats


@on_device_of_first
def dlogits_rows(
    out: torch.Tensor,
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    options: LogitOptions,
    stats: RowStats,
    grads: RowGrads,
    row_mask: torch.Tensor | None = None,
    *,
    skip_masked: bool = False,
) -> torch.Tensor:
    """dL/d(raw logits) of one chunk of rows, written to ``out``.

    On a CPU ``logits`` and ``out`` hold what ``fold_rows`` or ``shift_rows`` left in ``logits`` and
    ``scratch``. On the Triton path ``logits`` are the raw ones and ``out`` has any float dtype;
    rows that are masked or have no gradient become zeros; with ``skip_masked`` masked ones stay as
    they are, for GEMMs that never read them.
    """
    if not use_triton(logits):
        return _dlogits_rows_cpu(out, logits, token_ids, options, stats, grads)
    num_rows, vocab = logits.shape
    if num_rows == 0:
        return out
    most, num_warps = arch_choice(DLOGITS_BLOCKS, logits)
    block = block_size(vocab, most)
    _dlogits_rows_kernel[(num_rows, -(-vocab // block))](
        # output
        out,
        # inputs
        logits,
        token_ids,
        options.bias,
        options.row_temperature,
        None if row_mask is None else row_mask.view(torch.uint8),
        stats.logprobs,
        stats.entropy,
        stats.row_max,
        stats.log_sum,
        grads.logprobs,
        grads.entropy,
        grads.lse,
        # scalars
        *options.kernel_scalars(),
        # shapes
        vocab,
        # strides
        out.stride(0),
        logits.stride(0),
        # constexprs
        **options.kernel_flags(row_mask),
        HAS_GRAD_ENTROPY=grads.entropy is not None,
        HAS_GRAD_LSE=grads.lse is not None,
        SKIP_MASKED=skip_masked,
        BLOCK_V=block,
        num_warps=num_warps,
        **LAUNCH_OPTIONS,
    )
    return out


def apply_logit_options(logits: torch.Tensor, options: LogitOptions) -> torch.Tensor:
    """Bias, scale and softcap on raw logits [N, V] fp32, in place (portable path)."""
    if options.bias is not None:
        logits.add_(options.bias)
    if options.logit_scale != 1.0:
        logits.mul_(options.logit_scale)
    if options.logit_softcap is not None:
        logits.div_(options.logit_softcap).tanh_().mul_(options.logit_softcap)
    return logits


def shift_rows(
    logits: torch.Tensor, exps: torch.Tensor, options: LogitOptions, row_max: torch.Tensor
) -> None:
    """logits <- (logits - row_max) / temperature, exps <- exp of it (portable path)."""
    logits.sub_(row_max[:, None])
    if options.row_temperature is not None or options.temperature != 1.0:
        logits.div_(options.temperature_column())
    torch.exp(logits, out=exps)


def _fold_rows_cpu(
    logits: torch.Tensor,
    scratch: torch.Tensor,
    token_ids: torch.Tensor,
    options: LogitOptions,
    want_entropy: bool,
    top: TopLogits | None = None,
) -> RowStats:
    ids = token_ids[:, None].long()
    maxima = logits if top is None else span_maxima(logits)
    row_max, token_logit = maxima.amax(1), logits.gather(1, ids).squeeze(1)
    shift_rows(logits, scratch, options, row_max)
    shifted, exps = logits, scratch
    token_shifted = shifted.gather(1, ids).squeeze(1)
    token_exp = token_shifted.exp()
    exps.scatter_(1, ids, 0.0)
    others = exps.sum(1)
    is_max = token_shifted == 0
    log_sum = torch.where(is_max, torch.log1p(others), torch.log(others + token_exp))
    temperature = options.temperature_column()
    lse = (row_max[:, None] / temperature).squeeze(1) + log_sum
    if top is not None:
        note_top(top, shifted, maxima, row_max, log_sum, token_ids, token_logit, options)
    entropy = logits.new_empty(0)
    if want_entropy:
        shifted.clamp_(min=_LOG_ZERO)  # 0 * -inf
        # not a dot product: BLAS adds in order, which loses 4e-5 of the entropy at V = 50,000
        weighted = (exps * shifted).sum(1)
        weighted += token_exp * token_shifted.clamp(min=_LOG_ZERO)
        entropy = log_sum - weighted / (others + token_exp)
    return RowStats(token_shifted - log_sum, entropy, lse, row_max, log_sum)


def note_top(
    top: TopLogits,
    shifted: torch.Tensor,
    maxima: torch.Tensor,
    row_max: torch.Tensor,
    log_sum: torch.Tensor,
    token_ids: torch.Tensor,
    token_logit: torch.Tensor,
    options: LogitOptions,
) -> None:
    """Fill ``top`` from what ``shift_rows`` left (portable path); ``maxima`` are the logits'."""
    temperature = options.temperature_column()
    shifted_maxima = (maxima - row_max[:, None]) / temperature
    rows, columns, values = entries_above(shifted, shifted_maxima, log_sum + LOG_LEAST)
    if options.row_temperature is not None:
        temperature = options.row_temperature[rows]
    logits = values.double() * temperature + row_max[rows]  # whose exponentials were added up
    top.take(token_ids, token_logit, rows, columns, logits)


def _dlogits_rows_cpu(
    exps: torch.Tensor,
    shifted: torch.Tensor,
    token_ids: torch.Tensor,
    options: LogitOptions,
    stats: RowStats,
    grads: RowGrads,
) -> torch.Tensor:
    inv_temperature = 1.0 / (
        options.temperature if options.row_temperature is None else options.row_temperature
    )
    cap_slope = None
    if options.logit_softcap is not None:
        capped = shifted.mul(options.temperature_column()).add_(stats.row_max[:, None])
        cap_slope = capped.div_(options.logit_softcap).square_().neg_().add_(1.0)
    # p_k (slope + curve * shifted_k) for k != y, at_token for k = y
    logprobs = stats.logprobs.clamp(min=_LOG_ZERO)
    slope = -grads.logprobs
    token_slope = torch.zeros_like(slope)
    if grads.lse is not None:
        slope = slope + grads.lse
        token_slope = token_slope + grads.lse
    if grads.entropy is not None:
        slope = slope - grads.entropy * (stats.entropy - stats.log_sum)
        token_slope = token_slope - grads.entropy * (logprobs + stats.entropy)
    at_token = token_slope * logprobs.exp() - grads.logprobs * torch.expm1(logprobs)
    to_p = inv_temperature * options.logit_scale * torch.exp(-stats.log_sum)
    if grads.entropy is None:
        exps.mul_((slope * to_p)[:, None])
    else:
        curve = -grads.entropy * to_p
        shifted.clamp_(min=_LOG_ZERO).mul_(curve[:, None]).add_((slope * to_p)[:, None])
        exps.mul_(shifted)
    at_token = at_token * inv_temperature * options.logit_scale
    ids = token_ids[:, None].long()
    inside = (ids >= 0) & (ids < exps.shape[1])  # else in another shard (vocab_parallel.py)
    column = ids.where(inside, 0)
    exps.scatter_(1, column, torch.where(inside, at_token[:, None], exps.gather(1, column)))
    if cap_slope is not None:
        exps.mul_(cap_slope)
    return exps


def row_chunks(
    num_rows: int, rows_per_chunk: int, live: torch.Tensor | None = None
) -> Iterator[slice | torch.Tensor]:
    """Indices that walk [0, num_rows) in chunks: slices, or int64 tensors where ``live`` [N] bool
    leaves rows out (reading it is a host sync: CPU only)."""
    if live is None or bool(live.all()):
        for start in range(0, num_rows, rows_per_chunk):
            yield slice(start, min(start + rows_per_chunk, num_rows))
    else:
        indices = live.nonzero().squeeze(1)
        if len(indices):
            yield from indices.split(rows_per_chunk)
