"""The curves of a pipeline's RL stages beside each other, with what the paper shows of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from grpo_engine.report.charts import NARROW, THIN, Line, percent
from grpo_engine.report.pipeline_record import Pipeline, RLStage
from grpo_engine.report.sections import card
from grpo_engine.report.words import esc

PREFERENCES = ("helpful", "safety")
SHARE = {"number": percent, "floor": 0.0, "ceiling": 1.0, "change": False}
FIRST = 3  # training batches that count as the start


def rl_sections(pipeline: Pipeline) -> list[str]:
    return [
        _outcome(pipeline.rl),
        _cold_start(pipeline),
        _language(pipeline.rl),
        _preferences(pipeline.rl),
        _components(pipeline.rl),
    ]


def _section(title: str, aside: str, cards: str, kind: str = "cards wide") -> str:
    if not cards:
        return ""
    return f"""<section><h2>{esc(title)}</h2>
<p class="aside">{esc(aside)}</p>
<div class="{kind}">{cards}</div></section>
"""


def _held_out(stage: RLStage) -> Line:
    return Line(
        stage.label,
        [(e.step, e.value) for e in stage.accuracy],
        tone=stage.tone,
        dots=True,
        intervals=[None if e.low is None else (e.low, e.high) for e in stage.accuracy],
    )


def _accuracy_key(stage: RLStage) -> str:
    names = [name for name in stage.run.reward_names() if "accuracy" in name]
    return f"rewards/{names[0]}/mean" if names else ""


def _training(stage: RLStage) -> Line:
    return Line(stage.label, stage.run.series(_accuracy_key(stage)), tone=stage.tone)


def _outcome(stages: Sequence[RLStage]) -> str:
    lengths = []
    for stage in stages:
        held_out = stage.run.series("eval/mean_length")
        kept = held_out or stage.run.series("completions/mean_length")
        lengths.append(Line(stage.label, kept, tone=stage.tone, dots=bool(held_out)))
    cards = card(
        "Accuracy",
        "held-out problems",
        [_held_out(stage) for stage in stages],
        f"Bars are 95{THIN}% intervals. The paper’s Figure 2 (v1) plots R1-Zero’s AIME 2024 "
        f"pass@1: 15.6{THIN}% at its first point, 71.0{THIN}% at step 8,400.",
        **SHARE,
    )
    cards += card(
        "Response length",
        "tokens",
        lengths,
        "Points: held-out problems; a line without points: training batches. The paper’s Figure 3 "
        "(v1) shows R1-Zero’s mean answer growing from about 0.6k to 9.6k tokens over 8,400 steps.",
        floor=0.0,
        change=False,
    )
    aside = (
        "The paper’s Figures 2 and 3, of every RL stage of this pipeline. Each counts its own "
        "steps; step 0 is the model it starts from."
    )
    return _section("Accuracy and response length over RL", aside, cards)


# -- cold start ------------------------------------------------------------------------------------


def _cold_start(pipeline: Pipeline) -> str:
    """RL from the base model next to the first RL that starts from a model of the pipeline."""
    rows = {stage.name: stage for stage in pipeline.rl}
    zero = later = None
    for stage in pipeline.of_kind("grpo"):
        if stage.name not in rows:
            continue
        origin = pipeline.origin(stage)
        if zero is None and origin == pipeline.base:
            zero = rows[stage.name]
        elif later is None and origin in pipeline.record.stages:
            later = rows[stage.name]
    if zero is None or later is None:
        return ""
    pair = [zero, later]
    cards = card(
        "Accuracy in training",
        "batch means",
        [_training(stage) for stage in pair],
        " ".join(filter(None, (_steadiness(stage) for stage in pair))),
        **SHARE,
    )
    cards += card(
        "Accuracy",
        "held-out problems",
        [_held_out(stage) for stage in pair],
        f"The same two stages on problems not trained on; bars are 95{THIN}% intervals.",
        **SHARE,
    )
    aside = (
        f"{zero.label} begins at the base model, {later.label} after fine-tuning on cold-start "
        "data. The paper gives cold start as the way “to prevent the early unstable cold start "
        "phase of RL training from the base model” (v1, 2.3.1): RL should start higher and swing "
        "less. Near 100 % there is less room to swing."
    )
    return _section("What cold start changes", aside, cards)


def _steadiness(stage: RLStage) -> str:
    values = stage.run.values(_accuracy_key(stage))
    if len(values) <= FIRST:
        return ""
    swing = fmean(abs(b - a) for a, b in zip(values, values[1:], strict=False))
    return (
        f"{stage.label}: {percent(fmean(values[:FIRST]))} over the first {FIRST} batches, "
        f"{100 * swing:.1f} points from one batch to the next on average."
    )


# -- language --------------------------------------------------------------------------------------


def _language(stages: Sequence[RLStage]) -> str:
    lines, ends = [], []
    for stage in stages:
        values = stage.run.values("rewards/language/mean")
        if not values:
            continue
        weight = stage.weight("language")
        how = "measured, not rewarded" if weight == 0 else "rewarded"
        label = f"{stage.label}, {how}"
        lines.append(Line(label, stage.run.series("rewards/language/mean"), tone=stage.tone))
        ends.append(f"{label}: {percent(values[0])} to {percent(values[-1])}.")
    chart = card(
        "Language consistency",
        "training batches",
        lines,
        "Words of the prompt’s language / all words of the reasoning (v2, eq. 7). "
        + " ".join(ends),
        **SHARE,
    )
    if not chart:
        return ""
    chart += card(
        "Accuracy of the same stages",
        "held-out problems",
        [_held_out(stage) for stage in stages if stage.run.values("rewards/language/mean")],
        "The paper reports for the language reward “a slight degradation in the model’s "
        "performance” (v1, 2.3.2).",
        **SHARE,
    )
    aside = (
        "The reward of the reasoning RL that keeps a chain of thought in one language, and what "
        "it costs."
    )
    return _section("Language consistency", aside, chart)


# -- preference rewards ----------------------------------------------------------------------------


def _preferences(stages: Sequence[RLStage]) -> str:
    cards = ""
    for stage in stages:
        lines = []
        for tone, name in enumerate(PREFERENCES, start=1):
            training = stage.run.series(f"rewards/{name}/mean")
            held_out = stage.run.series(f"eval/{name}")
            lines += [
                Line(f"{name}, training", training, tone=tone),
                Line(f"{name}, held-out prompts", held_out, tone=tone + 3, dots=True),
            ]
        if not any(line.values() for line in lines):
            continue
        steps = {"span": (stage.run.rows[0]["step"], stage.run.last_step)}
        cards += card(
            f"Preference reward, {stage.label}",
            "reward models",
            lines,
            "Mean score of the reward models on the rows they judge, from the step at which the "
            "general prompts join.",
            change=False,
            **steps,
        )
        cards += card(
            f"Held-out accuracy, {stage.label}",
            "",
            [_held_out(stage)],
            "If this falls while the reward beside it rises, the policy pleases the reward model "
            "instead of getting better.",
            number=percent,
            floor=0.0,
            ceiling=1.0,
            **steps,
        )
    aside = (
        "The paper’s Figure 6 (v2): with the helpful reward model, the reward rises while "
        "CodeForces performance falls, which is why preference rewards come only in the last steps."
    )
    return _section("Preference reward against accuracy", aside, cards)


# -- components ------------------------------------------------------------------------------------


def _components(stages: Sequence[RLStage]) -> str:
    aside = "Batch means, each over the rows that the reward applies to."
    return _section("Reward components", aside, "".join(_component_cards(stages)), "cards")


def _component_cards(stages: Sequence[RLStage]) -> Iterable[str]:
    for stage in stages:
        lines = [
            Line(_weighted(stage, name), stage.run.series(f"rewards/{name}/mean"), tone=1 + n % 6)
            for n, name in enumerate(stage.run.reward_names(), start=1)
        ]
        total = Line("total", stage.run.series("reward"), tone=1)
        yield card(
            stage.label,
            "by step",
            [total, *lines],
            f"Stage {stage.name}: the total is {' + '.join(line.label for line in lines)}.",
            change=False,
            size=NARROW,
        )


def _weighted(stage: RLStage, name: str) -> str:
    weight = stage.weight(name)
    return name if weight in (None, 1) else f"{weight:g} × {name}"
