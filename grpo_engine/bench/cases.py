"""What is compared: jobs, and named cases of them with the sizes of real models.

A case says which job, how large, in which dtype and on which values; ``make`` turns it into the
inputs that every provider is given. The same case, device and seed give the same inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

JOBS = (
    "token_logprobs",  # logits -> log-probabilities (entropy), and back to the logits
    "linear_logprobs",  # hidden states and head -> log-probabilities (entropy), and back
    "linear_grpo_loss",  # hidden states and head -> GRPO loss, and back
    "grpo_loss",  # log-probabilities -> GRPO loss, and back
    "pack",  # ragged sequences and three fields -> one packed row
    "unpack",  # a packed field -> one padded row a sequence
    "varlen_attention",  # packed queries, keys, values -> causal attention per sequence, and back
    "plan_batches",  # lengths -> micro-batches, on the host
    "group_advantages",  # rewards -> advantages
)

# (D, V) of the models' heads, from their config.json (hidden_size, vocab_size).
HEADS = {
    "miniature": (128, 316),  # shipped with this package
    "SmolLM2-135M": (576, 49_152),
    "Qwen2.5-0.5B": (896, 151_936),
    "Qwen2.5-1.5B": (1536, 151_936),
    "Qwen2.5-3B": (2048, 151_936),
    "Qwen2.5-7B": (3584, 152_064),
    "Qwen3-0.6B": (1024, 151_936),
    "Qwen3-1.7B": (2048, 151_936),
    "Qwen3-4B": (2560, 151_936),
    "Qwen3-8B": (4096, 151_936),
    "Llama-3.1-8B": (4096, 128_256),
    "DeepSeek-V3": (7168, 129_280),
}

SOURCES = ("random", "hidden_states")
# How the distribution over the vocabulary looks (inputs.py).
VALUES = ("diffuse", "peaked", "all_negative", "large", "certain")
# What a case asks for beyond its job; a provider says which of these it lacks.
FEATURES = {
    "entropy": "the entropy, too",
    "entropy_grad": "a gradient through the entropy",
    "lse": "the log-sum-exp, too",
    "temperature": "one temperature",
    "temperature_vector": "a temperature per token",
    "bias": "a bias on the head",
    "row_mask": "rows left out by a mask",
    "half_dead": "half of the rows with a zero incoming gradient",
    "frozen_head": "no gradient of the head's weight (LoRA)",
    "weighted": "an incoming gradient per token, not one for all",
    "kl": "a KL term to a reference",
    "backward": "gradients",
}

Inputs = dict[str, Any]  # tensors, a float "temperature", and "wants": names of the outputs asked


@dataclass(frozen=True)
class Case:
    """One comparison. ``sizes``: N, D, V tokens, width, vocabulary; S sequences; G group size; H, K
    heads of queries and of keys, E their width; ``max_tokens``, ``ranks`` of a plan. ``dtype`` is
    that of hidden states, weight, logits or queries.
    """

    name: str
    job: str
    sizes: Mapping[str, int]
    dtype: torch.dtype = torch.float32
    source: str = "random"
    values: str = "diffuse"
    features: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        for what, value, known in (
            ("job", self.job, JOBS),
            ("source", self.source, SOURCES),
            ("values", self.values, VALUES),
        ):
            if value not in known:
                raise ValueError(f"{what} must be one of {', '.join(known)}; got {value!r}")
        unknown = sorted(set(self.features) - set(FEATURES))
        if unknown:
            raise ValueError(
                f"features: {', '.join(unknown)} unknown; known: {', '.join(FEATURES)}"
            )

    def make(self, device: torch.device | str, seed: int = 0) -> Inputs:
        """The inputs on ``device``; see ``inputs.py`` for the keys of each job."""
        from grpo_engine.bench.inputs import make_inputs

        return make_inputs(self, torch.device(device), seed)


def tensors(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors among the inputs, for counting bytes."""
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def head_case(
    model: str,
    num_tokens: int,
    dtype: torch.dtype,
    job: str = "linear_grpo_loss",
    *,
    values: str = "diffuse",
    source: str = "random",
    features: frozenset[str] = frozenset(),
    weighted: bool = True,
) -> Case:
    """A case with the head of ``model``; ``weighted`` False: one incoming gradient for all tokens,
    as in supervised training, which is all that some of the others can do."""
    width, vocab = HEADS[model]
    extra = ", ".join(sorted(features) + ([] if weighted else ["one gradient for all"]))
    name = f"{job} {model} N={num_tokens} {str(dtype).removeprefix('torch.')} {values}"
    name += (" real hidden states" if source == "hidden_states" else "") + (extra and f" ({extra})")
    sizes = {"N": num_tokens, "D": width, "V": vocab, "S": max(1, num_tokens // 512)}
    if job == "token_logprobs":
        del sizes["D"]
    features = frozenset(features) | ({"weighted"} if weighted else set())
    return Case(name, job, sizes, dtype, source, values, features)


def small_cases(dtype: torch.dtype = torch.float32) -> list[Case]:
    """One tiny case per job: for checks that a provider works at all."""
    head = {"N": 12, "D": 64, "V": 131, "S": 3}
    weighted = frozenset({"weighted"})
    return [
        Case(
            "small token_logprobs", "token_logprobs", {"N": 12, "V": 131}, dtype, features=weighted
        ),
        Case("small linear_logprobs", "linear_logprobs", head, dtype, features=weighted),
        Case("small linear_grpo_loss", "linear_grpo_loss", head, dtype, features=weighted),
        Case("small grpo_loss", "grpo_loss", {"N": 24, "S": 3}),
        Case("small pack", "pack", {"S": 9, "longest": 16}),
        Case("small unpack", "unpack", {"S": 9, "longest": 16}),
        Case("small varlen_attention", "varlen_attention", _attention_sizes(5, 16, 4, 2, 8)),
        Case("small plan_batches", "plan_batches", {"S": 40, "longest": 64, "max_tokens": 128}),
        Case("small group_advantages", "group_advantages", {"N": 24, "G": 4}),
    ]


def cpu_cases() -> list[Case]:
    """What a CPU can time within minutes: few tokens, whole vocabularies, fp32."""
    fp32 = torch.float32
    entropy = frozenset({"entropy"})
    frozen = frozenset({"frozen_head"})
    return [
        head_case("SmolLM2-135M", 512, fp32, "token_logprobs", features=entropy),
        head_case("SmolLM2-135M", 512, fp32, "linear_logprobs"),
        head_case("SmolLM2-135M", 512, fp32, "linear_logprobs", features=frozen),
        head_case("SmolLM2-135M", 512, fp32, "linear_logprobs", weighted=False),
        head_case("SmolLM2-135M", 512, fp32, "linear_logprobs", source="hidden_states"),
        head_case("SmolLM2-135M", 512, fp32),
        head_case("SmolLM2-135M", 512, fp32, values="peaked", source="hidden_states"),
        head_case("Qwen2.5-0.5B", 128, fp32),
        Case(
            "varlen_attention SmolLM2-135M S=8",
            "varlen_attention",
            _attention_sizes(8, 512, 9, 3, 64),
        ),
        *host_cases(),
    ]


def gpu_cases() -> list[Case]:
    """The sizes of training: the targets' own (D 4096, V 151,936) first, then the other heads."""
    bf16 = torch.bfloat16
    none, frozen = frozenset(), frozenset({"frozen_head"})
    entropy, dead = frozenset({"entropy"}), frozenset({"half_dead"})
    main = "Qwen3-8B"
    cases = [
        head_case(main, 16_384, bf16),
        head_case(main, 16_384, bf16, features=frozen),
        head_case(main, 16_384, bf16, "linear_logprobs"),
        head_case(main, 16_384, bf16, "linear_logprobs", features=frozen),
        head_case(main, 16_384, bf16, "linear_logprobs", features=dead),
        head_case(main, 16_384, bf16, "linear_logprobs", weighted=False),
        head_case(main, 16_384, bf16, values="peaked"),
        head_case(main, 8192, bf16, "token_logprobs", features=entropy),
    ]
    for model, num_tokens, features in (
        ("Qwen2.5-0.5B", 16_384, none),
        ("Qwen2.5-1.5B", 16_384, none),
        ("Qwen2.5-3B", 8192, none),
        ("Qwen2.5-7B", 8192, none),
        ("Llama-3.1-8B", 8192, none),
        ("DeepSeek-V3", 4096, none),
    ):
        cases.append(head_case(model, num_tokens, bf16, features=features))
    real = dict(source="hidden_states")
    for job in ("linear_grpo_loss", "linear_logprobs"):
        cases.append(head_case("SmolLM2-135M", 16_384, bf16, job, **real))
        cases.append(head_case("SmolLM2-135M", 16_384, bf16, job, values="peaked", **real))
    heads = _attention_sizes(16, 2048, 28, 4, 128)
    cases.append(Case("varlen_attention Qwen2.5-7B S=16", "varlen_attention", heads, bf16))
    return cases + host_cases(scale=8)


def _attention_sizes(
    sequences: int, longest: int, heads: int, key_heads: int, width: int
) -> dict[str, int]:
    return {"S": sequences, "longest": longest, "H": heads, "K": key_heads, "E": width}


def host_cases(scale: int = 1) -> list[Case]:
    """The jobs without a vocabulary."""
    return [
        Case(f"grpo_loss N={2048 * scale}", "grpo_loss", {"N": 2048 * scale, "S": 4 * scale}),
        Case(f"pack S={2000 * scale}", "pack", {"S": 2000 * scale, "longest": 512}),
        Case("pack S=64", "pack", {"S": 64, "longest": 512}),
        Case(f"unpack S={2000 * scale}", "unpack", {"S": 2000 * scale, "longest": 512}),
        Case("unpack S=64", "unpack", {"S": 64, "longest": 512}),
        Case(
            "plan_batches S=100000",
            "plan_batches",
            {"S": 100_000, "longest": 32_768, "max_tokens": 32_768, "ranks": 8},
        ),
        Case("group_advantages N=8192 G=16", "group_advantages", {"N": 8192, "G": 16}),
    ]
