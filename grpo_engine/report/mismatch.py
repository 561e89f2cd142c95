"""The section of report.html on the sampler: how far it was from the trainer, and how old its
weights were."""

from __future__ import annotations

from collections.abc import Iterable

from grpo_engine.metrics import ESS_LOW, MISMATCH_KL_HIGH
from grpo_engine.report.charts import NARROW, Line, percent
from grpo_engine.report.record import RunRecord
from grpo_engine.report.sections import card
from grpo_engine.report.words import esc

_POSITIVE = {"floor": 0.0, "size": NARROW}
ENGINES = {"hf": "Hugging Face transformers", "vllm": "vLLM"}


def sampler_charts(record: RunRecord) -> str:
    """Empty for a run that sampled nothing."""
    cards = "".join(_cards(record))
    if not cards:
        return ""
    name = ENGINES.get(record.config.get("generator"), ENGINES["hf"])
    return f"""<section><h2>Sampler against trainer</h2>
<p class="aside">Sampled by {esc(name)}. Both report log-probabilities of the same tokens; with the
same weights they differ by rounding alone. A run warns from a KL of {MISMATCH_KL_HIGH:g} nats per
token, or an effective sample size of tokens below {percent(ESS_LOW)}.</p>
<div class="cards">{cards}</div></section>
"""


def _line(record: RunRecord, key: str, tone: int, label: str = "") -> Line:
    return Line(label or key, record.series(f"sampling/{key}"), tone=tone)


def _cards(record: RunRecord) -> Iterable[str]:
    yield card(
        "KL, sampler to trainer",
        "nats/token",
        [_line(record, "kl", 4)],
        "Estimated from the sampled tokens of each rollout.",
        **_POSITIVE,
    )
    yield card(
        "Gap of log-probabilities",
        "nats",
        [
            _line(record, "logp_difference_mean", 4, "mean of a step"),
            _line(record, "logp_difference_max", 2, "largest of a rollout"),
        ],
        "Absolute values, token by token.",
        **_POSITIVE,
    )
    yield card(
        "Importance ratio",
        "trainer / sampler",
        [
            _line(record, "importance_sampling_ratio_min", 1, "smallest"),
            _line(record, "importance_sampling_ratio_mean", 3, "mean, as corrected"),
            _line(record, "importance_sampling_ratio_max", 2, "largest"),
        ],
        "Of the tokens of a rollout, before is_clip bounds it. The mean, where is_correction is "
        "on, is of the bounded weights in the loss.",
        **_POSITIVE,
    )
    yield card(
        "Effective sample size",
        "share",
        [
            _line(record, "ess_token", 3, "tokens"),
            _line(record, "ess_sequence", 5, "sequences"),
        ],
        "What importance weights of this spread leave of a rollout. That of sequences falls with "
        "their length.",
        **_POSITIVE,
        number=percent,
        ceiling=1.0,
    )
    yield card(
        "Age of the sampler’s weights",
        "updates",
        [_line(record, "staleness", 6)],
        "Optimiser steps between the weights that drew a step’s tokens and those it changes. It "
        "counts up while one rollout is used for several steps, and by as many again where "
        "rollouts are sampled ahead.",
        **_POSITIVE,
    )
