"""One chunk of rows of a language-model head: the GEMMs around the row kernels, their workspace.

linear_logprobs.py and linear_grpo.py walk the rows of ``hidden`` [N, D] in chunks of C: logits
[C, V] in fp32, one pass over them (vocab_rows.py), gradients of hidden, weight and bias added up.
Precision and bytes are in the docstring of linear_logprobs.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grpo_engine.kernels.common import device_arch, use_triton
from grpo_engine.kernels.live_gemm import LiveRows, live_add_grad_weight, live_grad_hidden
from grpo_engine.kernels.vocab_rows import (
    LogitOptions,
    RowGrads,
    RowStats,
    dlogits_rows,
    row_chunks,
)

# Logits of a chunk (fp32) and their gradient together. At V = 151,936 in bf16: 1,280 rows.
CUDA_WORKSPACE_BYTES = 1200 * 10**6
# On a CPU: elements of a chunk's logits (a cache of 2 MB), but at least as many rows as keep the
# GEMM from re-reading the weight too often, and at most as many as still add speed.
CPU_CHUNK_ELEMENTS = 1 << 19
CPU_CHUNK_ROWS = (256, 4096)
# On a CPU: rows of a half-precision weight that are widened to fp32 at a time.
CPU_VOCAB_TILE = 4096
# On a CPU: terms of G @ weight that the BLAS adds up by itself. Where the rows do not fill its
# tiles it adds the last of them one after another: at V = 262,144 an error of 2e-5, so 4e-6.
CPU_SUM_TILE = 16_384
# torch.addmm adds a half product to an fp32 matrix since 2.10 (pytorch pull request 167931); before
# that d weight takes a product [V, D] of its own and a pass to add it.
ADDMM_TAKES_HALF = torch.__version__ >= (2, 10)


@dataclass(frozen=True)
class Workspace:
    """Buffers for one chunk: ``logits`` [C, V] fp32 and ``dlogits`` [C, V] for their gradient, in
    fp32 on the portable path (where the fold uses it as scratch) and the GEMM's dtype on Triton."""

    logits: torch.Tensor
    dlogits: torch.Tensor

    @classmethod
    def make(
        cls,
        hidden: torch.Tensor,
        vocab: int,
        *,
        for_gradient: bool,
        multiple: int = 1,
        widest: int | None = None,
    ) -> Workspace:
        """``multiple``: the rows are one of it; ``widest``: as many rows as a head of so many
        columns has (the largest shard, so that every rank walks the same chunks)."""
        check_half_gemm(hidden)
        portable = not use_triton(hidden)
        dtype = torch.float32 if portable else hidden.dtype
        rows = min(chunk_rows(hidden, widest or vocab), max(1, hidden.shape[0]))
        rows = -(-rows // multiple) * multiple
        return cls(
            torch.empty(rows, vocab, dtype=torch.float32, device=hidden.device),
            torch.empty(
                rows if portable or for_gradient else 0, vocab, dtype=dtype, device=hidden.device
            ),
        )

    @property
    def rows(self) -> int:
        return self.logits.shape[0]


def check_half_gemm(hidden: torch.Tensor) -> None:
    """ValueError for half inputs on a CUDA device older than Ampere: its GEMMs cannot be relied on
    to return bf16 and fp16 products in fp32."""
    if not hidden.is_cuda or hidden.dtype == torch.float32:
        return
    arch = device_arch(hidden.device.index)
    if arch < 80:
        raise ValueError(
            f"hidden is {hidden.dtype}, which needs compute capability >= 8.0; {hidden.device} has "
            f"{arch // 10}.{arch % 10}: pass float32"
        )


def chunk_rows(hidden: torch.Tensor, vocab: int) -> int:
    """Rows of a chunk, from the memory budget of the device."""
    if hidden.is_cuda:
        bytes_per_row = vocab * (4 + hidden.element_size())
        return max(128, CUDA_WORKSPACE_BYTES // bytes_per_row // 128 * 128)
    least, most = CPU_CHUNK_ROWS
    return max(least, min(most, CPU_CHUNK_ELEMENTS // vocab))


def chunk_hidden(
    hidden: torch.Tensor, index: slice | torch.Tensor, row_mask: torch.Tensor | None
) -> torch.Tensor:
    """Rows [C, D] of a chunk. Masked ones reach the GEMMs on the Triton path; there they are zeros,
    as in d weight = G.T @ hidden the zeros of G do not silence a NaN."""
    if row_mask is None or not use_triton(hidden):
        return hidden[index]
    return torch.where(row_mask[index][:, None], hidden[index], 0.0)


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
    def make(
        cls,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        needs: tuple[bool, bool, bool],
        hidden_dtype: torch.dtype,
        *,
        every_row: bool | None = None,
    ) -> HeadGrads:
        """``every_row``: the chunks will write every row of ``hidden`` (by default on the Triton
        path), so that it need not start as zeros."""
        need_hidden, need_weight, need_bias = needs
        make = weight.new_zeros
        every_row = use_triton(hidden) if every_row is None else every_row
        make_hidden = hidden.new_empty if every_row else hidden.new_zeros
        return cls(
            make_hidden(hidden.shape, dtype=hidden_dtype) if need_hidden else None,
            make(weight.shape, dtype=torch.float32) if need_weight else None,
            make(weight.shape[:1], dtype=torch.float32) if need_bias else None,
        )

    def as_outputs(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients in the dtypes of their inputs; without elements where not needed."""
        empty = hidden.new_empty
        return (
            empty(0) if self.hidden is None else self.hidden.to(hidden.dtype),
            empty(0, dtype=weight.dtype) if self.weight is None else self.weight.to(weight.dtype),
            empty(0) if self.bias is None else self.bias.to(bias.dtype),
        )

    @staticmethod
    def fake_outputs(
        hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, needs: list[bool]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``as_outputs`` by shape alone."""
        need_hidden, need_weight, need_bias = needs
        return (
            hidden.new_empty(hidden.shape if need_hidden else (0,)),
            weight.new_empty(weight.shape if need_weight else (0,)),
            bias.new_empty(bias.shape) if need_bias else hidden.new_empty(0),
        )

    def add(
        self,
        index: slice | torch.Tensor,
        dlogits: torch.Tensor,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        unscale: torch.Tensor | None,
        *,
        row_scale: torch.Tensor | None = None,
        live: LiveRows | None = None,
        places: torch.Tensor | None = None,
    ) -> None:
        """Add a chunk: ``dlogits`` [C, V] times ``unscale`` (0-d) and ``row_scale`` [C] fp32
        (None: 1), ``hidden`` [C, D]. With ``live`` the chunk's rows are those at ``index``, a
        slice, of its list; ``hidden`` is then [N, D], and ``dlogits`` past the count is not read
        (but for the bias, which needs zeros there). ``places``: as in ``live_grad_hidden``."""
        if self.bias is not None:
            rows = dlogits
            if row_scale is not None:  # a row scaled by 0 may be one that nobody wrote
                scale = row_scale[:, None]
                rows = (dlogits.float() * scale).masked_fill_(scale == 0, 0.0)
            bias = rows.sum(0, dtype=torch.float32)
            self.bias.add_(bias if unscale is None else bias * unscale)
        if self.hidden is not None:
            self._put_hidden(index, dlogits, weight, unscale, row_scale, live, places)
        if self.weight is not None:
            self._add_weight(index, dlogits, hidden, unscale, row_scale, live, places)

    def _put_hidden(self, index, dlogits, weight, unscale, row_scale, live, places) -> None:
        scale = row_scale
        if unscale is not None:
            scale = unscale.expand(len(dlogits)) if scale is None else scale * unscale
        if live is not None:
            scale = None if scale is None else scale.contiguous()
            where = {"places": places}
            live_grad_hidden(self.hidden, dlogits, weight, live, index.start, scale, **where)
            return
        in_place = self.hidden.dtype == weight.dtype == dlogits.dtype == torch.float32
        if in_place and scale is None and isinstance(index, slice):
            wide_mm(dlogits, weight, out=self.hidden[index])
            return
        product = wide_mm(dlogits, weight)
        if scale is not None:
            product.mul_(scale[:, None])
        self.hidden[index] = product.to(self.hidden.dtype)

    def _add_weight(self, index, dlogits, hidden, unscale, row_scale, live, places) -> None:
        """``unscale`` costs a product [V, D] of its own and a pass to add it."""
        total = self.weight if unscale is None else torch.zeros_like(self.weight)
        if live is not None:
            where = {"places": places}
            live_add_grad_weight(total, dlogits, hidden, live, index.start, row_scale, **where)
        else:
            if row_scale is not None:
                hidden = (hidden.float() * row_scale[:, None]).to(dlogits.dtype)
            add_wide_mm(total, dlogits.t(), hidden)
        if unscale is not None:
            self.weight.add_(total.mul_(unscale))


def wide_mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a [M, V] @ b [V, D] in fp32, into ``out`` where ``a`` is fp32. A CPU adds up the products of
    tiles of V, widening a half ``b`` tile by tile."""
    if a.dtype != torch.float32:
        return half_mm(a, b)
    size = CPU_SUM_TILE if b.dtype == torch.float32 else CPU_VOCAB_TILE
    if a.is_cuda:
        size = b.shape[0]
    product = torch.mm(a[:, :size], b[:size].float(), out=out)
    for start in range(size, b.shape[0], size):
        tile = slice(start, start + size)
        product.add_(a[:, tile] @ b[tile].float())
    return product


def add_wide_mm(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total [V, D] fp32 += a [V, M] @ b [M, D]; fp32 where ``a`` is."""
    if a.dtype == torch.float32:
        total.addmm_(a, b.float())
    else:
        add_half_mm(total, a, b)


def half_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of half matrices with an fp32 result; widened where the device has no such GEMM."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_half_mm(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b of half matrices, in fp32."""
    if a.is_cuda and ADDMM_TAKES_HALF:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.add_(half_mm(a, b))


def scale_for_half(grads: RowGrads, dtype: torch.dtype) -> tuple[RowGrads, torch.Tensor | None]:
    """For fp16 only: the gradients divided by the power of two above their largest, and that power.

    A token's gradient is about 1 / N times a probability, which fp16 flushes to zero; divided, the
    largest of a chunk's dlogits is about 1, and rounds exactly as it would have. bf16 and fp32 have
    the range: unchanged.
    """
    if dtype != torch.float16:
        return grads, None
    largest = torch.stack([g.abs().amax() for g in grads if g is not None and g.numel()]).amax()
    power = power_above(largest)
    return RowGrads(*(None if g is None else g / power for g in grads)), power


def power_above(value: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that is not below ``value`` (0-d); 1 for 0."""
    return torch.exp2(torch.ceil(torch.log2(torch.where(value > 0, value, 1.0))))


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
    live: LiveRows | None = None,
) -> None:
    """Gradients of one chunk, whose logits are in ``work``; every argument is the chunk's own, but
    for ``hidden`` [N, D] where ``live`` is given (``HeadGrads.add``)."""
    rows = token_ids.shape[0]
    grads, unscale = scale_for_half(grads, work.dlogits.dtype)
    dlogits = dlogits_rows(
        work.dlogits[:rows],
        work.logits[:rows],
        token_ids,
        options,
        stats,
        grads,
        row_mask,
        skip_masked=live is not None and into.bias is None,
    )
    into.add(index, dlogits, hidden, weight, unscale, live=live)


def head_row_chunks(
    hidden: torch.Tensor, rows_per_chunk: int, live: torch.Tensor | None
) -> list[slice | torch.Tensor]:
    """Chunks of the live rows on a CPU, of all rows on CUDA (see the module docstring)."""
    return list(row_chunks(hidden.shape[0], rows_per_chunk, None if use_triton(hidden) else live))
