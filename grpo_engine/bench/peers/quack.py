"""QuACK's chunked linear cross entropy (CuTe DSL): gradients made in the forward pass."""

from __future__ import annotations

import importlib.util

import torch

from grpo_engine.bench.cases import Inputs
from grpo_engine.bench.peers.plain_torch import CE_ONLY, ONE_SUM, finish_sum, masked_ids
from grpo_engine.bench.provider import Outputs, Provider, installed

PACKAGE = "quack-kernels"


def _missing(device: torch.device) -> str | None:
    absent = installed("quack", PACKAGE)
    if absent:
        return absent
    if importlib.util.find_spec("cutlass") is None:
        return "QuACK needs nvidia-cutlass-dsl, which is not installed"
    if device.type != "cuda":
        return "QuACK needs a CUDA GPU of compute capability 9.0 or newer"
    capability = torch.cuda.get_device_capability(device)
    if capability < (9, 0):
        return (
            f"QuACK needs compute capability 9.0 or newer, found {'.'.join(map(str, capability))}"
        )
    return None


def _sum(inputs: Inputs, backward: bool) -> Outputs:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    loss = chunked_linear_cross_entropy(
        inputs["hidden"], inputs["weight"], masked_ids(inputs), ignore_index=-100, reduction="sum"
    )
    return finish_sum(loss, inputs, backward)


PROVIDERS = (
    Provider(
        "QuACK chunked_linear_cross_entropy",
        "linear_logprobs",
        PACKAGE,
        _sum,
        _missing,
        CE_ONLY | ONE_SUM | {"bias": "takes no bias"},
        multiples={"N": 8, "D": 8, "V": 8},
    ),
)
