"""Instances of the vocabulary-parallel fold that are shipped, for ahead-of-time compilation
(tests/test_aot.py)."""

from __future__ import annotations

from grpo_engine.kernels.common import AotCase
from grpo_engine.kernels.top_logits import TOP
from grpo_engine.kernels.vocab_parallel_triton import _fold_shard_kernel
from grpo_engine.kernels.vocab_rows_triton import FOLD_BLOCKS

_FLAGS = ("HAS_BIAS", "HAS_SOFTCAP", "HAS_ROW_TEMPERATURE", "HAS_ROW_MASK", "WITH_ENTROPY")


def _aot_case(label: str, *on: str) -> AotCase:
    block, num_warps = FOLD_BLOCKS[90]
    types = {"local_ids_ptr": "*i64", "bias_ptr": "*bf16", "row_mask_ptr": "*u8", "V": "i32"}
    types |= {"top_ids_ptr": "*i32"}
    types |= {"stride_parts_k": "i32", "stride_logits_n": "i32"}
    constexprs = {"BLOCK_V": block, "TOP": TOP, **{flag: flag in on for flag in _FLAGS}}
    signature = {
        name: types.get(name, "*fp32" if name.endswith("_ptr") else "fp32")
        for name in _fold_shard_kernel.arg_names
        if name not in constexprs
    }
    return AotCase(label, _fold_shard_kernel, signature, constexprs, num_warps)


AOT_SIGNATURES = [
    _aot_case("plain"),
    _aot_case("entropy", "WITH_ENTROPY"),
    _aot_case("everything", *_FLAGS),
]
