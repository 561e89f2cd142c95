"""``--profile``: where the time of each provider goes.

A trace per provider (Chrome's format: chrome://tracing, Perfetto) and a table of its kernels by
time, from PyTorch's profiler. On CUDA with Nsight Compute's ``ncu`` on PATH a second process runs
the provider once more under it, for the bytes, occupancy and bandwidth of every kernel (ncu.py).
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import torch

from grpo_engine.bench import ncu
from grpo_engine.bench.cases import Inputs
from grpo_engine.bench.measure import runner_of
from grpo_engine.bench.provider import Provider
from grpo_engine.bench.rows import BOTH, OK, Row
from grpo_engine.bench.timing import Runner, quiet_profiler, reason, release

TOP = 12  # rows of a table


def profile_rows(
    rows: list[Row], providers: list[Provider], device: torch.device, folder: Path
) -> tuple[dict[str, Any], list[str]]:
    """(sections for the report, notes). Only what was right and was timed is profiled."""
    by_name = {(provider.job, provider.name): provider for provider in providers}
    sections: dict[str, Any] = {}
    notes = [ncu.absent(device)] if ncu.absent(device) else []
    case, inputs = None, None
    for row in rows:
        if row.status != OK or row.ms is None:
            continue
        provider = by_name[row.case.job, row.provider]
        title = f"{row.case.name}, {row.passes}, {row.provider}"
        try:
            if row.case != case:
                case = inputs = None  # in this order, also where there is no room for the next
                release(device)
                case, inputs = row.case, row.case.make(device)
            trace = folder / f"trace-{file_name(title)}.json"
            table = trace_once(provider, inputs, row.passes == BOTH, device, trace)
            sections[f"Profile: {title}"] = table
            if not ncu.absent(device):
                sections[f"ncu: {title}"] = ncu.measure(row.case, row.passes, row.provider, device)
        except Exception as error:  # one provider's trouble is noted, the rest goes on
            notes.append(f"not profiled: {title}: {reason(error)}")
    return sections, notes


def file_name(words: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=_-]+", "-", words).strip("-")[:150]


def trace_once(
    provider: Provider, inputs: Inputs, backward: bool, device: torch.device, path: Path
) -> dict[str, Any]:
    """Write the trace of one warm call and return its table."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    runner = runner_of(provider, inputs, backward)
    with contextlib.nullcontext() if backward else torch.no_grad():
        runner()
        given = runner.ready()
        with quiet_profiler():
            recorder = profile(activities=activities)
            recorder.start()
        try:
            call_to_the_end(runner, given, device)
        finally:
            with quiet_profiler():
                recorder.stop()
    with quiet_profiler():
        recorder.export_chrome_trace(str(path))
    return kernels_by_time(recorder.key_averages(), device)


def call_to_the_end(runner: Runner, given: Any, device: torch.device) -> None:
    runner.call(given)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernels_by_time(averages: Any, device: torch.device) -> dict[str, Any]:
    """The TOP kernels on CUDA, the TOP torch operators on a CPU, by their own time."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        kernels = [e for e in averages if e.device_type == torch.autograd.DeviceType.CUDA]
        times = [(e.self_device_time_total, e.count, e.key) for e in kernels]
    else:
        times = [(e.self_cpu_time_total, e.count, e.key) for e in averages]
    times = sorted((entry for entry in times if entry[0] > 0), reverse=True)
    total = sum(entry[0] for entry in times) or 1.0
    rows = [
        [short(name), str(count), f"{us / 1e3:.3f}", f"{100 * us / total:.1f}"]
        for us, count, name in times[:TOP]
    ]
    what = "kernel" if on_gpu else "operator (CPU)"
    return {"columns": [what, "calls", "ms", "% of all"], "rows": rows}


def short(name: str) -> str:
    """A C++ kernel's name without its template arguments, at most 80 characters."""
    name = re.sub(r"<.*>", "<...>", name.removeprefix("void "))
    return name if len(name) <= 80 else name[:77] + "..."
