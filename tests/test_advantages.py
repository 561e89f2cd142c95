"""group_advantages against its plain-Python specification, and the cases that trainers get
wrong."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_engine.kernels.advantages import group_advantages, group_advantages_ref

NAN = math.nan
# the device is the same for every example
ON_DEVICE = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
REWARD = st.one_of(st.sampled_from([0.0, 1.0, 0.1, NAN]), st.floats(-1e4, 1e4, width=32))


@settings(max_examples=150, **ON_DEVICE)
@given(
    rows=st.lists(st.tuples(REWARD, st.integers(-3, 3)), max_size=24),
    scale=st.sampled_from(["group", "batch", "none"]),
    ddof=st.sampled_from([0, 1]),
    eps=st.sampled_from([0.0, 1e-4]),
)
def test_group_ids_match_reference(rows, scale: str, ddof: int, eps: float, device):
    rewards = torch.tensor([reward for reward, _ in rows], dtype=torch.float32, device=device)
    ids = torch.tensor([group for _, group in rows], dtype=torch.int64, device=device)
    options = {"scale": scale, "ddof": ddof, "eps": eps}
    got = group_advantages(rewards, ids, **options)
    expected = group_advantages_ref(rewards, ids, **options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=100, **ON_DEVICE)
@given(
    rewards=st.lists(REWARD, min_size=12, max_size=12),
    size=st.sampled_from([1, 2, 3, 4, 6, 12]),
    scale=st.sampled_from(["group", "batch", "none"]),
)
def test_group_size_is_the_same_as_ids(rewards, size: int, scale: str, device):
    rewards = torch.tensor(rewards, dtype=torch.float32, device=device)
    ids = torch.arange(12, device=device) // size
    got = group_advantages(rewards, size, scale=scale)
    assert torch.equal(got, group_advantages(rewards, ids, scale=scale))
    torch.testing.assert_close(
        got, group_advantages_ref(rewards, size, scale=scale), rtol=1e-5, atol=1e-6
    )


def test_by_hand(device):
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0], device=device)
    sample_std = math.sqrt(1 / 3)
    expected = torch.tensor([0.5, -0.5, -0.5, 0.5], device=device)
    torch.testing.assert_close(group_advantages(rewards, 4), expected / (sample_std + 1e-4))
    torch.testing.assert_close(group_advantages(rewards, 4, ddof=0, eps=0.0), expected / 0.5)
    torch.testing.assert_close(group_advantages(rewards, 4, scale="none"), expected)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_zero(scale: str, device):
    """Seven times 0.1, over 7, is not 0.1 in fp64; an equally small std would make that +-1."""
    rewards = torch.tensor([0.1] * 7 + [0.0, 1.0] * 3 + [1.0], dtype=torch.float64, device=device)
    assert rewards[:7].cpu().cumsum(0)[-1] / 7 != 0.1  # added in order
    advantages = group_advantages(rewards, 7, scale=scale, eps=0.0)
    assert torch.equal(advantages[:7], torch.zeros(7, device=device))
    assert advantages[7:].abs().min() > 0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_unscorable_answers_are_left_out(scale: str, device):
    rewards = torch.tensor([1.0, NAN, 0.0, 0.5, NAN, NAN, 2.0, NAN], device=device)
    advantages = group_advantages(rewards, 4, scale=scale)
    assert torch.equal(advantages.isnan(), torch.zeros(8, dtype=torch.bool, device=device))
    assert (advantages[rewards.isnan()] == 0).all()
    assert advantages[6] == 0, "one scored answer has nothing to be compared with"
    if scale == "group":
        ids = torch.tensor([0, 0, 0], device=device)
        assert torch.equal(advantages[[0, 2, 3]], group_advantages(rewards[[0, 2, 3]], ids))


def test_groups_of_one_are_zero(device):
    rewards = torch.tensor([3.0, -1.0, 7.0], device=device)
    assert torch.equal(group_advantages(rewards, 1), torch.zeros(3, device=device))
    assert torch.equal(
        group_advantages(rewards, torch.tensor([4, 9, 2], device=device)),
        torch.zeros(3, device=device),
    )


def test_mean_zero_and_order_do_not_matter(device):
    rewards = torch.rand(64, device=device)
    ids = torch.arange(64, device=device) % 5
    advantages = group_advantages(rewards, ids)
    for group in range(5):
        assert advantages[ids == group].sum().abs() < 1e-5
    order = torch.randperm(64, device=device)
    shuffled = group_advantages(rewards[order], ids[order])
    torch.testing.assert_close(shuffled, advantages[order], rtol=1e-6, atol=1e-7)


def test_no_rewards(device):
    assert group_advantages(torch.zeros(0, device=device), 4).shape == (0,)
    assert group_advantages(
        torch.zeros(0, device=device), torch.zeros(0, dtype=torch.int32, device=device)
    ).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": "prompt"}, "scale.*'prompt'"),
        ({"ddof": 2}, "ddof.*2"),
        ({"eps": -1.0}, "eps.*-1.0"),
        ({"group_ids": 5}, "5.*8"),
        ({"group_ids": 0}, "group.*0"),
        ({"group_ids": True}, "True"),
        ({"group_ids": torch.zeros(7, dtype=torch.int64)}, r"group_ids.*\[8\].*\[7\]"),
        ({"group_ids": torch.zeros(8)}, "group_ids.*float32"),
        ({"rewards": torch.zeros(8, dtype=torch.int64)}, "rewards.*int64"),
        ({"rewards": torch.zeros(2, 4)}, r"rewards.*\[2, 4\]"),
        ({"rewards": torch.tensor([math.inf] * 8)}, "rewards.*inf"),
    ],
)
def test_bad_input_names_the_argument_and_value(arguments: dict, message: str):
    call = {"rewards": torch.rand(8), "group_ids": 4} | arguments
    with pytest.raises(ValueError, match=message):
        group_advantages(**call)
