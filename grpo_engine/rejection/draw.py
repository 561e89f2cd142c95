"""Drawing: ``num_samples`` answers a prompt from each generator, verified, and appended to
``samples.jsonl`` batch by batch. A stopped run goes on with the first batch that is not there, and
ends with the same bytes as one that was not stopped."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.progress import Progress as Bar

from grpo_engine.evaluation.folder import identity
from grpo_engine.evaluation.samples import Cell, SampleFile, fingerprint, plan_batches
from grpo_engine.generation.hf import HFGenerator
from grpo_engine.interrupt import Interrupt
from grpo_engine.manifest import weights_sha256
from grpo_engine.policy import Policy
from grpo_engine.progress import say
from grpo_engine.rejection.config import SampleConfig
from grpo_engine.rejection.generators import Generator
from grpo_engine.rejection.verify import UNVERIFIED, Findings, Verifier
from grpo_engine.rewards import RewardError
from grpo_engine.types import GenerationRequest

ERRORS_COUNT_FROM = 32  # samples


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
        self.config = config
        self.source: str | None = None
        self.policy: Policy | None = None
        self.sampler: HFGenerator | None = None
        self.weights: dict[str, str] = {}

    def policy_of(self, source: str) -> Policy:
        if source != self.source:
            self.close()
            config = self.config
            self.policy = Policy.load(
                source, dtype=config.dtype, device=config.device, trainable=False
            )
            self.sampler = HFGenerator(
                self.policy,
                max_batch_size=config.generation_batch_size,
                max_batch_tokens=config.generation_batch_tokens,
            )
            self.source = source
            if source not in self.weights:
                self.weights[source] = weights_sha256(self.policy.model)
        return self.policy

    def close(self) -> None:
        if self.sampler is not None:
            self.sampler.close()
        self.source = self.policy = self.sampler = None
        gc.collect()


class Drawing:
    """The samples of a run: which they are, and the drawing of those that are not there yet."""

    def __init__(
        self,
        config: SampleConfig,
        generators: Sequence[Generator],
        left_out: set[int],
        verifier: Verifier,
        shelf: Shelf,
    ) -> None:
        self.config, self.verifier, self.shelf = config, verifier, shelf
        self.generators = {generator.name: generator for generator in generators}
        self.left_out = left_out  # rows that no answer is drawn for
        found = verifier.identity()
        self._made_by = {
            one.name: fingerprint(
                identity({"model": one.model, "verifier": found}), sampling_values(one)
            )
            for one in generators
        }
        self._references: dict[int, str] = {}
        self.whole = self.failed = 0  # answers not cut by the cap; of those not verified
        self.first_failure: str | None = None

    def key_of(self, cell: Cell) -> str | None:
        """What the tokens of a sample and the findings on it depend on."""
        name, row, sample = cell
        generator = self.generators.get(name)
        prompt = generator and generator.of_row.get(row)
        if prompt is None:
            return None
        if row not in self._references:
            self._references[row] = _reference(prompt.row)
        made = self._made_by[name], self._references[row]
        return fingerprint(made, prompt.token_ids, generator.seed(row, sample))

    def cells(self) -> Iterator[Cell]:
        """All samples of the run, by row, generator and number."""
        rows = sorted({row for one in self.generators.values() for row in one.of_row})
        for row in rows:
            for name, generator in self.generators.items():
                if row in generator.of_row and row not in self.left_out:
                    for sample in range(generator.settings.num_samples):
                        yield name, row, sample

    def batches(self, generator: Generator) -> Iterator[list[Cell]]:
        settings = generator.settings
        prompts = [one for one in generator.prompts if one.row["row"] not in self.left_out]
        if not prompts:
            return
        for batch in plan_batches(
            [len(prompt.token_ids) for prompt in prompts],
            settings.num_samples,
            settings.max_completion_length,
            max_rows=settings.generation_batch_size,
            max_tokens=settings.generation_batch_tokens,
        ):
            yield [(generator.name, prompts[place].row["row"], number) for place, number in batch]

    def run(self, samples: SampleFile, interrupt: Interrupt, bar: Bar) -> None:
        """Draw and verify what is not there yet."""
        total = sum(1 for _ in self.cells())
        task = bar.add_task("samples", total=total)
        self._count(samples.samples.values())
        for generator in self.generators.values():
            for cells in self.batches(generator):
                missing = [cell for cell in cells if cell not in samples.samples]
                if missing:
                    with interrupt.abortable():
                        drawn = self.draw(generator, missing)
                    self._count(drawn)
                    self._check_failures(total)
                    samples.append(drawn)
                bar.advance(task, len(cells))
                if missing and bar.disable:
                    say(f"{bar.tasks[0].completed:.0f} of {total} samples")

    def draw(self, generator: Generator, cells: Sequence[Cell]) -> list[Draw]:
        texts = self.generate(generator, cells)
        whole = [place for place, (_, _, reason) in enumerate(texts) if reason == "stop"]
        rows = [generator.of_row[cells[place][1]] for place in whole]
        found = self.verifier.examine(
            [prompt.row for prompt in rows],
            [prompt.text for prompt in rows],
            [texts[place][0] for place in whole],
        )
        findings = dict(zip(whole, found, strict=True))
        return [
            Draw(
                *cell,
                seed=generator.seed(*cell[1:]),
                completion=text,
                length=length,
                finish_reason=reason,
                findings=asdict(findings.get(place, Findings())),
            )
            for place, (cell, (text, length, reason)) in enumerate(zip(cells, texts, strict=True))
        ]

    def generate(self, generator: Generator, cells: Sequence[Cell]) -> list[tuple[str, int, str]]:
        """(text, tokens, finish reason) of each cell."""
        policy = self.shelf.policy_of(generator.settings.model)
        requests = [
            GenerationRequest(generator.of_row[row].token_ids, generator.seed(row, sample))
            for _, row, sample in cells
        ]
        drawn = []
        generations = self.shelf.sampler.generate(requests, generator.sampling)
        for (_, row, _), one in zip(cells, generations, strict=True):
            ids, reason = one.completion_ids, one.finish_reason
            text_ids = ids[:-1] if reason == "stop" else ids
            text = policy.tokenizer.decode(text_ids, skip_special_tokens=False)
            completion, stopped = generator.completion(row, text)
            drawn.append((completion, len(ids), "stop" if stopped else reason))
        return drawn

    def _count(self, drawn: Iterable[Draw]) -> None:
        for one in drawn:
            self.whole += not one.truncated
            self.failed += one.found.failure is not None
            self.first_failure = self.first_failure or one.found.failure

    def _check_failures(self, total: int) -> None:
        """RewardError if too large a share of the whole answers so far could not be verified."""
        allowed = self.config.max_reward_error_rate
        if self.whole >= min(ERRORS_COUNT_FROM, total) and self.failed > allowed * self.whole:
            raise RewardError(
                f"{self.failed} of {self.whole} answers could not be verified, more than "
                f"max_reward_error_rate={allowed:g} allows; the first failure: "
                f"{self.first_failure}"
            )

    def verdict_of(self, draw: Draw) -> str:
        return UNVERIFIED if draw.truncated else draw.found.verdict(self.config.min_reward)


def sampling_values(generator: Generator) -> dict[str, Any]:
    one = generator.settings
    return {
        "temperature": one.temperature,
        "top_p": one.top_p,
        "top_k": one.top_k,
        "max_completion_length": one.max_completion_length,
        "stop": generator.stop,
        "seed": one.seed,
    }


def _reference(row: dict[str, Any]) -> str:
    """What the verdict on a row depends on beside the answer."""
    return fingerprint({name: repr(value) for name, value in sorted(row.items())})
