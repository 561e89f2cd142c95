"""One rollout: prompts x G outputs from the current policy, their rewards and advantages, as arrays
to train on.

Nothing here keeps random state: every seed is a hash of (run seed, what it is for, its counters),
so a resumed run draws exactly what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo_engine.data import columns_of
from grpo_engine.generation.base import Generator
from grpo_engine.kernels import completion_rows, group_advantages, pack_rollouts
from grpo_engine.kernels.packing import PackedBatch
from grpo_engine.rewards import RewardPool, RewardReport
from grpo_engine.support import Support, spans
from grpo_engine.types import Generation, GenerationRequest, Rollout, SamplingParams, UserError


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Prompt:
    """A data row as the model sees it."""

    row: dict[str, Any]
    text: str
    token_ids: list[int]


def sample_rollouts(
    generator: Generator,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    num_generations: int,
    sampling: SamplingParams,
    seed_parts: tuple[int | str, ...],
    on_rollouts: Callable[[Sequence[int], Sequence[Rollout]], None] | None = None,
) -> list[Rollout]:
    """``num_generations`` outputs of each prompt, grouped: rollout r belongs to prompt r // G.

    ``on_rollouts`` gets the indices of some rollouts and these, as soon as they are drawn.
    """
    requests = [
        GenerationRequest(prompt.token_ids, derive_seed(*seed_parts, group, sample))
        for group, prompt in enumerate(prompts)
        for sample in range(num_generations)
    ]
    rollouts: dict[int, Rollout] = {}

    def take(members: Sequence[int], drawn: Sequence[Generation]) -> None:
        for index, generation in zip(members, drawn, strict=True):
            group = index // num_generations
            rollouts[index] = _rollout(tokenizer, prompts[group], group, generation)
        if on_rollouts is not None:
            on_rollouts(members, [rollouts[index] for index in members])

    generator.generate(requests, sampling, on_batch=take)
    return [rollouts[index] for index in range(len(requests))]


def _rollout(tokenizer: Any, prompt: Prompt, group: int, generation: Generation) -> Rollout:
    return Rollout(
        row=prompt.row,
        prompt=prompt.text,
        prompt_ids=prompt.token_ids,
        completion=tokenizer.decode(generation.text_ids, skip_special_tokens=False),
        completion_ids=generation.completion_ids,
        sampler_logprobs=generation.sampler_logprobs,
        finish_reason=generation.finish_reason,
        group=group,
        support=generation.support,
    )


def score_rollouts(pool: RewardPool, rollouts: list[Rollout]) -> RewardReport:
    """Fill ``rewards`` and ``reward`` (the weighted sum) in place.

    A function that returns None does not apply to the row and is left out of its sum. A function
    that *failed* (timeout, exception, worker death, not a number) makes the rollout unscorable:
    ``reward`` stays None, and it takes no part in its group's baseline nor in the loss.
    """
    report = pool.score(
        [r.prompt for r in rollouts],
        [r.completion for r in rollouts],
        columns_of([r.row for r in rollouts]),
        completion_ids=[r.completion_ids for r in rollouts],
    )
    hand_out(report, rollouts)
    return report


def hand_out(report: RewardReport, rollouts: Sequence[Rollout]) -> None:
    """Give each rollout its ``rewards`` and their sum."""
    for index, (rollout, total) in enumerate(zip(rollouts, report.totals, strict=True)):
        rollout.rewards = {name: scores[index] for name, scores in report.scores.items()}
        rollout.reward = total


def assign_advantages(rollouts: list[Rollout], num_generations: int, scale: str) -> None:
    """A = (r - mean) / std within each group (eq. 3 of the R1 paper); unscorable rollouts get 0."""
    rewards = torch.tensor([np.nan if r.reward is None else r.reward for r in rollouts])
    advantages = group_advantages(rewards, num_generations, scale=scale)
    for rollout, advantage in zip(rollouts, advantages.tolist(), strict=True):
        rollout.advantage = advantage


@dataclass
class MicroBatch:
    """Packed sequences and, for the rows that predict completion tokens, what the loss needs."""

    packed: PackedBatch  # prompts + completions, N tokens
    rows: Tensor  # [M] int64: hidden row that predicts completion token m
    completions: PackedBatch  # the M completion tokens with their per-token fields
    kept: Tensor | None = None  # what each of the M was drawn from, where the sampler truncates


@dataclass
class RolloutArrays:
    """The sequences of one rollout, flat, on the training device. R sequences, T completion tokens
    in all.

    Saved in checkpoints, so that a run stopped between the mini-batches of a rollout continues
    exactly.
    """

    prompt_lengths: np.ndarray  # [R] int64
    completion_lengths: np.ndarray  # [R] int64
    counted: np.ndarray  # [R] bool: scorable, so part of the loss's denominator
    unmasked: np.ndarray  # [R] bool: not masked for being cut by the cap
    live: np.ndarray  # [R] bool: has a gradient, so worth a forward pass
    max_completion_length: int  # the cap it was sampled under
    token_ids: Tensor  # [sum(prompt + completion)] int64
    completion_ids: Tensor  # [T] int64
    sampler_logprobs: Tensor  # [T] fp32
    advantages: Tensor  # [R] fp32
    old_logprobs: Tensor | None = None  # [T] fp32
    ref_logprobs: Tensor | None = None  # [T] fp32
    support: Support | None = None  # of the T tokens, where the sampler truncates
    sampled_step: int | None = None  # optimiser steps done by the weights that it was drawn from
    order: list[np.ndarray] = field(
        default_factory=list
    )  # mini-batches still to do, rollout indices

    @classmethod
    def from_rollouts(
        cls,
        rollouts: list[Rollout],
        *,
        device: torch.device,
        drop_dead: bool,
        mask_truncated: bool,
        max_completion_length: int,
    ) -> RolloutArrays:
        """Of rollouts with rewards and advantages. See ``take_rewards``."""
        arrays = cls.before_rewards(
            rollouts,
            device=device,
            mask_truncated=mask_truncated,
            max_completion_length=max_completion_length,
        )
        arrays.take_rewards(rollouts, drop_dead=drop_dead)
        return arrays

    def take_rewards(self, rollouts: list[Rollout], *, drop_dead: bool) -> None:
        """``drop_dead``: groups whose rewards are all equal have zero advantage; without a KL or
        entropy term their gradient is exactly zero, and they are never packed (they still count in
        the denominator)."""
        self.counted = np.array([r.reward is not None for r in rollouts])
        self.live = self.counted & self.unmasked
        if drop_dead:
            self.live &= np.array([r.advantage != 0.0 for r in rollouts])
        self.advantages = torch.tensor(
            [r.advantage for r in rollouts],
            dtype=torch.float32,
            device=self.token_ids.device,
        )

    @classmethod
    def before_rewards(
        cls,
        rollouts: list[Rollout],
        *,
        device: torch.device,
        mask_truncated: bool,
        max_completion_length: int,
    ) -> RolloutArrays:
        """Of rollouts that are still being scored, as if all of them came to count."""
        unmasked = np.array([not mask_truncated or r.finish_reason == "stop" for r in rollouts])
        completion_ids = [t for r in rollouts for t in r.completion_ids]
        token_ids = [t for r in rollouts for t in (*r.prompt_ids, *r.completion_ids)]
        known = rollouts[0].support is not None
        support = Support.concatenate([r.support for r in rollouts]) if known else None
        return cls(
            prompt_lengths=np.array([len(r.prompt_ids) for r in rollouts]),
            completion_lengths=np.array([len(r.completion_ids) for r in rollouts]),
            counted=np.ones(len(rollouts), dtype=bool),
            unmasked=unmasked,
            live=unmasked,
            max_completion_length=max_completion_length,
            token_ids=torch.tensor(token_ids, dtype=torch.int64, device=device),
            completion_ids=torch.tensor(completion_ids, dtype=torch.int64, device=device),
            sampler_logprobs=torch.tensor(
                [x for r in rollouts for x in r.sampler_logprobs],
                dtype=torch.float32,
                device=device,
            ),
            advantages=torch.zeros(len(rollouts), device=device),
            support=support,
        )

    @property
    def lengths(self) -> np.ndarray:
        return self.prompt_lengths + self.completion_lengths

    def micro_batch(self, indices: Sequence[int], vocab: int) -> MicroBatch:
        """Pack the sequences ``indices``, in that order. ``vocab``: rows of the head."""
        chosen = np.asarray(indices)
        packed = pack_rollouts(self.token_ids, offsets=_offsets(self.lengths), order=chosen)
        fixed = {"old_logprobs": self.old_logprobs, "ref_logprobs": self.ref_logprobs}
        completions = pack_rollouts(
            self.completion_ids,
            {
                "sampler_logprobs": self.sampler_logprobs,
                **{k: v for k, v in fixed.items() if v is not None},
            },
            per_sequence={"advantages": self.advantages},
            offsets=_offsets(self.completion_lengths),
            order=chosen,
        )
        rows = completion_rows(self.prompt_lengths[chosen], self.completion_lengths[chosen])
        device, kept = self.token_ids.device, None
        if self.support is not None:
            starts, counts = (
                _offsets(self.completion_lengths)[chosen],
                self.completion_lengths[chosen],
            )
            kept = self.support.kept(vocab, device, spans(starts, counts))
        return MicroBatch(packed=packed, rows=rows.to(device), completions=completions, kept=kept)

    def to_tensors(self) -> dict[str, Tensor]:
        """Contiguous CPU tensors for safetensors."""
        tensors = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "support":
                if value is not None:
                    tensors |= value.to_tensors("support.")
            elif f.name == "order":
                for k, mini_batch in enumerate(value):
                    tensors[f"order.{k:05d}"] = torch.as_tensor(mini_batch)
            elif value is not None:
                # cloned: old and reference log-probs may be one tensor, which safetensors refuses
                tensors[f.name] = torch.as_tensor(value).detach().cpu().clone()
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], device: torch.device) -> RolloutArrays:
        on_host = ("prompt_lengths", "completion_lengths", "counted", "unmasked", "live")
        for name in on_host:
            if name not in tensors:
                raise UserError(
                    f"the saved rollout has no {name!r}: another version of grpo_engine wrote it; "
                    "resume from a checkpoint between two rollouts"
                )
        values: dict[str, Any] = {name: tensors[name].numpy() for name in on_host}
        if "support.ids" in tensors:
            values["support"] = Support.from_tensors(tensors, "support.")
        for name in ("max_completion_length", "sampled_step"):
            if name in tensors:
                values[name] = int(tensors[name])
        for f in fields(cls):
            if f.name not in values and f.name in tensors:
                values[f.name] = tensors[f.name].to(device)
        order = [tensors[name].numpy() for name in sorted(tensors) if name.startswith("order.")]
        return cls(**values, order=order)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """[R] lengths -> [R + 1] starts."""
    return np.concatenate([[0], np.cumsum(lengths)])


def split_mini_batches(
    num_rollouts: int, parts: int, iterations: int, seed: int
) -> list[np.ndarray]:
    """``iterations`` random splits of the rollout into ``parts`` equal mini-batches."""
    generator = np.random.default_rng(seed)
    return [
        part
        for _ in range(iterations)
        for part in np.split(generator.permutation(num_rollouts), parts)
    ]


def rollout_metrics(
    rollouts: list[Rollout],
    report: RewardReport,
    arrays: RolloutArrays,
    num_generations: int,
) -> dict[str, Any]:
    """What metrics.jsonl says of a rollout (TRL's names). Means are over scored rollouts."""
    lengths = arrays.completion_lengths
    rewards = np.array([np.nan if r.reward is None else r.reward for r in rollouts])
    groups = rewards.reshape(-1, num_generations)
    spread = np.array([np.ptp(g[~np.isnan(g)]) if (~np.isnan(g)).any() else 0.0 for g in groups])
    rows: dict[str, Any] = {
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(
            np.mean([r.finish_reason == "length" for r in rollouts])
        ),
        "frac_reward_zero_std": float(np.mean(spread == 0)),
        "frac_groups_dropped": float(
            np.mean(~arrays.live.reshape(-1, num_generations).any(axis=1))
        ),
    }
    scored = rewards[~np.isnan(rewards)]
    if len(scored):
        rows["reward"], rows["reward_std"] = float(scored.mean()), float(scored.std())
    for name, scores in report.scores.items():
        if not report.outcomes[name].total():  # no row of its domains in this rollout
            continue
        values = [score for score in scores if score is not None]
        if values:
            rows[f"rewards/{name}/mean"] = float(np.mean(values))
            rows[f"rewards/{name}/std"] = float(np.std(values))
        rows[f"rewards/{name}/error_rate"] = report.error_rate(name)
        rows |= {f"rewards/{name}/{o}_rate": share for o, share in report.rates(name).items()}
        if name in report.first_errors:
            rows[f"rewards/{name}/first_error"] = report.first_errors[name]
    return rows | {name: float(np.mean(values)) for name, values in report.measures.items()}


def domain_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Share and mean reward of each domain (``scenarios.with_domains``) in a rollout."""
    found: dict[str, float] = {}
    for domain in sorted({r.row["domain"] for r in rollouts}):
        rewards = [r.reward for r in rollouts if r.row["domain"] == domain]
        scored = [reward for reward in rewards if reward is not None]
        found[f"domains/{domain}/share"] = len(rewards) / len(rollouts)
        if scored:
            found[f"domains/{domain}/reward"] = float(np.mean(scored))
    return found
