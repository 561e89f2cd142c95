"""The GRPO stage as a run: its rollouts before the updates, its screen and its plan."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from grpo_engine.config import GRPOConfig
from grpo_engine.generation.build import sampler_words
from grpo_engine.prepare import build_run, check_loss_options
from grpo_engine.rewards import RewardError
from grpo_engine.session import Session, run_stage
from grpo_engine.types import GeneratorError


class GRPOSession(Session):
    FAILURES = (*Session.FAILURES, RewardError, GeneratorError)

    def before_update(self) -> None:
        """Sample and score a rollout where none is pending; have the next one begun if it is to be
        sampled ahead."""
        if self.run.arrays is None:
            self._new_rollout()
        with self.interrupt.abortable():
            self.run.sample_ahead()

    def _new_rollout(self) -> None:
        run, config = self.run, self.run.config
        with self.interrupt.abortable():
            rollouts, arrays, rows = run.rollout()
        notes = getattr(run.generator, "notes", ()) if self.sample is None else ()
        for note in notes:  # once, as soon as there is an engine
            self.screen.message(note)
        if not arrays.counted.any():
            raise RewardError(f"no answer of the rollout could be scored ({unscored(rows)})")
        every = config.log_completions_steps
        if run.step == 0 or run.step // every != (run.step - config.updates_per_rollout) // every:
            self.completions.write_rollouts(run.step + 1, rollouts)
        self.sample = rollouts[0]
        run.begin(arrays, rows)

    def summary(self) -> dict[str, Any]:
        config = self.run.config
        outputs = f"{config.prompts_per_generation} x {config.num_generations}"
        sampler = {} if config.generator == "hf" else {"sampler": sampler_words(config)}
        return {"outputs per rollout": outputs, **sampler}

    def versions(self) -> dict[str, str]:
        engine = getattr(self.run.generator, "engine", None)  # a server's is known once it answers
        return {} if engine is None else {"vllm": engine.version}

    def plan(self) -> dict[str, str]:
        run, config = self.run, self.run.config
        updates = config.updates_per_rollout
        outputs = config.prompts_per_generation * config.num_generations
        rollouts = -(-config.max_steps // updates)
        return {
            "data": f"{len(run.prompts)} prompts from {config.dataset}",
            **({"general": self._general_plan()} if run.general else {}),
            "rewards": self._reward_plan(),
            "held out": f"{len(self.held_out.prompts) if self.held_out else 0} prompts",
            "rollout": f"{config.prompts_per_generation} prompts x {config.num_generations} = "
            f"{outputs} outputs of at most {config.max_completion_length} tokens",
            "sampler": sampler_words(config)
            + (", a rollout ahead of the updates" if config.rollouts_ahead else ""),
            "steps": f"{config.max_steps}: {rollouts} rollouts x {updates} updates of "
            f"{outputs // config.steps_per_generation} outputs",
            "epochs": f"{run.stream.epochs(rollouts):.2f}",
            "reference": "none"
            if run.reference is None
            else f"replaced every {config.ref_model_sync_steps} steps",
        }

    def _reward_plan(self) -> str:
        """``accuracy (math, code), format``"""
        run = self.run
        specs = [*(run.pool.rewards if run.pool else ()), *(model.spec for model in run.models)]
        return ", ".join(
            spec.name + (f" ({', '.join(spec.domains)})" if spec.domains else "") for spec in specs
        )

    def _general_plan(self) -> str:
        config, mixture = self.run.config, self.run.stream.mixture
        first = mixture.first_general * config.updates_per_rollout
        return (
            f"{len(self.run.general)} prompts, {mixture.general} of the {mixture.prompts} of a "
            f"rollout from step {first + 1} of {config.max_steps} on"
        )


def unscored(rows: dict[str, Any]) -> str:
    """The outcomes of a rollout's rewards, for an error message."""
    rates = [f"{key} {value:.0%}" for key, value in rows.items() if key.endswith("_rate") and value]
    errors = [str(value) for key, value in rows.items() if key.endswith("/first_error")]
    return "; ".join(rates + errors) or "no reward function applies to its rows"


def build_session(
    config: GRPOConfig, checkpoint: Path | None, stack: ExitStack
) -> tuple[GRPOSession, dict[str, Any]]:
    run, held_out, inputs = build_run(config, checkpoint, stack)
    return GRPOSession(run, held_out), inputs


def train_grpo(
    config: GRPOConfig,
    *,
    recipe: str | None = None,
    resume: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> int:
    """Train, log, checkpoint and report one GRPO run; returns the process's exit code. See
    ``run_stage``."""
    check_loss_options(config)
    return run_stage(
        config,
        build_session,
        recipe=recipe,
        resume=resume,
        overwrite=overwrite,
        dry_run=dry_run,
    )
