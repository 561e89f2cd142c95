"""The truth in fp64 on the very inputs a provider is given, errors against it, and two verdicts.

``wrong`` is the gate before a clock is started: is this the function that was asked for? It allows
what rounding at the working dtype explains, measured by plain torch on the same inputs.
``misses`` holds a result against this package's own bounds:

    log-probabilities, loss, log-sum-exp   absolute error <= 1e-5
    entropy                                absolute error <= 1e-4
    gradients of half inputs               relative error <= 1.2 times that of torch's own autograd
    gradients of fp32 inputs               relative error <= 1e-5

Gradients are compared by the Frobenius norm of the difference over that of the truth.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_engine.bench.cases import Case, Inputs
from grpo_engine.bench.provider import Outputs, Provider

ABSOLUTE = ("logprobs", "entropy", "lse", "loss", "advantages")  # largest absolute error
BOUNDS = {"logprobs": 1e-5, "lse": 1e-5, "loss": 1e-5, "logprobs_sum": 1e-5, "entropy": 1e-4}
GRADIENT_BOUND, GRADIENT_FACTOR = 1e-5, 1.2
GATE_FACTOR = 4.0
# Half-precision logits of some tens are off by this much, whoever rounds them.
GATE_ABSOLUTE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
GATE_RELATIVE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}
GATE_APPROXIMATE = 0.25  # of a gradient that leaves out something by design
ELEMENTS_AT_ONCE = {"cpu": 2**25, "cuda": 2**27}  # of fp64 logits


# ---- The truth -----------------------------------------------------------------------------------


def truth(case: Case, inputs: Inputs) -> Outputs:
    """Every output and gradient that a provider of the job may give, fp64 (integers exact)."""
    makers = {
        "token_logprobs": _logits_truth,
        "linear_logprobs": _head_truth,
        "linear_grpo_loss": _head_truth,
        "grpo_loss": _loss_truth,
        "pack": _pack_truth,
        "unpack": _unpack_truth,
        "varlen_attention": _attention_truth,
        "plan_batches": _plan_truth,
        "group_advantages": _advantages_truth,
    }
    return makers[case.job](inputs)


def _exact(inputs: Inputs, name: str, rows: slice = slice(None)) -> Tensor | None:
    if name not in inputs:
        return None
    tensor = inputs[name].detach()[rows].double()
    return tensor.requires_grad_(inputs[name].requires_grad)


def _row_chunks(num_rows: int, vocab: int, device: torch.device) -> list[slice]:
    step = max(1, ELEMENTS_AT_ONCE.get(device.type, 2**25) // vocab)
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def _rows_of(logits: Tensor, inputs: Inputs, rows: slice) -> Outputs:
    """Log-probabilities, entropy and log-sum-exp of logits [n, V], 0 where masked."""
    temperature = inputs.get("temperature", 1.0)
    if isinstance(temperature, Tensor):
        temperature = temperature[rows].double()[:, None]
    logits = logits / temperature
    lse = logits.logsumexp(-1)
    log_p = logits - lse[:, None]
    outputs = {
        "logprobs": log_p.gather(1, inputs["token_ids"][rows, None]).squeeze(1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "lse": lse,
    }
    if "row_mask" in inputs:
        mask = inputs["row_mask"][rows]
        outputs = {name: value.where(mask, 0.0) for name, value in outputs.items()}
    return outputs


def _logprob_objective(outputs: Outputs, inputs: Inputs, rows: slice) -> Tensor:
    """The scalar whose gradient the incoming gradients ask for."""
    total = (outputs["logprobs"] * inputs["grad_logprobs"][rows].double()).sum()
    if "grad_entropy" in inputs:
        total = total + (outputs["entropy"] * inputs["grad_entropy"][rows].double()).sum()
    return total


@torch.enable_grad()
def _logits_truth(inputs: Inputs) -> Outputs:
    num_rows, vocab = inputs["logits"].shape
    pieces: dict[str, list[Tensor]] = {}
    for rows in _row_chunks(num_rows, vocab, inputs["logits"].device):
        logits = _exact(inputs, "logits", rows)
        outputs = _rows_of(logits, inputs, rows)
        objective = _logprob_objective(outputs, inputs, rows)
        (outputs["d_logits"],) = torch.autograd.grad(objective, logits)
        for name, value in outputs.items():
            pieces.setdefault(name, []).append(value.detach())
    return {name: torch.cat(values) for name, values in pieces.items()}


@torch.enable_grad()
def _head_truth(inputs: Inputs) -> Outputs:
    """Rows some at a time; gradients of weight and bias are sums over them."""
    hidden, weight, bias = inputs["hidden"], _exact(inputs, "weight"), _exact(inputs, "bias")
    pieces: dict[str, list[Tensor]] = {}
    sums: dict[str, Tensor] = {}
    weights = _loss_weights(inputs)
    for rows in _row_chunks(hidden.shape[0], weight.shape[0], hidden.device):
        leaves = {"hidden": _exact(inputs, "hidden", rows), "weight": weight, "bias": bias}
        leaves = {n: t for n, t in leaves.items() if t is not None and t.requires_grad}
        logits = leaves.get("hidden", hidden[rows].detach().double()) @ weight.T
        outputs = _rows_of(logits if bias is None else logits + bias, inputs, rows)
        if weights is None:
            objective = _logprob_objective(outputs, inputs, rows)
        else:
            objective = _clipped_loss(outputs["logprobs"], inputs, weights, rows)
            sums["loss"] = sums.get("loss", 0.0) + objective.detach()
        grads = torch.autograd.grad(objective, list(leaves.values()))
        for name, grad in zip(leaves, grads, strict=True):
            if name == "hidden":
                outputs["d_hidden"] = grad
            else:
                sums[f"d_{name}"] = sums[f"d_{name}"].add_(grad) if f"d_{name}" in sums else grad
        for name, value in outputs.items():
            pieces.setdefault(name, []).append(value.detach())
    found = {name: torch.cat(values) for name, values in pieces.items()} | sums
    found["logprobs_sum"] = found["logprobs"].sum()
    return found


def _loss_weights(inputs: Inputs) -> Tensor | None:
    """[N] fp64 of the loss; None where there is none. With a head a mean over tokens left in,
    without one a mean over sequences of means over tokens."""
    if "old_logprobs" not in inputs:
        return None
    if "hidden" in inputs:
        ones = torch.ones(
            len(inputs["hidden"]), dtype=torch.float64, device=inputs["hidden"].device
        )
        kept = ones if "row_mask" not in inputs else ones.where(inputs["row_mask"], 0.0)
        return kept / kept.sum()
    lengths = inputs["cu_seqlens"].diff().double()
    return (1 / (lengths * len(lengths))).repeat_interleave(lengths.long())


def _clipped_loss(logprobs: Tensor, inputs: Inputs, weights: Tensor, rows: slice) -> Tensor:
    """GRPO's clipped objective with the k3 estimate of the KL divergence."""
    old, advantages = (inputs[n][rows].double() for n in ("old_logprobs", "advantages"))
    ratio = (logprobs - old).exp()
    low, high = 1 - inputs["epsilon"], 1 + inputs["epsilon"]
    gain = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    loss = -gain
    if "ref_logprobs" in inputs:
        gap = inputs["ref_logprobs"][rows].double() - logprobs
        loss = loss + inputs["beta"] * (gap.exp() - gap - 1)
    return (loss * weights[rows]).sum()


@torch.enable_grad()
def _loss_truth(inputs: Inputs) -> Outputs:
    logprobs = _exact(inputs, "logprobs")
    loss = _clipped_loss(logprobs, inputs, _loss_weights(inputs), slice(None))
    (grad,) = torch.autograd.grad(loss, logprobs)
    return {"loss": loss.detach(), "d_logprobs": grad}


def _pack_truth(inputs: Inputs) -> Outputs:
    """From the definition, sequence by sequence."""
    offsets, order = inputs["offsets"], inputs["order"]
    pieces = [slice(offsets[i], offsets[i + 1]) for i in order]
    lengths = torch.tensor([piece.stop - piece.start for piece in pieces])
    device = inputs["token_ids"].device
    found = {
        "token_ids": torch.cat([inputs["token_ids"][piece] for piece in pieces]),
        "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()]).to(device),
        "segment_ids": torch.arange(len(order)).repeat_interleave(lengths).to(device),
        "cu_seqlens": torch.cat([torch.zeros(1).long(), lengths.cumsum(0)]).to(device),
    }
    fields = inputs["fields"].items()
    return found | {name: torch.cat([values[piece] for piece in pieces]) for name, values in fields}


def _unpack_truth(inputs: Inputs) -> Outputs:
    """From the definition, token by token of each row."""
    lengths, packed = torch.tensor(inputs["lengths"]), inputs["packed"]
    place = torch.arange(int(lengths.max()))
    inside = place < lengths[:, None]
    padded = torch.zeros(inside.shape, dtype=packed.dtype, device=packed.device)
    padded[inside.to(packed.device)] = packed
    return {"padded": padded}


@torch.enable_grad()
def _attention_truth(inputs: Inputs) -> Outputs:
    """softmax(q k / sqrt(E)) v of each sequence and head, over the keys up to the query's own."""
    q, k, v = (inputs[name].detach().double().requires_grad_() for name in "qkv")
    shared = q.shape[1] // k.shape[1]  # heads of queries with the same keys
    pieces = []
    for q_i, k_i, v_i in zip(*(field.split(inputs["lengths"]) for field in (q, k, v)), strict=True):
        keys, values = (x.repeat_interleave(shared, 1) for x in (k_i, v_i))
        scores = torch.einsum("ihe,jhe->hij", q_i, keys) / math.sqrt(q.shape[2])
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -math.inf).softmax(-1)
        pieces.append(torch.einsum("hij,jhe->ihe", weights, values))
    out = torch.cat(pieces)
    grads = torch.autograd.grad(out, (q, k, v), inputs["grad_out"].double())
    return {"out": out.detach(), **dict(zip(("d_q", "d_k", "d_v"), grads, strict=True))}


def _plan_truth(inputs: Inputs) -> Outputs:
    """Every sequence once, no token above the limit."""
    everyone = torch.arange(len(inputs["lengths"]))
    return {"planned": everyone, "over": torch.zeros((), dtype=torch.float64)}


def _advantages_truth(inputs: Inputs) -> Outputs:
    groups = inputs["rewards"].double().view(-1, inputs["group_size"])
    centred = groups - groups.mean(1, keepdim=True)
    spread = groups.std(1, keepdim=True)  # of the sample, as TRL and verl take it
    return {"advantages": (centred / (spread + 1e-4)).flatten()}


# ---- Errors and verdicts -------------------------------------------------------------------------


def errors(outputs: Outputs, true: Outputs) -> dict[str, float]:
    """Error of every output: largest absolute for ABSOLUTE, else relative in the Frobenius norm;
    integers: the share that differs. Infinite where something is not finite or of another shape.
    """
    return {name: _error(name, value, true[name]) for name, value in outputs.items()}


def _error(name: str, found: Tensor, true: Tensor) -> float:
    if found.shape != true.shape:
        return math.inf
    if not true.is_floating_point():
        return (found != true).double().mean().item() if true.numel() else 0.0
    difference = found.double() - true.double()
    if not difference.isfinite().all():
        return math.inf
    if name in ABSOLUTE:
        return difference.abs().max().item() if true.numel() else 0.0
    norm, true_norm = difference.norm().item(), true.double().norm().item()
    return norm / true_norm if true_norm else norm


def expected(case: Case, backward: bool) -> set[str]:
    """The outputs that a provider of the job owes, ``logprobs_sum`` aside."""
    features, job = case.features, case.job
    if job in ("linear_grpo_loss", "grpo_loss"):
        names = {"loss"}
    elif job in ("token_logprobs", "linear_logprobs"):
        names = {"logprobs"} | ({"lse"} & features)
        names |= {"entropy"} if features & {"entropy", "entropy_grad"} else set()
    elif job == "varlen_attention":
        return {"out"} | ({"d_q", "d_k", "d_v"} if backward else set())
    elif job == "unpack":
        return {"padded"}
    else:
        return set()
    if not backward:
        return names
    if job in ("token_logprobs", "grpo_loss"):
        return names | {"d_logits" if job == "token_logprobs" else "d_logprobs"}
    names |= {"d_hidden"} | (set() if "frozen_head" in features else {"d_weight"})
    return names | ({"d_bias"} if "bias" in features else set())


def wrong(
    provider: Provider,
    found: dict[str, float],
    plain: dict[str, float],
    case: Case,
    backward: bool,
) -> str | None:
    """Why the result is not that of the job, in one line, or None.

    ``found`` are the provider's errors, ``plain`` those of plain torch on the same inputs (empty
    where it has none). With ``backward`` the gradients are owed as well.
    """
    owed = expected(case, backward) - set(found)
    if "logprobs_sum" in found:
        owed -= {"logprobs"}
    if owed:
        return f"gives no {', '.join(sorted(owed))}"
    for name, error in found.items():
        floor = GATE_ABSOLUTE if name in ABSOLUTE else GATE_RELATIVE
        limit = GATE_FACTOR * plain.get(name, 0.0) + floor[case.dtype]
        if provider.approximate and name.startswith("d_"):
            limit = max(limit, GATE_APPROXIMATE)
        if case.job in ("pack", "unpack", "plan_batches"):
            limit = 0.0
        if not error <= limit:
            return f"{name}: error {error:.2e}, allowed {limit:.2e}"
    return None


def misses(found: dict[str, float], plain: dict[str, float], case: Case) -> list[str]:
    """This package's bounds that the errors exceed, a line each."""
    lines = []
    for name, error in found.items():
        bound, words = BOUNDS.get(name), ""
        if name.startswith("d_"):
            bound = GRADIENT_BOUND
            if case.dtype != torch.float32 and name in plain:
                bound, words = GRADIENT_FACTOR * plain[name], f" (torch {plain[name]:.2e})"
        if bound is not None and not error <= bound:
            lines.append(f"{name} {error:.2e} > {bound:.2e}{words}")
    return lines
