"""The floor of a case: the least work any implementation must do, timed beside the providers.

A head job must multiply: N x D by D x V to the logits, and back twice, into the hidden states and
into the weight. Its floor is those bare matrix products (one forward; three with gradients; two
where the weight is frozen), through the same BLAS, in the same dtype, on the same values. Rows
whose incoming gradient is zero need only the first. Every other job must move memory: its floor is
a plain copy that reads and writes as many bytes. Planning runs on the host and has none.

"% of the floor" is floor time over provider time. 100 % can be passed: a head that skips work (a
sparse backward) does less than the bare products, and the copy is one library's, not the memory's
limit. Attention's copy moves its inputs and outputs, which long sequences leave far behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_engine.bench.cases import Case, Inputs, tensors

HEAD_JOBS = ("linear_logprobs", "linear_grpo_loss")
NO_GRADIENT_JOBS = ("pack", "unpack", "plan_batches", "group_advantages")
COPY_BYTES = 2**30  # of the bandwidth measurement on CUDA; a CPU takes COPY_BYTES_CPU
COPY_BYTES_CPU = 2**28


@dataclass(frozen=True)
class Work:
    """The least a case takes: floating-point operations, and bytes to and from memory."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class Floor:
    """``run`` is timed like a provider; ``label`` says in words what it is."""

    label: str
    run: Callable[[], object]


def rows_of(case: Case, inputs: Inputs) -> tuple[int, int]:
    """(rows that must go forward, rows that must go back): those that the mask leaves in, and of
    them those whose incoming gradient is not known to be zero."""
    rows = case.sizes["N"]
    mask = inputs.get("row_mask")
    live = torch.ones(rows, dtype=torch.bool) if mask is None else mask.bool().cpu()
    forward = int(live.sum())
    if "half_dead" in case.features:
        known = "grad_logprobs" if "grad_logprobs" in inputs else "advantages"
        live = live & (inputs[known] != 0).cpu()
    return forward, int(live.sum())


def gemm_count(case: Case, backward: bool) -> int:
    if not backward:
        return 1
    return 2 if "frozen_head" in case.features else 3


def least_work(case: Case, inputs: Inputs, outputs: dict[str, Tensor], backward: bool) -> Work:
    """Reads each input once a pass and writes each output once; ``outputs`` has the shapes of what
    a provider gave."""
    if case.job in HEAD_JOBS:
        forward, back = rows_of(case, inputs)
        one = 2.0 * case.sizes["D"] * case.sizes["V"]
        flops = one * (forward + back * (gemm_count(case, backward) - 1))
        moved = byte_size(inputs["hidden"], inputs["weight"])
        if backward:
            moved += byte_size(inputs["hidden"])
            moved += 0 if "frozen_head" in case.features else byte_size(inputs["weight"])
        return Work(flops, moved)
    if case.job == "token_logprobs":
        rows, vocab = case.sizes["N"], case.sizes["V"]
        logits = byte_size(inputs["logits"])
        # Forward: subtract, exponential, add. Backward: subtract, exponential, multiply.
        flops, moved = 3.0 * rows * vocab, float(logits)
        if backward:
            live = rows_of(case, inputs)[1] / rows
            flops, moved = flops * (1 + live), logits * (1 + live + 1)
        return Work(flops, moved)
    return Work(0.0, float(byte_size(*arrays(inputs), *outputs.values())))


def arrays(inputs: Inputs) -> list[Tensor]:
    """Every tensor among the inputs, packing's fields included."""
    return [*tensors(inputs).values(), *inputs.get("fields", {}).values()]


def byte_size(*arrays: Tensor) -> int:
    return sum(array.numel() * array.element_size() for array in arrays)


def floor_of(case: Case, inputs: Inputs, work: Work, backward: bool) -> Floor | None:
    """None for planning, which has no floor."""
    if case.job == "plan_batches":
        return None
    if case.job in HEAD_JOBS:
        return gemm_floor(case, inputs, backward)
    return copy_floor(work.bytes, arrays(inputs)[0].device)


def gemm_floor(case: Case, inputs: Inputs, backward: bool) -> Floor:
    """Bare products into memory that is there already. What goes back are the logits themselves:
    zeros would run faster than real values."""
    hidden, weight = inputs["hidden"].detach(), inputs["weight"].detach()
    count, (forward, live) = gemm_count(case, backward), rows_of(case, inputs)
    rows, back = hidden[:forward], hidden[:live]
    logits = torch.empty(forward, len(weight), dtype=hidden.dtype, device=hidden.device)
    grad_hidden = torch.empty_like(back) if count > 1 else None
    grad_weight = torch.empty_like(weight) if count > 2 else None

    def run() -> None:
        torch.mm(rows, weight.T, out=logits)
        if grad_hidden is not None:
            torch.mm(logits[:live], weight, out=grad_hidden)
        if grad_weight is not None:
            torch.mm(logits[:live].T, back, out=grad_weight)

    words = {1: "1 bare GEMM", 2: "2 bare GEMMs", 3: "3 bare GEMMs"}[count]
    if live < forward and count > 1:
        words += f", backward on {live} rows"
    return Floor(words, run)


def copy_floor(moved: float, device: torch.device) -> Floor:
    """A copy that reads half of the bytes and writes the other half."""
    half = max(1, int(moved) // 2)
    source = torch.randint(256, (half,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Floor(
        f"copy moving {moved / 2**20:.3g} MiB (read + write)", lambda: target.copy_(source)
    )


def copy_bandwidth_run(device: torch.device) -> tuple[float, Callable[[], object]]:
    """(bytes read plus written, the copy) large enough that caches do not count."""
    size = COPY_BYTES if device.type == "cuda" else COPY_BYTES_CPU
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * size, lambda: target.copy_(source)
