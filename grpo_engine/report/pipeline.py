"""report.html of a whole pipeline: every stage of DeepSeek-R1 on one page, in the paper's figures
and tables.

A section is there if the pipeline got that far. Every number is read from the files the stages
left, or measured on the answers they kept; the page says which.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grpo_engine.lineage import StageRecord
from grpo_engine.metrics import write_atomically
from grpo_engine.report.charts import percent
from grpo_engine.report.data_tables import data_sections
from grpo_engine.report.moments import reflection_section
from grpo_engine.report.page import REPORT_FILE, figures, footer, note, page, warning_items
from grpo_engine.report.pipeline_record import (
    Evaluation,
    Pipeline,
    load_pipeline,
)
from grpo_engine.report.record import RunRecord
from grpo_engine.report.rl_curves import rl_sections
from grpo_engine.report.sections import key_values, table
from grpo_engine.report.stage_diagram import stage_diagram
from grpo_engine.report.stage_tables import NONE, model_sections
from grpo_engine.report.words import duration, esc, hardware

WORK = {  # kinds of stages as the time table groups them
    "grpo": "RL",
    "sft": "fine-tuning",
    "distill": "fine-tuning",
    "reward-model": "reward models",
    "sample": "sampling",
    "preferences": "judgements",
    "eval": "evaluation",
}
STATUS_WORDS = {"finished": "finished", "running": "running, or killed"}


def write_pipeline_report(folder: str | Path) -> Path:
    """Write ``folder/report.html`` of the pipeline in ``folder`` and return its path.

    Works for finished, stopped and running pipelines. Raises UserError where there is none or a
    file of a stage is damaged.
    """
    pipeline = load_pipeline(folder)
    path = pipeline.folder / REPORT_FILE
    write_atomically(path, render(pipeline))
    return path


def render(pipeline: Pipeline) -> str:
    """The whole page."""
    sections = [
        _header(pipeline),
        _incomplete(pipeline),
        _warnings(pipeline),
        stage_diagram(pipeline),
        *rl_sections(pipeline),
        *model_sections(pipeline),
        reflection_section(pipeline),
        *data_sections(pipeline),
        _budget(pipeline),
        _machine(pipeline),
    ]
    title = f"{_name(pipeline)} · report of all stages"
    return page(title, sections, footer(pipeline.record.values, pipeline.folder))


def _name(pipeline: Pipeline) -> str:
    values = pipeline.record.values
    return str(values.get("recipe") or values.get("name") or pipeline.folder.resolve().name)


# -- the top of the page ---------------------------------------------------------------------------


def _first_and_last(pipeline: Pipeline) -> tuple[Evaluation, Evaluation] | None:
    """The evaluations of the first and of the last model that is no student, in the first set of
    problems that has both."""
    for some in pipeline.problem_sets():
        main = [one for one in some if one.model not in pipeline.students]
        if len(main) > 1:
            return main[0], main[-1]
    return None


def headline(pipeline: Pipeline) -> str:
    """The outcome in one sentence, as measured."""
    ends = _first_and_last(pipeline)
    if ends is not None:
        first, last = ends
        before, after = (one.results["pass@1"]["value"] for one in ends)
        names = pipeline.models
        return (
            f"{names[last.model]} solves {percent(after)} of the test problems, "
            f"{names[first.model]} {percent(before)}"
        )
    done, listed = _counts(pipeline)
    return f"{done} of {listed} stages are finished"


def _counts(pipeline: Pipeline) -> tuple[int, int]:
    stages = pipeline.record.stages.values()
    return sum(s is not None and s.status == "finished" for s in stages), len(stages)


def _header(pipeline: Pipeline) -> str:
    done, listed = _counts(pipeline)
    status = str(pipeline.record.status)
    finished = done == listed
    words = "finished" if finished else f"{STATUS_WORDS.get(status, status)}, {done} of {listed}"
    badge = f'<span class="status {"finished" if finished else "partial"}">{esc(words)}</span>'
    base = f"<span>{esc(pipeline.base)}</span>" if pipeline.base else ""
    return f"""<header>
<div class="eyebrow"><b>{esc(_name(pipeline))}</b>{base}{badge}</div>
<h1>{esc(headline(pipeline))}</h1>
<p class="lede">{esc(_lede(pipeline))}</p>
{figures(_figures(pipeline))}
</header>
"""


def _lede(pipeline: Pipeline) -> str:
    done, listed = _counts(pipeline)
    sentences = [
        f"{done} of the {listed} stages of this pipeline are finished, after "
        f"{duration(_seconds(pipeline))} on {_hardware(pipeline)}."
    ]
    ends = _first_and_last(pipeline)
    if ends is not None:
        first, last = (one.results["pass@1"] for one in ends)
        results = ends[0].results
        sentences.append(
            f"Measured on {results['num_problems']:,} problems of {results['data']}, "
            f"{results['num_samples']} samples each, as pass@1"
        )
        intervals = [one.get("ci95") for one in (last, first)]
        if all(intervals):
            spans = [f"{100 * low:.1f}–{percent(high)}" for low, high in intervals]
            sentences[-1] += f"; 95 % intervals {spans[0]} and {spans[1]}"
        sentences[-1] += "."
    sentences.append("The page follows the paper’s figures and tables; its numbers are this run’s.")
    return " ".join(sentences)


def _hardware(pipeline: Pipeline) -> str:
    """As ``words.hardware`` says it of a run; the stages' own settings name the device."""
    devices = {str(run.config.get("device")) for run in pipeline.runs.values()}
    config = {"device": "cpu" if devices == {"cpu"} else "auto"}
    return hardware(RunRecord(pipeline.folder, config=config, manifest=pipeline.record.values))


def _figures(pipeline: Pipeline) -> list[tuple[str, str, str]]:
    cells = []
    for key, name in pipeline.models.items():
        if key == pipeline.base or key not in pipeline.record.stages:
            continue
        if name not in ("R1-Zero", "R1", "Student, distilled"):
            continue
        found = next(one for one in pipeline.evaluations if one.model == key).results["pass@1"]
        cells.append((f"{name}, pass@1", percent(found["value"]), _interval(found)))
    generated, trained = (_tokens(pipeline, name) for name in ("generated", "trained"))
    if generated or trained:
        cells.append(("Tokens generated", f"{generated:,}", f"{trained:,} trained on"))
    done, listed = _counts(pipeline)
    cells.append(("Time", duration(_seconds(pipeline)), f"{done} of {listed} stages"))
    return cells


def _interval(estimate: dict[str, Any]) -> str:
    if estimate.get("ci95") is None:
        return "no interval: one problem"
    low, high = estimate["ci95"]
    return f"95 % interval {100 * low:.1f}–{100 * high:.1f}"


def _seconds(pipeline: Pipeline) -> float:
    return sum(stage.seconds for stage in pipeline.record.ran())


def _tokens(pipeline: Pipeline, name: str) -> int:
    return sum(stage.tokens.get(name, 0) for stage in pipeline.record.ran())


def _incomplete(pipeline: Pipeline) -> str:
    items = []
    waiting = [name for name, stage in pipeline.record.stages.items() if stage is None]
    for name, stage in pipeline.record.stages.items():
        if stage is not None and stage.status != "finished":
            why = f": {stage.error}" if stage.error else ""
            words = STATUS_WORDS.get(stage.status, stage.status)
            items.append(f"{name}: {words}{why}.")
    if waiting:
        items.append(f"Not begun: {', '.join(waiting)}.")
    if items:
        items.insert(0, "This pipeline is not finished. The page shows what it got to.")
    return note("Incomplete", [esc(item) for item in (*items, *pipeline.gaps)])


def _warnings(pipeline: Pipeline) -> str:
    items = []
    for name, run in pipeline.runs.items():
        items += [f"<b>{esc(name)}</b> {item}" for item in warning_items(run.rows)]
    for one in pipeline.evaluations:
        unjudged = one.results["rates"]["unjudged"]
        if unjudged["count"]:
            sentence = f"{unjudged['count']:,} samples could not be judged and count as wrong."
            items.append(f"<b>{esc(one.name)}</b> {sentence}")
        overlap = one.results.get("overlap")
        if overlap and overlap.get("problems"):
            sentence = f"{overlap['problems']:,} problems share ten words with the training data."
            items.append(f"<b>{esc(one.name)}</b> {sentence}")
    return note("Warnings during the run", items)


# -- the bottom of the page ------------------------------------------------------------------------


def _budget(pipeline: Pipeline) -> str:
    stages = [stage for stage in pipeline.record.ran() if stage.sessions]
    total = _seconds(pipeline)
    if not stages or not total:
        return ""
    bar, words, tones = [], [], _tones(stages)
    for stage in stages:
        share, label = percent(stage.seconds / total), stage.name
        words.append(f"{label} {share}")
        width = f"width:{100 * stage.seconds / total:.2f}%"
        title = f"{esc(label)} {share}"
        bar.append(f'<i class="fill-{tones[_work(stage)]}" style="{width}" title="{title}"></i>')
    rows = [_budget_row(stage, total, tones[_work(stage)]) for stage in stages]
    sums = [_tokens(pipeline, name) for name in ("generated", "trained")]
    rows.append(["<b>total</b>", "", *(f"{n:,}" for n in sums), duration(total), percent(1)])
    head = ("Stage", "steps", "tokens generated", "tokens trained", "time", "share")
    aside = (
        "Wall time of every start of a stage that ended by itself; colours are kinds of work. "
        "Generated tokens of RL stages are the mean lengths times the answers, those of the "
        "evaluations within the stage included. Trained tokens "
        "count prompts too. What a stage does not count is a dash."
    )
    return f"""<section><h2>Time and tokens</h2>
<p class="aside">{aside}</p>
<div class="split" role="img" aria-label="{esc(", ".join(words))}">{"".join(bar)}</div>
<ul class="legend">{_kinds(stages, tones, total)}</ul>
{table(head, rows)}</section>
"""


def _kinds(stages: Iterable[StageRecord], tones: dict[str, int], total: float) -> str:
    """The colours, with the share of all stages that do the same work."""
    seconds = dict.fromkeys(tones, 0.0)
    for stage in stages:
        seconds[_work(stage)] += stage.seconds
    return "".join(
        f'<li><span class="key fill-{tones[kind]}"></span>{esc(kind)} {percent(spent / total)}</li>'
        for kind, spent in seconds.items()
    )


def _work(stage: StageRecord) -> str:
    return WORK.get(stage.kind, stage.kind)


def _tones(stages: Iterable[StageRecord]) -> dict[str, int]:
    kinds = dict.fromkeys(map(_work, stages))
    return {kind: 1 + number % 6 for number, kind in enumerate(kinds)}


def _budget_row(stage: StageRecord, total: float, tone: int) -> list[str]:
    counts = (stage.steps, stage.tokens.get("generated"), stage.tokens.get("trained"))
    return [
        f'<span class="key fill-{tone}"></span>{esc(stage.name)}',
        *(NONE if count is None else f"{count:,}" for count in counts),
        duration(stage.seconds) if stage.seconds else NONE,
        percent(stage.seconds / total),
    ]


def _machine(pipeline: Pipeline) -> str:
    values = pipeline.record.values
    pairs = [
        (name, values[name])
        for name in ("name", "recipe", "seed", "started", "finished", "code_version")
        if values.get(name) is not None
    ]
    for group in ("host", "versions"):
        pairs += [(key, value) for key, value in (values.get(group) or {}).items()]
    hashes = [
        (f"{stage.name}/{name}", output.sha256)
        for stage in pipeline.record.ran()
        for name, output in stage.outputs.items()
    ]
    fold = f"<summary>{len(hashes)} files and checkpoints by sha256</summary>{key_values(hashes)}"
    return f"""<section><h2>Machine and versions</h2>
<p class="aside">From manifest.json, which also has every setting of every stage.</p>
{key_values(pairs)}{f"<details>{fold}</details>" if hashes else ""}</section>
"""
