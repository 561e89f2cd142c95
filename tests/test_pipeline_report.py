"""The report of a whole pipeline: every number is the one in the files, every stage of it can be
missing, and nothing a model writes gets out of its box."""

from __future__ import annotations

import json
import re
import time

import pytest
from pipeline_folder import PROBLEMS, SECONDS, STAGES, write_jsonl, write_pipeline
from report_page import Page, assert_needs_nothing

from grpo_engine import cli
from grpo_engine.report.pipeline import headline, write_pipeline_report
from grpo_engine.report.pipeline_record import load_pipeline
from grpo_engine.report.reflection import correction, find_moment, reflective_words
from grpo_engine.report.stage_diagram import _nodes, lanes_of
from grpo_engine.report.stage_tables import paired_shares
from grpo_engine.types import UserError

HEADINGS = [
    "The stages and what came of what",
    "Accuracy and response length over RL",
    "What cold start changes",
    "Language consistency",
    "Preference reward against accuracy",
    "Reward components",
    "The models, stage by stage",
    "Distillation or RL for a small model",
    "Votes of several samples",
    "One problem, every model",
    "Reflection",
    "Sampled data",
    "Judgements for the reward models",
    "Reward models",
    "Time and tokens",
    "Machine and versions",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def html(whole):
    return write_pipeline_report(whole).read_text("utf-8")


def plain(html):
    return Page(html).text.replace("\u202f", " ")


def headings(html):
    return re.findall(r"<section[^>]*><h2>(.*?)</h2>", html)


def row_of(html, label):
    """The cells of the table row that begins with ``label``, as text."""
    found = [row for row in re.findall(r"<tr>(.*?)</tr>", html) if f"<td>{label}" in row]
    assert found, f"no row {label!r}"
    cells = re.findall(r"<td[^>]*>(.*?)</td>", found[0])
    return [re.sub(r"<[^>]+>", " ", cell).replace("\u202f", " ").strip() for cell in cells]


def columns(html):
    head = re.search(r"<th>Evaluation</th>(.*?)</tr>", html)[1]
    return re.findall(r"<th[^>]*>(.*?)</th>", head)


def test_a_finished_pipeline_has_every_section_in_order(html):
    assert headings(html) == HEADINGS
    assert "Incomplete" not in html


def test_the_outcome_is_told_with_the_measured_numbers(whole, html):
    values = {
        name: json.loads((whole / f"eval-{name}" / "results.json").read_text())["pass@1"]
        for name in ("base", "r1")
    }
    first, last = (100 * values[name]["value"] for name in ("base", "r1"))
    text = plain(html)
    assert f"R1 solves {last:.0f} % of the test problems, Base {first:.1f} %" in text
    low, high = values["base"]["ci95"]
    assert f"{100 * low:.1f}–{100 * high:.1f} %" in text
    assert f"{len(STAGES)} of the {len(STAGES)} stages" in text and "CPU (2 threads)" in text


def test_the_stage_table_has_the_papers_columns_and_the_files_numbers(whole, html):
    names = ["Base", "R1-Zero", "Dev1", "Dev3", "R1", "Student, distilled", "Student, RL alone"]
    assert columns(html) == names
    evals = ["base", "r1-zero", "dev1", "dev3", "r1", "distill", "student-rl"]
    results = [json.loads((whole / f"eval-{n}" / "results.json").read_text()) for n in evals]
    for label, key in (("pass@1", ("pass@k", "1")), ("cons@4", ("cons@k", "4"))):
        for cell, found in zip(row_of(html, label)[1:], results, strict=True):
            value = found[key[0]][key[1]]
            digits = 0 if value["value"] == 1 else 1
            wanted = f"{100 * value['value']:.{digits}f} %"
            low, high = value["ci95"]
            assert cell.split("  ")[0] == f"{wanted} {100 * low:.1f}–{100 * high:.1f}"
    assert row_of(html, "mean length")[1:] == ["11.5"] * 7
    assert row_of(html, "R1-Zero’s format")[1:] == ["100 %"] * 7
    # "We get so" of five words, of which two Chinese characters count as words of their own
    assert row_of(html, "language consistency")[1:] == ["60.0 %"] * 7
    assert row_of(html, "helpful reward")[4:6] == ["−0.50", "+1.25"]
    assert row_of(html, "safety reward")[1:4] == ["–", "–", "–"]


def test_distillation_is_set_against_rl_on_the_same_student(html):
    text = plain(html)
    section = text[text.index("Distillation or RL") : text.index("Votes of several")]
    assert "Here distillation is ahead of RL on the same student: 71.9 % and 21.9 %" in section
    assert "the intervals do not meet" in section and "3,000" in section
    # Two right samples of four more on each of the eight problems.
    words = (
        "Problem by problem, distillation less RL is +50.0 points (95 % interval +50.0 to +50.0)"
    )
    assert words in section


def test_shares_are_paired_by_problem():
    one = {"correct": [0, 2, 4], "rows": [3, 5, 9], "num_samples": 4}
    other = {"correct": [2, 1, 1], "rows": [9, 5, 4], "num_samples": 2}
    assert paired_shares(one, other).value == 0.0 + (0.5 - 0.5) / 2  # rows 5 and 9
    assert paired_shares(one, {**other, "correct": [1, 2, 1]}).value == (0.5 - 1 + 1 - 0.5) / 2
    assert paired_shares(one, {**other, "correct": [2, 2, 0]}).value == 0.25
    assert paired_shares(one, {**other, "rows": [9, 4, 2]}) is None


def test_curves_hold_the_logged_values(html):
    charts = [json.loads(value) for _, name, value in Page(html).attributes if name == "data-chart"]
    accuracy = {line["label"]: line for line in charts[0]}
    assert list(accuracy) == ["R1-Zero", "Dev2", "without-language", "R1", "Student, RL alone"]
    assert all(line["step"] == [0, 4] for line in charts[0])
    assert accuracy["Dev2"]["text"] == ["25.0\u202f%", "75.0\u202f%"]
    cold = next(chart for chart in charts if [x["label"] for x in chart] == ["R1-Zero", "Dev2"])
    assert cold[0]["step"] == [1, 2, 3, 4]
    language = next(c for c in charts if c[0]["label"] == "Dev2, rewarded")
    assert [line["label"] for line in language][1] == "without-language, measured, not rewarded"
    preference = next(c for c in charts if c[0]["label"] == "helpful, training")
    assert [line["label"] for line in preference] == [
        "helpful, training",
        "helpful, held-out prompts",
        "safety, training",
        "safety, held-out prompts",
    ]
    assert preference[0]["step"] == [3, 4] and preference[1]["text"] == ["-0.5", "1.25"]


def test_every_picture_is_described_in_words(html):
    pictures = html.count("<svg ")
    assert pictures == html.count("<desc>") and pictures > 15
    assert "reasoning-rl → Dev2 uses cold-start-sft → Dev1." in html


def test_the_diagram_has_every_stage_and_every_edge(whole, html):
    pipeline = load_pipeline(whole)
    drawn = set(re.findall(r"<title>(\S+) → (\S+) \((\S+)\)</title>", html))
    evals = {name for name, (kind, _, _) in STAGES.items() if kind == "eval"}
    edges = {(a, c, field) for a, _, c, field in pipeline.record.edges() if c not in evals}
    outside = {("tiny", name, "model") for name in ("r1-zero", "cold-start-sft", "r1-sft")}
    outside |= {("smaller", name, "model") for name in ("distill", "student-rl")}
    assert drawn == edges | outside
    wide = re.search(r'<svg [^>]*class="wide".*?</svg>', html)[0]
    assert wide.count('class="box data') == 2 * 4  # a sheet and its folded corner
    assert wide.count('class="box outside') == 2
    names = re.findall(r'class="name"[^>]*>([^<]*)<', wide)
    assert [name.split()[0] for name in names if name not in ("tiny", "smaller")] == [
        name for name in STAGES if name not in evals
    ]


def test_no_two_lines_of_the_diagram_run_over_each_other(whole):
    nodes = list(_nodes(load_pipeline(whole)))
    row = {node.key: number for number, node in enumerate(nodes)}
    lanes = lanes_of(nodes)
    spans = {}
    for key, lane in lanes.items():
        users = [row[node.key] for node in nodes if key in [source for source, _, _ in node.uses]]
        spans.setdefault(lane, []).append((row[key], max(users)))
    assert sum(map(len, spans.values())) == len(lanes) > 8
    for together in spans.values():
        together.sort()
        assert all(a[1] < b[0] for a, b in zip(together, together[1:], strict=False))
    assert len(spans) < len(lanes)  # lanes are shared


def test_data_and_reward_model_tables(html):
    text = plain(html)
    assert "10 prompts, 9 of them with an answer kept; 500 tokens drawn, 375 in the data" in text
    assert row_of(html, "math") == ["math", "20", "12.5", "1.0"]
    assert row_of(html, "mixed language") == ["mixed language", "5", "12.5 %"]
    assert row_of(html, "helpful-pairs")[1:] == [
        "40 pairs",
        "30",
        "75.0 %",
        "160",
        "60.0 %",
        "12.5 %",
    ]
    assert row_of(html, "safety-labels")[2] == "30 18 safe, 12 unsafe"
    assert row_of(html, "helpful-rm")[1:] == ["25", "87.5 % 75.0–93.8", "–", "6.2 %", "−0.25"]


def test_time_and_tokens_add_up(html):
    kinds = [kind for kind, _, _ in STAGES.values()]
    generated = 1000 * sum(kind in ("grpo", "eval", "sample") for kind in kinds)
    trained = 3000 * sum(kind in ("grpo", "sft", "distill") for kind in kinds)
    minutes = SECONDS * len(STAGES) / 60
    total = row_of(html[html.index("<h2>Time and tokens") :], "<b>total</b>")
    assert total == ["total", "", f"{generated:,}", f"{trained:,}", f"{minutes:.1f} min", "100 %"]


def test_warnings_name_their_stage(html):
    assert "all-scenario-rl reward-hacking: reward &#x27;helpful&#x27; rose" in re.sub(
        r"</?b>", "", html
    )


def test_one_problem_is_answered_by_every_model(html):
    text = plain(html)
    section = text[text.index("One problem, every model") : text.index("Reflection")]
    assert "What is 1+1? expected 2" in section  # the base gets it wrong, R1 right
    assert section.count("✓ right") == 1 and section.count("✗ wrong") == 6
    assert section.index("Base ✗ wrong") < section.index("R1 ✓ right")


# -- reflection ------------------------------------------------------------------------------------


def test_the_aha_moment_is_picked_by_the_rule_it_states(html):
    text = plain(html)
    assert "It writes “3+4=8”, says “check” and replaces it by “3+4=7”" in text
    assert "R1-Zero, step 4, training batch" in text


def test_without_a_correction_the_page_says_so(tmp_path):
    folder = write_pipeline(tmp_path / "run", stages=1)
    sample = {
        "step": 4,
        "prompt": "q",
        "completion": "3+4=7 wait 3+4=7",
        "rewards": {"accuracy": 1},
    }
    write_jsonl(folder / "r1-zero" / "completions" / "step-000004.jsonl", [sample])
    text = plain(write_pipeline_report(folder).read_text("utf-8"))
    assert "There is none among the answers that this run kept" in text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("9+8=15. Wait, 9+8=17.", ("9+8=15", "Wait", "9+8=17")),
        ("9 + 8 = 15，等等，检查 9+8=17", ("9 + 8 = 15", "检查", "9+8=17")),
        ("9+8=17. Wait, 9+8=17.", None),  # it looks back and finds nothing
        ("9+8=15. So 9+8=17.", None),  # no word of the list between them
        ("Wait. 9+8=15, 9+8=17", None),
        ("9+8=15. Wait, 8+9=17.", None),  # another left side
        ("19+8=15 but 9+8=17", None),
        ("1+2=3+4=7 but 1+2=5", None),  # a chain of equations has no one result
        ("2*3=5; however 2*3=6", ("2*3=5", "however", "2*3=6")),
        ("-4+1=-5, wrong: -4+1=-3", ("-4+1=-5", "wrong", "-4+1=-3")),
        ("buttery 1+1=3 1+1=2", None),
        (
            r"$12 \times 13 = 146$. Wait, $12 \times 13 = 156$.",
            ("12 * 13 = 146", "Wait", "12 * 13 = 156"),
        ),
        (
            r"\(12 \cdot 13 = 146\), an error: 12 × 13 = \boxed{156}",
            ("12 * 13 = 146", "error", "12 × 13 = 156"),
        ),
        (
            "(3 + 4) * 2 = 13. Wait, (3 + 4) * 2 = 14.",
            ("(3 + 4) * 2 = 13", "Wait", "(3 + 4) * 2 = 14"),
        ),
        ("(3 + 4) * 2 = 13. Wait, 4 * 2 = 8.", None),
        ("x = 5. Wait, so x = 7.", ("x = 5", "Wait", "x = 7")),
        ("x = 5, but also x = 7", None),  # a second solution
        (r"x_1 = \frac{1}{2}, wrong: x_1 = 1/3", ("x_1 = 1/2", "wrong", "x_1 = 1/3")),
        (
            "5 apples * 3 = 14. Wait: 5 apples * 3 = 15.",
            ("5 apples * 3 = 14", "Wait", "5 apples * 3 = 15"),
        ),
        (
            r"2x + 3(x - 1) = 4 but 2x+3(x-1)=7",
            ("2x + 3(x - 1) = 4", "but", "2x+3(x-1)=7"),
        ),
        (
            r"$\sqrt{16} + 1 = 4$; wait, $\sqrt{16}+1 = 5$",
            ("sqrt(16) + 1 = 4", "wait", "sqrt(16)+1 = 5"),
        ),
        ("3 >= 2, wait 3 <= 2 and 3 == 3", None),
        ("2 * 9+8=15 wait 9+8=17", None),
        ("1+2=3+4=8 but 3+4=7", None),
        ("√3+4=5 wait 3+4=7", None),
    ],
)
def test_a_correction_is_a_changed_result_after_a_word(text, found):
    assert correction(text) == found


def test_the_papers_own_moment_is_shown_for_its_words_where_no_answer_corrects_itself(tmp_path):
    transcript = r"""<think> To solve $\sqrt{a - \sqrt{a+x}} = x$, let's start by squaring both
sides: $\left(\sqrt{a-\sqrt{a+x}}\right)^2 = x^2 \implies a - \sqrt{a + x} = x^2$. Rearrange to
isolate the inner square root term: $(a - x^2)^2 = a + x$. ... Wait, wait. Wait. That's an
aha moment I can flag here. Let's reevaluate this step-by-step to identify if the correct
sum can be ... We started with the equation $\sqrt{a - \sqrt{a+x}} = x$.
</think> <answer> 7 </answer>"""
    folder = write_pipeline(tmp_path / "run", stages=1)
    sample = {"step": 4, "prompt": "q", "completion": transcript, "rewards": {"accuracy": 1}}
    fewer = {**sample, "completion": "wait wait 7"}
    file = folder / "r1-zero" / "completions" / "step-000004.jsonl"
    write_jsonl(file, [fewer, sample, {**sample, "completion": "wait " * 9, "rewards": {}}])
    text = plain(write_pipeline_report(folder).read_text("utf-8"))
    assert "The most reflective answer" in text and "An aha moment" not in text
    assert "no aha moment by the rule" in text and "It has 3: wait 3." in text
    assert "aha moment I can flag here" in text


def test_words_are_counted_whole_and_in_either_case():
    counts = reflective_words("Wait, waiting is no wait. But butter. 等等，检查。Check-check")
    assert counts == {"wait": 2, "but": 1, "等等": 1, "检查": 1, "check": 2}


def test_a_moment_is_right_and_of_the_latest_step():
    good = {"completion": "1+1=3 wait 1+1=2", "correct": 1.0}
    bad = {**good, "correct": 0.0}
    late = {**good, "completion": "2+2=5 wait 2+2=4"}
    assert find_moment({1: [bad, good], 2: [late], 3: [bad]}, {}).sample is late
    trained = {"completion": good["completion"], "rewards": {"accuracy": 1.0}}
    assert find_moment({3: [bad]}, {1: [trained]}).held_out is False
    assert find_moment({3: [bad]}, {1: [{**trained, "rewards": {"format": 1.0}}]}) is None
    wordy = {**good, "completion": "wait, wait, wait"}
    assert find_moment({3: [wordy]}, {1: [trained]}).sample is trained
    assert find_moment({3: [wordy], 4: [{**good, "completion": "wait, wait"}]}, {}).sample is wordy
    assert find_moment({3: [{**good, "completion": "wait"}]}, {}) is None


@pytest.mark.parametrize(
    "piece",
    [
        *("1", "1+", "1 - ", ". ", "1=1 ", "wait 1+1=2 ", "1+1=2 1+1=3 ", " ", "等等 1+1=1+1="),
        *("(", "(1+", "1+(1=", "x=", "1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 ! =", "\\frac{1}"),
    ],
)
def test_looking_for_corrections_takes_linear_time(piece):
    begun = time.process_time()
    correction("wait " + 20_000 * piece)
    assert time.process_time() - begun < 5  # it takes up to 1 s; quadratic, it would take minutes


# -- what is missing, hostile or broken ------------------------------------------------------------


@pytest.mark.parametrize("stages", range(len(STAGES)))
def test_a_pipeline_that_got_so_far_has_a_report(tmp_path, stages):
    folder = write_pipeline(tmp_path / "run", stages=stages)
    html = write_pipeline_report(folder).read_text("utf-8")
    Page(html)
    there = headings(html)
    assert there == [title for title in HEADINGS if title in there]
    names = list(STAGES)
    assert f"Not begun: {', '.join(names[stages:])}." in html
    assert ("Sampled data" in there) == (stages > names.index("cold-start-data"))
    assert ("What cold start changes" in there) == (stages > names.index("reasoning-rl"))
    assert ("The models, stage by stage" in there) == (stages > names.index("eval-base"))
    if stages < 3:
        assert f"{stages} of {len(STAGES)} stages are finished" in html


def test_a_failed_stage_is_named_with_its_error(tmp_path):
    folder = write_pipeline(tmp_path / "run", stages=2)
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    values["stages"]["r1-zero"] |= {"status": "failed", "error": "loss <b>is</b> NaN"}
    path.write_text(json.dumps(values))
    html = write_pipeline_report(folder).read_text("utf-8")
    assert "r1-zero: failed: loss &lt;b&gt;is&lt;/b&gt; NaN." in html
    assert "failed: pass@1" in html or "failed: held-out accuracy" in html  # in the diagram


def test_a_running_stage_without_a_step_and_a_lost_folder(tmp_path):
    folder = write_pipeline(tmp_path / "run", stages=6)
    for name in ("metrics.jsonl", "config.yaml", "manifest.json"):
        (folder / "r1-zero" / name).unlink()
    (folder / "cold-start-sft").rename(tmp_path / "elsewhere")
    html = write_pipeline_report(folder).read_text("utf-8")
    assert "Accuracy and response length" not in html
    assert "The folder of the stage cold-start-sft is gone" in html


EVIL = (
    "</style></script><script>alert(1)</script><img src=x onerror=alert(2)>"
    "\"'><svg onload=alert(3)></pre></table> & \x1b[31m \ud800 https//x"
)


def test_what_models_and_data_say_stays_text(tmp_path):
    folder = write_pipeline(tmp_path / "run", answer=EVIL.replace("\ud800", ""))
    manifest = folder / "manifest.json"
    values = json.loads(manifest.read_text())
    values |= {"recipe": EVIL.replace("\ud800", ""), "code_version": EVIL.replace("\ud800", "")}
    values["stages"]["eval-base"]["settings"]["model"] = "<script>alert(4)</script>"
    values["stages"]["r1-zero"]["settings"]["dataset"] = "<img src=x onerror=alert(5)>"
    manifest.write_text(json.dumps(values))
    metrics = folder / "r1-zero" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows[-1]["warnings"] = [f"evil: {EVIL}".replace("\ud800", "")]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = folder / "eval-base" / "samples.jsonl"
    lines = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
    for line in lines:
        line["completion"] = EVIL
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = write_pipeline_report(folder).read_text("utf-8")
    parsed = assert_needs_nothing(html)
    assert headings(html) == HEADINGS
    assert parsed.text.count("<script>alert(1)</script>") > 10
    assert "\x1b" not in html and html.count("</style>") == html.count("<style>") == 1


def test_the_page_needs_nothing_but_itself(html):
    assert_needs_nothing(html)


def test_the_same_folder_gives_the_same_page(whole, html):
    assert write_pipeline_report(whole).read_text("utf-8") == html


def test_the_verb_tells_a_pipeline_from_a_stage(whole, capsys):
    assert cli.main(["report", str(whole)]) == 0
    assert "Time and tokens" in (whole / "report.html").read_text("utf-8")
    assert cli.main(["report", str(whole / "r1-zero")]) == 0
    assert "The evaluation in numbers" in (whole / "r1-zero" / "report.html").read_text("utf-8")
    assert capsys.readouterr().out.split() == [
        str(whole / "report.html"),
        str(whole / "r1-zero" / "report.html"),
    ]


@pytest.mark.parametrize("name", ["eval-base/results.json", "cold-start-data/statistics.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    folder = write_pipeline(tmp_path / "run", stages=4)
    (folder / name).write_text("{")
    with pytest.raises(UserError, match=name):
        write_pipeline_report(folder)
    (folder / name).write_text("[]")
    with pytest.raises(UserError, match="must hold a mapping, found list"):
        write_pipeline_report(folder)


def test_a_folder_of_something_else_is_refused(tmp_path, whole):
    with pytest.raises(UserError, match="there is no manifest.json"):
        write_pipeline_report(tmp_path)
    with pytest.raises(UserError, match="holds another run"):
        write_pipeline_report(whole / "r1-zero")


def test_problem_sets_are_not_compared_with_each_other(tmp_path):
    folder = write_pipeline(tmp_path / "run", stages=6)
    path = folder / "eval-dev1" / "results.json"
    results = json.loads(path.read_text())
    results["data"] = results["config"]["data"] = "other.jsonl"
    path.write_text(json.dumps(results))
    pipeline = load_pipeline(folder)
    assert [[one.name for one in some] for some in pipeline.problem_sets()] == [
        ["eval-base", "eval-r1-zero"],
        ["eval-dev1"],
    ]
    assert headline(pipeline).startswith("R1-Zero solves")
    html = write_pipeline_report(folder).read_text("utf-8")
    assert len(re.findall(r"<tr><td>pass@1", html)) == 2
    assert f"{PROBLEMS} problems" in html
