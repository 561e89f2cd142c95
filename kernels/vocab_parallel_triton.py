"""Triton kernel of vocab_parallel.py: one program folds a shard's columns of one row.

The same read of the row as vocab_rows_triton.py's fold, stopped before the parts that need the
other shards.
"""

from __future__ import annotations

from grpo_engine.kernels.common import jit, tl
from grpo_engine.kernels.vocab_rows_triton import _load_logits, _online_sums


@jit(do_not_specialize=["stride_parts_k"])
def _fold_shard_kernel(
    # output
    parts_ptr,  # [4, N] fp32: t, o, w, m of vocab_parallel.py
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
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # N * V passes 2^31 at 14,134 rows of 151,936
    out_ptr = parts_ptr + row
    if HAS_ROW_MASK:  # noqa: SIM102 - `and` would load the mask where there is none
        if tl.load(row_mask_ptr + row) == 0:
            for part in tl.static_range(4):
                tl.store(out_ptr + part * stride_parts_k, 0.0)
            return
    if HAS_ROW_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row)
    inv_temperature = 1.0 / temperature
    row_ptr = logits_ptr + row * stride_logits_n
    token = tl.load(local_ids_ptr + row).to(tl.int64)
    inside = (token >= 0) & (token < V)
    token_logit = _load_logits(
        row_ptr, bias_ptr, token, inside, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP
    )
    token_logit = tl.where(inside, token_logit, -float("inf"))  # softcap makes -inf finite
    row_max, others, weighted = _online_sums(
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
        BLOCK_V,
    )
    tl.store(out_ptr, token_logit)
    tl.store(out_ptr + stride_parts_k, others)
    tl.store(out_ptr + 2 * stride_parts_k, weighted)
    tl.store(out_ptr + 3 * stride_parts_k, row_max)
