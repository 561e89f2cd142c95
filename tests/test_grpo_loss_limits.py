"""grpo_loss at its limits: clips, caps, masks and denominators by hand, extreme values, bad
input."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import (
    OPTIONS,
    PATHS,
    assert_matches_reference,
    device_of_path,
    make_batch,
    run,
)

from grpo_engine.kernels.grpo_loss import (
    METRICS,
    LossMetrics,
    grpo_loss,
    grpo_loss_ref,
    loss_and_grad,
    make_loss_options,
)


@pytest.fixture(params=PATHS)
def path_device(request: pytest.FixtureRequest) -> torch.device:
    return device_of_path(request.param)


@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "sapo", "gspo", "vespo"])
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
    "name",
    ["grpo", "dapo", "cispo", "sapo", "gspo", "is-sequence-gspo", "entropy", "vespo-is-mask-kl"],
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
    "name",
    ["grpo", "dr_grpo", "dapo", "cispo", "sapo", "gspo", "is-sequence-mask", "entropy", "vespo"],
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


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "vespo"])
def test_no_tokens_at_all(name: str, path_device):
    batch = make_batch(path_device, lengths=(0, 0))
    loss, grad, _, metrics = run(grpo_loss, batch, **OPTIONS[name])
    assert loss == 0 and grad.shape == (0,) and metrics.to_dict()["tokens"] == 0


@pytest.mark.parametrize("name", ["grpo", "cispo", "sapo", "gspo", "vespo"])
def test_a_live_nan_is_not_hidden(name: str, path_device):
    batch = make_batch(path_device, lengths=(6, 4)) | {"loss_mask": None}
    with torch.no_grad():
        batch["logprobs"][2] = math.nan
    loss, grad, _, _ = run(grpo_loss, batch, **OPTIONS[name])
    assert torch.isnan(loss) and torch.isnan(grad[2])


@pytest.mark.triton
@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("name", ["grpo", "sequence-dapo", "vespo", "dapo"])
def test_tokens_outside_every_sequence_are_loud_on_a_gpu(
    name: str, per_sequence: bool, monkeypatch
):
    """The values of cu_seqlens are not read on the host there; a token left over gives NaN, unless
    nothing is looked up for it."""
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)  # no NaN by itself
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    b = {key: tensor.detach() for key, tensor in make_batch(device, lengths=(4, 4)).items()}
    short = torch.tensor([0, 3, 7], dtype=torch.int32, device=device)
    options = make_loss_options(**OPTIONS[name])
    advantages = torch.tensor([1.0, -1.0], device=device) if per_sequence else b["advantages"]
    fields = (b["logprobs"], b["old_logprobs"], advantages, None, short)
    _, (grad,), _ = loss_and_grad(*fields, None, None, None, None, options)
    by_sequence = name != "dapo" or per_sequence
    assert torch.isnan(grad[7]) == by_sequence and torch.isfinite(grad[:7]).all()


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


# Metrics


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
    ({"delta": 3.0, "loss_type": "vespo"}, "delta.*vespo"),
    ({"vespo_k_pos": -0.5}, "vespo_k_pos.*-0.5"),
    ({"vespo_k_neg": math.nan}, "vespo_k_neg.*nan"),
    ({"vespo_lambda_pos": "3"}, "vespo_lambda_pos.*'3'"),
    ({"vespo_lambda_neg": 0.0}, "vespo_lambda_neg.*>= 0.0001.*0.0"),
    ({"vespo_k_neg": 60.0, "vespo_lambda_neg": 1.5}, "vespo_k_neg=60.0, vespo_lambda_neg=1.5.*e"),
    ({"loss_type": "vespo", "importance_level": "sequence"}, "importance_level='sequence'.*vespo"),
    (
        {"loss_type": "vespo", "is_correction": "sequence_truncate"},
        "is_correction='sequence_truncate'.*vespo.*token_mask",
    ),
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


@pytest.mark.parametrize("op", [grpo_loss, grpo_loss_ref])
def test_an_unknown_option_is_the_called_functions(op):
    with pytest.raises(TypeError, match=rf"^{op.__name__}\(\) got an unexpected .* 'cliprange'$"):
        op(torch.zeros(2), None, torch.ones(2), cliprange=0.2)
