"""What every chat model has in common: equal requests are asked once, replies are kept, and a
request that fails is counted, not guessed."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from grpo_engine.chat.cache import ReplyCache
from grpo_engine.types import UserError

Conversation = list[dict[str, str]]
OnReplies = Callable[[dict[int, str]], None]
OnFailure = Callable[[int, str], None]


@dataclass(frozen=True)
class ChatSampling:
    """How a reply is drawn; temperature 0 is greedy. ``max_tokens`` counts the reply's tokens;
    ``whole``: one that is cut there is a failure."""

    seed: int
    temperature: float
    max_tokens: int
    whole: bool = False

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {self.max_tokens}")

    @property
    def cut(self) -> str:
        """The reason of that failure."""
        return f"cut: the reply does not end within max_tokens={self.max_tokens}"

    def seed_of(self, conversation: Conversation) -> int:
        """31 bits that differ between conversations, so that none borrows another's luck."""
        return int(plain_hash([self.seed, conversation])[:8], 16) >> 1


class ChatOptions(BaseModel):
    """The options of one kind of chat model. ``read`` raises UserError naming option and value."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @classmethod
    def read(cls, spec: str, options: dict[str, Any]) -> ChatOptions:
        for name in options:
            if name not in cls.model_fields:
                known = ", ".join(cls.model_fields)
                raise UserError(f"judge {spec!r} has no option {name!r}; it has: {known}")
        try:
            return cls(**options)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"])) or "options"
            message = first["msg"].removeprefix("Value error, ")
            raise UserError(f"judge {spec!r}: {name} {first['input']!r:.80}: {message}") from None


class ChatModel(ABC):
    """Answers conversations. Subclasses implement ``_ask``, set ``identity``, and take ``spec``,
    their ``OPTIONS`` and a cache.

    Attributes:
        identity: plain data that says which model this is, part of every cache key. Where it is
            found (an address, a folder) does not belong in it: that may change between a run and
            its continuation. No secrets.
        place: where it was found, for manifests; no secrets either.
        asked, recalled, failed: requests sent on, found in the cache, and left without a reply.
        first_failure: the reason of the first of those, for error messages.
    """

    OPTIONS: ClassVar[type[ChatOptions]]

    def __init__(
        self, identity: dict[str, Any], place: dict[str, Any], cache: ReplyCache | None = None
    ) -> None:
        self.identity, self.place = identity, place
        self.cache = cache
        self.asked = self.recalled = 0
        self.failed: Counter[str] = Counter()
        self.first_failure: str | None = None

    def complete(
        self,
        conversations: Sequence[Conversation],
        *,
        seed: int = 0,
        temperature: float = 0.0,
        max_tokens: int = 1024,
        whole: bool = False,
    ) -> list[str | None]:
        """One reply to each conversation, in order; None where none could be had, and with
        ``whole`` where it is cut at ``max_tokens`` (a Python function cannot say so).

        A conversation is a list of messages with ``role`` and ``content``. Equal conversations get
        the same reply: ask again with another ``seed`` for another. Raises UserError for what no
        retry can mend (a refused key, an unknown model).
        """
        sampling = ChatSampling(seed, temperature, max_tokens, whole)
        keys = [self.key(conversation, sampling) for conversation in conversations]
        replies: dict[str, str] = {}
        wanted: dict[str, Conversation] = {}
        for key, conversation in zip(keys, conversations, strict=True):
            known = self.cache.get(key) if self.cache is not None else None
            if known is not None:
                replies[key] = known
                self.recalled += 1
            else:
                wanted.setdefault(key, conversation)
        if wanted:
            names = list(wanted)

            def on_replies(arrived: dict[int, str]) -> None:
                # Kept as they come: an interruption loses only what is still on its way.
                named = {names[index]: _writable(reply) for index, reply in arrived.items()}
                replies.update(named)
                if self.cache is not None:
                    self.cache.put(named)

            def on_failure(index: int, reason: str) -> None:
                self.failed[reason.partition(":")[0]] += 1
                self.first_failure = self.first_failure or reason

            self.asked += len(wanted)
            self._ask(list(wanted.values()), sampling, on_replies, on_failure)
        return [replies.get(key) for key in keys]

    def key(self, conversation: Conversation, sampling: ChatSampling) -> str:
        """128 bits over all that a reply depends on."""
        drawn: list[Any] = [sampling.seed, sampling.temperature, sampling.max_tokens]
        if sampling.whole:
            drawn.append("whole")
        return plain_hash([self.identity, conversation, drawn])

    def check(self) -> None:
        """Find out at the start whether the model will answer. Raises UserError."""
        return None  # a loaded model or function will

    def close(self) -> None:
        """Let go of the cache's file and of weights."""
        if self.cache is not None:
            self.cache.close()

    @abstractmethod
    def _ask(
        self,
        conversations: list[Conversation],
        sampling: ChatSampling,
        on_replies: OnReplies,
        on_failure: OnFailure,
    ) -> None:
        """Hand each conversation's reply to ``on_replies`` or its reason, "kind: details", to
        ``on_failure``, under its index, in any order, from one thread at a time. Replies handed
        over together are kept together or not at all."""


def plain_hash(value: Any) -> str:
    """32 hex digits over plain data."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _writable(text: str) -> str:
    """Without lone surrogates, which the cache could not give back."""
    return text.encode("utf-8", "replace").decode("utf-8")
