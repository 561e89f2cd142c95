"""The stages of a pipeline as a picture: checkpoints and data from top to bottom in the order they
were made, and who used what.

Each source has a lane of its own to the left of the boxes, from its row down to the last stage that
used it, as ``git log --graph`` draws branches: any lineage fits on a phone. The picture is drawn
twice, narrow and wide, and the page shows the one that fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from grpo_engine.lineage import StageRecord
from grpo_engine.report.charts import percent
from grpo_engine.report.pipeline_record import PAPER_NAMES, TRAINING, Pipeline
from grpo_engine.report.words import duration, esc, shown

LANE = 11  # between two lanes
NARROW_ROW, WIDE_ROW = 66, 62  # height of a row
BOX = 48  # height of a box
NARROW_WIDTH, WIDE_WIDTH, WIDE_BOX = 344, 900, 330
NARROW_CHARS, WIDE_CHARS = 38, 46  # of a line of a box, at most
SIDE_CHARS = 62
MADE_BY = {
    "grpo": "RL",
    "sft": "fine-tuning",
    "distill": "distillation",
    "reward-model": "reward model",
    "sample": "sampling",
    "preferences": "judgements",
}


@dataclass
class Node:
    """``uses``: (key of the source, what of it, in which field)."""

    key: str
    shape: str  # checkpoint, data or outside
    name: str
    figure: str = ""
    status: str = ""
    side: tuple[str, str] = ("", "")
    uses: list[tuple[str, str, str]] = field(default_factory=list)


def stage_diagram(pipeline: Pipeline) -> str:
    nodes = list(_nodes(pipeline))
    if not nodes:
        return ""
    words = " ".join(
        f"{node.name} uses {', '.join(_source(nodes, key) for key, _, _ in node.uses)}."
        for node in nodes
        if node.uses
    )
    return f"""<section><h2>The stages and what came of what</h2>
<p class="aside">From top to bottom in the order of the paper’s Figure 2 (v2). Rounded boxes are
models, boxes with a folded corner are data; a broken edge marks what came from outside. A line runs
from each box to every stage that used it, broken if it is data. Evaluations stand on the models.
</p>
<div class="flow">{_picture(nodes, words, wide=False)}{_picture(nodes, words, wide=True)}</div>
</section>
"""


def _source(nodes: Sequence[Node], key: str) -> str:
    return next((node.name for node in nodes if node.key == key), key)


# -- what is drawn ---------------------------------------------------------------------------------


def _nodes(pipeline: Pipeline) -> Iterator[Node]:
    """Stages but evaluations, each outside model before the first stage that uses it."""
    edges: dict[str, list[tuple[str, str, str]]] = {}
    for source, what, user, name in pipeline.record.edges():
        edges.setdefault(user, []).append((source, what, name))
    drawn: set[str] = set()
    for name, stage in pipeline.record.stages.items():
        kind = pipeline.record.values["stages"][name].get("kind")
        if kind == "eval":
            continue
        node = Node(name, "checkpoint" if kind in TRAINING else "data", _title(name))
        if stage is None:
            node.status = "not begun"
            drawn.add(name)
            yield node
            continue
        node.uses = edges.get(name, [])
        for source in [key for key, _, _ in node.uses if key not in drawn]:
            drawn.add(source)  # a stage that the YAML no longer has
            yield Node(source, "outside", source, "made by an earlier pipeline")
        outside = pipeline.origin(stage)
        if outside and "model" not in [field_name for _, _, field_name in node.uses]:
            if outside not in drawn:
                yield Node(outside, "outside", outside, _outside_figure(pipeline, outside))
            drawn.add(outside)
            node.uses = [(outside, "", "model"), *node.uses]
        node.figure = _figure(pipeline, stage)
        node.status = "" if stage.status == "finished" else stage.status
        node.side = _side(stage)
        drawn.add(name)
        yield node


def _title(name: str) -> str:
    called = PAPER_NAMES.get(name)
    return f"{name} → {called}" if called else name


def _outside_figure(pipeline: Pipeline, key: str) -> str:
    role = "the base model" if key == pipeline.base else "from outside"
    if key in pipeline.students:
        role = "the student"
    return ", ".join(word for word in (role, _evaluated(pipeline, key)) if word)


def _evaluated(pipeline: Pipeline, key: str) -> str:
    """pass@1 in the first evaluation of the model."""
    for one in pipeline.evaluations:
        if one.model == key:
            return f"pass@1 {percent(one.results['pass@1']['value'])}"
    return ""


def _figure(pipeline: Pipeline, stage: StageRecord) -> str:
    words = []
    if stage.kind == "reward-model":
        accuracy = pipeline.file(stage.name, "results.json").get("accuracy") or {}
        if accuracy.get("value") is not None:
            words.append(f"agrees with {percent(accuracy['value'])}")
    elif stage.kind in TRAINING:
        words.append(_evaluated(pipeline, stage.name))
        run = pipeline.runs.get(stage.name)
        held_out = run.values("eval/accuracy") if run and not words[0] else []
        if held_out:
            words.append(f"held-out accuracy {percent(held_out[-1])}")
        elif run and not words[0] and (loss := run.values("eval/loss") or run.values("loss")):
            words.append(f"loss {loss[-1]:.3f}")
    else:
        words.append(_rows(pipeline, stage))
    if stage.steps:
        words.append(f"{stage.steps:,} steps")
    return ", ".join(word for word in words if word)


def _rows(pipeline: Pipeline, stage: StageRecord) -> str:
    found = pipeline.file(stage.name, "statistics.json")
    if stage.kind == "sample" and "acceptance" in found:
        total = found["table"]["total"]["samples"]
        taken = found["acceptance"]
        share = percent(taken["kept"] / taken["samples"]) if taken["samples"] else "none"
        return f"{total:,} rows, {share} of samples kept"
    if "pairs_judged" in found:
        return f"{found['kept']:,} of {found['pairs_judged']:,} pairs kept"
    if "answers_judged" in found:
        return f"{found['safe']:,} safe, {found['unsafe']:,} unsafe answers"
    return ""


def _side(stage: StageRecord) -> tuple[str, str]:
    """What the wide picture says beside the box: how it was made, and what it took."""
    how = MADE_BY.get(stage.kind, stage.kind)
    rewards = stage.settings.get("reward_funcs")
    if stage.kind == "grpo" and rewards:
        how += f" on {shown(stage.settings.get('dataset'))} by {shown(rewards)}"
    elif stage.inputs.get("dataset") is None and stage.settings.get("dataset"):
        how += f" from {shown(stage.settings['dataset'])}"
    words = [duration(stage.seconds)] if stage.seconds else []
    words += [f"{count:,} tokens {name}" for name, count in sorted(stage.tokens.items())]
    return how, ", ".join(words)


# -- drawing ---------------------------------------------------------------------------------------


def lanes_of(nodes: Sequence[Node]) -> dict[str, int]:
    """Source -> its lane, 0 next to the boxes. Two sources share one if the last use of the first
    comes before the row of the other; short lines are innermost."""
    row = {node.key: number for number, node in enumerate(nodes)}
    spans: dict[str, tuple[int, int]] = {}
    for number, node in enumerate(nodes):
        for key, _, _ in node.uses:
            spans[key] = (row[key], number)
    taken: list[list[tuple[int, int]]] = []
    lanes = {}
    for key, (first, last) in sorted(spans.items(), key=lambda item: item[1][1] - item[1][0]):
        for lane in range(len(taken) + 1):
            if lane == len(taken):
                taken.append([])
            if all(last < start or end < first for start, end in taken[lane]):
                taken[lane].append((first, last))
                lanes[key] = lane
                break
    return lanes


def _picture(nodes: Sequence[Node], words: str, *, wide: bool) -> str:
    row_height = WIDE_ROW if wide else NARROW_ROW
    lanes = lanes_of(nodes)
    left = LANE * (max(lanes.values(), default=-1) + 1) + 16
    width = WIDE_WIDTH if wide else max(NARROW_WIDTH, left + 250)
    box = WIDE_BOX if wide else width - left - 2
    tops = {node.key: number * row_height + 4 for number, node in enumerate(nodes)}
    tones = {key: 1 + number % 6 for number, key in enumerate(k.key for k in nodes)}
    shapes = {node.key: node.shape for node in nodes}
    body = []
    for key, lane in lanes.items():
        kind = f"wire tone-{tones[key]}" + (" of-data" if shapes[key] == "data" else "")
        x, out = left - 12 - lane * LANE, tops[key] + BOX - 9
        users = [(node, field_name) for node in nodes for k, _, field_name in node.uses if k == key]
        for node, field_name in users:
            into = tops[node.key] + _entry(node, key)
            hint = f"{key} → {node.key} ({field_name})"
            path = f"M{left} {out}H{x + 5}Q{x} {out} {x} {out + 5}V{into - 5}"
            path += f"Q{x} {into} {x + 5} {into}H{left - 5}"
            body.append(f'<path class="{kind}" d="{path}"><title>{esc(hint)}</title></path>')
            tip = f"M{left - 7} {into - 3.5}L{left - 1} {into}L{left - 7} {into + 3.5}Z"
            body.append(f'<path class="tip-of tone-{tones[key]}" d="{tip}"/>')
    for node in nodes:
        body.append(_box(node, left, tops[node.key], box, tones[node.key], wide))
    height = len(nodes) * row_height - (row_height - BOX) + 8
    size = f'viewBox="0 0 {width} {height}" role="img" class="{"wide" if wide else "narrow"}"'
    title = "<title>Stages of the pipeline</title>"
    return f"<svg {size}>{title}<desc>{esc(words)}</desc>{''.join(body)}</svg>"


def _entry(node: Node, key: str) -> float:
    """Where the line from ``key`` meets the box, from its top. Several spread over the upper part,
    as the lower is where the box's own line leaves."""
    keys = list(dict.fromkeys(k for k, _, _ in node.uses))
    return 8 + keys.index(key) * min(9.0, 22 / max(1, len(keys) - 1))


def _box(node: Node, x: float, y: float, width: float, tone: int, wide: bool) -> str:
    marks = f"box {node.shape} tone-{tone}" + (" waiting" if node.status == "not begun" else "")
    if node.shape == "data":
        fold, right, bottom = 12, x + width, y + BOX
        shape = (
            f'<path class="{marks}" d="M{x} {y}H{right - fold}L{right} {y + fold}V{bottom}H{x}Z"/>'
            f'<path class="{marks} fold" d="M{right - fold} {y}V{y + fold}H{right}"/>'
        )
    else:
        shape = f'<rect class="{marks}" x="{x}" y="{y}" width="{width}" height="{BOX}" rx="11"/>'
    most = WIDE_CHARS if wide else NARROW_CHARS
    below = node.status if node.status and not node.figure else node.figure
    if node.status and node.figure:
        below = f"{node.status}: {node.figure}"
    kind = "status-of" if node.status else "figure-of"
    lines = [("name", x + 13, y + 20, _cut(node.name, most - 4))]
    lines.append((kind, x + 13, y + 38, _cut(below, most)))
    for number, text in enumerate(node.side if wide else ()):
        lines.append(("side", x + width + 18, y + 20 + 18 * number, _cut(text, SIDE_CHARS)))
    return shape + "".join(
        f'<text class="{role}" x="{left}" y="{top}">{esc(text)}</text>'
        for role, left, top, text in lines
        if text
    )


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
