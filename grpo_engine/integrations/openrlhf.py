"""OpenRLHF >= 0.11 on our kernels.

    from grpo_engine.integrations.openrlhf import patch_openrlhf
    patch_openrlhf()        # before the trainer builds its Actor and PolicyLoss

OpenRLHF trains in Ray workers: each must run ``patch_openrlhf()``, for instance by
``ray.init(runtime_env={"worker_process_setup_hook": patch_openrlhf, ...})``. Ray runs that hook
before it says which GPU is the worker's, and OpenRLHF's imports look for GPUs; so the patch waits
until OpenRLHF is imported, and does not import it.

``PolicyLoss`` becomes one launch with the same five results. ``Actor.forward`` keeps its own code,
but the head of its model hands it hidden states in place of logits wherever only log-probabilities
and entropy are made of them: the logits, which OpenRLHF copies to fp32, never exist. Where the
entropy is asked it takes a pass of its own.

Not supported, and refused: a ``dual_clip`` below 1 + ``clip_eps_high``, DeepSpeed ZeRO-3, and
models that scale or cap their logits outside the head (a TypeError from the model's own code).
Vision-language models, and calls that ask for the logits themselves, keep OpenRLHF's own path.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from typing import Any

import torch
from torch import Tensor, nn

from grpo_engine.integrations.contract import Unsupported, require
from grpo_engine.integrations.head import in_one_dtype
from grpo_engine.integrations.padded import padded_grpo_loss
from grpo_engine.kernels import linear_logprobs

TRAINER = "openrlhf.trainer.ray.ppo_actor"  # binds PolicyLoss at its import
_replaced: list[tuple[Any, str, Any]] = []  # (where, name, what was there) while patched


class PolicyLoss(nn.Module):
    """``openrlhf.models.PolicyLoss``: the same arguments, the same five results."""

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: tuple[float, float] | list[float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        self.gspo = policy_loss_type == "gspo"
        for name, value, known in (
            ("policy_loss_type", policy_loss_type, ("ppo", "gspo")),
            ("is_correction_level", is_correction_level, ("off", "token", "seq")),
            ("is_correction_mode", is_correction_mode, ("mask", "clip")),
            ("is_correction_gating", is_correction_gating, ("ratio", "binary_kl", "tv")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        per_token_ratio = is_correction_level != "seq" and is_correction_gating == "ratio"
        if is_correction_mode == "clip" and not per_token_ratio:
            raise ValueError(
                "is_correction_mode='clip' needs is_correction_level='token' and "
                "is_correction_gating='ratio'"
            )
        bounded_above = is_correction_gating == "ratio" or is_correction_level == "off"
        if not bounded_above and is_correction_threshold[0] > 0:
            raise ValueError(f"is_correction_gating={is_correction_gating!r} takes an upper bound")
        self.token_level_loss = token_level_loss and not self.gspo
        self.level, self.mode = is_correction_level, is_correction_mode
        self.gating, self.threshold = is_correction_gating, is_correction_threshold
        if dual_clip is not None and dual_clip <= 1.0:
            raise ValueError(f"dual_clip must be > 1, got {dual_clip}")
        if dual_clip is not None and dual_clip < 1 + clip_eps_high:
            raise Unsupported(
                f"dual_clip={dual_clip!r} must be >= 1 + clip_eps_high = {1 + clip_eps_high:g}"
            )
        self.options = {
            "epsilon": clip_eps_low,
            "epsilon_high": clip_eps_high,
            "delta": dual_clip,
            "importance_level": "sequence" if self.gspo else "token",
        }

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor | None, ...]:
        """(loss, clip ratio, ppo KL, vLLM KL or None, filtered share or None); all [B, T]."""
        if self.gspo and action_mask is None:
            raise ValueError("policy_loss_type='gspo' needs action_mask, which is None")
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        corrects = self.level != "off"
        if corrects and rollout_log_probs is None:
            raise ValueError(f"is_correction_level={self.level!r} needs rollout_log_probs")
        weights = vllm_kl = filtered = None
        if corrects and not self.gspo:
            weights, filtered = self._correction(old_log_probs, rollout_log_probs, mask)
            vllm_kl = _mean(rollout_log_probs - old_log_probs, mask)
        # gspo takes its ratio against the sampler where the correction is on
        old = rollout_log_probs if corrects and self.gspo else old_log_probs
        if self.token_level_loss:
            total = mask.sum() if batch_num_tokens is None else batch_num_tokens
        else:
            total = (mask.sum(-1) > 0).sum() if global_batch_size is None else global_batch_size
        given = batch_num_tokens if self.token_level_loss else global_batch_size
        loss, _ = padded_grpo_loss(
            log_probs,
            old,
            advantages,
            mask,
            policy_weights=weights,
            loss_type="dapo" if self.token_level_loss else "grpo",
            denominator=total if given is None else total / dp_size,
            **self.options,
        )
        clipped, ppo_kl = self._metrics(log_probs.detach(), old, old_log_probs, advantages, mask)
        return loss, clipped, ppo_kl, vllm_kl, filtered

    @torch.no_grad()
    def _correction(self, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(weight of the policy term [B, 1 or T], filtered share): a gate on a token's statistic
        or its mean over the sequence."""
        low, high = self.threshold
        log_ratio, by_sequence = old - rollout, self.level == "seq"
        if self.gating == "ratio":
            gate = _mean(log_ratio, mask, -1)[:, None].exp() if by_sequence else log_ratio.exp()
        else:
            gate = _divergence(self.gating, rollout, old)
            gate = _mean(gate, mask, -1)[:, None] if by_sequence else gate
        if self.mode == "clip":
            outside = (gate < low) | (gate > high)
            weights = gate.clamp(low, high)
        else:
            outside = ~((gate >= low) & (gate <= high))  # a NaN is outside
            weights = torch.where(outside, 0.0, log_ratio.exp())
        return weights, outside.float().mean() if by_sequence else _mean(outside.float(), mask)

    @torch.no_grad()
    def _metrics(
        self, log_probs: Tensor, old: Tensor, start: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(share of tokens whose clipped branch is the smaller, KL to the start of the update)."""
        log_ratio = log_probs - old
        if self.gspo:
            mean = (log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1)
            ratio = mean.exp()[:, None].expand_as(log_probs)
        else:
            ratio = log_ratio.clamp(-20.0, 20.0).exp()
        bounded = ratio.clamp(1 - self.options["epsilon"], 1 + self.options["epsilon_high"])
        clipped = bounded * advantages < ratio * advantages
        return _mean(clipped.float(), mask), _mean(start - log_probs, mask)


def _mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    return (x * mask).sum(dim) / mask.sum(dim)


def _divergence(kind: str, rollout: Tensor, old: Tensor) -> Tensor:
    p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
    if kind == "tv":
        return (p - q).abs()
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


# ---- Actor.forward without logits ----------------------------------------------------------------


class HeadInputs:
    """Stands for logits inside ``Actor.forward``: hidden states, the head, and a temperature.

    Takes the three things that OpenRLHF does to logits there: a cast, an in-place division by the
    temperature, and the two functions that read them. Anything else raises AttributeError.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.temperature = 1.0

    def to(self, dtype: torch.dtype) -> HeadInputs:
        return self  # log-probabilities come out in fp32 anyway

    def div_(self, temperature: float) -> HeadInputs:
        self.temperature *= temperature
        return self

    def logprobs(self, token_ids: Tensor, entropy: bool = False) -> tuple[Tensor, ...]:
        hidden, weight, bias = in_one_dtype(self.hidden, self.weight, self.bias)
        found = linear_logprobs(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            token_ids.reshape(-1),
            bias=bias,
            temperature=self.temperature,
            return_entropy=entropy,
        )
        found = found if entropy else (found,)
        return tuple(x.view(token_ids.shape) for x in found)


def log_probs_from_logits(original: Any) -> Any:
    """OpenRLHF's function of that name, which takes our stand-in, too."""

    def from_logits(logits: Any, labels: Tensor, temperature: float = 1.0) -> Tensor:
        if not isinstance(logits, HeadInputs):
            return original(logits, labels, temperature)
        if temperature != 1.0:
            logits.div_(temperature)
        return logits.logprobs(labels)[0]

    return from_logits


def compute_entropy(original: Any) -> Any:
    """OpenRLHF's function of that name, which takes our stand-in, too."""

    def entropy(logits: Any) -> Tensor:
        if not isinstance(logits, HeadInputs):
            return original(logits)
        shape, device = logits.hidden.shape[:-1], logits.hidden.device
        return logits.logprobs(torch.zeros(shape, dtype=torch.long, device=device), True)[1]

    return entropy


def actor_forward(original: Any) -> Any:
    """``Actor.forward`` over hidden states where its result needs no logits."""

    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self, *args, **kwargs) -> Any:
        # OpenRLHF passes the attention mask by position here and by name there
        given = signature.bind(self, *args, **kwargs).arguments
        wanted = given.get("action_mask") is not None or given.get("return_logprobs", False)
        if not wanted or getattr(self, "is_vlm", False):
            return original(self, *args, **kwargs)
        with _hidden_for_logits(self.model):
            result = original(self, *args, **kwargs)
        if isinstance(result, tuple):
            result[1]["logits"] = None  # nothing that a caller could take for logits
        return result

    return forward


@contextmanager
def _hidden_for_logits(model: Any) -> Iterator[None]:
    """The model's head returns its own inputs while this lasts."""
    model = getattr(model, "module", model)  # DeepSpeed's engine around it
    head = model.get_output_embeddings()
    if hasattr(head.weight, "ds_id"):
        raise Unsupported("DeepSpeed ZeRO-3 partitions the head; use ZeRO-2 or unpatch_openrlhf()")
    if not isinstance(head, nn.Linear):
        raise Unsupported(f"the head is a {type(head).__name__}, not a torch.nn.Linear")

    def stand_in(hidden: Tensor) -> HeadInputs:
        return HeadInputs(hidden, head.weight, head.bias)

    before = vars(head).get("forward")  # hooks of accelerate and the like stand there
    head.forward = stand_in  # on the instance: shadows the class's
    try:
        yield
    finally:
        del head.forward
        if before is not None:
            head.forward = before


def patch_openrlhf() -> None:
    """Put our loss and log-probabilities into OpenRLHF, now or, where it is not imported yet, as
    soon as it is. Twice is once.

    Raises:
        ImportError: OpenRLHF is not installed.
        Unsupported: a patch point of this OpenRLHF is not what was tested.
    """
    require("openrlhf")
    unpatch_openrlhf()
    if "openrlhf.models" in sys.modules:
        _patch()
    else:
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported(MetaPathFinder):
    """Lets the others find ``openrlhf.models``, and patches once it has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "openrlhf.models":
            return None
        others = (f.find_spec(name, path, target) for f in sys.meta_path if f is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is None:
            return None
        run = spec.loader.exec_module

        def run_and_patch(module: Any) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _patch()

        spec.loader.exec_module = run_and_patch
        return spec


def _patch() -> None:
    import openrlhf.models as models
    import openrlhf.models.actor as actor
    import openrlhf.models.loss as loss

    _replace(actor, "log_probs_from_logits", log_probs_from_logits(actor.log_probs_from_logits))
    _replace(actor, "compute_entropy", compute_entropy(actor.compute_entropy))
    _replace(actor.Actor, "forward", actor_forward(actor.Actor.forward))
    trainer = sys.modules.get(TRAINER)  # imported before, it has OpenRLHF's; not while it is
    for where in (loss, models, trainer):
        if hasattr(where, "PolicyLoss"):
            _replace(where, "PolicyLoss", PolicyLoss)


def unpatch_openrlhf() -> None:
    """Put back what ``patch_openrlhf`` replaced, or stop it from waiting."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _WhenImported)]
    while _replaced:
        where, name, before = _replaced.pop()
        setattr(where, name, before)
    trainer = sys.modules.get(TRAINER)  # imported since, it took ours
    if getattr(trainer, "PolicyLoss", None) is PolicyLoss:
        trainer.PolicyLoss = sys.modules["openrlhf.models"].PolicyLoss


def _replace(where: Any, name: str, new: Any) -> None:
    _replaced.append((where, name, getattr(where, name)))
    setattr(where, name, new)
