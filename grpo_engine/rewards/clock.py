"""Loading time does not count against a completion's deadline.

A first ``import sympy`` on a busy machine can take longer than scoring one completion may. Code
that imports something heavy wraps it in ``loading()``; the worker then tells its pool, which
waits up to its start-up limit instead. Outside a worker nothing is listening and ``loading()``
does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_listeners: list[Callable[[bool], None]] = []


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
