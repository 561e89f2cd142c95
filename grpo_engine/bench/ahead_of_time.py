"""Without a GPU the Triton kernels can still be compiled: what they would take on one."""

from __future__ import annotations

from typing import Any

from grpo_engine.bench.timing import reason
from grpo_engine.kernels.testing import HAS_TRITON, aot_cases, compile_ahead, interpreting

ARCH = 90  # sm_90: H100, H200
TITLE = (
    f"Triton kernels compiled ahead of time for sm_{ARCH} (no GPU here; this says nothing of speed)"
)
COLUMNS = ["kernel", "registers a thread", "spilled bytes", "shared bytes"]


def resource_table() -> dict[str, Any] | str:
    """The table, or in one line why there is none."""
    if not HAS_TRITON:
        return "no ahead-of-time table: triton is not installed"
    if interpreting():
        return "no ahead-of-time table: TRITON_INTERPRET is set"
    rows = []
    for case in aot_cases():
        try:
            found = compile_ahead(case, ARCH)
            figures = [found.registers, found.spill_bytes, found.shared_bytes]
        except Exception as error:  # shown in the table
            figures = [f"does not compile: {reason(error)}", "-", "-"]
        rows.append([case.kernel_name, *map(str, figures)])
    return {"columns": COLUMNS, "rows": rows}
