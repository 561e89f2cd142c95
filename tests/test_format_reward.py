"""The format rewards. R1-Zero's: exactly one think block, then exactly one non-empty answer block.
The readable one: exactly one think block, then a summary."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_engine.rewards import format_r1_reward, format_reward

GOOD = "<think>2 + 2 is 4</think> <answer>4</answer>"


@pytest.mark.parametrize(
    "completion",
    [
        GOOD,
        " " + GOOD + "\n",
        "<think>\nfirst\n\nsecond\n</think>\n<answer>\n4\n</answer>",
        "<think>a</think><answer>4</answer>",
        "<think></think> <answer>4</answer>",  # empty thinking is allowed: no reward for length
        "<think>a < b and c > d</think> <answer>x</answer>",
        [{"role": "assistant", "content": GOOD}],
    ],
)
def test_the_format_is_rewarded(completion):
    assert format_reward([completion]) == [1.0]


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "4",
        "<answer>4</answer>",
        "<think>a</think>",
        "<think>a</think> 4",
        "<think>a</think> <answer></answer>",
        "<think>a</think> <answer> \n\t</answer>",
        "<think>a</think> <answer>\u200b</answer>",  # nothing that can be seen
        "<think>a</think> <answer>\u2060 \u3164\ufeff</answer>",
        "<think>a <answer>4</answer>",
        "<think>a</think> <answer>4",
        "<answer>4</answer> <think>a</think>",
        "<think>a <answer>4</answer></think>",
        "<think>a</think> so <answer>4</answer>",
        "So: " + GOOD,
        GOOD + " and that is it",
        GOOD + "\ntrailing line",
        GOOD + "</answer>",
        GOOD + "\n<answer>5</answer>",
        GOOD + " " + GOOD,
        "<think>a</think></think> <answer>4</answer>",
        "<think><think>a</think> <answer>4</answer>",
        "<think>a</think> <answer><answer>4</answer>",
        "<THINK>a</THINK> <ANSWER>4</ANSWER>",
        "<think >a</think > <answer>4</answer>",
        "</think>a<think> <answer>4</answer>",
    ],
)
def test_everything_else_is_not(completion):
    assert format_reward([completion]) == [0.0]


def test_prefilled_thinking_must_not_be_opened_again():
    inside = "2 + 2 is 4</think> <answer>4</answer>"
    assert format_reward([inside]) == [0.0]
    assert format_reward([inside, GOOD], thinking_prefilled=True) == [1.0, 0.0]


@given(st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "x", " ", "\n"])))
def test_any_sequence_of_pieces_agrees_with_the_grammar(pieces):
    text = "".join(pieces)
    grammar = r"\s*<think>[x\s]*</think>\s*<answer>\s*x[x\s]*</answer>\s*"
    assert format_reward([text]) == [float(re.fullmatch(grammar, text) is not None)]


def test_a_long_adversarial_completion_is_scanned_in_linear_time():
    texts = ["<think>" * 100_000, "<" * 1_000_000, GOOD + " " * 1_000_000 + "<answer>"]
    start = time.perf_counter()
    assert format_reward(texts) == [0.0, 0.0, 0.0]
    assert time.perf_counter() - start < 2


def test_other_columns_are_ignored():
    assert format_reward(completions=[GOOD], prompts=["q"], solution=["4"]) == [1.0]


@pytest.mark.parametrize(
    "completion",
    [
        GOOD,
        "<think>2 + 2 is 4</think>It is 4.",
        "\n<think>\nfirst\n\nsecond\n</think>\n\nThe answer is \\boxed{4}.\n",
        "<think></think>Hello!",  # a greeting needs no reasoning
        "<think>a</think>see <answer>4</answer> or </answer>",  # tags of answers are only text
        [{"role": "assistant", "content": "<think>a</think>b"}],
    ],
)
def test_reasoning_then_a_summary_is_readable(completion):
    assert format_r1_reward([completion]) == [1.0]


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "It is 4.",
        "<think>a",
        "<think>a</think>",
        "<think>a</think> \n\t",
        "<think>a</think>\u200b",
        "a</think>b",
        "So: <think>a</think>b",
        "<think>a</think>b<think>c</think>d",
        "<think>a</think>b</think>",
        "<think><think>a</think>b",
        "</think>a<think>b",
        "<THINK>a</THINK>b",
    ],
)
def test_everything_else_is_not_readable(completion):
    assert format_r1_reward([completion]) == [0.0]


def test_prefilled_thinking_of_the_readable_format():
    found = format_r1_reward(["a</think>b", "<think>a</think>b", "a"], thinking_prefilled=True)
    assert found == [1.0, 0.0, 0.0]


@given(st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "x", " ", "\n"])))
def test_any_sequence_of_pieces_agrees_with_the_readable_grammar(pieces):
    text = "".join(pieces)
    grammar = r"\s*<think>((?!</?think>)[\s\S])*</think>\s*((?!</?think>)\S)((?!</?think>)[\s\S])*"
    assert format_r1_reward([text]) == [float(re.fullmatch(grammar, text) is not None)]
