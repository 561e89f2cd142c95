"""Evaluation: the estimators behind ``pass@k`` and ``cons@k``, and their uncertainty.

All of them average over what could have been drawn instead of drawing it: the same samples always
give the same number. The unit of uncertainty is the problem: samples of one problem are not
independent evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_RESAMPLES = 10_000
_RESAMPLED_AT_ONCE = 1 << 22


def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> float | np.ndarray:
    """The chance that one of ``k`` samples is right, when ``c`` of ``n`` samples were.

    1 - C(n-c, k) / C(n, k): the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), as the
    product of 1 - k/i over i = n-c+1 .. n, which neither overflows nor cancels. ``n`` and ``c``
    may be integers (gives a float) or arrays, one entry a problem (gives fp64). ``k=1`` is c / n.

    Raises ValueError if n < k anywhere: fewer samples cannot say what k of them would do. Also if
    c is not in [0, n] or k < 1.
    """
    _check_k(k)
    samples, correct = np.broadcast_arrays(_integers("n", n), _integers("c", c))
    for wrong, rule in (
        (samples < k, f"n >= k={k}"),
        ((correct < 0) | (correct > samples), "c <= n"),
    ):
        if wrong.any():
            at = int(np.argmax(wrong.ravel()))
            found = f"n={samples.ravel()[at]}, c={correct.ravel()[at]}"
            raise ValueError(f"pass@k needs 0 <= {rule}, got {found}")
    pairs = zip(samples.ravel().tolist(), correct.ravel().tolist(), strict=True)
    values = np.array([_pass_at_k(*pair, k) for pair in pairs]).reshape(samples.shape)
    return float(values) if values.ndim == 0 else values


def _pass_at_k(n: int, c: int, k: int) -> float:
    if n - c < k:
        return 1.0
    if k == 1:
        return c / n
    return -math.expm1(math.fsum(math.log1p(-k / i) for i in range(n - c + 1, n + 1)))


def _integers(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be whole numbers, got {values!r:.80}")
    return array


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"k must be a whole number >= 1, got {k!r}")


def cons_at_k(
    answers: Sequence[Any],
    correct: Any,
    k: int | None = None,
    *,
    equivalent: Callable[[Any, Any], bool] | None = None,
) -> float:
    """The chance that the majority answer of ``k`` of the samples is right (one problem).

    ``answers``: the extracted answer of each of the n samples, None where there is none.
    ``correct``: one bool a sample, or else the right answer itself. ``equivalent(a, b)`` says when
    two answers are the same vote (default ``==``); classes are formed in order of appearance.
    ``k`` defaults to n.

    Ties: the share of right ones among the classes tied for the first place, so the order of
    samples never matters. Samples without an answer count among the k but cannot win; if all k
    are such, the vote is lost. For k < n the value is the exact expectation over all C(n, k)
    subsets, by counting, without sampling noise.

    Raises ValueError if n < k, if the lengths differ, or if one class holds right and wrong
    samples.
    """
    k = len(answers) if k is None else k
    _check_k(k)
    if len(answers) < k:
        raise ValueError(f"cons@k needs n >= k={k} samples, got n={len(answers)}")
    classes = _classes(answers, correct, equivalent or (lambda one, other: one == other))
    if k == len(answers):
        top = max((size for size, _ in classes), default=0)
        verdicts = [right for size, right in classes if size == top]
        return sum(verdicts) / len(verdicts) if verdicts else 0.0
    silent = sum(answer is None for answer in answers)
    largest = min(k, max((size for size, _ in classes), default=0))
    won = sum(
        Fraction(int(right), tied)
        for most in range(1, largest + 1)
        for tied, right in enumerate(_winning_draws(classes, silent, most, k))
        if tied
    )
    return float(Fraction(won) / math.comb(len(answers), k))


def _classes(
    answers: Sequence[Any], correct: Any, equivalent: Callable[[Any, Any], bool]
) -> list[tuple[int, bool]]:
    """(number of samples, is it right) of each class of equivalent answers."""
    verdicts = None
    if isinstance(correct, (list, tuple, np.ndarray)) and all(
        isinstance(one, (bool, np.bool_)) for one in correct
    ):
        verdicts = list(correct)
        if len(verdicts) != len(answers):
            raise ValueError(f"{len(answers)} answers but {len(verdicts)} verdicts in correct")
    found: list[tuple[Any, list[int]]] = []
    for index, answer in enumerate(answers):
        if answer is None:
            continue
        members = next((m for first, m in found if equivalent(first, answer)), None)
        if members is None:
            found.append((answer, [index]))
        else:
            members.append(index)
    classes = []
    for first, members in found:
        if verdicts is None:
            right = {bool(equivalent(correct, first))}
        else:
            right = {bool(verdicts[index]) for index in members}
        if len(right) > 1:
            raise ValueError(f"samples with the equivalent answer {first!r:.80} differ in correct")
        classes.append((len(members), right.pop()))
    return classes


def _winning_draws(
    classes: Sequence[tuple[int, bool]], silent: int, most: int, k: int
) -> np.ndarray:
    """Number of right classes tied for the first place, summed over the draws of ``k`` samples in
    which the largest class has exactly ``most`` votes, by the number of tied classes.

    Adds one class after the other to polynomials in the number drawn; whole numbers, so exact.
    """
    # Axes: classes tied so far, samples drawn so far.
    draws = np.zeros((k // most + 1, k + 1), dtype=object)
    draws[0, 0] = 1
    right = np.zeros_like(draws)
    for size, is_right in [*classes, (silent, None)]:
        below = size if is_right is None else min(size, most - 1)
        new_draws, new_right = np.zeros_like(draws), np.zeros_like(right)
        for taken in range(min(below, k) + 1):
            ways = math.comb(size, taken)
            new_draws[:, taken:] += ways * draws[:, : k + 1 - taken]
            new_right[:, taken:] += ways * right[:, : k + 1 - taken]
        if is_right is not None and size >= most:
            ways = math.comb(size, most)
            before = draws[:-1, : k + 1 - most]
            new_draws[1:, most:] += ways * before
            new_right[1:, most:] += ways * (right[:-1, : k + 1 - most] + is_right * before)
        draws, right = new_draws, new_right
    return right[:, k]


class Estimate(NamedTuple):
    """A mean over problems with its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap_ci95(values: ArrayLike, *, seed: int = 0, resamples: int = _RESAMPLES) -> Estimate:
    """The mean of ``values``, one a problem, with the 95 % percentile bootstrap over problems.

    Equal values (every problem solved) have no spread, so their interval has no width: it says
    nothing about problems harder than these. Raises ValueError for fewer than two problems or a
    value that is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"a bootstrap needs at least 2 problems, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"problem {int(np.argmin(np.isfinite(array)))} has no finite value")
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    rows = max(1, _RESAMPLED_AT_ONCE // len(array))
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        drawn = generator.integers(len(array), size=(stop - start, len(array)))
        means[start:stop] = array[drawn].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(array.mean()), float(low), float(high))


def paired_difference(
    before: ArrayLike, after: ArrayLike, *, seed: int = 0, resamples: int = _RESAMPLES
) -> Estimate:
    """Mean of after - before on the same problems, in the same order, with its 95 % interval.

    Two checkpoints find the same problems hard, so this is narrower than two separate intervals.
    Raises ValueError for unequal lengths.
    """
    one, other = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if one.shape != other.shape:
        raise ValueError(f"paired values must match, got shapes {one.shape} and {other.shape}")
    return bootstrap_ci95(other - one, seed=seed, resamples=resamples)
