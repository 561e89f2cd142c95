"""On what a number was measured: the device's name, threads, versions, commit and date.

Numbers of two machines are never compared, so a name must be stable on one machine and differ
between two: on a CPU its model, threads and cores, on CUDA the name of the GPU.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from grpo_engine.manifest import code_version
from grpo_engine.types import UserError

BUSY_SHARE = 0.25  # of the cores, beside half a core for whoever started this
ALWAYS = ("grpo-engine", "torch", "triton", "numpy")


def resolve_device(name: str | None) -> torch.device:
    """The device of ``--device``; None: CUDA where there is one, else the CPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: must be cpu, cuda or cuda:<number>")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: no CUDA device here ({torch.__version__})")
    index = 0 if device.index is None else device.index
    if index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"--device {name}: the CUDA devices here are cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


def hardware(device: torch.device) -> str:
    """One line that names the device, CPU or GPU, in every output."""
    if device.type == "cuda":
        return f"GPU, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"CPU, {cpu_model()}, {threads} thread{'s' * (threads > 1)} on {cores()} cores"


def cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def busy(device: torch.device) -> str | None:
    """A line where other work runs on this machine's cores: then times on a CPU mean little."""
    if device.type != "cpu" or not hasattr(os, "getloadavg"):
        return None
    load = os.getloadavg()[0]
    if load <= 0.5 + BUSY_SHARE * cores():
        return None
    return f"load average {load:.1f} on {cores()} cores: this machine is busy, times are unreliable"


def slug(hardware_name: str) -> str:
    """The hardware's name as a file name: 'GPU, NVIDIA H200' -> 'gpu-nvidia-h200'."""
    return re.sub(r"[^a-z0-9]+", "-", hardware_name.lower()).strip("-")


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Versions of what the numbers depend on, the providers' packages included."""
    found = {"python": platform.python_version()}
    for name in dict.fromkeys([*ALWAYS, *packages]):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def provenance(device: torch.device, packages: Iterable[str] = ()) -> dict[str, Any]:
    """What every row carries."""
    return {
        "hardware": hardware(device),
        "device": device.type,
        "code": code_version(),
        "versions": versions(packages),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
