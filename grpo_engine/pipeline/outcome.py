"""What a stage came to, read from the files it left: for the screen, the lineage and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from grpo_engine.history import finite_number
from grpo_engine.lineage import StageRecord
from grpo_engine.metrics import METRICS_FILE, read_jsonl, read_metrics
from grpo_engine.progress import counted

WIDE = 160  # columns, where the output is no terminal


def measured_tokens(folder: Path) -> dict[str, int]:
    """``generated`` and ``trained`` tokens as far as the stage's files say them: its own account in
    manifest.json, else metrics.jsonl (whose lengths are means; held-out evaluations count as well)
    and samples.jsonl."""
    own = _json(folder / "manifest.json").get("tokens")
    if isinstance(own, dict):
        return {name: int(own[name]) for name in ("generated", "trained") if name in own}
    found: dict[str, int] = {}
    rows = _metrics(folder)
    trained = [row["num_tokens"] for row in rows if "num_tokens" in row]
    if trained:
        found["trained"] = int(trained[-1])
    lengths = [
        v for row in rows if (v := finite_number(row, "completions/mean_length")) is not None
    ]
    if lengths:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        outputs = settings["prompts_per_generation"] * settings["num_generations"]
        found["generated"] = round(sum(lengths) * outputs + _held_out_tokens(rows))
    if (folder / "samples.jsonl").is_file():
        drawn = [row["length"] for row in read_jsonl(folder / "samples.jsonl")]
        found["generated"] = sum(drawn)
    return found


def _held_out_tokens(rows: list[dict[str, Any]]) -> float:
    """Generated in the evaluations of a training run."""
    total = 0.0
    for row in rows:
        for kind in ("eval", "eval/general"):
            length = finite_number(row, f"{kind}/mean_length")
            total += (length or 0.0) * (finite_number(row, f"{kind}/num_answers") or 0.0)
    return total


def steps_done(folder: Path) -> int | None:
    """Optimiser steps of a training stage."""
    rows = _metrics(folder)
    return rows[-1]["step"] if rows else None


def figures_of(folder: Path, product: str | None) -> dict[str, Any]:
    """The few numbers by which one knows a stage."""
    found: dict[str, Any] = {}
    rows = _metrics(folder)
    if rows:
        found["steps"] = rows[-1]["step"]
        for key in ("eval/accuracy", "eval/loss"):
            values = [v for row in rows if (v := finite_number(row, key)) is not None]
            if values:
                found[key] = values[-1]
    results = _json(folder / "results.json")
    if "pass@1" in results:
        found["pass@1"] = results["pass@1"]["value"]
        found["answer length"] = results["length"]["mean"]
    if product is not None and product.endswith(".jsonl") and (folder / product).is_file():
        with (folder / product).open("rb") as lines:
            found["rows"] = sum(1 for line in lines if line.strip())
    return found


def headline(figures: dict[str, Any]) -> str:
    """``60 steps, held-out accuracy 81.2 %``."""
    words = []
    for name, value in figures.items():
        if name in ("steps", "rows"):
            words.append(counted(value, name.removesuffix("s")))
        elif name in ("eval/accuracy", "pass@1"):
            label = "held-out accuracy" if name.startswith("eval/") else name
            words.append(f"{label} {100 * value:.1f} %")
        else:
            words.append(f"{name.replace('eval/', 'held-out ')} {value:.3g}")
    return ", ".join(words)


def show_evaluations(records: dict[str, StageRecord], names: list[str], folder: Path) -> None:
    """The finished evaluations beside each other, as the paper's Table 3 has its stages."""
    table = Table(title="Evaluations", title_justify="left")
    table.add_column("model", overflow="fold")
    for heading in ("pass@1", "95 % interval", "cons@k", "tokens", "samples"):
        table.add_column(heading, justify="right")
    for name in names:
        record = records.get(name)
        if record is None or record.kind != "eval" or record.status != "finished":
            continue
        results = _json(folder / name / "results.json")
        first, votes = results["pass@1"], results["cons@k"]
        interval = first["ci95"] and " to ".join(f"{100 * end:.1f}" for end in first["ci95"])
        most = list(votes)[-1] if votes else None
        table.add_row(
            str(record.settings["model"]),
            f"{100 * first['value']:.1f} %",
            interval or "",
            "" if most is None else f"{100 * votes[most]['value']:.1f} % (k = {most})",
            f"{results['length']['mean']:.0f}",
            f"{results['num_problems']} x {results['num_samples']}",
        )
    if table.row_count:
        console = Console()
        (console if console.is_terminal else Console(width=WIDE)).print(table)


def waits_for_a_person(folder: Path) -> bool:
    """Whether a stage has ended, without its result, for somebody to edit its candidates."""
    return _json(folder / "manifest.json").get("status") == "awaiting_edits"


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder) if (folder / METRICS_FILE).is_file() else []


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return values if isinstance(values, dict) else {}
