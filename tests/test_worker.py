"""The process an engine lives in: whatever happens to it or to us, one clear error and no process
left."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from toy_worker import __file__ as TOY

from grpo_engine.generation.worker import WorkerProcess, main_stack
from grpo_engine.types import GeneratorError, UserError

START_S = 60.0  # this machine may be busy


def is_running(pid: int) -> bool:
    """Neither gone nor a zombie that waits to be reaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def ends(pid: int, within_s: float = 20.0) -> bool:
    stop_at = time.monotonic() + within_s
    while is_running(pid) and time.monotonic() < stop_at:
        time.sleep(0.05)
    return not is_running(pid)


def members(session: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # gone meanwhile
                if os.getsid(int(entry.name)) == session and is_running(int(entry.name)):
                    found.append(int(entry.name))
    return found


@pytest.fixture
def worker(tmp_path):
    made = WorkerProcess("toy_worker:Toy", name="the toy", log_path=tmp_path / "toy.log")
    assert made.call("double", 1, timeout_s=START_S) == 2  # it is up: short timeouts from here on
    yield made
    made.close()


def test_a_call_streams_and_returns(worker):
    seen = []
    assert worker.call("count", (3, 0.0), timeout_s=START_S, on_message=seen.append) == 3
    assert seen == [0, 1, 2]


def test_a_refusal_is_the_users_and_leaves_the_worker_in_order(worker):
    with pytest.raises(UserError, match="^top_p: not here$"):
        worker.call("refuse", "top_p: not here", timeout_s=START_S)
    assert worker.call("double", 4, timeout_s=START_S) == 8


def test_a_failure_ends_it_and_carries_its_log(worker, tmp_path):
    worker.call("say", "this is what I last said", timeout_s=START_S)
    with pytest.raises(GeneratorError) as caught:
        worker.call("fail", timeout_s=START_S)
    text = str(caught.value)
    assert text.startswith("the toy failed in fail: RuntimeError: no such luck (toy_worker.py:")
    assert "this is what I last said" in text and str(tmp_path / "toy.log") in text
    assert ends(worker.pid)
    with pytest.raises(GeneratorError, match="the toy is gone: it failed in fail") as again:
        worker.call("double", 1, timeout_s=START_S)
    assert str(again.value) == text.replace("the toy failed", "the toy is gone: it failed", 1)


@pytest.mark.parametrize(
    ("method", "how"), [("die", "exit code 7"), ("kill", r"signal 9 \(SIGKILL\); out of memory\?")]
)
def test_a_death_is_noticed_at_once(worker, method, how):
    started = time.monotonic()
    with pytest.raises(GeneratorError, match=f"^the toy died during {method}: {how}"):
        worker.call(method, timeout_s=500)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("method", "function"), [("stand_still", "stand_still"), ("hold_the_lock", "hold_the_lock")]
)
def test_one_that_hangs_shows_where(worker, method, function):
    worker.call("say", "just before", timeout_s=START_S)
    with pytest.raises(GeneratorError) as caught:
        worker.call(method, timeout_s=1.0)
    text = str(caught.value)
    assert text.startswith(f"the toy made no progress for 1 s in {method}")
    stack, _, log = text.partition("the end of its log")
    assert f"in {function}" in stack.splitlines()[2]
    assert "just before" in log and "File" not in log
    assert ends(worker.pid)


def test_the_setting_behind_a_deadline_is_named(worker):
    words = r"made no progress for 0\.5 s \(generation_timeout\) in stand_still"
    with pytest.raises(GeneratorError, match=words):
        worker.call("stand_still", timeout_s=0.5, timeout_name="generation_timeout")


def test_one_that_closes_its_connection_is_ended_and_not_called_out_of_memory(worker):
    with pytest.raises(GeneratorError, match="during hang_up: it closed its connection, and was"):
        worker.call("hang_up", timeout_s=START_S)
    assert ends(worker.pid)


def test_the_deadline_is_for_progress_not_for_the_call(worker):
    assert worker.call("count", (8, 0.4), timeout_s=2.0) == 8


def test_close_leaves_no_process(worker):
    grandchild = worker.call("child", timeout_s=START_S)
    worker.close()
    assert ends(worker.pid) and ends(grandchild)
    worker.close()
    with pytest.raises(GeneratorError, match="the toy is gone: it was closed"):
        worker.call("double", 1, timeout_s=START_S)


@pytest.mark.parametrize("end", [None, "fail", "die", "kill", "stand_still", "hold_the_lock"])
def test_shared_memory_goes_with_it_however_it_ends(worker, end):
    """Python's resource tracker, a process of its own, frees it after its owner."""
    memory = Path("/dev/shm") / worker.call("share", timeout_s=START_S)
    assert memory.exists()
    if end is None:
        worker.close()
    else:
        with pytest.raises(GeneratorError):
            worker.call(end, timeout_s=1.0)
    assert not memory.exists()
    assert not members(worker.pid)  # the tracker is gone too


def test_a_process_that_ignores_the_signal_is_killed_all_the_same(worker):
    stubborn = worker.call("stubborn_child", timeout_s=START_S)
    worker.close()
    assert ends(worker.pid) and ends(stubborn)


@pytest.mark.parametrize(
    ("method", "argument", "wait_s"),
    [("count", (10**6, 0.001), START_S), ("hold_the_lock", None, 0.5)],
)
def test_close_from_another_thread_ends_the_call(worker, method, argument, wait_s):
    """One that looks at ``cancelled`` ends by itself, one in C is killed."""
    timer = threading.Timer(0.5, worker.close, kwargs={"wait_s": wait_s})
    started = time.monotonic()
    timer.start()
    with pytest.raises(GeneratorError, match=f"^the toy was closed during {method}$"):
        worker.call(method, argument, timeout_s=500)
    timer.join()
    assert ends(worker.pid) and time.monotonic() - started < START_S


@pytest.mark.parametrize("method", ["stand_still", "hold_the_lock"])
def test_a_killed_parent_leaves_no_process_and_no_shared_memory(method, tmp_path):
    path = os.pathsep.join([str(Path(TOY).parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(
        [sys.executable, TOY, method, str(tmp_path / "log")],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as parent:
        *pids, name = parent.stdout.readline().split()
        pids, memory = list(map(int, pids)), Path("/dev/shm") / name
        time.sleep(0.5)
        assert len(pids) == 2 and all(is_running(pid) for pid in pids) and memory.exists()
        parent.kill()
    assert all(ends(pid) for pid in pids)
    stop_at = time.monotonic() + 20
    while (memory.exists() or members(pids[0])) and time.monotonic() < stop_at:
        time.sleep(0.05)
    assert not memory.exists() and not members(pids[0])


class Stop(BaseException):
    pass


def test_ctrl_c_takes_the_call_back_and_the_next_one_is_clean(worker):
    """As ``Interrupt.abortable``: the handler raises in the main thread, anywhere in the call."""

    def stop(signum, frame):
        raise Stop

    previous = signal.signal(signal.SIGUSR2, stop)
    try:
        for delay in (0.05, 0.1, 0.15, 0.2, 0.25):
            timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGUSR2))
            timer.start()
            seen = []
            with pytest.raises(Stop):
                worker.call("count", (10_000, 0.001), timeout_s=START_S, on_message=seen.append)
            timer.join()
            assert seen == list(range(len(seen)))
            assert worker.call("double", 21, timeout_s=START_S) == 42
    finally:
        signal.signal(signal.SIGUSR2, previous)
    assert worker.call("cancelled", timeout_s=START_S) == 5


def test_an_error_in_on_message_takes_the_call_back(worker):
    def refuse(value):
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        worker.call("count", (10_000, 0.001), timeout_s=START_S, on_message=refuse)
    assert worker.call("cancelled", timeout_s=START_S) == 1


def test_a_temporary_log_goes_with_a_worker_in_order_and_stays_after_a_failure():
    for method, stays in (("double", False), ("fail", True)):
        worker = WorkerProcess("toy_worker:Toy", name="the toy")
        try:
            worker.call(method, 1, timeout_s=START_S)
        except GeneratorError:
            assert method == "fail"
        worker.close()
        assert worker.log_path.exists() == stays
        worker.log_path.unlink(missing_ok=True)


def test_a_worker_that_cannot_start_says_why(tmp_path):
    worker = WorkerProcess("toy_worker:Missing", name="the toy", log_path=tmp_path / "log")
    with pytest.raises(GeneratorError, match="(?s)died during double: exit code 1.*Missing"):
        worker.call("double", 1, timeout_s=START_S)


def test_an_older_log_is_kept_and_not_quoted(tmp_path):
    log = tmp_path / "toy.log"
    log.write_text("of an earlier run\n", encoding="utf-8")
    worker = WorkerProcess("toy_worker:Toy", name="the toy", log_path=log)
    with pytest.raises(GeneratorError) as caught:
        worker.call("die", timeout_s=START_S)
    assert "about to die" in str(caught.value) and "earlier run" not in str(caught.value)
    assert log.read_text(encoding="utf-8").startswith("of an earlier run\n")


def test_of_a_long_log_only_the_end_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("grpo_engine.generation.worker.TAIL_BYTES", 100)
    worker = WorkerProcess("toy_worker:Toy", name="the toy", log_path=tmp_path / "toy.log")
    worker.call("say", "long ago\n" + "x" * 200 + "\njust before", timeout_s=START_S)
    with pytest.raises(GeneratorError) as caught:
        worker.call("die", timeout_s=START_S)
    text = str(caught.value)
    assert text.endswith("just before\n  about to die") and "long ago" not in text


def test_main_stack_is_that_of_the_thread_with_the_signal():
    dump = (
        'Thread 0x1 (most recent call first):\n  File "a.py", line 1 in wait\n\n'
        'Current thread 0x2 (most recent call first):\n  File "b.py", line 2 in step\n'
        '  File "b.py", line 3 in main\n\nExtension modules: x\n'
    )
    assert main_stack(dump) == ['  File "b.py", line 2 in step', '  File "b.py", line 3 in main']
    assert main_stack("nothing") == []
