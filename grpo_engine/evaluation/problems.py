"""Rows as problems of one kind: mathematics, multiple choice, code with tests, or reasoning_gym.

The kind decides the columns a row needs, how its question is put, and the reward that judges an
answer. Mistakes in the data are found here, before a model is loaded; each names file and row.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from grpo_engine.data import Row, read_rows
from grpo_engine.evaluation.config import EvalConfig
from grpo_engine.filters import Decontamination, plain_words
from grpo_engine.rewards import unusable_solutions
from grpo_engine.rewards.choice import LETTERS
from grpo_engine.rewards.code import checked_tests
from grpo_engine.templates import BOXED_SUFFIX
from grpo_engine.types import UserError

# The question of the multiple-choice benchmarks in the paper's tables (simple-evals' GPQA wording).
CHOICE_HEADER = (
    "Answer the following multiple choice question. The last line of your response should be of "
    "the following format: 'ANSWER: $LETTER' (without quotes) where LETTER is one of {letters}. "
    "Think step by step before answering."
)
CODE_SUFFIX = (
    "Please reason step by step, and put your final program within one ```python code block."
)
PROMPT_COLUMNS = ("prompt", "problem", "question")
SOLUTION_COLUMNS = ("answer", "solution")
CHOICES_COLUMNS = ("choices", "options")
OVERLAP_WORDS = 10
OVERLAP_LEAST = 5  # shorter questions are not compared: "2 + 2" is in half of all texts


@dataclass(frozen=True)
class Kind:
    """How one kind of problem is put and judged."""

    reward: str
    suffix: str | None  # behind every question, template 'chat'


KINDS = {
    "math": Kind("accuracy", BOXED_SUFFIX),
    "choice": Kind("grpo_engine.rewards.choice:choice_reward", None),
    "code": Kind("code", CODE_SUFFIX),
    "reasoning_gym": Kind("reasoning_gym", BOXED_SUFFIX),
}


@dataclass
class Problems:
    """The problems of an evaluation. ``rows`` have ``prompt``, what the reward needs, and ``row``:
    their number in the data, from 1."""

    task: str
    rows: list[Row]
    columns: dict[str, str] = field(default_factory=dict)  # what was read as prompt, solution, ...
    unusable: list[int] = field(default_factory=list)  # row numbers left out

    @property
    def kind(self) -> Kind:
        return KINDS[self.task]


def load_problems(config: EvalConfig) -> Problems:
    """The problems that ``config`` names, every row checked. Raises UserError."""
    rows = read_rows(
        config.data, args=config.data_args, split=config.data_split, limit=config.data_limit
    )
    task = _task(config, rows)
    columns = {"prompt": _column(config, rows, "prompt_column", PROMPT_COLUMNS)}
    if task in ("math", "choice"):
        columns["solution"] = _column(config, rows, "solution_column", SOLUTION_COLUMNS)
    if task == "choice":
        columns["choices"] = _column(config, rows, "choices_column", CHOICES_COLUMNS)
    problems = Problems(task, [], columns)
    for number, row in enumerate(rows, start=1):
        where = f"{config.data}: row {number}"
        needed = _NEEDED.get(task, ())
        for name in (*columns.values(), *needed):
            if row.get(name) is None:
                raise UserError(f"{where} has no {name!r}; its columns: {_names(row)}")
        _check_prompt(row[columns["prompt"]], where, columns["prompt"])
        problem = {**row, "prompt": row[columns["prompt"]], "row": number}
        if "solution" in columns:
            problem["solution"] = row[columns["solution"]]
        if task == "choice":
            problem |= _as_choice(problem, row[columns["choices"]], config, where)
        problems.rows.append(problem)
    _leave_out_unusable(config, problems)
    return problems


_NEEDED = {"code": ("tests",), "reasoning_gym": ("task", "entry")}


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(str, names)))


def _task(config: EvalConfig, rows: list[Row]) -> str:
    """The kind of the problems, by the columns of the first row where it is not given."""
    if config.task != "auto":
        return config.task
    columns = set(rows[0])
    chosen = {config.choices_column} if config.choices_column else set(CHOICES_COLUMNS)
    signs = {
        "choice": bool(columns & chosen),
        "code": "tests" in columns,
        "reasoning_gym": {"task", "entry"} <= columns,
    }
    found = [name for name, there in signs.items() if there]
    if len(found) > 1:
        raise UserError(
            f"--task auto: the columns of {config.data} fit {' and '.join(found)} "
            f"({_names(columns)}); name one with --task"
        )
    if found:
        return found[0]
    if columns & {*SOLUTION_COLUMNS, config.solution_column}:
        return "math"
    raise UserError(
        f"--task auto: {config.data} has no solution, answer, choices or tests; its columns: "
        f"{_names(columns)}"
    )


def _column(config: EvalConfig, rows: list[Row], field_name: str, usual: tuple[str, ...]) -> str:
    """The column that ``field_name`` names, or the usual one that is there."""
    named = getattr(config, field_name)
    if named is not None:
        return named
    there = [name for name in usual if name in rows[0]]
    if not there:
        raise UserError(
            f"--{field_name}: {config.data} has none of {', '.join(usual)}; its columns: "
            f"{_names(rows[0])}"
        )
    # Data with both a worked solution and its final answer are judged by the answer; but two
    # columns that could be the question are two different evaluations.
    if len(there) > 1 and usual is not SOLUTION_COLUMNS:
        raise UserError(f"--{field_name}: {config.data} has {' and '.join(there)}; name one")
    return there[0]


def _check_prompt(prompt: Any, where: str, name: str) -> None:
    if isinstance(prompt, str) and prompt.strip():
        return
    is_messages = isinstance(prompt, list) and all(
        isinstance(one, dict) and isinstance(one.get("content"), str) and "role" in one
        for one in prompt
    )
    if not prompt or not is_messages:
        raise UserError(
            f"{where}: {name!r} must be a text or a list of messages with role and content, "
            f"got {prompt!r:.80}"
        )


def _as_choice(problem: Row, choices: Any, config: EvalConfig, where: str) -> Row:
    """The row with its choices in their order, lettered; ``solution`` is the letter and
    ``choice_order[i]`` the place in the data of the choice shown as letter i."""
    if not isinstance(problem["prompt"], str):
        raise UserError(f"{where}: the question of a multiple choice must be a text")
    texts = isinstance(choices, list) and all(isinstance(text, str) for text in choices)
    if not texts or not 2 <= len(choices) <= len(LETTERS):
        raise UserError(f"{where}: wanted a list of 2 to 26 choices, got {choices!r:.80}")
    right = _right_choice(problem["solution"], choices, where)
    if choices.count(choices[right]) > 1:
        raise UserError(f"{where}: the right choice {choices[right]!r:.60} is there twice")
    order = list(range(len(choices)))
    if config.shuffle_choices:
        random.Random(f"choices {config.seed} {problem['row']}").shuffle(order)
    letters = LETTERS[: len(choices)]
    header = CHOICE_HEADER.format(letters=letters)
    listed = "\n".join(
        f"{letter}) {choices[place]}" for letter, place in zip(letters, order, strict=True)
    )
    return {
        "question": problem["prompt"],
        "prompt": f"{header}\n\n{problem['prompt']}\n\n{listed}",
        "solution": letters[order.index(right)],
        "num_choices": len(choices),
        "choice_order": order,
    }


def _right_choice(answer: Any, choices: list[str], where: str) -> int:
    """The index of the right choice: ``answer`` is an index from 0, a letter or the text itself."""
    found = set()
    if isinstance(answer, int) and not isinstance(answer, bool):
        found |= {answer} & set(range(len(choices)))
    elif isinstance(answer, str):
        text = answer.strip()
        if len(text) == 1 and text.upper() in LETTERS[: len(choices)]:
            found.add(LETTERS.index(text.upper()))
        found |= {place for place, choice in enumerate(choices) if choice == answer}
    if len({choices[place] for place in found}) == 1:
        return min(found)
    what = "could be two of the choices" if found else "is none of the choices"
    raise UserError(f"{where}: the answer {answer!r:.60} {what} ({len(choices)} choices)")


def _leave_out_unusable(config: EvalConfig, problems: Problems) -> None:
    """References and tests that cannot be judged: an error, or left out and counted."""
    reasons: dict[int, str] = {}
    if problems.task == "math":
        for index in unusable_solutions([row["solution"] for row in problems.rows]):
            reasons[index] = f"the solution {problems.rows[index]['solution']!r:.60}"
    elif problems.task == "code":
        for index, row in enumerate(problems.rows):
            try:
                checked_tests(row["tests"])
            except ValueError as error:
                reasons[index] = str(error)
    if not reasons:
        return
    if config.unusable_rows == "error":
        index, reason = next(iter(reasons.items()))
        raise UserError(
            f"{config.data}: row {problems.rows[index]['row']} cannot be judged: {reason} "
            f"({len(reasons)} such rows; leave them out with --unusable_rows skip)"
        )
    problems.unusable = [problems.rows[index]["row"] for index in reasons]
    problems.rows = [row for index, row in enumerate(problems.rows) if index not in reasons]
    if not problems.rows:
        raise UserError(f"{config.data}: no row can be judged")


def question_text(row: Mapping[str, Any]) -> str:
    """What a problem asks, without our own words around it."""
    prompt = row.get("question") if "choice_order" in row else row["prompt"]
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt)


def count_overlap(config: EvalConfig, problems: Problems) -> dict[str, Any] | None:
    """How many problems share ten words in a row with the texts of ``check_overlap``."""
    if config.check_overlap is None:
        return None
    training = read_rows(config.check_overlap)
    questions = [question_text(row) for row in problems.rows]
    together = Decontamination(questions, size=OVERLAP_WORDS, least=OVERLAP_LEAST)
    single = {
        index: Decontamination([question], size=OVERLAP_WORDS, least=OVERLAP_LEAST)
        for index, question in enumerate(questions)
    }
    shared: set[int] = set()
    for text in (text for row in training for text in _texts(row)):
        if together.matches(text):
            for index in [index for index, one in single.items() if one.matches(text)]:
                shared.add(index)
                del single[index]
    return {
        "source": config.check_overlap,
        "training_rows": len(training),
        "words": OVERLAP_WORDS,
        "problems": len(shared),
        "share": len(shared) / len(questions),
        "rows": [problems.rows[index]["row"] for index in sorted(shared)],
        "too_short_to_compare": sum(len(plain_words(one)) < OVERLAP_LEAST for one in questions),
    }


def _texts(value: Any) -> Iterator[str]:
    """Every text in a row, messages and lists included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _texts(one)
