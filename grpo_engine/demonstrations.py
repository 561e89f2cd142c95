"""Rows to imitate, as tokens: which ids a model sees, and which of them carry the loss.

A row is a ``prompt`` with its ``completion``, or ``messages``. Either way it is cut into segments
where the model would begin and end to speak, and each segment is tokenised by itself: in use the
prompt is tokenised before the answer exists, so no token may reach across that border.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from grpo_engine.data import Row, read_rows
from grpo_engine.kernels import pack_rollouts
from grpo_engine.kernels.packing import PackedBatch
from grpo_engine.sft_config import SFTConfig
from grpo_engine.templates import render_prompt, require_template
from grpo_engine.types import UserError

BLOCK = 1024  # rows tokenised at once


class Segment(NamedTuple):
    text: str
    learned: bool
    special: bool = False  # the tokenizer adds its own special tokens


@dataclass(frozen=True)
class Demonstrations:
    """R rows of T tokens in all, flat on the host. A row's first token is never learned: nothing
    predicts it."""

    token_ids: Tensor  # [T] int32
    learned: np.ndarray  # [T] bool: the token carries loss
    offsets: np.ndarray  # [R + 1] int64

    @classmethod
    def of(cls, token_ids: Sequence[np.ndarray], learned: Sequence[np.ndarray]) -> Demonstrations:
        offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in token_ids])])
        flat = torch.from_numpy(np.concatenate(token_ids))
        return cls(flat, np.concatenate(learned), offsets.astype(np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def num_learned(self, chosen: np.ndarray) -> int:
        """Learned tokens of the rows ``chosen``."""
        return sum(int(self.learned_of(row).sum()) for row in chosen)

    def learned_of(self, row: int) -> np.ndarray:
        return self.learned[self.offsets[row] : self.offsets[row + 1]]

    def micro_batch(
        self, chosen: Sequence[int], device: torch.device
    ) -> tuple[PackedBatch, Tensor, Tensor]:
        """(the rows ``chosen`` packed, [M] packed rows that predict a learned token, [M] those
        tokens), int64 on ``device``."""
        order = np.asarray(chosen)
        packed = pack_rollouts(self.token_ids, offsets=self.offsets, order=order, device=device)
        packed = replace(packed, token_ids=packed.token_ids.long())
        starts = np.concatenate([[0], np.cumsum(self.lengths[order])])
        places = [
            start + np.flatnonzero(self.learned_of(row))
            for start, row in zip(starts, order, strict=False)
        ]
        learned = torch.from_numpy(np.concatenate(places)).to(device)
        return packed, learned - 1, packed.token_ids[learned]


# -- rows ------------------------------------------------------------------------------------------


def load_demonstrations(
    config: SFTConfig, source: str, args: Mapping[str, Any], split: str | None, limit: int | None
) -> list[Row]:
    """The rows of ``source``, each with its number as ``row``, and with ``prompt`` and
    ``completion``, or ``messages`` and, as the prompt, those before the first answer. Raises
    UserError naming row and column."""
    rows = read_rows(source, args=args, split=split, limit=limit)
    return [
        {**_standard_row(config, row, f"{source}: row {number}"), "row": number}
        for number, row in enumerate(rows, start=1)
    ]


def _standard_row(config: SFTConfig, row: Row, where: str) -> Row:
    prompt, completion = row.get(config.prompt_column), row.get(config.completion_column)
    messages = row.get(config.messages_column)
    if messages is not None and completion is not None:
        raise UserError(
            f"{where} has both {config.messages_column!r} and {config.completion_column!r}; "
            "drop one of the columns"
        )
    if messages is not None:
        _check_messages(messages, f"{where}: {config.messages_column!r}")
        first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), None)
        if not first:
            what = "has no assistant turn" if first is None else "begins with the assistant"
            raise UserError(f"{where}: {config.messages_column!r} {what}")
        return {**row, "prompt": messages[:first], "messages": messages, "completion": None}
    for column, value in ((config.prompt_column, prompt), (config.completion_column, completion)):
        if value is None:
            raise UserError(
                f"{where} has no {column!r} (nor {config.messages_column!r}); columns: "
                f"{', '.join(sorted(map(str, row)))}"
            )
    if not isinstance(prompt, str):
        _check_messages(prompt, f"{where}: {config.prompt_column!r}")
    for column, value in ((config.prompt_column, prompt), (config.completion_column, completion)):
        wrong = not isinstance(value, str) and column == config.completion_column
        if wrong or (isinstance(value, str) and not value.strip()):
            raise UserError(f"{where}: {column!r} must be a non-empty text, got {value!r:.80}")
    return {**row, "prompt": prompt, "completion": completion, "messages": None}


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where} must be a list of messages, got {messages!r:.80}")
    for message in messages:
        whole = isinstance(message, dict) and all(
            isinstance(message.get(key), str) for key in ("role", "content")
        )
        if not whole or (message["role"] == "assistant" and not message["content"].strip()):
            raise UserError(f"{where} needs role and content (text) in each, got {message!r:.80}")


# -- segments --------------------------------------------------------------------------------------


def segments(config: SFTConfig, tokenizer: Any, row: Row, where: str) -> list[Segment]:
    """The row's text as the model sees it, cut at the borders of what is learned."""
    if row["messages"] is not None:
        return _turns(config, tokenizer, row["messages"], where)
    template, prefix = config.prompt_template, config.response_prefix
    if prefix and row["completion"].startswith(prefix):
        raise UserError(
            f"{where}: the completion begins with response_prefix {prefix!r}, which already ends "
            "the prompt"
        )
    text = render_prompt(
        row,
        template,
        tokenizer,
        system_prompt=config.system_prompt,
        suffix=config.prompt_suffix,
        few_shot=config.few_shot,
        response_prefix=prefix,
    )
    # A chat template writes the special tokens itself; otherwise the tokenizer adds its own.
    answer = _not_opened_twice(text, row["completion"], prefix, where)
    return [Segment(text, False, special=template != "chat"), Segment(answer, True)]


def _not_opened_twice(text: str, completion: str, prefix: str | None, where: str) -> str:
    """The completion behind the prompt ``text``. Some chat templates open the think tag, and an
    answer that was sampled behind it (``grpo-engine sample``) is written whole: what of its
    beginning the prompt has is left out. UserError where the tag is the user's own ``prefix``."""
    opening, rest = text[len(text.rstrip().removesuffix("<think>")) :], completion.lstrip()
    if not (opening.startswith("<think>") and rest.startswith("<think>")):
        return completion
    if prefix:
        raise UserError(
            f"{where}: the completion begins with <think>, which the prompt already ends in: take "
            f"it off the completions, or choose another response_prefix than {prefix!r}"
        )
    return rest.removeprefix(opening if rest.startswith(opening) else "<think>")


def _turns(
    config: SFTConfig, tokenizer: Any, messages: list[dict[str, str]], where: str
) -> list[Segment]:
    """The assistant's turns and what comes between them. What the user sent last is not answered
    and left out."""
    if config.prompt_template != "chat":
        raise UserError(
            f"prompt_template {config.prompt_template!r}: {where} has messages, which need 'chat'"
        )
    for name in ("prompt_suffix", "few_shot", "response_prefix"):
        if getattr(config, name):
            raise UserError(f"{name}: does not apply to rows with messages ({where})")
    require_template("chat", tokenizer)
    if config.system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    found, written = [], ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        place = f"{where}, message {turn + 1}"
        before = _rendered(tokenizer, messages[:turn], place, add_generation_prompt=True)
        through = _rendered(tokenizer, messages[: turn + 1], place, add_generation_prompt=False)
        if not before.startswith(written) or not through.startswith(before):
            raise UserError(
                f"{place}: the chat template writes the conversation up to here otherwise than "
                "when this answer is asked for, so what the model would see is not what it would "
                "learn"
            )
        spoken = through[len(before) :]
        if message["content"].strip() not in spoken:
            raise UserError(
                f"{place}: the chat template leaves out part of the assistant's text (some strip "
                "what is inside <think>); use rows with prompt and completion, or another template"
            )
        found += [Segment(before[len(written) :], False), Segment(spoken, True)]
        written = through
    return found


def _rendered(tokenizer: Any, messages: list[dict[str, str]], where: str, **options: Any) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # templates raise what they like about roles and their order
        raise UserError(f"{where}: the chat template fails: {' '.join(str(error).split())}") from (
            error
        )


# -- tokens ----------------------------------------------------------------------------------------


def tokenize(
    config: SFTConfig, tokenizer: Any, eos_ids: Sequence[int], rows: Sequence[Row], source: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(token ids [n], which are learned [n]) of each row, in order. ``eos_ids``: the token put
    behind an answer that has none, and others that end one."""
    for begin in range(0, len(rows), BLOCK):
        chosen = rows[begin : begin + BLOCK]
        block = [segments(config, tokenizer, row, f"{source}: row {row['row']}") for row in chosen]
        ids = iter(_ids_of(tokenizer, [segment for row in block for segment in row]))
        for row, pieces in zip(chosen, block, strict=True):
            parts = [(next(ids), segment) for segment in pieces]
            if row is rows[0] or len(parts) > 2:
                _check_borders(tokenizer, parts, f"{source}: row {row['row']}")
            yield _joined(config, parts, eos_ids, is_talk=row["messages"] is not None)


def _ids_of(tokenizer: Any, pieces: list[Segment]) -> list[list[int]]:
    found: dict[bool, Iterator[list[int]]] = {}
    for special in (False, True):
        texts = [piece.text for piece in pieces if piece.special == special]
        made = tokenizer(texts, add_special_tokens=special, verbose=False) if texts else None
        found[special] = iter(made["input_ids"] if made else ())
    return [next(found[piece.special]) for piece in pieces]


def _check_borders(tokenizer: Any, parts: Sequence[tuple[list[int], Segment]], where: str) -> None:
    """What the model will be shown in use must be what it is trained on: no tokenizer that puts a
    space before a completion, and no earlier turn that is other tokens once it is history."""
    text, ids = "", []
    for made, segment in parts:
        if segment.learned and text and ids != _whole(tokenizer, text, parts[0][1].special):
            raise UserError(
                f"{where}: the tokenizer cuts the conversation before an answer otherwise as a "
                "whole than in turns; the model would be trained on other tokens than it sees"
            )
        text, ids = text + segment.text, [*ids, *made]
    joined = _whole(tokenizer, text, parts[0][1].special)
    if tokenizer.decode(joined) != tokenizer.decode(ids):
        raise UserError(
            f"{where}: the tokenizer adds text where a completion begins: it becomes "
            f"{tokenizer.decode(ids)[-80:]!r}"
        )


def _whole(tokenizer: Any, text: str, special: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def _joined(
    config: SFTConfig,
    parts: Sequence[tuple[list[int], Segment]],
    eos_ids: Sequence[int],
    *,
    is_talk: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """One row. What a chat template writes behind the token that ends a turn is not learned. The
    last answer gets such a token where it has none."""
    token_ids, learned = [], []
    for number, (made, segment) in enumerate(parts, start=1):
        ids = np.array(made, dtype=np.int32)
        mask = np.full(len(ids), segment.learned)
        if segment.learned and is_talk:
            ends = np.flatnonzero(np.isin(ids, eos_ids))
            mask[ends[-1] + 1 if len(ends) else len(ids) :] = False
        if number == len(parts):
            ids = ids[mask]
            if not len(ids) or ids[-1] not in eos_ids:
                ids = np.append(ids, np.int32(eos_ids[0]))
            mask = np.ones(len(ids), dtype=bool)
        token_ids.append(ids)
        learned.append(mask)
    mask = np.concatenate(learned)
    if not config.completion_only_loss:
        mask[:] = True
    mask[:1] = False
    return np.concatenate(token_ids), mask


def fit(
    config: SFTConfig,
    rows: Sequence[Row],
    made: Iterator[tuple[np.ndarray, np.ndarray]],
    source: str,
) -> tuple[Demonstrations, list[Row], dict[str, int]]:
    """(the rows that fit ``max_length`` as tokens, and as they were, how many were "left out" and
    how many "cut"). UserError where none is left, or at a row that is too long under ``long_rows``
    'error'."""
    token_ids, learned, kept, counts = [], [], [], {"left out": 0, "cut": 0}
    longest = config.max_length
    for row, (ids, mask) in zip(rows, made, strict=True):
        if len(ids) > longest and config.long_rows == "error":
            raise UserError(
                f"{source}: row {row['row']} has {len(ids)} tokens, more than "
                f"max_length={longest}; raise it, or choose long_rows skip or truncate"
            )
        cut = len(ids) > longest
        # A prompt that fills max_length leaves nothing to learn.
        if cut and (config.long_rows == "skip" or not mask[:longest].any()):
            counts["left out"] += 1
            continue
        counts["cut"] += cut
        token_ids.append(ids[:longest])
        learned.append(mask[:longest])
        kept.append(row)
    if not kept:
        raise UserError(f"{source}: every row is longer than max_length={longest}")
    return Demonstrations.of(token_ids, learned), kept, counts
