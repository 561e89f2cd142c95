"""What the judgements came to: how many are of use, and how far the judge can be trusted. No times
and no places, so that a repetition can be compared byte by byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from grpo_engine.preferences.config import PreferencesConfig
from grpo_engine.preferences.labels import LabelledAnswer
from grpo_engine.preferences.pairs import JudgedPair, judged_lengths, verdict_values
from grpo_engine.rewards.judge import VERDICTS

HIGH_FLIP_RATE = 0.3
LENGTH_BIAS = 1.1  # mean length of chosen answers / of rejected ones


def pair_figures(
    judged: Sequence[JudgedPair],
    kept: Sequence[Mapping[str, Any]],
    ties: Sequence[Mapping[str, Any]],
    config: PreferencesConfig,
) -> dict[str, Any]:
    """``flip_rate``: of the pairs with a preference in each order, those whose preference changes
    with the order (0 = no position bias, 1 = position decides all). ``first_position_rate``: of the
    verdicts that prefer one answer, those for the one shown first (0.5 = no bias). Lengths in
    characters within the scope."""
    shown = Counter(verdict for one in judged for verdict in one.judgements)
    first = shown["A>>B"] + shown["A>B"]
    decided = first + shown["B>A"] + shown["B>>A"]
    signs = [_sign_by_order(one, config) for one in judged if one.is_complete]
    both = [(plain, swapped) for plain, swapped in signs if plain and swapped]
    pairs = [judged_lengths(row, config) for row in kept]
    lengths = {
        "chosen": [chosen for chosen, _ in pairs],
        "rejected": [rejected for _, rejected in pairs],
    }
    return {
        "pairs_judged": len(judged),
        "kept": len(kept),
        "kept_share": _share(len(kept), len(judged)),
        "ties": len(ties),
        "without_verdict": sum(not one.is_complete for one in judged),
        "judgements": {
            "asked": sum(len(one.judgements) for one in judged),
            "without_verdict": shown[None],
            "verdicts_as_shown": {verdict: shown[verdict] for verdict in VERDICTS},
        },
        "position_bias": {
            "first_position_rate": _share(first, decided),
            "flip_rate": _share(sum(a != b for a, b in both), len(both)),
            "pairs_with_both_orders": len(both),
        },
        "mean_difference": _mean([row["difference"] for row in kept]),
        "mean_length": {name: _mean(values) for name, values in lengths.items()},
        "length_ratio": _share(sum(lengths["chosen"]), sum(lengths["rejected"])),
        "longer_chosen_share": _share(sum(a > b for a, b in pairs), len(pairs)),
    }


def _sign_by_order(one: JudgedPair, config: PreferencesConfig) -> tuple[int, int]:
    """Which answer (1 the first, -1 the second, 0 neither) the verdicts prefer in each order."""
    values = verdict_values(config)
    sums = [0.0, 0.0]
    for verdict, swapped in zip(one.verdicts, one.pair.swapped, strict=True):
        sums[swapped] += values[verdict]
    plain, swapped = ((total > 0) - (total < 0) for total in sums)
    return plain, swapped


def label_figures(
    labelled: Sequence[LabelledAnswer],
    kept: Sequence[Mapping[str, Any]],
    ties: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Lengths in characters of the whole answer."""
    verdicts = Counter(verdict for one in labelled for verdict in one.judgements)
    lengths: dict[str, list[int]] = {"safe": [], "unsafe": []}
    for row in kept:
        lengths["safe" if row["label"] else "unsafe"].append(len(row["completion"]))
    return {
        "answers_judged": len(labelled),
        "kept": len(kept),
        "kept_share": _share(len(kept), len(labelled)),
        "ties": len(ties),
        "without_verdict": sum(not one.is_complete for one in labelled),
        "safe": len(lengths["safe"]),
        "unsafe": len(lengths["unsafe"]),
        "unsafe_share": _share(len(lengths["unsafe"]), len(kept)),
        "judgements": {
            "asked": sum(len(one.judgements) for one in labelled),
            "without_verdict": verdicts[None],
            "safe": verdicts[True],
            "unsafe": verdicts[False],
        },
        "mean_length": {name: _mean(values) for name, values in lengths.items()},
    }


def warnings(figures: Mapping[str, Any]) -> list[str]:
    """What the user should know before training on it."""
    found = []
    flips = figures.get("position_bias", {}).get("flip_rate")
    if flips is not None and flips > HIGH_FLIP_RATE:
        found.append(f"the judge's preference flips with the order in {flips:.0%} of the pairs")
    ratio = figures.get("length_ratio")
    if ratio is not None and not 1 / LENGTH_BIAS <= ratio <= LENGTH_BIAS:
        found.append(f"chosen answers are {ratio:.2f} times as long as rejected ones")
    if figures["kept"] and 0 in (figures.get("safe", 1), figures.get("unsafe", 1)):
        found.append("all labels are the same: a reward model cannot learn from them")
    if figures["without_verdict"]:
        found.append(f"{figures['without_verdict']} could not be judged and are left out")
    return found


def as_markdown(figures: Mapping[str, Any]) -> str:
    """The figures as one table, a nested name written with its parents."""
    lines = ["| figure | value |", "|---|---|"]
    lines += [f"| {name} | {_written(value)} |" for name, value in _flat(figures, "")]
    return "\n".join(lines) + "\n"


def _flat(values: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    flat = []
    for name, value in values.items():
        name = prefix + name.replace("_", " ")
        flat += _flat(value, f"{name}: ") if isinstance(value, Mapping) else [(name, value)]
    return flat


def _written(value: Any) -> str:
    if value is None:
        return "n/a"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
