"""Triton kernels of live_gemm.py: two GEMMs whose number of rows, or of terms, is on the device.

One program makes one output tile. Its shape and the order of the sum are the same whatever the
number of rows, so a row's result depends on that row alone. Sizes are run-time arguments.
"""

from __future__ import annotations

from typing import NamedTuple

from grpo_engine.kernels.common import jit, tl


class Tile(NamedTuple):
    """Output tile [m, n], terms k a step, and the launch; m and k are rows of the pack at once."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


# Half inputs whose sizes, strides and pointers 16 divides, by compute capability. No spills
# (tests/test_aot.py). Not yet timed on a device.
LOGITS_TILES = {80: Tile(128, 128, 64, 8, 3), 90: Tile(128, 256, 64, 8, 4)}
HIDDEN_TILES = {80: Tile(128, 128, 64, 8, 3), 90: Tile(256, 128, 64, 8, 3)}
WEIGHT_TILES = {80: Tile(128, 128, 64, 8, 3), 90: Tile(128, 256, 64, 8, 3)}
# Everything else, by element size: small enough for loads of one element at a time.
PLAIN_TILES = {2: Tile(64, 64, 32, 8, 2), 4: Tile(64, 64, 16, 8, 2)}
# Row tiles that walk the columns together: their rows stay in L2 while the weight streams by.
GROUP_TILES = 16


@jit
def _tile_of(pid, num_m, num_n, group_m):
    """(row tile, column tile) of a program: ``group_m`` row tiles, then the next column."""
    group = pid // (group_m * num_n)
    first = group * group_m
    size = min(num_m - first, group_m)
    within = pid - first * num_n
    return first + within % size, within // size


@jit
def _times_16(size):
    """``size``, which 16 divides, so that the compiler sees it."""
    return size // 16 * 16


@jit
def _halves(tile):
    """The left and the right half of the columns of a tile [M, N]."""
    folded = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(folded, (0, 2, 1)))


@jit
def _live_count(count_ptr, num_rows, start, HAS_ROWS: tl.constexpr):
    """Rows of the chunk that are there: ``num_rows``, or fewer where the count on the device ends
    before."""
    if HAS_ROWS:
        return min(tl.load(count_ptr) - start, num_rows)
    return num_rows


@jit(do_not_specialize=["num_rows", "start", "group_m"])
def _live_rows_gemm_kernel(
    # output
    out_ptr,  # [M, COLS], or [N, COLS] where SCATTER
    # inputs
    a_ptr,  # [M, K], or [N, K] where GATHER
    b_ptr,  # [K, COLS], or [COLS, K] where B_TRANSPOSED
    index_ptr,  # [N] int32
    count_ptr,  # [1] int32
    places_ptr,  # [N] int32
    row_scale_ptr,  # [M] fp32
    # scalars
    start,
    # shapes
    num_rows,  # M
    COLS,
    K,
    group_m,
    # strides; the other one is 1
    stride_out,
    stride_a,
    stride_b,
    # constexprs
    HAS_ROWS: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    SCATTER: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,  # 16 divides strides, K and COLS, and pointers
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[i] = row_scale[i] * (a[i] @ b). Rows of a are index[start + i] where GATHER, those of out
    where SCATTER; those of a and row_scale are places[start + i] where HAS_PLACES."""
    if ALIGNED:
        COLS, K = _times_16(COLS), _times_16(K)
        stride_out, stride_a, stride_b = (
            _times_16(stride_out),
            _times_16(stride_a),
            _times_16(stride_b),
        )
    tile_m, tile_n = _tile_of(
        tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.cdiv(COLS, BLOCK_N), group_m
    )
    live = _live_count(count_ptr, num_rows, start, HAS_ROWS)
    if tile_m * BLOCK_M >= live:
        return
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < live
    mask_n = offs_n < COLS
    packed = offs_m + start
    if HAS_ROWS:
        packed = tl.load(index_ptr + packed, mask=mask_m, other=0)
    packed = packed.to(tl.int64)  # rows times V passes 2^31
    a_rows = offs_m.to(tl.int64)
    if HAS_PLACES:
        a_rows = tl.load(places_ptr + offs_m + start, mask=mask_m, other=0).to(tl.int64)
    # 64-bit scalars that move, 32-bit tiles that do not: half the registers of tiles of pointers
    if GATHER or HAS_PLACES:
        a_offs = (packed if GATHER else a_rows)[:, None] * stride_a + offs_k[None, :]
    else:
        a_ptr += (tile_m * BLOCK_M).to(tl.int64) * stride_a
        a_offs = tl.arange(0, BLOCK_M)[:, None] * stride_a + offs_k[None, :]
    if B_TRANSPOSED:
        b_ptr += (tile_n * BLOCK_N).to(tl.int64) * stride_b
        b_offs = tl.arange(0, BLOCK_N)[None, :] * stride_b + offs_k[:, None]
    else:
        b_ptr += tile_n * BLOCK_N
        b_offs = offs_k[:, None] * stride_b + tl.arange(0, BLOCK_N)[None, :]

    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        a_ptrs, b_ptrs = a_ptr + a_offs, b_ptr + b_offs
        if ALIGNED:
            a_ptrs = tl.multiple_of(a_ptrs, (1, 16))
            b_ptrs = tl.multiple_of(b_ptrs, (16, 1) if B_TRANSPOSED else (1, 16))
        a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=INPUT_PRECISION)
        a_ptr += BLOCK_K
        b_ptr += BLOCK_K if B_TRANSPOSED else BLOCK_K * tl.cast(stride_b, tl.int64)

    if HAS_ROW_SCALE:
        total *= tl.load(row_scale_ptr + a_rows, mask=mask_m, other=0.0)[:, None]
    out_rows = packed if SCATTER else offs_m.to(tl.int64)
    rows_ptr = out_ptr + out_rows[:, None] * stride_out
    left, right = _halves(total)
    HALF: tl.constexpr = BLOCK_N // 2
    for side in tl.static_range(2):
        offs = tile_n * BLOCK_N + side * HALF + tl.arange(0, HALF)
        ptrs = rows_ptr + offs[None, :]
        if ALIGNED:
            ptrs = tl.multiple_of(ptrs, (1, 16))
        part = left if side == 0 else right
        mask = mask_m[:, None] & (offs < COLS)[None, :]
        tl.store(ptrs, part.to(out_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["num_rows", "start", "group_m"])
def _live_weight_gemm_kernel(
    # output
    total_ptr,  # [V, D] fp32, added to
    # inputs
    dlogits_ptr,  # [M, V]
    hidden_ptr,  # [N, D]
    index_ptr,  # [N] int32
    count_ptr,  # [1] int32
    places_ptr,  # [N] int32
    row_scale_ptr,  # [M] fp32
    # scalars
    start,
    # shapes
    num_rows,  # M
    V,
    D,
    group_m,
    # strides; the other one is 1
    stride_total,
    stride_dlogits,
    stride_hidden,
    # constexprs
    HAS_ROWS: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    ALIGNED: tl.constexpr,  # 16 divides strides, V and D, and pointers
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """total[v] += sum_i dlogits[i, v] * (row_scale[i] * hidden[index[start + i]]), i < live; with
    HAS_PLACES dlogits and row_scale are at places[start + i]."""
    if ALIGNED:
        V, D = _times_16(V), _times_16(D)
        stride_total, stride_dlogits, stride_hidden = (
            _times_16(stride_total),
            _times_16(stride_dlogits),
            _times_16(stride_hidden),
        )
    tile_v, tile_d = _tile_of(tl.program_id(0), tl.cdiv(V, BLOCK_M), tl.cdiv(D, BLOCK_N), group_m)
    live = _live_count(count_ptr, num_rows, start, HAS_ROWS)
    if live <= 0:
        return
    offs_v = tile_v * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tile_d * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_v = offs_v < V
    mask_d = offs_d < D
    dlogits_ptr += tile_v * BLOCK_M

    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, live, BLOCK_K):
        rows = k + offs_k
        mask_k = rows < live
        packed = rows + start
        if HAS_ROWS:
            packed = tl.load(index_ptr + packed, mask=mask_k, other=0)
        a_rows = rows.to(tl.int64)
        if HAS_PLACES:
            a_rows = tl.load(places_ptr + rows + start, mask=mask_k, other=0).to(tl.int64)
        a_ptrs = dlogits_ptr + a_rows[None, :] * stride_dlogits + tl.arange(0, BLOCK_M)[:, None]
        b_ptrs = hidden_ptr + packed[:, None].to(tl.int64) * stride_hidden + offs_d[None, :]
        if ALIGNED:
            a_ptrs = tl.multiple_of(a_ptrs, (16, 1))
            b_ptrs = tl.multiple_of(b_ptrs, (1, 16))
        a = tl.load(a_ptrs, mask=mask_v[:, None] & mask_k[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_d[None, :], other=0.0)
        if HAS_ROW_SCALE:
            scale = tl.load(row_scale_ptr + a_rows, mask=mask_k, other=0.0)
            b = (b.to(tl.float32) * scale[:, None]).to(hidden_ptr.dtype.element_ty)
        total = tl.dot(a, b, total, input_precision=INPUT_PRECISION)

    # in two halves: the old values of a whole tile would not fit beside the new ones
    HALF: tl.constexpr = BLOCK_N // 2
    left, right = _halves(total)
    rows_ptr = total_ptr + offs_v[:, None].to(tl.int64) * stride_total
    for side in tl.static_range(2):
        offs = tile_d * BLOCK_N + side * HALF + tl.arange(0, HALF)
        ptrs = rows_ptr + offs[None, :]
        if ALIGNED:
            ptrs = tl.multiple_of(ptrs, (1, 16))
        mask = mask_v[:, None] & (offs < D)[None, :]
        part = left if side == 0 else right
        tl.store(ptrs, tl.load(ptrs, mask=mask, other=0.0) + part, mask=mask)
