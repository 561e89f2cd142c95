"""grpo_loss against TRL's own `GRPOTrainer._compute_loss`, run from the installed package.

A stand-in carries what that method reads from the trainer, and hands it log-probabilities as a leaf
instead of a model, so loss and gradient can be compared per token. The sampler correction is
computed by TRL elsewhere, inside `_generate_and_score_completions`; that block of its source is
compiled and run as it stands.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from grpo_engine.kernels.common import interpreting
from grpo_engine.kernels.grpo_loss import grpo_loss
from grpo_engine.kernels.loss_options import CLIPPED_LOSSES, LOSS_TYPES

pytest.importorskip("trl", minversion="1.16.0")
pytestmark = pytest.mark.skipif(interpreting(), reason="compares the portable path")

LENGTHS, WIDTH = (7, 3, 12, 0, 1, 9), 12  # completion tokens; one row is all padding
VESPO = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")


@pytest.fixture(scope="module")
def trainer_class():
    from trl import GRPOTrainer

    return GRPOTrainer


def padded_inputs(seed: int = 0) -> dict:
    """TRL's layout: [B, T] with a completion mask; leaves `logps` and `entropies`."""
    g = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), WIDTH)
    logps = -torch.rand(shape, generator=g) * 3
    old = logps + 0.3 * torch.randn(shape, generator=g)
    mask = (torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]).long()
    mask[2, 4] = 0  # a tool token inside a completion
    return {
        "logps": logps.requires_grad_(),
        "entropies": (torch.rand(shape, generator=g) * 2).requires_grad_(),
        "prompt_ids": torch.zeros(len(LENGTHS), 2, dtype=torch.long),
        "prompt_mask": torch.ones(len(LENGTHS), 2, dtype=torch.long),
        "completion_ids": torch.zeros(shape, dtype=torch.long),
        "completion_mask": mask,
        "advantages": torch.randn(len(LENGTHS), generator=g),
        "old_per_token_logps": old,
        "ref_per_token_logps": logps.detach() + 0.3 * torch.randn(shape, generator=g),
        "sampling_per_token_logps": old + 0.1 * torch.randn(shape, generator=g),
        "num_items_in_batch": mask.sum(),
    }


def trl_config(**changed) -> SimpleNamespace:
    """The fields of GRPOConfig that the loss reads, at TRL's defaults but for what is changed."""
    from trl import GRPOConfig

    names = [
        *("epsilon", "epsilon_high", "delta", "beta", "loss_type", "importance_sampling_level"),
        *("use_bias_correction_kl", "sapo_temperature_pos", "sapo_temperature_neg"),
        *("top_entropy_quantile", "off_policy_mask_threshold", "entropy_coef"),
        *("vllm_importance_sampling_mode", "vllm_importance_sampling_clip_min"),
        "vllm_importance_sampling_clip_max",
        *VESPO,
    ]
    defaults = {name: GRPOConfig.__dataclass_fields__[name].default for name in names}
    unknown = set(changed) - set(defaults)
    assert not unknown, f"not fields of TRL's GRPOConfig that the loss reads: {unknown}"
    config = SimpleNamespace(**(defaults | changed))
    config.steps_per_generation = 1
    if config.epsilon_high is None:
        config.epsilon_high = config.epsilon
    return config


def trl_loss(trainer_class, inputs: dict, config: SimpleNamespace, use_sampler: bool):
    """(loss, logged metrics) of TRL's code."""
    accelerator = SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )
    stand_in = SimpleNamespace(
        args=config,
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        loss_type=config.loss_type,
        importance_sampling_level=config.importance_sampling_level,
        beta=config.beta,
        epsilon_low=config.epsilon,
        epsilon_high=config.epsilon_high,
        top_entropy_quantile=config.top_entropy_quantile,
        off_policy_mask_threshold=config.off_policy_mask_threshold,
        max_completion_length=WIDTH,
        current_gradient_accumulation_steps=config.steps_per_generation,
        get_gamma_weights=trainer_class.get_gamma_weights,
        entropy_coef=config.entropy_coef,
        _entropy_bonus_enabled=config.entropy_coef != 0,
        use_adaptive_entropy=False,
        aux_loss_enabled=False,
        use_vllm=use_sampler,
        vllm_importance_sampling_correction=use_sampler,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            inputs["logps"],
            inputs["entropies"],
            None,
        ),
    )
    if use_sampler:
        inputs = inputs | {
            "importance_sampling_ratio": trl_sampler_ratio(trainer_class, inputs, config)
        }
    loss = trainer_class._compute_loss(stand_in, None, inputs)
    return loss, {name: values[-1] for name, values in stand_in._metrics["train"].items()}


def trl_sampler_ratio(trainer_class, inputs: dict, config: SimpleNamespace) -> torch.Tensor:
    """TRL's importance_sampling_ratio, by the one statement of its source that assigns it."""
    source = textwrap.dedent(inspect.getsource(trainer_class._generate_and_score_completions))
    blocks = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.If)
        and any(
            isinstance(part, ast.Assign)
            and getattr(part.targets[0], "id", "") == "per_token_logps_diff"
            for part in node.body
        )
    ]
    assert len(blocks) == 1, "TRL has moved its sampler correction"
    this = SimpleNamespace(use_vllm=True, vllm_importance_sampling_correction=True)
    for name in ("mode", "clip_min", "clip_max"):
        name = f"vllm_importance_sampling_{name}"
        setattr(this, name, getattr(config, name))
    scope = {
        "self": this,
        "torch": torch,
        "math": math,
        "tool_mask": None,
        "completion_mask": inputs["completion_mask"],
        "old_per_token_logps": inputs["old_per_token_logps"],
        "sampling_per_token_logps": inputs["sampling_per_token_logps"],
    }
    exec(compile(ast.Module(body=blocks, type_ignores=[]), "trl", "exec"), scope)
    return scope["vllm_importance_sampling_ratio"]


def ours(inputs: dict, config: SimpleNamespace, use_sampler: bool):
    """The same call of grpo_loss: rows packed end to end, and the leaves to differentiate."""
    row, column = (torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]).nonzero(as_tuple=True)

    def packed(name: str) -> torch.Tensor | None:
        return None if inputs[name] is None else inputs[name].detach()[row, column]

    logprobs, entropy = packed("logps").requires_grad_(), packed("entropies").requires_grad_()
    loss, metrics = grpo_loss(
        logprobs,
        packed("old_per_token_logps"),
        inputs["advantages"],
        cu_seqlens=torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()]),
        loss_mask=packed("completion_mask"),
        ref_logprobs=packed("ref_per_token_logps") if config.beta else None,
        sampler_logprobs=packed("sampling_per_token_logps") if use_sampler else None,
        entropy=entropy,
        loss_type=config.loss_type,
        importance_level=config.importance_sampling_level,
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
        delta=config.delta,
        beta=config.beta,
        kl_bias_correction=config.use_bias_correction_kl,
        is_correction=config.vllm_importance_sampling_mode if use_sampler else None,
        is_clip=(
            config.vllm_importance_sampling_clip_min,
            config.vllm_importance_sampling_clip_max,
        ),
        entropy_coef=config.entropy_coef,
        max_completion_length=WIDTH,
        sapo_temperature_pos=config.sapo_temperature_pos,
        sapo_temperature_neg=config.sapo_temperature_neg,
        **{name: getattr(config, name) for name in VESPO},
    )
    return loss, metrics, logprobs, entropy, (row, column)


def compare(trainer_class, config: SimpleNamespace, use_sampler: bool = False, **inputs) -> None:
    inputs = padded_inputs() | inputs
    expected, logged = trl_loss(trainer_class, inputs, config, use_sampler)
    leaves = (inputs["logps"], inputs["entropies"])
    expected_grads = torch.autograd.grad(expected, leaves, allow_unused=True)
    loss, metrics, logprobs, entropy, where = ours(inputs, config, use_sampler)
    grads = torch.autograd.grad(loss, (logprobs, entropy))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[0], expected_grads[0][where], rtol=1e-4, atol=1e-7)
    assert expected_grads[0].abs().sum() > 0
    if config.entropy_coef:
        torch.testing.assert_close(grads[1], expected_grads[1][where], rtol=1e-5, atol=1e-8)
    compare_metrics(metrics.to_dict(), logged, config)


def compare_metrics(means: dict, logged: dict, config: SimpleNamespace) -> None:
    """Ours are means over tokens; TRL's clip ratios are so at token level only."""
    names = {"entropy": "entropy", "kl": "kl"}
    if config.importance_sampling_level == "token":
        for side in ("low", "high", "region") if config.loss_type in CLIPPED_LOSSES else ():
            names[f"clip_{side}"] = f"clip_ratio/{side}_mean"
        if config.loss_type == "cispo":
            names["clip_high"] = "cispo_clip_ratio"
    for name, trl_name in names.items():
        if name in means or trl_name in logged:
            assert means[name] == pytest.approx(logged[trl_name], rel=1e-5, abs=1e-6), name


SHARED_LOSSES = sorted(set(LOSS_TYPES) - {"gspo"})  # TRL spells gspo by importance_sampling_level


def test_every_loss_type_of_trl_is_accounted_for(trainer_class):
    """A variant that TRL adds fails here until it is implemented."""
    known = set()
    for node in ast.walk(
        ast.parse(textwrap.dedent(inspect.getsource(trainer_class._compute_loss)))
    ):
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == "self.loss_type":
            for comparator in node.comparators:
                values = ast.literal_eval(comparator)
                known |= {values} if isinstance(values, str) else set(values)
    assert known == set(SHARED_LOSSES)


# vespo takes no importance level of its own (TRL warns, grpo_loss refuses)
LEVELS = [
    (loss_type, level)
    for loss_type in SHARED_LOSSES
    for level in ("token", "sequence")
    if (loss_type, level) != ("vespo", "sequence")
]


@pytest.mark.parametrize(("loss_type", "level"), LEVELS)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_loss_types(trainer_class, loss_type: str, level: str, beta: float):
    high = 1.05 if loss_type == "cispo" else 0.06
    config = trl_config(
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon=0.04,
        epsilon_high=high,
        beta=beta,
    )
    compare(trainer_class, config)


@pytest.mark.parametrize("loss_type", SHARED_LOSSES)
def test_on_policy_without_old_logprobs(trainer_class, loss_type: str):
    config = trl_config(loss_type=loss_type, epsilon_high=5.0)
    compare(trainer_class, config, old_per_token_logps=None)


@pytest.mark.parametrize("loss_type", sorted(set(SHARED_LOSSES) - {"bnpo"}))  # bnpo: local by name
def test_two_micro_batches_of_trl_are_one_call_of_ours(trainer_class, loss_type: str):
    """The denominator: TRL's accumulation over two micro-batches against the whole batch at
    once."""
    config = trl_config(loss_type=loss_type, epsilon_high=1.2)
    config.steps_per_generation = 2
    inputs = padded_inputs()
    expected = 0.0
    for rows in (slice(0, 3), slice(3, 6)):
        part = {name: x[rows] if x.ndim else x for name, x in inputs.items()}
        expected = expected + trl_loss(trainer_class, part, config, use_sampler=False)[0]
    (expected_grad,) = torch.autograd.grad(expected, inputs["logps"])
    loss, _, logprobs, _, where = ours(inputs, config, use_sampler=False)
    (grad,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad[where], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "sapo"])
def test_kl_with_and_without_bias_correction(trainer_class, loss_type, corrected, level):
    config = trl_config(
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_high=1.2,
        beta=0.3,
        use_bias_correction_kl=corrected,
    )
    compare(trainer_class, config)


@pytest.mark.parametrize("loss_type", sorted(CLIPPED_LOSSES))
def test_two_sided_clip(trainer_class, loss_type: str):
    compare(trainer_class, trl_config(loss_type=loss_type, delta=1.25, epsilon=0.2))


def test_the_epsilon_of_r1(trainer_class):
    compare(trainer_class, trl_config(loss_type="grpo", epsilon=10.0, beta=0.001))


def test_sapo_temperatures(trainer_class):
    config = trl_config(loss_type="sapo", sapo_temperature_pos=0.5, sapo_temperature_neg=3.0)
    compare(trainer_class, config)


@pytest.mark.parametrize("bounds", [(None, 3.0), (0.9, 1.1), (0.95, None)])
@pytest.mark.parametrize(
    "mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo", "sapo"])
def test_sampler_correction(trainer_class, loss_type: str, mode: str, bounds):
    config = trl_config(
        loss_type=loss_type,
        beta=0.1,
        epsilon_high=1.2,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=bounds[0],
        vllm_importance_sampling_clip_max=bounds[1],
    )
    compare(trainer_class, config, use_sampler=True)


VESPO_CASES = {
    "defaults": {},
    "asymmetric": dict(zip(VESPO, (0.5, 0.2, 1.5, 4.0), strict=True)),
    "no power": {"vespo_k_pos": 0.0, "vespo_k_neg": 0.0},
    "kl": {"beta": 0.3},
    "kl-corrected": {"beta": 0.3, "use_bias_correction_kl": True},
    "entropy": {"entropy_coef": 0.02},
}


@pytest.mark.parametrize("bounds", [(None, 3.0), (0.9, 1.1), (0.95, None)])
@pytest.mark.parametrize("mode", [None, "token_truncate", "token_mask"])
@pytest.mark.parametrize("case", VESPO_CASES)
def test_vespo(trainer_class, case: str, mode: str | None, bounds):
    config = trl_config(
        loss_type="vespo",
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=bounds[0],
        vllm_importance_sampling_clip_max=bounds[1],
        **VESPO_CASES[case],
    )
    compare(trainer_class, config, use_sampler=mode is not None)


@pytest.mark.parametrize("sign", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("spread", [0.0, 0.01, 0.5, 3.0, 40.0])
def test_vespo_weight(trainer_class, spread: float, sign: float):
    """phi itself, from ratios of one to beyond every clamp, for each sign of the advantage."""
    inputs = padded_inputs()
    noise = spread * torch.randn(inputs["logps"].shape, generator=torch.Generator().manual_seed(1))
    inputs["old_per_token_logps"] = inputs["logps"].detach() - noise
    inputs["advantages"] = sign * inputs["advantages"].abs()
    mask, config = inputs["completion_mask"], trl_config(loss_type="vespo")
    phi = trainer_class.get_gamma_weights(
        inputs["advantages"][:, None], noise, mask, None, *(getattr(config, n) for n in VESPO)
    )
    if spread in (0.5, 3.0):
        assert phi.min() < 0.5 < phi.max()
    metrics = ours(inputs, config, use_sampler=False)[1]
    expected = ((phi * mask).sum() / mask.sum()).item()
    assert metrics.to_dict()["phi_mean"] == pytest.approx(expected, rel=1e-5)


def test_vespo_refuses_the_corrections_that_trl_refuses(trainer_class):
    source = inspect.getsource(trainer_class.__init__)
    assert 'self.vllm_importance_sampling_mode not in ["token_truncate", "token_mask"]' in source
    config = trl_config(loss_type="vespo", vllm_importance_sampling_mode="sequence_mask")
    with pytest.raises(ValueError, match="is_correction='sequence_mask'.*vespo"):
        ours(padded_inputs(), config, use_sampler=True)


def test_sampler_correction_with_sequence_ratios(trainer_class):
    config = trl_config(loss_type="grpo", importance_sampling_level="sequence", epsilon=0.03)
    compare(trainer_class, config, use_sampler=True)


def test_unscored_sampler_tokens(trainer_class):
    sampled = padded_inputs()["sampling_per_token_logps"]
    sampled[0, 2] = sampled[2, 4] = math.nan
    config = trl_config(loss_type="dapo", vllm_importance_sampling_mode="token_truncate")
    compare(trainer_class, config, use_sampler=True, sampling_per_token_logps=sampled)


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
def test_entropy_bonus(trainer_class, loss_type: str):
    """TRL's bonus is the token mean whatever the loss type; ours is normalised like the loss, which
    for these two is the same."""
    compare(trainer_class, trl_config(loss_type=loss_type, entropy_coef=0.02))


def test_group_advantages(trainer_class):
    """TRL's nan-aware standard deviation and 1e-4, on its own rewards layout."""
    from trl.trainer.utils import nanstd

    from grpo_engine.kernels.advantages import group_advantages

    rewards = torch.rand(12)
    rewards[5] = math.nan
    grouped = rewards.view(-1, 4)
    centred = grouped - grouped.nanmean(1, keepdim=True)
    for scale, std in (("group", nanstd(grouped, dim=1).unsqueeze(1)), ("batch", nanstd(rewards))):
        expected = (centred / (std + 1e-4)).nan_to_num(nan=0.0).flatten()
        torch.testing.assert_close(group_advantages(rewards, 4, scale=scale), expected)
