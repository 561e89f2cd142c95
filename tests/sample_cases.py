"""What the tests of grpo-engine sample share: settings, scripted answers, and what a run left."""

import json
from pathlib import Path

from grpo_engine.cli import main

SUMS = {
    "model": "miniature",
    "dataset": "reasoning_gym:chain_sum",
    "dataset_args": "{seed: 5, size: 6, min_terms: 4, max_terms: 6, min_digits: 1, max_digits: 1}",
    "prompt_template": "r1-zero",
    "num_samples": 4,
    "max_completion_length": 96,
    "generation_batch_size": 5,
    "answer_format": "none",
    "reward_workers": 1,
    "device": "cpu",
}
MADE = ("data.jsonl", "rejected.jsonl", "statistics.json", "statistics.md")


def flags(folder, **changes):
    values = {**SUMS, **changes, "output_dir": folder}
    return [word for name, value in values.items() for word in (f"--{name}", _text(value))]


def _text(value):
    return json.dumps(value) if isinstance(value, (list, dict)) else str(value)


def sample(folder, *switches, **changes):
    return main(["sample", *flags(folder, **changes), *switches])


def lines_of(folder, name="samples.jsonl"):
    return (Path(folder) / name).read_text(encoding="utf-8").splitlines()


def rows_of(folder, name="data.jsonl"):
    return [json.loads(line) for line in lines_of(folder, name)]


def statistics_of(folder):
    return json.loads((Path(folder) / "statistics.json").read_text(encoding="utf-8"))


def manifest_of(folder):
    return json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refused(capsys, code):
    """The one line of a user error."""
    assert code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("grpo-engine: error: ")
    return last
