"""Which answers are to be drawn: some to each of a run's prompts, each by a seed of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from grpo_engine.generation.build import generator_inputs
from grpo_engine.interrupt import Interrupt
from grpo_engine.rollouts import Prompt, derive_seed
from grpo_engine.sampling.samples import Cell, SampleFile, fingerprint, plan_batches
from grpo_engine.types import GenerationRequest, SamplingParams


class SamplingConfig(Protocol):
    """The settings that say how answers are drawn."""

    num_samples: int
    max_completion_length: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    response_prefix: str | None
    generation_batch_size: int
    generation_batch_tokens: int
    device: str
    dtype: str


@dataclass
class Series:
    """``num_samples`` answers to each of ``prompts``.

    Args:
        verb: enters every seed, so that no verb draws what another has drawn.
        prompts: their rows carry their number as ``row``.
        name: what the cells begin with, where a run has several series.
        left_out: rows that no answer is drawn for.
    """

    verb: str
    config: SamplingConfig
    prompts: list[Prompt]
    name: str | None = None
    left_out: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        one = self.config
        self.sampling = SamplingParams(
            one.max_completion_length, one.temperature, one.top_p, one.top_k
        )
        self.of_row = {prompt.row["row"]: prompt for prompt in self.prompts}

    def cell(self, row: int, sample: int) -> Cell:
        return (row, sample) if self.name is None else (self.name, row, sample)

    def prompt(self, cell: Cell) -> Prompt:
        return self.of_row[cell[-2]]

    def seed(self, cell: Cell) -> int:
        return derive_seed(self.config.seed, self.verb, *cell)

    def key(self, cell: Cell, made_from: Any) -> str | None:
        """What a sample depends on: its prompt, its seed and ``made_from`` (plain data: weights,
        sampling, ...). None for a row that is not here."""
        prompt = self.of_row.get(cell[-2])
        if prompt is None:
            return None
        return fingerprint(made_from, prompt.token_ids, self.seed(cell))

    def batches(self) -> Iterator[list[Cell]]:
        """All cells, in the batches that they are drawn and saved in."""
        config = self.config
        prompts = [one for one in self.prompts if one.row["row"] not in self.left_out]
        if not prompts:
            return
        for batch in plan_batches(
            [len(prompt.token_ids) for prompt in prompts],
            config.num_samples,
            config.max_completion_length,
            max_rows=config.generation_batch_size,
            max_tokens=config.generation_batch_tokens,
        ):
            yield [self.cell(prompts[place].row["row"], number) for place, number in batch]

    def requests(self, cells: Sequence[Cell]) -> list[GenerationRequest]:
        return [GenerationRequest(self.prompt(one).token_ids, self.seed(one)) for one in cells]

    def begun(self, cell: Cell) -> str:
        """What the prompt made the answer begin with: ``response_prefix``, or the think tag that
        some chat templates open."""
        opened = self.prompt(cell).text.rstrip().endswith("<think>")
        return self.config.response_prefix or ("<think>" if opened else "")

    def inputs(self) -> dict[str, Any]:
        """How the answers are drawn, for the manifest."""
        one = self.config
        return {
            "temperature": one.temperature,
            "top_p": one.top_p,
            "top_k": one.top_k,
            "max_completion_length": one.max_completion_length,
            "seed": one.seed,
            **generator_inputs(one),
        }

    def prompts_sha256(self) -> str:
        return fingerprint([[prompt.row["row"], prompt.text] for prompt in self.prompts])


def draw_missing(
    series: Series,
    samples: SampleFile,
    make: Callable[[list[Cell]], Sequence[Any]],
    interrupt: Interrupt,
    *,
    note: Callable[[Cell], dict[str, Any]] | None = None,
) -> Iterator[tuple[int, bool]]:
    """Keep in ``samples`` what ``make`` draws of the cells that are not there yet, batch by batch;
    ``note``: columns for the reader. Yields (cells that are there now, whether any was drawn)."""
    for cells in series.batches():
        missing = [cell for cell in cells if cell not in samples.samples]
        if missing:
            with interrupt.abortable():
                made = make(missing)
            samples.append(made, None if note is None else [note(cell) for cell in missing])
        yield len(cells), bool(missing)
