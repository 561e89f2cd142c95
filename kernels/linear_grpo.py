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

Two ways from logits to G, both exact:

* With a prior, the old log-probabilities or else the sampler's, and no entropy bonus: the logits
  are read once, before g is known, and become E with G = r E, r one number a row (exp_rows.py).
  14 bytes a logit on CUDA at half inputs, besides the GEMMs' own reads of X and W and the sum of
  d weight.
* Without one, with an entropy bonus (its gradient is no multiple of E), a bias that requires grad,
  ``batch_invariant`` or ``tp_group``: fold_rows, the loss, dlogits_rows. 18 bytes a logit (fp32
  written by the GEMM, read by the fold, read again for G; G written in half and read by two GEMMs).
  Also where nothing requires grad: 8, the fold alone.

The largest item with a trainable head on CUDA is neither of these: each chunk of C rows reads and
writes d weight in fp32, 8 D V bytes or 8 D / C a logit. At D = 4096, V = 151,936 in bf16 a chunk
has 1,280 rows (head_chunks.py): 25.6 bytes a logit, 64.7 GB over the 13 chunks of N = 16,384, which
at 4.3 TB/s take 15 ms, as against 8 ms for the 14 bytes; how much of it hides behind the products
is not yet measured. Twice the rows would halve it, and take twice the workspace.

A sequence-level ratio (GSPO, VESPO) or sampler correction makes g_t depend on the whole sequence,
which a chunk of rows may cut. Those options, and ``kept`` sets, run in two phases: linear_logprobs,
then grpo_loss, then the backward of linear_logprobs, which computes the logits a second time
(8 N D V FLOP; with a frozen head 4, or 8 with an entropy bonus).

Saved for backward: d hidden, d weight and d bias in fp32, nothing of size N by V. They are rounded
once, after the incoming scalar (a loss scaler's would come too late for a flushed fp16 value).
Where nothing requires grad none are made.

Memory beside inputs and results, at the sizes above: 2.76 GB of fp32 gradients (d weight 2.49) from
the first chunk until backward is done; 1.17 GB of workspace in the forward pass, none in backward,
which rounds each gradient into its own tensor. The largest sum, 4.14 GB, is reached there: 2.76 GB
beside the bf16 gradients that stay. A frozen head has no d weight: 1.44 GB, in the forward pass.
"""

from __future__ import annotations

import torch

from grpo_engine.kernels.certified import SparseBackward, check_sparse_options, head_metric_sums
from grpo_engine.kernels.common import custom_op, first_derivatives_only, use_triton
from grpo_engine.kernels.grpo_loss import (
    NUM_METRICS,
    LossMetrics,
    LossOptions,
    check_advantages,
    check_loss_inputs,
    grpo_loss,
    grpo_loss_ref,
    make_loss_options,
    metric_names,
    per_token_advantages,
    token_weights,
)
from grpo_engine.kernels.head_chunks import HeadGrads
from grpo_engine.kernels.head_pass import HeadPass
from grpo_engine.kernels.linear_grpo_chunks import TokenLoss, add_chunk_grads, read_chunk
from grpo_engine.kernels.linear_logprobs import (
    check_flag,
    check_head,
    linear_logprobs,
    linear_logprobs_ref,
)
from grpo_engine.kernels.logprobs import split_temperature
from grpo_engine.kernels.loss_options import (
    HEAD_METRICS,
    check_denominator,
    refuse_unknown_options,
)
from grpo_engine.kernels.vocab_parallel import (
    agree_on_loss,
    grad_facts,
    group_name_of,
    together,
)
from grpo_engine.kernels.vocab_rows import LogitOptions, RowStats

SPARSE_MAX_ENTRIES = 64  # the default


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
    kept: torch.Tensor | None = None,
    compact_rows: bool | None = None,
    batch_invariant: bool = False,
    tp_group: object | None = None,
    sparse_delta: float | None = None,
    sparse_max_entries: int = SPARSE_MAX_ENTRIES,
    loss_mask: torch.Tensor | None = None,
    **loss_arguments,
) -> tuple[torch.Tensor, LossMetrics, torch.Tensor]:
    """Specification of ``linear_grpo_loss``: linear_logprobs_ref, then grpo_loss_ref.

    ``compact_rows`` and ``batch_invariant`` say how, not what: no effect here. Nor has
    ``sparse_delta``: its gradient is certified to be near this one.
    """
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
        kept=kept,
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
    compact: bool,
    batch_invariant: bool,
    choices: str,
    numbers: list[float],
    needs: list[bool],
    tp_group: str | None = None,
    sparse_delta: float | None = None,
    sparse_max_entries: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, logprobs, metric sums, and the gradients of hidden, weight and bias for a loss gradient
    of 1; a gradient without elements where ``needs`` is False."""
    row_mask = None if mask is None else mask != 0
    if compact and mask is None:
        row_mask = torch.ones(len(token_ids), dtype=torch.bool, device=hidden.device)
    fields = {
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "cu_seqlens, loss_mask or denominator": weights,
        "loss_mask": mask,
        "ref_logprobs": ref_logprobs,
        "sampler_logprobs": sampler_logprobs,
    }
    head = HeadPass.forward(
        hidden,
        weight,
        token_ids,
        LogitOptions(temperature, row_temperature, bias, logit_scale, logit_softcap),
        row_mask,
        compact=compact,
        batch_invariant=batch_invariant,
        tp_group=tp_group,
        pass_name="linear_grpo_loss",
        **fields,
        **{"loss options": [choices, numbers], "return_entropy": want_entropy},
        **grad_facts(needs),
    )
    loss = TokenLoss.make(
        head, LossOptions.from_op_arguments(choices, numbers), tuple(fields.values())
    )
    # one factor a row makes neither the gradient of the entropy nor, without a pass, of the bias;
    # and it would take a second collective to try the prior of a row that several shards hold
    folded = needs[2] or loss.options.entropy_coef or batch_invariant or head.shards is not None
    one_read = any(needs[:2]) and not folded
    every_row = use_triton(hidden) and head.live is None
    into = HeadGrads.make(hidden, weight, tuple(needs), torch.float32, every_row=every_row)
    work = head.workspace(for_gradient=any(needs))
    stats = RowStats.zeros(hidden, head.places, want_entropy=False)
    sparse = SparseBackward.make(head, sparse_delta, sparse_max_entries, any(needs))
    for chunk in head.chunks(work.rows):
        prior = loss.prior if one_read else None
        rows = read_chunk(head, chunk, work, prior, want_entropy, as_exps=sparse is not None)
        stats.logprobs[chunk] = rows.logprobs
        grads = loss.add(chunk, rows.logprobs, rows.entropy if want_entropy else None)
        if sparse is not None:
            sparse.add(head, chunk, rows, grads.logprobs, into)
        elif any(needs) and (use_triton(hidden) or bool(grads.live().any())):
            add_chunk_grads(head, chunk, work, rows, grads, into)
    if sparse is not None:
        sparse.finish(head, into)
    head.finish(into)
    logprobs = head.put_back(stats, want_entropy=False).logprobs
    made = [
        hidden.new_empty(0, dtype=torch.float32) if g is None else g
        for g in (into.hidden, into.weight, into.bias)
    ]
    sums = loss.metric_sums
    if sparse_delta is not None:
        sums = torch.cat((sums, head_metric_sums(sparse, loss.mask, sums)))
    return loss.loss, logprobs, sums, *made


@_linear_grpo.register_fake
def _(hidden, weight, bias, *rest, tp_group=None, sparse_delta=None, sparse_max_entries=0):
    need_hidden, need_weight, need_bias = rest[16]
    is_sparse = (rest[18] if len(rest) > 18 else sparse_delta) is not None
    shapes = (
        (),
        hidden.shape[:1],
        (NUM_METRICS + len(HEAD_METRICS) * is_sparse,),
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
    results = [None] * 23
    if grad_loss is None:
        return tuple(results)
    for i, (grad, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
        if ctx.needs_input_grad[i]:
            rounded = torch.empty_like(grad, dtype=dtype)
            results[i] = torch.mul(grad, grad_loss, out=rounded)
    return tuple(results)


_linear_grpo.register_autograd(_backward, setup_context=_setup_context)


# ---- Public function -----------------------------------------------------------------------------


@together
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
    kept: torch.Tensor | None = None,
    compact_rows: bool | None = None,
    batch_invariant: bool = False,
    tp_group: object | None = None,
    sparse_delta: float | None = None,
    sparse_max_entries: int = SPARSE_MAX_ENTRIES,
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
        row_mask: [N] bool; the same as a zero in ``loss_mask``. The logprob of a row that either
            leaves out is returned as 0.
        kept: what the sampler kept of each row, as in ``linear_logprobs``: loss, logprobs and
            entropy are then of the distribution over it, as ``sampler_logprobs`` of a truncating
            sampler are; ``old_logprobs`` and ``ref_logprobs`` must be, too. Two phases for every
            loss: kept ids cost no GEMM in either, a mask four (8 N D V FLOP). Not with
            compact_rows=True or batch_invariant.
        compact_rows: on CUDA, spend no GEMM work on the rows that the masks leave out, and of the
            others only the first GEMM on those without a gradient (advantage and beta 0, or
            clipped; not with entropy_coef), without a host sync. None: where ``row_mask`` is given;
            True: also without it: for a batch in which many advantages are 0. False: never.
            Compacted, the GEMMs are live_gemm.py's, else cuBLAS's, the faster ones where most rows
            count (by how much is not yet timed). A CPU always leaves out what it can.
        batch_invariant: logprobs as ``linear_logprobs(batch_invariant=True)`` gives them, bit for
            bit, so that the ratio to log-probabilities it made is exactly 1 in any packing. Without
            it a log-probability that agrees with ``old_logprobs`` to within fp32 rounding is
            returned equal to it, which most are on the policy that made them, but not all.
        sparse_delta: None: the exact gradient. In (0, 1): of each row the entries that hold all but
            this share of its mass (probability, times the slope of a softcap), as long as
            sparse_max_entries [1, 128] do; the other rows exactly (certified.py bounds the error).
            The loss, its metrics and the logprobs do not change; ``metrics`` has two more,
            ``dropped_mass`` and ``sparse_rows``. Pays on a policy that is sure of itself. Not with
            entropy_coef, a bias that requires grad, sequence-level options, kept or tp_group.
        **loss_options: the other options of ``grpo_loss``: loss_type, importance_level, epsilon,
            epsilon_high, delta, beta, kl_estimator, kl_bias_correction, is_correction, is_clip,
            entropy_coef, max_completion_length, sapo_temperature_pos, sapo_temperature_neg,
            vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg.

    Returns:
        (loss, metrics, logprobs): 0-d fp32, differentiable with respect to hidden, weight and bias
        (once: backward raises RuntimeError under ``create_graph=True``);
        ``LossMetrics``; the current log-probabilities [N] fp32, without gradient.

    Raises:
        ValueError: wrong shape, dtype, device, or option, or another tensor that requires grad; the
            message names it.
        TypeError: an option that does not exist.
    """
    refuse_unknown_options("linear_grpo_loss", loss_options)
    options = make_loss_options(**loss_options)
    check_head(hidden, weight, token_ids, bias, logit_softcap, logit_scale, row_mask, tp_group)
    check_flag("compact_rows", compact_rows, or_none=True)
    check_flag("batch_invariant", batch_invariant)
    num_tokens, device = hidden.shape[0], hidden.device
    fields = {
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "sampler_logprobs": sampler_logprobs,
    }
    check_loss_inputs(options, num_tokens, device, cu_seqlens, loss_mask, fields)
    if sparse_delta is not None:
        check_sparse_options(sparse_delta, sparse_max_entries)
        _check_sparse_allowed(sparse_delta, options, bias, kept, tp_group)
    elif sparse_max_entries != SPARSE_MAX_ENTRIES:
        raise ValueError(
            f"sparse_max_entries={sparse_max_entries!r} has no meaning without sparse_delta"
        )
    mask = combined_mask(loss_mask, row_mask)
    compact = row_mask is not None if compact_rows is None else compact_rows
    want_entropy = return_entropy or options.entropy_coef != 0
    check_advantages(advantages, num_tokens, device, cu_seqlens)
    check_denominator(options, denominator)
    grad_mode = torch.is_grad_enabled()
    needs = [grad_mode and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    if options.needs_sequence_pass or kept is not None:
        facts = {
            **fields,
            "advantages": advantages,
            "loss_mask": mask,
            "cu_seqlens": cu_seqlens,
            "denominator": denominator,
            "loss options": list(options.op_arguments()),
            "return_entropy": want_entropy,
            "batch_invariant": batch_invariant,
        }
        agree_on_loss(tp_group, weight, facts | grad_facts(needs))
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
                "kept": kept,
                "compact_rows": compact if kept is None else compact_rows,
                "batch_invariant": batch_invariant,
                "tp_group": tp_group,
            },
            loss={**fields, **loss_options, "cu_seqlens": cu_seqlens, "denominator": denominator},
        )
    scalar, per_row = split_temperature(temperature, num_tokens, device)
    loss, logprobs, sums, _, _, _ = _linear_grpo(
        hidden if hidden.stride(1) == 1 else hidden.contiguous(),
        weight if weight.stride(1) == 1 else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        token_ids.contiguous(),
        per_row,
        None if mask is None else mask.contiguous(),
        old_logprobs,
        per_token_advantages(advantages, num_tokens, cu_seqlens),
        token_weights(num_tokens, cu_seqlens, mask, options, denominator, device),
        ref_logprobs,
        sampler_logprobs,
        scalar,
        None if logit_softcap is None else float(logit_softcap),
        1.0 if logit_scale is None else float(logit_scale),
        want_entropy,
        compact and use_triton(hidden),
        batch_invariant,
        *options.op_arguments(),
        needs,
        group_name_of(tp_group),
        None if sparse_delta is None else float(sparse_delta),
        sparse_max_entries,
    )
    names = metric_names(
        options,
        has_ref=ref_logprobs is not None,
        has_entropy=want_entropy,
        has_sampler=sampler_logprobs is not None,
    )
    names += () if sparse_delta is None else HEAD_METRICS
    return loss, LossMetrics(sums, names), logprobs


def _check_sparse_allowed(
    sparse_delta: float,
    options: LossOptions,
    bias: torch.Tensor | None,
    kept: torch.Tensor | None,
    tp_group: object | None,
) -> None:
    """ValueError for an option whose gradient a sparse row does not make."""
    bias_grad = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    for refused, what in (
        (options.entropy_coef != 0, f"entropy_coef={options.entropy_coef!r}"),
        (options.loss_type == "vespo", "loss_type='vespo'"),
        (options.importance_level == "sequence", "importance_level='sequence' or loss_type='gspo'"),
        (options.needs_sequence_pass, f"is_correction={options.is_correction!r}"),
        (bias_grad, "a bias that requires grad"),
        (kept is not None, "kept"),
        (tp_group is not None, "tp_group"),
    ):
        if refused:
            raise ValueError(f"sparse_delta={sparse_delta!r} does not go with {what}")


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
    """Sequence-level options and kept sets: log-probabilities first, then the loss on all."""
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
