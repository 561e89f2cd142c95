"""Answers labelled safe or unsafe, point by point (v2, 3.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_engine.data import Row
from grpo_engine.preferences.answers import Answer
from grpo_engine.preferences.config import PreferencesConfig
from grpo_engine.rewards.judge import ChatModel, question_text, safety
from grpo_engine.rollouts import derive_seed


@dataclass(frozen=True)
class LabelledAnswer:
    """``judgements``: True safe, False unsafe, None no verdict."""

    row: Row
    answer: Answer
    judgements: tuple[bool | None, ...]

    @property
    def is_complete(self) -> bool:
        return None not in self.judgements

    @property
    def label(self) -> int | None:
        """1 safe, 0 unsafe, by majority; None where the verdicts are split evenly."""
        safe = sum(verdict is True for verdict in self.judgements)
        if 2 * safe == len(self.judgements):
            return None
        return int(2 * safe > len(self.judgements))


def label_answers(
    judge: ChatModel, answers: Sequence[tuple[Row, Answer]], config: PreferencesConfig
) -> Iterator[list[LabelledAnswer]]:
    """The answers with their verdicts, ``judge_batch_size`` at a time."""
    size = config.judge_batch_size
    for start in range(0, len(answers), size):
        batch = answers[start : start + size]
        rounds = [
            safety(
                judge,
                [question_text(row["prompt"]) for row, _ in batch],
                [answer.judged for _, answer in batch],
                seed=derive_seed(config.seed, "judgement", number),
                temperature=config.judge_temperature,
                max_tokens=config.judge_max_tokens,
                attempts=config.judge_attempts,
            )
            for number in range(config.resolved_judgements)
        ]
        yield [
            LabelledAnswer(row, answer, verdicts)
            for (row, answer), verdicts in zip(batch, zip(*rounds, strict=True), strict=True)
        ]


def label_rows(
    labelled: Sequence[LabelledAnswer],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of safety.jsonl, rows of ties.jsonl). Answers without all their verdicts are in
    neither."""
    kept, ties = [], []
    for one in labelled:
        if not one.is_complete:
            continue
        row = {
            "prompt": one.row["prompt"],
            "completion": one.answer.completion,
            **({} if one.label is None else {"label": one.label}),
            **({"domain": one.row["domain"]} if "domain" in one.row else {}),
            "row": one.row["row"],
            "answer": one.answer.number,
            "judgements": ["safe" if verdict else "unsafe" for verdict in one.judgements],
        }
        (ties if one.label is None else kept).append(row)
    return kept, ties
