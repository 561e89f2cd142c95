"""The answers to be judged: sampled from a model, batch by batch into ``samples.jsonl``, or given
in columns of the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from grpo_engine.data import Row, load_rows
from grpo_engine.evaluation.folder import identity
from grpo_engine.evaluation.samples import Cell, SampleFile, fingerprint, plan_batches
from grpo_engine.generation.hf import HFGenerator
from grpo_engine.interrupt import Interrupt
from grpo_engine.manifest import rows_sha256, weights_sha256
from grpo_engine.policy import Policy
from grpo_engine.preferences.config import PreferencesConfig
from grpo_engine.prepare import load_prompts
from grpo_engine.rewards.model import judged_part
from grpo_engine.rollouts import Prompt, derive_seed
from grpo_engine.types import GenerationRequest, SamplingParams, UserError


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


@dataclass
class Sampler:
    """Draws the answers to ``rows``. The same answers come whatever was there before."""

    config: PreferencesConfig
    policy: Policy
    prompts: list[Prompt]
    rows: int
    generator: HFGenerator
    inputs: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        self.sampling = SamplingParams(
            config.max_completion_length, config.temperature, config.top_p, config.top_k
        )
        self.of_row = {prompt.row["row"]: prompt for prompt in self.prompts}
        texts = [[prompt.row["row"], prompt.text] for prompt in self.prompts]
        self.inputs = {
            "model": {
                "path": config.model,
                "weights_sha256": weights_sha256(self.policy.model),
                "dtype": config.dtype,
                "end_ids": list(self.policy.eos_ids),
            },
            "prompts": {"sha256": fingerprint(texts), "template": config.prompt_template},
            "sampling": {
                "num_samples": config.num_samples,
                "temperature": config.temperature,
                "top_p": config.top_p,
                "top_k": config.top_k,
                "max_completion_length": config.max_completion_length,
                "seed": config.seed,
            },
        }
        self._identity = identity(self.inputs)

    @classmethod
    def load(cls, config: PreferencesConfig, rows: list[Row]) -> Sampler:
        """Model and prompts, checked. Raises UserError."""
        policy = Policy.load(
            config.model, dtype=config.dtype, device=config.device, trainable=False
        )
        prompts = load_prompts(config, policy.tokenizer, rows)
        limit = getattr(policy.text_config, "max_position_embeddings", None)
        longest = max(len(prompt.token_ids) for prompt in prompts)
        if limit is not None and longest + config.max_completion_length > limit:
            raise UserError(
                f"--max_completion_length {config.max_completion_length}: with the longest prompt "
                f"({longest} tokens) it passes the {limit} positions of {config.model}"
            )
        generator = HFGenerator(
            policy,
            max_batch_size=config.generation_batch_size,
            max_batch_tokens=config.generation_batch_tokens,
        )
        return cls(config, policy, prompts, len(rows), generator)

    def key_of(self, cell: Cell) -> str | None:
        """All that a sample's tokens depend on; None for a cell that is not asked for."""
        prompt = self.of_row.get(cell[0])
        if prompt is None or cell[1] >= self.config.num_samples:
            return None
        return fingerprint(self._identity, prompt.token_ids, self._seed(cell))

    def _seed(self, cell: Cell) -> int:
        return derive_seed(self.config.seed, "preferences", *cell)

    def batches(self) -> Iterator[list[Cell]]:
        for batch in plan_batches(
            [len(prompt.token_ids) for prompt in self.prompts],
            self.config.num_samples,
            self.config.max_completion_length,
            max_rows=self.config.generation_batch_size,
            max_tokens=self.config.generation_batch_tokens,
        ):
            yield [(self.prompts[index].row["row"], number) for index, number in batch]

    def sample(self, samples: SampleFile, interrupt: Interrupt) -> Iterator[int]:
        """Draw what is not there yet; yields the answers of each batch, drawn or found."""
        for cells in self.batches():
            missing = [cell for cell in cells if cell not in samples.samples]
            if missing:
                with interrupt.abortable():
                    drawn = self._draw(missing)
                samples.append(drawn)
            yield len(cells)

    def _draw(self, cells: list[Cell]) -> list[SampledAnswer]:
        requests = [
            GenerationRequest(self.of_row[cell[0]].token_ids, self._seed(cell)) for cell in cells
        ]
        drawn = []
        for cell, one in zip(cells, self.generator.generate(requests, self.sampling), strict=True):
            ids = one.completion_ids[:-1] if one.finish_reason == "stop" else one.completion_ids
            text = self.policy.tokenizer.decode(ids, skip_special_tokens=False)
            drawn.append(
                SampledAnswer(
                    row=cell[0],
                    sample=cell[1],
                    seed=self._seed(cell),
                    completion=self._begun(cell[0]) + text,
                    length=len(one.completion_ids),
                    finish_reason=one.finish_reason,
                )
            )
        return drawn

    def _begun(self, row: int) -> str:
        """What the prompt made the answer begin with."""
        opened = self.of_row[row].text.rstrip().endswith("<think>")
        return self.config.response_prefix or ("<think>" if opened else "")


def dataset_input(config: PreferencesConfig, rows: list[Row]) -> dict[str, Any]:
    return {"source": config.dataset, "rows": len(rows), "sha256": rows_sha256(rows)}
