"""grpo_loss: explicit gradients against the autograd specification, invariances, limits and bad
input.

Tests with a `path` parameter run on the portable CPU path, and on the Triton kernels where there is
a GPU or TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
import random

import pytest
import torch

from grpo_engine.kernels.common import interpreting
from grpo_engine.kernels.grpo_loss import (
    METRICS,
    LossMetrics,
    _grpo_loss_op,
    grpo_loss,
    grpo_loss_ref,
    loss_and_grad,
    make_loss_options,
    token_weights,
)

PATHS = ["portable", pytest.param("triton", marks=pytest.mark.triton)]
FIELDS = ("logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs", "entropy")

# One line per formula and per option; each is checked for value, gradients and metrics.
OPTIONS = {
    "grpo": {},
    "grpo-clip-higher": {"epsilon": 0.1, "epsilon_high": 0.28},
    "grpo-r1": {"epsilon": 10.0, "beta": 0.001},
    "grpo-delta": {"delta": 1.5},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 30},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "bnpo": {"loss_type": "bnpo"},
    "luspo": {"loss_type": "luspo", "importance_level": "sequence", "epsilon": 0.03},
    "luspo-token": {"loss_type": "luspo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "sapo": {"loss_type": "sapo"},
    "sapo-temperatures": {
        "loss_type": "sapo",
        "sapo_temperature_pos": 0.7,
        "sapo_temperature_neg": 2.0,
    },
    "gspo": {"loss_type": "gspo", "epsilon": 0.03},
    "sequence-dapo": {"loss_type": "dapo", "importance_level": "sequence", "epsilon": 0.03},
    "sequence-cispo": {"loss_type": "cispo", "importance_level": "sequence", "epsilon_high": 1.01},
    "sequence-sapo": {"loss_type": "sapo", "importance_level": "sequence"},
    "kl-k1": {"beta": 0.3, "kl_estimator": "k1"},
    "kl-k2": {"beta": 0.3, "kl_estimator": "k2"},
    "kl-k3": {"beta": 0.3},
    "kl-k1-corrected": {"beta": 0.3, "kl_estimator": "k1", "kl_bias_correction": True},
    "kl-k3-corrected": {"beta": 0.3, "kl_bias_correction": True},
    "kl-k3-corrected-sequence": {
        "beta": 0.3,
        "kl_bias_correction": True,
        "loss_type": "gspo",
        "epsilon": 0.03,
    },
    "kl-cispo-corrected": {"beta": 0.3, "kl_bias_correction": True, "loss_type": "cispo"},
    "is-token-truncate": {"is_correction": "token_truncate", "is_clip": (0.9, 1.1)},
    "is-token-mask": {"is_correction": "token_mask", "is_clip": (0.9, 1.1)},
    "is-sequence-truncate": {"is_correction": "sequence_truncate", "is_clip": (0.9, 1.1)},
    "is-sequence-mask": {"is_correction": "sequence_mask", "is_clip": (0.9, 1.1)},
    "is-unbounded": {"is_correction": "token_truncate", "is_clip": (None, None)},
    "is-with-kl": {"is_correction": "token_mask", "is_clip": (0.9, 1.1), "beta": 0.3},
    "is-sequence-gspo": {
        "is_correction": "sequence_truncate",
        "loss_type": "gspo",
        "epsilon": 0.03,
        "beta": 0.1,
    },
    "entropy": {"entropy_coef": 0.01},
    "entropy-dapo-kl": {"entropy_coef": -0.02, "loss_type": "dapo", "beta": 0.1},
}


@pytest.fixture(params=PATHS)
def path_device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "portable":
        if interpreting():
            pytest.skip("TRITON_INTERPRET=1 sends CPU tensors to the Triton kernels")
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_batch(
    device: torch.device, lengths=(5, 0, 15, 1, 20, 3), seed: int = 0, spread: float = 0.3
) -> dict:
    """Tokens of `lengths`, some masked, one sequence wholly; leaves require grad."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    logprobs = -torch.rand(n, generator=g) * 3

    def near(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x + scale * spread * torch.randn(n, generator=g)

    old = near(logprobs)
    mask = torch.rand(n, generator=g) > 0.2
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    if len(lengths) > 1:
        mask[cu_seqlens[-2] : cu_seqlens[-1]] = False
    batch = {
        "logprobs": logprobs,
        "old_logprobs": old,
        "advantages": torch.randn(n, generator=g),
        "cu_seqlens": cu_seqlens,
        "loss_mask": mask,
        "ref_logprobs": near(logprobs),
        "sampler_logprobs": near(old, 0.3),
        "entropy": torch.rand(n, generator=g) * 2,
    }
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    batch["logprobs"].requires_grad_()
    batch["entropy"].requires_grad_()
    return batch


def in_double(batch: dict) -> dict:
    """The same values in fp64, as new leaves."""
    out = {}
    for name, tensor in batch.items():
        if tensor is None or not tensor.is_floating_point():
            out[name] = tensor
        else:
            out[name] = tensor.detach().double().requires_grad_(tensor.requires_grad)
    return out


def run(fn, batch: dict, **options):
    """(loss, gradient of logprobs, gradient of entropy, metrics)."""
    loss, metrics = fn(**batch, **options)
    leaves = (batch["logprobs"], batch["entropy"])
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return loss.detach(), *grads, metrics


def assert_matches_reference(batch: dict, **options) -> None:
    loss, grad, grad_entropy, metrics = run(grpo_loss, batch, **options)
    truth, truth_grad, truth_entropy, truth_metrics = run(
        grpo_loss_ref, in_double(batch), **options
    )
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    scale = truth_grad.abs().max().item()
    torch.testing.assert_close(grad.double(), truth_grad, rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(grad_entropy.double(), truth_entropy, rtol=1e-5, atol=1e-9)
    assert metrics.names == truth_metrics.names
    torch.testing.assert_close(metrics.to_dict(), truth_metrics.to_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_matches_reference(name: str, path_device):
    assert_matches_reference(make_batch(path_device), **OPTIONS[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_the_batch_reaches_both_sides_of_every_bound(name: str):
    """Else a wrong clip or mask would pass the comparison above unseen."""
    means = run(grpo_loss_ref, make_batch(torch.device("cpu")), **OPTIONS[name])[3].to_dict()
    options = make_loss_options(**OPTIONS[name])
    if options.loss_type in ("grpo", "dr_grpo", "dapo", "bnpo", "luspo") and options.epsilon < 1:
        assert 0 < means["clip_low"] < 1 and 0 < means["clip_high"] < 1, means
    if options.loss_type == "cispo":
        assert (0 < means["clip_high"] < 1) or options.epsilon_high >= 5, means
    if options.is_correction is not None and options.is_clip[1] < 2:
        assert 0 < means["is_truncated"] < 1, means


@pytest.mark.parametrize("seed", range(12))
def test_random_options_match_reference(seed: int, path_device):
    draw = random.Random(seed)
    loss_type = draw.choice(["grpo", "dr_grpo", "dapo", "bnpo", "luspo", "cispo", "sapo", "gspo"])
    is_clipped = loss_type not in ("cispo", "sapo")
    options = {
        "loss_type": loss_type,
        "importance_level": draw.choice(["token", "sequence"]),
        "epsilon": draw.choice([0.05, 0.2, 10.0]),
        "epsilon_high": draw.choice([0.28, 1.2]),
        "delta": draw.choice([None, 2.5]) if is_clipped else None,
        "beta": draw.choice([0.0, 0.05]),
        "kl_estimator": draw.choice(["k1", "k2", "k3"]),
        "kl_bias_correction": draw.random() < 0.5,
        "is_correction": draw.choice([None, "token_mask", "token_truncate", "sequence_mask"]),
        "is_clip": draw.choice([(0.0, 2.0), (0.8, 1.2), (0.5, None)]),
        "entropy_coef": draw.choice([0.0, 0.01]),
        "max_completion_length": 16,
        "denominator": draw.choice([None, 7.0]),
    }
    batch = make_batch(path_device, lengths=(9, 4, 0, 30), seed=seed, spread=0.5)
    if draw.random() < 0.3:
        batch["old_logprobs"] = None
    if draw.random() < 0.3:
        batch["loss_mask"] = batch["loss_mask"].float() * 0.5
    if draw.random() < 0.3:
        batch["cu_seqlens"] = None
    assert_matches_reference(batch, **options)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "is-sequence-gspo", "is-sequence-mask"])
def test_fractional_mask_weighs_tokens(name: str, path_device):
    batch = make_batch(path_device)
    batch["loss_mask"] = batch["loss_mask"] * torch.rand(44).to(path_device)
    assert_matches_reference(batch, **OPTIONS[name])


@pytest.mark.parametrize("name", ["grpo", "gspo", "sequence-sapo", "is-sequence-gspo"])
def test_sequences_longer_than_a_block(name: str, path_device):
    batch = make_batch(path_device, lengths=(1300, 3, 700), spread=0.05)
    assert_matches_reference(batch, **OPTIONS[name])


# The specification itself


@pytest.mark.parametrize("name", [n for n in OPTIONS if "cispo" not in n])  # detached ratio
def test_reference_gradcheck(name: str):
    batch = in_double(make_batch(torch.device("cpu"), lengths=(3, 0, 5)))
    leaves = {"logprobs": batch.pop("logprobs"), "entropy": batch.pop("entropy")}

    def loss(logprobs, entropy):
        return grpo_loss_ref(logprobs, **batch, entropy=entropy, **OPTIONS[name])[0]

    assert torch.autograd.gradcheck(loss, tuple(leaves.values()), eps=1e-7, atol=1e-6)


def test_gradient_coefficient_of_deepseekmath(path_device):
    """DeepSeekMath eq 21, pi_old = pi: the objective's gradient is A + beta (pi_ref / pi - 1)."""
    n, beta = 6, 0.04
    x = (-torch.rand(n)).to(path_device).requires_grad_()
    ref, adv = (torch.randn(n).to(path_device) for _ in range(2))
    for old in (None, x.detach()):
        loss, _ = grpo_loss(x, old, adv, ref_logprobs=ref, beta=beta)
        (grad,) = torch.autograd.grad(loss, x)
        expected = adv + beta * ((ref - x).exp() - 1)
        torch.testing.assert_close(-grad * n, expected.detach(), rtol=1e-5, atol=1e-6)


# Invariances


def cut_sequences(batch: dict, order: list[int]) -> dict:
    """The sequences `order` of a batch, packed anew."""
    bounds = batch["cu_seqlens"].tolist()
    index = torch.tensor(
        [t for s in order for t in range(bounds[s], bounds[s + 1])], dtype=torch.long
    )
    lengths = [bounds[s + 1] - bounds[s] for s in order]
    part = {name: batch[name].detach()[index] for name in (*FIELDS, "advantages", "loss_mask")}
    part["cu_seqlens"] = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    part["cu_seqlens"] = part["cu_seqlens"].to(batch["cu_seqlens"])
    part["logprobs"].requires_grad_()
    part["entropy"].requires_grad_()
    return part | {"index": index}


@pytest.mark.parametrize(
    ("split", "as_tensor"),
    [([[s] for s in range(8)], False), ([[7, 2, 5], [0, 1], [6, 3, 4]], True)],
)
@pytest.mark.parametrize(
    "name", ["grpo", "dr_grpo", "dapo", "cispo", "sapo", "gspo", "is-sequence-gspo"]
)
def test_any_split_into_micro_batches_adds_up(name: str, as_tensor: bool, split, path_device):
    """1 x 8 sequences = 8 x 1 = any order and packing, given the denominator of the whole."""
    lengths = (5, 0, 15, 1, 20, 3, 9, 4)
    batch = make_batch(path_device, lengths=lengths)
    denominator = torch.tensor(11.0, device=path_device) if as_tensor else 11.0
    options = OPTIONS[name] | {"denominator": denominator}
    loss, grad, _, metrics = run(grpo_loss, batch, **options)
    loss_sum, grad_parts, metric_parts = 0.0, torch.full_like(grad, math.nan), None
    for order in split:
        part = cut_sequences(batch, order)
        index = part.pop("index")
        part_loss, part_grad, _, part_metrics = run(grpo_loss, part, **options)
        loss_sum = loss_sum + part_loss
        grad_parts[index] = part_grad
        metric_parts = part_metrics if metric_parts is None else metric_parts + part_metrics
    torch.testing.assert_close(loss_sum, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_parts, grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(metric_parts.sums, metrics.sums, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "kl-k3-corrected", "cispo", "is-token-mask", "entropy"])
def test_token_level_seam_takes_any_cut_of_the_tokens(name: str, path_device):
    """What linear_grpo_loss relies on: chunks of rows, cut through sequences, add up."""
    options = make_loss_options(**OPTIONS[name])
    assert not options.needs_sequence_pass
    b = {k: t.detach() for k, t in make_batch(path_device).items()}
    n = len(b["logprobs"])
    w = token_weights(n, b["cu_seqlens"], b["loss_mask"], options, None, path_device)
    names = ("logprobs", "old_logprobs", "advantages", None, "cu", "loss_mask", *FIELDS[2:])

    def call(cut: slice):
        args = [w[cut] if k is None else None if k == "cu" else b[k][cut] for k in names]
        return loss_and_grad(*args, options)

    whole, parts = call(slice(0, n)), [call(slice(i, i + 7)) for i in range(0, n, 7)]
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), whole[1], rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([p[2] for p in parts]), whole[2], rtol=0, atol=0)
    torch.testing.assert_close(sum(p[3] for p in parts), whole[3], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "is-sequence-gspo"])
def test_repeats_bit_for_bit(name: str, path_device):
    batch = make_batch(path_device, lengths=(1500, 40))
    first, second = (run(grpo_loss, batch, **OPTIONS[name]) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(first[3].sums, second[3].sums)


def test_advantages_per_sequence_are_broadcast(path_device):
    batch = make_batch(path_device, lengths=(4, 0, 6))
    batch["advantages"] = torch.tensor([1.0, 2.0, -3.0], device=path_device)
    expanded = torch.tensor([1.0] * 4 + [-3.0] * 6, device=path_device)
    loss, grad, _, _ = run(grpo_loss, batch)
    expected = run(grpo_loss, batch | {"advantages": expanded})
    assert torch.equal(loss, expected[0]) and torch.equal(grad, expected[1])
    assert_matches_reference(batch)


@pytest.mark.parametrize(
    "name", ["grpo", "cispo", "sapo", "gspo", "kl-k3-corrected", "is-sequence-truncate"]
)
def test_no_old_logprobs_means_on_policy(name: str, path_device):
    batch = make_batch(path_device)
    implied = run(grpo_loss, batch | {"old_logprobs": None}, **OPTIONS[name])
    given = run(grpo_loss, batch | {"old_logprobs": batch["logprobs"].detach()}, **OPTIONS[name])
    assert torch.equal(implied[0], given[0]) and torch.equal(implied[1], given[1])
    assert implied[3]["ratio_mean"] == 1
    assert implied[1].abs().sum() > 0


# Limits


@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "sapo", "gspo"])
@pytest.mark.parametrize("shift", [50.0, 1000.0])
def test_extreme_log_ratios_stay_finite(loss_type: str, shift: float, path_device):
    """Every sign of advantage, ratio and KL gap: no overflow, no 0 * inf; the same as the
    reference."""
    x = torch.full((8,), -1.0, device=path_device, requires_grad=True)
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0], device=path_device)
    batch = {
        "logprobs": x,
        "old_logprobs": -1.0 + shift * sign,
        "advantages": torch.tensor([1.0, 1, -1, -1, 2, 2, -2, -2], device=path_device),
        "cu_seqlens": torch.arange(9, device=path_device),
        "ref_logprobs": -1.0 - shift * sign.flip(0),
        "sampler_logprobs": -1.0 - shift * sign,
        "entropy": torch.ones(8, device=path_device, requires_grad=True),
    }
    options = {"loss_type": loss_type, "beta": 0.01, "kl_bias_correction": True}
    options |= {"is_correction": "token_truncate", "is_clip": (0.0, 2.0)}
    loss, grad, _, metrics = run(grpo_loss, batch, **options)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()
    assert all(math.isfinite(value) for value in metrics.to_dict().values())
    assert_matches_reference(batch, **options)


@pytest.mark.parametrize("fn", [grpo_loss, grpo_loss_ref])
@pytest.mark.parametrize("name", ["kl-k1", "kl-k2", "kl-k3", "kl-k3-corrected", "gspo", "cispo"])
def test_a_term_with_coefficient_zero_is_absent(name: str, fn, path_device):
    """An infinite KL estimate or entropy that is only reported does not make the loss 0 * inf."""
    options = OPTIONS[name] | {"beta": 0.0}
    batch = make_batch(path_device)
    clean = run(fn, batch, **options)
    live = batch["loss_mask"].nonzero()[0, 0]
    batch["ref_logprobs"][live] = -math.inf
    with torch.no_grad():
        batch["entropy"][live] = math.inf
    got = run(fn, batch, **options)
    assert torch.equal(got[0], clean[0]) and torch.equal(got[1], clean[1])
    assert torch.isfinite(got[0]) and torch.equal(got[2], torch.zeros_like(got[2]))
    means = got[3].to_dict()
    assert math.isinf(means["kl"]) and math.isinf(means["entropy"])


def test_clipped_tokens_have_exactly_no_gradient(path_device):
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1e30, 1.0], device=path_device)
    adv = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0], device=path_device)
    x = torch.zeros(6, device=path_device, requires_grad=True)
    loss, metrics = grpo_loss(x, -ratio.log(), adv, loss_type="dapo", denominator=1.0)
    (grad,) = torch.autograd.grad(loss, x)
    expected = torch.tensor([0.0, 1.5, -0.5, 0.0, 0.0, -1.0], device=path_device)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=0)
    means = metrics.to_dict()
    assert means["clip_high"] == pytest.approx(2 / 6) and means["clip_low"] == pytest.approx(1 / 6)


def test_r1_epsilon_of_ten(path_device):
    """Range [-9, 11]: only a positive advantage with ratio > 11 is clipped, a negative one
    never."""
    ratio = torch.tensor([10.9, 11.1, 10.9, 11.1, 1e-6], device=path_device)
    adv = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0], device=path_device)
    x = torch.zeros(5, device=path_device, requires_grad=True)
    loss, _ = grpo_loss(x, -ratio.log(), adv, epsilon=10.0, loss_type="dapo", denominator=1.0)
    (grad,) = torch.autograd.grad(loss, x)
    expected = torch.tensor([-10.9, 0.0, 10.9, 11.1, 1e-6], device=path_device)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.item(), -10.9 - 11 + 10.9 + 11.1 + 1e-6, rtol=1e-5, atol=1e-5)


def test_delta_caps_the_open_branch(path_device):
    ratio = torch.tensor([3.0, 5.0], device=path_device)
    x = torch.zeros(2, device=path_device, requires_grad=True)
    adv = torch.tensor([-1.0, -1.0], device=path_device)
    loss, _ = grpo_loss(x, -ratio.log(), adv, delta=4.0, loss_type="dapo", denominator=1.0)
    (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(loss.item(), 3.0 + 4.0, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.tolist(), [3.0, 0.0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("delta", [None, 1.0])
def test_a_ratio_on_the_bound_keeps_its_gradient(delta: float | None, path_device):
    """epsilon 0 and ratio 1: clip bounds, ratio and delta coincide, every comparison is a tie."""
    batch = make_batch(path_device, lengths=(6,)) | {"loss_mask": None}
    batch["old_logprobs"] = batch["logprobs"].detach().clone()
    assert_matches_reference(batch, epsilon=0.0, delta=delta)
    assert run(grpo_loss, batch, epsilon=0.0, delta=delta)[1].abs().min() > 0


def test_a_rounding_tie_splits_the_gradient_as_torch_does(path_device):
    """A = 4 units of the smallest fp32: 1.3 A and 1.2 A both round to 5 units, so that min() sees a
    tie and half of the unclipped gradient flows: 0.5 x 4 units x 1.3, rounded to 3 units."""
    unit = 2.0**-149
    batch = {
        "logprobs": torch.zeros(1, device=path_device, requires_grad=True),
        "old_logprobs": -torch.tensor([1.3], device=path_device).log(),
        "advantages": torch.tensor([4 * unit], device=path_device),
        "entropy": torch.zeros(1, device=path_device, requires_grad=True),
    }
    for fn in (grpo_loss, grpo_loss_ref):
        assert run(fn, batch, loss_type="dapo", denominator=1.0)[1].item() == -3 * unit


@pytest.mark.parametrize(
    "name", ["grpo", "dapo", "cispo", "sapo", "gspo", "is-sequence-gspo", "entropy"]
)
def test_masked_tokens_may_hold_anything(name: str, path_device):
    batch = make_batch(path_device)
    clean = run(grpo_loss, batch, **OPTIONS[name])
    dead = ~batch["loss_mask"]
    for poison in (math.nan, math.inf):
        dirty = {}
        for key, tensor in batch.items():
            dirty[key] = tensor
            if tensor.is_floating_point():
                dirty[key] = tensor.detach().masked_fill(dead, poison)
                dirty[key].requires_grad_(tensor.requires_grad)
        got = run(grpo_loss, dirty, **OPTIONS[name])
        assert torch.equal(got[0], clean[0]) and torch.equal(got[1], clean[1])
        assert torch.equal(got[2], clean[2]) and torch.equal(got[3].sums, clean[3].sums)
        assert (got[1][dead] == 0).all() and (got[2][dead] == 0).all()


@pytest.mark.parametrize(
    "name", ["grpo", "dr_grpo", "dapo", "cispo", "sapo", "gspo", "is-sequence-mask", "entropy"]
)
def test_all_masked_gives_zero(name: str, path_device):
    batch = make_batch(path_device)
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    loss, grad, grad_entropy, metrics = run(grpo_loss, batch, **OPTIONS[name])
    assert loss == 0 and not grad.any() and not grad_entropy.any()
    assert not any(metrics.to_dict().values())


def test_a_masked_sequence_counts_in_the_mean(path_device):
    x = torch.zeros(4, device=path_device, requires_grad=True)
    cu_seqlens = torch.tensor([0, 2, 4], device=path_device)
    mask = torch.tensor([1, 1, 0, 0], device=path_device)
    loss, _ = grpo_loss(
        x, None, torch.ones(4, device=path_device), cu_seqlens=cu_seqlens, loss_mask=mask
    )
    assert loss.item() == pytest.approx(-0.5)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
def test_no_tokens_at_all(name: str, path_device):
    batch = make_batch(path_device, lengths=(0, 0))
    loss, grad, _, metrics = run(grpo_loss, batch, **OPTIONS[name])
    assert loss == 0 and grad.shape == (0,) and metrics.to_dict()["tokens"] == 0


@pytest.mark.parametrize("name", ["grpo", "cispo", "sapo", "gspo"])
def test_a_live_nan_is_not_hidden(name: str, path_device):
    batch = make_batch(path_device, lengths=(6, 4)) | {"loss_mask": None}
    with torch.no_grad():
        batch["logprobs"][2] = math.nan
    loss, grad, _, _ = run(grpo_loss, batch, **OPTIONS[name])
    assert torch.isnan(loss) and torch.isnan(grad[2])


@pytest.mark.triton
@pytest.mark.parametrize("name", ["grpo", "sequence-dapo"])
def test_tokens_outside_every_sequence_are_loud_on_a_gpu(name: str):
    """The values of cu_seqlens are not read on the host there; a token left over gives NaN."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    b = {key: tensor.detach() for key, tensor in make_batch(device, lengths=(4, 4)).items()}
    short = torch.tensor([0, 3, 7], dtype=torch.int32, device=device)
    options = make_loss_options(**OPTIONS[name])
    w = token_weights(8, short, None, options, None, device)
    fields = (b["logprobs"], b["old_logprobs"], b["advantages"], w)
    _, grad, _, _ = loss_and_grad(*fields, short, None, None, None, None, options)
    assert torch.isnan(grad[7]) and torch.isfinite(grad[:7]).all()


def test_an_unscored_token_keeps_weight_one(path_device):
    batch = make_batch(path_device, lengths=(5,)) | {"loss_mask": None}
    batch["sampler_logprobs"][1] = math.nan
    batch["sampler_logprobs"][
        3
    ] = -math.inf  # the sampler said impossible: ratio capped, then clipped
    options = {"is_correction": "token_truncate", "is_clip": (0.0, 2.0)}
    same = batch | {"sampler_logprobs": batch["sampler_logprobs"].clone()}
    same["sampler_logprobs"][1] = batch["old_logprobs"][1]
    got, expected = (run(grpo_loss, b, **options) for b in (batch, same))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert got[3].to_dict()["sampler_unscored"] == pytest.approx(1 / 5)


def test_default_denominators(path_device):
    x = torch.zeros(6, device=path_device)
    adv = torch.ones(6, device=path_device)
    shape = {
        "cu_seqlens": torch.tensor([0, 4, 6], device=path_device),
        "loss_mask": torch.tensor([1, 1, 1, 0, 1, 1], device=path_device),
    }

    def loss(**options) -> float:
        return grpo_loss(x, None, adv, **shape, **options)[0].item()

    assert loss() == pytest.approx(-1.0)  # mean of two means
    assert loss(loss_type="dr_grpo", max_completion_length=10) == pytest.approx(-5 / 20)
    assert loss(loss_type="dapo") == pytest.approx(-1.0)  # five tokens over five
    assert loss(denominator=8) == pytest.approx(-2 / 8)  # sum of two means
    assert loss(loss_type="dapo", denominator=8) == pytest.approx(-5 / 8)


# The op


def test_backward_scales_with_the_incoming_gradient(path_device):
    batch = make_batch(path_device)
    plain = run(grpo_loss, batch, entropy_coef=0.1)
    tripled = run(lambda **kw: (grpo_loss(**kw)[0] * 3, None), batch, entropy_coef=0.1)
    torch.testing.assert_close(tripled[1], plain[1] * 3)
    torch.testing.assert_close(tripled[2], plain[2] * 3)


@pytest.mark.parametrize("name", ["grpo", "is-sequence-gspo", "entropy-dapo-kl"])
def test_opcheck(name: str, path_device):
    b = make_batch(path_device)
    options = make_loss_options(**OPTIONS[name])
    w = token_weights(
        len(b["logprobs"]), b["cu_seqlens"], b["loss_mask"], options, None, path_device
    )
    args = [b["logprobs"], b["old_logprobs"], b["advantages"], w, b["cu_seqlens"], b["loss_mask"]]
    args += [b[field] for field in FIELDS[2:]]
    torch.library.opcheck(_grpo_loss_op, (*args, *options.op_arguments()))


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_compiles_without_graph_breaks(name: str, path_device):
    def loss_of(batch, **options):
        loss, metrics = grpo_loss(**batch, **options)
        return loss, metrics.sums

    batch = make_batch(path_device)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    loss, sums = compiled(batch, **OPTIONS[name])
    (grad,) = torch.autograd.grad(loss, batch["logprobs"])
    expected, expected_grad, _, metrics = run(grpo_loss, batch, **OPTIONS[name])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)
    torch.testing.assert_close(sums, metrics.sums)


def test_inputs_are_left_alone(path_device):
    batch = make_batch(path_device)
    before = {name: tensor.detach().clone() for name, tensor in batch.items()}
    run(grpo_loss, batch, **OPTIONS["is-sequence-gspo"])
    assert all(torch.equal(before[name], batch[name]) for name in batch)


def test_metrics_read_and_add():
    sums = torch.zeros(len(METRICS))
    sums[:2] = torch.tensor([4.0, 2.0])
    metrics = LossMetrics(sums, ("tokens", "kl"))
    assert metrics.to_dict() == {"tokens": 4.0, "kl": 0.5}
    assert (metrics + metrics).to_dict() == {"tokens": 8.0, "kl": 0.5}
    assert metrics["kl"] == 0.5
    with pytest.raises(KeyError, match="entropy"):
        metrics["entropy"]
    with pytest.raises(ValueError, match="options differ"):
        metrics + LossMetrics(sums, ("tokens",))


# Bad input


BAD_OPTIONS = [
    ({"loss_type": "ppo"}, "loss_type.*'ppo'"),
    ({"importance_level": "word"}, "importance_level.*'word'"),
    ({"kl_estimator": "k4"}, "kl_estimator.*'k4'"),
    ({"is_correction": "mask"}, "is_correction.*'mask'"),
    ({"is_correction": "token_mask", "sampler_logprobs": None}, "is_correction.*sampler_logprobs"),
    ({"is_clip": (2.0, 1.0)}, r"is_clip.*\(2.0, 1.0\)"),
    ({"is_clip": 2.0}, "is_clip.*2.0"),
    ({"epsilon": -0.1}, "epsilon.*-0.1"),
    ({"epsilon": math.nan}, "epsilon.*nan"),
    ({"epsilon_high": "0.2"}, "epsilon_high.*'0.2'"),
    ({"delta": 1.1}, "delta.*1.1"),
    ({"delta": 3.0, "loss_type": "cispo"}, "delta.*cispo"),
    ({"beta": -1.0}, "beta.*-1.0"),
    ({"beta": 0.1, "ref_logprobs": None}, "beta=0.1.*ref_logprobs"),
    ({"entropy_coef": math.inf}, "entropy_coef.*inf"),
    ({"entropy_coef": 0.1, "entropy": None}, "entropy_coef=0.1.*entropy"),
    ({"sapo_temperature_pos": 0.0}, "sapo_temperature_pos.*0.0"),
    ({"loss_type": "dr_grpo"}, "dr_grpo.*max_completion_length"),
    ({"max_completion_length": 0}, "max_completion_length.*0"),
    ({"max_completion_length": 2.5}, "max_completion_length must be an int >= 1, got 2.5"),
    ({"max_completion_length": True}, "max_completion_length.*True"),
    ({"kl_bias_correction": "yes"}, "kl_bias_correction must be True or False, got 'yes'"),
    ({"is_clip": (True, 3)}, r"is_clip.*\(True, 3\)"),
    ({"denominator": 0.0}, "denominator.*0.0"),
    ({"denominator": True}, "denominator.*True"),
    ({"denominator": "3"}, "denominator.*'3'"),
    ({"denominator": torch.ones(2)}, r"denominator.*\[2\]"),
    ({"old_logprobs": torch.zeros(3)}, r"old_logprobs.*\[44\].*\[3\]"),
    ({"logprobs": torch.zeros(4, 11)}, r"logprobs.*\[4, 11\]"),
    ({"logprobs": torch.zeros(44, dtype=torch.bfloat16)}, "logprobs.*float32.*bfloat16"),
    ({"ref_logprobs": torch.zeros(44, dtype=torch.float64)}, "ref_logprobs.*float64"),
    ({"entropy": torch.zeros(44, device="meta")}, "entropy.*meta"),
    ({"advantages": torch.zeros(5)}, r"advantages.*\[44\].*\[6\].*\[5\]"),
    ({"advantages": torch.zeros(44, dtype=torch.float64)}, "advantages.*float64"),
    ({"loss_mask": torch.ones(43)}, r"loss_mask.*\[43\]"),
    ({"loss_mask": torch.linspace(-1, 1, 44)}, "loss_mask must be finite and >= 0, got -1.0"),
    ({"loss_mask": torch.tensor([math.nan] + [1.0] * 43)}, "loss_mask.*nan"),
    ({"loss_mask": torch.tensor([math.inf] + [1.0] * 43)}, "loss_mask.*inf"),
    ({"loss_mask": -torch.ones(44, dtype=torch.int32)}, "loss_mask.*-1"),
    ({"cu_seqlens": torch.tensor([0, 40])}, "cu_seqlens.*44.*40"),
    ({"cu_seqlens": torch.tensor([0, 50, 44])}, "cu_seqlens"),
    ({"cu_seqlens": torch.tensor([0.0, 44.0])}, "cu_seqlens.*float32"),
    ({"cu_seqlens": torch.tensor([0])}, r"cu_seqlens.*\[1\]"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD_OPTIONS)
def test_bad_input_names_the_argument_and_value(wrong: dict, message: str):
    batch = make_batch(torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        grpo_loss(**(batch | wrong))


@pytest.mark.parametrize(
    "wrong", [{"beta": 0.1}, {"is_correction": "token_mask"}, {"loss_type": "dr_grpo"}]
)
def test_the_reference_does_not_drop_a_term_either(wrong: dict):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        grpo_loss_ref(torch.zeros(2), None, torch.ones(2), **wrong)
