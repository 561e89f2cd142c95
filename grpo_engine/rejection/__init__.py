"""``grpo-engine sample``: the two steps of the paper that make data to imitate.

Rejection sampling (v1 2.3.3, v2 B.3.3): several answers a prompt, of which the right and readable
ones are kept, and rows of other tasks are mixed in. Cold start (v1 2.3.1, v2 B.3.2): the same from
several generators, and what is kept is rewritten into one readable format, verified again, and
perhaps edited by a person.

``config`` the fields; ``generators`` how each way of sampling puts the question; ``verify`` right
or wrong; ``draw`` samples, kept as they come; ``select`` which of them are kept, and why the others
are not; ``readable`` the format and the rewriting; ``edits`` the file a person edits; ``mix`` rows
of other tasks; ``statistics`` the tables; ``work`` all of it in order; ``plan`` what is loaded and
checked before; ``run`` the folder around it.
"""

from __future__ import annotations

from typing import Any

__all__ = ["SampleConfig", "run_sample"]


def __getattr__(name: str) -> Any:  # the fields alone need no torch
    if name == "SampleConfig":
        from grpo_engine.rejection.config import SampleConfig

        return SampleConfig
    if name == "run_sample":
        from grpo_engine.rejection.run import run_sample

        return run_sample
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
