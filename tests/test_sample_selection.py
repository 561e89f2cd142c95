"""grpo-engine sample with scripted answers: every reason to reject one, and the judge."""

import shutil

import pytest
import scripted_samples
from fake_endpoint import endpoint
from sample_cases import (
    lines_of,
    manifest_of,
    rows_of,
    statistics_of,
    write,
)
from sample_chat import LEAK
from scripted_samples import (
    BAD,
    CHAT,
    EDITED_BADLY,
    LIMITS,
    PROSE,
    QUESTION,
    REWRITTEN_BADLY,
    ROW,
    chain,
    reasons_of,
)

from grpo_engine.rejection import SampleConfig
from grpo_engine.rejection.select import REASONS
from grpo_engine.rejection.verify import Findings
from grpo_engine.settings import build_config
from grpo_engine.types import UserError

tiny, scripted = scripted_samples.tiny, scripted_samples.scripted


def test_every_reason_of_the_selection(scripted, tmp_path):
    good = chain("First of all I add two and three.")
    answers = {(1, number): text for number, text in enumerate([good, *BAD.values()])}
    tests = write(tmp_path / "tests.jsonl", {"problem": LEAK, "answer": "1"})
    folder = scripted([ROW], answers, decontaminate=str(tests), **LIMITS)
    assert reasons_of(folder) == dict(enumerate(BAD, start=1))
    [kept] = rows_of(folder)
    assert kept["completion"] == good and kept["sample"] == 0
    found = statistics_of(folder)
    assert found["acceptance"]["rejected"] == dict.fromkeys(BAD, 1)
    assert list(found["acceptance"]["rejected"]) == [name for name in REASONS if name in BAD]
    notes = {one["reason"]: one.get("note") for one in rows_of(folder, "rejected.jsonl")}
    assert "no verdict" in notes["unverified"] and notes["wrong"] is None
    # right: the good one and all that are right but not kept for another reason
    assert found["solve_rate"]["mean"] == pytest.approx(9 / 13)


def test_a_leak_of_a_few_characters_is_rejected_where_it_is_asked(scripted, tmp_path):
    good = chain("First of all I add two and three.")
    leaked = chain("First of all I add two and three 因此.")
    answers = {(1, 0): good, (1, 1): leaked}
    limits = {**LIMITS, "min_language_share": None, "max_off_script_characters": 0}
    folder = scripted([ROW], answers, **limits)
    assert reasons_of(folder) == {1: "mixed_language"}


def test_all_reasons_have_a_test():
    rewriting, editing = set(REWRITTEN_BADLY.values()), set(EDITED_BADLY)
    assert set(BAD) | rewriting | {"rewrite_bad_format"} | editing == set(REASONS)


def test_rows_of_the_evaluation_are_not_sampled(scripted, tmp_path):
    tests = write(tmp_path / "tests.jsonl", {"question": QUESTION.upper()})
    rows = [ROW, {"prompt": "How many are two and two, please tell me?", "solution": "4"}]
    answers = {(2, 0): chain("I add two and two.", "\\boxed{4}")}
    folder = scripted(rows, answers, decontaminate=str(tests))
    assert [row["row"] for row in rows_of(folder)] == [2] and len(lines_of(folder)) == 1
    assert statistics_of(folder)["prompts"] == {
        "rows": 2,
        "too_long": 0,
        "contaminated": 1,
        "sampled": 1,
        "with_kept_answers": 1,
    }
    inputs = manifest_of(folder)["inputs"]
    assert inputs["decontamination"]["words"] == 10 and inputs["decontamination"]["sha256"]


def test_which_answers_are_kept(scripted, tmp_path):
    thoughts = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    answers = {
        (1, n): chain(f"I add two and three, says {word}.") for n, word in enumerate(thoughts)
    }
    picked = set()
    for seed in range(4):
        folder = scripted(
            [ROW],
            answers,
            keep="random",
            max_per_prompt=2,
            seed=seed,
            output_dir=str(tmp_path / f"run{seed}"),
        ).with_name(f"run{seed}")
        kept = [row["sample"] for row in rows_of(folder)]
        assert kept == sorted(kept) and len(kept) == 2
        picked.add(tuple(kept))
    assert len(picked) > 1, "the seed draws"
    folder = scripted([ROW], answers)
    assert len(rows_of(folder)) == 6


def test_the_reward_must_reach_its_minimum(scripted):
    rewards = ["accuracy", "format"]
    texts = {(1, 0): chain("I add."), (1, 1): "<think>I add.</think><answer>5</answer>"}
    folder = scripted([ROW], texts, reward_funcs=rewards)
    assert reasons_of(folder) == {0: "wrong"}
    folder = scripted([ROW], texts, reward_funcs=rewards, min_reward={"accuracy": 1, "format": 0})
    assert reasons_of(folder) == {}


@pytest.mark.parametrize(
    ("found", "least", "verdict"),
    [
        (Findings({"a": 1.0}, {"a": "ok"}), 1.0, "right"),
        (Findings({"a": 0.5}, {"a": "ok"}), 1.0, "wrong"),
        (Findings({"a": 0.5}, {"a": "ok"}), {"a": 0.5}, "right"),
        (Findings({"a": 0.0}, {"a": "no_answer"}), 1.0, "no_answer"),
        (Findings({"a": None}, {"a": "none"}), 1.0, "unverified"),
        (Findings({"a": 1.0, "b": None}, {"a": "ok", "b": "none"}), 1.0, "right"),
        (Findings({"a": 1.0, "b": None}, {"a": "ok", "b": "timeout"}), 1.0, "unverified"),
        (Findings(asked=True, judged=True), 1.0, "right"),
        (Findings(asked=True, judged=False), 1.0, "wrong"),
        (Findings(asked=True, judged=None), 1.0, "unverified"),
        (Findings({"a": 1.0}, {"a": "ok"}, True, False), 1.0, "wrong"),
        (Findings({"a": 0.0}, {"a": "ok"}, True, True), 1.0, "wrong"),
        (Findings(), 1.0, "unverified"),
    ],
)
def test_verdicts(found, least, verdict):
    assert found.verdict(least) == verdict


def test_too_many_failures_end_the_run(scripted, tmp_path, capsys):
    answers = {(1, n): chain("I add.", "crash") for n in range(2)}
    folder = scripted([ROW], answers, code=1, reward_funcs=[f"{CHAT}:crashing_accuracy"])
    err = capsys.readouterr().err
    assert "could not be verified" in err and "no verdict" in err
    assert manifest_of(folder)["status"] == "failed" and not (folder / "data.jsonl").exists()


def test_another_reward_program_makes_other_findings(scripted, tmp_path):
    """What an edited program would say is not what the samples hold."""
    program = tmp_path / "mine.py"
    program.write_text("def right(completions, **_):\n    return [1.0] * len(completions)\n")
    rewards = {"reward_funcs": [f"{program}:right"]}
    assert len(rows_of(scripted([ROW], {(1, 0): chain("I add.")}, **rewards))) == 1
    program.write_text("def right(completions, **_):\n    return [0.0] * len(completions)\n")
    with pytest.raises(UserError, match="its samples have verifier reward_sources .*--overwrite"):
        scripted([ROW], {(1, 0): chain("I add.")}, **rewards)


def test_nothing_kept_is_a_failure_that_shows_why(scripted, capsys):
    folder = scripted([ROW], {(1, 0): chain("I add.", "\\boxed{6}")}, code=1)
    assert manifest_of(folder)["status"] == "failed" and rows_of(folder) == []
    assert statistics_of(folder)["acceptance"]["rejected"] == {"wrong": 1}
    assert "no answer was kept" in capsys.readouterr().err


def test_rows_that_nothing_can_verify_are_named_before_answers_are_drawn(
    scripted, tmp_path, capsys
):
    answers = {(1, 0): chain("I add."), (2, 0): chain("Light is scattered.", "It is scattering.")}
    only_math = {"reward_domains": {"accuracy": ["math"]}}
    folder = scripted([ROW, PROSE], answers, **only_math)
    assert "to 1 rows (2) no reward applies: their answers will be" in capsys.readouterr().err
    assert reasons_of(folder) == {0: "unverified"} and [r["row"] for r in rows_of(folder)] == [1]
    other = {"output_dir": str(tmp_path / "other")}
    with pytest.raises(
        UserError, match=r"--reward_domains: to every row \(stem\) no reward applies"
    ):
        scripted([PROSE], answers, **only_math, **other)
    bare = [{**PROSE, "solution": None}, {**PROSE, "solution": None}]
    with pytest.raises(UserError, match=r"to every row \(stem\) no reward applies and there is no"):
        scripted(bare, answers, judge=f"{CHAT}:judge", **only_math, **other)
    assert not (tmp_path / "other").exists()
    assert "reward 'accuracy' applies to no row: it is for math" in capsys.readouterr().err


def test_code_problems_run_their_tests(scripted):
    cases = [{"input": "2\n", "output": "4\n"}]
    rows = [{"prompt": "double the number", "tests": {"type": "stdio", "cases": cases}}]
    answers = {
        (1, 0): chain("I read it.", "```python\nprint(2 * int(input()))\n```"),
        (1, 1): chain("I guess.", "```python\nprint(2)\n```"),
        (1, 2): chain("I give up.", "no program"),
    }
    folder = scripted(rows, answers, reward_funcs=["code"], rewrite="template")
    [kept] = rows_of(folder)
    assert kept["domain"] == "code" and kept["completion"].endswith("print(2 * int(input()))\n```")
    assert reasons_of(folder) == {1: "wrong", 2: "no_answer"}
    assert manifest_of(folder)["inputs"]["verifier"]["sandbox"]


# --- the judge ------------------------------------------------------------------------------------


def test_a_judge_where_no_rule_applies(scripted):
    answers = {
        (1, 0): chain("I add."),
        (2, 0): chain("Light is scattered.", "It is scattering."),
        (1, 1): chain("I add.", "\\boxed{6}"),
        (2, 1): chain("It is painted.", "It is paint."),
        (1, 2): chain("I add two and three."),
        (2, 2): chain("Hm.", "I am unsure about scattering."),
        (1, 3): chain("I really do add."),
        (2, 3): "<think>scattering it is, but I never",
    }
    folder = scripted(
        [ROW, PROSE],
        answers,
        judge=f"{CHAT}:judge",
        reward_domains={"accuracy": ["math"]},
        answer_format="none",
    )
    rejected = {(r["row"], r["sample"]): r["reason"] for r in rows_of(folder, "rejected.jsonl")}
    assert rejected == {(1, 1): "wrong", (2, 1): "wrong", (2, 2): "unverified", (2, 3): "no_answer"}
    asked = {
        (s["row"], s["sample"]) for s in rows_of(folder, "samples.jsonl") if s["findings"]["asked"]
    }
    assert asked == {(2, 0), (2, 1), (2, 2), (2, 3)}
    assert [row["domain"] for row in rows_of(folder)] == ["math", "math", "math", "stem"]
    verifier = manifest_of(folder)["inputs"]["verifier"]
    assert verifier["judge"]["kind"] == "function" and verifier["judge_prompt"]
    assert (folder / "replies.jsonl").is_file()


def test_a_judge_beside_the_rules(scripted):
    answers = {(1, 0): chain("I add."), (1, 1): chain("I add.", "five, so \\boxed{05}")}
    folder = scripted([ROW], answers, judge=f"{CHAT}:judge", judge_rows="all")
    assert len(rows_of(folder)) == 2
    answers = {(1, 0): chain("I add.", "unsure, \\boxed{5}")}
    assert reasons_of(
        scripted(
            [{**ROW, "prompt": "2+3?"}],
            answers,
            judge=f"{CHAT}:judge",
            judge_rows="all",
            max_reward_error_rate=1.0,
            code=1,
            output_dir=str(folder) + "2",
        ).with_name("run2")
    ) == {0: "unverified"}


def test_the_judge_is_asked_as_the_fields_say(scripted, monkeypatch):
    """And what it was asked with is part of what the findings come from, where it is not what it
    always was."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    answers = {(2, 0): chain("Light.", "scattering"), (1, 0): chain("I add.")}
    domains = {"reward_domains": {"accuracy": ["math"]}}
    others = {"judge_max_tokens": 99, "judge_temperature": 0.25, "judge_attempts": 2}
    for changes, number, asked in (({}, 3, (0.0, 2048)), (others, 2, (0.25, 99))):
        with endpoint(lambda body: "no idea") as fake:
            options = {"model": "judge-1", "max_concurrency": 1}
            values = {"judge": fake.url, "judge_options": options, **domains, **changes}
            folder = scripted([ROW, PROSE], answers, max_reward_error_rate=1.0, **values)
            if not changes:
                with pytest.raises(UserError, match="verifier judge_max_tokens None, now it is 99"):
                    scripted([ROW, PROSE], answers, **values, judge_max_tokens=99)
        assert len(fake.bodies) == number, "attempts to get a readable reply"
        assert (fake.bodies[0]["temperature"], fake.bodies[0]["max_tokens"]) == asked
        assert all(body["max_tokens"] == asked[1] for body in fake.bodies)
        verifier = manifest_of(folder)["inputs"]["verifier"]
        assert {name: verifier[name] for name in verifier if name in others} == changes
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["judge_max_tokens", "judge_temperature", "judge_attempts"])
def test_the_fields_of_the_judge_need_one(name):
    with pytest.raises(UserError, match=f"{name}=7.*: has no meaning without a judge"):
        build_config({"dataset": "x.jsonl", name: 7}, SampleConfig)


def test_a_judge_needs_references(scripted):
    with pytest.raises(UserError, match="no row has a solution"):
        scripted([{"prompt": "why?"}], {(1, 0): "so"}, judge=f"{CHAT}:judge", reward_funcs=[])
