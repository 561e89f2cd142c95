"""One case: the same inputs for everyone, correct first, then in turn against the clock.

A provider that is past the gate (truth.wrong) is shown as WRONG with its error and not timed; one
that raises, as FAILED with the reason. So is one that leaves other inputs behind than it was given:
everyone after it would compute something else.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpo_engine.bench.cases import Case, Inputs, tensors
from grpo_engine.bench.floors import NO_GRADIENT_JOBS, Floor, Work, floor_of, least_work
from grpo_engine.bench.peers.plain_torch import many_shapes
from grpo_engine.bench.provider import Provider
from grpo_engine.bench.rows import ABSENT, BOTH, CANNOT, FAILED, FORWARD, OK, WRONG, Row
from grpo_engine.bench.timing import (
    Clock,
    Runner,
    Samples,
    Spread,
    interleave,
    peak_mib,
    reason,
    release,
)
from grpo_engine.bench.truth import errors, truth, wrong
from grpo_engine.types import UserError

SEED = 0
FLOOR = "the floor"
PLAIN = "torch"  # the provider whose own error says what the dtype allows
LOSS_JOBS = ("linear_grpo_loss", "grpo_loss")  # a loss without its gradients is no use


@dataclass
class Gated:
    """What came through the gate: a row each, what to time of those that are right, and the shapes
    of their outputs (meta tensors: they hold no memory)."""

    backward: bool
    rows: list[Row] = field(default_factory=list)
    runners: dict[str, Runner] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


def passes_of(job: str) -> tuple[str, ...]:
    if job in NO_GRADIENT_JOBS:
        return (FORWARD,)
    return (BOTH,) if job in LOSS_JOBS else (FORWARD, BOTH)


def measure_case(
    case: Case,
    providers: list[Provider],
    clock: Clock,
    rounds: int,
    rows: list[Row],
) -> None:
    """Append the case's rows to ``rows``, where they stay, complete or not, if interrupted.

    Inputs that cannot be made stand in every provider's row: "not here" where they need a package
    that is absent, FAILED otherwise (out of memory).
    """
    torch.compiler.reset()  # past its limit of recompilations a function runs eager, silently
    with many_shapes():
        _measure_case(case, providers, clock, rounds, rows)


def _measure_case(
    case: Case, providers: list[Provider], clock: Clock, rounds: int, rows: list[Row]
) -> None:
    device = clock.device
    try:
        inputs = case.make(device, SEED)
        true = truth(case, inputs)  # on the inputs' device, large: gone before anything is timed
    except Exception as error:  # the reason goes into the table
        absent = isinstance(error, UserError)
        status, words = (ABSENT, str(error)) if absent else (FAILED, f"no inputs: {reason(error)}")
        first, *_ = passes_of(case.job)
        rows += [Row(case, first, p.name, is_ours(p), status, words) for p in providers]
        release(device)
        return
    try:
        gates = [
            gate(case, passes, inputs, true, providers, device) for passes in passes_of(case.job)
        ]
        del true
        for gated in gates:
            rows += gated.rows
        for gated in gates:
            time_gated(case, inputs, gated, clock, rounds)
    finally:
        del inputs
        gc.collect()
        release(device)


def time_gated(case: Case, inputs: Inputs, gated: Gated, clock: Clock, rounds: int) -> None:
    """Fill the times, floors and peaks of the rows that came through the gate."""
    if not gated.runners:
        return
    with gradients(gated.backward):
        work = least_work(case, inputs, gated.outputs, gated.backward)
        timed = {row.provider: row for row in gated.rows if row.status == OK}
        for name, row in timed.items():
            row.flops, row.bytes = work.flops, work.bytes
            with recorded(row, clock.device):
                row.peak_mib = measured_peak(case, gated.runners[name], clock.device)
        floor = floor_or_none(case, inputs, work, gated.backward, clock.device)
        runners = {n: r for n, r in gated.runners.items() if timed[n].status == OK}
        if floor is not None:
            runners[FLOOR] = Runner(lambda _: floor.run())
        samples: dict[str, Samples] = {}
        try:
            interleave(runners, clock, rounds, samples=samples)
        finally:
            fill(timed, samples, floor)


def gradients(backward: bool) -> contextlib.AbstractContextManager:
    """A forward pass alone is what recomputes old log-probabilities: without a graph."""
    return contextlib.nullcontext() if backward else torch.no_grad()


def measured_peak(case: Case, runner: Runner, device: torch.device) -> float | None:
    """None for the planner, whose memory is C++'s, not PyTorch's."""
    return None if case.job == "plan_batches" else peak_mib(runner, device)


def floor_or_none(
    case: Case, inputs: Inputs, work: Work, backward: bool, device: torch.device
) -> Floor | None:
    """None too where its buffers do not fit beside the inputs."""
    try:
        return floor_of(case, inputs, work, backward)
    except (torch.OutOfMemoryError, MemoryError):
        release(device)
        return None


@contextlib.contextmanager
def recorded(row: Row, device: torch.device) -> Iterator[None]:
    """An error inside becomes the row's."""
    try:
        yield
    except Exception as error:  # the reason goes into the table
        row.status, row.reason = FAILED, reason(error)
        release(device)


def gate(
    case: Case,
    passes: str,
    inputs: Inputs,
    true: dict[str, Tensor],
    providers: list[Provider],
    device: torch.device,
) -> Gated:
    """Run every provider once and hold it against the fp64 truth."""
    gated, before = Gated(passes == BOTH), checksums(inputs)
    plain: dict[str, float] = {}
    for provider in sorted(providers, key=lambda p: p.name != PLAIN):  # PLAIN sets the measure
        row = Row(case, passes, provider.name, is_ours(provider), OK)
        row.approximate = provider.approximate
        gated.rows.append(row)
        absent, cannot = provider.missing(device), provider.unsuited(case, gated.backward)
        if absent or cannot:
            row.status, row.reason = (ABSENT, absent) if absent else (CANNOT, cannot)
            continue
        with recorded(row, device), gradients(gated.backward):
            outputs = provider.run(provider.prepared(inputs), gated.backward)
            row.errors = errors(outputs, true)
            verdict = wrong(provider, row.errors, plain, case, backward=gated.backward)
            if verdict:
                row.status, row.reason = WRONG, verdict
            if provider.name == PLAIN:
                plain = row.errors
            gated.outputs = {name: value.to("meta") for name, value in outputs.items()}
            del outputs
        if checksums(inputs) != before:
            row.status, row.reason = FAILED, "overwrote the inputs it was given"
            inputs.update(case.make(device, SEED))
        if row.status == OK:
            gated.runners[provider.name] = runner_of(provider, inputs, gated.backward)
    order = [provider.name for provider in providers]
    gated.rows.sort(key=lambda row: order.index(row.provider))
    gated.runners = {name: gated.runners[name] for name in order if name in gated.runners}
    return gated


def runner_of(provider: Provider, inputs: Inputs, backward: bool) -> Runner:
    def call(given: Inputs | None) -> object:
        return provider.run(inputs if given is None else given, backward)

    return Runner(call, (lambda: provider.prepared(inputs)) if provider.overwrites else None)


def is_ours(provider: Provider) -> bool:
    return provider.name.startswith("ours")


def checksums(inputs: Inputs) -> dict[str, int]:
    """The sum of each input's bits, which tells whether a run wrote into it."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    found = {}
    for name, tensor in (tensors(inputs) | inputs.get("fields", {})).items():
        values = tensor.detach().view(bits[tensor.element_size()])
        found[name] = int(values.sum(dtype=torch.int64))
    return found


def fill(timed: dict[str, Row], samples: dict[str, Samples], floor: Floor | None) -> None:
    """Put the times into the rows, as many rounds as there are."""
    if not samples:
        return
    bare = samples.get(FLOOR)
    for name, row in timed.items():
        taken = samples.get(name)
        if row.status != OK or taken is None:
            continue
        if taken.failure is not None:
            row.status, row.reason = FAILED, taken.failure
            continue
        if not taken.times:  # interrupted
            continue
        row.rounds, row.ms = len(taken.times), Spread.of(taken.times)
        most = max(len(s.times) for s in samples.values())
        if row.rounds < most:
            row.reason = f"{row.rounds} of {most} rounds: slow"
        row.wall_ms = Spread.of(taken.wall) if taken.wall else None
        if floor is not None and bare is not None and bare.times:
            row.floor, row.floor_ms = floor.label, Spread.of(bare.times)
