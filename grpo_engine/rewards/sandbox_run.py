"""One program in one sandbox: started, talked to, watched, and ended without a trace.

The limits of the kernel hold for each process. What the sandbox uses as a whole (time, output,
memory, number of files and of sockets) is watched from here, every 50 ms. Ending it is one SIGKILL,
through a pidfd, to process 1 of its namespace; the kernel then ends all the others, and the
launcher, whose exit we wait for, reaps process 1: no zombie is left to anybody.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import select
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_engine.rewards.seccomp import seccomp_filter

NOBODY = 65534
_START_TIMEOUT_S = 20.0
_WATCH_INTERVAL_S = 0.05
_MIB = 1 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE")
_CHILD_PID = re.compile(rb'"child-pid": *(\d+)')
_MAX_STATUS_BYTES = 10_000
_READY = b'"ready"\n'


class SandboxError(Exception):
    """The sandbox could not be started. Never the fault of the code in it."""


@dataclass(frozen=True)
class Limits:
    """What one sandbox may use.

    ``memory_mb`` holds for each process and for all together; ``disk_mb`` for each of /tmp and
    /work, which are in memory; ``sockets`` for all processes together, because nothing else counts
    the memory of their buffers; ``wall_s`` for each wait; ``output_bytes`` for stdout, for stderr
    and for one message.
    """

    wall_s: float = 4.0
    memory_mb: int = 1024
    processes: int = 64
    file_mb: int = 32
    open_files: int = 128
    disk_mb: int = 64
    inodes: int = 10_000
    sockets: int = 64
    output_bytes: int = _MIB

    def for_kernel(self, lifetime_s: float) -> dict[str, int]:
        """Values of RLIMIT_*, in their units."""
        return {
            "CPU": int(lifetime_s) + 2,
            "AS": self.memory_mb * _MIB,
            "NPROC": self.processes,
            "FSIZE": self.file_mb * _MIB,
            "NOFILE": self.open_files,
            "STACK": 64 * _MIB,
            "CORE": 0,
            "MSGQUEUE": 0,
        }


@dataclass(frozen=True)
class Descriptors:
    """The descriptors a launcher is given besides the standard three."""

    channel: int
    status: int
    seccomp: int


class SandboxRun:
    """A running sandbox. Use as a context manager: leaving it ends everything inside.

    ``end`` says how it ended, None while it runs: ``exited`` (see ``exit_code``; 128 + N for
    signal N), ``closed``, or the limit it reached: ``time``, ``output``, ``memory``, ``files``,
    ``sockets``.
    Raises SandboxError or OSError when the program could not be started. ``isolated`` is False for
    a launcher without namespaces, whose process group is all that can be ended.
    """

    def __init__(
        self,
        command: Callable[[Descriptors], list[str]],
        job: dict[str, Any],
        *,
        stdin: bytes,
        limits: Limits,
        lifetime_s: float,
        isolated: bool,
        directory: str,
    ) -> None:
        self.limits = limits
        self.end: str | None = None
        self.exit_code: int | None = None
        self.stdout, self.stderr = bytearray(), bytearray()
        self._messages, self._status = bytearray(), bytearray()
        self._isolated = isolated
        self._descriptors: set[int] = set()
        self._process: subprocess.Popen | None = None
        self._first_pid = 0  # process 1 of the namespace, by its number here
        self._first_pidfd = -1
        self._selector = selectors.DefaultSelector()
        self._next_watch = math.inf  # until ready: the root it sees before that is the host's
        body = json.dumps({**job, "limits": limits.for_kernel(lifetime_s)}).encode()
        try:
            self._start(command, directory, stdin, len(body).to_bytes(8, "big") + body)
            self._await_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SandboxRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def exchange(self, message: Any) -> Any:
        """Send one message and wait for one; see ``receive``."""
        self._send(self._channel, json.dumps(message).encode() + b"\n")
        return self.receive()

    def receive(self) -> Any:
        """The next message from inside; None when it ended, reached a limit or wrote nonsense."""
        self._pump(lambda: b"\n" in self._messages, self.limits.wall_s)
        line, newline, rest = bytes(self._messages).partition(b"\n")
        if not newline:
            return None
        self._messages[:] = rest
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            return None

    def wait(self) -> None:
        """Until the program ends, at most ``wall_s``."""
        self._pump(lambda: False, self.limits.wall_s)

    def close(self) -> None:
        """End everything inside and give back every descriptor. Safe to call twice."""
        self._kill("closed")
        if self._process is not None:
            self._process.wait()
        self._selector.close()
        for descriptor in list(self._descriptors):
            self._close_descriptor(descriptor)

    # Starting

    def _start(
        self,
        command: Callable[[Descriptors], list[str]],
        directory: str,
        stdin: bytes,
        job: bytes,
    ) -> None:
        stdin_read, stdin_write = self._pipe()
        stdout_read, stdout_write = self._pipe()
        stderr_read, stderr_write = self._pipe()
        status_read, status_write = self._pipe()
        seccomp_read, seccomp_write = self._pipe()
        ours, theirs = (end.detach() for end in socket.socketpair())
        self._descriptors |= {ours, theirs}
        self._channel = os.dup(ours)  # for writing: a selector takes a descriptor once
        self._descriptors.add(self._channel)
        os.write(seccomp_write, seccomp_filter())  # far below a pipe's capacity
        root = os.getuid() == 0
        self._process = subprocess.Popen(
            command(Descriptors(theirs, status_write, seccomp_read)),
            stdin=stdin_read,
            stdout=stdout_write,
            stderr=stderr_write,
            pass_fds=(theirs, status_write, seccomp_read),
            cwd=directory,
            env=_environment("/work" if self._isolated else directory),
            # With namespaces the launcher stays in our group: it dies with us.
            start_new_session=not self._isolated,
            **(dict(user=NOBODY, group=NOBODY, extra_groups=[]) if root else {}),
        )
        exit_notice = os.pidfd_open(self._process.pid)
        for end in (stdin_read, stdout_write, stderr_write, status_write, theirs):
            self._close_descriptor(end)
        self._close_descriptor(seccomp_read)
        self._close_descriptor(seccomp_write)
        self._descriptors.add(exit_notice)
        self._selector.register(exit_notice, selectors.EVENT_READ, self._on_exit)
        self._read_from(stdout_read, self.stdout, self.limits.output_bytes)
        self._read_from(stderr_read, self.stderr, self.limits.output_bytes)
        self._read_from(status_read, self._status, _MAX_STATUS_BYTES)
        self._read_from(ours, self._messages, self.limits.output_bytes)
        self._stdin = stdin_write
        os.set_blocking(stdin_write, False)
        self._send(self._channel, job)
        self._send(stdin_write, stdin)

    def _await_ready(self) -> None:
        """The first message comes after all set-up and before any foreign code."""
        if self._isolated:
            self._pump(lambda: _CHILD_PID.search(self._status) is not None, _START_TIMEOUT_S)
            found = _CHILD_PID.search(self._status)
            if found:
                self._adopt(int(found[1]))
        self._pump(lambda: b"\n" in self._messages, _START_TIMEOUT_S)
        if not self._messages.startswith(_READY):
            reason = " ".join(self.stderr.decode(errors="replace").split())[-300:]
            raise SandboxError(reason or f"not ready: {self.end}, exit code {self.exit_code}")
        del self._messages[: len(_READY)]
        self._next_watch = time.monotonic() + _WATCH_INTERVAL_S

    def _adopt(self, pid: int) -> None:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return  # it has ended, and the launcher is about to
        self._descriptors.add(pidfd)
        # Opened first, looked at second: now the number cannot have passed to another.
        parent = _parent_of(pid)
        if parent == self._process.pid:
            self._first_pid, self._first_pidfd = pid, pidfd
        elif parent != 0:
            raise SandboxError(f"process {pid} is not a child of the launcher")

    def _pipe(self) -> tuple[int, int]:
        ends = os.pipe()
        self._descriptors.update(ends)
        return ends

    def _close_descriptor(self, descriptor: int) -> None:
        if descriptor in self._descriptors:
            self._descriptors.remove(descriptor)
            os.close(descriptor)

    # Talking

    def _read_from(self, descriptor: int, content: bytearray, limit: int) -> None:
        os.set_blocking(descriptor, False)

        def read() -> None:
            try:
                piece = os.read(descriptor, 1 << 16)
            except BlockingIOError:
                return
            except ConnectionResetError:
                piece = b""
            content.extend(piece[: limit + 1 - len(content)])
            if not piece:
                self._unregister(descriptor)
            elif len(content) > limit:
                self._kill("output")

        self._selector.register(descriptor, selectors.EVENT_READ, read)

    def _send(self, descriptor: int, content: bytes) -> None:
        unsent = memoryview(content)

        def write() -> None:
            nonlocal unsent
            try:
                unsent = unsent[os.write(descriptor, unsent) :]
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionResetError):
                unsent = unsent[:0]  # nobody will read it
            if not unsent:
                self._unregister(descriptor)
                if descriptor == self._stdin:
                    self._close_descriptor(descriptor)

        self._unregister(descriptor)  # of a message that was cut short
        self._selector.register(descriptor, selectors.EVENT_WRITE, write)

    def _unregister(self, descriptor: int) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(descriptor)

    def _pump(self, done: Callable[[], bool], seconds: float) -> None:
        """Move bytes until ``done``, the end, or the deadline, which ends the sandbox."""
        deadline = time.monotonic() + seconds
        while self.end is None and not done():
            now = time.monotonic()
            if now >= deadline:
                self._kill("time")
            elif now >= self._next_watch:
                self._watch()
                self._next_watch = time.monotonic() + _WATCH_INTERVAL_S
            else:
                for key, _ in self._selector.select(min(deadline, self._next_watch) - now):
                    if self.end is None:
                        key.data()

    # Ending

    def _on_exit(self) -> None:
        """The launcher has exited, so nothing is left inside; take in what the pipes still hold."""
        self.exit_code = self._process.wait()
        ended = [key.fd for key in self._selector.get_map().values() if key.data == self._on_exit]
        for descriptor in ended:
            self._unregister(descriptor)
        # Not to the end of file: without namespaces a survivor may hold a pipe open.
        while self.end is None and self._selector.get_map():
            readable = [
                k for k, events in self._selector.select(0) if events & selectors.EVENT_READ
            ]
            if not readable:
                break
            for key in readable:
                key.data()
        self.end = self.end or "exited"

    def _kill(self, reason: str) -> None:
        if self._process is None or self._process.returncode is not None:
            self.end = self.end or reason
            return
        self.end = self.end or reason
        if self._first_pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._first_pidfd, signal.SIGKILL)
            try:
                self._process.wait(timeout=5)  # it reaps process 1 and exits
                return
            except subprocess.TimeoutExpired:
                self._process.kill()
        elif self._isolated:
            self._process.kill()  # before process 1 was known
        else:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _watch(self) -> None:
        """End the sandbox if all of it together has passed a limit."""
        if self._first_pid == 0:
            return
        passed = None
        if _resident_bytes(self._first_pid) > self.limits.memory_mb * _MIB:
            passed = "memory"
        elif any(
            _files_in(self._first_pid, place) > self.limits.inodes for place in ("tmp", "work")
        ):
            passed = "files"
        elif _sockets_in(self._first_pid) > self.limits.sockets:
            passed = "sockets"
        if passed is not None and not _has_exited(self._first_pidfd):
            self._kill(passed)  # it was ours we measured, not another under the same number


def _environment(home: str) -> dict[str, str]:
    """All that the program sees of an environment. The fixed hash seed makes verdicts repeat."""
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": home,
        "TMPDIR": "/tmp" if home == "/work" else home,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
    }


def _parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _has_exited(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])


def _resident_bytes(pid: int) -> int:
    """Resident memory of ``pid`` and its descendants; a shared page counts in each of them."""
    pages, waiting = 0, [pid]
    while waiting:
        one = waiting.pop()
        try:
            pages += int(Path(f"/proc/{one}/statm").read_text().split()[1])
            for task in os.listdir(f"/proc/{one}/task"):
                waiting += map(int, Path(f"/proc/{one}/task/{task}/children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
    return pages * _PAGE


def _files_in(pid: int, place: str) -> int:
    try:
        found = os.statvfs(f"/proc/{pid}/root/{place}")
    except OSError:
        return 0  # ended while we looked; a live one of ours is always readable
    return found.f_files - found.f_ffree


def _sockets_in(pid: int) -> int:
    """Open sockets of the network namespace of ``pid``."""
    try:
        words = Path(f"/proc/{pid}/net/sockstat").read_text().split()
    except OSError:
        return 0  # ended while we looked
    return int(words[words.index("used") + 1])
