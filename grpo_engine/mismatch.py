"""How far the sampler is from the trainer: the same tokens, the log-probs of both.

They differ by rounding, by kernels and number types, by a weight update that was lost, by options
that only one of them knows, and on purpose where rollouts are drawn ahead of the updates. With
d = log pi_trainer - log pi_sampler of a sampled token and w = exp(d):

    kl   = mean of w - 1 - d            KL(sampler || trainer) a token (k3: never negative)
    ess  = (sum w)^2 / (n sum w^2)      the share of n samples that importance weights w leave
           of tokens, and of sequences with w = exp(sum of d)

The log-probs are those that the loss has anyway: nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOG_RATIO_MAX = 20.0  # as in the loss: exp(20) = 5e8 marks a broken log-prob


def mismatch_metrics(
    logprobs: Tensor, sampler_logprobs: Tensor, lengths: Sequence[int]
) -> dict[str, float]:
    """The figures above under ``sampling/``, and the largest gap and the extreme ratios.

    Args:
        logprobs, sampler_logprobs: [T] of S sequences end to end; NaN of the sampler: not scored.
        lengths: [S] tokens of each sequence.

    Returns: {} without a scored token. What is not finite stays so, for the log to name it.
    """
    scored = ~sampler_logprobs.isnan()
    if not bool(scored.any()):
        return {}
    gaps = torch.where(scored, logprobs.double() - sampler_logprobs.double(), 0.0)
    tokens = gaps[scored]
    ratios = tokens.clamp(max=LOG_RATIO_MAX).exp()
    counts = torch.as_tensor(lengths, device=gaps.device)
    owner = torch.repeat_interleave(torch.arange(len(counts), device=gaps.device), counts)
    sums = torch.zeros(len(counts), dtype=gaps.dtype, device=gaps.device).index_add_(0, owner, gaps)
    figures = {
        "kl": (ratios - 1 - tokens).mean(),
        "logp_difference_max": tokens.abs().max(),
        "importance_sampling_ratio_min": ratios.min(),
        "importance_sampling_ratio_max": ratios.max(),
        "ess_token": effective_share(tokens),
        "ess_sequence": effective_share(sums[counts > 0]),
    }
    values = torch.stack(list(figures.values())).tolist()  # one wait for the device
    return {f"sampling/{name}": value for name, value in zip(figures, values, strict=True)}


def effective_share(log_weights: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2) in (0, 1] of n log-weights; 1 where all are equal."""
    once = torch.logsumexp(log_weights, 0)
    twice = torch.logsumexp(2 * log_weights, 0)
    return (2 * once - twice).exp() / len(log_weights)
