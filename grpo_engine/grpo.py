"""GRPO as DeepSeek-R1 runs it (R1-Zero and the RL stages): the loop, and the state it carries.

One rollout (arXiv 2501.12948v2, section 2.1 and appendix A.3):

    sample G outputs of P prompts from the policy          -> sample_rollouts
    reward each output by rule                             -> score_rollouts
    advantage = (r - mean(group)) / std(group)             -> assign_advantages
    split the P x G outputs at random into mini-batches    -> split_mini_batches
    for each mini-batch: one optimiser step                -> GRPORun.update
    every K steps: reference <- policy                     -> GRPORun.refresh_reference

No critic; the KL term is in the loss; training never builds logits: packed hidden states go
straight into ``linear_grpo_loss``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo_engine.config import GRPOConfig
from grpo_engine.data import PromptOrder
from grpo_engine.generation.base import Generator
from grpo_engine.kernels import LossMetrics, linear_grpo_loss, linear_logprobs, plan_batches
from grpo_engine.lora import ADAPTER_FOLDER, read_adapter
from grpo_engine.metrics import Stopwatch
from grpo_engine.policy import Policy
from grpo_engine.rewards import RewardPool
from grpo_engine.rollouts import (
    MicroBatch,
    Prompt,
    RolloutArrays,
    assign_advantages,
    derive_seed,
    rollout_metrics,
    sample_rollouts,
    score_rollouts,
    split_mini_batches,
)
from grpo_engine.types import Rollout, SamplingParams

MAX_SKIPPED_UPDATES = 3  # non-finite gradients in a row that stop the run
TRAINER_FOLDER = "trainer"  # beside the model files of a checkpoint
COUNTERS = ("step", "rollouts_done", "tokens_done", "reference_step", "skipped_in_a_row")


class RunAborted(Exception):
    """The run cannot go on, for a reason that is not the user's input. Nothing bad was saved."""


class GRPORun:
    """The state of a run between two steps, and the moves that change it.

    ``step`` counts optimiser updates done; ``rollouts_done`` counts rollouts sampled; ``arrays`` is
    the rollout being trained on (None: the next step starts with a new one).
    """

    def __init__(
        self,
        config: GRPOConfig,
        policy: Policy,
        reference: Policy | None,
        generator: Generator,
        pool: RewardPool,
        prompts: Sequence[Prompt],
    ) -> None:
        self.config, self.policy, self.generator, self.pool = config, policy, generator, pool
        self.prompts = prompts
        self.prompt_order = PromptOrder(len(prompts), derive_seed(config.seed, "prompts"))
        self.reference = reference  # frozen; None without a KL term
        self.reference_step = 0
        self.optimizer = torch.optim.AdamW(
            [p for p in policy.model.parameters() if p.requires_grad],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        self.step = 0
        self.rollouts_done = 0
        self.tokens_done = 0
        self.arrays: RolloutArrays | None = None
        self.rollout_rows: dict[
            str, float
        ] = {}  # rollout-level metrics, written with its first step
        self.skipped_in_a_row = 0
        # Of the current rollout, per update; None where a checkpoint does not know.
        self.sampling_seconds: float | None = 0.0
        synchronize = torch.cuda.synchronize if policy.device.type == "cuda" else None
        self.watch = Stopwatch(synchronize)

    # -- one rollout ----------------------------------------------------------------------------

    def rollout(self) -> tuple[list[Rollout], RolloutArrays, dict[str, float]]:
        """Sample, reward and prepare one rollout; ``begin`` makes it the current one. Changes no
        state, so an interrupted rollout is simply drawn again, bit for bit the same."""
        config, number = self.config, self.rollouts_done
        first = number * config.prompts_per_generation
        prompts = [
            self.prompts[self.prompt_order[first + k]] for k in range(config.prompts_per_generation)
        ]
        sampling = SamplingParams(
            max_completion_length=config.completion_cap(self.step),
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
        )
        with self.watch.phase("generate"), self.autocast():
            rollouts = sample_rollouts(
                self.generator,
                self.policy.tokenizer,
                prompts,
                config.num_generations,
                sampling,
                (config.seed, "rollout", number),
            )
        with self.watch.phase("reward"):
            report = score_rollouts(self.pool, rollouts)
            assign_advantages(rollouts, config.num_generations, config.scale_rewards)
        arrays = RolloutArrays.from_rollouts(
            rollouts,
            device=self.policy.device,
            drop_dead=not config.beta and not config.entropy_coef,
            mask_truncated=config.mask_truncated_completions,
            max_completion_length=sampling.max_completion_length,
        )
        self._fill_fixed_logprobs(arrays)
        arrays.order = split_mini_batches(
            len(rollouts),
            config.steps_per_generation,
            config.num_iterations,
            derive_seed(config.seed, "split", number),
        )
        return rollouts, arrays, rollout_metrics(rollouts, report, arrays, config.num_generations)

    def begin(self, arrays: RolloutArrays, rows: dict[str, float]) -> None:
        self.arrays, self.rollout_rows = arrays, rows
        self.rollouts_done += 1

    def _fill_fixed_logprobs(self, arrays: RolloutArrays) -> None:
        """Log-probs that stay fixed during the rollout's updates: the old policy's, only where some
        update is off-policy, and the reference's, only with a KL term."""
        config = self.config
        off_policy = config.updates_per_rollout > 1
        if off_policy and config.old_logprobs == "recompute":
            with self.watch.phase("old_logprobs"):
                arrays.old_logprobs = self.logprobs(self.policy, arrays)
        elif off_policy:
            arrays.old_logprobs = arrays.sampler_logprobs
        if self.reference is not None:
            same_weights = self.reference_step == self.step
            with self.watch.phase("ref_logprobs"):
                if same_weights and off_policy and config.old_logprobs == "recompute":
                    arrays.ref_logprobs = arrays.old_logprobs
                else:
                    arrays.ref_logprobs = self.logprobs(self.reference, arrays)

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
            yield live[chunk], arrays.micro_batch(live[chunk])

    def _hidden(self, policy: Policy, batch: MicroBatch) -> Tensor:
        """[M, D] hidden states of the rows that predict completion tokens."""
        packed = batch.packed
        hidden = policy.hidden_states(
            packed.token_ids, packed.position_ids, packed.cu_seqlens, packed.max_seqlen
        )
        hidden = hidden.index_select(0, batch.rows)
        # Under autocast the final norm returns fp32, and the head's GEMMs are the largest of all.
        return hidden.bfloat16() if self.config.bf16 else hidden

    def _head_options(self, policy: Policy, hidden: Tensor) -> dict[str, Any]:
        head = policy.head
        return {
            "weight": head.weight.to(hidden.dtype),
            "bias": None if head.bias is None else head.bias.to(hidden.dtype),
            "logit_softcap": head.logit_softcap,
            "logit_scale": head.logit_scale,
            "temperature": self.config.temperature,
        }

    @torch.no_grad()
    def logprobs(self, policy: Policy, arrays: RolloutArrays) -> Tensor:
        """[T] fp32 log-probs of every live completion token under ``policy`` (0 for dead ones)."""
        result = torch.zeros_like(arrays.sampler_logprobs)
        starts = torch.as_tensor(np.concatenate([[0], np.cumsum(arrays.completion_lengths)]))
        everything = np.arange(len(arrays.completion_lengths))
        for chosen, batch in self._micro_batches(arrays, everything):
            with self.autocast():
                hidden = self._hidden(policy, batch)
            values = linear_logprobs(
                hidden, token_ids=batch.completions.token_ids, **self._head_options(policy, hidden)
            )
            for index, part in zip(
                chosen, values.split(arrays.completion_lengths[chosen].tolist()), strict=True
            ):
                result[starts[index] : starts[index] + len(part)] = part
        return result

    # -- one step -------------------------------------------------------------------------------

    def update(self) -> dict[str, Any]:
        """One optimiser step on the next mini-batch of the rollout; returns its metrics."""
        config, arrays = self.config, self.arrays
        mini_batch = arrays.order[0]
        learning_rate = self.learning_rate()
        with self.watch.phase("update"):
            loss, metrics = self._gradients(arrays, mini_batch)
            parameters = self.optimizer.param_groups[0]["params"]
            for parameter in parameters:  # all sequences dead: a zero gradient, not a missing one
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
            finite = math.isfinite(grad_norm) and math.isfinite(loss)
            if finite:
                self.optimizer.param_groups[0]["lr"] = learning_rate
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self._guard_finite(finite, grad_norm, loss)
        self.step += 1
        arrays.order = arrays.order[1:]
        tokens = int(arrays.lengths[mini_batch].sum())
        self.tokens_done += tokens
        row = {
            "step": self.step,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "skipped_update": int(not finite),
            **metrics,
            **self.rollout_rows,
            "num_tokens": self.tokens_done,
        }
        self.rollout_rows = {}
        if not arrays.order:
            self.arrays = None
            self.generator.sync_weights(self.step)
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
        total, merged = 0.0, None
        if denominator:
            for _, batch in self._micro_batches(arrays, mini_batch):
                with self.autocast():
                    hidden = self._hidden(self.policy, batch)
                loss, metrics, _ = self._loss(hidden, batch, denominator)
                loss.backward()
                total = total + loss.detach()
                merged = metrics if merged is None else merged + metrics
        return float(total), {} if merged is None else loss_rows(merged)

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
            **self._head_options(self.policy, hidden),
        )

    def _denominator(self, arrays: RolloutArrays, mini_batch: np.ndarray) -> float:
        """Sequences or tokens of the mini-batch that count (house rule: what was scorable), dead or
        not."""
        counted = mini_batch[arrays.counted[mini_batch]]
        if self.config.loss_type in ("grpo", "sapo", "gspo", "luspo"):
            return float(len(counted))
        if self.config.loss_type == "dr_grpo":
            return float(len(counted) * arrays.max_completion_length)
        return float(arrays.completion_lengths[counted[arrays.kept[counted]]].sum())

    def _guard_finite(self, finite: bool, grad_norm: float, loss: float) -> None:
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MAX_SKIPPED_UPDATES:
            raise RunAborted(
                f"step {self.step + 1}: loss {loss}, gradient norm {grad_norm}: not finite "
                f"{MAX_SKIPPED_UPDATES} times in a row; the weights were not changed by these steps"
            )

    def learning_rate(self) -> float:
        config = self.config
        if self.step < config.warmup_steps:
            return config.learning_rate * (self.step + 1) / config.warmup_steps
        if config.lr_scheduler_type == "constant":
            return config.learning_rate
        span = max(1, config.max_steps - config.warmup_steps)
        progress = min(1.0, (self.step - config.warmup_steps) / span)
        shape = (
            1 - progress
            if config.lr_scheduler_type == "linear"
            else (1 + math.cos(math.pi * progress)) / 2
        )
        return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * shape

    def refresh_reference(self) -> None:
        """pi_ref <- pi_theta every ``ref_model_sync_steps`` steps (paper: 400)."""
        every = self.config.ref_model_sync_steps
        if self.reference is not None and every and self.step % every == 0:
            self.reference.copy_weights_from(self.policy)
            self.reference_step = self.step

    def autocast(self) -> Any:
        if not self.config.bf16:
            return nullcontext()
        return torch.autocast(self.policy.device.type, dtype=torch.bfloat16)

    # -- checkpoints ----------------------------------------------------------------------------

    def write_checkpoint(self, folder: Path) -> None:
        """A Hugging Face model folder, with the optimiser, counters and pending rollout under
        ``trainer/``."""
        self.policy.save_pretrained(folder)
        trainer = folder / TRAINER_FOLDER
        trainer.mkdir()
        save_file(self._optimizer_tensors(), trainer / "optimizer.safetensors")
        if self.reference is not None and self.reference_step > 0:
            reference = {
                n: p.detach().cpu().contiguous() for n, p in self.reference.weights().items()
            }
            save_file(reference, trainer / "reference.safetensors")
        if self.arrays is not None:
            save_file(self.arrays.to_tensors(), trainer / "rollout.safetensors")
        state = {name: getattr(self, name) for name in (*COUNTERS, "sampling_seconds")}
        (trainer / "state.json").write_text(json.dumps(state, indent=1))

    def read_checkpoint(self, folder: Path) -> None:
        """Bring a freshly built run (policy loaded from ``folder``; with LoRA it is the base still,
        its adapter is loaded here) to the state that was saved there."""
        trainer, device = folder / TRAINER_FOLDER, self.policy.device
        state = json.loads((trainer / "state.json").read_text())
        for name in COUNTERS:
            setattr(self, name, state[name])
        # Without it the rest of a rollout would look as if sampled in no time.
        self.sampling_seconds = state.get("sampling_seconds")
        if self.policy.adapter is not None:
            self.policy.load_weights(read_adapter(folder / ADAPTER_FOLDER))
        self._load_optimizer(load_file(trainer / "optimizer.safetensors"))
        if (trainer / "reference.safetensors").exists():
            self.reference.load_weights(load_file(trainer / "reference.safetensors"))
        if (trainer / "rollout.safetensors").exists():
            self.arrays = RolloutArrays.from_tensors(
                load_file(trainer / "rollout.safetensors"), device
            )
        self.generator.sync_weights(self.step)

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        names = {p: n for n, p in self.policy.model.named_parameters()}
        return {
            f"{key}.{names[parameter]}": value.detach().cpu().contiguous()
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
        }

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        parameters = dict(self.policy.model.named_parameters())
        for name, value in tensors.items():
            key, _, parameter_name = name.partition(".")
            parameter = parameters[parameter_name]
            # AdamW keeps its step counter on the host, its moments beside the parameter.
            self.optimizer.state[parameter][key] = (
                value if key == "step" else value.to(parameter.device)
            )


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
        "phi_mean": "vespo/phi_mean",  # over tokens; TRL's phi_seq_mean is over sequences
    }
    return {ours: values[theirs] for theirs, ours in names.items() if theirs in values}
