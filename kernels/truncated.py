"""Log-probabilities renormalised over what a sampler kept: top-k, top-p, or any set of ids per row.

Maths. A sampler that truncates draws from p_k / sum of p over the kept set S, not from p. Training
against it with log-probabilities over the whole vocabulary puts the kept mass into every ratio
(DeepSeek-V3.2, arXiv:2512.02556, section 3.1 "Keep Sampling Mask"; trl issue 6789). So the row
maths of logprobs.py runs over S_n alone: logits outside S_n are -inf, and lse and entropy are those
of the truncated distribution. S_n is given, not recomputed from the policy's own logits: it must
stay the sampler's while the policy moves. Which ids are kept takes no gradient.

``kept`` has two forms (``KEPT``):

* ids [N, K] int32 or int64, each at most once in a row, the rest of the row filled with -1 (any
  negative number, in any place): the lists of ids that vLLM's and SGLang's ``return_sampling_mask``
  give, padded. No GEMM touches the vocabulary: K dot products a row, a softmax over them, and a
  backward of K rows gathered and added (truncated_ids.py, sparse_rows.py).
* a mask: [N, V] bool, or its bits, [N, ceil(V / 8)] uint8, id v in bit v % 8 of byte v // 8. The
  chunks and GEMMs of linear_logprobs, with the logits outside the mask set to -inf
  (truncated_mask.py). Never cheaper than the whole head: for kept sets without a bound on their
  size.

With E kept entries, ids take 2 E D FLOP forward and 2 E D for each of d hidden and d weight, where
the dense head takes 2 N V D for each of four. Saved for backward: [N, K] fp32 logits beside the
ids. Bytes at inputs of b bytes: forward reads E D b; backward reads 2 E D b, and what depends on V
is d weight alone: 4 V D to zero it, (4 + b) V D to round it. Some twelve passes over [N, K] fp32
come on top: bias, softcap, softmax, their gradients.

A row's token must be in its kept set: a sampler cannot have drawn another. Where it is not, or an
id is out of [0, V), a CPU raises ValueError; on CUDA, where looking would be a host sync, that
row's results are NaN. An id twice in a row raises on a CPU; on CUDA it counts twice.
"""

from __future__ import annotations

import torch

from grpo_engine.kernels.common import INT_DTYPES, custom_op, first_derivatives_only, use_triton
from grpo_engine.kernels.head_pass import check_live_rows
from grpo_engine.kernels.logprobs import row_grads
from grpo_engine.kernels.truncated_ids import ids_backward, ids_forward
from grpo_engine.kernels.truncated_mask import mask_backward, mask_forward
from grpo_engine.kernels.vocab_rows import LogitOptions, RowGrads, RowStats

KEPT = "ids [N, K] int32 or int64, mask [N, V] bool, or bits [N, ceil(V / 8)] uint8"

# On the Triton path lists of kept ids are filled up to a multiple of this: one kernel for each
# power of two of K, and not two.
KEPT_MULTIPLE = 16


def check_kept(kept: torch.Tensor, num_rows: int, vocab: int, device: torch.device) -> None:
    """ValueError unless ``kept`` has one of its three forms, on ``device``."""
    if not isinstance(kept, torch.Tensor):
        raise ValueError(f"kept must be a tensor, got {type(kept).__name__}")
    widths = {torch.bool: vocab, torch.uint8: -(-vocab // 8)}
    if kept.dtype not in (*widths, *INT_DTYPES):
        raise ValueError(f"kept must be {KEPT}; got {kept.dtype}")
    width = widths.get(kept.dtype, "K")
    right_width = kept.ndim == 2 and (kept.shape[1] == width or (width == "K" and kept.shape[1]))
    if not right_width or kept.shape[0] != num_rows:
        raise ValueError(
            f"kept of {kept.dtype} must have shape [{num_rows}, {width}] with K > 0, got "
            f"{list(kept.shape)}"
        )
    if kept.device != device:
        raise ValueError(f"kept is on {kept.device}, expected {device}")


def refuse_with_kept(**arguments: object) -> None:
    """ValueError for an option that is set and has no meaning, or no code, over a kept set."""
    for name, value in arguments.items():
        if value:
            raise ValueError(f"{name}={value!r} does not go with kept: leave one of them out")


def truncated_logprobs(
    kept: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, *arguments
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities, entropy (without elements unless wanted) and lse, [N] fp32 each, of the
    distribution over ``kept``. ``linear_logprobs`` calls it with arguments that it has checked:
    bias, token_ids, row_temperature, row_mask, temperature, logit_softcap, logit_scale and
    want_entropy of the operator below.
    """
    check_kept(kept, hidden.shape[0], weight.shape[0], hidden.device)
    if kept.dtype == torch.int64:  # an id beyond int32 stays out of the vocabulary
        kept = kept.clamp(-1, weight.shape[0]).to(torch.int32)
    if kept.dtype == torch.int32 and use_triton(hidden):  # kernels are compiled by what divides K
        kept = torch.nn.functional.pad(kept, (0, -kept.shape[1] % KEPT_MULTIPLE), value=-1)
    bias, token_ids, *rest = arguments
    results = _truncated_logprobs(hidden, weight, bias, token_ids, kept.contiguous(), *rest)
    return results[:3]


# ---- Registered operators ------------------------------------------------------------------------


@custom_op("grpo_engine::truncated_logprobs")
def _truncated_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    token_ids: torch.Tensor,
    kept: torch.Tensor,
    row_temperature: torch.Tensor | None,
    row_mask: torch.Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    logit_scale: float,
    want_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The five fields of RowStats, and with kept ids their logits [N, K] fp32 for backward."""
    options = LogitOptions(temperature, row_temperature, bias, logit_scale, logit_softcap)
    check_live_rows(token_ids, row_temperature, row_mask, weight.shape[0])
    forward = ids_forward if kept.dtype == torch.int32 else mask_forward
    stats, logits = forward(hidden, weight, token_ids, kept, options, row_mask, want_entropy)
    return (*stats, logits)


@_truncated_logprobs.register_fake
def _(hidden, weight, bias, token_ids, kept, *rest):
    stats = RowStats.empty(hidden, hidden.shape[0], want_entropy=rest[-1])
    shape = kept.shape if kept.dtype == torch.int32 else (0,)
    return (*stats, hidden.new_empty(shape, dtype=torch.float32))


@custom_op("grpo_engine::truncated_logprobs_backward")
def _truncated_logprobs_backward(
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    token_ids: torch.Tensor,
    kept: torch.Tensor,
    row_temperature: torch.Tensor | None,
    row_mask: torch.Tensor | None,
    stats: list[torch.Tensor],
    logits: torch.Tensor,
    temperature: float,
    logit_softcap: float | None,
    logit_scale: float,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias; one without elements where ``needs`` is False."""
    backward = ids_backward if kept.dtype == torch.int32 else mask_backward
    made = backward(
        RowGrads(grad_logprobs, grad_entropy, grad_lse),
        hidden,
        weight,
        token_ids,
        kept,
        LogitOptions(temperature, row_temperature, bias, logit_scale, logit_softcap),
        row_mask,
        RowStats(*stats),
        logits,
        tuple(needs),
    )
    empty = hidden.new_empty
    return (
        empty(0) if made.hidden is None else made.hidden,
        empty(0, dtype=weight.dtype) if made.weight is None else made.weight.to(weight.dtype),
        empty(0) if made.bias is None else made.bias.to(bias.dtype),
    )


@_truncated_logprobs_backward.register_fake
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
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*tensors, *output)
    ctx.scalars = (temperature, logit_softcap, logit_scale)


@first_derivatives_only
def _backward(ctx, *grads):
    tensors, (*stats, logits) = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    incoming = row_grads(grads[:3], stats[0])
    results = _truncated_logprobs_backward(*incoming, *tensors, stats, logits, *ctx.scalars, needs)
    made = [grad if need else None for grad, need in zip(results, needs, strict=True)]
    return (*made, *[None] * 8)


_truncated_logprobs.register_autograd(_backward, setup_context=_setup_context)
