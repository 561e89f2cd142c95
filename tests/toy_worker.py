"""What a worker process of tests/test_worker.py serves, and the parent that one of them kills."""

import ctypes
import os
import socket
import subprocess
import sys
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from grpo_engine.types import UserError


class Toy:
    def __init__(self) -> None:
        self.seen_cancelled = 0

    def double(self, call, argument):
        return 2 * argument

    def count(self, call, argument):
        """Send 0, 1, ... with a pause after each, until ``number`` or the caller has enough."""
        number, pause = argument
        for i in range(number):
            if call.cancelled:
                self.seen_cancelled += 1
                return None
            call.send(i)
            time.sleep(pause)
        return number

    def cancelled(self, call, argument):
        return self.seen_cancelled

    def refuse(self, call, argument):
        raise UserError(argument)

    def fail(self, call, argument):
        raise RuntimeError("no such luck")

    def say(self, call, argument):
        print(argument, flush=True)

    def die(self, call, argument):
        print("about to die", flush=True)
        os._exit(7)

    def kill(self, call, argument):
        os.kill(os.getpid(), 9)

    def stand_still(self, call, argument):
        time.sleep(600)

    def hold_the_lock(self, call, argument):
        """In C, with the interpreter's lock: no thread of this process runs any more."""
        ctypes.PyDLL(None).sleep(600)

    def child(self, call, argument):
        """A grandchild that would outlive us; its id."""
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid

    def stubborn_child(self, call, argument):
        """One that ignores the signal that ends the others; its id, once it does."""
        code = "import signal, time; signal.signal(signal.SIGIO, signal.SIG_IGN); print(flush=True)"
        child = subprocess.Popen(
            [sys.executable, "-c", f"{code}; time.sleep(600)"], stdout=subprocess.PIPE
        )
        child.stdout.readline()
        return child.pid

    def hang_up(self, call, argument):
        call._channel.shutdown(socket.SHUT_RDWR)
        time.sleep(600)

    def share(self, call, argument):
        """Shared memory that nobody frees; its name."""
        self.memory = SharedMemory(create=True, size=16)
        return self.memory.name


def main() -> None:
    """A parent: starts a worker that has a child and shared memory, prints the two ids and the
    memory's name, waits to be killed."""
    from grpo_engine.generation.worker import WorkerProcess

    method, log = sys.argv[1:]
    worker = WorkerProcess("toy_worker:Toy", name="the toy", log_path=Path(log))
    started = worker.call("child", timeout_s=60), worker.call("share", timeout_s=60)
    print(worker.pid, *started, flush=True)
    worker.call(method, timeout_s=600)


if __name__ == "__main__":
    main()
