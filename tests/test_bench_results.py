"""What grpo-engine bench makes of its rows: the comparison with a baseline, tables, targets."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bench_parts import ADVANTAGES, spread
from rich.console import Console

from grpo_engine.bench.baseline import load_baseline, regressions
from grpo_engine.bench.cases import gpu_cases
from grpo_engine.bench.charts import write_roofline
from grpo_engine.bench.machine import slug
from grpo_engine.bench.providers import providers_of
from grpo_engine.bench.rows import ABSENT, BOTH, CANNOT, FAILED, FORWARD, OK, WRONG, Row
from grpo_engine.bench.tables import case_markdown, number, print_case
from grpo_engine.bench.targets import main_case, target_cases, target_table
from grpo_engine.types import UserError

# -- the baseline --------------------------------------------------------------------------------


def result(**changes):
    row = Row(ADVANTAGES, FORWARD, "ours", True, OK, ms=spread(10.0), floor_ms=spread(1.0))
    row.peak_mib, row.errors = 100.0, {"advantages": 1e-8}
    for name, value in changes.items():
        setattr(row, name, value)
    about = {"hardware": "CPU, test", "date": "2026-01-01", "code": "1", "versions": {}}
    return about | {"rows": [row.to_json()]}


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({}, None),
        ({"ms": spread(11.0)}, None),
        ({"ms": spread(12.0)}, "10.00 ms -> 12.00 ms (1.20x; allowed 1.15x)"),
        ({"ms": spread(12.0, noise=0.1)}, None),
        ({"ms": spread(14.0, noise=0.1)}, "(1.40x; allowed 1.30x)"),
        ({"ms": spread(15.0), "floor_ms": spread(1.5)}, None),
        ({"ms": spread(20.0), "floor_ms": spread(1.5)}, "a machine 1.50x slower; allowed 1.15x"),
        ({"ms": spread(30.0), "floor_ms": spread(9.0)}, "a machine 2.00x slower at most; allowed"),
        ({"ms": spread(10.0), "floor_ms": spread(0.5)}, None),
        ({"peak_mib": 105.0}, None),
        ({"peak_mib": 107.0}, "peak 100.0 MiB -> 107.0 MiB"),
        ({"errors": {"advantages": 9e-7}}, None),
        ({"errors": {"advantages": 2e-6}}, "error of advantages 1.0e-08 -> 2.0e-06"),
        ({"errors": {"advantages": math.inf}}, "error of advantages 1.0e-08 -> inf"),
        ({"status": WRONG, "reason": "too far off", "ms": None}, "was right, now WRONG"),
        ({"provider": "torch", "ours": False, "ms": spread(99.0)}, None),
    ],
)
def test_worse_than_the_baseline(now, words):
    found, compared = regressions(result(**now), result())
    assert compared == (0 if now.get("provider") else 1)
    if words is None:
        assert found == []
    else:
        (line,) = found
        assert words in line and line.startswith("four groups, forward, ours")


@pytest.mark.parametrize(
    ("ms", "floors", "corrected"),
    [
        (10.0, (1.0, 2.0), True),
        (2.0, (0.25, 0.5), True),  # a tenth of the call
        (10.0, (0.25, 0.5), False),
        (10.0, (0.5, 2.0), False),  # in one of the two runs
    ],
)
def test_only_a_floor_that_tells_of_the_machine_corrects(ms, floors, corrected):
    base = result(ms=spread(ms), floor_ms=spread(floors[0]))
    found, _ = regressions(result(ms=spread(2 * ms), floor_ms=spread(floors[1])), base)
    assert (found == []) is corrected, found


def broken(**changes):
    return json.dumps(result() | {"format": 1, "rows": []} | changes)


def broken_row(**changes):
    return broken(rows=[result()["rows"][0] | changes])


def test_a_baseline_of_another_machine_is_refused(tmp_path):
    path = tmp_path / f"{slug('CPU, test')}.json"
    path.write_text(json.dumps(result() | {"format": 1}))
    assert load_baseline(path, "CPU, test") == load_baseline(tmp_path, "CPU, test")
    with pytest.raises(UserError, match="measured on 'CPU, test', this is 'GPU, NVIDIA H200'"):
        load_baseline(path, "GPU, NVIDIA H200")
    with pytest.raises(UserError, match=r"no gpu-nvidia-h200\.json .* there are: cpu-test"):
        load_baseline(tmp_path, "GPU, NVIDIA H200")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "not a results file"),
        ('{"format": 1, "hardware": "x", "rows": [{}]}', "date is missing or no text"),
        (broken(rows=None), "versions or rows are missing"),
        (broken(versions=[]), "versions or rows are missing"),
        (broken(rows=[3]), "row 1: no object"),
        (broken(rows=[{}]), "row 1: case is missing"),
        (broken_row(ms=3), "row 1: ms is odd: 3"),
        (broken_row(ms={"median": 1.0}), "row 1: ms is odd"),
        (broken_row(floor_ms="fast"), 'row 1: floor_ms is odd: "fast"'),
        (broken_row(errors=None), "row 1: errors is odd: null"),
        (broken_row(errors={"loss": []}), "row 1: errors is odd"),
        (broken_row(peak_mib=True), "row 1: peak_mib is odd: true"),
        (broken_row(peak_mib=math.nan), "row 1: peak_mib is odd: NaN"),
        (broken_row(ours="yes"), "row 1: ours is odd"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_a_broken_baseline_is_named(tmp_path, text, words):
    path = tmp_path / "base.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"--compare {path}: .*{words}"):
        load_baseline(path, "x")


# -- tables and charts ---------------------------------------------------------------------------


def some_rows():
    right = Row(ADVANTAGES, FORWARD, "ours", True, OK, errors={"advantages": 1e-9})
    right.ms, right.floor, right.floor_ms = spread(2.0), "copy of 1 MiB", spread(1.0)
    right.rounds, right.peak_mib, right.flops, right.bytes = 5, 3.5, 1e6, 1e4
    wrong = Row(ADVANTAGES, FORWARD, "a|b", False, WRONG, "error 0.5, allowed 1e-4")
    wrong.errors = {"advantages": 0.5}
    failed = Row(ADVANTAGES, FORWARD, "f", False, FAILED, "OutOfMemoryError: 9 GiB")
    absent = Row(ADVANTAGES, FORWARD, "g", False, ABSENT, "needs a GPU")
    return [right, wrong, failed, absent]


def test_markdown_shows_what_is_wrong_and_why():
    page = case_markdown(some_rows())
    assert (
        "| forward | ours | 2.000 | 2.000 - 2.000 | 50.0 | 3.500 | 1.0e-09 (advantages) |" in page
    )
    assert "| forward | a\\|b | WRONG | - | - | - | 5.0e-01 (advantages) | - |" in page
    assert "floor: forward copy of 1 MiB, 1.000 ms" in page
    assert "- WRONG: error 0.5, allowed 1e-4: a|b (forward)" in page
    assert "- FAILED: OutOfMemoryError: 9 GiB: f (forward)" in page
    assert "- not here: needs a GPU: g" in page


def test_the_screen_shows_the_same(capsys):
    print_case(some_rows(), Console(force_terminal=True, width=120, color_system=None))
    shown = capsys.readouterr().out
    for words in ("ours", "WRONG", "FAILED", "50.0", "not here: needs a GPU: g"):
        assert words in shown


def test_numbers_have_four_digits_and_no_exponent():
    assert [number(x) for x in (0.000123456, 0.5, 12.3456, 1234.5, 98765.4, 0, None)] == [
        *("0.0001235", "0.5000", "12.35", "1234", "98765", "0", "-")
    ]


ROOFS = {"copy_gb_per_s": 10.0, "gemm_tflops": 0.1, "hardware": "CPU", "code": "1", "date": "today"}


def test_roofline(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    written = write_roofline(ROOFS, some_rows(), tmp_path / "a.b")
    assert [path.name for path in written] == ["a.b.png", "a.b.svg"]
    assert written[0].read_bytes().startswith(b"\x89PNG") and b"<svg" in written[1].read_bytes()


def test_without_matplotlib_the_roofline_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is not installed" in write_roofline(ROOFS, some_rows(), tmp_path / "x")
    assert "nothing with" in write_roofline(ROOFS, some_rows()[1:], tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_targets_are_met_missed_or_not_measured():
    main, *_, frozen, _, _, _ = target_cases()
    ours = Row(main, BOTH, "ours", True, OK, ms=spread(84.0), floor_ms=spread(80.0))
    ours.floor, ours.peak_mib = "3 bare GEMMs", 4000.0
    near = Row(main, BOTH, "rival", False, OK, ms=spread(90.0), floor_ms=spread(80.0))
    filtered = replace(near, provider="filters", ms=spread(50.0), approximate="drops entries")
    slow = replace(ours, case=frozen, ms=spread(90.0), floor_ms=spread(60.0), floor="2 bare GEMMs")
    rows = {tuple(row[:2]): row[2:] for row in target_table([ours, near, filtered, slow])["rows"]}
    job = "linear_grpo_loss"
    assert rows[job, "<= 1.10x of 3 bare GEMMs"] == ["1.050x of 3 bare GEMMs", "met"]
    figure, verdict = rows[job, ">= 1.2x faster than every exact rival"]
    assert figure.startswith("1.07x, the nearest being rival, of 1 rivals; not timed: torch, ")
    assert verdict == "MISSED"
    assert rows[f"{job}, frozen head", "<= 1.10x of 2 bare GEMMs"][1] == "MISSED"
    assert rows["token_logprobs, forward", ">= 90 % of copy"] == ["not measured", ""]


def test_a_target_against_rivals_is_met_only_when_all_were_timed():
    case = main_case()

    def row(name, status=OK, **more):
        return Row(case, BOTH, name, name == "ours", status, **more)

    known = [p for p in providers_of(case.job) if not p.name.startswith("ours")]
    known = [p for p in known if not p.approximate]
    able = [p.name for p in known if not p.unsuited(case)]
    assert {"torch", "torch.compile", "Liger FusedLinearGRPOLoss"} <= set(able)
    timed = [row("ours", ms=spread(10.0)), *(row(n, ms=spread(20.0)) for n in able)]
    timed += [row(p.name, CANNOT) for p in known if p.name not in able]

    def judged(rows):
        words = ">= 1.2x faster than every exact rival"
        return next(r[2:] for r in target_table(rows)["rows"] if r[1] == words)

    assert judged(timed) == [f"2.00x, the nearest being torch, of {len(able)} rivals", "met"]
    for last in ([], [row(able[-1], ABSENT)], [row(able[-1], FAILED)], [row(able[-1])]):
        rest = [r for r in timed if r.provider != able[-1]]
        figure, verdict = judged([*rest, *last])
        assert verdict == "not decided" and figure.endswith(f"; not timed: {able[-1]}")
    wrong = [r for r in timed if r.provider != able[-1]] + [row(able[-1], WRONG)]
    assert judged(wrong)[1] == "met"


def test_launches_have_a_line_that_names_the_test_which_counts_them():
    rows = {tuple(row[:2]): row[2:] for row in target_table([])["rows"]}
    for target in (
        ("grpo_loss, forward", "<= 2 launches"),
        ("grpo_loss", "no host sync"),
        ("pack, unpack", "one launch"),
    ):
        figure, verdict = rows[target]
        path, _, name = figure.removeprefix("counted by ").partition("::")
        assert name and verdict == "not decided"
        assert f"def {name}" in (Path(__file__).parents[1] / path).read_text()


def test_target_cases_are_cases_of_a_gpu():
    names = {case.name for case in gpu_cases()}
    assert [case.name for case in target_cases() if case.name not in names] == []
