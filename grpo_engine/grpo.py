"""GRPO as DeepSeek-R1 runs it (R1-Zero and the RL stages): the loop, and the state it carries.

One rollout (arXiv 2501.12948v2, section 2.1 and appendix A.3):

    sample G outputs of P prompts from the policy          -> sample_rollouts
    reward each output, by rule and by reward models       -> RolloutScoring
    advantage = (r - mean(group)) / std(group)             -> assign_advantages
    split the P x G outputs at random into mini-batches    -> split_mini_batches
    for each mini-batch: one optimiser step                -> GRPORun.update
    every K steps: reference <- policy                     -> GRPORun.refresh_reference

No critic; the KL term is in the loss; training never builds logits: packed hidden states go
straight into ``linear_grpo_loss``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo_engine.config import GRPOConfig
from grpo_engine.draws import Draw, DrawAhead
from grpo_engine.generation.base import Generator
from grpo_engine.kernels import LossMetrics, linear_grpo_loss, linear_logprobs, plan_batches
from grpo_engine.learner import TRAINER_FOLDER, Learner
from grpo_engine.mismatch import mismatch_metrics
from grpo_engine.policy import Policy
from grpo_engine.rewards import RewardPool, RewardReport
from grpo_engine.rollouts import (
    MicroBatch,
    Prompt,
    RolloutArrays,
    assign_advantages,
    derive_seed,
    domain_metrics,
    rollout_metrics,
    sample_rollouts,
    split_mini_batches,
)
from grpo_engine.scenarios import Mixture, PromptStream
from grpo_engine.scoring import ModelReward, RolloutScoring
from grpo_engine.types import Rollout, SamplingParams


class GRPORun(Learner):
    """The state of a run between two steps, and the moves that change it.

    ``rollouts_done`` counts rollouts sampled; ``arrays`` is the rollout being trained on (None: the
    next step starts with a new one), ``ahead`` the next one where it is sampled meanwhile.
    """

    COUNTERS = (*Learner.COUNTERS, "rollouts_done", "reference_step", "sampling_seconds")

    def __init__(
        self,
        config: GRPOConfig,
        policy: Policy,
        reference: Policy | None,
        generator: Generator,
        pool: RewardPool | None,
        prompts: Sequence[Prompt],
        *,
        general: Sequence[Prompt] = (),
        models: Sequence[ModelReward] = (),
    ) -> None:
        """``general`` prompts join ``prompts`` late in the run (see ``scenarios``). ``pool``: the
        rewards by rule, None without any; ``models``: those by reward models."""
        super().__init__(config, policy, config.max_steps)
        self.generator, self.pool, self.models = generator, pool, models
        self.prompts, self.general = prompts, general
        seeds = [derive_seed(config.seed, kind) for kind in ("prompts", "general prompts")]
        mixture = Mixture.of(config, bool(general))
        self.stream = PromptStream(mixture, prompts, general, seeds)
        self.reference = reference  # frozen; None without a KL term
        self.reference_step = 0
        self.rollouts_done = 0
        self.arrays: RolloutArrays | None = None
        self.ahead: DrawAhead | None = None
        self.rollout_rows: dict[str, float] = {}  # metrics of the rollout, for its first step
        self.sync_rows: dict[str, float] = {}  # of weights handed to the generator since then
        # Of the current rollout, per update; None where a checkpoint does not know.
        self.sampling_seconds: float | None = 0.0

    # -- one rollout ----------------------------------------------------------------------------

    def rollout(self) -> tuple[list[Rollout], RolloutArrays, dict[str, float]]:
        """Sample, reward and prepare one rollout; ``begin`` makes it the current one. Changes no
        state, so an interrupted rollout is simply drawn again, bit for bit the same. (One that was
        interrupted while it was sampled ahead is drawn from the weights of its time.)"""
        config, number = self.config, self.rollouts_done
        rollouts, arrays, report = self._sampled_and_scored(number)
        arrays.order = split_mini_batches(
            len(rollouts),
            config.steps_per_generation,
            config.num_iterations,
            derive_seed(config.seed, "split", number),
        )
        rows = rollout_metrics(rollouts, report, arrays, config.num_generations)
        if config.reward_domains:
            rows |= domain_metrics(rollouts)
        if self._recomputes_old:
            live = np.flatnonzero(np.repeat(arrays.live, arrays.completion_lengths))
            chosen = torch.as_tensor(live, device=self.policy.device)
            pair = arrays.old_logprobs[chosen], arrays.sampler_logprobs[chosen]
            rows |= mismatch_metrics(*pair, arrays.completion_lengths[arrays.live])
        return rollouts, arrays, rows

    def sync_generator(self) -> None:
        """Have the generator sample from the present weights. Waits for what is sampled ahead, and
        raises what ended that."""
        if self.ahead is not None:
            with self.watch.phase("generate"):
                self.ahead.rollouts()
        with self.watch.phase("sync_weights"), self.autocast():
            self.sync_rows |= self.generator.sync_weights(self.step)

    def sample_ahead(self) -> None:
        """With ``rollouts_ahead``: have the rollout after the current one sampled beside the
        updates, from the present weights. Nothing where it is under way, or not to be trained."""
        begins = self.step + len(self.arrays.order)
        if self.config.rollouts_ahead and self.ahead is None and begins < self.total_steps:
            self.ahead = DrawAhead(self._new_draw(self.rollouts_done, begins), self._sample)

    def _new_draw(self, number: int, begins: int) -> Draw:
        """Of rollout ``number``, which the updates after step ``begins`` are to learn from."""
        self.sync_generator()
        config, prompts = self.config, self.stream.rollout(number)
        sampling = SamplingParams(
            max_completion_length=config.completion_cap(begins),
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            return_support=True,
        )
        scoring = RolloutScoring(self.pool, self.models, prompts, config.num_generations)
        return Draw(number, self.step, prompts, sampling, scoring)

    def _sample(self, draw: Draw) -> list[Rollout]:
        return sample_rollouts(
            self.generator,
            self.policy.tokenizer,
            draw.prompts,
            self.config.num_generations,
            draw.sampling,
            (self.config.seed, "rollout", draw.number),
            on_rollouts=draw.scoring.add,
        )

    def _sampled_and_scored(self, number: int) -> tuple[list[Rollout], RolloutArrays, RewardReport]:
        """The rollout but for its split. Rewards by rule are worked off beside everything else."""
        config, ahead = self.config, self.ahead
        drop_dead = not config.beta and not config.entropy_coef
        draw = self._new_draw(number, self.step) if ahead is None else ahead.draw
        with draw.scoring as scoring:
            with self.watch.phase("generate"), self.autocast():
                rollouts = self._sample(draw) if ahead is None else ahead.rollouts()
            self.ahead = None
            arrays = RolloutArrays.before_rewards(
                rollouts,
                device=self.policy.device,
                mask_truncated=config.mask_truncated_completions,
                max_completion_length=draw.sampling.max_completion_length,
            )
            arrays.sampled_step = draw.version
            if arrays.support is None and draw.sampling.truncates(len(self.policy.head.weight)):
                raise ValueError("the generator truncates and did not return its tokens' support")
            if self.models:
                with self.watch.phase("reward_model"):
                    scoring.ask_models(rollouts)
            if not drop_dead:  # else the rewards say which sequences need no log-probs
                self._fill_fixed_logprobs(arrays)
            with self.watch.phase("reward"):  # what is left of the rules
                report = scoring.result(rollouts)
        assign_advantages(rollouts, config.num_generations, config.scale_rewards)
        arrays.take_rewards(rollouts, drop_dead=drop_dead)
        if drop_dead:
            self._fill_fixed_logprobs(arrays)
        return rollouts, arrays, report

    def begin(self, arrays: RolloutArrays, rows: dict[str, float]) -> None:
        self.arrays, self.rollout_rows = arrays, rows
        self.rollouts_done += 1

    def _fill_fixed_logprobs(self, arrays: RolloutArrays) -> None:
        """Log-probs that stay fixed during the rollout's updates: the old policy's, only where some
        update is off-policy, and the reference's, only with a KL term."""
        config = self.config
        if self._recomputes_old:
            with self.watch.phase("old_logprobs"):
                arrays.old_logprobs = self.logprobs(self.policy, arrays)
        elif config.old_logprobs == "sampler" and (
            config.updates_per_rollout > 1 or config.rollouts_ahead
        ):
            arrays.old_logprobs = arrays.sampler_logprobs
        if self.reference is not None:
            same_weights = self.reference_step == self.step
            with self.watch.phase("ref_logprobs"):
                if same_weights and self._recomputes_old:
                    arrays.ref_logprobs = arrays.old_logprobs
                else:
                    arrays.ref_logprobs = self.logprobs(self.reference, arrays)

    @property
    def _recomputes_old(self) -> bool:
        """Whether log-probs at the start of a rollout's updates are computed beforehand. Where it
        has a single update, those of the loss are the same, and there is no pass to spend."""
        return self.config.updates_per_rollout > 1 and self.config.old_logprobs == "recompute"

    def _micro_batches(
        self, arrays: RolloutArrays, chosen: np.ndarray
    ) -> Iterator[tuple[np.ndarray, MicroBatch]]:
        """The live ones among ``chosen``, packed into rows of at most ``max_tokens_per_microbatch``
        tokens."""
        live = chosen[arrays.live[chosen]]
        if not len(live):
            return
        lengths = arrays.lengths[live].tolist()
        for chunk in plan_batches(lengths, self.config.max_tokens_per_microbatch)[0]:
            yield live[chunk], arrays.micro_batch(live[chunk], len(self.policy.head.weight))

    def head_options(self, policy: Policy, hidden: Tensor) -> dict[str, Any]:
        return {**super().head_options(policy, hidden), "temperature": self.config.temperature}

    @torch.no_grad()
    def logprobs(self, policy: Policy, arrays: RolloutArrays) -> Tensor:
        """[T] fp32 log-probs of every live completion token under ``policy`` (0 for dead ones)."""
        result = torch.zeros_like(arrays.sampler_logprobs)
        starts = torch.as_tensor(np.concatenate([[0], np.cumsum(arrays.completion_lengths)]))
        everything = np.arange(len(arrays.completion_lengths))
        for chosen, batch in self._micro_batches(arrays, everything):
            hidden = self.hidden_rows(policy, batch.packed, batch.rows)
            values = linear_logprobs(
                hidden,
                token_ids=batch.completions.token_ids,
                kept=batch.kept,
                **self.head_options(policy, hidden),
            )
            for index, part in zip(
                chosen, values.split(arrays.completion_lengths[chosen].tolist()), strict=True
            ):
                result[starts[index] : starts[index] + len(part)] = part
        return result

    # -- one step -------------------------------------------------------------------------------

    def update(self) -> dict[str, Any]:
        """One optimiser step on the next mini-batch of the rollout; returns its metrics."""
        arrays = self.arrays
        mini_batch = arrays.order[0]
        age = None if arrays.sampled_step is None else self.step - arrays.sampled_step
        with self.watch.phase("update"):
            loss, metrics = self._gradients(arrays, mini_batch)
            row = self.descend(loss)
        arrays.order = arrays.order[1:]
        tokens = int(arrays.lengths[mini_batch].sum())
        self.tokens_done += tokens
        row = row | metrics | self.rollout_rows | self.sync_rows
        row["num_tokens"] = self.tokens_done
        if age is not None:  # an older version's checkpoint does not say
            row["sampling/staleness"] = age
        self.rollout_rows, self.sync_rows = {}, {}
        if not arrays.order:
            self.arrays = None
        self.refresh_reference()
        return row | self._times(arrays, mini_batch)

    def _times(self, arrays: RolloutArrays, mini_batch: np.ndarray) -> dict[str, float]:
        """Seconds by phase. ``tokens_per_second`` spreads the rollout's own time evenly over its
        steps."""
        times = self.watch.lap()
        sampling = sum(v for k, v in times.items() if k not in ("time/step", "time/update"))
        if sampling:
            self.sampling_seconds = sampling / self.config.updates_per_rollout
        lengths = arrays.lengths[mini_batch]
        update = times["time/update"]
        times["update_tokens_per_second"] = int(lengths[arrays.live[mini_batch]].sum()) / update
        if self.sampling_seconds is not None:
            times["tokens_per_second"] = int(lengths.sum()) / (update + self.sampling_seconds)
        return times

    def _gradients(
        self, arrays: RolloutArrays, mini_batch: np.ndarray
    ) -> tuple[float, dict[str, float]]:
        """Accumulate the mini-batch's gradients. The denominator is that of the whole mini-batch,
        dead groups included, so the gradient does not depend on how it is cut into micro-batches or
        on dropping them."""
        denominator = self._denominator(arrays, mini_batch)
        total, merged, pairs = 0.0, None, []
        if denominator:
            for chosen, batch in self._micro_batches(arrays, mini_batch):
                hidden = self.hidden_rows(self.policy, batch.packed, batch.rows)
                loss, metrics, logprobs = self._loss(hidden, batch, denominator)
                loss.backward()
                total = total + loss.detach()
                merged = metrics if merged is None else merged + metrics
                sampler = batch.completions.fields["sampler_logprobs"]
                pairs.append((logprobs.detach(), sampler, arrays.completion_lengths[chosen]))
        if merged is None:
            return float(total), {}
        rows = loss_rows(merged)
        if not self._recomputes_old:  # else the whole rollout was compared before its first update
            ours, samplers, lengths = zip(*pairs, strict=True)
            rows |= mismatch_metrics(torch.cat(ours), torch.cat(samplers), np.concatenate(lengths))
        return float(total), rows

    def _loss(
        self, hidden: Tensor, batch: MicroBatch, denominator: float
    ) -> tuple[Tensor, LossMetrics, Tensor]:
        config, fields = self.config, batch.completions.fields
        return linear_grpo_loss(
            hidden,
            token_ids=batch.completions.token_ids,
            old_logprobs=fields.get("old_logprobs"),
            advantages=fields["advantages"],
            cu_seqlens=batch.completions.cu_seqlens,
            ref_logprobs=fields.get("ref_logprobs"),
            sampler_logprobs=fields["sampler_logprobs"],
            **config.loss_options(),
            denominator=denominator,
            return_entropy=True,
            kept=batch.kept,
            sparse_delta=config.sparse_delta,
            sparse_max_entries=config.sparse_max_entries,
            **self.head_options(self.policy, hidden),
        )

    def _denominator(self, arrays: RolloutArrays, mini_batch: np.ndarray) -> float:
        """Sequences or tokens of the mini-batch that count (house rule: what was scorable), dead or
        not."""
        counted = mini_batch[arrays.counted[mini_batch]]
        if self.config.loss_type in ("grpo", "sapo", "gspo", "luspo"):
            return float(len(counted))
        if self.config.loss_type == "dr_grpo":
            return float(len(counted) * arrays.max_completion_length)
        return float(arrays.completion_lengths[counted[arrays.unmasked[counted]]].sum())

    def refresh_reference(self) -> None:
        """pi_ref <- pi_theta every ``ref_model_sync_steps`` steps (paper: 400)."""
        every = self.config.ref_model_sync_steps
        if self.reference is not None and every and self.step % every == 0:
            self.reference.copy_weights_from(self.policy)
            self.reference_step = self.step

    # -- checkpoints ----------------------------------------------------------------------------

    def write_checkpoint(self, folder: Path) -> None:
        """With the reference, once it is no longer the base, and the pending rollout."""
        super().write_checkpoint(folder)
        trainer = folder / TRAINER_FOLDER
        if self.reference is not None and self.reference_step > 0:
            reference = {
                n: p.detach().cpu().contiguous() for n, p in self.reference.weights().items()
            }
            save_file(reference, trainer / "reference.safetensors")
        if self.arrays is not None:
            save_file(self.arrays.to_tensors(), trainer / "rollout.safetensors")

    def read_checkpoint(self, folder: Path) -> None:
        super().read_checkpoint(folder)
        trainer, device = folder / TRAINER_FOLDER, self.policy.device
        if (trainer / "reference.safetensors").exists():
            self.reference.load_weights(load_file(trainer / "reference.safetensors"))
        if (trainer / "rollout.safetensors").exists():
            self.arrays = RolloutArrays.from_tensors(
                load_file(trainer / "rollout.safetensors"), device
            )

    def close(self) -> None:
        """End the generator, and what is sampled ahead."""
        self.generator.close()
        if self.ahead is not None:
            self.ahead.give_up()


def loss_rows(metrics: LossMetrics) -> dict[str, float]:
    """The loss kernel's metrics under the names TRL users know."""
    values = metrics.to_dict()
    names = {
        "kl": "kl",
        "entropy": "entropy",
        "clip_low": "clip_ratio/low_mean",
        "clip_high": "clip_ratio/high_mean",
        "clip_region": "clip_ratio/region_mean",
        "sampling_logp_difference": "sampling/logp_difference_mean",
        "is_weight_mean": "sampling/importance_sampling_ratio_mean",
        "dropped_mass": "sparse/dropped_mass",  # mean share of probability that was left out
        "sparse_rows": "sparse/rows",  # share of tokens whose gradient was made sparse
        "phi_mean": "vespo/phi_mean",  # over tokens; TRL's phi_seq_mean is over sequences
    }
    return {ours: values[theirs] for theirs, ours in names.items() if theirs in values}
