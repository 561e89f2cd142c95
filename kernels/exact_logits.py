"""Log-probabilities held to 1e-5: a GEMM's rounding taken out of the logits that decide them.

A GEMM adds up D products in fp32. At |logit| = 60 each addition rounds by up to 2e-6, and what is
left of it in a logit was measured to reach 2e-5 (D = 64, 60 being the largest logit), on the hidden
states of a real model 7e-5 (D = 576). In a log-probability, with v the logits of the GEMM after
bias, scale and softcap, and T d_k the error of v_k,

    logprob' = logprob + d_y - log(1 + sum_k p_k expm1(d_k)),        lse' = lse + log(1 + ...)

where p_k = exp(v_k / T - lse): the error of the token's own logit counts in full, the others by
their probability. So the logits of y and of the TOP largest others (top_logits.py; those with p_k
above LEAST) are computed again as dot products in fp64, and d is known there and taken for 0
elsewhere. Without cancellation, however sure the policy:

    logprob' = logprob - log1p((1 - p_y) expm1(-d_y) + exp(-d_y) R)
    R = sum_{k != y} p_k expm1(d_k)

A shard of the vocabulary (vocab_parallel.py) makes its own part of d_y and R; they are added up.

Errors (CPU, largest of a case of benchmarks/results/truth_table_cpu.md; TOP = 0 is y alone):

                                        no correction   TOP = 0       1       4       8
    |z| to 60, fp32 / fp16, D = 64      1.1e-5 / 2.1e-5  9e-6  3.4e-6  5e-7   3e-7
    real rows, temperature 1            9e-6 / 1.2e-5    4e-6  3.2e-6  1e-6   5e-7
    real rows, temperature 0.6          1.1e-5 / 1.2e-5  1e-5  5.5e-6  6e-7   6e-7

What remains is the rounding of the sums over V, and of the result. TOP is 8, not 1, for tensor
cores: they cut off instead of rounding, which shifts all large logits the same way, so that an
exact y beside others that are not would be worse than none. Simulated (a sum cut off after every
16 products, D = 576 to 4096), TOP = 1 gave up to 8e-5, 4 up to 1.4e-5, 8 up to 6e-6. Not yet
measured on a device.

No bound for every input: where more than TOP likely tokens share one large logit (CPU: where none
of many holds LEAST), the others keep their common error, and it counts in full against the exact y.
200 equal rows of a head at logit 60 leave 2e-5 on a CPU (test_exact_logits.py); on tensor cores,
whose error is common by nature, such rows may lose more than they gain.

Entropy is left as it is (its bound is 1e-4), and so are the statistics from which the gradient of
the logits continues: they belong to the logits that the GEMM makes again in backward. On logits
that were not made by a GEMM (token_logprobs) there is nothing to correct.

Cost: at most (1 + TOP) D products a row on the Triton path, as many elements of the weight read,
and one launch; on a CPU as many as hold LEAST, 5 a row at 2.2 nats of entropy.
"""

from __future__ import annotations

import torch

from grpo_engine.kernels.common import (
    LAUNCH_OPTIONS,
    arch_choice,
    on_device_of_first,
    use_triton,
)
from grpo_engine.kernels.exact_logits_triton import EXACT_BLOCKS, _exact_rows_kernel
from grpo_engine.kernels.exp_rows import AGREE, ExpRows, agreed
from grpo_engine.kernels.top_logits import LEAST, TOP, TopLogits
from grpo_engine.kernels.vocab_rows import LogitOptions, RowStats

# On a CPU: elements of the weight gathered at a time (1 MB in fp64, a cache).
CPU_GATHER_ELEMENTS = 1 << 17


def exact_stats(
    stats: RowStats,
    top: TopLogits,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    options: LogitOptions,
    row_mask: torch.Tensor | None = None,
) -> RowStats:
    """``fold_rows``'s statistics with logprobs and lse corrected; ``hidden`` [C, D] of its rows."""
    if use_triton(hidden):
        _launch(hidden, weight, top, options, row_mask, stats.logprobs, stats.lse)
        return stats
    lse = _lse(stats.logprobs, top, options)
    return corrected(stats, *_shifts(top, hidden, weight, options, lse))


def exact_exps(
    rows: ExpRows,
    prior: torch.Tensor,
    top: TopLogits,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    row_mask: torch.Tensor | None = None,
) -> None:
    """Correct the logprobs of ``exp_rows``, in place, and settle where they are the prior's."""
    if use_triton(hidden):
        agree = {"prior": prior.contiguous(), "safe": rows.safe}
        _launch(hidden, weight, top, rows.options, row_mask, rows.logprobs, None, **agree)
        return
    lse = _lse(rows.logprobs, top, rows.options)
    shifts = _shifts(top, hidden, weight, rows.options, lse)
    logprobs = _corrected_logprobs(rows.logprobs, *shifts)
    rows.logprobs.copy_(torch.where(agreed(logprobs, prior) & ~rows.safe, prior, logprobs))


def shard_shifts(
    stats: RowStats,
    top: TopLogits,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    options: LogitOptions,
    row_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """[2, C] fp32: a shard's part of d_y and R; ``weight`` and ``top`` are the shard's own,
    ``stats`` the whole row's."""
    if use_triton(hidden):
        shifts = hidden.new_zeros(2, len(hidden), dtype=torch.float32)
        _launch(hidden, weight, top, options, row_mask, stats.logprobs, stats.lse, shifts)
        return shifts
    return torch.stack(_shifts(top, hidden, weight, options, stats.lse)).float()


def corrected(stats: RowStats, shift: torch.Tensor, moved: torch.Tensor) -> RowStats:
    """Statistics with logprobs and lse corrected by (d_y, R) [C]."""
    token_p = stats.logprobs.double().exp().nan_to_num_(0.0)  # an id out of range has no p
    change = token_p * torch.expm1(shift) + moved
    return stats._replace(
        logprobs=_corrected_logprobs(stats.logprobs, shift, moved),
        lse=(stats.lse + torch.log1p(change)).float(),
    )


def _corrected_logprobs(
    logprobs: torch.Tensor, shift: torch.Tensor, moved: torch.Tensor
) -> torch.Tensor:
    wide = logprobs.double()
    change = -torch.expm1(wide) * torch.expm1(-shift) + torch.exp(-shift) * moved
    return (wide - torch.log1p(change)).float()


# ---- Portable path -------------------------------------------------------------------------------


def _temperature(options: LogitOptions) -> float | torch.Tensor:
    return options.temperature if options.row_temperature is None else options.row_temperature


def _lse(logprobs: torch.Tensor, top: TopLogits, options: LogitOptions) -> torch.Tensor:
    """[C] from the token's logit: good enough to weigh an error with."""
    return top.values[: len(logprobs)] / _temperature(options) - logprobs


def _shifts(
    top: TopLogits,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    options: LogitOptions,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(d_y, R) of each row [C] in fp64, with p_k = exp(v_k / T - lse); 0 where unknown."""
    num_rows, rows = len(lse), top.rows
    temperature = options.rows(rows).temperature_column()
    if options.row_temperature is not None:
        temperature = temperature.squeeze(1)
    shifts = _exact_logits(hidden, weight, rows, top.ids.clamp(min=0), options) - top.values
    shifts = torch.where((top.ids >= 0) & top.values.isfinite(), shifts / temperature, 0.0)
    p = torch.exp(top.values / temperature - lse[rows])[num_rows:]
    change = torch.where(p > LEAST, p * torch.expm1(shifts[num_rows:]), 0.0)
    # in order, so that a row's sum has one order
    return shifts[:num_rows], torch.bincount(rows[num_rows:], change, minlength=num_rows)


def _exact_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    options: LogitOptions,
) -> torch.Tensor:
    """[E] fp64: logits of the pairs (row of ``hidden``, row of ``weight``), but the temperature.

    A pair's bits do not depend on the others (batch invariance), which a BLAS would not promise;
    torch shares out a sum between threads only where it is the only one."""
    num_pairs, wide = len(ids), hidden.double()
    step = max(2, CPU_GATHER_ELEMENTS // max(1, hidden.shape[1]))
    logits = torch.empty(num_pairs, dtype=torch.float64)
    for start in range(0, num_pairs, step):
        part = slice(max(0, min(start, num_pairs - 2)), start + step)
        products = wide[rows[part]].mul_(weight[ids[part]])
        torch.sum(products, 1, out=logits[part])
    if options.bias is not None:
        logits += options.bias[ids]
    logits *= options.logit_scale
    if options.logit_softcap is not None:
        logits.div_(options.logit_softcap).tanh_().mul_(options.logit_softcap)
    return logits


# ---- Triton --------------------------------------------------------------------------------------


@on_device_of_first
def _launch(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    top: TopLogits,
    options: LogitOptions,
    row_mask: torch.Tensor | None,
    logprobs: torch.Tensor,
    lse: torch.Tensor | None,
    shifts: torch.Tensor | None = None,
    prior: torch.Tensor | None = None,
    safe: torch.Tensor | None = None,
) -> None:
    """``shifts`` alone is written where it is given, else ``logprobs`` and ``lse``."""
    if len(logprobs) == 0:
        return
    block_d, num_warps = arch_choice(EXACT_BLOCKS, hidden)
    _exact_rows_kernel[(len(logprobs),)](
        # outputs
        shifts,
        logprobs,
        lse,
        # inputs
        top.ids,
        top.values,
        hidden,
        weight,
        options.bias,
        options.row_temperature,
        None if row_mask is None else row_mask.view(torch.uint8),
        prior,
        None if safe is None else safe.view(torch.uint8),
        # scalars
        *options.kernel_scalars(),
        LEAST,
        *AGREE,
        # shapes
        hidden.shape[1],
        # strides
        0 if shifts is None else shifts.stride(0),
        hidden.stride(0),
        weight.stride(0),
        # constexprs
        **options.kernel_flags(row_mask),
        HAS_LSE=lse is not None,
        HAS_PRIOR=prior is not None,
        SHIFTS_ONLY=shifts is not None,
        TOP=TOP,
        BLOCK_D=block_d,
        num_warps=num_warps,
        **LAUNCH_OPTIONS,
    )
