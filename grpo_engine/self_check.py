"""Every kernel against its reference, on this machine, in a few seconds.

Forward and backward on small random inputs with awkward sizes. The truth is the ``_ref`` twin in
fp64 on the CPU, fed the very values that the kernel got, so that what is measured is the kernel's
error and not that of rounding its inputs. A kernel that raises has failed; its error is told in one
line.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

LENGTHS = (7, 1, 19, 12)  # tokens of the sequences, odd on purpose
TOKENS = sum(LENGTHS)
WIDTH, VOCAB = 24, 301
# Largest difference allowed, as a share of the largest value of the reference. The bf16 bounds
# allow for gradients and outputs stored in bf16 (eps 2^-8) after sums in fp32.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
LOSS_CASES: tuple[dict[str, Any], ...] = (
    {"beta": 0.04},
    {"loss_type": "dapo", "epsilon_high": 0.28, "is_correction": "token_truncate"},
    {"loss_type": "dr_grpo", "max_completion_length": 32, "kl_estimator": "k2", "beta": 0.1},
    {"loss_type": "cispo", "epsilon_high": 5.0},
    {"loss_type": "gspo", "epsilon": 3e-4, "epsilon_high": 4e-4},
    {"loss_type": "vespo"},
    {"delta": 1.5},
)

Outputs = list[Tensor]


@dataclass(frozen=True)
class Check:
    """The outcome for one kernel on one device and dtype."""

    kernel: str
    device: str
    dtype: str
    path: str  # what ran: triton, portable, extension ...
    passed: bool
    error: float | None  # relative to the reference's largest value; None if the kernel raised
    tolerance: float
    reason: str = ""  # of a failure, one line


class Inputs:
    """Seeded random inputs, made on the CPU so that every device gets the same values."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator().manual_seed(0)

    def floats(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*shape, generator=self._generator) * scale
        return values.to(self.device, dtype or self.dtype)

    def logprobs(self) -> Tensor:
        """[TOKENS] fp32, all negative."""
        return -self.floats(TOKENS, dtype=torch.float32).abs() - 0.1

    def ids(self) -> Tensor:
        return torch.randint(VOCAB, (TOKENS,), generator=self._generator).to(self.device)

    def cu_seqlens(self) -> Tensor:
        ends = torch.tensor((0, *LENGTHS)).cumsum(0)
        return ends.to(self.device, torch.int32)


def truth(value: Any) -> Any:
    """A copy for the reference: on the CPU, floating point in fp64, gradients of its own."""
    if not isinstance(value, Tensor):
        return value
    copy = value.detach().cpu()
    copy = copy.double() if copy.is_floating_point() else copy
    return copy.requires_grad_(value.requires_grad)


def differentiate(outputs: Outputs, inputs: list[Tensor]) -> Outputs:
    """The outputs and the gradients of a fixed weighted sum of them with respect to ``inputs``."""
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for output in outputs:
        weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        total = total + (output.double() * weights.to(output.device)).sum()
    return [*outputs, *torch.autograd.grad(total, inputs)]


def relative_error(ours: Outputs, reference: Outputs) -> float:
    """Largest difference as a share of the reference's largest value, over all tensors; inf where
    one side is not finite or the shapes differ.
    """
    worst = 0.0
    for got, expected in zip(ours, reference, strict=True):
        if got.shape != expected.shape:
            return float("inf")
        got, expected = got.detach().cpu().double(), expected.detach().double()
        if not (got.isfinite().all() and expected.isfinite().all()):
            return float("inf")
        scale = expected.abs().max().item() if expected.numel() else 0.0
        gap = (got - expected).abs().max().item() if expected.numel() else 0.0
        worst = max(worst, gap / max(scale, 1e-12) if gap else 0.0)
    return worst


def _against_reference(
    kernels: ModuleType,
    name: str,
    call: Callable[[Callable, list[Any]], Outputs],
    arguments: list[Any],
) -> float:
    ours = call(getattr(kernels, name), arguments)
    reference = call(getattr(kernels, f"{name}_ref"), [truth(a) for a in arguments])
    return relative_error(ours, reference)


# -- one function per kernel: returns the error
# --------------------------------------------------------


def check_token_logprobs(kernels: ModuleType, make: Inputs) -> float:
    temperature = make.floats(TOKENS, dtype=torch.float32).abs() + 0.5

    def call(op: Callable, arguments: list[Any]) -> Outputs:
        logits, ids, heat = arguments
        outputs = op(logits, ids, temperature=heat, return_entropy=True, return_lse=True)
        return differentiate(list(outputs), [logits])

    logits = make.floats(TOKENS, VOCAB, scale=3.0).requires_grad_()
    return _against_reference(kernels, "token_logprobs", call, [logits, make.ids(), temperature])


def _head(make: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    hidden = make.floats(TOKENS, WIDTH).requires_grad_()
    weight = make.floats(VOCAB, WIDTH, scale=0.3).requires_grad_()
    return hidden, weight, make.floats(VOCAB, scale=0.3).requires_grad_()


def check_linear_logprobs(kernels: ModuleType, make: Inputs) -> float:
    def call(op: Callable, arguments: list[Any]) -> Outputs:
        hidden, weight, bias, ids, mask = arguments
        outputs = op(
            hidden,
            weight,
            ids,
            bias=bias,
            temperature=0.7,
            logit_softcap=30.0,
            logit_scale=1.1,
            return_entropy=True,
            row_mask=mask,
        )
        return differentiate(list(outputs), [hidden, weight, bias])

    mask = torch.arange(TOKENS, device=make.device) % 5 != 3
    arguments = [*_head(make), make.ids(), mask]
    return _against_reference(kernels, "linear_logprobs", call, arguments)


def _loss_outputs(loss: Tensor, metrics: Any, inputs: list[Tensor]) -> Outputs:
    figures = torch.tensor(list(metrics.to_dict().values()), dtype=torch.float64)
    return [*differentiate([loss], inputs), figures]


def check_grpo_loss(kernels: ModuleType, make: Inputs) -> float:
    logprobs, cu_seqlens = make.logprobs().requires_grad_(), make.cu_seqlens()
    old, reference, sampler = (
        logprobs.detach() + make.floats(TOKENS, scale=scale, dtype=torch.float32)
        for scale in (0.5, 0.3, 0.1)
    )
    advantages = make.floats(TOKENS, dtype=torch.float32)
    arguments = [logprobs, old, advantages, cu_seqlens, reference, sampler]

    def caller(options: dict[str, Any]) -> Callable[[Callable, list[Any]], Outputs]:
        def call(op: Callable, arguments: list[Any]) -> Outputs:
            current, old, weights, ends, reference, sampler = arguments
            loss, metrics = op(
                current,
                old,
                weights,
                cu_seqlens=ends,
                ref_logprobs=reference,
                sampler_logprobs=sampler,
                **options,
            )
            return _loss_outputs(loss, metrics, [current])

        return call

    return max(
        _against_reference(kernels, "grpo_loss", caller(options), arguments)
        for options in LOSS_CASES
    )


def check_linear_grpo_loss(kernels: ModuleType, make: Inputs) -> float:
    def caller(options: dict[str, Any]) -> Callable[[Callable, list[Any]], Outputs]:
        def call(op: Callable, arguments: list[Any]) -> Outputs:
            hidden, weight, bias, ids, old, advantages, ends = arguments
            loss, metrics, logprobs = op(
                hidden, weight, ids, old, advantages, bias=bias, cu_seqlens=ends, **options
            )
            return [*_loss_outputs(loss, metrics, [hidden, weight, bias]), logprobs]

        return call

    head, ids = _head(make), make.ids()
    with torch.no_grad():
        current = kernels.linear_logprobs_ref(head[0], head[1], ids, bias=head[2])
    # Old log-probs at ratios away from 1 and from the clip edges: at an edge the gradient jumps,
    # and rounding alone may fall on either side of it.
    shift = torch.tensor([0.05, -0.1, 0.6, -0.7], device=make.device).repeat(TOKENS)[:TOKENS]
    old = current.float() + shift
    arguments = [*head, ids, old, make.floats(TOKENS, dtype=torch.float32), make.cu_seqlens()]
    cases: tuple[dict[str, Any], ...] = ({}, {"importance_level": "sequence"})
    return max(
        _against_reference(kernels, "linear_grpo_loss", caller(options), arguments)
        for options in cases
    )


def check_group_advantages(kernels: ModuleType, make: Inputs) -> float:
    rewards = make.floats(24, dtype=torch.float32)
    rewards[:4] = 1.0  # a group without a signal
    rewards[5] = float("nan")  # an answer no reward could score
    ids = (torch.arange(24) // 4).flip(0).to(make.device)
    errors = []
    for scale in ("group", "batch", "none"):
        for groups in (4, ids):

            def call(op: Callable, arguments: list[Any], scale: str = scale) -> Outputs:
                return [op(*arguments, scale=scale)]

            errors.append(_against_reference(kernels, "group_advantages", call, [rewards, groups]))
    return max(errors)


def check_pack_rollouts(kernels: ModuleType, make: Inputs) -> float:
    """Bit-exact: packs ids and fields, and unpacks them again."""
    ids, fields = make.ids(), make.floats(TOKENS, dtype=torch.float32)
    sequences = [part.clone() for part in ids.split(LENGTHS)]
    values = [part.clone() for part in fields.split(LENGTHS)]
    order = [2, 0, 3]
    batch = kernels.pack_rollouts(
        sequences,
        {"old_logprobs": values},
        per_sequence={"advantages": [1.0, 2.0, 3.0, 4.0]},
        order=order,
    )
    where = [n for i in order for n in range(LENGTHS[i])]
    sizes = [LENGTHS[i] for i in order]
    packed_advantages = torch.tensor([i + 1.0 for i in order for _ in range(LENGTHS[i])])
    exact = [
        (batch.token_ids, torch.cat([sequences[i] for i in order])),
        (batch.position_ids, torch.tensor(where)),
        (batch.cu_seqlens, torch.tensor([0, *sizes]).cumsum(0)),
        (batch.fields["old_logprobs"], torch.cat([values[i] for i in order])),
        (batch.fields["advantages"], packed_advantages),
    ]
    padded = kernels.unpack(batch.fields["old_logprobs"], batch.cu_seqlens, padded=True)
    for row, i in enumerate(order):
        exact.append((padded[row, : LENGTHS[i]], values[i]))
        exact.append((padded[row, LENGTHS[i] :], torch.zeros(max(sizes) - LENGTHS[i])))
    return max(relative_error([got], [expected.cpu()]) for got, expected in exact)


def check_varlen_attention(kernels: ModuleType, make: Inputs) -> float:
    queries, keys, values = (make.floats(TOKENS, heads, 16).requires_grad_() for heads in (4, 2, 2))

    def call(op: Callable, arguments: list[Any]) -> Outputs:
        q, k, v, ends = arguments
        out = op(q, k, v, cu_seqlens=ends, max_seqlen=max(LENGTHS))
        return differentiate([out], [q, k, v])

    arguments = [queries, keys, values, make.cu_seqlens()]
    return _against_reference(kernels, "varlen_attention", call, arguments)


def check_plan_batches(kernels: ModuleType, make: Inputs) -> float:
    """Counts broken promises: a sequence lost or placed twice, a chunk over budget, unequal
    counts.
    """
    lengths = [1 + (i * 7919) % 190 for i in range(500)]
    broken = 0
    for method in ("best_fit", "lpt", "kk"):
        plan = kernels.plan_batches(lengths, 512, num_ranks=3, method=method)
        placed = sorted(index for rank in plan for chunk in rank for index in chunk)
        broken += placed != list(range(len(lengths)))
        broken += sum(sum(lengths[i] for i in chunk) > 512 for rank in plan for chunk in rank)
        broken += len({len(rank) for rank in plan}) != 1
    return float(broken)


FLOATING: dict[str, Callable[[ModuleType, Inputs], float]] = {
    "token_logprobs": check_token_logprobs,
    "linear_logprobs": check_linear_logprobs,
    "linear_grpo_loss": check_linear_grpo_loss,
    "varlen_attention": check_varlen_attention,
}
FP32: dict[str, Callable[[ModuleType, Inputs], float]] = {
    "grpo_loss": check_grpo_loss,
    "group_advantages": check_group_advantages,
}
EXACT: dict[str, Callable[[ModuleType, Inputs], float]] = {"pack_rollouts": check_pack_rollouts}
ON_HOST: dict[str, Callable[[ModuleType, Inputs], float]] = {"plan_batches": check_plan_batches}


def cases() -> Iterator[tuple[str, Callable[[ModuleType, Inputs], float], str, torch.dtype, float]]:
    """(kernel, check, device, dtype, tolerance) of everything there is to check on this machine."""
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for device in devices:
        dtypes = [torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16]
        for dtype in dtypes:
            for name, check in FLOATING.items():
                yield name, check, device, dtype, TOLERANCE[dtype]
        for name, check in FP32.items():
            yield name, check, device, torch.float32, TOLERANCE[torch.float32]
        for name, check in EXACT.items():
            yield name, check, device, torch.float32, 0.0
    for name, check in ON_HOST.items():
        yield name, check, "cpu", torch.float32, 0.0


def path_taken(kernel: str, device: str) -> str:
    """Which implementation an op on ``device`` runs."""
    from grpo_engine.kernels.common import interpreting

    if kernel in EXACT or kernel in ON_HOST:
        return "extension" if device == "cpu" else "extension (CUDA)"
    if kernel == "varlen_attention":
        return "portable" if device == "cpu" else "FlashAttention or portable"
    if device != "cpu":
        return "triton"
    return "triton (interpreter)" if interpreting() else "portable"


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def check_kernels() -> list[Check]:
    """Run everything; never raises for a kernel's fault."""
    checks = []
    try:
        kernels = importlib.import_module("grpo_engine.kernels")
    except Exception as error:
        kernels, broken = None, one_line(error)
    for name, check, device, dtype, tolerance in cases():
        shown = str(dtype).removeprefix("torch.")
        if kernels is None:
            checks.append(Check(name, device, shown, "-", False, None, tolerance, broken))
            continue
        try:
            error = check(kernels, Inputs(torch.device(device), dtype))
        except Exception as raised:
            reason, path = one_line(raised), "-"
            checks.append(Check(name, device, shown, path, False, None, tolerance, reason))
            continue
        passed = error <= tolerance
        reason = "" if passed else f"error {error:.2g} is above {tolerance:.2g}"
        path = path_taken(name, device)
        checks.append(Check(name, device, shown, path, passed, error, tolerance, reason))
    return checks
