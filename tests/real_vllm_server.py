"""A real `vllm serve` beside the tests, started with the command line that our errors print."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from grpo_engine.generation.server_check import ServerOptions, serve_command
from grpo_engine.generation.vllm_server import connect_server
from grpo_engine.types import UserError

# A machine without a GPU, and tests that are not to take all of it.
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
SMALL = ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "4"]


class RealServer:
    """``url``, ``process`` and the ``log`` file of a running server."""

    def __init__(self, url, process, log):
        self.url, self.process, self.log = url, process, log
        self.shared: set[str] = set()  # files in /dev/shm that it had when it was told to end

    def post(self, path, fields=None):
        body = json.dumps(fields or {}).encode()
        request = urllib.request.Request(
            self.url + path, body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()

    def running(self):
        """Requests that it is sampling."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=60) as answer:
            text = answer.read().decode()
        numbers = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", text, re.M)
        return sum(map(float, numbers))

    def kill(self):
        """At once, as a machine without memory would; but for Python's resource trackers, which end
        after the others and free what these had in /dev/shm."""
        self.note_shared()
        for pid in self.members():
            with suppress(OSError):  # gone meanwhile
                if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)

    def note_shared(self):
        for pid in self.members():
            with suppress(OSError):
                maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
                self.shared |= set(re.findall(r"/dev/shm/\S+$", maps, re.M))

    def members(self):
        """Its processes that still run: all of its session."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
                    state, _, _, session = stat.rpartition(")")[2].split()[:4]
                    if int(session) == self.process.pid and state != "Z":
                        found.append(int(entry.name))
        return found

    def connect(self, policy, options):
        options = replace(options, base_url=self.url, timeout_s=120, start_timeout_s=240)
        try:
            return connect_server(policy, options)
        except UserError as error:
            pytest.fail(f"{error}\n{self.log.read_text()[-5000:]}")


@contextmanager
def serve(policy, folder, **options):
    """A server for ``policy`` with what ``ServerOptions(**options)`` needs; (server, options)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        options = ServerOptions(f"http://127.0.0.1:{free.getsockname()[1]}", **options)
    words = shlex.split(serve_command(policy, options))
    start = words.index("python")
    settings, command = dict(word.split("=") for word in words[:start]), words[start + 1 :]
    log = folder / "vllm.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command, *SMALL],
            env={**os.environ, **ENVIRONMENT, **settings},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    server = RealServer(options.url, process, log)
    try:
        yield server, options
    finally:
        if process.poll() is None:
            server.note_shared()
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
        server.kill()
        process.wait()
        stop_at = time.monotonic() + 20
        while server.members() and time.monotonic() < stop_at:
            time.sleep(0.05)
    assert server.shared and not [name for name in server.shared if os.path.exists(name)]
    assert not server.members()
