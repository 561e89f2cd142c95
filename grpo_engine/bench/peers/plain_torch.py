"""Plain torch: the logits in memory, autograd, as written by hand; the same under torch.compile;
and torch's own fused head."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from grpo_engine.bench.cases import Inputs
from grpo_engine.bench.provider import HEAD, Outputs, Provider, finish


def _row_outputs(
    logits: Tensor, token_ids: Tensor, temperature: Tensor | float, wants: tuple[str, ...]
) -> Outputs:
    """Log-probabilities (entropy, lse) in fp32 from logits of any dtype."""
    divide = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    logits = logits.float() / divide
    log_p = logits.log_softmax(-1)
    outputs = {"logprobs": log_p.gather(1, token_ids[:, None]).squeeze(1)}
    if "entropy" in wants:
        outputs["entropy"] = -(log_p.exp() * log_p).sum(-1)
    if "lse" in wants:
        outputs["lse"] = logits.logsumexp(-1)
    return outputs


def _head_outputs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    temperature: Tensor | float,
    row_mask: Tensor | None,
    wants: tuple[str, ...],
) -> Outputs:
    logits = F.linear(hidden, weight, bias)  # [N, V] in the working dtype
    outputs = _row_outputs(logits, token_ids, temperature, wants)
    if row_mask is not None:
        outputs = {name: value.where(row_mask, 0.0) for name, value in outputs.items()}
    return outputs


def clipped_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    weights: Tensor,
    ref: Tensor | None,
    epsilon: float,
    beta: float,
) -> Tensor:
    """sum_t weights_t (-min(r A, clip(r) A) + beta k3)."""
    ratio = torch.exp(logprobs - old)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    if ref is not None:
        per_token = per_token + beta * (torch.exp(ref - logprobs) - (ref - logprobs) - 1)
    return (per_token * weights).sum()


def _head_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    temperature: Tensor | float,
    row_mask: Tensor | None,
    *loss_arguments,
) -> Tensor:
    arguments = (bias, temperature, row_mask, ("logprobs",))
    logprobs = _head_outputs(hidden, weight, token_ids, *arguments)["logprobs"]
    return clipped_loss(logprobs, *loss_arguments)


def token_weights(inputs: Inputs) -> Tensor:
    """[N]: with a head the mean over the tokens left in, else over sequences of means."""
    if "hidden" in inputs:
        mask = inputs.get("row_mask")
        if mask is None:
            mask = torch.ones(len(inputs["hidden"]), device=inputs["hidden"].device)
        return mask / mask.sum()
    return _sequence_weights(inputs["cu_seqlens"], len(inputs["logprobs"]))


def _sequence_weights(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    lengths = cu_seqlens.diff()
    each = 1 / (lengths * len(lengths))
    return each.repeat_interleave(lengths, output_size=num_tokens)  # no host sync


def _sequence_loss(
    logprobs: Tensor, cu_seqlens: Tensor, old: Tensor, advantages: Tensor, *options
) -> Tensor:
    """The loss of log-probabilities, its weights included: a compiler fuses them as well."""
    weights = _sequence_weights(cu_seqlens, len(logprobs))
    return clipped_loss(logprobs, old, advantages, weights, *options)


def _loss_options(inputs: Inputs) -> tuple:
    return inputs.get("ref_logprobs"), inputs["epsilon"], inputs["beta"]


def _loss_arguments(inputs: Inputs) -> tuple:
    fields = (inputs["old_logprobs"], inputs["advantages"], token_weights(inputs))
    return (*fields, *_loss_options(inputs))


def _head_arguments(inputs: Inputs) -> tuple:
    required = (inputs["hidden"], inputs["weight"], inputs["token_ids"])
    return (*required, inputs.get("bias"), inputs.get("temperature", 1.0), inputs.get("row_mask"))


def _advantages(rewards: Tensor, group_size: int) -> Tensor:
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).view(-1)


Wrap = Callable[[Callable], Callable]
SHAPES = 256  # compiled of one function at most

# What a fused cross entropy has none of.
CE_ONLY = {
    "entropy": "gives no entropy",
    "entropy_grad": "gives no entropy",
    "lse": "gives no log-sum-exp",
    "temperature": "takes no temperature",
    "temperature_vector": "takes no temperature",
}
ONE_SUM = {"weighted": "gives one sum: no gradient per token"}


def masked_ids(inputs: Inputs) -> Tensor:
    """Token ids with -100, which cross entropies leave out, in the rows that the mask drops."""
    mask = inputs.get("row_mask")
    return inputs["token_ids"] if mask is None else inputs["token_ids"].where(mask, -100)


def finish_sum(loss: Tensor, inputs: Inputs, backward: bool) -> Outputs:
    """Outputs of an op whose one result is the negative sum of log-probabilities."""
    return finish({"loss": -loss}, inputs, backward, HEAD, rename={"loss": "logprobs_sum"})


def head_providers(
    name: str,
    package: str | None,
    logprobs: Callable[[Inputs], Outputs],
    missing: Callable[[torch.device], str | None],
    cannot: dict[str, str],
    **rest: Any,
) -> tuple[Provider, Provider]:
    """An op that gives log-probabilities, alone and followed by the loss in plain torch, as the
    trainers that have no fused loss use it."""

    def alone(inputs: Inputs, backward: bool) -> Outputs:
        outputs = logprobs(inputs)
        outputs = {name: outputs[name] for name in inputs["wants"]}
        return finish(outputs, inputs, backward, HEAD)

    def then_loss(inputs: Inputs, backward: bool) -> Outputs:
        loss = clipped_loss(logprobs(inputs)["logprobs"].float(), *_loss_arguments(inputs))
        return finish({"loss": loss}, inputs, backward, HEAD)

    lasting = {"missing": missing, "cannot": cannot, **rest}
    return (
        Provider(name, "linear_logprobs", package, alone, **lasting),
        Provider(f"{name}, then loss", "linear_grpo_loss", package, then_loss, **lasting),
    )


def _token_logprobs(wrap: Wrap, inputs: Inputs, backward: bool) -> Outputs:
    temperature = inputs.get("temperature", 1.0)
    arguments = (inputs["logits"], inputs["token_ids"], temperature, inputs["wants"])
    return finish(wrap(_row_outputs)(*arguments), inputs, backward, ("logits",))


def _linear_logprobs(wrap: Wrap, inputs: Inputs, backward: bool) -> Outputs:
    outputs = wrap(_head_outputs)(*_head_arguments(inputs), inputs["wants"])
    return finish(outputs, inputs, backward, HEAD)


def _linear_grpo_loss(wrap: Wrap, inputs: Inputs, backward: bool) -> Outputs:
    loss = wrap(_head_loss)(*_head_arguments(inputs), *_loss_arguments(inputs))
    return finish({"loss": loss}, inputs, backward, HEAD)


def _grpo_loss(wrap: Wrap, inputs: Inputs, backward: bool) -> Outputs:
    fields = (inputs[name] for name in ("logprobs", "cu_seqlens", "old_logprobs", "advantages"))
    loss = wrap(_sequence_loss)(*fields, *_loss_options(inputs))
    return finish({"loss": loss}, inputs, backward, ("logprobs",))


def _group_advantages(wrap: Wrap, inputs: Inputs, backward: bool) -> Outputs:
    return {"advantages": wrap(_advantages)(inputs["rewards"], inputs["group_size"])}


def _as_it_is(function: Callable) -> Callable:
    return function


@cache
def _compiled(function: Callable) -> Callable:
    """Compiled for each shape anew."""
    compiled = torch.compile(function, dynamic=False)

    def run(*arguments):
        with many_shapes():
            return compiled(*arguments)

    return run


def many_shapes() -> AbstractContextManager[None]:
    """Recompilations as often as shapes ask for them; past a limit of its own torch would run the
    function uncompiled, or stop. Nothing where that holds already: patching takes as long as a
    small kernel, so who times calls does it around all of them."""
    if torch._dynamo.config.recompile_limit >= SHAPES:
        return nullcontext()
    limits = {"recompile_limit": SHAPES, "fail_on_recompile_limit_hit": True}
    return torch._dynamo.config.patch(**limits)


def no_compiler(device: torch.device) -> str | None:
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "torch.compile needs a C++ compiler on a CPU"
    return None


# ---- torch's own fused head ----------------------------------------------------------------------


def _fused_missing(device: torch.device) -> str | None:
    if not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy"
    return None


def _fused_logprobs(chunked: bool, inputs: Inputs) -> Outputs:
    """Log-probabilities [N], by reduction="none"."""
    loss = F.linear_cross_entropy(
        inputs["hidden"],
        inputs["weight"],
        masked_ids(inputs),
        linear_bias=inputs.get("bias"),
        reduction="none",
        options=torch.nn.LinearCrossEntropyOptions() if chunked else None,
    )
    return {"logprobs": -loss}


def _fused_sum(inputs: Inputs, backward: bool) -> Outputs:
    """One sum, its gradients made in the forward pass."""
    loss = F.linear_cross_entropy(
        inputs["hidden"],
        inputs["weight"],
        masked_ids(inputs),
        linear_bias=inputs.get("bias"),
        reduction="sum",
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    return finish_sum(loss, inputs, backward)


_JOBS = {
    "token_logprobs": _token_logprobs,
    "linear_logprobs": _linear_logprobs,
    "linear_grpo_loss": _linear_grpo_loss,
    "grpo_loss": _grpo_loss,
    "group_advantages": _group_advantages,
}

PROVIDERS = (
    *(Provider("torch", job, None, partial(run, _as_it_is)) for job, run in _JOBS.items()),
    *(
        Provider("torch.compile", job, None, partial(run, _compiled), no_compiler, compiles=True)
        for job, run in _JOBS.items()
    ),
    *head_providers(
        "F.linear_cross_entropy", None, partial(_fused_logprobs, False), _fused_missing, CE_ONLY
    ),
    *head_providers(
        "F.linear_cross_entropy, chunked",
        None,
        partial(_fused_logprobs, True),
        _fused_missing,
        CE_ONLY,
    ),
    Provider(
        "F.linear_cross_entropy, chunked sum",
        "linear_logprobs",
        None,
        _fused_sum,
        _fused_missing,
        CE_ONLY | ONE_SUM,
    ),
)
