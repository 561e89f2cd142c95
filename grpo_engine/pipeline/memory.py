"""What a stage will need on its device, term by term, from the model's config alone.

P weights of w bytes, L layers of width D, V ids, K values of keys and values a token and layer, F
inner width of the feed-forward (of those experts that a token goes through), A width of queries and
attention output. N tokens in a micro-batch, B rows in a sampling batch of T tokens each, e bytes of
an activation. Terms (bytes):

    weights        P w                     fp32 where the stage trains
    bf16 copies    2 P                     autocast's, where bf16 is on
    optimiser      8 P'                    AdamW: two fp32 moments of the P' weights that train
    reference      P w                     the frozen policy of a KL term; an adapter needs none
    reward models  sum of their P w        bf16 where bf16 is on
    KV cache       1.5 B T L K e           storage grows by halves; a group's prompt is kept once
    sampler        16 B V                  fp32 scores and log-probs, fp64 cumulative sums
    gradients      4 P'
    activations    N L (6 D + 3 A + 1.5 K + 4 F) e      kept for the backward pass
                   N (L D + 6 D + 3 A + 1.5 K + 4 F) e  with gradient checkpointing
    head           8 C V + 4 V D + 8 N D   chunks of C rows of logits and their gradient,
                                           d weight, d hidden (kernels/head_chunks.py)

A stage that samples and trains does one after the other, so its peak is the static terms and the
larger of (KV cache, sampler) and (gradients, activations, head). The allocator's slack and CUDA's
own context are not in it, nor a vLLM engine (``generator: vllm``), which has KV cache and sampler
of its own and takes the share of a GPU that it is told.
"""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from grpo_engine.kernels.head_chunks import (
    CPU_CHUNK_ELEMENTS,
    CPU_CHUNK_ROWS,
    CUDA_WORKSPACE_BYTES,
)
from grpo_engine.models.load import SHIPPED, looks_local

STATIC = ("weights", "bf16 copies", "optimiser", "reference", "reward models")
SAMPLING = ("KV cache", "sampler")
UPDATE = ("gradients", "activations", "head")
HUB_TIMEOUT = 5.0  # seconds, for a model's config.json
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelShape:
    """Widths in values; ``parameters`` counts tied weights once; ``linear`` is the sum over linear
    layers (but the head) of inputs + outputs, what an adapter of rank 1 has."""

    parameters: int
    layers: int
    hidden: int
    vocab: int
    kv: int
    attention: int
    feed_forward: int
    linear: int


@dataclass
class Memory:
    """Bytes by term; ``peak`` of the stage."""

    terms: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        def total(names: tuple[str, ...]) -> int:
            return sum(self.terms.get(name, 0) for name in names)

        return total(STATIC) + max(total(SAMPLING), total(UPDATE))


@cache
def model_shape(source: str) -> ModelShape | str:
    """The shape of a local folder's model or of a Hugging Face id's, or why it is not known. No
    weights are read."""
    from transformers import AutoConfig

    place = str(SHIPPED.get(source, Path(source).expanduser()))
    if source == "smollm2-135m-instruct":
        return "its config is inside a package of weights"
    try:
        if Path(place).is_dir():
            return shape_of(AutoConfig.from_pretrained(place))
        if looks_local(source):
            return "no config: there is no such folder"
        return shape_of(_config_of_id(source))
    except Exception as error:  # of any kind: the stage that loads the model will say more
        return f"no config: {' '.join(str(error).split())[:90]}"


def _config_of_id(source: str) -> Any:
    """From the local cache, else read from the hub, once and without keeping it: a plan writes
    nothing, and offline it does not wait for retries."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):
        if constants.HF_HUB_OFFLINE:
            raise OSError("not in the local cache, and HF_HUB_OFFLINE is set") from None
    request = urllib.request.Request(hf_hub_url(source, "config.json"), headers=build_hf_headers())
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT) as answer:
            values = json.load(answer)
    except OSError:
        raise OSError("not in the local cache, and the hub does not answer") from None
    return AutoConfig.for_model(**values)


def shape_of(config: Any) -> ModelShape:
    """Counted on the meta device, where weights have no storage."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    head = model.get_output_embeddings()
    linear = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    key, value = width, width
    if getattr(text, "kv_lora_rank", None):  # MLA: transformers caches the expanded heads
        kv_heads, key, value = heads, text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        kv=kv_heads * (key + value),
        attention=heads * max(key, value),
        feed_forward=_feed_forward(text),
        linear=sum(module.in_features + module.out_features for module in linear),
    )


def _feed_forward(text: Any) -> int:
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    experts = getattr(text, "num_experts_per_tok", None)
    if not experts:
        return inner
    one = getattr(text, "moe_intermediate_size", None) or inner
    return max(inner, one * (experts + (getattr(text, "n_shared_experts", None) or 0)))


def training_memory(
    config: Any, shape: ModelShape, reward_models: int = 0, answers: int | None = None
) -> Memory:
    """Of a stage with an optimiser, sampling included where it samples. ``reward_models``: the
    weights of those it scores with; ``answers``: the most it draws at a time, None for those of a
    rollout."""
    weight_bytes, activation = 4, 2 if config.bf16 else 4
    rank = config.lora_r
    trained = shape.parameters if rank is None else rank * shape.linear
    terms = {"weights": weight_bytes * shape.parameters, "optimiser": 8 * trained}
    if config.bf16:
        terms["bf16 copies"] = 2 * shape.parameters
    if getattr(config, "beta", 0) and rank is None:
        terms["reference"] = weight_bytes * shape.parameters
    if reward_models:
        terms["reward models"] = (2 if config.bf16 else 4) * reward_models
    if hasattr(config, "num_generations"):
        outputs = config.prompts_per_generation * config.num_generations
        terms |= _sampling_terms(config, shape, answers or outputs, activation)
    tokens = min(config.max_tokens_per_microbatch, _step_tokens(config))
    layer = 6 * shape.hidden + 3 * shape.attention + 3 * shape.kv // 2 + 4 * shape.feed_forward
    kept = shape.layers * layer
    if config.gradient_checkpointing:
        kept = shape.layers * shape.hidden + layer
    terms["gradients"] = 4 * trained
    terms["activations"] = tokens * kept * activation
    terms["head"] = _head_bytes(config, shape, tokens)
    return Memory(terms)


def _step_tokens(config: Any) -> int:
    """The most tokens that an optimiser step has."""
    if hasattr(config, "num_generations"):
        outputs = config.prompts_per_generation * config.num_generations
        return outputs // config.steps_per_generation * _longest(config)
    rows = getattr(config, "sequences_per_step", None)
    if rows is None:  # a reward model's: pairs of answers, or answers
        rows = config.batch_size * (2 if config.kind == "helpful" else 1)
    return rows * config.max_length


def sampling_memory(config: Any, shape: ModelShape, answers: int | None = None) -> Memory:
    """Of a stage that only samples, so many ``answers`` if that is known."""
    each = BYTES[getattr(config, "dtype", "float32")]
    terms = {"weights": each * shape.parameters}
    if answers is None:
        answers = config.generation_batch_size
    return Memory(terms | _sampling_terms(config, shape, answers, each))


def _sampling_terms(config: Any, shape: ModelShape, outputs: int, each: int) -> dict[str, int]:
    if getattr(config, "generator", "hf") == "vllm":
        return {}
    longest = _longest(config)
    rows = min(config.generation_batch_size, outputs, config.generation_batch_tokens // longest)
    rows = max(1, rows)
    return {
        "KV cache": rows * longest * shape.layers * shape.kv * each * 3 // 2,
        "sampler": 16 * rows * shape.vocab,
    }


def _longest(config: Any) -> int:
    cap = config.max_completion_length
    return config.max_prompt_length + (max(cap.values()) if isinstance(cap, dict) else cap)


def _head_bytes(config: Any, shape: ModelShape, tokens: int) -> int:
    least, most = CPU_CHUNK_ROWS
    rows = min(tokens, max(least, min(most, CPU_CHUNK_ELEMENTS // shape.vocab)))
    workspace = 8 * rows * shape.vocab
    if on_gpu(config):
        workspace = min(CUDA_WORKSPACE_BYTES, 8 * tokens * shape.vocab)
    return workspace + 4 * shape.vocab * shape.hidden + 8 * tokens * shape.hidden


def on_gpu(config: Any) -> bool:
    device = config.device
    return torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
