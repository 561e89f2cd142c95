"""Instances of the kernel of exp_rows.py that are shipped, for ahead-of-time compilation
(tests/test_aot.py). Apart from the kernel, because it needs Triton and that imports without it."""

from __future__ import annotations

from grpo_engine.kernels.common import AotCase
from grpo_engine.kernels.exp_rows_triton import EXP_BLOCKS, _exp_rows_kernel
from grpo_engine.kernels.top_logits import TOP

_TYPES = {
    "token_ids_ptr": "*i64",
    "safe_ptr": "*u8",
    "row_mask_ptr": "*u8",
    "top_ids_ptr": "*i32",
    "V": "i32",
    "stride_exps_n": "i32",
    "stride_logits_n": "i32",
}


def _aot_case(out_type: str, **flags: bool) -> AotCase:
    """The kernel at one type of the exponentials; every flag not named is off."""
    block, num_warps = EXP_BLOCKS[90]
    types = {**_TYPES, "exps_ptr": "*" + out_type, "bias_ptr": "*" + out_type}
    signature, constexprs = {}, {"BLOCK_V": block}
    for name in _exp_rows_kernel.arg_names:
        if name.isupper() and name not in ("V", "BLOCK_V"):
            constexprs[name] = flags.get(name, 0 if name == "TOP" else False)
        elif name != "BLOCK_V":
            signature[name] = types.get(name, "*fp32" if name.endswith("_ptr") else "fp32")
    label = "-".join([out_type, *(name.lower() for name, on in flags.items() if on)])
    return AotCase(label, _exp_rows_kernel, signature, constexprs, num_warps)


AOT_SIGNATURES = [
    *(
        _aot_case(out_type, WITH_ENTROPY=entropy)
        for out_type in ("bf16", "fp16", "fp32")
        for entropy in (False, True)
    ),
    *(_aot_case(out_type, TOP=TOP) for out_type in ("bf16", "fp16", "fp32")),
    _aot_case("bf16", HAS_ROW_MASK=True, TOP=TOP),
    _aot_case("bf16", HAS_ROW_MASK=True, SKIP_MASKED=True, TOP=TOP),
    _aot_case(
        "bf16",
        HAS_BIAS=True,
        HAS_SOFTCAP=True,
        HAS_ROW_TEMPERATURE=True,
        HAS_ROW_MASK=True,
        WITH_ENTROPY=True,
        TOP=TOP,
    ),
]
