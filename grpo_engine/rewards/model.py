"""Scoring answers with a trained reward model (DeepSeek-R1 v2, 3.1, equations 5 and 6).

A helpfulness model reads the prompt and the final summary only, so that the reward says nothing
about the reasoning; a safety model reads the whole response (v1, 2.3.4). Equation 5 prints the
helpful reward of a *pair* of responses, and how one response is scored in RL is not reported: here
each response gets the network's score of it alone, which is the Bradley-Terry strength whose
differences the network was trained on. Nor is the scale of the scores: see ``SCALES``.

Runs in the process that calls it, beside the policy, never in a reward worker: it needs the device.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grpo_engine.checkpoint import (
    SEAL,
    DamagedCheckpoint,
    list_checkpoints,
    verify_checkpoint,
)
from grpo_engine.kernels import pack_rollouts, plan_batches
from grpo_engine.reward_network import RewardNetwork
from grpo_engine.rewards.language import split_thinking
from grpo_engine.templates import render_prompt, require_template
from grpo_engine.types import UserError

CARD_FILE = "reward_model.json"
KINDS = ("helpful", "safety")
SCOPES = ("summary", "response")
# raw: the head's output; standardised: (raw - mean) / std over the training answers;
# probability: the logistic function of raw, for safety the probability of "safe"
SCALES = ("raw", "standardised", "probability")
EMPTY_SUMMARIES = ("lowest", "scored")


def judged_part(completion: str, scope: str) -> str:
    """What of ``completion`` the model reads: all of it, or the summary.

    The summary is what follows the last ``</think>``, without the space around it. It is empty if
    the reasoning was never closed; an answer without any think tag (the paper's data has such, for
    a mere "hello") is all summary.
    """
    if scope == "response":
        return completion
    if "<think>" not in completion and "</think>" not in completion:
        return completion.strip()
    return split_thinking(completion)[1].strip()


@dataclass(frozen=True)
class ScoreCard:
    """``reward_model.json``: what a score of the model beside it means, and how to ask for one.

    ``mean``, ``std`` and ``lowest`` are of raw scores of training answers. ``empty_summary``: an
    answer without a summary gets the ``lowest`` of them, or is ``scored`` as the empty text.
    """

    kind: str
    scope: str
    prompt_template: str = "none"
    system_prompt: str | None = None
    prompt_suffix: str | None = None
    score_scale: str = "raw"
    mean: float = 0.0
    std: float = 1.0
    lowest: float = 0.0
    scored_answers: int = 0  # of which mean, std and lowest are
    empty_summary: str = "lowest"
    accuracy: float | None = None  # on held-out rows, at the step of this checkpoint
    step: int = 0

    def text(self, prompt: Any, completion: str, tokenizer: Any) -> str:
        """The text the network reads, without the end-of-sequence token that follows it.

        ``prompt``: a string or messages, as in the data, not as rendered for the policy. A template
        that opens the think tag for the policy does not open it here: the summary follows no
        reasoning, and a response brings its own tag.
        """
        rendered = render_prompt(
            {"prompt": prompt},
            self.prompt_template,
            tokenizer,
            system_prompt=self.system_prompt,
            suffix=self.prompt_suffix,
        )
        return re.sub(r"<think>\s*$", "", rendered) + judged_part(completion, self.scope)

    @property
    def add_special_tokens(self) -> bool:
        """A chat template writes special tokens itself; otherwise the tokenizer adds its own."""
        return self.prompt_template != "chat"

    def encode(self, prompt: Any, completion: str, network: RewardNetwork) -> list[int]:
        """Token ids of ``text``, ending in end-of-sequence."""
        text = self.text(prompt, completion, network.tokenizer)
        return network.encode(text, add_special_tokens=self.add_special_tokens)

    def lacks_summary(self, completion: str) -> bool:
        return self.scope == "summary" and not judged_part(completion, self.scope)

    def scaled(self, raw: np.ndarray) -> np.ndarray:
        """fp64 raw scores in ``score_scale``."""
        if self.score_scale == "standardised":
            return (raw - self.mean) / self.std
        if self.score_scale == "probability":
            return np.exp(-np.logaddexp(0.0, -raw))
        return raw

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        (folder / CARD_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> ScoreCard:
        """UserError naming the file when it is not there or not what ``write`` wrote."""
        path = folder / CARD_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"reward model {folder}: there is no {CARD_FILE} in it") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not {"kind", "scope"} <= values.keys() <= names:
            raise UserError(f"{path}: must hold kind, scope and what else a score card has")
        card = cls(**values)
        for name, known in (
            ("kind", KINDS),
            ("scope", SCOPES),
            ("score_scale", SCALES),
            ("empty_summary", EMPTY_SUMMARIES),
        ):
            if getattr(card, name) not in known:
                raise UserError(f"{path}: {name} {getattr(card, name)!r} is none of {known}")
        if not card.std > 0:
            raise UserError(f"{path}: std {card.std} must be above 0")
        return card


def saved_folder(source: str | os.PathLike[str]) -> Path:
    """Where ``source`` leads: a checkpoint, or the newest one of a ``reward-model`` run."""
    path = Path(source).expanduser()
    if not (path / CARD_FILE).is_file() and path.is_dir():
        path = (list_checkpoints(path) or [path])[-1]
    return path


class ScalarModel:
    """A saved reward model, ready to score. Deterministic: no sampling, no dropout."""

    def __init__(
        self, network: RewardNetwork, card: ScoreCard, *, max_tokens_per_microbatch: int = 16384
    ) -> None:
        if max_tokens_per_microbatch < 1:
            raise UserError(f"max_tokens_per_microbatch={max_tokens_per_microbatch}: must be >= 1")
        require_template(card.prompt_template, network.tokenizer)
        self.network, self.card = network, card
        self.max_tokens_per_microbatch = max_tokens_per_microbatch

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: str = "auto",
        dtype: str = "float32",
        score_scale: str | None = None,
        max_tokens_per_microbatch: int = 16384,
    ) -> ScalarModel:
        """``folder``: a checkpoint of a ``reward-model`` run, or the run, whose newest checkpoint
        is taken. ``score_scale`` replaces the saved one.

        Raises UserError for a folder that holds no reward model or a damaged one, or an unknown
        scale.
        """
        path = saved_folder(folder)
        card = ScoreCard.read(path)
        if (path / SEAL).is_file():
            try:
                verify_checkpoint(path)
            except DamagedCheckpoint as damage:
                raise UserError(
                    f"reward model {path}: the checkpoint is damaged: {damage}"
                ) from damage
        if score_scale is not None:
            if score_scale not in SCALES:
                raise UserError(f"score_scale must be one of {SCALES}, got {score_scale!r}")
            card = ScoreCard(**{**asdict(card), "score_scale": score_scale})
        network = RewardNetwork.from_saved(path, device=device, dtype=dtype)
        return cls(network, card, max_tokens_per_microbatch=max_tokens_per_microbatch)

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        *,
        thinking_prefilled: bool = False,
    ) -> list[float]:
        """One score an answer, in the card's scale; higher is better.

        ``prompts`` are strings or messages as in the data (a rollout's ``row["prompt"]``): the
        card's own template is put around them. ``thinking_prefilled``: the policy's prompts ended
        in an opened think tag, so the completions begin inside the reasoning. There is no limit of
        length (v2, 3.1); an answer longer than ``max_tokens_per_microbatch`` is scored alone.

        Raises ValueError when the lists differ in length.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions")
        if thinking_prefilled:
            completions = ["<think>" + completion for completion in completions]
        card = self.card
        raw = np.full(len(prompts), card.lowest)
        judged = [
            index
            for index, completion in enumerate(completions)
            if card.empty_summary == "scored" or not card.lacks_summary(completion)
        ]
        raw[judged] = self.raw_scores(
            [card.encode(prompts[i], completions[i], self.network) for i in judged]
        )
        return card.scaled(raw).tolist()

    def raw_scores(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """[S] fp64 outputs of the head for token sequences that end in end-of-sequence.

        Raises FloatingPointError when one is not finite: the model is broken, not the answer.
        """
        scores = network_scores(self.network, sequences, self.max_tokens_per_microbatch)
        if not np.isfinite(scores).all():
            index = int(np.argmin(np.isfinite(scores)))
            raise FloatingPointError(f"reward model: score {index} is {scores[index]}")
        return scores


@torch.no_grad()
def network_scores(
    network: RewardNetwork, sequences: Sequence[Sequence[int]], max_tokens: int
) -> np.ndarray:
    """[S] fp64 scores, computed in packed rows of at most ``max_tokens`` tokens, or of a single
    sequence that is longer."""
    scores = np.zeros(len(sequences))
    if not len(sequences):
        return scores
    lengths = [len(sequence) for sequence in sequences]
    for chunk in plan_batches(lengths, max(max_tokens, *lengths, 1))[0]:
        packed = pack_rollouts([list(sequences[i]) for i in chunk], device=network.device)
        found = network.scores(
            packed.token_ids, packed.position_ids, packed.cu_seqlens, packed.max_seqlen
        )
        scores[chunk] = found.double().cpu().numpy()
    return scores
