"""Samplers: the protocol the loops use and its engines. vLLM is imported only in an engine's own
process, which imports from here too: so nothing heavy comes in before it is asked for."""

from importlib import import_module
from typing import Any

from grpo_engine.generation.base import Generator

__all__ = ["Generator", "HFGenerator"]


def __getattr__(name: str) -> Any:
    if name == "HFGenerator":
        return import_module("grpo_engine.generation.hf").HFGenerator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
