"""The start-up check: it finds what moved, names it, and imports nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from grpo_engine.integrations import contract
from grpo_engine.integrations.contract import HOSTS, Unsupported, check, findings, require

INSTALLED = [name for name, host in HOSTS.items() if host.folder and host.symbols]


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
    with pytest.raises(Unsupported, match="trl .* is not the .*_compute_loss: its code changed"):
        require("trl")
    require("trl", loss=False)  # the log-prob op alone does not care
    state = findings()["trl"]["state"]
    assert state.startswith("NO longer as in 1.16.0") and "_compute_loss: its code changed" in state


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
    names = ("contract", "liger", "openrlhf", "prime_rl", "pytorch", "skyrl", "slime", "trl")
    packages = {host.package for host in HOSTS.values()}
    code = (
        f"import sys\nfor n in {(*names, 'trl_head', 'trl_loss', 'verl')!r}:"
        " __import__('grpo_engine.integrations.' + n)\n"
        f"print(sorted({packages!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "[]", done.stderr


# ---- Hosts that cannot be installed here, against their documented signatures -------------------


def test_prime_rl_loss():
    """LossInputs of prime-rl 0.8; the expected sum is its documented example, clip and all."""
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
    with pytest.raises(Unsupported, match="divides by tokens"):
        sequence_loss(inputs, loss_type="grpo")
    with pytest.raises(Unsupported, match="beta=0.1 needs"):
        sequence_loss(inputs, beta=0.1)


@pytest.mark.parametrize("kind", ["grpo_engine", "grpo_engine_dual_clip"])
def test_skyrl_loss(kind: str):
    from grpo_engine.integrations.skyrl import policy_loss

    shape = (3, 8)
    old = -torch.rand(shape)
    log_probs = (old + 0.8 * torch.randn(shape)).requires_grad_()
    advantages, mask = torch.randn(shape) / 20, (torch.rand(shape) > 0.3).float()
    correction = SimpleNamespace(tis_ratio_type=None)
    config = SimpleNamespace(
        policy_loss_type=kind,
        eps_clip_low=0.1,
        eps_clip_high=0.28,
        clip_ratio_c=1.5,
        off_policy_correction=correction,
    )
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
    correction.tis_ratio_type = "token"
    with pytest.raises(Unsupported, match="tis_ratio_type='token'"):
        policy_loss(log_probs, old, advantages, config, mask, old)


@pytest.mark.parametrize("kl", [0.0, 0.05])
def test_slime_loss(monkeypatch, kl: float):
    """slime's documented custom loss: its reducer is a sum of masked means, its batch lists."""
    from grpo_engine.integrations import slime

    lengths = [4, 7, 3]
    masks = [torch.ones(n) for n in lengths]
    masks[1][2] = 0

    def reducer(x):
        parts = zip(x.split(lengths), masks, strict=True)
        return sum((part * mask).sum() / mask.sum() for part, mask in parts)

    def lists(scale: float) -> list[torch.Tensor]:
        return [scale * torch.randn(n) for n in lengths]

    logits = (0.3 * torch.randn(sum(lengths))).requires_grad_()  # stands for what slime makes of it
    batch = {"log_probs": lists(0.3), "ref_log_probs": lists(0.3), "advantages": lists(1.0)}
    batch |= dict.fromkeys(("unconcat_tokens", "total_lengths", "response_lengths"), lengths)
    megatron = SimpleNamespace(
        get_log_probs_and_entropy=lambda x, **_: (x[:0], {"log_probs": list(x.split(lengths))})
    )
    for name in ("slime", "slime.backends", "slime.backends.megatron_utils"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "slime.backends.megatron_utils.loss", megatron)
    args = SimpleNamespace(
        eps_clip=0.2,
        eps_clip_high=0.28,
        eps_clip_c=3.0,
        use_kl_loss=kl > 0,
        kl_loss_coef=kl,
        kl_loss_type="low_var_kl",
        entropy_coef=0.0,
        advantage_estimator="grpo",
    )
    names = ("log_probs", "ref_log_probs", "advantages")
    old, ref, advantages = (torch.cat(batch[name]) for name in names)
    ratio = (logits - old).exp()
    losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    losses = torch.where(advantages < 0, torch.min(-3.0 * advantages, losses), losses)
    expected = reducer(losses + kl * ((ref - logits).exp() - (ref - logits) - 1))
    loss, logged = slime.loss(args, batch, logits, reducer)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, logits)[0], rtol=1e-5, atol=1e-6)
    high, low = (ratio > 1.28) & (advantages > 0), (ratio < 0.8) & (advantages < 0)
    torch.testing.assert_close(logged["pg_clipfrac"], reducer((high | low).float()))
    for name, value in (("use_tis", True), ("entropy_coef", 0.1), ("advantage_estimator", "gspo")):
        with pytest.raises(Unsupported, match=name):
            changed = SimpleNamespace(**vars(args) | {name: value})
            slime.loss(changed, batch, logits, reducer)
