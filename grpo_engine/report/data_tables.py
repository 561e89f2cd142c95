"""What the stages of a pipeline that make data made, and what the reward models learned from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from grpo_engine.lineage import StageRecord
from grpo_engine.report.charts import THIN, percent
from grpo_engine.report.pipeline_record import Pipeline
from grpo_engine.report.sections import table
from grpo_engine.report.stage_tables import NONE, estimate_cell
from grpo_engine.report.words import esc


def data_sections(pipeline: Pipeline) -> list[str]:
    return [_sampled(pipeline), _judged(pipeline), _reward_models(pipeline)]


# -- cold start and rejection sampling -------------------------------------------------------------


def _sampled(pipeline: Pipeline) -> str:
    parts = []
    for stage in pipeline.of_kind("sample"):
        found = pipeline.file(stage.name, "statistics.json")
        if "table" in found and "acceptance" in found:
            parts.append(_one_data_set(stage, found))
    if not parts:
        return ""
    return f"""<section><h2>Sampled data</h2>
<p class="aside">In the shape of the paper’s Table 5 (v2), whose total is 804,745 samples of 5,355.3
tokens on average; and what became of every sample that was drawn. Each rejected one counts once,
under the first reason.</p>
{"".join(parts)}</section>
"""


def _one_data_set(stage: StageRecord, found: Mapping[str, Any]) -> str:
    tokens, prompts = found["tokens"], found["prompts"]
    words = [
        f"{prompts['sampled']:,} prompts, {prompts['with_kept_answers']:,} of them with an answer "
        f"kept; {tokens['drawn']:,} tokens drawn, {tokens['in_data']:,} in the data."
    ]
    rate = found["solve_rate"]["mean"]
    if rate is not None:
        words.append(f"Mean share of right answers to a prompt: {percent(rate)}.")
    domains = table(("Domain", "samples", "avg tokens", "avg rounds"), _domain_rows(found["table"]))
    kept = table(*_acceptance(found["acceptance"]))
    return f"""<h3 class="below">{esc(stage.name)}</h3><p class="aside">{esc(" ".join(words))}</p>
<div class="cards wide tables"><div>{domains}</div><div>{kept}</div></div>
"""


def _domain_rows(found: Mapping[str, Any]) -> Iterable[list[str]]:
    for one in (*found["domains"], found["total"]):
        name = esc(one["domain"])
        yield [
            f"<b>{name}</b>" if one is found["total"] else name,
            f"{one['samples']:,}",
            _decimal(one["average_tokens"]),
            _decimal(one["average_rounds"]),
        ]


def _decimal(value: float | None) -> str:
    return NONE if value is None else f"{value:,.1f}"


def _acceptance(found: Mapping[str, Any]) -> tuple[tuple[str, ...], list[list[str]]]:
    """A column for all samples, and one for each generator where there are several."""
    generators = found.get("by_generator") or {}
    columns = [found, *(generators.values() if len(generators) > 1 else ())]
    head = ("Samples", "all", *(generators if len(generators) > 1 else ()), "share")

    def line(label: str, counts: list[int]) -> list[str]:
        share = percent(counts[0] / found["samples"]) if found["samples"] else NONE
        return [label, *(f"{count:,}" for count in counts), share]

    rows = [
        line(esc(reason.replace("_", " ")), [one["rejected"].get(reason, 0) for one in columns])
        for reason in found["rejected"]
    ]
    rows.append(line("<b>kept</b>", [one["kept"] for one in columns]))
    rows.append(line("<b>drawn</b>", [one["samples"] for one in columns]))
    return head, rows


# -- judgements ------------------------------------------------------------------------------------


def _judged(pipeline: Pipeline) -> str:
    rows = []
    for stage in pipeline.of_kind("preferences"):
        found = pipeline.file(stage.name, "statistics.json")
        if "pairs_judged" in found:
            rows.append(_pairs_row(stage, found))
        elif "answers_judged" in found:
            rows.append(_labels_row(stage, found))
    if not rows:
        return ""
    head = ("Stage", "judged", "kept", "share kept", "judgements", "first place wins", "flips")
    return f"""<section><h2>Judgements for the reward models</h2>
<p class="aside">Pairs are judged in both orders. “First place wins”: of the verdicts for one of the
answers, those for the one shown first (50{THIN}% is no bias). “Flips”: pairs whose preference
changes with the order. The paper: four judgements a pair, kept from a difference of 1, 66,000
pairs; 106,000 prompts labelled safe or unsafe (v2, 3.1).</p>
{table(head, rows)}</section>
"""


def _pairs_row(stage: StageRecord, found: Mapping[str, Any]) -> list[str]:
    bias = found["position_bias"]
    scope = f"helpful, {esc(found['scope'])}"
    return [
        f"{esc(stage.name)}<small>{scope}</small>",
        f"{found['pairs_judged']:,} pairs",
        f"{found['kept']:,}",
        _share(found["kept_share"]),
        f"{found['judgements']['asked']:,}",
        _share(bias["first_position_rate"]),
        _share(bias["flip_rate"]),
    ]


def _labels_row(stage: StageRecord, found: Mapping[str, Any]) -> list[str]:
    split = f"{found['safe']:,} safe, {found['unsafe']:,} unsafe"
    return [
        f"{esc(stage.name)}<small>safety, {esc(found.get('scope', 'response'))}</small>",
        f"{found['answers_judged']:,} answers",
        f"{found['kept']:,}<small>{split}</small>",
        _share(found["kept_share"]),
        f"{found['judgements']['asked']:,}",
        NONE,
        NONE,
    ]


def _share(value: float | None) -> str:
    return NONE if value is None else percent(value)


# -- reward models ---------------------------------------------------------------------------------


def _reward_models(pipeline: Pipeline) -> str:
    rows = []
    for stage in pipeline.of_kind("reward-model"):
        found = pipeline.file(stage.name, "results.json")
        if "accuracy" in found:
            rows.append(_reward_model_row(stage, found))
    if not rows:
        return ""
    head = ("Reward model", "held-out rows", "accuracy", "ROC area", "calibration error")
    return f"""<section><h2>Reward models</h2>
<p class="aside">On judgements they were not trained on. Accuracy: the chosen answer scores higher,
or the label is found; its 95{THIN}% interval is a bootstrap over prompts. Calibration error: mean
distance of the predicted probability from what is observed. “Score and length”: their rank
correlation; reward models are known to pay for length.</p>
{table((*head, "score and length"), rows)}</section>
"""


def _reward_model_row(stage: StageRecord, found: Mapping[str, Any]) -> list[str]:
    area = (found.get("auc") or {}).get("value")
    rank = ((found.get("length") or {}).get("score_correlation") or {}).get("spearman")
    return [
        f"{esc(stage.name)}<small>{esc(found['kind'])}, {esc(found['scope'])}</small>",
        f"{found['rows']:,}",
        estimate_cell(found["accuracy"]),
        NONE if area is None else f"{area:.3f}",
        _share((found.get("calibration") or {}).get("error")),
        NONE if rank is None else f"{rank:+.2f}".replace("-", "−"),
    ]
