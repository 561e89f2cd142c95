"""grpo-engine sample holds one row's texts in memory, not all that were drawn."""

import random
import tracemalloc

import pytest
from sample_cases import rows_of, statistics_of, write
from tiny_model import make_tiny_model

from grpo_engine.rejection import SampleConfig, run_sample
from grpo_engine.rejection.draw import Draw, Drawing
from grpo_engine.rejection.select import Answers, Candidate, in_batches
from grpo_engine.rejection.work import Work
from grpo_engine.settings import build_config

ROWS, SAMPLES, LENGTH = 40, 4, 200_000
PROGRAMS = """
def right(completions, **_):
    return [float("wrong" not in text) for text in completions]

def rewriter(conversations):
    thoughts = [one[-1]["content"].partition("## Thought process\\n")[2] for one in conversations]
    asks = "Reply with the thought process alone."
    return [
        thought if asks in one[-1]["content"] else f"It is {thought[:20]} \\\\boxed{{5}}."
        for one, thought in zip(conversations, thoughts)
    ]
"""


@pytest.mark.parametrize("rewrite", [None, "template", "chat"])
def test_the_texts_of_a_run_are_never_all_in_memory(tmp_path, monkeypatch, rewrite):
    """32 MB are drawn, as many are rewritten, half of them are rejected."""

    def generate(self, generator, cells):
        texts = []
        for _, row, number in cells:
            summary = "wrong" if number % 2 else "\\boxed{5}"
            texts.append(f"<think>{row}.{number}{'x' * LENGTH}</think>{summary}")
        return [(text, 7, "stop") for text in texts]

    monkeypatch.setattr(Drawing, "generate", generate)
    (tmp_path / "programs.py").write_text(PROGRAMS)
    make_tiny_model(tmp_path / "model")
    rows = [{"prompt": f"{n}?", "solution": "5", "language": None} for n in range(ROWS)]
    values = {
        "model": str(tmp_path / "model"),
        "dataset": str(write(tmp_path / "rows.jsonl", *rows)),
        "prompt_template": "none",
        "num_samples": SAMPLES,
        "max_completion_length": 8,
        "generation_batch_size": 4,
        "reward_funcs": [f"{tmp_path}/programs.py:right"],
        "min_language_share": None,
        "max_paragraph_words": None,
        "max_repeated_share": None,
        "rewrite": f"{tmp_path}/programs.py:rewriter" if rewrite == "chat" else rewrite,
        "rewrite_batch_size": 3,
        "reward_workers": 1,
        "device": "cpu",
        "output_dir": str(tmp_path / "run"),
    }
    make, peaks = Work.make, []

    def measured(*args):
        tracemalloc.start()
        try:
            return make(*args)
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    monkeypatch.setattr(Work, "make", measured)
    monkeypatch.setattr("grpo_engine.rejection.work.domain_table", table_without_tokens)
    assert run_sample(build_config(values, SampleConfig)) == 0
    assert len(rows_of(tmp_path / "run")) == ROWS * SAMPLES // 2
    assert statistics_of(tmp_path / "run")["acceptance"]["rejected"] == {"wrong": 80}
    assert peaks[0] < 0.35 * ROWS * SAMPLES * LENGTH, f"{peaks[0] / 1e6:.1f} MB"


def table_without_tokens(rows, tokenizer):
    """The tokenizer of the tests takes its time over a word of this length."""
    count = sum(1 for _ in rows)
    return {"domains": [], "total": {"domain": "total", "samples": count, "tokens": 0,
                                     "average_tokens": 0.0, "average_rounds": 1.0}}  # fmt: skip


def answers_to(row, count):
    cells = [("one", row, n) for n in range(count)]
    draws = [Draw(*cell, 0, f"{cell}", 1, "stop", {}) for cell in cells]
    found = Answers({"row": row, "domain": "math"}, cells)
    found.candidates = {one.cell: Candidate(found.row, one, one.completion) for one in draws}
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_batches_reach_over_rows_and_keep_their_order(size):
    draw = random.Random(size)
    counts = [draw.choice([0, 0, 1, 2, 5]) for _ in range(40)]
    rows = [answers_to(row, count) for row, count in enumerate(counts)]
    every = [cell for one in rows for cell in one.candidates]
    seen, batches = [], []

    def change(batch):
        batches.append(len(batch))
        for answers, candidate in batch:
            assert candidate.cell in answers.candidates
            seen.append(candidate.cell)
            del answers.candidates[candidate.cell]

    out = []
    for answers in in_batches(iter(rows), size, change):
        assert not answers.candidates, "all of them have been changed"
        out.append(answers)
    assert out == rows and seen == every
    assert batches[:-1] == [size] * (len(batches) - 1) and 0 < batches[-1] <= size
