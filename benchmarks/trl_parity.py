"""TRL's GRPOTrainer, and the same with our kernels dropped in: the same training, step by step.

    python benchmarks/trl_parity.py [--steps 20] [--option_steps 4] [--out FILE]

The miniature model learns chain sums, the reward being the share of digits in an answer, three
times from one seed: TRL as installed, our subclass, and TRL's own class under ``patch_trl()``. Then
TRL and our subclass over TRL's options, a few steps each. All sides sample with the model's
``generate``, so what they learn decides what they are shown: curves that stay together to the end
are the whole proof. Written: the curves, and of every option the largest difference of the loss
(relative where it is above 1) and of the gradient norm (relative) over its steps. At the first step
that is one loss on one batch, later also what the weights have drifted apart. What ours refuses is
named.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from grpo_engine.bench.machine import hardware
from grpo_engine.integrations.contract import Unsupported
from grpo_engine.manifest import code_version

RESULTS = Path(__file__).parent / "results"
SIDES = ("trl", "grpo_engine", "patch_trl")
LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "luspo", "cispo", "sapo", "vespo")
LEVELS = ("token", "sequence")
OPTIONS: dict[str, dict[str, Any]] = {
    **{
        f"{loss}, {level}": {"loss_type": loss, "importance_sampling_level": level}
        for loss in LOSSES
        for level in LEVELS
    },
    "no KL": {"beta": 0.0},
    "KL not bias-corrected": {"use_bias_correction_kl": False},
    "two-sided clip": {"delta": 1.5, "epsilon_high": 0.28},
    "rewards scaled by batch": {"scale_rewards": "batch"},
    "truncated answers masked": {"mask_truncated_completions": True},
    "highest-entropy tokens": {"top_entropy_quantile": 0.5},
    "temperature 0.7": {"temperature": 0.7},
}
CURVE = ("reward", "loss", "grad_norm", "kl", "entropy", "completions/mean_length")


def reward(completions: list[str], **_) -> list[float]:
    """The share of digits."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


@contextmanager
def trainer_class(side: str) -> Iterator[type]:
    import trl

    from grpo_engine.integrations import trl as ours

    if side == "grpo_engine":
        yield ours.GRPOTrainer
        return
    if side == "patch_trl":
        ours.patch_trl()
    try:
        yield trl.GRPOTrainer
    finally:
        ours.unpatch_trl()


def train(side: str, model_folder: str, steps: int, options: dict[str, Any]) -> list[dict]:
    """What TRL logs of each step."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import GRPOConfig

    values = {"beta": 0.04, "loss_type": "dapo", **options}
    with trainer_class(side) as kind, TemporaryDirectory() as folder:
        trainer = kind(
            model=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(model_folder),
            reward_funcs=reward,
            train_dataset=Dataset.from_list([{"prompt": f"{i}+{i + 3}="} for i in range(64)]),
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=16,
                gradient_accumulation_steps=2,
                num_generations=8,
                max_completion_length=24,
                max_steps=steps,
                num_iterations=2,
                learning_rate=1e-3,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
                seed=7,
                **values,
            ),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def differences(rows: list[dict], base: list[dict]) -> dict[str, float]:
    """Of the first step and the largest of all."""
    loss = [
        abs(a["loss"] - b["loss"]) / max(1.0, abs(b["loss"]))
        for a, b in zip(rows, base, strict=True)
    ]
    norm = [
        abs(a["grad_norm"] - b["grad_norm"]) / max(b["grad_norm"], 1e-12)
        for a, b in zip(rows, base, strict=True)
    ]
    return {
        "loss, first step": loss[0],
        "loss": max(loss),
        "grad_norm, first step": norm[0],
        "grad_norm": max(norm),
        "reward": max(
            abs(a["reward"] - b["reward"])
            for a, b in zip(rows, base, strict=True)
            if "reward" in b  # logged once a rollout
        ),
    }


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "# TRL with and without our kernels: the same training",
        "",
        f"{result['hardware']}; {result['date']}; code {result['code']}; "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + f". Made by `{result['command']}`.",
        "",
        "## Curves",
        "",
        "| step | " + " | ".join(f"{name}: TRL | ours | patched" for name in CURVE[:3]) + " |",
        "|" + "---|" * (1 + 3 * 3),
    ]
    for step, rows in enumerate(zip(*(result["curves"][side] for side in SIDES), strict=True), 1):
        cells = [f"{row[name]:.5g}" if name in row else "" for name in CURVE[:3] for row in rows]
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    lines += ["", "Largest differences from TRL's curve:", ""]
    for side in SIDES[1:]:
        found = result["curve_differences"][side]
        lines.append(f"- {side}: " + ", ".join(f"{k} {v:.1e}" for k, v in found.items()))
    columns = list(result["curve_differences"]["grpo_engine"])
    lines += [
        "",
        f"## Options, {result['option_steps']} steps each: differences from TRL's",
        "",
        "| option | " + " | ".join(columns) + " |",
        "|" + "---|" * (1 + len(columns)),
    ]
    for name, found in result["options"].items():
        cells = [f"{found[c]:.1e}" if c in found else "" for c in columns]
        refused = f" (refused: {found['refused']})" if "refused" in found else ""
        lines.append(f"| {name}{refused} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--option_steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS / "trl_parity_cpu.json")
    args = parser.parse_args()
    from grpo_engine.policy import Policy

    with TemporaryDirectory() as folder:
        Policy.load("miniature", device="cpu").save_pretrained(folder)
        curves = {side: train(side, folder, args.steps, {}) for side in SIDES}
        options = {}
        for name, changed in OPTIONS.items():
            base = train("trl", folder, args.option_steps, changed)
            try:
                rows = train("grpo_engine", folder, args.option_steps, changed)
            except Unsupported as error:
                options[name] = {"refused": str(error)}
            else:
                options[name] = differences(rows, base)
            print(name, options[name], flush=True)
    result = {
        "command": shlex.join(["python", "benchmarks/trl_parity.py", *sys.argv[1:]]),
        "hardware": hardware(torch.device("cpu")),
        "code": code_version(),
        "date": date.today().isoformat(),
        "versions": {
            name: metadata.version(name) for name in ("grpo-engine", "torch", "transformers", "trl")
        },
        "option_steps": args.option_steps,
        "curves": {
            side: [{name: row[name] for name in CURVE if name in row} for row in rows]
            for side, rows in curves.items()
        },
        "curve_differences": {side: differences(curves[side], curves["trl"]) for side in SIDES[1:]},
        "options": options,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(result))
    print(f"-> {args.out}, {args.out.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
