"""One reward worker seen from outside: child process, socket, lifeline, and what it printed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque

_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from grpo_engine.rewards.worker import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)
_OUTPUT_TAIL_BYTES = 2000


class WorkerProcess:
    """One child process and what the supervisor knows about it."""

    def __init__(self, hello: bytes, startup_timeout_s: float) -> None:
        ours, theirs = socket.socketpair()
        lifeline_read, self.lifeline = os.pipe()
        output_read, output_write = os.pipe()
        try:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _BOOTSTRAP,
                    json.dumps([entry or os.getcwd() for entry in sys.path]),
                    str(theirs.fileno()),
                    str(lifeline_read),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output_write,
                stderr=output_write,
                pass_fds=(theirs.fileno(), lifeline_read),
                start_new_session=True,  # Ctrl-C is ours to handle; killpg reaches its children
                env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            )
        except BaseException:
            ours.close()
            os.close(self.lifeline)
            os.close(output_read)
            raise
        finally:
            theirs.close()
            os.close(lifeline_read)
            os.close(output_write)
        ours.setblocking(False)
        os.set_blocking(output_read, False)
        self.channel = ours
        self.output = output_read
        self.output_open = True
        self.printed = b""
        self.incoming = b""
        self.outgoing = bytearray(hello)
        self.ready = False
        self.assigned: deque[int] = deque()  # tasks, the one being scored first
        self.if_killed: tuple[float, str] | None = None  # (score, outcome) of that being scored
        self.scored = 0
        self.deadline = time.monotonic() + startup_timeout_s

    @property
    def busy(self) -> bool:
        return not self.ready or bool(self.assigned)

    def kill(self) -> None:
        """SIGKILL to the worker and its children, then reap it. Safe to call twice."""
        if self.process.returncode is None:
            try:
                # It has not been reaped, so the id cannot belong to anyone else.
                os.killpg(self.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                self.process.kill()
            self.process.wait()
        if self.output_open:
            self.read_output()
        self.channel.close()
        for name in ("lifeline", "output"):
            descriptor = getattr(self, name)
            setattr(self, name, -1)
            if descriptor >= 0:
                os.close(descriptor)
        self.output_open = False

    def read_output(self) -> None:
        """Keep the tail of what the rewards printed."""
        try:
            piece = os.read(self.output, 1 << 20)
        except BlockingIOError:
            return
        self.output_open = bool(piece)
        self.printed = (self.printed + piece)[-_OUTPUT_TAIL_BYTES:]

    def last_lines(self) -> str:
        """What the worker printed last, as the end of an error message; empty if it was silent."""
        if self.output_open:
            self.read_output()
        lines = self.printed.decode(errors="replace").strip().splitlines()[-3:]
        return f"; its last output: {' | '.join(lines)}" if lines else ""
