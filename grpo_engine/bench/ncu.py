"""Bytes, occupancy and achieved bandwidth of every kernel, by Nsight Compute's command line.

``ncu`` runs ``replay`` in a process of its own: it makes the inputs, warms the provider up, and
only then starts the measured call (cudaProfilerStart). The output is ncu's CSV: one line per kernel
launch and metric, in base units. The parser is tested on a recorded sample of that format; ncu
itself has not been run with it yet.
"""

from __future__ import annotations

import base64
import csv
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import torch

from grpo_engine.bench.cases import Case
from grpo_engine.bench.measure import runner_of
from grpo_engine.bench.providers import providers_of
from grpo_engine.bench.rows import BOTH

TIME = "gpu__time_duration.sum"  # ns
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
REGISTERS = "launch__registers_per_thread"
METRICS = (TIME, READ, WRITTEN, OCCUPANCY, REGISTERS)
TIMEOUT_S = 300
COLUMNS = [
    "kernel",
    "launches",
    "ms",
    "MiB read",
    "MiB written",
    "GB/s",
    "occupancy %",
    "registers",
]


def absent(device: torch.device) -> str | None:
    """Why there is no report by ncu, or None."""
    if device.type != "cuda":
        return "no bytes, occupancy or bandwidth of kernels: those need a GPU and ncu"
    if shutil.which("ncu") is None:
        return "no bytes, occupancy or bandwidth of kernels: ncu (Nsight Compute) is not on PATH"
    return None


def measure(case: Case, passes: str, provider: str, device: torch.device) -> dict[str, Any]:
    """The table of one provider. RuntimeError with ncu's own line where it fails."""
    replay_code = "import sys; from grpo_engine.bench.ncu import replay; replay(*sys.argv[1:])"
    command = [
        "ncu",
        "--csv",
        *("--print-units", "base"),
        *("--metrics", ",".join(METRICS)),
        *("--profile-from-start", "off"),
        *(sys.executable, "-c", replay_code, packed(case), passes, provider, str(device)),
    ]
    with tempfile.TemporaryDirectory() as elsewhere:  # the repository must stay off sys.path
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ncu = subprocess.Popen(command, cwd=elsewhere, start_new_session=True, **pipes)
        try:
            printed, said = ncu.communicate(timeout=TIMEOUT_S)
        except BaseException:
            os.killpg(ncu.pid, signal.SIGKILL)  # with the Python under it, which holds the GPU
            ncu.wait()
            raise
    if ncu.returncode != 0:
        lines = [line for line in printed.splitlines() if line.startswith("==ERROR==")]
        raise RuntimeError(f"ncu: {(lines or said.splitlines() or ['failed'])[-1]}")
    return table(parse(printed))


def packed(case: Case) -> str:
    """The case as one word of a command line."""
    return base64.b64encode(pickle.dumps(case)).decode()


def unpacked(word: str) -> Case:
    return pickle.loads(base64.b64decode(word))


def replay(word: str, passes: str, provider: str, device_name: str) -> None:
    """What runs under ncu: one warm call that is not measured, one that is."""
    case, device = unpacked(word), torch.device(device_name)
    torch.cuda.set_device(device)
    (chosen,) = (p for p in providers_of(case.job) if p.name == provider)
    runner = runner_of(chosen, case.make(device), passes == BOTH)
    with torch.set_grad_enabled(passes == BOTH):
        runner()
        given = runner.ready()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        runner.call(given)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


@dataclass
class Kernel:
    """Sums over the launches of one kernel; ``warp_ns`` is occupancy weighted by time. None: ncu
    gave no number for a launch."""

    launches: int = 0
    ns: float = 0.0
    read: float | None = 0.0
    written: float | None = 0.0
    warp_ns: float | None = 0.0
    registers: float | None = 0.0


def parse(text: str) -> dict[str, Kernel]:
    """Kernels by name from ncu's CSV; the program's own output and ncu's log lines are skipped.

    ValueError where there is no table or a metric is missing of a launch.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    if start is None:
        raise ValueError("ncu printed no table")
    launches: dict[tuple[str, str], dict[str, float | None]] = {}
    for line in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        launch = launches.setdefault((line["ID"], line["Kernel Name"]), {})
        launch[line["Metric Name"]] = number(line["Metric Value"])
    kernels: dict[str, Kernel] = {}
    for (number_of, name), metrics in launches.items():
        missing = [metric for metric in METRICS if metric not in metrics]
        if missing or metrics[TIME] is None:
            raise ValueError(f"launch {number_of} of {name} has no {', '.join(missing or [TIME])}")
        add(kernels.setdefault(name, Kernel()), metrics)
    return kernels


def add(kernel: Kernel, metrics: dict[str, float | None]) -> None:
    def plus(one: float | None, other: float | None) -> float | None:
        return None if one is None or other is None else one + other

    time, occupancy = metrics[TIME], metrics[OCCUPANCY]
    kernel.launches += 1
    kernel.ns += time
    kernel.read = plus(kernel.read, metrics[READ])
    kernel.written = plus(kernel.written, metrics[WRITTEN])
    kernel.warp_ns = plus(kernel.warp_ns, None if occupancy is None else occupancy * time)
    registers = metrics[REGISTERS]
    known = registers is not None and kernel.registers is not None
    kernel.registers = max(kernel.registers, registers) if known else None


def number(text: str) -> float | None:
    """ncu writes thousands with commas, and 'n/a' where the device lacks a counter."""
    text = text.replace(",", "").strip()
    return float(text) if re.fullmatch(r"-?\d+(\.\d+)?([eE][+-]?\d+)?", text) else None


def table(kernels: dict[str, Kernel]) -> dict[str, Any]:
    """Kernels by time."""

    def shown(value: float | None, digits: int) -> str:
        return "n/a" if value is None else f"{value:.{digits}f}"

    rows = []
    for name, kernel in sorted(kernels.items(), key=lambda item: -item[1].ns):
        read, written = kernel.read, kernel.written
        moved = None if read is None or written is None else read + written
        rows.append(
            [
                name if len(name) <= 80 else name[:77] + "...",
                str(kernel.launches),
                f"{kernel.ns / 1e6:.3f}",
                shown(None if read is None else read / 2**20, 1),
                shown(None if written is None else written / 2**20, 1),
                shown(None if moved is None or not kernel.ns else moved / kernel.ns, 0),
                shown(None if kernel.warp_ns is None else kernel.warp_ns / (kernel.ns or 1), 1),
                shown(kernel.registers, 0),
            ]
        )
    return {"columns": COLUMNS, "rows": rows}
