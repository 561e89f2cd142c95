"""Instances of the selection kernels that are shipped, for ahead-of-time compilation
(tests/test_aot.py). Apart from the kernels, because it needs Triton and they import without it."""

from __future__ import annotations

from grpo_engine.kernels.certified_triton import (
    CANDIDATE_BLOCKS,
    CHOICE_WARPS,
    SPAN,
    _candidates_kernel,
    _choose_entries_kernel,
)
from grpo_engine.kernels.common import AotCase


def _signature(fn, constexprs: dict, **types: str) -> dict[str, str]:
    types = {
        "ids_ptr": "*i32",
        "ids_out_ptr": "*i32",
        "count_ptr": "*i32",
        "count_out_ptr": "*i32",
        "dense_ptr": "*u8",
        "token_ids_ptr": "*i64",
        "budget_share": "fp32",
        "unit": "fp32",
        "max_entries": "i32",
        "V": "i32",
    } | types
    return {
        name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in fn.arg_names
        if name not in constexprs
    }


def _candidates_case(dtype: str, candidates: int) -> AotCase:
    block, num_warps = CANDIDATE_BLOCKS[90]
    constexprs = {"CANDIDATES": candidates, "SPAN": SPAN, "BLOCK_V": block}
    signature = _signature(_candidates_kernel, constexprs, exps_ptr="*" + dtype)
    return AotCase(f"{dtype}-{candidates}", _candidates_kernel, signature, constexprs, num_warps)


def _choice_case(candidates: int) -> AotCase:
    constexprs = {"CANDIDATES": candidates}
    signature = _signature(_choose_entries_kernel, constexprs, exps_ptr="*bf16")
    num_warps = CHOICE_WARPS[candidates]
    return AotCase(str(candidates), _choose_entries_kernel, signature, constexprs, num_warps)


AOT_SIGNATURES = [
    _candidates_case("bf16", 512),
    _candidates_case("fp32", 512),
    *(_choice_case(candidates) for candidates in CHOICE_WARPS),
]
