"""The page of a reward model: how often it agrees with the held-out judgements, whether its
probabilities can be believed, and what it pays for length. From results.json and metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_engine.report.charts import NARROW, THIN, Line, percent, plain_number, ticks
from grpo_engine.report.plane import Plane, figure
from grpo_engine.report.record import RunRecord, wilson
from grpo_engine.report.sections import card, table
from grpo_engine.report.words import esc
from grpo_engine.types import UserError

SQUARE = (370, 300)
JUDGED = {"helpful": "pairs", "safety": "answers"}  # what a row of that kind is
LENGTH_MATTERS = 0.5  # rank correlation of score and length from which the page warns


def reward_model_sections(record: RunRecord) -> list[str]:
    """What comes after the curves of loss and accuracy; nothing where no row was held out."""
    results = _results(record)
    return [
        _agreement(record, results),
        _calibration(results.get("calibration")),
        _length(results.get("length")),
        _scores(record),
    ]


def _results(record: RunRecord) -> dict[str, Any]:
    path = record.folder / "results.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold a mapping, found {type(found).__name__}")
    return found


# -- agreement -------------------------------------------------------------------------------------


def _agreement(record: RunRecord, results: Mapping[str, Any]) -> str:
    rows = list(_agreement_rows(results))
    if not rows:
        return ""
    judged = "the whole response, reasoning included"
    if results.get("scope") == "summary":
        judged = "the final summary only"
    figures = table(("Held-out rows", "value", f"95{THIN}% interval"), rows)
    return f"""<section><h2>Agreement with the held-out judgements</h2>
<p class="aside">At step {results.get("step", record.last_step):,}. What is judged: {judged}.
Intervals are a bootstrap over prompts.</p>
<div class="cards wide beside">{_margins(results)}<div>{figures}</div></div></section>
"""


def _agreement_rows(results: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, label in (("accuracy", "Accuracy"), ("auc", "Area under the ROC curve")):
        found = results.get(name)
        if found and found.get("value") is not None:
            number = percent if name == "accuracy" else plain_number
            rows.append([label, number(found["value"]), _interval(found.get("ci95"), number)])
    if results.get("rows"):
        unit = JUDGED.get(str(results.get("kind")), "rows")
        count = f"{results['rows']:,} of {results['prompts']:,} prompts"
        rows.append([f"Held-out {unit}", count, ""])
    return rows


def _interval(ci95: Sequence[float] | None, number: Any) -> str:
    return "–" if ci95 is None else f"{number(ci95[0])} – {number(ci95[1])}"


def _margins(results: Mapping[str, Any]) -> str:
    """A histogram of the margins, or of the scores of each label."""
    kind, histogram = results["kind"], results["margin"]["histogram"]
    edges, counts = histogram["edges"], histogram["counts"]
    labels = ["chosen minus rejected"] if kind == "helpful" else ["safe", "unsafe"]
    plane = Plane((edges[0], edges[-1]), (0.0, float(max(map(max, counts), default=0) or 1)))
    body = plane.axes(x_ticks=ticks(edges[0], edges[-1]), y_ticks=ticks(0.0, plane.top))
    if edges[0] < 0 < edges[-1]:
        body += plane.segment((0.0, 0.0), (0.0, plane.top), "cursor")
    groups = []
    for tone, group in enumerate(counts[: len(labels)], start=1):
        points = [(edges[0], 0.0)]
        for low, high, count in zip(edges, edges[1:], group, strict=False):
            points += [(low, float(count)), (high, float(count))]
        body += plane.path([*points, (edges[-1], 0.0)], f"line tone-{tone}")
        groups.append(f"{labels[tone - 1]}: {sum(group):,} rows")
    title = "Margins" if kind == "helpful" else "Scores by label"
    caption = (
        "Raw score of the chosen answer minus that of the rejected one. What lies left of 0 is "
        "judged wrongly."
        if kind == "helpful"
        else "Raw scores. Above 0 the model says safe."
    )
    legend = [Line(label, [], tone=i) for i, label in enumerate(labels, start=1)]
    return figure(title, "held-out rows", plane, body, "; ".join(groups) + ".", caption, legend)


# -- calibration -----------------------------------------------------------------------------------


def _calibration(found: Mapping[str, Any] | None) -> str:
    filled = [row for row in found["table"] if row["count"]] if found else []
    if not filled:
        return ""
    rows = [
        [
            f"{percent(row['from'])} – {percent(row['to'])}",
            f"{row['count']:,}",
            "–" if not row["count"] else percent(row["predicted"]),
            "–" if not row["count"] else percent(row["observed"]),
        ]
        for row in found["table"]
    ]
    head = ("Predicted probability", "rows", "mean predicted", "observed")
    return f"""<section><h2>Can its probabilities be believed?</h2>
<p class="aside">Predicted: {esc(found["predicted"])}. Observed: {esc(found["observed"])}. Expected
calibration error: {percent(found["error"])} (mean distance of the two, by rows).</p>
<div class="cards wide beside">{_reliability(filled, found)}<div>{table(head, rows)}</div></div>
</section>
"""


def _reliability(filled: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> str:
    low = found["table"][0]["from"]
    plane = Plane((low, 1.0), (0.0, 1.0), size=SQUARE)
    body = plane.axes([low, (1 + low) / 2, 1.0], [0.0, 0.25, 0.5, 0.75, 1.0], number=percent)
    body += plane.segment((low, low), (1.0, 1.0), "cursor")
    most = max(row["count"] for row in filled)
    words = []
    for row in filled:
        bottom, top = wilson(row["observed"] * row["count"], row["count"])
        x = row["predicted"]
        body += plane.segment((x, bottom), (x, top), "bar tone-1")
        radius = 2.5 + 5.5 * (row["count"] / most) ** 0.5
        body += plane.circle((x, row["observed"]), radius, "dot tone-1")
        words.append(
            f"predicted {percent(x)}, observed {percent(row['observed'])}, {row['count']:,} rows"
        )
    caption = (
        f"One circle an interval of predictions, its area the number of rows, its bar a 95{THIN}% "
        "interval. On the dashed line, what the model says happens as often as it says."
    )
    return figure("Reliability", "", plane, body, "; ".join(words) + ".", caption)


# -- length ----------------------------------------------------------------------------------------


def _length(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    rows = []

    def add(label: str, value: float | None, number: Any) -> None:
        if value is not None:
            rows.append([label, number(value)])

    for name, label in (("score_correlation", "Score"), ("margin_correlation", "Margin")):
        for kind, coefficient in (found.get(name) or {}).items():
            beside = "length" if name == "score_correlation" else "difference in length"
            add(f"{label} against {beside}, {kind.capitalize()}’s", coefficient, _signed)
    add("Accuracy where the chosen answer is longer", _get(found, "longer"), percent)
    add("Accuracy where it is shorter", _get(found, "shorter"), percent)
    add("A judge that takes the longer answer", found.get("accuracy_of_the_longer"), percent)
    add("Mean length of an answer, tokens", found.get("mean_tokens"), plain_number)
    if not rows:
        return ""
    return f"""<section><h2>Does it pay for length?</h2>
<p class="aside">Reward models are known to prefer long answers, and a policy finds that out.
{esc(_length_verdict(found))}</p>
{table(("Held-out rows", "value"), rows)}</section>
"""


def _get(found: Mapping[str, Any], side: str) -> float | None:
    return found.get(f"accuracy_where_chosen_is_{side}")


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _length_verdict(found: Mapping[str, Any]) -> str:
    rank = (found.get("margin_correlation") or found["score_correlation"]).get("spearman")
    if rank is None:
        return "Here scores or lengths do not vary."
    if abs(rank) < LENGTH_MATTERS:
        return f"Here the rank correlation is {_signed(rank)}."
    side = "longer" if rank > 0 else "shorter"
    return (
        f"Here the rank correlation is {_signed(rank)}: {side} answers score higher. If length is "
        "not what was judged, balance the lengths of the pairs."
    )


# -- scores ----------------------------------------------------------------------------------------


def _scores(record: RunRecord) -> str:
    def line(key: str, tone: int, label: str = "", dots: bool = False) -> Line:
        return Line(label or key, record.series(key), tone=tone, dots=dots)

    cards = card(
        "Margin",
        "raw score",
        [line("eval/margin", 1, "held-out rows", dots=True), line("margin", 2, "training batch")],
        "Mean of chosen minus rejected, or of safe minus unsafe.",
        size=NARROW,
    )
    sides = ("chosen", "rejected") if record.values("chosen_reward") else ("safe", "unsafe")
    cards += card(
        "Scores",
        "raw",
        [line(f"{side}_reward", tone, side) for tone, side in enumerate(sides, start=1)],
        "Batch means. Of pairs only the distance has a meaning, not the level.",
        size=NARROW,
    )
    cards += card(
        "Calibration error",
        "",
        [line("eval/calibration_error", 3, dots=True)],
        "On held-out rows. Where it rises while accuracy stands still, the model is overconfident.",
        number=percent,
        floor=0.0,
        size=NARROW,
    )
    if not cards:
        return ""
    return f"""<section><h2>Scores during training</h2>
<div class="cards">{cards}</div></section>
"""
