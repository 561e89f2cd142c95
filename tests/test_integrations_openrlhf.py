"""The OpenRLHF integration against OpenRLHF's own code.

Its package imports flash-attn, which a machine without a GPU cannot build. So ``models/loss.py`` is
loaded by path from the installed wheel, and ``Actor.forward`` is compiled from its source:

    pip install --no-deps 'openrlhf>=0.11'      # or OPENRLHF_FOLDER=the wheel's folder openrlhf/
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny_model import make_tiny_model
from torch.nn import functional

from grpo_engine.integrations import contract
from grpo_engine.integrations import openrlhf as ours
from grpo_engine.integrations.contract import Unsupported
from grpo_engine.kernels.common import interpreting

GIVEN = os.environ.get("OPENRLHF_FOLDER")
FOLDER = Path(GIVEN) if GIVEN else contract.HOSTS["openrlhf"].folder
pytestmark = [
    pytest.mark.skipif(interpreting(), reason="compares the portable path"),
    pytest.mark.skipif(
        FOLDER is None, reason="openrlhf is not installed: pip install --no-deps 'openrlhf>=0.11'"
    ),
]
LENGTHS, WIDTH = (7, 3, 12, 1, 9), 12


@pytest.fixture(scope="module")
def utils() -> dict:
    """The functions of models/utils.py that loss and actor use, as they stand."""
    names = {"log_probs_from_logits", "compute_entropy", "masked_mean", "_logsumexp_by_chunk"}
    path = FOLDER / "models" / "utils.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    body = [node for node in tree.body if getattr(node, "name", "") in names]
    assert {node.name for node in body} == names
    from typing import Optional

    scope = {"torch": torch, "F": functional, "Optional": Optional}
    exec(compile(ast.Module(body, []), str(path), "exec"), scope)
    return scope


@pytest.fixture(scope="module")
def theirs(utils) -> type:
    """PolicyLoss of models/loss.py itself, with the package's __init__ left out."""
    package = ModuleType("grpo_engine_test_openrlhf")
    package.__path__ = [str(FOLDER / "models")]
    masks = ModuleType(f"{package.__name__}.utils")
    masks.masked_mean = utils["masked_mean"]
    sys.modules[package.__name__], sys.modules[masks.__name__] = package, masks
    name = f"{package.__name__}.loss"
    spec = importlib.util.spec_from_file_location(name, FOLDER / "models" / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.PolicyLoss
    del sys.modules[package.__name__], sys.modules[masks.__name__]


def compare(theirs: type, totals: dict | None = None, **options) -> None:
    shape = (len(LENGTHS), WIDTH)
    mask = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    mask[2, 4] = False
    old = -torch.rand(shape) * 3 - 0.01
    fields = {
        "old_log_probs": old,
        "advantages": torch.randn(shape),
        "action_mask": mask,
        "rollout_log_probs": old + 0.3 * torch.randn(shape),
    }
    log_probs = old + 0.5 * torch.randn(shape)
    results = []
    for kind in (theirs, ours.PolicyLoss):
        leaf = log_probs.clone().requires_grad_()
        found = kind(**options)(leaf, **fields, **(totals or {}))
        (grad,) = torch.autograd.grad(found[0], leaf)
        results.append((*found, grad))
    assert results[0][-1].abs().max() > 1e-4
    for expected, found in zip(*results, strict=True):
        assert (expected is None) == (found is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


TOTALS = {"dp_size": 2, "batch_num_tokens": 81.0, "global_batch_size": 12.0}


@pytest.mark.parametrize("totals", [None, TOTALS], ids=["local", "global"])
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("dual_clip", [None, 1.6])
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_policy_loss(theirs, kind: str, dual_clip, token_level: bool, totals):
    compare(
        theirs,
        totals,
        policy_loss_type=kind,
        dual_clip=dual_clip,
        token_level_loss=token_level,
        clip_eps_low=0.1,
        clip_eps_high=0.28,
    )


CORRECTIONS = [
    ("token", "mask", "ratio", (0.8, 1.3)),
    ("token", "clip", "ratio", (0.8, 1.3)),
    ("token", "mask", "binary_kl", (0.0, 0.02)),
    ("token", "mask", "tv", (0.0, 0.05)),
    ("seq", "mask", "ratio", (0.85, 1.15)),
    ("seq", "mask", "binary_kl", (0.0, 0.03)),
    ("seq", "mask", "tv", (0.0, 0.06)),
]


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: "-".join(c[:3]))
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_sampler_correction(theirs, kind: str, correction):
    names = ("level", "mode", "gating", "threshold")
    options = {f"is_correction_{n}": v for n, v in zip(names, correction, strict=True)}
    compare(theirs, policy_loss_type=kind, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"policy_loss_type": "reinforce"},
        {"is_correction_level": "word"},
        {"is_correction_mode": "clip", "is_correction_level": "seq"},
        {"is_correction_gating": "tv", "is_correction_level": "token"},
        {"dual_clip": 1.1},
    ],
    ids=str,
)
def test_what_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))[:13]):
        ours.PolicyLoss(**options)


@pytest.fixture(scope="module")
def actor(utils, tmp_path_factory):
    """An object with OpenRLHF's Actor.forward, its functions, and a tiny model."""
    from transformers import AutoModelForCausalLM

    tree = ast.parse((FOLDER / "models" / "actor.py").read_text(encoding="utf-8"))
    cls = next(node for node in tree.body if getattr(node, "name", "") == "Actor")
    method = next(node for node in cls.body if getattr(node, "name", "") == "forward")
    method.returns = None
    for argument in method.args.args:
        argument.annotation = None
    module = ModuleType("actor")
    module.__dict__.update(utils)
    exec(compile(ast.Module([method], []), "actor.py", "exec"), module.__dict__)
    folder = make_tiny_model(tmp_path_factory.mktemp("tiny"), tokenizer=False)
    kind = type("Actor", (), {"forward": module.forward})
    instance = kind()
    instance.model = AutoModelForCausalLM.from_pretrained(folder)
    instance.packing_samples, instance.temperature = False, 0.7
    return SimpleNamespace(module=module, kind=kind, instance=instance)


def test_actor_forward_without_logits(actor):
    ids = torch.randint(3, 40, (3, 10))
    attention = torch.ones_like(ids)
    attention[0, :3] = 0
    action_mask = torch.ones(3, 6, dtype=torch.long)
    action_mask[1, -2:] = 0
    model, original = actor.instance.model, actor.kind.forward
    upstream = torch.randn(2, 3, 6)

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        log_probs, output = actor.instance.forward(
            ids, action_mask, attention_mask=attention, return_output=True, return_entropy=True
        )
        entropy = output.entropy[:, -6:]
        (log_probs * upstream[0] + entropy * upstream[1] * action_mask).sum().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        return [log_probs.detach(), entropy.detach() * action_mask, *grads], output

    expected, output = run()
    assert output["logits"] is not None
    every = {"attention_mask": attention, "return_logprobs": True}
    expected.append(actor.instance.forward(ids, **every).detach())
    module = actor.module
    before = module.log_probs_from_logits, module.compute_entropy
    module.log_probs_from_logits = ours.log_probs_from_logits(before[0])
    module.compute_entropy = ours.compute_entropy(before[1])
    actor.kind.forward = ours.actor_forward(original)
    try:
        found, output = run()
        assert output["logits"] is None
        found.append(actor.instance.forward(ids, **every).detach())
        whole = actor.instance.forward(ids, attention_mask=attention, return_output=True)
        assert whole["logits"].shape == (3, 10, model.config.vocab_size)
        with pytest.raises(Unsupported, match="by name"):
            actor.instance.forward(ids, action_mask, attention)
    finally:
        module.log_probs_from_logits, module.compute_entropy = before
        actor.kind.forward = original
    assert "forward" not in vars(model.get_output_embeddings())
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_patch_points_are_where_we_know_them():
    assert contract.check("openrlhf", FOLDER) == []
