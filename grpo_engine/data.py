"""Rows: where prompts come from, in which order they are used, and what is refused at the door.

A row is a dict with ``prompt`` (a string or a list of messages), usually ``solution``, and any
other columns, which reach the reward functions by name. Every mistake in the input is a UserError
of one line that names the file, row or column; nothing is guessed and nothing is skipped without
a count.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_engine.models.general import miniature_rows
from grpo_engine.types import UserError

Row = dict[str, Any]

_TASK_PREFIX = "reasoning_gym:"
_MINIATURE_PREFIX = "miniature:"
# As of reasoning_gym 0.1.25.
_UNUSABLE_TASKS = {
    "composite": "name one task",
    "game_of_life_halting": "its scorer gives full marks to any text",
    "codeio": "it draws different problems for the same seed and executes generated code",
}
_SOURCES = "a .jsonl or .parquet file, a dataset directory, a Hugging Face dataset id, or "
_SOURCES += "reasoning_gym:<task> or miniature:<general|prompts>"


def load_rows(
    source: str,
    *,
    args: Mapping[str, Any] | None = None,
    split: str | None = None,
    limit: int | None = None,
    prompt_column: str = "prompt",
    solution_column: str = "solution",
) -> list[Row]:
    """The rows of ``source`` (the first ``limit``), with ``prompt`` and ``solution`` filled in.

    ``source``: a ``.jsonl`` or ``.parquet`` file; a local dataset directory or Hugging Face
    dataset id (``args`` go to ``datasets.load_dataset``, ``split`` defaults to "train");
    ``reasoning_gym:<task>`` (``args``: seed, size and the task's own options; rows then carry
    ``task``, ``task_args`` and ``entry`` for the task's scorer); or ``miniature:general`` and
    ``miniature:prompts`` (toy rows, see ``models/general.py``). ``solution`` may be absent
    unless ``solution_column`` was renamed: a reward that needs it says so. Raises UserError.
    """
    rows = read_rows(source, args=args, split=split, limit=limit)
    return _with_standard_columns(source, rows, prompt_column, solution_column)


def read_rows(
    source: str,
    *,
    args: Mapping[str, Any] | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> list[Row]:
    """The rows of ``source`` as they are, whatever their columns. See ``load_rows``."""
    if limit is not None and limit < 1:
        raise UserError(f"limit must be >= 1, got {limit}")
    args = dict(args or {})
    if source.startswith(_TASK_PREFIX):
        _refuse(source, split=split)
        rows = _reasoning_gym_rows(source.removeprefix(_TASK_PREFIX), args, limit)
    elif source.startswith(_MINIATURE_PREFIX):
        _refuse(source, split=split)
        rows = miniature_rows(source.removeprefix(_MINIATURE_PREFIX), args)[:limit]
    elif source.endswith((".jsonl", ".parquet")):
        _refuse(source, split=split, args=args)
        path = Path(source).expanduser()
        if not path.is_file():
            raise UserError(f"dataset file {source} does not exist")
        read = _jsonl_rows if path.suffix == ".jsonl" else _parquet_rows
        rows = read(path, limit)
    else:
        rows = _hugging_face_rows(source, args, split, limit)
    if not rows:
        raise UserError(f"dataset {source} is empty")
    return rows


def check_source(source: str, *, args: Mapping[str, Any] | None = None) -> None:
    """Refuse what is wrong with a generated set, its name and ``args``, before any row is made.
    Of files and data sets nothing is looked at. Raises UserError."""
    args = dict(args or {})
    if source.startswith(_TASK_PREFIX):
        _reasoning_gym_problems(source.removeprefix(_TASK_PREFIX), args)
    elif source.startswith(_MINIATURE_PREFIX):
        miniature_rows(source.removeprefix(_MINIATURE_PREFIX), args)


def _refuse(source: str, **options: Any) -> None:
    for name, value in options.items():
        if value:
            raise UserError(f"{name} does not apply to {source}, got {value!r}")


def _jsonl_rows(path: Path, limit: int | None) -> list[Row]:
    rows: list[Row] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except json.JSONDecodeError as error:
                reason = f"{error.msg} at column {error.colno}"
                raise UserError(f"{path}:{number}: not valid JSON: {reason}") from None
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8: {error.reason}") from None
            if not isinstance(row, dict):
                kind = type(row).__name__
                raise UserError(f"{path}:{number}: wanted a JSON object, got a {kind}")
            rows.append(row)
            if len(rows) == limit:
                break
    return rows


def _parquet_rows(path: Path, limit: int | None) -> list[Row]:
    try:
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        raise UserError(f"reading {path} needs pyarrow: pip install 'grpo-engine[data]'") from None
    import pyarrow

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {_one_line(error)}") from None
    return table.slice(0, limit).to_pylist()


def _hugging_face_rows(
    source: str, args: Mapping[str, Any], split: str | None, limit: int | None
) -> list[Row]:
    path = Path(source).expanduser()
    if path.is_file() or (path.suffix and not path.exists() and source.count("/") != 1):
        raise UserError(f"dataset {source}: wanted {_SOURCES}")
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(
            f"loading {source} needs datasets: pip install 'grpo-engine[data]'"
        ) from None
    saved = (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
    try:
        if saved:
            _refuse(source, args=args)
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path) if path.is_dir() else source, **args)
    except UserError:
        raise
    except Exception as error:  # the library raises dozens of types; all mean "not loadable"
        raise UserError(f"cannot load dataset {source}: {_one_line(error)}") from error
    if isinstance(loaded, Mapping):
        wanted = split or "train"
        if wanted not in loaded:
            raise UserError(f"dataset {source} has no split {wanted!r}; it has: {_names(loaded)}")
        loaded = loaded[wanted]
    elif split is not None:
        raise UserError(f"dataset {source} has no splits, got split={split!r}")
    count = len(loaded) if limit is None else min(limit, len(loaded))
    return [dict(loaded[index]) for index in range(count)]


def _reasoning_gym_problems(task: str, args: dict[str, Any]) -> Any:
    """The task's data set, which makes a problem when it is asked for. Gives ``args`` a seed."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as missing:
        if missing.name != "reasoning_gym":
            raise
        raise UserError(
            f"{_TASK_PREFIX}{task} needs reasoning-gym: pip install 'grpo-engine[tasks]'"
        ) from None
    if task in _UNUSABLE_TASKS:
        raise UserError(f"reasoning_gym task {task!r} is refused: {_UNUSABLE_TASKS[task]}")
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"unknown reasoning_gym task {task!r}{hint}")
    known = {option.name for option in dataclasses.fields(DATASETS[task][1])}
    for name in args:
        if name not in known:
            raise UserError(
                f"reasoning_gym task {task!r} has no option {name!r}; it has: {_names(known)}"
            )
    # Without a seed the task would draw a new one each time and a resumed run other problems.
    args.setdefault("seed", 0)
    try:
        return reasoning_gym.create_dataset(task, **args)
    except (AssertionError, ValueError, TypeError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in sorted(args.items()))
        raise UserError(f"reasoning_gym task {task!r} ({given}): {_one_line(error)}") from None


def _reasoning_gym_rows(task: str, args: dict[str, Any], limit: int | None) -> list[Row]:
    problems = _reasoning_gym_problems(task, args)
    size = len(problems) if limit is None else min(limit, len(problems))
    task_args = {name: value for name, value in args.items() if name not in ("seed", "size")}
    return [
        {
            "prompt": entry["question"],
            "solution": entry["answer"],
            "task": task,
            "task_args": task_args,
            "entry": entry,
        }
        for entry in (problems[index] for index in range(size))
    ]


def _with_standard_columns(
    source: str, rows: list[Row], prompt_column: str, solution_column: str
) -> list[Row]:
    columns = _names({name for row in rows for name in row})
    renamed = []
    for number, row in enumerate(rows, start=1):
        if prompt_column not in row:
            raise UserError(
                f"{source}: row {number} has no column {prompt_column!r}; columns: {columns}"
            )
        if solution_column != "solution" and solution_column not in row:
            raise UserError(
                f"{source}: row {number} has no column {solution_column!r}; columns: {columns}"
            )
        prompt = row[prompt_column]
        if not _is_prompt(prompt):
            raise UserError(
                f"{source}: row {number}: {prompt_column!r} must be a non-empty string or a "
                f"list of messages with role and content, got {prompt!r:.80}"
            )
        standard = {**row, "prompt": prompt}
        if solution_column in row:
            standard["solution"] = row[solution_column]
        renamed.append(standard)
    return renamed


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in prompt
        )
    )


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(str, names)))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows as columns for the reward functions; a column a row lacks is None there."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


class PromptOrder:
    """Which row comes k-th in training: a fresh seeded permutation of all rows in every epoch.

    A pure function of (num_rows, seed, k), so a run resumes from a counter alone. Python's own
    generator is used because its sequences are the same on every platform and version.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        if num_rows < 1:
            raise UserError(f"num_rows must be >= 1, got {num_rows}")
        self.num_rows = num_rows
        self.seed = seed
        self._epoch = -1
        self._permutation: list[int] = []

    def __getitem__(self, position: int) -> int:
        """The row index at ``position`` (0, 1, ... without end)."""
        if position < 0:
            raise IndexError(f"position must be >= 0, got {position}")
        epoch, offset = divmod(position, self.num_rows)
        if epoch != self._epoch:
            self._permutation = list(range(self.num_rows))
            random.Random(f"prompt order {self.seed} {epoch}").shuffle(self._permutation)
            self._epoch = epoch
        return self._permutation[offset]

    def take(self, start: int, count: int) -> list[int]:
        """Row indices at positions ``start .. start + count - 1``."""
        return [self[position] for position in range(start, start + count)]


def check_prompt_lengths(
    lengths: Sequence[int], max_prompt_length: int, *, policy: str = "error"
) -> list[int]:
    """Indices of the prompts that fit. ``lengths`` in tokens, by row.

    ``policy`` "error" raises UserError at the first prompt that is too long; "skip" leaves such
    rows out (the caller reports ``len(lengths) - len(kept)``) and raises only when none is left.
    """
    if policy not in ("error", "skip"):
        raise UserError(f"long_prompts must be 'error' or 'skip', got {policy!r}")
    kept = [index for index, length in enumerate(lengths) if length <= max_prompt_length]
    if len(kept) < len(lengths) and policy == "error":
        row = next(index for index, length in enumerate(lengths) if length > max_prompt_length)
        raise UserError(
            f"the prompt of row {row + 1} has {lengths[row]} tokens, more than "
            f"max_prompt_length={max_prompt_length} ({len(lengths) - len(kept)} such rows)"
        )
    if not kept:
        raise UserError(
            f"every prompt is longer than max_prompt_length={max_prompt_length}; "
            f"the shortest has {min(lengths, default=0)} tokens"
        )
    return kept


def without_overlap(
    train: Sequence[Row], held_out: Sequence[Row], *, policy: str = "drop"
) -> tuple[list[Row], int]:
    """(training rows whose prompt text is not among ``held_out``, number of rows dropped).

    ``policy`` "error" raises UserError with the count instead of dropping; with "drop" it raises
    only when no training row is left.
    """
    if policy not in ("drop", "error"):
        raise UserError(f"overlap policy must be 'drop' or 'error', got {policy!r}")
    seen = {_prompt_text(row) for row in held_out}
    kept = [row for row in train if _prompt_text(row) not in seen]
    dropped = len(train) - len(kept)
    if dropped and (policy == "error" or not kept):
        raise UserError(f"{dropped} of {len(train)} training prompts are also held-out prompts")
    return kept, dropped


def _prompt_text(row: Mapping[str, Any]) -> str:
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
