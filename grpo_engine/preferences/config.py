"""The fields of ``grpo-engine preferences``. NR: the paper does not report it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from grpo_engine.settings import PromptConfig, SamplerConfig

# Judgements and scope where the field is null: v2 3.1, v1 2.3.4.
JUDGEMENTS = {"helpful": 4, "safety": 1}
SCOPES = {"helpful": "summary", "safety": "response"}


class PreferencesConfig(PromptConfig, SamplerConfig):
    """Everything the data depends on; the resolved copy is saved as ``config.yaml``."""

    stage: ClassVar[str] = "preferences"

    kind: Literal["helpful", "safety"] = Field(
        "helpful", description="pairs of which one is better, or answers labelled safe or unsafe"
    )

    # --- answers --------------------------------------------------------------------------------
    dataset: str = Field(
        description="*.jsonl, *.parquet, Hugging Face id or folder, or another source of prompts "
        "(paper: 66,000 pairs from non-reasoning prompts; 106,000 prompts for safety)"
    )
    dataset_args: dict[str, Any] = Field({}, description="arguments of the data source")
    dataset_split: str | None = Field(None, description="split of a Hugging Face dataset")
    dataset_limit: int | None = Field(None, ge=1, description="use only the first rows")
    answer_columns: list[str] = Field(
        [],
        description="columns that hold given answers, texts or lists of texts; none: sample them",
    )
    model: str = Field(
        "miniature",
        description="what answers are sampled from: local folder, Hugging Face id, or 'miniature' "
        "/ 'smollm2-135m-instruct'",
    )
    num_samples: int = Field(4, ge=1, description="answers a prompt (NR)")
    max_prompt_length: int = Field(2048, ge=1, description="in tokens")
    long_prompts: Literal["error", "skip"] = Field(
        "error", description="rows whose prompt exceeds max_prompt_length"
    )
    max_completion_length: int = Field(8192, ge=1, description="in tokens")
    temperature: float = Field(1.0, gt=0, description="NR")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 = all")
    drop_truncated: bool = Field(True, description="leave out answers cut by the cap (NR)")
    generation_batch_size: int = Field(
        256, ge=1, description="most sequences decoded at once; samples are saved batch by batch"
    )
    generation_batch_tokens: int = Field(
        1_048_576, ge=1, description="most tokens (prompts + caps) the sampler's cache may hold"
    )

    # --- judge ----------------------------------------------------------------------------------
    judge: str | None = Field(
        None,
        min_length=1,
        description="the chat model that judges (paper: DeepSeek-V3): http(s)://.../v1, "
        "module:function, file.py:function, or a local model; null: model itself judges, loaded "
        "here (a small one seldom gives a verdict that can be read)",
    )
    judge_options: dict[str, Any] = Field(
        {},
        description="of the judge: model, api_key_env, timeout, max_concurrency, max_retries ...",
    )
    judge_temperature: float = Field(
        0.6, ge=0, description="NR; at 0 judgements of one order may all be the same"
    )
    judge_max_tokens: int = Field(4096, ge=1, description="of one reply (NR)")
    judge_attempts: int = Field(3, ge=1, description="replies asked for until one can be read")
    judge_batch_size: int = Field(64, ge=1, description="pairs or answers judged at a time")
    max_judge_error_rate: float = Field(
        0.1, ge=0, le=1, description="share of judgements without a verdict that stops the run"
    )
    scope: Literal["summary", "response"] | None = Field(
        None,
        description="what the judge sees of an answer; null: the paper's, the summary alone for "
        "helpful and the whole response for safety",
    )
    judgements: int | None = Field(
        None, ge=1, description="of each pair or answer; null: 4 (paper) for helpful, 1 for safety"
    )

    # --- pairs (helpful) ------------------------------------------------------------------------
    answer_order: Literal["balanced", "random"] = Field(
        "balanced",
        description="which answer is shown first: each in half of the judgements, in random "
        "order; or drawn every time (paper: random), which leaves some position bias",
    )
    value_better: float = Field(1.0, gt=0, description="of the verdict [[A>B]] (NR)")
    value_much_better: float = Field(2.0, gt=0, description="of the verdict [[A>>B]] (NR)")
    min_difference: float = Field(
        1.0, ge=0, description="pairs whose mean score is not above it are ties (paper: 1)"
    )
    max_length_ratio: float = Field(
        2.0,
        ge=1,
        description="of the longer to the shorter answer of a pair, in characters within the "
        'scope (paper: "comparable lengths"; NR)',
    )
    max_mean_length_ratio: float | None = Field(
        None,
        ge=1,
        description="of all chosen to all rejected answers, either way: the pairs that tilt it "
        "most are left out until it holds (NR); null: any",
    )
    pairs_per_prompt: int = Field(1, ge=1, description="at most (NR)")

    # --- machine and output ---------------------------------------------------------------------
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 ...")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the weights while sampling"
    )
    seed: int = Field(0, ge=0)
    output_dir: str = "runs/preferences"

    @property
    def resolved_judge(self) -> tuple[str, dict[str, Any]]:
        """The chat model's name and its options."""
        if self.judge is not None:
            return self.judge, self.judge_options
        return self.model, {"device": self.device, "dtype": self.dtype, **self.judge_options}

    @property
    def resolved_scope(self) -> str:
        return self.scope or SCOPES[self.kind]

    @property
    def resolved_judgements(self) -> int:
        return self.judgements or JUDGEMENTS[self.kind]

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if "cache" in self.judge_options:
            yield f"judge_options={self.judge_options}: replies are kept in output_dir, not 'cache'"
        if self.value_much_better < self.value_better:
            yield (
                f"value_much_better={self.value_much_better}: is less than value_better="
                f"{self.value_better}"
            )
        if len(set(self.answer_columns)) != len(self.answer_columns):
            yield f"answer_columns={self.answer_columns}: each once"
        if self.kind == "safety":
            yield from self._pair_fields_given()
            return
        if self.answer_order == "balanced" and self.resolved_judgements % 2:
            yield (
                f"judgements={self.resolved_judgements}: answer_order 'balanced' needs an even "
                "number, as each answer is shown first in half of them"
            )
        if self.min_difference >= self.value_much_better:
            yield (
                f"min_difference={self.min_difference}: no mean score can be above it, the "
                f"highest is value_much_better={self.value_much_better}"
            )
        if not self.answer_columns and self.num_samples < 2:
            yield f"num_samples={self.num_samples}: a pair needs two answers"

    def _pair_fields_given(self) -> Iterator[str]:
        """Fields of pairs that have been set although nothing is paired."""
        for name in (
            *("answer_order", "value_better", "value_much_better", "min_difference"),
            *("max_length_ratio", "max_mean_length_ratio", "pairs_per_prompt"),
        ):
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                yield f"{name}={value!r}: has no meaning with kind='safety'"
