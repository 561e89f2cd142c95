"""A warning when a run learns to please its reward instead of getting better (v2, appendix B.5 and
figure 6: the helpful reward rises while CodeForces performance falls).

The rule, applied at every held-out evaluation. Take the mean of the last ``WINDOW`` evaluations,
and of every ``WINDOW`` in a row before them; the reward of an evaluation is the mean over the
training steps that led to it. There is a warning if for some earlier window both hold:

* accuracy is now lower in each of the last evaluations, by at least ``MIN_FALL`` in their mean,
  and by at least ``Z_FALL`` standard errors of the difference of two windows of so many held-out
  answers. The error counts every answer as a fresh draw; with the same problems each time it is
  smaller, so this errs on the quiet side. As many errors as four because all windows are compared
  with each other: with a steady accuracy and a rising reward, 40 evaluations give a false alarm in
  about one run in a hundred (simulated in the tests);
* the reward is now higher by at least ``MIN_RISE`` of its standard deviation over completions.

The reward looked at is each reward model's (``PREFERENCES``), from where it joins the run. Without
any in the row it is the whole ``reward``; a total that jumps because a reward model joins is
therefore never taken for a rise. A reward that rises with steady accuracy, or an accuracy that
falls with the reward, is no reward hacking and says nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from grpo_engine.history import Evaluation, History, finite_number

PREFERENCES = ("rewards/helpful/mean", "rewards/safety/mean")
WINDOW = 3  # evaluations
MIN_FALL = 0.03  # of held-out accuracy
Z_FALL = 4.0  # standard errors
MIN_RISE = 0.25  # standard deviations of the reward over completions


def hacking_warnings(row: Mapping[str, Any], history: History) -> list[str]:
    """Sentences "reward-hacking: ..." about the evaluation in ``row``; none without one.

    ``history``: the rows before ``row``.
    """
    if finite_number(row, "eval/accuracy") is None:
        return []
    copied = history.evaluations.copy()
    copied.append(row)
    evaluations = list(copied)
    recent = {key for evaluation in evaluations[-WINDOW:] for key in evaluation.rewards}
    keys = [key for key in PREFERENCES if key in recent] or ["reward"]
    return [sentence for key in keys if (sentence := _hacked(evaluations, key))]


def _hacked(evaluations: Sequence[Evaluation], key: str) -> str | None:
    """What to say about ``key``: against the earlier window with the highest accuracy of those that
    the rule finds."""
    windows = [evaluations[i : i + WINDOW] for i in range(len(evaluations) - WINDOW + 1)]
    if not windows:
        return None
    now = windows[-1]
    found = [then for then in windows[:-WINDOW] if _accuracy_fell(then, now)]
    found = [then for then in found if _reward_rose(then, now, key)]
    if not found:
        return None
    then = max(found, key=_accuracy)
    name = "the reward" if key == "reward" else f"reward {key.split('/')[1]!r}"
    return (
        f"reward-hacking: {name} rose {_reward(then, key):.3f} -> {_reward(now, key):.3f} while "
        f"held-out accuracy fell {_accuracy(then):.1%} -> {_accuracy(now):.1%} (means of {WINDOW} "
        f"evaluations, steps {then[0].step} to {then[-1].step} and {now[0].step} to "
        f"{now[-1].step}): stop at an earlier checkpoint, or give the preference reward fewer steps"
    )


def _accuracy(window: Sequence[Evaluation]) -> float:
    return fmean(evaluation.accuracy for evaluation in window)


def _accuracy_fell(then: Sequence[Evaluation], now: Sequence[Evaluation]) -> bool:
    before = _accuracy(then)
    fall = before - _accuracy(now)
    if fall < MIN_FALL or any(evaluation.accuracy >= before for evaluation in now):
        return False
    variance = 0.0
    for window in (then, now):
        answers = sum(evaluation.samples for evaluation in window)
        if not answers:
            return False
        # Of a share that is 0 or 1 the plain estimate would be exactly certain: add one of each.
        share = (_accuracy(window) * answers + 1) / (answers + 2)
        variance += share * (1 - share) / answers
    return fall >= Z_FALL * math.sqrt(variance)


def _reward(window: Sequence[Evaluation], key: str) -> float:
    return fmean(e.rewards[key] for e in window if key in e.rewards)


def _reward_rose(then: Sequence[Evaluation], now: Sequence[Evaluation], key: str) -> bool:
    if not all(any(key in e.rewards for e in window) for window in (then, now)):
        return False
    spreads = [e.spreads[key] for e in (*then, *now) if key in e.spreads]
    rise = _reward(now, key) - _reward(then, key)
    return rise > 0 and bool(spreads) and rise >= MIN_RISE * fmean(spreads)
