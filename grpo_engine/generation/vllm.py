"""Sampling with vLLM, beside the policy: a second copy of the weights that must be the first one's.

``VLLMGenerator`` is the loops' ``Generator`` over an ``Engine`` and the ``WeightSync`` that brings
it the weights and proves that it has them. The engine here lives in a process of ours on the same
machine (``start_colocated``); ``vllm_server`` has the one over HTTP. vLLM itself is imported only
in that process (``vllm_worker``).

What the same seed gives: a request's tokens are drawn from its own seed, and on one machine with
one version of vLLM the same list of requests gives the same tokens again. vLLM does not promise
more. In another batch, or with other cached prefixes, the matrix products round otherwise, so that
a draw on the edge may fall to the other side; and the tokens are not those of ``HFGenerator``,
which turns a seed into a draw in another way. Only greedy tokens (``top_k=1``) can be compared.

Tested with vLLM 0.32 on the CPU. What is for GPUs alone (the choice of the device, more than one
of them, sleeping) follows vLLM's documentation and has not been run yet.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from grpo_engine.generation.base import OnBatch, check_requests
from grpo_engine.generation.engine import (
    INSTALL,
    Engine,
    LoadedWeights,
    WeightUpdate,
    support_width,
)
from grpo_engine.generation.worker import WorkerProcess
from grpo_engine.policy import Policy
from grpo_engine.types import (
    Generation,
    GenerationRequest,
    GeneratorError,
    SamplingParams,
    UserError,
)

NAME = "the vLLM engine"


@dataclass(frozen=True)
class VLLMOptions:
    """How the engine is started. UserError for what cannot be.

    Args:
        gpu_memory_utilization: share of the GPU's memory for weights and cache; on a CPU the most
            that the cache may take of the machine's.
        max_model_len: most tokens of a prompt and its completion; None = the model's positions.
        max_num_seqs: requests decoded together.
        dtype: the engine's; None = the policy's.
        enable_sleep: give the device's memory back between ``generate`` and the next sync. The
            weights wait in host memory meanwhile (vLLM's level 1).
        lora_rank: of the adapter that requests will carry; 0 = none.
        timeout_s: without any progress, after which the engine counts as hung.
        start_timeout_s: for importing vLLM and making the model.
        log_path: what the engine says is appended there; None: a temporary file.
    """

    gpu_memory_utilization: float = 0.3
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    max_num_seqs: int = 256
    dtype: torch.dtype | None = None
    enable_sleep: bool = False
    lora_rank: int = 0
    timeout_s: float = 600.0
    start_timeout_s: float = 900.0
    log_path: Path | None = None

    def __post_init__(self) -> None:
        if not 0 < self.gpu_memory_utilization <= 1:
            raise UserError(
                f"vllm_gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}"
            )
        for name in ("tensor_parallel_size", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("timeout_s", "start_timeout_s"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be > 0, got {getattr(self, name)}")


class Sync(Protocol):
    """What ``weight_sync.WeightSync`` does for the generator."""

    notes: Sequence[str]  # what the engines so far did without, a sentence each

    def sync(self, engine: Engine, version: int) -> dict[str, float]: ...

    def close(self) -> None: ...


class VLLMGenerator:
    """Draws completions with the weights that ``policy`` had at the last ``sync_weights``.

    Args:
        start: starts the engine; called by the first ``sync_weights``.
        sync: brings the weights over. Raises GeneratorError where the engine has others.
    """

    def __init__(self, policy: Policy, start: Callable[[], Engine], sync: Sync) -> None:
        self.policy, self.engine = policy, None
        self.weights_version: int | None = None  # None: nobody knows what the engine has
        self._start, self._sync = start, sync
        self._closed = False

    @property
    def notes(self) -> list[str]:
        """What was asked for and the engine does without, once it is there and has weights."""
        return [] if self.engine is None else [*self.engine.notes, *self._sync.notes]

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParams,
        *,
        on_batch: OnBatch | None = None,
    ) -> list[Generation]:
        """See ``Generator.generate``. Raises RuntimeError where the last ``sync_weights`` is
        missing, failed, or was interrupted."""
        self._check_open("generate()")
        if self.engine is None or self.weights_version is None:
            raise RuntimeError("generate() without a sync_weights() that went through")
        config = self.policy.text_config
        positions = getattr(config, "max_position_embeddings", None)
        limit = self.engine.max_model_len
        check_requests(
            requests,
            sampling,
            vocab_size=config.vocab_size,
            max_positions=limit if positions is None else min(limit, positions),
            whose="the engine's" if positions is None or limit < positions else "the model's",
        )
        support_width(sampling, config.vocab_size)
        if not requests:
            return []
        self.engine.wake()
        drawn = self.engine.generate(requests, sampling, on_batch=on_batch)
        self.engine.sleep()
        return drawn

    def sync_weights(self, version: int) -> dict[str, float]:
        """See ``Generator.sync_weights``; starts the engine the first time. The version that it
        already has is not sent again."""
        self._check_open("sync_weights()")
        known = self.weights_version
        if known is not None and version < known:
            raise ValueError(f"version must not fall: {version} after {known}")
        if version == known:
            return {}
        self.weights_version = None  # until it is through, whatever it ends with
        if self.engine is None:
            self.engine = self._start()
        self.engine.wake()
        measured = self._sync.sync(self.engine, version)
        self.weights_version = version
        return measured

    def close(self) -> None:
        """End the engine. Safe to call twice."""
        self._closed, self.weights_version = True, None
        engine, self.engine = self.engine, None
        try:
            if engine is not None:
                engine.close()
        finally:
            self._sync.close()

    def _check_open(self, what: str) -> None:
        if self._closed:
            raise RuntimeError(f"{what} after close()")


class ColocatedVLLM:
    """An ``Engine`` in a process of ours; see ``start_colocated``."""

    def __init__(self, worker: WorkerProcess, facts: dict[str, Any], options: VLLMOptions) -> None:
        self.dtype: torch.dtype = getattr(torch, facts["dtype"])
        self.fp32_products: torch.dtype = facts["fp32_products"]
        self.max_model_len: int = facts["max_model_len"]
        self.version: str = facts["version"]  # vLLM's
        self.notes: Sequence[str] = facts["notes"]
        self.worker = worker
        self._memory: Sequence[str] = facts["memory"]
        self._sleeps: bool = facts["sleeps"]
        self._asleep = False
        self._timeout_s = options.timeout_s

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParams,
        *,
        on_batch: OnBatch | None = None,
    ) -> list[Generation]:
        results: list[Generation | None] = [None] * len(requests)

        def take(drawn: list[tuple[int, Generation]]) -> None:
            for i, generation in drawn:
                results[i] = generation
            if drawn and on_batch is not None:
                on_batch([i for i, _ in drawn], [generation for _, generation in drawn])

        self._call("generate", (list(requests), sampling), take)
        if None in results:
            raise GeneratorError(f"{NAME} left {results.count(None)} of {len(results)} out")
        return results

    def update_weights(self, update: WeightUpdate) -> LoadedWeights:
        return self._call("update_weights", update)

    def sleep(self) -> None:
        if self._sleeps and not self._asleep:
            self._call("sleep")
            self._asleep = True

    def wake(self) -> None:
        if self._asleep:
            self._call("wake")
            self._asleep = False

    def close(self) -> None:
        self.worker.close()
        for path in self._memory:  # of ranks that were killed
            Path(path).unlink(missing_ok=True)

    def _call(
        self, method: str, argument: Any = None, on_message: Callable[[Any], None] | None = None
    ) -> Any:
        return self.worker.call(
            method,
            argument,
            timeout_s=self._timeout_s,
            timeout_name="generation_timeout",
            on_message=on_message,
        )


def start_colocated(policy: Policy, options: VLLMOptions) -> ColocatedVLLM:
    """Start vLLM for the model of ``policy``, without any of its weights yet.

    Raises UserError where vLLM is not installed or refuses model or options, GeneratorError where
    it dies or hangs on the way.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f"generator 'vllm': vLLM is not installed; {INSTALL}")
    worker = WorkerProcess(
        "grpo_engine.generation.vllm_worker:VLLMWorker",
        name=NAME,
        log_path=options.log_path,
        env=_environment(policy, options),
    )
    try:
        with tempfile.TemporaryDirectory(prefix="grpo-engine-vllm-") as folder:
            _write_config(policy, folder)
            arguments = {
                "model": folder,
                "dtype": str(options.dtype or policy.dtype).removeprefix("torch."),
                "max_model_len": options.max_model_len,
                "max_num_seqs": options.max_num_seqs,
                "tensor_parallel_size": options.tensor_parallel_size,
                "gpu_memory_utilization": options.gpu_memory_utilization,
            }
            start = {
                "arguments": {name: x for name, x in arguments.items() if x is not None},
                "eos_ids": list(policy.eos_ids),
                "vocab_size": policy.text_config.vocab_size,
                "lora_rank": options.lora_rank,
                "enable_sleep": options.enable_sleep,
                "cache_bytes": _cache_bytes(policy, options),
            }
            limit = options.start_timeout_s
            facts = worker.call("start", start, timeout_s=limit, timeout_name="vllm_start_timeout")
        return ColocatedVLLM(worker, facts, options)
    except BaseException:
        worker.close(wait_s=0)  # it may be in the middle of importing vLLM
        raise


def _environment(policy: Policy, options: VLLMOptions) -> dict[str, str]:
    values = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in our worker itself, not beside it
        "VLLM_NO_USAGE_STATS": "1",  # a training run reports to nobody
        "NO_COLOR": "1",
    }
    if policy.device.type == "cuda" and options.tensor_parallel_size == 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        index = policy.device.index or 0
        values["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
    return values


def _write_config(policy: Policy, folder: str) -> None:
    """config.json alone: without weights or generation config there is nothing that could leak."""
    config = copy.deepcopy(policy.model.config)
    config.architectures = [type(policy.model).__name__]
    config.save_pretrained(folder)


def _cache_bytes(policy: Policy, options: VLLMOptions) -> int:
    """Of keys and values, if every request grew to its longest. For the CPU, where vLLM would take
    its whole share of the memory however small the model is."""
    config = policy.text_config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = torch.finfo(options.dtype or policy.dtype).bits // 8
    tokens = (options.max_model_len or config.max_position_embeddings) + 256  # whole blocks
    needed = 2 * config.num_hidden_layers * heads * width * size * tokens * options.max_num_seqs
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(needed, int(options.gpu_memory_utilization * memory))
