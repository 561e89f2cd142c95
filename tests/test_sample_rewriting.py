"""grpo-engine sample with scripted answers: the rewriting, and the editing hand."""

import json

import pytest
import sample_chat
import scripted_samples
from fake_endpoint import endpoint
from sample_cases import (
    manifest_of,
    rows_of,
    statistics_of,
    write,
)
from sample_chat import LEAK
from scripted_samples import (
    CHAT,
    EDITED_BADLY,
    LIMITS,
    QUESTION,
    REWRITTEN_BADLY,
    ROW,
    chain,
    reasons_of,
)

from grpo_engine.rejection import SampleConfig
from grpo_engine.rejection.readable import conversation, fill, summary_task, tidied
from grpo_engine.settings import build_config
from grpo_engine.types import UserError

tiny, scripted = scripted_samples.tiny, scripted_samples.scripted
REWRITING = {
    **{
        name: LIMITS[name]
        for name in ("reward_funcs", "max_paragraph_words", "max_reward_error_rate")
    },
    "rewrite": f"{CHAT}:rewriter",
}


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
