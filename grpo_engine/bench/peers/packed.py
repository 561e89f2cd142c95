"""Packed rows in plain torch and with flash-attn: padding them again, attention over them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from grpo_engine.bench.cases import Inputs
from grpo_engine.bench.provider import Outputs, Provider, finish_attention, installed


def _pad(inputs: Inputs, backward: bool) -> Outputs:
    return {"padded": pad_sequence(inputs["packed"].split(inputs["lengths"]), batch_first=True)}


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, L, H, E] queries, [B, L, K, E] keys and values -> [B, L, H, E]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _one_by_one(inputs: Inputs, backward: bool) -> Outputs:
    fields = (inputs[name].split(inputs["lengths"]) for name in "qkv")
    pieces = [_attention(*(x[None] for x in each))[0] for each in zip(*fields, strict=True)]
    return finish_attention(torch.cat(pieces), inputs, backward)


def _padded(inputs: Inputs, backward: bool) -> Outputs:
    """All sequences as long as the longest: on the right, where no real query sees the padding."""
    lengths = inputs["lengths"]
    rows = (pad_sequence(inputs[name].split(lengths), batch_first=True) for name in "qkv")
    out = _attention(*rows)
    out = torch.cat([row[:length] for row, length in zip(out, lengths, strict=True)])
    return finish_attention(out, inputs, backward)


def _flash_missing(device: torch.device) -> str | None:
    absent = installed("flash_attn", "flash-attn")
    if absent or device.type == "cuda":
        return absent
    return "needs a CUDA GPU"


def _flash(inputs: Inputs, backward: bool) -> Outputs:
    from flash_attn import flash_attn_varlen_func

    bounds, longest = inputs["cu_seqlens"], max(inputs["lengths"])
    fields = (inputs[name] for name in "qkv")
    out = flash_attn_varlen_func(*fields, bounds, bounds, longest, longest, causal=True)
    return finish_attention(out, inputs, backward)


PROVIDERS = (
    Provider("torch", "unpack", None, _pad),
    Provider("torch", "varlen_attention", None, _padded),
    Provider("torch, a sequence at a time", "varlen_attention", None, _one_by_one),
    Provider("flash-attn", "varlen_attention", "flash-attn", _flash, _flash_missing),
)
