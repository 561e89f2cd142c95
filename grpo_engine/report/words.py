"""Numbers and facts of a run as the words of its report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any

from grpo_engine.report.charts import percent
from grpo_engine.report.record import Estimate, RunRecord

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def esc(value: Any) -> str:
    """HTML-escaped text; what HTML cannot hold (controls, lone surrogates) becomes U+FFFD."""
    return escape(_UNPRINTABLE.sub("\ufffd", str(value)), quote=True)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def hardware(record: RunRecord) -> str:
    """The machine as the manifest names it; "CPU" whenever no GPU was used."""
    host = record.manifest.get("host")
    if not isinstance(host, Mapping):
        return str(host) if host else "hardware that was not recorded"
    gpus = host.get("gpus") or []
    if gpus and not str(record.config.get("device")).startswith("cpu"):
        return ", ".join(map(str, gpus))
    threads = host.get("cpu_threads")
    return f"CPU ({threads} thread{'' if threads == 1 else 's'})" if threads else "CPU"


def span(estimate: Estimate) -> str:
    """The 95 % interval in percent, or a dash."""
    if estimate.low is None or estimate.high is None:
        return "–"
    return f"{100 * estimate.low:.1f}–{percent(estimate.high)}"


def measure_name(record: RunRecord) -> str:
    measure = record.config.get("eval_reward", "accuracy")
    return "accuracy" if measure == "accuracy" else f"{measure} reward"


def shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {shown(inner)}" for key, inner in value.items()) or "none"
    return "none" if value is None else str(value)
