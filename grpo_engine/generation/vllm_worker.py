"""The process that holds vLLM (``vllm.start_colocated``), and the only one of ours that imports it.

It drives the engine itself, step by step, rather than through ``LLM.generate``: so that a finished
completion is handed over, and scored, while others are still drawn, and an aborted call ends
within a step.

What a sampler must not do here is to be cleverer than the trainer's distribution: no tokenizer, no
weights and no generation_config of a checkpoint are read (``load_format="dummy"``: every weight
comes from the trainer, and one that did not would be noise, which the canary hears); the end ids
are the policy's, whatever config.json says; and log-probs are those of the processed distribution,
after temperature, top-k and top-p.
"""

from __future__ import annotations

import inspect
import math
import multiprocessing
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from grpo_engine.generation import vllm_transfer
from grpo_engine.generation.engine import (
    INSTALL,
    LoadedWeights,
    WeightUpdate,
    fp32_products,
    support_of,
    support_width,
)
from grpo_engine.generation.worker import Call
from grpo_engine.types import Generation, GenerationRequest, SamplingParams, UserError

PROGRESS_S = 1.0  # between signs that tokens are made while nothing finishes
CPU_BLOCK = 32  # tokens of a cache block; vLLM's own default there is 128, few prompts fill it
NO_SLEEP = (
    "vllm_enable_sleep_mode: vLLM has no sleep mode on this platform; the engine keeps its memory"
)


class VLLMWorker:
    """Serves ``vllm.ColocatedVLLM``."""

    def start(self, call: Call, options: dict[str, Any]) -> dict[str, Any]:
        """Make the engine. Raises UserError where vLLM refuses the model or an option."""
        try:
            import vllm
            from vllm import LLM, envs  # vllm itself loads the rest when first asked for it
            from vllm.platforms import current_platform
        except (ImportError, RuntimeError, AttributeError) as error:
            raise UserError(
                f"generator 'vllm': vLLM cannot be imported: {_in_one_line(error)} ({INSTALL})"
            ) from error

        vllm_transfer.register()
        self.eos_ids, self.vocab_size = options["eos_ids"], options["vocab_size"]
        on_cpu = current_platform.is_cpu()
        sleeps = options["enable_sleep"] and not on_cpu
        arguments = engine_arguments(options, on_cpu=on_cpu, sleeps=sleeps)
        try:
            self.llm = LLM(**arguments)
        except (ValueError, NotImplementedError) as error:
            raise UserError(
                f"generator 'vllm': vLLM {vllm.__version__} refuses this model or an option: "
                f"{_in_one_line(error)}"
            ) from error
        self.loader = vllm_transfer.WeightLoader(self.llm)
        config = self.llm.llm_engine.vllm_config.model_config
        precision = getattr(envs, "VLLM_FLOAT32_MATMUL_PRECISION", "highest")  # not in older ones
        return {
            "version": vllm.__version__,
            "dtype": str(config.dtype).removeprefix("torch."),
            "fp32_products": fp32_products(precision, on_cpu=on_cpu),
            "max_model_len": config.max_model_len,
            "sleeps": sleeps,
            "memory": untracked_memory(),
            "notes": [NO_SLEEP] if options["enable_sleep"] and not sleeps else [],
        }

    def generate(self, call: Call, work: tuple[list[GenerationRequest], SamplingParams]) -> None:
        """Send ``[(index, Generation), ...]`` as they finish, and [] now and then meanwhile: only
        when tokens were made, for an engine that steps without any hangs all the same."""
        requests, sampling = work
        engine, width = self.llm.llm_engine, support_width(sampling, self.vocab_size)
        index = {f"{call.number}-{i}": i for i in range(len(requests))}
        for name, i in index.items():
            engine.add_request(
                name,
                {"type": "token", "prompt_token_ids": requests[i].prompt_ids},
                sampling_params(sampling, requests[i].seed, self.eos_ids, width),
                lora_request=self.loader.lora_request,
            )
        last_sign = time.monotonic()
        while engine.has_unfinished_requests():
            if call.cancelled:
                engine.abort_request(list(index))
                return
            advanced = engine.step()  # those with new tokens
            drawn = [
                (index.pop(output.request_id), generation_of(output.outputs[0], width > 0))
                for output in advanced
                if output.finished
            ]
            if drawn or (advanced and time.monotonic() - last_sign > PROGRESS_S):
                call.send(drawn)
                last_sign = time.monotonic()

    def update_weights(self, call: Call, update: WeightUpdate) -> LoadedWeights:
        return self.loader.load(update)

    def sleep(self, call: Call, argument: None) -> None:
        self.llm.sleep(level=1)

    def wake(self, call: Call, argument: None) -> None:
        self.llm.wake_up()

    def close(self) -> None:
        if hasattr(self, "llm"):
            self.llm.llm_engine.engine_core.shutdown()


def untracked_memory() -> list[str]:
    """The files in /dev/shm through which ranks on a CPU talk: vLLM's C++ makes them, so no
    resource tracker knows them, and removes them in an orderly end alone."""
    found: set[str] = set()
    for rank in multiprocessing.active_children():
        maps = Path(f"/proc/{rank.pid}/maps").read_text(encoding="utf-8")
        found |= set(re.findall(r" (/dev/shm/\S*cpushm\S*)$", maps, re.MULTILINE))
    return sorted(found)


def engine_arguments(options: dict[str, Any], *, on_cpu: bool, sleeps: bool) -> dict[str, Any]:
    """The keyword arguments of ``vllm.LLM``."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = {
        **options["arguments"],
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "generation_config": "vllm",  # its own defaults, not a checkpoint's
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": -1,
        "seed": 0,
    }
    if "weight_transfer_config" in inspect.signature(EngineArgs).parameters:
        arguments["weight_transfer_config"] = {"backend": vllm_transfer.BACKEND}
    if options["lora_rank"]:
        rank = lora_rank_of(options["lora_rank"])
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
    if sleeps:
        arguments["enable_sleep_mode"] = True
    if on_cpu:
        arguments |= {
            "enforce_eager": True,  # compiling takes minutes
            "block_size": CPU_BLOCK,
            "kv_cache_memory_bytes": options["cache_bytes"],
        }
    return arguments


def lora_rank_of(rank: int) -> int:
    """The least that vLLM makes room for and ``rank`` fits in. Raises UserError where none does."""
    from vllm.config.lora import MaxLoRARanks

    ranks = sorted(get_args(MaxLoRARanks))
    if rank > ranks[-1]:
        raise UserError(f"lora_r: vLLM serves adapters of rank {ranks[-1]} at most, got {rank}")
    return next(one for one in ranks if one >= rank)


def sampling_params(sampling: SamplingParams, seed: int, eos_ids: Sequence[int], width: int) -> Any:
    """``sampling`` in vLLM's words. With ignore_eos the ends are ``eos_ids`` alone; cumulative, so
    that each step tells which requests got a token."""
    from vllm.sampling_params import RequestOutputKind
    from vllm.sampling_params import SamplingParams as Params

    return Params(
        max_tokens=sampling.max_completion_length,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=seed,
        stop_token_ids=list(eos_ids),
        ignore_eos=True,
        logprobs=width,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.CUMULATIVE,
    )


def generation_of(output: Any, with_support: bool) -> Generation:
    """A vLLM ``CompletionOutput`` with ``FlatLogprobs``, whose every position begins with the
    token that was drawn. Raises RuntimeError for anything else, ValueError as ``support_of``."""
    ids, flat = list(output.token_ids), output.logprobs
    starts = flat.start_indices
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a request with {output.finish_reason!r}")
    if [flat.token_ids[start] for start in starts] != ids:
        raise RuntimeError("vLLM's log-probs are of other tokens than it returned")
    logprobs = [flat.logprobs[start] for start in starts]
    if not all(map(math.isfinite, logprobs)):
        raise RuntimeError("the log-prob of a token that was drawn is not finite")
    support = None
    if with_support:
        entries = list(zip(flat.token_ids, flat.logprobs, strict=True))
        spans = zip(starts, flat.end_indices, strict=True)
        support = support_of(entries[start + 1 : end] for start, end in spans)
    return Generation(ids, logprobs, output.finish_reason, support)


def _in_one_line(error: Exception) -> str:
    """Pydantic's errors are tables: the first row, with the field's name where there is one."""
    found = getattr(error, "errors", None)
    if callable(found):
        first = found()[0]
        text = ": ".join([*map(str, first["loc"]), first["msg"]])
    else:
        text = str(error)
    return " ".join(text.split())
