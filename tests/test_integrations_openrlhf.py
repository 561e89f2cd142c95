"""The OpenRLHF integration against OpenRLHF's own code.

Its package imports flash-attn, which a machine without a GPU cannot build. So ``models/loss.py`` is
loaded by path from the installed wheel, and ``Actor.forward`` is compiled from its source:

    pip install --no-deps 'openrlhf>=0.11'      # or OPENRLHF_FOLDER=the wheel's folder openrlhf/
"""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, nullcontext
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
    kind = type("Actor", (torch.nn.Module,), {"forward": module.forward})
    instance = kind()
    instance.model = AutoModelForCausalLM.from_pretrained(folder)
    instance.packing_samples, instance.temperature = False, 0.7
    return SimpleNamespace(module=module, kind=kind, instance=instance)


@contextmanager
def patched(actor):
    """Actor.forward and its two functions as ``patch_openrlhf`` leaves them."""
    module, original = actor.module, actor.kind.forward
    before = module.log_probs_from_logits, module.compute_entropy
    module.log_probs_from_logits = ours.log_probs_from_logits(before[0])
    module.compute_entropy = ours.compute_entropy(before[1])
    actor.kind.forward = ours.actor_forward(original)
    try:
        yield
    finally:
        module.log_probs_from_logits, module.compute_entropy = before
        actor.kind.forward = original


def actor_calls() -> list[ast.Call]:
    """Where OpenRLHF's PPO calls an Actor: to train it, and to score with it and the reference."""
    found = []
    for file, cls, name in (
        ("ppo_actor.py", "ActorPPOTrainer", "self.actor"),
        ("ppo_actor.py", "PolicyModelActor", "self.actor"),
        ("launcher.py", "ReferenceModelActor", "self.model"),
    ):
        tree = ast.parse((FOLDER / "trainer" / "ray" / file).read_text(encoding="utf-8"))
        body = next(node for node in tree.body if getattr(node, "name", "") == cls)
        calls = [n for n in ast.walk(body) if isinstance(n, ast.Call) and len(n.args) >= 2]
        found += [call for call in calls if ast.unparse(call.func) == name]
    return found


def test_actor_forward_as_openrlhf_calls_it(actor):
    """With its own mix of arguments by position and by name."""
    values = {
        "sequences": torch.randint(3, 40, (3, 10)),
        "action_mask": torch.ones(3, 6, dtype=torch.long),
        "attention_mask": torch.ones(3, 10, dtype=torch.long),
        "return_output": True,
        "return_entropy": True,
    }
    calls = actor_calls()
    assert len(calls) == 3
    for call in calls:
        names = [ast.unparse(a).removesuffix(".to(device)") for a in call.args]
        args = [values[name] for name in names]
        named = {k.arg: values.get(k.arg) for k in call.keywords if k.arg is not None}
        results = []
        for side in (nullcontext, lambda: patched(actor)):
            with side(), torch.no_grad():
                found = actor.instance(*args, **named)
            results.append(found[0] if named.get("return_output") else found)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_hook_on_the_head_stays(actor):
    """accelerate puts its hooks where the stand-in goes, on the instance."""
    head = actor.instance.model.get_output_embeddings()

    def hooked(hidden):
        return functional.linear(hidden, head.weight)

    head.forward = hooked
    try:
        with patched(actor):
            ids = torch.randint(3, 40, (2, 5))
            actor.instance(ids, torch.ones(2, 3), attention_mask=torch.ones_like(ids))
        assert head.forward is hooked
    finally:
        del head.forward


def test_actor_forward_without_logits(actor):
    ids = torch.randint(3, 40, (3, 10))
    attention = torch.ones_like(ids)
    attention[0, :3] = 0
    action_mask = torch.ones(3, 6, dtype=torch.long)
    action_mask[1, -2:] = 0
    model = actor.instance.model
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
    with patched(actor):
        found, output = run()
        assert output["logits"] is None
        found.append(actor.instance.forward(ids, **every).detach())
        whole = actor.instance.forward(ids, attention_mask=attention, return_output=True)
        assert whole["logits"].shape == (3, 10, model.config.vocab_size)
    assert "forward" not in vars(model.get_output_embeddings())
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_head_with_an_adapter_is_refused(actor):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(
        actor.instance.model, peft.LoraConfig(target_modules=["lm_head"], r=2)
    )
    ids = torch.randint(3, 40, (2, 5))
    instance = actor.kind()
    instance.model, instance.packing_samples, instance.temperature = wrapped, False, 1.0
    try:
        with patched(actor), pytest.raises(Unsupported, match="the head is a Linear, not"):
            instance(ids, torch.ones(2, 3), attention_mask=torch.ones_like(ids))
    finally:
        wrapped.unload()


def test_the_patch_points_are_where_we_know_them():
    assert contract.check("openrlhf", FOLDER) == []


# ---- The patch as a whole ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """OpenRLHF's loss, functions, Actor.forward and the trainer's imports in a package of that name
    that needs neither flash-attn nor DeepSpeed. Returns the folder for sys.path."""
    root = tmp_path_factory.mktemp("site")
    models, trainer = root / "openrlhf" / "models", root / "openrlhf" / "trainer" / "ray"
    for folder in (models, trainer):
        folder.mkdir(parents=True)
    for folder in (root / "openrlhf", trainer.parent, trainer):
        (folder / "__init__.py").touch()
    shutil.copy(FOLDER / "models" / "loss.py", models)
    head = "import torch\nimport torch.nn.functional as F\nimport torch.distributed as dist\n"
    head += "from typing import Optional\n"
    functions = ("log_probs_from_logits", "compute_entropy", "masked_mean", "_logsumexp_by_chunk")
    source = (FOLDER / "models" / "utils.py").read_text(encoding="utf-8")
    nodes = [n for n in ast.parse(source).body if getattr(n, "name", "") in functions]
    (models / "utils.py").write_text(head + "\n".join(ast.unparse(node) for node in nodes))
    source = (FOLDER / "models" / "actor.py").read_text(encoding="utf-8")
    cls = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "Actor")
    method = next(n for n in cls.body if getattr(n, "name", "") == "forward")
    lines = "\n".join(source.splitlines()[method.lineno - 1 : method.end_lineno])
    uses = "from .utils import compute_entropy, log_probs_from_logits\n"
    (models / "actor.py").write_text(f"{head}{uses}class Actor:\n{lines}\n")
    (models / "__init__.py").write_text(
        "from .actor import Actor\nfrom .loss import PolicyLoss, aggregate_loss\n"
    )
    source = (FOLDER / "trainer" / "ray" / "ppo_actor.py").read_text(encoding="utf-8")
    line = next(x for x in source.splitlines() if x.startswith("from openrlhf.models import"))
    (trainer / "ppo_actor.py").write_text(
        f"{line}\nclass Trainer:\n    def __init__(self):\n"
        "        self.actor_loss_fn = PolicyLoss()\n"
    )
    return root


WHOLE_PATCH = """
import sys
from grpo_engine.integrations import openrlhf as ours
if sys.argv[1] == "before":
    ours.patch_openrlhf(), ours.patch_openrlhf()
    assert not [name for name in sys.modules if name.split(".")[0] == "openrlhf"]
from openrlhf.trainer.ray import ppo_actor
import openrlhf.models as models
if sys.argv[1] == "after":
    ours.patch_openrlhf(), ours.patch_openrlhf()
assert type(ppo_actor.Trainer().actor_loss_fn) is ours.PolicyLoss
assert models.PolicyLoss is ours.PolicyLoss
assert models.Actor.forward.__module__ == "openrlhf.models.actor"
assert hasattr(models.Actor.forward, "__wrapped__")
assert models.actor.compute_entropy.__module__ == ours.__name__
ours.unpatch_openrlhf()
assert type(ppo_actor.Trainer().actor_loss_fn).__module__ == "openrlhf.models.loss"
assert models.PolicyLoss is models.loss.PolicyLoss is ppo_actor.PolicyLoss
assert not hasattr(models.Actor.forward, "__wrapped__")
assert models.actor.compute_entropy is models.utils.compute_entropy
assert not [finder for finder in sys.meta_path if type(finder).__module__ == ours.__name__]
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_patch_before_and_after_openrlhf_is_imported(package, when: str):
    """Before: nothing is imported by the patch itself. As a Ray worker's set-up hook it runs before
    the worker knows its GPU, and DeepSpeed looks for GPUs when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", WHOLE_PATCH, when],
        capture_output=True,
        text=True,
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(package)},
    )
    assert done.returncode == 0, done.stderr
