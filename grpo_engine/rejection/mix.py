"""The rows of other tasks that are mixed in: "approximately 200k" non-reasoning samples beside 600k
of reasoning (v1 2.3.3), or the trivial questions of the cold start (v2 Listing 3)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from grpo_engine.data import Row, read_rows
from grpo_engine.filters import Decontamination
from grpo_engine.progress import say
from grpo_engine.rejection.config import SampleConfig
from grpo_engine.rejection.statistics import assistant_texts
from grpo_engine.rewards.judge import question_text
from grpo_engine.types import UserError


class General:
    """The rows of ``general_dataset``, checked: ``messages``, or ``prompt`` and ``completion``.
    Those that share words with the evaluation are left out and counted."""

    def __init__(self, config: SampleConfig, tests: Decontamination | None) -> None:
        self.config = config
        source = config.general_dataset
        rows = read_rows(source, args=config.general_args, split=config.general_split)
        for number, row in enumerate(rows, start=1):
            _check(row, f"--general_dataset {source}: row {number}")
        named = [
            {
                **row,
                "domain": row.get("domain") or "general",
                "source": "general_dataset",
                "row": number,
            }
            for number, row in enumerate(rows, start=1)
        ]
        self.rows = [row for row in named if tests is None or not _matches(row, tests)]
        self.contaminated = len(named) - len(self.rows)

    def mixed(self, sampled: int) -> tuple[list[Row], dict[str, Any]]:
        """(the rows beside ``sampled`` others, in their order, drawn by the seed; the counts)."""
        share, wanted = self.config.general_share, len(self.rows)
        if share is not None:
            wanted = round(sampled * share / (1 - share))
        count = min(wanted, len(self.rows))
        if count < wanted:
            say(
                f"general_dataset: {wanted} rows would be {share:g} of the mix, it has {count}: "
                "all are taken"
            )
        drawn = random.Random(f"general {self.config.seed}").sample(range(len(self.rows)), count)
        counts = {
            "wanted": wanted,
            "taken": count,
            "available": len(self.rows),
            "contaminated": self.contaminated,
            "share": count / (sampled + count) if sampled + count else None,
        }
        return [self.rows[place] for place in sorted(drawn)], counts


def _check(row: Row, where: str) -> None:
    """UserError unless the row can be learnt from."""
    if row.get("messages") is not None:
        messages = row["messages"]
        if not _are_messages(messages) or messages[-1]["role"] != "assistant":
            raise UserError(
                f"{where}: messages must be a list with role and content that ends with the "
                f"assistant's, got {messages!r:.80}"
            )
        return
    for name in ("prompt", "completion"):
        value = row.get(name)
        fits = isinstance(value, str) and value.strip()
        if not fits and not (name == "prompt" and _are_messages(value)):
            raise UserError(f"{where}: {name!r} must be a non-empty text, got {value!r:.80}")


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(one, dict)
            and isinstance(one.get("role"), str)
            and isinstance(one.get("content"), str)
            for one in value
        )
    )


def _matches(row: Row, tests: Decontamination) -> bool:
    asked: Sequence[Any] = row["prompt"] if row.get("messages") is None else row["messages"]
    texts = [question_text(asked), *assistant_texts(row)]
    return any(tests.matches(text) for text in texts)
