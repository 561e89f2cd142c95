"""The engine's side of a weight update, run in vLLM's own processes: the only file of the engine
that knows vLLM's weight-transfer interface. Nothing of vLLM is imported before a call asks for it.

vLLM (from 0.28) takes weights in three calls: ``start_weight_update``, which turns each layer back
into the form that checkpoints are loaded into, ``update_weights``, which asks the configured
``WeightTransferEngine`` to load them, and ``finish_weight_update``, which repacks what the layers
compute with. ``register`` makes ours known under BACKEND, in every process of vLLM, through the
entry point ``vllm.general_plugins``. Where the installed vLLM has no such calls, its workers'
``reload_weights`` is given the same weights, and LoadedWeights.method says so.

Neither drops the prefix cache, which holds keys and values of the old weights: ``WeightLoader``
does.
"""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from grpo_engine.generation.engine import LoadedWeights, WeightUpdate
from grpo_engine.generation.shared_weights import ReceivedWeights, write_adapter

BACKEND = "grpo_engine_shared_memory"


@functools.cache
def register() -> None:
    """Make BACKEND known to the vLLM in this process; nothing to do where it is too old for it."""
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError:
        return
    WeightTransferEngineFactory.register_engine(BACKEND, transfer_engine_class())


@functools.cache
def transfer_engine_class() -> type:
    """Our subclass of vLLM's ``WeightTransferEngine``."""
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    @dataclass
    class InitInfo(WeightTransferInitInfo):
        """Nothing to agree on: each update names its memory."""

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):
        """``dataclasses.asdict`` of a WeightUpdate."""

        version: int
        memory: str
        adapter: bool = False

    class SharedMemoryTransfer(WeightTransferEngine):
        """Loads a model's weights from the trainer's memory and answers there."""

        init_info_cls, update_info_cls = InitInfo, UpdateInfo

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.expected = parameter_names(self.model)  # while the model is whole
            self.finest = finest_dtype(self.model)
            self.received: ReceivedWeights | None = None
            self.unfinished = False

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            pass

        def start_weight_update(self) -> None:
            if self.unfinished:
                self._take_back()
            self.unfinished = True
            initialize_layerwise_reload(self.model)

        def _take_back(self) -> None:
            """End an update that broke off: layers would count what they were given then as part of
            the next one, and without their weights nothing could be drawn until then. Those that
            were not given all of theirs get the old ones."""
            for layer in self.model.modules():
                waiting = get_layerwise_info(layer)
                waiting.loaded_weights.clear()
                waiting.load_numel = 0
            finalize_layerwise_reload(self.model, self.model_config)
            repack_tied_heads(self.model)
            self.unfinished = False

        def receive_weights(self, update_info: UpdateInfo) -> None:
            self.shutdown()
            try:
                self.received = ReceivedWeights(update_info.memory, update_info.version)
                load_all(self.model, self.received, self.expected)
            except BaseException:
                self.shutdown()
                self._take_back()
                raise

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)
            repack_tied_heads(self.model)
            self.unfinished = False
            if self.received is not None:  # else nothing was loaded, and the trainer gets no reply
                parallel = self.parallel_config
                ranks = parallel.world_size * parallel.data_parallel_size
                first = parallel.data_parallel_index * parallel.world_size
                self.received.reply(first + parallel.rank, ranks, self.finest)
            self.shutdown()

        def shutdown(self) -> None:
            if self.received is not None:
                self.received.close()
            self.received = None

    return SharedMemoryTransfer


def parameter_names(model: Any) -> set[str]:
    """What the model must be given, under the names that ``load_weights`` returns."""
    return {name.replace(".base_layer.", ".") for name, _ in model.named_parameters()}


def finest_dtype(model: Any) -> torch.dtype:
    """Of the model's parameters: where it is finer than that of the rest (the norms, a router's
    bias), weights that were rounded for the rest are not all that it could hold."""
    floating = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max(floating, key=lambda dtype: torch.finfo(dtype).bits)


def load_all(model: Any, received: ReceivedWeights, expected: set[str]) -> None:
    """``model.load_weights``, and the check that vLLM makes of a checkpoint but not of an update:
    every parameter was in it. Raises RuntimeError, also for what a layer cannot take."""
    given = "no tensor"

    def named() -> Iterator[tuple[str, Any]]:
        nonlocal given
        for name, tensor in received:
            given = f"{name} {tuple(tensor.shape)}"
            yield name, tensor

    try:
        loaded = model.load_weights(named())
    except Exception as error:  # vLLM's loaders assert, without words
        raise RuntimeError(
            f"{given} of version {received.version} does not fit the model: "
            f"{type(error).__name__}: {error}"
        ) from error
    missing = sorted(expected - loaded) if loaded is not None else []
    if missing:
        raise RuntimeError(
            f"the update to version {received.version} has nothing for {len(missing)} of the "
            f"model's {len(expected)} parameters, such as {', '.join(missing[:3])}"
        )


def repack_tied_heads(model: Any) -> None:
    """Have each LM head that is the embedding matrix repacked from it.

    vLLM (0.32) does so when it starts, but an update loads the embedding alone: on a CPU the head
    would go on multiplying by its packed copy of the old weights, without a word.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    modules = list(model.modules())
    embeddings = {
        id(module.weight)
        for module in modules
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    }
    for module in modules:
        if isinstance(module, ParallelLMHead) and id(module.weight) in embeddings:
            module.quant_method.process_weights_after_loading(module)


def reload_in_worker(worker: Any, memory: str, version: int) -> None:
    """The same by a worker's ``reload_weights``, for a vLLM without the three calls."""
    received = ReceivedWeights(memory, version)
    try:
        worker.reload_weights(weights_iterator=iter(received))
        model = worker.model_runner.get_model()
        repack_tied_heads(model)
        received.reply(worker.rank, worker.parallel_config.world_size, finest_dtype(model))
    finally:
        received.close()


class WeightLoader:
    """Loads what the trainer published into the ``vllm.LLM`` of this process.

    ``lora_request`` is what every request is to carry from then on: None, or the latest adapter.
    Raises RuntimeError where this vLLM cannot be given weights at all.
    """

    def __init__(self, llm: Any) -> None:
        self.llm, self.lora_request = llm, None
        self.native = hasattr(llm, "start_weight_update") and hasattr(llm, "get_weight_version")
        self._adapters = 0
        if self.native:
            llm.init_weight_transfer_engine({"init_info": {}})
        elif not _reloads_from_memory():
            raise RuntimeError(
                "this vLLM cannot be given new weights: it has neither start_weight_update (from "
                "0.28 on) nor reload_weights(weights_iterator=...)"
            )

    def load(self, update: WeightUpdate) -> LoadedWeights:
        """Between generations only. Whatever fails raises, and leaves an engine without weights."""
        if update.adapter:
            loaded = self._load_adapter(update)
        elif self.native:
            self.llm.start_weight_update()
            self.llm.update_weights({"update_info": asdict(update)})
            self.llm.finish_weight_update(weight_version=str(update.version))
            loaded = LoadedWeights(int(self.llm.get_weight_version()))
        else:
            self.llm.collective_rpc(reload_in_worker, args=(update.memory, update.version))
            loaded = LoadedWeights(update.version, "reload_weights")
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache of the old weights could not be dropped")
        return loaded

    def _load_adapter(self, update: WeightUpdate) -> LoadedWeights:
        """A new adapter in place of the last one. vLLM reads adapters from files only: these exist
        while it does."""
        from vllm.lora.request import LoRARequest

        received = ReceivedWeights(update.memory, update.version)
        try:
            self._adapters += 1  # vLLM keeps adapters by number and cached prefixes by name
            name = f"version-{update.version}-{self._adapters}"
            with tempfile.TemporaryDirectory(prefix="grpo-engine-adapter-") as folder:
                write_adapter(received, Path(folder))
                request = LoRARequest(name, self._adapters, folder)
                if not self.llm.llm_engine.add_lora(request):
                    raise RuntimeError(f"vLLM did not take the adapter of version {update.version}")
            if self.lora_request is not None:
                self.llm.llm_engine.remove_lora(self.lora_request.lora_int_id)
            self.lora_request = request
            received.reply()
        finally:
            received.close()
        return LoadedWeights(update.version, "lora")


def _reloads_from_memory() -> bool:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    method = getattr(GPUModelRunner, "reload_weights", None)
    return method is not None and "weights_iterator" in inspect.signature(method).parameters
