"""Sampling with the policy's own Hugging Face model: no second copy of the weights to sync.

``model.generate`` prepares a batch of prompts as it does for everybody: it checks the generation
config, makes the cache that fits the architecture (sliding windows, hybrids), the positions and
mask, and the logits processors (temperature, top-k, top-p). Then it calls the decoding loop below,
its ``custom_generate``, in place of its own, which has no seed per request, reports no logprob of
the truncated distribution, keeps finished rows to the end of the batch and copies the whole
key/value cache at every token. What a checkpoint's generation_config.json says (repetition penalty,
top_k, temperature) does not apply: it would make the sampler another distribution than the policy.

Where the time of a small model goes, and what is done about it:

* the cache: keys and values are written into storage with room to grow, not concatenated anew at
  each token;
* prompts: each distinct prompt of a batch is run, stored and read once for its whole group;
* finished rows leave the batch, cache included, once a quarter of it is done;
* the host waits for the device once a token, to learn which rows have ended (and for the ids that
  each token was drawn from, where the trainer asks for them).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from grpo_engine.generation.base import OnBatch, check_requests
from grpo_engine.generation.prefix import SharedPrefix
from grpo_engine.policy import Policy, routed_attention
from grpo_engine.support import Support, support_entries
from grpo_engine.types import Generation, GenerationRequest, SamplingParams, UserError

# Rows leave the batch when this fraction has ended; selecting copies the live rows' cache once.
DROP_FRACTION = 0.25


def sampling_config(policy: Policy, sampling: SamplingParams) -> GenerationConfig:
    """``sampling`` in transformers' words, and nothing that the checkpoint's own config says."""
    return GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_new_tokens=sampling.max_completion_length,
        eos_token_id=list(policy.eos_ids) or None,
        pad_token_id=policy.pad_id,
        use_cache=True,
    )


def ranked_logprobs(scores: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """The sampler's distribution in the order in which a uniform number picks from it, fp32. That
    order is part of what a seed means: another one would draw other tokens.

    Args:
        scores: [B, V] fp32, the processed logits: -inf outside the support.

    Returns: logprobs [B, K] over the support, likeliest first where it is truncated, and the ids
        [B, K] of those columns, or None where the columns are the vocabulary itself.
    """
    if 0 < sampling.top_k < scores.shape[-1]:
        values, ids = scores.topk(sampling.top_k, dim=-1)
    elif sampling.top_p < 1.0:
        values, ids = scores.sort(dim=-1, descending=True, stable=True)
    else:
        values, ids = scores, None
    return values.log_softmax(-1), ids


def draw(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF sampling: column indices [B] for logprobs [B, K] and uniforms [B] fp64 in [0, 1).

    The CDF is fp64: in fp32 it stops growing near 1 and the ids in the tail of a large vocabulary
    could never be drawn. Scaling by its last value keeps the draw inside the support.
    """
    cdf = logprobs.exp().cumsum(-1, dtype=torch.float64)
    target = uniforms[:, None] * cdf[:, -1:]
    columns = torch.searchsorted(cdf, target, right=True).squeeze(-1)
    return columns.clamp_max_(logprobs.shape[-1] - 1)


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, views of the filled part of storage with room to grow.

    [B, Hkv, capacity, Dh]. transformers' own layer concatenates, which moves the whole cache at
    each token.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Append [B, Hkv, L, Dh]; return all keys and values so far."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True  # lazy_initialization's arguments differ between releases
            self._keys, self._values = self.keys, self.values = key_states, value_states
            self._filled = key_states.shape[-2]
            return key_states, value_states
        end = self._filled + key_states.shape[-2]
        if end > self._keys.shape[-2]:
            capacity = max(end, self._filled + max(32, self._filled // 2))
            self._keys = self._moved(self._keys, capacity)
            self._values = self._moved(self._values, capacity)
        self._keys[:, :, self._filled : end].copy_(key_states)
        self._values[:, :, self._filled : end].copy_(value_states)
        self._filled = end
        self.keys, self.values = self._keys[:, :, :end], self._values[:, :, :end]
        return self.keys, self.values

    def _moved(self, storage: Tensor, capacity: int, rows: Tensor | None = None) -> Tensor:
        filled = storage[:, :, : self._filled]
        filled = filled if rows is None else filled.index_select(0, rows)
        moved = filled.new_empty(filled.shape[0], filled.shape[1], capacity, filled.shape[3])
        moved[:, :, : self._filled] = filled
        return moved

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep (or repeat) the rows ``indices``."""
        if not self.is_initialized:
            return
        capacity = self._keys.shape[-2]
        self._keys = self._moved(self._keys, capacity, indices)
        self._values = self._moved(self._values, capacity, indices)
        self.keys = self._keys[:, :, : self._filled]
        self.values = self._values[:, :, : self._filled]


class HFGenerator:
    """Draws completions from ``policy`` as it is when called.

    Args:
        max_batch_size: rows decoded together.
        max_batch_tokens: bound on rows x (longest prompt + max_completion_length), i.e. on the
            cache.

    Raises UserError for a model without transformers' ``generate``.
    """

    def __init__(
        self, policy: Policy, *, max_batch_size: int = 256, max_batch_tokens: int = 262_144
    ) -> None:
        if max_batch_size < 1 or max_batch_tokens < 1:
            raise ValueError(
                f"max_batch_size and max_batch_tokens must be >= 1, got {max_batch_size} and "
                f"{max_batch_tokens}"
            )
        if not policy.model.can_generate():
            name = type(policy.model).__name__
            raise UserError(f"model: {name} has no generate() to sample with")
        self.policy: Policy | None = policy
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.weights_version = 0

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParams,
        *,
        on_batch: OnBatch | None = None,
    ) -> list[Generation]:
        """See ``Generator.generate``. Raises FloatingPointError where logits are NaN."""
        if self.policy is None:
            raise RuntimeError("generate() after close()")
        config = self.policy.text_config
        check_requests(
            requests,
            sampling,
            vocab_size=config.vocab_size,
            max_positions=getattr(config, "max_position_embeddings", None),
        )
        results: list[Generation | None] = [None] * len(requests)
        with self.policy.active(), _sampling_mode(self.policy, sampling):
            for members in self._plan(requests, sampling.max_completion_length):
                drawn = _decode(self.policy, [requests[i] for i in members], sampling)
                for i, generation in zip(members, drawn, strict=True):
                    results[i] = generation
                if on_batch is not None:
                    on_batch(members, drawn)
        return [generation for generation in results if generation is not None]

    def sync_weights(self, version: int) -> dict[str, float]:
        """The weights are the policy's own: only the version is recorded."""
        if version < self.weights_version:
            raise ValueError(f"version must not fall: {version} after {self.weights_version}")
        self.weights_version = version
        return {}

    def close(self) -> None:
        """Let go of the policy."""
        self.policy = None

    def _plan(self, requests: Sequence[GenerationRequest], max_new: int) -> Iterator[list[int]]:
        """Batches of request indices: prompts of like length together, equal prompts adjacent."""
        order = sorted(
            range(len(requests)),
            key=lambda i: (-len(requests[i].prompt_ids), requests[i].prompt_ids),
        )
        batch: list[int] = []
        for i in order:
            width = len(requests[batch[0] if batch else i].prompt_ids) + max_new
            full = (
                len(batch) == self.max_batch_size
                or (len(batch) + 1) * width > self.max_batch_tokens
            )
            if batch and full:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch


def _uniforms(seeds: list[int], count: int, device: torch.device) -> Tensor:
    """[R, count] fp64: the draws of a request come from its own seed, whatever batch it is in."""
    generator = torch.Generator()
    rows = [
        torch.rand(count, generator=generator.manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    return torch.stack(rows).to(device)


@contextmanager
def _sampling_mode(policy: Policy, sampling: SamplingParams) -> Iterator[None]:
    """Evaluation mode (which also turns gradient checkpointing off) and our generation config,
    undone afterwards. Transformers fills the gaps of a config that it is given from the model's,
    before release 5 even where a value equals the general default, so that ours stands there."""
    model = policy.model
    training = [module for module in model.modules() if module.training]
    own_config = model.generation_config
    model.eval()
    model.generation_config = sampling_config(policy, sampling)
    try:
        with torch.inference_mode():
            yield
    finally:
        model.generation_config = own_config
        for module in training:
            module.training = True


class _Rows:
    """The open rows of a decoding batch: the model's cache, and what each forward needs beside it.

    R rows (completions) over U distinct prompts, padded on the left to P tokens. With R > U the
    prompts' cache stays apart (``SharedPrefix``) and ``cache`` holds completions only.

    Args:
        input_ids: [U, P].
        lengths: [U] of the prompts.
        prompt_of_row: [R] indices of prompts.
        prepared: the arguments of the model's forward, as ``generate`` has prepared them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        lengths: Tensor,
        prompt_of_row: Tensor,
        prepared: dict[str, Any],
    ) -> None:
        self.model, self.fixed = model, dict(prepared)
        mask = self.fixed.pop("attention_mask", None)
        positions = self.fixed.pop("position_ids", None)  # before transformers 5: made by the next
        self.cache = self.fixed.pop("past_key_values")
        # Sliding layers keep transformers' own class: they already hold no more than their window.
        self.cache.layers = [
            GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.cache.layers
        ]
        names = inspect.signature(model.prepare_inputs_for_generation).parameters
        self.names_cache_position = "cache_position" in names  # before transformers 5
        logits = self._forward(input_ids, positions, mask)
        num_prompts, num_rows = len(input_ids), len(prompt_of_row)
        self.logits, self.lengths = logits[prompt_of_row], lengths[prompt_of_row]
        self.mask: Tensor | None = None
        self.prefix: SharedPrefix | None = None
        layers = self.cache.layers
        if num_prompts < num_rows and all(type(layer) is GrowingLayer for layer in layers):
            keys, values = [x.keys for x in layers], [x.values for x in layers]
            self.prefix = SharedPrefix(keys, values, mask, prompt_of_row)
            self.cache.layers = [GrowingLayer() for _ in layers]
            return
        if num_prompts < num_rows:
            self.cache.batch_select_indices(prompt_of_row)
        if mask is not None:
            self.mask = mask[prompt_of_row]

    def _forward(self, token_ids: Tensor, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        """Logits [R, V] after the last of ``token_ids`` [R, L]; positions None: of the prompts."""
        place = {} if positions is None else {"position_ids": positions}
        if self.names_cache_position:
            past = self.cache.get_seq_length()
            end = past + token_ids.shape[1]
            place["cache_position"] = torch.arange(past, end, device=token_ids.device)
        inputs = self.model.prepare_inputs_for_generation(
            token_ids, past_key_values=self.cache, attention_mask=mask, **place, **self.fixed
        )
        return self.model(**inputs, return_dict=True).logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.lengths = self.lengths[rows]
        self.cache.batch_select_indices(rows)
        if self.mask is not None:
            self.mask = self.mask[rows]
        if self.prefix is not None:
            self.prefix.keep(rows)

    def advance(self, token: Tensor, drawn: int) -> None:
        """Feed each row's token [R], its ``drawn``-th (from 0), and set ``logits`` [R, V]."""
        positions = (self.lengths + drawn)[:, None]
        if self.prefix is not None:
            with routed_attention(lambda window: self.prefix):
                self.logits = self._forward(token[:, None], positions, None)
            return
        if self.mask is not None:
            self.mask = nn.functional.pad(self.mask, (0, 1), value=1)
        self.logits = self._forward(token[:, None], positions, self.mask)


def _decode(
    policy: Policy, requests: list[GenerationRequest], sampling: SamplingParams
) -> list[Generation]:
    """Draw the completions of one batch of R requests, each distinct prompt run once."""
    index: dict[tuple[int, ...], int] = {}
    of_row = [index.setdefault(tuple(r.prompt_ids), len(index)) for r in requests]
    width, device = max(len(p) for p in index), policy.device
    padded = torch.tensor([[policy.pad_id] * (width - len(p)) + list(p) for p in index])
    lengths = torch.tensor([len(p) for p in index])
    mask = (torch.arange(width) >= (width - lengths)[:, None]).long()
    is_ragged = any(len(p) < width for p in index)

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **prepared):
        # Ends and cap are counted in _draw, where they give each row its finish reason.
        if not is_ragged:
            prepared.pop("attention_mask", None)  # transformers 5 has dropped it already
        prompt_of_row = torch.tensor(of_row, device=device)
        rows = _Rows(model, input_ids, lengths.to(device), prompt_of_row, prepared)
        return _draw(rows, logits_processor, requests, sampling, policy.eos_ids)

    return policy.model.generate(
        padded.to(device),
        attention_mask=mask.to(device),
        generation_config=policy.model.generation_config,
        custom_generate=loop,
    )


def _draw(
    rows: _Rows,
    logits_processor: LogitsProcessorList,
    requests: list[GenerationRequest],
    sampling: SamplingParams,
    eos_ids: Sequence[int],
) -> list[Generation]:
    """The decoding loop: ``rows`` are at the end of their prompts."""
    device, max_new, num_rows = rows.logits.device, sampling.max_completion_length, len(requests)
    uniforms = _uniforms([request.seed for request in requests], max_new, device)
    eos = torch.tensor(eos_ids, device=device)
    token_ids = torch.zeros(num_rows, max_new, dtype=torch.int64, device=device)
    logprobs = torch.zeros(num_rows, max_new, device=device)
    lengths = torch.full((num_rows,), max_new, device=device)  # of the completions
    live = torch.arange(num_rows, device=device)  # request of each row still in the batch
    open_rows = torch.ones(num_rows, dtype=torch.bool, device=device)  # of those, not ended
    supports: list[tuple[Tensor, Tensor, Tensor]] = []  # of each step, if asked for
    for t in range(max_new):
        # Temperature, top-k and top-p read the scores alone; a processor that wants the tokens so
        # far cannot come from our config, and would fail on None.
        scores = logits_processor(None, rows.logits.float())
        columns, ids = ranked_logprobs(scores, sampling)
        column = draw(columns, uniforms[live, t])[:, None]
        token = (column if ids is None else ids.gather(-1, column))[:, 0]
        token_ids[live, t] = token
        logprob = columns.gather(-1, column)[:, 0]
        logprobs[live, t] = logprob
        if ids is not None and sampling.return_support:
            counts = columns.isfinite().sum(-1)  # what is cut comes last
            entries = support_entries(ids, counts, scores.shape[-1])
            supports.append((live.cpu(), counts.cpu(), entries))
        ended = open_rows & torch.isin(token, eos)
        # A mask as an index would make the host wait for its count.
        lengths[live] = torch.where(ended, t + 1, lengths[live])
        open_rows &= ~ended
        # The step's one host sync, but for the support.
        num_open, num_bad = torch.stack([open_rows.sum(), logprob.isnan().sum()]).tolist()
        if num_bad:
            raise FloatingPointError(f"logits of {num_bad} rows are not finite at token {t}")
        if num_open == 0 or t + 1 == max_new:
            break
        if num_open <= (1 - DROP_FRACTION) * len(live):
            kept = open_rows.nonzero()[:, 0]
            live, token, open_rows = live[kept], token[kept], open_rows[kept]
            rows.keep(kept)
        rows.advance(token, t)
    found = [None] * num_rows
    if supports:
        found = Support.of_steps(supports, lengths.tolist(), rows.logits.shape[-1])
    return _collect(token_ids, logprobs, lengths.tolist(), set(eos_ids), found)


def _collect(
    token_ids: Tensor,
    logprobs: Tensor,
    lengths: list[int],
    eos: set[int],
    supports: Sequence[Support | None],
) -> list[Generation]:
    generations = []
    for ids, logps, n, support in zip(
        token_ids.tolist(), logprobs.tolist(), lengths, supports, strict=True
    ):
        reason = "stop" if ids[n - 1] in eos else "length"
        generations.append(Generation(ids[:n], logps[:n], reason, support))
    return generations
