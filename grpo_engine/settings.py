"""What the configurations of all stages share: the fields of a training run, and how values come
from a recipe or YAML file and from flags.

Names follow TRL where TRL has one. A wrong field or value raises ``UserError`` with one line that
names the field and the value. A leaf of the engine: imports only ``types``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from grpo_engine.types import UserError


class Settings(BaseModel):
    """The fields of one stage; the resolved copy is saved as ``config.yaml``.

    ``stage`` is the verb of the command line that the fields belong to. ``_problems`` yields what
    contradicts what, one sentence each.
    """

    model_config = ConfigDict(
        extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )
    stage: ClassVar[str]

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        yield from ()

    @classmethod
    def help_text(cls) -> str:
        """One line a field: flag, default, meaning."""
        lines = []
        for name, field in cls.model_fields.items():
            default = "required" if field.is_required() else repr(field.get_default())
            note = f"  {field.description}" if field.description else ""
            lines.append(f"  --{name} ({default}){note}")
        return "\n".join(lines)


class TrainConfig(Settings):
    """What every training stage has: model, rows, optimiser, machine and folder."""

    # --- what to train on -----------------------------------------------------------------------
    model: str = Field(
        "miniature",
        description="local folder, Hugging Face id, or 'miniature' / 'smollm2-135m-instruct'",
    )
    dataset: str = Field(
        description="*.jsonl, *.parquet, Hugging Face id or folder, or reasoning_gym:<task>"
    )
    dataset_args: dict[str, Any] = Field(
        {}, description="arguments of the data source (reasoning_gym: seed, size, task options)"
    )
    dataset_split: str | None = Field(None, description="split of a Hugging Face dataset")
    dataset_limit: int | None = Field(None, ge=1, description="use only the first rows")

    # --- optimiser ------------------------------------------------------------------------------
    max_tokens_per_microbatch: int = Field(
        40960, ge=1, description="packed tokens per forward pass"
    )
    learning_rate: float = Field(3e-6, gt=0)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    min_learning_rate: float = Field(0.0, ge=0, description="end of the linear / cosine schedule")
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)

    # --- LoRA (needs peft) ----------------------------------------------------------------------
    lora_r: int | None = Field(
        None, ge=1, description="rank of an adapter trained in place of the weights; null = none"
    )
    lora_alpha: int | None = Field(
        None, ge=1, description="the adapter counts lora_alpha / lora_r; default 2 x lora_r"
    )
    lora_target_modules: str | list[str] = Field(
        "all-linear", description="layers with an adapter: all-linear (but the head), or names"
    )

    # --- machine --------------------------------------------------------------------------------
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 ...")
    bf16: bool = Field(False, description="bf16 autocast over fp32 weights")
    attention: Literal["auto", "torch", "flash-attn", "buckets"] = Field(
        "auto",
        description="packed attention: torch varlen or flash-attn on CUDA, length buckets on CPU",
    )
    gradient_checkpointing: bool = False

    # --- the run's folder -----------------------------------------------------------------------
    output_dir: str = Field(description="the run's folder")
    seed: int = Field(0, ge=0)
    save_steps: int = Field(100, ge=1)
    save_total_limit: int = Field(2, ge=1)
    eval_dataset: str | None = Field(None, description="held-out rows; null = no evaluation")
    eval_dataset_args: dict[str, Any] = Field({})
    eval_dataset_split: str | None = None
    eval_limit: int | None = Field(200, ge=1)
    eval_steps: int = Field(50, ge=1)

    # Fields that may change between a run and its continuation; another change would be another
    # run. Those of LENGTH_FIELDS may not where ``length_is_fixed``.
    RESUMABLE_FIELDS: ClassVar[frozenset[str]] = frozenset(
        {
            *("output_dir", "save_steps", "save_total_limit", "eval_steps"),
            *("max_steps", "max_tokens_per_microbatch", "device"),
        }
    )
    LENGTH_FIELDS: ClassVar[frozenset[str]] = frozenset({"max_steps"})

    @property
    def length_is_fixed(self) -> bool:
        """Whether something in the run is counted from its end, so that LENGTH_FIELDS stay."""
        return self.lr_scheduler_type != "constant"

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.lora_r is None:
            for name in ("lora_alpha", "lora_target_modules"):
                value = getattr(self, name)
                if value != type(self).model_fields[name].default:
                    yield f"{name}={value!r}: has no meaning without lora_r"
        if self.lr_scheduler_type == "constant" and self.min_learning_rate:
            yield (
                f"min_learning_rate={self.min_learning_rate}: has no meaning with "
                "lr_scheduler_type='constant'"
            )
        if (self.min_learning_rate or 0.0) > self.learning_rate:
            yield (
                f"min_learning_rate={self.min_learning_rate}: is above "
                f"learning_rate={self.learning_rate}"
            )


class PromptConfig(Settings):
    """How a row's prompt becomes the text that the model sees (``templates.render_prompt``)."""

    prompt_column: str = Field(
        "prompt", description="column that holds the prompt (text or messages)"
    )
    prompt_template: Literal["r1-zero", "chat", "none"] = Field(
        "r1-zero", description="how a row becomes the model's prompt"
    )
    system_prompt: str | None = Field(None, description="system message (template 'chat')")
    prompt_suffix: str | None = Field(
        None, description="text put behind every question (template 'chat')"
    )
    few_shot: list[dict[str, str]] = Field(
        [], description="{prompt, completion} examples shown as earlier turns (template 'chat')"
    )
    response_prefix: str | None = Field(
        None, description="text every answer is made to begin with, such as '<think>'"
    )


class SamplerConfig(Settings):
    """What draws the tokens (``generation.build``). All of it may change when a run is continued:
    the distribution stays, the tokens that a seed stands for do not."""

    generator: Literal["hf", "vllm"] = Field(
        "hf", description="hf: transformers, with the policy's own weights; vllm: an engine beside"
    )
    vllm_mode: Literal["colocate", "server"] = Field(
        "colocate", description="an engine that the run starts, or your own `vllm serve`"
    )
    vllm_server_base_url: str | None = Field(
        None, description="of the server, such as http://localhost:8000"
    )
    vllm_server_timeout: float = Field(
        240.0, gt=0, description="seconds to wait for the server to answer at the start"
    )
    vllm_start_timeout: float = Field(
        900.0, gt=0, description="seconds that the engine may take to start (colocate)"
    )
    vllm_gpu_memory_utilization: float = Field(
        0.3, gt=0, le=1, description="share of a GPU's memory for the engine (colocate)"
    )
    vllm_tensor_parallel_size: int = Field(1, ge=1, description="GPUs of the engine (colocate)")
    vllm_max_model_length: int | None = Field(
        None, ge=1, description="most tokens of a sequence (colocate); null = what the run needs"
    )
    vllm_enable_sleep_mode: bool = Field(
        False, description="give the engine's device memory back while the policy is trained"
    )
    generation_timeout: float = Field(
        600.0,
        gt=0,
        description="seconds without any progress after which the engine counts as dead",
    )

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        yield from self._engine_problems()

    def _engine_problems(self) -> Iterator[str]:
        server = ("vllm_server_base_url", "vllm_server_timeout")
        ours = ("start_timeout", "gpu_memory_utilization", "tensor_parallel_size")
        colocate = [f"vllm_{name}" for name in (*ours, "max_model_length")]
        if self.generator == "hf":
            without = "generator 'vllm'"
            names = [*SamplerConfig.model_fields]
        elif self.vllm_mode == "server":
            without, names = "vllm_mode 'colocate'", colocate
            if self.vllm_server_base_url is None:
                yield "vllm_mode='server': needs --vllm_server_base_url"
        else:
            without, names = "vllm_mode 'server'", server
        for name in names:
            value = getattr(self, name)
            if name != "generator" and value != SamplerConfig.model_fields[name].default:
                yield f"{name}={value!r}: has no meaning without {without}"


StageConfig = TypeVar("StageConfig", bound=Settings)


# -- recipes and files -----------------------------------------------------------------------------


def recipe_names(stage: str | None = None) -> list[str]:
    """The recipes in the package, or those of one stage."""
    folder = resources.files("grpo_engine") / "recipes"
    names = sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )
    return [name for name in names if stage is None or load_recipe(name).get("stage") == stage]


def load_recipe(name: str, stage: str | None = None) -> dict[str, Any]:
    """The fields of a recipe, its ``stage`` among them. UserError if that is not ``stage``."""
    path = resources.files("grpo_engine") / "recipes" / f"{name}.yaml"
    if not path.is_file():
        known = recipe_names(stage) or recipe_names()
        raise UserError(f"--recipe {name}: no such recipe; there are {', '.join(known)}")
    values = _parse_yaml(path.read_text(encoding="utf-8"), f"recipe {name}")
    if stage not in (None, values.get("stage")):
        raise UserError(
            f"--recipe {name}: is a recipe of grpo-engine {values.get('stage')}, not of {stage}"
        )
    return values


def load_yaml(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({error})") from error
    return _parse_yaml(text, f"--config {path}")


class _EachOnce(yaml.SafeLoader):
    """YAML's own rule, which PyYAML leaves out: a field that stands twice in one mapping is a
    mistake, whose first value would be lost without a word. What ``<<`` brings in may be
    overridden as ever: it is not in the mapping yet."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        seen = set()
        for key in keys:
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(
                    None, None, f"{key.value} stands there twice", key.start_mark
                )
            seen.add((key.tag, key.value))
        return node


def _parse_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, Loader=_EachOnce)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{where}: must hold 'field: value' lines, found {type(values).__name__}")
    return values


# -- flags and validation --------------------------------------------------------------------------


def apply_overrides(
    values: dict[str, Any], overrides: Sequence[tuple[str, str]], cls: type[Settings]
) -> dict[str, Any]:
    """Lay ``--field value`` pairs over ``values``; ``a.b`` reaches into a mapping; values are
    YAML, but for those of the text fields of ``cls``."""
    merged = dict(values)
    for name, text in overrides:
        try:
            value = text if _is_text(name, cls) and text != "null" else yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(
                f"--{name} {text}: not a valid value ({' '.join(str(error).split())})"
            ) from error
        head, _, rest = name.partition(".")
        if rest:
            inner = merged.get(head) or {}
            if not isinstance(inner, dict):
                raise UserError(
                    f"--{name} {text}: {head} is {inner!r}, which has no field {rest!r}"
                )
            merged[head] = {**inner, rest: value}
        else:
            merged[head] = value
    return merged


def _is_text(name: str, cls: type[Settings]) -> bool:
    """Whether the field holds text, which YAML would turn into a date or a number."""
    field = cls.model_fields.get(name)
    return field is not None and field.annotation in (str, str | None)


def build_config(
    values: dict[str, Any], cls: type[StageConfig], overrides: Sequence[tuple[str, str]] = ()
) -> StageConfig:
    """``cls`` with ``values`` and the flags laid over them; every problem becomes one ``UserError``
    line naming field and value. A ``stage`` among the values must be that of ``cls``."""
    values = apply_overrides(values, overrides, cls)
    stage = values.pop("stage", cls.stage)
    if stage != cls.stage:
        raise UserError(
            f"stage {stage!r}: these are settings of grpo-engine {stage}, not of {cls.stage}"
        )
    fields = cls.model_fields
    for name in values:
        if not isinstance(name, str):
            raise UserError(f"{name!r}: {values[name]!r:.60}: not the name of a field")
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"--{name} {values[name]!r}: unknown field{hint}")
    try:
        return cls(**values)
    except ValidationError as error:
        raise UserError(_first_problem(error, cls)) from error


def _first_problem(error: ValidationError, cls: type[Settings]) -> str:
    first, *others = error.errors()
    field = str(first["loc"][0]) if first["loc"] else ""
    if len(first["loc"]) > 2 and isinstance(first["loc"][1], int):  # within a list of mappings
        field += f"[{first['loc'][1]}].{first['loc'][2]}"
    if first["type"] == "missing" and field in cls.model_fields:
        line = f"--{field}: needs a value ({cls.model_fields[field].description})"
    else:
        message = first["msg"].removeprefix("Value error, ")
        line = f"--{field} {first['input']!r}: {message}" if field else message
    return line + (f" (and {len(others)} more)" if others else "")


def config_text(config: Settings) -> str:
    """The resolved configuration as YAML; ``build_config`` reads it back the same."""
    values = {"stage": config.stage, **config.model_dump(mode="json")}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
