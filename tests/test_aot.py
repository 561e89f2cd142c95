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
from grpo_engine.kernels.testing import (
    ARCHS,
    VARIANTS,
    aot_cases,
    compile_ahead,
    multiples_of_16,
    row_name,
    shipped_kernels,
)

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
    compiled = {row_name(arch, variant) for arch in ARCHS for variant in VARIANTS}
    assert all(set(rows) == compiled for rows in TABLE["kernels"].values())


def test_the_two_variants_are_the_two_that_launches_compile():
    """Both are in the table because they differ: in most kernels by registers."""
    differ = [
        name
        for name, rows in TABLE["kernels"].items()
        if rows[row_name(90, "aligned")] != rows[row_name(90, "generic")]
    ]
    assert len(differ) > len(TABLE["kernels"]) / 4, differ


def test_everything_that_16_can_divide_is_said_to_be_divisible():
    """As Triton's own launcher says it: pointers and integers, by place among the arguments."""
    for case in aot_cases():
        stated = {case.fn.arg_names[place] for (place,) in multiples_of_16(case)}
        kinds = {name: case.signature.get(name, "constexpr") for name in case.fn.arg_names}
        assert stated == {n for n, kind in kinds.items() if kind not in ("constexpr", "fp32")}


# Of the generic variant one architecture always, the others when asked: a compilation takes 0.2 to
# 0.5 s, and the tests must not take minutes.
COMPILED = [
    pytest.param(arch, variant, marks=() if quick else pytest.mark.slow)
    for variant in VARIANTS
    for arch in ARCHS
    for quick in [variant == "aligned" or arch == 90]
]


@pytest.mark.parametrize(("arch", "variant"), COMPILED)
def test_resources_match_the_table(arch: int, variant: str):
    """Spills and shared memory always; registers only under the Triton release that made the table,
    as its bundled assembler allocates them."""
    import triton

    same_release = triton.__version__ == TABLE["triton"]
    wrong = {}
    for case in aot_cases():
        used = asdict(compile_ahead(case, arch, variant))
        expected = TABLE["kernels"][case.kernel_name][row_name(arch, variant)]
        if not same_release:
            used["registers"] = expected["registers"]
        if used["spill_bytes"] or used != expected:
            wrong[case.kernel_name] = {"now": used, "table": expected}
    assert not wrong, (
        f"{row_name(arch, variant)}, table made with triton {TABLE['triton']}: {wrong}; {REWRITE}"
    )
