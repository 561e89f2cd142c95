"""Reflective words over the steps of RL, and an answer that looks back and corrects itself."""

from __future__ import annotations

from grpo_engine.report.charts import Line
from grpo_engine.report.pipeline_record import Pipeline, RLStage
from grpo_engine.report.reflection import (
    CHINESE_WORDS,
    FALLBACK,
    LEAST_WORDS,
    PAPER_WORDS,
    RULE,
    reflective_words,
)
from grpo_engine.report.sections import answer, card, question, table
from grpo_engine.report.words import esc

SHOWN_WORDS = 8


def reflection_section(pipeline: Pipeline) -> str:
    """How often the words stand in an answer, step by step; and the "aha" moment."""
    stages = [stage for stage in pipeline.rl if stage.words]
    if not stages:
        return ""
    lines = [
        Line(
            stage.label,
            [(step, words.total() / count) for step, (count, words) in stage.words.items()],
            tone=stage.tone,
            dots=True,
        )
        for stage in stages
    ]
    chart = card(
        "Reflective words",
        "per answer",
        lines,
        "Mean over the training answers kept at that step, held-out ones where none of those "
        "were. The paper finds 5 to 7 times as many at the end of R1-Zero’s training as at "
        "its start (v2, C.2).",
        floor=0.0,
        change=False,
    )
    return f"""<section><h2>Reflection</h2>
<p class="aside">Occurrences of the words that v2, C.2 counts ({esc(", ".join(PAPER_WORDS))}) and of
their Chinese counterparts, which are this report’s addition ({esc("、".join(CHINESE_WORDS))}).</p>
<div class="cards wide beside">{chart}<div>{_word_table(stages[0])}</div></div>
{_moment(pipeline)}</section>
"""


def _word_table(stage: RLStage) -> str:
    """The most frequent words at the first and at the last step kept."""
    (first, (count, early)), *_, (last, (final, late)) = [*stage.words.items()] * 2
    if not early + late:
        return f'<p class="aside">None of them stands in {esc(stage.label)}’s kept answers.</p>'
    rows = [
        [esc(word), f"{early[word] / count:.2f}", f"{late[word] / final:.2f}"]
        for word, _ in (early + late).most_common(SHOWN_WORDS)
    ]
    rows.append(["<b>all</b>", f"{early.total() / count:.2f}", f"{late.total() / final:.2f}"])
    note = f"{stage.label}: occurrences per answer."
    return table(("Word", f"step {first:,}", f"step {last:,}"), rows, note)


def _moment(pipeline: Pipeline) -> str:
    """The paper’s aha moment is R1-Zero’s: the first RL stage that has one is shown; where none
    has, the first with an answer of many reflective words, and it says that this is another rule.
    """
    title = "<h3>An aha moment</h3>"
    rule = (
        f"The rule: {RULE}; of the first RL stage that has one, the latest step, held-out answers "
        "before training ones, the first in the file."
    )
    found = [stage for stage in pipeline.rl if stage.moment is not None]
    shown = next((stage for stage in found if stage.moment.changed), found[0] if found else None)
    if shown is None:
        return f"""<div class="pair moment">{title}<p class="aside">There is none among the answers
that this run kept. {esc(rule)}</p></div>
"""
    moment = shown.moment
    place = "held-out problem" if moment.held_out else "training batch"
    if moment.changed:
        first, word, second = moment.changed
        told = f"It writes “{first}”, says “{word}” and replaces it by “{second}”."
    else:
        title = "<h3>The most reflective answer</h3>"
        instead = FALLBACK.format(least=LEAST_WORDS)
        words = reflective_words(str(moment.sample.get("completion", "")))
        counts = ", ".join(f"{word} {count}" for word, count in words.most_common())
        told = (
            "No answer that this run kept corrects a result, so this is no aha moment by the rule. "
            f"Shown instead: {instead}, of the first RL stage that has one. It has "
            f"{words.total()}: {counts}."
        )
    whose = f"{shown.label}, step {moment.step:,}, {place}"
    return f"""<div class="pair moment">{title}<p class="aside">{esc(told)} {esc(rule)}</p>
{question(moment.sample)}<div class="answers">{answer(moment.sample, whose)}</div></div>
"""
