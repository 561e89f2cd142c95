"""Shared test set-up: pinned environment, poisoned memory, and who runs the
marks `triton`, `gpu` and `vllm`.

`pytest` runs everything that needs neither a GPU nor Triton; `TRITON_INTERPRET=1 pytest -m triton`
runs the Triton kernels on the CPU through Triton's interpreter. The two cannot share one process:
Triton reads the variable once, when a kernel is decorated.
"""

from __future__ import annotations

import os

# Before the first import of torch and triton, which read these once.
os.environ.setdefault("OMP_NUM_THREADS", "2")
# Unset, the default changes between Triton 3.9 (on) and 3.10 (off), and bitwise tests would move
# with it.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib.util
import random

import numpy as np
import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    has_cuda = torch.cuda.is_available()
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    has_triton = importlib.util.find_spec("triton") is not None
    has_vllm = importlib.util.find_spec("vllm") is not None
    for item in items:
        if item.get_closest_marker("vllm") and not has_vllm:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make test-vllm"))
        if item.get_closest_marker("gpu") and not has_cuda:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
        if item.get_closest_marker("triton"):
            if not has_triton:
                item.add_marker(pytest.mark.skip(reason="triton is not installed"))
            elif not (has_cuda or interpreting):
                item.add_marker(
                    pytest.mark.skip(reason="no CUDA GPU and TRITON_INTERPRET is not 1")
                )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def poison_of(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    if dtype == torch.bool:  # a byte other than 0 and 1 is undefined behaviour in a C++ bool
        return True
    return int.from_bytes(b"\xa5" * dtype.itemsize, "little", signed=dtype.is_signed)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN, or in integers the byte 0xA5 over and over (an index far out
    of any range), so that a kernel that misses an element, or reads one that nobody wrote, fails
    its test instead of passing on memory that happened to be zero."""

    def poison(made: torch.Tensor) -> torch.Tensor:
        if isinstance(made, torch._subclasses.FakeTensor) or made.device.type == "meta":
            return made
        with torch.no_grad():
            return made.fill_(poison_of(made.dtype))

    def poisoned(make):
        def made(*args, **kwargs):
            if torch.compiler.is_compiling():
                return make(*args, **kwargs)
            return poison(make(*args, **kwargs))

        return made

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))


@pytest.fixture
def device() -> torch.device:
    """Where kernel tests run: the GPU where there is one, else the CPU (portable path or
    interpreter)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
