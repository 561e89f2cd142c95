"""HTTP to a server that streams: JSON calls with a deadline, and streams of events that another
thread can break off. Standard library only; a connection per request, so that one that is lost
means a server that is lost. Proxies of the environment are not used: weights and rollouts stay in
the cluster.
"""

from __future__ import annotations

import http.client
import json
import queue
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from grpo_engine.endpoints import clean_words, read_body

CONNECT_SECONDS = 30.0
MAX_EVENT_BYTES = 64 * 2**20  # the supports of one chunk, spelled out
WORDS = 400  # characters of a server's answer that a message shows
GRACE_SECONDS = 10.0  # for threads whose stream was broken off

T = TypeVar("T")


@dataclass
class Refused(Exception):
    """The server answered, with another status than 2xx."""

    status: int
    words: str

    def __str__(self) -> str:
        return f"HTTP {self.status}" + (f": {self.words}" if self.words else "")


@dataclass
class Lost(Exception):
    """No whole answer: no connection, one that broke off, a deadline, a body that is no JSON."""

    reason: str

    def __str__(self) -> str:
        return self.reason


class Streams:
    """The streams being read, and when any of them last brought something.

    ``close`` breaks them all off, from any thread; the server then aborts their requests.
    """

    def __init__(self) -> None:
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.closed = False
        self.last_progress = time.monotonic()

    def progress(self) -> None:
        self.last_progress = time.monotonic()

    @contextmanager
    def reading(self, connection: http.client.HTTPConnection) -> Iterator[None]:
        """``connection`` is open in this context, and ``close`` reaches it."""
        try:
            connection.connect()
            sock = connection.sock  # http.client lets go of it once the answer's head is there
            with self._lock:
                if self.closed:
                    raise Lost("broken off")
                self._sockets.add(sock)
            try:
                sock.settimeout(None)  # how long is too long is for the reader of all streams
                yield
            finally:
                with self._lock:
                    self._sockets.discard(sock)
        finally:
            connection.close()

    def close(self) -> None:
        with self._lock:
            self.closed = True
            for sock in self._sockets:
                with suppress(OSError):  # it has ended by itself
                    sock.shutdown(socket.SHUT_RDWR)


def as_finished(
    work: Callable[[int], T], count: int, workers: int, streams: Streams, seconds: float
) -> Iterator[tuple[int, T]]:
    """(i, work(i)) for each i < ``count``, in so many threads, in the order in which they end.

    ``work`` reads from ``streams``, which are closed when this generator is. Raises what ``work``
    raises, and Lost where ``streams`` are closed meanwhile or bring nothing for ``seconds``.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    finished: queue.SimpleQueue[tuple[int, T] | BaseException] = queue.SimpleQueue()
    for index in range(count):
        waiting.put(index)

    def run() -> None:
        while not streams.closed:
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                finished.put((index, work(index)))
            except BaseException as error:  # goes on in the caller's thread
                finished.put(error)
                return

    # Daemons: a process that is told to end does not wait for a server.
    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(workers, count))]
    try:
        for thread in threads:
            thread.start()
        for _ in range(count):
            outcome = _next(finished, streams, seconds)
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome
    finally:
        streams.close()
        end = time.monotonic() + GRACE_SECONDS
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, end - time.monotonic()))


def _next(finished: queue.SimpleQueue[T], streams: Streams, seconds: float) -> T:
    while True:
        try:
            return finished.get(timeout=min(0.2, seconds))
        except queue.Empty:
            if streams.closed:
                raise Lost("closed meanwhile") from None
            if time.monotonic() - streams.last_progress > seconds:
                raise Lost(f"no sign of life for {seconds:g} s") from None


class Service:
    """A server at ``url``; ``key`` goes into the Authorization header, and nowhere else."""

    def __init__(self, url: str, key: str | None) -> None:
        parts = urllib.parse.urlsplit(url)
        self.url, self._key = url, key
        self._kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        self._address = parts.hostname, parts.port
        self._prefix = parts.path
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"

    def call(
        self,
        path: str,
        fields: dict[str, Any] | None = None,
        *,
        seconds: float,
        answers_json: bool = True,
    ) -> Any:
        """The answer, within ``seconds``, to a POST of ``fields``, or to a GET where that is None:
        what its JSON says (None where the body is empty), or text. Raises Refused, Lost."""
        deadline = time.monotonic() + seconds
        connection = self._connection(seconds)
        try:
            answer = self._ask(connection, path, fields)
            body = read_body(answer, deadline)
        except (OSError, http.client.HTTPException) as error:
            raise self._lost(error) from None
        finally:
            connection.close()
        if not 200 <= answer.status < 300:
            raise self._refused(answer.status, body)
        text = body.decode("utf-8", "replace")
        try:
            return json.loads(text) if answers_json and text.strip() else text or None
        except ValueError:
            raise Lost(f"no JSON: {self._clean(text)}") from None

    def events(
        self, path: str, fields: dict[str, Any], streams: Streams
    ) -> Iterator[dict[str, Any]]:
        """The server-sent events that answer a POST, up to "[DONE]". Raises Refused, Lost."""
        connection = self._connection(CONNECT_SECONDS)
        try:
            with streams.reading(connection), self._ask(connection, path, fields) as answer:
                if not 200 <= answer.status < 300:
                    body = read_body(answer, time.monotonic() + CONNECT_SECONDS)
                    raise self._refused(answer.status, body)
                while line := answer.readline(MAX_EVENT_BYTES):
                    streams.progress()
                    if not line.startswith(b"data:"):
                        continue
                    text = line[len(b"data:") :].strip()
                    if text == b"[DONE]":
                        return
                    yield self._event(text)
        except (OSError, http.client.HTTPException) as error:
            raise self._lost(error) from None
        raise Lost("the connection was closed in the middle")

    def _connection(self, seconds: float) -> http.client.HTTPConnection:
        return self._kind(*self._address, timeout=seconds)

    def _ask(
        self,
        connection: http.client.HTTPConnection,
        path: str,
        fields: dict[str, Any] | None,
    ) -> http.client.HTTPResponse:
        body = None if fields is None else json.dumps(fields).encode("ascii")
        method = "GET" if fields is None else "POST"
        connection.request(method, self._prefix + path, body, self._headers)
        return connection.getresponse()

    def _event(self, text: bytes) -> dict[str, Any]:
        try:
            event = json.loads(text)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise Lost(f"no event: {self._clean(text.decode('utf-8', 'replace'))}")
        if "error" in event:
            raise Lost(f"it stopped in the middle: {self._said(event)}")
        return event

    def _refused(self, status: int, body: bytes) -> Refused:
        try:
            said = self._said(json.loads(body))
        except ValueError:
            said = self._clean(body.decode("utf-8", "replace"))
        return Refused(status, said)

    def _said(self, answer: Any) -> str:
        """The message in an error's body: {"error": {"message": ...}}, {"error"} or {"detail"}."""
        for name in ("error", "detail", "message"):
            if isinstance(answer, dict) and name in answer:
                answer = answer[name]
        return self._clean(answer)

    def _lost(self, error: Exception) -> Lost:
        return Lost(self._clean(error) or type(error).__name__)

    def _clean(self, said: Any) -> str:
        return clean_words(said, self._key, WORDS)
