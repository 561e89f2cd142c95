"""The verl integration against verl's own code.

``import verl`` needs Ray, TensorDict and Hydra. Its loss is compiled from the installed file, the
functions as they stand, without the imports around them; its torch head is loaded by path.
"""

from __future__ import annotations

import ast
import importlib
import logging
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from grpo_engine.integrations import verl as ours
from grpo_engine.integrations.contract import HOSTS, Unsupported
from grpo_engine.kernels.common import interpreting

pytestmark = [
    pytest.mark.skipif(interpreting(), reason="compares the portable path"),
    pytest.mark.skipif(HOSTS["verl"].folder is None, reason="verl is not installed"),
]
LENGTHS, WIDTH = (7, 3, 12, 0, 9), 12


def functions_of(file: str, names: set[str], **scope) -> dict:
    """Top-level functions of verl's ``file``, without decorators and annotations, and a registry
    if the file has one."""
    tree = ast.parse((HOSTS["verl"].folder / file).read_text(encoding="utf-8"))
    body = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.decorator_list, node.returns = [], None
            for argument in node.args.args:
                argument.annotation = None
            for inner in ast.walk(node):
                if isinstance(inner, ast.FunctionDef):
                    inner.returns = None
                    for argument in inner.args.args:
                        argument.annotation = None
            body.append(node)
    assert {node.name for node in body} == names
    exec(compile(ast.Module(body, []), file, "exec"), scope)
    return scope


@pytest.fixture(scope="module")
def core_algos() -> dict:
    masked = functions_of("utils/torch_functional.py", {"masked_sum", "masked_mean"}, torch=torch)
    names = {
        "agg_loss",
        "compute_policy_loss_vanilla",
        "register_policy_loss",
        "get_policy_loss_fn",
    }
    return functions_of(
        "trainer/ppo/core_algos.py",
        names,
        torch=torch,
        verl_F=SimpleNamespace(**masked),
        AlgoConfig=type("AlgoConfig", (), {}),
        POLICY_LOSS_REGISTRY={},
    )


class Config(SimpleNamespace):
    def get(self, name, default=None):
        return getattr(self, name, default)


def config(**changed) -> Config:
    batch_facts = changed.pop("global_batch_info", {})
    values = {"clip_ratio": 0.2, "clip_ratio_low": 0.1, "clip_ratio_high": 0.28}
    values |= {"clip_ratio_c": 3.0, "global_batch_info": batch_facts} | changed
    return Config(**values)


def tensors() -> dict[str, torch.Tensor]:
    shape = (len(LENGTHS), WIDTH)
    old = -torch.rand(shape) * 3
    return {
        "old_log_prob": old,
        "log_prob": old + 0.8 * torch.randn(shape),
        "advantages": torch.randn(shape),
        "response_mask": torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None],
    }


def compare(core_algos: dict, inputs: dict, **arguments) -> None:
    results = []
    for loss_fn in (core_algos["compute_policy_loss_vanilla"], ours.policy_loss):
        log_prob = inputs["log_prob"].clone().requires_grad_()
        loss, metrics = loss_fn(**inputs | {"log_prob": log_prob}, **arguments)
        (grad,) = torch.autograd.grad(loss, log_prob)
        results.append((loss.detach(), grad, metrics))
    (expected, expected_grad, theirs), (found, grad, mine) = results
    assert expected_grad.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-7)
    assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7)


MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
GLOBAL = {
    "dp_size": 2,
    "batch_num_tokens": 71,
    "global_batch_size": torch.tensor(12),
    "loss_scale_factor": 40,
}


@pytest.mark.parametrize("batch_facts", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_loss_mode(core_algos, mode: str, weighted: bool, batch_facts: dict):
    weights = (0.3 * torch.randn(len(LENGTHS), WIDTH)).exp() if weighted else None
    options = config(global_batch_info=batch_facts)
    compare(core_algos, tensors(), loss_agg_mode=mode, config=options, rollout_is_weights=weights)


@pytest.mark.parametrize(
    "changed",
    [
        {"clip_ratio_low": None, "clip_ratio_high": None},
        {"clip_ratio_c": 1.5},
        {"clip_ratio": 10.0, "clip_ratio_low": 10.0, "clip_ratio_high": 10.0, "clip_ratio_c": 20.0},
    ],
)
def test_clip_options(core_algos, changed: dict):
    compare(core_algos, tensors(), config=config(**changed))


def test_every_aggregation_of_verl_is_known(core_algos):
    source = (HOSTS["verl"].folder / "trainer/ppo/core_algos.py").read_text(encoding="utf-8")
    agg = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "agg_loss")
    known = set()
    for node in ast.walk(agg):
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == "loss_agg_mode":
            value = ast.literal_eval(node.comparators[0])
            known |= {value} if isinstance(value, str) else set(value)
    assert known == set(MODES)


def test_what_is_refused(core_algos):
    with pytest.raises(Unsupported, match="clip_ratio_c=1.2 must be >= 1 \\+ clip_ratio_high"):
        ours.policy_loss(**tensors(), config=config(clip_ratio_c=1.2))
    with pytest.raises(Unsupported, match="loss_agg_mode='mean'"):
        ours.policy_loss(**tensors(), loss_agg_mode="mean", config=config())
    with pytest.raises(ValueError, match="needs batch_num_tokens"):
        ours.policy_loss(**tensors(), config=config(global_batch_info={"dp_size": 2}))
    head = (torch.randn(4, 8), torch.randn(11, 8), torch.arange(4))
    with pytest.raises(Unsupported, match="reduction='mean'"):
        ours.linear_cross_entropy(*head, 1.0, "mean")
    with pytest.raises(Unsupported, match="of 2 ranks"):
        ours.linear_cross_entropy(*head, 1.0, "none", SimpleNamespace(size=lambda: 2))


@pytest.fixture
def verl_modules(monkeypatch, core_algos) -> dict[str, ModuleType]:
    """verl as far as we import it: its own functions under its own names."""
    folder, modules = HOSTS["verl"].folder, {}
    for name in (
        "verl",
        "verl.trainer",
        "verl.trainer.ppo",
        "verl.trainer.ppo.core_algos",
        "verl.utils",
        "verl.utils.experimental",
        "verl.utils.experimental.torch_functional",
        "verl.utils.kernel",
        "verl.utils.kernel.linear_cross_entropy",
    ):
        modules[name] = ModuleType(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, modules[name])
        monkeypatch.setitem(sys.modules, name, modules[name])
    modules["verl.trainer.ppo.core_algos"].__dict__.update(core_algos)
    modules["verl.utils.kernel.linear_cross_entropy"].linear_cross_entropy = object()
    modules["verl.utils.experimental.torch_functional"].FusedLinearForPPO = object
    modules["verl"].__spec__ = SimpleNamespace(submodule_search_locations=[str(folder)])
    return modules


@pytest.mark.parametrize("logprobs", [False, True])
def test_plugin_registers_on_import(monkeypatch, verl_modules, core_algos, logprobs: bool):
    monkeypatch.setenv("GRPO_ENGINE_VERL_LOGPROBS", "1" if logprobs else "0")
    monkeypatch.delitem(sys.modules, "grpo_engine.integrations.verl_plugin", raising=False)
    kernel = verl_modules["verl.utils.kernel.linear_cross_entropy"]
    before = kernel.linear_cross_entropy
    importlib.import_module("grpo_engine.integrations.verl_plugin")
    assert core_algos["get_policy_loss_fn"]("grpo_engine") is ours.policy_loss
    assert (kernel.linear_cross_entropy is ours.linear_cross_entropy) == logprobs
    ours.unpatch_verl()
    assert kernel.linear_cross_entropy is before
    assert verl_modules["verl.utils.experimental.torch_functional"].FusedLinearForPPO is object


def load_plugins() -> None:
    """The lines of verl/__init__.py that load plug-ins, as they stand."""
    source = (HOSTS["verl"].folder / "__init__.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    named = [i for i, n in enumerate(tree.body) if "_plugins_policy" in ast.unparse(n)]
    assert len(named) == 2  # how it is chosen, what is loaded
    tree.body = tree.body[named[0] : named[1] + 1]
    exec(compile(tree, "verl/__init__.py", "exec"), {"os": os, "logging": logging})


@pytest.mark.parametrize("policy", [None, "none", "grpo_engine,another"])
def test_verl_finds_the_plugin_by_itself(monkeypatch, verl_modules, core_algos, policy):
    """By the metadata of this installation, through verl's own loader: nothing to import or set.
    A Ray worker does the same, since it imports verl as well."""
    monkeypatch.delitem(sys.modules, "grpo_engine.integrations.verl_plugin", raising=False)
    monkeypatch.setitem(core_algos, "POLICY_LOSS_REGISTRY", {})
    if policy is not None:
        monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", policy)
    load_plugins()
    assert ("grpo_engine" in core_algos["POLICY_LOSS_REGISTRY"]) == (policy != "none")


def test_a_plugin_that_cannot_register_says_so(monkeypatch, verl_modules):
    """verl itself logs it at level DEBUG."""
    monkeypatch.delitem(sys.modules, "grpo_engine.integrations.verl_plugin", raising=False)
    moved = Unsupported("verl.trainer.ppo.core_algos.agg_loss: no such symbol")
    monkeypatch.setattr(ours, "require", lambda name: (_ for _ in ()).throw(moved))
    with pytest.warns(UserWarning, match="not registered with verl: .*agg_loss: no such symbol"):
        load_plugins()


def test_the_entry_point_is_declared():
    tomllib = pytest.importorskip("tomllib")
    root = Path(__file__).resolve().parents[1]
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]
    assert declared["verl.plugins"] == {"grpo_engine": "grpo_engine.integrations.verl_plugin"}


@pytest.mark.parametrize("batched", [False, True])
def test_log_prob_op(batched: bool):
    """Against verl's FusedLinearForPPO, both outputs and gradients; its Triton twin needs a GPU."""
    from grpo_engine.bench.peers.verl import load

    theirs = load("utils.experimental.torch_functional").FusedLinearForPPO()
    shape = (3, 11) if batched else (33,)
    hidden, weight = torch.randn(*shape, 16), torch.randn(40, 16)
    ids = torch.randint(0, 40, shape)
    upstream = torch.randn(2, *shape)
    results = []
    for op in (theirs, ours.FusedLinearForPPO(), ours.linear_cross_entropy):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        found = op(*leaves, ids, 0.7)
        if op is ours.linear_cross_entropy:
            assert found[0].shape == (33,)
            found = [x.view(shape) for x in found]
        total = sum((x * g).sum() for x, g in zip(found, upstream, strict=True))
        results.append([*found, *torch.autograd.grad(total, leaves)])
    for result in results[1:]:
        for mine, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
