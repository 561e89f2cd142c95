"""The parts of grpo-engine preferences: scores of pairs, position bias, lengths, labels."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_engine.preferences.answers import usable_answers
from grpo_engine.preferences.config import PreferencesConfig
from grpo_engine.preferences.labels import LabelledAnswer
from grpo_engine.preferences.pairs import (
    JudgedPair,
    Pair,
    balanced_lengths,
    pair_rows,
    plan_pairs,
    verdict_values,
)
from grpo_engine.preferences.statistics import pair_figures, warnings
from grpo_engine.settings import build_config

RULE = f"{Path(__file__).with_name('judge_rules.py')}:rule"


def config_of(**values):
    return build_config({"dataset": "x", "judge": RULE, **values}, PreferencesConfig)


def answers_of(*texts, config=None):
    config = config or config_of()
    return usable_answers([(text, False) for text in texts], config, Counter())


def judged_pair(verdicts, swapped=(False, False, True, True)):
    one, other = answers_of("one", "other")
    return JudgedPair(Pair({"row": 1, "prompt": "q"}, one, other, swapped), tuple(verdicts))


def test_the_score_is_the_mean_from_the_first_answers_side():
    values = verdict_values(config_of())
    assert judged_pair(["A>>B", "A>B", "B>A", "B>>A"]).score(values) == 1.5
    assert judged_pair(["A>>B"] * 4).score(values) == 0
    assert judged_pair(["B>A", "B>A", "A>B", "A>>B"]).score(values) == -1.25
    assert not judged_pair(["A>B", None, "A>B", "A>B"]).is_complete
    mine = verdict_values(config_of(value_better=1.5, value_much_better=3.0))
    assert judged_pair(["A>>B", "A=B", "A=B", "A=B"]).score(mine) == 0.75


def test_the_threshold_itself_is_a_tie(tmp_path):
    """The paper keeps pairs whose difference exceeds 1."""
    at, above = (
        judged_pair(["A>B", "A>B", "B>A", "B>A"]),
        judged_pair(["A>>B", "A>B", "B>A", "B>A"]),
    )
    kept, ties = pair_rows([at, above], config_of())
    assert [row["difference"] for row in kept] == [1.25]
    assert [row["difference"] for row in ties] == [1.0]
    assert set(ties[0]) >= {"answer_a", "answer_b"}
    lost = judged_pair(["B>A", "B>>A", "A>B", "A>>B"])
    [row], [] = pair_rows([lost], config_of())
    assert (row["chosen"], row["rejected"], row["difference"]) == ("other", "one", 1.5)
    assert row["judgements"] == [
        {"verdict": "A>B", "shown_first": "rejected"},
        {"verdict": "A>>B", "shown_first": "rejected"},
        {"verdict": "A>B", "shown_first": "chosen"},
        {"verdict": "A>>B", "shown_first": "chosen"},
    ]


def test_position_bias_is_counted():
    flipping = judged_pair(["A>B", "A>B", "A>B", "A>B"])
    firm = judged_pair(["A>B", "A>>B", "B>A", "B>A"])
    unsure = judged_pair(["A>B", "A=B", "A=B", "A=B"])
    incomplete = judged_pair(["A>B", "A>B", "A>B", None])
    figures = pair_figures([flipping, firm, unsure, incomplete], [], [], config_of())
    bias = figures["position_bias"]
    assert (bias["flip_rate"], bias["pairs_with_both_orders"]) == (0.5, 2)
    assert bias["first_position_rate"] == pytest.approx((4 + 2 + 1 + 3) / (4 + 4 + 1 + 3))
    assert figures["judgements"]["without_verdict"] == figures["without_verdict"] == 1
    assert any("flips with the order in 50%" in line for line in warnings(figures))
    # by the sum of each order's verdicts: 2 - 1 as shown, -1 - 1 swapped
    torn = judged_pair(["A>>B", "B>A", "A>B", "A>B"])
    assert pair_figures([torn], [], [], config_of())["position_bias"]["flip_rate"] == 1.0


def test_answers_of_incomparable_length_are_not_paired():
    config = config_of(max_length_ratio=2.0, pairs_per_prompt=9)
    answers = answers_of("a" * 10, "b" * 20, "c" * 21, "d" * 100, config=config)
    dropped = Counter()
    pairs = plan_pairs({"row": 1, "prompt": "q"}, answers, config, dropped)
    lengths = {tuple(sorted((len(p.first.judged), len(p.second.judged)))) for p in pairs}
    assert lengths == {(10, 20), (20, 21)}
    assert dropped == {"lengths": 4}
    one = config_of(max_length_ratio=2.0)
    assert len(plan_pairs({"row": 1, "prompt": "q"}, answers, one, Counter())) == 1
    drawn = {
        tuple(p.cell)
        for seed in range(20)
        for p in plan_pairs(
            {"row": 1, "prompt": "q"}, answers, config_of(max_length_ratio=2.0, seed=seed), dropped
        )
    }
    assert len(drawn) == 2


def test_answers_that_cannot_be_judged_are_counted():
    dropped = Counter()
    found = usable_answers(
        [
            ("a", True),
            ("<think>x", False),
            ("b", False),
            ("<think>y</think> b ", False),
            ("", False),
        ],
        config_of(),
        dropped,
    )
    assert [answer.number for answer in found] == [2]
    assert dropped == {"truncated": 1, "empty": 2, "duplicate": 1}
    kept = usable_answers([("a", True)], config_of(drop_truncated=False), dropped)
    assert len(kept) == 1


def test_lengths_can_be_balanced_over_all_pairs():
    def row(chosen, rejected):
        return {"chosen": "<think>thoughts</think>" + "c" * chosen, "rejected": "r" * rejected}

    rows = [row(10, 10), row(40, 20), row(12, 11), row(11, 20), row(60, 30), row(20, 20)]
    assert balanced_lengths(rows, config_of()) == rows
    config = config_of(max_mean_length_ratio=1.25)
    # 153 : 111 is too much; without the pair of 40 : 20, 113 : 91 is not
    assert balanced_lengths(rows, config) == [row for row in rows if row is not rows[1]]
    assert balanced_lengths([row(30, 10)], config) == []
    assert balanced_lengths([], config) == []
    turned = [row(20, 10), row(10, 40), row(10, 11)]
    assert balanced_lengths(turned, config_of(max_mean_length_ratio=1.5)) == [turned[0], turned[2]]


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=40),
    st.sampled_from([1.0, 1.1, 1.5]),
)
def test_balanced_lengths_are_balanced_in_order_and_no_more_than_needed(lengths, limit):
    rows = [{"chosen": "c" * a, "rejected": "r" * b, "row": n} for n, (a, b) in enumerate(lengths)]
    kept = balanced_lengths(rows, config_of(max_mean_length_ratio=limit))
    chosen = sum(len(row["chosen"]) for row in kept)
    rejected = sum(len(row["rejected"]) for row in kept)
    assert chosen <= limit * rejected + 1e-9 and rejected <= limit * chosen + 1e-9
    assert [row["row"] for row in kept] == sorted(row["row"] for row in kept)
    everything = [sum(side) for side in zip(*lengths, strict=True)] or [0, 0]
    if everything[0] <= limit * everything[1] and everything[1] <= limit * everything[0]:
        assert kept == rows


def test_a_label_is_the_majoritys():
    def label(*verdicts):
        return LabelledAnswer({"row": 1}, answers_of("x")[0], verdicts).label

    assert (label(True), label(False), label(True, False)) == (1, 0, None)
    assert (label(True, False, True), label(False, False, True)) == (1, 0)
