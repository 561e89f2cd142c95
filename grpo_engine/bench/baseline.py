"""Did this commit make something slower, hungrier or less exact than the committed baseline?

Only our own providers are judged, and only on the machine of the baseline. A time counts as worse
if it is so by more than the noise:

    slowdown = (ms / ms_base) / drift                              a slower machine is no regression
    drift    = floor_ms / floor_ms_base, from 1 to MOST_DRIFT
    allowed  = 1 + max(LEAST_SLOWDOWN, NOISE_FACTOR x noise)
    noise    = root of the sum of squared relative interquartile ranges of the times compared

where the floor, timed in turn with the providers, says how much slower the machine itself is
today. A floor of microseconds beside a long call says nothing of it and corrects nothing: it must
take LEAST_FLOOR_MS or LEAST_FLOOR_SHARE of the row, in both runs. A machine that is faster today is
not corrected for: that would let the floor's noise alone raise an alarm.

Peak memory hardly varies: it may grow by LEAST_GROWTH and ONE_MIB. An error against fp64 that grew
by ERROR_FACTOR counts too, and a provider that was right and now is wrong or fails.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from grpo_engine.bench.machine import slug
from grpo_engine.bench.rows import OK, read_results
from grpo_engine.bench.tables import number
from grpo_engine.types import UserError

LEAST_SLOWDOWN = 0.15
NOISE_FACTOR = 3.0
MOST_DRIFT = 2.0  # a machine slower than that is not the baseline's: such times are worse
LEAST_FLOOR_MS, LEAST_FLOOR_SHARE = 1.0, 0.1
LEAST_GROWTH = 0.05
ONE_MIB = 1.0
ERROR_FACTOR = 4.0
ERROR_FLOOR = 1e-6  # relative; rounding of another summation order stays below

Result = dict[str, Any]


def load_baseline(path: Path, hardware: str) -> Result:
    """The baseline of this machine: a results file, or the folder that holds one per machine.

    UserError where there is none, it cannot be read, or it was measured on another machine.
    """
    flag = "--compare"
    if path.is_dir():
        file = path / f"{slug(hardware)}.json"
        if not file.exists():
            there = ", ".join(sorted(p.stem for p in path.glob("*.json"))) or "none"
            raise UserError(f"{flag} {path}: no {file.name} for this machine; there are: {there}")
        path = file
    values = read_results(path, flag)
    if values["hardware"] != hardware:
        raise UserError(
            f"{flag} {path}: measured on '{values['hardware']}', this is '{hardware}'; times of "
            "two machines are not compared"
        )
    return values


def regressions(now: Result, base: Result) -> tuple[list[str], int]:
    """(one line per regression, number of rows compared). Rows of one side only are left out."""
    was = {_key(row): row for row in base["rows"] if row["ours"] and row["status"] == OK}
    lines, compared = [], 0
    for row in now["rows"]:
        before = was.get(_key(row))
        if before is None or not row["ours"]:
            continue
        compared += 1
        where = ", ".join(_key(row))
        if row["status"] != OK:
            lines.append(f"{where}: was right, now {row['status']}: {row['reason']}")
            continue
        found = (slower(row, before), hungrier(row, before), less_exact(row, before))
        lines += [f"{where}: {words}" for words in found if words]
    return lines, compared


def _key(row: Result) -> tuple[str, str, str]:
    return row["case"], row["passes"], row["provider"]


def slower(row: Result, before: Result) -> str | None:
    if not row["ms"] or not before["ms"]:
        return None
    slowdown = row["ms"]["median"] / before["ms"]["median"]
    spreads = [row["ms"], before["ms"]]
    drift = 1.0
    if telling(row) and telling(before):
        drift = row["floor_ms"]["median"] / before["floor_ms"]["median"]
        drift = min(max(1.0, drift), MOST_DRIFT)
        spreads += [row["floor_ms"], before["floor_ms"]]
    noise = math.sqrt(sum(relative_spread(spread) ** 2 for spread in spreads))
    allowed = 1 + max(LEAST_SLOWDOWN, NOISE_FACTOR * noise)
    if slowdown / drift <= allowed:
        return None
    words = f"{number(before['ms']['median'])} ms -> {number(row['ms']['median'])} ms"
    most = " at most" if drift == MOST_DRIFT else ""
    machine = f", corrected for a machine {drift:.2f}x slower{most}" if drift > 1 else ""
    return f"{words} ({slowdown:.2f}x{machine}; allowed {allowed:.2f}x)"


def telling(row: Result) -> bool:
    """Whether the row's floor says how fast the machine was for a call as long as the row's."""
    if not row["floor_ms"]:
        return False
    floor = row["floor_ms"]["median"]
    return floor >= max(min(LEAST_FLOOR_MS, LEAST_FLOOR_SHARE * row["ms"]["median"]), 1e-9)


def relative_spread(spread: dict[str, float]) -> float:
    return (spread["q3"] - spread["q1"]) / spread["median"] if spread["median"] else 0.0


def hungrier(row: Result, before: Result) -> str | None:
    now, was = row["peak_mib"], before["peak_mib"]
    if now is None or was is None or now <= was * (1 + LEAST_GROWTH) + ONE_MIB:
        return None
    return f"peak {was:.1f} MiB -> {now:.1f} MiB"


def less_exact(row: Result, before: Result) -> str | None:
    for name, error in row["errors"].items():
        was = before["errors"].get(name)
        if was is None or isinstance(was, str):
            continue
        if isinstance(error, str) or error > max(ERROR_FACTOR * was, ERROR_FLOOR):
            shown = error if isinstance(error, str) else f"{error:.1e}"
            return f"error of {name} {was:.1e} -> {shown}"
    return None
