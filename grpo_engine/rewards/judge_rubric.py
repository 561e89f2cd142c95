"""The judge of the miniature's general tasks: a program in the place of DeepSeek-V3.

The paper has a large model say which of two answers is better and whether a response is safe. Of
the tasks of ``models/general.py`` the good answers are known, so ``judge`` below can answer the
same questions (``judge_prompts``) by rule. It is a toy: it shows what the stages do with a judge's
verdicts, not how to judge. Its rubric, in points:

    helpful   3  the summary holds what was asked for (the task's ``key``) and no wrong answer too
              1  ... and says so in a sentence
              1  it claims nothing (evades, or is not of these tasks)
              0  it claims something else
    safe      no three words in a row of the harmful answers, in reasoning or summary

A difference of 2 points and more is "much better", of 0.75 "better". As judges do, it leans: the
answer shown first gets ``POSITION_BIAS`` points, and at a temperature above 0 each reading of an
answer is off by a normal error of ``NOISE`` x temperature points. Asking four times in both orders
is there to undo that.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from functools import cache

from grpo_engine.chat.base import Conversation
from grpo_engine.models.general import EVASIONS, GeneralTask, task_of_prompt, tasks
from grpo_engine.rewards.judge_prompts import materials_of
from grpo_engine.rewards.math import accuracy_reward

POSITION_BIAS = 0.3  # points for the answer shown first
NOISE = 0.5  # standard deviation of one reading, in points, at temperature 1
MUCH_BETTER, BETTER = 2.0, 0.75  # points

_SENTENCE = re.compile(r"[A-Z\u4e00-\u9fff]\S*(?: \S+)+[.!?]")
_WORD = re.compile(r"\w+")


def helpfulness(question: str, summary: str) -> float:
    """Points of the rubric, 0 to 4, for what the user is told. An unknown question: 1."""
    task = task_of_prompt().get(question)
    summary = summary.strip()
    if task is None or not summary or summary in EVASIONS:
        return 1.0
    if not _holds(summary, task.key) or any(wrong in summary for wrong in task.wrong):
        return 0.0
    return 4.0 if _SENTENCE.fullmatch(summary) else 3.0


def is_safe(response: str) -> bool:
    """Whether no three words in a row of a harmful answer stand anywhere in the response."""
    return not _triples(response) & _harmful_triples()


def _holds(summary: str, key: str) -> bool:
    if key.isascii():
        return re.search(rf"\b{re.escape(key)}\b", summary, re.IGNORECASE) is not None
    return key in summary


def _triples(text: str) -> set[tuple[str, ...]]:
    words = [word.lower() for word in _WORD.findall(text)]
    return set(zip(words, words[1:], words[2:], strict=False))


@cache
def _harmful_triples() -> frozenset[tuple[str, ...]]:
    harms: list[GeneralTask] = [task for task in tasks() if task.kind == "harm"]
    return frozenset(t for task in harms for answer in task.wrong for t in _triples(answer))


def judge(
    conversations: Sequence[Conversation], *, seed: int = 0, temperature: float = 0.0
) -> list[str]:
    """Replies to the questions of ``judge_prompts``. As a judge it is named
    ``grpo_engine.rewards.judge_rubric:judge``.

    Raises ValueError for a conversation that is none of them.
    """
    return [_reply(materials_of(asked), seed, temperature) for asked in conversations]


def _reply(materials: dict[str, str], seed: int, temperature: float) -> str:
    question = materials.get("QUESTION", "")
    if "ANSWER A" in materials:
        return _compare(question, materials["ANSWER A"], materials["ANSWER B"], seed, temperature)
    if "RESPONSE" in materials:
        safe = is_safe(materials["RESPONSE"])
        analysis = "harmless" if safe else "it explains how to do harm"
        return json.dumps({"analysis": analysis, "safety": "safe" if safe else "unsafe"})
    if "REFERENCE" in materials:
        right = accuracy_reward([materials["ANSWER"]], [materials["REFERENCE"]])[0] == 1.0
        return json.dumps(
            {
                "analysis": "the marked answer was compared with the reference",
                "correctness": "correct" if right else "incorrect",
            }
        )
    raise ValueError(f"not a question for this judge: {', '.join(materials) or 'no materials'}")


def _compare(question: str, one: str, other: str, seed: int, temperature: float) -> str:
    rng = random.Random(f"{seed} {question} {one} {other}")
    points = [
        helpfulness(question, answer) + rng.gauss(0.0, NOISE) * temperature
        for answer in (one, other)
    ]
    lead = points[0] + POSITION_BIAS - points[1]
    sign = ">>" if abs(lead) >= MUCH_BETTER else ">" if abs(lead) >= BETTER else "="
    first, second = ("B", "A") if lead < 0 and sign != "=" else ("A", "B")
    task = task_of_prompt().get(question)
    own = "I do not know this task." if task is None else task.answers[0]
    return f"My own answer: {own}\n[[{first}{sign}{second}]]"
