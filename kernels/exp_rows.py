"""One chunk of rows with a log-probability known beforehand: logits to exponentials in one read.

Maths. Row i has the token y, the logits l_k (after bias, scale and softcap) and a prior: what its
log-probability was a moment ago (the old or the sampler's one, which GRPO always holds). Then
l_y / T - prior is nearly the log-sum-exp, and with it as the offset no maximum has to be known:

    d_k = (l_k - l_y) / T + prior          d_y = prior, exactly
    e_k = exp(d_k), others = sum_{k != y} e_k, total = others + e_y           total is near 1
    logprob = prior - log total            with log1p(others / e_y) where e_y dominates
    entropy = log total - sum_k e_k d_k / total
    E_k = unit * slope_k * e_k for k != y, E_y = -unit * slope_y * others     slope: of the softcap
    d logprob / d raw_k = -logit_scale / (T * unit * total) * E_k

so E is the gradient of the logits but for one factor a row, which ``exp_chunk_backward`` gives to
the rows around its two GEMMs. E_y has no cancellation, however sure the policy.

Guard. The prior is a hint, never trusted: a row whose |log total| exceeds the limit below (or is
not finite: a prior of NaN or infinity, a sum that overflowed) is redone from its maximum, from the
logits which are still there, and ``ExpRows.safe`` says so. The result does not depend on the prior
beyond rounding.

Agreement. Where logprob and prior agree within 2^-22 (2 + |prior|), at most 2^-18, which is what
the two roundings can do, the prior is returned as it is: recomputed on the policy that made it, a
log-probability is the same number and the ratio is 1. Where exact_logits.py is to correct the
log-probability (``top``), this is settled after it (``exact_exps``).

Half formats. E is written in the dtype of the GEMMs. bf16 has the range of fp32. fp16 has not: its
unit of 512 lets p = 1e-5 keep all its bits, and its guard is tighter, so that unit * total stays
under 65504. fp32 and bf16: unit 1.

In dW = E.T @ (r X) both factors are rounded, where G.T @ X rounds one: alone, that makes 1.2 times
the error of a d weight in bf16. So E_y, which is half or more of a row's norm, stays out of this
GEMM and is added in fp32 (sparse_rows.py, one entry a row), and the error ends below that of G.T @
X: 2.1e-3 against 2.4e-3 at 0.7 nats of entropy, 1.7e-3 against 2.3e-3 at 6 (bf16 roundings
simulated on a CPU, N = D = 256, V = 32,768; 1.7e-3 is the rounding of d weight itself).

Bytes on CUDA at half inputs, besides the GEMMs' own reads of X and W: 14 a logit (fp32 written by
the GEMM, read here; E written in half and read by two GEMMs); 8 more for a row redone. The GEMM of
d weight adds to an fp32 sum: 8 D / C bytes a logit more in chunks of C rows, the largest item where
D is (linear_grpo.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from grpo_engine.kernels.common import (
    LAUNCH_OPTIONS,
    arch_choice,
    block_size,
    on_device_of_first,
    use_triton,
)
from grpo_engine.kernels.exp_rows_triton import EXP_BLOCKS, _exp_rows_kernel
from grpo_engine.kernels.head_chunks import HeadGrads, scale_for_half
from grpo_engine.kernels.live_gemm import LiveRows, live_rows
from grpo_engine.kernels.sparse_rows import add_sparse_grad_weight
from grpo_engine.kernels.top_logits import LEAST, TOP, TopLogits, entries_above, span_maxima
from grpo_engine.kernels.vocab_rows import (
    LogitOptions,
    RowGrads,
    RowStats,
    _fold_rows_cpu,
    apply_logit_options,
    dlogits_rows,
    fold_rows,
)

# dtype of E -> (largest |log total| in nats, unit)
EXP_RANGE = {torch.float32: (8.0, 1.0), torch.bfloat16: (8.0, 1.0), torch.float16: (4.0, 512.0)}
# |logprob - prior| up to AGREE[0] + AGREE[1] |prior|, at most AGREE[2], is rounding
AGREE = (2.0**-21, 2.0**-22, 2.0**-18)
# On a CPU: columns of D in two GEMMs that take as long as copying a row of E (10 ns and 1.6 ns a
# logit at D = 128, one thread).
CPU_COPY_COLUMNS = 24


@dataclass(frozen=True)
class ExpRows:
    """What one read of a chunk leaves: ``exps`` [C, V], E above; the rest [C] fp32.

    The probability of k != y is ``exps / (unit * total)``, times the slope under a softcap; that of
    y is ``1 - others / total``. ``entropy`` has no elements where it was not asked for. ``safe``
    [C] bool: rows with a prior that was not used.
    """

    exps: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor
    total: torch.Tensor
    others: torch.Tensor
    at_token: torch.Tensor  # E_y before it is rounded
    safe: torch.Tensor
    token_ids: torch.Tensor  # of the chunk's rows
    options: LogitOptions  # of the chunk's rows
    unit: float

    def row_scale(self, grad_logprobs: torch.Tensor) -> torch.Tensor:
        """[C] fp32: dL/d(raw logits) = row_scale[:, None] * exps; 0 where dL/d logprob is."""
        options = self.options
        temperature = options.temperature
        if options.row_temperature is not None:
            temperature = options.row_temperature
        scale = grad_logprobs * (-options.logit_scale / self.unit) / (self.total * temperature)
        return torch.where(grad_logprobs == 0, 0.0, scale)


@on_device_of_first
def exp_rows(
    out: torch.Tensor,
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    options: LogitOptions,
    prior: torch.Tensor | None,
    want_entropy: bool,
    row_mask: torch.Tensor | None = None,
    top: TopLogits | None = None,
    *,
    skip_masked: bool = False,
) -> ExpRows:
    """Log-probabilities of one chunk of rows and E, which is written to ``out`` [C, V].

    ``logits`` are the raw ones, fp32; on a CPU they are overwritten. ``out`` is in the dtype of the
    GEMMs, fp32 on a CPU. ``prior`` [C] fp32; None: two reads of the logits, and the bits of
    ``fold_rows``. Rows outside ``row_mask`` (Triton path) give logprob 0 and zeros in ``out``, or
    leave it as it is with ``skip_masked``. ``top``: as in ``fold_rows``.
    """
    limit, unit = EXP_RANGE[out.dtype]
    if prior is None:
        stats = fold_rows(logits, out, token_ids, options, want_entropy, row_mask, top)
        return exps_of_stats(
            out, logits, token_ids, options, stats, row_mask, skip_masked=skip_masked
        )
    if not use_triton(logits):
        return _exp_rows_cpu(out, logits, token_ids, options, prior, want_entropy, limit, top)
    num_rows, vocab = logits.shape

    def vector(size: int) -> torch.Tensor:
        return logits.new_empty(size, dtype=torch.float32)

    rows = ExpRows(
        out,
        logprobs=vector(num_rows),
        entropy=vector(num_rows if want_entropy else 0),
        total=vector(num_rows),
        others=vector(num_rows),
        at_token=vector(num_rows),
        safe=logits.new_empty(num_rows, dtype=torch.bool),
        token_ids=token_ids,
        options=options,
        unit=unit,
    )
    if num_rows == 0:
        return rows
    most, num_warps = arch_choice(EXP_BLOCKS, logits)
    _exp_rows_kernel[(num_rows,)](
        # outputs
        out,
        rows.logprobs,
        rows.entropy,
        rows.total,
        rows.others,
        rows.at_token,
        rows.safe.view(torch.uint8),
        *(top.outputs(logits, num_rows) if top else (None, None)),
        # inputs
        logits,
        token_ids,
        options.bias,
        options.row_temperature,
        None if row_mask is None else row_mask.view(torch.uint8),
        prior.contiguous(),
        # scalars
        *options.kernel_scalars(),
        unit,
        math.exp(-limit),
        math.exp(limit),
        *AGREE,
        # shapes
        vocab,
        # strides
        out.stride(0),
        logits.stride(0),
        # constexprs
        **options.kernel_flags(row_mask),
        SKIP_MASKED=skip_masked,
        WITH_ENTROPY=want_entropy,
        TOP=TOP if top else 0,
        BLOCK_V=block_size(vocab, most),
        num_warps=num_warps,
        **LAUNCH_OPTIONS,
    )
    return rows


def exps_of_stats(
    out: torch.Tensor,
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    options: LogitOptions,
    stats: RowStats,
    row_mask: torch.Tensor | None = None,
    *,
    skip_masked: bool = False,
) -> ExpRows:
    """E from known statistics, ``total`` 1: the gradient of the logits where dL/d logprob is the
    same everywhere. ``out`` and ``logits`` as ``fold_rows`` left them."""
    unit = EXP_RANGE[out.dtype][1]
    temperature = options.temperature
    if options.row_temperature is not None:
        temperature = options.row_temperature
    same = torch.ones_like(stats.logprobs).mul_(temperature).mul_(-unit / options.logit_scale)
    dlogits_rows(
        out, logits, token_ids, options, stats, RowGrads(same), row_mask, skip_masked=skip_masked
    )
    in_range = token_ids.long().clamp(0, logits.shape[1] - 1)[:, None]
    return ExpRows(
        out,
        stats.logprobs,
        stats.entropy,
        total=torch.ones_like(stats.logprobs),
        others=-torch.expm1(stats.logprobs),
        at_token=out.gather(1, in_range).squeeze(1).float(),
        safe=torch.zeros_like(stats.logprobs, dtype=torch.bool),
        token_ids=token_ids,
        options=options,
        unit=unit,
    )


def _exp_rows_cpu(
    out: torch.Tensor,
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    options: LogitOptions,
    prior: torch.Tensor,
    want_entropy: bool,
    limit: float,
    top: TopLogits | None,
) -> ExpRows:
    """Portable path, in fp32: the offset of a row as one number in the units of its logits."""
    apply_logit_options(logits, options)
    ids = token_ids[:, None].long()
    temperature = options.temperature_column()
    token_logit = logits.gather(1, ids)
    offset = token_logit - prior[:, None] * temperature
    torch.sub(logits, offset, out=out)
    if options.row_temperature is not None or options.temperature != 1.0:
        out.div_(temperature)
    out.exp_().scatter_(1, ids, 0.0)
    others = out.sum(1)
    token_shifted = ((token_logit - offset) / temperature).squeeze(1)
    token_exp = token_shifted.exp()
    total = others + token_exp
    safe = ~((total > math.exp(-limit)) & (total < math.exp(limit)))
    logprobs = torch.where(
        others < token_exp, -torch.log1p(others / token_exp), token_shifted - total.log()
    )
    if top is None:
        logprobs = torch.where(agreed(logprobs, prior), prior, logprobs)
    if bool(safe.any()):
        index = safe.nonzero().squeeze(1)
        stats = _redo_rows(out, logits, token_ids, options, index)
        offset[index], logprobs[index] = stats.row_max[:, None], stats.logprobs
        others[index] = out[index].sum(1)
        shifted = (token_logit[index] - offset[index]) / options.rows(index).temperature_column()
        token_shifted[index] = shifted.squeeze(1)
        token_exp = token_shifted.exp()
        total = others + token_exp
    if top is not None:
        index, columns, _ = entries_above(out, span_maxima(out), total * LEAST)
        top.take(token_ids, token_logit.squeeze(1), index, columns, logits[index, columns])
    entropy = logits.new_empty(0)
    if want_entropy:
        # not from ``out``: exp(d) = 0 has lost d; -inf times 0 counts as 0
        weighted = torch.sub(logits, offset).div_(temperature).mul_(out)
        weighted = weighted.nan_to_num_(0.0).sum(1)
        weighted += torch.where(token_exp > 0, token_exp * token_shifted, 0.0)
        entropy = total.log() - weighted / total
    out.scatter_(1, ids, -others[:, None])
    if options.logit_softcap is not None:
        out.mul_(logits.div_(options.logit_softcap).square_().neg_().add_(1.0))
    at_token = out.gather(1, ids).squeeze(1)
    return ExpRows(
        out, logprobs, entropy, total, others, at_token, safe, token_ids, options, unit=1.0
    )


def agreed(logprobs: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """[C] bool: where they are the same number but for rounding."""
    base, slope, most = AGREE
    return (logprobs - prior).abs() <= (base + slope * prior.abs()).clamp(max=most)


def _redo_rows(
    out: torch.Tensor,
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    options: LogitOptions,
    index: torch.Tensor,
) -> RowStats:
    """Exponentials of the rows ``index`` from their own maximum, to ``out`` (portable path)."""
    again, exps = logits[index], torch.empty_like(logits[index])
    stats = _fold_rows_cpu(again, exps, token_ids[index], options.rows(index), want_entropy=False)
    out[index] = exps
    return stats


def exp_chunk_backward(
    index: slice | torch.Tensor,
    rows: ExpRows,
    grad_logprobs: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    into: HeadGrads,
    live: LiveRows | None = None,
) -> None:
    """Add a chunk's gradients of hidden and weight: dX = r (E @ W), dW += E.T @ (r X), r the row
    scale; every argument is the chunk's own, but for ``hidden`` [N, D] where ``live`` is given
    (``HeadGrads.add``).

    Rows whose gradient is 0 add exactly 0; with ``live`` they are left out of both GEMMs, on a CPU
    where that pays. ``rows.exps`` is used up.
    """
    scale, exps = rows.row_scale(grad_logprobs), rows.exps
    chunk, part = index, {}
    if live is not None:
        places, count = live_rows(scale != 0)
        part = {"live": LiveRows(live.index[index][places.long()], count), "places": places}
        index = slice(0, len(places))
    if not use_triton(hidden):
        chosen = (scale != 0).nonzero().squeeze(1)
        if (len(scale) - len(chosen)) * hidden.shape[1] > CPU_COPY_COLUMNS * len(chosen):
            if isinstance(index, slice):
                index = torch.arange(index.start, index.stop)
            index, exps, scale, hidden = (t[chosen] for t in (index, exps, scale, hidden))
    (factor, *_), power = scale_for_half(RowGrads(scale), exps.dtype)
    arguments = (index, exps, hidden, weight, power)
    if exps.dtype == torch.float32 or into.weight is None:
        into.add(*arguments, row_scale=factor, **part)
        return
    replace(into, weight=None).add(*arguments, row_scale=factor, **part)
    _take_out_tokens(chunk, rows, scale, hidden, into.weight, live)
    replace(into, hidden=None).add(*arguments, row_scale=factor, **part)


def _take_out_tokens(
    index: slice,
    rows: ExpRows,
    scale: torch.Tensor,
    hidden: torch.Tensor,
    grad_weight: torch.Tensor,
    live: LiveRows | None,
) -> None:
    """E_y of each row out of ``rows.exps`` and, times r X, into ``grad_weight`` in fp32."""
    vocab = rows.exps.shape[1]
    in_range = rows.token_ids.long().clamp(0, vocab - 1)  # a row that is left out may have any id
    rows.exps.scatter_(1, in_range[:, None], 0.0)
    if live is not None:
        hidden = hidden[live.index[index].long()]
    add_sparse_grad_weight(
        grad_weight,
        torch.where(scale == 0, 0.0, scale * rows.at_token)[:, None],
        in_range[:, None].int(),
        (scale != 0).int(),
        hidden,
    )
