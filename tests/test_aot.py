"""Every Triton kernel of the package compiles for sm_80, sm_90 and sm_100 without spilling, and
takes the registers and shared memory that the committed table says.

After a change that is meant: python -m grpo_engine.kernels.testing tests/aot_resources.json
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from grpo_engine.kernels.common import HAS_TRITON, interpreting
from grpo_engine.kernels.testing import ARCHS, aot_cases, compile_ahead, shipped_kernels

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
    pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET=1 compiles nothing"),
]

TABLE = json.loads((Path(__file__).parent / "aot_resources.json").read_text())
REWRITE = "python -m grpo_engine.kernels.testing tests/aot_resources.json"


def test_every_kernel_has_a_case_and_every_case_a_row():
    cases = aot_cases()
    names = [case.kernel_name for case in cases]
    assert len(names) == len(set(names)), "two cases share a name"
    assert set(shipped_kernels()) == {case.fn.__name__ for case in cases}
    assert set(names) == set(TABLE["kernels"]), f"the table is out of date; {REWRITE}"


@pytest.mark.parametrize("arch", ARCHS)
def test_resources_match_the_table(arch: int):
    """Spills and shared memory always; registers only under the Triton release that made the table,
    as its bundled assembler allocates them."""
    import triton

    same_release = triton.__version__ == TABLE["triton"]
    wrong = {}
    for case in aot_cases():
        used = asdict(compile_ahead(case, arch))
        expected = TABLE["kernels"][case.kernel_name][f"sm_{arch}"]
        if not same_release:
            used["registers"] = expected["registers"]
        if used["spill_bytes"] or used != expected:
            wrong[case.kernel_name] = {"now": used, "table": expected}
    assert not wrong, f"sm_{arch}, table made with triton {TABLE['triton']}: {wrong}; {REWRITE}"
