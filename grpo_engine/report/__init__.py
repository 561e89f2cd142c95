"""report.html: what a training run did, on one page that needs nothing but itself.

The page makes no request (its Content-Security-Policy forbids them), reads without its script, on a
phone, in the dark and on paper. Every number on it is read from the run's folder; what is not there
is said to be missing. Sentences about the paper say what the paper plots, not that this run repeats
it.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, median

from grpo_engine.metrics import write_atomically
from grpo_engine.report.charts import THIN, percent
from grpo_engine.report.losses import loss_charts, loss_figures, loss_headline, loss_lede
from grpo_engine.report.mismatch import sampler_charts
from grpo_engine.report.page import REPORT_FILE, figures, footer, note, page, warning_items
from grpo_engine.report.record import Estimate, RunRecord, load_run, paired_gain
from grpo_engine.report.reward_model import JUDGED, reward_model_sections
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
    judges = record.stage == "reward-model"  # it has scores to show, and no answers of its own
    sections = [
        _header(record),
        _incomplete(record),
        _warnings(record),
        outcome_charts(record) if record.stage == "grpo" else loss_charts(record),
        *(reward_model_sections(record) if judges else [answers(record), rewards(record)]),
        update_charts(record),
        sampler_charts(record),
        time_split(record),
        "" if judges else evaluation(record),
        configuration(record),
        lineage(record),
    ]
    return page(
        f"{_name(record)} · training report", sections, footer(record.manifest, record.folder)
    )


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
    by_loss = record.stage != "grpo" and not (record.stage == "reward-model" and accuracy)
    if by_loss and (words := loss_headline(record, steps)):
        return words
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
    sentences = [] if record.stage == "grpo" else loss_lede(record)
    accuracy = record.accuracy()
    if len(accuracy) >= 2:
        first, last = accuracy[0], accuracy[-1]
        problems = f"held-out {JUDGED.get(record.config.get('kind'), 'problems')}"
        problems = f"{last.problems:,} {problems}" if last.problems else problems
        if first.low is not None and last.low is not None:
            _, change = _gain(record, first, last)
            intervals = f"{span(first)} before, {span(last)} after"
            sentences.append(f"Measured on {problems}; 95{THIN}% intervals {intervals}{change}.")
        else:
            sentences.append("The samples of these evaluations were not kept: no interval.")
    elif record.stage == "grpo":
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
    shown = [] if record.stage == "grpo" else loss_figures(record)
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
        below = "median step" + (", sampling included" if record.stage == "grpo" else "")
        shown.append(("Throughput", f"{median(rate):,.0f} tok/s", below))
    return figures(shown)


def _incomplete(record: RunRecord) -> str:
    status, sentences = _status(record), list(record.gaps)
    if status != "finished" and record.rows:
        sentences.insert(0, f"This run is not finished: {status}. The page shows what it got to.")
    return note("Incomplete", [esc(sentence) for sentence in sentences])


def _warnings(record: RunRecord) -> str:
    return note("Warnings during the run", warning_items(record.rows))
