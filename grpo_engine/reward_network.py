"""A causal LM's body with a scalar head (DeepSeek-R1 v2, 3.1: R1's architecture and such a head).

The score of a sequence is the head's output at its last token, which is always end-of-sequence.
Sequences are packed as the policy's are, and no logits are built: one row of the hidden states a
sequence is all that reaches the head.

The network *is* a Hugging Face ``...ForSequenceClassification`` with one label: what is saved loads
with ``AutoModelForSequenceClassification.from_pretrained`` and gives the same score. That class
reads the rightmost token that is not padding, so padding must be another token than
end-of-sequence; where a tokenizer pads with its end-of-sequence token (DeepSeek's, Qwen's base
models'), another token of the vocabulary takes its place (``choose_pad_token``).
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from grpo_engine.manifest import weights_sha256
from grpo_engine.models.load import is_classifier, load_model
from grpo_engine.packing_check import require_packing
from grpo_engine.policy import DTYPES, Policy, resolve_device
from grpo_engine.types import UserError

# Tokens that widespread vocabularies keep for padding or hardly use, in order of preference. Any
# will do that is not end-of-sequence: padding is masked, and the last token is never padding.
PAD_TOKENS = (
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<｜▁pad▁｜>",  # DeepSeek
    "<|PAD_TOKEN|>",
    "<|finetune_right_pad_id|>",  # Llama 3
    "<|fim_pad|>",  # Qwen 2.5
    "<|vision_pad|>",
    "<|endoftext|>",
    "<unk>",
)


class RewardNetwork(Policy):
    """A language model's body and a linear head without bias, D -> 1.

    ``from_model`` puts a new head on a language model; ``from_saved`` reads a saved network. Both
    raise UserError for what cannot be one: an architecture without a sequence-classification class,
    blocks that cannot run packed rows, no end-of-sequence token, nothing to pad with.
    ``base_sha256``: ``weights_sha256`` of the model that ``from_model`` began with.
    """

    base_sha256: str | None = None

    @classmethod
    def from_model(
        cls,
        model: str,
        *,
        seed: int = 0,
        dtype: str = "float32",
        device: str = "auto",
        attention: str = "auto",
        gradient_checkpointing: bool = False,
        pad_token: str | None = None,
    ) -> RewardNetwork:
        """The body of ``model`` (as in ``Policy.load``) under a head drawn from ``seed``; of a
        saved reward model, its own head.

        ``pad_token``: a token of the vocabulary; None: see ``choose_pad_token``.
        """
        target = resolve_device(device)
        if is_classifier(model):
            loaded, tokenizer = _load_saved(model, dtype)
            base_sha256 = weights_sha256(loaded)
        else:
            language_model, tokenizer = load_model(str(model), DTYPES[dtype])
            base_sha256 = weights_sha256(language_model)
            loaded = put_head(language_model, seed)
        choose_pad_token(loaded, tokenizer, pad_token)
        network = cls(
            loaded.to(target),
            tokenizer,
            attention=attention,
            gradient_checkpointing=gradient_checkpointing,
        )
        network.base_sha256 = base_sha256
        return network

    @classmethod
    def from_saved(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: str = "float32",
        device: str = "auto",
        attention: str = "auto",
        trainable: bool = False,
        gradient_checkpointing: bool = False,
    ) -> RewardNetwork:
        """What ``save_pretrained`` wrote, or any such folder of another program's."""
        target = resolve_device(device)
        if not is_classifier(folder):
            raise UserError(f"reward model: {str(folder)!r} holds no sequence-classification model")
        loaded, tokenizer = _load_saved(str(folder), dtype)
        choose_pad_token(loaded, tokenizer, None)
        return cls(
            loaded.to(target),
            tokenizer,
            attention=attention,
            trainable=trainable,
            gradient_checkpointing=gradient_checkpointing and trainable,
        )

    @property
    def eos_id(self) -> int:
        """The token every scored sequence ends with."""
        return self.tokenizer.eos_token_id

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of ``text`` followed by end-of-sequence, unless it ends so already."""
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return ids if ids and ids[-1] == self.eos_id else [*ids, self.eos_id]

    def scores(
        self, token_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """[S] fp32 scores of a packed row; arguments as of ``hidden_states``.

        The head is computed in fp32 whatever the autocast: a score is one dot product, and the
        loss takes differences of scores.
        """
        return self._head(self._last_hidden(token_ids, position_ids, cu_seqlens, max_seqlen))

    def _last_hidden(
        self, token_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """[S, D] final-norm hidden states of the sequences' last tokens."""
        hidden = self.hidden_states(token_ids, position_ids, cu_seqlens, max_seqlen)
        return hidden.index_select(0, cu_seqlens[1:].long() - 1)

    def _head(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.model.score.weight.float())[:, 0]

    def _require_self_test(self) -> None:
        """As the policy's, with scores in the place of logits."""
        require_packing(self.model, self._packing_error, "scores")

    @torch.no_grad()
    def _packing_error(self, lengths: tuple[int, ...] = (5, 9, 2), seed: int = 0) -> float:
        """Largest difference of a packed score to the model's own of the sequence alone, relative
        to the largest score or, where the head happens to give small ones, to what a head of its
        norm gives at random: |hidden| |weight| / sqrt(D)."""
        drawn = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, self.text_config.vocab_size, (sum(lengths),), generator=drawn)
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        ids[bounds[1:] - 1] = self.eos_id  # the model's own forward skips padding at the end
        ids = ids.to(self.device)
        positions = torch.cat([torch.arange(n) for n in lengths]).to(self.device)
        cu_seqlens = bounds.to(device=self.device, dtype=torch.int32)
        hidden = self._last_hidden(ids, positions, cu_seqlens, max(lengths))
        alone = torch.cat(
            [
                self.model(input_ids=ids[None, start:end], use_cache=False).logits[:, 0].float()
                for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
            ]
        )
        norms = hidden.float().norm(dim=1).max() * self.model.score.weight.float().norm()
        scale = torch.maximum(alone.abs().max(), norms / hidden.shape[1] ** 0.5)
        scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
        return ((self._head(hidden) - alone).abs().max() / scale).item()


def put_head(language_model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The architecture's sequence-classification model with one label around the body of
    ``language_model``, whose parameters it takes over.

    The head is drawn N(0, 1 / (D + 1)) (the paper reports no initialisation; this is that of
    Stiennon et al., arXiv 2009.01325): scores begin with a spread near 1.
    """
    config, name = language_model.config, type(language_model).__name__
    mapped = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if mapped is None:
        raise UserError(
            f"model: {name} has no sequence-classification class in transformers, so a reward "
            "model of it could not be saved as an ordinary one"
        )
    config.num_labels = 1
    body = language_model.base_model
    with torch.device("meta"):  # the body's weights are there already
        model = mapped(config)
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise UserError(f"model: {mapped.__name__} has no linear head named 'score'")
    setattr(model, model.base_model_prefix, body)
    drawn = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, head.in_features, generator=drawn) * (head.in_features + 1) ** -0.5
    model.score = nn.Linear(head.in_features, 1, bias=False, dtype=body.dtype)
    model.score.weight.data.copy_(weight)
    rest = [path for path, tensor in model.state_dict().items() if tensor.is_meta]
    if rest:
        raise UserError(f"model: {mapped.__name__} has weights besides body and head: {rest[0]}")
    return model


def choose_pad_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: str | None
) -> None:
    """Set a padding token other than end-of-sequence in the tokenizer and the model's config:
    ``wanted``, else the tokenizer's own, else one of ``PAD_TOKENS`` in the vocabulary.

    Raises UserError without an end-of-sequence token, if ``wanted`` is not in the vocabulary or is
    that token, or if there is nothing to pad with.
    """
    eos, size = tokenizer.eos_token_id, model.config.get_text_config().vocab_size
    if eos is None or not 0 <= eos < size:
        raise UserError("model: its tokenizer names no end-of-sequence token to score at")
    vocabulary = tokenizer.get_vocab()

    def usable(token: str | None) -> bool:
        return token in vocabulary and vocabulary[token] != eos and vocabulary[token] < size

    if wanted is not None and not usable(wanted):
        raise UserError(
            f"pad_token={wanted!r}: must be a token of the vocabulary and not {tokenizer.eos_token}"
        )
    found = next((t for t in (wanted, tokenizer.pad_token, *PAD_TOKENS) if usable(t)), None)
    if found is None:
        raise UserError(
            "model: its tokenizer has no padding token besides end-of-sequence "
            f"({tokenizer.eos_token}); name an unused token of the vocabulary with --pad_token"
        )
    tokenizer.pad_token = found
    for config in (model.config, model.config.get_text_config(), model.base_model.config):
        config.pad_token_id = vocabulary[found]


def _load_saved(folder: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = Path(folder).expanduser()
    try:
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=DTYPES[dtype])
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # OSError, ValueError, SafetensorError, ... : all mean "not usable"
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model: cannot load {folder!r}: {type(error).__name__}: {reason}"
        ) from error
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1 or head.bias is not None:
        raise UserError(f"model: {folder!r} has no scalar head (a linear 'score' with one output)")
    # The weights are still pages of the file: whoever writes it anew changes or kills this process.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model, tokenizer
