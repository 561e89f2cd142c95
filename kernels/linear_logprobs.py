"""Log-probabilities straight from hidden states: a language-model head that never holds [N, V].

Maths. raw = hidden @ weight.T [N, V]; logits = softcap * tanh((raw + bias) * scale / softcap);
then the row maths of logprobs.py on logits / temperature. The bias belongs to the linear layer, the
scale multiplies its result (Cohere, Granite), the softcap follows (Gemma), the temperature is last.
With G = dL/d raw [N, V]: d hidden = G @ weight, d weight = G.T @ hidden, d bias = sum of G's rows.

Rows go through in chunks: GEMM to fp32 logits, one pass over them (vocab_rows.py), nothing kept but
five numbers a row. Backward recomputes the chunk's logits: 4 GEMMs of 2 N D V FLOP in all, 3 with a
frozen head (no d weight). linear_grpo.py needs one less: it makes its gradient in the forward pass.

Precision. Logits leave the GEMM in fp32, never rounded to half, which would cost 0.1 in a logprob
and bias the entropy. d weight and d bias are summed over chunks in fp32 and rounded once. On a CPU
half inputs are multiplied in fp32, a tile of the vocabulary at a time. On CUDA fp32 GEMMs obey
``torch.backends.cuda.matmul``: TF32 applies where the user allows it.

Bytes on CUDA at half inputs, besides the GEMMs' own reads of X and W: forward 8 a logit (fp32
written and read), backward 14 (the same again, then G written in half and read by two GEMMs).
Workspace: one chunk of fp32 logits and one of G (head_chunks.py). d weight in fp32: 4 D V.

Rows with ``row_mask`` False give logprob, entropy and lse 0 and take no gradient; their token ids
are not looked at. On a CPU those rows, and in backward the rows whose incoming gradients are zero,
are left out of the GEMMs. On CUDA counting them would be a host sync, so only the passes over
their logits are skipped, and masked rows enter the GEMMs as zeros: what they hold cannot matter.
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
from grpo_engine.kernels.head_chunks import (
    HeadGrads,
    Workspace,
    chunk_hidden,
    head_chunk_backward,
    head_row_chunks,
    raw_logits,
)
from grpo_engine.kernels.logprobs import check_row_values, row_grads, split_temperature
from grpo_engine.kernels.vocab_rows import (
    LogitOptions,
    RowGrads,
    RowStats,
    apply_logit_options,
    fold_rows,
    shift_rows,
)


def linear_logprobs_ref(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
    row_mask: torch.Tensor | None = None,
    tp_group: object | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Specification of ``linear_logprobs``: [N, V] logits in fp64 for fp64 inputs, else fp32."""
    if tp_group is not None:
        raise ValueError("tp_group is not supported yet")
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(wide) @ weight.to(wide).T
    if bias is not None:
        logits = logits + bias.to(wide)
    if logit_scale is not None:
        logits = logits * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    logits = logits / (temperature[:, None] if torch.is_tensor(temperature) else temperature)
    ids = token_ids.long() if row_mask is None else token_ids.long().where(row_mask, 0)
    log_p = torch.log_softmax(logits, dim=-1)
    outputs = [log_p.gather(1, ids[:, None]).squeeze(1)]
    if return_entropy:
        outputs.append(-(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1))
    if return_lse:
        outputs.append(logits.logsumexp(-1))
    if row_mask is not None:
        outputs = [torch.where(row_mask, output, 0.0) for output in outputs]
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


# ---- Registered operators ------------------------------------------------------------------------


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


@custom_op("grpo_engine::linear_logprobs")
def _linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    token_ids: torch.Tensor,
    row_temperature: torch.Tensor | None,
    row_mask: torch.Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    logit_scale: float,
    want_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The five fields of RowStats."""
    check_live_rows(token_ids, row_temperature, row_mask, weight.shape[0])
    options = LogitOptions(temperature, row_temperature, bias, logit_scale, logit_softcap)
    # the CPU path visits the unmasked rows only, the Triton path writes every row
    make_stats = RowStats.empty if row_mask is None or use_triton(hidden) else RowStats.zeros
    stats = make_stats(hidden, hidden.shape[0], want_entropy)
    work = Workspace.make(hidden, weight.shape[0], for_gradient=False)
    for index in head_row_chunks(hidden, work.rows, row_mask):
        rows = hidden[index]
        logits = raw_logits(rows, weight, work.logits[: len(rows)])
        chunk = fold_rows(
            logits,
            work.dlogits[: len(rows)],
            token_ids[index],
            options.rows(index),
            want_entropy,
            None if row_mask is None else row_mask[index],
        )
        stats.put(index, chunk)
    return tuple(stats)


@_linear_logprobs.register_fake
def _(hidden, weight, bias, token_ids, row_temperature, row_mask, *rest):
    return tuple(RowStats.empty(hidden, hidden.shape[0], want_entropy=rest[-1]))


@custom_op("grpo_engine::linear_logprobs_backward")
def _linear_logprobs_backward(
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    token_ids: torch.Tensor,
    row_temperature: torch.Tensor | None,
    row_mask: torch.Tensor | None,
    stats: list[torch.Tensor],
    temperature: float,
    logit_softcap: float | None,
    logit_scale: float,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias; one without elements where ``needs`` is False."""
    grads = RowGrads(grad_logprobs, grad_entropy, grad_lse)
    all_stats = RowStats(*stats)
    options = LogitOptions(temperature, row_temperature, bias, logit_scale, logit_softcap)
    into = HeadGrads.make(hidden, weight, tuple(needs), hidden.dtype)
    work = Workspace.make(hidden, weight.shape[0], for_gradient=True)
    live = None
    if not use_triton(hidden):
        live = grads.live() if row_mask is None else grads.live() & row_mask
    for index in head_row_chunks(hidden, work.rows, live):
        rows, chunk_options = chunk_hidden(hidden, index, row_mask), options.rows(index)
        chunk = all_stats.rows(index)
        logits = raw_logits(rows, weight, work.logits[: len(rows)])
        if not use_triton(hidden):
            apply_logit_options(logits, chunk_options)
            shift_rows(logits, work.dlogits[: len(rows)], chunk_options, chunk.row_max)
        head_chunk_backward(
            index,
            work,
            rows,
            weight,
            token_ids[index],
            chunk_options,
            chunk,
            grads.rows(index),
            None if row_mask is None else row_mask[index],
            into,
        )
    empty = hidden.new_empty
    return (
        empty(0) if into.hidden is None else into.hidden,
        empty(0, dtype=weight.dtype) if into.weight is None else into.weight.to(weight.dtype),
        empty(0) if into.bias is None else into.bias.to(bias.dtype),
    )


@_linear_logprobs_backward.register_fake
def _(grad_logprobs, grad_entropy, grad_lse, hidden, weight, bias, *rest):
    need_hidden, need_weight, need_bias = rest[-1]
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        bias.new_empty(bias.shape) if need_bias else hidden.new_empty(0),
    )


# ---- Autograd ------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    *tensors, temperature, logit_softcap, logit_scale, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[3], output[4])
    ctx.save_for_backward(*tensors, *output)
    ctx.scalars = (temperature, logit_softcap, logit_scale)


@first_derivatives_only
def _backward(ctx, *grads):
    tensors, stats = ctx.saved_tensors[:6], list(ctx.saved_tensors[6:])
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    incoming = row_grads(grads[:3], stats[0])
    results = _linear_logprobs_backward(*incoming, *tensors, stats, *ctx.scalars, needs)
    made = [grad if need else None for grad, need in zip(results, needs, strict=True)]
    return (*made, *[None] * 7)


_linear_logprobs.register_autograd(_backward, setup_context=_setup_context)


# ---- Public function -----------------------------------------------------------------------------


def check_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    bias: torch.Tensor | None,
    logit_softcap: float | None,
    logit_scale: float | None,
    row_mask: torch.Tensor | None,
    tp_group: object | None,
) -> None:
    """ValueError naming the first argument of a fused head that cannot be used."""
    check_float("hidden", hidden)
    check_float("weight", weight)
    if hidden.ndim != 2:
        raise ValueError(f"hidden must have shape [N, D], got {list(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight must have shape [V, {hidden.shape[1]}] with V > 0, got {list(weight.shape)}"
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight is {weight.dtype}, hidden is {hidden.dtype}: they must agree")
    if weight.device != hidden.device:
        raise ValueError(f"weight is on {weight.device}, expected {hidden.device}")
    num_rows, device = hidden.shape[0], hidden.device
    check_vector("token_ids", token_ids, num_rows, device, INT_DTYPES)
    if bias is not None:
        check_vector("bias", bias, weight.shape[0], device)
        check_float("bias", bias)
    if row_mask is not None:
        check_vector("row_mask", row_mask, num_rows, device, (torch.bool,))
    for name, value in (("logit_softcap", logit_softcap), ("logit_scale", logit_scale)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not value > 0:
            raise ValueError(f"{name} must be a number > 0 or None, got {value!r}")
    if tp_group is not None:
        raise ValueError("tp_group is not supported yet: pass the whole weight and tp_group=None")


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
    row_mask: torch.Tensor | None = None,
    tp_group: object | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Log-probability of each row's token under the head ``weight``, without [N, V] in memory.

    Args:
        hidden: [N, D] fp32, bf16 or fp16.
        weight: [V, D], dtype of ``hidden``.
        token_ids: [N] int32 or int64; out of [0, V) raises on a CPU and gives NaN on CUDA.
        bias: [V]. The logits are ``softcap * tanh((hidden @ weight.T + bias) * scale / softcap)``.
        temperature: a float or an [N] tensor (no gradient), > 0; divides the logits, last.
        logit_softcap, logit_scale: as above; None leaves them out.
        return_entropy, return_lse: also return these, of logits / temperature, in nats.
        row_mask: [N] bool; a False row gives 0 everywhere, takes no gradient, and its token id
            may be anything.
        tp_group: must be None.

    Returns:
        logprobs [N] fp32, or the tuple (logprobs[, entropy][, lse]); all differentiable with
        respect to hidden, weight and bias, once: backward raises RuntimeError under
        ``create_graph=True``. A gradient that is not needed is not computed.

    Raises:
        ValueError: wrong shape, dtype, device or option; the message names it.
    """
    check_head(hidden, weight, token_ids, bias, logit_softcap, logit_scale, row_mask, tp_group)
    scalar, per_row = split_temperature(temperature, hidden.shape[0], hidden.device)
    logprobs, entropy, lse, _, _ = _linear_logprobs(
        hidden,
        weight,
        None if bias is None else bias.contiguous(),
        token_ids.contiguous(),
        per_row,
        None if row_mask is None else row_mask.contiguous(),
        scalar,
        None if logit_softcap is None else float(logit_softcap),
        1.0 if logit_scale is None else float(logit_scale),
        return_entropy,
    )
    outputs = [logprobs]
    if return_entropy:
        outputs.append(entropy)
    if return_lse:
        outputs.append(lse)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)
