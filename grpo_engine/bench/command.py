"""``grpo-engine bench``: choose, measure, show, write, compare.

Exit codes: 0; 1 where one of our own kernels is wrong or fails, or got worse than the baseline; 2 a
wrong flag; 130 after Ctrl-C. What was measured before a Ctrl-C or an error is written.
"""

from __future__ import annotations

import shlex
import time
from contextlib import suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo_engine.bench import ahead_of_time
from grpo_engine.bench.baseline import load_baseline, regressions
from grpo_engine.bench.charts import FORMATS, write_roofline
from grpo_engine.bench.floors import HEAD_JOBS, copy_bandwidth_run
from grpo_engine.bench.machine import busy, hardware, provenance, slug
from grpo_engine.bench.measure import is_ours, measure_case
from grpo_engine.bench.options import BenchOptions, read_options, writable
from grpo_engine.bench.profiling import profile_rows
from grpo_engine.bench.rows import FAILED, FORMAT, OK, WRONG, Row, write_json
from grpo_engine.bench.tables import markdown, markdown_table, print_case
from grpo_engine.bench.targets import target_table
from grpo_engine.bench.timing import Clock, Runner, Spread, interleave, reason
from grpo_engine.metrics import write_atomically
from grpo_engine.types import UserError

ERROR_NOTE = (
    "Max error: largest absolute error against fp64 of log-probs, entropy, loss, advantages. "
    "Gradient error: relative, by the Frobenius norm."
)
QUICK_NOTE = (
    "--quick: fewer cases and rounds; providers that compile for every shape take part in the "
    "targets' main case alone."
)
CPU_NOTES = [
    "These are the portable CPU paths: they say nothing about a GPU.",
    "Times: this process's clock, caches as they are. Peak: PyTorch's allocator.",
    ERROR_NOTE,
]
GPU_NOTES = [
    "Times: between two CUDA events, the L2 cache overwritten before. Wall ms, of short calls: the "
    "host's clock from an idle device to an idle device. Peak: PyTorch's allocator.",
    ERROR_NOTE,
]
COPY_ROUNDS = 5


class PipedConsole(Console):
    """Rich would turn a reader that has gone into exit code 1; the program's answer is 141."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def run_bench(
    pairs: list[tuple[str, str]], switches: set[str], console: Console | None = None
) -> int:
    """Run the verb on parsed flags; returns the exit code. UserError only before measuring."""
    console = console or PipedConsole()
    options = read_options(pairs, switches)
    if options.list:
        print_list(options, console)
        return 0
    name = hardware(options.device)
    base = load_baseline(options.compare, name) if options.compare else None
    if base is not None and not options.truth:
        in_common(options, base)
    out = writable(options.out)
    words = [word for flag, value in pairs for word in (f"--{flag}", value)]
    words += [f"--{switch}" for switch in sorted(switches)]
    command = shlex.join(["grpo-engine", "bench", *words])
    if options.truth:
        from grpo_engine.bench.truth_table import run_truth_table

        return run_truth_table(
            out, options.device, options.quick, partial(say, console), command=command
        )
    result = new_result(options, command)
    rows: list[Row] = []
    say(console, f"{name}, code {result['code']}", "bold")
    for note in result["notes"]:
        say(console, note, "dim")
    failure: Exception | None = None
    try:
        measure(options, result, rows, console)
        extras(options, result, rows, console, out)
    except (KeyboardInterrupt, Exception) as error:
        failure = error if isinstance(error, Exception) else None
        result["interrupted"] = True
        for row in rows:
            if row.status == OK and row.ms is None:
                row.reason = "interrupted before it was timed"
        words = "writing what was measured so far" if rows else "nothing was measured or written"
        with suppress(BrokenPipeError):  # perhaps the very error
            say(console, f"{reason(failure) if failure else 'interrupted'}: {words}", "yellow")
    if not rows and result["interrupted"] and failure is None:
        return 130
    if rows or not result["interrupted"]:
        write(result, rows, out / slug(name), console)
    if failure is not None:
        raise failure
    code = verdict(rows, console)
    if base is not None:
        code = max(code, compare(result, base, console))
    return 130 if result["interrupted"] else code


def in_common(options: BenchOptions, base: dict[str, Any]) -> None:
    """UserError, before minutes are spent, where the baseline has no row that would be compared."""
    was = {(r["case"], r["provider"]) for r in base["rows"] if r["ours"] and r["status"] == OK}
    now = {(c.name, p.name) for c in options.cases for p in options.providers_for(c) if is_ours(p)}
    if not was & now:
        raise UserError(
            f"--compare {options.compare}: none of its rows is of a case and provider chosen here; "
            f"it was made by: {base.get('command', 'an unknown command')}"
        )


def new_result(options: BenchOptions, command: str) -> dict[str, Any]:
    packages = [p.package for p in [*options.providers, *options.compiling] if p.package]
    on_cpu = options.device.type == "cpu"
    notes = list(CPU_NOTES if on_cpu else GPU_NOTES)
    quick = [QUICK_NOTE] if options.quick else []
    load = busy(options.device)
    return {
        "format": FORMAT,
        "command": command,
        **provenance(options.device, packages),
        "notes": [*notes, *quick, *([load] if load else [])],
        "rounds": options.rounds,
        "case_s": {},
        "copy_gb_per_s": None,
        "gemm_tflops": None,
        "interrupted": False,
        "sections": {},
    }


def measure(
    options: BenchOptions, result: dict[str, Any], rows: list[Row], console: Console
) -> None:
    if options.device.type == "cuda":
        torch.cuda.set_device(options.device)  # events and allocations of the rivals as well
    clock = Clock(options.device)
    result["copy_gb_per_s"] = copy_bandwidth(clock)
    say(console, f"copy bandwidth {result['copy_gb_per_s']:.1f} GB/s\n")
    began = time.perf_counter()
    for place, case in enumerate(options.cases):
        if options.seconds and time.perf_counter() - began > options.seconds:
            late = ", ".join(case.name for case in options.cases[place:])
            result["notes"].append(f"not measured, {options.seconds} s were up: {late}")
            say(console, result["notes"][-1], "yellow")
            return
        if console.is_terminal:  # a line, no spinner: its thread would disturb the clock
            say(console, f"{place + 1}/{len(options.cases)} {case.name}", "dim")
        first, start = len(rows), time.perf_counter()
        try:
            measure_case(case, options.providers_for(case), clock, options.rounds, rows)
        finally:
            for group in by_case(rows[first:]):
                print_case(group, console)
        result["case_s"][case.name] = round(time.perf_counter() - start, 1)


def copy_bandwidth(clock: Clock) -> float:
    """GB/s read plus written by a plain copy."""
    moved, copy = copy_bandwidth_run(clock.device)
    runner = Runner(lambda _: copy())
    samples = interleave({"copy": runner}, clock, COPY_ROUNDS)["copy"]
    if samples.failure is not None:
        raise RuntimeError(f"the copy that measures bandwidth failed: {samples.failure}")
    return moved / Spread.of(samples.times).median / 1e6


def by_case(rows: list[Row]) -> list[list[Row]]:
    return [list(group) for _, group in groupby(rows, key=lambda row: row.case.name)]


def extras(
    options: BenchOptions, result: dict[str, Any], rows: list[Row], console: Console, out: Path
) -> None:
    """Targets on a GPU, the ahead-of-time table without one, and profiles where asked."""
    sections = result["sections"]
    if options.device.type == "cuda":
        sections["Targets"] = target_table(rows)
    if options.profile:
        everyone = [*options.providers, *options.compiling]
        found, notes = profile_rows(rows, everyone, options.device, writable(out))
        sections |= found
        for note in notes:
            say(console, note)
        result["notes"] += notes
    if not torch.cuda.is_available() and not options.quick:
        table = ahead_of_time.resource_table()
        if isinstance(table, str):
            result["notes"].append(table)
            say(console, table)
        else:
            sections[ahead_of_time.TITLE] = table
    for title, table in sections.items():
        print_section(title, table, console)


def print_section(title: str, table: dict[str, Any], console: Console) -> None:
    if not console.is_terminal:
        lines = [f"### {title}", "", *markdown_table(table["columns"], table["rows"]), ""]
        print("\n".join(lines), file=console.file)
        return
    shown = Table(title=title, box=None, title_justify="left", title_style="bold")
    for name in table["columns"]:
        shown.add_column(name, header_style="dim")
    for row in table["rows"]:
        shown.add_row(*map(Text, row))
    console.print(shown)
    console.print()


def write(result: dict[str, Any], rows: list[Row], stem: Path, console: Console) -> None:
    """``stem``.json, .md, .png and .svg."""
    about = {k: result[k] for k in ("hardware", "device", "code", "versions", "date")}
    floors = [r for r in rows if r.case.job in HEAD_JOBS and r.floor_ms and r.flops]
    if floors:
        result["gemm_tflops"] = max(r.flops / r.floor_ms.median / 1e9 for r in floors)
    result["rows"] = [row.to_json() | about for row in rows]
    paths = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".json", ".md")]
    write_json(paths[0], result)
    write_atomically(paths[1], markdown(result, rows))
    try:
        drawn = write_roofline(result, rows, stem)
    except Exception as error:  # of matplotlib: the figures are safe
        drawn = f"no roofline: {reason(error)}"
    if isinstance(drawn, str):
        say(console, drawn)
        for suffix in FORMATS:  # of other figures
            stem.with_name(f"{stem.name}.{suffix}").unlink(missing_ok=True)
    for path in [*paths, *(drawn if isinstance(drawn, list) else [])]:
        say(console, f"-> {path}")


def verdict(rows: list[Row], console: Console) -> int:
    """1 where one of our own kernels is wrong or fails."""
    bad = [row for row in rows if row.ours and row.status in (WRONG, FAILED)]
    for row in bad:
        say(console, f"{row.status}: {', '.join(row.key)}: {row.reason}", "bold red")
    return 1 if bad else 0


def compare(result: dict[str, Any], base: dict[str, Any], console: Console) -> int:
    lines, compared = regressions(result, base)
    about = f"the baseline of {base['date'][:10]}, code {base['code']}"
    changed = [
        f"{name} {base['versions'].get(name, 'none')} -> {result['versions'].get(name, 'none')}"
        for name in sorted({*base["versions"], *result["versions"]})
        if base["versions"].get(name) != result["versions"].get(name)
    ]
    if changed:
        say(console, f"since {about}: {', '.join(changed)}", "yellow")
    for line in lines:
        say(console, f"WORSE {line}", "bold red")
    if not compared:
        say(console, f"nothing in common with {about}: nothing compared", "bold red")
        return 1
    left = sum(row["ours"] and row["status"] == OK for row in base["rows"]) - compared
    if left:
        say(console, f"{left} rows of the baseline were not run, and not compared", "yellow")
    if not lines:
        say(console, f"{compared} rows: none worse than {about}", "bold green")
    return 1 if lines else 0


def print_list(options: BenchOptions, console: Console) -> None:
    """Jobs, their cases on this device and their providers."""
    say(console, f"{hardware(options.device)}\n", "bold")
    for job in dict.fromkeys(case.job for case in options.cases):
        say(console, job, "bold")
        for case in options.cases:
            if case.job == job:
                say(console, f"  case      {case.name}")
        for provider in options.providers_of(job):
            missing = provider.missing(options.device)
            about = f"not here: {missing}" if missing else (provider.version() or "")
            say(console, f"  provider  {provider.name}  {about}".rstrip())


def say(console: Console, words: str, style: str = "") -> None:
    console.print(Text(words, style=style), soft_wrap=True)
