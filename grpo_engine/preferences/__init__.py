"""``grpo-engine preferences``: what the reward models learn from (DeepSeek-R1 v2, 3.1).

Helpful: pairs of answers to one prompt, each judged several times by a chat model with the order
swapped, kept where the mean difference is clear. Safety: whole responses, each labelled safe or
unsafe.

``config`` the fields; ``answers`` where the answers come from; ``pairs`` and ``labels`` what the
judge makes of them; ``statistics`` the tables; ``run`` the stage.
"""

from __future__ import annotations

from typing import Any

__all__ = ["PreferencesConfig", "run_preferences"]


def __getattr__(name: str) -> Any:  # the fields alone need no torch
    if name == "PreferencesConfig":
        from grpo_engine.preferences.config import PreferencesConfig

        return PreferencesConfig
    if name == "run_preferences":
        from grpo_engine.preferences.run import run_preferences

        return run_preferences
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
