"""The fields of supervised fine-tuning and of distillation, which is the same loop. A leaf.

The defaults are the paper's (arXiv 2501.12948v2, appendices B.4.2 and B.4.3). It does not report
optimiser, warm-up, weight decay, packing or the loss mask: those are the fields' defaults.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from grpo_engine.settings import PromptConfig, TrainConfig


class SFTConfig(PromptConfig, TrainConfig):
    """Everything a fine-tuning run depends on; the resolved copy is saved as ``config.yaml``."""

    stage: ClassVar[str] = "sft"
    output_dir: str = Field("runs/sft", description="the run's folder")

    # --- what to train on -----------------------------------------------------------------------
    dataset: str = Field(
        description="*.jsonl, *.parquet, Hugging Face id or folder; rows with prompt and "
        "completion, or with messages"
    )
    prompt_template: Literal["r1-zero", "chat", "none"] = Field(
        "chat", description="how a prompt, or messages ('chat'), become the model's text"
    )
    completion_column: str = Field("completion", description="column that holds the answer (text)")
    messages_column: str = Field(
        "messages",
        description="column that holds a whole conversation, in place of prompt and "
        "completion; its assistant turns are learned",
    )
    chat_template: str | None = Field(
        None, description="Jinja file put in place of the tokenizer's chat template, and saved"
    )
    eos_token: str | None = Field(
        None, description="token put behind a completion; null = the tokenizer's own"
    )
    completion_only_loss: bool = Field(
        True, description="learn the completions only, not the prompts (the paper does not say)"
    )
    max_length: int = Field(32_768, ge=2, description="tokens of a row (paper: 32,768)")
    long_rows: Literal["error", "skip", "truncate"] = Field(
        "error", description="rows longer than max_length"
    )
    max_position_embeddings: int | None = Field(
        None, ge=1, description="positions written into the model's configuration; null = its own"
    )

    # --- update ---------------------------------------------------------------------------------
    num_train_epochs: float = Field(
        2.0, gt=0, description="passes over the rows (paper: 2, in version 2 '2-3')"
    )
    max_steps: int | None = Field(
        None, ge=1, description="optimiser steps, in place of num_train_epochs"
    )
    sequences_per_step: int = Field(128, ge=1, description="rows of one step (paper: 128)")
    learning_rate: float = Field(5e-5, gt=0, description="(paper: 5e-5)")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="(paper: cosine)"
    )
    min_learning_rate: float | None = Field(
        None,
        ge=0,
        description="end of the linear / cosine schedule; null = a tenth of learning_rate (paper)",
    )

    LENGTH_FIELDS: ClassVar[frozenset[str]] = frozenset({"max_steps", "num_train_epochs"})
    RESUMABLE_FIELDS: ClassVar[frozenset[str]] = TrainConfig.RESUMABLE_FIELDS | LENGTH_FIELDS

    @model_validator(mode="after")
    def _resolve_min_learning_rate(self) -> SFTConfig:
        if self.min_learning_rate is None:
            falls = self.lr_scheduler_type != "constant"
            self.min_learning_rate = self.learning_rate / 10 if falls else 0.0
        return self

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.max_length > self.max_tokens_per_microbatch:
            yield (
                f"max_tokens_per_microbatch={self.max_tokens_per_microbatch}: one row may have "
                f"{self.max_length} tokens (max_length)"
            )


class DistillConfig(SFTConfig):
    """Fine-tuning a student on a teacher's answers: Table 6 gives each student's learning rate (see
    the recipes), appendix B.4.3 the rest."""

    stage: ClassVar[str] = "distill"
    output_dir: str = Field("runs/distill", description="the run's folder")
    sequences_per_step: int = Field(64, ge=1, description="rows of one step (paper: 64)")
    learning_rate: float = Field(
        1e-4, gt=0, description="(paper: 1e-4 for 1.5B down to 2e-5 for 70B)"
    )
