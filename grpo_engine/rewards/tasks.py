"""Accuracy on reasoning_gym rows, verified by the task's own scorer.

Rows come from ``grpo_engine.data`` with the columns ``task``, ``task_args`` and ``entry``. The
verdict is binary, as in the R1 paper: the scorers hand out partial credit for mentioning the
answer, which a policy learns to collect. Several scorers pass the answer to ``eval`` (directly or
through sympy), so those see only answers that are plain literals or plain arithmetic.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from grpo_engine.rewards.answers import (
    MAX_ANSWER_CHARS,
    completion_text,
    marked_answers,
    text_after_thinking,
)
from grpo_engine.rewards.clock import loading
from grpo_engine.types import UserError

# As of reasoning_gym 0.1.25.
_EVALUATED_AS_PYTHON = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}
_EVALUATED_BY_SYMPY = {
    "countdown",
    "intermediate_integration",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
}
_ARITHMETIC = re.compile(r"[0-9A-Za-z+\-*/^() .]*")
_NAME = re.compile(r"[A-Za-z]\w*")
_MATHS_NAME = re.compile(
    "[A-Za-z]|sin|cos|tan|sec|csc|cot|asin|acos|atan|sinh|cosh|tanh|log|ln|exp|sqrt|pi"
)


@lru_cache(maxsize=64)
def _scorer(task: str, task_args: str) -> Any:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(
            "reward 'reasoning_gym' needs reasoning-gym: pip install 'grpo-engine[tasks]'"
        )
    with loading():  # the package is large, and some tasks read word lists
        import reasoning_gym

        options = {**json.loads(task_args), "size": 1, "seed": 0}
        return reasoning_gym.create_dataset(task, **options)


def _safe_to_score(task: str, answer: str) -> bool:
    """Whether the task's scorer may see ``answer``; False where ``eval`` could run code in it."""
    if task in _EVALUATED_AS_PYTHON:
        try:
            ast.literal_eval(answer)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            # Plain text such as "1 2 3" also makes eval a SyntaxError; only that is let through.
            return not re.search(r"[(\[{.]", answer)
        return True
    if task in _EVALUATED_BY_SYMPY:
        return bool(_ARITHMETIC.fullmatch(answer)) and all(
            _MATHS_NAME.fullmatch(name) for name in _NAME.findall(answer)
        )
    return True


def score_answer(
    answer: str, task: str, entry: Mapping[str, Any], task_args: Mapping[str, Any] | None = None
) -> bool:
    """Whether the task's own scorer gives ``answer`` full marks.

    An exception is the answer's fault, and the answer wrong, when the stored answer scores without
    one; otherwise the scorer is at fault and the exception is passed on.
    """
    scorer = _scorer(task, json.dumps(dict(task_args or {}), sort_keys=True))
    if not _safe_to_score(task, answer):
        return False
    try:
        return float(scorer.score_answer(answer, entry)) >= 1.0
    except Exception:
        if entry.get("answer") is None:
            raise
        scorer.score_answer(entry["answer"], entry)
        return False


def _judge(
    completion: Any, row: Mapping[str, Any], *, thinking_prefilled: bool = False
) -> tuple[float | None, str]:
    if row["task"] is None:
        return None, "none"  # a row of another source in a mixed data set
    tail = text_after_thinking(completion_text(completion), thinking_prefilled)
    answers = marked_answers(tail) if tail is not None else None
    if answers is None:
        return 0.0, "no_answer"
    if any(len(answer) > MAX_ANSWER_CHARS for answer in answers):
        return 0.0, "too_long"
    if len(answers) > 1:
        return 0.0, "ok"
    return float(score_answer(answers[0], row["task"], row["entry"], row.get("task_args"))), "ok"


def reasoning_gym_reward(
    completions: list[Any],
    task: list[str],
    entry: list[Mapping[str, Any]],
    task_args: list[Mapping[str, Any]] | None = None,
    *,
    thinking_prefilled: bool = False,
    **_: Any,
) -> list[float | None]:
    """1.0 where the task's own scorer gives the marked answer full marks, else 0.0 (TRL signature).

    Two different marked answers are wrong. Scorers run without a deadline here: use ``RewardPool``
    for text a model wrote.
    """
    rows = [
        {"task": name, "entry": one, "task_args": args}
        for name, one, args in zip(task, entry, task_args or [None] * len(task), strict=True)
    ]
    return [
        _judge(completion, row, thinking_prefilled=thinking_prefilled)[0]
        for completion, row in zip(completions, rows, strict=True)
    ]


reasoning_gym_reward.judge = _judge
reasoning_gym_reward.required_columns = ("task", "entry")
