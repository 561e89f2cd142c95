"""The figures of an evaluation, from its samples alone: the same samples give the same
``results.json``, to the byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from rich.table import Table

from grpo_engine.evaluate import bootstrap_ci95, cons_at_k, pass_at_k
from grpo_engine.evaluation.samples import Sample
from grpo_engine.evaluation.votes import Votes

POLICIES = {
    "pass@1": "mean over the samples of a problem, then over problems",
    "pass@k": "unbiased: 1 - C(n - c, k) / C(n, k)",
    "ci95": "percentile bootstrap over problems, 10,000 resamples, seed 0",
    "unjudged": "samples whose verdict failed (timeout, error) count as wrong; 'bounds' is the "
    "figure with them wrong and with them right",
    "no_answer": "wrong, and no vote",
    "truncated": "cut by max_completion_length; judged as they are",
    "ties": "the share of right ones among the answers tied for the first place",
}
VERIFIER_ERRORS = ("error", "worker_death", "invalid_score", "gold_invalid", "none")


def figures(task: str, problems: Sequence[Sequence[Sample]], ks: Sequence[int]) -> dict[str, Any]:
    """Estimates, rates and lengths. ``problems``: the samples of each, equally many."""
    every = [sample for samples in problems for sample in samples]
    votes = Votes(task, problems)
    worst = _estimates(problems, votes, ks)
    best = None
    if any(sample.unjudged for sample in every):
        as_right = [
            [replace(one, score=1.0) if one.unjudged else one for one in samples]
            for samples in problems
        ]
        best = _estimates(as_right, Votes(task, as_right), ks)
    for name, estimate in worst.items():
        if best is not None:
            estimate["bounds"] = [estimate["value"], best[name]["value"]]
    return {
        "pass@1": worst["pass@1"],
        "pass@k": {str(k): worst[f"pass@{k}"] for k in ks},
        "cons@k": {str(k): worst[f"cons@{k}"] for k in ks} if votes.ballots else None,
        "votes": {
            "same_answer": votes.policy,
            "comparisons": votes.comparisons,
            "failed_comparisons": votes.failed_comparisons,
        },
        "rates": _rates(every),
        "length": _lengths(every),
        "correct": [sum(one.right for one in samples) for samples in problems],
        "policies": POLICIES,
    }


def _estimates(
    problems: Sequence[Sequence[Sample]], votes: Votes, ks: Sequence[int]
) -> dict[str, dict[str, Any]]:
    total = np.array([len(samples) for samples in problems])
    correct = np.array([sum(one.right for one in samples) for samples in problems])
    found = {f"pass@{k}": _estimate(pass_at_k(total, correct, k)) for k in sorted({1, *ks})}
    for k in ks if votes.ballots else ():
        found[f"cons@{k}"] = _estimate(
            [
                cons_at_k(ballot, [one.right for one in samples], k)
                for ballot, samples in zip(votes.ballots, problems, strict=True)
            ]
        )
    return found


def _estimate(values: Any) -> dict[str, Any]:
    """One problem has no spread over problems: no interval."""
    if len(values) < 2:
        return {"value": float(np.mean(values)), "ci95": None}
    value, low, high = bootstrap_ci95(values)
    return {"value": value, "ci95": [low, high]}


def _rates(samples: Sequence[Sample]) -> dict[str, Any]:
    """Count and share of what can go wrong with a sample, and of every outcome of the reward."""
    outcomes = Counter(sample.outcome for sample in samples)
    counts = {
        "no_answer": outcomes["no_answer"],
        "truncated": sum(sample.finish_reason == "length" for sample in samples),
        "truncated_without_answer": sum(
            sample.finish_reason == "length" and sample.outcome == "no_answer" for sample in samples
        ),
        "unjudged": sum(sample.unjudged for sample in samples),
        "timeout": outcomes["timeout"],  # of the verifier
        "verifier_error": sum(outcomes[name] for name in VERIFIER_ERRORS),
        "time_limit": outcomes["time_limit"],  # of a program under test: wrong
    }
    return {
        **{name: {"count": n, "share": n / len(samples)} for name, n in counts.items()},
        "outcomes": dict(sorted(outcomes.items())),
    }


def _lengths(samples: Sequence[Sample]) -> dict[str, float | int | None]:
    """In tokens."""
    lengths = np.array([sample.length for sample in samples])
    right = np.array([sample.right for sample in samples])
    return {
        "mean": float(lengths.mean()),
        "median": float(np.median(lengths)),
        "p95": float(np.percentile(lengths, 95)),
        "max": int(lengths.max()),
        "mean_right": float(lengths[right].mean()) if right.any() else None,
        "mean_wrong": float(lengths[~right].mean()) if not right.all() else None,
        "total": int(lengths.sum()),
    }


def results_table(results: dict[str, Any]) -> Table:
    """What the screen shows at the end."""
    table = Table()
    table.add_column(results["task"])
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right", style="dim")
    for family in ("pass@k", "cons@k"):
        for k, estimate in (results[family] or {}).items():
            if family == "pass@k" or k != "1":  # cons@1 says what pass@1 says
                table.add_row(family[:-1] + k, _percent(estimate["value"]), _interval(estimate))
    if results["pass@k"].get("1") is None:
        table.add_row("pass@1", _percent(results["pass@1"]["value"]), _interval(results["pass@1"]))
    table.add_section()
    for name in ("no_answer", "truncated", "unjudged"):
        rate = results["rates"][name]
        table.add_row(name.replace("_", " "), _percent(rate["share"]), f"{rate['count']} samples")
    length = results["length"]
    spread = f"median {length['median']:.0f}, 95 % {length['p95']:.0f}, most {length['max']}"
    table.add_row("tokens, mean", f"{length['mean']:.1f}", spread)
    if overlap := results.get("overlap"):
        words = f"{overlap['problems']} of {results['num_problems']} problems"
        table.add_row("in the training data", _percent(overlap["share"]), words)
    return table


def warnings(results: dict[str, Any]) -> list[str]:
    """What a reader of the figures must know."""
    found = []
    rates, total = results["rates"], results["num_problems"] * results["num_samples"]
    if rates["unjudged"]["count"]:
        low, high = results["pass@1"]["bounds"]
        found.append(
            f"{rates['unjudged']['count']} of {total} samples could not be judged and count as "
            f"wrong: pass@1 is between {low:.4f} and {high:.4f}"
        )
    for key, what in (
        ("unusable_rows", "cannot be judged"),
        ("long_prompts", "have prompts over max_prompt_length"),
    ):
        if rows := results["left_out"][key]:
            found.append(f"{len(rows)} rows are left out because they {what}")
    return found


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _interval(estimate: dict[str, Any]) -> str:
    if estimate["ci95"] is None:
        return "one problem"
    low, high = estimate["ci95"]
    return f"{100 * low:.1f} to {100 * high:.1f}"
