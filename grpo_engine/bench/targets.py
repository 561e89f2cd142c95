"""What the kernels are meant to reach on an H200, and what was measured of it.

A target reads rows; where the row it needs is not there (the case was not chosen, the provider is
absent, no GPU) it says "not measured". On another GPU the figures are shown beside the same
targets, which were set for an H200.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from grpo_engine.bench.cases import Case, head_case, host_cases
from grpo_engine.bench.providers import providers_of
from grpo_engine.bench.rows import ABSENT, BOTH, FAILED, FORWARD, OK, Row

MODEL, TOKENS, LOGITS_TOKENS = "Qwen3-8B", 16_384, 8192
WORKSPACE_MIB = 1.3e9 / 2**20
SPARSE = "certified"  # in the name of the sparse provider


def target_cases() -> list[Case]:
    """The cases that the targets are about: what ``--quick`` runs on a GPU. The jobs of
    milliseconds come right after the first head: they cost little, whenever the time is up."""
    bf16, frozen = torch.bfloat16, frozenset({"frozen_head"})
    entropy = frozenset({"entropy"})
    return [
        main_case(),
        *host_cases(scale=8),
        head_case(MODEL, TOKENS, bf16, features=frozen),
        head_case(MODEL, TOKENS, bf16, values="peaked"),
        head_case(MODEL, TOKENS, bf16, "linear_logprobs"),
        head_case(MODEL, LOGITS_TOKENS, bf16, "token_logprobs", features=entropy),
    ]


def main_case() -> Case:
    """The one that every rival takes part in, also who compiles: the target is about them all."""
    return head_case(MODEL, TOKENS, torch.bfloat16)


@dataclass(frozen=True)
class Target:
    """``measure`` gives (figure, whether it is met), or None where it was not measured; None for
    "met" where the figure does not decide it."""

    job: str
    words: str
    measure: Callable[[Board], tuple[str, bool | None] | None]


class Board:
    """The rows that were timed, by case, pass and provider; ``seen`` are all."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.seen = list(rows)
        self.rows = [row for row in self.seen if row.status == OK and row.ms is not None]

    def row(self, case: Case, passes: str, provider: str = "ours") -> Row | None:
        wanted = (case.name, passes, provider)
        return next((row for row in self.rows if row.key == wanted), None)

    def containing(self, case: Case, passes: str, words: str) -> Row | None:
        found = [r for r in self.rows if r.case.name == case.name and r.passes == passes]
        return next((row for row in found if row.ours and words in row.provider), None)

    def rivals(self, case: Case, passes: str) -> list[Row]:
        """Everyone else who is exact: wrong ones have no time."""
        found = [r for r in self.rows if r.case.name == case.name and r.passes == passes]
        return [row for row in found if not row.ours and not row.approximate]

    def not_timed(self, case: Case, passes: str) -> list[str]:
        """Known exact rivals that could do the case and have no time: not here, failed,
        interrupted or not chosen. One that is wrong does another job: it is no rival."""
        seen = {r.provider: r for r in self.seen if (r.case.name, r.passes) == (case.name, passes)}
        names = []
        for rival in providers_of(case.job):
            if rival.name.startswith("ours") or rival.approximate:
                continue
            row = seen.get(rival.name)
            if row is None:
                missing = rival.unsuited(case, passes == BOTH) is None
            else:
                missing = row.status in (ABSENT, FAILED) or (row.status == OK and row.ms is None)
            names += [rival.name] if missing else []
        return names


def times_floor(row: Row | None, limit: float) -> tuple[str, bool] | None:
    if row is None or row.floor_ms is None:
        return None
    ratio = row.ms.median / row.floor_ms.median
    return f"{ratio:.3f}x of {row.floor}", ratio <= limit


def faster_than_rivals(board: Board, case: Case, passes: str, factor: float):
    ours, rivals = board.row(case, passes), board.rivals(case, passes)
    if ours is None or not rivals:
        return None
    nearest = min(rivals, key=lambda row: row.ms.median)
    ratio, left = nearest.ms.median / ours.ms.median, board.not_timed(case, passes)
    words = f"{ratio:.2f}x, the nearest being {nearest.provider}, of {len(rivals)} rivals"
    words += f"; not timed: {', '.join(left)}" if left else ""
    if ratio < factor:
        return words, False
    return words, None if left else True


def workspace(board: Board, case: Case):
    row = board.row(case, BOTH)
    if row is None or row.peak_mib is None:
        return None
    elements = sum(case.sizes[axis] * case.sizes["D"] for axis in "NV")
    beside = row.peak_mib - elements * case.dtype.itemsize / 2**20
    in_fp32 = row.peak_mib - elements * 4 / 2**20  # as they are summed, until they are rounded
    return f"{beside:.0f} MiB; beside their fp32 sums {in_fp32:.0f} MiB", beside <= WORKSPACE_MIB


def sparse(board: Board, case: Case):
    """Time against three bare GEMMs, and the gradients' errors against the dense path's."""
    row, dense = board.containing(case, BOTH, SPARSE), board.row(case, BOTH)
    times = times_floor(row, 0.6)
    if times is None or dense is None:
        return None
    names = [name for name in row.errors if name.startswith("d_") and name in dense.errors]
    exact = all(row.errors[name] <= dense.errors[name] for name in names)
    words = "below" if exact else "ABOVE"
    return f"{times[0]}, gradient errors {words} the dense path's", times[1] and exact


def sparse_overhead(board: Board, case: Case):
    row, dense = board.containing(case, BOTH, SPARSE), board.row(case, BOTH)
    if row is None or dense is None:
        return None
    ratio = row.ms.median / dense.ms.median
    return f"{ratio:.3f}x of the dense path", ratio <= 1.05


def of_copy(board: Board, case: Case, percent: float, passes: str = FORWARD):
    row = board.row(case, passes)
    if row is None or row.percent_of_floor is None:
        return None
    return f"{row.percent_of_floor:.1f} % of copy", row.percent_of_floor >= percent


def backward_of_copy(board: Board, case: Case, percent: float):
    """The backward alone, as the difference of both passes and the forward one."""
    both, forward = board.row(case, BOTH), board.row(case, FORWARD)
    if both is None or forward is None or None in (both.floor_ms, forward.floor_ms):
        return None
    took = both.ms.median - forward.ms.median
    floor = both.floor_ms.median - forward.floor_ms.median
    reached = 100 * floor / took if took > 0 else float("nan")
    return f"{reached:.1f} % of copy", reached >= percent


def times_faster(board: Board, case: Case, passes: str, other: str, factor: float):
    """By the host's clock: these are launch-bound."""
    ours, theirs = board.row(case, passes), board.row(case, passes, other)
    if ours is None or theirs is None or None in (ours.wall_ms, theirs.wall_ms):
        return None
    ratio = theirs.wall_ms.median / ours.wall_ms.median
    return f"{ratio:.1f}x (wall)", ratio >= factor


def counted_by(test: str) -> Callable[[Board], tuple[str, None]]:
    """No row says it: a test on a GPU does."""
    return lambda board: (f"counted by {test}", None)


def targets() -> list[Target]:
    main, loss, packs, small_packs, unpacks, small_unpacks, *_ = target_cases()
    *_, frozen, peaked, logprobs, logits = target_cases()
    both, back = "linear_grpo_loss", "token_logprobs"
    return [
        Target(both, "<= 1.10x of 3 bare GEMMs", lambda b: times_floor(b.row(main, BOTH), 1.1)),
        Target(
            both,
            ">= 1.2x faster than every exact rival",
            lambda b: faster_than_rivals(b, main, BOTH, 1.2),
        ),
        Target(both, "workspace <= 1.3 GB beside the gradients", lambda b: workspace(b, main)),
        Target(
            f"{both}, frozen head",
            "<= 1.10x of 2 bare GEMMs",
            lambda b: times_floor(b.row(frozen, BOTH), 1.1),
        ),
        Target(
            f"{both}, certified sparse, peaked",
            "<= 0.6x of 3 bare GEMMs, gradient errors below the dense path's",
            lambda b: sparse(b, peaked),
        ),
        Target(
            f"{both}, certified sparse, diffuse",
            "<= 5 % over the dense path",
            lambda b: sparse_overhead(b, main),
        ),
        Target(
            "linear_logprobs, forward",
            "<= 1.08x of 1 bare GEMM",
            lambda b: times_floor(b.row(logprobs, FORWARD), 1.08),
        ),
        Target(f"{back}, forward", ">= 90 % of copy", lambda b: of_copy(b, logits, 90)),
        Target(f"{back}, backward", ">= 90 % of copy", lambda b: backward_of_copy(b, logits, 90)),
        Target(
            "grpo_loss", ">= 20x plain torch", lambda b: times_faster(b, loss, BOTH, "torch", 20)
        ),
        Target(
            "grpo_loss, forward",
            "<= 2 launches",
            counted_by("tests/test_grpo_loss_launches.py::test_launches_on_a_gpu"),
        ),
        Target(
            "grpo_loss",
            "no host sync",
            counted_by("tests/test_kernels_on_gpu.py::test_no_host_sync"),
        ),
        Target(
            "pack, unpack",
            "one launch",
            counted_by("tests/test_packing.py::test_packing_is_one_launch"),
        ),
        Target("pack, large", ">= 80 % of copy", lambda b: of_copy(b, packs, 80)),
        Target(
            "pack, small",
            ">= 10x the torch chain",
            lambda b: times_faster(b, small_packs, FORWARD, "torch, field by field", 10),
        ),
        Target("unpack, large", ">= 80 % of copy", lambda b: of_copy(b, unpacks, 80)),
        Target(
            "unpack, small",
            ">= 10x the torch chain",
            lambda b: times_faster(b, small_unpacks, FORWARD, "torch", 10),
        ),
    ]


COLUMNS = ["job", "target on an H200", "measured", ""]


def target_table(rows: Iterable[Row]) -> dict[str, Any]:
    board, table = Board(rows), []
    for target in targets():
        found = target.measure(board)
        figure, met = ("not measured", None) if found is None else found
        shown = {True: "met", False: "MISSED", None: "not decided" if found else ""}[met]
        table.append([target.job, target.words, figure, shown])
    return {"columns": COLUMNS, "rows": table}
