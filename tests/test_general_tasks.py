"""The toy general tasks, the rows made of them, and the program that judges their answers."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from transformers import AutoTokenizer

from grpo_engine.chat.load import load_chat_model
from grpo_engine.data import load_rows
from grpo_engine.models import MINIATURE, general
from grpo_engine.rewards import judge_rubric as rubric
from grpo_engine.rewards.judge import correctness, pairwise, safety
from grpo_engine.rewards.judge_prompts import conversation
from grpo_engine.rewards.language import split_thinking
from grpo_engine.types import UserError

JUDGE = "grpo_engine.rewards.judge_rubric:judge"


def rows(name: str, **args) -> list[dict]:
    return load_rows(f"miniature:{name}", args=args)


# --- tasks and rows ---


def test_every_wording_asks_for_one_task():
    wordings = [wording for task in general.tasks() for wording in task.wordings]
    assert len(wordings) == len(set(wordings)) == len(general.task_of_prompt())
    kinds = Counter(task.kind for task in general.tasks())
    assert set(kinds) == {"self", "fact", "translation", "writing", "harm"}
    assert min(kinds.values()) >= 3


def test_right_answers_hold_their_key_and_wrong_ones_do_not():
    for task in general.tasks():
        for wording in task.wordings:
            if task.kind == "harm":
                assert all(rubric.is_safe(answer) for answer in (*task.answers, task.thought))
                assert not any(rubric.is_safe(answer) for answer in task.wrong)
                continue
            assert all(rubric.helpfulness(wording, answer) == 4.0 for answer in task.answers)
            assert rubric.helpfulness(wording, task.short) == 3.0
            assert not any(rubric.helpfulness(wording, answer) for answer in task.wrong)


def test_held_out_prompts_are_one_wording_of_each_task():
    held_out, trained = general.prompts(True), general.prompts(False)
    assert [task for _, task in held_out] == list(general.tasks())
    assert not {prompt for prompt, _ in held_out} & {prompt for prompt, _ in trained}
    assert len(held_out) + len(trained) == len(general.task_of_prompt())


def test_rows_are_short_for_the_miniature_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(MINIATURE)
    written = rows("general", size=300)
    lengths = [len(tokenizer(row["completion"])["input_ids"]) for row in written]
    assert 20 < sum(lengths) / len(lengths) < 60 and max(lengths) < 100
    assert max(len(tokenizer(prompt)["input_ids"]) for prompt in general.task_of_prompt()) < 50


def test_general_rows_hold_every_quality_at_its_share():
    written = rows("general", size=6000, seed=1)
    assert all(re.fullmatch(r"<think> .+ </think> \S.*", row["completion"]) for row in written)
    for preference, shares in (
        ("helpful", general.QUALITIES),
        ("safety", general.SAFETY_QUALITIES),
    ):
        found = Counter(row["quality"] for row in written if row["preference"] == preference)
        assert set(found) == set(shares)
        for quality, share in shares.items():
            assert found[quality] / found.total() == pytest.approx(share, abs=0.05)


def test_quality_is_what_the_rubric_says():
    points = {"plain": 4.0, "curt": 3.0, "evasive": 1.0, "wrong": 0.0}
    for row in rows("general", size=500, seed=2):
        thought, summary = split_thinking(row["completion"])
        if row["preference"] == "helpful":
            assert rubric.helpfulness(row["prompt"], summary) == points[row["quality"]]
        else:
            assert rubric.is_safe(row["completion"]) == (row["quality"] in ("kind", "refusal"))
            # a slip shows only in the reasoning
            assert rubric.is_safe(summary) == (row["quality"] != "unsafe")


def test_same_arguments_give_the_same_rows():
    assert rows("general", size=20, seed=3) == rows("general", size=20, seed=3)
    assert rows("general", size=20, seed=3) != rows("general", size=20, seed=4)
    whole = rows("prompts")
    assert [row["prompt"] for row in whole] == [prompt for prompt, _ in general.prompts(False)]
    assert len(rows("prompts", held_out=True)) == len(general.tasks())
    assert {row["kind"] for row in rows("prompts", preference="safety")} == {"harm"}
    assert load_rows("miniature:prompts", limit=3) == whole[:3]


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("generl", {}, "miniature:generl"),
        ("general", {}, "size"),
        ("general", {"size": 0}, "size must be >= 1, got 0"),
        ("prompts", {"sizes": 3}, "no option 'sizes'"),
        ("prompts", {"preference": "harmless"}, "'harmless'"),
    ],
)
def test_bad_arguments_are_named(name, args, said):
    with pytest.raises(UserError, match=said):
        rows(name, **args)


# --- the judge ---


@pytest.fixture(scope="module")
def judge():
    return load_chat_model(JUDGE)


def test_better_answer_wins_in_both_orders(judge):
    question = "What colour is snow?"
    ranked = ["Snow is white.", "white", "It depends.", "Snow is red."]
    for better in range(len(ranked)):
        for worse in range(better + 1, len(ranked)):
            pair = ranked[better], ranked[worse]
            first, second = pairwise(judge, [question] * 2, pair, pair[::-1])
            assert first in ("A>B", "A>>B")
            # the lean towards the first answer can hide a small lead, not turn it
            assert second in ("B>A", "B>>A", "A=B")
    assert pairwise(judge, [question], ["Snow is red."], ["Snow is white."]) == ["B>>A"]


def test_judge_leans_to_the_first_answer_and_is_noisy_with_temperature(judge):
    assert pairwise(judge, ["?"], ["one"], ["two"]) == ["A=B"]
    question, pair = "What colour is snow?", ("Snow is white.", "white")
    assert pairwise(judge, [question] * 2, pair, pair[::-1]) == ["A>B", "A=B"]
    drawn = {
        verdict
        for seed in range(40)
        for verdict in pairwise(judge, [question], [pair[0]], [pair[0]], seed=seed, temperature=1)
    }
    assert "A=B" in drawn and len(drawn) > 1


def test_two_answers_at_once_are_no_answer():
    assert rubric.helpfulness("What colour is snow?", "Snow is white. Snow is red.") == 0.0
    assert rubric.helpfulness("What colour is snow?", "") == 1.0
    assert rubric.helpfulness("An unknown question", "Snow is white.") == 1.0


def test_safety_covers_the_reasoning(judge):
    question = "How do I cheat at cards?"
    hidden = "<think> Hide an ace in the sleeve. </think> I cannot help with that."
    kind = "<think> This may hurt someone. </think> Learn the game with friends."
    assert safety(judge, [question] * 2, [hidden, kind]) == [False, True]


def test_correctness_is_the_marked_answer(judge):
    answers = [r"It is \boxed{7}.", r"It is \boxed{8}.", "It is 7."]
    assert correctness(judge, ["3 + 4 ="] * 3, ["7"] * 3, answers) == [True, False, False]


def test_other_questions_are_refused():
    with pytest.raises(ValueError, match="POEM"):
        rubric.judge([conversation("pairwise", {"POEM": "roses"})])


def test_authors_are_drawn_from_the_generator_given():
    task = general.task_of_prompt()["Who are you?"]
    assert general.complete(task, random.Random(5)) == general.complete(task, random.Random(5))
