"""A language-model head whose rows are shared out over the ranks of a process group (``tp_group``).

Rank r holds V_r > 0 consecutive rows of the head, in rank order; V is the sum of V_r, which may
differ. ``hidden`` and everything else with a row per token is the same on every rank.

Maths. With l = the logits after bias, scale and softcap, T the temperature, y the token, each rank
folds its own columns of a row into four numbers (``fold_shard``):

    m_r = max_k l_k,  o_r = sum_{k != y} exp((l_k - m_r) / T),
    w_r = sum_{k != y} exp((l_k - m_r) / T) (l_k - m_r) / T,  t_r = l_y, or -inf for y elsewhere

One all-gather of them, and every rank computes the same (``merge_parts``), with m = max_r m_r and
d_r = (m_r - m) / T:

    others = sum_r o_r exp(d_r),  logprob = (t - m) / T - log(others + exp((t - m) / T))

``others`` stays apart from the token's own exponential, so a confident token keeps log1p(others),
as on one device. Backward needs nothing more of the other ranks: p_k = exp((l_k - m_r) / T -
(log_sum - d_r)), which is the row maths of vocab_rows.py with the pair (row_max, log_sum) moved to
the shard's own origin. A token outside the shard matches no column there. With the row's lse known,
each rank computes its own largest logits again (exact_logits.py); a second all-gather adds up the
two numbers a row that come of it.

Who adds up d hidden. Each rank's own columns give a part of d hidden = G @ weight. The ops
all-reduce the parts in fp32 themselves and return the whole d hidden on every rank; d weight and
d bias are the shard's own, with nothing left to reduce. So hand in ``hidden`` as it is, not behind
a layer whose backward sums over the same group: under Megatron not through ColumnParallelLinear's
input or copy_to_tensor_model_parallel_region (d hidden would come out as many times too large as
there are ranks), and under sequence parallelism gathered with ``tensor_parallel_output_grad=False``
(the backward of that gather must cut, not sum).

Collectives. Forward: two all-gathers a chunk, of 16 C and 8 C bytes a rank for its C rows (24 N in
all; every rank walks the chunks of the largest shard). Where d hidden is needed one all-reduce of
4 N D bytes: in backward, or in forward where the gradient is made there (linear_grpo_loss, frozen
head). Ahead of the forward pass, and of a backward pass that multiplies by the head, a note of 4
KiB a rank (``agree``), with which an error on one rank becomes an error on all. It goes over the
host where the group has a CPU backend (gloo, or torch's default of gloo beside NCCL), without a
device sync. In a group of NCCL alone it goes over the current CUDA device, and the host waits for
it: one device sync a note, so that such a call cannot be captured in a CUDA graph.

Determinism. The merge is the same arithmetic on the same numbers on every rank, so logprobs,
entropy, lse and the loss are bitwise equal on all of them. d hidden is what the backend's
all-reduce returns: the same on all ranks and in every run for gloo. NCCL has not been run.
"""

from __future__ import annotations

import functools
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grpo_engine.kernels.common import (
    LAUNCH_OPTIONS,
    arch_choice,
    block_size,
    on_device_of_first,
    use_triton,
)
from grpo_engine.kernels.top_logits import TOP, TopLogits, span_maxima
from grpo_engine.kernels.vocab_parallel_triton import _fold_shard_kernel
from grpo_engine.kernels.vocab_rows import (
    LogitOptions,
    RowStats,
    apply_logit_options,
    note_top,
    shift_rows,
)
from grpo_engine.kernels.vocab_rows_triton import FOLD_BLOCKS

# exp() of this is 0 in fp32; stands in for log 0 where 0 * log 0 must be 0.
_LOG_ZERO = -1e4
# What a rank tells the others about its call, as JSON.
_NOTE_BYTES = 4096
_MOST_ERROR_CHARACTERS = 500


@dataclass(frozen=True)
class VocabShards:
    """Which rows of the head each rank of a group holds."""

    group_name: str
    rank: int
    sizes: tuple[int, ...]  # V_r by rank

    @property
    def first(self) -> int:
        """Number, in the whole head, of this rank's first row."""
        return sum(self.sizes[: self.rank])

    @property
    def vocab(self) -> int:
        return sum(self.sizes)

    @property
    def group(self) -> Any:
        return _group_of(self.group_name)

    def local_ids(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids counted from this rank's first row: in [0, V_r) for its own tokens alone."""
        return token_ids - self.first

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """[W, *shape]: every rank's ``part``, which has the same shape on all of them."""
        out = part.new_empty((len(self.sizes), *part.shape))
        if part.numel():
            torch.distributed.all_gather(list(out.unbind(0)), part.contiguous(), group=self.group)
        return out

    def add_up(self, part: torch.Tensor | None) -> None:
        """``part`` <- its sum over the ranks, in its own dtype; None: nothing to do."""
        if part is not None and part.numel():
            torch.distributed.all_reduce(part, group=self.group)


# ---- The group and what its ranks agree on -------------------------------------------------------


def group_name_of(tp_group: object | None) -> str | None:
    """The name under which torch knows ``tp_group`` (operators take strings, not groups); None for
    None and for a group of one rank, whose shard is the whole head."""
    if tp_group is None:
        return None
    distributed = torch.distributed
    if not distributed.is_available() or not isinstance(tp_group, distributed.ProcessGroup):
        raise ValueError(
            "tp_group must be a torch.distributed.ProcessGroup or None, got "
            f"{type(tp_group).__name__}"
        )
    return tp_group.group_name if tp_group.size() > 1 else None


def _group_of(group_name: str) -> Any:
    # the registry of torch's own functional collectives; this name from torch 2.9 to 2.13 at least
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(group_name)


def together(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a public function with ``tp_group``: where it raises ValueError or TypeError on
    one rank, the others are told, and raise ValueError in the ``agree`` that they wait in.

    While torch.compile traces nobody can be told: a call that fails there fails on its own rank.
    """

    @functools.wraps(function)
    def call(*arguments: Any, tp_group: object | None = None, **options: Any) -> Any:
        if tp_group is None or torch.compiler.is_compiling():
            return function(*arguments, tp_group=tp_group, **options)
        group_name = group_name_of(tp_group)
        try:
            return function(*arguments, tp_group=tp_group, **options)
        except (ValueError, TypeError) as error:
            if group_name is not None and not getattr(error, "told", False):
                error.told = True  # by this function, not again by one that calls it
                _exchange(_group_of(group_name), {"error": str(error)[:_MOST_ERROR_CHARACTERS]})
            raise

    return call


def agree(group_name: str, vocab: int, facts: dict[str, Any]) -> VocabShards:
    """The shards of a head of which this rank holds ``vocab`` rows.

    ValueError on every rank where one has raised before it got here, or where ``facts`` (name ->
    JSON value) are not the same on all of them.

    Every call is an exchange, on every group, and nothing is remembered: V_r alone does not tell a
    rank what the others hold. On a group without a CPU backend (NCCL alone) that is a device sync
    each time. A rank that raises ValueError or TypeError alone is heard there as on any other group
    (``together``); one that fails otherwise (out of memory, killed) leaves the others waiting until
    the group times out.
    """
    group = _group_of(group_name)
    notes = _exchange(group, {"V": vocab, **facts})
    problem = _disagreement(notes, facts)
    if problem is not None:
        error = ValueError(problem)
        error.told = True  # everyone finds the same
        raise error
    return VocabShards(group_name, group.rank(), tuple(note["V"] for note in notes))


def _disagreement(notes: list[dict[str, Any]], facts: Iterable[str]) -> str | None:
    for rank, note in enumerate(notes):
        if "error" in note:
            return f"rank {rank} of tp_group refused its input: {note['error']}"
    for rank, name in itertools.product(range(1, len(notes)), facts):
        here, there = notes[0].get(name), notes[rank].get(name)
        if here != there:
            return (
                f"{name} must be the same on every rank of tp_group, got {here} on rank 0 and "
                f"{there} on rank {rank}"
            )
    return None


def _type_of(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _fact(tensor: Any) -> Any:
    """Type, shape and, on a CPU, a checksum (on CUDA reading the bytes would be a host sync); what
    is not a tensor as it is."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    if tensor.is_cuda or tensor.numel() == 0:
        return _type_of(tensor)
    values = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{_type_of(tensor)} with checksum {zlib.crc32(values):08x}"


def _on_cpu(group: Any) -> bool:
    return "cpu:" in torch.distributed.get_backend_config(group)


def _exchange(group: Any, note: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's note."""
    text = json.dumps(note).encode().ljust(_NOTE_BYTES)
    if len(text) > _NOTE_BYTES:
        raise RuntimeError(f"a note of {len(text)} bytes does not fit in {_NOTE_BYTES}")
    mine = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    if not _on_cpu(group):
        mine = mine.to("cuda")
    everyone = mine.new_empty(group.size(), _NOTE_BYTES)
    torch.distributed.all_gather(list(everyone.unbind(0)), mine, group=group)
    return [json.loads(row.tobytes()) for row in everyone.cpu().numpy()]


def whole_head(
    weight: torch.Tensor, bias: torch.Tensor | None, tp_group: object | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The whole head on every rank, for the reference twins: this rank's own rows are its own
    tensors, so that their gradients need no collective; the others' rows are copies."""
    group_name = group_name_of(tp_group)
    if group_name is None:
        return weight, bias
    shards = agree(group_name, weight.shape[0], {"bias": bias is not None})
    return tuple(None if part is None else _whole(part, shards) for part in (weight, bias))


def _whole(part: torch.Tensor, shards: VocabShards) -> torch.Tensor:
    padded = part.new_zeros((max(shards.sizes), *part.shape[1:]))
    padded[: len(part)] = part.detach()
    parts = [rows[:size] for rows, size in zip(shards.gather(padded), shards.sizes, strict=True)]
    parts[shards.rank] = part
    return torch.cat(parts)


def shards_for_forward(
    group_name: str | None,
    pass_name: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    options: LogitOptions,
    row_mask: torch.Tensor | None,
    **facts: Any,
) -> VocabShards | None:
    """``agree`` on a forward pass over the rows of ``hidden``; None without a group. ``facts`` are
    further values and tensors that must be the same on every rank."""
    if group_name is None:
        return None
    temperature = options.row_temperature
    if row_mask is not None and not hidden.is_cuda:  # what a masked row holds cannot matter
        token_ids = token_ids.where(row_mask, 0)
        temperature = None if temperature is None else temperature.where(row_mask, 0.0)
    rows = {
        "row_mask": row_mask,
        "token_ids": token_ids,
        "temperature": options.temperature if temperature is None else temperature,
        "logit_scale": options.logit_scale,
        "logit_softcap": options.logit_softcap,
    }
    known = {"the pass": pass_name, "hidden": _type_of(hidden)}
    for name, value in (rows | facts).items():
        known[name] = _fact(value)
    return agree(group_name, weight.shape[0], known)


def grad_facts(needs: Sequence[bool]) -> dict[str, bool]:
    """What the ranks must agree on of which of hidden, weight and bias need a gradient: whether
    there is a backward pass, and a d hidden to add up in it."""
    return {"hidden requires grad": needs[0], "any requires grad": any(needs)}


def agree_on_loss(tp_group: object | None, weight: torch.Tensor, fields: dict[str, Any]) -> None:
    """``agree`` on the tensors and options of a loss that does not meet the head in one pass. Not
    traced by torch.compile: a compiled call does without."""
    group_name = group_name_of(tp_group)
    if group_name is not None and not torch.compiler.is_compiling():
        facts = {name: _fact(value) for name, value in fields.items()}
        agree(group_name, weight.shape[0], {"the pass": "a loss in two phases", **facts})


def shards_for_backward(
    group_name: str | None, pass_name: str, weight: torch.Tensor, need_hidden: bool
) -> VocabShards | None:
    """``agree`` on a backward pass: whether there is a d hidden to add up."""
    if group_name is None:
        return None
    facts = {"the pass": f"backward of {pass_name}", "hidden requires grad": need_hidden}
    return agree(group_name, weight.shape[0], facts)


# ---- One row from its shards ---------------------------------------------------------------------


@on_device_of_first
def fold_shard(
    logits: torch.Tensor,
    scratch: torch.Tensor,
    local_ids: torch.Tensor,
    options: LogitOptions,
    want_entropy: bool,
    row_mask: torch.Tensor | None = None,
    top: TopLogits | None = None,
) -> torch.Tensor:
    """(t, o, w, m) of one chunk's shard of columns: [4, C] fp32; w is 0 without ``want_entropy``.

    On a CPU ``logits`` [C, V_r] fp32 and ``scratch`` are overwritten with what ``dlogits_rows``
    continues from, at the shard's own origin; the Triton path reads ``logits``, leaves ``scratch``
    alone, and gives zeros for the rows outside ``row_mask``. ``top``: as in ``fold_rows``.
    """
    if not use_triton(logits):
        return _fold_shard_cpu(logits, scratch, local_ids, options, want_entropy, top)
    num_rows, vocab = logits.shape
    parts = logits.new_empty(4, num_rows)
    if num_rows == 0:
        return parts
    most, num_warps = arch_choice(FOLD_BLOCKS, logits)
    _fold_shard_kernel[(num_rows,)](
        # outputs
        parts,
        *(top.outputs(logits, num_rows) if top else (None, None)),
        # inputs
        logits,
        local_ids,
        options.bias,
        options.row_temperature,
        None if row_mask is None else row_mask.view(torch.uint8),
        # scalars
        *options.kernel_scalars(),
        # shapes
        vocab,
        # strides
        parts.stride(0),
        logits.stride(0),
        # constexprs
        **options.kernel_flags(row_mask),
        WITH_ENTROPY=want_entropy,
        TOP=TOP if top else 0,
        BLOCK_V=block_size(vocab, most),
        num_warps=num_warps,
        **LAUNCH_OPTIONS,
    )
    return parts


def _fold_shard_cpu(
    logits: torch.Tensor,
    scratch: torch.Tensor,
    local_ids: torch.Tensor,
    options: LogitOptions,
    want_entropy: bool,
    top: TopLogits | None,
) -> torch.Tensor:
    apply_logit_options(logits, options)
    inside = (local_ids >= 0) & (local_ids < logits.shape[1])
    column = torch.where(inside, local_ids, 0).long()[:, None]
    token_logit = logits.gather(1, column).squeeze(1).masked_fill(~inside, -torch.inf)
    maxima = logits if top is None else span_maxima(logits)
    row_max = maxima.amax(1)
    origin = _finite_origin(row_max)
    shift_rows(logits, scratch, options, origin)
    kept = scratch.gather(1, column).squeeze(1).masked_fill(inside, 0.0)
    scratch.scatter_(1, column, kept[:, None])
    others = scratch.sum(1)
    if top is not None:
        ids = local_ids.where(inside, -1)
        # Less than 1 only where the token is the largest; then its 1 is the row's least.
        log_sum = others.clamp(min=1.0).log()
        note_top(top, logits, maxima, origin, log_sum, ids, token_logit, options)
    weighted = torch.zeros_like(others)
    if want_entropy:
        logits.clamp_(min=_LOG_ZERO)  # 0 * -inf
        weighted = (scratch * logits).sum(1)
    return torch.stack([token_logit, others, weighted, row_max])


def _finite_origin(row_max: torch.Tensor) -> torch.Tensor:
    """A shard whose logits are all -inf (tokens banned by the bias) is measured from 0."""
    return row_max.masked_fill(row_max == -torch.inf, 0.0)


def merge_shards(
    part: torch.Tensor,
    shards: VocabShards,
    local_ids: torch.Tensor,
    options: LogitOptions,
    want_entropy: bool,
    row_mask: torch.Tensor | None = None,
) -> RowStats:
    """Rows [C] from every rank's ``fold_shard``, of which ``part`` is this rank's; a collective.

    logprobs, entropy and lse are those of the whole row, the same on every rank. row_max and
    log_sum are of the whole row at the origin of this rank's shard, for its gradient.
    """
    first = shards.first
    # an id outside [0, V) cannot raise on CUDA without a host sync: it gives NaN
    known = (local_ids >= -first) & (local_ids < shards.vocab - first)
    stats = merge_parts(shards.gather(part), shards.rank, known, options, want_entropy)
    if row_mask is None:
        return stats
    return RowStats(*(f.where(row_mask, 0.0) if f.numel() else f for f in stats))


def merge_parts(
    parts: torch.Tensor,
    rank: int,
    known: torch.Tensor,
    options: LogitOptions,
    want_entropy: bool,
) -> RowStats:
    """``merge_shards`` of all ranks' ``parts`` [W, 4, C]; NaN logprobs where not ``known`` [C]."""
    token_logits, others, weighted, row_max = parts.unbind(1)
    top = row_max.amax(0)
    per_row = options.row_temperature
    temperature = options.temperature if per_row is None else per_row
    drop = ((row_max - top) / temperature).clamp(min=_LOG_ZERO)  # [W, C] nats
    scale = drop.exp()
    token_shifted = (token_logits.amax(0) - top) / temperature
    token_exp = token_shifted.exp()
    total = (others * scale).sum(0)
    log_sum = torch.where(token_shifted == 0, torch.log1p(total), torch.log(total + token_exp))
    entropy = parts.new_empty(0)
    if want_entropy:
        rebased = (scale * (weighted + others * drop)).sum(0)
        rebased = rebased + token_exp * token_shifted.clamp(min=_LOG_ZERO)
        entropy = log_sum - rebased / (total + token_exp)
    logprobs = torch.where(known, token_shifted - log_sum, torch.nan)
    lse = top / temperature + log_sum
    return RowStats(logprobs, entropy, lse, _finite_origin(row_max[rank]), log_sum - drop[rank])
