"""This package's kernels, each in every mode that changes how the work is done."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from grpo_engine.bench.cases import Inputs
from grpo_engine.bench.provider import (
    HEAD,
    Later,
    Outputs,
    Provider,
    finish,
    finish_attention,
    here,
)
from grpo_engine.kernels import (
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logprobs,
    pack_rollouts,
    pack_rollouts_ref,
    plan_batches,
    token_logprobs,
    unpack,
    varlen_attention,
)
from grpo_engine.kernels.common import interpreting

SPARSE_DELTA = 1e-3


def _named(outputs: Tensor | tuple[Tensor, ...], inputs: Inputs) -> Outputs:
    """Our tuples come in the order logprobs, entropy, lse."""
    values = outputs if isinstance(outputs, tuple) else (outputs,)
    names = [name for name in ("logprobs", "entropy", "lse") if name in inputs["wants"]]
    return dict(zip(names, values, strict=True))


def _asked(inputs: Inputs) -> dict:
    wants = inputs["wants"]
    return {"return_entropy": "entropy" in wants, "return_lse": "lse" in wants}


def _head_options(inputs: Inputs) -> dict:
    return {k: inputs[k] for k in ("bias", "temperature", "row_mask") if k in inputs}


def _token_logprobs(inputs: Inputs, backward: bool, **mode) -> Outputs:
    options = {"temperature": inputs.get("temperature", 1.0)} | _asked(inputs)
    outputs = token_logprobs(inputs["logits"], inputs["token_ids"], **options, **mode)
    return finish(_named(outputs, inputs), inputs, backward, ("logits",))


def _linear_logprobs(inputs: Inputs, backward: bool, **mode) -> Outputs:
    options = _head_options(inputs) | _asked(inputs)
    outputs = linear_logprobs(
        inputs["hidden"], inputs["weight"], inputs["token_ids"], **options, **mode
    )
    return finish(_named(outputs, inputs), inputs, backward, HEAD)


def _loss_options(inputs: Inputs) -> dict:
    options = {"epsilon": inputs["epsilon"], "cu_seqlens": inputs["cu_seqlens"]}
    if "ref_logprobs" in inputs:
        options |= {"beta": inputs["beta"], "ref_logprobs": inputs["ref_logprobs"]}
    return options


def _linear_grpo_loss(inputs: Inputs, backward: bool, **mode) -> Outputs:
    loss, _, _ = linear_grpo_loss(
        inputs["hidden"],
        inputs["weight"],
        inputs["token_ids"],
        inputs["old_logprobs"],
        inputs["advantages"],
        loss_type="dapo",
        **_head_options(inputs),
        **_loss_options(inputs),
        **mode,
    )
    return finish({"loss": loss}, inputs, backward, HEAD)


def _logprobs_then_loss(inputs: Inputs, backward: bool) -> Outputs:
    head = (inputs["hidden"], inputs["weight"], inputs["token_ids"])
    logprobs = linear_logprobs(*head, **_head_options(inputs))
    fields = (inputs["old_logprobs"], inputs["advantages"])
    mask = inputs.get("row_mask")
    options = _loss_options(inputs)
    loss, _ = grpo_loss(logprobs, *fields, loss_type="dapo", loss_mask=mask, **options)
    return finish({"loss": loss}, inputs, backward, HEAD)


def _grpo_loss(inputs: Inputs, backward: bool) -> Outputs:
    fields = (inputs["logprobs"], inputs["old_logprobs"], inputs["advantages"])
    loss, _ = grpo_loss(*fields, **_loss_options(inputs))
    return finish({"loss": loss}, inputs, backward, ("logprobs",))


def _pack(op, inputs: Inputs, backward: bool) -> Outputs:
    batch = op(
        inputs["token_ids"], inputs["fields"], offsets=inputs["offsets"], order=inputs["order"]
    )
    made = {**vars(batch), **batch.fields}
    return {name: made[name] for name in inputs["wants"]}


def _unpack(inputs: Inputs, backward: bool) -> Outputs:
    lengths = inputs["lengths"]
    padded = unpack(inputs["packed"], inputs["cu_seqlens"], padded=True, lengths=lengths)
    return {"padded": padded}


def _varlen_attention(inputs: Inputs, backward: bool) -> Outputs:
    bounds = {"cu_seqlens": inputs["cu_seqlens"], "max_seqlen": max(inputs["lengths"])}
    out = varlen_attention(inputs["q"], inputs["k"], inputs["v"], **bounds)
    return finish_attention(out, inputs, backward)


def _plan(method: str, inputs: Inputs, backward: bool) -> Outputs:
    ranks, limit = inputs["ranks"], inputs["max_tokens"]
    plan = plan_batches(inputs["lengths"], limit, num_ranks=ranks, method=method)
    return Later(lambda: plan_outputs([chunk for rank in plan for chunk in rank], inputs))


def plan_outputs(chunks: list[list[int]], inputs: Inputs) -> Outputs:
    """``planned``: the sequences in the plan, sorted; ``over``: the tokens above the limit."""
    lengths = torch.tensor(inputs["lengths"])
    loads = [int(lengths[chunk].sum()) if chunk else 0 for chunk in chunks]
    return {
        "planned": torch.tensor(sorted(index for chunk in chunks for index in chunk)),
        "over": torch.tensor(float(sum(max(0, load - inputs["max_tokens"]) for load in loads))),
    }


def _compact_missing(device: torch.device) -> str | None:
    if device.type == "cpu" and not interpreting():
        return "a CPU always leaves dead rows out"
    return None


def _group_advantages(inputs: Inputs, backward: bool) -> Outputs:
    return {"advantages": group_advantages(inputs["rewards"], inputs["group_size"])}


PROVIDERS = (
    Provider("ours", "token_logprobs", None, _token_logprobs),
    Provider(
        "ours, gradient over the logits",
        "token_logprobs",
        None,
        partial(_token_logprobs, inplace_backward=True),
        overwrites=("logits",),
    ),
    Provider("ours", "linear_logprobs", None, _linear_logprobs),
    Provider("ours", "linear_grpo_loss", None, _linear_grpo_loss),
    Provider(
        "ours, probabilities kept",
        "linear_logprobs",
        None,
        partial(_linear_logprobs, keep_probs=True),
        cannot=dict.fromkeys(("entropy", "entropy_grad", "lse"), "keeps no entropy's gradient"),
    ),
    *(
        Provider(f"ours, {words}", job, None, partial(run, **mode), missing)
        for job, run in (
            ("linear_logprobs", _linear_logprobs),
            ("linear_grpo_loss", _linear_grpo_loss),
        )
        for words, mode, missing in (
            ("batch-invariant", {"batch_invariant": True}, here),
            ("dead rows left out", {"compact_rows": True}, _compact_missing),
        )
    ),
    Provider(
        "ours, certified sparse",
        "linear_grpo_loss",
        None,
        partial(_linear_grpo_loss, sparse_delta=SPARSE_DELTA),
        cannot={"bias": "has no gradient of a bias"},
        approximate=f"leaves out at most {SPARSE_DELTA:g} of each row's probability",
    ),
    Provider("ours, logprobs then loss", "linear_grpo_loss", None, _logprobs_then_loss),
    Provider("ours", "grpo_loss", None, _grpo_loss),
    Provider("ours", "pack", None, partial(_pack, pack_rollouts)),
    Provider("torch, field by field", "pack", None, partial(_pack, pack_rollouts_ref)),
    Provider("ours", "unpack", None, _unpack),
    Provider("ours", "varlen_attention", None, _varlen_attention),
    *(
        Provider(f"ours, {method}", "plan_batches", None, partial(_plan, method))
        for method in ("best_fit", "lpt", "kk")
    ),
    Provider("ours", "group_advantages", None, _group_advantages),
)
