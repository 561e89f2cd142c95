"""What a pipeline left in its folder, as its report needs it: the models by the paper's names, the
RL stages with their curves, the evaluations, and the statistics of the data stages.

A stage that has not run, or not got that far, is simply not there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from grpo_engine import lineage
from grpo_engine.lineage import PipelineRecord, StageRecord
from grpo_engine.metrics import read_jsonl
from grpo_engine.report.record import Estimate, RunRecord, load_run
from grpo_engine.report.reflection import Moment, find_moment, words_by_step
from grpo_engine.rewards.format import has_r1_format, has_readable_format
from grpo_engine.rewards.language import language_consistency_reward
from grpo_engine.types import UserError

# What the paper calls the model that comes out of a stage (v2, figure 2 and table 3).
PAPER_NAMES = {
    "r1-zero": "R1-Zero",
    "cold-start-sft": "Dev1",
    "reasoning-rl": "Dev2",
    "r1-sft": "Dev3",
    "all-scenario-rl": "R1",
    "distill": "Student, distilled",
    "student-rl": "Student, RL alone",
}
TRAINING = ("grpo", "sft", "distill", "reward-model")
DATA_FIELDS = ("data", "data_args", "data_split", "data_limit", "task")
MOST_MEASURED = 1024  # answers of an evaluation whose language and format are looked at


@dataclass
class RLStage:
    """A stage of kind ``grpo``. The answers it kept are read once and only their figures stay."""

    name: str
    label: str
    tone: int
    run: RunRecord
    accuracy: list[Estimate]
    words: dict[int, tuple[int, Counter[str]]]
    moment: Moment | None

    def weight(self, reward: str) -> float | None:
        """Of a reward function in the sum; None for one the stage does not have."""
        names = self.run.config.get("reward_funcs") or []
        weights = self.run.config.get("reward_weights") or [1.0] * len(names)
        return dict(zip(names, weights, strict=False)).get(reward)


@dataclass
class Evaluation:
    """A finished stage of kind ``eval``. ``model`` is the key of what it evaluated; ``language``,
    ``zero_format`` and ``readable`` are measured here, over at most MOST_MEASURED answers, evenly
    spread."""

    name: str
    model: str
    results: dict[str, Any]
    folder: Path
    language: float | None = None
    zero_format: float | None = None
    readable: float | None = None

    @property
    def problems(self) -> str:
        """Which problems: evaluations of the same ones are compared."""
        config = self.results.get("config", {})
        return json.dumps([config.get(name) for name in DATA_FIELDS], sort_keys=True)

    def samples(self) -> list[dict[str, Any]]:
        path = self.folder / "samples.jsonl"
        return read_jsonl(path) if path.is_file() else []


@dataclass
class Pipeline:
    """``models``: key -> name, in the order of the report's columns. The key of a stage's product
    is the stage, of another checkpoint its path, of a model from outside its name."""

    record: PipelineRecord
    models: dict[str, str] = field(default_factory=dict)
    rl: list[RLStage] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    runs: dict[str, RunRecord] = field(default_factory=dict)
    gaps: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.record.folder

    def of_kind(self, *kinds: str) -> list[StageRecord]:
        return [stage for stage in self.record.ran() if stage.kind in kinds]

    def label(self, stage: str) -> str:
        return PAPER_NAMES.get(stage, stage)

    def file(self, stage: str, name: str) -> dict[str, Any]:
        """A JSON file of a stage; {} where it is not there."""
        path = self.folder / stage / name
        if not path.is_file():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from None
        if not isinstance(found, dict):
            raise UserError(f"{path}: must hold a mapping, found {type(found).__name__}")
        return found

    def origin(self, stage: StageRecord) -> str:
        """The key of the model that a stage starts from or evaluates."""
        used = stage.inputs.get("model")
        if used is None or used.stage is None:
            return str(stage.settings.get("model", ""))
        product = self.record.product_of(used.stage)
        made = f"{used.stage}/{product.name}" if product is not None else used.path
        return used.stage if used.path == made else used.path

    @cached_property
    def base(self) -> str | None:
        """The model from outside that the first RL stage starts from."""
        for stage in self.of_kind("grpo"):
            origin = self.origin(stage)
            if origin and origin not in self.record.stages:
                return origin
        return None

    @cached_property
    def students(self) -> set[str]:
        """The keys of the models that are distilled, of those that are not yet, and of those that
        are trained by RL from the same start."""
        starts = {self.origin(stage) for stage in self.of_kind("distill")} - {self.base}
        trained = {
            stage.name for stage in self.of_kind("grpo", "distill") if self.origin(stage) in starts
        }
        return starts | trained | {stage.name for stage in self.of_kind("distill")}

    def problem_sets(self) -> list[list[Evaluation]]:
        """The evaluations by the problems they share, each in the order of ``models``."""
        sets: dict[str, list[Evaluation]] = {}
        for one in self.evaluations:
            sets.setdefault(one.problems, []).append(one)
        order = list(self.models)
        return [sorted(some, key=lambda one: order.index(one.model)) for some in sets.values()]


def holds_pipeline(folder: str | Path) -> bool:
    """Whether ``folder`` is that of a pipeline, by its manifest; a damaged one is none."""
    try:
        return lineage.read_values(Path(folder)) is not None
    except UserError:
        return False


def load_pipeline(folder: str | Path) -> Pipeline:
    """Read a pipeline's folder. Raises UserError when there is none or a file is damaged."""
    pipeline = Pipeline(lineage.read(folder))
    for stage in pipeline.of_kind(*TRAINING):
        if not pipeline.record.folder_of(stage.name).is_dir():
            pipeline.gaps.append(f"The folder of the stage {stage.name} is gone.")
            continue
        run = pipeline.runs[stage.name] = load_run(pipeline.record.folder_of(stage.name))
        if stage.kind == "grpo" and run.rows:
            pipeline.rl.append(_rl_stage(pipeline, stage, run))
        run.evals, run.samples = {}, {}  # of a real run, gigabytes
    pipeline.evaluations = list(_evaluations(pipeline))
    _measure_all(pipeline.evaluations)
    pipeline.models = _models(pipeline)
    return pipeline


def _rl_stage(pipeline: Pipeline, stage: StageRecord, run: RunRecord) -> RLStage:
    return RLStage(
        name=stage.name,
        label=pipeline.label(stage.name),
        tone=1 + len(pipeline.rl) % 6,
        run=run,
        accuracy=run.accuracy(),
        words=words_by_step(run.samples or run.evals),
        moment=find_moment(run.evals, run.samples),
    )


def _evaluations(pipeline: Pipeline) -> Iterator[Evaluation]:
    for stage in pipeline.of_kind("eval"):
        results = pipeline.file(stage.name, "results.json")
        if "pass@1" not in results:
            continue
        folder = pipeline.record.folder_of(stage.name)
        yield Evaluation(stage.name, pipeline.origin(stage), results, folder)


def _measure_all(evaluations: Sequence[Evaluation]) -> None:
    """What the results files do not say of the answers. The question is kept beside the first
    sample of a problem; one evaluation that has it serves all of the same problems."""
    asked: dict[str, dict[int, str]] = {}
    for one in evaluations:
        questions = asked.setdefault(one.problems, {})
        for sample in one.samples():
            if isinstance(sample.get("prompt"), str):
                questions[sample["row"]] = sample["prompt"]
    for one in evaluations:
        _measure(one, asked[one.problems])


def _measure(found: Evaluation, asked: Mapping[int, str]) -> None:
    samples = found.samples()
    samples = samples[:: -(-len(samples) // MOST_MEASURED) or 1]
    if not samples:
        return
    opened = found.results.get("inputs", {}).get("judge", {}).get("thinking_prefilled", False)
    texts = [str(sample.get("completion", "")) for sample in samples]
    found.zero_format = fmean(has_r1_format(text, thinking_prefilled=opened) for text in texts)
    found.readable = fmean(has_readable_format(text, thinking_prefilled=opened) for text in texts)
    known = [(t, asked[s["row"]]) for t, s in zip(texts, samples, strict=True) if s["row"] in asked]
    if known:
        answers, questions = zip(*known, strict=True)
        shares = [x for x in language_consistency_reward(answers, questions) if x is not None]
        found.language = fmean(shares) if shares else None


def _models(pipeline: Pipeline) -> dict[str, str]:
    """Every model that was evaluated: from outside first, then by stage, students last."""
    stages = list(pipeline.record.stages)
    keys = list(dict.fromkeys(one.model for one in pipeline.evaluations))

    def place(key: str) -> tuple[bool, int]:
        stage = key.partition("/")[0]
        return key in pipeline.students, stages.index(stage) if stage in stages else -1

    return {key: _model_name(pipeline, key) for key in sorted(keys, key=place)}


def _model_name(pipeline: Pipeline, key: str) -> str:
    if key == pipeline.base:
        return "Base"
    stage, _, checkpoint = key.partition("/")
    if stage in pipeline.record.stages:
        return pipeline.label(stage) + (f", {checkpoint}" if checkpoint else "")
    return "Student, before" if key in pipeline.students else key


def value_of(estimate: Mapping[str, Any] | None) -> float | None:
    return None if estimate is None else estimate.get("value")


def largest_k(results: Mapping[str, Any], family: str) -> int | None:
    """The largest k of ``pass@k`` or ``cons@k``; None where there is none above 1."""
    found: Sequence[int] = [int(k) for k in results.get(family) or {}]
    return max((k for k in found if k > 1), default=None)
