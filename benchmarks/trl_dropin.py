"""TRL's GRPOTrainer with our kernels dropped in, beside TRL alone: step time and peak memory.

    python benchmarks/trl_dropin.py [--device cuda] [--rounds 3] [--vocab 32768] [--out FILE]

Three sides run the same trainer on the same randomly initialised Qwen2, prompts and seed:

    trl          TRL as installed
    logprobs     patch_trl(loss=False): our log-prob op alone
    grpo_engine  our GRPOTrainer: the loss made with the log-probabilities, in one pass

The learning rate is 1e-9 and no token ends an answer, so all sides sample the same tokens; losses
and gradient norms are compared at every step, and the largest difference is written with the times.
The sides run in turn, each round in a fresh process; the first steps of a process are warm-up.
Reported: the median of the step and of the policy update (everything after sampling, rewards and
reference), and the peak memory: on a GPU what the update allocated at most, on a CPU the most that
the process ever held, which includes sampling.
"""

from __future__ import annotations

import argparse
import json
import resource
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
SIDES = ("trl", "logprobs", "grpo_engine")
WARM_UP = 2


def make_model(args: argparse.Namespace, folder: str):
    """(model, tokenizer): random weights, saved in ``folder`` for TRL to read its reference from;
    the miniature's tokenizer, whose ids are the first."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from grpo_engine.policy import Policy

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    Qwen2ForCausalLM(config).to(dtype).save_pretrained(folder)
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype).to(args.device)
    return model, Policy.load("miniature", device="cpu").tokenizer


def reward(completion_ids, **_) -> list[float]:
    """Something that differs within a group: the share of even ids."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def run(args: argparse.Namespace) -> list[dict[str, float]]:
    """Steps of one side in this process."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    if args.side == "logprobs":
        from grpo_engine.integrations.trl import patch_trl

        patch_trl(loss=False)
    if args.side == "grpo_engine":
        from grpo_engine.integrations.trl import GRPOTrainer
    on_gpu = args.device == "cuda"
    measured: list[dict[str, float]] = []

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    class Timed(GRPOTrainer):
        sampling_s = 0.0

        def _generate_and_score_completions(self, inputs):
            start = now()
            output = super()._generate_and_score_completions(inputs)
            self.sampling_s += now() - start
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            return output

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start, trainer.sampling_s = now(), 0.0

        def on_step_end(self, *_, **__):
            step = now() - self.start
            held = torch.cuda.max_memory_allocated() if on_gpu else peak_of_process()
            measured.append(
                {
                    "step_s": step,
                    "update_s": step - trainer.sampling_s,
                    "peak_mib": held / 2**20,
                }
            )

    with TemporaryDirectory() as folder:
        model, tokenizer = make_model(args, folder)
        trainer = Timed(
            model=model,
            processing_class=tokenizer,
            reward_funcs=reward,
            train_dataset=Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(1000)]),
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=not on_gpu,
                bf16=False,
                per_device_train_batch_size=args.batch,
                num_generations=args.batch // 2,
                max_completion_length=args.length,
                beta=0.001,
                loss_type="dapo",
                learning_rate=1e-9,
                max_steps=args.steps + WARM_UP,
                report_to=[],
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
                seed=3,
            ),
            callbacks=[Clock()],
        )
        trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    return [
        row | {name: log[name] for name in ("loss", "grad_norm")}
        for row, log in zip(measured, logged, strict=True)
    ]


def peak_of_process() -> int:
    """Bytes; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(side: str, flags: list[str]) -> list[dict[str, float]]:
    """The steps of one fresh process, warm-up included."""
    command = [sys.executable, __file__, *flags, "--side", side]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def gap(step: dict[str, float], base: dict[str, float]) -> float:
    """Of loss and gradient norm, the larger difference, relative to the gradient norm."""
    return max(abs(step[name] - base[name]) for name in ("loss", "grad_norm")) / base["grad_norm"]


def summary(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    found = {}
    for name in ("step_s", "update_s", "peak_mib"):
        values = [row[name] for row in rows]
        found[name] = {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="measured steps per process")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="answers a step, two prompts")
    parser.add_argument("--length", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--out", type=Path, help="default: results/trl_dropin_<device>.json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run(args)))
        return
    names = ("steps", "device", "vocab", "hidden", "layers", "batch", "length")
    flags = [part for name in names for part in (f"--{name}", str(getattr(args, name)))]
    rows: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    difference = dict.fromkeys(SIDES, 0.0)
    for number in range(args.rounds):
        found = {side: measure(side, flags) for side in SIDES}
        for side, steps in found.items():
            gaps = [gap(a, b) for a, b in zip(steps, found["trl"], strict=True)]
            difference[side] = max(difference[side], *gaps)
            rows[side] += steps[WARM_UP:]
            last = summary(steps[WARM_UP:])
            print(
                f"round {number + 1} {side:12} step {last['step_s']['median']:.3f} s  update "
                f"{last['update_s']['median']:.3f} s  peak {last['peak_mib']['max']:.0f} MiB  "
                f"TRL's within {max(gaps):.1e}"
            )
    sides = {side: summary(steps) for side, steps in rows.items()}
    base = sides["trl"]
    result = {
        "command": shlex.join(["python", "benchmarks/trl_dropin.py", *sys.argv[1:]]),
        "device": args.device,
        "hardware": hardware(torch.device(args.device)),
        "code": code_version(),
        "date": date.today().isoformat(),
        "versions": {
            name: metadata.version(name) for name in ("grpo-engine", "torch", "transformers", "trl")
        },
        "model": f"random Qwen2, {args.layers} layers, hidden {args.hidden}, vocab {args.vocab}",
        "batch": f"{args.batch} answers of {args.length} tokens",
        **sides,
        "difference_from_trl": difference,
        "update_speedup": {
            side: base["update_s"]["median"] / found["update_s"]["median"]
            for side, found in sides.items()
        },
    }
    out = args.out or RESULTS / f"trl_dropin_{args.device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
