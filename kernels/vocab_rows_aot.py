"""Instances of the vocabulary kernels that are shipped, for ahead-of-time compilation
(tests/test_aot.py). Apart from the kernels, because it needs Triton and they import without it."""

from __future__ import annotations

from grpo_engine.kernels.common import AotCase
from grpo_engine.kernels.top_logits import TOP
from grpo_engine.kernels.vocab_rows_triton import (
    DLOGITS_BLOCKS,
    FOLD_BLOCKS,
    _dlogits_rows_kernel,
    _fold_rows_kernel,
)


def _aot_case(fn, logits_type: str, blocks: tuple[int, int], out_type="fp32", **flags) -> AotCase:
    """A kernel at one logits type; every flag not named is off."""
    block, num_warps = blocks
    types = {
        "dlogits_ptr": "*" + out_type,
        "logits_ptr": "*" + logits_type,
        "token_ids_ptr": "*i64",
        "bias_ptr": "*" + out_type,
        "row_mask_ptr": "*u8",
        "top_ids_ptr": "*i32",
        "V": "i32",
        "stride_logits_n": "i32",
        "stride_dlogits_n": "i32",
    }
    signature, constexprs = {}, {"BLOCK_V": block}
    for name in fn.arg_names:
        if name.isupper() and name not in ("V", "BLOCK_V"):
            constexprs[name] = flags.get(name, 0 if name == "TOP" else False)
        elif name != "BLOCK_V":
            signature[name] = types.get(name, "*fp32" if name.endswith("_ptr") else "fp32")
    label = "-".join([logits_type, out_type, *(name.lower() for name, on in flags.items() if on)])
    return AotCase(label, fn, signature, constexprs, num_warps)


# Without TOP for token_logprobs; with it for the fp32 logits of the head chunks (bias, softcap, row
# mask).
AOT_SIGNATURES = [
    *(
        _aot_case(_fold_rows_kernel, dtype, FOLD_BLOCKS[90], WITH_ENTROPY=entropy)
        for dtype in ("bf16", "fp16", "fp32")
        for entropy in (False, True)
    ),
    _aot_case(_fold_rows_kernel, "fp32", FOLD_BLOCKS[90], TOP=TOP),
    _aot_case(
        _fold_rows_kernel,
        "fp32",
        FOLD_BLOCKS[90],
        HAS_BIAS=True,
        HAS_SOFTCAP=True,
        HAS_ROW_TEMPERATURE=True,
        HAS_ROW_MASK=True,
        WITH_ENTROPY=True,
        TOP=TOP,
    ),
    *(
        _aot_case(
            _dlogits_rows_kernel, dtype, DLOGITS_BLOCKS[90], out_type=out, HAS_GRAD_ENTROPY=entropy
        )
        for dtype, out in (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "bf16"), ("fp32", "fp32"))
        for entropy in (False, True)
    ),
    _aot_case(
        _dlogits_rows_kernel,
        "fp32",
        DLOGITS_BLOCKS[90],
        out_type="bf16",
        HAS_BIAS=True,
        HAS_SOFTCAP=True,
        HAS_ROW_TEMPERATURE=True,
        HAS_ROW_MASK=True,
        HAS_GRAD_ENTROPY=True,
        HAS_GRAD_LSE=True,
    ),
    _aot_case(
        _dlogits_rows_kernel,
        "fp32",
        DLOGITS_BLOCKS[90],
        out_type="bf16",
        HAS_ROW_MASK=True,
        SKIP_MASKED=True,
    ),
]
