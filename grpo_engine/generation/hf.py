"""Sampling with the policy's own Hugging Face model: no second copy of the weights to sync.

The model's forward and transformers' cache layers do the positions, masks and sliding windows of
whatever architecture it is. The decoding loop is ours, because ``model.generate`` has no seed per
request, reports no logprob of the truncated distribution, keeps finished rows to the end of the
batch, copies the whole key/value cache at every token, and applies whatever the checkpoint's
generation_config.json says (repetition penalty, top_k), which would make the sampler another
distribution than the policy.

Where the time of a small model goes, and what is done about it:

* the cache: keys and values are written into storage with room to grow, not concatenated anew at
  each token;
* prompts: each distinct prompt of a batch is run, stored and read once for its whole group;
* finished rows leave the batch, cache included, once a quarter of it is done;
* the host waits for the device once a token, to learn which rows have ended.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from grpo_engine.generation.base import check_requests
from grpo_engine.generation.prefix import SharedPrefix
from grpo_engine.policy import Policy, routed_attention
from grpo_engine.types import Generation, GenerationRequest, SamplingParams

# Rows leave the batch when this fraction has ended; selecting copies the live rows' cache once.
DROP_FRACTION = 0.25


def truncated_logprobs(
    logits: Tensor, temperature: float, top_p: float, top_k: int
) -> tuple[Tensor, Tensor | None]:
    """The sampler's distribution, renormalised over its support, in fp32.

    Args:
        logits: [B, V]. Softmax(logits / temperature) is cut to the ``top_k`` likeliest ids (0 =
            all), then to the shortest prefix, likeliest first, that holds at least ``top_p`` of
            what is left.

    Returns: logprobs [B, K], -inf outside the support, and the ids [B, K] of those columns, or None
        where the columns are the vocabulary itself (nothing truncated).
    """
    scaled = logits.float() / temperature
    if top_p >= 1.0 and not 0 < top_k < scaled.shape[-1]:
        return scaled.log_softmax(-1), None
    if 0 < top_k < scaled.shape[-1]:
        values, ids = scaled.topk(top_k, dim=-1)
    else:
        values, ids = scaled.sort(dim=-1, descending=True, stable=True)
    logprobs = values.log_softmax(-1)
    if top_p < 1.0:
        probs = logprobs.exp()
        before = probs.cumsum(-1) - probs  # mass of the likelier ids: 0 for the first, which stays
        kept = logprobs.masked_fill(before >= top_p, -torch.inf)
        logprobs = kept - kept.logsumexp(-1, keepdim=True)
    return logprobs, ids


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
            self.lazy_initialization(key_states, value_states)
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
    """

    def __init__(
        self, policy: Policy, *, max_batch_size: int = 256, max_batch_tokens: int = 262_144
    ) -> None:
        if max_batch_size < 1 or max_batch_tokens < 1:
            raise ValueError(
                f"max_batch_size and max_batch_tokens must be >= 1, got {max_batch_size} and "
                f"{max_batch_tokens}"
            )
        self.policy: Policy | None = policy
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.weights_version = 0

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
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
        with self.policy.active(), _sampling_mode(self.policy.model):
            for members in self._plan(requests, sampling.max_completion_length):
                drawn = _decode(self.policy, [requests[i] for i in members], sampling)
                for i, generation in zip(members, drawn, strict=True):
                    results[i] = generation
        return [generation for generation in results if generation is not None]

    def sync_weights(self, version: int) -> None:
        """The weights are the policy's own: only the version is recorded."""
        if version < self.weights_version:
            raise ValueError(f"version must not fall: {version} after {self.weights_version}")
        self.weights_version = version

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
def _sampling_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (which also turns gradient checkpointing off), undone afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


class _Rows:
    """The open rows of a decoding batch: the model's cache, and what each forward needs beside it.

    R rows (completions) over U distinct prompts, padded on the left to P tokens. With R > U the
    prompts' cache stays apart (``SharedPrefix``) and ``cache`` holds completions only.
    """

    def __init__(self, policy: Policy, prompts: list[list[int]]) -> None:
        index: dict[tuple[int, ...], int] = {}
        of_row = [index.setdefault(tuple(prompt), len(index)) for prompt in prompts]
        self.model = policy.model
        accepted = inspect.signature(policy.model.forward).parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.width = max(len(p) for p in index)  # P
        logits, mask, lengths = self._prefill(policy, list(index))
        prompt_of_row = torch.tensor(of_row, device=policy.device)
        self.logits, self.lengths = logits[prompt_of_row], lengths[prompt_of_row]
        self.mask: Tensor | None = None
        self.prefix: SharedPrefix | None = None
        layers = self.cache.layers
        if len(index) < len(of_row) and all(type(layer) is GrowingLayer for layer in layers):
            keys, values = [x.keys for x in layers], [x.values for x in layers]
            self.prefix = SharedPrefix(keys, values, mask, prompt_of_row)
            self.cache.layers = [GrowingLayer() for _ in layers]
            return
        if len(index) < len(of_row):
            self.cache.batch_select_indices(prompt_of_row)
        if mask is not None:
            self.mask = mask[prompt_of_row]

    def _prefill(
        self, policy: Policy, prompts: list[tuple[int, ...]]
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Run the distinct prompts: last logits [U, V], mask [U, P] or None, lengths [U]."""
        device, width = policy.device, self.width
        padded = [[policy.pad_id] * (width - len(p)) + list(p) for p in prompts]
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        positions = torch.arange(width, device=device)[None, :] - (width - lengths)[:, None]
        some_padding = any(len(p) < width for p in prompts)
        mask = (positions >= 0).long() if some_padding else None
        self.cache = DynamicCache(config=policy.model.config)
        # Sliding layers keep transformers' own class: they already hold no more than their window.
        self.cache.layers = [
            GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.cache.layers
        ]
        logits = self._run(torch.tensor(padded, device=device), positions.clamp_min_(0), mask)
        return logits, mask, lengths

    def _run(self, token_ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        out = self.model(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **self.last_only,
        )
        return out.logits[:, -1]

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
                self.logits = self._run(token[:, None], positions, None)
            return
        if self.mask is not None:
            self.mask = nn.functional.pad(self.mask, (0, 1), value=1)
        self.logits = self._run(token[:, None], positions, self.mask)


def _decode(
    policy: Policy, requests: list[GenerationRequest], sampling: SamplingParams
) -> list[Generation]:
    """Draw the completions of one batch of R requests."""
    device, max_new, num_rows = policy.device, sampling.max_completion_length, len(requests)
    rows = _Rows(policy, [request.prompt_ids for request in requests])
    uniforms = _uniforms([request.seed for request in requests], max_new, device)
    eos = torch.tensor(policy.eos_ids, device=device)
    token_ids = torch.zeros(num_rows, max_new, dtype=torch.int64, device=device)
    logprobs = torch.zeros(num_rows, max_new, device=device)
    lengths = torch.full((num_rows,), max_new, device=device)  # of the completions
    live = torch.arange(num_rows, device=device)  # request of each row still in the batch
    open_rows = torch.ones(num_rows, dtype=torch.bool, device=device)  # of those, not ended
    for t in range(max_new):
        columns, ids = truncated_logprobs(
            rows.logits, sampling.temperature, sampling.top_p, sampling.top_k
        )
        column = draw(columns, uniforms[live, t])[:, None]
        token = (column if ids is None else ids.gather(-1, column))[:, 0]
        token_ids[live, t] = token
        logprob = columns.gather(-1, column)[:, 0]
        logprobs[live, t] = logprob
        ended = open_rows & torch.isin(token, eos)
        # A mask as an index would make the host wait for its count.
        lengths[live] = torch.where(ended, t + 1, lengths[live])
        open_rows &= ~ended
        # The step's one host sync.
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
    return _collect(token_ids, logprobs, lengths, set(policy.eos_ids))


def _collect(
    token_ids: Tensor, logprobs: Tensor, lengths: Tensor, eos: set[int]
) -> list[Generation]:
    generations = []
    for ids, logps, n in zip(token_ids.tolist(), logprobs.tolist(), lengths.tolist(), strict=True):
        reason = "stop" if ids[n - 1] in eos else "length"
        generations.append(Generation(ids[:n], logps[:n], reason))
    return generations
