"""R1-Zero on the miniature, several seeds: does accuracy rise, do the answers grow, how long does
it take?

    python benchmarks/r1_zero_seeds.py [--seeds 0 1 2] [--out FILE] [--field value ...]

Runs the recipe r1-zero-miniature once per seed, one after another, each in a fresh process, and
keeps the curves: held-out accuracy (reasoning-gym problems that neither the base model's corpus nor
RL contains) and mean response length at every evaluation, reward, accuracy and length of every
rollout. ``train_s`` is the time of all steps (sampling, rewards, updates); ``wall_s`` also holds
start-up, evaluations, checkpoints and the report. A run with other fields than the recipe's needs
an --out of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from grpo_engine.manifest import code_version
from grpo_engine.metrics import read_metrics

RESULTS = Path(__file__).parent / "results"
RECIPE = "r1-zero-miniature"
EVALUATED = ("eval/accuracy", "eval/mean_length", "eval/clipped_ratio")
SAMPLED = (
    "reward",
    "rewards/accuracy/mean",
    "completions/mean_length",
    "kl",
    "entropy",
    "sparse/dropped_mass",
    "sparse/rows",
)


def run(seed: int, fields: list[str]) -> dict:
    command = [
        sys.executable,
        "-m",
        "grpo_engine.cli",
        "grpo",
        "--recipe",
        RECIPE,
        "--device",
        "cpu",
        *fields,
    ]
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run(
            [*command, "--seed", str(seed), "--output_dir", folder + "/run"],
            capture_output=True,
            text=True,
            cwd=folder,
        )
        wall = time.perf_counter() - start
        if done.returncode != 0:
            sys.exit(f"seed {seed} failed:\n{done.stderr[-3000:]}")
        rows = read_metrics(folder + "/run")
    evaluations = [
        {"step": r["step"], **{k: r[k] for k in EVALUATED}} for r in rows if "eval/accuracy" in r
    ]
    sampled = [
        {"step": r["step"], **{k: round(r[k], 4) for k in SAMPLED if k in r}}
        for r in rows
        if "reward" in r
    ]
    first, last = evaluations[0], evaluations[-1]
    return {
        "seed": seed,
        "accuracy": [first["eval/accuracy"], last["eval/accuracy"]],
        "mean_length": [first["eval/mean_length"], last["eval/mean_length"]],
        "length_ratio": last["eval/mean_length"] / first["eval/mean_length"],
        "steps": rows[-1]["step"],
        "train_s": sum(r.get("time/step", 0.0) for r in rows),
        "wall_s": wall,
        "evaluations": evaluations,
        "rollouts": sampled,
    }


def table(runs: list[dict]) -> str:
    lines = [
        "| seed | held-out accuracy | mean response length | ratio | steps | training s |",
        "|---|---|---|---|---|---|",
    ]
    for r in runs:
        (a0, a1), (l0, l1) = r["accuracy"], r["mean_length"]
        lines.append(
            f"| {r['seed']} | {a0:.3f} -> {a1:.3f} | {l0:.1f} -> {l1:.1f} "
            f"| {r['length_ratio']:.2f} | {r['steps']} | {r['train_s']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "r1_zero_miniature_cpu.json")
    args, fields = parser.parse_known_args()
    if fields and args.out == parser.get_default("out"):
        parser.error(f"{' '.join(fields)}: another run than the recipe's needs its own --out")
    runs = []
    for seed in args.seeds:
        runs.append(run(seed, fields))
        print(table(runs[-1:]).splitlines()[-1], flush=True)
    result = {
        "command": " ".join(["python benchmarks/r1_zero_seeds.py", *fields]),
        "recipe": RECIPE,
        "hardware": f"CPU, {platform.machine()}, {os.cpu_count()} cores",
        "code": code_version(),
        "date": date.today().isoformat(),
        "versions": {
            name: metadata.version(name)
            for name in ("grpo-engine", "torch", "transformers", "reasoning-gym")
        },
        "runs": runs,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(
        f"{result['hardware']}, {result['date']}, `{result['command']}`\n\n{table(runs)}\n"
    )
    print(f"\n{table(runs)}\n\n-> {args.out}")


if __name__ == "__main__":
    main()
