"""report.html: what a training run did, on one page that needs nothing but itself.

The page makes no request (its Content-Security-Policy forbids them), reads without its script, on a
phone, in the dark and on paper. Every number on it is read from the run's folder; what is not there
is said to be missing. Sentences about the paper say what the paper plots, not that this run repeats
it.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from statistics import fmean, median

from grpo_engine.metrics import write_atomically
from grpo_engine.report.charts import THIN, percent
from grpo_engine.report.record import Estimate, RunRecord, load_run, paired_gain
from grpo_engine.report.sections import (
    answers,
    configuration,
    evaluation,
    lineage,
    outcome_charts,
    rewards,
    time_split,
    update_charts,
)
from grpo_engine.report.words import duration, esc, hardware, measure_name, span

REPORT_FILE = "report.html"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
FINISHED = ("finished", "completed", "done")


def write_report(output_dir: str | Path) -> Path:
    """Write ``output_dir/report.html`` from the run's other files and return its path.

    Works for finished, interrupted and running runs. Raises UserError when there is no such folder
    or a file in it is damaged.
    """
    record = load_run(output_dir)
    path = record.folder / REPORT_FILE
    write_atomically(path, render(record))
    return path


def render(record: RunRecord) -> str:
    """The whole page."""
    assets = resources.files("grpo_engine.report") / "assets"
    style = (assets / "report.css").read_text(encoding="utf-8")
    script = (assets / "report.js").read_text(encoding="utf-8")
    sections = [
        _header(record),
        _incomplete(record),
        _warnings(record),
        outcome_charts(record),
        answers(record),
        rewards(record),
        update_charts(record),
        time_split(record),
        evaluation(record),
        configuration(record),
        lineage(record),
    ]
    version = record.manifest.get("code_version")
    made_by = f"Written by GRPO Engine{f' {version}' if version else ''}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{esc(_name(record))} · training report</title>
<style>
{style}</style>
</head>
<body>
<main>
{"".join(sections)}
<footer>{esc(made_by)} from the files in {esc(record.folder.resolve().name)}/. Intervals are
95&nbsp;%: Wilson’s where a problem is right or wrong, a bootstrap over problems otherwise.</footer>
</main>
<script>
{script}</script>
</body>
</html>
"""


def _name(record: RunRecord) -> str:
    name = record.manifest.get("recipe") or record.manifest.get("name")
    return str(name or record.folder.resolve().name)


# -- the outcome in words --------------------------------------------------------------------------


def _gain(record: RunRecord, first: Estimate, last: Estimate) -> tuple[str, str]:
    """(verb, the change with its interval). The verb is "rose" or "fell" only if the interval of
    the change leaves out 0, "" if it does not, and "went" if there is no interval."""
    gain = paired_gain(record.evals.get(first.step, []), record.evals.get(last.step, []))
    if gain is not None and first.low is not None and last.low is not None:
        change, low, high = (
            f"{100 * value:+.1f}".replace("-", "−") for value in (last.value - first.value, *gain)
        )
        words = f"; paired change {change} points, {low} to {high}"
        return ("rose" if gain[0] > 0 else "fell" if gain[1] < 0 else ""), words
    if first.low is not None and last.low is not None:
        return ("rose" if last.low > first.high else "fell" if last.high < first.low else ""), ""
    return "went", ""


def headline(record: RunRecord) -> str:
    """The outcome in one sentence, as measured."""
    steps = f"{record.last_step:,} step{'' if record.last_step == 1 else 's'}"
    accuracy, measure = record.accuracy(), measure_name(record)
    if len(accuracy) >= 2:
        first, last = accuracy[0], accuracy[-1]
        verb, _ = _gain(record, first, last)
        change = f"from {percent(first.value)} to {percent(last.value)}"
        taken = f"in {last.step - first.step:,} steps"
        if verb:
            return f"Held-out {measure} {verb} {change} {taken}"
        return f"No measurable change in held-out {measure}: {change} {taken}"
    if accuracy:
        only = accuracy[0]
        return f"Held-out {measure} is {percent(only.value)} at step {only.step:,}"
    reward = record.edges("reward")
    if reward:
        return f"Mean training reward went from {reward[0]:.3f} to {reward[1]:.3f} in {steps}"
    return f"{steps} logged, no reward among them" if record.rows else "This run logged no step"


def _lede(record: RunRecord) -> str:
    if not record.rows:
        return "There is nothing to show yet: no metrics were written."
    sentences = []
    accuracy = record.accuracy()
    if len(accuracy) >= 2:
        first, last = accuracy[0], accuracy[-1]
        problems = f"{last.problems:,} held-out problems" if last.problems else "held-out problems"
        if first.low is not None and last.low is not None:
            _, change = _gain(record, first, last)
            intervals = f"{span(first)} before, {span(last)} after"
            sentences.append(f"Measured on {problems}; 95{THIN}% intervals {intervals}{change}.")
        else:
            sentences.append("The samples of these evaluations were not kept: no interval.")
    else:
        sentences.append(
            "Without two held-out evaluations to compare, nothing here measures generalisation."
        )
    length = _length_change(record)
    if length:
        before, after, where = length
        ratio = f" ({after / before:.2f}×)" if before else ""
        sentences.append(
            f"The mean answer {where} went from {before:.1f} to {after:.1f} tokens{ratio}."
        )
    seconds = record.wall_seconds()
    taken = f" in {duration(seconds)}" if seconds is not None else ""
    plural = "" if record.last_step == 1 else "s"
    sentences.append(f"{record.last_step:,} optimiser step{plural}{taken} on {hardware(record)}.")
    return " ".join(sentences)


def _length_change(record: RunRecord) -> tuple[float, float, str] | None:
    """(before, after, where measured), in tokens."""
    held_out = record.values("eval/mean_length")
    if len(held_out) >= 2:
        return held_out[0], held_out[-1], "on held-out problems"
    edges = record.edges("completions/mean_length")
    return (*edges, "in training") if edges else None


def _status(record: RunRecord) -> str:
    """How the run ended, in words."""
    status = str(record.manifest.get("status") or "state unknown")
    if status in FINISHED:
        return "finished"
    planned = f" of {record.planned_steps:,}" if record.planned_steps else ""
    return f"{status} at step {record.last_step:,}{planned}"


# -- the top of the page ---------------------------------------------------------------------------


def _header(record: RunRecord) -> str:
    status = _status(record)
    facts = [record.config[key] for key in ("model", "dataset") if record.config.get(key)]
    parts = "".join(f"<span>{esc(fact)}</span>" for fact in facts)
    kind = "finished" if status == "finished" else "partial"
    badge = f'<span class="status {kind}">{esc(status)}</span>'
    return f"""<header>
<div class="eyebrow"><b>{esc(_name(record))}</b>{parts}{badge}</div>
<h1>{esc(headline(record))}</h1>
<p class="lede">{esc(_lede(record))}</p>
{_figures(record)}
</header>
"""


def _figures(record: RunRecord) -> str:
    shown: list[tuple[str, str, str]] = []
    accuracy = record.accuracy()
    if accuracy:
        last, best = accuracy[-1], max(accuracy, key=lambda e: e.value)
        below = f"from {percent(accuracy[0].value)}" if len(accuracy) > 1 else "one evaluation"
        if best.value > last.value:
            below += f"; best {percent(best.value)}, step {best.step:,}"
        shown.append((f"Held-out {measure_name(record)}", percent(last.value), below))
    length = _length_change(record)
    if length:
        below = f"from {length[0]:.0f}, {length[2]}"
        shown.append(("Mean answer", f"{length[1]:.0f} tokens", below))
    reward = record.edges("reward")
    if reward:
        below = f"from {reward[0]:.2f}; first and last tenth"
        shown.append(("Training reward", f"{reward[1]:.2f}", below))
    cut = record.values("completions/clipped_ratio")
    if cut:
        shown.append(("Cut by the length cap", percent(fmean(cut)), f"worst {percent(max(cut))}"))
    rate = record.values("tokens_per_second")
    if rate:
        shown.append(("Throughput", f"{median(rate):,.0f} tok/s", "median step, sampling included"))
    cells = "".join(
        f"<div><dt>{esc(label)}</dt>"
        f'<dd class="num">{esc(value)}<small>{esc(below)}</small></dd></div>'
        for label, value, below in shown
    )
    return f'<dl class="figures">{cells}</dl>' if cells else ""


def _incomplete(record: RunRecord) -> str:
    status, sentences = _status(record), list(record.gaps)
    if status != "finished" and record.rows:
        sentences.insert(0, f"This run is not finished: {status}. The page shows what it got to.")
    return _note("Incomplete", [esc(sentence) for sentence in sentences])


def _warnings(record: RunRecord) -> str:
    """One line per rule: its latest sentence, how often it spoke and when."""
    by_rule: dict[str, list[tuple[int, str]]] = {}
    for row in record.rows:
        for sentence in row.get("warnings") or ():
            rule = str(sentence).partition(":")[0]
            by_rule.setdefault(rule, []).append((row["step"], str(sentence)))
    items = []
    for spoken in by_rule.values():
        first, last = spoken[0][0], spoken[-1][0]
        when = f"step {first:,}"
        if last != first:
            when = f"{len(spoken):,} times, steps {first:,} to {last:,}"
        items.append(f"{esc(spoken[-1][1])} <small>({when})</small>")
    return _note("Warnings during the run", items)


def _note(title: str, items: list[str]) -> str:
    if not items:
        return ""
    body = "".join(f"<li>{item}</li>" for item in items)
    return f'<aside class="note"><h2>{title}</h2><ul>{body}</ul></aside>\n'
