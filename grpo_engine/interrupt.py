"""Ctrl-C and SIGTERM: stop at a point from which the run can be continued exactly."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

INTERRUPTED = "grpo-engine: interrupted"


class StopRequested(BaseException):
    """The user or the scheduler asked the run to stop. Not an ``Exception``: reward code cannot
    swallow it."""


def came_of_stop(error: BaseException) -> bool:
    """Whether ``error`` is a Ctrl-C, or a stop request, that became another error on its way: the
    initialisation of an extension module makes an ImportError of whatever is raised in it."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, (KeyboardInterrupt, StopRequested)):
        found = found.__cause__
    return found is not None


@contextmanager
def quitting_on_ctrl_c() -> Iterator[None]:
    """Around the imports of a verb, when nothing is under way that would have to be saved: Ctrl-C
    ends the process at once, with one line and code 130. An exception might not come through:
    whoever tries an import takes what it turned into for a package that is not installed."""
    of_python = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not of_python or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _quit)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _quit(signum: int, frame: FrameType | None) -> None:
    os.write(2, b"\n" + INTERRUPTED.encode() + b"\n")
    os._exit(128 + signum)


class Interrupt:
    """Turns the first SIGINT/SIGTERM into a stop request; the second one ends the process at once.

    Inside ``abortable()`` (sampling, rewards, evaluation: work that is redone bit for bit on
    resume) the request raises ``StopRequested`` immediately. Elsewhere (between the gradients and
    the end of an update, while saving) it only sets ``signum``, and the loop stops at the next step
    boundary.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._abortable = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
            outer = getattr(handler, "__self__", None)
            if isinstance(outer, Interrupt) and outer.signum is None:
                outer.signum = self.signum  # asked of a stage is asked of the pipeline around it

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self.signum = signum
        # print is not safe in a signal handler; the run may be in the middle of one
        os.write(2, b"\ngrpo-engine: stopping at the next safe point; once more ends it at once\n")
        if self._abortable:
            raise StopRequested

    def check(self) -> None:
        """Raise ``StopRequested`` if a signal has arrived."""
        if self.signum is not None:
            raise StopRequested

    @contextmanager
    def abortable(self) -> Iterator[None]:
        self._abortable = True
        try:
            self.check()
            yield
        except (ImportError, SystemError) as error:
            if not came_of_stop(error):
                raise
            raise StopRequested from error
        finally:
            self._abortable = False

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM (128 + signal number), 0 when nothing was
        requested."""
        return 0 if self.signum is None else 128 + self.signum
