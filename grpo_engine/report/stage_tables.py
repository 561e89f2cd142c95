"""The models of a pipeline beside each other: the paper's Table 3, distillation against RL, and the
votes of several samples. Every number is from results.json, or says where it is from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from grpo_engine.evaluate import Estimate, paired_difference
from grpo_engine.report.charts import THIN, TONES, WIDE, Line, classes, percent, ticks
from grpo_engine.report.pipeline_record import (
    MOST_MEASURED,
    Evaluation,
    Pipeline,
    largest_k,
    value_of,
)
from grpo_engine.report.plane import Plane, figure
from grpo_engine.report.sections import answer, question, table
from grpo_engine.report.words import esc, shown

COMPARED = ("num_samples", "temperature", "top_p", "max_completion_length", "prompt_template")
NAMES = {"num_samples": "samples a problem", "max_completion_length": "length cap"}
NONE = "–"


def model_sections(pipeline: Pipeline) -> list[str]:
    return [
        _stage_table(pipeline),
        _distilled(pipeline),
        _votes(pipeline),
        _same_problem(pipeline),
    ]


def estimate_cell(estimate: Mapping[str, Any] | None) -> str:
    """A share with its interval below."""
    if estimate is None or estimate.get("value") is None:
        return NONE
    interval = estimate.get("ci95")
    if interval is None:
        return percent(estimate["value"])
    low, high = interval
    return f"{percent(estimate['value'])}<small>{100 * low:.1f}–{100 * high:.1f}</small>"


def _share(value: float | None) -> str:
    return NONE if value is None else percent(value)


# -- the paper's Table 3 ---------------------------------------------------------------------------


def _stage_table(pipeline: Pipeline) -> str:
    if not pipeline.evaluations:
        return ""
    models = list(pipeline.models)
    rows: list[list[str]] = []
    for some in pipeline.problem_sets():
        rows += _problem_rows(some, models)
    rows += _reward_rows(pipeline, models)
    head = ("Evaluation", *pipeline.models.values())
    measured = (
        f"Format and language are measured here, on {MOST_MEASURED:,} answers of each evaluation "
        "at most, evenly spread; the rest is from the results files."
    )
    return f"""<section class="models"><h2>The models, stage by stage</h2>
<p class="aside">In the shape of the paper’s Table 3 (v2): Dev1 is the model after cold start, Dev2
after reasoning RL, Dev3 after fine-tuning on the sampled data. Below a share its 95{THIN}%
interval. {esc(measured)}</p>
{table(head, rows)}</section>
"""


def _problem_rows(some: Sequence[Evaluation], models: Sequence[str]) -> Iterable[list[str]]:
    by_model = {one.model: one for one in some}

    def row(label: str, cell: Callable[[Evaluation], str], below: str = "") -> list[str]:
        small = f"<small>{esc(below)}</small>" if below else ""
        cells = [cell(by_model[key]) if key in by_model else NONE for key in models]
        return [f"{esc(label)}{small}", *cells]

    first = some[0].results
    yield [
        f"<b>{esc(first['data'])}</b><small>{esc(_setting(some))}</small>",
        *([""] * len(models)),
    ]
    yield row("pass@1", lambda one: estimate_cell(one.results["pass@1"]))
    for family in ("pass@k", "cons@k"):
        k = min((n for one in some if (n := largest_k(one.results, family))), default=None)
        if k is not None:
            name = f"{family[:-1]}{k}"
            yield row(name, lambda one, f=family, k=k: estimate_cell(_at(one, f, k)))
    if any(one.zero_format is not None for one in some):
        yield row("R1-Zero’s format", lambda one: _share(one.zero_format), "think, answer tags")
        yield row("readable format", lambda one: _share(one.readable), "think tags, summary")
    if any(one.language is not None for one in some):
        yield row("language consistency", lambda one: _share(one.language), "of the reasoning")
    yield row("mean length", lambda one: f"{one.results['length']['mean']:.1f}", "tokens")
    yield row("cut by the cap", lambda one: _share(one.results["rates"]["truncated"]["share"]))
    if any(one.results["rates"]["unjudged"]["count"] for one in some):
        yield row("not judged", lambda one: _share(one.results["rates"]["unjudged"]["share"]))


def _at(one: Evaluation, family: str, k: int) -> Mapping[str, Any] | None:
    return (one.results.get(family) or {}).get(str(k))


def _setting(some: Sequence[Evaluation]) -> str:
    """How the samples were drawn; what is not alike for all models is said to differ."""
    words = [f"{some[0].results['num_problems']:,} problems"]
    for name in COMPARED:
        values = {json.dumps(one.results.get("config", {}).get(name)) for one in some}
        label = NAMES.get(name, name.replace("_", " "))
        value = json.loads(values.pop()) if len(values) == 1 else None
        if value is not None:
            words.append(f"{label} {shown(value)}")
        elif values:
            words.append(f"{label} differs")
    return ", ".join(words)


def _reward_rows(pipeline: Pipeline, models: Sequence[str]) -> Iterable[list[str]]:
    """What the reward models say of held-out general prompts, before and after the stage."""
    found: dict[str, dict[str, float]] = {}
    for stage in pipeline.rl:
        before = pipeline.origin(pipeline.record.stages[stage.name])
        for name in ("helpful", "safety"):
            values = stage.run.values(f"eval/{name}")
            if values:
                scores = found.setdefault(name, {})
                scores.setdefault(before, values[0])
                scores[stage.name] = values[-1]
    rows = [
        [
            f"{name} reward",
            *(f"{scores[key]:+.2f}".replace("-", "−") if key in scores else NONE for key in models),
        ]
        for name, scores in found.items()
        if set(scores) & set(models)
    ]
    if rows:
        where = "from the evaluations inside the RL stage"
        yield [
            f"<b>Reward models, held-out general prompts</b><small>{where}</small>",
            *([""] * len(models)),
        ]
        yield from rows


# -- distillation against RL -----------------------------------------------------------------------


def _distilled(pipeline: Pipeline) -> str:
    """Every student: before, distilled, and by RL alone; on each set of problems."""
    distilled = {stage.name: pipeline.origin(stage) for stage in pipeline.of_kind("distill")}
    by_rl = {
        stage.name: pipeline.origin(stage)
        for stage in pipeline.of_kind("grpo")
        if pipeline.origin(stage) in distilled.values()
    }
    wanted = {*distilled, *distilled.values(), *by_rl}
    rows, verdicts = [], []
    for some in pipeline.problem_sets():
        here = [one for one in some if one.model in wanted]
        if not any(one.model in distilled for one in here) or len(here) < 2:
            continue
        rows += [_student_row(pipeline, one) for one in here]
        verdicts += _verdicts(pipeline, here, distilled, by_rl)
    if not rows:
        return ""
    head = ("Model", "pass@1", "cons@k", "mean tokens", "trained tokens")
    return f"""<section><h2>Distillation or RL for a small model</h2>
<p class="aside">The paper’s comparison at 32B (v1, Table 6): on AIME 2024, RL alone reaches
47.0{THIN}%, distillation 72.6{THIN}%. {esc(" ".join(verdicts))}</p>
{table(head, rows)}</section>
"""


def _student_row(pipeline: Pipeline, one: Evaluation) -> list[str]:
    k = largest_k(one.results, "cons@k")
    stage = pipeline.record.stages.get(one.model)
    trained = stage.tokens.get("trained") if stage is not None else None
    problems = f"{one.results['num_problems']:,} of {esc(one.results['data'])}"
    votes = f"{estimate_cell(_at(one, 'cons@k', k))}<small>k = {k}</small>" if k else NONE
    return [
        f"{esc(pipeline.models[one.model])}<small>{problems}</small>",
        estimate_cell(one.results["pass@1"]),
        votes,
        f"{one.results['length']['mean']:.1f}",
        NONE if trained is None else f"{trained:,}",
    ]


def _verdicts(
    pipeline: Pipeline,
    here: Sequence[Evaluation],
    distilled: Mapping[str, str],
    by_rl: Mapping[str, str],
) -> Iterable[str]:
    of_model = {one.model: one.results["pass@1"] for one in here}
    for teacher, start in distilled.items():
        for other, same_start in by_rl.items():
            if start != same_start or not {teacher, other} <= set(of_model):
                continue
            one, two = of_model[teacher], of_model[other]
            ahead = "ahead of" if one["value"] > two["value"] else "not ahead of"
            apart = one["ci95"] and two["ci95"] and _apart(one["ci95"], two["ci95"])
            clear = "the intervals do not meet" if apart else "the intervals meet"
            yield (
                f"Here distillation is {ahead} RL on the same student: {percent(one['value'])} "
                f"and {percent(two['value'])}; {clear}."
            )
            results = {one.model: one.results for one in here}
            paired = paired_shares(results[other], results[teacher])
            if paired is not None:
                yield (
                    f"Problem by problem, distillation less RL is {_points(paired.value)} points "
                    f"(95{THIN}% interval {_points(paired.low)} to {_points(paired.high)})."
                )


def paired_shares(before: Mapping[str, Any], after: Mapping[str, Any]) -> Estimate | None:
    """Mean over the problems that two results have in common of the difference of their shares of
    right samples; None where they have fewer than two in common."""
    shares = []
    for results in (before, after):
        counts = results.get("correct") or []
        rows = results.get("rows") or range(len(counts))
        samples = results["num_samples"]
        shares.append({row: n / samples for row, n in zip(rows, counts, strict=True)})
    common = sorted(shares[0].keys() & shares[1].keys())
    if len(common) < 2:
        return None
    one, other = ([share[row] for row in common] for share in shares)
    return paired_difference(one, other)


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _apart(one: Sequence[float], two: Sequence[float]) -> bool:
    return one[0] > two[1] or two[0] > one[1]


# -- votes -----------------------------------------------------------------------------------------


def _votes(pipeline: Pipeline) -> str:
    cards = []
    for some in pipeline.problem_sets():
        curves = [
            (one, sorted((int(k), value_of(e)) for k, e in (one.results["cons@k"] or {}).items()))
            for one in some
        ]
        curves = [(one, points) for one, points in curves if len(points) > 1]
        if curves:
            cards.append(
                f"{_vote_chart(pipeline, curves)}<div>{_vote_table(pipeline, curves)}</div>"
            )
    if not cards:
        return ""
    return f"""<section><h2>Votes of several samples</h2>
<p class="aside">cons@k: the share of problems whose most frequent answer among k samples is right;
a tie counts by the share of right ones among the answers that tie. The paper: 71.0{THIN}% becomes
86.7{THIN}% for R1-Zero on AIME 2024, k = 64 (v1, Table 2).</p>
<div class="cards wide beside">{"".join(cards)}</div></section>
"""


Curves = Sequence[tuple[Evaluation, Sequence[tuple[int, float]]]]


def _vote_table(pipeline: Pipeline, curves: Curves) -> str:
    ks = sorted({k for _, points in curves for k, _ in points})
    rows = []
    for one, points in curves:
        of_k = dict(points)
        rows.append([esc(pipeline.models[one.model]), *(_share(of_k.get(k)) for k in ks)])
    return table(("cons@k", *(f"k = {k}" for k in ks)), rows)


def _vote_chart(pipeline: Pipeline, curves: Curves) -> str:
    ks = sorted({k for _, points in curves for k, _ in points})
    values = [value for _, points in curves for _, value in points]
    marks = [t for t in ticks(min(values), max(values)) if 0 <= t <= 1]
    marks = marks if len(marks) > 1 else [0.0, 1.0]
    ends = (min(*marks, min(values)), max(*marks, max(values)))
    plane = Plane((math.log2(ks[0]), math.log2(ks[-1])), ends, WIDE)
    body = plane.axes([math.log2(k) for k in ks], marks, number=percent, x_names=list(map(str, ks)))
    legend, words = [], []
    for number, (one, points) in enumerate(curves):
        line = Line(pipeline.models[one.model], [], tone=1 + number % TONES)
        name, kind = line.label, " ".join(classes(line, number))
        placed = [(math.log2(k), value) for k, value in points]
        body += plane.path(placed, f"line {kind}")
        body += "".join(plane.circle(point, 3.2, f"dot tone-{line.tone}") for point in placed)
        legend.append(line)
        first, last = points[0], points[-1]
        words.append(
            f"{name}: {percent(first[1])} at k {first[0]}, {percent(last[1])} at k {last[0]}."
        )
    data = curves[0][0].results["data"]
    caption = f"{data}: {curves[0][0].results['num_problems']:,} problems; k along the axis."
    return figure("cons@k", "over k", plane, body, " ".join(words), caption, legend)


# -- the same problem ------------------------------------------------------------------------------


def _same_problem(pipeline: Pipeline) -> str:
    """Sample 0 of every model for one problem of the set that most models answered."""
    sets = pipeline.problem_sets()
    if not sets:
        return ""
    some = max(sets, key=len)
    by_model = [(one, {s["row"]: s for s in one.samples() if s["sample"] == 0}) for one in some]
    main = [samples for one, samples in by_model if one.model not in pipeline.students]
    row = _telling_row([samples for _, samples in by_model], main)
    if row is None:
        return ""
    asked = next((s[row]["prompt"] for _, s in by_model if s[row].get("prompt")), None)
    asked = asked if isinstance(asked, str) else f"Problem {row} of {some[0].results['data']}"
    solution = by_model[0][1][row].get("solution")
    cards = "".join(
        answer(_as_answer(samples[row]), pipeline.models[one.model]) for one, samples in by_model
    )
    return f"""<section><h2>One problem, every model</h2>
<p class="aside">The first problem that the first of these models gets wrong and the last but the
students gets right with its first sample; the first problem of all where there is none.</p>
<div class="pair">{question({"prompt": asked, "solution": solution})}
<div class="answers">{cards}</div></div></section>
"""


def _telling_row(
    every: Sequence[Mapping[int, Mapping[str, Any]]],
    main: Sequence[Mapping[int, Mapping[str, Any]]],
) -> int | None:
    """A problem that every model answered; ``main``: the answers of those that are no students."""
    common = [row for row in every[0] if all(row in samples for samples in every)]
    if not common:
        return None
    before, after = (main[0], main[-1]) if main else (every[0], every[-1])
    told = (r for r in sorted(common) if before[r]["score"] != 1.0 and after[r]["score"] == 1.0)
    return next(told, min(common))


def _as_answer(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {**sample, "correct": sample.get("score")}
