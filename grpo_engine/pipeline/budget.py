"""How many steps and tokens a stage will take, from its settings and what is known of its data.

Tokens are bounds: every answer may be as long as its cap. What depends on data that no one has made
yet is bounded by what the stage that makes them may write; where that is not known either, a number
is None, and ``unknown`` says why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_engine.config import MODEL_REWARDS
from grpo_engine.data import read_rows
from grpo_engine.metrics import read_jsonl
from grpo_engine.pipeline.config import Reference, read_reference
from grpo_engine.pipeline.memory import (
    Memory,
    ModelShape,
    model_shape,
    sampling_memory,
    training_memory,
)
from grpo_engine.pipeline.stages import Stage, referenced_path
from grpo_engine.rewards.model import saved_folder
from grpo_engine.types import UserError


@dataclass
class Budget:
    """``generated``, ``trained``: tokens at most, of a stage that ``samples`` or ``trains``;
    ``held_out``: those of ``generated`` that its evaluations draw, None where that is not known
    and they come on top; ``answers``: how many it draws (of RL the most at a time); ``rows`` of
    ``row_tokens`` each: the most it may write, for the stages that read them."""

    samples: bool = False
    trains: bool = False
    steps: int | None = None
    generated: int | None = None
    trained: int | None = None
    held_out: int | None = 0
    answers: int | None = None
    rows: int | None = None
    row_tokens: int | None = None
    model: str = ""
    shape: ModelShape | None = None
    memory: Memory | None = None
    unknown: str = ""


class Budgets:
    """Of all stages, in order: a stage's data may be another's. In the settings of a stage on its
    own, which has the name "", braces refer to nothing."""

    def __init__(self, stages: list[Stage]) -> None:
        self.of_name = {stage.name: stage for stage in stages}
        self.found: dict[str, Budget] = {}
        for stage in stages:
            self.found[stage.name] = self._budget(stage)

    def _budget(self, stage: Stage) -> Budget:
        config, budget = stage.config, Budget()
        if hasattr(config, "model"):
            budget.model = self.base_model(config.model)
            shape = model_shape(budget.model)
            if isinstance(shape, str):
                budget.unknown = f"{budget.model}: {shape}"
            else:
                budget.shape = shape
        budget.trains = stage.kind.trains
        draws = hasattr(config, "num_generations") or hasattr(config, "num_samples")
        budget.samples = draws and not getattr(config, "answer_columns", None)
        if hasattr(config, "num_generations"):
            self._reinforcement(config, budget)
        elif hasattr(config, "num_samples"):
            self._sampling(config, budget)
        elif hasattr(config, "num_train_epochs"):
            self._supervised(config, budget)
        if budget.shape is not None and hasattr(config, "max_tokens_per_microbatch"):
            scored_by = self._reward_models(stage)
            if isinstance(scored_by, str):
                budget.unknown = scored_by
            else:
                budget.memory = training_memory(config, budget.shape, scored_by, budget.answers)
        elif budget.shape is not None and budget.samples:
            budget.memory = sampling_memory(config, budget.shape, budget.answers)
        return budget

    def base_model(self, model: str) -> str:
        """Where the weights first came from: it has the shape of all that was trained from it."""
        reference = self._reference(model)
        if reference is None:
            return model
        return self.base_model(self.of_name[reference.stage].config.model)

    def _reference(self, value: Any) -> Reference | None:
        reference = read_reference(value)
        return reference if reference is not None and reference.stage in self.of_name else None

    def _reward_models(self, stage: Stage) -> int | str:
        """Weights of the scalar models that the stage's rewards load, or why they are not known."""
        weights = 0
        for name in MODEL_REWARDS:
            folder = getattr(stage.config, f"{name}_model", None)
            if folder is None:
                continue
            reference = self._reference(folder)
            if reference is not None:
                folder = self.found[reference.stage].model
            else:
                folder = str(saved_folder(folder))
            shape = model_shape(folder)
            if isinstance(shape, str):
                return f"{folder}: {shape}"
            weights += shape.parameters
        return weights

    def _reinforcement(self, config: Any, budget: Budget) -> None:
        outputs = config.prompts_per_generation * config.num_generations
        budget.steps = config.max_steps
        caps = [
            config.completion_cap(step)
            for step in range(0, config.max_steps, config.updates_per_rollout)
        ]
        problems, general = self._held_out_rows(config)
        budget.answers = max(outputs, problems or 0, general or 0)
        budget.held_out = None
        if problems is not None and general is not None:
            steps = {*range(0, config.max_steps, config.eval_steps), config.max_steps}
            longest = sum(config.completion_cap(step) for step in steps)
            budget.held_out = (problems + general) * longest
        budget.generated = outputs * sum(caps) + (budget.held_out or 0)
        with_prompts = outputs * (sum(caps) + len(caps) * config.max_prompt_length)
        budget.trained = with_prompts * config.num_iterations

    def _held_out_rows(self, config: Any) -> tuple[int | None, int | None]:
        """(problems, general prompts) that each evaluation during RL answers once: before the first
        step, every ``eval_steps`` and at the end. None where no one knows how many."""
        if config.eval_dataset is None:
            return 0, 0
        problems = self.rows(config.eval_dataset, config.eval_dataset_args, config.eval_limit)
        found = [self.rows(one.source, one.args, one.limit) for one in config.general_eval_dataset]
        return problems, None if None in found else sum(found)

    def _sampling(self, config: Any, budget: Budget) -> None:
        if hasattr(config, "dataset"):
            prompts = self.rows(config.dataset, config.dataset_args, config.dataset_limit)
        else:
            prompts = self.rows(config.data, config.data_args, config.data_limit)
        if prompts is None:
            return
        if getattr(config, "answer_columns", None):  # given, not drawn
            budget.rows = _given(config, prompts)
            return
        drawn = [config]
        if hasattr(config, "resolved_generators"):
            drawn = [one for _, one in config.resolved_generators()]
        per_prompt = sum(one.num_samples for one in drawn)
        tokens = sum(one.num_samples * one.max_completion_length for one in drawn)
        budget.generated, budget.answers = prompts * tokens, prompts * per_prompt
        longest = max(one.max_completion_length for one in drawn)
        budget.row_tokens = config.max_prompt_length + longest
        kept = getattr(config, "max_per_prompt", None)
        if getattr(config, "kind", None) == "helpful":
            kept = config.pairs_per_prompt
        budget.rows = prompts * min(per_prompt, kept or per_prompt)
        if getattr(config, "general_dataset", None) is not None:
            if config.general_share is not None:
                budget.rows = math.ceil(budget.rows / (1 - config.general_share))
            else:
                general = self.rows(config.general_dataset, config.general_args, None)
                budget.rows = None if general is None else budget.rows + general

    def _supervised(self, config: Any, budget: Budget) -> None:
        rows = self.rows(config.dataset, config.dataset_args, config.dataset_limit)
        if rows is None:
            return
        batch = getattr(config, "sequences_per_step", None) or config.batch_size
        steps = math.ceil(rows * config.num_train_epochs / batch)
        if config.max_steps is not None:  # of fine-tuning it takes the place of the epochs
            more = hasattr(config, "sequences_per_step")
            steps = config.max_steps if more else min(steps, config.max_steps)
        reference = self._reference(config.dataset)
        made = self.found[reference.stage].row_tokens if reference is not None else None
        longest = config.max_length if made is None else min(made, config.max_length)
        pair = 2 if getattr(config, "kind", None) == "helpful" else 1
        budget.steps, budget.trained = steps, steps * batch * longest * pair

    def rows(self, source: str, args: dict[str, Any], limit: int | None) -> int | None:
        """Rows that ``source`` has, or may have; None where no one knows yet."""
        reference = self._reference(source)
        if reference is None:
            counted = _count(source, args, limit)
            return limit if counted is None else counted
        path = referenced_path(self.of_name[reference.stage], reference)
        if path is not None and path.is_file():
            rows: int | None = len(read_jsonl(path))
        else:
            rows = self.found[reference.stage].rows
        return rows if rows is None or limit is None else min(rows, limit)


def _given(config: Any, prompts: int) -> int | None:
    """Rows that come of the answers in ``answer_columns``: texts or lists of texts."""
    if config.kind == "helpful":
        return prompts * config.pairs_per_prompt
    try:
        rows = read_rows(config.dataset, args=config.dataset_args, limit=config.dataset_limit)
    except UserError:  # another stage's rows, or the stage itself will say so
        return None
    found = [row.get(column) or [] for row in rows for column in config.answer_columns]
    return sum(len(answers) if isinstance(answers, list) else 1 for answers in found)


def _count(source: str, args: dict[str, Any], limit: int | None) -> int | None:
    """Rows of a file or a generated set; a hub's data set is not fetched to be counted."""
    local = source.endswith((".jsonl", ".parquet")) and Path(source).expanduser().is_file()
    if not local and ":" not in source:
        return None
    try:
        return len(read_rows(source, args=args, limit=limit))
    except UserError:  # the stage itself will say so; a plan only counts
        return None
