"""What a worker process of tests/test_worker.py serves, and the parent that one of them kills."""

import ctypes
import os
import subprocess
import sys
import time
from multiprocessing.shared_memory import SharedMemory

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

    def share(self, call, argument):
        """Shared memory that nobody frees; its name."""
        self.memory = SharedMemory(create=True, size=16)
        return self.memory.name


def main() -> None:
    """A parent: starts a worker with a child of its own, prints both ids, waits to be killed."""
    from grpo_engine.generation.worker import WorkerProcess

    worker = WorkerProcess("toy_worker:Toy", name="the toy")
    print(worker.pid, worker.call("child", timeout_s=60), flush=True)
    worker.call(sys.argv[1], timeout_s=600)


if __name__ == "__main__":
    main()
