"""The process that runs reward functions. Started, watched and killed by ``pool.py``.

It never imports torch by itself, starts in about 0.1 s, and talks to its pool over one socket:
length-prefixed pickle in (our own rows), one JSON line out per score, so that the pool always knows
which completion is being scored and for how long. It dies with its pool, even in a C loop: the
kernel sends SIGIO, whose default action is to kill, when the pool's end of the lifeline closes.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import pickle
import resource
import socket
import struct
import time
import traceback
from collections.abc import Mapping
from typing import Any

from grpo_engine.rewards import clock
from grpo_engine.rewards.registry import InvalidScoreError, Reward, load_reward
from grpo_engine.types import UserError

LENGTH = struct.Struct("!Q")
MAX_MESSAGE_CHARS = 500


def main(channel_fd: int, lifeline_fd: int) -> None:
    """Load the rewards named by the first message, then score slices until the socket closes."""
    die_with(lifeline_fd)
    channel = socket.socket(fileno=channel_fd)
    clock.on_loading(lambda begins: _send(channel, ["loading", begins]))
    clock.on_measured(lambda name, value: _send(channel, ["measured", name, value]))
    clock.on_verdict_if_killed(lambda *verdict: _send(channel, ["if_killed", *verdict]))
    first = _receive(channel)
    if first is None:
        return
    _limit_memory(first["memory_limit_mb"])
    try:
        rewards = [load_reward(spec) for spec in first["rewards"]]
    except UserError as error:
        _send(channel, ["refused", str(error)])
        return
    _send(channel, ["ready", [list(reward.required_columns) for reward in rewards]])
    while (work := _receive(channel)) is not None:
        for task, reward_index, item_index in work["tasks"]:
            started = time.monotonic()
            reward = rewards[reward_index]
            if item_index is None:
                scores, outcome, message = _score_batch(reward, work)
            else:
                scores, outcome, message = _score_item(reward, work["items"][item_index])
            elapsed = time.monotonic() - started
            _send(channel, ["scored", task, scores, outcome, message, elapsed])


def die_with(lifeline_fd: int) -> None:
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, -os.getpgrp())  # children of a reward die as well
    flags = fcntl.fcntl(lifeline_fd, fcntl.F_GETFL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, flags | os.O_NONBLOCK | os.O_ASYNC)
    try:
        if os.read(lifeline_fd, 1) == b"":  # the pool was gone before the signal was armed
            os._exit(1)
    except BlockingIOError:
        return


def _limit_memory(limit_mb: int | None) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limit_mb is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = limit_mb * 2**20
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _receive(channel: socket.socket) -> Any:
    """The next message, or None when the pool has closed the socket."""
    header = _receive_exactly(channel, LENGTH.size)
    if header is None:
        return None
    body = _receive_exactly(channel, LENGTH.unpack(header)[0])
    return None if body is None else pickle.loads(body)


def _receive_exactly(channel: socket.socket, size: int) -> bytearray | None:
    received = bytearray()
    while len(received) < size:
        piece = channel.recv(min(size - len(received), 1 << 20))
        if not piece:
            return None
        received += piece
    return received


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


def describe(error: BaseException) -> str:
    """``ValueError: why (file.py:12)`` on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return text[:MAX_MESSAGE_CHARS] + place
