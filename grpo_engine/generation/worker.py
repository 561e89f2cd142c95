"""A process of ours that serves calls: started, watched and killed by ``WorkerProcess``.

The caller's side never blocks where a signal cannot reach it: two threads move the frames, and the
calling thread only waits on a queue. So an exception out of a signal handler (Ctrl-C) may leave
``call`` at any point without tearing a frame; the call is then taken back, and what still arrives
of it is dropped by its number.

Who is watched, and how:

* no message of a call for ``timeout_s``: the worker writes the stacks of all its threads into its
  log (faulthandler, which needs neither its help nor the interpreter's lock) and is killed;
* it died: its exit status and its last log lines are the error;
* we died: the kernel kills the worker's whole process group, in whatever C loop it is, when our end
  of the lifeline closes (``die_with``).

One process of the group is spared, in each of these: Python's resource tracker, which ends by
itself once the others are gone, and first frees the shared memory and semaphores that they left in
/dev/shm. It ignores SIGIO, the signal of the lifeline and of ``_end``.

Nothing in here knows what is served.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from grpo_engine.child import describe, die_with, receive, send
from grpo_engine.types import GeneratorError, UserError

LOOK_UP_S = 0.5  # longest wait before looking whether the process is still there
CLOSE_S = 10.0  # for an orderly end, before the kill
CLEAN_UP_S = 2.0  # then for the tracker that frees shared memory
DUMP_S = 5.0  # for the stacks to be written
TAIL_LINES = 15
TAIL_BYTES = 1 << 20  # of a log, in which those lines are looked for
STACK_LINES = 12
EVERY_CALL = 0  # among the numbers of cancelled calls, which begin at 1
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from grpo_engine.generation.worker import serve; "
    "serve(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))"
)


class WorkerProcess:
    """One worker. It is its own session: a Ctrl-C at the terminal does not reach it.

    Args:
        entry: ``module:name`` of what makes the object that serves: each of its public methods
            takes (``Call``, argument) and returns the result. An optional ``close()`` comes last.
        name: what it is, for messages: "the vLLM engine".
        log_path: what it prints is appended there; None: a temporary file, kept if it fails.
        env: added to our environment.
    """

    def __init__(
        self,
        entry: str,
        *,
        name: str,
        log_path: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.failure = name, ""
        self._temporary = log_path is None
        if log_path is None:
            descriptor, made = tempfile.mkstemp(prefix="grpo-engine-worker-", suffix=".log")
            os.close(descriptor)
            log_path = Path(made)
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self.log_path = log_path
        self._calls, self._closing = 0, False
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        ours, theirs = socket.socketpair()
        lifeline_read, lifeline = os.pipe()
        try:
            with open(log_path, "ab") as log:
                self._log_start = log.tell()
                self.process = subprocess.Popen(
                    [
                        sys.executable,
                        "-c",
                        _BOOTSTRAP,
                        json.dumps([entry_ or os.getcwd() for entry_ in sys.path]),
                        entry,
                        str(theirs.fileno()),
                        str(lifeline_read),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(theirs.fileno(), lifeline_read),
                    start_new_session=True,
                    env={**os.environ, **(env or {})},
                )
        except BaseException:
            ours.close()
            os.close(lifeline)
            raise
        finally:
            theirs.close()
            os.close(lifeline_read)
        self._end = weakref.finalize(self, _end, self.process, ours, lifeline, os.getpid())
        for move, frames in ((_read, self._inbox), (_write, self._outbox)):
            threading.Thread(target=move, args=(ours, frames), daemon=True).start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def call(
        self,
        method: str,
        argument: Any = None,
        *,
        timeout_s: float,
        timeout_name: str = "",
        on_message: Callable[[Any], None] | None = None,
    ) -> Any:
        """The result of ``method`` there. ``on_message`` gets what it sends on the way.

        Raises UserError as it does; GeneratorError where it failed, died, or sent nothing for
        ``timeout_s`` (``timeout_name``: the setting behind it, for the message): it is then gone,
        and later calls raise too.
        """
        if self.failure or not self._end.alive:
            raise GeneratorError(f"{self.name} is gone: {self.failure or 'it was closed'}")
        self._calls += 1
        number = self._calls
        try:
            self._outbox.put(("call", number, method, argument))
            limit = f"{timeout_s:g} s" + (f" ({timeout_name})" if timeout_name else "")
            return self._result(number, method, timeout_s, limit, on_message)
        except BaseException:
            self._outbox.put(("cancel", number))
            raise

    def _result(
        self,
        number: int,
        method: str,
        timeout_s: float,
        limit: str,
        on_message: Callable[[Any], None] | None,
    ) -> Any:
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            try:
                message = self._inbox.get(timeout=min(LOOK_UP_S, max(left, 0.0)))
            except queue.Empty:
                if _has_ended(self.process):
                    raise self._died(method) from None
                if left <= 0:
                    raise self._hung(method, limit) from None
                continue
            if message is None:
                raise self._died(method)
            of_call, kind, value = message
            if of_call != number:
                continue  # of a call that was taken back
            if kind == "result":
                if self._closing:  # it was told to stop short
                    raise self._closed(method)
                return value
            if kind == "refused":
                raise UserError(value)
            if kind == "failed":
                raise self._fail(f"failed in {method}: {value}")
            if on_message is not None:
                on_message(value)
            deadline = time.monotonic() + timeout_s

    def _closed(self, method: str) -> GeneratorError:
        return GeneratorError(f"{self.name} was closed during {method}")

    def _died(self, method: str) -> GeneratorError:
        if self._closing:
            return self._closed(method)
        stop_at = time.monotonic() + LOOK_UP_S
        while not _has_ended(self.process) and time.monotonic() < stop_at:
            time.sleep(0.01)  # its socket closes a moment before it ends
        by_itself = _has_ended(self.process)
        self._end()
        code = self.process.returncode
        how = f"exit code {code}"
        if not by_itself:
            how = "it closed its connection, and was killed"
        elif code < 0:
            how = f"signal {-code} ({signal.Signals(-code).name})"
            if -code == signal.SIGKILL:
                how += "; out of memory?"
        return self._fail(f"died during {method}: {how}")

    def _hung(self, method: str, limit: str) -> GeneratorError:
        size = self.log_path.stat().st_size
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)
        stop_at = time.monotonic() + DUMP_S
        grown = -1
        while time.monotonic() < stop_at and grown != self.log_path.stat().st_size:
            grown = self.log_path.stat().st_size
            time.sleep(0.2 if grown > size else 0.5)
        return self._fail(f"made no progress for {limit} in {method}", stacks_from=size)

    def _fail(self, what: str, stacks_from: int | None = None) -> GeneratorError:
        """Kill it, and make the error: what happened, where it stood, what it said last."""
        self._end()
        parts = [what]
        with open(self.log_path, "rb") as log:
            end = log.seek(0, os.SEEK_END) if stacks_from is None else stacks_from
            start = log.seek(max(self._log_start, end - TAIL_BYTES))
            text = log.read(end - start).decode(errors="replace")
            if stacks_from is not None:
                stack = main_stack(log.read(TAIL_BYTES).decode(errors="replace"))
                if stack:
                    parts += ["where it stood (most recent call first):", *stack]
        said = [line for line in text.splitlines() if line.strip()]
        lines = [line for line in said if "resource_tracker" not in line][-TAIL_LINES:]
        parts += [f"the end of its log, {self.log_path}:", *(f"  {line}" for line in lines)]
        whole = "\n".join(parts)
        self.failure = f"it {whole}"  # told again to whoever calls next
        return GeneratorError(f"{self.name} {whole}")

    def close(self, wait_s: float = CLOSE_S) -> None:
        """End it, with everything that it started. Safe to call twice, and from another thread than
        the one in ``call``, which then raises.

        Args:
            wait_s: for it to end by itself, before it is killed.
        """
        self._closing = True
        if self._end.alive:
            try:
                self._outbox.put(("close",))
                stop_at = time.monotonic() + wait_s
                while not _has_ended(self.process) and time.monotonic() < stop_at:
                    time.sleep(0.01)
            finally:
                self._end()
        self._outbox.put(None)
        if self._temporary and not self.failure:
            self.log_path.unlink(missing_ok=True)


def main_stack(dump: str) -> list[str]:
    """The frames of the thread that took the signal, usually the main one, from faulthandler's
    dump."""
    lines = dump.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("Current thread"):
            frames = []
            for frame in lines[i + 1 :]:
                if not frame.startswith("  File"):
                    break
                frames.append(frame)
            return frames[:STACK_LINES]
    return []


def _has_ended(process: subprocess.Popen) -> bool:
    """Without reaping it: until then its id, and that of its group, cannot be anyone else's."""
    if process.returncode is not None:
        return True
    flags = os.WEXITED | os.WNOWAIT | os.WNOHANG
    try:
        return os.waitid(os.P_PID, process.pid, flags) is not None
    except ChildProcessError:
        return True


def _has_others(session: int) -> bool:
    """Whether any process of the session but its leader still runs."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != session:
            with contextlib.suppress(OSError):  # gone meanwhile
                stat = Path(entry.path, "stat").read_text(encoding="utf-8", errors="replace")
                state, _, _, of_session = stat.rpartition(")")[2].split()[:4]
                if int(of_session) == session and state != "Z":
                    return True
    return False


def _end(process: subprocess.Popen, channel: socket.socket, lifeline: int, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked copy of us: the worker is not its child
    try:
        if process.returncode is None:
            _signal_group(process, signal.SIGIO)  # all but the resource tracker
            stop_at = time.monotonic() + CLEAN_UP_S
            while time.monotonic() < stop_at:
                if _has_ended(process) and not _has_others(process.pid):
                    break
                time.sleep(0.01)
    finally:  # a second Ctrl-C may come meanwhile
        if process.returncode is None:
            _signal_group(process, signal.SIGKILL)
            process.wait()
        with contextlib.suppress(OSError):  # not connected any more
            channel.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads
        channel.close()
        os.close(lifeline)


def _signal_group(process: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        process.kill()


def _read(channel: socket.socket, inbox: queue.SimpleQueue) -> None:
    """Put every frame into ``inbox``, and None at the end."""
    with contextlib.suppress(OSError):  # closed under us
        while (message := receive(channel)) is not None:
            inbox.put(message)
    inbox.put(None)


def _write(channel: socket.socket, outbox: queue.SimpleQueue) -> None:
    """Send what ``outbox`` gives, until None or the other end is gone: the reader sees that."""
    with contextlib.suppress(OSError):
        while (message := outbox.get()) is not None:
            send(channel, message)


# -- in the worker ---------------------------------------------------------------------------------


class Call:
    """What a method that serves is told of the call it is in."""

    def __init__(self, channel: socket.socket, number: int, cancelled: set[int]) -> None:
        self.number = number
        self._channel, self._cancelled = channel, cancelled

    @property
    def cancelled(self) -> bool:
        """The caller wants no result any more: return soon, with all in order."""
        return not self._cancelled.isdisjoint((self.number, EVERY_CALL))

    def send(self, value: Any) -> None:
        """To the caller's ``on_message``. Anything sent counts as progress."""
        send(self._channel, (self.number, "message", value))


def serve(entry: str, channel_fd: int, lifeline_fd: int) -> None:
    """Serve calls until told to close. Ends the process, with its threads, in any case."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # in the tracker it stays ignored
    resource_tracker.ensure_running()  # the one of all processes that we may start
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    die_with(lifeline_fd)
    channel = socket.socket(fileno=channel_fd)
    calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
    cancelled: set[int] = set()
    threading.Thread(target=_listen, args=(channel, calls, cancelled), daemon=True).start()
    code = 1
    try:
        module, _, name = entry.partition(":")
        target = getattr(importlib.import_module(module), name)()
        while (message := calls.get()) is not None and message[0] == "call":
            _, number, method, argument = message
            answer = _answer(target, method, Call(channel, number, cancelled), argument)
            send(channel, (number, *answer))
            if answer[0] == "failed":
                break
        else:
            code = 0
            getattr(target, "close", int)()
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _answer(target: Any, method: str, call: Call, argument: Any) -> tuple[str, Any]:
    try:
        return "result", getattr(target, method)(call, argument)
    except UserError as error:
        return "refused", str(error)
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        return "failed", describe(error)


def _listen(channel: socket.socket, calls: queue.SimpleQueue, cancelled: set[int]) -> None:
    while (message := receive(channel)) is not None:
        if message[0] == "cancel":
            cancelled.add(message[1])
            continue
        if message[0] == "close":
            cancelled.add(EVERY_CALL)
        calls.put(message)
    cancelled.add(EVERY_CALL)
    calls.put(None)
