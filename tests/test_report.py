from __future__ import annotations

import json
import re

import pytest
import yaml
from report_page import Page, assert_needs_nothing

from grpo_engine.report import headline, write_report
from grpo_engine.report.charts import Line, line_chart, percent, plain_number, thin, ticks
from grpo_engine.report.record import bootstrap, estimate, load_run, paired_gain, wilson
from grpo_engine.report.sections import user_part
from grpo_engine.report.words import hardware
from grpo_engine.types import UserError

R1_ZERO = "A conversation between User and Assistant. User: {} Assistant:"


def eval_samples(step, correct):
    return [
        {
            "step": step,
            "index": i,
            "prompt": R1_ZERO.format(f"{i}+1=?"),
            "completion": f"<think> 然后 {i}+1 </think> <answer> {step} </answer>",
            "correct": mark,
            "finish_reason": "stop" if i else "length",
            "length": 40 + 20 * (mark or 0),
            "solution": str(i + 1),
        }
        for i, mark in enumerate(correct)
    ]


def write_jsonl(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


@pytest.fixture
def run_folder(tmp_path):
    """A finished CPU run: 50 problems, 20 right before and 45 after (the 20 among them)."""
    folder = tmp_path / "run"
    folder.mkdir()
    before, after = [1] * 20 + [0] * 30, [1] * 45 + [0] * 5
    rows = [{"step": 0, "eval/accuracy": 0.4, "eval/mean_length": 48.0, "time/eval": 2.0}]
    for step in range(1, 11):
        rows.append(
            {
                "step": step,
                "reward": 0.5 + step / 10,
                "rewards/accuracy/mean": step / 10,
                "rewards/accuracy/error_rate": 0.25,
                "rewards/format/mean": 0.5,
                "completions/mean_length": 48.0 + step,
                "completions/clipped_ratio": 0.02,
                "kl": 0.01 * step,
                "entropy": 0.5,
                "grad_norm": None if step == 4 else 1.0,
                "tokens_per_second": 7000.0,
                "time/generate": 6.0,
                "time/update": 3.0,
                "time/step": 10.0,
            }
        )
    rows[4]["warnings"] = ["non-finite: grad_norm is NaN or infinite at step 4"]
    rows[-1] |= {"eval/accuracy": 0.9, "eval/mean_length": 72.0, "time/eval": 2.0}
    write_jsonl(folder / "metrics.jsonl", rows)
    write_jsonl(folder / "completions" / "eval-000000.jsonl", eval_samples(0, before))
    write_jsonl(folder / "completions" / "eval-000010.jsonl", eval_samples(10, after))
    config = {"model": "miniature", "dataset": "sums", "max_steps": 10, "device": "auto"}
    config |= {"reward_funcs": ["accuracy", "format"], "reward_weights": [1.0, 0.5]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    manifest = {
        "name": "run",
        "recipe": "r1-zero-miniature",
        "status": "finished",
        "started": 1000.0,
        "finished": 1110.0,
        "inputs": {"model": {"path": "miniature", "weights_sha256": "9f" * 32}},
        "host": {"cpu_threads": 2, "gpus": []},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def page(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text("utf-8"))


def text_of(folder):
    return page(folder).text.replace("\u202f", " ")


def test_outcome_is_told_with_the_measured_numbers(run_folder):
    text = text_of(run_folder)
    assert "Held-out accuracy rose from 40.0 % to 90.0 % in 10 steps" in text
    low, high = wilson(45, 50)
    assert f"{100 * low:.1f}–{100 * high:.1f} % after" in text
    assert "50 held-out problems" in text and "paired change +50.0 points" in text
    assert "from 48.0 to 72.0 tokens (1.50×)" in text
    assert "10 optimiser steps in 110 s on CPU (2 threads)" in text
    assert "GPU" not in text
    assert "9f" * 32 in text
    assert "45 right answers average 60 tokens, 5 wrong ones 40" in text


def test_page_needs_nothing_but_itself(run_folder):
    html = write_report(run_folder).read_text("utf-8")
    assert_needs_nothing(html)


def test_every_chart_is_described_in_words(run_folder):
    parsed = page(run_folder)
    charts = [value for _, name, value in parsed.attributes if name == "data-chart"]
    assert len(charts) >= 8
    assert parsed.tags.count("desc") == parsed.tags.count("title") - 1 == len(charts)
    assert "held-out problems: 40.0\u202f% at step 0, 90.0\u202f% at step 10" in parsed.text
    series = json.loads(charts[0])
    assert series[0]["step"] == [0, 10] and series[0]["text"][-1] == "90.0\u202f%"
    labels = {value for tag, name, value in parsed.attributes if name == "aria-label"}
    assert any("Sampling answers" in label for label in labels if label)


def test_time_split_counts_evaluations_once_and_names_the_rest(run_folder):
    assert load_run(run_folder).phases() == {
        "generate": 60.0,
        "update": 30.0,
        "eval": 4.0,
        "other": 10.0,
    }
    text = text_of(run_folder)
    assert "Sampling answers 60 s 57.7 %" in text and "104 s in steps" in text


def test_answers_are_paired_by_problem_and_escaped(run_folder):
    evil = "<script>alert(1)</script> & \x1b[31m \ud800 </pre> 汉字"
    for step in (0, 10):
        path = run_folder / "completions" / f"eval-{step:06d}.jsonl"
        rows = eval_samples(step, [0] * 50)
        rows[0]["completion"] = evil
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parsed = page(run_folder)
    assert parsed.tags.count("script") == 1
    assert "<script>alert(1)</script> & \ufffd[31m \ufffd </pre> 汉字" in parsed.text
    assert parsed.tags.count("article") == 24  # 12 problems, before and after
    assert "0+1=? expected 1" in parsed.text and "conversation between" not in parsed.text
    assert "cut by the length cap" in parsed.text and "✗ wrong" in parsed.text


def test_very_long_answers_are_cut_in_the_middle(run_folder):
    path = run_folder / "completions" / "eval-000010.jsonl"
    rows = eval_samples(10, [1] * 45 + [0] * 5)
    rows[0]["completion"] = "a" * 10_000 + "END"
    write_jsonl(path, rows)
    text = text_of(run_folder)
    assert "[… 4,003 characters not shown …]" in text and "aEND" in text


def test_reward_table_warnings_and_gaps(run_folder):
    text = text_of(run_folder)
    assert "accuracy 1 0.100 1.000 0.100 1.000 25.0 %" in text
    assert "format 0.5 0.500" in text
    assert "grad_norm is NaN or infinite at step 4 (step 4)" in text
    path = run_folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[1:6]:
        row["warnings"] = [f"truncation: {row['step']} % cut"]
    write_jsonl(path, rows)
    assert "truncation: 5 % cut (5 times, steps 1 to 5)" in text_of(run_folder)


def test_no_claim_without_evidence(run_folder):
    record = load_run(run_folder)
    same = eval_samples(10, [1] * 21 + [0] * 29)
    record.evals[10] = same
    record.rows[-1]["eval/accuracy"] = 21 / 50
    assert headline(record).startswith("No measurable change in held-out accuracy: from 40.0")
    record.evals = {}
    assert headline(record).startswith("Held-out accuracy went from")
    record.evals = {0: eval_samples(0, [1] * 20 + [0] * 30), 10: eval_samples(10, [0] * 50)}
    record.rows[-1]["eval/accuracy"] = 0.0
    assert headline(record).startswith("Held-out accuracy fell from")
    record.rows = record.rows[1:-1]
    assert headline(record) == "Mean training reward went from 0.600 to 1.400 in 9 steps"


def test_samples_that_do_not_match_the_metric_give_no_interval(run_folder):
    write_jsonl(run_folder / "completions" / "eval-000010.jsonl", eval_samples(10, [1, 0]))
    last = load_run(run_folder).accuracy()[-1]
    assert (last.value, last.low, last.problems) == (0.9, None, None)


def test_the_time_of_a_resumed_run_leaves_out_the_pause(run_folder):
    assert "in 110 s on" in text_of(run_folder)
    path = run_folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest |= {"finished": 90_000.0, "resumed": [{"at": "later", "from": "checkpoint-5"}]}
    path.write_text(json.dumps(manifest))
    assert "in 104 s on" in text_of(run_folder)  # ten steps of 10 s, two evaluations of 2 s


def test_interrupted_run_says_so(run_folder):
    path = run_folder / "metrics.jsonl"
    rows = path.read_text().splitlines()[:6]
    path.write_text("\n".join(rows) + '\n{"step": 6, "rew')
    manifest = json.loads((run_folder / "manifest.json").read_text())
    manifest |= {"status": "stopped", "finished": None}
    (run_folder / "manifest.json").write_text(json.dumps(manifest))
    text = text_of(run_folder)
    assert "This run is not finished: stopped at step 5 of 10" in text
    assert "Held-out accuracy is 40.0 % at step 0" in text
    assert "5 optimiser steps in 52 s" in text  # 5 steps and one evaluation


def test_bare_and_empty_folders(tmp_path):
    text = text_of(tmp_path)
    assert "This run logged no step" in text and "There is no metrics.jsonl" in text
    assert "There is no manifest.json" in text
    (tmp_path / "metrics.jsonl").touch()
    assert "metrics.jsonl is empty" in text_of(tmp_path)
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "kl": None, "loss": 0.5}])
    assert "1 step logged, no reward among them" in text_of(tmp_path)


def test_bad_folders_are_user_errors(tmp_path, run_folder):
    with pytest.raises(UserError, match="no folder"):
        write_report(tmp_path / "absent")
    (run_folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read"):
        write_report(run_folder)
    (run_folder / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="must hold a mapping, found list"):
        write_report(run_folder)
    assert not (run_folder / "report.html").exists()


def test_training_samples_stand_in_for_evaluations(tmp_path):
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "reward": 0.5}, {"step": 9, "reward": 1}])
    for step in (1, 9):
        row = {"step": step, "prompt": f"p{step}", "completion": f"c{step}", "reward": 0.5}
        write_jsonl(tmp_path / "completions" / f"step-{step:06d}.jsonl", [row])
    text = text_of(tmp_path)
    assert "their prompts may differ" in text
    assert "p1 Step 1 reward 0.50 c1" in text and "p9 Step 9 reward 0.50 c9" in text


def test_hardware_is_named_as_it_was_used(run_folder):
    record = load_run(run_folder)
    record.manifest["host"] = {"gpus": ["NVIDIA H200"], "cpu_threads": 16}
    assert hardware(record) == "NVIDIA H200"
    record.config["device"] = "cpu"
    assert hardware(record) == "CPU (16 threads)"
    record.manifest = {}
    assert hardware(record) == "hardware that was not recorded"


def test_user_part():
    assert user_part(R1_ZERO.format("User: 3+4=?")) == "3+4=?"
    assert user_part("3+4=?\n") == "3+4=?"


# -- intervals -------------------------------------------------------------------------------------


def test_wilson_against_published_values():
    # Newcombe 1998 (Statistics in Medicine 17), table I, method 3
    for successes, count, low, high in ((81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611)):
        found = wilson(successes, count)
        assert found == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20)[1] == 1.0


def test_bootstrap_matches_the_normal_interval_and_is_reproducible():
    values = [0.0, 1.0] * 200
    low, high = bootstrap(values)
    assert (low, high) == bootstrap(values)
    half = 1.96 * 0.5 / 20
    assert low == pytest.approx(0.5 - half, abs=0.006)
    assert high == pytest.approx(0.5 + half, abs=0.006)


def test_estimate_resamples_problems_not_samples():
    # 10 problems, 8 samples each, all samples of a problem agree: 10 independent values, not 80
    samples = [{"index": i, "correct": i % 2} for i in range(10) for _ in range(8)]
    found = estimate(3, 0.5, samples)
    assert found.problems == 10
    assert (found.low, found.high) == wilson(5, 10)
    mixed = [{"index": i, "correct": mark} for i in range(10) for mark in (i % 2, 1)]
    assert estimate(3, 0.75, mixed).high - estimate(3, 0.75, mixed).low > 0.2  # 20 samples: 0.18


def test_unjudged_samples_are_left_out_of_the_interval():
    samples = [{"index": i, "correct": mark} for i, mark in enumerate([1, 1, 0, None])]
    assert estimate(0, 2 / 3, samples).problems == 3


def test_paired_gain_needs_the_same_problems():
    before = [{"index": i, "correct": 0} for i in range(4)]
    after = [{"index": i, "correct": 1} for i in range(4)]
    assert paired_gain(before, after) == (1.0, 1.0)
    assert paired_gain(before, after[:3]) is None
    assert paired_gain([], []) is None


# -- charts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "low,high", [(0, 1), (0.0013, 0.0571), (-3, 8), (5, 5), (0, 0), (1e6, 3e6)]
)
def test_ticks_are_round_even_and_cover(low, high):
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 7
    steps = [b - a for a, b in zip(found[:-1], found[1:], strict=True)]
    assert max(steps) == pytest.approx(min(steps))
    mantissa = f"{steps[0]:.6e}".split("e")[0].rstrip("0").rstrip(".")
    assert mantissa in ("1", "2", "2.5", "5")


def coordinates(svg, kind):
    path = re.search(rf'<path class="{kind}" d="([^"]*)"', svg).group(1)
    return [part.split() for part in re.split("[ML]", path)[1:]], path


def test_a_higher_value_is_drawn_higher_and_none_breaks_the_line():
    points = [(0, 1.0), (1, 2.0), (2, None), (3, 3.0), (4, 1.0)]
    svg = line_chart("t", [Line("a", points)])
    (first, second, third, fourth), path = coordinates(svg, "line tone-1")
    assert float(second[1]) < float(first[1]) and float(fourth[1]) == float(first[1])
    assert float(first[0]) < float(second[0]) < float(third[0]) < float(fourth[0])
    assert path.count("M") == 2


def test_charts_of_odd_series():
    with pytest.raises(ValueError, match="no finite value"):
        line_chart("t", [Line("a", [(0, None)])])
    lone = line_chart("t", [Line("a", [(7, 0.0)])], floor=0.0, ceiling=1.0, number=percent)
    assert "<circle" in lone and "nan" not in lone
    flat = line_chart("t", [Line("a", [(0, 0.0), (1, 0.0)])], floor=0.0)
    assert ">-" not in flat  # nothing below the floor
    escaped = line_chart('<"&', [Line("<b>", [(0, 1.0), (1, 2.0)])])
    assert "<b>" not in escaped and "&lt;&quot;&amp;" in escaped


def test_long_runs_stay_small():
    points = [(step, float(step % 7)) for step in range(10_400)]
    svg = line_chart("t", [Line("a", points)])
    assert len(svg) < 40_000
    assert thin(points, 320)[-1][0] == 10_399
    assert thin(points[:320], 320) == points[:320]


def test_numbers():
    shown = [plain_number(v) for v in (0, 12345.6, 1.5, 0.04321, 0.00001234, -250)]
    assert shown == ["0", "12,346", "1.5", "0.0432", "1.2e-05", "-250"]
    assert [percent(v) for v in (0.5, 0.9996, 1.0)] == ["50.0\u202f%", "100\u202f%", "100\u202f%"]
