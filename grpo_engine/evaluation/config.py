"""The fields of an evaluation. The defaults are DeepSeek-R1's protocol: temperature 0.6, top-p
0.95, 32,768 tokens, pass@1 as the mean over several samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from grpo_engine.settings import SamplerConfig, build_config


class EvalConfig(SamplerConfig):
    """Everything an evaluation depends on; the resolved copy is saved as ``config.yaml``."""

    stage: ClassVar[str] = "eval"

    # --- what is evaluated ----------------------------------------------------------------------
    model: str = Field(
        "miniature",
        description="local folder, Hugging Face id, or 'miniature' / 'smollm2-135m-instruct'",
    )
    data: str = Field(
        min_length=1,
        description="*.jsonl, *.parquet, Hugging Face id or folder, or reasoning_gym:<task>",
    )
    data_args: dict[str, Any] = Field(
        {}, description="arguments of the data source (reasoning_gym: seed, size, task options)"
    )
    data_split: str | None = Field(None, description="split of a Hugging Face dataset")
    data_limit: int | None = Field(None, ge=1, description="use only the first rows")
    task: Literal["auto", "math", "choice", "code", "reasoning_gym"] = Field(
        "auto", description="kind of the problems; auto: by the columns of the data"
    )
    prompt_column: str | None = Field(
        None, description="column of the question; null: prompt, problem or question"
    )
    solution_column: str | None = Field(
        None, description="column of the right answer; null: answer if there is one, else solution"
    )
    choices_column: str | None = Field(
        None, description="column of the choices (a list of texts); null: choices or options"
    )
    unusable_rows: Literal["error", "skip"] = Field(
        "error", description="rows whose reference answer or tests cannot be judged"
    )
    shuffle_choices: bool = Field(
        True, description="put the choices of each question in an order drawn from the seed"
    )

    # --- prompt ---------------------------------------------------------------------------------
    prompt_template: Literal["r1-zero", "chat", "none"] = Field(
        "chat", description="how a row becomes the model's prompt"
    )
    system_prompt: str | None = Field(None, description="system message (template 'chat')")
    prompt_suffix: str | None = Field(
        None,
        description="text put behind every question; null: the task's own where the template is "
        "'chat' (maths: step by step, answer in a box), '' = none",
    )
    few_shot: list[dict[str, str]] = Field(
        [], description="{prompt, completion} examples shown as earlier turns (template 'chat')"
    )
    response_prefix: str | None = Field(
        None, description="text every answer is made to begin with, such as '<think>'"
    )
    max_prompt_length: int = Field(8192, ge=1, description="in tokens")
    long_prompts: Literal["error", "skip"] = Field(
        "error", description="rows whose prompt exceeds max_prompt_length"
    )

    # --- sampling -------------------------------------------------------------------------------
    num_samples: int = Field(
        16,
        ge=1,
        description="samples a problem (paper: 64 AIME and GPQA, 16 MATH, 8 LiveCodeBench)",
    )
    ks: list[int] | None = Field(
        None, description="the k of pass@k and cons@k; null: powers of two, and num_samples"
    )
    max_completion_length: int = Field(32_768, ge=1, description="in tokens")
    temperature: float = Field(0.6, gt=0)
    top_p: float = Field(0.95, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 = all")
    seed: int = Field(0, ge=0)
    generation_batch_size: int = Field(
        256, ge=1, description="most sequences decoded at once; samples are saved batch by batch"
    )
    generation_batch_tokens: int = Field(
        1_048_576, ge=1, description="most tokens (prompts + caps) the sampler's cache may hold"
    )

    # --- machine and rewards --------------------------------------------------------------------
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 ...")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the weights while sampling"
    )
    reward_workers: int = Field(2, ge=1)
    reward_timeout: float = Field(10.0, gt=0, description="seconds to judge one sample")
    max_reward_error_rate: float = Field(
        0.5, ge=0, le=1, description="share of samples that could not be judged that stops the run"
    )

    # --- output ---------------------------------------------------------------------------------
    check_overlap: str | None = Field(
        None,
        description="training data: counts the problems that share 10 words in a row with it",
    )
    output_dir: str = "runs/eval"

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.ks is None:
            return
        if not self.ks or sorted(set(self.ks)) != self.ks or self.ks[0] < 1:
            yield f"ks={self.ks}: wanted rising whole numbers >= 1"
        elif self.ks[-1] > self.num_samples:
            yield (
                f"ks={self.ks}: {self.ks[-1]} needs as many samples, num_samples is "
                f"{self.num_samples}"
            )

    def resolved_ks(self) -> list[int]:
        """The k that are estimated: ``ks``, or the powers of two and ``num_samples`` itself."""
        if self.ks is not None:
            return self.ks
        powers = [1 << bit for bit in range(self.num_samples.bit_length())]
        return sorted({*powers, self.num_samples})


def build_eval_config(values: dict[str, Any], flags: list[tuple[str, str]] = ()) -> EvalConfig:
    """``values`` (of a YAML file) with ``--field value`` flags laid over them, validated. See
    ``settings.build_config``."""
    return build_config(values, EvalConfig, flags)
