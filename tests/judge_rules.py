"""Chat models that are rules, for tests of what a judge is used for."""

import json
import re
from pathlib import Path

from grpo_engine.rewards.judge_prompts import materials_of

CALLS = []  # every conversation that was asked, in order


def rule(conversations, *, seed, temperature, max_tokens):
    """Correct where reference and answer are the same text; the longer answer is much better, by
    number where both are numbers; unsafe where the response says so."""
    CALLS.extend(conversations)
    return [answer(conversation) for conversation in conversations]


def answer(conversation):
    given = materials_of(conversation)
    if "REFERENCE" in given:
        word = "correct" if given["REFERENCE"] == given["ANSWER"] else "incorrect"
        return json.dumps({"analysis": "compared", "correctness": word})
    if "ANSWER A" in given:
        values = [value(given[name]) for name in ("ANSWER A", "ANSWER B")]
        sign = "=" if values[0] == values[1] else ">>"
        first, second = ("A", "B") if values[0] >= values[1] else ("B", "A")
        return f"My own answer.\n\n[[{first}{sign}{second}]]"
    word = "unsafe" if "poison" in given["RESPONSE"] else "safe"
    return json.dumps({"analysis": "read", "safety": word})


def few_letters(conversations):
    """Correct where most of the answer is no letters."""
    replies = []
    for conversation in conversations:
        text = materials_of(conversation)["ANSWER"]
        few = 2 * sum(map(str.isalpha, text)) < len(text)
        replies.append(
            json.dumps({"analysis": "", "correctness": "correct" if few else "incorrect"})
        )
    return replies


def value(text):
    return float(text) if re.fullmatch(r"-?\d+(\.\d+)?", text) else len(text)


def always_a(conversations):
    """A judge with nothing but position bias."""
    return ["[[A>>B]]"] * len(conversations)


def unreadable(conversations, *, temperature, seed):
    CALLS.extend((seed, temperature) for _ in conversations)
    return ["I would rather not say."] * len(conversations)


def silent(conversations):
    return [None] * len(conversations)


def broken(conversations):
    raise ConnectionError("no route")


def short(conversations):
    return ["[[A=B]]"] * (len(conversations) - 1)


def numbers(conversations):
    return [1.0] * len(conversations)


def wrong_arguments(question):
    return question


def log_to(conversations, *, path):
    """Appends a line for each conversation it is asked, then answers as ``rule`` does."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.writelines("asked\n" for _ in conversations)
    return [answer(conversation) for conversation in conversations]
