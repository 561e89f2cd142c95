"""Apple's cut cross entropy: with its gradient filter (the default) and without, and its
torch.compile version, which is what runs on a CPU."""

from __future__ import annotations

from functools import partial

import torch

from grpo_engine.bench.cases import Inputs
from grpo_engine.bench.peers.plain_torch import (
    CE_ONLY,
    head_providers,
    many_shapes,
    masked_ids,
    no_compiler,
)
from grpo_engine.bench.provider import Outputs, installed

PACKAGE = "cut-cross-entropy"
NO_BIAS = {"bias": "takes no bias"}


def _missing(device: torch.device) -> str | None:
    return installed("cut_cross_entropy", PACKAGE)


def _triton_missing(device: torch.device) -> str | None:
    if device.type != "cuda":
        return _missing(device) or "needs a CUDA GPU (Triton's interpreter cannot run its kernels)"
    return _missing(device)


def _compile_missing(device: torch.device) -> str | None:
    return _missing(device) or no_compiler(device)


def _logprobs(options: dict, inputs: Inputs) -> Outputs:
    from cut_cross_entropy import linear_cross_entropy

    ids = masked_ids(inputs)
    head = (inputs["hidden"], inputs["weight"])
    with many_shapes():  # some of its parts are compiled
        nll = linear_cross_entropy(*head, ids, reduction="none", **options)
    return {"logprobs": -nll}


PROVIDERS = (
    *head_providers(
        "CCE, filtered",
        PACKAGE,
        partial(_logprobs, {"impl": "cce"}),
        _triton_missing,
        CE_ONLY | NO_BIAS,
        approximate="skips tiles of the gradient whose entries are all small",
    ),
    *head_providers(
        "CCE, filter off",
        PACKAGE,
        partial(_logprobs, {"impl": "cce", "filter_eps": None}),
        _triton_missing,
        CE_ONLY | NO_BIAS,
    ),
    *head_providers(
        "CCE, torch_compile",
        PACKAGE,
        partial(_logprobs, {"impl": "torch_compile"}),
        _compile_missing,
        CE_ONLY | NO_BIAS,
    ),
)
