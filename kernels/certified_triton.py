"""Triton kernels of certified.py: which entries of a row of exponentials the backward keeps.

Two launches: one read of the row leaves the few entries large enough to matter (candidates), in the
order of the vocabulary; the second finds the threshold among them. Sizes are run-time arguments.
"""

from __future__ import annotations

from grpo_engine.kernels.common import jit, tl

# (BLOCK_V, num_warps) by compute capability: 16 entries a thread. Not yet timed on a device.
CANDIDATE_BLOCKS = {80: (2048, 4), 90: (2048, 4), 100: (2048, 4)}
# Blocks between two looks at whether the row can still be sparse.
SPAN = 8
# Warps of the second kernel, by candidates a row: 4 of them a thread.
CHOICE_WARPS = {256: 2, 512: 4, 1024: 8}


@jit(do_not_specialize=["max_entries"])
def _candidates_kernel(
    # outputs
    ids_ptr,  # [C, CANDIDATES] int32
    count_ptr,  # [C] int32: 0 for a dead row, CANDIDATES + 1 for one that cannot be sparse
    tail_ptr,  # [C] fp32: sum of the entries that are not candidates
    # inputs
    exps_ptr,  # [C, V]
    token_ids_ptr,  # [C]
    total_ptr,  # [C] fp32
    row_scale_ptr,  # [C] fp32, 0: dead
    # scalars
    budget_share,  # of the total: what may be dropped, times the unit of exps
    # shapes
    max_entries,
    V,
    # strides
    stride_exps_n,
    # constexprs
    CANDIDATES: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # C * V passes 2^31 where C is all of a pack
    if tl.load(row_scale_ptr + row) == 0.0:
        tl.store(count_ptr + row, 0)
        tl.store(tail_ptr + row, 0.0)
        return
    budget = budget_share * tl.load(total_ptr + row)
    least = budget / (CANDIDATES - max_entries)
    token = tl.load(token_ids_ptr + row).to(tl.int32)
    exps_ptr += row * stride_exps_n
    ids_ptr += row * CANDIDATES
    sums = tl.zeros([BLOCK_V], dtype=tl.float32)
    count = tl.full([], 0, dtype=tl.int32)
    start = tl.full([], 0, dtype=tl.int32)
    possible = budget > 0.0  # not where the total is NaN
    while possible & (start < V):
        for block in range(SPAN):
            offs_v = start + block * BLOCK_V + tl.arange(0, BLOCK_V)
            exps = tl.load(exps_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)
            is_candidate = (offs_v == token) | (exps >= least)
            sums += tl.where(is_candidate, 0.0, exps)
            in_block = is_candidate.to(tl.int32)
            found = tl.sum(in_block, axis=0)
            if found > 0:
                place = count + tl.cumsum(in_block, axis=0) - 1
                tl.store(ids_ptr + place, offs_v, mask=is_candidate & (place < CANDIDATES))
            count += found
        # a sum above the budget, or NaN, ends the row; so do more candidates than fit
        possible = (count <= CANDIDATES) & (tl.sum(sums, axis=0) <= budget)
        start += SPAN * BLOCK_V
    tl.store(count_ptr + row, tl.where(possible, count, CANDIDATES + 1))
    tl.store(tail_ptr + row, tl.sum(sums, axis=0))


@jit(do_not_specialize=["max_entries"])
def _choose_entries_kernel(
    # outputs
    ids_out_ptr,  # [C, max_entries] int32
    coef_ptr,  # [C, max_entries] fp32
    count_out_ptr,  # [C] int32
    dense_ptr,  # [C] bytes
    dropped_ptr,  # [C] fp32
    # inputs
    ids_ptr,  # [C, CANDIDATES]
    exps_ptr,  # [C, V]
    token_ids_ptr,  # [C]
    count_ptr,  # [C]
    tail_ptr,  # [C]
    total_ptr,  # [C]
    at_token_ptr,  # [C]
    row_scale_ptr,  # [C]
    # scalars
    budget_share,
    unit,
    # shapes
    max_entries,
    # strides
    stride_ids_out,
    stride_coef,
    stride_exps_n,
    # constexprs
    CANDIDATES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + row)
    is_sparse = (count > 0) & (count <= CANDIDATES)
    num_kept = tl.full([], 0, dtype=tl.int32)
    dropped = tl.full([], 0.0, dtype=tl.float32)
    if is_sparse:
        offs = tl.arange(0, CANDIDATES)
        there = offs < count
        ids = tl.load(ids_ptr + row * CANDIDATES + offs, mask=there, other=0)
        exps = tl.load(exps_ptr + row * stride_exps_n + ids, mask=there, other=0.0).to(tl.float32)
        is_token = ids == tl.load(token_ids_ptr + row).to(tl.int32)
        exps = tl.where(is_token, float("inf"), exps)  # above every threshold
        total = tl.load(total_ptr + row)
        tail = tl.load(tail_ptr + row)
        budget = budget_share * total
        # The bits of positive floats are ordered as they are. The largest threshold that drops no
        # more than the budget is found bit by bit: the sum of what lies below it never falls.
        bits = exps.to(tl.int32, bitcast=True)
        low = tl.full([], 0, dtype=tl.int32)
        high = tl.full([], 0x7F800000, dtype=tl.int32)  # infinity
        for _ in range(31):
            middle = low + (high - low + 1) // 2
            below = tail + tl.sum(tl.where(bits < middle, exps, 0.0), axis=0)
            fits = below <= budget
            low = tl.where(fits, middle, low)
            high = tl.where(fits, high, middle - 1)
        kept = there & (bits >= low)
        num_kept = tl.sum(kept.to(tl.int32), axis=0)
        is_sparse = num_kept <= max_entries
        below = tail + tl.sum(tl.where(bits < low, exps, 0.0), axis=0)
        dropped = tl.where(is_sparse, below / (unit * total), 0.0)
        if is_sparse:
            place = tl.cumsum(kept.to(tl.int32), axis=0) - 1
            at_token = tl.load(at_token_ptr + row)
            coef = tl.load(row_scale_ptr + row) * tl.where(is_token, at_token, exps)
            tl.store(ids_out_ptr + row * stride_ids_out + place, ids, mask=kept)
            tl.store(coef_ptr + row * stride_coef + place, coef, mask=kept)
    tl.store(count_out_ptr + row, tl.where(is_sparse, num_kept, 0))
    tl.store(dense_ptr + row, ((count > 0) & (is_sparse == 0)).to(tl.uint8))
    tl.store(dropped_ptr + row, dropped)
