"""The fields of a reward model's training. The defaults are the paper's (DeepSeek-R1 v2, 3.1): 256
rows a step, learning rate 6e-6, one epoch, sequences of at most 8,192 tokens. A leaf: imports
``settings`` only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from grpo_engine.settings import TrainConfig

SCOPE_OF = {"helpful": "summary", "safety": "response"}  # v1, 2.3.4
SCALE_OF = {"helpful": "standardised", "safety": "probability"}


class RewardModelConfig(TrainConfig):
    """Everything a reward model depends on; the resolved copy is saved as ``config.yaml``."""

    stage: ClassVar[str] = "reward-model"

    # --- what is learned ------------------------------------------------------------------------
    kind: Literal["helpful", "safety"] = Field(
        description="helpful: rows with prompt, chosen, rejected; safety: rows with prompt, "
        "completion, label (1 safe, 0 unsafe)"
    )
    scope: Literal["summary", "response"] | None = Field(
        None,
        description="what is judged: the summary after the last </think>, or the whole response; "
        "null: summary for helpful, response for safety (paper)",
    )
    prompt_column: str = Field(
        "prompt", description="column that holds the prompt (text or messages)"
    )
    prompt_template: Literal["r1-zero", "chat", "none"] = Field(
        "chat", description="how a row becomes what the reward model reads, before the answer"
    )
    system_prompt: str | None = Field(None, description="system message (template 'chat')")
    prompt_suffix: str | None = Field(
        None, description="text put behind every question (template 'chat')"
    )
    pad_token: str | None = Field(
        None,
        description="token of the vocabulary to pad with, other than end-of-sequence; null: the "
        "tokenizer's own, or one that is known to be unused",
    )
    max_length: int = Field(
        8192, ge=2, description="tokens of prompt and answer in training (paper); none in scoring"
    )
    long_rows: Literal["error", "skip"] = Field(
        "error", description="rows with a sequence of more than max_length tokens"
    )
    unusable_rows: Literal["error", "skip"] = Field(
        "error", description="pairs whose answers are the same within the scope"
    )

    # --- loss (the paper prints no formula: "pairwise", "point-wise") ----------------------------
    margin: float = Field(
        0.0,
        ge=0,
        description="helpful: -log sigmoid(chosen - rejected - margin), Bradley-Terry at 0",
    )
    center_rewards_coefficient: float = Field(
        0.0, ge=0, description="helpful: times (chosen + rejected)^2, pulls the scores' mean to 0"
    )

    # --- update ---------------------------------------------------------------------------------
    batch_size: int = Field(
        256, ge=1, description="rows (pairs, or answers) an optimiser step (paper: 256)"
    )
    num_train_epochs: int = Field(1, ge=1, description="passes over the rows (paper: 1)")
    max_steps: int | None = Field(
        None, ge=1, description="stop after this many steps; null: at the end of the epochs"
    )
    learning_rate: float = Field(6e-6, gt=0)

    lora_r: int | None = Field(
        None, ge=1, description="not for reward models, which train all their weights"
    )

    # --- the saved model's scores (their scale in RL is not reported) -----------------------------
    score_scale: Literal["raw", "standardised", "probability"] | None = Field(
        None,
        description="of the scores in RL: the head's output, that minus mean over std of training "
        "scores, or its logistic; null: standardised for helpful, probability for safety",
    )
    score_stats_rows: int = Field(
        512, ge=1, description="training rows scored at each save for that mean and std"
    )
    empty_summary: Literal["lowest", "scored"] = Field(
        "lowest",
        description="scope summary: an answer without one gets the lowest training score, or is "
        "scored as the empty text",
    )

    # --- evaluation and folder ------------------------------------------------------------------
    eval_dataset: str | None = Field(
        None, description="held-out rows; null: eval_share of the prompts"
    )
    eval_share: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="share of the prompts held out for evaluation where there is no eval_dataset",
    )
    eval_limit: int | None = Field(None, ge=1)
    calibration_bins: int = Field(10, ge=2, description="intervals of the reliability table")
    output_dir: str = "runs/reward-model"

    LENGTH_FIELDS: ClassVar[frozenset[str]] = frozenset({"max_steps", "num_train_epochs"})
    RESUMABLE_FIELDS: ClassVar[frozenset[str]] = TrainConfig.RESUMABLE_FIELDS | LENGTH_FIELDS

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.lora_r is not None:
            yield f"lora_r={self.lora_r}: a reward model trains all its weights, the head is new"
        longest = self.max_length * (2 if self.kind == "helpful" else 1)
        if longest > self.max_tokens_per_microbatch:
            yield (
                f"max_tokens_per_microbatch={self.max_tokens_per_microbatch}: one row may have "
                f"{longest} tokens (max_length {self.max_length}; both answers of a pair go "
                "through together)"
            )
        for name in ("margin", "center_rewards_coefficient"):
            if self.kind == "safety" and getattr(self, name):
                yield f"{name}={getattr(self, name)}: has no meaning for kind 'safety'"

    @property
    def judged_scope(self) -> str:
        return self.scope or SCOPE_OF[self.kind]

    @property
    def saved_scale(self) -> str:
        return self.score_scale or SCALE_OF[self.kind]
