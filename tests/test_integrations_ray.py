"""verl and OpenRLHF train in Ray workers: that our code gets there by what README says to do.

Needs Ray and, for verl, what its package imports: pip install ray tensordict hydra-core codetiming
orjson. Without them these skip.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
from test_integrations_openrlhf import package  # noqa: F401

from grpo_engine.integrations import contract

pytestmark = pytest.mark.slow
pytest.importorskip("ray")


def run(code: str, **variables: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd="/",
        env=os.environ | {"RAY_AUTH_MODE": "disabled"} | variables,
    )
    assert done.returncode == 0, done.stdout + done.stderr


VERL = """
import ray, verl
from grpo_engine.integrations import verl as ours
from verl.trainer.ppo.core_algos import get_policy_loss_fn
assert get_policy_loss_fn("grpo_engine") is ours.policy_loss
variables = {ours.LOGPROBS_VARIABLE: "1"}
ray.init(num_cpus=1, include_dashboard=False, runtime_env={"env_vars": variables})

@ray.remote
def places():
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.utils.experimental import torch_functional
    from verl.utils.kernel import linear_cross_entropy as kernel
    found = get_policy_loss_fn("grpo_engine"), kernel.linear_cross_entropy
    return {x.__module__ for x in (*found, torch_functional.FusedLinearForPPO)}

assert ray.get(places.remote()) == {ours.__name__}
"""


def test_verl_in_driver_and_worker():
    """Nothing but the installation, and in the worker the variable."""
    needed = ("verl", "tensordict", "hydra", "codetiming", "orjson")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    run(VERL)


OPENRLHF = """
import os, ray
from grpo_engine.integrations import openrlhf as ours
ray.init(
    num_cpus=1,
    include_dashboard=False,
    runtime_env={"worker_process_setup_hook": ours.patch_openrlhf},
)

@ray.remote
class Worker:
    def imported(self):
        import sys
        return [name for name in sys.modules if name.split(".")[0] == "openrlhf"]

    def places(self):
        from openrlhf.trainer.ray import ppo_actor
        loss = ppo_actor.Trainer().actor_loss_fn
        return type(loss).__module__, hasattr(ppo_actor.Actor.forward, "__wrapped__")

worker = Worker.remote()
assert ray.get(worker.imported.remote()) == []
assert ray.get(worker.places.remote()) == (ours.__name__, True)
"""


@pytest.mark.skipif(contract.HOSTS["openrlhf"].folder is None, reason="openrlhf is not installed")
def test_openrlhf_in_a_worker(package):  # noqa: F811
    """On its own loss and Actor.forward, in a package without flash-attn and DeepSpeed."""
    others = os.environ.get("PYTHONPATH", "")
    run(OPENRLHF, PYTHONPATH=f"{package}:{others}" if others else str(package))
