"""The parts of grpo-engine eval: problems, votes, figures, the samples file, the choice reward."""

import json
from dataclasses import replace

import numpy as np
import pytest

from grpo_engine.evaluate import bootstrap_ci95, cons_at_k, pass_at_k
from grpo_engine.evaluation.config import build_eval_config
from grpo_engine.evaluation.problems import count_overlap, load_problems
from grpo_engine.evaluation.results import figures, warnings
from grpo_engine.evaluation.samples import Sample
from grpo_engine.evaluation.votes import Votes
from grpo_engine.rewards.choice import choice_reward, chosen_letters
from grpo_engine.sampling import samples as samples_module
from grpo_engine.sampling.samples import fingerprint, plan_batches
from grpo_engine.types import UserError


def sample(row, number, answer, score, *, outcome="ok", reason="stop", length=10):
    answers = None if answer is None else [answer] if isinstance(answer, str) else answer
    outcome = "no_answer" if answer is None else outcome
    return Sample(row, number, 7, f"text of {answer}", length, reason, answers, score, outcome)


def samples(row, *pairs):
    return [sample(row, number, *pair) for number, pair in enumerate(pairs)]


def SampleFile(folder, key_of):
    return samples_module.SampleFile(folder, key_of, kind=Sample, work="evaluation")


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(data, **values):
    return build_eval_config({"data": str(data), **values})


# --- figures ------------------------------------------------------------------------------------


def test_figures_are_the_estimators_on_the_samples():
    problems = [
        samples(1, ("2", 1.0), ("3", 0.0), ("2", 1.0), ("4", 0.0)),
        samples(2, ("5", 0.0), ("5", 0.0), ("6", 1.0), (None, 0.0)),
        samples(3, (None, 0.0), (None, 0.0), (None, 0.0), (None, 0.0)),
    ]
    found = figures("math", problems, [1, 2, 4])
    for k in (1, 2, 4):
        value, low, high = bootstrap_ci95(pass_at_k([4, 4, 4], [2, 1, 0], k))
        assert found["pass@k"][str(k)] == {"value": value, "ci95": [low, high]}
        answers = [["2", "3", "2", "4"], ["5", "5", "6", None], [None] * 4]
        votes = [cons_at_k(*pair, k) for pair in zip(answers, ["2", "6", "0"], strict=True)]
        assert found["cons@k"][str(k)]["value"] == pytest.approx(np.mean(votes))
    assert found["pass@1"] == found["pass@k"]["1"]
    assert found["pass@1"]["value"] == pytest.approx(3 / 12)
    assert found["correct"] == [2, 1, 0]
    assert found["rates"]["no_answer"] == {"count": 5, "share": 5 / 12}
    assert found["rates"]["unjudged"]["count"] == 0 and "bounds" not in found["pass@1"]


def test_unjudged_and_truncated_samples_are_counted_and_bounded():
    problems = [
        [
            sample(1, 0, "1", 1.0, length=4),
            sample(1, 1, "2", None, outcome="timeout", length=6),
            sample(1, 2, None, 0.0, reason="length", length=32),
            sample(1, 3, "2", None, outcome="error", reason="length", length=32),
        ],
        samples(2, ("1", 0.0), ("1", 0.0), ("1", 0.0), ("1", 0.0)),
    ]
    found = figures("math", problems, [1, 4])
    assert found["pass@1"]["value"] == 1 / 8 and found["pass@1"]["bounds"] == [1 / 8, 3 / 8]
    # A tie between the answer 1 and the two unjudged 2 is none: they are two votes against one.
    assert found["cons@k"]["4"]["value"] == 0.0 and found["cons@k"]["4"]["bounds"] == [0.0, 0.5]
    counts = {name: rate["count"] for name, rate in found["rates"].items() if name != "outcomes"}
    assert counts == {
        "no_answer": 1,
        "truncated": 2,
        "truncated_without_answer": 1,
        "unjudged": 2,
        "timeout": 1,
        "verifier_error": 1,
        "time_limit": 0,
    }
    length = found["length"]
    assert length["max"] == 32 and length["mean"] == 14.25 and length["median"] == 10
    assert length["mean_right"] == 4
    result = {**found, "num_problems": 2, "num_samples": 4}
    result["left_out"] = {"unusable_rows": [3], "long_prompts": []}
    first, second = warnings(result)
    assert first.startswith("2 of 8 samples") and "0.1250 and 0.3750" in first
    assert second.startswith("1 rows")


def test_one_problem_has_no_interval_and_programs_do_not_vote():
    found = figures("code", [samples(1, (None, 1.0), (None, 0.0))], [1, 2])
    assert found["pass@1"] == {"value": 0.5, "ci95": None}
    assert found["cons@k"] is None and found["votes"]["same_answer"].startswith("none")


# --- votes --------------------------------------------------------------------------------------


def test_mathematics_votes_by_value_and_by_the_verifier():
    pytest.importorskip("math_verify")
    problem = samples(
        1,
        ("0.5", 1.0),
        (r"\frac12", 1.0),
        ("0.25", 0.0),
        (r"\frac{1}{4}", 0.0),
        (r"2\sqrt{2}", 0.0),
        (r"\sqrt{8}", 0.0),
        ("7", 0.0),
        (None, 0.0),
    )
    [ballot] = Votes("math", [problem]).ballots
    assert ballot[0] == ballot[1] and ballot[2] == ballot[3] and ballot[4] == ballot[5]
    assert len({vote for vote in ballot if vote}) == 4 and ballot[7] is None
    right = [one.right for one in problem]
    assert cons_at_k(ballot, right) == pytest.approx(1 / 3)  # three classes of two


def test_several_answers_and_unjudged_ones_vote_by_their_text():
    problem = [
        sample(1, 0, ["1", "2"], 0.0),
        sample(1, 1, ["2", "1"], 0.0),
        sample(1, 2, "1", 0.0),
        sample(1, 3, "1", None, outcome="timeout"),
    ]
    votes = Votes("math", [problem])
    [ballot] = votes.ballots
    assert ballot[0] == ballot[1] and len(set(ballot)) == 3 and votes.comparisons == 0


@pytest.mark.parametrize("outcome", ["time_limit", "resource_limit", "too_long"])
def test_what_the_verifier_could_not_read_is_not_compared_again(outcome):
    bomb = r"\binom{10^9}{5\cdot10^8}"
    problem = [sample(1, number, bomb, 0.0, outcome=outcome) for number in range(2)]
    votes = Votes("math", [[*problem, sample(1, 2, r"\sqrt2", 0.0)]])
    [ballot] = votes.ballots
    assert ballot[0] == ballot[1] != ballot[2] and votes.comparisons == 0


def test_reasoning_gym_votes_keep_different_right_answers_apart():
    problem = samples(1, ("4 + 2", 1.0), ("2 + 4", 1.0), ("Six ", 0.0), ("six", 0.0), ("6", 0.0))
    [ballot] = Votes("reasoning_gym", [problem]).ballots
    assert ballot[2] == ballot[3] and len(set(ballot)) == 3  # 4 + 2 and 2 + 4 have the same value
    assert ballot[0] == ballot[1] and ballot[0] != ballot[4]  # but 6 was judged wrong


# --- the samples file ---------------------------------------------------------------------------


def key_of(cell):
    return fingerprint(cell) if cell[0] < 9 else None


def test_samples_file_reads_back_what_was_written(tmp_path):
    batch = samples(1, ("2", 1.0), (None, 0.0)) + samples(2, ("\u4f60\n", None))
    with SampleFile(tmp_path, key_of) as file:
        file.append(batch, [{"solution": "2"}] * 3)
        assert list(file.samples.values()) == batch, "from the disk, as it is written"
    with SampleFile(tmp_path, key_of) as file:
        assert list(file.samples.values()) == batch
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0])["solution"] == "2"


def test_samples_file_drops_a_batch_that_was_cut_anywhere(tmp_path):
    first, second = samples(1, ("2", 1.0), ("3", 0.0)), samples(2, ("4", 0.0), ("5", 1.0))
    path = tmp_path / "samples.jsonl"
    with SampleFile(tmp_path, key_of) as file:
        file.append(first)
        size = path.stat().st_size
        file.append(second)
    whole = path.read_bytes()
    for cut in range(size, len(whole), 37):
        path.write_bytes(whole[:cut])
        with SampleFile(tmp_path, key_of) as file:
            assert list(file.samples.values()) == first
            file.append(second)
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: [lines[0].replace('"row": 1', '"row": 3'), *lines[1:]], ":1: drawn from"),
        (lambda lines: [*lines, "{}\n"], ":4: not a sample"),
        (lambda lines: [*lines, "nonsense\n"], ":4: not valid JSON"),
        (lambda lines: [lines[1], lines[0], lines[2]], None),
        (lambda lines: [lines[0], lines[2], lines[1]], ":2: the batch before it is incomplete"),
        (lambda lines: [*lines, lines[2]], ":4: row 2 sample 0 is there twice"),
    ],
)
def test_samples_file_refuses_what_is_not_its_own(tmp_path, change, words):
    with SampleFile(tmp_path, key_of) as file:
        file.append(samples(1, ("2", 1.0), ("3", 0.0)))
        file.append(samples(2, ("4", 0.0)))
    path = tmp_path / "samples.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(change(lines)), encoding="utf-8")
    if words is None:  # the order within a batch does not matter
        with SampleFile(tmp_path, key_of) as file:
            assert len(file.samples) == 3
        return
    with pytest.raises(UserError, match=words), SampleFile(tmp_path, key_of):
        pass
    assert path.read_text(encoding="utf-8") == "".join(change(lines))


def test_samples_file_has_one_writer(tmp_path):
    second = SampleFile(tmp_path, key_of)
    with SampleFile(tmp_path, key_of), pytest.raises(UserError, match="another evaluation"):
        second.__enter__()


def test_samples_are_rewritten_as_a_whole_or_not_at_all(tmp_path):
    path, sizes = tmp_path / "samples.jsonl", []

    def right(batch):
        sizes.append(len(batch))
        return [replace(one, score=1.0) for one in batch]

    def broken(batch):
        if batch[0].row == 2:
            raise KeyboardInterrupt
        return right(batch)

    with SampleFile(tmp_path, key_of) as file:
        file.append(samples(1, ("2", 0.0), ("3", 0.0)), [{"solution": "2"}] * 2)
        file.append(samples(2, ("4", None)))
        before = path.read_bytes()
        with pytest.raises(KeyboardInterrupt):
            file.rewrite(2, broken)
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
        file.rewrite(2, right)
        assert sizes == [2, 2, 1] and [one.score for one in file.samples.values()] == [1.0] * 3
        with pytest.raises(UserError, match="another evaluation"), SampleFile(tmp_path, key_of):
            pass
        file.append(samples(3, ("5", 0.0)))
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["score"] for line in lines] == [1.0, 1.0, 1.0, 0.0]
    assert lines[0]["solution"] == "2" and lines[0]["key"] == key_of((1, 0))
    with SampleFile(tmp_path, key_of) as file:
        assert len(file.samples) == 4


def test_more_samples_begin_with_the_same_batches():
    lengths = [5, 9, 5, 7, 30]
    plans = {
        count: list(plan_batches(lengths, count, 20, max_rows=4, max_tokens=120))
        for count in (1, 4, 8, 16)
    }
    for few, many in ((1, 4), (4, 8), (8, 16)):
        assert plans[many][: len(plans[few])] == plans[few]
    for count, batches in plans.items():
        cells = [cell for batch in batches for cell in batch]
        wanted = {(problem, number) for problem in range(5) for number in range(count)}
        assert len(cells) == len(wanted) and set(cells) == wanted
        for batch in batches:
            widest = max(lengths[problem] for problem, _ in batch) + 20
            assert len(batch) <= 4 and (len(batch) == 1 or len(batch) * widest <= 120)


# --- multiple choice ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "letters"),
    [
        ("I think A.\nANSWER: C", ["C"]),
        ("**Answer: (B)**", ["B"]),
        (r"so \boxed{\text{D}}", ["D"]),
        ("<answer> b) Paris </answer>", ["B"]),
        ("<answer>ANSWER: C</answer>", ["C"]),
        ("<answer>C. It is C.</answer>", ["C"]),
        (r"\boxed{A} or \boxed{B}", ["A", "B"]),
        ("<think>ANSWER: A</think> ANSWER: B", ["B"]),
        ("<think>ANSWER: A", []),
        ("ANSWER: E", []),
        ("ANSWER: Paris", []),
        ("ANSWER: A good question", []),
        ("ANSWER: (A) or (B)", []),
        ("the answer is C", []),
        ("", []),
    ],
)
def test_chosen_letters(completion, letters):
    assert chosen_letters(completion, 4) == letters


def test_choice_reward_scores_and_refuses():
    texts = ["ANSWER: A", "ANSWER: B", r"\boxed{A} \boxed{B}", "no idea", "ANSWER: A"]
    assert choice_reward(texts, ["A"] * 4 + ["Z"], [2] * 5) == [1.0, 0.0, 0.0, 0.0, None]
    assert choice_reward(["ANSWER: A"], ["A"], [2], thinking_prefilled=True) == [0.0]
    with pytest.raises(UserError, match="2 completions, 1 solutions"):
        choice_reward(["", ""], ["A"], [2, 2])


def test_choices_are_shuffled_by_the_seed_and_the_order_is_kept(tmp_path):
    rows = [
        {"question": f"Which {number}? {{x}}", "choices": list("wxyz"), "answer": number % 4}
        for number in range(12)
    ]
    data = write(tmp_path / "q.jsonl", *rows)
    found = load_problems(config(data))
    assert found.task == "choice" and found.columns["solution"] == "answer"
    for problem, row in zip(found.rows, rows, strict=True):
        place = "ABCD".index(problem["solution"])
        assert problem["choice_order"][place] == row["answer"]
        assert f"\n{problem['solution']}) {row['choices'][row['answer']]}" in problem["prompt"]
        assert row["question"] in problem["prompt"] and "one of ABCD" in problem["prompt"]
    assert len({tuple(row["choice_order"]) for row in found.rows}) > 3
    assert load_problems(config(data)).rows == found.rows
    assert load_problems(config(data, seed=1)).rows != found.rows
    plain = load_problems(config(data, shuffle_choices=False)).rows
    assert [row["solution"] for row in plain] == list("ABCD") * 3


@pytest.mark.parametrize(("answer", "place"), [("C", 2), ("c", 2), (2, 2), ("red", 0), ("blue", 2)])
def test_the_right_choice_is_an_index_a_letter_or_a_text(tmp_path, answer, place):
    row = {"question": "?", "choices": ["red", "green", "blue"], "answer": answer}
    [problem] = load_problems(config(write(tmp_path / "q.jsonl", row))).rows
    assert problem["choice_order"]["ABC".index(problem["solution"])] == place


# --- problems -----------------------------------------------------------------------------------

MATHS = {"problem": "1+1?", "answer": "2"}
CHOICE = {"question": "Which?", "choices": ["a", "b"], "answer": 0}
CODE = {"prompt": "Add.", "tests": {"type": "stdio", "cases": [{"input": "1", "output": "1"}]}}


@pytest.mark.parametrize(
    ("row", "task"),
    [
        (MATHS, "math"),
        ({"question": "1+1?", "answer": "so #### 2"}, "math"),
        ({"problem": "1+1?", "solution": r"\boxed{2}", "answer": "2"}, "math"),
        (CHOICE, "choice"),
        (CODE, "code"),
        ({**CODE, "solution": "print(1)"}, "code"),
    ],
)
def test_the_task_follows_from_the_columns(tmp_path, row, task):
    assert load_problems(config(write(tmp_path / "d.jsonl", row))).task == task


@pytest.mark.parametrize(
    ("rows", "flags", "words"),
    [
        ([{**CHOICE, **CODE}], {}, ["--task auto", "choice and code"]),
        ([{"problem": "1?"}], {}, ["--task auto", "problem"]),
        ([{"problem": "a", "prompt": "b", "answer": "2"}], {}, ["--prompt_column", "problem"]),
        ([MATHS], {"task": "code"}, ["row 1", "'tests'", "answer, problem"]),
        ([MATHS], {"task": "choice"}, ["--choices_column", "choices, options"]),
        ([MATHS], {"solution_column": "gold"}, ["row 1", "'gold'"]),
        ([MATHS, {"problem": "2?"}], {}, ["row 2", "'answer'"]),
        ([MATHS, {"problem": " ", "answer": "2"}], {}, ["row 2", "problem"]),
        ([MATHS, {"problem": "?", "answer": "((("}], {}, ["row 2", "cannot be judged", "1 such"]),
        ([CHOICE, {**CHOICE, "answer": 2}], {}, ["row 2", "2", "none of the choices"]),
        ([CHOICE, {**CHOICE, "choices": ["a"]}], {}, ["row 2", "2 to 26 choices"]),
        ([{**CHOICE, "choices": ["B", "A"], "answer": "A"}], {}, ["row 1", "could be two"]),
        ([{**CHOICE, "choices": ["a", "a"]}], {}, ["row 1", "there twice"]),
        ([CODE, {**CODE, "tests": {"type": "stdio"}}], {}, ["row 2", "no cases"]),
    ],
)
def test_bad_rows_are_refused_by_number(tmp_path, rows, flags, words):
    data = write(tmp_path / "d.jsonl", *rows)
    with pytest.raises(UserError) as error:
        load_problems(config(data, **flags))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_unusable_rows_can_be_left_out_and_are_named(tmp_path):
    rows = [MATHS, {"problem": "?", "answer": "((("}, {"problem": "3?", "answer": "3"}]
    found = load_problems(config(write(tmp_path / "d.jsonl", *rows), unusable_rows="skip"))
    assert [row["row"] for row in found.rows] == [1, 3] and found.unusable == [2]


def test_overlap_with_training_data_is_counted(tmp_path):
    shared = "a train leaves the station at nine and a second one at ten sharp"
    rows = [
        {"problem": f"Listen: {shared}. When do they meet?", "answer": "1"},
        {"problem": "How many of the twelve apples in this basket are neither red nor green?"},
        {"problem": "What is it?"},
    ]
    data = write(tmp_path / "d.jsonl", *({"answer": "1", **row} for row in rows))
    training = write(
        tmp_path / "t.jsonl",
        {"messages": [{"role": "user", "content": f"Once {shared.upper()}, they said."}]},
        {"prompt": "What is it? What is it? apples in this basket are neither red nor"},
    )
    settings = config(data, check_overlap=str(training))
    found = count_overlap(settings, load_problems(settings))
    assert (found["problems"], found["rows"], found["training_rows"]) == (1, [1], 2)
    assert found["too_short_to_compare"] == 1 and found["share"] == pytest.approx(1 / 3)
    assert count_overlap(config(data), load_problems(config(data))) is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--data"]),
        ([("data", "x"), ("num_sample", "3")], ["num_sample", "num_samples"]),
        ([("data", "x"), ("num_samples", "0")], ["--num_samples 0"]),
        ([("data", "x"), ("num_samples", "4"), ("ks", "[1, 8]")], ["ks=[1, 8]", "4"]),
        ([("data", "x"), ("ks", "[2, 1]")], ["ks=[2, 1]"]),
        ([("data", "x"), ("top_p", "1.5")], ["--top_p 1.5"]),
        ([("data", "x"), ("temperature", "0")], ["--temperature 0"]),
        ([("data", "x"), ("task", "maths")], ["--task 'maths'"]),
    ],
)
def test_bad_fields_are_refused(flags, words):
    with pytest.raises(UserError) as error:
        build_eval_config({}, flags)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_defaults_are_the_papers_protocol():
    found = build_eval_config({}, [("data", "2024"), ("num_samples", "12")])
    assert (found.temperature, found.top_p, found.max_completion_length) == (0.6, 0.95, 32_768)
    assert found.resolved_ks() == [1, 2, 4, 8, 12] and found.data == "2024"
