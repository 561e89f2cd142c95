"""Instances of the sparse row kernels that are shipped, for ahead-of-time compilation
(tests/test_aot.py). Apart from the kernels, because it needs Triton and they import without it."""

from __future__ import annotations

from grpo_engine.kernels.common import AotCase
from grpo_engine.kernels.sparse_rows_triton import (
    GATHER_BLOCKS,
    SEGMENT_BLOCKS,
    SEGMENT_PIECE,
    _crossing_sums_kernel,
    _gather_grad_hidden_kernel,
    _gather_logits_kernel,
    _segment_sums_kernel,
)


def _aot_case(fn, label: str, types: dict, constexprs: dict, num_warps: int) -> AotCase:
    signature = {
        name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in fn.arg_names
        if name not in constexprs
    }
    return AotCase(label, fn, signature, constexprs, num_warps)


_BLOCK_K, _BLOCK_D, _GATHER_WARPS = GATHER_BLOCKS[90]
_GATHER = {"BLOCK_K": _BLOCK_K, "BLOCK_D": _BLOCK_D}
_SEGMENT_D, _SEGMENT_WARPS = SEGMENT_BLOCKS[90]
_SEGMENTS = {"PIECE": SEGMENT_PIECE, "BLOCK_D": _SEGMENT_D}
_INTS = {"ids_ptr": "*i32", "counts_ptr": "*i32", "rows_ptr": "*i32"}
_SORTED = {"sorted_ids_ptr": "*i32", "order_ptr": "*i64"}


def _cases(dtype: str) -> list[AotCase]:
    pointer = "*" + dtype
    inputs = {"hidden_ptr": pointer, "weight_ptr": pointer}
    return [
        _aot_case(_gather_logits_kernel, dtype, _INTS | inputs, _GATHER, _GATHER_WARPS),
        *(
            _aot_case(
                _gather_grad_hidden_kernel,
                f"{dtype}-{out}" + ("-rows" if rows else ""),
                _INTS | inputs | {"out_ptr": "*" + out},
                _GATHER | {"HAS_ROWS": rows},
                _GATHER_WARPS,
            )
            for out in dict.fromkeys((dtype, "fp32"))
            for rows in (False, True)
        ),
        _aot_case(_segment_sums_kernel, dtype, _SORTED | inputs, _SEGMENTS, _SEGMENT_WARPS),
    ]


AOT_SIGNATURES = [
    *(case for dtype in ("bf16", "fp16", "fp32") for case in _cases(dtype)),
    _aot_case(_crossing_sums_kernel, "fp32", _SORTED, _SEGMENTS, _SEGMENT_WARPS),
]
