"""Instances of the loss kernels that are shipped, for ahead-of-time compilation
(tests/test_aot.py): every formula, with nothing and with everything on."""

from __future__ import annotations

from grpo_engine.kernels.common import AotCase
from grpo_engine.kernels.grpo_loss_triton import (
    NUM_WARPS,
    SEQUENCE_BLOCK,
    _sequence_kernel,
    _sequence_weights_kernel,
    _token_kernel,
    constexprs,
)
from grpo_engine.kernels.loss_options import make_loss_options


def _aot_case(fn, label: str, by_sequence: bool, has_old=True, **option_values) -> AotCase:
    options = make_loss_options(**option_values)
    flags = constexprs(
        options,
        has_old,
        options.beta > 0,
        options.is_correction is not None,
        options.entropy_coef != 0,
        by_sequence,
    )
    types = {"cu_seqlens_ptr": "*i32", "num_tokens": "i32"}
    signature = {
        name: types.get(name, "*fp32" if name.endswith("_ptr") else "fp32")
        for name in fn.arg_names
        if not name.isupper()
    }
    return AotCase(label, fn, signature, flags, NUM_WARPS)


_EVERYTHING = {"beta": 1.0, "kl_bias_correction": True, "entropy_coef": 1.0}
AOT_SIGNATURES = [
    AotCase(
        "f32",
        _sequence_weights_kernel,
        {"out_ptr": "*fp32", "mask_ptr": "*fp32", "cu_seqlens_ptr": "*i32"},
        {"BLOCK": SEQUENCE_BLOCK},
        NUM_WARPS,
    ),
    _aot_case(_token_kernel, "on-policy", False, has_old=False),
    _aot_case(_token_kernel, "clip", False),
    _aot_case(_token_kernel, "clip-k3", False, beta=1.0),
    _aot_case(_sequence_kernel, "gspo", True, loss_type="gspo"),
    _aot_case(_sequence_kernel, "vespo", True, loss_type="vespo"),
    *(
        _aot_case(
            _sequence_kernel,
            f"vespo-{how}-all",
            True,
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
            False,
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
            True,
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
