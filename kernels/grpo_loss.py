"""GRPO policy loss on packed per-token log-probabilities, with explicit derivatives.

For N packed completion tokens of S sequences, with mask m, weights w (`token_weights`), advantages
A and x = log pi of the token under the current policy:

    loss  = sum_t w_t l_t
    l_t   = c_t p_t + beta k_t [rho_t] - entropy_coef H_t     [rho_t]: with kl_bias_correction
    rho_t = exp(x_t - old_t)                                  importance_level="token"
    rho_s = exp(sum_s m (x - old) / sum_s m)                  "sequence": GSPO, arXiv 2507.18071

    p_t   = -min(min(rho, delta) A, clip(rho, 1 - epsilon, 1 + epsilon_high) A)
                 grpo (DeepSeekMath eq 3), dr_grpo (2503.20783), dapo (2503.14476), bnpo, luspo;
                 delta: INTELLECT-2 (2505.07291)
          = -min(rho, epsilon_high).detach() A x              cispo (2506.13585)
          = -(4 / tau) sigmoid(tau (rho - 1)) A               sapo (2511.20347), tau by sign of A
          = -phi_s.detach() A x                               vespo (2602.10693), with
    phi_s = exp(lambda + k log W - lambda W)                  k, lambda by sign of A; 1 at W = 1
    W     = exp(sum_s m (x - old + log c))                    the sequence's ratio, not its mean
    k_t   = x - ref                                           k1
          = (x - ref)^2 / 2                                   k2
          = exp(ref - x) - (ref - x) - 1                      k3 (DeepSeekMath eq 4)
    c_t   = bounded exp(old - sampler) of the token or of its sequence's sum; a constant.
            vespo has it in W and nowhere else

Backward, with a_t = dp_t / d log rho and d_t = dl_t / dx_t at fixed rho:

    token:     dloss/dx_t = w_t (d_t + c_t a_t [+ beta k_t rho_t])
    sequence:  dloss/dx_t = w_t d_t + m_t / (sum_s m) sum_{u in s} w_u (c_u a_u [+ beta k_u rho_s])

These come out of the same pass as the loss: the forward saves one fp32 gradient per token (one more
per entropy), the backward multiplies by the incoming scalar. First derivatives only: under
`create_graph=True` the backward raises.

Launches on CUDA, whatever the options: two forward, one backward (tests/test_grpo_loss_launches.py
counts them). Mask, [S] advantages, cu_seqlens and denominator are read as they come. The first
launch reads at most 8 floats a token and writes at most 2: N = 16,384 moves 0.7 MB, so launches are
the cost. Its programs take blocks of tokens, or for sequence-level options one sequence each, which
they sweep two or three times. It leaves one row of partial sums per program; the second launch adds
them in a fixed order (no atomics, the same bits in every run) and, where the loss is normalised by
a count over all tokens, divides loss and gradients by it. Hyper-parameters are run-time arguments.

Log-ratios are capped at 20 inside every exponential, with zero derivative beyond (verl caps there
too): e^20 = 5e8 marks a broken log-probability, and uncapped it overflows into 0 * inf = NaN
gradients on clipped tokens. vespo bounds a token's log-ratio by 20 on both sides, c and W to
[1e-8, e^20], as TRL does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_engine.kernels.common import custom_op, first_derivatives_only, use_triton
from grpo_engine.kernels.grpo_loss_reference import grpo_loss_ref
from grpo_engine.kernels.grpo_loss_torch import (
    check_advantages,
    float_mask,
    loss_and_grad_torch,
    per_token_advantages,
    segment_sum,
    sequence_ids,
)
from grpo_engine.kernels.loss_options import (
    METRICS,
    NUM_METRICS,
    SEQUENCE_MEAN_LOSSES,
    LossMetrics,
    LossOptions,
    check_denominator,
    check_loss_inputs,
    default_denominator,
    make_loss_options,
    metric_names,
)

__all__ = [
    "METRICS",
    "NUM_METRICS",
    "LossMetrics",
    "LossOptions",
    "check_advantages",
    "check_loss_inputs",
    "grpo_loss",
    "grpo_loss_ref",
    "loss_and_grad",
    "make_loss_options",
    "metric_names",
    "per_token_advantages",
    "token_weights",
]

# --------------------------------------------------------------------------------------------------
# Weights: mask, per-sequence mean and denominator in one number per token. linear_grpo_loss and the
# portable path need them as a tensor.


def token_weights(
    num_tokens: int,
    cu_seqlens: Tensor | None,
    loss_mask: Tensor | None,
    options: LossOptions,
    denominator: float | Tensor | None,
    device: torch.device,
) -> Tensor:
    """Weights w [N] fp32 such that the loss is sum_t w_t l_t; they need no log-probabilities.

    `denominator` (a positive number or 0-d tensor, already checked) replaces the default of the
    loss type, see `grpo_loss`.
    """
    mask = float_mask(num_tokens, loss_mask, device)
    num_sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if denominator is None:
        denominator = default_denominator(options, num_sequences)
    if denominator is None:
        denominator = mask.sum().clamp(min=1.0)
    if options.loss_type in SEQUENCE_MEAN_LOSSES:
        if cu_seqlens is None:
            cu_seqlens = torch.arange(2, device=device) * num_tokens
        mask = _sequence_mean_weights(mask, cu_seqlens)
    return mask / denominator


@custom_op("grpo_engine::sequence_mean_weights")
def _sequence_mean_weights(mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """mask / (its sum over the token's sequence), 0 where that is 0; fp32 [N]."""
    if use_triton(mask):
        from grpo_engine.kernels.grpo_loss_triton import sequence_mean_weights_triton

        return sequence_mean_weights_triton(mask.contiguous(), cu_seqlens)
    counts = segment_sum(mask, cu_seqlens)
    per_count = torch.where(counts > 0, 1 / counts, 0.0)
    return mask * per_count[sequence_ids(cu_seqlens, mask.shape[0])]


@_sequence_mean_weights.register_fake
def _(mask, cu_seqlens):
    return torch.empty_like(mask)


# --------------------------------------------------------------------------------------------------
# The seam shared with linear_grpo_loss: checked inputs in, loss and explicit gradients out


def loss_and_grad(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor | None,
    cu_seqlens: Tensor | None,
    loss_mask: Tensor | None,
    ref_logprobs: Tensor | None,
    sampler_logprobs: Tensor | None,
    entropy: Tensor | None,
    options: LossOptions,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss 0-d, its gradients [1, N] of logprobs or [2, N] of logprobs and entropy, metric sums
    [NUM_METRICS]), all fp32.

    Inputs are those of `grpo_loss`, already checked: fp32 [N], `advantages` also [S], `cu_seqlens`
    integer [S+1], `loss_mask` any dtype. `weights` [N] from `token_weights` stand for `cu_seqlens`
    and `denominator`; then, unless `options.needs_sequence_pass`, any cut of the tokens works, and
    losses and metric sums of the cuts add up.
    """
    fields = (ref_logprobs, sampler_logprobs, entropy, options)
    if use_triton(logprobs):
        from grpo_engine.kernels.grpo_loss_triton import loss_and_grad_triton

        per_token = (logprobs, old_logprobs, advantages, weights, cu_seqlens, loss_mask)
        return loss_and_grad_triton(*per_token, *fields, denominator)
    size, device = logprobs.shape[0], logprobs.device
    advantages = per_token_advantages(advantages, size, cu_seqlens)
    if weights is None:
        weights = token_weights(size, cu_seqlens, loss_mask, options, denominator, device)
    mask = float_mask(size, loss_mask, device)
    per_token = (logprobs, old_logprobs, advantages, weights, cu_seqlens, mask)
    return loss_and_grad_torch(*per_token, *fields)


# --------------------------------------------------------------------------------------------------
# torch.library registration and autograd


@custom_op("grpo_engine::grpo_loss")
def _grpo_loss_op(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor | None,
    loss_mask: Tensor | None,
    ref_logprobs: Tensor | None,
    sampler_logprobs: Tensor | None,
    entropy: Tensor | None,
    denominator_tensor: Tensor | None,
    denominator: float | None,
    choices: str,
    numbers: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """`loss_and_grad`; at most one of the two denominators."""
    return loss_and_grad(
        logprobs,
        old_logprobs,
        advantages,
        None,
        cu_seqlens,
        loss_mask,
        ref_logprobs,
        sampler_logprobs,
        entropy,
        LossOptions.from_op_arguments(choices, numbers),
        denominator if denominator_tensor is None else denominator_tensor,
    )


@_grpo_loss_op.register_fake
def _(logprobs, old_logprobs, advantages, cu_seqlens, loss_mask, ref, sampler, entropy, *_):
    rows = 1 if entropy is None else 2
    return (
        logprobs.new_empty(()),
        logprobs.new_empty(rows, logprobs.shape[0]),
        logprobs.new_empty(NUM_METRICS),
    )


def _setup_context(ctx, inputs, output) -> None:
    _, grads, metric_sums = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(grads, metric_sums)
    ctx.save_for_backward(grads)


@first_derivatives_only
def _backward(ctx, grad_loss, *_):
    results = [None] * 12
    if grad_loss is None:
        return tuple(results)
    (grads,) = ctx.saved_tensors
    needs_entropy = ctx.needs_input_grad[7]
    grads = grad_loss * (grads if needs_entropy else grads[:1])
    if ctx.needs_input_grad[0]:
        results[0] = grads[0]
    if needs_entropy:
        results[7] = grads[1]
    return tuple(results)


_grpo_loss_op.register_autograd(_backward, setup_context=_setup_context)


# --------------------------------------------------------------------------------------------------
# Public function


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    loss_mask: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    loss_type: str = "grpo",
    importance_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    kl_bias_correction: bool = False,
    is_correction: str | None = None,
    is_clip: tuple[float | None, float | None] = (0.0, 2.0),
    entropy_coef: float = 0.0,
    max_completion_length: int | None = None,
    denominator: float | Tensor | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[Tensor, LossMetrics]:
    """Policy-gradient loss of packed completions; formulas in the module docstring.

    Per-token inputs are fp32 [N], N the completion tokens of S sequences laid end to end. First
    derivatives flow to `logprobs` and `entropy` only: any other tensor that requires grad is an
    error (pass `.detach()`), and so is `create_graph=True`. What masked-out tokens hold is never
    read into the result.

    Args:
        logprobs: of the current policy.
        old_logprobs: of the policy that this update started from; None = exactly on-policy (ratio 1
            with gradient).
        advantages: [N], or [S] for one per sequence (a tensor of length N = S is taken per token).
        cu_seqlens: int32/int64 [S+1] offsets from 0 to N, empty sequences allowed; None = one
            sequence.
        loss_mask: [N] bool, or float weights >= 0 (0 drops a token); None = all tokens.
        ref_logprobs: of the reference policy; needed if beta > 0, else only reported as metric
            `kl`.
        sampler_logprobs: as the generator reported; needed by `is_correction`. NaN = not scored,
            weight 1.
        entropy: of the full distribution, per token; needed if entropy_coef != 0, else only
            reported.
        loss_type: grpo | dr_grpo | dapo | bnpo | luspo | cispo | sapo | vespo | gspo (= grpo with
            importance_level="sequence"). luspo (length-unbiased; meant for sequence ratios) is gspo
            without the mean over a sequence's tokens. vespo weighs each sequence by phi of its own
            ratio, so importance_level must stay "token".
        importance_level: ratio per token, or one length-normalised ratio per sequence.
        epsilon, epsilon_high: clip range [1 - epsilon, 1 + epsilon_high]; epsilon_high defaults to
            epsilon. For cispo epsilon_high is the cap of the ratio itself and defaults to 5
            (ScaleRL).
        delta: cap of the unclipped branch, >= 1 + epsilon_high; None = none.
        beta: KL coefficient. The KL term is not multiplied by the sampler correction (as in TRL).
        kl_estimator: k1 | k2 | k3. The gradient of k1 alone is not that of the KL divergence.
        kl_bias_correction: multiply the KL estimate by the differentiable ratio (DeepSeek-V3.2,
            2512.02556).
        is_correction: multiply the policy term by exp(old - sampler), bounded by `is_clip`:
            token_truncate | token_mask (0 outside) | sequence_truncate | sequence_mask (exp of the
            sequence's sum). With old_logprobs None the current, detached logprobs stand in for
            them. vespo takes a token_ one into its sequence ratio instead, and no sequence_ one.
        entropy_coef: subtracts entropy_coef times the entropy, normalised like the rest of the
            loss.
        denominator: divides the summed loss, so that micro-batches of any cut add up: for grpo and
            sapo (gspo) the sum of per-sequence masked means, otherwise the sum over tokens. None =
            of this call: grpo and sapo the number of sequences (an all-masked one counts as 0 in
            the sum and 1 in the number), luspo the number of sequences, dr_grpo sequences x
            max_completion_length, dapo, bnpo, cispo and vespo the masked-in tokens.
        sapo_temperature_pos, sapo_temperature_neg: sapo's tau for A > 0 and for A <= 0.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: vespo's k >= 0 and
            lambda >= 1e-4 for A >= 0 and for A < 0: k damps ratios below 1, lambda those above.

    Returns:
        (loss, metrics): 0-d fp32 and `LossMetrics`, whose `to_dict()` is the only host sync.

    Raises:
        ValueError: an unknown, contradictory or out-of-range option, or a tensor of wrong shape,
            dtype or device; names the argument and the value. `cu_seqlens` and `loss_mask` values
            are checked on CPU tensors only (no sync).
        RuntimeError: from backward, under `create_graph=True`.
    """
    options = make_loss_options(
        loss_type=loss_type,
        importance_level=importance_level,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        delta=delta,
        beta=beta,
        kl_estimator=kl_estimator,
        kl_bias_correction=kl_bias_correction,
        is_correction=is_correction,
        is_clip=is_clip,
        entropy_coef=entropy_coef,
        max_completion_length=max_completion_length,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        vespo_k_pos=vespo_k_pos,
        vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg,
        vespo_lambda_neg=vespo_lambda_neg,
    )
    fields = {
        "logprobs": logprobs,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "sampler_logprobs": sampler_logprobs,
        "entropy": entropy,
    }
    check_loss_inputs(options, logprobs.shape[0], logprobs.device, cu_seqlens, loss_mask, fields)
    check_advantages(advantages, logprobs.shape[0], logprobs.device, cu_seqlens)
    check_denominator(options, denominator)
    is_tensor = isinstance(denominator, Tensor)
    loss, _, metric_sums = _grpo_loss_op(
        logprobs,
        old_logprobs,
        advantages,
        cu_seqlens,
        loss_mask,
        ref_logprobs,
        sampler_logprobs,
        entropy,
        denominator if is_tensor else None,
        None if is_tensor or denominator is None else float(denominator),
        *options.op_arguments(),
    )
    names = metric_names(
        options,
        has_ref=ref_logprobs is not None,
        has_entropy=entropy is not None,
        has_sampler=sampler_logprobs is not None,
    )
    return loss, LossMetrics(metric_sums, names)
