"""Chat models for the tests of grpo-engine sample: functions, for ``judge`` and ``rewrite``."""

import json

from grpo_engine.rewards.judge import materials_of

CHINESE = "我们先把二和三加起来然后得到五所以答案是五"
NOVEL = " ".join(f"{a}{b}{c}" for a in "bcdfg" for b in "aeiou" for c in "klmnp")
LEAK = "Alice has three apples and gives two of them to her brother Bob on Monday"
LOOP = "I add two and three once more and it is five again. " * 20


def thought_of(conversation):
    return conversation[-1]["content"].partition("## Thought process\n")[2]


def rewriter(conversations, *, seed, temperature, max_tokens):
    """Refines and sums up as the first word of the thought process says."""
    return [reply(one) for one in conversations]


def reply(conversation):
    thought = thought_of(conversation)
    word = thought.split()[0]
    if "Reply with the thought process alone." in conversation[-1]["content"]:
        bodies = {
            "Fences": f"{thought}\n```\n2 + 3\n```",
            "Novels": f"{thought} {NOVEL}",
            "Mixes": f"{thought} {CHINESE}",
            "Leaks": f"{thought} {LEAK}",
            "Twins": "Twins I add two and three, and both say five.",
            "Empties": "",
            "Thinks": f"<think>how shall I put it</think>{thought}",
        }
        return bodies.get(word, thought)
    summaries = {
        "Alters": "Two and three make \\boxed{6}.",
        "Forgets": "Two and three make five.",
        "Vanishes": None,
        "Crashes": "crash \\boxed{5}",
        "Loops": f"{LOOP} \\boxed{{5}}",
    }
    return summaries.get(word, "Two and three make \\boxed{5}.")


def judge(conversations):
    """Right where the answer names the reference; without a verdict where it says "unsure"."""
    replies = []
    for one in conversations:
        shown = materials_of(one)
        label = "correct" if shown["REFERENCE"] in shown["ANSWER"] else "incorrect"
        verdict = json.dumps({"analysis": "compared", "correctness": label})
        replies.append("no idea" if "unsure" in shown["ANSWER"] else verdict)
    return replies


def crashing_accuracy(completions, **_):
    raise AssertionError("the pool calls judge")


def _judge(completion, row):
    from grpo_engine.rewards import accuracy_reward

    if "crash" in completion:
        raise RuntimeError("no verdict")
    return accuracy_reward.judge(completion, row)


crashing_accuracy.judge = _judge
crashing_accuracy.required_columns = ("solution",)
