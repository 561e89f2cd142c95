"""Log-probability of a chosen token per row of logits, with entropy and lse, forward and backward.

Maths. For a row of logits l[V], chosen token y and temperature T, with z = l / T,

    lse = log sum_k exp(z_k),  logprob = z_y - lse,
    p_k = exp(z_k - lse),      entropy = -sum_k p_k log p_k,
    dL/dl_k = (g_logprob (1[k = y] - p_k) + g_lse p_k - g_entropy p_k (log p_k + entropy)) / T

Every output is differentiable. What keeps it exact in fp32:

* The maximum m is taken off before dividing by T, and (m, log sum exp((l - m) / T)) are saved
  apart, so nothing is lost to the size of the logits (at |l| ~ 60 their sum, lse, loses 4e-6).
* The chosen token is left out of the running sum: with l_y the maximum, logprob = -log1p(others),
  and the gradient at y uses 1 - p_y = -expm1(logprob). A confident token keeps its precision.
* Logits of -inf (a masked vocabulary) have p = 0 and give zeros, not NaN. A row that is -inf
  everywhere has no distribution: it gives NaN, as in torch.

Saved for backward: the logits and five fp32 numbers a row.

Bytes at dtype size b: forward reads N V b (the floor), backward reads N V b and writes N V b (the
floor; with ``inplace_backward`` it allocates nothing). A row whose incoming gradients are all zero
is not read in backward. On a CPU the rows go through fp32 scratch of about one megabyte.

The kernels themselves, shared with the fused heads, are in vocab_rows.py.
"""

from __future__ import annotations

import numbers

import torch

from grpo_engine.kernels.common import (
    INT_DTYPES,
    check_float,
    check_vector,
    custom_op,
    first_derivatives_only,
    use_triton,
)
from grpo_engine.kernels.vocab_rows import (
    LogitOptions,
    RowGrads,
    RowStats,
    dlogits_rows,
    fold_rows,
    row_chunks,
    shift_rows,
)

# Elements of fp32 scratch for a chunk of rows on a CPU: 1 MB, an L2 cache.
CPU_SCRATCH_ELEMENTS = 1 << 18


def token_logprobs_ref(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    return_entropy: bool = False,
    return_lse: bool = False,
    inplace_backward: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Specification of ``token_logprobs`` in plain torch: fp64 for fp64 logits, else fp32."""
    scaled = logits if logits.dtype == torch.float64 else logits.float()
    scaled = scaled / (temperature[:, None] if torch.is_tensor(temperature) else temperature)
    log_p = torch.log_softmax(scaled, dim=-1)
    outputs = [log_p.gather(1, token_ids[:, None].long()).squeeze(1)]
    if return_entropy:
        finite_log_p = log_p.masked_fill(log_p == -torch.inf, 0.0)
        outputs.append(-(log_p.exp() * finite_log_p).sum(-1))
    if return_lse:
        outputs.append(scaled.logsumexp(-1))
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


# ---- Registered operators ------------------------------------------------------------------------


def check_row_values(
    token_ids: torch.Tensor, row_temperature: torch.Tensor | None, vocab: int
) -> None:
    """ValueError for a token id outside [0, V) or a temperature that is not > 0 and finite. CPU
    only: on CUDA reading them would be a host sync; such a row gives NaN there, but with an
    infinite temperature the uniform distribution."""
    if token_ids.is_cuda or token_ids.numel() == 0:
        return
    low, high = (int(value) for value in token_ids.aminmax())
    if low < 0 or high >= vocab:
        raise ValueError(f"token_ids must be in [0, {vocab}), got {low if low < 0 else high}")
    check_row_temperature(row_temperature)


def check_row_temperature(row_temperature: torch.Tensor | None) -> None:
    """ValueError for a temperature <= 0, NaN or infinite. CPU only."""
    if row_temperature is None or row_temperature.is_cuda:
        return
    wrong = row_temperature[~((row_temperature > 0) & (row_temperature < float("inf")))]
    if len(wrong):
        raise ValueError(f"temperature must be > 0 and finite, got {wrong[0].item()}")


@custom_op("grpo_engine::token_logprobs")
def _token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    temperature: float,
    row_temperature: torch.Tensor | None,
    want_entropy: bool,
    inplace_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The five fields of RowStats. ``inplace_backward`` is for the backward alone."""
    num_rows, vocab = logits.shape
    check_row_values(token_ids, row_temperature, vocab)
    options = LogitOptions(temperature, row_temperature)
    if use_triton(logits):
        return tuple(fold_rows(logits, logits, token_ids, options, want_entropy))
    stats = RowStats.empty(logits, num_rows, want_entropy)
    chunk_rows = max(1, min(num_rows, CPU_SCRATCH_ELEMENTS // vocab))
    buffer, scratch = torch.empty(2, chunk_rows, vocab, dtype=torch.float32)
    for index in row_chunks(num_rows, chunk_rows):
        rows = buffer[: index.stop - index.start].copy_(logits[index])
        chunk = fold_rows(
            rows, scratch[: len(rows)], token_ids[index], options.rows(index), want_entropy
        )
        stats.put(index, chunk)
    return tuple(stats)


@_token_logprobs.register_fake
def _(logits, token_ids, temperature, row_temperature, want_entropy, inplace_backward):
    return tuple(RowStats.empty(logits, logits.shape[0], want_entropy))


def _write_dlogits(
    out: torch.Tensor,
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    options: LogitOptions,
    stats: RowStats,
    grads: RowGrads,
) -> None:
    """dL/dlogits of all rows into ``out``, which may be ``logits``."""
    if use_triton(logits):
        dlogits_rows(out, logits, token_ids, options, stats, grads)
        return
    num_rows, vocab = logits.shape
    live = grads.live()
    chunk_rows = max(1, min(num_rows, CPU_SCRATCH_ELEMENTS // vocab))
    buffer, scratch = torch.empty(2, chunk_rows, vocab, dtype=torch.float32)
    for index in row_chunks(num_rows, chunk_rows, live):
        source = logits[index]
        rows, exps = buffer[: len(source)].copy_(source), scratch[: len(source)]
        chunk_options, chunk = options.rows(index), stats.rows(index)
        shift_rows(rows, exps, chunk_options, chunk.row_max)
        ids = token_ids[index]
        out[index] = dlogits_rows(exps, rows, ids, chunk_options, chunk, grads.rows(index)).to(
            out.dtype
        )
    if not bool(live.all()):
        out[~live] = 0.0


@custom_op("grpo_engine::token_logprobs_backward")
def _token_logprobs_backward(
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    row_temperature: torch.Tensor | None,
    stats: list[torch.Tensor],
    temperature: float,
) -> torch.Tensor:
    grads = RowGrads(grad_logprobs, grad_entropy, grad_lse)
    out = torch.empty_like(logits)
    options = LogitOptions(temperature, row_temperature)
    _write_dlogits(out, logits, token_ids, options, RowStats(*stats), grads)
    return out


@_token_logprobs_backward.register_fake
def _(grad_logprobs, grad_entropy, grad_lse, logits, *_):
    return torch.empty_like(logits)


@custom_op("grpo_engine::token_logprobs_backward_", mutates_args=("logits",))
def _token_logprobs_backward_inplace(
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    row_temperature: torch.Tensor | None,
    stats: list[torch.Tensor],
    temperature: float,
) -> None:
    grads = RowGrads(grad_logprobs, grad_entropy, grad_lse)
    options = LogitOptions(temperature, row_temperature)
    _write_dlogits(logits, logits, token_ids, options, RowStats(*stats), grads)


# ---- Autograd ------------------------------------------------------------------------------------


def row_grads(grads: tuple, like: torch.Tensor) -> RowGrads:
    """Incoming gradients of (logprobs, entropy, lse), contiguous; None for an unused one."""
    grad_logprobs, grad_entropy, grad_lse = grads
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(like)
    if grad_entropy is not None and grad_entropy.numel() != like.numel():
        grad_entropy = None  # entropy was not asked for
    return RowGrads(
        *(None if g is None else g.contiguous() for g in (grad_logprobs, grad_entropy, grad_lse))
    )


def _setup_context(ctx, inputs, output) -> None:
    logits, token_ids, temperature, row_temperature, _, inplace_backward = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[3], output[4])
    ctx.save_for_backward(logits, token_ids, row_temperature, *output)
    ctx.temperature, ctx.inplace_backward = temperature, inplace_backward


@first_derivatives_only
def _backward(ctx, *grads):
    logits, token_ids, row_temperature, *stats = ctx.saved_tensors
    incoming = row_grads(grads[:3], stats[0])
    arguments = (*incoming, logits, token_ids, row_temperature, stats, ctx.temperature)
    if ctx.inplace_backward:
        _token_logprobs_backward_inplace(*arguments)
        dlogits = logits.detach()
    else:
        dlogits = _token_logprobs_backward(*arguments)
    return dlogits, None, None, None, None, None


_token_logprobs.register_autograd(_backward, setup_context=_setup_context)


# ---- Public function -----------------------------------------------------------------------------


def split_temperature(
    temperature: float | torch.Tensor, num_rows: int, device: torch.device
) -> tuple[float, torch.Tensor | None]:
    """``temperature`` as (scalar, per-row fp32 tensor or None); ValueError for anything else."""
    if isinstance(temperature, torch.Tensor):
        check_vector("temperature", temperature, num_rows, device)
        if not temperature.is_floating_point():
            raise ValueError(f"temperature must be a float tensor, got {temperature.dtype}")
        if temperature.requires_grad:
            raise ValueError("temperature requires grad, but its gradient is not computed")
        return 1.0, temperature.float().contiguous()
    if isinstance(temperature, bool) or not isinstance(temperature, numbers.Real):
        raise ValueError(f"temperature must be a float or a tensor [N], got {temperature!r}")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")
    return float(temperature), None


def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    return_entropy: bool = False,
    return_lse: bool = False,
    inplace_backward: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Log-probability of ``token_ids[n]`` under ``softmax(logits[n] / temperature)``.

    Args:
        logits: [N, V] fp32, bf16 or fp16. Rows may be strided; the last dimension may not.
        token_ids: [N] int32 or int64. An id outside [0, V) raises ValueError on a CPU and gives NaN
            on CUDA, where looking would be a host sync.
        temperature: a float or an [N] tensor (no gradient), > 0.
        return_entropy: also return the entropy of the full distribution, in nats.
        return_lse: also return logsumexp(logits / temperature).
        inplace_backward: write dL/dlogits over ``logits`` instead of allocating [N, V]. The caller
            must not use ``logits`` after backward; a second backward raises.

    Returns:
        logprobs [N] fp32, or the tuple (logprobs[, entropy][, lse]). All are differentiable, once:
        backward raises RuntimeError under ``create_graph=True``.

    Raises:
        ValueError: wrong shape, dtype, device, stride or option; the message names it.
    """
    check_float("logits", logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape [N, V] with V > 0, got {list(logits.shape)}")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"logits must be contiguous along V, got strides {logits.stride()}")
    if inplace_backward and logits.stride(0) < logits.shape[1] and logits.shape[0] > 1:
        raise ValueError(f"inplace_backward needs rows apart, got strides {logits.stride()}")
    check_vector("token_ids", token_ids, logits.shape[0], logits.device, INT_DTYPES)
    scalar, per_row = split_temperature(temperature, logits.shape[0], logits.device)
    logprobs, entropy, lse, _, _ = _token_logprobs(
        logits, token_ids.contiguous(), scalar, per_row, return_entropy, inplace_backward
    )
    outputs = [logprobs]
    if return_entropy:
        outputs.append(entropy)
    if return_lse:
        outputs.append(lse)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)
