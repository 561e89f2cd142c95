"""What the loops ask of a sampler, whichever engine draws the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from grpo_engine.types import (
    Generation,
    GenerationRequest,
    GeneratorError,
    SamplingParams,
    UserError,
)

__all__ = ["Generator", "GeneratorError", "OnBatch", "check_requests"]

# Called with the indices of some requests and their completions, as soon as these are drawn.
OnBatch = Callable[[Sequence[int], Sequence[Generation]], None]


class Generator(Protocol):
    """Token ids in, token ids out: nothing is decoded and tokenised again on the way."""

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParams,
        *,
        on_batch: OnBatch | None = None,
    ) -> list[Generation]:
        """Draw one completion per request, in the order of the requests.

        ``on_batch`` is told of each request once, in any order.

        A request's tokens depend on its prompt, its seed, the sampling parameters and the weights,
        not on the other requests (up to rounding in batched matrix products). Where
        ``sampling.return_support`` is set and its top-p or top-k cut, each comes with its support.
        Raises UserError for an empty prompt or one that leaves no room for the completion, and
        GeneratorError where the engine died, or made no progress for as long as it may.
        """
        ...

    def sync_weights(self, version: int) -> dict[str, float]:
        """Sample from the policy's present weights from now on; ``version`` names them.

        Returns what was measured on the way (``sync/...``): nothing where there was nothing to do.
        Raises GeneratorError where the engine does not have these weights afterwards.
        """
        ...

    def close(self) -> None:
        """Free what the sampler holds. ``generate`` raises afterwards."""
        ...


def check_requests(
    requests: Sequence[GenerationRequest],
    sampling: SamplingParams,
    *,
    vocab_size: int,
    max_positions: int | None,
    whose: str = "the model's",
) -> None:
    """Refuse what no sampler can serve. Raises UserError naming the request by its index.

    Args:
        whose: has the ``max_positions``, in the message.
    """
    for i, request in enumerate(requests):
        if not request.prompt_ids:
            raise UserError(f"prompt: request {i} is empty; a prompt needs at least one token")
        low, high = min(request.prompt_ids), max(request.prompt_ids)
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise UserError(f"prompt: request {i} has token id {bad}, the vocabulary {vocab_size}")
        total = len(request.prompt_ids) + sampling.max_completion_length
        if max_positions is not None and total > max_positions:
            raise UserError(
                f"max_completion_length: {sampling.max_completion_length} after the "
                f"{len(request.prompt_ids)} prompt tokens of request {i} passes {whose} "
                f"{max_positions} positions"
            )
