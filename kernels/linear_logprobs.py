"""Log-probabilities straight from hidden states: a language-model head that never holds [N, V].

Maths. raw = hidden @ weight.T [N, V]; logits = softcap * tanh((raw + bias) * scale / softcap);
then the row maths of logprobs.py on logits / temperature. The bias belongs to the linear layer, the
scale multiplies its result (Cohere, Granite), the softcap follows (Gemma), the temperature is last.
With G = dL/d raw [N, V]: d hidden = G @ weight, d weight = G.T @ hidden, d bias = sum of G's rows.

Rows go through in chunks: GEMM to fp32 logits, one pass over them (vocab_rows.py), nothing kept but
five numbers a row. Backward recomputes the chunk's logits: 4 GEMMs of 2 N D V FLOP in all, 3 with a
frozen head (no d weight). linear_grpo.py needs one less: it makes its gradient in the forward pass.

Precision. Logits leave the GEMM in fp32, never rounded to half, which would cost 0.1 in a logprob
and bias the entropy. d weight and d bias are summed over chunks in fp32 and rounded once. On a CPU
half inputs are multiplied in fp32, a tile of the vocabulary at a time. On CUDA fp32 GEMMs obey
``torch.backends.cuda.matmul``: TF32 applies where the user allows it.

Bytes on CUDA at half inputs, besides the GEMMs' own reads of X and W: forward 8 a logit (fp32
written and read), backward 14 (the same again, then G written in half and read by two GEMMs).
Workspace: one chunk of fp32 logits and one of G, ``CUDA_WORKSPACE_BYTES``. d weight in fp32: 4 D V.

Rows with ``row_mask`` False give logprob, entropy and lse 0 and take no gradient; their token ids
are not looked at. On a CPU those rows, and in backward the rows whose incoming gradients are zero,
are left out of the GEMMs. On CUDA counting them would be a host sync, so only the passes over
their logits are skipped.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import torch

from grpo_engine.kernels.common import INT_DTYPES, check_float, check_vector, use_triton
from grpo_engine.kernels.logprobs import check_row_values, row_grads, split_temperature
from grpo_engine.kernels.vocab_rows import (
    LogitOptions,
    RowGrads,
    RowStats,
    apply_logit_options,
    dlogits_rows,
    fold_rows,
    row_chunks,
    shift_rows,
)

# Logits of a chunk (fp32) and their gradient together. At V = 151,936 in bf16: 2,304 rows.
CUDA_WORKSPACE_BYTES = 2 << 30
# On a CPU: elements of a chunk's logits (a cache of 2 MB), but at least as many rows as keep the
# GEMM from re-reading the weight too often, and at most as many as still add speed.
CPU_CHUNK_ELEMENTS = 1 << 19
CPU_CHUNK_ROWS = (128, 4096)
# On a CPU: rows of a half-precision weight that are widened to fp32 at a time.
CPU_VOCAB_TILE = 4096


def linear_logprobs_ref(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
    row_mask: torch.Tensor | None = None,
    tp_group: object | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Specification of ``linear_logprobs``: [N, V] logits in fp64 for fp64 inputs, else fp32."""
    if tp_group is not None:
        raise ValueError("tp_group is not supported yet")
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(wide) @ weight.to(wide).T
    if bias is not None:
        logits = logits + bias.to(wide)
    if logit_scale is not None:
        logits = logits * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    logits = logits / (temperature[:, None] if torch.is_tensor(temperature) else temperature)
    ids = token_ids.long() if row_mask is None else token_ids.long().where(row_mask, 0)
    log_p = torch.log_softmax(logits, dim=-1)
    outputs = [log_p.gather(1, ids[:, None]).squeeze(1)]
    if return_entropy:
        outputs.append(-(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1))
    if return_lse:
        outputs.append(logits.logsumexp(-1))
    if row_mask is not None:
        outputs = [torch.where(row_mask, output, 0.0) for output in outputs]
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


# ---- Chunks of rows, shared with linear_grpo.py --------------------------------------------------


@dataclass(frozen=True)
class Workspace:
    """Buffers for one chunk: ``logits`` [C, V] fp32 and ``dlogits`` [C, V] for their gradient, in
    fp32 on the portable path (where the fold uses it as scratch) and the GEMM's dtype on Triton."""

    logits: torch.Tensor
    dlogits: torch.Tensor

    @classmethod
    def make(cls, hidden: torch.Tensor, vocab: int, *, for_gradient: bool) -> Workspace:
        portable = not use_triton(hidden)
        dtype = torch.float32 if portable else hidden.dtype
        rows = min(chunk_rows(hidden, vocab), max(1, hidden.shape[0]))
        return cls(
            torch.empty(rows, vocab, dtype=torch.float32, device=hidden.device),
            torch.empty(
                rows if portable or for_gradient else 0, vocab, dtype=dtype, device=hidden.device
            ),
        )

    @property
    def rows(self) -> int:
        return self.logits.shape[0]


def chunk_rows(hidden: torch.Tensor, vocab: int) -> int:
    """Rows of a chunk, from the memory budget of the device."""
    if hidden.is_cuda:
        bytes_per_row = vocab * (4 + hidden.element_size())
        return max(128, CUDA_WORKSPACE_BYTES // bytes_per_row // 128 * 128)
    least, most = CPU_CHUNK_ROWS
    return max(least, min(most, CPU_CHUNK_ELEMENTS // vocab))


def raw_logits(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """hidden [C, D] @ weight.T [D, V] in fp32, into ``out`` [C, V]."""
    if hidden.dtype == torch.float32:
        return torch.mm(hidden, weight.t(), out=out)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
    wide = hidden.float()
    for start in range(0, weight.shape[0], CPU_VOCAB_TILE):
        tile = slice(start, start + CPU_VOCAB_TILE)
        out[:, tile] = wide @ weight[tile].float().t()
    return out


@dataclass(frozen=True)
class HeadGrads:
    """Gradients of the inputs of a head, summed over chunks; None where not needed."""

    hidden: torch.Tensor | None  # [N, D]
    weight: torch.Tensor | None  # [V, D] fp32
    bias: torch.Tensor | None  # [V] fp32

    @classmethod
    def zeros(
        cls,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        needs: tuple[bool, bool, bool],
        hidden_dtype: torch.dtype,
    ) -> HeadGrads:
        need_hidden, need_weight, need_bias = needs
        make = weight.new_zeros
        return cls(
            hidden.new_zeros(hidden.shape, dtype=hidden_dtype) if need_hidden else None,
            make(weight.shape, dtype=torch.float32) if need_weight else None,
            make(weight.shape[:1], dtype=torch.float32) if need_bias else None,
        )

    def add(
        self,
        index: slice | torch.Tensor,
        dlogits: torch.Tensor,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        unscale: torch.Tensor | None,
    ) -> None:
        """Add a chunk: ``dlogits`` [C, V] times ``unscale`` (0-d; None: 1), ``hidden`` [C, D]."""
        if self.bias is not None:
            bias = dlogits.sum(0, dtype=torch.float32)
            self.bias.add_(bias if unscale is None else bias * unscale)
        if dlogits.dtype == torch.float32 and hidden.dtype != torch.float32:
            self._add_widened(index, dlogits, hidden, weight)
        elif dlogits.dtype == torch.float32:
            if self.hidden is not None and isinstance(index, slice):
                torch.mm(dlogits, weight, out=self.hidden[index])
            elif self.hidden is not None:
                self.hidden[index] = dlogits @ weight
            if self.weight is not None:
                self.weight.addmm_(dlogits.t(), hidden)
        else:
            self._add_half(index, dlogits, hidden, weight, unscale)

    def _add_widened(self, index, dlogits, hidden, weight) -> None:
        """fp32 GEMMs on half inputs (CPU), a tile of the vocabulary at a time."""
        wide = hidden.float()
        grad_hidden = torch.zeros_like(wide)
        for start in range(0, weight.shape[0], CPU_VOCAB_TILE):
            tile = slice(start, start + CPU_VOCAB_TILE)
            if self.hidden is not None:
                grad_hidden.addmm_(dlogits[:, tile], weight[tile].float())
            if self.weight is not None:
                self.weight[tile].addmm_(dlogits[:, tile].t(), wide)
        if self.hidden is not None:
            self.hidden[index] = grad_hidden.to(self.hidden.dtype)

    def _add_half(self, index, dlogits, hidden, weight, unscale) -> None:
        """Half GEMMs with fp32 results (Triton path). ``unscale`` costs a pass over [V, D]."""
        if self.hidden is not None:
            grad_hidden = half_mm(dlogits, weight)
            if unscale is not None:
                grad_hidden.mul_(unscale)
            self.hidden[index] = grad_hidden.to(self.hidden.dtype)
        if self.weight is None:
            return
        if unscale is not None:
            self.weight.add_(half_mm(dlogits.t(), hidden).mul_(unscale))
        elif dlogits.is_cuda:
            torch.addmm(self.weight, dlogits.t(), hidden, out_dtype=torch.float32, out=self.weight)
        else:
            self.weight.add_(half_mm(dlogits.t(), hidden))


def half_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of half matrices with an fp32 result; widened where the device has no such GEMM."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def scale_for_half(grads: RowGrads, dtype: torch.dtype) -> tuple[RowGrads, torch.Tensor | None]:
    """For fp16 only: the gradients divided by the power of two above their largest, and that power.

    A token's gradient is about 1 / N times a probability, which fp16 flushes to zero; divided, the
    largest of a chunk's dlogits is about 1, and rounds exactly as it would have. bf16 and fp32 have
    the range: unchanged.
    """
    if dtype != torch.float16:
        return grads, None
    largest = torch.stack([g.abs().amax() for g in grads if g is not None and g.numel()]).amax()
    power = torch.exp2(torch.ceil(torch.log2(torch.where(largest > 0, largest, 1.0))))
    return RowGrads(*(None if g is None else g / power for g in grads)), power


def head_chunk_backward(
    index: slice | torch.Tensor,
    work: Workspace,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    options: LogitOptions,
    stats: RowStats,
    grads: RowGrads,
    row_mask: torch.Tensor | None,
    into: HeadGrads,
) -> None:
    """Gradients of one chunk, whose logits are in ``work``; every argument is the chunk's own."""
    rows = hidden.shape[0]
    grads, unscale = scale_for_half(grads, work.dlogits.dtype)
    dlogits = dlogits_rows(
        work.dlogits[:rows], work.logits[:rows], token_ids, options, stats, grads, row_mask
    )
    into.add(index, dlogits, hidden, weight, unscale)


# ---- Registered operators ------------------------------------------------------------------------


def head_row_chunks(
    hidden: torch.Tensor, rows_per_chunk: int, live: torch.Tensor | None
) -> list[slice | torch.Tensor]:
    """Chunks of the live rows on a CPU, of all rows on CUDA (see the module docstring)."""
    return list(row_chunks(hidden.shape[0], rows_per_chunk, None if use_triton(hidden) else live))


def check_live_rows(
    token_ids: torch.Tensor,
    row_temperature: torch.Tensor | None,
    row_mask: torch.Tensor | None,
    vocab: int,
) -> None:
    """``check_row_values`` for the rows of ``row_mask`` (CPU only)."""
    if token_ids.is_cuda:
        return
    if row_mask is not None:
        token_ids = token_ids[row_mask]
        row_temperature = None if row_temperature is None else row_temperature[row_mask]
    check_row_values(token_ids, row_temperature, vocab)


@torch.library.custom_op("grpo_engine::linear_logprobs", mutates_args=())
def _linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    token_ids: torch.Tensor,
    row_temperature: torch.Tensor | None,
    row_mask: torch.Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    logit_scale: float,
    want_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The five fields of RowStats."""
    check_live_rows(token_ids, row_temperature, row_mask, weight.shape[0])
    options = LogitOptions(temperature, row_temperature, bias, logit_scale, logit_softcap)
    stats = RowStats.zeros(hidden, hidden.shape[0], want_entropy)
    work = Workspace.make(hidden, weight.shape[0], for_gradient=False)
    for index in head_row_chunks(hidden, work.rows, row_mask):
        rows = hidden[index]
        logits = raw_logits(rows, weight, work.logits[: len(rows)])
        chunk = fold_rows(
            logits,
            work.dlogits[: len(rows)],
            token_ids[index],
            options.rows(index),
            want_entropy,
            None if row_mask is None else row_mask[index],
        )
        stats.put(index, chunk)
    return tuple(stats)


@_linear_logprobs.register_fake
def _(hidden, weight, bias, token_ids, row_temperature, row_mask, *rest):
    return tuple(RowStats.empty(hidden, hidden.shape[0], want_entropy=rest[-1]))


@torch.library.custom_op("grpo_engine::linear_logprobs_backward", mutates_args=())
def _linear_logprobs_backward(
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    token_ids: torch.Tensor,
    row_temperature: torch.Tensor | None,
    row_mask: torch.Tensor | None,
    stats: list[torch.Tensor],
    temperature: float,
    logit_softcap: float | None,
    logit_scale: float,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias; one without elements where ``needs`` is False."""
    grads = RowGrads(grad_logprobs, grad_entropy, grad_lse)
    all_stats = RowStats(*stats)
    options = LogitOptions(temperature, row_temperature, bias, logit_scale, logit_softcap)
    into = HeadGrads.zeros(hidden, weight, tuple(needs), hidden.dtype)
    work = Workspace.make(hidden, weight.shape[0], for_gradient=True)
    live = grads.live() if row_mask is None else grads.live() & row_mask
    for index in head_row_chunks(hidden, work.rows, live):
        rows, chunk_options, chunk = hidden[index], options.rows(index), all_stats.rows(index)
        logits = raw_logits(rows, weight, work.logits[: len(rows)])
        if not use_triton(hidden):
            apply_logit_options(logits, chunk_options)
            shift_rows(logits, work.dlogits[: len(rows)], chunk_options, chunk.row_max)
        head_chunk_backward(
            index,
            work,
            rows,
            weight,
            token_ids[index],
            chunk_options,
            chunk,
            grads.rows(index),
            None if row_mask is None else row_mask[index],
            into,
        )
    empty = hidden.new_empty
    return (
        empty(0) if into.hidden is None else into.hidden,
        empty(0, dtype=weight.dtype) if into.weight is None else into.weight.to(weight.dtype),
        empty(0) if into.bias is None else into.bias.to(bias.dtype),
    )


@_linear_logprobs_backward.register_fake
def _(grad_logprobs, grad_entropy, grad_lse, hidden, weight, bias, *rest):
    need_hidden, need_weight, need_bias = rest[-1]
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        bias.new_empty(bias.shape) if need_bias else hidden.new_empty(0),
    )


# ---- Autograd ------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output) -> None:
    *tensors, temperature, logit_softcap, logit_scale, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[3], output[4])
    ctx.save_for_backward(*tensors, *output)
    ctx.scalars = (temperature, logit_softcap, logit_scale)


def _backward(ctx, *grads):
    tensors, stats = ctx.saved_tensors[:6], list(ctx.saved_tensors[6:])
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    incoming = row_grads(grads[:3], stats[0])
    results = _linear_logprobs_backward(*incoming, *tensors, stats, *ctx.scalars, needs)
    made = [grad if need else None for grad, need in zip(results, needs, strict=True)]
    return (*made, *[None] * 7)


_linear_logprobs.register_autograd(_backward, setup_context=_setup_context)


# ---- Public function -----------------------------------------------------------------------------


def check_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    bias: torch.Tensor | None,
    logit_softcap: float | None,
    logit_scale: float | None,
    row_mask: torch.Tensor | None,
    tp_group: object | None,
) -> None:
    """ValueError naming the first argument of a fused head that cannot be used."""
    check_float("hidden", hidden)
    check_float("weight", weight)
    if hidden.ndim != 2:
        raise ValueError(f"hidden must have shape [N, D], got {list(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight must have shape [V, {hidden.shape[1]}] with V > 0, got {list(weight.shape)}"
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight is {weight.dtype}, hidden is {hidden.dtype}: they must agree")
    if weight.device != hidden.device:
        raise ValueError(f"weight is on {weight.device}, expected {hidden.device}")
    num_rows, device = hidden.shape[0], hidden.device
    check_vector("token_ids", token_ids, num_rows, device, INT_DTYPES)
    if bias is not None:
        check_vector("bias", bias, weight.shape[0], device)
        check_float("bias", bias)
    if row_mask is not None:
        check_vector("row_mask", row_mask, num_rows, device, (torch.bool,))
    for name, value in (("logit_softcap", logit_softcap), ("logit_scale", logit_scale)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not value > 0:
            raise ValueError(f"{name} must be a number > 0 or None, got {value!r}")
    if tp_group is not None:
        raise ValueError("tp_group is not supported yet: pass the whole weight and tp_group=None")


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
    row_mask: torch.Tensor | None = None,
    tp_group: object | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Log-probability of each row's token under the head ``weight``, without [N, V] in memory.

    Args:
        hidden: [N, D] fp32, bf16 or fp16.
        weight: [V, D], dtype of ``hidden``.
        token_ids: [N] int32 or int64; out of [0, V) raises on a CPU and gives NaN on CUDA.
        bias: [V]. The logits are ``softcap * tanh((hidden @ weight.T + bias) * scale / softcap)``.
        temperature: a float or an [N] tensor (no gradient), > 0; divides the logits, last.
        logit_softcap, logit_scale: as above; None leaves them out.
        return_entropy, return_lse: also return these, of logits / temperature, in nats.
        row_mask: [N] bool; a False row gives 0 everywhere, takes no gradient, and its token id
            may be anything.
        tp_group: must be None.

    Returns:
        logprobs [N] fp32, or the tuple (logprobs[, entropy][, lse]); all differentiable with
        respect to hidden, weight and bias. A gradient that is not needed is not computed.

    Raises:
        ValueError: wrong shape, dtype, device or option; the message names it.
    """
    check_head(hidden, weight, token_ids, bias, logit_softcap, logit_scale, row_mask, tp_group)
    scalar, per_row = split_temperature(temperature, hidden.shape[0], hidden.device)
    logprobs, entropy, lse, _, _ = _linear_logprobs(
        hidden,
        weight,
        None if bias is None else bias.contiguous(),
        token_ids.contiguous(),
        per_row,
        None if row_mask is None else row_mask.contiguous(),
        scalar,
        None if logit_softcap is None else float(logit_softcap),
        1.0 if logit_scale is None else float(logit_scale),
        return_entropy,
    )
    outputs = [logprobs]
    if return_entropy:
        outputs.append(entropy)
    if return_lse:
        outputs.append(lse)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)
