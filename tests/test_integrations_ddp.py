"""Two processes: gradients and curves of the drop-ins under DistributedDataParallel, on gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import ddp_cases
import pytest
import torch
from tiny_model import make_tiny_model
from trl_training import compare_curves

from grpo_engine.kernels.common import interpreting

pytest.importorskip("trl", minversion="1.16.0")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(interpreting(), reason="compares the portable path"),
]
WORLD = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes have written what ddp_cases.py says."""
    folder = tmp_path_factory.mktemp("ddp")
    make_tiny_model(folder / "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group["PYTHONPATH"] = str(Path(ddp_cases.__file__).parent)  # for what it imports from there
    processes = [
        subprocess.Popen(
            [sys.executable, ddp_cases.__file__, str(rank), str(WORLD), str(folder)],
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        for process in processes:
            words, _ = process.communicate(timeout=300)
            assert process.returncode == 0, words
    finally:
        for process in processes:
            process.kill()
    return folder


def test_a_step_in_ddp_is_the_step_of_one_process(folder):
    whole = ddp_cases.plain_step(folder / "tiny", 0, 1)
    assert max(grad.abs().max() for grad in whole.values()) > 1e-3
    for rank in range(WORLD):
        found = torch.load(folder / f"{rank}.pt")
        for name, grad in whole.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)


def test_trl_trains_alike_on_two_processes(folder):
    theirs, ours = torch.load(folder / "runs.pt").values()
    assert len(theirs) == 4
    compare_curves(ours, theirs)
