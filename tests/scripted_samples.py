"""Runs of grpo-engine sample with scripted answers in place of a model's, and an answer for every
reason to reject one."""

from pathlib import Path

import pytest
import sample_chat
from sample_cases import rows_of, write
from sample_chat import CHINESE, LEAK, LOOP, NOVEL
from tiny_model import make_tiny_model

from grpo_engine.rejection import SampleConfig, run_sample
from grpo_engine.rejection.draw import Drawing
from grpo_engine.settings import build_config

CHAT = Path(sample_chat.__file__)
QUESTION = "What is the sum of the numbers two and three?"
ROW = {"prompt": QUESTION, "solution": "5"}


def chain(thought, summary="The sum is \\boxed{5}."):
    return f"<think>{thought}</think>\n{summary}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def scripted(tiny, tmp_path, monkeypatch):
    """Make data of ``rows`` with these answers in place of the model's: {(row, sample): text or
    (text, finish reason)}, or by (generator, row, sample)."""

    def run(rows, answers, code=0, **values):
        def generate(self, generator, cells):
            found = [answers.get(cell, answers.get(cell[1:])) for cell in cells]
            return [
                (one, 7, "stop") if isinstance(one, str) else (one[0], 7, one[1]) for one in found
            ]

        monkeypatch.setattr(Drawing, "generate", generate)
        data = write(tmp_path / "rows.jsonl", *rows)
        settings = {
            "model": str(tiny),
            "dataset": str(data),
            "prompt_template": "none",
            "num_samples": 1 + max(key[-1] for key in answers),
            "max_completion_length": 8,
            "reward_workers": 1,
            "device": "cpu",
            "output_dir": str(tmp_path / "run"),
            **values,
        }
        assert run_sample(build_config(settings, SampleConfig)) == code
        return tmp_path / "run"

    return run


def reasons_of(folder):
    return {line["sample"]: line["reason"] for line in rows_of(folder, "rejected.jsonl")}


BAD = {
    "truncated": (chain("I add two and three."), "length"),
    "unverified": chain("I add two and three.", "crash \\boxed{5}"),
    "no_answer": chain("I add two and three.", "The sum is five."),
    "wrong": chain("I add two and three.", "The sum is \\boxed{6}."),
    "bad_format": "I add two and three. \\boxed{5}",
    "repetition": chain("I add two and three.", f"{LOOP} \\boxed{{5}}"),
    "code_block": chain("I add two and three.\n```\n2 + 3\n```\n"),
    "long_paragraph": chain(NOVEL),
    "mixed_language": chain(f"I add two and three. {CHINESE}"),
    "contaminated": chain(f"I think of this: {LEAK}."),
    "duplicate": chain("first of all I ADD two, and three!"),
    "surplus": chain("One more way to see it: three fingers and two fingers."),
}
LIMITS = {
    "reward_funcs": [f"{CHAT}:crashing_accuracy"],
    "max_paragraph_words": 60,
    "keep": "shortest",
    "max_per_prompt": 1,
    "max_reward_error_rate": 1.0,
}
# What the chat model of sample_chat does with a thought that begins with the word.
REWRITTEN_BADLY = {
    "Vanishes": "rewrite_failed",
    "Crashes": "rewrite_unverified",
    "Forgets": "rewrite_no_answer",
    "Alters": "rewrite_wrong",
    "Loops": "rewrite_repetition",
    "Fences": "rewrite_code_block",
    "Novels": "rewrite_long_paragraph",
    "Mixes": "rewrite_mixed_language",
    "Leaks": "rewrite_contaminated",
    "Twins": "rewrite_duplicate",
}
EDITED_BADLY = {
    "removed_by_editor": None,
    "edit_unverified": chain("I edit.", "crash \\boxed{5}"),
    "edit_no_answer": chain("I edit.", "five"),
    "edit_wrong": chain("I edit.", "\\boxed{6}"),
    "edit_bad_format": "I edit. \\boxed{5}",
    "edit_repetition": chain("I edit.", f"{LOOP} \\boxed{{5}}"),
    "edit_code_block": chain("I edit.\n```\n2 + 3\n```\n"),
    "edit_long_paragraph": chain(NOVEL),
    "edit_mixed_language": chain(f"I edit. {CHINESE}"),
    "edit_contaminated": chain(LEAK),
}
PROSE = {"prompt": "Why is the sky blue, in one word?", "solution": "scattering", "domain": "stem"}
