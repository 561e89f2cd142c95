"""What the tests of the loss share: the options they run through, batches, and the comparison with
the specification in fp64."""

from __future__ import annotations

import pytest
import torch

from grpo_engine.kernels.common import interpreting
from grpo_engine.kernels.grpo_loss import grpo_loss, grpo_loss_ref

PATHS = ["portable", pytest.param("triton", marks=pytest.mark.triton)]
FIELDS = ("logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs", "entropy")

# One line per formula and per option; each is checked for value, gradients and metrics.
OPTIONS = {
    "grpo": {},
    "grpo-clip-higher": {"epsilon": 0.1, "epsilon_high": 0.28},
    "grpo-r1": {"epsilon": 10.0, "beta": 0.001},
    "grpo-delta": {"delta": 1.5},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 30},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "bnpo": {"loss_type": "bnpo"},
    "luspo": {"loss_type": "luspo", "importance_level": "sequence", "epsilon": 0.03},
    "luspo-token": {"loss_type": "luspo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "sapo": {"loss_type": "sapo"},
    "sapo-temperatures": {
        "loss_type": "sapo",
        "sapo_temperature_pos": 0.7,
        "sapo_temperature_neg": 2.0,
    },
    "vespo": {"loss_type": "vespo"},
    "vespo-shape": {
        "loss_type": "vespo",
        "vespo_k_pos": 0.5,
        "vespo_lambda_pos": 0.2,
        "vespo_k_neg": 1.5,
        "vespo_lambda_neg": 4.0,
    },
    "vespo-is-truncate": {
        "loss_type": "vespo",
        "is_correction": "token_truncate",
        "is_clip": (0.9, 1.1),
    },
    "vespo-is-mask-kl": {
        "loss_type": "vespo",
        "is_correction": "token_mask",
        "is_clip": (0.8, 1.2),
        "beta": 0.3,
        "kl_bias_correction": True,
    },
    "gspo": {"loss_type": "gspo", "epsilon": 0.03},
    "sequence-dapo": {"loss_type": "dapo", "importance_level": "sequence", "epsilon": 0.03},
    "sequence-cispo": {"loss_type": "cispo", "importance_level": "sequence", "epsilon_high": 1.01},
    "sequence-sapo": {"loss_type": "sapo", "importance_level": "sequence"},
    "kl-k1": {"beta": 0.3, "kl_estimator": "k1"},
    "kl-k2": {"beta": 0.3, "kl_estimator": "k2"},
    "kl-k3": {"beta": 0.3},
    "kl-k1-corrected": {"beta": 0.3, "kl_estimator": "k1", "kl_bias_correction": True},
    "kl-k3-corrected": {"beta": 0.3, "kl_bias_correction": True},
    "kl-k3-corrected-sequence": {
        "beta": 0.3,
        "kl_bias_correction": True,
        "loss_type": "gspo",
        "epsilon": 0.03,
    },
    "kl-cispo-corrected": {"beta": 0.3, "kl_bias_correction": True, "loss_type": "cispo"},
    "is-token-truncate": {"is_correction": "token_truncate", "is_clip": (0.9, 1.1)},
    "is-token-mask": {"is_correction": "token_mask", "is_clip": (0.9, 1.1)},
    "is-sequence-truncate": {"is_correction": "sequence_truncate", "is_clip": (0.9, 1.1)},
    "is-sequence-mask": {"is_correction": "sequence_mask", "is_clip": (0.9, 1.1)},
    "is-unbounded": {"is_correction": "token_truncate", "is_clip": (None, None)},
    "is-with-kl": {"is_correction": "token_mask", "is_clip": (0.9, 1.1), "beta": 0.3},
    "is-sequence-gspo": {
        "is_correction": "sequence_truncate",
        "loss_type": "gspo",
        "epsilon": 0.03,
        "beta": 0.1,
    },
    "entropy": {"entropy_coef": 0.01},
    "entropy-dapo-kl": {"entropy_coef": -0.02, "loss_type": "dapo", "beta": 0.1},
}


def device_of_path(path: str) -> torch.device:
    """The device on which grpo_loss takes the portable path, or the Triton kernels."""
    if path == "portable":
        if interpreting():
            pytest.skip("TRITON_INTERPRET=1 sends CPU tensors to the Triton kernels")
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_batch(
    device: torch.device, lengths=(5, 0, 15, 1, 20, 3), seed: int = 0, spread: float = 0.3
) -> dict:
    """Tokens of `lengths`, some masked, one sequence wholly; leaves require grad."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    logprobs = -torch.rand(n, generator=g) * 3

    def near(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x + scale * spread * torch.randn(n, generator=g)

    old = near(logprobs)
    mask = torch.rand(n, generator=g) > 0.2
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    if len(lengths) > 1:
        mask[cu_seqlens[-2] : cu_seqlens[-1]] = False
    batch = {
        "logprobs": logprobs,
        "old_logprobs": old,
        "advantages": torch.randn(n, generator=g),
        "cu_seqlens": cu_seqlens,
        "loss_mask": mask,
        "ref_logprobs": near(logprobs),
        "sampler_logprobs": near(old, 0.3),
        "entropy": torch.rand(n, generator=g) * 2,
    }
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    batch["logprobs"].requires_grad_()
    batch["entropy"].requires_grad_()
    return batch


def in_double(batch: dict) -> dict:
    """The same values in fp64, as new leaves."""
    out = {}
    for name, tensor in batch.items():
        if tensor is None or not tensor.is_floating_point():
            out[name] = tensor
        else:
            out[name] = tensor.detach().double().requires_grad_(tensor.requires_grad)
    return out


def run(fn, batch: dict, **options):
    """(loss, gradient of logprobs, gradient of entropy, metrics)."""
    loss, metrics = fn(**batch, **options)
    leaves = (batch["logprobs"], batch["entropy"])
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return loss.detach(), *grads, metrics


def assert_matches_reference(batch: dict, **options) -> None:
    loss, grad, grad_entropy, metrics = run(grpo_loss, batch, **options)
    truth, truth_grad, truth_entropy, truth_metrics = run(
        grpo_loss_ref, in_double(batch), **options
    )
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    scale = truth_grad.abs().max().item()
    torch.testing.assert_close(grad.double(), truth_grad, rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(grad_entropy.double(), truth_entropy, rtol=1e-5, atol=1e-9)
    assert metrics.names == truth_metrics.names
    torch.testing.assert_close(metrics.to_dict(), truth_metrics.to_dict(), rtol=1e-5, atol=1e-6)


def cut_sequences(batch: dict, order: list[int]) -> dict:
    """The sequences `order` of a batch, packed anew."""
    bounds = batch["cu_seqlens"].tolist()
    index = torch.tensor(
        [t for s in order for t in range(bounds[s], bounds[s + 1])], dtype=torch.long
    )
    lengths = [bounds[s + 1] - bounds[s] for s in order]
    part = {name: batch[name].detach()[index] for name in (*FIELDS, "advantages", "loss_mask")}
    part["cu_seqlens"] = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    part["cu_seqlens"] = part["cu_seqlens"].to(batch["cu_seqlens"])
    part["logprobs"].requires_grad_()
    part["entropy"].requires_grad_()
    return part | {"index": index}
