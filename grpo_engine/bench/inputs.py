"""The inputs of a case, drawn or taken from a real model.

Random rows imitate a language model's: logits of unit spread over the whole vocabulary, and above
them eight candidates, each so many nats below the one before, the first one ``depth`` nats above
the background's log-sum-exp; depth differs from row to row. Independent normal logits would need a
spread far beyond any model's before their entropy came down from log V. The mean entropy over
Qwen2.5's vocabulary is 2.2 nats for diffuse rows and 0.5 nats for peaked ones (a test keeps it).

    all_negative  diffuse, every logit lowered by 40
    large         diffuse, scaled so that the largest |logit| is 60
    certain       in every other row the token has a probability of 1 to within rounding
"""

from __future__ import annotations

import math
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from grpo_engine.bench.cases import Case, Inputs

CANDIDATES = 8
ROWS = {  # of each kind of values: mean depth and its spread over rows, step to the next candidate
    "diffuse": (3.6, 2.5, 0.5),
    "peaked": (8.0, 2.5, 2.5),
    "all_negative": (3.6, 2.5, 0.5),
    "large": (3.6, 2.5, 0.5),
    "certain": (3.6, 2.5, 0.5),
}
BELOW_ZERO, LARGEST, CERTAIN_DEPTH = 40.0, 60.0, 30.0
PEAKED_TEMPERATURE = 0.6  # of real samples; their hidden states are divided by it
DROP_SHARE = 0.3  # of the rows, by row_mask
FIELDS = ("old", "ref", "sampler")  # packed beside the ids
EPSILON, BETA = 0.2, 0.04
ROWS_AT_ONCE = 512  # of fp32 logits, while old log-probabilities are made


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """See the functions below for the keys; tensors a provider differentiates require grad."""
    makers = {
        "token_logprobs": _token_logprobs,
        "linear_logprobs": _linear_logprobs,
        "linear_grpo_loss": _linear_grpo_loss,
        "grpo_loss": _grpo_loss,
        "pack": _pack,
        "unpack": _unpack,
        "varlen_attention": _varlen_attention,
        "plan_batches": _plan_batches,
        "group_advantages": _group_advantages,
    }
    return makers[case.job](case, Draw(device, seed))


class Draw:
    """Random tensors on one device from one seed."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def integers(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self.generator, device=self.device)

    def pick(self, probs: Tensor) -> Tensor:
        """[N] columns of probs [N, K], drawn in proportion."""
        return torch.multinomial(probs, 1, generator=self.generator).squeeze(1)

    def host(self) -> np.random.Generator:
        return np.random.default_rng(self.generator.initial_seed())


# ---- Heads and logits ----------------------------------------------------------------------------


def _candidates(case: Case, draw: Draw, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Candidate ids [N, K], their logits above the background [N, K], and the token of each row:
    a candidate, or any id, as likely as a sampler would draw it."""
    num_tokens, vocab = case.sizes["N"], case.sizes["V"]
    background = math.log(vocab) + spread**2 / 2  # log-sum-exp of normal logits
    mean, deviation, step = ROWS[case.values]
    depth = mean + deviation * draw.normal(num_tokens)
    ranks = torch.arange(CANDIDATES, device=draw.device)
    ids = draw.integers(vocab, num_tokens, CANDIDATES)
    if case.values == "certain":
        depth[::2] = CERTAIN_DEPTH
    boosts = (background + depth[:, None] - step * ranks).clamp_min(0)
    if case.values == "certain":
        boosts[::2, 1:] = 0
    likely = torch.cat([boosts, torch.full_like(depth, background)[:, None]], 1).softmax(1)
    anywhere = draw.integers(vocab, num_tokens, 1)
    tokens = torch.cat([ids, anywhere], 1).gather(1, draw.pick(likely)[:, None]).squeeze(1)
    return ids, boosts, tokens


def _random_head(case: Case, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [V, D] of rows of length about 1, token_ids [N]; fp32."""
    num_tokens, width, vocab = (case.sizes[axis] for axis in "NDV")
    weight = draw.normal(vocab, width) / math.sqrt(width)
    hidden = draw.normal(num_tokens, width)
    ids, boosts, tokens = _candidates(case, draw, 1.0)
    for column in range(CANDIDATES):  # a row of the head, scaled, raises its own logit
        rows = weight[ids[:, column]]
        hidden += (boosts[:, column] / rows.square().sum(1))[:, None] * rows
    if case.values == "all_negative":
        hidden[:, -1], weight[:, -1] = 8.0, -BELOW_ZERO / 8.0
    elif case.values == "large":
        hidden *= LARGEST / _largest_logit(hidden, weight)
    return hidden, weight, tokens


def _largest_logit(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([(rows @ weight.T).abs().max() for rows in hidden.split(ROWS_AT_ONCE)]).max()


def _head(case: Case, draw: Draw) -> Inputs:
    if case.source == "hidden_states":
        from grpo_engine.bench.hidden_states import real_head

        temperature = PEAKED_TEMPERATURE if case.values == "peaked" else 1.0
        found = real_head(case.sizes, temperature)
        hidden, weight, token_ids = (tensor.to(draw.device) for tensor in found)
        hidden = hidden / temperature  # so that everyone can run it, temperature or not
    else:
        hidden, weight, token_ids = _random_head(case, draw)
    inputs: Inputs = {
        "hidden": hidden.to(case.dtype).requires_grad_(),
        "weight": weight.to(case.dtype).requires_grad_("frozen_head" not in case.features),
        "token_ids": token_ids,
    }
    if "bias" in case.features:
        inputs["bias"] = draw.normal(case.sizes["V"]).to(case.dtype).requires_grad_()
    return inputs | _row_options(case, draw)


def _row_options(case: Case, draw: Draw) -> Inputs:
    num_tokens, options = case.sizes["N"], {}
    if "temperature" in case.features:
        options["temperature"] = 0.7
    elif "temperature_vector" in case.features:
        options["temperature"] = 0.5 + 0.1 * draw.integers(11, num_tokens).float()
    if "row_mask" in case.features:
        options["row_mask"] = (
            torch.rand(num_tokens, generator=draw.generator, device=draw.device) >= DROP_SHARE
        )
    return options


def _upstream(case: Case, draw: Draw) -> Inputs:
    """Incoming gradients, and the outputs asked for."""
    num_tokens = case.sizes["N"]
    grad = draw.normal(num_tokens)
    if "weighted" not in case.features:
        grad = torch.ones_like(grad)
    if "half_dead" in case.features:
        grad[draw.normal(num_tokens) > 0] = 0.0
    wants = ["logprobs"]
    inputs: Inputs = {"grad_logprobs": grad}
    if case.features & {"entropy", "entropy_grad"}:
        wants.append("entropy")
    if "entropy_grad" in case.features:
        inputs["grad_entropy"] = draw.normal(num_tokens)
    if "lse" in case.features:
        wants.append("lse")
    return inputs | {"wants": tuple(wants)}


def _token_logprobs(case: Case, draw: Draw) -> Inputs:
    """logits [N, V], token_ids [N], temperature?, grad_logprobs [N], grad_entropy? [N]."""
    logits = draw.normal(case.sizes["N"], case.sizes["V"])
    ids, boosts, token_ids = _candidates(case, draw, 1.0)
    logits.scatter_add_(1, ids, boosts)
    if case.values == "all_negative":
        logits -= BELOW_ZERO
    elif case.values == "large":
        logits *= LARGEST / logits.abs().max()
    inputs = {"logits": logits.to(case.dtype).requires_grad_(), "token_ids": token_ids}
    return inputs | _row_options(case, draw) | _upstream(case, draw)


def _linear_logprobs(case: Case, draw: Draw) -> Inputs:
    """hidden [N, D], weight [V, D], token_ids [N], bias? [V], temperature?, row_mask? [N],
    grad_logprobs [N], grad_entropy? [N]."""
    return _head(case, draw) | _upstream(case, draw)


def _linear_grpo_loss(case: Case, draw: Draw) -> Inputs:
    """The head, old_logprobs and advantages [N], cu_seqlens [S + 1], ref_logprobs? [N], beta,
    epsilon; the loss is dapo (a mean over tokens), sequences of equal length."""
    num_tokens, num_sequences = case.sizes["N"], case.sizes.get("S", 1)
    if num_tokens % num_sequences:
        raise ValueError(f"S must divide N: {num_sequences} does not divide {num_tokens}")
    inputs = _head(case, draw)
    logprobs = _current_logprobs(inputs)
    return inputs | _loss_fields(case, draw, logprobs, num_tokens // num_sequences)


def _loss_fields(case: Case, draw: Draw, logprobs: Tensor, length: int) -> Inputs:
    num_tokens = logprobs.shape[0]
    per_sequence = draw.normal(num_tokens // length)
    if "half_dead" in case.features:
        per_sequence[: len(per_sequence) // 2] = 0.0
    inputs = {
        "old_logprobs": logprobs - _log_ratios(num_tokens, draw),
        "advantages": per_sequence.repeat_interleave(length),
        "cu_seqlens": torch.arange(0, num_tokens + 1, length, device=draw.device).int(),
        "epsilon": EPSILON,
        "beta": BETA if "kl" in case.features else 0.0,
        "wants": ("loss",),
    }
    if "kl" in case.features:
        inputs["ref_logprobs"] = logprobs + 0.1 * draw.normal(num_tokens)
    return inputs


def _log_ratios(num_tokens: int, draw: Draw) -> Tensor:
    """[N]: three in four within the clip range, the others beyond it, none near its edges: there
    half-precision logits would decide by chance which tokens have a gradient."""
    beyond = draw.integers(4, num_tokens) == 0
    sign = 2.0 * draw.integers(2, num_tokens) - 1
    return torch.where(beyond, 0.8 * sign, 0.02 * draw.normal(num_tokens))


@torch.no_grad()
def _current_logprobs(inputs: Inputs) -> Tensor:
    """[N] fp32 of the present weights, by plain torch, some rows at a time."""
    num_tokens = inputs["hidden"].shape[0]
    logprobs = torch.empty(num_tokens, device=inputs["hidden"].device)
    weight = inputs["weight"].float()
    bias = inputs["bias"].float() if "bias" in inputs else 0.0
    temperature = inputs.get("temperature", 1.0)
    for start in range(0, num_tokens, ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        divide = temperature[rows, None] if isinstance(temperature, Tensor) else temperature
        logits = (inputs["hidden"][rows].float() @ weight.T + bias) / divide
        ids = inputs["token_ids"][rows, None]
        logprobs[rows] = logits.log_softmax(1).gather(1, ids).squeeze(1)
    return logprobs


# ---- Jobs without a vocabulary -------------------------------------------------------------------


def _grpo_loss(case: Case, draw: Draw) -> Inputs:
    """logprobs, old_logprobs, advantages [N], cu_seqlens [S + 1], ref_logprobs? [N], beta,
    epsilon; the loss is grpo (a mean over sequences of means over tokens)."""
    num_tokens, num_sequences = case.sizes["N"], case.sizes["S"]
    logprobs = -draw.normal(num_tokens).abs()
    fields = _loss_fields(case, draw, logprobs, num_tokens // num_sequences)
    return fields | {"logprobs": logprobs.requires_grad_()}


def _lengths(case: Case, generator: np.random.Generator) -> np.ndarray:
    """[S] from an eighth of the longest up."""
    longest = case.sizes["longest"]
    return generator.integers(longest // 8, longest + 1, case.sizes["S"])


def _pack(case: Case, draw: Draw) -> Inputs:
    """token_ids [T] of S ragged sequences end to end, three fp32 fields [T], and on the host
    offsets (S + 1 integers) and the order in which to pack them."""
    generator = draw.host()
    lengths = _lengths(case, generator)
    total = int(lengths.sum())
    return {
        "token_ids": draw.integers(50_000, total),
        "fields": {name: draw.normal(total) for name in FIELDS},
        "offsets": [0, *accumulate(lengths.tolist())],
        "order": generator.permutation(case.sizes["S"]).tolist(),
        "wants": ("token_ids", "position_ids", "segment_ids", "cu_seqlens", *FIELDS),
    }


def _unpack(case: Case, draw: Draw) -> Inputs:
    """packed [T] fp32, cu_seqlens [S + 1] int32, and on the host the lengths (S integers)."""
    lengths = _lengths(case, draw.host())
    return {
        "packed": draw.normal(int(lengths.sum())),
        "cu_seqlens": _cu_seqlens(lengths, draw.device),
        "lengths": lengths.tolist(),
        "wants": ("padded",),
    }


def _varlen_attention(case: Case, draw: Draw) -> Inputs:
    """q [T, H, E], k and v [T, K, E], the gradient of the output grad_out [T, H, E], cu_seqlens
    [S + 1] int32, and on the host the lengths (S integers)."""
    sizes, lengths = case.sizes, _lengths(case, draw.host())
    total = int(lengths.sum())
    shapes = {"q": sizes["H"], "k": sizes["K"], "v": sizes["K"]}
    fields = {n: draw.normal(total, heads, sizes["E"]) for n, heads in shapes.items()}
    return {
        **{name: field.to(case.dtype).requires_grad_() for name, field in fields.items()},
        "grad_out": draw.normal(total, sizes["H"], sizes["E"]).to(case.dtype),
        "cu_seqlens": _cu_seqlens(lengths, draw.device),
        "lengths": lengths.tolist(),
        "wants": ("out",),
    }


def _cu_seqlens(lengths: np.ndarray, device: torch.device) -> Tensor:
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    return torch.as_tensor(bounds, dtype=torch.int32, device=device)


def _plan_batches(case: Case, draw: Draw) -> Inputs:
    """lengths (S integers on the host), max_tokens, ranks."""
    lengths = draw.host().integers(1, case.sizes["longest"] + 1, case.sizes["S"])
    return {
        "lengths": lengths.tolist(),
        "max_tokens": case.sizes["max_tokens"],
        "ranks": case.sizes.get("ranks", 2),
        "wants": ("planned", "over"),
    }


def _group_advantages(case: Case, draw: Draw) -> Inputs:
    """rewards [N] of 0 and 1, group_size."""
    rewards = draw.integers(2, case.sizes["N"]).float()
    return {"rewards": rewards, "group_size": case.sizes["G"], "wants": ("advantages",)}
