"""Which chat model a name means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_engine.chat.base import ChatModel
from grpo_engine.chat.cache import ReplyCache
from grpo_engine.types import UserError


def load_chat_model(spec: str, /, *, cache: str | Path | None = None, **options: Any) -> ChatModel:
    """The chat model that ``spec`` names.

    * ``http://...`` or ``https://...``: the base address of an OpenAI-compatible endpoint, usually
      ending in /v1. Options: ``EndpointOptions``, above all ``model``. The key is read from the
      environment variable ``api_key_env``.
    * ``package.module:function`` or ``file.py:function``: see ``function``, ``FunctionOptions``.
    * otherwise a local folder, a Hugging Face id or a built-in name: see ``LocalOptions``.

    ``cache``: the file that replies are kept in and found again (see ``ReplyCache``). Call
    ``check()`` before the first question. Raises UserError naming what is wrong.
    """
    kind = _kind_of(spec)
    read = kind.OPTIONS.read(spec, options)
    kept = None if cache is None else ReplyCache(cache)
    try:
        return kind(spec, read, kept)
    except BaseException:
        if kept is not None:
            kept.close()
        raise


def check_chat_model(spec: str, /, *, cache: str | Path | None = None, **options: Any) -> None:
    """What can be known of ``load_chat_model(spec, ...)`` before weights are loaded or an endpoint
    is asked: its options, and of a function that it is there and how it is called. Raises
    UserError."""
    kind = _kind_of(spec)
    read = kind.OPTIONS.read(spec, options)
    if kind.__name__ == "FunctionModel":
        kind(spec, read)


def _kind_of(spec: str) -> type[ChatModel]:
    if not isinstance(spec, str) or not spec.strip():
        raise UserError(f"judge {spec!r}: wanted an address, module:function or a model")
    if spec.startswith(("http://", "https://")):
        from grpo_engine.chat.endpoint import EndpointModel as kind
    elif ":" in spec and not Path(spec).expanduser().is_dir():
        from grpo_engine.chat.function import FunctionModel as kind
    else:
        from grpo_engine.chat.local import LocalModel as kind
    return kind
