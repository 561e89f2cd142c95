"""Triton kernel of vocab_parallel.py: one program folds a shard's columns of one row.

The same read of the row as vocab_rows_triton.py's fold, stopped before the parts that need the
other shards.
"""

from __future__ import annotations

from grpo_engine.kernels.common import jit, tl
from grpo_engine.kernels.vocab_rows_triton import _online_sums, _row_start, _store_top


@jit(do_not_specialize=["stride_parts_k"])
def _fold_shard_kernel(
    # outputs
    parts_ptr,  # [4, N] fp32: t, o, w, m of vocab_parallel.py
    top_ids_ptr,  # [N, 1 + TOP] int32
    top_values_ptr,  # [N, 1 + TOP] fp32
    # inputs
    logits_ptr,  # [N, V]
    local_ids_ptr,  # [N]; in [0, V) for a token of this shard alone
    bias_ptr,  # [V]
    temperature_ptr,  # [N]
    row_mask_ptr,  # [N] bytes
    # scalars
    temperature,
    logit_scale,
    softcap,
    # shapes
    V,
    # strides
    stride_parts_k,
    stride_logits_n,
    # constexprs
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ROW_TEMPERATURE: tl.constexpr,
    HAS_ROW_MASK: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # N * V passes 2^31 at 14,134 rows of 151,936
    out_ptr = parts_ptr + row
    if HAS_ROW_MASK:  # noqa: SIM102 - `and` would load the mask where there is none
        if tl.load(row_mask_ptr + row) == 0:
            for part in tl.static_range(4):
                tl.store(out_ptr + part * stride_parts_k, 0.0)
            return
    row_ptr, temperature, inv_temperature, token, inside, token_logit = _row_start(
        row,
        logits_ptr,
        local_ids_ptr,
        bias_ptr,
        temperature_ptr,
        temperature,
        logit_scale,
        softcap,
        V,
        stride_logits_n,
        HAS_BIAS,
        HAS_SOFTCAP,
        HAS_ROW_TEMPERATURE,
    )
    token_logit = tl.where(inside, token_logit, -float("inf"))  # softcap makes -inf finite
    row_max, others, weighted, best, best_start = _online_sums(
        row_ptr,
        bias_ptr,
        token,
        token_logit,
        inv_temperature,
        logit_scale,
        softcap,
        V,
        HAS_BIAS,
        HAS_SOFTCAP,
        WITH_ENTROPY,
        TOP > 0,
        BLOCK_V,
    )
    tl.store(out_ptr, token_logit)
    tl.store(out_ptr + stride_parts_k, others)
    tl.store(out_ptr + 2 * stride_parts_k, weighted)
    tl.store(out_ptr + 3 * stride_parts_k, row_max)
    if TOP > 0:
        _store_top(
            top_ids_ptr + row * (1 + TOP),
            top_values_ptr + row * (1 + TOP),
            token,
            inside,
            token_logit,
            best,
            best_start,
            BLOCK_V,
            TOP,
        )
