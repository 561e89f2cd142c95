"""What every kernel file shares: optional Triton, dispatch, argument checks, ahead-of-time cases.

Triton is optional at import: on a machine without it ``@jit`` leaves a stub, CPU tensors take the
portable path, and a CUDA tensor gets a clear error. ``TRITON_INTERPRET=1`` (read when the package
is imported, as Triton itself reads it when a kernel is decorated) sends CPU tensors through the
Triton kernels as well; the tests use it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # a CPU-only install
    triton = tl = None
    HAS_TRITON = False

_INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

# Triton 3.10 turns FP fusion off by default; launches pass these options so results do not move.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT_DTYPES = (torch.int32, torch.int64)


def interpreting() -> bool:
    """True when Triton kernels run in its interpreter (``TRITON_INTERPRET=1`` at import)."""
    return _INTERPRETING


def use_triton(tensor: torch.Tensor) -> bool:
    """True when an op on ``tensor`` goes to the Triton kernels, False for the portable path."""
    if tensor.is_cuda and not HAS_TRITON:
        raise RuntimeError("CUDA tensors need triton: pip install triton")
    return tensor.is_cuda or _INTERPRETING


def jit(fn: Callable | None = None, **options: Any) -> Callable:
    """``triton.jit`` where Triton is installed, else the bare function (never launched)."""
    if fn is None:
        return functools.partial(jit, **options)
    return triton.jit(fn, **options) if HAS_TRITON else fn


def custom_op(name: str, mutates_args: tuple[str, ...] = ()) -> Callable:
    """``torch.library.custom_op`` whose body runs with autocast off.

    Each op states its own precision: under ``torch.autocast`` the fp32 GEMMs and sums inside it
    would turn half. The device type is that of the op's first argument, a tensor.
    """

    def register(body: Callable) -> torch.library.CustomOpDef:
        @functools.wraps(body)
        def run(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
            with torch.autocast(tensor.device.type, enabled=False):
                return body(tensor, *arguments, **keywords)

        schema = torch.library.infer_schema(body, mutates_args=mutates_args)
        return torch.library.custom_op(name, run, mutates_args=mutates_args, schema=schema)

    return register


def first_derivatives_only(backward: Callable) -> Callable:
    """Decorator of an op's backward: RuntimeError under ``create_graph=True``.

    The gradients are explicit numbers, so a second derivative would silently miss them
    (``torch.autograd.function.once_differentiable`` would miss the loss's own, whose incoming
    gradient is a constant).
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "grpo_engine kernels have first derivatives only: call backward without "
                "create_graph=True, or use the _ref twin"
            )
        return backward(ctx, *grads)

    return run


def on_device_of_first(launcher: Callable) -> Callable:
    """Decorator: Triton launches on the current device, so make it that of the first argument."""

    @functools.wraps(launcher)
    def launch(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        with torch.cuda.device_of(tensor):
            return launcher(tensor, *arguments, **keywords)

    return launch


@functools.lru_cache
def device_arch(device_index: int) -> int:
    """Compute capability of a CUDA device as one number: 80, 90, 100, ..."""
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


def arch_choice(table: Mapping[int, Any], tensor: torch.Tensor) -> Any:
    """The entry of a per-architecture table for ``tensor``'s device.

    ``table`` maps a compute capability (80, 90, 100) to a tuned choice; a device takes the entry of
    the newest architecture that is not newer than itself, else the oldest entry.
    """
    if not tensor.is_cuda:
        return table[min(table)]
    arch = device_arch(tensor.device.index or 0)
    return table[max((key for key in table if key <= arch), default=min(table))]


def block_size(length: int, most: int) -> int:
    """A power-of-two Triton block for a loop over ``length``: at most ``most``, at least 16."""
    return max(16, min(most, 1 << max(0, length - 1).bit_length()))


def check_float(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless ``tensor`` is fp32, bf16 or fp16."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")


def check_vector(
    name: str,
    tensor: torch.Tensor,
    length: int,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> None:
    """Raise ValueError unless ``tensor`` has shape [length], the device and one of ``dtypes``."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.ndim != 1 or tensor.shape[0] != length:
        raise ValueError(f"{name} must have shape [{length}], got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")
    if dtypes is not None and tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be one of {names}, got {tensor.dtype}")


def check_no_gradient(**tensors: object) -> None:
    """ValueError for a tensor that requires grad where none would reach it (None and numbers pass).

    Under ``torch.no_grad()`` nobody expects one.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires grad, but its gradient is not computed: pass {name}.detach()"
            )


@dataclass(frozen=True)
class AotCase:
    """One shipped instance of a Triton kernel, compiled ahead of time by ``tests/test_aot.py``.

    ``signature`` maps every run-time argument to its Triton type (``"*bf16"``, ``"i32"``,
    ``"fp32"``); ``constexprs`` gives the rest. ``label`` tells instances of one kernel apart.
    """

    label: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3

    @property
    def kernel_name(self) -> str:
        return f"{self.fn.__name__}[{self.label}]"
