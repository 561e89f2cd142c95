"""The support of each sampled token: the ids that a truncating sampler (top-p, top-k) chose among.

Such a sampler draws from softmax over that set, so the trainer's log-probs (old, reference and
policy) are taken over the same set (``kept`` of ``linear_logprobs``): without it every ratio would
carry the mass that was cut off.

A set is held as its ids or, where they would take more room, as one bit for each id of the
vocabulary: a token drawn from most of 152k ids takes 19 KB, and not 600. A leaf.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

BIT_ROWS = 1024  # tokens whose [V] bools are held at once on the way to bits


def bit_words(vocab: int) -> int:
    """int32 words that hold a bit for each of ``vocab`` ids."""
    return -(-vocab // 32)


def support_entries(ids: Tensor, counts: Tensor, vocab: int) -> Tensor:
    """What ``Support.ids`` holds of B tokens, on the host, where ``vocab`` is given.

    Args:
        ids: [B, K] int64; token b was drawn from the first counts[b] of its row, all different.
        counts: [B].
    """
    words = bit_words(vocab)
    table = ids[:, :words].int()
    wide = counts > words
    if bool(wide.any()):
        inside = torch.arange(ids.shape[1], device=ids.device) < counts[wide][:, None]
        mask = torch.zeros(len(inside), 32 * words, dtype=torch.bool, device=ids.device)
        mask.scatter_(1, ids[wide], inside)
        places = torch.arange(8, dtype=torch.uint8, device=ids.device)
        octets = mask.view(len(mask), -1, 8).to(torch.uint8) << places
        table[wide] = octets.sum(-1, dtype=torch.uint8).view(torch.int32)
    used = torch.arange(table.shape[1], device=ids.device) < counts[:, None]
    return table[used].cpu()


@dataclass(frozen=True)
class Support:
    """Of T tokens: ``counts`` [T] int32, how many ids each was drawn from, and these ``ids`` int32,
    token after token. Where the vocabulary's size ``vocab`` is given, a token with more ids than
    ``bit_words(vocab)`` has so many words of bits in their place, the lowest id in the lowest bit.
    On the host: a long rollout's take many gigabytes."""

    ids: np.ndarray
    counts: np.ndarray
    vocab: int | None = None

    @classmethod
    def of_steps(
        cls,
        steps: Sequence[tuple[Tensor, Tensor, Tensor]],
        lengths: Sequence[int],
        vocab: int | None = None,
    ) -> list[Support]:
        """That of each of R sequences, from what each decoding step knows of its rows.

        Args:
            steps: on the host, of step t: the sequences [B_t] of its rows; how many ids each row
                was drawn from, [B_t]; these ids, row after row, or with ``vocab``
                ``support_entries``.
            lengths: [R], tokens of each sequence; a row may go on beyond it.
        """
        sequence = np.concatenate([rows.numpy() for rows, _, _ in steps])
        step = np.repeat(np.arange(len(steps)), [len(rows) for rows, _, _ in steps])
        counts = np.concatenate([counts.numpy() for _, counts, _ in steps]).astype(np.int32)
        ids = np.concatenate([ids.numpy() for _, _, ids in steps]).astype(np.int32)
        inside = step < np.asarray(lengths)[sequence]
        tokens = np.flatnonzero(inside)[np.argsort(sequence[inside], kind="stable")]
        every = cls(ids, counts, vocab).take(tokens)
        ends = np.cumsum(lengths)
        last_id = np.concatenate([[0], np.cumsum(every.sizes, dtype=np.int64)])[ends]
        parts = zip(
            np.split(every.ids, last_id[:-1]), np.split(every.counts, ends[:-1]), strict=True
        )
        return [cls(*part, vocab) for part in parts]

    @classmethod
    def concatenate(cls, parts: Sequence[Support]) -> Support:
        """One after the other. Raises ValueError where they differ in ``vocab``."""
        sizes = {part.vocab for part in parts}
        if len(sizes) > 1:
            raise ValueError(f"the supports differ in vocab: {sorted(sizes, key=str)}")
        return cls(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.counts for part in parts]),
            parts[0].vocab,
        )

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """For safetensors."""
        values = {"ids": self.ids, "counts": self.counts}
        if self.vocab is not None:
            values["vocab"] = np.array(self.vocab)
        return {f"{prefix}{name}": torch.as_tensor(value) for name, value in values.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str) -> Support:
        vocab = tensors.get(f"{prefix}vocab")
        ids, counts = (tensors[f"{prefix}{name}"].numpy() for name in ("ids", "counts"))
        return cls(ids, counts, None if vocab is None else int(vocab))

    @cached_property
    def sizes(self) -> np.ndarray:
        """[T]: how many of ``ids`` each token has."""
        if self.vocab is None:
            return self.counts
        return np.minimum(self.counts, bit_words(self.vocab))

    @cached_property
    def starts(self) -> np.ndarray:
        """[T] int64: where each token's ids begin. Kept: each micro-batch takes some tokens."""
        return np.cumsum(self.sizes, dtype=np.int64) - self.sizes

    def take(self, tokens: np.ndarray) -> Support:
        """That of some tokens, in their order."""
        entries = spans(self.starts[tokens], self.sizes[tokens])
        return Support(self.ids[entries], self.counts[tokens], self.vocab)

    def kept(self, vocab: int, device: torch.device, tokens: np.ndarray | None = None) -> Tensor:
        """The ``kept`` of the kernels for ``tokens`` (None: all of them): ids [T, K] int32 padded
        with -1, K the most ids of one of them, or bits [T, ceil(V / 8)] uint8.

        Which of the two follows from the whole support, not from ``tokens``: they round
        differently, and the log-probs of one rollout are compared with each other. Raises
        ValueError if the ids were drawn from another vocabulary.
        """
        if self.vocab not in (None, vocab):
            raise ValueError(f"the sampler's vocabulary has {self.vocab} ids, the head {vocab}")
        part = self if tokens is None else self.take(tokens)
        as_ids = self.counts.max(initial=1) <= bit_words(vocab)
        return torch.as_tensor(part._padded() if as_ids else part._bits(vocab), device=device)

    def _padded(self) -> np.ndarray:
        """[T, K] int32, where no token has bits."""
        num_tokens = len(self.counts)
        padded = np.full((num_tokens, int(self.counts.max(initial=1))), -1, dtype=np.int32)
        token = np.repeat(np.arange(num_tokens), self.counts)
        padded[token, spans(np.zeros(num_tokens, dtype=np.int64), self.counts)] = self.ids
        return padded

    def _bits(self, vocab: int) -> np.ndarray:
        """[T, ceil(V / 8)] uint8."""
        num_tokens, width = len(self.counts), -(-vocab // 8)
        bits = np.empty((num_tokens, width), dtype=np.uint8)
        has_bits = self.sizes < self.counts
        ends = np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])
        for first in range(0, num_tokens, BIT_ROWS):
            last = min(first + BIT_ROWS, num_tokens)
            entries = self.ids[ends[first] : ends[last]]
            wide = has_bits[first:last]
            token = np.repeat(np.arange(last - first), self.sizes[first:last])
            listed = ~wide[token]
            mask = np.zeros((last - first, vocab), dtype=bool)
            mask[token[listed], entries[listed]] = True
            packed = np.packbits(mask, axis=1, bitorder="little")
            if wide.any():
                words = entries[~listed].reshape(-1, bit_words(vocab))
                packed[wide] = words.view(np.uint8)[:, :width]
            bits[first:last] = packed
        return bits


def spans(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Indices: start, start + 1, ... of ``counts`` entries each, one span after the other."""
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - counts), counts)
