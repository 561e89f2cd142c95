"""The process that runs reward functions. Started, watched and killed by ``pool.py``.

It never imports torch by itself, starts in about 0.1 s, and talks to its pool over one socket:
length-prefixed pickle in (our own rows), one JSON line out per score, so that the pool always knows
which completion is being scored and for how long. It dies with its pool, even in a C loop: the
kernel sends SIGIO, whose default action is to kill, when the pool's end of the lifeline closes.
"""

from __future__ import annotations

import json
import math
import resource
import socket
import time
from collections.abc import Mapping
from typing import Any

from grpo_engine.child import describe, die_with, receive
from grpo_engine.rewards import clock
from grpo_engine.rewards.registry import InvalidScoreError, Reward, load_reward
from grpo_engine.types import UserError


def main(channel_fd: int, lifeline_fd: int) -> None:
    """Load the rewards named by the first message, then score slices until the socket closes."""
    die_with(lifeline_fd)
    channel = socket.socket(fileno=channel_fd)
    clock.on_loading(lambda begins: _send(channel, ["loading", begins]))
    clock.on_measured(lambda name, value: _send(channel, ["measured", name, value]))
    clock.on_verdict_if_killed(lambda *verdict: _send(channel, ["if_killed", *verdict]))
    first = receive(channel)
    if first is None:
        return
    _limit_memory(first["memory_limit_mb"])
    try:
        rewards = [load_reward(spec) for spec in first["rewards"]]
    except UserError as error:
        _send(channel, ["refused", str(error)])
        return
    _send(channel, ["ready", [list(reward.required_columns) for reward in rewards]])
    while (work := receive(channel)) is not None:
        for task, reward_index, item_index in work["tasks"]:
            started = time.monotonic()
            reward = rewards[reward_index]
            if item_index is None:
                scores, outcome, message = _score_batch(reward, work)
            else:
                scores, outcome, message = _score_item(reward, work["items"][item_index])
            elapsed = time.monotonic() - started
            _send(channel, ["scored", task, scores, outcome, message, elapsed])


def _limit_memory(limit_mb: int | None) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limit_mb is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = limit_mb * 2**20
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _send(channel: socket.socket, message: list[Any]) -> None:
    channel.sendall(json.dumps(message).encode() + b"\n")


def _score_item(reward: Reward, item: Mapping[str, Any]) -> tuple[float | None, str, str]:
    """(score, outcome, message) of one completion; even SystemExit is only an error here."""
    try:
        value, outcome = reward.call(
            item["prompt"], item["completion"], item["row"], item["completion_ids"]
        )
        score = checked_score(value)
    except InvalidScoreError as error:
        return None, "invalid_score", str(error)
    except BaseException as error:
        return None, "error", describe(error)
    if score is None and outcome == "ok":
        outcome = "none"
    return score, outcome, ""


def _score_batch(reward: Reward, work: Mapping[str, Any]) -> tuple[list[float | None], str, str]:
    items = work["items"]
    try:
        values = reward.call_batch(
            [item["prompt"] for item in items],
            [item["completion"] for item in items],
            {name: [item["row"].get(name) for item in items] for name in items[0]["row"]},
            [item["completion_ids"] for item in items],
        )
        if len(values) != len(items):
            raise InvalidScoreError(f"returned {len(values)} scores for {len(items)} completions")
        return [checked_score(value) for value in values], "ok", ""
    except InvalidScoreError as error:
        return [None] * len(items), "invalid_score", str(error)
    except BaseException as error:
        return [None] * len(items), "error", describe(error)


def checked_score(value: Any) -> float | None:
    """A finite float (numpy and 0-d tensors too) or None; else InvalidScoreError."""
    if value is None:
        return None
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise InvalidScoreError(f"returned {value!r:.200}, not a number")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidScoreError(f"returned a value that is not one number: {error}") from None
    if not math.isfinite(number):
        raise InvalidScoreError(f"returned {number}")
    return number
