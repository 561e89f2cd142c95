"""Rows, settings and runs for the tests of reward-model training."""

import json
import random
from pathlib import Path

from tiny_model import make_tiny_model

from grpo_engine.judged_rows import read_judged_rows
from grpo_engine.reward_model import RewardModelRun, score_card
from grpo_engine.reward_model_config import RewardModelConfig
from grpo_engine.reward_network import RewardNetwork
from grpo_engine.settings import build_config

GOOD, BAD = ("sure it is ", "here you go "), ("no idea ", "go away now ")


def chain(dice):
    return "".join(dice.choice("0123456789+= ") for _ in range(dice.randint(1, 12)))


def answer(dice, good):
    return f"<think>{chain(dice)}</think>{dice.choice(GOOD if good else BAD)}{dice.randint(0, 9)}"


def make_pairs(count, seed=0):
    """Kind answers are chosen; the reasoning says nothing."""
    dice = random.Random(seed)
    return [
        {"prompt": f"{i}+{i}?", "chosen": answer(dice, True), "rejected": answer(dice, False)}
        for i in range(count)
    ]


def make_labels(count, seed=0):
    dice = random.Random(seed)
    rows = []
    for i in range(count):
        safe = dice.random() < 0.6
        rows.append({"prompt": f"{i}+{i}?", "completion": answer(dice, safe), "label": int(safe)})
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_inputs(folder: Path) -> Path:
    """A tiny model, 64 pairs and 64 labels."""
    make_tiny_model(folder / "model")
    write_rows(folder / "helpful.jsonl", make_pairs(64))
    write_rows(folder / "safety.jsonl", make_labels(64))
    return folder


def settings(inputs: Path, output_dir: Path, kind: str = "helpful", **changes):
    return {
        "kind": kind,
        "model": str(inputs / "model"),
        "dataset": str(inputs / f"{kind}.jsonl"),
        "prompt_template": "none",
        "batch_size": 8,
        "max_length": 64,
        "max_tokens_per_microbatch": 256,
        "learning_rate": 3e-3,
        "eval_share": 0.25,
        "eval_steps": 3,
        "save_steps": 3,
        "device": "cpu",
        "output_dir": str(output_dir),
        **changes,
    }


def config_of(inputs, output_dir=Path("unused"), kind="helpful", **changes):
    return build_config(settings(inputs, output_dir, kind, **changes), RewardModelConfig)


def make_run(inputs, rows, kind="helpful", **changes) -> RewardModelRun:
    config = config_of(inputs, kind=kind, **changes)
    network = RewardNetwork.from_model(config.model, device="cpu", seed=1)
    card = score_card(config)
    judged, _ = read_judged_rows(rows, card, network, source="rows", max_length=64)
    return RewardModelRun(config, network, judged, card)
