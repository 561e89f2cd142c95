"""A pipeline of toy stages: what runs, what is kept, what invalidates what, and going on after
every kind of stop."""

import json
import os
import re
import shutil

import pytest
from toy_pipeline import LISTED, NAMES, called, finish, no_collecting, results, run
from toy_stages import KINDS, calls

from grpo_engine import lineage
from grpo_engine.checkpoint import file_sha256
from grpo_engine.types import UserError


@pytest.fixture(scope="module", autouse=True)
def _no_collecting():
    with no_collecting():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("finished") / "run")


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


def test_one_stage_is_no_stages(tmp_path, capsys):
    """Nor is one step "1 steps"."""
    listed = [{"name": "a", "stage": "toy", "max_steps": 1}]
    assert run(tmp_path / "run", listed=listed, dry_run=True) == 0
    assert capsys.readouterr().out.startswith("1 stage in ")
    assert run(tmp_path / "run", listed=listed) == 0
    out = capsys.readouterr().out
    assert "checkpoint-1 (1 step)\n" in out and "finished: 1 stage in " in out


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
