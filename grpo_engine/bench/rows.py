"""One row: one provider on one case in one pass. And the file that holds the rows of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from grpo_engine.bench.cases import Case
from grpo_engine.bench.timing import Spread
from grpo_engine.metrics import write_atomically
from grpo_engine.types import UserError

FORMAT = 1
OK, WRONG, FAILED, ABSENT, CANNOT = "ok", "WRONG", "FAILED", "not here", "cannot"
FORWARD, BOTH = "forward", "forward+backward"


@dataclass
class Row:
    """Times in milliseconds, memory in MiB above the inputs. ``errors`` against fp64 are those of
    truth.errors; ``status`` is ok, WRONG (past the gate, not timed), FAILED, "not here" or
    "cannot", with the ``reason`` in one line; ``approximate``: what is left out by design."""

    case: Case
    passes: str
    provider: str
    ours: bool
    status: str
    reason: str = ""
    approximate: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    ms: Spread | None = None
    wall_ms: Spread | None = None
    rounds: int = 0
    floor: str | None = None
    floor_ms: Spread | None = None
    peak_mib: float | None = None
    flops: float = 0.0
    bytes: float = 0.0

    @property
    def key(self) -> tuple[str, str, str]:
        return self.case.name, self.passes, self.provider

    @property
    def percent_of_floor(self) -> float | None:
        if self.ms is None or self.floor_ms is None or not self.ms.median:
            return None
        return 100 * self.floor_ms.median / self.ms.median

    def to_json(self) -> dict[str, Any]:
        """Strict JSON: an error that is not finite becomes a string."""
        case = self.case
        return {
            "job": case.job,
            "case": case.name,
            "sizes": dict(case.sizes),
            "dtype": str(case.dtype).removeprefix("torch."),
            "source": case.source,
            "values": case.values,
            "features": sorted(case.features),
            "passes": self.passes,
            "provider": self.provider,
            "ours": self.ours,
            "status": self.status,
            "reason": self.reason,
            "approximate": self.approximate,
            "errors": {k: v if math.isfinite(v) else str(v) for k, v in self.errors.items()},
            "ms": self.ms and asdict(self.ms),
            "wall_ms": self.wall_ms and asdict(self.wall_ms),
            "rounds": self.rounds,
            "floor": self.floor,
            "floor_ms": self.floor_ms and asdict(self.floor_ms),
            "percent_of_floor": self.percent_of_floor,
            "peak_mib": self.peak_mib,
            "least_flops": self.flops,
            "least_bytes": self.bytes,
        }


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(values, indent=1, allow_nan=False) + "\n")


def read_results(path: Path, flag: str) -> dict[str, Any]:
    """A results file of this program; UserError names the flag and what is wrong with the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: not JSON ({error})") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UserError(f"{flag} {path}: not a results file of grpo-engine bench, format {FORMAT}")
    for name in ("hardware", "date", "code"):
        if not isinstance(values.get(name), str):
            raise UserError(f"{flag} {path}: {name} is missing or no text")
    if not isinstance(values.get("versions"), dict) or not isinstance(values.get("rows"), list):
        raise UserError(f"{flag} {path}: versions or rows are missing or of another type")
    for place, row in enumerate(values["rows"]):
        odd = "no object" if not isinstance(row, dict) else odd_field(row)
        if odd:
            raise UserError(f"{flag} {path}: row {place + 1}: {odd}")
    return values


def odd_field(row: dict[str, Any]) -> str | None:
    """What is wrong with a row that was read, as far as it is compared, or None."""

    def is_spread(value: Any) -> bool:
        names = [found.name for found in fields(Spread)]
        return isinstance(value, dict) and all(is_number(value.get(name)) for name in names)

    fits: dict[str, Callable[[Any], bool]] = {
        **dict.fromkeys(("case", "passes", "provider", "status", "reason"), is_text),
        "ours": lambda value: isinstance(value, bool),
        **dict.fromkeys(("ms", "floor_ms"), lambda value: value is None or is_spread(value)),
        "peak_mib": lambda value: value is None or is_number(value),
        "errors": lambda value: (
            isinstance(value, dict)
            and all(is_number(error) or is_text(error) for error in value.values())
        ),
    }
    for name, fit in fits.items():
        if name not in row:
            return f"{name} is missing"
        if not fit(row[name]):
            return f"{name} is odd: {json.dumps(row[name])[:60]}"
    return None


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    """Finite and at least 0, as every number is that is compared."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and math.isfinite(value) and value >= 0
