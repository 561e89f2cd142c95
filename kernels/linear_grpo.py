"""GRPO loss straight from hidden states, its gradient made in the forward pass: three GEMMs.

Maths. The head of linear_logprobs.py followed by the loss of grpo_loss.py. With x = logprobs [N]:

    loss = sum_t w_t l_t(x_t, H_t),  g_t = dloss/dx_t,  e_t = dloss/dH_t         (loss_and_grad)
    G = dL/d raw of (g, e) [N, V],  d hidden = G @ weight,  d weight = G.T @ hidden

Why three GEMMs. A loss that is a sum over tokens has a g_t that depends on token t alone, since the
weights w_t (mask, per-sequence mean, denominator) need no log-probabilities. So while a chunk's
logits are there, the loss gives its g, the logits become G and both products are added up. Backward
only multiplies by the incoming scalar, on the device. The logits are computed once, not twice:
6 N D V FLOP instead of 8, and 4 with a frozen head. For every token-level option that is the floor
of an exact dense gradient.

A sequence-level ratio (GSPO) or sampler correction makes g_t depend on the whole sequence, which a
chunk of rows may cut. Those options run in two phases: linear_logprobs, then grpo_loss, then the
backward of linear_logprobs, which computes the logits a second time (8 N D V FLOP).

Saved for backward: d hidden, d weight and d bias in fp32, nothing of size N by V. They are rounded
once, after the incoming scalar (a loss scaler's would come too late for a flushed fp16 value).
Where nothing requires grad none are made.

Bytes on CUDA at half inputs, besides the GEMMs' own reads of X and W: 18 a logit (fp32 written by
the GEMM, read by the fold, read again for G; G written in half and read by two GEMMs).
"""

from __future__ import annotations

import torch

from grpo_engine.kernels.common import custom_op, first_derivatives_only, use_triton
from grpo_engine.kernels.grpo_loss import (
    NUM_METRICS,
    LossMetrics,
    LossOptions,
    check_loss_inputs,
    grpo_loss,
    grpo_loss_ref,
    loss_and_grad,
    make_loss_options,
    metric_names,
    per_token_advantages,
    token_weights,
)
from grpo_engine.kernels.head_chunks import (
    HeadGrads,
    Workspace,
    chunk_hidden,
    head_chunk_backward,
    head_row_chunks,
    raw_logits,
)
from grpo_engine.kernels.linear_logprobs import (
    check_head,
    check_live_rows,
    linear_logprobs,
    linear_logprobs_ref,
)
from grpo_engine.kernels.logprobs import split_temperature
from grpo_engine.kernels.vocab_rows import LogitOptions, RowGrads, fold_rows


def linear_grpo_loss_ref(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float | None = None,
    return_entropy: bool = False,
    row_mask: torch.Tensor | None = None,
    tp_group: object | None = None,
    loss_mask: torch.Tensor | None = None,
    **loss_arguments,
) -> tuple[torch.Tensor, LossMetrics, torch.Tensor]:
    """Specification of ``linear_grpo_loss``: linear_logprobs_ref, then grpo_loss_ref."""
    mask = combined_mask(loss_mask, row_mask)
    want_entropy = return_entropy or bool(loss_arguments.get("entropy_coef"))
    outputs = linear_logprobs_ref(
        hidden,
        weight,
        token_ids,
        bias=bias,
        temperature=temperature,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        return_entropy=want_entropy,
        row_mask=None if mask is None else mask != 0,
        tp_group=tp_group,
    )
    logprobs, entropy = outputs if want_entropy else (outputs, None)
    loss, metrics = grpo_loss_ref(
        logprobs, old_logprobs, advantages, loss_mask=mask, entropy=entropy, **loss_arguments
    )
    return loss, metrics, logprobs.detach()


def combined_mask(
    loss_mask: torch.Tensor | None, row_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """The loss mask with the rows outside ``row_mask`` set to 0; None where neither is given."""
    if loss_mask is None or row_mask is None:
        return row_mask if loss_mask is None else loss_mask
    return torch.where(row_mask, loss_mask, torch.zeros_like(loss_mask))


# ---- Registered operator -------------------------------------------------------------------------


@custom_op("grpo_engine::linear_grpo")
def _linear_grpo(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    token_ids: torch.Tensor,
    row_temperature: torch.Tensor | None,
    mask: torch.Tensor | None,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    sampler_logprobs: torch.Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    logit_scale: float,
    want_entropy: bool,
    choices: str,
    numbers: list[float],
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, logprobs, metric sums, and the gradients of hidden, weight and bias for a loss gradient
    of 1; a gradient without elements where ``needs`` is False."""
    loss_options = LossOptions.from_op_arguments(choices, numbers)
    row_mask = None if mask is None else mask != 0
    check_live_rows(token_ids, row_temperature, row_mask, weight.shape[0])
    options = LogitOptions(temperature, row_temperature, bias, logit_scale, logit_softcap)
    fields = (old_logprobs, advantages, weights, mask, ref_logprobs, sampler_logprobs)

    loss, sums, logprobs = (
        hidden.new_zeros(shape, dtype=torch.float32) for shape in ((), NUM_METRICS, hidden.shape[0])
    )
    into = HeadGrads.make(hidden, weight, tuple(needs), torch.float32)
    work = Workspace.make(hidden, weight.shape[0], for_gradient=any(needs))
    for index in head_row_chunks(hidden, work.rows, row_mask):
        rows = chunk_hidden(hidden, index, row_mask)
        ids, chunk_options = token_ids[index], options.rows(index)
        live = None if row_mask is None else row_mask[index]
        logits = raw_logits(rows, weight, work.logits[: len(rows)])
        stats = fold_rows(logits, work.dlogits[: len(rows)], ids, chunk_options, want_entropy, live)
        logprobs[index] = stats.logprobs
        old, adv, w, m, ref, sampler = (None if f is None else f[index] for f in fields)
        entropy = stats.entropy if want_entropy else None
        chunk_loss, grad, grad_entropy, chunk_sums = loss_and_grad(
            stats.logprobs, old, adv, w, None, m, ref, sampler, entropy, loss_options
        )
        loss += chunk_loss
        sums += chunk_sums
        grads = RowGrads(grad, grad_entropy if loss_options.entropy_coef else None)
        if not any(needs) or (not use_triton(hidden) and not bool(grads.live().any())):
            continue
        head_chunk_backward(index, work, rows, weight, ids, chunk_options, stats, grads, live, into)
    made = [
        hidden.new_empty(0, dtype=torch.float32) if g is None else g
        for g in (into.hidden, into.weight, into.bias)
    ]
    return loss, logprobs, sums, *made


@_linear_grpo.register_fake
def _(hidden, weight, bias, *rest):
    need_hidden, need_weight, need_bias = rest[-1]
    shapes = (
        (),
        hidden.shape[:1],
        (NUM_METRICS,),
        hidden.shape if need_hidden else (0,),
        weight.shape if need_weight else (0,),
        bias.shape if need_bias else (0,),
    )
    return tuple(hidden.new_empty(shape, dtype=torch.float32) for shape in shapes)


# ---- Autograd ------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:])
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]


@first_derivatives_only
def _backward(ctx, grad_loss, *_):
    results = [None] * 18
    if grad_loss is None:
        return tuple(results)
    for i, (grad, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
        if ctx.needs_input_grad[i]:
            rounded = torch.empty_like(grad, dtype=dtype)
            results[i] = torch.mul(grad, grad_loss, out=rounded)
    return tuple(results)


_linear_grpo.register_autograd(_backward, setup_context=_setup_context)


# ---- Public function -----------------------------------------------------------------------------


def linear_grpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float | None = None,
    return_entropy: bool = False,
    row_mask: torch.Tensor | None = None,
    tp_group: object | None = None,
    cu_seqlens: torch.Tensor | None = None,
    loss_mask: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    sampler_logprobs: torch.Tensor | None = None,
    denominator: float | torch.Tensor | None = None,
    **loss_options,
) -> tuple[torch.Tensor, LossMetrics, torch.Tensor]:
    """GRPO loss of packed completion tokens from their hidden states, without [N, V] in memory.

    Args:
        hidden, weight, token_ids, bias, temperature, logit_softcap, logit_scale, tp_group: the
            head, as in ``linear_logprobs``; [N, D], [V, D], [N], [V], float or [N].
        old_logprobs, advantages, cu_seqlens, loss_mask, ref_logprobs, sampler_logprobs,
            denominator: the loss, as in ``grpo_loss``; [N] fp32, [S + 1] integer.
        return_entropy: compute the entropy for ``metrics`` even where ``entropy_coef`` is 0.
        row_mask: [N] bool; the same as a zero in ``loss_mask``. A row that either leaves out costs
            what it costs in ``linear_logprobs``, and its logprob is returned as 0.
        **loss_options: the other options of ``grpo_loss``: loss_type, importance_level, epsilon,
            epsilon_high, delta, beta, kl_estimator, kl_bias_correction, is_correction, is_clip,
            entropy_coef, max_completion_length, sapo_temperature_pos, sapo_temperature_neg.

    Returns:
        (loss, metrics, logprobs): 0-d fp32, differentiable with respect to hidden, weight and bias
        (once: backward raises RuntimeError under ``create_graph=True``);
        ``LossMetrics``; the current log-probabilities [N] fp32, without gradient.

    Raises:
        ValueError: wrong shape, dtype, device, or option, or another tensor that requires grad; the
            message names it.
        TypeError: an option that does not exist.
    """
    options = make_loss_options(**loss_options)
    check_head(hidden, weight, token_ids, bias, logit_softcap, logit_scale, row_mask, tp_group)
    num_tokens, device = hidden.shape[0], hidden.device
    fields = {
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "sampler_logprobs": sampler_logprobs,
    }
    check_loss_inputs(options, num_tokens, device, cu_seqlens, loss_mask, fields)
    mask = combined_mask(loss_mask, row_mask)
    want_entropy = return_entropy or options.entropy_coef != 0
    if options.needs_sequence_pass:
        return _two_phases(
            hidden,
            weight,
            token_ids,
            advantages,
            mask,
            want_entropy,
            head={
                "bias": bias,
                "temperature": temperature,
                "logit_softcap": logit_softcap,
                "logit_scale": logit_scale,
            },
            loss={**fields, **loss_options, "cu_seqlens": cu_seqlens, "denominator": denominator},
        )
    advantages = per_token_advantages(advantages, num_tokens, device, cu_seqlens)
    scalar, per_row = split_temperature(temperature, num_tokens, device)
    grad_mode = torch.is_grad_enabled()
    loss, logprobs, sums, _, _, _ = _linear_grpo(
        hidden,
        weight,
        None if bias is None else bias.contiguous(),
        token_ids.contiguous(),
        per_row,
        None if mask is None else mask.contiguous(),
        old_logprobs,
        advantages,
        token_weights(num_tokens, cu_seqlens, mask, options, denominator, device),
        ref_logprobs,
        sampler_logprobs,
        scalar,
        None if logit_softcap is None else float(logit_softcap),
        1.0 if logit_scale is None else float(logit_scale),
        want_entropy,
        *options.op_arguments(),
        [grad_mode and t is not None and t.requires_grad for t in (hidden, weight, bias)],
    )
    names = metric_names(
        options,
        has_ref=ref_logprobs is not None,
        has_entropy=want_entropy,
        has_sampler=sampler_logprobs is not None,
    )
    return loss, LossMetrics(sums, names), logprobs


def _two_phases(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor | None,
    want_entropy: bool,
    head: dict,
    loss: dict,
) -> tuple[torch.Tensor, LossMetrics, torch.Tensor]:
    """Sequence-level options: log-probabilities first, then the loss on all of them."""
    outputs = linear_logprobs(
        hidden,
        weight,
        token_ids,
        return_entropy=want_entropy,
        row_mask=None if mask is None else mask != 0,
        **head,
    )
    logprobs, entropy = outputs if want_entropy else (outputs, None)
    value, metrics = grpo_loss(
        logprobs, advantages=advantages, loss_mask=mask, entropy=entropy, **loss
    )
    return value, metrics, logprobs.detach()
