"""grpo_loss is two launches forward and one backward, whatever the options; nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loss_cases import OPTIONS, device_of_path, make_batch

from grpo_engine.kernels import loss_options
from grpo_engine.kernels.common import interpreting
from grpo_engine.kernels.grpo_loss import grpo_loss, make_loss_options

# Operators that allocate or look: no kernel on a GPU.
FREE = ("aten::empty", "aten::empty_strided", "aten::as_strided", "aten::view", "aten::detach")
HALF = 0.5  # a weight other than 1: a mask that is no bool


@pytest.fixture(autouse=True)
def _poisoned_memory() -> None:
    """Not in this file: writing the poison would be counted."""


def batch_for(device: torch.device, how: str) -> dict:
    batch = make_batch(device)
    changes = {
        "as it is": {},
        "float mask": {"loss_mask": batch["loss_mask"] * HALF},
        "no mask": {"loss_mask": None},
        "one sequence": {"cu_seqlens": None, "advantages": torch.ones(1, device=device)},
        "[S] advantages": {"advantages": torch.linspace(-1, 1, 6, device=device)},
        "no entropy": {"entropy": None},
    }
    return batch | changes[how]


HOW = ("as it is", "float mask", "no mask", "one sequence", "[S] advantages", "no entropy")
DENOMINATORS = (None, 7.0, torch.tensor(7))


def cases() -> list:
    """Every formula once, and every kind of input under a loss of each normaliser."""
    inputs = [(n, how, d) for n in ("grpo", "dapo", "gspo") for how in HOW for d in DENOMINATORS]
    return [(name, "as it is", None) for name in OPTIONS] + inputs


def calls_of(batch: dict, name: str, **options) -> tuple[Callable, Callable]:
    """The forward pass, and the backward of what it returned."""
    made = []

    def forward() -> None:
        made.append(grpo_loss(**batch, **OPTIONS[name], **options)[0])

    def backward() -> None:
        leaves = [batch["logprobs"]]
        if make_loss_options(**OPTIONS[name]).entropy_coef:
            leaves.append(batch["entropy"])
        torch.autograd.grad(made.pop(), leaves, seed)

    seed = torch.ones((), device=batch["logprobs"].device)
    return forward, backward


@pytest.mark.triton
@pytest.mark.skipif(not interpreting(), reason="counts what the interpreter is asked to run")
@pytest.mark.parametrize(("name", "how", "denominator"), cases())
def test_launches(name: str, how: str, denominator, monkeypatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    kernels = []
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda self, *_, **__: kernels.append(self.__name__)
    )
    # reads values, on a CPU only
    for check in ("_check_cu_seqlens", "_check_mask_values"):
        monkeypatch.setattr(loss_options, check, lambda *_: None)
    batch = batch_for(device_of_path("triton"), how)

    def launches_of(call: Callable) -> list[str]:
        kernels.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
        operators = [e for e in profile.events() if e.name.startswith("aten::")]
        leaves = [e for e in operators if not any(c in operators for c in e.cpu_children)]
        return kernels + [e.name for e in leaves if e.name not in FREE]

    forward, backward = calls_of(batch, name, denominator=denominator)
    by_sequence = make_loss_options(**OPTIONS[name]).needs_sequence_pass
    first = "_sequence_kernel" if by_sequence else "_token_kernel"
    assert launches_of(forward) == [first, "_reduce_kernel"]
    assert launches_of(backward) == ["aten::mul"]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "how", "denominator"), cases())
def test_launches_on_a_gpu(name: str, how: str, denominator) -> None:
    batch = batch_for(torch.device("cuda"), how)
    if isinstance(denominator, torch.Tensor):
        denominator = denominator.cuda()
    forward, backward = calls_of(batch, name, denominator=denominator)
    forward(), backward()  # compiles

    def launches_of(call: Callable) -> list[str]:
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        return [event.name for event in profile.events() if event.device_type == on_device]

    assert len(launches_of(forward)) == 2
    assert len(launches_of(backward)) == 1
