"""The answers to be judged: sampled from a model, batch by batch into ``samples.jsonl``, or given
in columns of the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from grpo_engine.data import Row, load_rows
from grpo_engine.interrupt import Interrupt
from grpo_engine.manifest import rows_sha256
from grpo_engine.preferences.config import PreferencesConfig
from grpo_engine.prepare import load_prompts
from grpo_engine.rewards.model import judged_part
from grpo_engine.sampling.folder import identity
from grpo_engine.sampling.model import SamplingModel
from grpo_engine.sampling.samples import Cell, SampleFile
from grpo_engine.sampling.series import Series, draw_missing
from grpo_engine.types import UserError


@dataclass(frozen=True)
class Answer:
    """One answer to one prompt. ``judged``: what of it the judge sees."""

    number: int  # among the answers to the prompt, from 0
    completion: str
    judged: str


@dataclass(frozen=True)
class SampledAnswer:
    """A line of ``samples.jsonl``."""

    row: int
    sample: int
    seed: int
    completion: str
    length: int  # tokens, the end-of-sequence one included
    finish_reason: str

    @property
    def cell(self) -> Cell:
        return self.row, self.sample


def load_questions(config: PreferencesConfig) -> list[Row]:
    """The rows of ``dataset``, numbered from 1 in ``row``. Raises UserError."""
    rows = load_rows(
        config.dataset,
        args=config.dataset_args,
        split=config.dataset_split,
        limit=config.dataset_limit,
        prompt_column=config.prompt_column,
    )
    return [{**row, "row": number} for number, row in enumerate(rows, start=1)]


def given_answers(row: Row, config: PreferencesConfig) -> list[str]:
    """The texts in the row's ``answer_columns``. Raises UserError naming row and column."""
    found: list[str] = []
    for column in config.answer_columns:
        value = row.get(column)
        values = value if isinstance(value, list) else [value]
        for text in values:
            if not isinstance(text, str):
                held = f"{text!r:.60}" if column in row else "no such column"
                raise UserError(
                    f"{config.dataset}: row {row['row']}: {column!r} must hold texts, got {held}"
                )
        found += values
    return found


def usable_answers(
    completions: list[tuple[str, bool]], config: PreferencesConfig, dropped: Counter[str]
) -> list[Answer]:
    """The answers to one prompt that can be judged; the others are counted in ``dropped``.
    ``completions``: (text, whether the cap cut it)."""
    usable: list[Answer] = []
    seen: set[str] = set()
    for number, (completion, truncated) in enumerate(completions):
        judged = judged_part(completion, config.resolved_scope).strip()
        if truncated and config.drop_truncated:
            dropped["truncated"] += 1
        elif not judged:
            dropped["empty"] += 1
        elif judged in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(judged)
            usable.append(Answer(number, completion, judged))
    return usable


class Sampler:
    """Draws the answers to ``rows``. The same answers come whatever was there before. Raises
    UserError for a model or prompts that do not go together."""

    def __init__(self, config: PreferencesConfig, rows: list[Row]) -> None:
        self.model = SamplingModel(config.model, config)
        prompts = load_prompts(config, self.model.policy.tokenizer, rows)
        self.series = Series("preferences", config, prompts)
        self.model.check_positions(self.series)
        self.inputs = {
            "model": self.model.inputs(),
            "prompts": {
                "sha256": self.series.prompts_sha256(),
                "template": config.prompt_template,
            },
            "sampling": {"num_samples": config.num_samples, **self.series.inputs()},
        }
        self._identity = identity(self.inputs)

    @property
    def total(self) -> int:
        return len(self.series.prompts) * self.series.config.num_samples

    def key_of(self, cell: Cell) -> str | None:
        """All that a sample's tokens depend on; None for a cell that is not asked for."""
        asked = cell[1] < self.series.config.num_samples
        return self.series.key(cell, self._identity) if asked else None

    def sample(self, samples: SampleFile, interrupt: Interrupt) -> Iterator[tuple[int, bool]]:
        """Draw what is not there yet; yields (answers there now, whether any was drawn) of each
        batch."""
        return draw_missing(self.series, samples, self._draw, interrupt)

    def _draw(self, cells: list[Cell]) -> list[SampledAnswer]:
        return [
            SampledAnswer(
                *cell,
                seed=self.series.seed(cell),
                completion=self.series.begun(cell) + text,
                length=length,
                finish_reason=reason,
            )
            for cell, (text, length, reason) in zip(
                cells, self.model.draw(self.series, cells), strict=True
            )
        ]


def dataset_input(config: PreferencesConfig, rows: list[Row]) -> dict[str, Any]:
    return {"source": config.dataset, "rows": len(rows), "sha256": rows_sha256(rows)}
