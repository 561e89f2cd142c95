"""R1-Zero on the miniature with either sampler: does it learn the same on vLLM, and what does the
way through another process cost?

    python benchmarks/vllm_vs_hf.py [--seeds 0 1] [--out FILE] [--field value ...]

In the environment of ``make test-vllm``. Runs the recipe r1-zero-miniature with ``generator`` hf
and vllm, and vllm a rollout ahead, each in a fresh process, one after another, and keeps of each:
held-out accuracy at every evaluation, the gap between sampler and trainer, the age of the sampler's
weights, and the seconds of the phases. A model of 0.6M parameters on a CPU says what the machinery
costs; it says nothing of vLLM's speed with a model that needs a GPU.
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
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from grpo_engine.manifest import code_version, package_versions
from grpo_engine.metrics import read_metrics

RESULTS = Path(__file__).parent / "results"
RECIPE = "r1-zero-miniature"
SAMPLERS = {
    "hf": ["--generator", "hf"],
    "vllm": ["--generator", "vllm"],
    "vllm, a rollout ahead": [
        *("--generator", "vllm", "--rollouts_ahead", "1", "--is_correction", "token_truncate"),
    ],
}
PHASES = ("sync_weights", "generate", "reward", "old_logprobs", "ref_logprobs", "update", "eval")


def run(sampler: str, seed: int, fields: list[str]) -> dict:
    command = [sys.executable, "-m", "grpo_engine.cli", "grpo", "--recipe", RECIPE]
    command += ["--device", "cpu", "--seed", str(seed), *SAMPLERS[sampler], *fields]
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        words = [*command, "--output_dir", folder + "/run"]
        done = subprocess.run(words, capture_output=True, text=True, cwd=folder)
        wall = time.perf_counter() - start
        if done.returncode != 0:
            sys.exit(f"{sampler}, seed {seed} failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
        rows = read_metrics(folder + "/run")

    def values(key: str) -> list[float]:
        return [row[key] for row in rows if row.get(key) is not None]

    accuracy = [[r["step"], r["eval/accuracy"]] for r in rows if "eval/accuracy" in r]
    seconds = {name: round(sum(values(f"time/{name}")), 2) for name in PHASES}
    return {
        "sampler": sampler,
        "seed": seed,
        "accuracy": accuracy,
        "kl_max": max(values("sampling/kl")),
        "logp_difference_max": max(values("sampling/logp_difference_max")),
        "ess_token_min": min(values("sampling/ess_token")),
        "staleness_mean": fmean(values("sampling/staleness")),
        "sync_seconds": [round(x, 4) for x in values("sync/seconds")],
        "canary_seconds": [round(x, 4) for x in values("sync/canary_seconds")],
        "seconds": seconds,
        "steps_s": round(sum(values("time/step")), 2),
        "wall_s": round(wall, 2),
        "warnings": sorted({w.partition(":")[0] for r in rows for w in r.get("warnings", ())}),
    }


def table(runs: list[dict]) -> str:
    lines = [
        "| sampler | seed | held-out accuracy | largest KL, nats/token | least ESS of tokens "
        "| mean age, updates | sampling s | weights + canary s | update s | whole run s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in runs:
        seconds = r["seconds"]
        syncs = sum(r["sync_seconds"]), sum(r["canary_seconds"])
        lines.append(
            f"| {r['sampler']} | {r['seed']} | {r['accuracy'][0][1]:.3f} -> "
            f"{r['accuracy'][-1][1]:.3f} | {r['kl_max']:.1e} | {r['ess_token_min']:.4f} "
            f"| {r['staleness_mean']:.1f} | {seconds['generate']:.0f} "
            f"| {syncs[0]:.1f} + {syncs[1]:.1f} | {seconds['update']:.0f} | {r['wall_s']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--out", type=Path, default=RESULTS / "vllm_vs_hf_cpu.json")
    args, fields = parser.parse_known_args()
    if fields and args.out == parser.get_default("out"):
        parser.error(f"{' '.join(fields)}: another run than the recipe's needs its own --out")
    runs = []
    for seed in args.seeds:
        for sampler in args.samplers:
            runs.append(run(sampler, seed, fields))
            print(table(runs[-1:]).splitlines()[-1], flush=True)
    result = {
        "command": " ".join(["python benchmarks/vllm_vs_hf.py", *fields]),
        "recipe": RECIPE,
        "hardware": f"CPU, {platform.machine()}, {os.cpu_count()} cores",
        "code": code_version(),
        "date": date.today().isoformat(),
        "versions": package_versions(),
        "runs": runs,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    head = f"{result['hardware']}, {result['date']}, `{result['command']}`"
    args.out.with_suffix(".md").write_text(f"{head}\n\n{table(runs)}\n")
    print(f"\n{table(runs)}\n\n-> {args.out}")


if __name__ == "__main__":
    main()
