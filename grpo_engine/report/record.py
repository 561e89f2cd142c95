"""What a finished, interrupted or running training run left in its folder, and the outcome measured
from it.

Nothing here is required to exist: each absence ends in a sentence of ``RunRecord.gaps``, never in a
guess.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import yaml

from grpo_engine.metrics import METRICS_FILE, list_completions, read_jsonl, read_metrics
from grpo_engine.types import UserError

BOOTSTRAP_DRAWS = 2000
EDGE_ROWS = 20  # most rows averaged at either end of the run when no evaluation exists


@dataclass(frozen=True)
class Estimate:
    """A fraction with its 95 % interval; ``low`` and ``high`` are None when the samples are not on
    disk."""

    step: int
    value: float
    low: float | None = None
    high: float | None = None
    problems: int | None = None


@dataclass
class RunRecord:
    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    evals: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    samples: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    gaps: list[str] = field(default_factory=list)

    def series(self, key: str) -> list[tuple[int, float | None]]:
        """(step, value) of every row that has ``key``; None where the run wrote null (a NaN)."""
        points = []
        for row in self.rows:
            if key in row:
                value = row[key]
                finite = isinstance(value, (int, float)) and math.isfinite(value)
                points.append((row["step"], float(value) if finite else None))
        return points

    def values(self, key: str) -> list[float]:
        return [value for _, value in self.series(key) if value is not None]

    @property
    def stage(self) -> str:
        """The verb that made the run."""
        return str(self.manifest.get("stage") or "grpo")

    @property
    def last_step(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def planned_steps(self) -> int | None:
        steps = self.config.get("max_steps")
        return steps if isinstance(steps, int) else None

    def accuracy(self) -> list[Estimate]:
        """Held-out accuracy at each evaluation, with an interval where its samples were kept."""
        return [
            estimate(step, value, self.evals.get(step, []))
            for step, value in self.series("eval/accuracy")
            if value is not None
        ]

    def edges(self, key: str) -> tuple[float, float] | None:
        """Mean over the first and over the last tenth of the rows that have ``key`` (at most 20
        rows each)."""
        values = self.values(key)
        if len(values) < 2:
            return None
        count = max(1, min(EDGE_ROWS, len(values) // 10))
        return fmean(values[:count]), fmean(values[-count:])

    def reward_names(self) -> list[str]:
        names = dict.fromkeys(
            key[len("rewards/") : -len("/mean")]
            for row in self.rows
            for key in row
            if key.startswith("rewards/") and key.endswith("/mean")
        )
        return list(names)

    def phases(self) -> dict[str, float]:
        """Total seconds per phase, largest first. What a step spent outside its phases is "other";
        an evaluation comes on top of time/step."""
        totals: dict[str, float] = defaultdict(float)
        other = 0.0
        for row in self.rows:
            times = {
                key[len("time/") :]: float(value)
                for key, value in row.items()
                if key.startswith("time/") and isinstance(value, (int, float))
            }
            step = times.pop("step", None)
            for name, seconds in times.items():
                totals[name] += seconds
            if step is not None:
                other += max(0.0, step - sum(times.values()) + times.get("eval", 0.0))
        ordered = dict(sorted(totals.items(), key=lambda item: -item[1]))
        if other > 0.005 * sum(totals.values()):
            ordered["other"] = other
        return ordered

    def wall_seconds(self) -> float | None:
        """From the manifest's start to its end; for a run that was resumed or has not ended, the
        sum of its steps and evaluations."""
        start, end = (_instant(self.manifest.get(key)) for key in ("started", "finished"))
        if start is not None and end is not None and not self.manifest.get("resumed"):
            return end - start
        return sum(self.phases().values()) or None


def _instant(value: Any) -> float | None:
    """Seconds since the epoch of a unix time or an ISO date."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp()
        except ValueError:
            return None
    return None


def load_run(folder: str | Path) -> RunRecord:
    """Read a run's folder. Raises UserError when the folder is absent or a file in it is
    damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"report: no folder {folder}")
    record = RunRecord(folder)
    if (folder / METRICS_FILE).is_file():
        record.rows = read_metrics(folder / METRICS_FILE)
        if not record.rows:
            record.gaps.append("metrics.jsonl is empty: the run ended before its first step.")
    else:
        record.gaps.append("There is no metrics.jsonl in this folder: no step was logged.")
    record.config = _read_mapping(folder / "config.yaml", record.gaps)
    record.manifest = _read_mapping(folder / "manifest.json", record.gaps)
    record.evals = {step: read_jsonl(path) for step, path in list_completions(folder, "eval")}
    record.samples = {step: read_jsonl(path) for step, path in list_completions(folder, "step")}
    return record


def _read_mapping(path: Path, gaps: list[str]) -> dict[str, Any]:
    if not path.is_file():
        gaps.append(f"There is no {path.name} in this folder.")
        return {}
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a mapping, found {type(content).__name__}")
    return content


# -- intervals -------------------------------------------------------------------------------------


def by_problem(samples: Sequence[Mapping[str, Any]]) -> dict[Any, float]:
    """Mean correctness of each problem's samples. Samples that could not be judged (``correct``
    null) are left out, as they are from eval/accuracy."""
    marks: dict[Any, list[float]] = defaultdict(list)
    for sample in samples:
        if sample.get("correct") is not None:
            marks[sample.get("index")].append(float(sample["correct"]))
    return {index: fmean(values) for index, values in marks.items()}


def wilson(successes: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a fraction: inside [0, 1] and sound at 0 and at 1, where the normal
    one is not."""
    z2 = 1.959964**2
    p = successes / count
    centre = p + z2 / (2 * count)
    spread = math.sqrt(z2 * (p * (1 - p) / count + z2 / (4 * count * count)))
    low, high = (centre - spread) / (1 + z2 / count), (centre + spread) / (1 + z2 / count)
    return max(0.0, min(low, p)), min(1.0, max(high, p))


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile interval of the mean, resampling problems (seeded: a report is
    reproducible)."""
    array = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(0)
    means = np.array([rng.choice(array, array.size).mean() for _ in range(BOOTSTRAP_DRAWS)])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def estimate(step: int, value: float, samples: Sequence[Mapping[str, Any]]) -> Estimate:
    """Attach an interval, but only if the samples kept on disk are the ones ``value`` was computed
    from."""
    problems = by_problem(samples)
    scored = list(problems.values())
    if not scored or abs(fmean(scored) - value) > 1e-4:
        return Estimate(step, value)
    if all(mark in (0.0, 1.0) for mark in scored):
        low, high = wilson(sum(scored), len(scored))
    else:
        low, high = bootstrap(scored)
    return Estimate(step, value, low, high, len(scored))


def paired_gain(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> tuple[float, float] | None:
    """95 % interval of the accuracy gain, problem by problem; None unless both judged the same
    problems."""
    first, last = by_problem(before), by_problem(after)
    if not first or first.keys() != last.keys():
        return None
    return bootstrap([last[index] - first[index] for index in first])
