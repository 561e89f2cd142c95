"""pass@k, cons@k and their intervals, against brute force over every subset."""

import itertools
import math
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_engine.evaluate import bootstrap_ci95, cons_at_k, paired_difference, pass_at_k


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        verdicts = [True] * c + [False] * (n - c)
        subsets = list(itertools.combinations(verdicts, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), rel=1e-14)


def test_pass_at_k_takes_arrays_and_pass_at_1_is_the_mean():
    values = pass_at_k([4, 8, 8], np.array([1, 0, 8]), 1)
    assert values.tolist() == [0.25, 0.0, 1.0]
    assert pass_at_k(64, [[0, 16], [32, 64]], 1).tolist() == [[0, 0.25], [0.5, 1]]
    assert isinstance(pass_at_k(4, 1, 2), float)


@pytest.mark.parametrize("n, c, k", [(10**9, 2, 3), (1_000_000, 3, 999), (10**6, 500, 10**5)])
def test_pass_at_k_keeps_its_digits_for_large_n(n, c, k):
    miss = Fraction(1)
    for i in range(n - c + 1, n + 1):
        miss *= 1 - Fraction(k, i)
    assert pass_at_k(n, c, k) == pytest.approx(float(1 - miss), rel=1e-13, abs=0)


@pytest.mark.parametrize(
    "n, c, k, message",
    [
        (3, 1, 4, "n >= k=4.*n=3"),
        ([8, 2], [1, 1], 4, "n=2"),
        (0, 0, 1, "n=0"),
        (4, 5, 1, "c=5"),
        (4, -1, 1, "c=-1"),
        (4, 1, 0, "k must"),
        (4, 1, 1.0, "k must"),
        (4.5, 1, 1, "n must be whole"),
        (4, 0.5, 1, "c must be whole"),
    ],
)
def test_pass_at_k_refuses_what_it_cannot_estimate(n, c, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k)


def by_brute_force(answers, correct, k):
    """The definition, one subset after the other."""
    total = Fraction(0)
    subsets = list(itertools.combinations(answers, k))
    for subset in subsets:
        votes = Counter(answer for answer in subset if answer is not None)
        tied = [answer for answer in votes if votes[answer] == max(votes.values())]
        if tied:
            total += Fraction(sum(answer == correct for answer in tied), len(tied))
    return float(total / len(subsets))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([None, "a", "b", "c", "d"]), min_size=1, max_size=9), st.data())
def test_cons_at_k_is_the_expectation_over_all_subsets(answers, draw):
    k = draw.draw(st.integers(1, len(answers)))
    expected = by_brute_force(answers, "a", k)
    assert cons_at_k(answers, "a", k) == pytest.approx(expected, abs=1e-15)
    assert cons_at_k(answers, [answer == "a" for answer in answers], k) == cons_at_k(
        answers, "a", k
    )
    assert cons_at_k(draw.draw(st.permutations(answers)), "a", k) == cons_at_k(answers, "a", k)


@pytest.mark.parametrize(
    "answers, k, value",
    [
        (["72", "72", "5"], 3, 1.0),
        (["72", "5", "5"], 3, 0.0),
        (["72", "5"], 2, 0.5),  # a tie: neither first nor last wins
        (["72", "5", "6"], 3, 1 / 3),
        ([None, None, "72"], 3, 1.0),  # silence cannot win
        ([None, None, None], 3, 0.0),
        ([None, None, "72"], 1, 1 / 3),  # but it does not vanish either
        (["72", "5"], 1, 0.5),  # cons@1 is pass@1
    ],
)
def test_the_vote(answers, k, value):
    assert cons_at_k(answers, "72", k) == pytest.approx(value)


def test_votes_are_counted_over_equivalence_classes_not_strings():
    answers = ["0.5", "1/2", "7", "7", "2/4"]
    equal = lambda one, other: Fraction(one) == Fraction(other)  # noqa: E731
    assert cons_at_k(answers, "1/2", 5) == 0.0  # as strings, 7 wins
    assert cons_at_k(answers, "1/2", 5, equivalent=equal) == 1.0
    assert cons_at_k(answers, [True, True, False, False, True], 5, equivalent=equal) == 1.0


def test_several_right_classes_share_a_tie():
    answers, verdicts = ["1/2", "0.5", "7"], [True, True, False]
    assert cons_at_k(answers, verdicts, 3) == pytest.approx(2 / 3)


def test_cons_at_k_refuses_bad_input():
    with pytest.raises(ValueError, match="n >= k=4.*n=3"):
        cons_at_k(["a"] * 3, "a", 4)
    with pytest.raises(ValueError, match="3 answers but 2 verdicts"):
        cons_at_k(["a"] * 3, [True, False], 3)
    with pytest.raises(ValueError, match="'a' differ"):
        cons_at_k(["a", "a"], [True, False], 2)
    with pytest.raises(ValueError, match="k must"):
        cons_at_k(["a"], "a", 0)


def test_64_samples_of_many_classes_take_a_moment():
    answers = [str(i % 40) for i in range(64)]
    start = time.perf_counter()
    value = cons_at_k(answers, "0", 32)
    assert time.perf_counter() - start < 5
    assert 0 < value < 1
    assert cons_at_k(["a"] * 40 + ["b"] * 24, "a", 63) == 1.0


def test_the_interval_covers_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        estimate = bootstrap_ci95(generator.beta(2, 3, size=60), seed=trial, resamples=500)
        covered += estimate.low <= 0.4 <= estimate.high
    assert 178 <= covered <= 199


def test_the_interval_matches_the_standard_error_and_repeats():
    values = np.random.default_rng(0).random(400)
    estimate = bootstrap_ci95(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert estimate.value == pytest.approx(values.mean())
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.05)
    assert estimate == bootstrap_ci95(list(values))
    assert estimate != bootstrap_ci95(values, seed=1)


def test_a_paired_difference_is_narrower_than_two_intervals():
    generator = np.random.default_rng(0)
    before = generator.random(200)
    after = before + generator.normal(0.02, 0.01, size=200)
    paired = paired_difference(before, after)
    assert 0 < paired.low < paired.value < paired.high
    assert bootstrap_ci95(before).high > bootstrap_ci95(after).low  # unpaired, nothing is seen


def test_intervals_refuse_bad_input():
    for values in ([0.5], [], [[0.5, 0.5]]):
        with pytest.raises(ValueError, match="at least 2 problems"):
            bootstrap_ci95(values)
    with pytest.raises(ValueError, match="problem 1 has no finite value"):
        bootstrap_ci95([0.5, math.nan])
    with pytest.raises(ValueError, match="shapes"):
        paired_difference([1, 2], [1, 2, 3])


def test_importing_the_estimators_loads_no_torch():
    code = "import sys, grpo_engine.evaluate; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
