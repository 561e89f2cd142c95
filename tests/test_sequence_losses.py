"""vespo, the loss that weighs whole sequences by a gamma density's shape in their ratio: by hand,
its limits, and from hidden states in two phases. The comparisons that every loss goes through are
in test_grpo_loss.py, those with TRL in test_trl_parity.py."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import (
    OPTIONS,
    PATHS,
    assert_matches_reference,
    device_of_path,
    in_double,
    make_batch,
    run,
)

from grpo_engine.kernels.grpo_loss import grpo_loss, grpo_loss_ref, make_loss_options
from grpo_engine.kernels.linear_grpo import linear_grpo_loss, linear_grpo_loss_ref
from grpo_engine.kernels.loss_options import LossOptions


@pytest.fixture(params=PATHS)
def path_device(request: pytest.FixtureRequest) -> torch.device:
    return device_of_path(request.param)


def phi_of(ratio: float, adv: float, shape=(2.0, 3.0, 3.0, 2.0)) -> float:
    k, decay = shape[:2] if adv >= 0 else shape[2:]
    return math.exp(decay) * ratio**k * math.exp(-decay * ratio)


@pytest.mark.parametrize("adv", [1.5, -0.5])
@pytest.mark.parametrize("ratio", [0.2, 0.9, 1.0, 1.6, 4.0])
def test_one_sequence_by_hand(ratio: float, adv: float, path_device):
    """Three tokens whose ratios multiply to `ratio`: gradient -phi A / denominator for each."""
    x = torch.tensor([-1.0, -0.5, -2.0], device=path_device, requires_grad=True)
    steps = torch.tensor([2.0, -1.5, 0.5], device=path_device) * math.log(ratio)
    batch = {"logprobs": x, "old_logprobs": x.detach() - steps}
    advantages = torch.full((3,), adv, device=path_device)
    for fn in (grpo_loss, grpo_loss_ref):
        loss, metrics = fn(**batch, advantages=advantages, loss_type="vespo", denominator=6.0)
        (grad,) = torch.autograd.grad(loss, x)
        phi = phi_of(ratio, adv)
        torch.testing.assert_close(grad.tolist(), [-phi * adv / 6] * 3, rtol=1e-5, atol=0)
        assert loss.item() == pytest.approx(-phi * adv * -3.5 / 6, rel=1e-5)
        assert metrics.to_dict()["phi_mean"] == pytest.approx(phi, rel=1e-5)


def test_the_sum_of_the_log_ratios_counts_not_their_mean(path_device):
    """The same small drift per token damps a long sequence and leaves a short one be."""
    x = torch.zeros(42, device=path_device)
    cu_seqlens = torch.tensor([0, 2, 42], device=path_device)
    advantages = torch.ones(2, device=path_device)
    x.requires_grad_()
    loss, _ = grpo_loss(
        x, x.detach() - 0.05, advantages, cu_seqlens=cu_seqlens, loss_type="vespo", denominator=1
    )
    (grad,) = torch.autograd.grad(loss, x)
    short, long = -grad[0].item(), -grad[2].item()
    assert short == pytest.approx(phi_of(math.exp(0.1), 1.0), rel=1e-4)
    assert long == pytest.approx(phi_of(math.exp(2.0), 1.0), rel=1e-4)
    assert long < 1e-5 < 0.8 < short


def test_the_sampler_correction_completes_the_ratio(path_device):
    """Unbounded, pi / pi_old times pi_old / pi_sampler is pi / pi_sampler."""
    batch = make_batch(path_device)
    corrected = run(
        grpo_loss, batch, loss_type="vespo", is_correction="token_truncate", is_clip=(None, None)
    )
    direct = run(grpo_loss, batch | {"old_logprobs": batch["sampler_logprobs"]}, loss_type="vespo")
    torch.testing.assert_close(corrected[:3], direct[:3], rtol=1e-5, atol=1e-7)
    uncorrected = run(grpo_loss, batch, loss_type="vespo")
    assert (corrected[1] - uncorrected[1]).abs().max() > 0.01 * uncorrected[1].abs().max()


def test_a_masked_sampler_token_puts_out_its_sequence(path_device):
    """token_mask makes c = 0, bounded at 1e-8: phi is 0 for that sequence and no other."""
    x = torch.zeros(4, device=path_device, requires_grad=True)
    sampler = torch.tensor([0.0, -5.0, 0.0, 0.0], device=path_device)
    options = {"loss_type": "vespo", "is_correction": "token_mask", "is_clip": (0.5, 2.0)}
    loss, metrics = grpo_loss(
        x,
        x.detach(),
        torch.ones(2, device=path_device),
        cu_seqlens=torch.tensor([0, 2, 4], device=path_device),
        sampler_logprobs=sampler,
        **options,
    )
    (grad,) = torch.autograd.grad(loss, x)
    assert grad[:2].abs().max() < 1e-12
    torch.testing.assert_close(grad[2:].tolist(), [-0.25, -0.25])
    means = metrics.to_dict()
    assert means["is_truncated"] == 0.25 and means["phi_mean"] == pytest.approx(0.5)


def test_advantages_of_both_signs_in_one_sequence(path_device):
    """k and lambda go by the token's own advantage, 0 among the positive."""
    ratio = 1.4
    x = torch.zeros(3, device=path_device, requires_grad=True)
    old = torch.tensor([-math.log(ratio), 0.0, 0.0], device=path_device)
    advantages = torch.tensor([1.0, -1.0, 0.0], device=path_device)
    loss, metrics = grpo_loss(x, old, advantages, loss_type="vespo", denominator=1.0)
    (grad,) = torch.autograd.grad(loss, x)
    expected = [-phi_of(ratio, 1.0), phi_of(ratio, -1.0), 0.0]
    torch.testing.assert_close(grad.tolist(), expected, rtol=1e-5, atol=1e-7)
    phis = [phi_of(ratio, adv) for adv in (1.0, -1.0, 0.0)]
    assert metrics.to_dict()["phi_mean"] == pytest.approx(sum(phis) / 3, rel=1e-5)


def test_on_policy_it_is_the_policy_gradient_of_dapo(path_device):
    batch = make_batch(path_device) | {"old_logprobs": None}
    ours = run(grpo_loss, batch, loss_type="vespo", beta=0.2)
    dapo = run(grpo_loss, batch, loss_type="dapo", beta=0.2)
    torch.testing.assert_close(ours[1], dapo[1], rtol=1e-6, atol=1e-9)
    assert ours[3].to_dict()["phi_mean"] == 1


@pytest.mark.parametrize("total", [-1e4, -100.0, 100.0, 1e4])
def test_a_ratio_beyond_every_bound_gives_no_gradient_and_no_nan(total: float, path_device):
    batch = make_batch(path_device, lengths=(60,)) | {"loss_mask": None}
    batch["old_logprobs"] = batch["logprobs"].detach() - total / 60
    loss, grad, _, metrics = run(grpo_loss, batch, loss_type="vespo")
    assert torch.isfinite(loss) and grad.abs().max() < 1e-13
    assert 0 <= metrics.to_dict()["phi_mean"] < 1e-13
    assert_matches_reference(batch, loss_type="vespo")


def test_a_token_counts_for_at_most_20_either_way(path_device):
    """30 and -40 cancel: W = 1; uncut they would leave e^-10."""
    x = torch.full((2,), -1.0, device=path_device, requires_grad=True)
    old = x.detach() - torch.tensor([30.0, -40.0], device=path_device)
    advantages = torch.ones(2, device=path_device)
    for fn in (grpo_loss, grpo_loss_ref):
        loss, metrics = fn(x, old, advantages, loss_type="vespo")
        (grad,) = torch.autograd.grad(loss, x)
        assert grad.tolist() == [-0.5, -0.5] and metrics["phi_mean"] == 1


def test_gradcheck_of_the_reference_where_the_weight_stands_still():
    """phi is held constant, so the loss's derivative is its gradient only where phi has none: with
    every log-ratio beyond the bound of 20. Pairs of +20 and -20 leave W = 1, phi = 1."""
    x = -torch.rand(6, dtype=torch.float64)
    far = torch.tensor([30.0, -30.0, 25.0, -40.0, -21.0, 22.0], dtype=torch.float64)
    fixed = {
        "old_logprobs": x + far,
        "advantages": torch.randn(6, dtype=torch.float64),
        "ref_logprobs": x + 0.1 * torch.randn(6, dtype=torch.float64),
        "loss_mask": torch.ones(6),
    }

    def loss(logprobs):
        return grpo_loss_ref(logprobs, **fixed, loss_type="vespo", beta=0.3)[0]

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(),), eps=1e-7, atol=1e-6)
    (grad,) = torch.autograd.grad(loss(x), x)
    gap = fixed["ref_logprobs"] - x.detach()
    torch.testing.assert_close(grad, (-fixed["advantages"] + 0.3 * (1 - gap.exp())) / 6)


@pytest.mark.parametrize("name", ["vespo", "vespo-is-mask-kl"])
def test_the_reference_holds_the_weight_constant(name: str):
    """The gradient is that of -phi A x with phi's number put in."""
    batch = in_double(make_batch(torch.device("cpu"), lengths=(3, 5, 2)))
    batch["loss_mask"] = None
    options = OPTIONS[name] | {"beta": 0.0, "entropy_coef": 0.0, "denominator": 1.0}
    x, adv = batch["logprobs"].detach(), batch["advantages"]
    difference = (batch["old_logprobs"] - batch["sampler_logprobs"]).exp()
    kept = difference.where((difference >= 0.8) & (difference <= 1.2), 1e-8)
    log_ratio = x - batch["old_logprobs"] + (kept.log() if "mask" in name else 0)
    expected = torch.zeros_like(x)
    for start, end in ((0, 3), (3, 8), (8, 10)):
        ratio = math.exp(max(log_ratio[start:end].sum().item(), math.log(1e-8)))
        for t in range(start, end):
            expected[t] = -phi_of(ratio, adv[t].item()) * adv[t]
    grad = run(grpo_loss_ref, batch, **options)[1]
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("name", ["vespo", "vespo-is-mask-kl", "vespo-shape"])
@pytest.mark.parametrize("is_on_policy", [False, True])
def test_from_hidden_states(name: str, is_on_policy: bool, path_device):
    """linear_grpo_loss runs it in two phases: a chunk of rows does not see its sequence's ratio."""
    n, d, v = 44, 8, 23
    batch = make_batch(path_device)
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn(n, d, generator=g).to(path_device).requires_grad_()
    weight = torch.randn(v, d, generator=g).to(path_device).requires_grad_()
    ids = torch.randint(v, (n,), generator=g).to(path_device)
    with torch.no_grad():
        x = linear_grpo_loss_ref(hidden, weight, ids, None, batch["advantages"])[2]
    near = x + 0.2 * torch.randn(3, n, generator=g).to(path_device)
    fields = {
        "hidden": hidden,
        "weight": weight,
        "old_logprobs": None if is_on_policy else near[0],
        "sampler_logprobs": near[0] + 0.3 * (near[1] - x),
        "ref_logprobs": near[2],
        "advantages": batch["advantages"],
    }
    rest = {k: batch[k] for k in ("cu_seqlens", "loss_mask")} | {"token_ids": ids}
    got = linear_grpo_loss(**fields, **rest, **OPTIONS[name])
    double = in_double(fields)
    truth = linear_grpo_loss_ref(**double, **rest, **OPTIONS[name])
    torch.testing.assert_close(got[0].double(), truth[0], rtol=1e-5, atol=1e-6)
    for ours, expected in zip(
        torch.autograd.grad(got[0], (hidden, weight)),
        torch.autograd.grad(truth[0], (double["hidden"], double["weight"])),
        strict=True,
    ):
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5 * scale)
    assert got[1].names == truth[1].names and "phi_mean" in got[1].names
    torch.testing.assert_close(got[1].to_dict(), truth[1].to_dict(), rtol=1e-4, atol=1e-5)


def test_options_survive_the_operator_schema():
    options = make_loss_options(
        loss_type="vespo",
        vespo_k_pos=0.5,
        vespo_lambda_pos=0.25,
        vespo_k_neg=1.5,
        vespo_lambda_neg=4.0,
        sapo_temperature_pos=0.75,
        max_completion_length=9,
    )
    assert LossOptions.from_op_arguments(*options.op_arguments()) == options
    assert options.needs_sequence_pass


def test_the_largest_weight_is_a_number(path_device):
    """At the limit that the options allow, the peak of phi is e^80 and still finite."""
    decay = 0.01  # phi peaks at k / decay; the option's limit is found by halving
    low, high = 1.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        try:
            make_loss_options(vespo_k_pos=middle, vespo_lambda_pos=decay)
            low = middle
        except ValueError:
            high = middle
    assert 5 < low < 50
    x = torch.zeros(1, device=path_device, requires_grad=True)
    old = -torch.tensor([low / decay], device=path_device).log()
    options = {"loss_type": "vespo", "vespo_k_pos": low, "vespo_lambda_pos": decay}
    loss, metrics = grpo_loss(x, old, torch.full((1,), 100.0, device=path_device), **options)
    (grad,) = torch.autograd.grad(loss, x)
    assert torch.isfinite(grad).all()
    assert metrics["phi_mean"].log().item() == pytest.approx(80, abs=0.01)
