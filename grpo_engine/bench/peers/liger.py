"""Liger-Kernel's ops: the scaled cross entropy (CuTe on sm_90, else a loop in torch), the fused
linear cross entropy, the chunked GRPO loss, and the Triton GRPO loss over logits in memory."""

from __future__ import annotations

import importlib.util
from functools import partial

import torch
from torch import Tensor

from grpo_engine.bench.cases import Inputs
from grpo_engine.bench.peers.plain_torch import (
    CE_ONLY,
    ONE_SUM,
    finish_sum,
    head_providers,
    masked_ids,
    no_compiler,
)
from grpo_engine.bench.provider import (
    HEAD,
    Outputs,
    Provider,
    finish,
    installed,
    triton_missing,
)

NO_VECTOR = {"temperature_vector": "takes one temperature, not one per token"}
NO_BIAS = {"bias": "takes no bias"}


def _missing(device: torch.device) -> str | None:
    return installed("liger_kernel", "liger-kernel")


def _triton_missing(device: torch.device) -> str | None:
    return _missing(device) or triton_missing(device)


def _compile_missing(device: torch.device) -> str | None:
    return _missing(device) or no_compiler(device)


def _scaled_missing(device: torch.device) -> str | None:
    """On compute capability 9.0 it is a CuTe kernel, elsewhere a loop in torch."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    if hopper and importlib.util.find_spec("cutlass") is None:
        return _missing(device) or "needs nvidia-cutlass-dsl on this GPU, which is not installed"
    return _missing(device)


def _scaled(inputs: Inputs) -> Outputs:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    want_entropy = "entropy" in inputs["wants"]
    found = Function.apply(
        inputs["hidden"],
        inputs["weight"],
        masked_ids(inputs),
        inputs.get("temperature", 1.0),
        -100,
        1,
        want_entropy,
    )
    if not want_entropy:
        return {"logprobs": -found}
    return {"logprobs": -found[0], "entropy": found[1]}


def _cross_entropy(reduction: str, inputs: Inputs) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Function

    found = Function.apply(
        inputs["hidden"],
        inputs["weight"],
        masked_ids(inputs),
        inputs.get("bias"),
        None,
        -100,
        0.0,
        0.0,
        reduction,
    )
    return found[0]


def _cross_entropy_rows(inputs: Inputs) -> Outputs:
    return {"logprobs": -_cross_entropy("none", inputs)}


def _cross_entropy_sum(inputs: Inputs, backward: bool) -> Outputs:
    return finish_sum(_cross_entropy("sum", inputs), inputs, backward)


def _padded(inputs: Inputs) -> dict[str, Tensor]:
    """Sequences of one length as [S, T], which is what a padded batch without padding is."""
    num_sequences = len(inputs["cu_seqlens"]) - 1
    names = ("token_ids", "old_logprobs", "ref_logprobs", "row_mask", "advantages")
    rows = {name: inputs[name].view(num_sequences, -1) for name in names if name in inputs}
    rows["advantages"] = rows["advantages"][:, 0].contiguous()  # one per sequence
    return rows


def _chunked_grpo(compiled: bool, inputs: Inputs, backward: bool) -> Outputs:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    rows = _padded(inputs)
    op = LigerFusedLinearGRPOLoss(
        beta=inputs["beta"],
        use_ref_model="ref_logprobs" in rows,
        epsilon_low=inputs["epsilon"],
        epsilon_high=inputs["epsilon"],
        loss_type="dapo",
        temperature=inputs.get("temperature", 1.0),
        compiled=compiled,
    )
    ids = rows["token_ids"]
    mask = rows["row_mask"] if "row_mask" in rows else torch.ones_like(ids)
    loss, _ = op(
        inputs["hidden"].view(*ids.shape, -1),
        inputs["weight"],
        ids,
        mask,
        rows["advantages"],
        bias=inputs.get("bias"),
        ref_per_token_logps=rows.get("ref_logprobs"),
        old_per_token_logps=rows["old_logprobs"],
    )
    return finish({"loss": loss}, inputs, backward, HEAD)


def _triton_grpo(inputs: Inputs, backward: bool) -> Outputs:
    """The logits in memory, [S, T + 1, V]: Liger drops each sequence's last position."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    rows = _padded(inputs)
    ids = rows["token_ids"]
    hidden = inputs["hidden"].view(*ids.shape, -1)
    hidden = torch.nn.functional.pad(hidden, (0, 0, 0, 1))
    logits = torch.nn.functional.linear(hidden, inputs["weight"], inputs.get("bias"))
    mask = rows.get("row_mask")
    loss, _ = triton_grpo_loss(
        logits,
        rows["old_logprobs"],
        rows.get("ref_logprobs"),
        ids.contiguous(),
        rows["advantages"],
        None if mask is None else mask.contiguous(),
        temperature=inputs.get("temperature", 1.0),
        beta=inputs["beta"],
        eps_low=inputs["epsilon"],
        eps_high=inputs["epsilon"],
        loss_type="dapo",
        reduce=True,
    )
    return finish({"loss": loss}, inputs, backward, HEAD)


def _selective_log_softmax(inputs: Inputs, backward: bool) -> Outputs:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    logits = torch.nn.functional.pad(inputs["logits"].detach(), (0, 0, 0, 1))
    ids = inputs["token_ids"][None].contiguous()
    logprobs = fused_selective_log_softmax(logits[None], ids, inputs.get("temperature", 1.0))
    return {"logprobs": logprobs[0]}


PROVIDERS = (
    *head_providers(
        "Liger FusedLinearScaledCE",
        "liger-kernel",
        _scaled,
        _scaled_missing,
        NO_VECTOR | NO_BIAS | {"lse": "gives no log-sum-exp"},
    ),
    *head_providers(
        "Liger FusedLinearCE", "liger-kernel", _cross_entropy_rows, _triton_missing, CE_ONLY
    ),
    Provider(
        "Liger FusedLinearCE, sum",
        "linear_logprobs",
        "liger-kernel",
        _cross_entropy_sum,
        _triton_missing,
        CE_ONLY | ONE_SUM,
    ),
    Provider(
        "Liger FusedLinearGRPOLoss",
        "linear_grpo_loss",
        "liger-kernel",
        partial(_chunked_grpo, True),
        _compile_missing,
        NO_VECTOR,
        compiles=True,  # in every call, and that is its default
    ),
    Provider(
        "Liger FusedLinearGRPOLoss, not compiled",
        "linear_grpo_loss",
        "liger-kernel",
        partial(_chunked_grpo, False),
        _missing,
        NO_VECTOR,
    ),
    Provider(
        "Liger triton_grpo_loss over logits",
        "linear_grpo_loss",
        "liger-kernel",
        _triton_grpo,
        _triton_missing,
        NO_VECTOR,
    ),
    Provider(
        "Liger fused_selective_log_softmax",
        "token_logprobs",
        "liger-kernel",
        _selective_log_softmax,
        _triton_missing,
        NO_VECTOR
        | {
            "entropy": "gives no entropy",
            "entropy_grad": "gives no entropy",
            "lse": "gives no log-sum-exp",
            "backward": "has no backward",
        },
    ),
)
