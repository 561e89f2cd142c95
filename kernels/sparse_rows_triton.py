"""Triton kernels of sparse_rows.py. Sizes are run-time arguments: no recompilation as they change.

Block sizes do not depend on K or D, so that a sum has the same order whatever the padding.
"""

from __future__ import annotations

from grpo_engine.kernels.common import jit, tl

# (BLOCK_K, BLOCK_D, num_warps) by compute capability: 16 fp32 values a thread for the sums and as
# many loads in flight. (BLOCK_D, num_warps) for the segments: 8 values a thread, a 16-byte load of
# half inputs. Not yet timed on a device.
GATHER_BLOCKS = {80: (8, 256, 4), 90: (8, 256, 4), 100: (8, 256, 4)}
SEGMENT_BLOCKS = {80: (1024, 4), 90: (1024, 4), 100: (1024, 4)}
# Sorted entries that one program of the segmented sum walks.
SEGMENT_PIECE = 128


@jit(do_not_specialize=["K", "stride_ids_n"])
def _gather_logits_kernel(
    # output
    out_ptr,  # [N, K] fp32
    # inputs
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    ids_ptr,  # [N, K]
    counts_ptr,  # [N]
    # shapes
    V,
    D,
    K,
    # strides
    stride_hidden_n,
    stride_weight_v,
    stride_ids_n,
    # constexprs
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    count = tl.minimum(tl.load(counts_ptr + row), K)
    ids = tl.load(ids_ptr + row * stride_ids_n + offs_k, mask=offs_k < count, other=-1)
    readable = (ids >= 0) & (ids < V)
    hidden_ptr += row * stride_hidden_n
    weight_ptrs = weight_ptr + tl.where(readable, ids, 0).to(tl.int64)[:, None] * stride_weight_v
    sums = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    # A block of padding reads neither the row nor the weight.
    width = tl.where(tl.max(readable.to(tl.int32), axis=0) > 0, D, 0)
    for start in range(0, width, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        hidden = tl.load(hidden_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        mask = readable[:, None] & mask_d[None, :]
        weight = tl.load(weight_ptrs + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        sums += hidden[None, :] * weight
    logits = tl.where(ids < 0, -float("inf"), tl.sum(sums, axis=1))
    # An id >= V cannot raise from here without a host sync: it gives NaN.
    logits = tl.where(ids >= V, float("nan"), logits)
    tl.store(out_ptr + row * K + offs_k, logits, mask=offs_k < K)


@jit(do_not_specialize=["K", "stride_coef_n", "stride_ids_n"])
def _gather_grad_hidden_kernel(
    # output
    out_ptr,  # [*, D]
    # inputs
    coef_ptr,  # [N, K] fp32
    ids_ptr,  # [N, K]
    counts_ptr,  # [N]
    weight_ptr,  # [V, D]
    rows_ptr,  # [N]
    # shapes
    V,
    D,
    K,
    # strides
    stride_out_n,
    stride_coef_n,
    stride_ids_n,
    stride_weight_v,
    # constexprs
    HAS_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = row
    if HAS_ROWS:
        target = tl.load(rows_ptr + row).to(tl.int64)
        if target < 0:
            return
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    count = tl.minimum(tl.load(counts_ptr + row), K)
    sums = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    for start in range(0, count, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < count
        ids = tl.load(ids_ptr + row * stride_ids_n + offs_k, mask=mask_k, other=-1)
        readable = (ids >= 0) & (ids < V)
        coef = tl.load(coef_ptr + row * stride_coef_n + offs_k, mask=readable, other=0.0)
        weight_ptrs = weight_ptr + ids.to(tl.int64)[:, None] * stride_weight_v + offs_d[None, :]
        mask = readable[:, None] & mask_d[None, :]
        weight = tl.load(weight_ptrs, mask=mask, other=0.0).to(tl.float32)
        sums += coef[:, None] * weight
    grad = tl.sum(sums, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + target * stride_out_n + offs_d, grad, mask=mask_d)


@jit(do_not_specialize=["K", "E"])
def _segment_sums_kernel(
    # outputs
    total_ptr,  # [V, D] fp32, added to
    crossing_ptr,  # [pieces, D] fp32: the sum of the id that began in an earlier piece
    # inputs
    sorted_ids_ptr,  # [E] ascending; V: adds nothing
    order_ptr,  # [E] int64: row * K + place
    coef_ptr,  # [N, K] fp32
    hidden_ptr,  # [N, D]
    # shapes
    V,
    D,
    K,
    E,
    # strides
    stride_total_v,
    stride_hidden_n,
    # constexprs
    PIECE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    piece = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    start = piece * PIECE
    end = tl.minimum(start + PIECE, E)
    vocab_id = tl.load(sorted_ids_ptr + start).to(tl.int64)
    before = tl.load(sorted_ids_ptr + start - 1, mask=start > 0, other=-1).to(tl.int64)
    began_here = before != vocab_id
    sums = tl.zeros([BLOCK_D], dtype=tl.float32)
    for i in range(start, end):
        if vocab_id < V:
            entry = tl.load(order_ptr + i)
            coef = tl.load(coef_ptr + entry)
            hidden_ptrs = hidden_ptr + (entry // K) * stride_hidden_n + offs_d
            sums += coef * tl.load(hidden_ptrs, mask=mask_d, other=0.0).to(tl.float32)
        after = tl.load(sorted_ids_ptr + i + 1, mask=i + 1 < end, other=-1).to(tl.int64)
        if after != vocab_id:  # the last of its id in this piece
            if vocab_id < V:
                if began_here:
                    total_ptrs = total_ptr + vocab_id * stride_total_v + offs_d
                    so_far = tl.load(total_ptrs, mask=mask_d, other=0.0)
                    tl.store(total_ptrs, so_far + sums, mask=mask_d)
                else:
                    tl.store(crossing_ptr + piece * D + offs_d, sums, mask=mask_d)
            sums = tl.zeros([BLOCK_D], dtype=tl.float32)
            began_here = tl.full([], 1, tl.int1)
        vocab_id = after


@jit(do_not_specialize=["E"])
def _crossing_sums_kernel(
    # output
    total_ptr,  # [V, D] fp32, added to
    # inputs
    crossing_ptr,  # [pieces, D] fp32
    sorted_ids_ptr,  # [E] ascending; V: adds nothing
    # shapes
    V,
    D,
    E,
    # strides
    stride_total_v,
    # constexprs
    PIECE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program for each piece in which an id begins that goes on in the next."""
    piece = tl.program_id(0).to(tl.int64)
    start = piece * PIECE
    end = start + PIECE
    if end >= E:
        return
    vocab_id = tl.load(sorted_ids_ptr + end - 1).to(tl.int64)
    if (vocab_id >= V) | (tl.load(sorted_ids_ptr + end) != vocab_id):
        return
    before = tl.load(sorted_ids_ptr + start - 1, mask=start > 0, other=-1).to(tl.int64)
    if before == vocab_id:  # it began earlier
        return
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    sums = tl.zeros([BLOCK_D], dtype=tl.float32)
    follower = piece + 1
    first = vocab_id
    while first == vocab_id:
        sums += tl.load(crossing_ptr + follower * D + offs_d, mask=mask_d, other=0.0)
        follower += 1
        first = tl.load(sorted_ids_ptr + follower * PIECE, mask=follower * PIECE < E, other=-1).to(
            tl.int64
        )
    total_ptrs = total_ptr + vocab_id * stride_total_v + offs_d
    tl.store(total_ptrs, tl.load(total_ptrs, mask=mask_d, other=0.0) + sums, mask=mask_d)
