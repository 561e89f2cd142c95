"""The rows as tables: for the screen (rich), for people who read files (Markdown)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo_engine.bench.rows import ABSENT, CANNOT, FAILED, OK, WRONG, Row
from grpo_engine.bench.timing import Spread

ERRORS = ("max error", "gradient error")
STYLES = {WRONG: "bold red", FAILED: "red"}
COLUMNS = ("pass", "provider", "median ms", "quartiles", "% of floor", "peak MiB", *ERRORS)
WALL = "wall ms"  # on CUDA only: host clock, launches included


def number(value: float | None, digits: int = 4) -> str:
    """Four significant digits without an exponent; '-' for what was not measured."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def spread_words(spread: Spread | None) -> str:
    return "-" if spread is None else f"{number(spread.q1)} - {number(spread.q3)}"


def error_words(row: Row, gradients: bool) -> str:
    """The largest error and of which output it is."""
    found = {n: e for n, e in row.errors.items() if n.startswith("d_") == gradients}
    if not found:
        return "-"
    name = max(found, key=lambda n: found[n])
    return f"{found[name]:.1e} ({name.removeprefix('d_')})"


def cells(row: Row, wall: bool) -> list[str]:
    """The row's cells in the order of COLUMNS, with ``wall`` the host's time after the quartiles;
    what was not timed has its status in the place of its time."""
    exactness = [error_words(row, gradients=False), error_words(row, gradients=True)]
    if row.status != OK:
        blank = ["-"] * (4 if wall else 3)
        return [row.passes, row.provider, row.status, *blank, *exactness]
    percent = row.percent_of_floor
    found = [row.passes, row.provider, number(row.ms and row.ms.median), spread_words(row.ms)]
    found += [number(row.wall_ms and row.wall_ms.median)] if wall else []
    found += ["-" if percent is None else f"{percent:.1f}", number(row.peak_mib), *exactness]
    notes = [note for note in (row.approximate, row.reason) if note]
    if notes:
        found[1] += f" ({'; '.join(notes)})"
    return found


def headings(wall: bool) -> list[str]:
    return [*COLUMNS[:4], *([WALL] if wall else []), *COLUMNS[4:]]


def floor_words(rows: Iterable[Row]) -> str:
    """'floor: forward 3 bare GEMMs 12.3 ms; ...' of the passes of one case."""
    found = {}
    for row in rows:
        if row.floor and row.floor_ms and row.passes not in found:
            found[row.passes] = f"{row.passes} {row.floor}, {number(row.floor_ms.median)} ms"
    return "floor: " + "; ".join(found.values()) if found else "no floor"


def case_title(row: Row) -> str:
    sizes = " ".join(f"{name}={size}" for name, size in row.case.sizes.items())
    return f"{row.case.name} [{sizes}]"


def split(rows: list[Row]) -> tuple[list[Row], list[str]]:
    """(rows for the table, one line for each reason why a provider has no time)."""
    shown = [row for row in rows if row.status not in (ABSENT, CANNOT)]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.status != OK:
            name = f"{row.provider} ({row.passes})" if row in shown else row.provider
            names = reasons.setdefault(f"{row.status}: {row.reason}", [])
            names += [name] if name not in names else []
    return shown, [f"{words}: {'; '.join(names)}" for words, names in reasons.items()]


def print_case(rows: list[Row], console: Console) -> None:
    """One case on the screen; Markdown where the output is no terminal."""
    if not rows:
        return
    if not console.is_terminal:
        print(case_markdown(rows), file=console.file)
        return
    wall = any(row.wall_ms for row in rows)
    shown, others = split(rows)
    table = Table(title=case_title(rows[0]), box=None, title_justify="left", title_style="bold")
    for name in headings(wall):
        side = "left" if name in ("pass", "provider", *ERRORS) else "right"
        table.add_column(name, header_style="dim", justify=side, overflow="fold")
    for row in shown:
        style = STYLES.get(row.status, "bold" if row.ours else "")
        table.add_row(*(Text(cell) for cell in cells(row, wall)), style=style)
    console.print(table)
    for line in [floor_words(rows), *others, ""]:
        console.print(Text(line, style="dim"), soft_wrap=True)


def case_markdown(rows: list[Row]) -> str:
    wall = any(row.wall_ms for row in rows)
    shown, others = split(rows)
    lines = [f"### {case_title(rows[0])}", "", floor_words(rows), ""]
    if shown:
        lines += [*markdown_table(headings(wall), [cells(row, wall) for row in shown]), ""]
    return "\n".join([*lines, *(f"- {line}" for line in others)]).rstrip() + "\n"


def markdown_table(names: list[str], rows: list[list[str]]) -> list[str]:
    def line(words: list[str]) -> str:
        return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |"

    return [line(names), "|" + "---|" * len(names), *map(line, rows)]


def markdown(result: dict[str, Any], rows: list[Row]) -> str:
    """The whole run as one page."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"# Kernel benchmark: {result['hardware']}",
        "",
        f"{result['date']}, code {result['code']}, `{result['command']}`",
        f"({versions})",
        "",
        *result["notes"],
        "",
    ]
    if result.get("interrupted"):
        lines += ["**Interrupted: what was measured until then.**", ""]
    if result.get("copy_gb_per_s"):
        lines += [f"Copy bandwidth in this process: {result['copy_gb_per_s']:.1f} GB/s.", ""]
    for _, group in groupby(rows, key=lambda row: row.case.name):
        lines.append(case_markdown(list(group)))
    for title, table in result.get("sections", {}).items():
        lines += [f"### {title}", "", *markdown_table(table["columns"], table["rows"]), ""]
    return "\n".join(lines).rstrip() + "\n"
