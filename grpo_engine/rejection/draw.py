"""Drawing: ``num_samples`` answers a prompt from each generator, verified, and appended to
``samples.jsonl`` batch by batch. A stopped run goes on with the first batch that is not there, and
ends with the same bytes as one that was not stopped."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.progress import Progress as Bar

from grpo_engine.interrupt import Interrupt
from grpo_engine.rejection.config import SampleConfig
from grpo_engine.rejection.generators import Generator
from grpo_engine.rejection.verify import UNVERIFIED, Findings, Verifier
from grpo_engine.sampling.folder import identity
from grpo_engine.sampling.model import Drawn, SamplingModel
from grpo_engine.sampling.run import Count, ErrorBudget
from grpo_engine.sampling.samples import Cell, SampleFile, fingerprint
from grpo_engine.sampling.series import draw_missing


@dataclass(frozen=True)
class Draw:
    """One answer, with what the verifier found. A truncated one is not verified."""

    generator: str
    row: int
    sample: int
    seed: int
    completion: str  # whole, what the prompt made it begin with included
    length: int  # tokens drawn, the end-of-sequence one included
    finish_reason: str
    findings: dict[str, Any]

    @property
    def cell(self) -> Cell:
        return self.generator, self.row, self.sample

    @property
    def found(self) -> Findings:
        return Findings(**self.findings)

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


class Shelf:
    """The models of a run, one in memory at a time."""

    def __init__(self, config: SampleConfig) -> None:
        caps: dict[str, int] = {}  # the longest answer that is drawn from each
        for _, one in config.resolved_generators():
            caps[one.model] = max(one.max_completion_length, caps.get(one.model, 0))
        self._configs = {
            source: config.model_copy(update={"max_completion_length": cap})
            for source, cap in caps.items()
        }
        self._model: SamplingModel | None = None

    def model_of(self, source: str) -> SamplingModel:
        if self._model is None or source != self._model.source:
            self.close()
            self._model = SamplingModel(source, self._configs[source])
        return self._model

    def close(self) -> None:
        if self._model is not None:
            self._model.close()
        self._model = None
        gc.collect()


class Drawing:
    """The samples of a run: which they are, and the drawing of those that are not there yet."""

    def __init__(
        self,
        config: SampleConfig,
        generators: Sequence[Generator],
        verifier: Verifier,
        shelf: Shelf,
    ) -> None:
        self.config, self.verifier, self.shelf = config, verifier, shelf
        self.generators = {generator.name: generator for generator in generators}
        found = verifier.identity()
        self._made_by = {
            one.name: fingerprint(identity({"model": one.model, "verifier": found}), one.inputs())
            for one in generators
        }
        self._references: dict[int, str] = {}
        self.errors = ErrorBudget(  # answers cut by the cap do not count
            "max_reward_error_rate", config.max_reward_error_rate, "answers could not be verified"
        )

    def key_of(self, cell: Cell) -> str | None:
        """What the tokens of a sample and the findings on it depend on."""
        generator = self.generators.get(cell[0])
        prompt = generator and generator.of_row.get(cell[1])
        if prompt is None:
            return None
        if cell[1] not in self._references:
            self._references[cell[1]] = _reference(prompt.row)
        return generator.key(cell, [self._made_by[cell[0]], self._references[cell[1]]])

    def cells(self) -> Iterator[Cell]:
        """All samples of the run, by row, generator and number."""
        for row in self.rows():
            yield from self.cells_of(row)

    def rows(self) -> list[int]:
        """The rows that answers are drawn for."""
        return sorted(
            {
                row
                for one in self.generators.values()
                for row in one.of_row
                if row not in one.left_out
            }
        )

    def cells_of(self, row: int) -> Iterator[Cell]:
        for generator in self.generators.values():
            if row in generator.of_row and row not in generator.left_out:
                for sample in range(generator.config.num_samples):
                    yield generator.cell(row, sample)

    def run(self, samples: SampleFile, interrupt: Interrupt, bar: Bar) -> None:
        """Draw and verify what is not there yet."""
        total = sum(1 for _ in self.cells())
        count = Count(bar, "samples", total)
        self._count(samples.samples.values())
        for generator in self.generators.values():

            def make(cells: list[Cell], generator: Generator = generator) -> list[Draw]:
                drawn = self.draw(generator, cells)
                self._count(drawn)
                self.errors.check(total)
                return drawn

            for cells, drawn in draw_missing(generator, samples, make, interrupt):
                count.advance(cells, quiet=not drawn)

    def draw(self, generator: Generator, cells: Sequence[Cell]) -> list[Draw]:
        texts = self.generate(generator, cells)
        whole = [place for place, (_, _, reason) in enumerate(texts) if reason == "stop"]
        prompts = [generator.prompt(cells[place]) for place in whole]
        found = self.verifier.examine(
            [prompt.row for prompt in prompts],
            [prompt.text for prompt in prompts],
            [texts[place][0] for place in whole],
        )
        findings = dict(zip(whole, found, strict=True))
        return [
            Draw(
                *cell,
                seed=generator.seed(cell),
                completion=text,
                length=length,
                finish_reason=reason,
                findings=asdict(findings.get(place, Findings())),
            )
            for place, (cell, (text, length, reason)) in enumerate(zip(cells, texts, strict=True))
        ]

    def generate(self, generator: Generator, cells: Sequence[Cell]) -> list[Drawn]:
        drawn = self.shelf.model_of(generator.config.model).draw(generator, cells)
        return [generator.whole(cell, one) for cell, one in zip(cells, drawn, strict=True)]

    def _count(self, drawn: Iterable[Draw]) -> None:
        for one in drawn:
            failure = one.found.failure
            self.errors.add(not one.truncated, failure is not None, failure)

    def verdict_of(self, draw: Draw) -> str:
        return UNVERIFIED if draw.truncated else draw.found.verdict(self.config.min_reward)


def _reference(row: dict[str, Any]) -> str:
    """What the verdict on a row depends on beside the answer."""
    return fingerprint({name: repr(value) for name, value in sorted(row.items())})
