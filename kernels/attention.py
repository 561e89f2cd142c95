"""Attention over packed rows: every token sees only its own sequence.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j   j in the sequence of i, j <= i, i - j < window

A pack of S sequences of lengths L_s costs O(sum L_s^2); the obvious block-diagonal mask costs
O((sum L_s)^2) memory and time, and is built here only by the reference.

Three backends compute the same function:

* ``torch``: ``torch.nn.attention.varlen.varlen_attn`` (FlashAttention inside PyTorch >= 2.10), half
  precision on CUDA devices of compute capability 8.0 (A100) or newer. Its arguments changed in 2.11
  (``window_size``, ``scale``) and 2.12 (``enable_gqa``): read from the signature, not the version.
* ``flash-attn``: ``flash_attn_varlen_func`` of the separate package, only on request.
* ``buckets``: any device, any dtype, softcap too. Sequences of similar length are padded together
  on the right and go through ``scaled_dot_product_attention(is_causal=True)``, one call a bucket.
  Padding keys lie after every real query, so causality itself hides them and no mask is needed.

``buckets`` needs the lengths on the host: for a CUDA ``cu_seqlens`` one read, which waits, and one
copy back from pinned memory, which does not, per pack and none per layer, if the caller keeps the
``BucketPlan`` (the policy does).
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from grpo_engine.kernels.common import device_arch

BACKENDS = ("auto", "torch", "flash-attn", "buckets")


def varlen_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    plan: BucketPlan | None = None,
) -> Tensor:
    """The specification: a dense [N, N] mask, in fp32 (fp64 for fp64 input). Returns q's dtype.
    ``backend`` and ``plan`` say how, not what: no effect here."""
    _check(q, k, v, cu_seqlens, max_seqlen, causal, window, softcap)
    _check_lengths(q, cu_seqlens, max_seqlen, plan=None)
    n = q.shape[0]
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    token = torch.arange(n, device=q.device)
    segment = torch.searchsorted(cu_seqlens.to(token.dtype), token, right=True)  # [N]
    allowed = segment[:, None] == segment[None, :]  # [N, N]
    distance = token[:, None] - token[None, :]
    if causal:
        allowed &= distance >= 0
    if window is not None:
        allowed &= distance < window
    out = dense_attention(
        *(x.to(acc).transpose(0, 1)[None] for x in (q, k, v)), allowed, scale, softcap
    )
    return out[0].transpose(0, 1).to(q.dtype)


@dataclass(frozen=True)
class Bucket:
    """``rows`` sequences padded on the right to ``length`` tokens: the next rows x length slots."""

    rows: int
    length: int


@dataclass
class BucketPlan:
    """Where each token of a pack goes when sequences of similar length are padded into buckets.

    P = slots = tokens + padding. Built once per pack; holds the window masks made for it.
    """

    buckets: list[Bucket]
    token_of_slot: Tensor  # [P] int64; a padding slot repeats its sequence's last token
    slot_of_token: Tensor  # [N] int64
    padding_slots: Tensor  # [number of padding slots] int64
    window_masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        return max((bucket.length for bucket in self.buckets), default=0)

    def window_mask(self, length: int, window: int) -> Tensor:
        """[length, length] bool, True where |query - key| lies in the causal window."""
        mask = self.window_masks.get((length, window))
        if mask is None:
            ones = torch.ones(length, length, dtype=torch.bool, device=self.token_of_slot.device)
            mask = self.window_masks[length, window] = ones.tril().triu(1 - window)
        return mask


def plan_buckets(cu_seqlens: Tensor | Sequence[int], *, exact: bool = False) -> BucketPlan:
    """Plan the padding of a pack. ``cu_seqlens`` [S+1]: a CUDA tensor costs one host sync.

    Sequences share a bucket when padding stays below a sixth of its length or 8 tokens (below that
    a call costs more than the padding); ``exact`` allows no padding at all.

    Raises ValueError unless ``cu_seqlens`` ascends from 0.
    """
    device = cu_seqlens.device if isinstance(cu_seqlens, Tensor) else torch.device("cpu")
    bounds = torch.as_tensor(cu_seqlens, device="cpu", dtype=torch.int64)
    lengths = bounds.diff()
    _check_ascending(bounds)
    order = lengths.argsort(descending=True, stable=True).tolist()
    starts, lens = bounds.tolist(), lengths.tolist()
    groups: list[list[int]] = []
    longest = 0
    for s in order:
        if lens[s] == 0:
            continue
        slack = 0 if exact else max(8, longest // 6)
        if not groups or longest - lens[s] > slack:
            groups.append([])
            longest = lens[s]
        groups[-1].append(s)

    buckets: list[Bucket] = []
    pieces: list[Tensor] = []
    num_slots = 0
    for group in groups:
        length = lens[group[0]]
        within = torch.arange(length)[None, :]
        last = torch.tensor([lens[s] - 1 for s in group])[:, None]
        start = torch.tensor([starts[s] for s in group])[:, None]
        pieces.append((start + torch.minimum(within, last)).flatten())
        buckets.append(Bucket(len(group), length))
        num_slots += len(group) * length
    token_of_slot = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
    # A sequence's slots rise with its tokens and padding repeats the last one, so "first slot that
    # holds this token" is where the token changes from one slot to the next (or a row begins).
    real = torch.ones(num_slots, dtype=torch.bool)
    if num_slots:
        real[1:] = token_of_slot[1:] != token_of_slot[:-1]
    slots = torch.arange(num_slots)
    slot_of_token = torch.empty(starts[-1], dtype=torch.int64)
    slot_of_token[token_of_slot[real]] = slots[real]
    indices = [token_of_slot, slot_of_token, slots[~real]]
    packed = torch.cat(indices)
    if device.type == "cuda":  # one copy, and from pinned memory: pageable ones would wait
        packed = packed.pin_memory()
    packed = packed.to(device, non_blocking=True)
    return BucketPlan(buckets, *packed.split([len(index) for index in indices]))


class _PadRows(torch.autograd.Function):
    """[N, ...] -> [P, ...]. The gradient of padding is exactly 0 (no real query sees a padding
    key), so the adjoint is a gather too, not the atomic scatter-add that autograd would use."""

    @staticmethod
    def forward(ctx, x: Tensor, plan: BucketPlan) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.token_of_slot)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.index_select(0, ctx.plan.slot_of_token), None


class _UnpadRows(torch.autograd.Function):
    """[P, ...] -> [N, ...]; the gradient of padding is set to 0, which ``_PadRows`` relies on."""

    @staticmethod
    def forward(ctx, x: Tensor, plan: BucketPlan) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.slot_of_token)

    @staticmethod
    def backward(ctx, grad: Tensor):
        padded = grad.index_select(0, ctx.plan.token_of_slot)
        return padded.index_fill_(0, ctx.plan.padding_slots, 0), None


def _attention_buckets(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BucketPlan,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    q, k, v = (_PadRows.apply(x, plan) for x in (q, k, v))
    # One split, not a slice per bucket: the gradient of a slice is a zero-filled [P, H, Dh].
    sizes = [bucket.rows * bucket.length for bucket in plan.buckets]
    outs = []
    for bucket, *qkv in zip(plan.buckets, *(x.split(sizes) for x in (q, k, v)), strict=True):
        qb, kb, vb = (
            x.unflatten(0, (bucket.rows, bucket.length)).transpose(1, 2) for x in qkv
        )  # [rows, H, length, Dh]
        windowed = window is not None and window < bucket.length
        if softcap is not None:
            reach = window if windowed else bucket.length
            mask = plan.window_mask(bucket.length, reach) if causal else None
            out = dense_attention(qb, kb, vb, mask, scale, softcap)
        elif windowed:
            mask = plan.window_mask(bucket.length, window)
            kb, vb = _repeat_heads(kb, qb.shape[1], 1), _repeat_heads(vb, qb.shape[1], 1)
            out = scaled_dot_product_attention(qb, kb, vb, attn_mask=mask, scale=scale)
        else:
            gqa = qb.shape[1] != kb.shape[1]
            out = scaled_dot_product_attention(
                qb, kb, vb, is_causal=causal, scale=scale, enable_gqa=gqa
            )
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return _UnpadRows.apply(torch.cat(outs) if outs else q, plan)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    """q [B, Hq, Lq, Dh], k, v [B, Hkv, Lk, Dh], allowed bool [..., Lq, Lk]; softmax >= fp32."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = _repeat_heads(k, q.shape[1], 1), _repeat_heads(v, q.shape[1], 1)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    return scores.softmax(-1, dtype=acc).to(q.dtype) @ v


def _repeat_heads(x: Tensor, num_heads: int, dim: int) -> Tensor:
    return x if x.shape[dim] == num_heads else x.repeat_interleave(num_heads // x.shape[dim], dim)


@lru_cache(maxsize=1)
def _torch_varlen() -> tuple[Callable[..., Tensor], frozenset[str]] | None:
    """``varlen_attn`` and its parameter names; None in torch 2.9 and older."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def _attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float | None,
    window: int | None,
) -> Tensor:
    found = _torch_varlen()
    if found is None:
        raise ValueError(
            f"backend='torch' needs torch >= 2.10, this is {torch.__version__}; backend='buckets' "
            "runs on any"
        )
    if q.is_cuda and _capability(q) < 80:
        raise ValueError(
            f"backend='torch' needs compute capability 8.0 or newer, {q.device} has "
            f"{_capability(q) / 10}; backend='buckets' runs on any"
        )
    varlen_attn, parameters = found
    options: dict[str, object] = {}
    if "window_size" in parameters:
        # FlashAttention counts the keys to the left of the query; ours counts the query too.
        left = -1 if window is None else window - 1
        options["window_size"] = (left, 0) if causal else (-1, -1)
    elif window is not None:
        raise ValueError(
            f"window={window} with backend='torch' needs torch >= 2.11, this is {torch.__version__}"
        )
    else:
        options["is_causal"] = causal
    if "enable_gqa" in parameters:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    else:
        k, v = _repeat_heads(k, q.shape[1], 1), _repeat_heads(v, q.shape[1], 1)
    if "scale" in parameters:
        options["scale"] = scale
    elif scale is not None:
        q = q * (scale * q.shape[-1] ** 0.5)  # this version always divides by sqrt(Dh)
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)


def _attention_flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            "backend='flash-attn' needs the flash-attn package, which is not installed"
        )
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        softmax_scale=scale,
        causal=causal,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )


def _capability(q: Tensor) -> int:
    """75 for a T4, 80 for an A100."""
    return device_arch(q.device.index or 0)


def _check_ascending(bounds: Tensor) -> None:
    if bounds[0] != 0 or (bounds.diff() < 0).any():
        raise ValueError(f"cu_seqlens must ascend from 0, got {bounds.tolist()}")


def _check_lengths(q: Tensor, cu_seqlens: Tensor, max_seqlen: int, plan: BucketPlan | None) -> None:
    """What the host knows without waiting for the device: a plan's lengths, a CPU tensor's."""
    if plan is not None:
        num_tokens, longest = len(plan.slot_of_token), plan.longest
    elif cu_seqlens.is_cpu:
        _check_ascending(cu_seqlens)
        num_tokens = int(cu_seqlens[-1])
        longest = int(cu_seqlens.diff().amax()) if len(cu_seqlens) > 1 else 0
    else:
        return
    if num_tokens != q.shape[0]:
        raise ValueError(f"cu_seqlens ends at {num_tokens}, q has {q.shape[0]} tokens")
    if longest > max_seqlen:
        raise ValueError(f"max_seqlen = {max_seqlen}, but a sequence has {longest} tokens")


def _check(q, k, v, cu_seqlens, max_seqlen, causal, window, softcap) -> None:
    if q.dim() != 3 or k.dim() != 3 or v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"q, k, v must be [N, Hq, Dh], [N, Hkv, Dh], [N, Hkv, Dh], got {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in tokens or head size")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"Hq={q.shape[1]} is not a multiple of Hkv={k.shape[1]}")
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"q, k, v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(
            f"cu_seqlens must be int32 [S+1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, q on {q.device}")
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen must be >= 0, got {max_seqlen}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window must be >= 1 and causal, got window={window}, causal={causal}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be > 0, got {softcap}")


def choose_backend(q: Tensor, v: Tensor, window: int | None, softcap: float | None) -> str:
    """What "auto" means: FlashAttention (``torch``) where it takes the input, else ``buckets``."""
    found = _torch_varlen()
    if (
        not q.is_cuda
        or q.dtype not in (torch.float16, torch.bfloat16)
        or q.shape[-1] % 8
        or q.shape[-1] > 256
        or v.shape[-1] != q.shape[-1]
        or softcap is not None
        or found is None
        or _capability(q) < 80
        or (window is not None and "window_size" not in found[1])
    ):
        return "buckets"
    return "torch"


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    plan: BucketPlan | None = None,
) -> Tensor:
    """Softmax attention inside each sequence of a pack; differentiable in q, k and v.

    Args:
        q: [N, Hq, Dh]; k, v: [N, Hkv, Dh] with Hq a multiple of Hkv; any float dtype.
        cu_seqlens: [S+1] int32 on q's device, 0 first and N last.
        max_seqlen: at least the longest sequence, a host int. On the CPU, and wherever ``plan`` is
            given, both are checked; FlashAttention on CUDA trusts them, as looking would wait for
            the device: it may leave rows past cu_seqlens[-1], or past max_seqlen within a sequence,
            unwritten.
        scale: of the scores before softcap and softmax; default Dh ** -0.5.
        window: keys a query sees, itself included (Hugging Face's ``sliding_window``); None = all.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
        backend: one of ``BACKENDS``; "auto" takes FlashAttention (``torch``) on CUDA where input
            and device allow it, else ``buckets``: fp32, a softcap, torch 2.9, a V100 or T4.
        plan: ``plan_buckets(cu_seqlens)`` kept by a caller with many layers; used by "buckets"
            only.

    Returns: [N, Hq, Dh] in q's dtype.

    Raises:
        ValueError: bad shape, dtype, device or option; a backend that lacks an option asked for.
    """
    _check(q, k, v, cu_seqlens, max_seqlen, causal, window, softcap)
    _check_lengths(q, cu_seqlens, max_seqlen, plan)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "auto":
        backend = choose_backend(q, v, window, softcap)
    if backend == "torch":
        if softcap is not None:
            raise ValueError(f"softcap={softcap} is not supported by backend='torch'")
        return _attention_torch(q, k, v, cu_seqlens, max_seqlen, causal, scale, window)
    if backend == "flash-attn":
        return _attention_flash_attn(
            q, k, v, cu_seqlens, max_seqlen, causal, scale, window, softcap
        )
    if plan is None:
        plan = plan_buckets(cu_seqlens, exact=not causal)
        _check_lengths(q, cu_seqlens, max_seqlen, plan)
    elif not causal and len(plan.padding_slots):
        raise ValueError("causal=False needs a plan made with exact=True: padding would be seen")
    return _attention_buckets(q, k, v, plan, causal, scale, window, softcap)
