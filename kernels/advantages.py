"""Group-relative advantages: A = (r - mean of its group) / (std + eps), DeepSeekMath eq 3.

For R rewards in groups of the same prompt. The papers write only "std"; TRL, verl and OpenRLHF take
the sample one (ddof=1), which is the default here, as is TRL's eps of 1e-4. Scale "batch" divides
by the standard deviation of all rewards of the call, "none" by nothing (Dr. GRPO, arXiv
2503.20783).

A NaN reward (no reward function could score the answer) is left out of its group's statistics and
gets advantage 0. A group with fewer than two scored answers, or with equal rewards, gets exactly 0:
the deviations are set to 0 rather than computed, since the rounded mean of equal rewards can differ
from them by one bit, which eps would only shrink.

R is some ten thousand at most, so this is a dozen small torch operations, in fp64 and without a
host sync. Group ids are brought together by a stable sort and summed segment by segment: no
atomics, the same bits in every run.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_engine.kernels.common import INT_DTYPES, check_vector

SCALES = ("group", "batch", "none")


def group_advantages_ref(
    rewards: Tensor,
    group_ids: Tensor | int,
    *,
    scale: str = "group",
    ddof: int = 1,
    eps: float = 1e-4,
) -> Tensor:
    """Specification of `group_advantages`, same arguments: Python floats, one group at a time."""
    values = rewards.tolist()
    if isinstance(group_ids, int):
        ids = [index // group_ids for index in range(len(values))]
    else:
        ids = group_ids.tolist()

    def deviation(scored: list[float]) -> float:
        if len(scored) < 2:
            return 0.0
        mean = math.fsum(scored) / len(scored)
        squares = math.fsum((value - mean) ** 2 for value in scored)
        return math.sqrt(squares / (len(scored) - ddof))

    batch_std = deviation([value for value in values if not math.isnan(value)])
    advantages = []
    for value, group_id in zip(values, ids, strict=True):
        members = zip(values, ids, strict=True)
        peers = [v for v, g in members if g == group_id and not math.isnan(v)]
        if math.isnan(value) or len(set(peers)) < 2:
            advantages.append(0.0)
            continue
        std = {"group": deviation(peers), "batch": batch_std, "none": None}[scale]
        centred = value - math.fsum(peers) / len(peers)
        advantages.append(centred if std is None else centred / (std + eps))
    return torch.tensor(advantages, dtype=torch.float32, device=rewards.device)


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor | int,
    *,
    scale: str = "group",
    ddof: int = 1,
    eps: float = 1e-4,
) -> Tensor:
    """Advantages [R] fp32 of rewards [R] (any float dtype) relative to their group.

    Args:
        rewards: [R]; NaN = unscorable.
        group_ids: ids [R] int32 or int64, any values in any order; or, as an int, the group size G
            (R is a multiple of G and groups lie end to end).
        scale: "group" | "batch" | "none": which standard deviation divides.
        ddof: 1 = sample, 0 = population standard deviation.
        eps: added to the standard deviation, >= 0.

    Raises:
        ValueError: naming the argument and its value. Infinite rewards are found on CPU tensors
            only (looking would be a sync).
    """
    _check(rewards, group_ids, scale, ddof, eps)
    if rewards.numel() == 0:
        return torch.empty_like(rewards, dtype=torch.float32)
    if isinstance(group_ids, int):
        return _segment_advantages(rewards, *_equal_segments(rewards, group_ids), scale, ddof, eps)
    order = torch.argsort(group_ids, stable=True)
    segments = _segments_of_sorted(group_ids[order])
    advantages = _segment_advantages(rewards[order], *segments, scale, ddof, eps)
    return torch.empty_like(advantages).scatter_(0, order, advantages)


def _equal_segments(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Segment index [R] and offsets [S+1] of groups of one size laid end to end."""
    positions = torch.arange(rewards.shape[0] + 1, device=rewards.device)
    return positions[:-1] // group_size, positions[::group_size]


def _segments_of_sorted(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Segment index [R] and offsets [R+1] of runs of equal ids. The number of runs stays on the
    device, so there are R segments, the last ones empty."""
    is_start = torch.ones_like(ids)
    is_start[1:] = (ids[1:] != ids[:-1]).to(ids.dtype)
    segment = is_start.cumsum(0) - 1
    numbers = torch.arange(ids.shape[0] + 1, device=ids.device, dtype=segment.dtype)
    return segment, torch.searchsorted(segment, numbers)


def _segment_advantages(
    rewards: Tensor, segment: Tensor, offsets: Tensor, scale: str, ddof: int, eps: float
) -> Tensor:
    rewards = rewards.double()
    is_scored = ~rewards.isnan()

    def per_group(values: Tensor, how: str) -> Tensor:
        reduced = torch.segment_reduce(values, how, offsets=offsets, axis=0, unsafe=True)
        return reduced[segment]

    count = per_group(is_scored.double(), "sum")
    mean = per_group(torch.where(is_scored, rewards, 0.0), "sum") / count.clamp(min=1)
    lowest = per_group(torch.where(is_scored, rewards, math.inf), "min")
    highest = per_group(torch.where(is_scored, rewards, -math.inf), "max")
    centred = torch.where(is_scored & (highest > lowest), rewards - mean, 0.0)
    if scale == "none":
        return centred.float()
    if scale == "group":
        variance = per_group(centred.square(), "sum") / (count - ddof).clamp(min=1)
    else:
        num_scored = is_scored.sum()
        batch_mean = torch.where(is_scored, rewards, 0.0).sum() / num_scored.clamp(min=1)
        squares = torch.where(is_scored, rewards - batch_mean, 0.0).square().sum()
        variance = squares / (num_scored - ddof).clamp(min=1)
    # Where nothing deviates 0 / (0 + eps) is 0, but with eps = 0 it would be NaN.
    return torch.where(centred == 0, 0.0, centred / (variance.sqrt() + eps)).float()


def _check(rewards: Tensor, group_ids: Tensor | int, scale: str, ddof: int, eps: float) -> None:
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(map(repr, SCALES))}; got {scale!r}")
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof!r}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and >= 0, got {eps!r}")
    if not isinstance(rewards, Tensor) or rewards.ndim != 1 or not rewards.is_floating_point():
        raise ValueError(f"rewards must be a floating-point tensor [R], got {_describe(rewards)}")
    if rewards.device.type == "cpu" and bool(rewards.isinf().any()):
        raise ValueError(
            "rewards must be finite, or NaN for an answer that cannot be scored; got inf"
        )
    if isinstance(group_ids, Tensor):
        check_vector("group_ids", group_ids, rewards.shape[0], rewards.device, INT_DTYPES)
    elif isinstance(group_ids, bool) or not isinstance(group_ids, int) or group_ids < 1:
        raise ValueError(f"group_ids must be a tensor or a group size >= 1, got {group_ids!r}")
    elif rewards.shape[0] % group_ids:
        raise ValueError(
            f"group size {group_ids} does not divide the number of rewards, {rewards.shape[0]}"
        )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
