"""The sandbox: what a program in it can use, reach and leave behind. Every test runs in both tiers
that are a boundary, where they exist, and afterwards nothing of it may be left."""

import dataclasses
import errno
import os
import pathlib
import platform
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from grpo_engine.rewards import sandbox as sandboxes
from grpo_engine.rewards import sandbox_run
from grpo_engine.rewards.sandbox import BUBBLEWRAP, NAMESPACES, RLIMITS_ONLY, find_sandbox
from grpo_engine.rewards.sandbox_run import Limits, SandboxError
from grpo_engine.rewards.seccomp import seccomp_filter


@pytest.fixture(scope="module", params=[BUBBLEWRAP, NAMESPACES])
def sandbox(request):
    found, reason = sandboxes._probe(request.param)
    if found is None:
        pytest.skip(f"{request.param}: {reason}")
    return found


def processes_with(marker):
    """Processes, of whatever parent, whose environment holds ``marker``."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as environment:
                if marker in environment.read() and int(pid) != os.getpid():
                    found.append(int(pid))
        except OSError:
            continue
    return found


def children():
    """Our children, zombies included."""
    lists = pathlib.Path("/proc/self/task").glob("*/children")  # one for each thread
    return {pid for pids in lists for pid in pids.read_text().split()}


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch):
    marker = f"MARKER={uuid.uuid4().hex}"
    name, value = marker.split("=")
    environment = sandbox_run._environment
    monkeypatch.setattr(
        sandbox_run, "_environment", lambda home: {**environment(home), name: value}
    )
    before = children(), len(os.listdir("/proc/self/fd"))
    yield marker.encode()
    assert (children(), len(os.listdir("/proc/self/fd"))) == before
    assert processes_with(marker.encode()) == []


def run(sandbox, code, stdin=b"", **limits):
    with sandbox.start(
        {"kind": "program", "code": code}, stdin=stdin, limits=Limits(**{"wall_s": 20, **limits})
    ) as running:
        running.wait()
    return running


def output(sandbox, code, **limits):
    ended = run(sandbox, code, **limits)
    assert (ended.end, ended.exit_code, bytes(ended.stderr)) == ("exited", 0, b"")
    return ended.stdout.decode().strip()


# Honest programs


@pytest.mark.parametrize(
    "code",
    [
        "print(42); exit(0)",
        "import sys; print(42); sys.exit()",
        "print(42, flush=True); import os; os._exit(0)",
        "import threading as t\nx = [t.Thread(target=print, args=(42,))]\n[i.start() for i in x]",
        "import sys\nsys.setrecursionlimit(10**6)\n"
        "def f(n): return n and 1 + f(n - 1)\nprint(f(50_000) and 42)",
        "import tempfile\nf = tempfile.TemporaryFile()\nf.write(b'42')\nf.seek(0)\n"
        "print(f.read().decode())",
        "x = bytearray(200 << 20)\nx[::4096] = b'x' * len(x[::4096])\nprint(42)",
        "import subprocess\nprint(subprocess.check_output(['echo', '42'], text=True))",
        "from multiprocessing import Pool\n"
        "def f(x): return x + 1\nif __name__ == '__main__':\n    print(Pool(2).map(f, [41])[0])",
        "import dataclasses, pickle\n@dataclasses.dataclass\nclass A:\n    x: 'int'\n"
        "print(pickle.loads(pickle.dumps(A(42))).x)",
        "open('m.py', 'w').write('x = 42')\nimport m\nprint(m.x)",
        "import atexit\natexit.register(print, 42)",
    ],
)
def test_an_honest_program_runs(sandbox, code):
    assert output(sandbox, code) == "42"


def test_input_goes_in_and_output_comes_out_whatever_their_size(sandbox):
    text = "line\n" * 200_000
    ended = run(sandbox, "import sys; print(len(sys.stdin.read()))", stdin=text.encode())
    assert ended.stdout == b"1000000\n"
    echo = run(sandbox, "import sys; sys.stdout.write(sys.stdin.read())", stdin=b"x" * 900_000)
    assert (echo.stdout, echo.end) == (b"x" * 900_000, "exited")
    assert run(sandbox, "print(1)", stdin=text.encode()).exit_code == 0  # never read


@pytest.mark.parametrize(
    "code, exit_code",
    [
        ("import sys; sys.exit(3)", 3),
        ("1/0", 1),
        ("import os; os._exit(7)", 7),
        ("import sys; sys.excepthook = lambda *a: None; 1/0", 1),
        ("import os; os.abort()", 128 + signal.SIGABRT),
        ("import ctypes; ctypes.string_at(0)", 128 + signal.SIGSEGV),
        ("import os; os.kill(os.getpid(), 9)", 128 + signal.SIGKILL),
        ("def", 1),
        ("x = '\\ud800'; print(x)", 1),
    ],
)
def test_the_exit_code_is_reported(sandbox, code, exit_code):
    ended = run(sandbox, code)
    assert (ended.end, ended.exit_code) == ("exited", exit_code)


def test_verdicts_repeat_because_the_hash_seed_is_fixed(sandbox):
    assert len({output(sandbox, "print(hash('a'))") for _ in range(3)}) == 1


# Limits


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "all(__import__('itertools').repeat(1))",  # no bytecode: no signal handler would ever run
        "import signal, time\nfor s in (1, 2, 15, 14): signal.signal(s, signal.SIG_IGN)\n"
        "while True:\n    try: time.sleep(100)\n    except BaseException: pass",
        "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
        "import os\nwhile os.fork(): pass\nwhile True: pass",
        "import os\nos.write(1, b'answer')\nos.fork()\nos.setsid() if os.getpid() > 2 else 0\n"
        "while True: pass",
    ],
)
def test_the_wall_clock_holds(sandbox, code):
    with sandbox.start({"kind": "program", "code": code}, limits=Limits(wall_s=0.3)) as running:
        start = time.monotonic()
        running.wait()
        took = time.monotonic() - start
    assert running.end == "time"
    assert took < 3


@pytest.mark.parametrize(
    "code",
    [
        "while True: print('x' * 10_000)",
        "import sys\nwhile True: sys.stderr.write('x' * 10_000)",
        "import sys; sys.stdout.write('x' * 100_000_000)",
    ],
)
def test_a_flood_of_output_ends_it(sandbox, code):
    ended = run(sandbox, code)
    assert ended.end == "output"
    assert max(len(ended.stdout), len(ended.stderr)) <= (1 << 20) + 1


@pytest.mark.parametrize(
    "code, least, most",
    [
        ("x = bytearray(1100 << 20)", 0, 0),
        (
            "import mmap\nx = [mmap.mmap(-1, 900 << 20)]\nn = 1\nx += [mmap.mmap(-1, 200 << 20)]",
            1,
            1,
        ),
        (
            "import threading, time\n"
            "for i in range(1000):\n"
            "    threading.Thread(target=time.sleep, args=(9,), daemon=True).start(); n = i",
            10,  # each reserves 8 MiB of address space or more
            64,
        ),
        ("import os\nf = [os.dup(0)]\nwhile True: f.append(os.dup(0)); n = len(f)", 120, 128),
        ("f = open('big', 'wb', 0)\nwhile True: f.write(b'x' * (1 << 20)); n += 1", 32, 33),
        ("open('sparse', 'wb').truncate(1 << 40)\nn = 1", 0, 0),
        ("while True: open(f'{n}', 'wb').write(b'x' * (8 << 20)); n += 1", 7, 8),
        ("while True: open(f'/dev/shm/{n}', 'wb').write(b'x' * (4 << 20)); n += 1", 3, 4),
    ],
)
def test_memory_threads_descriptors_and_disk_are_limited(sandbox, code, least, most):
    code = textwrap.indent(code, "    ")
    code = f"n = 0\ntry:\n{code}\nexcept BaseException: print(n)\nelse: print(10**9)"
    assert least <= int(output(sandbox, code)) <= most


def test_processes_are_limited_in_each_sandbox_alone(sandbox):
    code = (
        "import os, time\nn = 0\ntry:\n    while True:\n"
        "        if os.fork() == 0: time.sleep(9); os._exit(0)\n"
        "        n += 1\nexcept OSError: print(n, flush=True); os._exit(0)"
    )
    with ThreadPoolExecutor(3) as threads:
        counts = list(threads.map(lambda _: int(output(sandbox, code)), range(3)))
    assert all(50 <= count <= 64 for count in counts)


@pytest.mark.parametrize(
    "code, end",
    [
        (
            "import os, time\nfor i in range(20):\n"
            "    if os.fork() == 0:\n        x = b'x' * (60 << 20)\n        time.sleep(60)\n"
            "time.sleep(60)",
            "memory",
        ),
        (
            "import os\ni = 0\nwhile True:\n    i += 1\n"
            "    try: os.close(os.open(f'/tmp/{i}', os.O_CREAT))\n    except OSError: pass",
            "files",
        ),
        # What is in their buffers counts as nobody's memory.
        (
            "import os, socket, time\nos.fork()\nkept = []\nwhile len(kept) < 20:\n"
            "    kept.append(socket.socketpair())\n"
            "    for one in kept[-1]:\n"
            "        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 26)\n"
            "        one.setblocking(False)\n"
            "        try:\n            while True: one.send(b'x' * 65536)\n"
            "        except BlockingIOError: pass\n"
            "time.sleep(60)",
            "sockets",
        ),
    ],
)
def test_memory_files_and_sockets_of_the_whole_sandbox_are_watched(sandbox, code, end):
    ended = run(sandbox, code, wall_s=10, memory_mb=256)
    assert ended.end == end


def test_it_is_the_first_to_go_when_the_machine_runs_out_of_memory(sandbox):
    assert output(sandbox, "print(open('/proc/self/oom_score_adj').read())") == "1000"


# Walls


def test_there_is_no_network_and_the_host_cannot_be_reached(sandbox):
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        abstract.bind("\0grpo-engine-test-" + uuid.uuid4().hex)
        abstract.listen()
        code = (
            "import socket\n"
            f"for family, place in [(2, ('127.0.0.1', {server.getsockname()[1]})), "
            f"(2, ('1.1.1.1', 53)), (1, {abstract.getsockname()!r})]:\n"
            "    s = socket.socket(family); s.settimeout(1)\n"
            "    try: s.connect(place); print('reached', place)\n"
            "    except OSError: pass"
        )
        assert output(sandbox, code) == ""
    names = output(sandbox, "import socket; print([n for _, n in socket.if_nameindex()])")
    assert names == "['lo']"


def test_the_file_system_is_read_only_and_shows_nothing_of_the_host(sandbox, tmp_path):
    (tmp_path / "secret").write_text("secret")
    code = (
        "import os\n"
        "for place in ('/', '/usr', '/etc', '/dev', '/usr/bin', '/proc', '/home', '/var'):\n"
        "    try: open(place + '/new', 'w'); print('wrote', place)\n"
        "    except OSError: pass\n"
        f"for place in ({str(tmp_path)!r}, '/etc/passwd', '/etc/shadow', '/root', '/home',\n"
        "              '/var', '/sys/kernel', '/run', '/dev/sda', '/dev/mem', '/dev/kvm'):\n"
        "    if os.path.exists(place): print('sees', place)\n"
        "print(os.listdir('/work'), os.listdir('/tmp'), os.getuid() == 0)"
    )
    assert output(sandbox, code) == "[] [] False"


def test_an_interpreter_is_seen_wherever_it_lives(sandbox):
    with tempfile.TemporaryDirectory() as prefix:  # under /tmp, which has a tmpfs of its own inside
        os.chmod(prefix, 0o755)
        open(f"{prefix}/part", "w").close()
        code = (
            f"import os\nprint(os.listdir({prefix!r}))\n"
            f"try: open({prefix!r} + '/new', 'w'); print('wrote')\nexcept OSError: pass"
        )
        elsewhere = dataclasses.replace(sandbox, python_prefix=prefix)
        assert output(elsewhere, code) == "['part']"


def test_the_environment_and_the_descriptors_of_the_host_stay_outside(sandbox, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    names = output(sandbox, "import os; print(*sorted(os.environ))").split()
    assert set(names) - {"MARKER"} <= {"HOME", "LANG", "PATH", "PWD", "PYTHONHASHSEED", "TMPDIR"}
    with open("/dev/null") as extra:
        os.set_inheritable(extra.fileno(), True)
        code = "import os; print(*sorted(os.listdir('/proc/self/fd'), key=int))"
        assert output(sandbox, code) == "0 1 2 3"  # 3: the directory being listed


def test_only_its_own_processes_are_seen_and_signalled(sandbox):
    code = "import os; print(len([p for p in os.listdir('/proc') if p.isdigit()]))"
    assert output(sandbox, code) == "2"
    victim = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    try:
        run(sandbox, "import os; os.kill(-1, 9)")
        run(sandbox, "import os; os.kill(os.getppid(), 9); print(1)")
        code = f"import os\ntry: os.kill({victim.pid}, 9)\nexcept OSError as e: print(e.errno)"
        assert output(sandbox, code) == "3"
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="no system-call filter for this CPU"
)
def test_the_system_call_filter_refuses_what_no_program_needs(sandbox):
    code = (
        "import ctypes, platform\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "x86 = platform.machine() == 'x86_64'\n"
        "calls = {'unshare user': (272 if x86 else 97, 0x10000000),\n"
        "         'clone user': (56 if x86 else 220, 0x10000011), 'clone3': (435, 0, 0),\n"
        "         'io_uring': (425, 1, 0), 'bpf': (321 if x86 else 280, 0, 0, 0),\n"
        "         'perf': (298 if x86 else 241, 0, 0, -1, -1, 0),\n"
        "         'keyctl': (250 if x86 else 219, 0, 0), 'ptrace': (101 if x86 else 117, 0, 0),\n"
        "         'memfd': (319 if x86 else 279, b'x', 0),\n"
        "         'shmget': (29 if x86 else 194, 1, 4096, 0o1000),\n"
        "         'mount': (165 if x86 else 40, 0, 0, 0, 0, 0)}\n"
        "for name, call in calls.items():\n"
        "    done = libc.syscall(*call)\n"
        "    if done != -1 or ctypes.get_errno() not in (1, 38): print(name, ctypes.get_errno())"
    )
    assert output(sandbox, code) == ""


def verdict_of_filter(number, first_argument=0):
    """The return value of the filter's program for a system call, by the rules of classic BPF."""
    program = list(struct.iter_unpack("=HBBI", seccomp_filter()))
    audit_number = 0xC000003E if platform.machine() == "x86_64" else 0xC00000B7
    content = {0: number, 4: audit_number, 16: first_argument}
    value = at = 0
    while True:
        code, when_true, when_false, constant = program[at]
        if code == 0x06:
            return constant
        if code == 0x20:
            value = content[constant]
            holds = None
        else:
            holds = {0x15: value == constant, 0x35: value >= constant, 0x45: value & constant}[code]
        at += 1 + (0 if holds is None else when_true if holds else when_false)


ALLOWED, REFUSED, NO_SUCH_FAMILY = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.EAFNOSUPPORT


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="no system-call filter for this CPU"
)
def test_the_filter_lets_no_socket_past_the_network_namespace():
    x86 = platform.machine() == "x86_64"
    for number in (41, 53) if x86 else (198, 199):  # socket, socketpair
        verdicts = {family: verdict_of_filter(number, family) for family in range(64)}
        allowed = {family for family, verdict in verdicts.items() if verdict == ALLOWED}
        assert allowed == {1, 2, 10, 16}
        assert set(verdicts.values()) == {ALLOWED, NO_SUCH_FAMILY}
        assert verdict_of_filter(number, (1 << 32) - 1) == NO_SUCH_FAMILY
    clone, getpid, io_setup = (56, 39, 206) if x86 else (220, 172, 0)
    assert verdict_of_filter(clone, 0x11) == verdict_of_filter(getpid) == ALLOWED
    assert verdict_of_filter(clone, 0x10000011) == verdict_of_filter(io_setup) == REFUSED


def test_sockets_of_other_families_are_not_opened(sandbox):
    code = (
        "import socket\n"
        "for family in range(64):\n"
        "    for kind in (1, 2, 3, 5):\n"
        "        try: socket.socket(family, kind).close(); print(family)\n"
        "        except OSError: pass"
    )
    assert set(output(sandbox, code).split()) <= {"1", "2", "10", "16"}


@pytest.mark.parametrize(
    "code",
    [
        "if os.fork() == 0:\n    os.setsid()\n    os.fork() or time.sleep(60)\n    os._exit(0)",
        "import subprocess; subprocess.Popen(['sleep', '60'])",  # holds our pipes open
        "if os.fork() == 0:\n"
        "    for s in {*range(1, 32)} - {9, 19}: signal.signal(s, signal.SIG_IGN)\n"
        "    time.sleep(60)",
        "for i in range(30): os.fork() or os._exit(0)",  # zombies
    ],
)
def test_no_process_survives_its_program(sandbox, code):
    start = time.monotonic()
    assert output(sandbox, f"import os, signal, time\n{code}\nprint(42)") == "42"
    assert time.monotonic() - start < 5


def test_a_sandbox_dies_with_the_process_that_started_it(sandbox, nothing_left):
    code = (
        "import sys, time\n"
        "from grpo_engine.rewards import sandbox, sandbox_run\n"
        "env, mark = sandbox_run._environment, {'MARKER': sys.argv[1]}\n"
        "sandbox_run._environment = lambda home: {**env(home), **mark}\n"
        f"place = sandbox.Sandbox{(sandbox.tier, sandbox.python, sandbox.python_prefix)!r}\n"
        "job = {'kind': 'program', 'code': 'import time; time.sleep(60)'}\n"
        "with place.start(job) as run: print('started', flush=True); time.sleep(60)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, nothing_left[7:].decode()], stdout=subprocess.PIPE
    )
    with owner.stdout:
        assert owner.stdout.readline() == b"started\n"
        assert processes_with(nothing_left)
        owner.kill()
        owner.wait()
    end = time.monotonic() + 10
    while processes_with(nothing_left) and time.monotonic() < end:
        time.sleep(0.05)


def test_sandboxes_run_side_by_side(sandbox):
    code = "import os, time; open('/tmp/x', 'x'); time.sleep(0.1); print(input())"
    with ThreadPoolExecutor(6) as threads:
        runs = threads.map(lambda n: run(sandbox, code, stdin=str(n).encode()).stdout, range(12))
        assert [int(stdout) for stdout in runs] == list(range(12))


# Starting


def test_a_sandbox_that_does_not_start_is_an_error_and_never_a_verdict(sandbox, monkeypatch):
    monkeypatch.setattr(sandboxes.time, "sleep", lambda seconds: None)
    broken = sandboxes.Sandbox(sandbox.tier, "/usr/bin/no-such-python", "/usr")
    with pytest.raises(SandboxError, match="no-such-python"):
        run(broken, "print(1)")


@pytest.mark.parametrize("place", ["pipe", "dup", "pidfd_open"])
def test_a_machine_without_descriptors_is_an_error_and_never_a_verdict(sandbox, place, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(sandboxes.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(sandbox_run.os, place, refuse)
    with pytest.raises(SandboxError, match="Too many open files"):
        run(sandbox, "print(1)")


def test_starting_is_tried_again(sandbox, monkeypatch):
    command, calls = sandboxes.Sandbox.command, []

    def fails_once(self, *arguments):
        calls.append(1)
        return ["/bin/false"] if len(calls) == 1 else command(self, *arguments)

    monkeypatch.setattr(sandboxes.Sandbox, "command", fails_once)
    assert output(sandbox, "print(42)") == "42"
    assert len(calls) == 2


@pytest.fixture
def probes(monkeypatch):
    """Answers of the probes, by tier, instead of real ones."""
    answers = {}
    monkeypatch.setattr(sandboxes, "_probe", lambda tier: answers[tier])
    sandboxes._probe_boundaries.cache_clear()
    yield answers
    sandboxes._probe_boundaries.cache_clear()


def test_without_a_boundary_it_refuses_and_says_what_is_missing(probes):
    probes[BUBBLEWRAP] = (None, "the program bwrap is not installed")
    probes[NAMESPACES] = (None, "unshare: Operation not permitted")
    with pytest.raises(SandboxError, match="bwrap is not installed.*unshare: Operation not perm"):
        find_sandbox()
    rlimits = sandboxes.Sandbox(RLIMITS_ONLY, "python", "/usr")
    probes[RLIMITS_ONLY] = (rlimits, "")
    assert find_sandbox(allow_rlimits_only=True) is rlimits
    assert "not a security boundary" in rlimits.tier
    with pytest.raises(SandboxError):
        find_sandbox()


def test_a_weaker_tier_is_announced(probes, caplog):
    probes[BUBBLEWRAP] = (None, "the program bwrap is not installed")
    probes[NAMESPACES] = (sandboxes.Sandbox(NAMESPACES, "python", "/usr"), "")
    sandboxes._warn_once.cache_clear()
    assert find_sandbox().tier == NAMESPACES
    assert "namespaces" in caplog.text and "bwrap is not installed" in caplog.text


def test_the_best_tier_is_preferred(probes):
    best = sandboxes.Sandbox(BUBBLEWRAP, "python", "/usr")
    probes[BUBBLEWRAP] = (best, "")
    assert find_sandbox(allow_rlimits_only=True) is best


def test_rlimits_only_limits_and_cleans_up():
    found, reason = sandboxes._probe(RLIMITS_ONLY)
    assert found is not None, reason
    assert output(found, "open('x', 'w').write('1'); print(42)") == "42"
    assert run(found, "while True: pass", wall_s=0.3).end == "time"
    assert run(found, "import os; os.fork()\nwhile True: pass", wall_s=0.3).end == "time"
    place = output(found, "import os; print(os.getcwd())")
    assert not os.path.exists(place)
