"""Pairs of answers and which one a judge prefers (v2, 3.1).

each pair is judged several times (paper: 4), the order of the two answers at random;
score = mean of the verdicts' values, from the first answer's side;
kept if |score| > min_difference (paper: 1), chosen = the side the score is on.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_engine.data import Row
from grpo_engine.preferences.answers import Answer
from grpo_engine.preferences.config import PreferencesConfig
from grpo_engine.rewards.judge import SWAPPED, ChatModel, pairwise, question_text
from grpo_engine.rewards.model import judged_part
from grpo_engine.rollouts import derive_seed


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, and which of them is shown first in each judgement."""

    row: Row
    first: Answer
    second: Answer
    swapped: tuple[bool, ...]

    @property
    def cell(self) -> tuple[int, int, int]:
        return self.row["row"], self.first.number, self.second.number


@dataclass(frozen=True)
class JudgedPair:
    """``judgements``: the verdicts as the judge gave them, A being what it saw first; None: no
    verdict."""

    pair: Pair
    judgements: tuple[str | None, ...]

    @property
    def verdicts(self) -> list[str | None]:
        """The verdicts with A = the pair's first answer."""
        return [
            verdict if verdict is None or not swapped else SWAPPED[verdict]
            for verdict, swapped in zip(self.judgements, self.pair.swapped, strict=True)
        ]

    @property
    def is_complete(self) -> bool:
        return None not in self.judgements

    def score(self, values: dict[str, float]) -> float:
        """Mean value of the verdicts; positive: the first answer is better."""
        return sum(values[verdict] for verdict in self.verdicts) / len(self.judgements)


def verdict_values(config: PreferencesConfig) -> dict[str, float]:
    better, much = config.value_better, config.value_much_better
    return {"A>>B": much, "A>B": better, "A=B": 0.0, "B>A": -better, "B>>A": -much}


def plan_pairs(
    row: Row, answers: Sequence[Answer], config: PreferencesConfig, dropped: Counter[str]
) -> list[Pair]:
    """At most ``pairs_per_prompt`` pairs of comparable length, drawn by the seed."""
    draw = random.Random(f"pairs {config.seed} {row['row']}")
    candidates = list(itertools.combinations(answers, 2))
    draw.shuffle(candidates)
    comparable = []
    for one, other in candidates:
        short, long = sorted((len(one.judged), len(other.judged)))
        if long <= config.max_length_ratio * short:
            comparable.append((one, other))
        else:
            dropped["lengths"] += 1
    count = config.resolved_judgements
    pairs = []
    for one, other in comparable[: config.pairs_per_prompt]:
        if config.answer_order == "balanced":
            swapped = [False, True] * (count // 2)
            draw.shuffle(swapped)
        else:
            swapped = [draw.random() < 0.5 for _ in range(count)]
        pairs.append(Pair(row, one, other, tuple(swapped)))
    return pairs


def judge_pairs(
    judge: ChatModel, pairs: Sequence[Pair], config: PreferencesConfig
) -> Iterator[list[JudgedPair]]:
    """The pairs with their verdicts, ``judge_batch_size`` at a time."""
    size = config.judge_batch_size
    for start in range(0, len(pairs), size):
        batch = pairs[start : start + size]
        rounds = [
            _judge_once(judge, batch, number, config)
            for number in range(config.resolved_judgements)
        ]
        yield [
            JudgedPair(pair, tuple(shown))
            for pair, shown in zip(batch, zip(*rounds, strict=True), strict=True)
        ]


def _judge_once(
    judge: ChatModel, pairs: Sequence[Pair], number: int, config: PreferencesConfig
) -> list[str | None]:
    """The ``number``-th verdict of each pair, as shown."""
    shown = [
        (pair.second.judged, pair.first.judged)
        if pair.swapped[number]
        else (pair.first.judged, pair.second.judged)
        for pair in pairs
    ]
    return pairwise(
        judge,
        [question_text(pair.row["prompt"]) for pair in pairs],
        [first for first, _ in shown],
        [second for _, second in shown],
        seed=derive_seed(config.seed, "judgement", number),
        temperature=config.judge_temperature,
        max_tokens=config.judge_max_tokens,
        attempts=config.judge_attempts,
    )


def pair_rows(
    judged: Sequence[JudgedPair], config: PreferencesConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of pairs.jsonl, rows of ties.jsonl). Pairs without all their verdicts are in
    neither."""
    values = verdict_values(config)
    kept, ties = [], []
    for one in judged:
        if not one.is_complete:
            continue
        pair, score = one.pair, one.score(values)
        tie = abs(score) <= config.min_difference
        chosen, rejected = pair.first, pair.second
        verdicts, swapped = one.verdicts, pair.swapped
        if score < 0 and not tie:
            chosen, rejected = rejected, chosen
            verdicts = [SWAPPED[verdict] for verdict in verdicts]
            swapped = tuple(not other for other in swapped)
        names = ("answer_a", "answer_b") if tie else ("chosen", "rejected")
        row = {
            "prompt": pair.row["prompt"],
            names[0]: chosen.completion,
            names[1]: rejected.completion,
            **({"domain": pair.row["domain"]} if "domain" in pair.row else {}),
            "row": pair.row["row"],
            "answers": [chosen.number, rejected.number],
            "difference": score if tie else abs(score),
            # A is the first of the two texts above, whichever the judge saw first
            "judgements": [
                {"verdict": verdict, "shown_first": names[int(second)]}
                for verdict, second in zip(verdicts, swapped, strict=True)
            ],
        }
        (ties if tie else kept).append(row)
    return kept, ties


def judged_lengths(row: Mapping[str, Any], config: PreferencesConfig) -> tuple[int, int]:
    """Characters within the scope of (chosen, rejected)."""
    chosen, rejected = (
        len(judged_part(row[name], config.resolved_scope).strip())
        for name in ("chosen", "rejected")
    )
    return chosen, rejected


def balanced_lengths(
    rows: Sequence[dict[str, Any]], config: PreferencesConfig
) -> list[dict[str, Any]]:
    """``rows`` without some that tilt the lengths most, so that neither the chosen nor the rejected
    answers, all together, are more than ``max_mean_length_ratio`` times as long as the others. A
    judge that likes long answers would otherwise make a reward model that does."""
    limit = config.max_mean_length_ratio
    kept = [(row, judged_lengths(row, config)) for row in rows]
    while limit is not None and kept:
        totals = [sum(lengths[side] for _, lengths in kept) for side in (0, 1)]
        long = int(totals[1] > totals[0])
        # leaving a row out takes exactly its surplus off the excess
        excess = totals[long] - limit * totals[1 - long]
        if excess <= 1e-9 * totals[long]:  # rounding
            break
        surplus = [lengths[long] - limit * lengths[1 - long] for _, lengths in kept]
        dropped = _least_to_drop(surplus, excess)
        kept = [entry for index, entry in enumerate(kept) if index not in dropped]
    return [row for row, _ in kept]


def _least_to_drop(surplus: Sequence[float], excess: float) -> set[int]:
    """Few indices whose surplus adds up to ``excess``, with little beyond it."""
    dropped: set[int] = set()
    too_large = None
    for index in sorted(range(len(surplus)), key=lambda index: (-surplus[index], index)):
        if surplus[index] <= 0 or excess <= 0:
            break
        if surplus[index] > excess:
            too_large = index  # the smallest of them, as it turns out
            continue
        dropped.add(index)
        excess -= surplus[index]
    if excess > 0 and too_large is not None:
        dropped.add(too_large)
    return dropped
