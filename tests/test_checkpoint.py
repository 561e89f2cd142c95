import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_engine.checkpoint import (
    DamagedCheckpoint,
    find_checkpoint,
    list_checkpoints,
    quarantine,
    save_checkpoint,
    verify_checkpoint,
)
from grpo_engine.types import UserError


def writer(text: str):
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(text.encode() * 1000)
        (folder / "trainer").mkdir()
        (folder / "trainer" / "state.json").write_text(json.dumps({"text": text}))

    return write


def test_saved_checkpoint_is_valid_and_old_ones_are_pruned(tmp_path):
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, writer(str(step)), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]
    assert find_checkpoint(tmp_path, pytest.fail).name == "checkpoint-10"


@pytest.mark.parametrize("name", ["model.safetensors", "trainer/state.json", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete"])
def test_damage_is_noticed_and_the_last_good_one_is_used(tmp_path, name, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, writer(str(step)), keep=2)
    path = tmp_path / "checkpoint-2" / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes(
        content
        if damage == "flip"
        else content[: len(content) // 2]
        if damage == "truncate"
        else b""
    )
    if damage == "delete":
        path.unlink()
    with pytest.raises((DamagedCheckpoint, UserError)):
        verify_checkpoint(tmp_path / "checkpoint-2")
    with pytest.raises(UserError, match="checkpoint-2.*damaged"):
        find_checkpoint(tmp_path / "checkpoint-2", pytest.fail)
    said = []
    assert find_checkpoint(tmp_path, said.append).name == "checkpoint-1"
    assert "checkpoint-2 is damaged" in said[0]
    assert (tmp_path / "checkpoint-2.bad").is_dir()


def test_nothing_valid_is_an_error_and_moves_nothing(tmp_path):
    save_checkpoint(tmp_path, 3, writer("3"), keep=2)
    (tmp_path / "checkpoint-3" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(
        UserError,
        match="no valid checkpoint; checkpoint-3 is damaged: model.safetensors has 5 bytes",
    ):
        find_checkpoint(tmp_path, pytest.fail)
    assert (tmp_path / "checkpoint-3").is_dir()
    with pytest.raises(UserError, match="no such folder"):
        find_checkpoint(tmp_path / "absent", pytest.fail)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no checkpoint"):
        find_checkpoint(tmp_path / "empty", pytest.fail)


def test_a_whole_checkpoint_is_not_written_over_and_a_damaged_one_is_replaced(tmp_path):
    save_checkpoint(tmp_path, 1, writer("first"), keep=2)
    save_checkpoint(tmp_path, 1, writer("second"), keep=2)
    assert b"first" in (tmp_path / "checkpoint-1" / "model.safetensors").read_bytes()
    (tmp_path / "checkpoint-1" / "model.safetensors").write_bytes(b"")
    save_checkpoint(tmp_path, 1, writer("third"), keep=2)
    assert b"third" in (tmp_path / "checkpoint-1" / "model.safetensors").read_bytes()
    verify_checkpoint(tmp_path / "checkpoint-1")


def test_a_failing_write_leaves_the_previous_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, writer("1"), keep=1)

    def fails(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        save_checkpoint(tmp_path, 2, fails, keep=1)
    assert find_checkpoint(tmp_path, pytest.fail).name == "checkpoint-1"
    save_checkpoint(tmp_path, 2, writer("2"), keep=1)  # a leftover partial folder is no obstacle
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert not list(tmp_path.glob(".partial*"))


def test_quarantine_never_collides(tmp_path):
    for _ in range(3):
        (tmp_path / "checkpoint-1").mkdir()
        quarantine(tmp_path / "checkpoint-1")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-1.bad",
        "checkpoint-1.bad2",
        "checkpoint-1.bad3",
    ]


SAVE_FOREVER = """
import sys
from pathlib import Path
from grpo_engine.checkpoint import save_checkpoint
def write(folder):
    for k in range(20):
        (folder / f"part-{k}.bin").write_bytes(bytes([k]) * 20000)
step = int(sys.argv[2])
print("go", flush=True)
while True:
    step += 1
    save_checkpoint(Path(sys.argv[1]), step, write, keep=2)
"""


def test_kill_9_at_random_moments_always_leaves_a_valid_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, writer("1"), keep=2)
    dice = random.Random(0)
    step = 1
    for _ in range(50):
        child = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(tmp_path), str(step)],
            stdout=subprocess.PIPE,
            text=True,
        )
        child.stdout.readline()
        time.sleep(dice.uniform(0.0, 0.05))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        newest = find_checkpoint(tmp_path, pytest.fail)  # pytest.fail: none may even be damaged
        assert int(newest.name.split("-")[1]) >= step
        step = int(newest.name.split("-")[1])
