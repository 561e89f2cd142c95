"""The logits of a row that decide its log-sum-exp: the token's own and the largest of the others.

exact_logits.py computes them again, exactly. They are found where the row is read anyway.

Triton keeps, for every place of a block, the largest logit that was read there and the block that
it came from; at the end of the row the TOP largest of these are taken. Two of the largest that
stand BLOCK_V, or a multiple of it, apart hide one another: one stays as the GEMM made it. A CPU
takes the maximum of each span of SPAN columns, which costs no more than that of the row does, and
looks for entries of at least LEAST of the row's sum in the spans that can have one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Of a row's sum: a logit that holds less is left as the GEMM made it.
LEAST = 2.0**-6
LOG_LEAST = math.log(LEAST)
# On the Triton path: most logits besides the token's.
TOP = 8
# On a CPU: columns of a span.
SPAN = 128


@dataclass
class TopLogits:
    """Filled by the pass over a chunk's logits: columns, and the logits there, after bias, scale
    and softcap but before the temperature.

    Triton: ids int32 and values fp32 are [C, 1 + TOP], the token (-1 where it is in no column of
    this pass), then the others in any order, however small. CPU: [C + E], the C tokens, then E
    others, with their ``rows``; values fp64.
    """

    ids: torch.Tensor | None = None
    values: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    def outputs(self, like: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``ids`` and ``values`` for a kernel to write."""
        self.ids = like.new_empty(num_rows, 1 + TOP, dtype=torch.int32)
        self.values = like.new_empty(num_rows, 1 + TOP, dtype=torch.float32)
        return self.ids, self.values

    def take(
        self,
        token_ids: torch.Tensor,
        token_values: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """The tokens [C] (id -1: nowhere), and entries [E] that may be a token's: those are left
        out (portable path)."""
        others = columns != token_ids[rows]
        every = torch.arange(len(token_ids))
        self.rows = torch.cat([every, rows[others]])
        self.ids = torch.cat([token_ids.long(), columns[others]])
        self.values = torch.cat([token_values.double(), values[others].double()])


def span_maxima(matrix: torch.Tensor) -> torch.Tensor:
    """[C, ceil(V / SPAN)]: the largest of each SPAN columns of [C, V]."""
    vocab = matrix.shape[1]
    whole = vocab // SPAN * SPAN
    maxima = matrix[:, :whole].unflatten(1, (-1, SPAN)).amax(2) if whole else matrix[:, :0]
    if whole == vocab:
        return maxima
    return torch.cat([maxima, matrix[:, whole:].amax(1, keepdim=True)], 1)


def entries_above(
    matrix: torch.Tensor, maxima: torch.Tensor, least: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows, columns, values) [E] of the entries of [C, V] above ``least`` [C], row by row.

    ``maxima`` are its ``span_maxima``. A row with a NaN has none or some.
    """
    rows, spans = (maxima > least[:, None]).nonzero(as_tuple=True)
    columns = spans[:, None] * SPAN + torch.arange(SPAN)
    inside = columns < matrix.shape[1]
    values = matrix[rows[:, None], columns.where(inside, 0)]
    pair, place = ((values > least[rows, None]) & inside).nonzero(as_tuple=True)
    return rows[pair], columns[pair, place], values[pair, place]
