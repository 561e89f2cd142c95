"""The parts of grpo-engine sample with scripted answers: every reason to reject, the judge, the
rewriting, the editing hand, the mix, the generators."""

import json
from pathlib import Path

import pytest
import sample_chat
from fake_endpoint import endpoint
from sample_cases import (
    lines_of,
    manifest_of,
    rows_of,
    statistics_of,
    write,
)
from sample_chat import CHINESE, LEAK, LOOP, NOVEL
from tiny_model import make_tiny_model

from grpo_engine.rejection import SampleConfig, run_sample
from grpo_engine.rejection.config import GeneratorConfig
from grpo_engine.rejection.draw import Drawing
from grpo_engine.rejection.generators import few_shot_text
from grpo_engine.rejection.readable import conversation, fill, summary_task, tidied
from grpo_engine.rejection.select import EDIT, FAULTS, REASONS, REWRITE
from grpo_engine.rejection.statistics import domain_table, solve_rates
from grpo_engine.rejection.verify import Findings
from grpo_engine.settings import build_config
from grpo_engine.types import UserError

CHAT = Path(sample_chat.__file__)
QUESTION = "What is the sum of the numbers two and three?"
ROW = {"prompt": QUESTION, "solution": "5"}


def chain(thought, summary="The sum is \\boxed{5}."):
    return f"<think>{thought}</think>\n{summary}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def scripted(tiny, tmp_path, monkeypatch):
    """Make data of ``rows`` with these answers in place of the model's: {(row, sample): text or
    (text, finish reason)}, or by (generator, row, sample)."""

    def run(rows, answers, code=0, **values):
        def generate(self, generator, cells):
            found = [answers.get(cell, answers.get(cell[1:])) for cell in cells]
            return [
                (one, 7, "stop") if isinstance(one, str) else (one[0], 7, one[1]) for one in found
            ]

        monkeypatch.setattr(Drawing, "generate", generate)
        data = write(tmp_path / "rows.jsonl", *rows)
        settings = {
            "model": str(tiny),
            "dataset": str(data),
            "prompt_template": "none",
            "num_samples": 1 + max(key[-1] for key in answers),
            "max_completion_length": 8,
            "reward_workers": 1,
            "device": "cpu",
            "output_dir": str(tmp_path / "run"),
            **values,
        }
        assert run_sample(build_config(settings, SampleConfig)) == code
        return tmp_path / "run"

    return run


def reasons_of(folder):
    return {line["sample"]: line["reason"] for line in rows_of(folder, "rejected.jsonl")}


# --- selection ------------------------------------------------------------------------------------

BAD = {
    "truncated": (chain("I add two and three."), "length"),
    "unverified": chain("I add two and three.", "crash \\boxed{5}"),
    "no_answer": chain("I add two and three.", "The sum is five."),
    "wrong": chain("I add two and three.", "The sum is \\boxed{6}."),
    "bad_format": "I add two and three. \\boxed{5}",
    "repetition": chain("I add two and three.", f"{LOOP} \\boxed{{5}}"),
    "code_block": chain("I add two and three.\n```\n2 + 3\n```\n"),
    "long_paragraph": chain(NOVEL),
    "mixed_language": chain(f"I add two and three. {CHINESE}"),
    "contaminated": chain(f"I think of this: {LEAK}."),
    "duplicate": chain("first of all I ADD two, and three!"),
    "surplus": chain("One more way to see it: three fingers and two fingers."),
}
LIMITS = {
    "reward_funcs": [f"{CHAT}:crashing_accuracy"],
    "max_paragraph_words": 60,
    "keep": "shortest",
    "max_per_prompt": 1,
    "max_reward_error_rate": 1.0,
}


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

PROSE = {"prompt": "Why is the sky blue, in one word?", "solution": "scattering", "domain": "stem"}


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


def test_a_judge_needs_references(scripted):
    with pytest.raises(UserError, match="no row has a solution"):
        scripted([{"prompt": "why?"}], {(1, 0): "so"}, judge=f"{CHAT}:judge", reward_funcs=[])


# --- rewriting ------------------------------------------------------------------------------------


def test_rewriting_by_template(scripted):
    untidy = "<think>  First I add.  \n\n\n\nThen I <answer>stop.  </think> \\boxed{5} \\boxed{5.0}"
    folder = scripted([ROW], {(1, 0): untidy}, rewrite="template", answer_format="none")
    [kept] = rows_of(folder)
    assert kept["completion"] == (
        "<think>\nFirst I add.\n\nThen I stop.\n</think>\n\nThe final answer is \\boxed{5.0}."
    )


def test_the_template_is_that_of_the_questions_language(scripted):
    row = {"prompt": "二加三等于几？", "solution": "5"}
    folder = scripted(
        [row],
        {(1, 0): "<think>二加三得五。</think><answer>5</answer>"},
        rewrite="template",
        summary_template={"en": "It is {answer}", "zh": "{question}答案是 \\boxed{{answer}}"},
    )
    assert rows_of(folder)[0]["completion"].endswith("二加三等于几？答案是 \\boxed{5}")


# What the chat model of sample_chat does with a thought that begins with the word.
REWRITTEN_BADLY = {
    "Vanishes": "rewrite_failed",
    "Crashes": "rewrite_unverified",
    "Forgets": "rewrite_no_answer",
    "Alters": "rewrite_wrong",
    "Loops": "rewrite_repetition",
    "Fences": "rewrite_code_block",
    "Novels": "rewrite_long_paragraph",
    "Mixes": "rewrite_mixed_language",
    "Leaks": "rewrite_contaminated",
    "Twins": "rewrite_duplicate",
}
REWRITING = {
    **{
        name: LIMITS[name]
        for name in ("reward_funcs", "max_paragraph_words", "max_reward_error_rate")
    },
    "rewrite": f"{CHAT}:rewriter",
}


def test_a_rewritten_answer_is_verified_again(scripted, tmp_path):
    words = ["Keeps", "Thinks", "Empties", *REWRITTEN_BADLY]
    answers = {(1, n): chain(f"{word} I add two and three.") for n, word in enumerate(words)}
    answers[1, len(words)] = chain("Twins I add three and two.")
    tests = write(tmp_path / "tests.jsonl", {"problem": LEAK, "answer": "1"})
    folder = scripted([ROW], answers, decontaminate=str(tests), **REWRITING)
    expected = {words.index(word): reason for word, reason in REWRITTEN_BADLY.items()}
    expected |= {words.index("Empties"): "rewrite_failed", len(words): "rewrite_duplicate"}
    del expected[words.index("Twins")]  # the first of the twins stays
    assert reasons_of(folder) == expected
    kept = {row["sample"]: row["completion"] for row in rows_of(folder)}
    summary = "\n</think>\n\nTwo and three make \\boxed{5}."
    assert kept == {
        words.index("Keeps"): f"<think>\nKeeps I add two and three.{summary}",
        words.index("Thinks"): f"<think>\nThinks I add two and three.{summary}",
        words.index("Twins"): f"<think>\nTwins I add two and three, and both say five.{summary}",
    }
    found = statistics_of(folder)
    assert found["rewrite"] == {"candidates": len(answers), "kept": 3}
    assert found["acceptance"]["kept"] + sum(found["acceptance"]["rejected"].values()) == len(
        answers
    )
    assert manifest_of(folder)["inputs"]["rewriter"]["identity"]["kind"] == "function"


def test_a_chat_model_that_is_not_there_ends_the_run(scripted, capsys):
    answers = {(1, n): chain(f"Vanishes {word}.") for n, word in enumerate(["one", "two"])}
    folder = scripted([ROW], answers, code=1, rewrite=f"{CHAT}:rewriter")
    err = capsys.readouterr().err
    assert "2 of 2 answers could not be rewritten" in err and "no reply" in err
    assert manifest_of(folder)["status"] == "failed" and not (folder / "data.jsonl").exists()


def test_a_chain_that_was_cut_while_it_was_refined_is_not_kept(scripted, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    answers = {(1, n): chain(f"Keeps I add two and three, {word}.") for n, word in enumerate("ab")}
    with endpoint(lambda body: sample_chat.reply(body["messages"]), faults=["length"]) as fake:
        options = {"model": "judge-1", "max_concurrency": 1}
        folder = scripted([ROW], answers, rewrite=fake.url, rewrite_options=options)
    assert reasons_of(folder) == {0: "rewrite_failed"} and len(rows_of(folder)) == 1
    [line] = rows_of(folder, "rejected.jsonl")
    assert "cut: the reply does not end within max_tokens=8192" in line["note"]


def test_a_question_may_spoil_the_format(scripted):
    row = {"prompt": "What does the tag </think> mean, and what is two and three?", "solution": "5"}
    template = {"en": "{question} It is \\boxed{{answer}}."}
    folder = scripted(
        [row],
        {(1, 0): chain("I add.")},
        code=1,
        rewrite="template",
        summary_template=template,
        answer_format="none",  # of what is sampled; what is rewritten is readable
    )
    assert reasons_of(folder) == {0: "rewrite_bad_format"}


def test_stopped_while_rewriting_it_asks_only_for_what_is_missing(scripted, tmp_path, monkeypatch):
    import signal

    from grpo_engine.chat.function import FunctionModel

    asked, stop_at = [], [None]
    original = FunctionModel._replies

    def counted(self, batch, given):
        asked.append(len(batch))
        if len(asked) == stop_at[0]:
            signal.raise_signal(signal.SIGINT)
        return original(self, batch, given)

    monkeypatch.setattr(FunctionModel, "_replies", counted)
    answers = {
        (1, n): chain(f"Keeps I add two and three for the {word} time.")
        for n, word in enumerate(["first", "second", "third", "fourth"])
    }
    values = {**REWRITING, "rewrite_batch_size": 2}
    whole = scripted([ROW], answers, **values, output_dir=str(tmp_path / "whole")).with_name(
        "whole"
    )
    total = sum(asked)
    for calls in (1, 2, 3, 4):
        folder = tmp_path / f"stopped{calls}"
        asked.clear()
        stop_at[0] = calls
        scripted([ROW], answers, code=130, **values, output_dir=str(folder))
        done = sum(asked[:-1])
        asked.clear()
        stop_at[0] = None
        scripted([ROW], answers, **values, output_dir=str(folder))
        assert sum(asked) == total - done
        for name in ("samples.jsonl", "data.jsonl", "rejected.jsonl", "statistics.json"):
            assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_what_the_chat_model_is_asked():
    config = build_config(
        {
            "dataset": "x.jsonl",
            "rewrite_examples": [
                {"question": "q {answer}", "thought_process": "t", "summary": "s"},
                {"question": "q", "thought_process": "t", "reasoning": "r"},
            ],
        },
        SampleConfig,
    )
    asked = conversation("summary", summary_task(ROW), QUESTION, "I add {question}.", config)
    assert [turn["role"] for turn in asked] == ["user", "assistant", "user"]
    assert asked[0]["content"].endswith("## Question\nq {answer}\n\n## Thought process\nt")
    assert asked[1]["content"] == "s"
    assert asked[2]["content"].endswith(
        f"## Question\n{QUESTION}\n\n## Thought process\nI add {{question}}."
    )
    assert "\\boxed{}" in asked[2]["content"] and "faithful" in asked[2]["content"]
    assert "```python" in summary_task({**ROW, "tests": {}})


def test_filling_and_tidying():
    assert fill("{a} {b} {c}", {"a": "{b}", "b": "2"}) == "{b} 2 {c}"
    assert tidied("a  \r\n\n\n\nb <think> \n") == "a\n\nb"


# --- the editing hand -----------------------------------------------------------------------------

EDITED_BADLY = {
    "removed_by_editor": None,
    "edit_unverified": chain("I edit.", "crash \\boxed{5}"),
    "edit_no_answer": chain("I edit.", "five"),
    "edit_wrong": chain("I edit.", "\\boxed{6}"),
    "edit_bad_format": "I edit. \\boxed{5}",
    "edit_repetition": chain("I edit.", f"{LOOP} \\boxed{{5}}"),
    "edit_code_block": chain("I edit.\n```\n2 + 3\n```\n"),
    "edit_long_paragraph": chain(NOVEL),
    "edit_mixed_language": chain(f"I edit. {CHINESE}"),
    "edit_contaminated": chain(LEAK),
}


@pytest.fixture
def editing(scripted, tmp_path):
    """Run with the edit file; the answers are all good."""
    tests = write(tmp_path / "tests.jsonl", {"problem": LEAK, "answer": "1"})
    path = tmp_path / "edits.jsonl"
    words = ["quickly", "slowly", "calmly", "boldly", "oddly", "evenly", "bravely", "kindly"]
    words += ["warmly", "coolly", "newly", "shyly"]
    answers = {(1, n): chain(f"I {word} add two and three.") for n, word in enumerate(words)}

    def run(**values):
        settings = {**LIMITS, "keep": "all", "max_per_prompt": None, "decontaminate": str(tests)}
        return scripted([ROW], answers, **{**settings, "edit_file": str(path), **values})

    return run, path


def test_edits_are_taken_and_verified_again(editing, capsys):
    run, path = editing
    folder = run()
    assert manifest_of(folder)["status"] == "awaiting_edits"
    assert not (folder / "data.jsonl").exists()
    assert "12 candidates are in" in capsys.readouterr().err
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all({"id", "prompt", "solution", "completion", "row"} <= set(line) for line in lines)
    untouched, changed = lines[0]["completion"], chain("I add more carefully.")
    lines[1]["completion"] = changed
    for line, text in zip(lines[2:11], list(EDITED_BADLY.values())[1:], strict=True):
        line["completion"] = text
    lines[11]["drop"] = True
    write(path, *lines)
    run()
    assert [(row["completion"], row["edited"]) for row in rows_of(folder)] == [
        (untouched, False),
        (changed, True),
    ]
    expected = [*list(EDITED_BADLY)[1:], "removed_by_editor"]
    assert reasons_of(folder) == dict(enumerate(expected, start=2))
    assert statistics_of(folder)["edits"] == {
        "candidates": 12,
        "edited": 10,
        "dropped": 1,
        "edited_and_rejected": 9,
    }
    assert "12 candidates, 10 edited, 1 dropped, 9 edited and rejected" in capsys.readouterr().err
    assert manifest_of(folder)["inputs"]["edit_file"]["sha256"]


def test_deleted_lines_are_dropped(editing):
    run, path = editing
    folder = run()
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(reversed(lines[3:6])), encoding="utf-8")
    run()
    assert [row["sample"] for row in rows_of(folder)] == [3, 4, 5]
    path.write_text("")
    run(code=1)
    assert rows_of(folder) == [] and statistics_of(folder)["edits"]["dropped"] == 12


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda line: {**line, "id": "0" * 16}, ["line 2", "none of this run's candidates"]),
        (lambda line: {**line, "prompt": "another?"}, ["line 2", "'prompt' was changed"]),
        (lambda line: {**line, "solution": "6"}, ["line 2", "'solution' was changed"]),
        (lambda line: {**line, "completion": " "}, ["line 2", "completion must be a text"]),
        (lambda line: {**line, "drop": "yes"}, ["line 2", "drop must be true or false"]),
    ],
)
def test_other_changes_are_mistakes(editing, change, words):
    run, path = editing
    run()
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    write(path, lines[0], change(lines[1]), *lines[2:])
    with pytest.raises(UserError) as error:
        run()
    assert all(word in str(error.value) for word in ["--edit_file", *words])
    write(path, lines[0], lines[0])
    with pytest.raises(UserError, match="line 2.*twice"):
        run()


# --- the mix --------------------------------------------------------------------------------------

TALK = {
    "messages": [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "cheers"},
    ]
}


@pytest.mark.parametrize(("share", "taken"), [(None, 6), (0.25, 1), (0.5, 3), (0.9, 6)])
def test_other_rows_are_mixed_in(scripted, tmp_path, capsys, share, taken):
    rows = [{"prompt": f"say {n}", "completion": str(n), "kind": "echo"} for n in range(4)]
    leaked = {"prompt": "say this", "completion": LEAK, "domain": "writing"}
    rows[0]["messages"] = None  # as a Parquet file has it that holds both kinds
    general = write(tmp_path / "general.jsonl", *rows, leaked, {**TALK, "domain": "chat"}, TALK)
    tests = write(tmp_path / "tests.jsonl", {"problem": LEAK, "answer": "1"})
    answers = {
        (1, n): chain(f"I add, says {word}.") for n, word in enumerate(["one", "two", "six"])
    }
    folder = scripted(
        [ROW], answers, general_dataset=str(general), general_share=share, decontaminate=str(tests)
    )
    data = rows_of(folder)
    others = [row for row in data if row["source"] == "general_dataset"]
    assert [row["source"] for row in data[:3]] == ["sampled"] * 3 and len(others) == taken
    assert [row["row"] for row in others] == sorted(row["row"] for row in others)
    assert 5 not in [row["row"] for row in others], "it shares words with the evaluation"
    found = statistics_of(folder)
    assert found["general"]["taken"] == taken and found["general"]["contaminated"] == 1
    assert found["table"]["total"]["samples"] == 3 + taken
    if share is None:
        domains = {one["domain"]: one for one in found["table"]["domains"]}
        assert list(domains) == ["math", "general", "chat"] and others[0]["kind"] == "echo"
        assert domains["chat"]["average_rounds"] == 2.0
        assert domains["general"]["average_rounds"] == pytest.approx(6 / 5)
    assert ("would be 0.9 of the mix" in capsys.readouterr().err) == (share == 0.9)


def test_tables_of_nothing():
    assert domain_table([], None)["total"]["average_tokens"] is None
    assert solve_rates({})["mean"] is None


def test_solve_rates_fall_into_their_bins():
    right = {n: [True] * n + [False] * (8 - n) for n in range(9)}
    found = [one["prompts"] for one in solve_rates(right)["histogram"]]
    assert found == [1, 1, 2, 2, 2, 1]


def test_average_tokens_are_the_tokenizers(tiny):
    from transformers import AutoTokenizer

    rows = [
        {"domain": "math", "prompt": "a", "completion": "12345"},
        {"domain": "math", "prompt": "a", "completion": "123"},
        {"domain": "chat", **TALK},
    ]
    table = domain_table(rows, AutoTokenizer.from_pretrained(tiny))
    assert [(one["samples"], one["average_tokens"]) for one in table["domains"]] == [(2, 4), (1, 8)]
    assert table["total"]["average_tokens"] == pytest.approx(16 / 3)


# --- generators -----------------------------------------------------------------------------------


def test_answers_of_several_generators(scripted):
    answers = {
        ("r1-zero", 1, 0): "<think>I add.</think><answer>5</answer>",
        ("r1-zero", 1, 1): "<think>I add.</think><answer>6</answer>",
        ("few-shot", 1, 0): "I take two, then three. Answer: 5",
        ("asked", 1, 0): "I add two and three with great care. \\boxed{5}",
    }
    folder = scripted(
        [ROW],
        answers,
        generators=[
            {"method": "r1-zero", "num_samples": 2},
            {"method": "few-shot", "num_samples": 1},
            {"method": "direct", "name": "asked", "num_samples": 1},
        ],
        few_shot=[{"prompt": "1+1?", "completion": "One and one. Answer: 2"}],
        model="miniature",
        answer_format="none",
        max_prompt_length=2000,
        max_completion_length=4,
    )
    assert [row["generator"] for row in rows_of(folder)] == ["r1-zero", "few-shot", "asked"]
    accepted = statistics_of(folder)["acceptance"]
    assert accepted["by_generator"]["r1-zero"]["samples"] == 2
    assert accepted["by_generator"]["asked"]["kept"] == 1
    shown = manifest_of(folder)["inputs"]
    assert shown["generator r1-zero"]["temperature"] == 1.0
    assert shown["generator few-shot"]["stop"] == "### Question"
    names = ("r1-zero", "few-shot", "asked")
    assert len({shown[f"generator {name}"]["prompts_sha256"] for name in names}) == 3


def test_generators_with_models_of_their_own(tmp_path, tiny):
    other = make_tiny_model(tmp_path / "other", seed=1)
    generators = [{"name": "one", "model": str(tiny)}, {"name": "other", "model": str(other)}]
    settings = {
        "dataset": str(write(tmp_path / "rows.jsonl", ROW, PROSE)),
        "prompt_template": "none",
        "num_samples": 2,
        "max_completion_length": 8,
        "reward_workers": 1,
        "device": "cpu",
    }

    def samples(name, generators):
        folder = tmp_path / name
        values = {**settings, "generators": generators, "output_dir": str(folder)}
        assert run_sample(build_config(values, SampleConfig)) == 1  # random: no answer is right
        return {
            (one["generator"], one["row"], one["sample"]): (one["completion"], one["key"])
            for one in rows_of(folder, "samples.jsonl")
        }

    both = samples("both", generators)
    assert len(both) == 8
    assert samples("one", generators[:1]) | samples("other", generators[1:]) == both
    texts = [
        {text for (name, *_), (text, _) in both.items() if name == one} for one in ("one", "other")
    ]
    assert not texts[0] & texts[1]
    inputs = manifest_of(tmp_path / "both")["inputs"]
    hashes = {inputs[f"generator {one}"]["weights_sha256"] for one in ("one", "other")}
    assert len(hashes) == 2


def test_one_model_is_in_memory_at_a_time(tmp_path, tiny, monkeypatch):
    import gc
    import weakref

    from grpo_engine.policy import Policy

    loaded, load = [], Policy.load

    def watched(source, **options):
        gc.collect()
        assert [one for one in loaded if one() is not None] == []
        policy = load(source, **options)
        loaded.append(weakref.ref(policy))
        return policy

    monkeypatch.setattr(Policy, "load", watched)
    other = make_tiny_model(tmp_path / "other", seed=1)
    settings = {
        "dataset": str(write(tmp_path / "rows.jsonl", ROW)),
        "prompt_template": "none",
        "num_samples": 1,
        "max_completion_length": 4,
        "reward_workers": 1,
        "device": "cpu",
        "generators": [{"name": "one", "model": str(tiny)}, {"name": "two", "model": str(other)}],
        "output_dir": str(tmp_path / "run"),
    }
    assert run_sample(build_config(settings, SampleConfig)) == 1  # two random models: none is right
    assert len(loaded) == 4


def test_methods_set_what_they_stand_for():
    config = build_config(
        {
            "dataset": "x.jsonl",
            "temperature": 0.7,
            "prompt_template": "chat",
            "few_shot": [{"prompt": "p", "completion": "c"}],
            "generators": [
                {"method": "r1-zero"},
                {"method": "r1-zero", "name": "cold", "temperature": 0.5, "model": "other"},
                {"method": "direct", "num_samples": 3},
                {"method": "few-shot"},
            ],
        },
        SampleConfig,
    )
    zero, cold, direct, few = (settings for _, settings in config.resolved_generators())
    assert (zero.temperature, zero.prompt_template) == (1.0, "r1-zero")
    assert zero.few_shot == direct.few_shot == [], "they are for the few-shot generator"
    assert (cold.temperature, cold.model) == (0.5, "other")
    assert direct.num_samples == 3 and "verify" in direct.prompt_suffix
    assert few.temperature == 0.7 and few.prompt_suffix is None and few.few_shot
    [(one, alone)] = config.model_copy(update={"generators": []}).resolved_generators()
    assert one.label == "sample" and alone == config.model_copy(update={"generators": []})


def test_a_base_model_is_shown_examples_as_text(tmp_path, capsys):
    config = build_config({"dataset": "x.jsonl", "prompt_suffix": "Think."}, SampleConfig)
    text = few_shot_text([{"prompt": "1+1?", "completion": "2"}], "2+2?", config)
    assert text == (
        "### Question\n1+1?\nThink.\n### Answer\n2\n\n### Question\n2+2?\nThink.\n### Answer\n"
    )
    with pytest.raises(UserError, match="few_shot example 1"):
        few_shot_text([{"prompt": "1+1?"}], "2+2?", config)


def test_an_answer_ends_where_the_next_question_begins(tmp_path, monkeypatch):
    from grpo_engine.generation.hf import HFGenerator
    from grpo_engine.types import Generation

    texts = iter(["5\n\n### Question\nmore", "6 and on and on"])

    def generate(self, requests, sampling):
        tokenizer = self.policy.tokenizer
        made = []
        for _ in requests:
            ids = tokenizer(next(texts))["input_ids"]
            made.append(Generation(ids, [0.0] * len(ids), "length"))
        return made

    monkeypatch.setattr(HFGenerator, "generate", generate)
    settings = {
        "dataset": str(write(tmp_path / "rows.jsonl", ROW)),
        "prompt_template": "none",
        "generators": [{"method": "few-shot", "few_shot": [{"prompt": "1+1?", "completion": "2"}]}],
        "response_prefix": "<think>I see. </think>",
        "num_samples": 2,
        "generation_batch_size": 1,
        "max_completion_length": 50,
        "reward_workers": 1,
        "device": "cpu",
        "output_dir": str(tmp_path / "run"),
    }
    assert run_sample(build_config(settings, SampleConfig)) == 1  # no answer is marked
    one, other = rows_of(tmp_path / "run", "samples.jsonl")
    assert (one["completion"], one["finish_reason"]) == ("<think>I see. </think>5", "stop")
    assert other["completion"] == "<think>I see. </think>6 and on and on"
    assert other["finish_reason"] == "length"


def test_a_generator_field_that_does_not_exist():
    with pytest.raises(ValueError, match="temprature"):
        GeneratorConfig(temprature=1.0)
    assert {EDIT + fault for fault in FAULTS} < set(REASONS)
    assert {REWRITE + fault for fault in FAULTS} < set(REASONS)
