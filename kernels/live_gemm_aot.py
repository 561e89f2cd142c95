"""Instances of the live-row GEMMs that are shipped, for ahead-of-time compilation
(tests/test_aot.py). Apart from the kernels, because it needs Triton and they import without it."""

from __future__ import annotations

from grpo_engine.kernels.common import AotCase
from grpo_engine.kernels.live_gemm_triton import (
    HIDDEN_TILES,
    LOGITS_TILES,
    PLAIN_TILES,
    WEIGHT_TILES,
    Tile,
    _live_rows_gemm_kernel,
    _live_weight_gemm_kernel,
)


def _aot_case(fn, job: str, dtype: str, tile: Tile, **flags) -> AotCase:
    constexprs = {
        "HAS_ROWS": True,
        "HAS_PLACES": False,
        "HAS_ROW_SCALE": job != "logits",
        "INPUT_PRECISION": "ieee",
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        **flags,
    }
    types = {
        "index_ptr": "*i32",
        "count_ptr": "*i32",
        "places_ptr": "*i32",
        "row_scale_ptr": "*fp32",
    }
    types |= {"out_ptr": "*fp32", "total_ptr": "*fp32"}
    signature = {
        name: types.get(name, "*" + dtype if name.endswith("_ptr") else "i32")
        for name in fn.arg_names
        if name not in constexprs
    }
    ends = [dtype, f"{tile.m}x{tile.n}", *(["aligned"] if flags["ALIGNED"] else [])]
    ends += [] if constexprs["HAS_ROWS"] else ["all"]
    ends += ["places"] if constexprs["HAS_PLACES"] else []
    ends += [] if constexprs["INPUT_PRECISION"] == "ieee" else [constexprs["INPUT_PRECISION"]]
    label = "-".join([job, *ends])
    return AotCase(label, fn, signature, constexprs, tile.num_warps, tile.num_stages)


_LOGITS = {"GATHER": True, "SCATTER": False, "B_TRANSPOSED": True}
_HIDDEN = {"GATHER": False, "SCATTER": True, "B_TRANSPOSED": False}


def _cases(dtype: str, tiles: tuple[Tile, Tile, Tile], **flags) -> list[AotCase]:
    logits, hidden, weight = tiles
    return [
        _aot_case(_live_rows_gemm_kernel, "logits", dtype, logits, **_LOGITS, **flags),
        _aot_case(_live_rows_gemm_kernel, "hidden", dtype, hidden, **_HIDDEN, **flags),
        _aot_case(_live_weight_gemm_kernel, "weight", dtype, weight, **flags),
    ]


def _all_rows(dtype: str, tile: Tile, **flags) -> AotCase:
    """The batch-invariant GEMM."""
    return _aot_case(
        _live_rows_gemm_kernel, "logits", dtype, tile, HAS_ROWS=False, **_LOGITS, **flags
    )


def _placed(dtype: str, hidden: Tile, weight: Tile, **flags) -> list[AotCase]:
    """The two gradients with dlogits taken from a list of places."""
    flags["HAS_PLACES"] = True
    return [
        _aot_case(_live_rows_gemm_kernel, "hidden", dtype, hidden, **_HIDDEN, **flags),
        _aot_case(_live_weight_gemm_kernel, "weight", dtype, weight, **flags),
    ]


AOT_SIGNATURES = [
    *(
        case
        for arch in (80, 90)
        for case in _cases(
            "bf16", (LOGITS_TILES[arch], HIDDEN_TILES[arch], WEIGHT_TILES[arch]), ALIGNED=True
        )
    ),
    _all_rows("bf16", LOGITS_TILES[90], ALIGNED=True),
    *_placed("bf16", HIDDEN_TILES[90], WEIGHT_TILES[90], ALIGNED=True),
    *_cases("fp16", (PLAIN_TILES[2],) * 3, ALIGNED=False),
    *_cases("fp32", (PLAIN_TILES[4],) * 3, ALIGNED=False),
    *_cases("fp32", (PLAIN_TILES[4],) * 3, ALIGNED=False, INPUT_PRECISION="tf32"),
]
