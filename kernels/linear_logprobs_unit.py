"""linear_logprobs with the gradient's direction kept from the forward pass: no second logits GEMM.

Maths. Row n of dL/d raw is g_n A_n with g = dL/d logprobs [N] and A = d logprobs / d raw [N, V],
(onehot - p) times scale, softcap's slope and 1 / temperature: A does not depend on the loss. So

    frozen head   forward: U = A @ weight [N, D], kept
                  backward: d hidden = g U
    keep_probs    forward: A [N, V], kept
                  backward: d hidden = g (A @ weight), d weight = A.T @ (g X)

Two GEMMs of 2 N D V FLOP, and three. The gradients of entropy and lse are no multiples of A: with
a frozen head both come out of the same forward pass, no GEMM more as metrics; should a gradient
arrive for one, backward makes d hidden from recomputed logits, two GEMMs more.

Precision. U is kept in fp32. Where the logits are recomputed, g A is rounded to half, multiplied,
and rounded to half again; here A is rounded instead of g A, and g U once at the end: as many
roundings, of the same relative size. A half U would be one more, and 1.2 times the error.
A is kept in the dtype of the GEMMs (on a CPU fp32), as the recomputing path rounds g A. In d weight
one factor must take g: scaling X (2 N D bytes) and scaling A (4 N V bytes) both round once more in
half, each as much as the rounding of A itself; X it is. In fp32 and on a CPU neither is rounded.
fp16 has not the range for p: each row is kept divided by the power of two above its largest entry.

A row whose g is 0 gets exactly 0 and adds nothing, also where its U or A are not finite. To that
end the Triton path keeps zeros for a row whose logprob is NaN, and the NaN returns with g.

Bytes on CUDA at half inputs, besides the GEMMs' reads of X and W: frozen 16 a logit (fp32 written,
read twice; A written in half, read once), keep_probs 18, and 4 more where backward compacts rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from grpo_engine.kernels.common import custom_op, first_derivatives_only, use_triton
from grpo_engine.kernels.head_chunks import HeadGrads, Workspace, chunk_rows, power_above
from grpo_engine.kernels.head_pass import HeadPass
from grpo_engine.kernels.logprobs import row_grads
from grpo_engine.kernels.vocab_parallel import shards_for_backward
from grpo_engine.kernels.vocab_rows import LogitOptions, RowGrads, RowStats, dlogits_rows

# ---- Unit gradients ------------------------------------------------------------------------------


def unit_grads(logprobs: torch.Tensor, options: LogitOptions, dtype: torch.dtype) -> torch.Tensor:
    """[N] fp32: the row gradients that A is kept with. 1, in fp16 the power of two that brings the
    row's largest entry, 1 - p of the token, to between 1/2 and 1; 0 where the logprob is NaN."""
    unit = torch.ones_like(logprobs)
    if dtype == torch.float16:
        temperature = options.temperature
        if options.row_temperature is not None:
            temperature = options.row_temperature
        largest = -torch.expm1(logprobs) * options.logit_scale / temperature
        exponent = torch.ceil(torch.log2(torch.where(largest > 0, largest, 1.0)))
        unit = torch.exp2(-exponent.clamp(-100.0, 100.0))
    return torch.where(logprobs.isnan(), 0.0, unit)


def unit_chunks(
    head: HeadPass,
    work: Workspace,
    stats: RowStats,
    kept: torch.Tensor | None = None,
    *,
    want_entropy: bool = False,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """A forward pass over the chunks of ``head``: of each (chunk, unit [C], unit times A [C, V]);
    ``stats`` are filled in. On the Triton path the latter is written to ``kept`` [P, V], where it
    is given, else to the workspace."""
    for chunk in head.chunks(work.rows):
        made, options = head.fold(chunk, work, want_entropy), head.options.rows(chunk)
        stats.put(chunk, made)
        rows = chunk.stop - chunk.start
        in_place = kept is not None and use_triton(kept)
        out = kept[chunk] if in_place else work.dlogits[:rows]
        unit = unit_grads(made.logprobs, options, out.dtype)
        dlogits = dlogits_rows(
            out,
            work.logits[:rows],
            head.token_ids[chunk],
            options,
            made,
            RowGrads(unit),
            None if head.mask is None else head.mask[chunk],
            skip_masked=head.live is not None,
        )
        yield chunk, unit, dlogits


# ---- Frozen head ---------------------------------------------------------------------------------


@custom_op("grpo_engine::linear_logprobs_frozen")
def _frozen(
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
    want_lse: bool,
    tp_group: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The five fields of RowStats and U [N, D] fp32. ``want_lse`` is for the backward alone."""
    head = HeadPass.forward(
        hidden,
        weight,
        token_ids,
        LogitOptions(temperature, row_temperature, bias, logit_scale, logit_softcap),
        row_mask,
        compact=compact,
        batch_invariant=batch_invariant,
        tp_group=tp_group,
        pass_name="linear_logprobs with a frozen head",
        return_entropy=want_entropy,
    )
    stats = RowStats.empty(hidden, head.places, want_entropy)
    every_row = use_triton(hidden) and head.live is None
    into = HeadGrads.make(hidden, weight, (True, False, False), torch.float32, every_row=every_row)
    work = head.workspace(for_gradient=True)
    for chunk, unit, dlogits in unit_chunks(head, work, stats, want_entropy=want_entropy):
        # 1 / 0 where the logprob is NaN: 0 * inf in that row of U
        scale = 1.0 / unit if use_triton(hidden) else None
        into.add(
            head.rows_of(chunk), dlogits, hidden, weight, None, row_scale=scale, live=head.live
        )
    head.finish(into)
    return *head.put_back(stats, want_entropy), into.hidden


@_frozen.register_fake
def _(hidden, *rest, tp_group=None):
    stats = RowStats.empty(hidden, hidden.shape[0], want_entropy=rest[10])
    return *stats, hidden.new_empty(hidden.shape, dtype=torch.float32)


def _frozen_setup(ctx, inputs, output) -> None:
    *tensors, temperature, logit_softcap, logit_scale, compact, _, entropy, lse, group = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    # what the gradient of the others needs: hidden would otherwise be free after the forward pass
    ctx.save_for_backward(output[5], *((*tensors, *output[:5]) if entropy or lse else ()))
    ctx.scalars = (temperature, logit_softcap, logit_scale, compact)
    ctx.tp_group, ctx.dtype = group, tensors[0].dtype


@first_derivatives_only
def _frozen_backward(ctx, grad_logprobs, grad_entropy, grad_lse, *_):
    unit_hidden, *saved = ctx.saved_tensors
    if saved and not (grad_entropy is None and grad_lse is None):
        tensors, stats = saved[:6], saved[6:]
        grads = row_grads((grad_logprobs, grad_entropy, grad_lse), stats[0])
        grad_hidden, _, _ = torch.ops.grpo_engine.linear_logprobs_backward(
            *grads, *tensors, stats, *ctx.scalars, [True, False, False], ctx.tp_group
        )
        return (grad_hidden, *[None] * 13)
    if grad_logprobs is None:
        return (None,) * 14
    rows = grad_logprobs[:, None]
    grad_hidden = torch.empty_like(unit_hidden, dtype=ctx.dtype)
    torch.mul(unit_hidden, rows, out=grad_hidden)
    return (grad_hidden.masked_fill_(rows == 0, 0.0), *[None] * 13)


_frozen.register_autograd(_frozen_backward, setup_context=_frozen_setup)


def frozen_logprobs(*arguments) -> tuple[torch.Tensor, ...]:
    """logprobs, entropy and lse [N] where only ``hidden`` has a gradient; the arguments of the
    operator."""
    return _frozen(*arguments)[:3]


# ---- Kept probabilities --------------------------------------------------------------------------


@custom_op("grpo_engine::linear_logprobs_keep")
def _keep(
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
    tp_group: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logprobs [N], and A [N, V] times ``unit_grads`` in the order of the pass; past its last row
    CUDA writes nothing, a CPU zeros."""
    head = HeadPass.forward(
        hidden,
        weight,
        token_ids,
        LogitOptions(temperature, row_temperature, bias, logit_scale, logit_softcap),
        row_mask,
        compact=compact,
        batch_invariant=batch_invariant,
        tp_group=tp_group,
        pass_name="linear_logprobs with keep_probs",
    )
    stats = RowStats.empty(hidden, head.places, want_entropy=False)
    kept = _empty_kept(hidden, weight)
    if not use_triton(hidden):
        kept[head.places :] = 0.0
    work = head.workspace(for_gradient=False)
    for chunk, _, dlogits in unit_chunks(head, work, stats, kept):
        if not use_triton(hidden):
            kept[chunk] = dlogits
    return head.put_back(stats, want_entropy=False).logprobs, kept


@_keep.register_fake
def _(hidden, weight, *rest, tp_group=None):
    return (
        hidden.new_empty(hidden.shape[0], dtype=torch.float32),
        _empty_kept(hidden, weight),
    )


def _empty_kept(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[N, V] in the dtype of the GEMMs: a CPU multiplies half inputs in fp32."""
    dtype = hidden.dtype if use_triton(hidden) else torch.float32
    return hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=dtype)


@custom_op("grpo_engine::linear_logprobs_keep_backward")
def _keep_backward_op(
    grad_logprobs: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    token_ids: torch.Tensor,
    row_temperature: torch.Tensor | None,
    row_mask: torch.Tensor | None,
    logprobs: torch.Tensor,
    kept: torch.Tensor,
    temperature: float,
    logit_scale: float,
    compact: bool,
    needs: list[bool],
    tp_group: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias; one without elements where ``needs`` is False."""
    shards = shards_for_backward(tp_group, "linear_logprobs with keep_probs", weight, needs[0])
    options = LogitOptions(temperature, row_temperature, logit_scale=logit_scale)
    forward = HeadPass.make(
        hidden, weight, token_ids, options, row_mask, compact=compact, shards=shards
    )
    unit = unit_grads(logprobs, options, kept.dtype)
    # divided by 0 where the logprob is NaN: the kept row is 0 there, and 0 * inf is NaN
    scale = forward.take(torch.where(grad_logprobs == 0, 0.0, grad_logprobs / unit))
    head, picks = forward.narrow(scale != 0, compact=compact)
    if picks is not None:
        scale = scale[picks] if head.mask is None else torch.where(head.mask, scale[picks], 0.0)
    unscale = None
    if kept.dtype == torch.float16 and len(scale):
        unscale = power_above(torch.where(scale.isfinite(), scale, 0.0).abs().amax())
        scale = scale / unscale
    every_row = use_triton(hidden) and not compact
    into = HeadGrads.make(hidden, weight, tuple(needs), head.hidden_grad_dtype, every_row=every_row)
    copied = picks is not None or into.bias is not None
    rows_per_chunk = chunk_rows(hidden, weight.shape[0]) if copied else max(1, head.places)
    for chunk in head.chunks(rows_per_chunk):
        rows = kept[chunk] if picks is None else kept.index_select(0, picks[chunk])
        into.add(
            head.rows_of(chunk),
            rows,
            head.chunk_hidden(chunk),
            weight,
            unscale,
            row_scale=scale[chunk],
            live=head.live,
        )
    head.finish(into)
    return into.as_outputs(hidden, weight, bias)


@_keep_backward_op.register_fake
def _(grad_logprobs, hidden, weight, bias, *rest, tp_group=None):
    return HeadGrads.fake_outputs(hidden, weight, bias, rest[8])


def _keep_setup(ctx, inputs, output) -> None:
    *tensors, temperature, _, logit_scale, compact, _, tp_group = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)
    ctx.scalars = (temperature, logit_scale, compact)
    ctx.tp_group = tp_group


@first_derivatives_only
def _keep_backward(ctx, grad_logprobs, _):
    if grad_logprobs is None:
        return (None,) * 12
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    arguments = (grad_logprobs.contiguous(), *ctx.saved_tensors, *ctx.scalars)
    results = _keep_backward_op(*arguments, needs, ctx.tp_group)
    made = [grad if need else None for grad, need in zip(results, needs, strict=True)]
    return (*made, *[None] * 9)


_keep.register_autograd(_keep_backward, setup_context=_keep_setup)


def kept_logprobs(*arguments) -> torch.Tensor:
    """logprobs [N], A kept for the backward pass; the arguments of the operator."""
    return _keep(*arguments)[0]
