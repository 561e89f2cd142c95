"""What the kernel tests share: three-way accuracy, and the resources of ahead-of-time compiled
kernels.

Three-way: a result is held against an fp64 truth computed from the same (rounded) inputs, beside
what plain torch reaches at the working dtype. A tolerance alone cannot tell a good bf16 kernel from
a bad one.

Ahead of time: Triton compiles for a GPU that is not there; the registers, spills and shared memory
of the cubin are recorded in a committed table, so that a change which makes a kernel spill shows in
review. This says nothing about speed. Triton compiles an instance of its own for launches whose
pointers, strides and sizes are multiples of 16 (a vocabulary of 151,936), with wider loads and
other registers; the table holds that one, ``aligned``, and the ``generic`` one (a vocabulary of
50,257). Rewrite it with

    python -m grpo_engine.kernels.testing tests/aot_resources.json
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from grpo_engine.kernels.common import HAS_TRITON, LAUNCH_OPTIONS, AotCase, interpreting

ARCHS = (80, 90, 100)  # A100, H100/H200, B200
VARIANTS = ("aligned", "generic")

# Largest error, relative to the truth's largest magnitude, that needs no excuse by torch's own
# error.
ERROR_FLOOR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class ErrorReport:
    """Errors against the truth: largest absolute, and relative in the Frobenius norm."""

    name: str
    ours_max: float
    torch_max: float
    ours_norm: float
    torch_norm: float

    def __str__(self) -> str:
        return (
            f"{self.name}: max |error| ours {self.ours_max:.2e}, torch {self.torch_max:.2e}; "
            f"relative norm ours {self.ours_norm:.2e}, torch {self.torch_norm:.2e}"
        )


def assert_accurate(
    name: str,
    ours: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    dtype: torch.dtype,
    factor: float = 1.2,
    floor: float | None = None,
) -> ErrorReport:
    """Require error(ours) <= factor x error(eager) + floor, by largest element and by norm.

    `truth` is fp64, `eager` plain torch at `dtype`, `ours` the op under test at `dtype`; errors of
    the largest element are taken relative to the truth's largest magnitude. `floor` defaults to
    ERROR_FLOOR[dtype]. Shapes must agree and nothing may be NaN or infinite where the truth is
    finite.
    """
    if truth.dtype != torch.float64:
        raise ValueError(f"truth must be float64, got {truth.dtype}")
    assert ours.shape == eager.shape == truth.shape, (name, ours.shape, eager.shape, truth.shape)
    assert torch.isfinite(ours).all(), f"{name}: {int((~torch.isfinite(ours)).sum())} not finite"
    floor = ERROR_FLOOR[dtype] if floor is None else floor
    ours_error, eager_error = (ours.double() - truth).abs(), (eager.double() - truth).abs()
    norm = max(truth.norm().item(), torch.finfo(torch.float64).tiny)
    report = ErrorReport(
        name,
        ours_error.max().item() if truth.numel() else 0.0,
        eager_error.max().item() if truth.numel() else 0.0,
        ours_error.norm().item() / norm,
        eager_error.norm().item() / norm,
    )
    scale = truth.abs().max().item() if truth.numel() else 0.0
    assert report.ours_max <= factor * report.torch_max + floor * scale, str(report)
    assert report.ours_norm <= factor * report.torch_norm + floor, str(report)
    return report


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers a thread, bytes of local memory a thread (spills
    and local arrays), bytes of shared memory a program."""

    registers: int
    spill_bytes: int
    shared_bytes: int


def kernel_modules() -> list:
    """Every module of the kernels package, imported."""
    package = importlib.import_module("grpo_engine.kernels")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [
        importlib.import_module(f"grpo_engine.kernels.{name}")
        for name in names
        if not name.startswith("_C")
    ]


def shipped_kernels() -> dict[str, object]:
    """Name -> Triton function of every `*_kernel` that the package defines."""
    from triton.runtime.jit import JITFunction

    return {
        name: value
        for module in kernel_modules()
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }


def aot_cases() -> list[AotCase]:
    """Every instance that the kernel files list under AOT_SIGNATURES."""
    return [case for module in kernel_modules() for case in getattr(module, "AOT_SIGNATURES", ())]


def compile_ahead(case: AotCase, arch: int, variant: str = "aligned") -> Resources:
    """Compile for compute capability `arch` (90 = sm_90) without a device and read the cubin.

    `variant` is one of VARIANTS. Raises RuntimeError where Triton is missing or interprets: then
    nothing is compiled.
    """
    if not HAS_TRITON or interpreting():
        raise RuntimeError("ahead-of-time compilation needs triton, and TRITON_INTERPRET unset")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=case.fn,
        signature=_full_signature(case),
        constexprs=dict(case.constexprs),
        attrs=multiples_of_16(case) if variant == "aligned" else {},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **LAUNCH_OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spill_bytes = _cubin_resources(compiled.asm["cubin"])
    return Resources(registers, spill_bytes, compiled.metadata.shared)


def _full_signature(case: AotCase) -> dict[str, str]:
    """The types of all arguments in the kernel's order, as ASTSource wants them."""
    names = case.fn.arg_names
    unknown = set(case.signature) | set(case.constexprs)
    if unknown != set(names):
        raise ValueError(f"{case.kernel_name}: case and kernel differ in {unknown ^ set(names)}")
    return {name: case.signature.get(name, "constexpr") for name in names}


def multiples_of_16(case: AotCase) -> dict[tuple[int], list[list]]:
    """What a launch states about pointers and integers that 16 divides, as ASTSource wants it."""
    return {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(case.fn.arg_names)
        if case.signature.get(name, "").startswith(("*", "i"))
    }


def _cubin_resources(cubin: bytes) -> tuple[int, int]:
    """(registers, local bytes) a thread, from the cuobjdump that Triton brings along."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def measure_all() -> dict:
    """The table: versions, and kernel -> architecture and variant -> resources."""
    import triton

    kernels = {
        case.kernel_name: {
            row_name(arch, variant): asdict(compile_ahead(case, arch, variant))
            for arch in ARCHS
            for variant in VARIANTS
        }
        for case in aot_cases()
    }
    return {"triton": triton.__version__, "kernels": dict(sorted(kernels.items()))}


def row_name(arch: int, variant: str) -> str:
    return f"sm_{arch} {variant}"


def table_text(table: dict) -> str:
    """The table as JSON, one line per kernel, architecture and variant, so that a diff reads
    well."""
    rows = []
    for name, by_row in table["kernels"].items():
        lines = [f"    {json.dumps(row)}: {json.dumps(used)}" for row, used in by_row.items()]
        rows.append(f"   {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n   }")
    body = ",\n".join(rows)
    return f'{{\n "triton": {json.dumps(table["triton"])},\n "kernels": {{\n{body}\n }}\n}}\n'


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m grpo_engine.kernels.testing TABLE.json")
    Path(sys.argv[1]).write_text(table_text(measure_all()))
