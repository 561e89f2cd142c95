"""prime-rl 0.8: a custom loss on our kernel.

    [trainer.loss]
    type = "custom"
    import_path = "grpo_engine.integrations.prime_rl.loss"
    [trainer.loss.kwargs]
    loss_type = "dapo"
    epsilon = 0.2

prime-rl calls it once a sequence with 1-D tensors and divides the sum of the results by the whole
batch's count of trainable tokens. Its log-probabilities of the inference engine are the old ones:
ratios are taken against the policy that sampled, as in prime-rl's own loss.
"""

from __future__ import annotations

from typing import Any

from grpo_engine.integrations.contract import Unsupported
from grpo_engine.kernels import LossMetrics, grpo_loss


def sequence_loss(inputs: Any, **options) -> tuple[Any, LossMetrics]:
    """(sum of the token losses, metrics) of prime-rl's ``LossInputs``, options of ``grpo_loss``.

    Raises Unsupported for a loss type with a normaliser of its own: prime-rl divides by tokens.
    """
    loss_type = options.pop("loss_type", "dapo")
    if loss_type not in ("dapo", "bnpo", "cispo", "vespo"):
        raise Unsupported(
            f"loss_type={loss_type!r}: prime-rl divides by tokens; use dapo, cispo or vespo"
        )
    if options.get("beta") and inputs.ref_logprobs is None:
        raise Unsupported(f"beta={options['beta']!r} needs an algorithm that scores a reference")
    mask = inputs.loss_mask
    if inputs.loss_weights is not None:
        mask = mask * inputs.loss_weights.float()
    ref = inputs.ref_logprobs
    return grpo_loss(
        inputs.trainer_logprobs.float(),
        inputs.inference_logprobs.detach().float(),
        inputs.advantages.detach().float(),
        loss_mask=mask,
        ref_logprobs=None if ref is None else ref.detach().float(),
        loss_type=loss_type,
        denominator=1.0,
        **options,
    )


def loss(inputs: Any, **options) -> Any:
    """prime-rl's custom loss: ``LossInputs`` to ``LossOutputs``."""
    from prime_rl.trainer.rl.loss import LossOutputs

    value, metrics = sequence_loss(inputs, **options)
    names = [name for name in metrics.names if name != "tokens"]
    return LossOutputs(loss=value, metrics={name: metrics[name] for name in names})
