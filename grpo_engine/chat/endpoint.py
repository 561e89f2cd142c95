"""An OpenAI-compatible endpoint (``POST {base}/chat/completions``) as a chat model.

Standard library only. Requests go out in a bounded number of threads. A request is tried again
after 408, 409, 425, 429, 5xx, a lost connection, a timeout or a body that is no chat completion:
waits double with jitter, and a ``Retry-After`` holds back all threads. 401, 403, 404 and redirects
end the run (``UserError``): no retry mends them. Any other refusal (400: too long, say) is a
failure of that one conversation. When several conversations in a row have used up their tries, the
rest fail at once: the endpoint is down.

The key comes from an environment variable, goes into one header, and nowhere else: messages of the
server are cleaned of it.
"""

from __future__ import annotations

import difflib
import email.utils
import http.client
import json
import queue
import random
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator

from grpo_engine.chat.base import (
    ChatModel,
    ChatOptions,
    ChatSampling,
    Conversation,
    OnFailure,
    OnReplies,
)
from grpo_engine.chat.cache import ReplyCache
from grpo_engine.endpoints import api_key, checked_url, clean_words, read_body
from grpo_engine.types import UserError

API_KEY_ENV = "OPENAI_API_KEY"
RETRIED = {408, 409, 425, 429}
GRACE_SECONDS = 10.0  # for replies on their way when the run is stopped
_OWN_FIELDS = ("model", "messages", "temperature", "seed", "stream", "n")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another host, and turn the POST into a GET."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass
class _Failure(Exception):
    """One try came to nothing. ``wait``: what the server asked for, in seconds."""

    reason: str
    again: bool
    wait: float | None = None


class EndpointOptions(ChatOptions):
    """``model`` may be left out where the endpoint serves one only."""

    model: str | None = None
    # By default OPENAI_API_KEY, and without it no key is sent; a variable named here must be there.
    api_key_env: str | None = None
    timeout: float = Field(120.0, gt=0)  # seconds of one try, from connecting to the last byte
    max_concurrency: int = Field(8, ge=1, le=1024)  # requests on their way at once
    max_retries: int = Field(6, ge=0)  # further tries after the first
    backoff: float = Field(1.0, ge=0)  # first wait between tries, in seconds ...
    max_backoff: float = Field(60.0, ge=0)  # ... and the longest
    max_retry_after: float = Field(600.0, ge=0)  # a longer wait asked for is a failure instead
    max_tokens_field: str = "max_tokens"  # some servers call it max_completion_tokens
    omit: list[str] = []  # of temperature, seed and max_tokens_field: what the server refuses
    extra_body: dict[str, Any] = {}  # further fields of every request, such as top_p

    @model_validator(mode="after")
    def _fields(self) -> EndpointOptions:
        for name in self.omit:
            if name not in ("temperature", "seed", self.max_tokens_field):
                raise ValueError(f"omit must not hold {name!r}")
        for name in self.extra_body:
            if name in (*_OWN_FIELDS, self.max_tokens_field):
                raise ValueError(f"extra_body must not set {name!r}")
        return self


class EndpointModel(ChatModel):
    """See the module. ``spec``: the base address, usually ending in /v1. Raises UserError."""

    OPTIONS = EndpointOptions

    def __init__(
        self, spec: str, options: EndpointOptions, cache: ReplyCache | None = None
    ) -> None:
        self.url, self.options = checked_url("judge", spec), options
        self._key = api_key("judge", options.api_key_env, API_KEY_ENV)
        self._key_name = options.api_key_env or API_KEY_ENV
        # Proxies come from the environment, as everywhere.
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._jitter = random.Random()  # of waiting times only
        self._lock = threading.Lock()
        self._not_before = 0.0  # monotonic time before which no request goes out
        self._lost_in_a_row = 0
        self.model = options.model or self._only_model()
        identity = {
            "kind": "endpoint",
            "model": self.model,
            "omit": sorted(options.omit),
            "extra_body": options.extra_body,
        }
        super().__init__(identity, {"judge": self.url, "model": self.model}, cache)

    def check(self) -> None:
        """The address answers, takes the key and has the model. Costs nothing where the server
        lists its models, else one token."""
        names = self._listed_models()
        if names is None:
            self._try_repeatedly(
                lambda: self._post([{"role": "user", "content": "Hello"}], ChatSampling(0, 0.0, 1))
            )
        elif self.model not in names:
            near = difflib.get_close_matches(str(self.model), names, n=1)
            shown = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names[:5])}"
            raise UserError(f"judge {self.url!r} has no model {self.model!r}; {shown}")

    def _only_model(self) -> str:
        names = self._listed_models() or []
        if len(names) != 1:
            listed = f"{len(names)}: {', '.join(names[:5])}" if names else "none"
            raise UserError(
                f"judge {self.url!r}: needs the option model; the endpoint lists {listed}"
            )
        return names[0]

    def _listed_models(self) -> list[str] | None:
        """Ids of ``GET {base}/models``; None where the server has no such list."""
        body = self._try_repeatedly(lambda: self._send("models", None, listing=True))
        entries = body.get("data") if isinstance(body, dict) else None
        if not isinstance(entries, list):
            return None
        names = [entry.get("id") for entry in entries if isinstance(entry, dict)]
        return [name for name in names if isinstance(name, str)]

    def _try_repeatedly(self, send: Callable[[], Any]) -> Any:
        """``send()`` with a few retries; at the start there is no reason to wait for minutes."""
        for attempt in range(min(self.options.max_retries, 3) + 1):
            try:
                return send()
            except _Failure as failure:
                last = failure
                if not failure.again:
                    break
                time.sleep(min(self._wait_after(attempt, None), 5.0))
        raise UserError(f"judge {self.url!r}: {last.reason}")

    def _ask(
        self,
        conversations: list[Conversation],
        sampling: ChatSampling,
        on_replies: OnReplies,
        on_failure: OnFailure,
    ) -> None:
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        finished: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        for index in range(len(conversations)):
            waiting.put(index)
        stop = threading.Event()
        self._lost_in_a_row = 0

        def work() -> None:
            while not stop.is_set():
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    reply = self._reply(conversations[index], sampling, stop)
                    with self._lock:
                        on_replies({index: reply})
                    finished.put(None)
                except _Failure as failure:
                    with self._lock:
                        on_failure(index, failure.reason)
                    finished.put(None)
                except BaseException as error:  # goes on in the caller's thread
                    finished.put(error)
                    return

        count = min(self.options.max_concurrency, len(conversations))
        # Daemons: a process that is told to end does not wait for a server.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
        try:
            for thread in threads:
                thread.start()
            for _ in conversations:
                error = finished.get()
                if error is not None:
                    raise error
        finally:
            stop.set()
            end = time.monotonic() + GRACE_SECONDS
            for thread in threads:
                if thread.ident is not None:
                    thread.join(max(0.0, end - time.monotonic()))

    def _reply(
        self, conversation: Conversation, sampling: ChatSampling, stop: threading.Event
    ) -> str:
        """The reply to one conversation, after as many tries as it takes. Raises _Failure."""
        for attempt in range(self.options.max_retries + 1):
            with self._lock:
                if self._lost_in_a_row > self.options.max_concurrency:
                    raise _Failure("down: the endpoint has stopped answering", again=False)
                pause = self._not_before - time.monotonic()
            if stop.wait(max(0.0, pause)):
                break
            try:
                reply = self._post(conversation, sampling)
            except _Failure as failure:
                if not failure.again:
                    raise
                last = failure
                if failure.wait is not None and failure.wait > self.options.max_retry_after:
                    break
                if attempt < self.options.max_retries and stop.wait(
                    self._wait_after(attempt, failure)
                ):
                    break
            else:
                with self._lock:
                    self._lost_in_a_row = 0
                return reply
        if stop.is_set():
            raise _Failure("stopped", again=False)
        with self._lock:
            self._lost_in_a_row += 1
        raise last

    def _wait_after(self, attempt: int, failure: _Failure | None) -> float:
        """Seconds before the next try: doubling, half of it random; at least what was asked for,
        which then holds for every thread."""
        wait = min(self.options.max_backoff, self.options.backoff * 2**attempt)
        with self._lock:
            wait *= self._jitter.uniform(0.5, 1.0)
            if failure is not None and failure.wait is not None:
                self._not_before = max(self._not_before, time.monotonic() + failure.wait)
                wait = failure.wait + wait
        return wait

    def _post(self, conversation: Conversation, sampling: ChatSampling) -> str:
        drawn = {
            "temperature": sampling.temperature,
            "seed": sampling.seed_of(conversation),
            self.options.max_tokens_field: sampling.max_tokens,
        }
        body = self._send(
            "chat/completions",
            {
                "model": self.model,
                "messages": conversation,
                **{name: value for name, value in drawn.items() if name not in self.options.omit},
                **self.options.extra_body,
            },
        )
        try:
            choice = body["choices"][0]
            content = choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise _Failure("garbage: the body is no chat completion", again=True) from None
        if sampling.whole and choice.get("finish_reason") == "length":
            raise _Failure(sampling.cut, again=False)
        if content is None:  # all tokens went into hidden reasoning, or a filter cut it
            return ""
        if not isinstance(content, str):
            raise _Failure("garbage: the message's content is no text", again=True)
        return content

    def _send(self, path: str, fields: dict[str, Any] | None, *, listing: bool = False) -> Any:
        """One try: the JSON body of the answer. ``listing``: None where the path is not served.
        Raises _Failure, and UserError for what no retry mends."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        # Lone surrogates (a byte-level tokenizer cut in the middle) are escapes in ASCII JSON.
        sent = None if fields is None else json.dumps(fields).encode("ascii")
        request = urllib.request.Request(f"{self.url}/{path}", data=sent, headers=headers)
        deadline = time.monotonic() + self.options.timeout
        try:
            with self._opener.open(request, timeout=self.options.timeout) as answer:
                text = read_body(answer, deadline)
        except urllib.error.HTTPError as error:
            if listing and error.code in (404, 405, 501):
                return None
            raise self._refusal(error, deadline) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise UserError(f"judge {self.url!r}: {error.reason}") from None
            raise _Failure(f"connection: {self._clean(error.reason)}", again=True) from None
        except (OSError, http.client.HTTPException) as error:
            reason = self._clean(error) or type(error).__name__
            raise _Failure(f"connection: {reason}", again=True) from None
        try:
            return json.loads(text)
        except ValueError:
            raise _Failure("garbage: the body is not JSON", again=True) from None

    def _refusal(self, error: urllib.error.HTTPError, deadline: float) -> Exception:
        """What an HTTP status other than 2xx means."""
        with error:
            try:
                said = self._clean(read_body(error, deadline).decode("utf-8", "replace"))
            except (OSError, http.client.HTTPException):
                said = ""
        words = f"HTTP {error.code}" + (f": {said}" if said else "")
        if error.code in (401, 403):
            held = "was refused" if self._key is not None else "is not set"
            return UserError(f"judge {self.url!r}: {words} (the key in {self._key_name} {held})")
        if error.code == 404 or 300 <= error.code < 400:
            return UserError(f"judge {self.url!r}, model {self.model!r}: {words}")
        again = error.code in RETRIED or error.code >= 500
        return _Failure(words, again, _retry_after(error.headers.get("Retry-After")))

    def _clean(self, said: Any) -> str:
        return clean_words(said, self._key)


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (a number or a date); None where it says nothing usable."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        when = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    return max(0.0, when.timestamp() - time.time())
