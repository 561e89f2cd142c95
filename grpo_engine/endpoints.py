"""Addresses, keys and bodies of HTTP services that a user names: what the chat endpoint and the
vLLM server have in common. A leaf.

``what`` begins each message: the field, or the thing that has the address.
"""

from __future__ import annotations

import http.client
import os
import time
import urllib.parse
from typing import Any

from grpo_engine.types import UserError

MAX_BODY_BYTES = 16 * 2**20


def checked_url(what: str, spec: str, *, example: str = "http://localhost:8000/v1") -> str:
    """``spec`` without a slash at its end. Raises UserError: no http address, or one that would
    carry a secret into files."""
    try:
        parts = urllib.parse.urlsplit(spec)
        is_good = bool((parts.hostname or "").encode("idna")) and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good or parts.scheme not in ("http", "https"):
        raise UserError(f"{what} {spec!r}: not an address such as {example}")
    if parts.username or parts.password or parts.query or parts.fragment:
        # It would end in config.yaml and manifest.json; so it is not repeated here either.
        raise UserError(
            f"{what} {parts.scheme}://{parts.hostname}...: the address must hold no user, "
            "password, query or fragment; a key belongs in an environment variable"
        )
    return spec.rstrip("/")


def api_key(what: str, name: str | None, default: str) -> str | None:
    """The key in the environment variable ``name``, or ``default`` where that is None (then it may
    be absent: None). Raises UserError, which never repeats the key."""
    if name is not None and not name.isidentifier():  # perhaps the key itself: not repeated here
        raise UserError(f"{what}: api_key_env must be the name of an environment variable")
    key = os.environ.get(name or default, "").strip()
    if not key:
        if name is not None:
            raise UserError(f"{what}: the environment variable {name} (api_key_env) is not set")
        return None
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{what}: the key in {name or default} has characters no header may hold")
    return key


def clean_words(said: Any, key: str | None, limit: int = 200) -> str:
    """What a server said, on one line of at most ``limit`` characters, without the key."""
    text = str(said)
    if key is not None:
        text = text.replace(key, "***")
    return " ".join(text.split())[:limit]


def read_body(answer: Any, deadline: float) -> bytes:
    """The whole body, before ``deadline`` on the monotonic clock: a socket's own timeout starts
    anew with every byte. Raises TimeoutError, http.client.HTTPException for one too large."""
    pieces, size = [], 0
    while piece := answer.read1(1 << 16):
        size += len(piece)
        if size > MAX_BODY_BYTES:
            raise http.client.HTTPException(f"a body of more than {MAX_BODY_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
        pieces.append(piece)
    return b"".join(pieces)
