"""The kinds of stages a pipeline can have: their settings, their function, what they leave behind.

Nothing is imported before it is needed, so that a plan is quick and a missing extra of one stage
does not stop the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

from grpo_engine.checkpoint import list_checkpoints
from grpo_engine.metrics import write_atomically
from grpo_engine.pipeline.config import (
    REWARD_MODEL_FIELDS,
    PipelineConfig,
    Reference,
    StageEntry,
    leaves,
    place_of,
    references,
)
from grpo_engine.settings import SamplerConfig, Settings, build_config, config_text, load_yaml
from grpo_engine.types import UserError

# Of every stage: where it puts its files and how it uses the machine, an engine's share of it too.
# They may change without the stage having to run again. A training stage's class adds its own
# (``RESUMABLE_FIELDS``).
NEUTRAL_FIELDS = frozenset({"output_dir", "device"}) | (
    SamplerConfig.model_fields.keys() - {"generator"}
)


@dataclass(frozen=True)
class StageKind:
    """What the pipeline has to know of a verb.

    Args:
        config: ``module:class`` of its settings.
        run: ``module:function``, called as ``run(config, overwrite=..., [resume=...])``; returns
            the exit code.
        trains: it writes checkpoints and takes ``resume``; other stages go on where they stopped
            by themselves.
        checkpoints: what they hold, a ``model`` or a ``reward model``.
        product: the file that a bare reference to the stage means, or several of which its settings
            choose one; () where it trains: then it is its newest checkpoint.
        files: the other files that can be referred to, as glob patterns.
        neutral: fields beside ``NEUTRAL_FIELDS`` that do not change what it makes.
        written: fields that name files which the stage itself may make.
    """

    config: str
    run: str
    trains: bool = False
    checkpoints: str = "model"
    product: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    neutral: frozenset[str] = frozenset()
    written: frozenset[str] = frozenset()

    def config_class(self) -> type[Settings]:
        return _attribute(self.config)

    def function(self) -> Callable[..., int]:
        return _attribute(self.run)

    def neutral_fields(self) -> frozenset[str]:
        cls = self.config_class()
        resumable = getattr(cls, "RESUMABLE_FIELDS", frozenset())
        length = getattr(cls, "LENGTH_FIELDS", frozenset({"max_steps"}))
        return NEUTRAL_FIELDS | self.neutral | (resumable - length)

    def may_refer_to(self, path: str) -> bool:
        """Whether a stage of this kind can have a file ``path``."""
        return not path or any(Path(path).match(pattern) for pattern in self.makes())

    def makes(self) -> tuple[str, ...]:
        """Patterns of everything that can be referred to."""
        trained = ("checkpoint-*", "metrics.jsonl") if self.trains else ()
        return (*self.product, *trained, *self.files)

    def gives(self, path: str) -> str:
        """What a reference with ``path`` leads to: a ``model``, a ``reward model`` or ``data``."""
        checkpoint = not path or Path(path).match("checkpoint-*")
        return self.checkpoints if self.trains and checkpoint else "data"

    def takes(self, wanted: str, found: str) -> bool:
        """Whether ``found`` may stand where ``wanted`` is: training a reward model may also begin
        with one."""
        if wanted == "any model":
            return found != "data"
        if wanted == "file":
            return found == "data"
        begins = (wanted, found) == ("model", "reward model") and self.checkpoints == found
        return found == wanted or begins

    def result(self, folder: Path) -> Path | None:
        """What a bare reference leads to; None while it is not there."""
        if self.trains:
            checkpoints = list_checkpoints(folder)
            return checkpoints[-1] if checkpoints else None
        return next((folder / n for n in self.product if (folder / n).is_file()), None)


def _attribute(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


_BATCHES = frozenset(
    {"generation_batch_size", "generation_batch_tokens", "reward_workers", "max_reward_error_rate"}
)

STAGES: dict[str, StageKind] = {
    "grpo": StageKind(
        "grpo_engine.config:GRPOConfig",
        "grpo_engine.train:train_grpo",
        trains=True,
        files=("completions/*.jsonl",),
    ),
    "sample": StageKind(
        "grpo_engine.rejection.config:SampleConfig",
        "grpo_engine.rejection.run:run_sample",
        product=("data.jsonl",),
        neutral=_BATCHES,
        written=frozenset({"edit_file"}),
    ),
    "sft": StageKind("grpo_engine.sft_config:SFTConfig", "grpo_engine.sft:run_sft", trains=True),
    "distill": StageKind(
        "grpo_engine.sft_config:DistillConfig", "grpo_engine.sft:run_sft", trains=True
    ),
    "preferences": StageKind(
        "grpo_engine.preferences.config:PreferencesConfig",
        "grpo_engine.preferences.run:run_preferences",
        product=("pairs.jsonl", "safety.jsonl"),
        files=("ties.jsonl", "samples.jsonl", "statistics.json"),
        neutral=frozenset(
            {"generation_batch_size", "generation_batch_tokens", "max_judge_error_rate"}
        ),
    ),
    "reward-model": StageKind(
        "grpo_engine.reward_model_config:RewardModelConfig",
        "grpo_engine.reward_model:run_reward_model",
        trains=True,
        checkpoints="reward model",
    ),
    "eval": StageKind(
        "grpo_engine.evaluation.config:EvalConfig",
        "grpo_engine.evaluation.run:run_eval",
        product=("results.json",),
        files=("samples.jsonl",),
        neutral=_BATCHES,
    ),
}


@dataclass(frozen=True)
class Stage:
    """A stage ready to be planned: its settings are valid, its references still text."""

    name: str
    kind_name: str
    kind: StageKind
    config: Settings
    folder: Path

    @property
    def references(self) -> dict[str, Reference]:
        return references(self.config.model_dump(mode="json"))

    def content(self) -> dict[str, Any]:
        """The settings that decide what the stage makes."""
        return self.config.model_dump(mode="json", exclude=set(self.kind.neutral_fields()))


def build(pipeline: PipelineConfig, kinds: dict[str, StageKind]) -> list[Stage]:
    """Every stage with its settings checked, also of stages whose inputs do not exist yet. Raises
    ``UserError`` naming the stage, the field and the value."""
    stages = []
    for number, entry in enumerate(pipeline.stages, start=1):
        kind = kinds[entry.kind]
        folder = pipeline.output_dir / entry.name
        try:
            config = _settings(pipeline, entry, kind, folder)
        except UserError as error:
            place = f"stage {entry.name} ({number} of {len(pipeline.stages)})"
            raise UserError(f"{place}: {error}") from error
        stages.append(Stage(entry.name, entry.kind, kind, config, folder))
    _check_products(stages)
    return stages


def _settings(
    pipeline: PipelineConfig, entry: StageEntry, kind: StageKind, folder: Path
) -> Settings:
    cls = kind.config_class()
    inherited = {name: v for name, v in pipeline.shared.items() if name in cls.model_fields}
    return build_config({**inherited, **entry.fields, "output_dir": str(folder)}, cls)


_WORDS = {
    "model": "a model",
    "any model": "a model",
    "reward model": "a reward model",
    "data": "data",
    "file": "a file",
    "function": "a function",
}


def _check_products(stages: list[Stage]) -> None:
    """A reference must be to something that the other stage's kind makes."""
    of_name = {stage.name: stage for stage in stages}
    for stage in stages:
        for path, reference in stage.references.items():
            source = of_name[reference.stage]
            if not source.kind.may_refer_to(reference.path):
                raise UserError(
                    f"stage {stage.name}: --{path} {reference}: a stage of {source.kind_name} "
                    f"makes {', '.join(source.kind.makes())}"
                )
            found, wanted = source.kind.gives(reference.path), place_of(path)
            if wanted is not None and not stage.kind.takes(wanted, found):
                raise UserError(
                    f"stage {stage.name}: --{path} {reference}: a stage of {source.kind_name} "
                    f"gives {_WORDS[found]} there, wanted {_WORDS[wanted]}"
                )
            if wanted == "reward model" and source.config.kind != REWARD_MODEL_FIELDS[path]:
                raise UserError(
                    f"stage {stage.name}: --{path} {reference}: the stage {source.name} trains a "
                    f"reward model of kind {source.config.kind!r}"
                )


def check_models(stages: list[Stage]) -> None:
    """``UserError`` for a folder from outside the pipeline that holds another kind of model than
    its field is for. One that is not there is left to ``freshness.missing_files``."""
    from grpo_engine.models.load import is_classifier
    from grpo_engine.rewards.model import ScoreCard, saved_folder

    for stage in stages:
        for name, value in leaves(stage.content()):
            wanted = place_of(name)
            if name in stage.references or not isinstance(value, str):
                continue
            where, path = f"stage {stage.name}: --{name} {value}", Path(value).expanduser()
            if wanted == "model" and not stage.kind.takes(wanted, "reward model"):
                if is_classifier(path):
                    raise UserError(f"{where}: holds a reward model, wanted a model")
            elif wanted == "reward model" and path.is_dir():
                try:
                    kind = ScoreCard.read(saved_folder(path)).kind
                except UserError as error:
                    raise UserError(f"{where}: {error}") from error
                if kind != REWARD_MODEL_FIELDS[name]:
                    raise UserError(f"{where}: is a reward model of kind {kind!r}")


def referenced_path(source: Stage, reference: Reference) -> Path | None:
    """Where the reference leads; None while the stage has no result."""
    if reference.path:
        return source.folder / reference.path
    return source.kind.result(source.folder)


def resolved_config(stage: Stage, of_name: dict[str, Stage]) -> Settings:
    """The settings with every reference replaced by the path it leads to."""

    def replace(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {k: replace(v, f"{path}.{k}" if path else str(k)) for k, v in value.items()}
        if isinstance(value, list):
            return [replace(v, f"{path}.{n}" if path else str(n)) for n, v in enumerate(value)]
        if path not in found:
            return value
        target = referenced_path(of_name[found[path].stage], found[path])
        if target is None:
            raise UserError(f"stage {stage.name}: --{path} {found[path]}: has no result")
        return str(target)

    found = stage.references
    values = replace(stage.config.model_dump(mode="json"), "")
    return build_config(values, type(stage.config))


def _note_where_inputs_are(stage: Stage, config: Settings) -> None:
    """Before a run is continued that began when the pipeline lay, or was called, elsewhere: a run
    goes on only with the settings in its config.yaml, and paths are among them. That the inputs are
    the same was decided by their content."""
    now = config.model_dump(mode="json")
    places = {path.partition(".")[0] for path, _ in leaves(now) if place_of(path) is not None}
    path = stage.folder / "config.yaml"
    before = load_yaml(str(path)) if path.is_file() else now  # without it the stage itself says so
    if any(before.get(name) != now[name] for name in places):
        moved = build_config(before | {name: now[name] for name in places}, type(config))
        write_atomically(path, config_text(moved))


def validate_stage(stage: Stage, config: Settings) -> None:
    """The stage's own dry run, without its words: it loads and checks everything, raises
    ``UserError`` for what it would refuse, and leaves its folder as it is."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        stage.kind.function()(config, overwrite=True, dry_run=True)


def run_stage(stage: Stage, config: Settings, *, overwrite: bool, label: str) -> int:
    """Call the stage's function. A training stage goes on from its newest checkpoint if it has one
    and begins anew otherwise; another one goes on by itself."""
    function = stage.kind.function()
    options: dict[str, Any] = {"overwrite": overwrite}
    if stage.kind.trains:
        resumable = not overwrite and bool(list_checkpoints(stage.folder))
        options["resume"] = str(stage.folder) if resumable else None
        if resumable:
            _note_where_inputs_are(stage, config)
        # what lies there without a checkpoint is a run killed before its first save
        options["overwrite"] = not resumable
    if "recipe" in inspect.signature(function).parameters:
        options["recipe"] = label
    return function(config, **options)
