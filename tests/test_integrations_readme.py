"""README's section on other trainers: its blocks run as they are written there."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from tiny_model import make_tiny_model
from trl_training import OPTIONS, reward

from grpo_engine.integrations import contract
from grpo_engine.kernels.common import interpreting

pytestmark = pytest.mark.skipif(interpreting(), reason="compares the portable path")
README = Path(__file__).resolve().parents[1] / "README.md"
BATCH, PROMPT, WIDTH = 3, 5, 7


def sections() -> dict[str, list[tuple[str, str]]]:
    """Title up to the first comma or bracket -> its blocks, (language, code)."""
    text = README.read_text(encoding="utf-8")
    part = text.split("## In the trainer you already have\n")[1].split("\n## ")[0]
    found = {}
    for section in part.split("\n### ")[1:]:
        title = re.split(r" ?[,(\n]", section, maxsplit=1)[0]
        found[title] = re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)
    return found


SECTIONS = sections()


def block(title: str, index: int = 0) -> str:
    return SECTIONS[title][index][1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_every_host_has_a_section_of_at_most_ten_lines():
    hosts = "Plain PyTorch, TRL, verl, OpenRLHF, Liger-Kernel's signatures, slime, SkyRL, prime-rl"
    assert list(SECTIONS) == hosts.split(", ")
    for title, blocks in SECTIONS.items():
        assert blocks, title
        for _, code in blocks:
            assert len(code.splitlines()) <= 10, title


def completions(folder) -> dict:
    """What the blocks take as given."""
    from transformers import AutoModelForCausalLM

    input_ids = torch.randint(3, 40, (BATCH, PROMPT + WIDTH))
    return {
        "model": AutoModelForCausalLM.from_pretrained(folder),
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "num_completion": WIDTH,
        "completion_ids": input_ids[:, -WIDTH:],
        "advantages": torch.randn(BATCH),
        "mask": torch.ones(BATCH, WIDTH),
    }


def test_plain_pytorch(folder):
    names = completions(folder)
    exec(block("Plain PyTorch"), names)
    assert names["logprobs"].shape == (BATCH, WIDTH)
    assert names["metrics"].to_dict()["tokens"] == BATCH * WIDTH
    assert all(p.grad.abs().max() > 0 for p in names["model"].parameters())


def test_liger(folder):
    from grpo_engine.integrations.pytorch import completion_hidden

    names = completions(folder)
    model, lengths = names["model"], (names["input_ids"], names["attention_mask"], WIDTH)
    names |= {"hidden": completion_hidden(model, *lengths), "lm_head": model.lm_head}
    exec(block("Liger-Kernel's signatures"), names)
    names["loss"].backward()
    assert model.lm_head.weight.grad.abs().max() > 0 and len(names["metrics"]) == 1


def test_trl(folder, tmp_path):
    pytest.importorskip("trl", minversion="1.16.0")
    from datasets import Dataset
    from trl import GRPOConfig
    from trl import GRPOTrainer as Theirs

    from grpo_engine.integrations.trl import unpatch_trl
    from grpo_engine.integrations.trl_loss import compute_loss

    names = {
        "model": str(folder),
        "reward": reward,
        "args": GRPOConfig(output_dir=str(tmp_path), **OPTIONS | {"max_steps": 1}),
        "dataset": Dataset.from_list([{"prompt": "1+1="}] * 8),
    }
    exec(block("TRL"), names)
    assert names["trainer"].state.global_step == 1
    try:
        exec(block("TRL", 1), {})
        assert Theirs._compute_loss is compute_loss
    finally:
        unpatch_trl()
    assert Theirs._compute_loss is not compute_loss


def test_verl():
    """The names are those that we register and read, and verl has the fields."""
    from grpo_engine.integrations import verl

    words = shlex.split(block("verl").replace("\\\n", ""), comments=True)
    assert words[0] == f"{verl.LOGPROBS_VARIABLE}=1"
    given = dict(word.split("=") for word in words[4:])
    assert words[1:4] == ["python", "-m", "verl.trainer.main_ppo"]
    assert set(given.values()) == {verl.LOSS_MODE, "True"}
    host = contract.HOSTS["verl"].folder
    if host is None:
        pytest.skip("verl is not installed")
    assert (host / "trainer" / "main_ppo.py").is_file()
    config = yaml.safe_load((host / "trainer/config/_generated_ppo_trainer.yaml").read_text())
    for name in given:
        place = config
        for key in name.split("."):
            place = place[key]


def test_openrlhf(monkeypatch):
    host = contract.HOSTS["openrlhf"].folder
    if host is None:
        pytest.skip("openrlhf is not installed")
    from grpo_engine.integrations.openrlhf import patch_openrlhf, unpatch_openrlhf

    ran, ray = [], ModuleType("ray")
    ray.init = lambda runtime_env: ran.append(runtime_env)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(runpy, "run_module", lambda name, run_name: ran.append((name, run_name)))
    exec(block("OpenRLHF"), {})
    hook = {"worker_process_setup_hook": patch_openrlhf}
    assert ran == [hook, ("openrlhf.cli.train_ppo_ray", "__main__")]
    source = (host / "cli" / "train_ppo_ray.py").read_text(encoding="utf-8")
    assert "if not ray.is_initialized():" in source  # it keeps the one that is
    assert 'if __name__ == "__main__":' in source
    try:
        patch_openrlhf()
    finally:
        unpatch_openrlhf()


def resolved(path: str):
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def test_slime():
    words = shlex.split(block("slime"))
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert given["--loss-type"] == "custom_loss"
    assert callable(resolved(given["--custom-loss-function-path"]))


def test_prime_rl():
    tomllib = pytest.importorskip("tomllib")
    given = tomllib.loads(block("prime-rl"))["trainer"]["loss"]
    assert given["type"] == "custom" and callable(resolved(given["import_path"]))
    from grpo_engine.integrations.prime_rl import sequence_loss

    n = 4
    inputs = SimpleNamespace(
        trainer_logprobs=-torch.rand(n),
        inference_logprobs=-torch.rand(n),
        ref_logprobs=None,
        advantages=torch.randn(n),
        loss_mask=torch.ones(n, dtype=torch.bool),
        loss_weights=None,
    )
    assert sequence_loss(inputs, **given["kwargs"])[0].isfinite()


def test_skyrl(monkeypatch):
    if contract.HOSTS["skyrl"].folder is None:
        pytest.skip("skyrl is not installed")
    from grpo_engine.integrations import skyrl

    names, module = [], ModuleType("skyrl.backends.skyrl_train.utils.ppo_utils")
    module.register_policy_loss = lambda name: lambda function: names.append(name)
    module.PolicyLossRegistry = SimpleNamespace(list_available=lambda: names)
    monkeypatch.setattr(skyrl, "require", lambda name: None)
    for part in ("skyrl", "skyrl.backends", "skyrl.backends.skyrl_train"):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    monkeypatch.setitem(sys.modules, "skyrl.backends.skyrl_train.utils", ModuleType("utils"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(block("SkyRL"), {})
    text = README.read_text(encoding="utf-8")
    asked = re.search(r"policy_loss_type=(\w+)` \(or `(\w+)`\)", text).groups()
    assert names == list(asked)
