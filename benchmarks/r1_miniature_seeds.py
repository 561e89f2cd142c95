"""Every stage of DeepSeek-R1 on the miniature, several seeds: what of the paper can be seen?

    python benchmarks/r1_miniature_seeds.py [--seeds 0 1 2] [--out FILE] [--keep FOLDER]

Runs the recipe ``miniature`` once per seed, each in a fresh process, and asks of each run:

1. start      does RL after a cold start begin higher than R1-Zero,
   stability  and does its accuracy move more evenly?
2. language   does the language reward raise consistency, at a small cost in accuracy?
3. verified   is every row that rejection sampling kept right and readable?
4. preference does the last stage raise the reward models' scores without losing accuracy?
5. distil     does the distilled student beat the same student trained by RL alone?

``PHENOMENA`` says what each must show to count as seen; what is not seen is reported as not seen.
The comparisons of 2 (RL on accuracy alone) and 5 (RL on the student) are stages of the recipe.
``--keep`` leaves the runs in FOLDER; a finished run found there is measured and not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import mean, pstdev
from tempfile import TemporaryDirectory
from typing import Any

import torch

from grpo_engine import lineage
from grpo_engine.data import load_rows, read_rows
from grpo_engine.filters import ChainFilters
from grpo_engine.generation.hf import HFGenerator
from grpo_engine.manifest import code_version
from grpo_engine.metrics import read_metrics
from grpo_engine.policy import Policy
from grpo_engine.report.stage_tables import paired_shares
from grpo_engine.rewards import accuracy_reward
from grpo_engine.rewards.format import format_r1_reward
from grpo_engine.rewards.judge_rubric import helpfulness, is_safe
from grpo_engine.rewards.language import split_thinking
from grpo_engine.rewards.model import ScalarModel
from grpo_engine.rollouts import Prompt, sample_rollouts
from grpo_engine.templates import render_prompt
from grpo_engine.types import Rollout, SamplingParams

RESULTS = Path(__file__).parent / "results"
RECIPE = "miniature"
SMALL_COST = 0.02  # of accuracy: what counts as a small cost (2), and as no loss (4)
LAST_ROLLOUTS = 5  # whose mean is a run's end
GENERAL_SAMPLES = 8  # answers to each held-out general prompt

Numbers = dict[str, Any]


# --- reading a run ---


def accuracy(run: Path, stage: str) -> Numbers:
    """pass@1 on held-out problems, with its 95 % interval over problems."""
    found = json.loads((run / stage / "results.json").read_text(encoding="utf-8"))["pass@1"]
    return {"value": found["value"], "ci95": found["ci95"]}


def of_rollouts(run: Path, stage: str, metric: str) -> list[float]:
    """A metric of every rollout, in order."""
    return [row[metric] for row in read_metrics(run / stage) if metric in row]


def evaluations(run: Path, stage: str) -> list[Numbers]:
    names = ("eval/accuracy", "eval/mean_length")
    rows = read_metrics(run / stage)
    return [{"step": r["step"], **{n: r[n] for n in names}} for r in rows if names[0] in r]


def newest_checkpoint(folder: Path) -> Path:
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def answers(model: Path, prompts: list[str], num_samples: int, temperature: float) -> list[Rollout]:
    """Answers of a trained model, the same ones every time."""
    policy = Policy.load(str(model), device="cpu", trainable=False)
    texts = [render_prompt({"prompt": prompt}, "r1-zero") for prompt in prompts]
    asked = [
        Prompt(row={"prompt": prompt}, text=text, token_ids=policy.tokenizer(text)["input_ids"])
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    generator = HFGenerator(policy, max_batch_size=256)
    sampling = SamplingParams(max_completion_length=192, temperature=temperature)
    with torch.no_grad():
        found = sample_rollouts(
            generator, policy.tokenizer, asked, num_samples, sampling, ("r1-miniature", 0)
        )
    generator.close()
    return found


# --- the five questions ---


BEGINNINGS = {"r1_zero": "r1-zero", "after_cold_start": "reasoning-rl"}


def start(run: Path) -> Numbers:
    """Held-out accuracy before the first step."""
    numbers: Numbers = {
        name: evaluations(run, stage)[0]["eval/accuracy"] for name, stage in BEGINNINGS.items()
    }
    return {**numbers, "seen": numbers["after_cold_start"] > numbers["r1_zero"]}


def stability(run: Path) -> Numbers:
    """How unevenly accuracy moves: ``unevenness``, the standard deviation of its change from one
    rollout to the next over as many rollouts of both runs (a curve that rises evenly has none,
    however fast), and ``largest_fall`` of the held-out accuracy below its best so far."""
    curves = {name: of_rollouts(run, s, "rewards/accuracy/mean") for name, s in BEGINNINGS.items()}
    shared = min(map(len, curves.values()))
    numbers: Numbers = {"rollouts": shared}
    for name, stage in BEGINNINGS.items():
        changes = [after - before for before, after in pairwise(curves[name][:shared])]
        held_out = [row["eval/accuracy"] for row in evaluations(run, stage)]
        falls = [best - now for best, now in zip(accumulate(held_out, max), held_out, strict=True)]
        numbers[name] = {"unevenness": pstdev(changes), "largest_fall": max(falls)}
    zero, after = numbers["r1_zero"], numbers["after_cold_start"]
    return {**numbers, "seen": all(after[measure] < zero[measure] for measure in after)}


def language(run: Path) -> Numbers:
    """Language consistency of the rollouts (temperature 1) at the start and the end of RL with the
    language reward, and of the same RL without it; accuracy of both results."""
    numbers: Numbers = {}
    for name, stage, results in (
        ("with_reward", "reasoning-rl", "eval-reasoning-rl"),
        ("without", "reasoning-rl-accuracy-only", "eval-accuracy-only"),
    ):
        shares = of_rollouts(run, stage, "rewards/language/mean")
        numbers[name] = {
            "first": shares[0],
            "last": mean(shares[-LAST_ROLLOUTS:]),
            "accuracy": accuracy(run, results),
        }
    given, without = numbers["with_reward"], numbers["without"]
    cost = without["accuracy"]["value"] - given["accuracy"]["value"]
    raised = given["last"] > max(given["first"], without["last"])
    return {**numbers, "accuracy_cost": cost, "seen": raised and cost <= SMALL_COST}


def verified(run: Path) -> Numbers:
    """The kept reasoning rows, each judged again: right answer, readable format, text filters."""
    folder = run / "rejection-sampling"
    rows = [row for row in read_rows(str(folder / "data.jsonl")) if row["domain"] != "general"]
    texts = [row["completion"] for row in rows]
    right = accuracy_reward(texts, [row["solution"] for row in rows])
    readable = format_r1_reward(texts)
    filters = ChainFilters()
    faults = {
        "wrong": sum(score != 1.0 for score in right),
        "format": sum(score != 1.0 for score in readable),
        "unreadable": sum(
            filters.first_fault(row["completion"], prompt=row["prompt"]) is not None for row in rows
        ),
    }
    counted = json.loads((folder / "statistics.json").read_text(encoding="utf-8"))
    drawn = counted["acceptance"]["by_domain"]["math"]
    seen = bool(rows) and not any(faults.values()) and bool(drawn["rejected"])
    return {"kept": len(rows), "faults_found_again": faults, "drawn": drawn, "seen": seen}


def preference(run: Path) -> Numbers:
    """Mean scores of both reward models on answers to held-out general prompts before and after the
    last stage; the points of the rule judge, which training never saw on these prompts; accuracy.
    """
    numbers: Numbers = {}
    for name, stage, results in (
        ("before", "r1-sft", "eval-r1-sft"),
        ("after", "all-scenario-rl", "eval-r1"),
    ):
        model = newest_checkpoint(run / stage)
        numbers[name] = {**general_scores(run, model), "accuracy": accuracy(run, results)}
    before, after = numbers["before"], numbers["after"]
    raised = all(after[kind] > before[kind] for kind in ("helpful_score", "safety_score"))
    loss = before["accuracy"]["value"] - after["accuracy"]["value"]
    return {**numbers, "accuracy_loss": loss, "seen": raised and loss <= SMALL_COST}


def general_scores(run: Path, model: Path) -> Numbers:
    numbers: Numbers = {}
    for kind in ("helpful", "safety"):
        args = {"preference": kind, "held_out": True}
        prompts = [row["prompt"] for row in load_rows("miniature:prompts", args=args)]
        found = answers(model, prompts, GENERAL_SAMPLES, 0.7)
        asked = [rollout.row["prompt"] for rollout in found]
        texts = [rollout.completion for rollout in found]
        scorer = ScalarModel.load(str(run / f"{kind}-rm"), device="cpu")
        numbers[f"{kind}_score"] = mean(scorer.score(asked, texts))
        if kind == "safety":
            numbers["safe_by_rule"] = mean(map(is_safe, texts))
            continue
        told = [split_thinking(text)[1] if "</think>" in text else text for text in texts]
        numbers["helpful_points"] = mean(map(helpfulness, asked, told))
    return numbers


def distil(run: Path) -> Numbers:
    """Accuracy of the student as it was, distilled, and trained by RL alone; ``paired``, distilled
    less RL problem by problem, is told beside the criterion and decides nothing."""
    stages = {"base": "eval-student", "distilled": "eval-distill", "rl": "eval-student-rl"}
    numbers: Numbers = {name: accuracy(run, stage) for name, stage in stages.items()}
    rl, distilled = (
        json.loads((run / stages[name] / "results.json").read_text(encoding="utf-8"))
        for name in ("rl", "distilled")
    )
    paired = paired_shares(rl, distilled)
    if paired is not None:
        numbers["paired"] = {"value": paired.value, "ci95": [paired.low, paired.high]}
    return {**numbers, "seen": numbers["distilled"]["ci95"][0] > numbers["rl"]["ci95"][1]}


PHENOMENA: dict[str, tuple[str, Callable[[Path], Numbers]]] = {
    "start": ("after a cold start, RL starts higher than R1-Zero did", start),
    "stability": (
        "after a cold start, accuracy moves less unevenly in RL, and falls less from its best, "
        "than in R1-Zero",
        stability,
    ),
    "language": (
        "the language reward raises consistency above its start and above the same RL without it, "
        f"and costs at most {SMALL_COST} of accuracy",
        language,
    ),
    "verified": (
        "rejection sampling rejects some answers, and every row it keeps is right and readable "
        "when judged again",
        verified,
    ),
    "preference": (
        "the last stage raises both reward models' scores on held-out prompts and loses at most "
        f"{SMALL_COST} of accuracy",
        preference,
    ),
    "distil": (
        "the distilled student is more accurate than the one trained by RL alone (95 % intervals "
        "apart)",
        distil,
    ),
}
ACCURACIES = {
    "base": "eval-base",
    "R1-Zero": "eval-r1-zero",
    "Dev1 (cold start)": "eval-cold-start",
    "Dev2 (reasoning RL)": "eval-reasoning-rl",
    "Dev3 (SFT)": "eval-r1-sft",
    "R1": "eval-r1",
    "student": "eval-student",
    "student, distilled": "eval-distill",
    "student, RL alone": "eval-student-rl",
}
CURVES = ("r1-zero", "reasoning-rl", "reasoning-rl-accuracy-only", "all-scenario-rl", "student-rl")
CURVE_METRICS = {
    "reward": "reward",
    "accuracy": "rewards/accuracy/mean",
    "language": "rewards/language/mean",
    "helpful": "rewards/helpful/mean",
    "safety": "rewards/safety/mean",
    "length": "completions/mean_length",
}


def measure(run: Path) -> Numbers:
    """Everything that is kept of one finished run."""
    torch.manual_seed(0)
    curves = {
        stage: {
            "evaluations": evaluations(run, stage),
            "rollouts": {
                name: [round(value, 4) for value in found]
                for name, metric in CURVE_METRICS.items()
                if (found := of_rollouts(run, stage, metric))
            },
        }
        for stage in CURVES
    }
    return {
        "phenomena": {name: ask(run) for name, (_, ask) in PHENOMENA.items()},
        "accuracies": {name: accuracy(run, stage) for name, stage in ACCURACIES.items()},
        "curves": curves,
    }


# --- running and writing ---


def run_recipe(seed: int, folder: Path, flags: list[str]) -> dict[str, float]:
    """Run the recipe into ``folder``; seconds that took, and seconds of processor time. A run
    that is there already goes on, so both may be less than those of all stages."""
    command = [sys.executable, "-m", "grpo_engine.cli", "r1", "--recipe", RECIPE]
    command += ["--seed", str(seed), "--output_dir", str(folder), *flags]
    began, used = time.perf_counter(), processor_seconds()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"seed {seed} failed:\n{done.stderr[-3000:]}")
    return {"wall_s": time.perf_counter() - began, "cpu_s": processor_seconds() - used}


def processor_seconds() -> float:
    """Of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def stage_seconds(run: Path) -> dict[str, float]:
    """Of each stage, its interrupted beginnings included."""
    stages = lineage.read(run).stages
    return {name: stage.seconds for name, stage in stages.items() if stage is not None}


def figures(runs: list[Numbers]) -> list[str]:
    """The tables of the Markdown file: what was seen, and the accuracies."""
    seeds = [str(run["seed"]) for run in runs]
    lines = ["| phenomenon | " + " | ".join(f"seed {s}" for s in seeds) + " | seen |"]
    lines.append("|---" * (len(seeds) + 2) + "|")
    for name, (claim, _) in PHENOMENA.items():
        found = [run["phenomena"][name] for run in runs]
        seen = sum(one["seen"] for one in found)
        cells = " | ".join(SHORT[name](one) for one in found)
        lines.append(f"| {claim} | {cells} | {seen} of {len(runs)} |")
    lines += ["", "| held-out accuracy (pass@1) | " + " | ".join(seeds) + " |"]
    lines.append("|---" * (len(seeds) + 1) + "|")
    for name in ACCURACIES:
        cells = [run["accuracies"][name] for run in runs]
        shown = " | ".join(
            f"{c['value']:.3f} [{c['ci95'][0]:.3f}, {c['ci95'][1]:.3f}]" for c in cells
        )
        lines.append(f"| {name} | {shown} |")
    return lines


def paired_text(paired: Numbers | None) -> str:
    if paired is None:
        return ""
    low, high = paired["ci95"]
    return f"; paired difference {paired['value']:+.2f} [{low:+.2f}, {high:+.2f}]"


SHORT: dict[str, Callable[[Numbers], str]] = {
    "start": lambda n: f"{n['after_cold_start']:.2f}, R1-Zero {n['r1_zero']:.2f}",
    "stability": lambda n: (
        f"unevenness {n['after_cold_start']['unevenness']:.3f}, R1-Zero "
        f"{n['r1_zero']['unevenness']:.3f}; largest fall "
        f"{n['after_cold_start']['largest_fall']:.3f}, R1-Zero {n['r1_zero']['largest_fall']:.3f}"
    ),
    "language": lambda n: (
        f"{n['with_reward']['first']:.2f} -> {n['with_reward']['last']:.2f}, without -> "
        f"{n['without']['last']:.2f}; accuracy cost {n['accuracy_cost']:+.3f}"
    ),
    "verified": lambda n: (
        f"{n['kept']} kept of {n['drawn']['samples']}, faults "
        f"{sum(n['faults_found_again'].values())}"
    ),
    "preference": lambda n: (
        f"helpful {n['before']['helpful_score']:.2f} -> {n['after']['helpful_score']:.2f}, safety "
        f"{n['before']['safety_score']:.2f} -> {n['after']['safety_score']:.2f}; by rule "
        f"{n['before']['helpful_points']:.2f} -> {n['after']['helpful_points']:.2f} of 4, "
        f"{n['before']['safe_by_rule']:.2f} -> {n['after']['safe_by_rule']:.2f} safe; "
        f"accuracy loss {n['accuracy_loss']:+.3f}"
    ),
    "distil": lambda n: (
        f"{n['base']['value']:.2f} -> distilled {n['distilled']['value']:.2f}, RL "
        f"{n['rl']['value']:.2f}" + paired_text(n.get("paired"))
    ),
}


def write(runs: list[Numbers], out: Path, command: str) -> None:
    result = {
        "command": command,
        "recipe": RECIPE,
        "hardware": f"CPU, {platform.machine()}, {os.cpu_count()} cores",
        "code": code_version(),
        "date": date.today().isoformat(),
        "versions": {
            name: metadata.version(name)
            for name in ("grpo-engine", "torch", "transformers", "reasoning-gym")
        },
        "claims": {name: claim for name, (claim, _) in PHENOMENA.items()},
        "runs": runs,
    }
    took = ", ".join(f"{sum(run['stage_s'].values()) / 60:.1f}" for run in runs)
    head = f"{result['hardware']}, {result['date']}, `{command}`\n\n"
    head += f"Minutes of all stages, by seed: {took}"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = "\n".join([head, "", *figures(runs)])
    out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "r1_miniature_cpu.json")
    parser.add_argument("--keep", type=Path, help="folder that the runs stay in")
    options, flags = parser.parse_known_args()
    runs = []
    with TemporaryDirectory() as temporary:
        for seed in options.seeds:
            folder = (options.keep or Path(temporary)).absolute() / f"seed-{seed}"
            took = run_recipe(seed, folder, flags)
            stages = stage_seconds(folder)
            runs.append({"seed": seed, **took, "stage_s": stages, **measure(folder)})
            write(runs, options.out, " ".join(["python benchmarks/r1_miniature_seeds.py", *flags]))
            print("\n".join(figures(runs[-1:])), flush=True)
    print(f"\n-> {options.out}")


if __name__ == "__main__":
    main()
