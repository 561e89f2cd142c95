"""Options and metrics of the policy loss: what a caller may ask for, checked once at the border.

`make_loss_options` is the only way in; the loss code trusts what it returns. `LossMetrics` holds
sums, not means, so that the metrics of micro-batches add up to the metrics of the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_engine.kernels.common import INT_DTYPES, check_no_gradient, check_vector

CLIPPED_LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "luspo")  # one formula, five normalisations
SEQUENCE_MEAN_LOSSES = ("grpo", "sapo")  # a sum over sequences of the mean over their tokens
LOSS_TYPES = (*CLIPPED_LOSSES, "cispo", "sapo", "vespo", "gspo")
IMPORTANCE_LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")
IS_CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")

# ScaleRL (arXiv 2510.13786) caps the CISPO ratio at 5; TRL's fallback, epsilon = 0.2, would cap
# every token.
CISPO_EPSILON_HIGH = 5.0

LOG_RATIO_MAX = 20.0  # cap of log-ratios inside exponentials; see grpo_loss.py
# VESPO's sequence ratio is taken for no less than this; TRL's number, from the authors' code.
VESPO_RATIO_MIN = 1e-8
VESPO_LAMBDA_MIN = 1e-4  # TRL raises a smaller lambda to it in silence
VESPO_LOG_WEIGHT_MAX = 80.0  # e^80 = 5.5e34: times any sane advantage still an fp32 number


@dataclass(frozen=True)
class LossOptions:
    """Checked options of `grpo_loss`; build with `make_loss_options`. Every field is resolved:
    `loss_type` is never "gspo" (it becomes grpo with sequence ratios), `epsilon_high` and `is_clip`
    are numbers."""

    loss_type: str
    importance_level: str
    epsilon: float
    epsilon_high: float  # cispo: the cap of the ratio; otherwise the clip range ends 1 + this
    delta: float  # inf: no cap on the unclipped branch
    beta: float
    kl_estimator: str
    kl_bias_correction: bool
    is_correction: str | None
    is_clip: tuple[float, float]
    entropy_coef: float
    max_completion_length: int | None
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float

    @property
    def needs_sequence_pass(self) -> bool:
        """Whether one token's loss depends on its whole sequence, so that tokens cannot be cut
        freely."""
        is_sequence = self.is_correction is not None and self.is_correction.startswith("sequence")
        by_ratio = self.importance_level == "sequence" or self.loss_type == "vespo"
        return by_ratio or is_sequence

    def op_arguments(self) -> tuple[str, list[float]]:
        """The options as a torch.library schema can carry them; `from_op_arguments` is the
        inverse."""
        choices = (self.loss_type, self.importance_level, self.kl_estimator, self.is_correction)
        numbers = [
            self.epsilon,
            self.epsilon_high,
            self.delta,
            self.beta,
            float(self.kl_bias_correction),
            *self.is_clip,
            self.entropy_coef,
            float(self.max_completion_length or 0),
            self.sapo_temperature_pos,
            self.sapo_temperature_neg,
            self.vespo_k_pos,
            self.vespo_lambda_pos,
            self.vespo_k_neg,
            self.vespo_lambda_neg,
        ]
        return ",".join(choice or "" for choice in choices), numbers

    @staticmethod
    def from_op_arguments(choices: str, numbers: list[float]) -> LossOptions:
        loss_type, importance_level, kl_estimator, is_correction = choices.split(",")
        epsilon, epsilon_high, delta, beta, kl_bias_correction, is_low, is_high = numbers[:7]
        entropy_coef, max_completion_length, tau_pos, tau_neg = numbers[7:11]
        k_pos, lambda_pos, k_neg, lambda_neg = numbers[11:]
        return LossOptions(
            loss_type=loss_type,
            importance_level=importance_level,
            epsilon=epsilon,
            epsilon_high=epsilon_high,
            delta=delta,
            beta=beta,
            kl_estimator=kl_estimator,
            kl_bias_correction=bool(kl_bias_correction),
            is_correction=is_correction or None,
            is_clip=(is_low, is_high),
            entropy_coef=entropy_coef,
            max_completion_length=int(max_completion_length) or None,
            sapo_temperature_pos=tau_pos,
            sapo_temperature_neg=tau_neg,
            vespo_k_pos=k_pos,
            vespo_lambda_pos=lambda_pos,
            vespo_k_neg=k_neg,
            vespo_lambda_neg=lambda_neg,
        )


LOSS_OPTIONS = frozenset(LossOptions.__dataclass_fields__)  # the arguments of make_loss_options


def refuse_unknown_options(function: str, values: dict[str, object]) -> None:
    """TypeError as Python has it for an argument that `function` does not take."""
    for name in values:
        if name not in LOSS_OPTIONS:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def make_loss_options(
    *,
    loss_type: str = "grpo",
    importance_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    kl_bias_correction: bool = False,
    is_correction: str | None = None,
    is_clip: tuple[float | None, float | None] = (0.0, 2.0),
    entropy_coef: float = 0.0,
    max_completion_length: int | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> LossOptions:
    """Check and resolve the options of `grpo_loss`; their meaning is given there.

    Raises ValueError naming the option and its value if it is unknown, out of range, or contradicts
    another.
    """
    _one_of("loss_type", loss_type, LOSS_TYPES)
    _one_of("importance_level", importance_level, IMPORTANCE_LEVELS)
    _one_of("kl_estimator", kl_estimator, KL_ESTIMATORS)
    if is_correction is not None:
        _one_of("is_correction", is_correction, (*IS_CORRECTIONS, None))
    _number("epsilon", epsilon, low=0.0)
    if epsilon_high is None:
        epsilon_high = CISPO_EPSILON_HIGH if loss_type == "cispo" else epsilon
    _number("epsilon_high", epsilon_high, low=0.0)
    _number("beta", beta, low=0.0)
    _number("entropy_coef", entropy_coef)
    for name, value in (
        ("sapo_temperature_pos", sapo_temperature_pos),
        ("sapo_temperature_neg", sapo_temperature_neg),
    ):
        _number(name, value, low=0.0)
        if value == 0:
            raise ValueError(f"{name} must be > 0, got {value!r}")
    if not isinstance(kl_bias_correction, bool):
        raise ValueError(f"kl_bias_correction must be True or False, got {kl_bias_correction!r}")
    if max_completion_length is not None:
        is_int = isinstance(max_completion_length, int)
        if not is_int or isinstance(max_completion_length, bool) or max_completion_length < 1:
            raise ValueError(
                f"max_completion_length must be an int >= 1, got {max_completion_length!r}"
            )
    _check_vespo_weight("pos", vespo_k_pos, vespo_lambda_pos)
    _check_vespo_weight("neg", vespo_k_neg, vespo_lambda_neg)
    if loss_type == "vespo":
        _check_vespo(importance_level, is_correction)
    if loss_type == "gspo":
        loss_type, importance_level = "grpo", "sequence"
    return LossOptions(
        loss_type=loss_type,
        importance_level=importance_level,
        epsilon=float(epsilon),
        epsilon_high=float(epsilon_high),
        delta=_checked_delta(delta, loss_type, epsilon_high),
        beta=float(beta),
        kl_estimator=kl_estimator,
        kl_bias_correction=kl_bias_correction,
        is_correction=is_correction,
        is_clip=_checked_is_clip(is_clip),
        entropy_coef=float(entropy_coef),
        max_completion_length=max_completion_length,
        sapo_temperature_pos=float(sapo_temperature_pos),
        sapo_temperature_neg=float(sapo_temperature_neg),
        vespo_k_pos=float(vespo_k_pos),
        vespo_lambda_pos=float(vespo_lambda_pos),
        vespo_k_neg=float(vespo_k_neg),
        vespo_lambda_neg=float(vespo_lambda_neg),
    )


def _one_of(name: str, value: object, known: tuple) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(name: str, value: float, low: float = -math.inf) -> None:
    if not _is_number(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    # comparisons alone: under torch.compile(dynamic=True) value is symbolic, and no math.isfinite
    if not (low <= value < math.inf and value > -math.inf):
        bound = "" if low == -math.inf else f" and >= {low:g}"
        raise ValueError(f"{name} must be finite{bound}, got {value!r}")


def _checked_delta(delta: float | None, loss_type: str, epsilon_high: float) -> float:
    if delta is None:
        return math.inf
    _number("delta", delta, low=0.0)
    if loss_type not in CLIPPED_LOSSES:
        raise ValueError(
            f"delta={delta!r} has no meaning for loss_type={loss_type!r}: it does not clip"
        )
    if delta < 1 + epsilon_high:
        raise ValueError(
            f"delta must be >= 1 + epsilon_high = {1 + epsilon_high:g}, got {delta!r}: it caps the "
            "branch that the clip leaves open"
        )
    return float(delta)


def _check_vespo_weight(side: str, k: float, decay: float) -> None:
    """ValueError unless phi(w) = exp(decay + k log w - decay w) is an fp32 number for every w."""
    _number(f"vespo_k_{side}", k, low=0.0)
    _number(f"vespo_lambda_{side}", decay, low=VESPO_LAMBDA_MIN)
    if torch.compiler.is_compiling():
        return  # the numbers may be symbolic, without a logarithm
    peak = min(max(k / decay, VESPO_RATIO_MIN), math.exp(LOG_RATIO_MAX))
    log_phi = decay + k * math.log(peak) - decay * peak
    if log_phi > VESPO_LOG_WEIGHT_MAX:
        raise ValueError(
            f"vespo_k_{side}={k!r}, vespo_lambda_{side}={decay!r}: the weight would reach "
            f"e^{log_phi:.0f} at a ratio of {peak:.3g}, the limit is e^{VESPO_LOG_WEIGHT_MAX:g}"
        )


def _check_vespo(importance_level: str, is_correction: str | None) -> None:
    if importance_level != "token":
        raise ValueError(
            f"importance_level={importance_level!r} contradicts loss_type='vespo', which weighs "
            "whole sequences by itself; leave it at 'token'"
        )
    if is_correction is not None and is_correction.startswith("sequence"):
        raise ValueError(
            f"is_correction={is_correction!r} has no meaning for loss_type='vespo': the correction "
            "of each token enters the sequence's ratio; use 'token_truncate' or 'token_mask'"
        )


def _checked_is_clip(is_clip: tuple[float | None, float | None]) -> tuple[float, float]:
    if not isinstance(is_clip, (tuple, list)) or len(is_clip) != 2:
        raise ValueError(f"is_clip must be a pair (low, high), got {is_clip!r}")
    low = 0.0 if is_clip[0] is None else is_clip[0]
    high = math.inf if is_clip[1] is None else is_clip[1]
    if not (_is_number(low) and _is_number(high) and 0 <= low < high):
        raise ValueError(f"is_clip must hold 0 <= low < high (None: no bound), got {is_clip!r}")
    return float(low), float(high)


def check_denominator(options: LossOptions, denominator: float | Tensor | None) -> None:
    """ValueError unless `denominator` is None where it can be, a positive number, or a 0-d tensor
    without gradient."""
    if denominator is None:
        if options.loss_type == "dr_grpo" and options.max_completion_length is None:
            raise ValueError(
                "loss_type='dr_grpo' needs max_completion_length or denominator; both are None"
            )
    elif isinstance(denominator, Tensor):
        if denominator.ndim != 0:
            raise ValueError(
                f"denominator must be a 0-d tensor, got shape {list(denominator.shape)}"
            )
        check_no_gradient(denominator=denominator)
    elif not (_is_number(denominator) and 0 < denominator < math.inf):
        raise ValueError(f"denominator must be > 0 and finite, got {denominator!r}")


def default_denominator(options: LossOptions, num_sequences: int) -> float | None:
    """What divides the loss of a call without `denominator`; None: its masked-in tokens."""
    if options.loss_type == "dr_grpo":
        return float(num_sequences * (options.max_completion_length or 1))
    if options.loss_type in (*SEQUENCE_MEAN_LOSSES, "luspo"):
        return float(num_sequences)
    return None


def check_needed_fields(options: LossOptions, fields: dict[str, Tensor | None]) -> None:
    """ValueError if an option needs a tensor that `fields` lists as None."""
    for option, value, name in (
        ("beta", options.beta, "ref_logprobs"),
        ("is_correction", options.is_correction, "sampler_logprobs"),
        ("entropy_coef", options.entropy_coef, "entropy"),
    ):
        if value and name in fields and fields[name] is None:
            raise ValueError(f"{option}={value!r} needs {name}, which is None")


def check_loss_inputs(
    options: LossOptions,
    num_tokens: int,
    device: torch.device,
    cu_seqlens: Tensor | None,
    loss_mask: Tensor | None,
    fields: dict[str, Tensor | None],
) -> None:
    """Check the tensors of a loss call; `fields` maps argument names to per-token fp32 tensors or
    None.

    Raises ValueError naming the argument and what is wrong with it, a gradient that only `logprobs`
    and `entropy` would get included. Where an option needs a field
    that `fields` lists as None, that is an error; a field that is not listed is the caller's own
    affair.
    """
    check_needed_fields(options, fields)
    for name, tensor in fields.items():
        if tensor is not None:
            check_vector(name, tensor, num_tokens, device, (torch.float32,))
            if name not in ("logprobs", "entropy"):
                check_no_gradient(**{name: tensor})
    if loss_mask is not None:
        check_vector("loss_mask", loss_mask, num_tokens, device)
        _check_mask_values(loss_mask)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, num_tokens, device)


def _check_mask_values(loss_mask: Tensor) -> None:
    """ValueError for a weight below 0 or not finite. CPU only: on CUDA reading it would be a
    sync."""
    check_no_gradient(loss_mask=loss_mask)
    on_cpu = loss_mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and loss_mask.dtype != torch.bool and loss_mask.numel():
        low, high = (value.item() for value in loss_mask.aminmax())
        if not (low >= 0 and high < math.inf):
            wrong = high if low >= 0 else low
            raise ValueError(f"loss_mask must be finite and >= 0, got {wrong}")


def _check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int, device: torch.device) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        found = (
            list(cu_seqlens.shape) if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        )
        raise ValueError(f"cu_seqlens must have shape [S + 1], S >= 1, got {found}")
    check_vector("cu_seqlens", cu_seqlens, cu_seqlens.shape[0], device, INT_DTYPES)
    if device.type == "cpu" and not torch.compiler.is_compiling():
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != num_tokens or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of tokens, {num_tokens}; got "
                f"{first} ... {last}"
            )


# Order of the sums that every implementation writes; all are sums over tokens weighted by
# `loss_mask`.
METRICS = (
    "tokens",  # sum of the mask itself: the weight of every mean below
    "kl",  # the KL estimate as it enters the loss (times the ratio if kl_bias_correction)
    "entropy",
    "ratio_mean",  # pi / pi_old (importance_level="sequence": the sequence's ratio)
    "approx_kl",  # k3 estimate of KL(pi_old || pi) from the tokens' ratios
    "clip_low",  # fraction held at the lower clip (A < 0)
    "clip_high",  # fraction held at the upper clip, or at cispo's cap (A > 0)
    "clip_region",  # either
    "sampling_logp_difference",  # |log pi_old - log pi_sampler|
    "is_weight_mean",  # sampler correction after clipping or masking
    "is_truncated",  # fraction of weights that clipping or masking changed
    "sampler_unscored",  # fraction with a NaN sampler logprob, whose ratio counts as 1
    "phi_mean",  # vespo's weight of the token's sequence
)
NUM_METRICS = len(METRICS)
# What linear_grpo_loss(sparse_delta=...) adds behind them, likewise sums over tokens.
HEAD_METRICS = (
    "dropped_mass",  # share of a row that the sparse backward left out, at most sparse_delta
    "sparse_rows",  # fraction whose gradient it made; the others had the dense one, or none
)


def metric_names(
    options: LossOptions, *, has_ref: bool, has_entropy: bool, has_sampler: bool
) -> tuple[str, ...]:
    """The metrics that mean something under these options and inputs, in the order of METRICS."""
    absent = set()
    if not has_ref:
        absent |= {"kl"}
    if not has_entropy:
        absent |= {"entropy"}
    if not has_sampler:
        absent |= {"sampling_logp_difference", "sampler_unscored"}
    if options.is_correction is None:
        absent |= {"is_weight_mean", "is_truncated"}
    if options.loss_type in ("sapo", "vespo"):  # soft: nothing is held at a bound
        absent |= {"clip_low", "clip_high", "clip_region"}
    if options.loss_type != "vespo":
        absent |= {"phi_mean"}
    return tuple(name for name in METRICS if name not in absent)


@dataclass(frozen=True)
class LossMetrics:
    """Metrics of one or more micro-batches, still on the device.

    `sums` fp32 in the order of METRICS, then HEAD_METRICS if present; `names` those that apply.
    `a + b` merges micro-batches, `metrics["kl"]` is a 0-d tensor, and `to_dict()` is the one host
    sync.
    """

    sums: Tensor
    names: tuple[str, ...] = METRICS

    def __add__(self, other: LossMetrics) -> LossMetrics:
        if self.names != other.names:
            raise ValueError(f"cannot add metrics {self.names} and {other.names}: options differ")
        return LossMetrics(self.sums + other.sums, self.names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(f"{name!r} is not among {self.names}")
        if name == "tokens":
            return self.sums[0]
        tokens = self.sums[0]
        total = self.sums[(METRICS + HEAD_METRICS).index(name)]
        return torch.where(tokens > 0, total / tokens, torch.zeros_like(total))

    def to_dict(self) -> dict[str, float]:
        """Means over the masked-in tokens ("tokens": their number) as Python floats; 0 without
        tokens."""
        sums = dict(zip(METRICS + HEAD_METRICS, self.sums.tolist(), strict=False))
        tokens = sums["tokens"]
        return {
            name: tokens if name == "tokens" else (sums[name] / tokens if tokens > 0 else 0.0)
            for name in self.names
        }
