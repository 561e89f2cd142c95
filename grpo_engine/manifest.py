"""manifest.json: what a run was made from (hashes), by what (versions, machine, seeds), and how it
ended."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grpo_engine import __version__
from grpo_engine.integrations.contract import HOSTS
from grpo_engine.lora import base_tensors
from grpo_engine.metrics import write_atomically

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "triton",
    "peft",
    "numpy",
    "reasoning-gym",
    "math-verify",
)


def rows_sha256(rows: list[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str, ensure_ascii=False).encode())
    return digest.hexdigest()


def code_version() -> str:
    """Package version, and the commit when run from a checkout of this project."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return __version__
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__} ({done.stdout.strip()})"


def machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"platform": platform.platform(), "cpu_threads": torch.get_num_threads(), "gpus": gpus}


class Manifest:
    """``manifest.json``: what went in, with hashes, and how the run stands."""

    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        self.path, self.values = folder / "manifest.json", values

    def update(self, **values: Any) -> None:
        self.values.update(values)
        write_atomically(self.path, json.dumps(self.values, indent=1, ensure_ascii=False) + "\n")


def weights_sha256(model: nn.Module, merged: Mapping[str, Tensor] | None = None) -> str:
    """One hash over the names and bytes of all parameters, adapters left out; ``merged`` weights
    count in place of the model's own."""
    digest = hashlib.sha256()
    for name, parameter in base_tensors(model.named_parameters()):
        tensor = parameter if merged is None else merged[name]
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def package_version(name: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def vllm_version() -> str | None:
    """None where vLLM is not installed, under any name of its builds. Does not import it."""
    return HOSTS["vllm"].version


def package_versions() -> dict[str, str]:
    found = {name: package_version(name) for name in PACKAGES} | {"vllm": vllm_version()}
    return {name: version for name, version in found.items() if version is not None}
