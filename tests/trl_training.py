"""A short training by one of TRL's trainers on the tiny model: the curves that tests compare."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 8,
    "num_iterations": 2,
    "learning_rate": 2e-2,
    "beta": 0.04,
    "bf16": False,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 7,
}


def reward(completion_ids: list[list[int]], **_) -> list[float]:
    return [sum(3 <= i < 13 for i in ids) / 8 for ids in completion_ids]


def train(kind: type, folder: Path, output_dir: Path, *, peft_config=None, **changed) -> list[dict]:
    """What ``kind``, a GRPO or RLOO trainer, logs of each step; ``changed`` are its options."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, RLOOConfig

    torch.manual_seed(0)  # adapters are drawn before the trainer sets its own
    config = RLOOConfig if kind.__name__ == "RLOOTrainer" else GRPOConfig
    trainer = kind(
        model=AutoModelForCausalLM.from_pretrained(folder),
        processing_class=AutoTokenizer.from_pretrained(folder),
        reward_funcs=reward,
        args=config(output_dir=str(output_dir), **OPTIONS | changed),
        train_dataset=Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(8)] * 4),
        peft_config=peft_config,
    )
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def compare_curves(rows: list[dict], expected: list[dict], rel: float = 1e-3) -> None:
    """Everything logged of every step agrees, but for times."""
    timed = {"step_time", "train_runtime", "epoch"}
    for row, other in zip(rows, expected, strict=True):
        assert set(row) == set(other)
        for name in set(other) - timed:
            if isinstance(other[name], float) and not math.isnan(other[name]):
                assert row[name] == pytest.approx(other[name], rel=rel, abs=rel / 100), name
