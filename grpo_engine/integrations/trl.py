"""TRL >= 1.16 on our kernels.

    from grpo_engine.integrations.trl import GRPOTrainer     # instead of trl's
    from grpo_engine.integrations.trl import patch_trl, unpatch_trl     # or: every trainer of TRL

``GRPOTrainer`` is TRL's own with two methods replaced: the loss, and the log-prob op below it.
Nothing else changes: data, rewards, generation, checkpoints and the names of the metrics are TRL's.
The loss comes straight from hidden states in one pass (three GEMMs of the head instead of four)
wherever no option needs every token's entropy first (trl_loss.py), and it is the same number:
tests/test_integrations_trl.py compares it with TRL's over all loss types and options.

``patch_trl()`` puts both into TRL's modules, for scripts that cannot be edited and for trainers
that derive from GRPOTrainer; ``unpatch_trl()`` puts back what was there. Of the other trainers RLOO
and async GRPO get the log-prob op. SFT, DPO and KTO ask TRL's op for statistics that ours does not
make (the argmax, the mean logit), and go on using TRL's.

Not supported, and refused: DeepSpeed ZeRO-3 with the head partitioned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from grpo_engine.integrations.contract import require

OP = "_ChunkedLogProbFunction"  # as trl.trainer.utils knows it
_replaced: list[tuple[Any, str, Any]] = []  # (where, name, what was there) while patched


def patch_trl(*, loss: bool = True) -> None:
    """Put our log-prob op, and unless ``loss`` is False our GRPO loss, into TRL. Twice is once.

    Raises:
        ImportError: TRL is not installed.
        Unsupported: a patch point of this TRL is not what was tested.
    """
    require("trl", loss=loss)
    import trl.trainer.utils as utils
    from trl.trainer.grpo_trainer import GRPOTrainer as Base

    from grpo_engine.integrations.trl_head import LogProbFunction
    from grpo_engine.integrations.trl_loss import compute_loss

    unpatch_trl()
    _replace(utils, OP, LogProbFunction)
    if loss:
        _replace(Base, "_compute_loss", compute_loss)


def unpatch_trl() -> None:
    """Put back what ``patch_trl`` replaced; nothing if it replaced nothing."""
    while _replaced:
        where, name, before = _replaced.pop()
        setattr(where, name, before)


def _replace(where: Any, name: str, new: Any) -> None:
    _replaced.append((where, name, getattr(where, name)))
    setattr(where, name, new)


@contextmanager
def log_prob_op() -> Iterator[None]:
    """TRL's fused heads use our op while this lasts."""
    import trl.trainer.utils as utils

    from grpo_engine.integrations.trl_head import LogProbFunction

    before = getattr(utils, OP)
    setattr(utils, OP, LogProbFunction)
    try:
        yield
    finally:
        setattr(utils, OP, before)


def _make_trainer() -> type:
    require("trl")
    from trl import GRPOTrainer as Base

    from grpo_engine.integrations.trl_loss import compute_loss

    class GRPOTrainer(Base):
        """``trl.GRPOTrainer`` with our loss and log-prob op; see grpo_engine.integrations.trl."""

        def _compute_loss(self, model, inputs):
            with log_prob_op():
                return compute_loss(self, model, inputs)

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            with log_prob_op():
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    GRPOTrainer.__module__ = __name__
    GRPOTrainer.__qualname__ = "GRPOTrainer"
    return GRPOTrainer


def __getattr__(name: str) -> Any:
    if name != "GRPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _make_trainer()  # imports TRL: not before someone asks for it
    return globals()[name]
