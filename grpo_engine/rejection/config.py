"""The fields of ``grpo-engine sample``. What the paper does not report (samples a prompt and
temperature of rejection sampling, thresholds of the filters) has a default and is marked NR."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from grpo_engine.rewards.format import has_readable_format
from grpo_engine.settings import PromptConfig, SamplerConfig

# Our words for "directly prompting for detailed answers with reflection and verification".
DIRECT_SUFFIX = (
    "Work this out in detail before you answer. Write your reasoning inside <think> </think>: go "
    "step by step, look back at each step and verify it, and when you find a mistake say so and "
    "correct it. After </think>, give a short solution that ends with the final answer in "
    "\\boxed{}, or with the program in one ```python block if one was asked for."
)
SUMMARIES = {
    "en": "The final answer is \\boxed{{answer}}.",
    "zh": "最终答案是 \\boxed{{answer}}。",
}

# How the judge is asked.
JUDGE_SAMPLING = ("judge_temperature", "judge_max_tokens", "judge_attempts")


class GeneratorConfig(BaseModel):
    """One way of sampling answers. A field left null is the run's own field of that name, or what
    the method says: ``r1-zero`` its template and temperature 1.0 (v2 B.3.2), ``direct`` a suffix
    that asks for reflection and verification, ``few-shot`` examples of long reasoning."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    method: Literal["sample", "r1-zero", "few-shot", "direct"] = "sample"
    name: str | None = Field(None, min_length=1)
    model: str | None = None
    prompt_template: Literal["r1-zero", "chat", "none"] | None = None
    system_prompt: str | None = None
    prompt_suffix: str | None = None
    few_shot: list[dict[str, str]] | None = None
    response_prefix: str | None = None
    num_samples: int | None = Field(None, ge=1)
    max_completion_length: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, gt=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)

    @property
    def label(self) -> str:
        return self.name or self.method

    def changes(self) -> dict[str, Any]:
        """The fields of a ``SampleConfig`` that this generator has otherwise."""
        of_method: dict[str, Any] = {}
        if self.method == "r1-zero":
            of_method = {"prompt_template": "r1-zero", "temperature": 1.0}
            of_method |= {"system_prompt": None, "few_shot": []}  # the template has no place
        elif self.method == "direct":
            of_method = {"prompt_suffix": DIRECT_SUFFIX, "few_shot": []}
        own = self.model_dump(exclude={"method", "name"}, exclude_none=True)
        return {**of_method, **own}


class SampleConfig(PromptConfig, SamplerConfig):
    """Everything the data depends on; the resolved copy is saved as ``config.yaml``."""

    stage: ClassVar[str] = "sample"

    # --- prompts --------------------------------------------------------------------------------
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
    solution_column: str = Field("solution", description="column that holds the ground truth")
    dataset_domain: str | None = Field(
        None,
        description="of rows without a column 'domain'; null: code where there are tests, "
        "else math",
    )
    max_prompt_length: int = Field(2048, ge=1, description="in tokens")
    long_prompts: Literal["error", "skip"] = Field(
        "error", description="rows whose prompt exceeds max_prompt_length"
    )

    # --- sampling -------------------------------------------------------------------------------
    num_samples: int = Field(16, ge=1, description='answers a prompt (paper: "multiple", NR)')
    max_completion_length: int = Field(32_768, ge=1, description="in tokens")
    temperature: float = Field(1.0, gt=0, description="cold start: 1.0; rejection sampling: NR")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 = all")
    generators: list[GeneratorConfig] = Field(
        [],
        description="several ways of sampling: method (sample, r1-zero, few-shot, direct), name, "
        "and the fields each has otherwise; none: one, with the fields above",
    )
    seed: int = Field(0, ge=0)
    generation_batch_size: int = Field(
        256, ge=1, description="most sequences decoded at once; samples are saved batch by batch"
    )
    generation_batch_tokens: int = Field(
        1_048_576, ge=1, description="most tokens (prompts + caps) the sampler's cache may hold"
    )

    # --- right or wrong -------------------------------------------------------------------------
    reward_funcs: list[str] = Field(
        ["accuracy"], description="built-in names, module:function, or file.py:function"
    )
    reward_args: dict[str, dict[str, Any]] = Field(
        {}, description="arguments of reward functions, by name"
    )
    reward_domains: dict[str, list[str]] = Field(
        {},
        description="{reward: domains of the rows it applies to}; one that is not named applies to "
        "all rows",
    )
    min_reward: float | dict[str, float] = Field(
        1.0, description="what each reward that applies to the row must reach; or one for each"
    )
    judge: str | None = Field(
        None,
        description="a model that compares answer and reference (v2 Listing 4): module:function, "
        "file.py:function, http(s)://.../v1, or a local model; null: none (no model is the "
        "default: what the judge takes for right is what the next stage learns)",
    )
    judge_options: dict[str, Any] = Field({}, description="of the judge, such as its model name")
    judge_rows: Literal["unscored", "all"] = Field(
        "unscored", description="judge rows to which no reward applies, or every row as well"
    )
    judge_temperature: float = Field(0.0, ge=0, description="NR; 0: greedy")
    judge_max_tokens: int = Field(2048, ge=1, description="of one reply (NR)")
    judge_attempts: int = Field(3, ge=1, description="replies asked for until one can be read")
    reward_workers: int = Field(2, ge=1)
    reward_timeout: float = Field(10.0, gt=0, description="seconds to verify one answer")
    max_reward_error_rate: float = Field(
        0.5, ge=0, le=1, description="share of answers that could not be verified that stops it"
    )

    # --- readable or not ------------------------------------------------------------------------
    answer_format: Literal["readable", "r1-zero", "none"] = Field(
        "readable",
        description="of a sampled answer: <think>...</think> and a summary; R1-Zero's; any",
    )
    min_language_share: float | None = Field(
        0.95,
        ge=0,
        le=1,
        description="words of the prompt's language in the reasoning (NR); null = any",
    )
    max_off_script_characters: int | None = Field(
        None,
        ge=0,
        description="letters of other scripts in the whole answer, which sees a leak of a few "
        "characters in a long one (not in the paper); null = any",
    )
    max_paragraph_words: int | None = Field(
        500, ge=1, description="of the longest paragraph of the reasoning (NR); null = any"
    )
    code_blocks: bool = Field(False, description="whether the reasoning may hold code blocks")
    max_repeated_share: float | None = Field(
        0.5, ge=0, le=1, description="of repeated n-grams in the answer (NR); null = any"
    )
    ngram_size: int = Field(8, ge=1, description="words of such an n-gram (NR)")
    max_duplicate_overlap: float = Field(
        1.0, gt=0, le=1, description="answers to one prompt that overlap more are duplicates (NR)"
    )
    keep: Literal["all", "random", "shortest"] = Field(
        "all", description="which of the good answers to a prompt are kept (NR)"
    )
    max_per_prompt: int | None = Field(None, ge=1, description="how many (NR); not with keep: all")

    # --- rewriting (cold start) -----------------------------------------------------------------
    rewrite: str | None = Field(
        None,
        description="null: keep answers as sampled; template: tidy the reasoning, fill in "
        "summary_template; or a chat model, named as the judge is (v2 Listing 1)",
    )
    rewrite_options: dict[str, Any] = Field({}, description="of the chat model")
    rewrite_reasoning: bool = Field(
        True, description="a chat model refines (and translates) the reasoning as well"
    )
    rewrite_examples: list[dict[str, str]] = Field(
        [],
        description="shown to the chat model: {question, thought_process, and reasoning or summary}"
        ", such as traces that people have rewritten",
    )
    rewrite_temperature: float = Field(0.6, ge=0, description="NR")
    rewrite_max_tokens: int = Field(
        8192, ge=1, description="of one reply (NR); one cut there fails"
    )
    rewrite_batch_size: int = Field(64, ge=1, description="rewritten and saved together")
    readable_format: str = Field(
        "<think>\n{reasoning}\n</think>\n\n{summary}",
        description="how a rewritten answer is laid "
        "out (paper: special tokens around the reasoning, then the summary)",
    )
    summary_template: dict[str, str] = Field(
        SUMMARIES, description="by language of the prompt; {answer}, {question} (rewrite: template)"
    )
    edit_file: str | None = Field(
        None,
        description="JSONL for a person: written where it is not there yet, and the run waits; "
        "read, verified and taken where it is",
    )

    # --- other data -----------------------------------------------------------------------------
    decontaminate: str | None = Field(
        None, description="evaluation data: rows and answers that share words with it are dropped"
    )
    decontaminate_args: dict[str, Any] = Field({})
    decontaminate_split: str | None = None
    decontaminate_words: int = Field(10, ge=5, description="in a row (paper: 10)")
    general_dataset: str | None = Field(
        None, description="rows mixed in as they are: prompt and completion, or messages"
    )
    general_args: dict[str, Any] = Field({})
    general_split: str | None = None
    general_share: float | None = Field(
        None, gt=0, lt=1, description="of the mix (paper: 200k of 800k, 0.25); null: all its rows"
    )

    # --- machine and output ---------------------------------------------------------------------
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 ...")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the weights while sampling"
    )
    output_dir: str = "runs/sample"

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        yield from self._verification_problems()
        yield from self._rewriting_problems()
        if self.keep == "all" and self.max_per_prompt is not None:
            yield f"max_per_prompt={self.max_per_prompt}: has no meaning with keep='all'"
        if self.keep != "all" and self.max_per_prompt is None:
            yield f"keep={self.keep!r}: needs max_per_prompt"
        labels = [generator.label for generator in self.generators]
        if len(set(labels)) != len(labels):
            yield f"generators={labels}: give each a name of its own"
        for generator in self.generators:
            if generator.method == "few-shot" and not (generator.few_shot or self.few_shot):
                yield f"generators: {generator.label!r} needs few_shot examples"
        if self.general_dataset is None:
            for name in ("general_args", "general_split", "general_share"):
                if getattr(self, name):
                    yield f"{name}={getattr(self, name)!r}: has no meaning without general_dataset"

    def _verification_problems(self) -> Iterator[str]:
        if not self.reward_funcs and self.judge is None:
            yield "reward_funcs=[]: without a judge nothing tells right answers from wrong ones"
        if len(set(self.reward_funcs)) != len(self.reward_funcs):
            yield f"reward_funcs={self.reward_funcs}: each once"
        for name in ("reward_args", "reward_domains"):
            for reward in getattr(self, name):
                if reward not in self.reward_funcs:
                    yield f"{name}: {reward!r} is not among reward_funcs {self.reward_funcs}"
        for reward, domains in self.reward_domains.items():
            if not domains:
                yield f"reward_domains: {reward}: []: wanted some domains"
        if self.judge is None and self.judge_rows == "all":
            yield "judge_rows='all': needs a judge"
        for name in JUDGE_SAMPLING if self.judge is None else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                yield f"{name}={getattr(self, name)!r}: has no meaning without a judge"

    def _rewriting_problems(self) -> Iterator[str]:
        for slot in ("{reasoning}", "{summary}"):
            if self.readable_format.count(slot) != 1:
                yield f"readable_format={self.readable_format!r}: must hold {slot} once"
        if self.rewrite == "template" and not self.summary_template:
            yield "summary_template={}: rewrite 'template' needs one"
        shown = self.readable_format.replace("{reasoning}", "r").replace("{summary}", "s")
        if not has_readable_format(shown):
            yield f"readable_format={self.readable_format!r}: wanted <think>, </think>, a summary"
        for language, template in self.summary_template.items():
            if "{answer}" not in template:
                yield f"summary_template={{{language!r}: {template!r}}}: must hold {{answer}}"
        for example in self.rewrite_examples:
            parts = set(example)
            shown = parts - {"question", "thought_process"}
            if len(parts) - len(shown) < 2 or not shown or not shown <= {"reasoning", "summary"}:
                yield (
                    "rewrite_examples: wanted question, thought_process, and reasoning or summary; "
                    f"got {', '.join(sorted(parts)) or 'nothing'}"
                )

    def resolved_generators(self) -> list[tuple[GeneratorConfig, SampleConfig]]:
        """Each generator with the settings that it samples by."""
        found = self.generators or [GeneratorConfig()]
        return [(one, self.model_copy(update=one.changes())) for one in found]
