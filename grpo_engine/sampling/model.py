"""A frozen model and its sampler."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from grpo_engine.generation.base import Generator
from grpo_engine.generation.build import check_generator, open_generator
from grpo_engine.manifest import weights_sha256
from grpo_engine.policy import Policy
from grpo_engine.progress import say
from grpo_engine.sampling.samples import Cell
from grpo_engine.sampling.series import SamplingConfig, Series
from grpo_engine.types import UserError


class Drawn(NamedTuple):
    """One completion: ``text`` is without the token that ended it, ``length`` counts that too."""

    text: str
    length: int
    finish_reason: str


class SamplingModel:
    """``source`` loaded as ``config`` has it. Its sampler is opened by the first draw: a dry run
    opens none. Raises UserError for a model that cannot be loaded or sampled from."""

    def __init__(self, source: str, config: SamplingConfig) -> None:
        self.source, self.config = source, config
        self.policy = Policy.load(source, dtype=config.dtype, device=config.device, trainable=False)
        check_generator(config, self.policy)
        self.weights_sha256 = weights_sha256(self.policy.model)
        self._generator: Generator | None = None
        self._open = ExitStack()

    def inputs(self) -> dict[str, Any]:
        """What of the model the tokens depend on, and where it was found."""
        return {
            "path": self.source,
            "weights_sha256": self.weights_sha256,
            "dtype": self.config.dtype,
            "end_ids": list(self.policy.eos_ids),
        }

    def check_positions(self, series: Series) -> None:
        """UserError where the longest prompt and its completion pass the model's positions."""
        limit = getattr(self.policy.text_config, "max_position_embeddings", None)
        longest = max(len(prompt.token_ids) for prompt in series.prompts)
        cap = series.config.max_completion_length
        if limit is not None and longest + cap > limit:
            raise UserError(
                f"--max_completion_length {cap}: with the longest prompt ({longest} tokens) it "
                f"passes the {limit} positions of {self.source}"
            )

    def draw(self, series: Series, cells: Sequence[Cell]) -> list[Drawn]:
        """The completion of each cell."""
        if self._generator is None:
            self._generator = self._open.enter_context(open_generator(self.config, self.policy))
            self._generator.sync_weights(0)
            for note in getattr(self._generator, "notes", ()):
                say(note)
        made = self._generator.generate(series.requests(cells), series.sampling)
        decode = self.policy.tokenizer.decode
        return [
            Drawn(
                decode(one.text_ids, skip_special_tokens=False),
                len(one.completion_ids),
                one.finish_reason,
            )
            for one in made
        ]

    def close(self) -> None:
        self._generator = None
        self._open.close()
