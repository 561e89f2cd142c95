"""Supervised fine-tuning as DeepSeek-R1 does it: on the cold-start data, on the ~800k samples, and
in distillation (arXiv 2501.12948v2, appendices B.4.2 and B.4.3).

    an epoch: every row once, in an order drawn from the seed     -> PromptOrder
    for each step: the next ``sequences_per_step`` rows
        pack them into rows of tokens, Best-Fit                   -> plan_batches
        for each packed row: add its gradient                     -> SFTRun._gradients
        one optimiser step on the mean over the learned tokens    -> Learner.descend

The loss is the negative log-likelihood of the learned tokens, divided by their number in the whole
step, so it does not depend on the packing. Its gradient is that of the policy loss with advantage 1
at ratio 1, -d(ratio) = -d log p, which ``linear_grpo_loss`` makes in one pass over the logits:
three GEMMs of the head, where a log-probability with its backward takes four.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo_engine.data import PromptOrder, Row, without_overlap
from grpo_engine.demonstrations import Demonstrations, fit, load_demonstrations, tokenize
from grpo_engine.history import finite_number
from grpo_engine.kernels import LossMetrics, linear_grpo_loss, linear_logprobs, plan_batches
from grpo_engine.learner import Learner, load_policy
from grpo_engine.manifest import rows_sha256, weights_sha256
from grpo_engine.metrics import read_metrics
from grpo_engine.policy import Policy
from grpo_engine.progress import NUMBER, say
from grpo_engine.rollouts import derive_seed
from grpo_engine.session import Session, run_stage
from grpo_engine.sft_config import SFTConfig
from grpo_engine.types import UserError

OVERFITTED = 1.05  # times the lowest held-out loss


class SFTRun(Learner):
    """A fine-tuning run: besides the learner's state, its rows and the order they come in."""

    def __init__(self, config: SFTConfig, policy: Policy, rows: Demonstrations) -> None:
        size = config.sequences_per_step
        self.total_rows = max(1, round(config.num_train_epochs * len(rows)))
        if config.max_steps is not None:
            self.total_rows = config.max_steps * size
        super().__init__(config, policy, -(-self.total_rows // size))
        self.rows = rows
        self.order = PromptOrder(len(rows), derive_seed(config.seed, "rows"))

    def chosen(self, step: int) -> np.ndarray:
        """The rows of a step; the last one has fewer where the epochs end within it."""
        first = step * self.config.sequences_per_step
        last = min(first + self.config.sequences_per_step, self.total_rows)
        return np.array(self.order.take(first, last - first))

    def packed(self, rows: Demonstrations, chosen: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """(hidden states [M, D] that predict learned tokens, those tokens [M]) of each packed
        row."""
        lengths = rows.lengths[chosen].tolist()
        for chunk in plan_batches(lengths, self.config.max_tokens_per_microbatch)[0]:
            packed, places, token_ids = rows.micro_batch(chosen[chunk], self.policy.device)
            yield self.hidden_rows(self.policy, packed, places), token_ids

    def update(self) -> dict[str, Any]:
        """One optimiser step; returns its metrics."""
        chosen = self.chosen(self.step)
        with self.watch.phase("update"):
            loss, metrics = self._gradients(chosen)
            row = self.descend(loss)
        tokens = int(self.rows.lengths[chosen].sum())
        self.tokens_done += tokens
        done = min(self.step * self.config.sequences_per_step, self.total_rows)
        row |= {
            "entropy": metrics.to_dict()["entropy"],
            "epoch": done / len(self.rows),
            "num_tokens": self.tokens_done,
        }
        times = self.watch.lap()
        return row | times | {"tokens_per_second": tokens / times["time/update"]}

    def _gradients(self, chosen: np.ndarray) -> tuple[float, LossMetrics]:
        """Accumulate the step's gradients; returns the mean negative log-likelihood in nats per
        learned token."""
        num_learned = self.rows.num_learned(chosen)
        total, merged = 0.0, None
        for hidden, token_ids in self.packed(self.rows, chosen):
            loss, metrics, logprobs = linear_grpo_loss(
                hidden,
                token_ids=token_ids,
                old_logprobs=None,
                advantages=torch.ones_like(token_ids, dtype=torch.float32),
                loss_type="dapo",
                denominator=float(num_learned),
                return_entropy=True,
                **self.head_options(self.policy, hidden),
            )
            loss.backward()
            total = total - logprobs.double().sum()
            merged = metrics if merged is None else merged + metrics
        return float(total) / num_learned, merged

    @torch.no_grad()
    def mean_loss(self, rows: Demonstrations) -> float:
        """Mean negative log-likelihood of all ``rows``, in nats per learned token."""
        everything = np.arange(len(rows))
        total = 0.0
        for hidden, token_ids in self.packed(rows, everything):
            logprobs = linear_logprobs(
                hidden, token_ids=token_ids, **self.head_options(self.policy, hidden)
            )
            total = total - logprobs.double().sum()
        return float(total) / rows.num_learned(everything)


class HeldOutRows:
    """The loss on rows that are not trained on."""

    def __init__(self, rows: Demonstrations) -> None:
        self.rows = rows

    def evaluate(self, run: SFTRun) -> tuple[dict[str, float], list[dict[str, Any]]]:
        with run.watch.phase("eval"):
            return {"eval/loss": run.mean_loss(self.rows)}, []


class SFTSession(Session):
    FIGURES = (
        ("held-out loss", ("eval/loss",), NUMBER),
        ("loss", ("loss",), NUMBER),
        ("entropy", ("entropy",), NUMBER),
        ("gradient norm", ("grad_norm",), NUMBER),
        ("learning rate", ("learning_rate",), NUMBER),
        ("epoch", ("epoch",), NUMBER),
        ("tokens/s", ("tokens_per_second",), NUMBER),
    )

    def __init__(self, run: SFTRun, held_out: HeldOutRows | None, kept: list[Row]) -> None:
        super().__init__(run, held_out)
        self.kept = kept
        self.best: tuple[float, int] | None = None  # lowest held-out loss so far, and its step

    def warnings(self, row: dict[str, Any]) -> list[str]:
        """An entropy that falls is what imitation is for; a held-out loss that rises is not."""
        found = [words for words in super().warnings(row) if not words.startswith("entropy:")]
        loss = finite_number(row, "eval/loss")
        if loss is None:
            return found
        if self.best is None:  # the first evaluation, or the first since the run was resumed
            past = [r for r in read_metrics(self.folder) if r["step"] < row["step"]]
            losses = [(finite_number(r, "eval/loss"), r["step"]) for r in past]
            self.best = min((pair for pair in losses if pair[0] is not None), default=None)
        best, step = self.best or (loss, row["step"])
        if loss > OVERFITTED * best:
            found.append(
                f"overfitting: the held-out loss {loss:.3g} is above its best, {best:.3g} at step "
                f"{step}; more passes teach these rows by heart"
            )
        self.best = min((best, step), (loss, row["step"]))
        return found

    def summary(self) -> dict[str, Any]:
        return {"rows": len(self.run.rows)}

    def plan(self) -> dict[str, str]:
        run, config = self.run, self.run.config
        lengths, size = run.rows.lengths, config.sequences_per_step
        learned = run.rows.num_learned(np.arange(len(lengths)))
        steps = range(min(run.total_steps, -(-len(lengths) // size)))
        chosen = [run.chosen(step) for step in steps]
        limit = config.max_tokens_per_microbatch
        chunks = sum(len(plan_batches(lengths[rows].tolist(), limit)[0]) for rows in chosen)
        full = sum(int(lengths[rows].sum()) for rows in chosen) / (chunks * limit)
        lines = {
            "data": f"{len(lengths)} rows from {config.dataset}",
            "tokens": f"{lengths.sum():,} in a pass, {learned:,} of them learned; a row has "
            f"{lengths.mean():,.0f} on average, the longest {lengths.max():,}",
            "held out": f"{len(self.held_out.rows) if self.held_out else 0} rows",
            "steps": f"{run.total_steps} of {size} rows",
            "epochs": f"{run.total_rows / len(lengths):.2f}",
            "packing": f"{chunks / len(chosen):.1f} packed rows a step, {full:.1%} of their "
            f"{limit:,} tokens filled",
        }
        domains = Counter(str(row["domain"]) for row in self.kept if row.get("domain") is not None)
        if domains:
            lines["domains"] = ", ".join(f"{name} {n}" for name, n in domains.most_common())
        return lines


# -- a run -----------------------------------------------------------------------------------------


def adapt(config: SFTConfig, policy: Policy) -> None:
    """Give model and tokenizer what the configuration says in place of their own; checkpoints keep
    it."""
    if config.max_position_embeddings is not None:
        policy.text_config.max_position_embeddings = config.max_position_embeddings
    if config.chat_template is not None:
        try:
            text = Path(config.chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--chat_template {config.chat_template}: cannot be read ({error})"
            ) from error
        policy.tokenizer.chat_template = text
    if config.eos_token is not None:
        tokenizer = policy.tokenizer
        chosen = tokenizer.convert_tokens_to_ids(config.eos_token)
        if chosen is None or tokenizer.convert_ids_to_tokens(chosen) != config.eos_token:
            raise UserError(
                f"--eos_token {config.eos_token!r}: is not one token of {config.model}'s tokenizer"
            )
        tokenizer.eos_token = config.eos_token
        # Sampling is to stop at it, too.
        ids = list(dict.fromkeys([chosen, *policy.eos_ids]))
        policy.model.generation_config.eos_token_id = ids


def ending_ids(policy: Policy) -> list[int]:
    """The token that ends a completion, and the others that sampling stops at."""
    own = policy.tokenizer.eos_token_id
    return list(dict.fromkeys([*([] if own is None else [own]), *policy.eos_ids]))


def read_rows_of(config: SFTConfig, field: str, limit: int | None) -> list[Row]:
    """The rows of ``dataset`` or ``eval_dataset``."""
    args, split = (getattr(config, f"{field}_{name}") for name in ("args", "split"))
    return load_demonstrations(config, getattr(config, field), args, split, limit)


def tokenized(
    config: SFTConfig, policy: Policy, rows: list[Row], source: str
) -> tuple[Demonstrations, list[Row]]:
    """The rows that fit, as tokens and as they were."""
    made = tokenize(config, policy.tokenizer, ending_ids(policy), rows, source)
    found, kept, counts = fit(config, rows, made, source)
    for what, count in counts.items():
        if count:
            say(f"{source}: {count} rows longer than max_length={config.max_length} are {what}")
    limit = getattr(policy.text_config, "max_position_embeddings", None)
    if limit is not None and found.lengths.max() > limit:
        raise UserError(
            f"--max_length {config.max_length}: {source} has a row of {found.lengths.max()} "
            f"tokens, which passes the {limit} positions of {config.model}"
        )
    return found, kept


def build_session(
    config: SFTConfig, checkpoint: Path | None, stack: ExitStack
) -> tuple[SFTSession, dict[str, Any]]:
    """Load model and rows; everything the user can have wrong is found here."""
    rows = read_rows_of(config, "dataset", config.dataset_limit)
    eval_rows = []
    if config.eval_dataset:
        eval_rows = read_rows_of(config, "eval_dataset", config.eval_limit)
        rows, dropped = without_overlap(rows, eval_rows)
        if dropped:
            say(f"{dropped} training rows have a held-out prompt and are left out")
    policy = load_policy(config, checkpoint)
    adapt(config, policy)
    inputs = {"dataset": {"source": config.dataset, "rows": len(rows), "sha256": rows_sha256(rows)}}
    held_out = None
    if eval_rows:
        source, hashed = config.eval_dataset, rows_sha256(eval_rows)
        inputs["eval_dataset"] = {"source": source, "rows": len(eval_rows), "sha256": hashed}
        held_out = HeldOutRows(tokenized(config, policy, eval_rows, source)[0])
    if checkpoint is None or policy.adapter is not None:
        inputs["model"] = {"path": config.model, "weights_sha256": weights_sha256(policy.model)}
    demonstrations, kept = tokenized(config, policy, rows, config.dataset)
    run = SFTRun(config, policy, demonstrations)
    if checkpoint is not None:
        run.read_checkpoint(checkpoint)
    return SFTSession(run, held_out, kept), inputs


def run_sft(
    config: SFTConfig,
    *,
    recipe: str | None = None,
    resume: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> int:
    """Fine-tune, log, checkpoint and report one run, of ``SFTConfig`` or ``DistillConfig``; returns
    the process's exit code. See ``run_stage``."""
    return run_stage(
        config,
        build_session,
        recipe=recipe,
        resume=resume,
        overwrite=overwrite,
        dry_run=dry_run,
    )
