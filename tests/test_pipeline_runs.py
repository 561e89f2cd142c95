"""A pipeline of toy stages: what runs, what is kept, what invalidates what, and going on after
every kind of stop."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback

import pytest
import toy_stages
import yaml
from toy_stages import KINDS, calls

from grpo_engine import lineage
from grpo_engine.checkpoint import file_sha256
from grpo_engine.pipeline.config import read_pipeline
from grpo_engine.pipeline.run import run_pipeline
from grpo_engine.types import UserError

# The paper's shape: two roads from the base, one of them through data of the other.
LISTED = [
    {"name": "zero", "stage": "toy"},
    {"name": "cold-data", "stage": "toydata", "model": "{zero}"},
    {"name": "cold-sft", "stage": "toy", "extras": {"dataset": "{cold-data}/data.jsonl"}},
    {"name": "rl", "stage": "toy", "model": "{cold-sft}"},
    {"name": "reject", "stage": "toydata", "model": "{rl}", "rows": 4},
    {"name": "final", "stage": "toy", "extras": {"dataset": "{reject}"}, "max_steps": 2},
    {"name": "student", "stage": "toy", "model": "small", "extras": {"dataset": "{reject}"}},
    {"name": "alone", "stage": "toy", "model": "small"},
]
NAMES = [stage["name"] for stage in LISTED]


def run(folder, *flags, listed=LISTED, kinds=KINDS, **options):
    """The exit code. ``flags``: ``stage.field=value``."""
    pairs = [tuple(flag.split("=", 1)) for flag in flags]
    values = {"output_dir": str(folder), "stages": listed}
    return run_pipeline(read_pipeline(values, pairs, kinds), kinds, **options)


def called(folder):
    """Stages that were called since the last look."""
    found = [line.split()[0] for line in calls(folder)]
    (folder / "calls.txt").unlink(missing_ok=True)
    return found


def results(folder):
    """Hash of every stage's result."""
    record = lineage.read(folder)
    return {r.name: r.outputs[r.product].sha256 for r in record.ran() if r.product}


@pytest.fixture(scope="module", autouse=True)
def _no_collecting():
    """Toys leave nothing on a device, and walking torch's objects takes longer than all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda: 0)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished pipeline, to be copied."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run(folder) == 0
    assert called(folder) == NAMES
    return folder


@pytest.fixture
def again(finished, tmp_path):
    """A copy of it, times of last change included."""
    return shutil.copytree(finished, tmp_path / "run")


def test_nothing_changed_nothing_runs(again, capsys):
    before = results(again)
    assert run(again) == 0
    assert called(again) == []
    assert results(again) == before
    assert "[4/8] rl: unchanged, checkpoint-3 (3 steps)" in capsys.readouterr().out


# flag -> the stages that run again, and no other
INVALIDATES = {
    "zero.value=x": ["zero", "cold-data", "cold-sft", "rl", "reject", "final", "student"],
    "cold_data.rows=3": ["cold-data", "cold-sft", "rl", "reject", "final", "student"],
    "cold_sft.max_steps=4": ["cold-sft", "rl", "reject", "final", "student"],
    "rl.value=x": ["rl", "reject", "final", "student"],
    "reject.seed=1": ["reject", "final", "student"],
    "final.value=x": ["final"],
    "student.model=other": ["student"],
    "alone.max_steps=1": ["alone"],
    "seed=1": NAMES,
    # where and how often, not what
    "device=cuda:7": [],
    "rl.save_steps=2": [],
    # a default that is now written out
    "final.value=": [],
    "cold_data.rows=2": [],
}


@pytest.mark.parametrize("flag", INVALIDATES)
def test_a_field_invalidates_its_stage_and_what_depends_on_it(again, flag):
    before = results(again)
    assert run(again, flag) == 0
    assert called(again) == INVALIDATES[flag]
    after = results(again)
    assert {name for name in NAMES if before[name] != after[name]} == set(INVALIDATES[flag])
    assert run(again, flag) == 0
    assert called(again) == []
    # and back
    assert run(again) == 0
    assert called(again) == INVALIDATES[flag]
    assert results(again) == before


def test_the_reasons_are_said_before_anything_runs(again, capsys):
    assert run(again, "rl.value=x") == 0
    said = capsys.readouterr().err.splitlines()
    assert said[:4] == [
        "grpo-engine: rl: runs again: value is 'x', was ''",
        "grpo-engine: reject: runs again after rl, unless that comes out the same",
        "grpo-engine: final: runs again after reject, unless that comes out the same",
        "grpo-engine: student: runs again after reject, unless that comes out the same",
    ]


def test_what_is_made_again_is_set_aside_or_replaced(again):
    old = (again / "final" / "checkpoint-2" / "state.txt").read_text()
    assert run(again, "final.value=x") == 0
    kept = again / "final.superseded" / "checkpoint-2" / "state.txt"
    assert kept.read_text() == old
    assert run(again, "final.value=y", overwrite=True) == 0
    assert sorted(p.name for p in again.glob("final*")) == ["final", "final.superseded"]
    assert kept.read_text() == old


def test_data_edited_by_hand_is_kept_and_used(again, capsys):
    """The human-edit hook: rows may be corrected between two stages."""
    path = again / "cold-data" / "data.jsonl"
    path.write_text(path.read_text() + '{"row": "by hand"}\n')
    assert run(again) == 0
    assert called(again) == ["cold-sft", "rl", "reject", "final", "student"]
    assert "cold-data: kept, with data.jsonl edited since" in capsys.readouterr().err
    assert "by hand" in path.read_text()
    record = lineage.read(again).stages["cold-sft"]
    assert record.inputs["extras.dataset"].sha256 == file_sha256(path)


def test_a_stage_that_waits_for_a_person(tmp_path, capsys):
    folder, edits = tmp_path / "run", tmp_path / "edits.jsonl"
    flag = f"cold_data.edit_file={edits}"
    assert run(folder, flag) == 0
    assert called(folder) == ["zero", "cold-data"]
    assert "[2/8] cold-data: waits for a person" in capsys.readouterr().out
    record = lineage.read(folder)
    assert record.status == record.stages["cold-data"].status == "waiting for a person"
    edits.write_text('{"row": "edited"}\n')
    assert run(folder, flag) == 0
    assert called(folder) == NAMES[1:]
    assert "edited" in (folder / "cold-data" / "data.jsonl").read_text()
    # edited once more: the stage goes on with it, nothing is set aside
    edits.write_text('{"row": "edited again"}\n')
    assert run(folder, flag) == 0
    assert called(folder) == ["cold-data", "cold-sft", "rl", "reject", "final", "student"]
    assert "again" in (folder / "cold-data" / "data.jsonl").read_text()
    assert not (folder / "cold-data.superseded").exists()


def test_a_stage_that_comes_out_the_same_invalidates_nothing_further(again):
    """Two rows instead of four, and back to four while only reject has run."""
    listed = [{**s, "rows": 3} if s["name"] == "reject" else s for s in LISTED]
    assert run(again, listed=listed, only=["reject"]) == 0
    assert called(again) == ["reject"]
    assert run(again) == 0
    assert called(again) == ["reject"]  # final and student saw these four rows before


def test_an_outside_file_counts_by_content(tmp_path):
    folder, source = tmp_path / "run", tmp_path / "train.jsonl"
    source.write_text('{"a": 1}\n')
    listed = [
        {"name": "a", "stage": "toy", "extras": {"data": str(source)}},
        {"name": "b", "stage": "toy", "model": "{a}"},
        {"name": "c", "stage": "toy"},
    ]
    assert run(folder, listed=listed) == 0
    called(folder)
    os.utime(source, (1, 1))  # another time, the same content
    assert run(folder, listed=listed) == 0
    assert called(folder) == []
    source.write_text('{"a": 2}\n')
    assert run(folder, listed=listed) == 0
    assert called(folder) == ["a", "b"]
    source.unlink()
    with pytest.raises(UserError, match="stage a: --extras.data .*train.jsonl: no such file"):
        run(folder, listed=listed)


@pytest.mark.parametrize("damage", ["gone", "flipped", "cut"])
def test_a_result_that_is_not_what_it_was_is_made_again(again, damage):
    before = results(again)
    checkpoint = again / "rl" / "checkpoint-3"
    state = checkpoint / "state.txt"
    if damage == "gone":
        shutil.rmtree(checkpoint)
    elif damage == "flipped":
        state.write_text("x" * state.stat().st_size)
    else:
        state.unlink()
    assert run(again) == 0
    assert calls(again) == ["rl from 2"]  # from the checkpoint before, and nothing else
    assert results(again) == before


def test_new_and_removed_stages_leave_the_others_alone(again):
    listed = [s for s in LISTED if s["name"] != "alone"]
    listed.append({"name": "more", "stage": "toy", "model": "{final}"})
    assert run(again, listed=listed) == 0
    assert called(again) == ["more"]
    assert list(lineage.read(again).stages) == [s["name"] for s in listed]
    assert run(again) == 0  # "alone" is back, and was finished
    assert called(again) == []


def test_a_folder_that_no_pipeline_made_is_set_aside(tmp_path):
    folder = tmp_path / "run"
    (folder / "zero").mkdir(parents=True)
    (folder / "zero" / "precious.txt").write_text("mine")
    assert run(folder, only=["zero"]) == 0
    assert (folder / "zero.superseded" / "precious.txt").read_text() == "mine"


# -- parts of it -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"only": ["rl"]}, ["rl"]),
        ({"only": ["alone", "rl"]}, ["rl", "alone"]),
        ({"from_stage": "reject"}, ["reject", "final", "student", "alone"]),
        ({"to_stage": "cold-data"}, ["zero", "cold-data"]),
        ({"from_stage": "rl", "to_stage": "reject"}, ["rl", "reject"]),
    ],
)
def test_parts(again, options, expected):
    flags = [f"{name.replace('-', '_')}.seed=8" for name in NAMES]
    assert run(again, *flags, **options) == 0
    assert called(again) == expected


def test_a_part_says_what_it_leaves_as_it_is(again, capsys):
    assert run(again, "zero.value=x", only=["student"]) == 0
    assert called(again) == []
    assert "zero: stays as it is, though value is 'x', was ''" in capsys.readouterr().err


def test_a_part_needs_the_stages_before_it(tmp_path):
    with pytest.raises(UserError, match="stage rl: --model {cold-sft}: .* has not finished"):
        run(tmp_path / "run", from_stage="rl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"only": ["lr"]}, "--only lr: no such stage; there are zero, cold-data"),
        ({"from_stage": "x"}, "--from-stage x: no such stage"),
        ({"from_stage": "rl", "to_stage": "zero"}, "--to-stage zero: comes before"),
        ({"only": ["rl"], "to_stage": "zero"}, "--only rl: not together with"),
    ],
)
def test_wrong_parts(tmp_path, options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        run(tmp_path / "run", **options)
    assert list(tmp_path.iterdir()) == []


# -- refusals and failures ---------------------------------------------------------------------


def test_a_folder_of_another_run_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"stage": "grpo"}))
    with pytest.raises(UserError, match="holds another run"):
        run(tmp_path)


def test_an_input_in_a_stages_folder_is_refused(tmp_path):
    folder = tmp_path / "run"
    (folder / "zero").mkdir(parents=True)
    (folder / "zero" / "mine.jsonl").write_text("{}\n")
    listed = [*LISTED, {"name": "x", "stage": "toy", "model": str(folder / "zero" / "mine.jsonl")}]
    with pytest.raises(UserError, match=re.escape("refer to it as {zero}/...")):
        run(folder, listed=listed)


def test_a_failing_stage_stops_the_pipeline_with_its_exit_code(tmp_path, capsys):
    folder = tmp_path / "run"
    assert run(folder, "cold_sft.exit_with=1") == 1
    assert called(folder) == ["zero", "cold-data", "cold-sft"]
    assert "stage cold-sft failed with exit code 1" in capsys.readouterr().err
    record = lineage.read(folder)
    assert record.status == "failed"
    assert record.stages["cold-sft"].status == "failed"
    assert record.stages["cold-sft"].exit_code == 1
    assert record.stages["rl"] is None
    assert run(folder) == 0
    assert called(folder) == NAMES[2:]


def test_a_users_mistake_that_only_the_stage_sees_names_the_stage(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="^stage reject: no rows today$"):
        run(folder, "reject.raises=UserError")
    record = lineage.read(folder).stages["reject"]
    assert (record.status, record.exit_code, record.error) == ("failed", 2, "no rows today")


def test_a_bug_is_recorded_and_not_hidden(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyError):
        run(folder, "cold_data.raises=KeyError")
    assert lineage.read(folder).status == "failed"
    assert lineage.read(folder).stages["cold-data"].error == "KeyError: 'no rows today'"
    assert run(folder) == 0
    assert called(folder)[2:] == NAMES[1:]


def test_a_stage_that_leaves_no_result_has_failed(tmp_path):
    kinds = {
        **KINDS,
        "toydata": KINDS["toydata"].__class__(
            "toy_stages:DataConfig", "toy_stages:write_data", product=("other.jsonl",)
        ),
    }
    with pytest.raises(UserError, match="stage cold-data: has finished without other.jsonl"):
        run(tmp_path / "run", kinds=kinds, listed=LISTED[:2])
    assert lineage.read(tmp_path / "run").stages["cold-data"].status == "failed"


# -- lineage -----------------------------------------------------------------------------------


def test_the_lineage_says_which_made_which(finished):
    record = lineage.read(finished)
    assert record.status == "finished"
    assert list(record.edges()) == [
        ("zero", "checkpoint-3", "cold-data", "model"),
        ("cold-data", "data.jsonl", "cold-sft", "extras.dataset"),
        ("cold-sft", "checkpoint-3", "rl", "model"),
        ("rl", "checkpoint-3", "reject", "model"),
        ("reject", "data.jsonl", "final", "extras.dataset"),
        ("reject", "data.jsonl", "student", "extras.dataset"),
    ]
    for source, made, user, name in record.edges():
        used = record.stages[user].inputs[name].sha256
        assert used == record.stages[source].outputs[made].sha256
    rl = record.stages["rl"]
    assert (rl.steps, rl.tokens, rl.exit_code, rl.seed) == (3, {"trained": 30}, 0, 0)
    assert rl.seconds > 0 and rl.started <= rl.finished
    assert record.product_of("rl") == finished / "rl" / "checkpoint-3"
    assert record.values["versions"]["torch"]


def test_a_pipeline_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no manifest.json of a pipeline"):
        lineage.read(tmp_path)


# -- dry run -----------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing(again, tmp_path, capsys):
    def files(folder):
        return {
            p.relative_to(folder): (p.stat().st_mtime_ns, p.stat().st_size)
            for p in folder.rglob("*")
        }

    before = files(tmp_path)
    assert run(again, "rl.value=x", dry_run=True) == 0
    assert run(tmp_path / "new" / "deeper", dry_run=True) == 0
    assert files(tmp_path) == before
    assert "value is 'x', was ''" in capsys.readouterr().out


# -- signals and kills, in a process of their own ------------------------------------------------


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
