"""verl's fused heads: the loop in torch, and NVIDIA's Triton kernels.

``import verl`` starts with Ray, TensorDict and Hydra, which these files do not need. So they are
loaded from the installed distribution by path, unchanged, without the package's own ``__init__``;
where verl is already imported as a whole, that one is used.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from grpo_engine.bench.cases import Inputs
from grpo_engine.bench.peers.plain_torch import head_providers
from grpo_engine.bench.provider import Outputs, installed

LACKS = {
    "temperature_vector": "takes one temperature, not one per token",
    "bias": "takes no bias",
    "lse": "gives no log-sum-exp",
}
ALIAS = "grpo_engine_bench_verl"  # name of a package that is verl's folder, without its __init__


def _missing(device: torch.device) -> str | None:
    return installed("verl", "verl")


def _triton_missing(device: torch.device) -> str | None:
    if device.type != "cuda":
        return _missing(device) or "needs a CUDA GPU (tensor descriptors, no CPU path)"
    return _missing(device)


@cache
def load(name: str) -> ModuleType:
    """verl's module ``name``, for instance "utils.kernel.kernels"."""
    if "verl" in sys.modules:
        return importlib.import_module(f"verl.{name}")
    folder = Path(importlib.util.find_spec("verl").origin).parent
    _bare_packages(ALIAS, folder, name)
    with _standing_in("verl", folder):  # for what the file imports by its full name
        return importlib.import_module(f"{ALIAS}.{name}")


def _bare_packages(root: str, folder: Path, name: str) -> None:
    """Packages without code for every level above ``name``, so that submodules are found."""
    parents = name.split(".")[:-1]
    for depth in range(len(parents) + 1):
        package = ".".join([root, *parents[:depth]])
        if package not in sys.modules:
            module = ModuleType(package)
            module.__path__ = [str(folder.joinpath(*parents[:depth]))]
            sys.modules[package] = module


@contextmanager
def _standing_in(root: str, folder: Path) -> Iterator[None]:
    """While this lasts, ``verl.utils.device`` and its like can be imported without verl."""
    before = set(sys.modules)
    _bare_packages(root, folder, "utils.device")
    _bare_packages(root, folder, "plugin.platform")
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            if name.split(".")[0] == root:
                del sys.modules[name]


def _masked(outputs: Outputs, inputs: Inputs) -> Outputs:
    mask = inputs.get("row_mask")
    if mask is None:
        return outputs
    return {name: value.masked_fill(~mask, 0) for name, value in outputs.items()}


def _named(found: tuple, inputs: Inputs) -> Outputs:
    return _masked(dict(zip(("logprobs", "entropy"), found, strict=True)), inputs)


def _torch_loop(inputs: Inputs) -> Outputs:
    op = load("utils.experimental.torch_functional").FusedLinearForPPO()
    head = (inputs["hidden"], inputs["weight"], inputs["token_ids"])
    return _named(op(*head, temperature=inputs.get("temperature", 1.0)), inputs)


def _triton(inputs: Inputs) -> Outputs:
    load("utils.kernel.kernels")  # verl imports it when first called
    op = load("utils.kernel.linear_cross_entropy").linear_cross_entropy
    temperature = float(inputs.get("temperature", 1.0))
    found = op(inputs["hidden"], inputs["weight"], inputs["token_ids"], temperature, "none", None)
    return _named(found, inputs)


PROVIDERS = (
    *head_providers("verl FusedLinearForPPO", "verl", _torch_loop, _missing, LACKS),
    *head_providers(
        "verl linear_cross_entropy (Triton)",
        "verl",
        _triton,
        _triton_missing,
        LACKS,
        multiples={"D": 128},
    ),
)
