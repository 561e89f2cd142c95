"""The rows a reward model learns from, as token sequences: pairs of answers of which one was
preferred (helpful), or answers labelled safe or unsafe (safety).

Each row is read the way the finished model will read answers: the card's template around the
prompt, and of the answer only what is in the card's scope.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo_engine.kernels import pack_rollouts
from grpo_engine.kernels.packing import PackedBatch
from grpo_engine.reward_network import RewardNetwork
from grpo_engine.rewards.model import ScoreCard
from grpo_engine.types import UserError

Row = Mapping[str, Any]
ANSWER_COLUMNS = {"helpful": ("chosen", "rejected"), "safety": ("completion",)}
LABELS = {"safe": 1, "unsafe": 0}


@dataclass(frozen=True)
class JudgedRows:
    """R rows of A sequences each (A = 2: chosen, rejected; A = 1: one answer), flat, on the host.
    Sequence a of row r is number r * A + a."""

    token_ids: Tensor  # [T] int64: prompt, answer, end-of-sequence, one sequence after another
    lengths: np.ndarray  # [R * A] int64: tokens of each sequence
    answer_lengths: np.ndarray  # [R * A] int64: tokens of the judged part alone
    prompt_numbers: np.ndarray  # [R] int64: rows of one prompt have one number
    labels: np.ndarray | None  # [R] fp64, 1 safe and 0 unsafe; None for pairs

    def __len__(self) -> int:
        return len(self.prompt_numbers)

    @property
    def answers(self) -> int:
        """A, the sequences of a row."""
        return 2 if self.labels is None else 1

    @property
    def row_tokens(self) -> np.ndarray:
        """[R] tokens of each row's sequences together."""
        return self.lengths.reshape(-1, self.answers).sum(axis=1)

    def pack(self, rows: Sequence[int], device: torch.device) -> PackedBatch:
        """The sequences of ``rows``, in that order, as one packed row."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        order = (np.asarray(rows)[:, None] * self.answers + np.arange(self.answers)).ravel()
        return pack_rollouts(self.token_ids, offsets=offsets, order=order, device=device)


def read_judged_rows(
    rows: Sequence[Row],
    card: ScoreCard,
    network: RewardNetwork,
    *,
    source: str,
    max_length: int,
    long_rows: str = "error",
    unusable_rows: str = "error",
) -> tuple[JudgedRows, dict[str, int]]:
    """(the rows, how many were left out by which option).

    A row with a sequence of more than ``max_length`` tokens is an error or, with ``long_rows``
    "skip", left out; so is, by ``unusable_rows``, a pair whose answers are the same within the
    scope: it has nothing to learn. Raises UserError naming the source, row, column and value for
    these, for a missing or wrong column and for a sequence past the model's positions, and when no
    row is left.
    """
    options = {"long_rows": long_rows, "unusable_rows": unusable_rows}
    positions = getattr(network.text_config, "max_position_embeddings", None)
    left_out: Counter[str] = Counter()
    sequences, answer_lengths, kept, labels = [], [], [], []
    for number, row in enumerate(rows, start=1):
        where = f"{source}: row {number}"
        answers = [_answer(row, column, where) for column in ANSWER_COLUMNS[card.kind]]
        label = None if card.kind == "helpful" else _label(row, where)
        encoded = [card.encode(row["prompt"], answer, network) for answer in answers]
        option, problem = _problem(encoded, card.scope, max_length, positions)
        if problem and options.get(option) != "skip":
            hint = f"; leave such rows out with --{option} skip" if option else ""
            raise UserError(f"{where}: {problem}{hint}")
        if problem:
            left_out[option] += 1
            continue
        prompt_length = len(card.encode(row["prompt"], "", network))
        sequences += [np.array(ids, dtype=np.int64) for ids in encoded]  # a list is 4 times that
        answer_lengths += [len(ids) - prompt_length for ids in encoded]
        kept.append(_prompt_key(row))
        labels.append(label)
    if not kept:
        raise UserError(f"{source}: no row is left ({dict(left_out)})")
    judged = JudgedRows(
        token_ids=torch.from_numpy(np.concatenate(sequences)),
        lengths=np.array([len(ids) for ids in sequences]),
        answer_lengths=np.array(answer_lengths),
        prompt_numbers=_numbered(kept),
        labels=None if card.kind == "helpful" else np.array(labels, dtype=np.float64),
    )
    return judged, dict(left_out)


def _problem(
    encoded: Sequence[list[int]], scope: str, max_length: int, positions: int | None
) -> tuple[str, str]:
    """(the option that leaves such rows out, what is wrong with a row's sequences), or empty."""
    longest = max(map(len, encoded))
    if len(encoded) == 2 and encoded[0] == encoded[1]:
        return "unusable_rows", f"chosen and rejected are the same within scope {scope!r}"
    if longest > max_length:
        words = f"a sequence of {longest} tokens is longer than max_length={max_length}"
        return "long_rows", words
    if positions is not None and longest > positions:
        words = f"a sequence of {longest} tokens passes the {positions} positions of the model"
        return "", f"{words}; lower max_length={max_length}"
    return "", ""


def split_off(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows): about ``share`` of the prompts, at least one, drawn by a hash
    of seed and prompt, so that no prompt is on both sides and a row's side does not depend on the
    other rows' order. Raises UserError when one prompt is all there is."""
    prompts = sorted({_prompt_key(row) for row in rows}, key=lambda key: _hash(seed, key))
    if len(prompts) < 2:
        raise UserError(f"eval_share={share}: the rows have one prompt only; none is left to train")
    count = min(max(1, round(share * len(prompts))), len(prompts) - 1)
    chosen = set(prompts[:count])
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        sides[_prompt_key(row) in chosen].append(row)
    return sides


def _hash(seed: int, key: str) -> bytes:
    return hashlib.blake2b(repr((seed, "held out", key)).encode()).digest()


def _prompt_key(row: Row) -> str:
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def _numbered(keys: Sequence[str]) -> np.ndarray:
    known: dict[str, int] = {}
    return np.array([known.setdefault(key, len(known)) for key in keys])


def _answer(row: Row, column: str, where: str) -> str:
    """A text, or the one assistant message that holds it."""
    value = row.get(column)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        value = value[0].get("content") if value[0].get("role") == "assistant" else value
    if not isinstance(value, str) or not value.strip():
        found = "no such column" if column not in row else f"{value!r:.80}"
        raise UserError(f"{where}: {column!r} must be an answer's text, got {found}")
    return value


def _label(row: Row, where: str) -> float:
    label = row.get("label")
    label = LABELS.get(label, label) if isinstance(label, str) else label
    if not isinstance(label, (bool, int, float)) or label not in (0, 1):
        found = "no such column" if "label" not in row else f"{row['label']!r:.80}"
        raise UserError(f"{where}: 'label' must be 1 (safe) or 0 (unsafe), got {found}")
    return float(label)
