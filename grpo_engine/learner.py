"""A model in training: AdamW, its learning-rate schedule, the guarded step, and what a checkpoint
keeps of them. Each training stage is a subclass that makes the gradients."""

from __future__ import annotations

import json
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo_engine.kernels.packing import PackedBatch
from grpo_engine.lora import ADAPTER_FOLDER, LoraOptions, read_adapter
from grpo_engine.metrics import Stopwatch
from grpo_engine.policy import Policy
from grpo_engine.settings import TrainConfig

MAX_SKIPPED_UPDATES = 3  # non-finite gradients in a row that stop the run
TRAINER_FOLDER = "trainer"  # beside the model files of a checkpoint


class RunAborted(Exception):
    """The run cannot go on, for a reason that is not the user's input. Nothing bad was saved."""


class Learner:
    """The state of a run between two steps. ``step`` counts optimiser updates done, of
    ``total_steps``.

    A stage implements ``update``: it accumulates the gradients of one step, calls ``descend`` and
    returns the step's row for metrics.jsonl. What else it carries from step to step it adds to
    ``COUNTERS`` (numbers) or writes in its own ``write_checkpoint``.
    """

    COUNTERS: ClassVar[tuple[str, ...]] = ("step", "tokens_done", "skipped_in_a_row")

    def __init__(self, config: TrainConfig, policy: Policy, total_steps: int) -> None:
        self.config, self.policy, self.total_steps = config, policy, total_steps
        self.optimizer = torch.optim.AdamW(
            [p for p in policy.model.parameters() if p.requires_grad],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        self.step = 0
        self.tokens_done = 0
        self.skipped_in_a_row = 0
        synchronize = torch.cuda.synchronize if policy.device.type == "cuda" else None
        self.watch = Stopwatch(synchronize)

    def update(self) -> dict[str, Any]:
        """One optimiser step; returns its metrics."""
        raise NotImplementedError

    def autocast(self) -> AbstractContextManager[Any]:
        if not self.config.bf16:
            return nullcontext()
        return torch.autocast(self.policy.device.type, dtype=torch.bfloat16)

    def hidden_rows(self, policy: Policy, packed: PackedBatch, rows: Tensor) -> Tensor:
        """[M, D] hidden states of the rows [M] of a packed batch that predict a token to learn."""
        with self.autocast():
            hidden = policy.hidden_states(
                packed.token_ids, packed.position_ids, packed.cu_seqlens, packed.max_seqlen
            )
            hidden = hidden.index_select(0, rows)
        # Under autocast the final norm returns fp32, and the head's GEMMs are the largest of all.
        return hidden.bfloat16() if self.config.bf16 else hidden

    def head_options(self, policy: Policy, hidden: Tensor) -> dict[str, Any]:
        """The head's arguments of the fused-linear kernels, for these hidden states."""
        head = policy.head
        return {
            "weight": head.weight.to(hidden.dtype),
            "bias": None if head.bias is None else head.bias.to(hidden.dtype),
            "logit_softcap": head.logit_softcap,
            "logit_scale": head.logit_scale,
        }

    # -- one step -------------------------------------------------------------------------------

    def learning_rate(self) -> float:
        """Of the next step."""
        config = self.config
        if self.step < config.warmup_steps:
            return config.learning_rate * (self.step + 1) / config.warmup_steps
        if config.lr_scheduler_type == "constant":
            return config.learning_rate
        span = max(1, self.total_steps - config.warmup_steps)
        progress = min(1.0, (self.step - config.warmup_steps) / span)
        shape = (
            1 - progress
            if config.lr_scheduler_type == "linear"
            else (1 + math.cos(math.pi * progress)) / 2
        )
        return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * shape

    def descend(self, loss: float) -> dict[str, Any]:
        """Clip the gradients that are there and step along them, unless they or ``loss`` are not
        finite. Raises RunAborted after MAX_SKIPPED_UPDATES such steps in a row."""
        learning_rate = self.learning_rate()
        parameters = self.optimizer.param_groups[0]["params"]
        for parameter in parameters:  # nothing to learn from: a zero gradient, not a missing one
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        max_norm = self.config.max_grad_norm
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
        finite = math.isfinite(grad_norm) and math.isfinite(loss)
        if finite:
            self.optimizer.param_groups[0]["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MAX_SKIPPED_UPDATES:
            raise RunAborted(
                f"step {self.step + 1}: loss {loss}, gradient norm {grad_norm}: not finite "
                f"{MAX_SKIPPED_UPDATES} times in a row; the weights were not changed by these steps"
            )
        self.step += 1
        return {
            "step": self.step,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "skipped_update": int(not finite),
        }

    # -- checkpoints ----------------------------------------------------------------------------

    def write_checkpoint(self, folder: Path) -> None:
        """A Hugging Face model folder, with the optimiser and the counters under ``trainer/``."""
        self.policy.save_pretrained(folder)
        trainer = folder / TRAINER_FOLDER
        trainer.mkdir()
        save_file(self._optimizer_tensors(), trainer / "optimizer.safetensors")
        state = {name: getattr(self, name) for name in self.COUNTERS}
        (trainer / "state.json").write_text(json.dumps(state, indent=1))

    def read_checkpoint(self, folder: Path) -> None:
        """Bring a freshly built run (policy loaded from ``folder``; with LoRA it is the base still,
        its adapter is loaded here) to the state that was saved there. A counter that an older
        version did not write becomes None."""
        trainer = folder / TRAINER_FOLDER
        state = json.loads((trainer / "state.json").read_text())
        for name in self.COUNTERS:
            setattr(self, name, state.get(name))
        if self.policy.adapter is not None:
            self.policy.load_weights(read_adapter(folder / ADAPTER_FOLDER))
        self._load_optimizer(load_file(trainer / "optimizer.safetensors"))

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


def load_policy(config: TrainConfig, checkpoint: Path | None, *, trainable: bool = True) -> Policy:
    """The policy to train. A checkpoint of a LoRA run holds merged weights: its policy begins as
    the base again, and ``Learner.read_checkpoint`` loads the adapter."""
    lora = None
    if config.lora_r is not None:
        lora = LoraOptions(
            config.lora_r, config.lora_alpha, config.lora_target_modules, config.seed
        )
    return Policy.load(
        config.model if checkpoint is None or lora else str(checkpoint),
        device=config.device,
        attention=config.attention,
        gradient_checkpointing=config.gradient_checkpointing,
        trainable=trainable,
        lora=lora,
    )
