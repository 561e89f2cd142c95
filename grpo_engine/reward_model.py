"""The reward models of DeepSeek-R1 (v2, 3.1): helpfulness from pairs, safety from labels.

One step (256 rows, one epoch):

    score the answers, packed, no logits        -> RewardNetwork.scores
    pairs:  -log sigmoid(s_chosen - s_rejected) -> pairwise_loss
    labels: binary cross-entropy of s           -> pointwise_loss
    one optimiser step

The paper says "pairwise" and "point-wise" and prints neither formula: Bradley-Terry and the
logistic loss are assumed. The helpful model is given the final summary only, the safety model the
whole response, in training as in use.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from grpo_engine.data import PromptOrder, load_rows, without_overlap
from grpo_engine.judged_rows import JudgedRows, read_judged_rows, split_off
from grpo_engine.kernels import plan_batches
from grpo_engine.learner import Learner
from grpo_engine.manifest import rows_sha256
from grpo_engine.metrics import write_atomically
from grpo_engine.progress import NUMBER, PERCENT, say
from grpo_engine.reward_model_config import RewardModelConfig
from grpo_engine.reward_network import RewardNetwork
from grpo_engine.reward_results import RESULTS_FILE, correct_rows, reward_results
from grpo_engine.rewards.model import ScoreCard
from grpo_engine.rollouts import derive_seed
from grpo_engine.session import Session, run_stage
from grpo_engine.types import UserError


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, *, margin: float = 0.0, centering: float = 0.0
) -> Tensor:
    """[P] -log sigmoid(chosen - rejected - margin) + centering (chosen + rejected)^2, of fp32
    scores [P]. Without the options: Bradley and Terry's likelihood of the preference."""
    loss = -logsigmoid(chosen - rejected - margin)
    return loss + centering * (chosen + rejected).square() if centering else loss


def pointwise_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """[R] cross-entropy of labels [R] (1 safe, 0 unsafe) under sigmoid(score), in fp32."""
    return binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), reduction="none")


class RewardModelRun(Learner):
    """The state of a run between two steps: nothing but the step, since the rows of step k are a
    function of seed and k."""

    policy: RewardNetwork
    config: RewardModelConfig

    def __init__(
        self, config: RewardModelConfig, network: RewardNetwork, rows: JudgedRows, card: ScoreCard
    ) -> None:
        self.steps_per_epoch = -(-len(rows) // config.batch_size)
        steps = config.num_train_epochs * self.steps_per_epoch
        super().__init__(config, network, min(steps, config.max_steps or steps))
        self.rows, self.card = rows, card
        self.order = PromptOrder(len(rows), derive_seed(config.seed, "judged rows"))
        self.evaluated: tuple[int, float] | None = None  # (step, held-out accuracy)

    def batch(self, step: int) -> np.ndarray:
        """Rows of ``step`` (0, 1, ...): the next ``batch_size`` of the epoch's permutation, fewer
        at its end."""
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place * self.config.batch_size
        count = min(self.config.batch_size, len(self.rows) - first)
        return np.array(self.order.take(epoch * len(self.rows) + first, count))

    def update(self) -> dict[str, Any]:
        """One optimiser step; returns its metrics."""
        batch = self.batch(self.step)
        with self.watch.phase("update"):
            loss, metrics = self._gradients(batch)
            row = self.descend(loss)
        tokens = int(self.rows.row_tokens[batch].sum())
        self.tokens_done += tokens
        times = self.watch.lap()
        return {
            **row,
            **metrics,
            "epoch": self.step / self.steps_per_epoch,
            "num_tokens": self.tokens_done,
            "tokens_per_second": tokens / times["time/update"],
            **times,
        }

    def _gradients(self, batch: np.ndarray) -> tuple[float, dict[str, float]]:
        """Accumulate the gradient of the mean loss over ``batch``. It does not depend on how the
        rows are spread over micro-batches."""
        total = torch.zeros((), device=self.policy.device)
        scores = np.zeros((len(batch), self.rows.answers))
        for chunk in plan_batches(
            self.rows.row_tokens[batch], self.config.max_tokens_per_microbatch
        )[0]:
            found = self._scores(self.rows, batch[chunk])
            loss = self._losses(found, self.rows, batch[chunk]).sum() / len(batch)
            loss.backward()
            total += loss.detach()
            scores[chunk] = found.detach().double().cpu().numpy().reshape(-1, self.rows.answers)
        labels = None if self.rows.labels is None else self.rows.labels[batch]
        return float(total), score_metrics(scores, labels)

    def _scores(self, rows: JudgedRows, chosen: np.ndarray) -> Tensor:
        """[R * A] fp32 scores of the rows ``chosen``."""
        packed = rows.pack(chosen, self.policy.device)
        with self.autocast():
            return self.policy.scores(
                packed.token_ids, packed.position_ids, packed.cu_seqlens, packed.max_seqlen
            )

    def _losses(self, scores: Tensor, rows: JudgedRows, chosen: np.ndarray) -> Tensor:
        """[R] losses of the rows ``chosen``."""
        if rows.labels is not None:
            return pointwise_loss(scores, torch.from_numpy(rows.labels[chosen]).to(scores.device))
        config = self.config
        return pairwise_loss(
            *scores.view(-1, 2).T,
            margin=config.margin,
            centering=config.center_rewards_coefficient,
        )

    @torch.no_grad()
    def measure(self, rows: JudgedRows, chosen: np.ndarray) -> tuple[np.ndarray, float]:
        """(fp64 raw scores [R, A] of the rows ``chosen``, their mean loss), without a gradient."""
        scores, loss = np.zeros((len(chosen), rows.answers)), 0.0
        for chunk in plan_batches(rows.row_tokens[chosen], self.config.max_tokens_per_microbatch)[
            0
        ]:
            found = self._scores(rows, chosen[chunk])
            loss += float(self._losses(found, rows, chosen[chunk]).sum())
            scores[chunk] = found.double().cpu().numpy().reshape(-1, rows.answers)
        return scores, loss / len(chosen)

    def write_checkpoint(self, folder: Path) -> None:
        """With ``reward_model.json``: what the scores of these weights mean."""
        super().write_checkpoint(folder)
        sample = np.array(self.order.take(0, min(self.config.score_stats_rows, len(self.rows))))
        scores, _ = self.measure(self.rows, sample)
        step, accuracy = self.evaluated or (None, None)
        replace(
            self.card,
            mean=float(scores.mean()),
            std=float(scores.std()) or 1.0,
            lowest=float(scores.min()),
            scored_answers=scores.size,
            accuracy=accuracy if step == self.step else None,
            step=self.step,
        ).write(folder)


def score_metrics(scores: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
    """Of a batch's raw scores [R, A]: for pairs how far the chosen lie above the rejected, for
    labels the safe above the unsafe. A side that the batch lacks is left out."""
    if labels is None:
        chosen, rejected = scores.T
        return {
            "accuracy": float((chosen > rejected).mean()),
            "margin": float((chosen - rejected).mean()),
            "chosen_reward": float(chosen.mean()),
            "rejected_reward": float(rejected.mean()),
        }
    scores = scores[:, 0]
    row = {"accuracy": float(((scores > 0) == (labels == 1)).mean())}
    sides = {"safe_reward": scores[labels == 1], "unsafe_reward": scores[labels == 0]}
    row |= {name: float(side.mean()) for name, side in sides.items() if len(side)}
    if len(row) == 3:
        row["margin"] = row["safe_reward"] - row["unsafe_reward"]
    return row


class HeldOutRows:
    """Rows the model is not trained on, scored whole at every evaluation; each leaves
    ``results.json``, the last one standing."""

    def __init__(self, rows: JudgedRows) -> None:
        self.rows = rows

    def evaluate(self, run: RewardModelRun) -> tuple[dict[str, float], list[dict[str, Any]]]:
        rows, config = self.rows, run.config
        with run.watch.phase("eval"):
            scores, loss = run.measure(rows, np.arange(len(rows)))
            if not np.isfinite(scores).all():
                raise FloatingPointError("the scores of the held-out rows are not finite")
            results = reward_results(scores.ravel(), rows, bins=config.calibration_bins)
        head = {"stage": config.stage, "kind": config.kind, "scope": config.judged_scope}
        head |= {"step": run.step, "loss": loss}
        text = json.dumps(head | results, indent=1, allow_nan=False)
        write_atomically(Path(config.output_dir) / RESULTS_FILE, text + "\n")
        run.evaluated = (run.step, results["accuracy"]["value"])
        metrics = {
            "eval/loss": loss,
            "eval/accuracy": results["accuracy"]["value"],
            "eval/calibration_error": results["calibration"]["error"],
            **{
                f"eval/{name}": value
                for name, value in score_metrics(scores, rows.labels).items()
                if name != "accuracy"
            },
        }
        if results.get("auc", {}).get("value") is not None:
            metrics["eval/auc"] = results["auc"]["value"]
        return metrics, self._samples(scores)

    def _samples(self, scores: np.ndarray) -> list[dict[str, Any]]:
        """One row each for ``completions/eval-N.jsonl``."""
        rows, correct = self.rows, correct_rows(scores.ravel(), self.rows)
        lengths = rows.answer_lengths.reshape(-1, rows.answers)
        return [
            {
                "index": index,
                "correct": float(correct[index]),
                "scores": scores[index].tolist(),
                "lengths": lengths[index].tolist(),
                **({} if rows.labels is None else {"label": int(rows.labels[index])}),
            }
            for index in range(len(rows))
        ]


class RewardModelSession(Session):
    run: RewardModelRun
    FIGURES = (
        ("held-out accuracy", ("eval/accuracy",), PERCENT),
        ("accuracy", ("accuracy",), PERCENT),
        ("loss", ("loss",), NUMBER),
        ("margin", ("margin",), NUMBER),
        ("calibration error", ("eval/calibration_error",), PERCENT),
        ("gradient norm", ("grad_norm",), NUMBER),
        ("tokens/s", ("tokens_per_second",), NUMBER),
    )

    def open_logs(self, resume_step: int | None) -> None:
        path = self.folder / RESULTS_FILE
        if path.exists() and json.loads(path.read_text())["step"] > (resume_step or 0):
            path.unlink()  # of a step that is to be done again
        super().open_logs(resume_step)

    def summary(self) -> dict[str, Any]:
        config = self.run.config
        return {"kind": config.kind, "scope": config.judged_scope, "rows": len(self.run.rows)}

    def plan(self) -> dict[str, str]:
        run, config = self.run, self.run.config
        rows, tokens = run.rows, run.rows.row_tokens
        unit = "pairs" if config.kind == "helpful" else "answers"
        held_out = len(self.held_out.rows) if self.held_out else 0
        return {
            "kind": f"{config.kind}, judged on the {config.judged_scope}",
            "data": f"{len(rows)} {unit} from {config.dataset}, {int(tokens.sum()):,} tokens, "
            f"longest sequence {int(rows.lengths.max()):,}",
            "held out": f"{held_out} {unit}",
            "steps": f"{run.total_steps} of {config.batch_size} {unit}, "
            f"{config.num_train_epochs} epochs",
            "tokens": f"{self._planned_tokens():,} in all, micro-batches of at most "
            f"{config.max_tokens_per_microbatch:,}",
            "padding": f"{run.policy.tokenizer.pad_token} (in the saved model)",
        }

    def _planned_tokens(self) -> int:
        run = self.run
        return sum(int(run.rows.row_tokens[run.batch(k)].sum()) for k in range(run.total_steps))


def score_card(config: RewardModelConfig) -> ScoreCard:
    return ScoreCard(
        kind=config.kind,
        scope=config.judged_scope,
        prompt_template=config.prompt_template,
        system_prompt=config.system_prompt,
        prompt_suffix=config.prompt_suffix,
        score_scale=config.saved_scale,
        empty_summary=config.empty_summary,
    )


def load_judged_rows(
    config: RewardModelConfig,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training rows, held-out rows), no prompt in common."""
    rows = load_rows(
        config.dataset,
        args=config.dataset_args,
        split=config.dataset_split,
        limit=config.dataset_limit,
        prompt_column=config.prompt_column,
    )
    if not config.eval_dataset:
        if not config.eval_share:
            return rows, []
        rows, held_out = split_off(rows, config.eval_share, config.seed)
        return rows, held_out[: config.eval_limit]
    held_out = load_rows(
        config.eval_dataset,
        args=config.eval_dataset_args,
        split=config.eval_dataset_split,
        limit=config.eval_limit,
        prompt_column=config.prompt_column,
    )
    rows, dropped = without_overlap(rows, held_out)
    if dropped:
        say(f"{dropped} training rows have a held-out prompt and are left out")
    return rows, held_out


def load_network(config: RewardModelConfig, checkpoint: Path | None) -> RewardNetwork:
    options: dict[str, Any] = {
        "device": config.device,
        "attention": config.attention,
        "gradient_checkpointing": config.gradient_checkpointing,
    }
    if checkpoint is not None:
        return RewardNetwork.from_saved(checkpoint, trainable=True, **options)
    seed = derive_seed(config.seed, "reward head")
    return RewardNetwork.from_model(config.model, seed=seed, pad_token=config.pad_token, **options)


def build_session(
    config: RewardModelConfig, checkpoint: Path | None, stack: ExitStack
) -> tuple[RewardModelSession, dict[str, Any]]:
    """Load model and rows; everything the user can have wrong is found here."""
    train, held_out = load_judged_rows(config)
    network = load_network(config, checkpoint)
    card = score_card(config)

    def judged(rows: list[dict[str, Any]], source: str) -> JudgedRows:
        found, left_out = read_judged_rows(
            rows,
            card,
            network,
            source=source,
            max_length=config.max_length,
            long_rows=config.long_rows,
            unusable_rows=config.unusable_rows,
        )
        for option, count in left_out.items():
            say(f"{count} rows of {source} are left out (--{option} skip)")
        return found

    rows = judged(train, config.dataset)
    check_labels(rows, config.dataset)
    evaluation = None
    source = config.eval_dataset or config.dataset
    if held_out:
        evaluation = HeldOutRows(judged(held_out, source))
    run = RewardModelRun(config, network, rows, card)
    if checkpoint is not None:
        run.read_checkpoint(checkpoint)
    inputs: dict[str, Any] = {"dataset": _lineage(config.dataset, train)}
    if held_out:
        inputs["eval_dataset"] = _lineage(source, held_out)
    if network.base_sha256 is not None:
        inputs["model"] = {"path": config.model, "weights_sha256": network.base_sha256}
    return RewardModelSession(run, evaluation), inputs


def check_labels(rows: JudgedRows, source: str) -> None:
    """A safety model needs both labels."""
    if rows.labels is not None and len(set(rows.labels.tolist())) < 2:
        word = "safe" if rows.labels[0] else "unsafe"
        raise UserError(f"{source}: all {len(rows)} rows to train on are labelled {word}")


def _lineage(source: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"source": source, "rows": len(rows), "sha256": rows_sha256(rows)}


def run_reward_model(
    config: RewardModelConfig,
    *,
    recipe: str | None = None,
    resume: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> int:
    """Train, evaluate, checkpoint and report one reward model; returns the process's exit code. See
    ``run_stage``."""
    return run_stage(
        config,
        build_session,
        recipe=recipe,
        resume=resume,
        overwrite=overwrite,
        dry_run=dry_run,
    )
