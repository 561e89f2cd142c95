"""What the report says of a run that learns from given rows (fine-tuning, reward models) instead of
rewards: its loss, in training and on held-out rows.
"""

from __future__ import annotations

from collections.abc import Iterable

from grpo_engine.report.charts import THIN, Line, percent
from grpo_engine.report.record import RunRecord
from grpo_engine.report.sections import card

TOKEN_STAGES = ("sft", "distill")  # their loss is a mean over tokens


def loss_unit(record: RunRecord) -> str:
    return "nats/token" if record.stage in TOKEN_STAGES else "nats"


def loss_headline(record: RunRecord, steps: str) -> str:
    """The outcome in one sentence; "" for a run that logged no loss."""
    held_out, edges = record.values("eval/loss"), record.edges("loss")
    unit = "nats per token" if record.stage in TOKEN_STAGES else "nats"
    if len(held_out) >= 2:
        change = f"from {held_out[0]:.3f} to {held_out[-1]:.3f} {unit}"
        return f"Held-out loss went {change} in {steps}"
    if edges:
        change = f"from {edges[0]:.3f} to {edges[1]:.3f} {unit}"
        return f"Training loss went {change} in {steps}"
    return ""


def loss_lede(record: RunRecord) -> list[str]:
    """What was learned from, and how well that carries over."""
    sentences = []
    tokens, epochs = record.values("num_tokens"), record.values("epoch")
    if tokens:
        passes = f" in {epochs[-1]:.3g} passes over the rows" if epochs else ""
        sentences.append(f"{tokens[-1]:,.0f} tokens were read{passes}.")
    held_out = record.values("eval/loss")
    if len(held_out) < 2:
        sentences.append(
            "Without two held-out evaluations to compare, nothing here measures generalisation."
        )
    elif held_out[-1] > min(held_out):
        best = min((value, step) for step, value in record.series("eval/loss") if value is not None)
        sentences.append(
            f"The held-out loss was lowest at step {best[1]:,} ({best[0]:.3f}) and rose again."
        )
    return sentences


def loss_figures(record: RunRecord) -> list[tuple[str, str, str]]:
    """(label, value, remark) for the top of the page."""
    shown = []
    held_out, edges = record.values("eval/loss"), record.edges("loss")
    if held_out:
        below = f"from {held_out[0]:.3f}" if len(held_out) > 1 else "one evaluation"
        shown.append(("Held-out loss", f"{held_out[-1]:.3f}", f"{below} {loss_unit(record)}"))
    if edges:
        below = f"from {edges[0]:.3f}; first and last tenth"
        shown.append(("Training loss", f"{edges[1]:.3f}", below))
    return shown


def loss_charts(record: RunRecord) -> str:
    cards = "".join(_cards(record))
    if not cards:
        return ""
    return f"""<section><h2>Loss</h2>
<p class="aside">What the optimiser lowers, on the rows it learns from and on those held out.</p>
<div class="cards wide">{cards}</div></section>
"""


def _cards(record: RunRecord) -> Iterable[str]:
    held_out = Line("held-out rows", record.series("eval/loss"), dots=True)
    training = Line("training step", record.series("loss"), tone=2)
    caption = "Mean negative log-likelihood of the learned tokens, over all of a step’s tokens."
    if record.stage not in TOKEN_STAGES:
        caption = "Mean over a step’s rows."
    yield card(
        "Loss",
        loss_unit(record),
        [held_out, training] if held_out.values() else [training],
        caption,
        floor=0.0,
    )
    accuracy = record.accuracy()
    yield card(
        "Accuracy",
        "",
        [
            Line(
                "held-out rows",
                [(e.step, e.value) for e in accuracy],
                dots=True,
                intervals=[None if e.low is None else (e.low, e.high) for e in accuracy],
            ),
            Line("training step", record.series("accuracy"), tone=2),
        ],
        f"Rows judged as they are labelled; bars, where there are any, are 95{THIN}% intervals.",
        number=percent,
        floor=0.0,
        ceiling=1.0,
    )
    yield card(
        "Learning rate",
        "",
        [Line("learning_rate", record.series("learning_rate"), tone=3)],
        "Of each step.",
        floor=0.0,
    )
