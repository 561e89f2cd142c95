"""All of DeepSeek-R1's stages on the miniature: each does what the paper says it does.

The questions, and what counts as an answer, are those of ``benchmarks/r1_miniature_seeds.py``,
which asks them of three seeds; the slow tests ask them of one, in about a quarter of an hour. Not
asked here is whether RL is stabler after a cold start than R1-Zero: R1-Zero on the miniature is
not unstable, and the committed results say so.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "r1_miniature_seeds.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("r1_miniature_seeds", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(script, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("r1") / "run"
    script.run_recipe(0, folder, [])
    return folder


@pytest.mark.slow
def test_every_stage_finished(run):
    manifests = sorted(run.glob("*/manifest.json"))
    assert len(manifests) > 20
    for path in manifests:
        assert json.loads(path.read_text(encoding="utf-8"))["status"] == "finished", (
            path.parent.name
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["start", "language", "verified", "preference", "distil"])
def test_phenomenon_is_seen(script, run, name):
    claim, ask = script.PHENOMENA[name]
    numbers = ask(run)
    assert numbers["seen"], f"{claim}: {numbers}"


# --- the questions themselves, asked of made-up runs ---


def write_metrics(folder: Path, accuracies: list[float], held_out: list[float], **columns) -> None:
    folder.mkdir(parents=True)
    rows = [{"step": 0, "eval/accuracy": held_out[0], "eval/mean_length": 30.0}]
    for step, value in enumerate(accuracies, start=1):
        row = {"step": step, "rewards/accuracy/mean": value}
        rows.append(row | {name: found[step - 1] for name, found in columns.items()})
    rows[-1] |= {"eval/accuracy": held_out[1], "eval/mean_length": 60.0}
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def write_results(
    folder: Path, value: float, spread: float = 0.01, correct: list[int] | None = None
) -> None:
    folder.mkdir(parents=True)
    found = {"pass@1": {"value": value, "ci95": [value - spread, value + spread]}}
    if correct is not None:
        found |= {"correct": correct, "rows": list(range(len(correct))), "num_samples": 4}
    (folder / "results.json").write_text(json.dumps(found), encoding="utf-8")


def test_an_even_rise_is_stable_however_fast_and_a_fall_is_not(script, tmp_path):
    write_metrics(tmp_path / "r1-zero", [0.2, 0.4, 0.6, 0.8], [0.2, 0.8])
    write_metrics(tmp_path / "reasoning-rl", [0.8, 0.9, 0.7, 0.9], [0.9, 0.85])
    found = script.stability(tmp_path)
    assert found["r1_zero"] == {"unevenness": pytest.approx(0.0), "largest_fall": 0.0}
    assert found["after_cold_start"]["unevenness"] == pytest.approx(0.17, abs=0.01)
    assert found["after_cold_start"]["largest_fall"] == pytest.approx(0.05)
    assert not found["seen"]
    assert script.start(tmp_path) == {"r1_zero": 0.2, "after_cold_start": 0.9, "seen": True}


@pytest.mark.parametrize(
    ("shares", "accuracy", "seen"),
    [([0.7, 0.9, 1.0], 0.95, True), ([0.7, 0.9, 1.0], 0.9, False), ([0.7, 0.7, 0.7], 0.95, False)],
    ids=["raised", "at a cost", "not raised"],
)
def test_language_reward_must_raise_consistency_at_a_small_cost(
    script, tmp_path, monkeypatch, shares, accuracy, seen
):
    monkeypatch.setattr(script, "LAST_ROLLOUTS", 1)
    column = "rewards/language/mean"
    write_metrics(tmp_path / "reasoning-rl", [0.9] * 3, [0.9, 0.9], **{column: shares})
    without = {column: [0.7, 0.7, 0.7]}
    write_metrics(tmp_path / "reasoning-rl-accuracy-only", [0.9] * 3, [0.9, 0.9], **without)
    write_results(tmp_path / "eval-reasoning-rl", accuracy)
    write_results(tmp_path / "eval-accuracy-only", 0.95)
    assert script.language(tmp_path)["seen"] is seen


@pytest.mark.parametrize(("spread", "seen"), [(0.01, True), (0.2, False)])
def test_distilled_student_must_be_better_beyond_the_intervals(script, tmp_path, spread, seen):
    for stage, value, correct in (
        ("eval-student", 0.2, [0, 0, 2]),
        ("eval-distill", 0.8, [4, 2, 4]),
        ("eval-student-rl", 0.6, [3, 1, 3]),
    ):
        write_results(tmp_path / stage, value, spread, correct)
    found = script.distil(tmp_path)
    assert found["seen"] is seen
    # One sample of four more on each problem, whatever the unpaired intervals say.
    assert found["paired"] == {"value": 0.25, "ci95": [0.25, 0.25]}
    assert "paired difference +0.25 [+0.25, +0.25]" in script.SHORT["distil"](found)


def test_a_kept_row_with_a_wrong_answer_is_found_again(script, tmp_path):
    folder = tmp_path / "rejection-sampling"
    folder.mkdir()
    good = "<think> First 1+2=3. So 3. </think> It is \\boxed{3}."
    row = {"prompt": "1 + 2 = ?", "completion": good, "solution": "3", "domain": "math"}
    counted = {"acceptance": {"by_domain": {"math": {"samples": 4, "rejected": {"wrong": 2}}}}}
    (folder / "statistics.json").write_text(json.dumps(counted), encoding="utf-8")
    for rows, seen in (([row, row], True), ([row, {**row, "solution": "4"}], False)):
        text = "".join(json.dumps(one) + "\n" for one in rows)
        (folder / "data.jsonl").write_text(text, encoding="utf-8")
        assert script.verified(tmp_path)["seen"] is seen
