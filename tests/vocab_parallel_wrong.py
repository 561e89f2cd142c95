"""Calls with tp_group that are wrong on the last rank alone, and the errors that all must raise."""

from __future__ import annotations

import torch

# name -> what is wrong on the last rank, and what every rank passes besides
WRONG_HEAD = {
    "shape": {"token_ids": torch.zeros(5, dtype=torch.long)},
    "dtype": {"weight": torch.zeros(5, 8, dtype=torch.float64)},
    "no rows of the head": {"weight": torch.zeros(0, 8)},
    "token id": {"token_ids": torch.full((6,), 20)},
    "other rows": {
        "hidden": torch.zeros(5, 8),
        "token_ids": torch.zeros(5, dtype=torch.long),
        "old_logprobs": torch.zeros(5),
        "advantages": torch.ones(5),
    },
    "other mask": {"row_mask": torch.arange(6) > 2},
    "temperature": {"temperature": 0.0},
    "row temperature": {"temperature": torch.tensor([1.0, 1, 1, -1, 1, 1])},
    "other temperature": {"temperature": 0.5},
    "other need": {"hidden": torch.ones(6, 8, requires_grad=True)},
    "other hidden need": {
        "hidden": torch.ones(6, 8, requires_grad=True),
        "weight": torch.ones(5, 8, requires_grad=True),
    },
    "other weight need": {"weight": torch.ones(5, 8, requires_grad=True)},
}
TWO = {"cu_seqlens": torch.tensor([0, 3, 6])}
SEQUENCE_MASK = {"is_correction": "sequence_mask", "sampler_logprobs": torch.zeros(6)}
WRONG_LOSS = {
    "loss shape": ({"advantages": torch.ones(4)}, {}),
    "loss option": ({"loss_type": "ppo"}, {}),
    "unknown option": ({"epsilom": 0.1}, {}),
    "other option": ({"epsilon": 0.3}, {}),
    "other advantages": ({"advantages": torch.zeros(6)}, {}),
    "other denominator": ({"denominator": 5.0}, {}),
    "gspo shape": ({"advantages": torch.ones(4)}, {"loss_type": "gspo"}),
    "gspo advantages": ({"advantages": torch.zeros(6)}, {"loss_type": "gspo"}),
    "gspo option": ({"epsilon": 1e-3}, {"loss_type": "gspo"}),
    "gspo sequences": ({"cu_seqlens": torch.tensor([0, 1, 6])}, {"loss_type": "gspo"} | TWO),
    "gspo denominator": ({"denominator": 50.0}, {"loss_type": "gspo", "denominator": 1.0}),
    "gspo denominator tensor": (
        {"denominator": torch.tensor(50.0)},
        {"loss_type": "gspo", "denominator": torch.tensor(1.0)},
    ),
    "gspo bad denominator": ({"denominator": 0.0}, {"loss_type": "gspo", "denominator": 1.0}),
    "gspo entropy": ({"return_entropy": True}, {"loss_type": "gspo"}),
    "gspo batch_invariant": ({"batch_invariant": True}, {"loss_type": "gspo"}),
    "gspo need": ({"hidden": torch.ones(6, 8, requires_grad=True)}, {"loss_type": "gspo"}),
    "luspo sequences": (
        {"cu_seqlens": torch.tensor([0, 1, 6])},
        {"loss_type": "luspo", "importance_level": "sequence"} | TWO,
    ),
    "vespo option": ({"vespo_k_pos": 1.5}, {"loss_type": "vespo"}),
    "sequence_mask option": ({"is_clip": (None, 3.0)}, SEQUENCE_MASK),
}

# What every rank's error must name: the wrong rank's own, which the others are told, or the
# difference that all of them see.
NAMES_IN_ERRORS = {
    "shape": "token_ids must have shape [6], got [5]",
    "dtype": "weight must be float32, bfloat16 or float16, got torch.float64",
    "no rows of the head": "weight must have shape [V, 8] with V > 0, got [0, 8]",
    "token id": "token_ids must be the same on every rank",
    "other rows": "hidden must be the same on every rank of tp_group, got float32 [6, 8] on rank 0",
    "other mask": "row_mask must be the same on every rank",
    "temperature": "temperature must be finite and > 0, got 0.0",
    "row temperature": "temperature must be the same on every rank",
    "other temperature": "temperature must be the same on every rank",
    "other need": "must be the same on every rank",
    "other hidden need": "hidden requires grad must be the same on every rank",
    "other weight need": "any requires grad must be the same on every rank",
    "loss shape": "advantages must have shape",
    "loss option": "loss_type",
    "unknown option": "epsilom",
    "other option": "loss options must be the same on every rank",
    "other advantages": "advantages must be the same on every rank",
    "other denominator": "cu_seqlens, loss_mask or denominator must be the same on every rank",
    "gspo shape": "advantages must have shape",
    "gspo advantages": "advantages must be the same on every rank",
    "gspo option": "loss options must be the same on every rank",
    "gspo sequences": "cu_seqlens must be the same on every rank",
    "gspo denominator": "denominator must be the same on every rank of tp_group, got 1.0 on rank 0",
    "gspo denominator tensor": "denominator must be the same on every rank",
    "gspo bad denominator": "denominator must be > 0 and finite, got 0.0",
    "gspo entropy": "return_entropy must be the same on every rank",
    "gspo batch_invariant": "batch_invariant must be the same on every rank",
    "gspo need": "hidden requires grad must be the same on every rank",
    "luspo sequences": "cu_seqlens must be the same on every rank",
    "vespo option": "loss options must be the same on every rank",
    "sequence_mask option": "loss options must be the same on every rank",
    "backward": "hidden requires grad must be the same on every rank",
}
