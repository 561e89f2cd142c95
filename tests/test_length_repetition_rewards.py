"""The length and the repetition reward."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_engine.rewards import length_reward, repetition_reward
from grpo_engine.types import UserError


@pytest.mark.parametrize(
    "length, value",
    [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0), (5000, -1.0)],
)
def test_the_penalty_grows_linearly_over_the_cache(length, value):
    scores = length_reward(["x"], [[7] * length], max_length=100, cache=20)
    assert scores == [pytest.approx(value)]


def test_tokens_are_counted_where_given_and_words_elsewhere():
    text = "one two three four"
    assert length_reward([text], [[1]], max_length=4, cache=2) == [0.0]
    assert length_reward([text], max_length=4, cache=2) == [-1.0]
    assert length_reward(["一二三"], max_length=4, cache=2) == [-0.5]


@pytest.mark.parametrize("max_length, cache", [(10, 0), (10, -1), (10, 11), (0, 0)])
def test_limits_that_make_no_sense_are_refused(max_length, cache):
    with pytest.raises(UserError, match=f"cache={cache}.*max_length={max_length}"):
        length_reward(["x"], [[1]], max_length=max_length, cache=cache)
    with pytest.raises(UserError, match="2 completions but 1"):
        length_reward(["x", "y"], [[1]], max_length=10, cache=5)


@pytest.mark.parametrize(
    "text, repeated",
    [
        ("", 0.0),
        ("one two", 0.0),  # no trigram
        ("a b c d e f", 0.0),
        ("a b c a b c", 1 - 3 / 4),
        ("A b C a B c", 1 - 3 / 4),
        ("a a a a a a", 1 - 1 / 4),
        ("一二三一二三", 1 - 3 / 4),
        ("はいはいはいはい", 1 - 2 / 6),
        ("x" * 102, 1 - 1 / 100),  # a loop without blanks
    ],
)
def test_repeated_trigrams_are_penalised(text, repeated):
    assert repetition_reward([text]) == [pytest.approx(-repeated)]
    assert repetition_reward([text], max_penalty=-0.25) == [pytest.approx(-repeated / 4)]
    assert repetition_reward([[{"role": "assistant", "content": text}]]) == [
        pytest.approx(-repeated)
    ]


def test_the_size_of_the_n_grams_is_an_option():
    assert repetition_reward(["a b a b"], ngram_size=1) == [-0.5]
    assert repetition_reward(["a b a b"], ngram_size=2) == [pytest.approx(-1 / 3)]
    assert repetition_reward(["a b a b"], ngram_size=4) == [0.0]


@given(st.text(max_size=60), st.integers(1, 5))
def test_the_penalty_stays_within_its_bounds(text, ngram_size):
    assert -2 < repetition_reward([text], ngram_size=ngram_size, max_penalty=-2.0)[0] <= 0


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="max_penalty must be <= 0, got 0.5"):
        repetition_reward(["a"], max_penalty=0.5)
    with pytest.raises(UserError, match="ngram_size must be >= 1, got 0"):
        repetition_reward(["a"], ngram_size=0)


def test_a_megabyte_takes_a_moment():
    start = time.perf_counter()
    repetition_reward(["word " * 200_000, "x" * 1_000_000, "一" * 300_000])
    assert time.perf_counter() - start < 8


def test_other_columns_are_ignored():
    assert repetition_reward(completions=["a"], prompts=["q"], solution=["4"]) == [0.0]
    assert length_reward(completions=["a"], prompts=["q"], max_length=9, cache=1) == [0.0]
