"""TRL's log-prob op on our kernels, and the seam through which the whole loss is made inside it.

TRL's models compute per-token log-probabilities in their own forward pass, where nothing knows of
advantages. ``FusedRequest`` brings them there: while one is open, the op makes loss and gradients
in the pass that makes the log-probabilities. The loss leaves the model as the gradient of these
log-probabilities, so that DDP and FSDP see it pass through the model's output.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from grpo_engine.integrations.contract import Unsupported
from grpo_engine.integrations.head import in_one_dtype
from grpo_engine.kernels import LossMetrics, linear_grpo_loss, linear_logprobs

OURS = {"log_probs", "entropy"}
EVERY_OUTPUT = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # TRL's default


@dataclass
class FusedRequest:
    """The loss of one micro-batch, to be made inside the model's forward pass.

    All tensors [B, T], T the completion's columns.
    """

    scored: Tensor  # bool: the tokens that TRL's labels name
    loss_mask: Tensor  # bool: those that count, fewer where tools wrote some
    old_logprobs: Tensor | None
    advantages: Tensor
    ref_logprobs: Tensor | None
    sampler_logprobs: Tensor | None
    options: dict  # of linear_grpo_loss, denominator included
    loss: Tensor | None = field(default=None, init=False)
    metrics: LossMetrics | None = field(default=None, init=False)

    def make(self, head: tuple, compact: bool, **logit_options) -> Tensor:
        """The log-probabilities [N] of TRL's rows, whose gradient is that of the loss."""
        if self.loss is not None:
            raise RuntimeError("the model ran its head twice in one loss")
        hidden, weight, bias, targets = head
        rows, cu_seqlens = self._rows(hidden.shape[0], compact)
        loss, self.metrics, logprobs = linear_grpo_loss(
            hidden,
            weight,
            targets,
            rows(self.old_logprobs),
            rows(self.advantages),
            bias=bias,
            row_mask=rows(self.loss_mask),
            cu_seqlens=cu_seqlens,
            ref_logprobs=rows(self.ref_logprobs),
            sampler_logprobs=rows(self.sampler_logprobs),
            return_entropy=True,
            **logit_options,
            **self.options,
        )
        self.loss = loss.detach()
        return logprobs + (loss - self.loss)

    def _rows(self, num_rows: int, compact: bool):
        """How a [B, T] tensor lies in the rows that TRL passes, and their sequences' bounds.

        On Triton devices TRL passes the scored tokens alone, elsewhere every column but the last,
        prompts first.
        """
        batch, width = self.scored.shape
        if compact:
            places = self.scored.flatten().nonzero().squeeze(1)  # the one host sync of all fields
            if len(places) != num_rows:
                raise Unsupported(f"TRL scores {num_rows} tokens, not those of completion_mask")
            ends = self.scored.sum(1).cumsum(0)

            def rows(x: Tensor | None) -> Tensor | None:
                return None if x is None else x.flatten()[places]

            return rows, functional.pad(ends, (1, 0))
        columns = num_rows // batch
        if columns * batch != num_rows or columns < width:
            raise Unsupported(f"TRL scores {num_rows} tokens of {batch} rows of {width} or more")
        left = (columns - width, 0)

        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else functional.pad(x, left).reshape(-1)

        return rows, torch.arange(batch + 1, device=self.scored.device) * columns

    def loss_through(self, logprobs: Tensor) -> Tensor:
        """The loss, its gradient led through the model's output ``logprobs`` [B, T].

        Every scored log-probability carries that gradient whole; one of them is asked for it.
        """
        if self.loss is None:
            raise RuntimeError("the model's forward did not come through TRL's fused head")
        first = self.scored.flatten().int().argmax()
        carrier = logprobs.flatten().gather(0, first[None]).squeeze(0)
        return self.loss + (carrier - carrier.detach())

    def __enter__(self) -> FusedRequest:
        global _open
        if _open is not None:
            raise RuntimeError("two losses at once in one process")
        _open = self
        return self

    def __exit__(self, *_) -> None:
        global _open
        _open = None


_open: FusedRequest | None = None


class LogProbFunction:
    """Stands where ``trl.kernels.ChunkedLogProbFunction`` stood, for its ``apply`` alone."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = EVERY_OUTPUT,
    ) -> tuple[Tensor | None, ...]:
        """(logprobs, entropy, None, None, None) as TRL's own; [N] fp32.

        hidden [N, D], weight [V, D], bias [V], targets [N]. Products run in the autocast dtype, or
        that of ``hidden``, as TRL's do, but logits are not rounded to it. ``chunk_size`` is TRL's
        business: our chunks are sized by the kernels.

        A call that asks for other outputs goes to TRL's own op, which a warning says once.
        """
        if set(outputs) - OURS:
            return _trl_op(
                outputs,
                *(hidden, weight, bias, targets, temperature, chunk_size),
                *(final_logit_softcapping, logit_scale, outputs),
            )
        if hasattr(weight, "ds_id"):
            raise Unsupported(
                "DeepSpeed ZeRO-3 partitions the head again before our backward pass reads it; "
                "use ZeRO-2, FSDP2, or TRL's own op (unpatch_trl())"
            )
        hidden, weight, bias = in_one_dtype(hidden, weight, bias)
        options = {
            "temperature": float(temperature),
            "logit_softcap": final_logit_softcapping,
            "logit_scale": logit_scale,
        }
        with torch.autocast(hidden.device.type, enabled=False):
            if _open is not None:
                head = (hidden, weight, bias, targets)
                return _open.make(head, _compacts(hidden), **options), *[None] * 4
            want_entropy = "entropy" in outputs
            found = linear_logprobs(
                hidden, weight, targets, bias=bias, return_entropy=want_entropy, **options
            )
        return (*found, None, None, None) if want_entropy else (found, *[None] * 4)


def _compacts(hidden: Tensor) -> bool:
    from trl.trainer.utils import _use_triton

    return _use_triton(hidden.device)


def _trl_op(outputs: tuple[str, ...], *arguments):
    from trl.kernels import ChunkedLogProbFunction

    warnings.warn(
        f"grpo_engine: TRL's own log-prob op runs where {sorted(set(outputs) - OURS)} are asked",
        stacklevel=3,
    )
    return ChunkedLogProbFunction.apply(*arguments)
