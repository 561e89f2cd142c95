"""Samplers: the protocol the loops use and its engines. vLLM is imported only by its own module."""

from grpo_engine.generation.base import Generator
from grpo_engine.generation.hf import HFGenerator

__all__ = ["Generator", "HFGenerator"]
