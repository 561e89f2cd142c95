"""The sections of report.html: charts with captions, tables, and sample answers. Each takes the run
and returns HTML, or "" when the run has nothing to show there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from grpo_engine.report.charts import (
    MAX_POINTS,
    NARROW,
    THIN,
    Line,
    classes,
    line_chart,
    percent,
    plain_number,
)
from grpo_engine.report.record import RunRecord
from grpo_engine.report.words import duration, esc, hardware, measure_name, shown, span

SHOWN_PAIRS, FOLDED_PAIRS = 3, 9  # pairs of answers in the open, and behind a fold
LONGEST_ANSWER = 6000  # characters shown of one answer
PHASE_NAMES = {
    "generate": "Sampling answers",
    "sync_weights": "Weights to the sampler",
    "reward": "Scoring answers",
    "reward_model": "Scoring by reward models",
    "old_logprobs": "Log-probabilities, old policy",
    "ref_logprobs": "Log-probabilities, reference",
    "update": "Policy update",
    "eval": "Held-out evaluation",
    "checkpoint": "Checkpoints",
    "other": "Other",
}
KEY_FIELDS = [
    *("model", "dataset", "prompt_template", "reward_funcs", "reward_weights", "max_steps"),
    *("prompts_per_generation", "num_generations", "steps_per_generation", "num_iterations"),
    *("max_completion_length", "temperature", "learning_rate", "loss_type", "epsilon", "beta"),
    *("num_train_epochs", "sequences_per_step", "pairs_per_step", "lr_scheduler_type"),
    *("min_learning_rate", "max_length", "completion_only_loss"),
    *("ref_model_sync_steps", "generator", "rollouts_ahead", "is_correction", "device", "seed"),
]
EVAL_SETTINGS = {
    "eval_dataset": "problems from",
    "eval_reward": "graded by",
    "eval_temperature": "temperature",
    "eval_top_p": "top-p",
    "max_completion_length": "length cap",
    "seed": "seed",
}


# -- charts ----------------------------------------------------------------------------------------


def card(
    title: str,
    unit: str,
    lines: Sequence[Line],
    caption: str,
    change: bool = True,
    **axis: Any,
) -> str:
    """A chart with its heading and caption; "" when no line has a value. ``change``: the heading
    says how the first line began and ended."""
    lines = [line for line in lines if line.values()]
    if not lines:
        return ""
    number, values = axis.get("number", plain_number), lines[0].values()
    legend = "".join(
        f'<li><i class="{" ".join(classes(line, i))}"></i>{esc(line.label)}</li>'
        for i, line in enumerate(lines)
    )
    ends = f"{esc(number(values[0]))} → <b>{esc(number(values[-1]))}</b>"
    return f"""<figure><header><h3>{esc(title)} <small>{esc(unit)}</small></h3>
<span>{ends if change and len(values) > 1 else ""}</span></header>
{f'<ul class="legend">{legend}</ul>' if len(lines) > 1 else ""}{line_chart(title, lines, **axis)}
<figcaption>{esc(caption)}</figcaption></figure>
"""


def outcome_charts(record: RunRecord) -> str:
    """Accuracy and length, the two curves the paper shows of R1-Zero (v1, figures 2 and 3)."""
    accuracy = record.accuracy()
    held_out = Line(
        "held-out problems",
        [(e.step, e.value) for e in accuracy],
        dots=True,
        intervals=[None if e.low is None else (e.low, e.high) for e in accuracy],
    )
    training = [
        Line("training batch", record.series(f"rewards/{name}/mean"), tone=2)
        for name in record.reward_names()
        if "accuracy" in name
    ]
    cards = card(
        measure_name(record).capitalize(),
        "",
        [held_out, *training[:1]],
        f"Points: the same held-out problems each time, bars their 95{THIN}% intervals. The "
        f"paper’s Figure 2 (v1) plots R1-Zero’s AIME 2024 pass@1: 15.6{THIN}% at its first point, "
        f"71.0{THIN}% at step 8,400.",
        number=percent,
        floor=0.0,
        ceiling=1.0,
    )
    cards += card(
        "Answer length",
        "tokens",
        [
            Line("held-out problems", record.series("eval/mean_length"), dots=True),
            Line("training batch", record.series("completions/mean_length"), tone=2),
        ],
        f"{_length_by_outcome(record)}The paper’s Figure 3 (v1) shows R1-Zero’s mean answer "
        "growing from about 0.6k to 9.6k tokens over 8,400 steps, with no reward for length.",
        floor=0.0,
    )
    if not cards:
        return ""
    return f"""<section><h2>Accuracy and answer length</h2>
<p class="aside">The two curves by which the DeepSeek-R1 paper describes R1-Zero. These are this
run’s own: its model, task and scale are not the paper’s.</p>
<div class="cards wide">{cards}</div></section>
"""


def _length_by_outcome(record: RunRecord) -> str:
    """Mean length of right and of wrong held-out answers at the last evaluation with samples."""
    lengths: dict[bool, list[float]] = {True: [], False: []}
    for sample in record.evals[max(record.evals)] if record.evals else ():
        if sample.get("correct") in (0, 1) and isinstance(sample.get("length"), (int, float)):
            lengths[sample["correct"] == 1].append(sample["length"])
    right, wrong = lengths[True], lengths[False]
    if not (right and wrong):
        return ""
    return (
        f"At step {max(record.evals):,}, {len(right):,} right answers average {fmean(right):.0f} "
        f"tokens, {len(wrong):,} wrong ones {fmean(wrong):.0f}. "
    )


def update_charts(record: RunRecord) -> str:
    cards = [*_policy_cards(record), *_batch_cards(record), *_speed_cards(record)]
    if not any(cards):
        return ""
    return f"""<section><h2>Inside the update</h2>
<p class="aside">By optimiser step. Where a line is doubled, the thin one is the values (means of
neighbours in runs of more than {MAX_POINTS} steps) and the thick one their moving mean.</p>
<div class="cards">{"".join(cards)}</div></section>
"""


_POSITIVE = {"floor": 0.0, "size": NARROW}
_SHARE = {**_POSITIVE, "number": percent}


def _line(record: RunRecord, key: str, tone: int, label: str = "", dots: bool = False) -> Line:
    return Line(label or key, record.series(key), tone=tone, dots=dots)


def _policy_cards(record: RunRecord) -> Iterable[str]:
    yield card(
        "KL from the reference",
        "nats/token",
        [_line(record, "kl", 4)],
        "Mean estimate per token. Falls to zero when the policy becomes the reference.",
        size=NARROW,
    )
    yield card(
        "Entropy",
        "nats/token",
        [_line(record, "entropy", 5)],
        "Of the policy’s full distribution. Near zero, the answers of a group are all alike."
        if record.stage == "grpo"
        else "Of the model’s full distribution, where it learns.",
        **_POSITIVE,
    )
    yield card(
        "Clipped tokens",
        "",
        [
            _line(record, "clip_ratio/region_mean", 1, "all"),
            _line(record, "clip_ratio/low_mean", 2, "low side"),
            _line(record, "clip_ratio/high_mean", 3, "high side"),
        ],
        "Tokens whose ratio left the clip range and so lost their gradient. None can, if each "
        "rollout is used for a single step.",
        **_SHARE,
    )
    yield card(
        "Gradient norm",
        "",
        [_line(record, "grad_norm", 6)],
        "Before clipping. A gap is a step whose gradient was not finite.",
        **_POSITIVE,
    )


def _batch_cards(record: RunRecord) -> Iterable[str]:
    yield card(
        "Cut by the length cap",
        "",
        [
            _line(record, "completions/clipped_ratio", 2, "training batch"),
            _line(record, "eval/clipped_ratio", 1, "held-out problems", dots=True),
        ],
        "Answers that hit max_completion_length. One cut before its final answer was complete "
        "cannot be right, so a high share teaches brevity.",
        **_SHARE,
    )
    yield card(
        "Groups without a signal",
        "",
        [_line(record, "frac_reward_zero_std", 3)],
        "Prompts whose answers all got the same reward: no advantage, nothing to learn.",
        **_SHARE,
        ceiling=1.0,
    )


def _speed_cards(record: RunRecord) -> Iterable[str]:
    yield card(
        "Throughput, whole step",
        "tokens/s",
        [_line(record, "tokens_per_second", 1)],
        "Sampling, scoring and update together; evaluations left out."
        if record.stage == "grpo"
        else "Forward, loss, backward and optimiser; evaluations left out.",
        **_POSITIVE,
    )
    yield card(
        "Throughput, policy update",
        "tokens/s",
        [_line(record, "update_tokens_per_second", 2)],
        "Forward, loss, backward and optimiser alone.",
        **_POSITIVE,
    )


# -- tables ----------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """Cells are HTML already. The first column is words, the others are numbers."""
    kinds = ["", *[' class="num"'] * (len(head) - 1)]

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{k}>{c}</{tag}>" for k, c in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    note = f'<p class="above">{esc(caption)}</p>' if caption else ""
    top = f"<thead><tr>{cells('th', [esc(name) for name in head])}</tr></thead>"
    return f'{note}<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def rewards(record: RunRecord) -> str:
    names = record.reward_names()
    keys = {"total": "reward"} | {name: f"rewards/{name}/mean" for name in names}
    lines = [
        Line(name, record.series(key), tone=1 + i % 6) for i, (name, key) in enumerate(keys.items())
    ]
    lines += [
        Line(f"{name}, held-out prompts", record.series(f"eval/{name}"), tone=tone, dots=True)
        for tone, name in ((5, "helpful"), (6, "safety"))
    ]
    caption = "Batch means. The total is the weighted sum of the reward functions."
    chart = card("Reward", "", lines, caption)
    if not chart:
        return ""
    given = record.config.get("reward_weights") or [1.0] * len(names)
    weights = dict(zip(record.config.get("reward_funcs") or names, given, strict=False))
    rows = []
    for name, key in keys.items():
        values, edges = record.values(key), record.edges(key)
        errors = record.values(f"rewards/{name}/error_rate")
        numbers = [*(edges or (None, None)), min(values, default=None), max(values, default=None)]
        cells = ["–" if number is None else f"{number:.3f}" for number in numbers]
        weight = f"{weights[name]:g}" if name in weights else ""
        rows.append([esc(name), weight, *cells, percent(fmean(errors)) if errors else "–"])
    head = ("Reward", "weight", "first tenth", "last tenth", "lowest", "highest", "failed")
    note = "Batch means; “failed” is the share of answers the function could not score."
    return f"""<section><h2>Rewards</h2>
<div class="cards wide beside">{chart}<div>{table(head, rows, note)}</div></div></section>
"""


def time_split(record: RunRecord) -> str:
    phases = record.phases()
    total = sum(phases.values())
    if not total:
        return ""
    bar, rows, words = [], [], []
    for i, (name, seconds) in enumerate(phases.items()):
        fill, label = f"fill-{1 + i % 6}", PHASE_NAMES.get(name, name)
        share = percent(seconds / total)
        words.append(f"{label} {share}")
        width = f"width:{100 * seconds / total:.2f}%"
        bar.append(f'<i class="{fill}" style="{width}" title="{esc(label)} {share}"></i>')
        rows.append([f'<span class="key {fill}"></span>{esc(label)}', duration(seconds), share])
    return f"""<section><h2>Where the time went</h2>
<p class="aside">{duration(total)} in steps and evaluations, on {esc(hardware(record))}.</p>
<div class="split" role="img" aria-label="{esc(", ".join(words))}">{"".join(bar)}</div>
{table(("Phase", "time", "share"), rows)}</section>
"""


def evaluation(record: RunRecord) -> str:
    """First and last held-out evaluation, with what is needed to judge the numbers."""
    accuracy = record.accuracy()
    if not accuracy:
        return ""
    cut = dict(record.series("eval/clipped_ratio"))
    rows = []
    for e in accuracy if len(accuracy) <= 2 else (accuracy[0], accuracy[-1]):
        samples = record.evals.get(e.step, [])
        lengths = sorted(s["length"] for s in samples if isinstance(s.get("length"), (int, float)))
        unjudged = [s.get("correct") is None for s in samples]
        p95 = lengths[int(0.95 * (len(lengths) - 1))] if lengths else None
        rows.append(
            [
                f"step {e.step:,}",
                f"{e.problems:,}" if e.problems else "–",
                percent(e.value),
                span(e),
                f"{fmean(lengths):.1f}" if lengths else "–",
                "–" if p95 is None else f"{p95:.0f}",
                "–" if cut.get(e.step) is None else percent(cut[e.step]),
                percent(fmean(unjudged)) if unjudged else "–",
            ]
        )
    head = ("Evaluation", "problems", measure_name(record), f"95{THIN}% interval")
    head += ("mean tokens", "p95 tokens", "cut", "not judged")
    settings = [
        f"{label} {shown(record.config[key])}"
        for key, label in EVAL_SETTINGS.items()
        if record.config.get(key) is not None
    ]
    note = ", ".join(settings)
    return f"<section><h2>The evaluation in numbers</h2>{table(head, rows, note)}</section>\n"


def key_values(pairs: Iterable[tuple[str, Any]]) -> str:
    rows = "".join(
        f'<tr><td class="mono">{esc(key)}</td><td class="mono">{esc(shown(value))}</td></tr>'
        for key, value in pairs
    )
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'


def configuration(record: RunRecord) -> str:
    if not record.config:
        return ""
    chosen = [(key, record.config[key]) for key in KEY_FIELDS if key in record.config]
    rest = [(key, value) for key, value in record.config.items() if key not in KEY_FIELDS]
    more = f"<summary>{len(rest)} further fields</summary>{key_values(rest)}"
    fold = f'<details class="print">{more}</details>'
    return f"""<section><h2>Configuration</h2>
{key_values(chosen)}{fold if rest else ""}</section>
"""


def lineage(record: RunRecord) -> str:
    if not record.manifest:
        return ""
    return f"""<section><h2>Lineage</h2>
<p class="aside">What went in, by hash, and what ran. From manifest.json.</p>
{key_values(_flat(record.manifest))}</section>
"""


def _flat(tree: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


# -- sample answers --------------------------------------------------------------------------------


def answers(record: RunRecord) -> str:
    """Early and late answers side by side: the same held-out problems if two evaluations kept their
    samples, training samples otherwise.
    """
    pairs, rule, first, last = _answer_pairs(record)
    if not pairs:
        return ""
    count = min(len(pairs), SHOWN_PAIRS + FOLDED_PAIRS)
    chosen = [pairs[i * len(pairs) // count] for i in range(count)]
    cards = [_pair(before, after, first, last) for before, after in chosen]
    more = len(cards) - SHOWN_PAIRS
    fold = f"<details><summary>{more} more</summary>{''.join(cards[SHOWN_PAIRS:])}</details>"
    return f"""<section><h2>Answers, early and late</h2>
<p class="aside">{esc(rule)}</p>
{"".join(cards[:SHOWN_PAIRS])}{fold if more > 0 else ""}</section>
"""


def _answer_pairs(record: RunRecord) -> tuple[list[tuple[Any, Any]], str, int, int]:
    """(pairs of samples, how they were chosen, step of the first of a pair, step of the second)."""
    if len(record.evals) >= 2:
        first, last = min(record.evals), max(record.evals)
        after = {sample.get("index"): sample for sample in record.evals[last]}
        pairs = [(s, after[s.get("index")]) for s in record.evals[first] if s.get("index") in after]
        rule = (
            "The same held-out problems before and after, taken evenly from the list whatever the "
        )
        return pairs, rule + "outcome.", first, last
    kept = record.evals or record.samples
    if not kept:
        return [], "", 0, 0
    first, last = min(kept), max(kept)
    rule = "From the first and the last training batch that was kept; their prompts may differ."
    if first == last:
        rule = f"Samples of step {first:,}, the only ones kept."
    return list(zip(kept[first], kept[last], strict=False)), rule, first, last


def _pair(before: Mapping[str, Any], after: Mapping[str, Any], first: int, last: int) -> str:
    same = before.get("prompt") == after.get("prompt")
    sides = [(before, first)] if first == last else [(before, first), (after, last)]
    cards = "".join(
        answer(sample, f"Step {step:,}", with_question=not same) for sample, step in sides
    )
    head = question(before) if same else ""
    return f'<div class="pair">{head}<div class="answers">{cards}</div></div>'


def user_part(prompt: str) -> str:
    """The user's part of a prompt in the R1-Zero template; any other prompt whole."""
    start, end = prompt.rfind(" User: "), prompt.rfind("Assistant:")
    return prompt[start + len(" User: ") : end].strip() if 0 <= start < end else prompt.strip()


def question(sample: Mapping[str, Any]) -> str:
    asked = esc(user_part(str(sample.get("prompt", ""))))
    solution = sample.get("solution")
    expected = "" if solution is None else f"<small>expected {esc(str(solution)[:80])}</small>"
    return f'<div class="question">{asked}{expected}</div>'


def answer(sample: Mapping[str, Any], whose: str, with_question: bool = False) -> str:
    """One answer with its verdict; ``whose`` is its heading."""
    marks = [f"<b>{esc(whose)}</b>"]
    if sample.get("correct") in (0, 1):
        right = sample["correct"] == 1
        word, sign = ("right", "✓") if right else ("wrong", "✗")
        marks.append(f'<span class="{word}">{sign} {word}</span>')
    elif "correct" in sample:
        marks.append(f"<span>score {esc(shown(sample['correct']))}</span>")
    elif isinstance(sample.get("reward"), (int, float)):
        marks.append(f"<span>reward {sample['reward']:.2f}</span>")
    if sample.get("length") is not None:
        marks.append(f"<span>{esc(sample['length'])} tokens</span>")
    if sample.get("finish_reason") == "length":
        marks.append('<span class="wrong">cut by the length cap</span>')
    body = _marked_up(str(sample.get("completion", "")))
    return (
        f'<article class="answer">{question(sample) if with_question else ""}'
        f'<header>{"".join(marks)}</header><pre tabindex="0">{body}</pre></article>'
    )


def _marked_up(completion: str) -> str:
    """Escaped text, shortened in the middle when very long, with the template's tags tinted."""
    if len(completion) > LONGEST_ANSWER:
        keep = LONGEST_ANSWER // 2
        left_out = f"[… {len(completion) - 2 * keep:,} characters not shown …]"
        cut = f'<span class="cut">\n{left_out}\n</span>'
        return _tinted(completion[:keep]) + cut + _tinted(completion[-keep:])
    return _tinted(completion) if completion.strip() else '<span class="cut">(empty)</span>'


def _tinted(raw: str) -> str:
    tags = r"&lt;/?(?:think|answer)&gt;"
    return re.sub(tags, lambda tag: f'<span class="tag">{tag[0]}</span>', esc(raw))
