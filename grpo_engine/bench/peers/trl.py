"""TRL's two ops: the chunked head that all its trainers use, and log-probabilities with entropy
from logits."""

from __future__ import annotations

import torch

from grpo_engine.bench.cases import Inputs
from grpo_engine.bench.peers.plain_torch import head_providers
from grpo_engine.bench.provider import Outputs, Provider, finish, installed, triton_missing

VOCAB_CHUNK = 32_768  # what TRL's trainers pass
NO_VECTOR = {"temperature_vector": "takes one temperature, not one per token"}
NO_LSE = {"lse": "gives no log-sum-exp"}


def _missing(device: torch.device) -> str | None:
    return installed("trl", "trl")


def _triton_missing(device: torch.device) -> str | None:
    return _missing(device) or triton_missing(device)


def _chunked(inputs: Inputs) -> Outputs:
    """On CUDA the masked rows are left out before, elsewhere dropped after, as TRL does."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    hidden, token_ids, mask = inputs["hidden"], inputs["token_ids"], inputs.get("row_mask")
    compact = mask is not None and hidden.is_cuda
    logprobs, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden[mask] if compact else hidden,
        inputs["weight"],
        inputs.get("bias"),
        token_ids[mask] if compact else token_ids,
        inputs.get("temperature", 1.0),
        VOCAB_CHUNK,
        None,
        1.0,
        ("entropy",) if "entropy" in inputs["wants"] else (),
    )
    found = {"logprobs": logprobs, "entropy": entropy}
    outputs = {name: value for name, value in found.items() if value is not None}
    if compact:
        empty = torch.zeros(mask.shape, device=hidden.device)
        return {name: empty.masked_scatter(mask, value) for name, value in outputs.items()}
    if mask is not None:
        return {name: value.masked_fill(~mask, 0) for name, value in outputs.items()}
    return outputs


def _from_logits(inputs: Inputs, backward: bool) -> Outputs:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    temperature = inputs.get("temperature", 1.0)
    found = selective_log_softmax_and_entropy(inputs["logits"], inputs["token_ids"], temperature)
    outputs = dict(zip(("logprobs", "entropy"), found, strict=True))
    outputs = {name: outputs[name] for name in inputs["wants"]}
    return finish(outputs, inputs, backward, ("logits",))


PROVIDERS = (
    *head_providers("TRL ChunkedLogProb", "trl", _chunked, _missing, NO_VECTOR | NO_LSE),
    Provider(
        "TRL selective_log_softmax_and_entropy",
        "token_logprobs",
        "trl",
        _from_logits,
        _triton_missing,
        NO_VECTOR | NO_LSE,
    ),
)
