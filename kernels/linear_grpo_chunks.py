"""One chunk of linear_grpo_loss: logits to statistics, the loss, and the gradients from it.

The order is fixed: ``read_chunk`` leaves the chunk in the workspace, ``TokenLoss.add`` turns its
log-probabilities into loss and gradient, ``add_chunk_grads`` continues from the workspace.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grpo_engine.kernels.exact_logits import exact_exps
from grpo_engine.kernels.exp_rows import ExpRows, exp_chunk_backward, exp_rows, exps_of_stats
from grpo_engine.kernels.grpo_loss import NUM_METRICS, LossOptions, loss_and_grad
from grpo_engine.kernels.head_chunks import HeadGrads, Workspace, head_chunk_backward
from grpo_engine.kernels.head_pass import HeadPass
from grpo_engine.kernels.top_logits import TopLogits
from grpo_engine.kernels.vocab_rows import RowGrads, RowStats


@dataclass(frozen=True)
class TokenLoss:
    """The loss of a pass over the rows, chunk by chunk: the one place where it meets the head."""

    options: LossOptions
    old: torch.Tensor | None  # [P] in the order of the pass, as are all fields
    advantages: torch.Tensor
    weights: torch.Tensor
    mask: torch.Tensor | None
    ref: torch.Tensor | None
    sampler: torch.Tensor | None
    loss: torch.Tensor  # 0-d, summed over chunks
    metric_sums: torch.Tensor  # [NUM_METRICS], likewise

    @classmethod
    def make(
        cls, head: HeadPass, options: LossOptions, fields: tuple[torch.Tensor | None, ...]
    ) -> TokenLoss:
        """``fields`` [N]: old, advantages, weights, mask, ref, sampler."""
        ordered = [None if field is None else head.take(field) for field in fields]
        zeros = [torch.zeros(n, device=head.hidden.device) for n in ((), NUM_METRICS)]
        return cls(options, *ordered, *zeros)

    @property
    def prior(self) -> torch.Tensor | None:
        """What the log-probabilities were a moment ago, [P]; NaN where unknown."""
        return self.sampler if self.old is None else self.old

    def add(self, chunk: slice, logprobs: torch.Tensor, entropy: torch.Tensor | None) -> RowGrads:
        """Add a chunk's loss and metrics; its gradients."""
        old, adv, w, m, ref, sampler = (
            None if field is None else field[chunk]
            for field in (
                self.old,
                self.advantages,
                self.weights,
                self.mask,
                self.ref,
                self.sampler,
            )
        )
        loss, grads, sums = loss_and_grad(
            logprobs, old, adv, w, None, m, ref, sampler, entropy, self.options
        )
        self.loss.add_(loss)
        self.metric_sums.add_(sums)
        return RowGrads(grads[0], grads[1] if self.options.entropy_coef else None)


def read_chunk(
    head: HeadPass,
    chunk: slice,
    work: Workspace,
    prior: torch.Tensor | None,
    want_entropy: bool,
    *,
    as_exps: bool = False,
) -> ExpRows | RowStats:
    """Logits of a chunk and the statistics of its rows: every chunk is read here. With a ``prior``
    [P] or ``as_exps`` as ExpRows, whose ``exps`` are in ``work.dlogits``, else as RowStats."""
    num_rows, skip_masked = chunk.stop - chunk.start, head.live is not None
    ids, options = head.token_ids[chunk], head.options.rows(chunk)
    mask = None if head.mask is None else head.mask[chunk]
    if prior is not None:
        logits, exps = head.logits(chunk, work), work.dlogits[:num_rows]
        prior, top = prior[chunk], TopLogits()
        how = {"top": top, "skip_masked": skip_masked}
        rows = exp_rows(exps, logits, ids, options, prior, want_entropy, mask, **how)
        exact_exps(rows, prior, top, head.hidden_rows(chunk), head.weight, mask)
        return rows
    stats = head.fold(chunk, work, want_entropy)
    if not as_exps:
        return stats
    logits, exps = work.logits[:num_rows], work.dlogits[:num_rows]
    return exps_of_stats(exps, logits, ids, options, stats, mask, skip_masked=skip_masked)


def add_chunk_grads(
    head: HeadPass,
    chunk: slice,
    work: Workspace,
    rows: ExpRows | RowStats,
    grads: RowGrads,
    into: HeadGrads,
) -> None:
    """The gradients of a chunk that ``read_chunk`` has just left in ``work``."""
    index = chunk if head.live is not None else head.rows_of(chunk)
    hidden, weight = head.chunk_hidden(chunk), head.weight
    if isinstance(rows, ExpRows):
        exp_chunk_backward(index, rows, grads.logprobs, hidden, weight, into, head.live)
        return
    ids, options = head.token_ids[chunk], head.options.rows(chunk)
    mask = None if head.mask is None else head.mask[chunk]
    head_chunk_backward(
        index, work, hidden, weight, ids, options, rows, grads, mask, into, head.live
    )
