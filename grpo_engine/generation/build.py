"""The one place where a sampler is made for a configuration, and closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from grpo_engine.generation.base import Generator
from grpo_engine.generation.engine import INSTALL, Engine, support_width
from grpo_engine.generation.hf import HFGenerator
from grpo_engine.manifest import vllm_version
from grpo_engine.policy import Policy
from grpo_engine.types import SamplingParams, UserError

LORA_RANKS = (0, 1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0  # vLLM's
LOG_FILE = "vllm.log"  # what an engine of ours says, in the run's folder


def check_generator(config: Any, policy: Policy) -> None:
    """UserError for what ``open_generator`` could not serve. Starts nothing."""
    _server_version.cache_clear()  # of an earlier run in this process
    if config.generator == "hf":
        _hf_generator(config, policy)
        return
    if config.vllm_mode == "colocate" and vllm_version() is None:
        raise UserError(f"--generator vllm: vLLM is not installed; {INSTALL}")
    _check_temperatures(config)
    _start(config, policy)
    if hasattr(config, "num_generations"):  # training needs the ids that a token was drawn from
        cut = SamplingParams(1, top_p=config.top_p, top_k=config.top_k, return_support=True)
        support_width(cut, policy.text_config.vocab_size)


@contextmanager
def open_generator(config: Any, policy: Policy) -> Iterator[Generator]:
    """The sampler that ``config`` (``SamplerConfig``, with ``generation_batch_size``,
    ``generation_batch_tokens`` and ``output_dir``) asks for, over ``policy``. Its ``sync_weights``
    comes before the first draw, and is what starts an engine."""
    generator = (_hf_generator if config.generator == "hf" else _vllm_generator)(config, policy)
    try:
        yield generator
    finally:
        generator.close()


def generator_inputs(config: Any) -> dict[str, Any]:
    """What the tokens depend on beside weights, prompt, seed and sampling: nothing with the model's
    own sampler. Of a server that means asking it; raises UserError where it does not answer."""
    if config.generator == "hf":
        return {}
    if config.vllm_mode == "server":
        url = config.vllm_server_base_url
        version = _server_version(url, config.vllm_server_timeout)
        return {"engine": "vllm", "mode": "server", "version": version, "source": url}
    return {"engine": "vllm", "mode": "colocate", "version": vllm_version()}


def sampler_words(config: Any) -> str:
    """For a plan: ``vLLM 0.32.0, in a process of its own``."""
    if config.generator == "hf":
        return "transformers, with the policy's own weights"
    if config.vllm_mode == "server":
        return f"vLLM server at {config.vllm_server_base_url}"
    return f"vLLM {vllm_version()}, in a process of its own"


@cache  # a run says once more what it came from when its server may be dead
def _server_version(url: str, wait_s: float) -> str:
    from grpo_engine.generation.server_check import version_of

    return version_of(url, wait_s)


def longest_sequence(config: Any, policy: Policy) -> int:
    """Tokens of the longest prompt and completion of the run, in its longest phase; no more than
    the model has positions, beyond which each prompt is refused by itself."""
    caps = config.max_completion_length
    longest = config.max_prompt_length + (max(caps.values()) if isinstance(caps, dict) else caps)
    positions = getattr(policy.text_config, "max_position_embeddings", None)
    return longest if positions is None else min(longest, positions)


def lora_rank(config: Any) -> int:
    """The smallest of vLLM's ranks that an adapter of the run fits in, 0 without one."""
    wanted = getattr(config, "lora_r", None) or 0
    fitting = [rank for rank in LORA_RANKS if rank >= wanted]
    if not fitting:
        raise UserError(
            f"--lora_r {wanted}: vLLM serves adapters of at most rank {LORA_RANKS[-1]}; use a "
            "smaller one, or generator hf"
        )
    return fitting[0]


def _check_temperatures(config: Any) -> None:
    """UserError for one that vLLM refuses at the first draw, or is so low that it draws at another
    and merely logs it."""
    several = hasattr(config, "resolved_generators")  # each with a temperature of its own
    for one in [one for _, one in config.resolved_generators()] if several else [config]:
        for name in ("temperature", "eval_temperature"):
            value = getattr(one, name, MIN_TEMPERATURE)
            if value < MIN_TEMPERATURE:
                raise UserError(
                    f"--{name} {value}: vLLM would draw at {MIN_TEMPERATURE}, the lowest that it "
                    "has; use that or more, or generator hf"
                )
            if value > MAX_TEMPERATURE:
                raise UserError(
                    f"--{name} {value}: vLLM draws at {MAX_TEMPERATURE:g} at most; use that or "
                    "less, or generator hf"
                )


def _hf_generator(config: Any, policy: Policy) -> HFGenerator:
    return HFGenerator(
        policy,
        max_batch_size=config.generation_batch_size,
        max_batch_tokens=config.generation_batch_tokens,
    )


def _vllm_generator(config: Any, policy: Policy) -> Generator:
    from grpo_engine.generation.vllm import VLLMGenerator
    from grpo_engine.generation.weight_sync import WeightSync

    return VLLMGenerator(policy, _start(config, policy), WeightSync(policy))


def _start(config: Any, policy: Policy) -> Callable[[], Engine]:
    """What starts the engine, with its options checked."""
    common = {
        "timeout_s": config.generation_timeout,
        "max_model_len": config.vllm_max_model_length or longest_sequence(config, policy),
        "enable_sleep": config.vllm_enable_sleep_mode,
        "lora_rank": lora_rank(config),
    }
    if config.vllm_mode == "server":
        from grpo_engine.generation.vllm_server import ServerOptions, connect_server

        url, wait = config.vllm_server_base_url, config.vllm_server_timeout
        return partial(connect_server, policy, ServerOptions(url, start_timeout_s=wait, **common))
    from grpo_engine.generation.vllm import VLLMOptions, start_colocated

    options = VLLMOptions(
        start_timeout_s=config.vllm_start_timeout,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        tensor_parallel_size=config.vllm_tensor_parallel_size,
        max_num_seqs=config.generation_batch_size,
        # Autocast trains bf16 copies of fp32 weights, so bf16 is what the engine is to have.
        dtype=torch.bfloat16 if getattr(config, "bf16", False) else None,
        log_path=Path(config.output_dir) / LOG_FILE,
        **common,
    )
    return partial(start_colocated, policy, options)
