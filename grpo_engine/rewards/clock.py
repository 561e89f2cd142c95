"""What a reward tells the pool of its worker besides a score.

Loading time does not count against a completion's deadline.

A first ``import sympy`` on a busy machine can take longer than scoring one completion may. Code
that imports something heavy wraps it in ``loading()``; the worker then tells its pool, which
waits up to its start-up limit instead. Outside a worker nothing is listening and ``loading()``
does nothing.

What runs past the deadline has no score, unless it said before what being killed would mean. And a
reward may measure more than it rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_listeners: list[Callable[[bool], None]] = []
_verdict_listeners: list[Callable[[float, str], None]] = []
_measure_listeners: list[Callable[[str, float], None]] = []


def on_loading(listener: Callable[[bool], None]) -> None:
    """Call ``listener(True)`` when a load begins and ``listener(False)`` when it ends."""
    _listeners.append(listener)


@contextmanager
def loading() -> Iterator[None]:
    """Mark the block as loading."""
    for listener in _listeners:
        listener(True)
    try:
        yield
    finally:
        for listener in _listeners:
            listener(False)


def on_verdict_if_killed(listener: Callable[[float, str], None]) -> None:
    """Call ``listener(score, outcome)`` whenever ``verdict_if_killed`` is called."""
    _verdict_listeners.append(listener)


def verdict_if_killed(score: float, outcome: str) -> None:
    """From here on the completion is to blame if its score takes too long: it gets ``score`` and
    ``outcome`` then, instead of none. Outside a worker nothing is listening."""
    for listener in _verdict_listeners:
        listener(score, outcome)


def on_measured(listener: Callable[[str, float], None]) -> None:
    """Call ``listener(name, value)`` for everything ``measured``."""
    _measure_listeners.append(listener)


def measured(name: str, value: float) -> None:
    """A number about the completion being scored, for the metrics alone. ``name``: as in
    ``language/off_script_characters/answer``."""
    for listener in _measure_listeners:
        listener(name, value)
