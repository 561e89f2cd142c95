"""The start-up check: it finds what moved, names it, and imports nothing."""

from __future__ import annotations
import __future__

import ast
import functools
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from grpo_engine.integrations import contract
from grpo_engine.integrations.contract import HOSTS, Unsupported, check, findings, require

INSTALLED = [name for name, host in HOSTS.items() if host.folder]


@pytest.mark.parametrize("name", INSTALLED)
def test_every_patch_point_of_an_installed_host_is_in_its_place(name: str):
    assert check(name) == []
    require(name)
    assert findings()[name]["version"] == HOSTS[name].version
    assert findings()[name]["state"].startswith("every patch point")


@pytest.mark.skipif("trl" not in INSTALLED, reason="trl is not installed")
def test_a_moved_symbol_is_named(tmp_path, monkeypatch):
    for symbol in HOSTS["trl"].symbols:
        target = tmp_path / symbol.file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HOSTS["trl"].folder / symbol.file, target)
    utils, trainer = tmp_path / "trainer/utils.py", tmp_path / "trainer/grpo_trainer.py"
    utils.write_text(utils.read_text().replace("    temperature: float = 1.0,\n", ""))
    code = trainer.read_text()
    trainer.write_text(code.replace('elif self.loss_type == "luspo"', 'elif False and "luspo"'))
    assert "luspo" in code
    head, loss = check("trl", tmp_path)
    assert head.startswith("trl.trainer.utils.add_fused_lm_head: its parameters are model, cast")
    assert loss == "trl.trainer.grpo_trainer.GRPOTrainer._compute_loss: its code changed"
    (tmp_path / "kernels/chunked_logprob.py").unlink()
    assert (
        "chunked_logprob.ChunkedLogProbFunction.forward: no such file" in check("trl", tmp_path)[0]
    )

    monkeypatch.setattr(contract, "check", lambda name: [loss])
    said = r"trl .* is not the .*_compute_loss: its code changed \(patch_trl\(loss=False\) does"
    with pytest.raises(Unsupported, match=said):
        require("trl")
    require("trl", loss=False)  # the log-prob op alone does not care
    state = findings()["trl"]["state"]
    assert state.startswith("NO longer as in 1.16.0") and "_compute_loss: its code changed" in state


def test_a_host_that_was_never_installed_by_pip_is_found(tmp_path, monkeypatch):
    """slime and prime-rl are run from a checkout on sys.path."""
    for package, file, code in (
        (
            "slime",
            "backends/megatron_utils/loss.py",
            "def policy_loss_function(args, batch, logits, sum_of_sample_mean): ...\n"
            "def get_log_probs_and_entropy(logits, *, args, unconcat_tokens, total_lengths,"
            " response_lengths, with_entropy=False, non_loss_data=True): ...\n",
        ),
        (
            "prime_rl",
            "trainer/rl/loss.py",
            "class LossInputs:\n    trainer_logprobs: int\n    inference_logprobs: int\n"
            "    ref_logprobs: int\n    advantages: int\n    loss_mask: int\n"
            "class LossOutputs:\n    loss: int\n    metrics: dict\n",
        ),
    ):
        path = tmp_path / package / file
        path.parent.mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
        path.write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    found = findings()
    assert found["slime"]["state"].startswith("every patch point is as in git of 2026-08-21")
    assert found["slime"]["version"] == "unknown"
    moved = "prime_rl.trainer.rl.loss.LossInputs: 'loss_weights:' is gone"
    assert found["prime-rl"]["state"].startswith("NO longer as in 0.8.0")
    assert found["prime-rl"]["state"].endswith(moved)


@pytest.mark.parametrize(
    ("use", "install"),
    [
        ("from grpo_engine.integrations.trl import GRPOTrainer", "grpo-engine[trl]"),
        ("from grpo_engine.integrations.trl import patch_trl as f; f()", "grpo-engine[trl]"),
        ("from grpo_engine.integrations.verl import register as f; f()", "grpo-engine[verl]"),
        (
            "from grpo_engine.integrations.openrlhf import patch_openrlhf as f; f()",
            "grpo-engine[openrlhf]",
        ),
        ("from grpo_engine.integrations.skyrl import register as f; f()", "grpo-engine[skyrl]"),
    ],
)
def test_an_absent_host_says_what_to_install(monkeypatch, use: str, install: str):
    monkeypatch.setattr(contract.importlib.util, "find_spec", lambda name: None)
    sys.modules.get("grpo_engine.integrations.trl", SimpleNamespace()).__dict__.pop(
        "GRPOTrainer", None
    )
    with pytest.raises(ImportError, match="is not installed: ") as caught:
        exec(use, {})
    assert install in str(caught.value)


def test_importing_every_integration_imports_no_host():
    """All but verl's plug-in, which verl imports."""
    folder = Path(contract.__file__).parent
    names = sorted({path.stem for path in folder.glob("*.py")} - {"__init__", "verl_plugin"})
    packages = {host.package for host in HOSTS.values()} | {"accelerate", "peft", "ray"}
    code = (
        f"import sys\nfor n in {names!r}: __import__('grpo_engine.integrations.' + n)\n"
        f"print(sorted({packages!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "[]", done.stderr


# ---- Hosts that cannot be installed here, against their documented signatures -------------------


def test_prime_rl_loss(monkeypatch):
    """LossInputs of prime-rl 0.8; the expected sum is its documented example, clip and all."""
    from grpo_engine.integrations.prime_rl import loss as loss_of_inputs
    from grpo_engine.integrations.prime_rl import sequence_loss

    n = 9
    inputs = SimpleNamespace(
        trainer_logprobs=(-torch.rand(n)).requires_grad_(),
        inference_logprobs=-torch.rand(n),
        ref_logprobs=None,
        advantages=torch.randn(n),
        loss_mask=torch.rand(n) > 0.3,
        loss_weights=torch.rand(n),
    )
    ratio = (inputs.trainer_logprobs - inputs.inference_logprobs).exp()
    terms = torch.min(ratio * inputs.advantages, ratio.clamp(0.8, 1.2) * inputs.advantages)
    expected = -(terms * inputs.loss_weights)[inputs.loss_mask].sum()
    loss, metrics = sequence_loss(inputs, epsilon=0.2)
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, inputs.trainer_logprobs)
    (expected_grad,) = torch.autograd.grad(expected, inputs.trainer_logprobs)
    torch.testing.assert_close(grad, expected_grad)
    assert metrics["tokens"] > 0
    prime_rl = ModuleType("prime_rl.trainer.rl.loss")
    prime_rl.LossOutputs = SimpleNamespace
    for name in ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, prime_rl.__name__, prime_rl)
    outputs = loss_of_inputs(inputs, epsilon=0.2)
    assert torch.equal(outputs.loss, loss)
    assert set(outputs.metrics) >= {"clip_region", "ratio_mean"}
    assert all(value.ndim == 0 for value in outputs.metrics.values())
    with pytest.raises(Unsupported, match="divides by tokens"):
        sequence_loss(inputs, loss_type="grpo")
    with pytest.raises(Unsupported, match="beta=0.1 needs"):
        sequence_loss(inputs, beta=0.1)


def skyrl_case(clip_ratio_c: float = 1.5) -> tuple[dict, SimpleNamespace]:
    shape = (3, 8)
    old = -torch.rand(shape)
    inputs = {
        "log_probs": old + 0.8 * torch.randn(shape),
        "old_log_probs": old,
        "advantages": torch.randn(shape) / 20,
        "loss_mask": (torch.rand(shape) > 0.3).float(),
    }
    inputs["loss_mask"][2] = 0
    config = SimpleNamespace(
        policy_loss_type="regular",  # what a call's own loss_fn overrides
        eps_clip_low=0.1,
        eps_clip_high=0.28,
        clip_ratio_c=clip_ratio_c,
        off_policy_correction=SimpleNamespace(tis_ratio_type=None),
    )
    return inputs, config


@pytest.fixture
def skyrl_registry(monkeypatch):
    """SkyRL's registry, compiled from its file: its imports want Ray."""
    folder = HOSTS["skyrl"].folder
    if folder is None:
        pytest.skip("skyrl is not installed")
    path = folder / "backends/skyrl_train/utils/ppo_utils.py"
    names = {"BaseFunctionRegistry", "PolicyLossRegistry", "register_policy_loss"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if getattr(node, "name", "") in names]
    module = ModuleType("skyrl.backends.skyrl_train.utils.ppo_utils")
    module.__dict__.update(
        ray=SimpleNamespace(is_initialized=lambda: False),
        StrEnum=type("StrEnum", (str,), {}),
        wraps=functools.wraps,
    )
    flags = __future__.annotations.compiler_flag
    exec(compile(tree, str(path), "exec", flags), module.__dict__)
    for name in ("skyrl", "skyrl.backends", "skyrl.backends.skyrl_train"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["skyrl"].__spec__ = SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setitem(sys.modules, "skyrl.backends.skyrl_train.utils", ModuleType("utils"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.PolicyLossRegistry


@pytest.mark.parametrize("kind", ["grpo_engine", "grpo_engine_dual_clip"])
def test_skyrl_loss(skyrl_registry, kind: str):
    from grpo_engine.integrations.skyrl import register

    register(), register()
    assert set(skyrl_registry.list_available()) == {"grpo_engine", "grpo_engine_dual_clip"}
    policy_loss = skyrl_registry.get(kind)
    inputs, config = skyrl_case()
    log_probs, old, advantages, mask = inputs.values()
    log_probs.requires_grad_()
    ratio = (log_probs - old).clamp(-20, 20).exp()
    bounded = ratio.clamp(0.9, 1.28) * advantages
    losses = -torch.min(ratio * advantages, bounded)
    clipped = (-bounded > -ratio * advantages).float()
    if kind.endswith("dual_clip"):
        losses = torch.where(advantages < 0, torch.min(-1.5 * advantages, losses), losses)
    expected = (losses * mask).sum()
    loss, metrics = policy_loss(log_probs, old, advantages, config, mask, old)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    (grad,) = torch.autograd.grad(loss, log_probs)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, log_probs)[0])
    assert metrics == {"clip_ratio": pytest.approx(((clipped * mask).sum() / mask.sum()).item())}


@pytest.mark.parametrize(
    ("name", "value"), [("tis_ratio_type", "token"), ("outlier_token_is_threshold_low", 0.0)]
)
def test_skyrl_corrections_are_refused(name: str, value):
    from grpo_engine.integrations.skyrl import policy_loss

    inputs, config = skyrl_case()
    setattr(config.off_policy_correction, name, value)
    policy_loss(**inputs, config=config)  # SkyRL looks at them only with the sampler's
    with pytest.raises(Unsupported, match=f"off_policy_correction.{name}={value!r}"):
        policy_loss(**inputs, config=config, rollout_logprobs=inputs["old_log_probs"])


def test_skyrl_dual_clip_inside_the_clip_is_refused():
    from grpo_engine.integrations.skyrl import policy_loss

    inputs, config = skyrl_case(clip_ratio_c=1.2)
    policy_loss(**inputs, config=config)
    with pytest.raises(Unsupported, match="clip_ratio_c=1.2 must be >= 1 \\+ eps_clip_high"):
        policy_loss(**inputs, config=config, dual_clip=True)


# slime's documented custom loss: its reducer is a sum of masked means, its batch lists.
LENGTHS = [4, 7, 3]


def slime_reducer(x: torch.Tensor) -> torch.Tensor:
    masks = [torch.ones(n) for n in LENGTHS]
    masks[1][2] = 0
    parts = zip(x.split(LENGTHS), masks, strict=True)
    return sum((part * mask).sum() / mask.sum() for part, mask in parts)


def slime_batch() -> dict:
    names = ("log_probs", "ref_log_probs", "advantages")
    batch = {name: [torch.randn(n) for n in LENGTHS] for name in names}
    batch["log_probs"] = [0.3 * x for x in batch["log_probs"]]
    batch["ref_log_probs"][0][:2] = torch.tensor([4.0, -15.0])  # beyond low_var_kl's bound
    return batch | dict.fromkeys(("unconcat_tokens", "total_lengths", "response_lengths"), LENGTHS)


def slime_args(**changed) -> SimpleNamespace:
    options = {
        "eps_clip": 0.2,
        "eps_clip_high": 0.28,
        "eps_clip_c": 3.0,
        "use_kl_loss": True,
        "kl_loss_coef": 0.05,
        "kl_loss_type": "low_var_kl",
        "entropy_coef": 0.0,
        "advantage_estimator": "grpo",
    }
    return SimpleNamespace(**options | changed)


def put_slime(monkeypatch, get_log_probs_and_entropy, **more) -> None:
    """slime's loss module, of which ours takes these functions."""
    name = "slime.backends.megatron_utils"
    for part in ("slime", "slime.backends", name, f"{name}.loss"):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    found = {"get_log_probs_and_entropy": get_log_probs_and_entropy} | more
    sys.modules[f"{name}.loss"].__dict__.update(found)
    sys.modules[name].loss = sys.modules[f"{name}.loss"]


def slime_log_probs(
    logits, *, args, unconcat_tokens, total_lengths, response_lengths, with_entropy
):
    """With slime's signature; ``logits`` stands for what it makes of them."""
    assert not with_entropy
    return logits[:0], {"log_probs": list(logits.split(response_lengths))}


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("kl", [None, "k1", "k3", "low_var_kl"])
def test_slime_loss(monkeypatch, kl: str | None, on_policy: bool):
    from grpo_engine.integrations import slime

    put_slime(monkeypatch, slime_log_probs)
    logits, batch = (0.3 * torch.randn(sum(LENGTHS))).requires_grad_(), slime_batch()
    args = slime_args(use_kl_loss=kl is not None, kl_loss_type=kl)
    ref, advantages = torch.cat(batch["ref_log_probs"]), torch.cat(batch["advantages"])
    old = logits.detach() if on_policy else torch.cat(batch["log_probs"])
    if on_policy:  # slime leaves the pass out
        del batch["log_probs"]
    ratio = (logits - old).exp()
    losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    losses = torch.where(advantages < 0, torch.min(-3.0 * advantages, losses), losses)
    gap = ref - logits
    terms = {"k1": -gap, "k3": gap.exp() - gap - 1}
    terms["low_var_kl"] = terms["k3"].clamp(-10, 10)
    assert (terms["k3"] > 10).sum() == 2
    expected = slime_reducer(losses + (0.05 * terms[kl] if kl else 0.0))
    loss, logged = slime.loss(args, batch, logits, slime_reducer)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, logits)[0], rtol=1e-5, atol=1e-6)
    high, low = (ratio > 1.28) & (advantages > 0), (ratio < 0.8) & (advantages < 0)
    torch.testing.assert_close(logged["pg_clipfrac"], slime_reducer((high | low).float()))
    assert set(logged) == {"loss", "pg_clipfrac"} | ({"kl_loss"} if kl else set())
    if kl:
        torch.testing.assert_close(logged["kl_loss"], slime_reducer(terms[kl]).detach())


def test_slime_log_probs_of_its_releases(monkeypatch):
    """The older one takes max_seq_lens where the batch has it; the newer replays top-p sets."""
    from grpo_engine.integrations import slime

    logits, batch, seen = torch.randn(sum(LENGTHS)), slime_batch(), []

    def older(logits, *, max_seq_lens=None, **named):
        seen.append(max_seq_lens)
        return slime_log_probs(logits, **named)[1]

    def newer(logits, *, top_p_token_ids=None, **named):
        seen.append(top_p_token_ids)
        return slime_log_probs(logits, **named)

    def replayed(args, batch):
        return {} if args.rollout_top_p == 1.0 else {"top_p_token_ids": batch["kept"]}

    put_slime(monkeypatch, older)
    slime.loss(slime_args(), batch | {"max_seq_lens": [9, 9, 9]}, logits, slime_reducer)
    put_slime(monkeypatch, newer, get_rollout_top_p_logprob_kwargs=replayed)
    for top_p in (1.0, 0.9):
        args = slime_args(rollout_top_p=top_p)
        slime.loss(args, batch | {"kept": [[1]]}, logits, slime_reducer)
    assert seen == [[9, 9, 9], None, [[1]]]


def test_slime_without_a_response_on_this_rank(monkeypatch):
    from grpo_engine.integrations import slime

    def none(logits, **_):
        return logits[:0], {"log_probs": [logits[0, :0, 0]]}

    put_slime(monkeypatch, none)
    logits = torch.randn(1, 4, 8, requires_grad=True)
    loss, logged = slime.loss(slime_args(), slime_batch(), logits, slime_reducer)
    loss.backward()
    assert loss == 0 and not logits.grad.any()
    assert set(logged) == {"loss", "pg_clipfrac", "kl_loss"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_tis", True),
        ("entropy_coef", 0.1),
        ("advantage_estimator", "gspo"),
        ("use_score_centering", True),
        ("pg_loss_type", "reinforce"),
        ("kl_loss_type", "k4"),
        ("eps_clip_c", 1.1),
    ],
)
def test_what_slime_asks_beyond_is_refused(monkeypatch, name: str, value):
    from grpo_engine.integrations import slime

    put_slime(monkeypatch, slime_log_probs)
    with pytest.raises(Unsupported, match=f"{name}={value!r}"):
        slime.loss(
            slime_args(**{name: value}), slime_batch(), torch.randn(sum(LENGTHS)), slime_reducer
        )
