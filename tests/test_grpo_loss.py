"""grpo_loss: explicit gradients against the autograd specification, invariances, and the op.

Tests with a `path_device` run on the portable CPU path, and on the Triton kernels where there is a
GPU or TRITON_INTERPRET=1. Limits and bad input are in test_grpo_loss_limits.py.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from loss_cases import (
    FIELDS,
    OPTIONS,
    PATHS,
    assert_matches_reference,
    cut_sequences,
    device_of_path,
    in_double,
    make_batch,
    run,
)

from grpo_engine.kernels.grpo_loss import (
    _grpo_loss_op,
    grpo_loss,
    grpo_loss_ref,
    loss_and_grad,
    make_loss_options,
    token_weights,
)
from grpo_engine.kernels.loss_options import LOSS_TYPES


@pytest.fixture(params=PATHS)
def path_device(request: pytest.FixtureRequest) -> torch.device:
    return device_of_path(request.param)


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
    if options.loss_type == "vespo":
        assert 0.01 < means["phi_mean"] < 0.99, means
    if options.is_correction is not None and options.is_clip[1] < 2:
        assert 0 < means["is_truncated"] < 1, means


@pytest.mark.parametrize("seed", range(16))
def test_random_options_match_reference(seed: int, path_device):
    draw = random.Random(seed)
    loss_type = draw.choice(LOSS_TYPES)
    is_clipped = loss_type not in ("cispo", "sapo", "vespo")
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
    if loss_type == "vespo":
        options["importance_level"] = "token"
        options["is_correction"] = draw.choice([None, "token_mask", "token_truncate"])
    batch = make_batch(path_device, lengths=(9, 4, 0, 30), seed=seed, spread=0.5)
    if draw.random() < 0.3:
        batch["old_logprobs"] = None
    if draw.random() < 0.3:
        batch["loss_mask"] = batch["loss_mask"].float() * 0.5
    if draw.random() < 0.3:
        batch["cu_seqlens"] = None
    assert_matches_reference(batch, **options)


@pytest.mark.parametrize(
    "name",
    ["grpo", "dapo", "gspo", "is-sequence-gspo", "is-sequence-mask", "vespo", "vespo-is-truncate"],
)
def test_fractional_mask_weighs_tokens(name: str, path_device):
    batch = make_batch(path_device)
    batch["loss_mask"] = batch["loss_mask"] * torch.rand(44).to(path_device)
    assert_matches_reference(batch, **OPTIONS[name])


@pytest.mark.parametrize(
    "name", ["grpo", "gspo", "sequence-sapo", "is-sequence-gspo", "vespo-is-truncate"]
)
def test_sequences_longer_than_a_block(name: str, path_device):
    batch = make_batch(path_device, lengths=(1300, 3, 700), spread=0.05)
    assert_matches_reference(batch, **OPTIONS[name])


# The specification itself


DETACHED = ("cispo", "vespo")  # a coefficient held constant: not the derivative of the value


@pytest.mark.parametrize("name", [n for n in OPTIONS if not any(d in n for d in DETACHED)])
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


@pytest.mark.parametrize(
    ("split", "as_tensor"),
    [([[s] for s in range(8)], False), ([[7, 2, 5], [0, 1], [6, 3, 4]], True)],
)
@pytest.mark.parametrize(
    "name",
    ["grpo", "dr_grpo", "dapo", "cispo", "sapo", "gspo", "is-sequence-gspo", "vespo-is-mask-kl"],
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
    torch.testing.assert_close(torch.cat([p[1] for p in parts], 1), whole[1], rtol=0, atol=0)
    torch.testing.assert_close(sum(p[2] for p in parts), whole[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "is-sequence-gspo", "vespo-is-truncate"])
def test_repeats_bit_for_bit(name: str, path_device):
    batch = make_batch(path_device, lengths=(1500, 40))
    first, second = (run(grpo_loss, batch, **OPTIONS[name]) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(first[3].sums, second[3].sums)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
@pytest.mark.parametrize("lengths", [(4, 0, 6), [0, *(7 * i % 23 for i in range(60)), 0]])
def test_advantages_per_sequence_are_broadcast(name: str, lengths, path_device):
    batch = make_batch(path_device, lengths=lengths)
    each = torch.linspace(-1.0, 2.0, len(lengths), device=path_device)
    expanded = each.repeat_interleave(torch.tensor(lengths, device=path_device))
    loss, grad, _, _ = run(grpo_loss, batch | {"advantages": each}, **OPTIONS[name])
    expected = run(grpo_loss, batch | {"advantages": expanded}, **OPTIONS[name])
    assert torch.equal(loss, expected[0]) and torch.equal(grad, expected[1])
    assert_matches_reference(batch | {"advantages": each}, **OPTIONS[name])


@pytest.mark.parametrize(
    "name",
    [
        "grpo",
        "cispo",
        "sapo",
        "gspo",
        "kl-k3-corrected",
        "is-sequence-truncate",
        "vespo-is-mask-kl",
    ],
)
def test_no_old_logprobs_means_on_policy(name: str, path_device):
    batch = make_batch(path_device)
    implied = run(grpo_loss, batch | {"old_logprobs": None}, **OPTIONS[name])
    given = run(grpo_loss, batch | {"old_logprobs": batch["logprobs"].detach()}, **OPTIONS[name])
    assert torch.equal(implied[0], given[0]) and torch.equal(implied[1], given[1])
    assert implied[3]["ratio_mean"] == 1
    assert implied[1].abs().sum() > 0


# The op


def test_backward_scales_with_the_incoming_gradient(path_device):
    batch = make_batch(path_device)
    plain = run(grpo_loss, batch, entropy_coef=0.1)
    tripled = run(lambda **kw: (grpo_loss(**kw)[0] * 3, None), batch, entropy_coef=0.1)
    torch.testing.assert_close(tripled[1], plain[1] * 3)
    torch.testing.assert_close(tripled[2], plain[2] * 3)


@pytest.mark.parametrize(
    "name", ["grpo", "is-sequence-gspo", "entropy-dapo-kl", "vespo-is-mask-kl"]
)
def test_opcheck(name: str, path_device):
    b = make_batch(path_device)
    options = make_loss_options(**OPTIONS[name])
    args = [b["logprobs"], b["old_logprobs"], b["advantages"], b["cu_seqlens"], b["loss_mask"]]
    args += [b[field] for field in FIELDS[2:]]
    for denominators in ((None, None), (None, 3.0), (torch.tensor(3.0, device=path_device), None)):
        torch.library.opcheck(_grpo_loss_op, (*args, *denominators, *options.op_arguments()))


@pytest.mark.parametrize("name", ["grpo", "gspo", "vespo"])
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
