"""Rewards by rule that overlap sampling and the model passes after it (v2, appendix B.1: the
module of rule-based rewards is scheduled asynchronously, to hide its latency).

The scores are those of one ``RewardPool.score`` over the whole batch: every call is of one
completion, a batched reward still sees all of them at once, and the error budget counts against
all completions of the batch, not against the piece that happened to be there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from grpo_engine.rewards.pool import RewardPool
from grpo_engine.rewards.scores import RewardReport


class BackgroundScoring:
    """Scores completions in a thread of its own as they come. A context manager: leaving it ends
    the thread, and with it whatever is still being scored.

    Args:
        prompts, columns: as for ``RewardPool.score``; of all completions that will come.

    Raises UserError for unequal lengths or a missing column.
    """

    def __init__(
        self, pool: RewardPool, prompts: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> None:
        self._pool = pool
        self._batch = pool.begin(prompts, columns)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rewards")
        self._pieces: list[Future[None]] = []

    def add(
        self,
        members: Sequence[int],
        completions: Sequence[Any],
        completion_ids: Sequence[list[int]],
    ) -> None:
        """Have the completions of the prompts ``members`` scored. Raises what ended an earlier
        piece (RewardError: too many failures), so that sampling does not go on in vain."""
        for piece in self._pieces:
            if piece.done():
                piece.result()
        for member, completion, ids in zip(members, completions, completion_ids, strict=True):
            self._batch.put(member, completion, ids)
        self._submit(list(self._pool.single_tasks(self._batch, members)))

    def result(self) -> RewardReport:
        """The report, once all completions have been added; waits for it. Raises RewardError."""
        missing = sum("completion" not in item for item in self._batch.items)
        if missing:
            raise ValueError(f"{missing} of {len(self._batch.items)} completions were not added")
        self._submit(list(self._pool.whole_tasks(self._batch)))
        for piece in self._pieces:
            piece.result()
        return self._pool.report(self._batch)

    def _submit(self, tasks: list[tuple[int, int | None]]) -> None:
        self._pieces.append(self._thread.submit(self._work_off, tasks))

    def _work_off(self, tasks: list[tuple[int, int | None]]) -> None:
        if self._batch.cancelled:
            return
        try:
            self._batch.ask(tasks)
            self._pool.work_off(self._batch)
        except BaseException:
            self._batch.cancelled = True  # the pieces behind this one would only add to the harm
            raise

    def __enter__(self) -> BackgroundScoring:
        return self

    def __exit__(self, *_: object) -> None:
        self._batch.cancelled = True
        self._thread.shutdown(wait=True, cancel_futures=True)
