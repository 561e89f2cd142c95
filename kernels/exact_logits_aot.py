"""Instances of the kernel of exact_logits.py that are shipped, for ahead-of-time compilation
(tests/test_aot.py). Apart from the kernel, because it needs Triton and that imports without it."""

from __future__ import annotations

from grpo_engine.kernels.common import AotCase
from grpo_engine.kernels.exact_logits_triton import EXACT_BLOCKS, _exact_rows_kernel
from grpo_engine.kernels.top_logits import TOP

_FLAGS = ("HAS_BIAS", "HAS_SOFTCAP", "HAS_ROW_TEMPERATURE", "HAS_ROW_MASK")


def _aot_case(dtype: str, label: str, *on: str) -> AotCase:
    """The kernel at one type of ``hidden`` and ``weight``, the flags ``on`` set."""
    block, num_warps = EXACT_BLOCKS[90]
    types = {name + "_ptr": "*" + dtype for name in ("hidden", "weight", "bias")}
    types |= {"top_ids_ptr": "*i32", "row_mask_ptr": "*u8", "safe_ptr": "*u8", "D": "i32"}
    types |= {"stride_hidden_n": "i32", "stride_weight_v": "i32", "stride_shifts_k": "i32"}
    flags = (*_FLAGS, "HAS_LSE", "HAS_PRIOR", "SHIFTS_ONLY")
    constexprs = {"BLOCK_D": block, "TOP": TOP, **{flag: flag in on for flag in flags}}
    signature = {
        name: types.get(name, "*fp32" if name.endswith("_ptr") else "fp32")
        for name in _exact_rows_kernel.arg_names
        if name not in constexprs
    }
    return AotCase(f"{dtype}-{label}", _exact_rows_kernel, signature, constexprs, num_warps)


AOT_SIGNATURES = [
    *(_aot_case(dtype, "stats", "HAS_LSE") for dtype in ("bf16", "fp16", "fp32")),
    *(_aot_case(dtype, "prior", "HAS_PRIOR") for dtype in ("bf16", "fp16", "fp32")),
    _aot_case("bf16", "shard", "HAS_LSE", "SHIFTS_ONLY"),
    _aot_case("bf16", "everything", "HAS_LSE", *_FLAGS),
]
