"""Clocks and memory: every provider in turn, device time by CUDA events, peaks by the allocator.

A round runs every provider once, and the next begins with the next one (a b c, b c a, c a b, ...),
so that a machine that is busy or warming up disturbs all of them alike and nobody is always first.
The floor takes part as one more runner. Warm-up calls come before and are not kept.

On CUDA a sample is preceded by a write over a buffer larger than the L2 cache: inputs come from
device memory, as they do in training, and the host queues the work while that write runs. The time
lies between two events around the call. Work that the host cannot launch fast enough shows there
only in part, so each round of a short call also takes the wall time: the host's clock from an idle
device to an idle device, launches included. On a CPU there is only the host's clock; calls shorter
than MIN_SAMPLE_MS are repeated and divided, with whatever the caches hold.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

MIN_SAMPLE_MS = 2.0
WARM_UP = 1  # rounds, after the gate's call; it says how often a short call is repeated
BUDGET_S = 60.0  # of one runner, above which it gets no further round
LONG_MS = 20.0  # device time from which the host's share is no question
FLUSH_BYTES = 256 * 2**20  # more than any L2 cache; its write takes as long as a launch


@dataclass(frozen=True)
class Runner:
    """``call(prepare())`` is the work; only ``call`` is timed. ``prepare`` hands over what the call
    destroys."""

    call: Callable[[Any], object]
    prepare: Callable[[], Any] | None = None

    def ready(self) -> Any:
        return None if self.prepare is None else self.prepare()

    def __call__(self) -> object:
        return self.call(self.ready())


@dataclass
class Samples:
    """Milliseconds of one runner, one entry a round; ``wall`` is empty on a CPU and for long calls.
    ``failure`` says why it stopped early."""

    times: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    failure: str | None = None


@dataclass(frozen=True)
class Spread:
    """What is reported of a list of times."""

    median: float
    q1: float
    q3: float
    least: float
    most: float

    @classmethod
    def of(cls, times: list[float]) -> Spread:
        """Raises ValueError where there is no time."""
        if not times:
            raise ValueError("no times to summarise")
        q1, median, q3 = quartiles(times)
        return cls(median, q1, q3, min(times), max(times))

    @property
    def noise(self) -> float:
        """Interquartile range relative to the median."""
        return (self.q3 - self.q1) / self.median if self.median else 0.0


def quartiles(times: list[float]) -> tuple[float, float, float]:
    if len(times) == 1:
        return times[0], times[0], times[0]
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return q1, median, q3


class Clock:
    """Takes one sample of a callable on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = None
        if device.type == "cuda":
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def sample(self, runner: Runner, repeats: int = 1) -> tuple[float, float | None]:
        """(device ms, wall ms of a short call); on a CPU (ms of one call, None)."""
        call, given = runner.call, runner.ready()
        if self._flush is None:
            start = time.perf_counter()
            for _ in range(repeats):
                call(given)
            return 1e3 * (time.perf_counter() - start) / repeats, None
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start_event.record()
        call(given)
        end_event.record()
        end_event.synchronize()
        device_ms = start_event.elapsed_time(end_event)
        if device_ms > LONG_MS:
            return device_ms, None
        given = runner.ready()
        self._flush.zero_()
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call(given)
        torch.cuda.synchronize(self.device)
        return device_ms, 1e3 * (time.perf_counter() - start)

    def repeats(self, runner: Runner, took: float) -> int:
        """How many calls of ``took`` ms make a sample long enough for the host's clock; 1 on CUDA,
        and where a call destroys what it is given."""
        if self._flush is not None or runner.prepare is not None:
            return 1
        return max(1, round(MIN_SAMPLE_MS / max(took, 1e-4)))


def interleave(
    runners: dict[str, Runner],
    clock: Clock,
    rounds: int,
    *,
    warm_up: int = WARM_UP,
    budget_s: float = BUDGET_S,
    samples: dict[str, Samples] | None = None,
) -> dict[str, Samples]:
    """``rounds`` rounds over all runners after ``warm_up`` rounds that are not kept.

    A runner that raises is left out from then on and its failure kept; one that has used up
    ``budget_s`` seconds takes no further part once it has a time. ``samples`` may be handed in and
    is filled as the rounds go, so that an interrupted caller still holds what was taken.
    """
    samples = {} if samples is None else samples
    samples |= {name: Samples() for name in runners}
    repeats = dict.fromkeys(runners, 1)
    spent = dict.fromkeys(runners, 0.0)
    order = list(runners)
    for number in range(-warm_up, rounds):
        first = max(0, number) % max(1, len(order))
        for name in [*order[first:], *order[:first]]:
            runner, mine = runners[name], samples[name]
            if mine.failure is not None or (mine.times and spent[name] > budget_s):
                continue
            start = time.perf_counter()
            try:
                took, wall = clock.sample(runner, repeats[name])
            except Exception as error:  # the reason goes into the table
                mine.failure = reason(error)
                release(clock.device)
                continue
            spent[name] += time.perf_counter() - start
            if number < 0:
                repeats[name] = clock.repeats(runner, took)
                continue
            mine.times.append(took)
            if wall is not None:
                mine.wall.append(wall)
    return samples


def reason(error: BaseException) -> str:
    """Kind and first line of an error, for one cell of a table."""
    lines = str(error).strip().splitlines()
    first = lines[0].strip() if lines else ""
    if len(first) > 160:
        first = first[:157] + "..."
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def release(device: torch.device) -> None:
    """Give cached blocks back, so that one provider's failure does not starve the next."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_mib(runner: Runner, device: torch.device) -> float:
    """Most MiB that one call holds beyond what was held before it, its results included.

    From PyTorch's own allocator: on CUDA its statistics, on a CPU its profiler's memory events.
    Memory that a library takes elsewhere (a BLAS workspace, a C++ vector, numpy) is not seen.
    """
    given = runner.ready()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = runner.call(given)
        torch.cuda.synchronize(device)
        del kept
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    from torch.profiler import ProfilerActivity, profile

    with quiet_profiler():
        recorder = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        recorder.start()
    try:
        kept = runner.call(given)
    finally:
        with quiet_profiler():
            recorder.stop()
    del kept
    held = most = 0
    events = recorder.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 2**20


@contextlib.contextmanager
def quiet_profiler() -> Iterator[None]:
    """Starting and stopping the profiler logs to the process's standard error, past Python's."""
    kept = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)
