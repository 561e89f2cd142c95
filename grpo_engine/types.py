"""The nouns that the rooms of the engine hand to each other. A leaf: imports nothing of ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # it knows torch, which rewards do without
    from grpo_engine.support import Support

FinishReason = Literal["stop", "length"]


class UserError(Exception):
    """A mistake in the caller's input: the command line prints one line and exits with code 2.

    The message names the field and the value.
    """


class GeneratorError(Exception):
    """A sampler that died, hangs, or does not have the weights it should have: not the user's
    mistake. It ends a command with what was done saved, and exit code 1."""


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn. The sampler's distribution is softmax(logits / temperature), cut
    to the smallest set holding ``top_p`` of the mass and to the ``top_k`` likeliest ids (0 =
    all)."""

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    return_support: bool = False  # with each token the ids it was drawn from, where these are cut

    def __post_init__(self) -> None:
        if self.max_completion_length < 1:
            raise UserError(f"max_completion_length must be >= 1, got {self.max_completion_length}")
        if not self.temperature > 0:
            raise UserError(
                f"temperature must be > 0, got {self.temperature}: samples at 0 are equal, "
                "and equal samples have no advantage"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise UserError(f"top_k must be >= 0 (0 = all), got {self.top_k}")

    def truncates(self, vocab_size: int) -> bool:
        """Whether a token may be drawn from fewer ids than ``vocab_size``."""
        return self.top_p < 1 or 0 < self.top_k < vocab_size


@dataclass(frozen=True)
class GenerationRequest:
    """One completion to draw. The same seed and prompt give the same tokens whatever else is in the
    batch."""

    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Generation:
    """What the sampler returned: ids as sampled, never re-tokenised.

    ``completion_ids`` ends with the end-of-sequence id when ``finish_reason`` is "stop";
    ``sampler_logprobs[t]`` is the log-probability of ``completion_ids[t]`` under the sampler's own
    (temperature-scaled, truncated) distribution.
    """

    completion_ids: list[int]
    sampler_logprobs: list[float]
    finish_reason: FinishReason
    support: Support | None = None  # of its tokens, if asked for

    @property
    def text_ids(self) -> list[int]:
        """``completion_ids`` without the id that ended them."""
        return self.completion_ids[:-1] if self.finish_reason == "stop" else self.completion_ids


@dataclass
class Rollout:
    """One sampled answer on its way from the sampler through the rewards to the loss."""

    row: dict[str, Any]  # the data set's row, passed to rewards by column name
    prompt: str  # the text the model saw
    prompt_ids: list[int]
    completion: str
    completion_ids: list[int]
    sampler_logprobs: list[float]
    finish_reason: FinishReason
    group: int  # index of the prompt within this rollout batch
    support: Support | None = None  # the ids each token was drawn from, where top-p or top-k cut
    rewards: dict[str, float | None] = field(default_factory=dict)
    reward: float | None = None  # weighted sum; None = no reward function could score it
    advantage: float = 0.0
