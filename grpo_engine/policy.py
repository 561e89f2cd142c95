"""The policy: any Hugging Face causal LM, made to run packed rows.

Sequences lie one after another in a single row of N tokens, without padding. The model's own
modules run unchanged; only its attention is replaced, through transformers' AttentionInterface. A
packed forward asks the model for its attention mask as usual, and our registered mask function
answers with a ``PackMask``: not a tensor but the pack itself. The model hands it down to every
layer, as it would a mask, gradient checkpointing included, and our attention function calls it. An
ordinary forward or ``generate`` of the same model object gets an ordinary mask and sdpa.

Logits never exist here: ``hidden_states`` ends at the final norm and ``head`` says how the model
turns those into logits, for the fused loss. With LoRA the policy is an adapter in the model
(``grpo_engine.lora``) and its frozen copies are further ones.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from grpo_engine.kernels.attention import (
    BucketPlan,
    choose_backend,
    dense_attention,
    plan_buckets,
    varlen_attention,
)
from grpo_engine.lora import ADAPTER_FOLDER, Adapter, LoraOptions
from grpo_engine.models.load import load_model
from grpo_engine.packing_check import first_not_finite, require_packing
from grpo_engine.types import UserError

ATTENTION_NAME = "grpo_engine"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION_BACKENDS = ("auto", "torch", "flash-attn", "buckets")
# Layers a packed row can express; others (chunked, linear, recurrent, ...) carry state across it.
PACKABLE_LAYERS = {"full_attention", "sliding_attention"}


class RoutedMask(Protocol):
    """What the layers receive in place of a mask tensor: it knows what each query may see."""

    def attend(
        self,
        layer: int | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        softcap: float | None,
    ) -> Tensor:
        """query [B, Hq, L, Dh], key and value [B, Hkv, Lk, Dh] of ``layer`` -> [B, L, Hq, Dh]."""
        ...


# Set during a forward: from a layer's sliding window (None = full attention) to its mask.
_route: ContextVar[Callable[[int | None], RoutedMask] | None] = ContextVar("route", default=None)


@contextmanager
def routed_attention(make_mask: Callable[[int | None], RoutedMask]) -> Iterator[None]:
    """Forwards in this context hand ``make_mask(window)`` to their layers as the attention mask."""
    token = _route.set(make_mask)
    try:
        yield
    finally:
        _route.reset(token)


class SequencePack:
    """The boundaries of a packed row; indices derived from them are made once for all layers."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, backend: str) -> None:
        self.cu_seqlens = cu_seqlens
        self.max_seqlen = max_seqlen
        self.backend = backend

    @cached_property
    def plan(self) -> BucketPlan:
        return plan_buckets(self.cu_seqlens)


@dataclass(frozen=True)
class PackMask:
    """The mask of a packed row: the pack itself, and the layer's window."""

    pack: SequencePack
    window: int | None

    def attend(self, layer, query, key, value, scale, softcap) -> Tensor:
        """See ``RoutedMask``; B = 1."""
        pack, backend = self.pack, self.pack.backend
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if torch.is_autocast_enabled(q.device.type):  # rotary leaves q and k wider than v
            q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
        if backend == "auto":
            backend = choose_backend(q, v, self.window, softcap)
        return varlen_attention(
            q,
            k,
            v,
            cu_seqlens=pack.cu_seqlens,
            max_seqlen=pack.max_seqlen,
            scale=scale,
            window=self.window,
            softcap=softcap,
            backend=backend,
            plan=pack.plan if backend == "buckets" else None,
        )[None]


def _mask(*args: Any, **kwargs: Any) -> Tensor | RoutedMask | None:
    """transformers' mask hook. ``local_size`` is the sliding window when the layer has one."""
    route = _route.get()
    if route is None:
        return sdpa_mask(*args, **kwargs)
    if kwargs.get("use_vmap"):
        raise UserError("model: adds its own rule to the attention mask; packed rows cannot run it")
    return route(kwargs.get("local_size"))


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | RoutedMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention hook; shapes as in ``RoutedMask.attend``.

    ``dropout`` is ignored: a dropped unit changes the logprob, so the ratio to the sampler would be
    noise.
    """
    for unsupported in ("s_aux", "position_bias"):
        if kwargs.get(unsupported) is not None:
            raise UserError(f"model: attention uses {unsupported}, which packed rows cannot run")
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        layer = getattr(module, "layer_idx", None)
        return attention_mask.attend(layer, query, key, value, scaling, softcap), None
    if softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    if attention_mask is None and query.shape[2] > 1:
        shape = query.shape[2], key.shape[2]
        ones = torch.ones(shape, dtype=torch.bool, device=query.device)
        attention_mask = ones.tril(shape[1] - shape[0])
    out = dense_attention(query, key, value, attention_mask, scaling, softcap)
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, _mask)


class LMHead(NamedTuple):
    """logits = softcap(logit_scale * (hidden @ weight.T + bias)), softcap(x) = c * tanh(x / c)."""

    weight: Tensor  # [V, D]; the embedding matrix itself where the model ties them
    bias: Tensor | None  # [V]
    logit_softcap: float | None
    logit_scale: float | None


class Policy:
    """A causal LM with its tokenizer, for packed training and for sampling.

    ``Policy.load`` is the usual way in; the constructor takes a model already built. Raises
    UserError when the model's blocks cannot run packed rows, which a few tokens of forward prove
    (``packing_error``).

    Dropout is off throughout. Padding, which only generation uses, falls back to the
    end-of-sequence id.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        attention: str = "auto",
        gradient_checkpointing: bool = False,
        trainable: bool = True,
        lora: LoraOptions | None = None,
    ) -> None:
        if attention not in ATTENTION_BACKENDS:
            raise UserError(f"attention must be one of {ATTENTION_BACKENDS}, got {attention!r}")
        if attention == "flash-attn" and importlib.util.find_spec("flash_attn") is None:
            raise UserError("attention: 'flash-attn' is not installed (pip install flash-attn)")
        if lora is not None and not trainable:
            raise ValueError("lora: trainable=False leaves it nothing to train")
        _refuse_unpackable(model)
        self.model = model
        self.tokenizer = tokenizer
        self.attention = attention
        self.adapter = None if lora is None else Adapter.attach(model, lora)
        self._adopt(gradient_checkpointing, trainable)
        self._require_self_test()

    @classmethod
    def load(
        cls,
        model: str,
        *,
        dtype: str = "float32",
        device: str = "auto",
        attention: str = "auto",
        gradient_checkpointing: bool = False,
        trainable: bool = True,
        lora: LoraOptions | None = None,
    ) -> Policy:
        """Load a local directory, a Hugging Face id, "miniature" or "smollm2-135m-instruct".

        With ``lora`` an adapter is trained in place of the weights.

        Raises UserError naming the field: a folder that is missing or cut short, no tokenizer, no
        end-of-sequence token, an unknown dtype, a device that is not there, blocks that cannot be
        packed, a layer that cannot have an adapter.
        """
        if dtype not in DTYPES:
            raise UserError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
        target = resolve_device(device)
        loaded, tokenizer = load_model(str(model), DTYPES[dtype])
        policy = cls(
            loaded.to(target),
            tokenizer,
            attention=attention,
            gradient_checkpointing=gradient_checkpointing,
            trainable=trainable,
            lora=lora,
        )
        if not policy.eos_ids:
            raise UserError(f"model: {model!r} names no end-of-sequence token")
        return policy

    def _adopt(self, gradient_checkpointing: bool, trainable: bool) -> None:
        """Take over attention, dropout and modes of the model."""
        model = self.model
        try:
            model.set_attn_implementation(ATTENTION_NAME)
        except ValueError as error:
            raise UserError(
                f"model: {type(model).__name__} fixes its attention: {error}"
            ) from error
        for config in (model.config, self._base.config):
            if config._attn_implementation != ATTENTION_NAME:
                raise UserError(
                    f"model: {type(model).__name__} does not let its attention be replaced"
                )
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.requires_grad_(False)
        for parameter in self.weights().values():
            parameter.requires_grad_(trainable)
        model.eval()
        if gradient_checkpointing and trainable:
            # transformers 5 renamed it and warns about the old name.
            new_name = getattr(model, "activation_checkpointing_enable", None)
            (new_name or model.gradient_checkpointing_enable)({"use_reentrant": False})
            # transformers checkpoints a layer only if that layer is in training mode; its children
            # stay in eval mode, so that nothing random comes on.
            for module in model.modules():
                if getattr(module, "gradient_checkpointing", False):
                    module.training = True

    @property
    def _base(self) -> PreTrainedModel:
        return self.model.base_model

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def text_config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def head(self) -> LMHead:
        """How hidden states become logits: the live parameters, not copies."""
        layer = self.model.get_output_embeddings()
        config = self.text_config
        scale = getattr(config, "logit_scale", None)  # Cohere multiplies
        divisor = getattr(config, "logits_scaling", None)  # Granite divides
        if divisor is not None:
            scale = (1.0 if scale is None else scale) / divisor
        softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and 3
        return LMHead(layer.weight, getattr(layer, "bias", None), softcap, scale)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a completion: those of generation_config and the tokenizer's own.

        Ids outside the vocabulary do not count: transformers gives some tokenizers a default one.
        """
        ids = self.model.generation_config.eos_token_id
        found = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            found.append(self.tokenizer.eos_token_id)
        return tuple(dict.fromkeys(i for i in found if 0 <= i < self.text_config.vocab_size))

    @property
    def pad_id(self) -> int:
        """Fills the left of shorter prompts in generation, masked out; training has no padding."""
        pad = None if self.tokenizer is None else self.tokenizer.pad_token_id
        if pad is not None and 0 <= pad < self.text_config.vocab_size:
            return pad
        return self.eos_ids[0] if self.eos_ids else 0

    def hidden_states(
        self, token_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """Final-norm hidden states [N, D] of a packed row, in the parameters' dtype; no logits.

        Args:
            token_ids, position_ids: [N] int64; positions start at 0 in each sequence.
            cu_seqlens: [S+1] int32, where the sequences begin, and N.
            max_seqlen: tokens of the longest sequence, a host int.
        """
        pack = SequencePack(cu_seqlens, max_seqlen, self.attention)
        with self.active(), routed_attention(lambda window: PackMask(pack, window)):
            out = self._base(
                input_ids=token_ids[None],
                position_ids=position_ids[None],
                attention_mask=None,
                use_cache=False,
                return_dict=True,
            )
        return out.last_hidden_state[0]

    def first_not_finite(self) -> str | None:
        """Name of a trained parameter that holds a NaN or infinity; None if all are finite."""
        return first_not_finite(self.model, trained=True)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a Hugging Face directory: safetensors, config, tokenizer. With LoRA these are the
        merged weights, and the adapter is under ``adapter/``."""
        merged = None if self.adapter is None else self.adapter.merged_state_dict()
        self.model.save_pretrained(path, state_dict=merged)
        if self.adapter is not None:
            self.adapter.save(Path(path) / ADAPTER_FOLDER)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(path)

    def active(self) -> AbstractContextManager[None]:
        """Where ``model`` is called directly: makes it compute this policy, and not another one
        that lives in the same model (LoRA)."""
        return nullcontext() if self.adapter is None else self.adapter.active()

    def frozen_copy(self) -> Policy:
        """The weights as they are now, taking no gradient: the reference policy. With LoRA it
        shares the model and copies the adapter only."""
        frozen = copy.copy(self)
        if self.adapter is not None:
            frozen.adapter = self.adapter.frozen_copy()
        else:
            frozen.model = copy.deepcopy(self.model).requires_grad_(False).eval()
        return frozen

    def weights(self) -> dict[str, nn.Parameter]:
        """The live parameters that make this policy: all of the model's, or its adapter's."""
        if self.adapter is not None:
            return self.adapter.parameters()
        return dict(self.model.named_parameters())

    def copy_weights_from(self, other: Policy) -> None:
        """Make our weights those of ``other``, in place. Raises ValueError if shapes differ."""
        self.load_weights(other.weights())

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy ``weights``, named as ours, into ours. Raises ValueError if names or shapes
        differ."""
        ours = self.weights()
        if ours.keys() != weights.keys():
            raise ValueError(f"the policies differ in {sorted(ours.keys() ^ weights.keys())[:3]}")
        for name, tensor in ours.items():
            if tensor.shape != weights[name].shape:
                raise ValueError(
                    f"{name}: {tuple(tensor.shape)} here, {tuple(weights[name].shape)} there"
                )
            tensor.copy_(weights[name])
        if self.adapter is not None:
            self.adapter.weights_changed()

    def _require_self_test(self) -> None:
        require_packing(self.model, lambda: packing_error(self), "logits")


@torch.no_grad()
def packing_error(policy: Policy, lengths: tuple[int, ...] = (5, 9, 2), seed: int = 0) -> float:
    """Largest logit difference of one packed forward to the model's own forward of each sequence
    alone, relative to the largest logit. Covers attention, positions and the LM head's scale, cap
    and bias."""
    device, head = policy.device, policy.head
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, policy.text_config.vocab_size, (sum(lengths),), generator=drawn).to(
        device
    )
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    cu_seqlens = bounds.to(device=device, dtype=torch.int32)
    hidden = policy.hidden_states(ids, positions, cu_seqlens, max(lengths))
    packed = nn.functional.linear(hidden, head.weight, head.bias).float()
    if head.logit_scale is not None:
        packed = packed * head.logit_scale
    if head.logit_softcap is not None:
        packed = head.logit_softcap * torch.tanh(packed / head.logit_softcap)
    with policy.active():
        alone = torch.cat(
            [
                policy.model(input_ids=ids[None, start:end], use_cache=False).logits[0].float()
                for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
            ]
        )
    scale = alone.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return ((packed - alone).abs().max() / scale).item()


def resolve_device(device: str) -> torch.device:
    """The GPU if there is one, else the CPU, for "auto". Raises UserError for an absent device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}") from error
    if resolved.type not in ("cpu", "cuda"):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: {device!r} asked for, but torch {torch.__version__} sees no GPU")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device: {device!r} asked for, but there are {torch.cuda.device_count()} GPUs"
        )
    return resolved


def _refuse_unpackable(model: PreTrainedModel) -> None:
    config, name = model.config.get_text_config(), type(model).__name__
    if model.config.is_encoder_decoder:
        raise UserError(f"model: {name} is an encoder-decoder; a causal LM is needed")
    if getattr(model, "_is_stateful", False):
        raise UserError(f"model: {name} has recurrent layers, which packed rows cannot run")
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - PACKABLE_LAYERS)
    if odd:
        raise UserError(f"model: {name} has {', '.join(odd)} layers, which packed rows cannot run")
