"""Kernels of GRPO Engine, imported as ``grpo_engine.kernels`` (``package_dir`` maps this folder
there).

``<op>`` is the fast path (Triton/CUDA on CUDA tensors, a portable chunked path on CPU tensors) and
``<op>_ref`` its fp32/fp64 specification with the same signature.
"""

from grpo_engine.kernels.advantages import group_advantages, group_advantages_ref
from grpo_engine.kernels.attention import varlen_attention, varlen_attention_ref
from grpo_engine.kernels.grpo_loss import grpo_loss, grpo_loss_ref
from grpo_engine.kernels.linear_grpo import linear_grpo_loss, linear_grpo_loss_ref
from grpo_engine.kernels.linear_logprobs import linear_logprobs, linear_logprobs_ref
from grpo_engine.kernels.logprobs import token_logprobs, token_logprobs_ref
from grpo_engine.kernels.loss_options import LossMetrics, LossOptions, make_loss_options
from grpo_engine.kernels.packing import (
    PackedBatch,
    completion_rows,
    pack_rollouts,
    pack_rollouts_ref,
    plan_batches,
    unpack,
    unpack_ref,
)
from grpo_engine.kernels.sampler_kept import (
    kept_by_sampler,
    kept_by_sampler_ref,
    linear_kept_by_sampler,
    linear_kept_by_sampler_ref,
)

# Hugging Face transformers probes ``find_spec("kernels")``; with the repository root on sys.path it
# finds this folder and some releases read ``__version__`` from it.
__version__ = "0.1.0"

__all__ = [
    "LossMetrics",
    "LossOptions",
    "PackedBatch",
    "completion_rows",
    "group_advantages",
    "group_advantages_ref",
    "grpo_loss",
    "grpo_loss_ref",
    "kept_by_sampler",
    "kept_by_sampler_ref",
    "linear_grpo_loss",
    "linear_grpo_loss_ref",
    "linear_kept_by_sampler",
    "linear_kept_by_sampler_ref",
    "linear_logprobs",
    "linear_logprobs_ref",
    "make_loss_options",
    "pack_rollouts",
    "pack_rollouts_ref",
    "plan_batches",
    "token_logprobs",
    "token_logprobs_ref",
    "unpack",
    "unpack_ref",
    "varlen_attention",
    "varlen_attention_ref",
]
