"""One GRPO step, ours beside TRL's GRPOTrainer: same model, prompts, rewards, batch and machine.

    python benchmarks/step_vs_trl.py [--device cuda] [--rounds 3] [--steps 6] [--out FILE]

Both sides sample P x G answers of the miniature base model at temperature 1 under the same length
cap, score them with the same rule rewards and take one optimiser step with a KL term. The learning
rate is 1e-9, so every step samples the same policy and the sides see equally long answers. The
sides run in turn (ours, TRL, ours, TRL, ...), each round in a fresh process; the first steps of a
process are warm-up.

TRL has no reward pool and no packed rows; both use float32 on the same device. Reported: median
seconds of the whole step and of the policy update (everything after sampling and rewards), with
tokens (prompt and completion, padding not counted) per second. Throughput is what to compare; both
are given.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from grpo_engine.bench.machine import hardware
from grpo_engine.manifest import code_version

RESULTS = Path(__file__).parent / "results"
PROMPTS, GENERATIONS, CAP, WARM_UP = 16, 16, 160, 2
TASK = {"min_terms": 4, "max_terms": 6, "min_digits": 1, "max_digits": 1}


def settings(output_dir: str, steps: int, device: str):
    from grpo_engine.config import build_config

    return build_config(
        {
            "model": "miniature",
            "device": device,
            "dataset": "reasoning_gym:chain_sum",
            "dataset_args": {"seed": 1, "size": 1000, **TASK},
            "prompts_per_generation": PROMPTS,
            "num_generations": GENERATIONS,
            "max_prompt_length": 64,
            "max_completion_length": CAP,
            "max_tokens_per_microbatch": 16384,
            "steps_per_generation": 1,
            "max_steps": steps,
            "learning_rate": 1e-9,
            "beta": 0.001,
            "ref_model_sync_steps": None,
            "save_steps": 10_000,
            "log_completions_steps": 10_000,
            "output_dir": output_dir,
        }
    )


def run_ours(steps: int, device: str) -> list[dict[str, float]]:
    from grpo_engine.metrics import read_metrics
    from grpo_engine.train import train_grpo

    with TemporaryDirectory() as folder:
        if train_grpo(settings(folder, steps, device)) != 0:
            raise RuntimeError("our run failed")
        rows = read_metrics(folder)
    tokens = [row["num_tokens"] for row in rows]
    return [
        {
            "step_s": row["time/step"],
            "update_s": row["time/update"],
            "tokens": now - before,
            "mean_length": row["completions/mean_length"],
            "reward": row["reward"],
        }
        for row, now, before in zip(rows, tokens, [0, *tokens], strict=False)
    ]


def run_trl(steps: int, device: str) -> list[dict[str, float]]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from grpo_engine.data import load_rows
    from grpo_engine.policy import Policy
    from grpo_engine.rewards import accuracy_reward, format_reward
    from grpo_engine.templates import render_prompt

    policy = Policy.load("miniature", device=device)
    policy.model.set_attn_implementation("sdpa")
    rows = load_rows("reasoning_gym:chain_sum", args={"seed": 1, "size": 1000, **TASK})
    data = [{"prompt": render_prompt(r, "r1-zero"), "solution": r["solution"]} for r in rows]
    measured: list[dict[str, float]] = []

    def now() -> float:
        """The device idle, as our own clock has it: launched work is not done work."""
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    class Timed(GRPOTrainer):
        sampling_s = tokens = 0.0

        def _generate_and_score_completions(self, inputs):
            start = now()
            output = super()._generate_and_score_completions(inputs)
            self.sampling_s += now() - start
            lengths = output["completion_mask"].sum(1)
            self.mean_length = float(lengths.float().mean())
            self.tokens = int(lengths.sum() + output["prompt_mask"].sum())
            return output

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start, trainer.sampling_s = now(), 0.0

        def on_step_end(self, *args, **kwargs):
            step = now() - self.start
            measured.append(
                {
                    "step_s": step,
                    # sampling phase: generation, rewards and reference log-probs, as on our side
                    "update_s": step - trainer.sampling_s,
                    "tokens": trainer.tokens,
                    "mean_length": trainer.mean_length,
                }
            )

    with TemporaryDirectory() as folder:
        trainer = Timed(
            model=policy.model,
            processing_class=policy.tokenizer,
            reward_funcs=[accuracy_reward, format_reward],
            train_dataset=Dataset.from_list(data),
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=device == "cpu",
                bf16=False,
                per_device_train_batch_size=PROMPTS * GENERATIONS,
                num_generations=GENERATIONS,
                gradient_accumulation_steps=1,
                max_completion_length=CAP,
                temperature=1.0,
                beta=0.001,
                loss_type="grpo",
                learning_rate=1e-9,
                max_steps=steps,
                gradient_checkpointing=False,
                report_to=[],
                save_strategy="no",
                logging_steps=10_000,
                disable_tqdm=True,
            ),
            callbacks=[Clock()],
        )
        trainer.train()
    return measured


def measure(side: str, steps: int, device: str) -> list[dict[str, float]]:
    """The steps of one fresh process, warm-up left out."""
    flags = ["--side", side, "--steps", str(steps + WARM_UP), "--device", device]
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])[WARM_UP:]


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    def spread(values: list[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    return {
        "steps": len(rows),
        "step_s": spread([r["step_s"] for r in rows]),
        "update_s": spread([r["update_s"] for r in rows]),
        "step_tokens_per_s": spread([r["tokens"] / r["step_s"] for r in rows]),
        "update_tokens_per_s": spread([r["tokens"] / r["update_s"] for r in rows]),
        "mean_completion_length": statistics.mean(r["mean_length"] for r in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="measured steps per process")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="default: results/step_vs_trl_<device>.json")
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        rows = (run_ours if args.side == "ours" else run_trl)(args.steps, args.device)
        print(json.dumps(rows))
        return
    rows: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
    for number in range(args.rounds):
        for side in rows:
            rows[side] += measure(side, args.steps, args.device)
            last = summary(rows[side][-args.steps :])
            print(
                f"round {number + 1} {side:5} step {last['step_s']['median']:.3f} s  update "
                f"{last['update_s']['median']:.3f} s  "
                f"{last['step_tokens_per_s']['median']:.0f} tokens/s"
            )
    ours, trl = summary(rows["ours"]), summary(rows["trl"])
    result = {
        "command": shlex.join(["python", "benchmarks/step_vs_trl.py", *sys.argv[1:]]),
        "device": args.device,
        "hardware": hardware(torch.device(args.device)),
        "code": code_version(),
        "date": date.today().isoformat(),
        "versions": {
            name: metadata.version(name) for name in ("grpo-engine", "torch", "transformers", "trl")
        },
        "batch": f"{PROMPTS} prompts x {GENERATIONS} outputs, cap {CAP}",
        "ours": ours,
        "trl": trl,
        "speedup": {
            "step": ours["step_tokens_per_s"]["median"] / trl["step_tokens_per_s"]["median"],
            "update": ours["update_tokens_per_s"]["median"] / trl["update_tokens_per_s"]["median"],
        },
    }
    out = args.out or RESULTS / f"step_vs_trl_{args.device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    for what, times in result["speedup"].items():
        print(f"{what}: {times:.2f}x TRL's tokens per second")
    print(out)


if __name__ == "__main__":
    main()
