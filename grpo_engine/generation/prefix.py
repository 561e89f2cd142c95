"""Decoding a group: its prompt's keys and values are stored and read once, not once per completion.

A decoding step of a small model is bound by reading the key/value cache. The G completions of a
prompt share its part of the cache, so their queries attend to it together, a [G, Dh] x [Dh, P]
product instead of G vector products over G copies. Each completion then attends to its own tokens,
and the two parts are joined before the softmax:

    softmax([q Kp' ; q Kc']) [Vp ; Vc]      Kp, Vp of the prompt, Kc, Vc of the completion

All rows of a batch have drawn the same number of tokens, so the completion part has no padding and
needs no mask.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SharedPrefix:
    """The prompts of a decoding batch, as a ``RoutedMask`` of the policy's attention.

    U prompts, R rows (completions), P prompt tokens, G slots per prompt.

    Args:
        keys, values: per layer [U, Hkv, P, Dh].
        mask: [U, P], 0 on the left padding; None = no padding.
        prompt_of_row: [R] indices of prompts.
    """

    def __init__(
        self,
        keys: list[Tensor],
        values: list[Tensor],
        mask: Tensor | None,
        prompt_of_row: Tensor,
    ) -> None:
        # The cache holds views with the head axis inside the token axis; a product would copy them.
        self.keys = [x.contiguous() for x in keys]
        self.values = [x.contiguous() for x in values]
        self.padding = None if mask is None else mask == 0  # [U, P]
        self._seat(prompt_of_row)

    def _seat(self, prompt_of_row: Tensor) -> None:
        """Give every row a slot [prompt, place]. Syncs with the host: only when rows change."""
        self.prompt_of_row = prompt_of_row
        counts = torch.bincount(prompt_of_row, minlength=len(self.keys[0]))
        self.width = int(counts.max())  # G
        order = prompt_of_row.argsort(stable=True)
        first = counts.cumsum(0) - counts
        place = torch.arange(len(order), device=order.device) - first[prompt_of_row[order]]
        self.slot_of_row = torch.empty_like(order)
        self.slot_of_row[order] = prompt_of_row[order] * self.width + place
        # An empty slot repeats row 0: computed and not read.
        self.row_of_slot = order.new_zeros(len(counts) * self.width)
        rows = torch.arange(len(order), device=order.device)
        self.row_of_slot[self.slot_of_row] = rows
        padding = self.padding
        self.padding_of_row = None if padding is None else padding[prompt_of_row][:, None, None, :]
        self.in_place = torch.equal(self.row_of_slot, rows)  # full groups in order: nothing to move

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only; prompts without a row left are let go."""
        prompts, prompt_of_row = self.prompt_of_row[rows].unique(return_inverse=True)
        if len(prompts) < len(self.keys[0]):
            self.keys = [x.index_select(0, prompts) for x in self.keys]
            self.values = [x.index_select(0, prompts) for x in self.values]
            self.padding = None if self.padding is None else self.padding[prompts]
        self._seat(prompt_of_row)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        softcap: float | None,
    ) -> Tensor:
        """query [R, Hq, 1, Dh], the completions' key, value [R, Hkv, t, Dh] -> [R, 1, Hq, Dh]."""
        rows, num_heads, _, width = query.shape
        kv_heads = key.shape[1]
        repeat = num_heads // kv_heads
        own = query.reshape(rows, kv_heads, repeat, width)
        prompt_scores = self._to_slots(own) @ self.keys[layer].transpose(-1, -2)
        prompt_scores = self._to_rows(prompt_scores, repeat)  # [R, Hkv, repeat, P]
        own_scores = own @ key.transpose(-1, -2)  # [R, Hkv, repeat, t]
        scores = torch.cat([prompt_scores, own_scores], dim=-1).float()
        scores = scores * (width**-0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        num_prompt = prompt_scores.shape[-1]
        if self.padding_of_row is not None:
            scores[..., :num_prompt].masked_fill_(self.padding_of_row, -torch.inf)
        probs = scores.softmax(-1).to(value.dtype)
        prompt_probs, own_probs = probs.split([num_prompt, key.shape[2]], dim=-1)
        out = self._to_rows(self._to_slots(prompt_probs) @ self.values[layer], repeat)
        out = out + own_probs @ value
        return out.reshape(rows, 1, num_heads, value.shape[-1])

    def _to_slots(self, x: Tensor) -> Tensor:
        """[R, Hkv, repeat, E] -> [U, Hkv, G * repeat, E]."""
        x = x if self.in_place else x.index_select(0, self.row_of_slot)
        return x.unflatten(0, (-1, self.width)).transpose(1, 2).flatten(2, 3)

    def _to_rows(self, x: Tensor, repeat: int) -> Tensor:
        """[U, Hkv, G * repeat, E] -> [R, Hkv, repeat, E]."""
        x = x.unflatten(2, (self.width, repeat)).transpose(1, 2).flatten(0, 1)
        return x if self.in_place else x.index_select(0, self.slot_of_row)
