"""Running code nobody has read: a fresh sandbox for each program.

Three tiers, found out at start-up by really launching them, best first:

* ``bubblewrap``: needs the program ``bwrap`` >= 0.8 and user namespaces;
* ``namespaces``: the same walls by system calls of our own (``namespaces.py``), where bubblewrap
  is missing;
* ``rlimits-only (not a security boundary)``: limits, a temporary directory and, for root, another
  user id. Only when the caller asks for it by ``allow_rlimits_only``.

With none of them ``find_sandbox`` raises SandboxError and says what is missing.

Inside: no network, no environment, a read-only system of /usr and the interpreter, a few MiB of
tmpfs, a system-call filter, resource limits. Started by root, everything runs as uid 65534: the
kernel does not count the processes of uid 0. Only Python's standard library is promised.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_engine.rewards.sandbox_run import (
    NOBODY,
    Descriptors,
    Limits,
    SandboxError,
    SandboxRun,
)
from grpo_engine.rewards.seccomp import seccomp_filter

BUBBLEWRAP, NAMESPACES = "bubblewrap", "namespaces"
RLIMITS_ONLY = "rlimits-only (not a security boundary)"
_START_ATTEMPTS = 3
_MIB = 1 << 20
_SHM_MB = 16
_SYSTEM_PATHS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sandbox:
    """A tier that works on this machine, with the interpreter that works in it."""

    tier: str
    python: str
    python_prefix: str

    @property
    def is_boundary(self) -> bool:
        """Whether code inside is kept from the host, and not merely limited."""
        return self.tier != RLIMITS_ONLY

    @contextlib.contextmanager
    def start(
        self,
        job: dict[str, Any],
        *,
        stdin: bytes = b"",
        limits: Limits | None = None,
        lifetime_s: float | None = None,
    ) -> Iterator[SandboxRun]:
        """A running program, ended when the block is left. ``job``: see ``sandbox_boot.py``;
        ``lifetime_s`` bounds the CPU time of a program that is talked to more than once.

        Raises SandboxError when three attempts to start it have failed.
        """
        limits = limits or Limits()
        with contextlib.ExitStack() as stack:
            for attempt in range(1, _START_ATTEMPTS + 1):
                try:
                    place = "/" if self.is_boundary else stack.enter_context(_work_directory())
                    run = SandboxRun(
                        functools.partial(self.command, limits),
                        job,
                        stdin=stdin,
                        limits=limits,
                        lifetime_s=limits.wall_s if lifetime_s is None else lifetime_s,
                        isolated=self.is_boundary,
                        directory=place,
                    )
                    break
                except (SandboxError, OSError, subprocess.SubprocessError) as error:
                    # OSError: no descriptor, process or memory left on the host
                    if attempt == _START_ATTEMPTS:
                        raise SandboxError(str(error)) from error
                    time.sleep(0.1 * attempt)
            with run:
                yield run

    def command(self, limits: Limits, descriptors: Descriptors) -> list[str]:
        """The argument list that starts ``sandbox_boot.py`` in a fresh sandbox of this tier."""
        interpreter = [self.python, "-s", "-S", "-B", "-X", "utf8", "-c"]
        boot = [*interpreter, _source("sandbox_boot.py"), str(descriptors.channel)]
        if self.tier == BUBBLEWRAP:
            return [*self._bubblewrap(limits, descriptors), "--", *boot]
        if self.tier == NAMESPACES:
            plan = {
                "binds": self._binds(),
                "symlinks": _system_symlinks(),
                "sizes": {"/dev/shm": _SHM_MB, "/tmp": limits.disk_mb, "/work": limits.disk_mb},
                "inodes": 2 * limits.inodes,  # above the watched limit, which names its verdict
                "status_fd": descriptors.status,
                "seccomp_fd": descriptors.seccomp,
                "command": boot,
            }
            return [*interpreter, _source("namespaces.py"), json.dumps(plan)]
        return boot

    def _binds(self) -> list[str]:
        real = [path for path in _SYSTEM_PATHS if os.path.isdir(path) and not os.path.islink(path)]
        cache = [path for path in ("/etc/ld.so.cache",) if os.path.exists(path)]
        inside_usr = Path(self.python_prefix).is_relative_to("/usr")
        return ["/usr", *real, *cache, *([] if inside_usr else [self.python_prefix])]

    def _bubblewrap(self, limits: Limits, descriptors: Descriptors) -> list[str]:
        disk = str(limits.disk_mb * _MIB)
        mounts = [part for path in self._binds() for part in ("--ro-bind", path, path)]
        mounts += [part for path, to in _system_symlinks() for part in ("--symlink", to, path)]
        if seccomp_filter():
            mounts += ["--seccomp", str(descriptors.seccomp)]
        program = shutil.which("bwrap") or "bwrap"
        options = f"""
            --unshare-all --unshare-user --disable-userns --die-with-parent --new-session --as-pid-1
            --cap-drop ALL --hostname sandbox --json-status-fd {descriptors.status}
            --proc /proc --dev /dev --size {_SHM_MB * _MIB} --tmpfs /dev/shm --remount-ro /dev
            --size {disk} --tmpfs /tmp --size {disk} --tmpfs /work
        """
        return [program, *options.split(), *mounts, "--remount-ro", "/", "--chdir", "/work"]


def find_sandbox(*, allow_rlimits_only: bool = False) -> Sandbox:
    """The best tier that works here; the probes run once per process.

    Raises SandboxError naming what is missing when there is no boundary and ``allow_rlimits_only``
    is False.
    """
    with _probe_lock:
        found, reasons = _probe_boundaries()
        if found is None and allow_rlimits_only:
            found, reason = _probe(RLIMITS_ONLY)
            reasons = (*reasons, f"{RLIMITS_ONLY}: {reason}")
    if found is None:
        raise SandboxError("no sandbox for foreign code: " + "; ".join(reasons))
    if found.tier != BUBBLEWRAP:
        _warn_once(found.tier, "; ".join(reasons))
    return found


_probe_lock = threading.Lock()


@functools.lru_cache(maxsize=1)
def _probe_boundaries() -> tuple[Sandbox | None, tuple[str, ...]]:
    reasons = []
    for tier in (BUBBLEWRAP, NAMESPACES):
        found, reason = _probe(tier)
        if found is not None:
            return found, tuple(reasons)
        reasons.append(f"{tier}: {reason}")
    return None, tuple(reasons)


@functools.lru_cache(maxsize=8)
def _probe(tier: str) -> tuple[Sandbox | None, str]:
    """(the sandbox, "") if a program runs in it and its output comes back, else (None, why not)."""
    if tier == BUBBLEWRAP and shutil.which("bwrap") is None:
        return None, "the program bwrap is not installed (Debian: apt-get install bubblewrap)"
    reason = ""
    for python, prefix in _interpreters():
        sandbox = Sandbox(tier, python, prefix)
        try:
            with sandbox.start({"kind": "program", "code": "print(6 * 7)"}) as run:
                run.wait()
        except SandboxError as error:
            reason = reason or str(error)
            continue
        if run.stdout == b"42\n" and run.exit_code == 0:
            return sandbox, ""
        reason = reason or f"a test program ended by {run.end}, exit code {run.exit_code}"
    return None, reason


def _interpreters() -> list[tuple[str, str]]:
    """(program, prefix) of interpreters without a virtual environment, this one first.

    The others are for root, whose own interpreter uid 65534 often may not read.
    """
    own = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    found = [(own, os.path.realpath(sys.base_prefix))]
    for path in ("/usr/local/bin/python3", "/usr/bin/python3"):
        if os.path.exists(path) and os.path.realpath(path) != own:
            found.append((os.path.realpath(path), "/usr"))
    return found


@functools.lru_cache(maxsize=8)
def _warn_once(tier: str, reasons: str) -> None:
    _log.warning("code rewards run in the tier '%s' (%s)", tier, reasons)


def _system_symlinks() -> list[tuple[str, str]]:
    return [(path, os.readlink(path)) for path in _SYSTEM_PATHS if os.path.islink(path)]


@functools.lru_cache(maxsize=4)
def _source(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


@contextlib.contextmanager
def _work_directory() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="grpo-engine-") as path:
        if os.getuid() == 0:
            os.chown(path, NOBODY, NOBODY)
        yield path
