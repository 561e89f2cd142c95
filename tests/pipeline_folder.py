"""A pipeline's folder as the stages of DeepSeek-R1 leave it, small and with known numbers."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from grpo_engine.evaluation.results import figures
from grpo_engine.evaluation.samples import Sample
from grpo_engine.lineage import Input, Lineage, Output, Session, StageRecord

QUESTION = "A conversation between User and Assistant. User: What is {}+1? Assistant:"
PROBLEMS, SAMPLES = 8, 4

# name: (kind, {field: stage it reads}, settings)
STAGES = {
    "r1-zero": ("grpo", {}, {"model": "tiny", "reward_funcs": ["accuracy", "format"]}),
    "eval-base": ("eval", {}, {"model": "tiny"}),
    "eval-r1-zero": ("eval", {"model": "r1-zero"}, {}),
    "cold-start-data": ("sample", {"model": "r1-zero"}, {"dataset": "sums"}),
    "cold-start-sft": ("sft", {"dataset": "cold-start-data"}, {"model": "tiny"}),
    "eval-dev1": ("eval", {"model": "cold-start-sft"}, {}),
    "reasoning-rl": ("grpo", {"model": "cold-start-sft"}, {}),
    "without-language": ("grpo", {"model": "cold-start-sft"}, {}),
    "rejection-sampling": ("sample", {"model": "reasoning-rl"}, {"dataset": "sums"}),
    "r1-sft": ("sft", {"dataset": "rejection-sampling"}, {"model": "tiny"}),
    "eval-dev3": ("eval", {"model": "r1-sft"}, {}),
    "helpful-pairs": ("preferences", {"model": "r1-sft"}, {"dataset": "prompts"}),
    "safety-labels": ("preferences", {"model": "r1-sft"}, {"dataset": "prompts"}),
    "helpful-rm": ("reward-model", {"model": "r1-sft", "dataset": "helpful-pairs"}, {}),
    "safety-rm": ("reward-model", {"model": "r1-sft", "dataset": "safety-labels"}, {}),
    "all-scenario-rl": (
        "grpo",
        {"model": "r1-sft", "helpful_model": "helpful-rm", "safety_model": "safety-rm"},
        {},
    ),
    "eval-r1": ("eval", {"model": "all-scenario-rl"}, {}),
    "distill": ("distill", {"dataset": "rejection-sampling"}, {"model": "smaller"}),
    "eval-distill": ("eval", {"model": "distill"}, {}),
    "student-rl": ("grpo", {}, {"model": "smaller"}),
    "eval-student-rl": ("eval", {"model": "student-rl"}, {}),
}
# right samples of the SAMPLES of every problem
RIGHT = {"base": 1, "r1-zero": 3, "dev1": 2, "dev3": 3, "r1": 4, "distill": 3, "student-rl": 1}
PRODUCTS = {"sample": "data.jsonl", "eval": "results.json", "preferences": "pairs.jsonl"}
SECONDS = 10.0


def product_of(name: str) -> str:
    kind = STAGES[name][0]
    if name == "safety-labels":
        return "safety.jsonl"
    return PRODUCTS.get(kind, "checkpoint-4")


def write_pipeline(folder: Path, stages: int | None = None, answer: str = "") -> Path:
    """The first ``stages`` of them finished, the others not begun. ``answer`` replaces every
    model's text, question and reference."""
    folder.mkdir()
    lineage = Lineage(folder)
    names = list(STAGES)[:stages]
    for name in names:
        kind, reads, settings = STAGES[name]
        place = folder / name
        place.mkdir()
        if kind in ("grpo", "sft", "distill", "reward-model"):
            write_training(place, name, kind, answer)
        {"eval": write_eval, "sample": write_sampled}.get(kind, lambda *_: None)(place, answer)
        if kind == "preferences":
            write_judged(place, safety=name == "safety-labels")
        if kind == "reward-model":
            write_reward_results(place, name)
        lineage.records[name] = record(name, kind, reads, settings)
    lineage.write(
        {name: kind for name, (kind, _, _) in STAGES.items()},
        name="tiny-run",
        recipe="miniature",
        status="finished" if stages is None else "stopped",
        seed=7,
        code_version="1.2.3",
        versions={"torch": "2.99"},
        host={"cpu_threads": 2, "gpus": []},
    )
    return folder


def record(name: str, kind: str, reads: dict, settings: dict) -> StageRecord:
    settings = dict(settings)
    for field, source in reads.items():
        settings[field] = "{" + source + "}"
    inputs = {
        field: Input(f"{source}/{product_of(source)}", "ab" * 32, source)
        for field, source in reads.items()
    }
    generated = {"generated": 1000} if kind in ("grpo", "eval", "sample") else {}
    trained = {"trained": 3000} if kind in ("grpo", "sft", "distill") else {}
    return StageRecord(
        name,
        kind,
        status="finished",
        settings=settings,
        inputs=inputs,
        outputs={product_of(name): Output("cd" * 32, 5)},
        product=product_of(name),
        sessions=[Session("2026-01-01T00:00:00+00:00", "2026-01-01T00:00:10+00:00", SECONDS, 0)],
        steps=4 if kind in ("grpo", "sft", "distill", "reward-model") else None,
        tokens=generated | trained,
    )


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


# -- training --------------------------------------------------------------------------------------


def write_training(place: Path, name: str, kind: str, answer: str) -> None:
    rewards = ["accuracy", "format" if "r1-zero" in name else "language"]
    config = {"model": "tiny", "device": "cpu", "max_steps": 4, "reward_funcs": rewards}
    if name == "without-language":
        config["reward_weights"] = [1.0, 0.0]
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    stage = {"stage": kind, "name": name, "status": "finished"}
    (place / "manifest.json").write_text(json.dumps(stage))
    if kind != "grpo":
        write_jsonl(place / "metrics.jsonl", [{"step": n, "loss": 2.0 / n} for n in range(1, 5)])
        return
    rows = []
    for step in range(5):
        row = {"step": step}
        if step in (0, 4):
            row |= {"eval/accuracy": 0.25 if step == 0 else 0.75, "eval/mean_length": 10.0 + step}
            right = 2 if step == 0 else 6
            samples = [held_out(step, index, index < right, answer) for index in range(PROBLEMS)]
            write_jsonl(place / "completions" / f"eval-{step:06d}.jsonl", samples)
        if step:
            row |= training_row(step, name)
        rows.append(row)
    if name == "all-scenario-rl":
        rows[-1]["warnings"] = ["reward-hacking: reward 'helpful' rose while accuracy fell"]
        for row, score in ((rows[0], -0.5), (rows[-1], 1.25)):
            row |= {"eval/helpful": score, "eval/safety": 2 * score}
    write_jsonl(place / "metrics.jsonl", rows)
    kept = [training_sample(step, name, answer) for step in (1, 4)]
    for sample in kept:
        write_jsonl(place / "completions" / f"step-{sample['step']:06d}.jsonl", [sample])


def training_row(step: int, name: str) -> dict:
    row = {
        "reward": 1.0 + step / 10,
        "rewards/accuracy/mean": step / 10,
        "completions/mean_length": 20.0,
        "time/step": 2.0,
    }
    if "r1-zero" in name or name == "student-rl":
        return row | {"rewards/format/mean": 0.5}
    row["rewards/language/mean"] = 0.7 if name == "without-language" else 0.6 + step / 10
    if name == "all-scenario-rl" and step > 2:
        row |= {"rewards/helpful/mean": step / 4, "rewards/safety/mean": 0.5}
    return row


def held_out(step: int, index: int, right: bool, answer: str) -> dict:
    return {
        "step": step,
        "index": index,
        "prompt": answer or QUESTION.format(index),
        "completion": answer or f"<think> {index}+1={index + 1} </think> {index + 1}",
        "correct": float(right),
        "finish_reason": "stop",
        "length": 10 + step,
        "solution": answer or str(index + 1),
    }


def training_sample(step: int, name: str, answer: str) -> dict:
    """R1-Zero's last one looks back and corrects itself."""
    text = "<think> First 3+4=7. So 7. </think> <answer> 7 </answer>"
    if step == 4 and name == "r1-zero":
        text = "<think> First 3+4=8. Wait, check: 3+4=7. So 7. </think> <answer> 7 </answer>"
    return {
        "step": step,
        "prompt": answer or QUESTION.format("3+4"),
        "completion": f"{text} {answer}",
        "rewards": {"accuracy": 1.0},
        "reward": 2.0,
        "finish_reason": "stop",
        "length": 30,
        "solution": answer or "7",
    }


# -- evaluations -----------------------------------------------------------------------------------


def eval_samples(right: int, answer: str) -> list[list[Sample]]:
    """Problem 0 is the harder one: one right sample less."""
    problems = []
    for row in range(1, PROBLEMS + 1):
        samples = []
        for number in range(SAMPLES):
            good = number >= SAMPLES - right + (row == 1 and right < SAMPLES)
            value = str(row + 1) if good else str(90 + number)
            text = answer or f"<think> We get {value} 然后 so </think> <answer> {value} </answer>"
            samples.append(
                Sample(row, number, 1, text, 10 + number, "stop", [value], float(good), "ok")
            )
        problems.append(samples)
    return problems


def write_eval(place: Path, answer: str) -> None:
    problems = eval_samples(RIGHT[place.name.removeprefix("eval-")], answer)
    results = {
        "model": "m",
        "data": answer or "sums.jsonl",
        "task": "reasoning_gym",
        "num_problems": PROBLEMS,
        "num_samples": SAMPLES,
        **figures("reasoning_gym", problems, [1, 2, 4]),
        "config": {"data": "sums.jsonl", "num_samples": SAMPLES, "temperature": 0.6},
    }
    (place / "results.json").write_text(json.dumps(results, indent=1))
    rows = [
        {
            **vars(one),
            "solution": answer or str(one.row + 1),
            **({"prompt": answer or f"What is {one.row}+1?"} if one.sample == 0 else {}),
        }
        for samples in problems
        for one in samples
    ]
    write_jsonl(place / "samples.jsonl", rows)


# -- data and reward models ------------------------------------------------------------------------


def write_sampled(place: Path, answer: str) -> None:
    total = {"domain": "total", "samples": 30, "average_tokens": 12.5, "average_rounds": 1.0}
    taken = {"samples": 40, "kept": 20, "rejected": {"wrong": 15, "mixed_language": 5}}
    found = {
        "table": {
            "domains": [
                {**total, "domain": answer or "math", "samples": 20},
                {**total, "domain": "general", "samples": 10},
            ],
            "total": total,
        },
        "acceptance": {**taken, "by_generator": {"sample": taken}},
        "solve_rate": {"prompts": 10, "mean": 0.5, "histogram": []},
        "prompts": {"rows": 10, "sampled": 10, "with_kept_answers": 9},
        "tokens": {"drawn": 500, "in_data": 375},
    }
    (place / "statistics.json").write_text(json.dumps(found))


def write_judged(place: Path, *, safety: bool) -> None:
    common = {"kept": 30, "kept_share": 0.75, "judgements": {"asked": 160}, "without_verdict": 0}
    found = common | {"scope": "summary", "pairs_judged": 40}
    found["position_bias"] = {"first_position_rate": 0.6, "flip_rate": 0.125}
    if safety:
        found = common | {"scope": "response", "answers_judged": 40, "safe": 18, "unsafe": 12}
    (place / "statistics.json").write_text(json.dumps(found))


def write_reward_results(place: Path, name: str) -> None:
    found = {
        "kind": "safety" if name == "safety-rm" else "helpful",
        "scope": "summary",
        "rows": 25,
        "accuracy": {"value": 0.875, "ci95": [0.75, 0.9375]},
        "calibration": {"error": 0.0625},
        "length": {"score_correlation": {"spearman": -0.25}},
    }
    (place / "results.json").write_text(json.dumps(found))
