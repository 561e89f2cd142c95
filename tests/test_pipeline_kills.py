"""A pipeline of toy stages in a process of its own: signals and kills at every kind of moment."""

import os
import signal
import subprocess
import sys
import time
import traceback

import pytest
import toy_stages
import yaml
from toy_pipeline import LISTED, NAMES, called, finish, no_collecting, results
from toy_stages import calls

from grpo_engine import lineage


@pytest.fixture(scope="module", autouse=True)
def _no_collecting():
    with no_collecting():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("finished") / "run")


def arguments(folder, *flags, listed=LISTED):
    path = folder.parent / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"stage": "r1", "stages": listed}))
    return ["--config", str(path), "--output_dir", str(folder), *flags]


class Launched:
    """``grpo-engine r1`` with the toy stages in a forked child, where signals and kills hit nothing
    else; a new interpreter would spend its time on imports."""

    def __init__(self, folder, *flags, **options):
        given = arguments(folder, *flags, **options)
        self.out, self.err = folder.parent / "stdout.txt", folder.parent / "stderr.txt"
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            self._child(given)

    def _child(self, given):
        code = 99
        try:
            sys.stdout, sys.stderr = self.out.open("w"), self.err.open("w")
            os.dup2(sys.stderr.fileno(), 2)  # the handlers write there
            for name in (signal.SIGINT, signal.SIGTERM):
                signal.signal(name, signal.default_int_handler)
            code = toy_stages.main(given)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds=None):
        """The exit code; None while it still runs after ``seconds``."""
        until = None if seconds is None else time.monotonic() + seconds
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, 0 if until is None else os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                assert "Traceback" not in self.stderr, self.stderr
            elif time.monotonic() > until:
                return None
            else:
                time.sleep(0.005)
        return self.returncode

    def send(self, number):
        os.kill(self.pid, number)

    @property
    def stderr(self):
        return self.err.read_text()


def launch(folder, *flags, **options):
    done = Launched(folder, *flags, **options)
    done.wait()
    return done


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_stops_the_stage_and_the_pipeline(tmp_path, finished, name, code):
    folder = tmp_path / "run"
    done = launch(folder, "--rl.signal_at", f"2:{name}")
    assert done.returncode == code, done.stderr
    record = lineage.read(folder)
    assert (record.status, record.stages["rl"].status) == ("stopped", "stopped")
    assert record.stages["reject"] is None
    called(folder)
    done = launch(folder)
    assert done.returncode == 0
    assert calls(folder)[0] == "rl from 2"
    assert "rl: goes on: stopped, not finished; from checkpoint-2" in done.stderr
    assert results(folder) == results(finished)
    assert len(lineage.read(folder).stages["rl"].sessions) == 2


def test_a_signal_at_the_very_end_of_a_stage_is_not_lost(tmp_path):
    """The stage is through and returns 0; the next one must not begin."""
    folder = tmp_path / "run"
    done = launch(folder, "--zero.signal_at", "3:SIGINT")
    assert done.returncode == 130
    record = lineage.read(folder)
    assert record.stages["zero"].status == "finished"
    assert record.stages["cold-data"] is None
    assert record.status == "stopped"


@pytest.mark.parametrize("stage", ["zero", "rl", "final"])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_killed_within_a_stage_it_goes_on_there(tmp_path, finished, stage, step):
    folder = tmp_path / "run"
    if stage == "final" and step == 3:
        step = 2  # it has two steps: killed between its last one and its record
    flag = f"--{stage}.signal_at", f"{step}:SIGKILL:{tmp_path / 'marker'}"
    assert launch(folder, *flag).returncode == -signal.SIGKILL
    assert lineage.read(folder).stages[stage].status == "running"
    called(folder)
    done = launch(folder, *flag)
    assert done.returncode == 0, done.stderr
    assert calls(folder)[0] == f"{stage} from {step}"
    assert called(folder) == NAMES[NAMES.index(stage) :]
    assert results(folder) == results(finished)


def test_killed_anywhere_at_all(tmp_path, finished):
    """Again and again, after ever longer times, until one run gets through."""
    folder, wait, kills = tmp_path / "run", 0.02, 0
    while True:
        child = Launched(folder)
        if child.wait(wait) is None:
            child.send(signal.SIGKILL)
            kills += 1
        if child.wait() == 0:
            break
        assert child.returncode == -signal.SIGKILL, child.stderr
        wait += 0.02
    assert kills >= 3
    assert results(folder) == results(finished)


def test_two_at_once_in_a_folder_are_refused(tmp_path):
    folder = tmp_path / "run"
    slow = [{"name": "a", "stage": "toy", "max_steps": 100_000}]
    first = Launched(folder, listed=slow)
    try:
        while len(calls(folder)) < 1:
            assert first.wait(0.01) is None
        second = launch(folder.parent / "run", listed=slow)
        assert second.returncode == 2
        assert "another grpo-engine r1 is running there" in second.stderr
    finally:
        first.send(signal.SIGTERM)
    assert first.wait() == 143


def test_times_of_killed_and_later_sessions_are_kept(tmp_path):
    folder = tmp_path / "run"
    flag = "--zero.signal_at", f"1:SIGKILL:{tmp_path / 'marker'}"
    launch(folder, *flag)
    begun = time.monotonic()
    assert launch(folder, *flag, "--only", "zero").returncode == 0
    first, second = lineage.read(folder).stages["zero"].sessions
    assert (first.finished, first.exit_code) == (None, None)
    assert second.exit_code == 0 and 0 < second.seconds < time.monotonic() - begun
    assert lineage.read(folder).status == "partly finished"


def test_the_folder_alone_continues_it(tmp_path):
    """In an interpreter of its own, from nothing but the command line."""
    folder = tmp_path / "run"
    assert launch(folder, "--rl.value", "z", "--to-stage", "cold-sft").returncode == 0
    called(folder)
    alone = [sys.executable, toy_stages.__file__, "--output_dir", str(folder)]
    done = subprocess.run(alone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert called(folder) == NAMES[3:]
    assert lineage.read(folder).stages["rl"].settings["value"] == "z"
