"""Log-probabilities straight from hidden states: a language-model head that never holds [N, V].

Maths. raw = hidden @ weight.T [N, V]; logits = softcap * tanh((raw + bias) * scale / softcap);
then the row maths of logprobs.py on logits / temperature. The bias belongs to the linear layer, the
scale multiplies its result (Cohere, Granite), the softcap follows (Gemma), the temperature is last.
With G = dL/d raw [N, V]: d hidden = G @ weight, d weight = G.T @ hidden, d bias = sum of G's rows.

Rows go through in chunks: GEMM to fp32 logits, one pass over them (vocab_rows.py), nothing kept but
five numbers a row. Products of 2 N D V FLOP in all, f the share of rows with a gradient:

    general                                  1 forward, 3 f backward: the logits are made again
    frozen head (only ``hidden`` has a       2 forward, 0 backward; entropy and lse come along, and
      gradient)                                2 f backward if a gradient for one of them arrives
    ``keep_probs``                           1 forward, 2 f backward, N V numbers kept

The second and third are in linear_logprobs_unit.py. linear_grpo.py needs three in all, too: it
makes its gradient in the forward pass.

Precision. Logits leave the GEMM in fp32, never rounded to half, which would cost 0.1 in a logprob
and bias the entropy; of those that decide a log-probability the rounding of the GEMM is taken out
(exact_logits.py), so that logprobs and lse are within 1e-5 of fp64 on the same inputs (measured on
a CPU; not yet on a device). d weight and d bias are summed over chunks in fp32 and rounded once. On
a CPU half inputs are multiplied in fp32, a tile of the vocabulary at a time. On CUDA fp32 GEMMs
obey ``torch.backends.cuda.matmul``: TF32 applies where the user allows it.

Bytes on CUDA at half inputs, besides the GEMMs' own reads of X and W: forward 8 a logit (fp32
written and read), backward 14 (the same again, then G written in half and read by two GEMMs) and,
for d weight, which every chunk of C rows reads and writes in fp32, 8 D / C (25.6 at D = 4096 and
C = 1,280, more than all the rest: linear_grpo.py).
Workspace: one chunk of fp32 logits and one of G (head_chunks.py). d weight in fp32: 4 D V.

Rows with ``row_mask`` False give logprob, entropy and lse 0 and take no gradient; their token ids
are not looked at, and what their hidden states hold cannot matter. Those rows, and in backward the
rows whose incoming gradients are zero, can be left out of the GEMMs (``compact_rows``: by default
where there is a ``row_mask``; head_pass.py).
On CUDA only the device knows how many stay: the GEMMs are live_gemm.py's, without a host sync.
"""

from __future__ import annotations

import math
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
from grpo_engine.kernels.head_chunks import HeadGrads
from grpo_engine.kernels.head_pass import HeadPass
from grpo_engine.kernels.linear_logprobs_unit import frozen_logprobs, kept_logprobs
from grpo_engine.kernels.logprobs import row_grads, split_temperature
from grpo_engine.kernels.truncated import refuse_with_kept, truncated_logprobs
from grpo_engine.kernels.truncated_mask import kept_mask
from grpo_engine.kernels.vocab_parallel import (
    grad_facts,
    group_name_of,
    shards_for_backward,
    together,
    whole_head,
)
from grpo_engine.kernels.vocab_rows import LogitOptions, RowGrads, RowStats


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
    kept: torch.Tensor | None = None,
    compact_rows: bool | None = None,
    keep_probs: bool = False,
    batch_invariant: bool = False,
    tp_group: object | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Specification of ``linear_logprobs``: [N, V] logits in fp64 for fp64 inputs, else fp32.

    ``compact_rows``, ``keep_probs`` and ``batch_invariant`` say how, not what: no effect here.
    """
    weight, bias = whole_head(weight, bias, tp_group)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(wide) @ weight.to(wide).T
    if bias is not None:
        logits = logits + bias.to(wide)
    if logit_scale is not None:
        logits = logits * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    if kept is not None:
        logits = logits.masked_fill(~kept_mask(kept, weight.shape[0]), -torch.inf)
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
    compact: bool,
    batch_invariant: bool,
    want_entropy: bool,
    tp_group: str | None = None,
    needs: list[bool] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The five fields of RowStats. ``needs`` (gradients of hidden, weight, bias) is only compared
    between the ranks of ``tp_group``."""
    options = LogitOptions(temperature, row_temperature, bias, logit_scale, logit_softcap)
    head = HeadPass.forward(
        hidden,
        weight,
        token_ids,
        options,
        row_mask,
        compact=compact,
        batch_invariant=batch_invariant,
        tp_group=tp_group,
        pass_name="linear_logprobs",
        return_entropy=want_entropy,
        **({} if needs is None else grad_facts(needs)),
    )
    stats = RowStats.empty(hidden, head.places, want_entropy)
    work = head.workspace(for_gradient=False)
    for chunk in head.chunks(work.rows):
        stats.put(chunk, head.fold(chunk, work, want_entropy))
    return tuple(head.put_back(stats, want_entropy))


@_linear_logprobs.register_fake
def _(hidden, *rest, tp_group=None, needs=None):
    return tuple(RowStats.empty(hidden, hidden.shape[0], want_entropy=rest[10]))


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
    compact: bool,
    needs: list[bool],
    tp_group: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias; one without elements where ``needs`` is False."""
    shards = shards_for_backward(tp_group, "linear_logprobs", weight, needs[0])
    grads = RowGrads(grad_logprobs, grad_entropy, grad_lse)
    options = LogitOptions(temperature, row_temperature, bias, logit_scale, logit_softcap)
    live = row_mask
    if compact or not use_triton(hidden):
        live = grads.live() if row_mask is None else grads.live() & row_mask
    head = HeadPass.make(hidden, weight, token_ids, options, live, compact=compact, shards=shards)
    place_stats, place_grads = head.take_stats(RowStats(*stats)), head.take_grads(grads)
    into = HeadGrads.make(
        hidden,
        weight,
        tuple(needs),
        head.hidden_grad_dtype,
        every_row=use_triton(hidden) and not compact,
    )
    work = head.workspace(for_gradient=True)
    for chunk in head.chunks(work.rows):
        head.backward(chunk, work, place_stats, place_grads, into)
    head.finish(into)
    return into.as_outputs(hidden, weight, bias)


@_linear_logprobs_backward.register_fake
def _(grad_logprobs, grad_entropy, grad_lse, hidden, weight, bias, *rest, tp_group=None):
    return HeadGrads.fake_outputs(hidden, weight, bias, rest[8])


# ---- Autograd ------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    *tensors, temperature, logit_softcap, logit_scale, compact, _, _, tp_group, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[3], output[4])
    ctx.save_for_backward(*tensors, *output)
    ctx.scalars = (temperature, logit_softcap, logit_scale, compact)
    ctx.tp_group = tp_group


@first_derivatives_only
def _backward(ctx, *grads):
    tensors, stats = ctx.saved_tensors[:6], list(ctx.saved_tensors[6:])
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    incoming = row_grads(grads[:3], stats[0])
    results = _linear_logprobs_backward(
        *incoming, *tensors, stats, *ctx.scalars, needs, ctx.tp_group
    )
    made = [grad if need else None for grad, need in zip(results, needs, strict=True)]
    return (*made, *[None] * 11)


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
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number > 0 or None, got {value!r}")
    group_name_of(tp_group)


def check_flag(name: str, value: object, *, or_none: bool = False) -> None:
    if not isinstance(value, bool) and not (or_none and value is None):
        raise ValueError(
            f"{name} must be True{', False or None' if or_none else ' or False'}, got {value!r}"
        )


@together
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
    kept: torch.Tensor | None = None,
    compact_rows: bool | None = None,
    keep_probs: bool = False,
    batch_invariant: bool = False,
    tp_group: object | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Log-probability of each row's token under the head ``weight``, without [N, V] in memory.

    Where ``hidden`` alone requires grad (a frozen head, LoRA), the forward pass makes the direction
    of its gradient too and keeps it, 4 N D bytes: two GEMMs in all, entropy and lse included unless
    a gradient arrives for them (then four). It is made for every row of ``row_mask``, also those
    whose gradient turns out to be 0.

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
        kept: what the sampler kept of each row: ids [N, K] int32 or int64 with -1 in unused places,
            a mask [N, V] bool, or its bits [N, ceil(V / 8)] uint8 (truncated.py). Everything is
            then that of the distribution over the kept set alone, which must hold the row's token
            (else ValueError on a CPU, NaN on CUDA). With ids no GEMM is run at all. Not with
            compact_rows=True, keep_probs or batch_invariant.
        compact_rows: on CUDA, spend no GEMM work on rows outside ``row_mask``, nor in backward on
            rows whose incoming gradients are 0, without a host sync. None: where ``row_mask`` is
            given; without one backward multiplies every row, also those with a gradient of 0. True:
            always: for a batch in which many advantages are 0. False: never. Compacted, the GEMMs
            are live_gemm.py's, else cuBLAS's, the faster ones where most rows count (by how much is
            not yet timed). A CPU always leaves such rows out.
        keep_probs: keep the gradient of the logits, [N, V] in ``hidden``'s dtype (on a CPU fp32),
            for the backward pass, which then has two GEMMs instead of three. Not with
            return_entropy or return_lse where a gradient is needed.
        batch_invariant: logprobs, entropy and lse of a row are the same bits whatever rows stand
            beside it, in whatever chunks (at one number of CPU threads): the ratio to log-
            probabilities recomputed in another packing is exactly 1. For its cost see head_pass.py.
            Gradients are what they are without it.
        tp_group: a torch.distributed.ProcessGroup whose ranks hold the head together: ``weight``
            [V_r, D] and ``bias`` [V_r] are this rank's consecutive rows of it, in rank order, and
            all else is the same on every rank (``token_ids`` count from the first row of rank 0).
            Every rank gets the same outputs, the whole d hidden, and the gradients of its own rows;
            every rank must make the same calls, backward included. For who adds up d hidden, what
            is sent, and what happens to an error on one rank see vocab_parallel.py. Not with kept.

    Returns:
        logprobs [N] fp32, or the tuple (logprobs[, entropy][, lse]); all differentiable with
        respect to hidden, weight and bias, once: backward raises RuntimeError under
        ``create_graph=True``. A gradient that is not needed is not computed. The same call gives
        the same bits again, gradients included.

    Raises:
        ValueError: wrong shape, dtype, device or option; the message names it.
    """
    check_head(hidden, weight, token_ids, bias, logit_softcap, logit_scale, row_mask, tp_group)
    check_flag("compact_rows", compact_rows, or_none=True)
    check_flag("keep_probs", keep_probs)
    check_flag("batch_invariant", batch_invariant)
    scalar, per_row = split_temperature(temperature, hidden.shape[0], hidden.device)
    compact = row_mask is not None if compact_rows is None else compact_rows
    arguments = (
        hidden if hidden.stride(1) == 1 else hidden.contiguous(),
        weight if weight.stride(1) == 1 else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        token_ids.contiguous(),
        per_row,
        None if row_mask is None else row_mask.contiguous(),
        scalar,
        None if logit_softcap is None else float(logit_softcap),
        1.0 if logit_scale is None else float(logit_scale),
        compact and use_triton(hidden),
        batch_invariant,
    )
    group = group_name_of(tp_group)
    grad_mode = torch.is_grad_enabled()
    needs = [grad_mode and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    extras = return_entropy or return_lse
    if kept is not None:
        refuse_with_kept(
            compact_rows=compact_rows,
            keep_probs=keep_probs,
            batch_invariant=batch_invariant,
            tp_group=tp_group,
        )
        results = truncated_logprobs(kept, *arguments[:9], return_entropy)
    elif keep_probs and any(needs):
        if extras:
            raise ValueError(
                "keep_probs keeps what the gradient of logprobs needs, not that of entropy or lse: "
                "pass return_entropy=False and return_lse=False, or keep_probs=False"
            )
        return kept_logprobs(*arguments, group)
    elif needs == [True, False, False]:
        results = frozen_logprobs(*arguments, return_entropy, return_lse, group)
    else:
        results = _linear_logprobs(*arguments, return_entropy, group, needs)
    logprobs, entropy, lse = results[:3]
    outputs = [logprobs]
    if return_entropy:
        outputs.append(entropy)
    if return_lse:
        outputs.append(lse)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)
