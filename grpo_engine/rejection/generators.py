"""The prompts of each way of sampling: v1 2.3.1 tried R1-Zero's own outputs, few-shot prompting
with long chains of thought, and asking directly for detailed answers with reflection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_engine.data import Row, load_rows, read_rows
from grpo_engine.evaluation.problems import PROMPT_COLUMNS
from grpo_engine.prepare import load_prompts
from grpo_engine.rejection.config import GeneratorConfig, SampleConfig
from grpo_engine.rewards.judge import question_text
from grpo_engine.rollouts import Prompt
from grpo_engine.sampling.model import Drawn, SamplingModel
from grpo_engine.sampling.samples import Cell
from grpo_engine.sampling.series import Series
from grpo_engine.types import UserError

# Few-shot examples for a base model, which has no turns to show them as (template 'none').
QUESTION_MARK, ANSWER_MARK = "### Question", "### Answer"


@dataclass
class Generator(Series):
    """One way of sampling, with its prompts. ``config`` is the run's, with what this generator has
    otherwise.

    Args:
        model: what the answers depend on: weights, number type, end ids.
        stop: text at which an answer ends, where no end token does.
    """

    model: dict[str, Any] = field(default_factory=dict)
    stop: str | None = None

    def whole(self, cell: Cell, drawn: Drawn) -> Drawn:
        """The answer with what the prompt made it begin with, and without the stop text."""
        text, stopped, _ = drawn.text.partition(self.stop) if self.stop else (drawn.text, "", "")
        if stopped:
            drawn = drawn._replace(finish_reason="stop")
        return drawn._replace(text=self.begun(cell) + (text.rstrip() if stopped else text))

    def inputs(self) -> dict[str, Any]:
        return {**super().inputs(), "stop": self.stop}


def load_questions(config: SampleConfig) -> list[Row]:
    """The rows of ``dataset``, numbered from 1 in ``row``, each with a ``domain``."""
    rows = load_rows(
        config.dataset,
        args=config.dataset_args,
        split=config.dataset_split,
        limit=config.dataset_limit,
        prompt_column=config.prompt_column,
        solution_column=config.solution_column,
    )
    return [
        {**row, "row": number, "domain": _domain(row, config.dataset_domain)}
        for number, row in enumerate(rows, start=1)
    ]


def _domain(row: Row, default: str | None) -> str:
    domain = row.get("domain") or default
    return str(domain) if domain else "math" if row.get("tests") is None else "code"


def test_questions(config: SampleConfig) -> Iterator[str]:
    """The questions of the evaluation that ``decontaminate`` names."""
    rows = read_rows(
        config.decontaminate, args=config.decontaminate_args, split=config.decontaminate_split
    )
    for number, row in enumerate(rows, start=1):
        column = next((name for name in PROMPT_COLUMNS if row.get(name)), None)
        if column is None:
            raise UserError(
                f"--decontaminate {config.decontaminate}: row {number} has none of "
                f"{', '.join(PROMPT_COLUMNS)}; its columns: {', '.join(sorted(row))}"
            )
        yield question_text(row[column])


def make_generator(
    one: GeneratorConfig,
    settings: SampleConfig,
    model: SamplingModel,
    rows: list[Row],
    left_out: set[int],
) -> Generator:
    """The prompts of ``rows`` as this generator puts them; no answer is drawn for those
    ``left_out``. Raises UserError as rendering does, and where the longest answer would pass the
    model's positions."""
    shown, stop = rows, None
    if settings.few_shot and settings.prompt_template == "none":
        shown, stop = [_with_examples(row, settings) for row in rows], QUESTION_MARK
        settings = settings.model_copy(update={"few_shot": [], "prompt_suffix": None})
    original = {row["row"]: row for row in rows}
    prompts = [
        Prompt(original[prompt.row["row"]], prompt.text, prompt.token_ids)
        for prompt in load_prompts(settings, model.policy.tokenizer, shown)
    ]
    made = Generator("sample", settings, prompts, one.label, left_out, model.inputs(), stop)
    model.check_positions(made)
    return made


def _with_examples(row: Row, settings: SampleConfig) -> Row:
    """The question behind the examples, as one text that a base model goes on with."""
    if not isinstance(row["prompt"], str):
        raise UserError(
            f"few_shot: row {row['row']} holds messages; show examples to it with template 'chat'"
        )
    return {**row, "prompt": few_shot_text(settings.few_shot, row["prompt"], settings)}


def few_shot_text(
    examples: Sequence[Mapping[str, str]], question: str, settings: SampleConfig
) -> str:
    suffix = f"\n{settings.prompt_suffix}" if settings.prompt_suffix else ""
    parts = []
    for number, example in enumerate(examples, start=1):
        if set(example) != {"prompt", "completion"}:
            raise UserError(
                f"few_shot example {number} must have prompt and completion, got "
                f"{', '.join(sorted(example)) or 'nothing'}"
            )
        parts.append(_exchange(example["prompt"] + suffix, example["completion"]))
    return "".join([*parts, _exchange(question + suffix, "")]).rstrip("\n") + "\n"


def _exchange(question: str, answer: str) -> str:
    return f"{QUESTION_MARK}\n{question}\n{ANSWER_MARK}\n{answer}\n\n"
