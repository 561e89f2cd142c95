"""The support of each sampled token: the ids that a truncating sampler (top-p, top-k) chose among.

Such a sampler draws from softmax over that set, so the trainer's log-probs (old, reference and
policy) are taken over the same set (``kept`` of ``linear_logprobs``): without it every ratio would
carry the mass that was cut off. A leaf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

BIT_ROWS = 1024  # tokens whose [V] bools are held at once on the way to bits


@dataclass(frozen=True)
class Support:
    """Of T tokens: ``counts`` [T] int32, how many ids each was drawn from, and those ``ids`` [sum
    of counts] int32, token after token. On the host: a long rollout's take many gigabytes."""

    ids: np.ndarray
    counts: np.ndarray

    @classmethod
    def of_steps(
        cls,
        steps: Sequence[tuple[Tensor, Tensor, Tensor]],
        lengths: Sequence[int],
    ) -> list[Support]:
        """That of each of R sequences, from what each decoding step knows of its rows.

        Args:
            steps: on the host, of step t: the sequences [B_t] of its rows; how many ids each row
                was drawn from, [B_t]; these ids, row after row.
            lengths: [R], tokens of each sequence; a row may go on beyond it.
        """
        sequence = np.concatenate([rows.numpy() for rows, _, _ in steps])
        step = np.repeat(np.arange(len(steps)), [len(rows) for rows, _, _ in steps])
        counts = np.concatenate([counts.numpy() for _, counts, _ in steps]).astype(np.int32)
        ids = np.concatenate([ids.numpy() for _, _, ids in steps]).astype(np.int32)
        inside = step < np.asarray(lengths)[sequence]
        tokens = np.flatnonzero(inside)[np.argsort(sequence[inside], kind="stable")]
        every = cls(ids, counts).take(tokens)
        ends = np.cumsum(lengths)
        last_id = np.concatenate([[0], np.cumsum(every.counts, dtype=np.int64)])[ends]
        parts = zip(
            np.split(every.ids, last_id[:-1]), np.split(every.counts, ends[:-1]), strict=True
        )
        return [cls(*part) for part in parts]

    @classmethod
    def concatenate(cls, parts: Sequence[Support]) -> Support:
        return cls(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.counts for part in parts]),
        )

    @cached_property
    def starts(self) -> np.ndarray:
        """[T] int64: where each token's ids begin. Kept: each micro-batch takes some tokens."""
        return np.cumsum(self.counts, dtype=np.int64) - self.counts

    def take(self, tokens: np.ndarray) -> Support:
        """That of some tokens, in their order."""
        counts = self.counts[tokens]
        return Support(self.ids[spans(self.starts[tokens], counts)], counts)

    def kept(self, vocab: int, device: torch.device) -> Tensor:
        """The ``kept`` of the kernels, in the smaller of two forms: ids [T, K] int32 padded with
        -1, K the most ids of a token, or bits [T, ceil(V / 8)] uint8."""
        most, num_tokens = int(self.counts.max(initial=1)), len(self.counts)
        token = np.repeat(np.arange(num_tokens), self.counts)
        width = -(-vocab // 8)
        if 4 * most <= width:
            padded = np.full((num_tokens, most), -1, dtype=np.int32)
            padded[token, spans(np.zeros(num_tokens, dtype=np.int64), self.counts)] = self.ids
            return torch.as_tensor(padded, device=device)
        bits = np.empty((num_tokens, width), dtype=np.uint8)
        ends = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])
        for first in range(0, num_tokens, BIT_ROWS):
            last = min(first + BIT_ROWS, num_tokens)
            entries = slice(ends[first], ends[last])
            mask = np.zeros((last - first, vocab), dtype=bool)
            mask[token[entries] - first, self.ids[entries]] = True
            bits[first:last] = np.packbits(mask, axis=1, bitorder="little")
        return torch.as_tensor(bits, device=device)


def spans(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Indices: start, start + 1, ... of ``counts`` entries each, one span after the other."""
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - counts), counts)
