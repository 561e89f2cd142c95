"""A Python function as a chat model: for clients of one's own, for rules, and for tests.

    def reply(conversations, *, seed, temperature, max_tokens) -> list[str | None]

with one reply to each conversation (a list of messages with role and content); None, or an
exception, is a failure. Options that the function does not name are not passed.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from grpo_engine.chat.base import (
    ChatModel,
    ChatOptions,
    ChatSampling,
    Conversation,
    OnFailure,
    OnReplies,
)
from grpo_engine.chat.cache import ReplyCache
from grpo_engine.rewards.registry import find_function
from grpo_engine.types import UserError


class FunctionOptions(ChatOptions):
    """``args`` are passed to every call; ``batch_size`` conversations are handed over at a time,
    and a failure of the function costs that many replies."""

    args: dict[str, Any] = {}
    batch_size: int = Field(32, ge=1)


class FunctionModel(ChatModel):
    """``spec``: ``package.module:function`` or ``path/to/file.py:function``.

    Raises UserError where the function is not found, takes other arguments, or returns something
    else than one text or None to each conversation.
    """

    OPTIONS = FunctionOptions

    def __init__(
        self, spec: str, options: FunctionOptions, cache: ReplyCache | None = None
    ) -> None:
        self._function = find_function(spec, f"judge {spec!r}")
        self._args, self._batch_size = options.args, options.batch_size
        self._sampling = _accepted(spec, self._function, self._args)
        identity = {
            "kind": "function",
            "name": spec.rpartition(":")[2],
            "args": self._args,
            "sha256": _source_sha256(self._function),
        }
        super().__init__(identity, {"judge": spec}, cache)

    def _ask(
        self,
        conversations: list[Conversation],
        sampling: ChatSampling,
        on_replies: OnReplies,
        on_failure: OnFailure,
    ) -> None:
        given = {name: getattr(sampling, name) for name in self._sampling}
        for start in range(0, len(conversations), self._batch_size):
            batch = conversations[start : start + self._batch_size]
            replies = dict(enumerate(self._replies(batch, given), start=start))
            on_replies({index: reply for index, reply in replies.items() if isinstance(reply, str)})
            for index, reply in replies.items():
                if not isinstance(reply, str):
                    on_failure(index, "no reply" if reply is None else f"exception: {reply!r}")

    def _replies(self, batch: list[Conversation], given: dict[str, Any]) -> list[Any]:
        place = self.place["judge"]
        try:
            # Copies: what the function does to a message must not reach the cache's keys.
            copies = [[dict(message) for message in conversation] for conversation in batch]
            replies = self._function(copies, **given, **self._args)
        except UserError:
            raise
        except Exception as error:
            return [error] * len(batch)
        if not isinstance(replies, (list, tuple)) or len(replies) != len(batch):
            raise UserError(
                f"judge {place!r}: wanted a list of {len(batch)} replies, got {replies!r:.80}"
            )
        for reply in replies:
            if reply is not None and not isinstance(reply, str):
                raise UserError(f"judge {place!r}: a reply must be text or None, got {reply!r:.80}")
        return list(replies)


def _accepted(spec: str, function: Callable[..., Any], args: dict[str, Any]) -> list[str]:
    """Which of seed, temperature and max_tokens the function takes."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise UserError(f"judge {spec!r}: its signature cannot be read") from None
    options = ["seed", "temperature", "max_tokens"]
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        options = [name for name in options if name in parameters]
        for name in args:
            if name not in parameters:
                raise UserError(f"judge {spec!r} has no argument {name!r}")
    try:
        inspect.signature(function).bind([], **dict.fromkeys([*options, *args]))
    except TypeError as error:
        raise UserError(
            f"judge {spec!r}: {error}; wanted (conversations, *, seed, temperature, max_tokens)"
        ) from None
    return options


def _source_sha256(function: Callable[..., Any]) -> str | None:
    """Of the file that defines the function: another program, other replies. None if it has
    none."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        return None
    if path is None or not Path(path).is_file():
        return None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
