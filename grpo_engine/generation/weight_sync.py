"""Bringing the trainer's weights into a vLLM engine, and proving that they are there.

A sync publishes the weights in shared memory (``shared_weights.py``), has the engine load them by
its own weight-transfer interface (``vllm_transfer.py``), and then believes nothing: the engine's
version must be the one that was sent; each of its ranks must have read every tensor, with the
checksum that the policy's own tensor has; and its log-probs must be the trainer's (``canary.py``).
Anything else raises GeneratorError, which ends the run: an engine that samples from other weights
trains something else, without a trace in the loss.

Weights go in the dtype that the engine computes in, to which it would round them anyway. Where it
says that it keeps some in a finer one (the bias of a router, a state-space model's decay), they all
go as the trainer has them, and it rounds the others itself.

With LoRA the base weights are sent once to an engine, then the adapter alone; vLLM applies it as it
is. Nothing is merged: bf16 weights would lose most of a small adapter.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from grpo_engine.generation.canary import Canary
from grpo_engine.generation.engine import Engine, WeightUpdate
from grpo_engine.generation.shared_weights import PublishedWeights, Reply
from grpo_engine.lora import base_tensors
from grpo_engine.policy import Policy
from grpo_engine.types import GeneratorError

NO_TRANSFER = (
    "vLLM: this version has no interface for new weights; it reloads them from shared memory "
    "(reload_weights)"
)
NO_REPLY = (
    "vLLM: the server cannot say what it has read of an adapter; only the log-probs of fixed "
    "prompts prove that it has the right one"
)


class WeightSync:
    """Sends ``policy``'s weights to an engine; made anew for each engine."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.canary = Canary(policy)
        self.method: str | None = None  # how the engine loaded them: LoadedWeights.method
        self.notes: list[str] = []  # of what stood in for the usual way, once each
        self._base_sent = False
        self._as_they_are = False  # the engine keeps some weights in a finer dtype than its own

    def sync(self, engine: Engine, version: int) -> dict[str, float]:
        """The policy's present weights, as ``version``, into ``engine``; returns metrics.

        Raises GeneratorError where the engine does not hold exactly these weights afterwards.
        """
        start, adapter = time.perf_counter(), self.policy.adapter
        if adapter is None:
            sent = self._send(engine, version, checkpoint_weights(self.policy))
        else:
            base_sent = self._base_sent
            sent = 0 if base_sent else self._send(engine, version, checkpoint_weights(self.policy))
            self._base_sent = True
            tensors, config = adapter.file_tensors(), _adapter_config(self.policy)
            sent += self._send(engine, version, tensors, adapter_config=config)
        loaded = time.perf_counter()
        seen = self.canary.check(engine, version)
        row = {"sync/seconds": loaded - start, "sync/bytes": float(sent)}
        return row | {"sync/canary_seconds": time.perf_counter() - loaded} | seen

    def close(self) -> None:
        """Forget what the engine holds: the next sync is a first one."""
        self.canary.anchor, self._base_sent, self._as_they_are = None, False, False

    def _send(
        self,
        engine: Engine,
        version: int,
        tensors: Mapping[str, Tensor],
        *,
        adapter_config: str | None = None,
    ) -> int:
        """Publish, have the engine load, compare what it answers. Returns the bytes sent."""
        is_adapter = adapter_config is not None
        # An adapter keeps its fp32: vLLM rounds it where it must, on its way into the product.
        dtype = None if is_adapter or self._as_they_are else engine.dtype
        published = PublishedWeights(tensors, version, dtype=dtype, adapter_config=adapter_config)
        try:
            loaded = engine.update_weights(WeightUpdate(version, published.path, is_adapter))
            self.method = loaded.method
            if loaded.version != version:
                raise GeneratorError(
                    f"weights: version {version} was sent, the engine reports {loaded.version}"
                )
            if loaded.method == "reload_weights":
                self._note(NO_TRANSFER)
            replies = published.replies() if loaded.replied else []
            if loaded.replied:
                require_same(published, replies)
            else:
                self._note(NO_REPLY)
        finally:
            published.close()
        if published.rounded and any(_is_finer(reply.finest, engine.dtype) for reply in replies):
            self._as_they_are = True
            return published.nbytes + self._send(engine, version, tensors)
        return published.nbytes

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)


def require_same(published: PublishedWeights, replies: list[Reply]) -> None:
    """Raise GeneratorError unless every rank has read just what was published."""
    version = published.version
    if not replies:
        raise GeneratorError(
            f"weights: version {version} was sent, but the engine does not say that it loaded it"
        )
    ranks = replies[0].ranks
    if [reply.rank for reply in replies] != list(range(ranks)):
        raise GeneratorError(
            f"weights: version {version} was sent, but only ranks "
            f"{[reply.rank for reply in replies]} of the engine's {ranks} say that they loaded it"
        )
    for reply in replies:
        if reply.version != version:
            raise GeneratorError(
                f"weights: version {version} was sent, rank {reply.rank} loaded {reply.version}"
            )
        missing = sorted(published.checksums.keys() - reply.checksums.keys())
        if missing:
            raise GeneratorError(
                f"weights: rank {reply.rank} of the engine did not load {_some(missing)} of "
                f"version {version}"
            )
        changed = [n for n, c in published.checksums.items() if reply.checksums[n] != c]
        if changed or len(reply.checksums) > len(published.checksums):
            odd = changed or sorted(reply.checksums.keys() - published.checksums.keys())
            raise GeneratorError(
                f"weights: rank {reply.rank} of the engine loaded other bytes of {_some(odd)} than "
                f"the trainer has at version {version}"
            )


def checkpoint_weights(policy: Policy) -> dict[str, Tensor]:
    """The policy's live tensors under the names of a checkpoint of its class, each once: tied ones
    under one name, adapters left out."""
    model = policy.model
    named = dict(base_tensors(model.named_parameters()))
    buffers = {name for name, _ in base_tensors(model.named_buffers())}
    saved = dict(base_tensors(model.state_dict().items()))
    named |= {name: tensor for name, tensor in saved.items() if name in buffers}
    try:  # from transformers 5 on a model may hold its weights in another form than its files
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return named
    return revert_weight_conversion(model, named)


def _adapter_config(policy: Policy) -> str:
    """The text of peft's adapter_config.json."""
    with tempfile.TemporaryDirectory() as folder:
        policy.adapter.config.save_pretrained(folder)
        return (Path(folder) / "adapter_config.json").read_text()


def _is_finer(name: str | None, dtype: torch.dtype) -> bool:
    return name is not None and torch.finfo(getattr(torch, name)).bits > torch.finfo(dtype).bits


def _some(names: list[str]) -> str:
    """The first two names, and how many there are."""
    shown = ", ".join(names[:2])
    return shown if len(names) <= 2 else f"{shown} and {len(names) - 2} more tensors"
