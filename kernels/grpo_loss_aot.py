"""Instances of the loss kernels that are shipped, for ahead-of-time compilation
(tests/test_aot.py): every formula, with nothing and with everything on."""

from __future__ import annotations

from grpo_engine.kernels.common import AotCase
from grpo_engine.kernels.grpo_loss_sequence_triton import _sequence_kernel
from grpo_engine.kernels.grpo_loss_triton import (
    NUM_WARPS,
    SEQUENCE_BLOCK,
    _reduce_kernel,
    _sequence_weights_kernel,
    _token_kernel,
    constexprs,
    reduce_constexprs,
    weighting,
)
from grpo_engine.kernels.loss_options import make_loss_options

_TYPES = {
    "cu_seqlens_ptr": "*i32",
    "mask_ptr": "*u8",
    **dict.fromkeys(("num_tokens", "num_sequences", "search_steps", "num_rows"), "i32"),
}


def _signature(fn) -> dict[str, str]:
    return {
        name: _TYPES.get(name, "*fp32" if name.endswith("_ptr") else "fp32")
        for name in fn.arg_names
        if not name.isupper()
    }


def _aot_case(fn, label: str, has_old=True, is_chunk=False, **option_values) -> AotCase:
    """As `grpo_loss` launches it with a mask, cu_seqlens and [S] advantages; `is_chunk`: as
    linear_grpo_loss does."""
    options = make_loss_options(**option_values)
    flags = constexprs(
        options,
        weighting(options, is_chunk, not is_chunk, False),
        by_token=is_chunk,
        denominator=False,
        sequences=not is_chunk,
        mask=True,
        old=has_old,
        ref=options.beta > 0,
        sampler=options.is_correction is not None,
        entropy=options.entropy_coef != 0,
    )
    return AotCase(label, fn, _signature(fn), flags, NUM_WARPS)


def _reduce_case(normalise: str, grads: int) -> AotCase:
    flags = reduce_constexprs(normalise, grads)
    label = f"{normalise}-{grads}"
    return AotCase(label, _reduce_kernel, _signature(_reduce_kernel), flags, NUM_WARPS)


_EVERYTHING = {"beta": 1.0, "kl_bias_correction": True, "entropy_coef": 1.0}
AOT_SIGNATURES = [
    AotCase(
        "f32",
        _sequence_weights_kernel,
        {"out_ptr": "*fp32", "mask_ptr": "*fp32", "cu_seqlens_ptr": "*i32"},
        {"BLOCK": SEQUENCE_BLOCK},
        NUM_WARPS,
    ),
    *(
        _reduce_case(normalise, grads)
        for normalise in ("none", "tokens", "mean")
        for grads in (1, 2)
    ),
    _aot_case(_token_kernel, "on-policy", has_old=False),
    _aot_case(_token_kernel, "chunk", is_chunk=True),
    _aot_case(_token_kernel, "dapo", loss_type="dapo"),
    _aot_case(_token_kernel, "clip"),
    _aot_case(_token_kernel, "clip-k3", beta=1.0),
    _aot_case(_sequence_kernel, "gspo", loss_type="gspo"),
    _aot_case(_sequence_kernel, "vespo", loss_type="vespo"),
    *(
        _aot_case(
            _sequence_kernel,
            f"vespo-{how}-all",
            loss_type="vespo",
            is_correction=how,
            **_EVERYTHING,
        )
        for how in ("token_truncate", "token_mask")
    ),
    *(
        _aot_case(
            _token_kernel,
            f"{loss}-{how}-all",
            loss_type=loss,
            is_correction=how,
            **_EVERYTHING,
        )
        for loss, how in (
            ("grpo", "token_truncate"),
            ("cispo", "token_mask"),
            ("sapo", "token_mask"),
        )
    ),
    *(
        _aot_case(
            _sequence_kernel,
            f"{loss}-{how}-all",
            loss_type=loss,
            importance_level="sequence",
            is_correction=how,
            **_EVERYTHING,
        )
        for loss, how in (
            ("grpo", "sequence_mask"),
            ("cispo", "sequence_mask"),
            ("sapo", "token_mask"),
        )
    ),
]
