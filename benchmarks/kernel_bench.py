"""Every kernel beside eager PyTorch doing the same: correct first, then timed in turn.

    python benchmarks/kernel_bench.py [--device cuda] [--rounds 7] [--out FILE]

Each case runs forward and backward on the same inputs. A provider is timed only if its result is
right: within the stated error of the fp64 answer. The providers of a case run in turn (a, b, a, b,
...), so that a busy machine disturbs all of them alike. Printed: median milliseconds with the
fastest and the slowest round, and on CUDA the peak memory above the inputs.

On a machine without a GPU these are the portable CPU paths, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grpo_engine.kernels import (
    grpo_loss,
    linear_grpo_loss,
    linear_logprobs,
    pack_rollouts,
    pack_rollouts_ref,
    plan_batches,
    token_logprobs,
)
from grpo_engine.manifest import code_version

RESULTS = Path(__file__).parent / "results"


@dataclass
class Case:
    """``providers[name]()`` gives the tensors to compare with ``truth``; ``tolerance`` is relative
    to the largest true value of each."""

    name: str
    providers: dict[str, Callable[[], tuple[Tensor, ...]]]
    truth: tuple[Tensor, ...]
    tolerance: float


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return (output.detach(), *torch.autograd.grad(output, inputs))


def eager_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, ids[:, None])[:, 0]


def logits_case(device: torch.device, n: int, v: int) -> Case:
    logits = torch.randn(n, v, device=device, requires_grad=True)
    ids, upstream = torch.randint(v, (n,), device=device), torch.randn(n, device=device)

    def run(op: Callable[[Tensor, Tensor], Tensor], z: Tensor = logits) -> tuple[Tensor, ...]:
        logprobs = op(z, ids)
        (grad,) = torch.autograd.grad(logprobs, z, upstream.to(logprobs.dtype))
        return logprobs.detach(), grad

    exact = logits.detach().double().requires_grad_()
    truth = run(lambda z, i: torch.log_softmax(z, -1).gather(-1, i[:, None])[:, 0], exact)
    return Case(
        f"token_logprobs N={n} V={v}",
        {"ours": lambda: run(token_logprobs), "eager": lambda: run(eager_logprobs)},
        truth,
        1e-5,
    )


def head_inputs(device: torch.device, n: int, d: int, v: int) -> dict[str, Tensor]:
    return {
        "hidden": torch.randn(n, d, device=device, requires_grad=True),
        "weight": (torch.randn(v, d, device=device) * d**-0.5).requires_grad_(),
        "ids": torch.randint(v, (n,), device=device),
        "advantages": torch.randn(n, device=device),
        "noise": 0.2 * torch.randn(n, device=device),
    }


def head_case(device: torch.device, n: int, d: int, v: int) -> Case:
    """The whole GRPO head: hidden states to loss, gradients of hidden states and weight."""
    x = head_inputs(device, n, d, v)
    with torch.no_grad():
        old = linear_logprobs(x["hidden"], x["weight"], x["ids"]) + x["noise"]
    bounds = torch.tensor([0, n // 2, n], dtype=torch.int32, device=device)

    def eager(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        ratio = torch.exp(eager_logits(hidden, weight) - old)
        clipped = ratio.clamp(0.8, 1.2)
        per_token = -torch.minimum(ratio * x["advantages"], clipped * x["advantages"])
        loss = (per_token[: n // 2].mean() + per_token[n // 2 :].mean()) / 2
        return gradients(loss, hidden, weight)

    def eager_logits(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        return torch.log_softmax(logits, -1).gather(-1, x["ids"][:, None])[:, 0]

    def ours(logprobs_first: bool) -> tuple[Tensor, ...]:
        hidden, weight = x["hidden"], x["weight"]
        if logprobs_first:
            logprobs = linear_logprobs(hidden, weight, x["ids"])
            loss, _ = grpo_loss(logprobs, old, x["advantages"], cu_seqlens=bounds)
        else:
            loss, _, _ = linear_grpo_loss(
                hidden, weight, x["ids"], old, x["advantages"], cu_seqlens=bounds
            )
        return gradients(loss, hidden, weight)

    exact = [x[name].detach().double().requires_grad_() for name in ("hidden", "weight")]
    return Case(
        f"GRPO head N={n} D={d} V={v}",
        {
            "linear_grpo_loss": lambda: ours(False),
            "linear_logprobs + grpo_loss": lambda: ours(True),
            "eager": lambda: eager(x["hidden"], x["weight"]),
        },
        eager(*exact),
        1e-4,
    )


def packing_case(device: torch.device, sequences: int, longest: int) -> Case:
    lengths = np.random.default_rng(0).integers(longest // 8, longest + 1, sequences)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = torch.randint(50_000, (int(offsets[-1]),), device=device)
    fields = {name: torch.randn(len(ids), device=device) for name in ("old", "ref", "sampler")}
    order = np.random.default_rng(1).permutation(sequences)

    def run(op: Callable) -> tuple[Tensor, ...]:
        batch = op(ids, fields, offsets=offsets, order=order)
        return (batch.token_ids, batch.position_ids, batch.segment_ids, *batch.fields.values())

    return Case(
        f"pack {sequences} sequences, {len(ids)} tokens, 3 fields",
        {"ours": lambda: run(pack_rollouts), "torch chain": lambda: run(pack_rollouts_ref)},
        run(pack_rollouts_ref),
        0.0,
    )


def error(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    worst = 0.0
    for one, true in zip(found, truth, strict=True):
        scale = true.double().abs().max().clamp_min(1e-30)
        worst = max(worst, float((one.double() - true.double()).abs().max() / scale))
    return worst


def measure(case: Case, rounds: int, device: torch.device) -> list[dict]:
    rows, timed = [], {}
    for name, run in case.providers.items():
        wrong = error(run(), case.truth)
        rows.append({"case": case.name, "provider": name, "error": wrong})
        if wrong <= case.tolerance:
            timed[name] = []
    for _ in range(rounds):
        for name, times in timed.items():
            times.append(milliseconds(case.providers[name], device))
    for row in rows:
        times = timed.get(row["provider"])
        if times is None:
            row["wrong"] = True
            continue
        row |= {"ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times)}
    return rows


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start_s = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start_s)


def planner_rows(rounds: int) -> list[dict]:
    lengths = np.random.default_rng(0).integers(1, 32_769, 100_000)
    rows = []
    for method in ("best_fit", "lpt", "kk"):
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            plan = plan_batches(lengths, 32_768, num_ranks=8, method=method)
            times.append(1e3 * (time.perf_counter() - start))
        used = lengths.sum() / (32_768 * sum(len(rank) for rank in plan))
        rows.append(
            {
                "case": "plan 100,000 sequences over 8 ranks (one CPU core)",
                "provider": f"{method}, {100 * used:.1f} % full",
                "ms": statistics.median(times),
                "min_ms": min(times),
                "max_ms": max(times),
                "error": 0.0,
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    lines = [
        "| case | provider | median ms | min - max | error against fp64 |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        took = (
            "wrong, not timed | "
            if row.get("wrong")
            else f"{row['ms']:.2f} | {row['min_ms']:.2f} - {row['max_ms']:.2f}"
        )
        lines.append(f"| {row['case']} | {row['provider']} | {took} | {row['error']:.1e} |")
    return "\n".join(lines)


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    if device.type == "cuda":
        shapes = {"logits": (4096, 151_936), "head": [(4096, 1024, 151_936)], "pack": (4096, 8192)}
    else:
        shapes = {
            "logits": (512, 50_257),
            "head": [(20_000, 128, 131), (1024, 576, 49_152)],
            "pack": (2000, 512),
        }
    makers = [lambda: logits_case(device, *shapes["logits"])]
    makers += [lambda s=s: head_case(device, *s) for s in shapes["head"]]
    makers += [lambda: packing_case(device, *shapes["pack"])]
    rows = []
    for make in makers:
        rows += measure(make(), args.rounds, device)
    rows += planner_rows(args.rounds)
    print(
        f"{hardware(device)}, float32, forward and backward, {args.rounds} rounds\n\n{table(rows)}"
    )
    out = args.out or RESULTS / f"kernels_{device.type}.json"
    result = {
        "command": "python benchmarks/kernel_bench.py",
        "hardware": hardware(device),
        "code": code_version(),
        "date": date.today().isoformat(),
        "versions": {name: metadata.version(name) for name in ("grpo-engine", "torch")},
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    out.with_suffix(".md").write_text(f"{hardware(device)}, {result['date']}\n\n{table(rows)}\n")
    print(f"\n-> {out}")


if __name__ == "__main__":
    main()
