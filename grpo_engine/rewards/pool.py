"""Reward functions in worker processes that can be killed.

A reward function may loop in C where no signal or thread can stop it, leak, crash, or call
``os._exit``. So each runs in a worker of our own (never forked: a fresh interpreter, safe after
CUDA start-up), and one supervisor in the caller's thread watches the clock: every single score
has a wall deadline; when it passes, the worker and all its children get SIGKILL and a new worker
goes on with the rest. No alarm signal is used anywhere, so it works in any thread and leaves the
caller's alone.

Every completion gets exactly one outcome per reward, in order:

* ``ok``: a finite number; ``none``: the function returned None, the reward does not apply;
* ``timeout``: past the deadline, worker killed; ``worker_death``: it exited or crashed;
* ``error``: the function raised; ``invalid_score``: NaN, infinite, not a number, or a wrong number
  of scores;
* or a name the reward itself gives (accuracy: ``no_answer``, ``too_long``, ``gold_invalid``).

Failures (the third to sixth) score None, never 0. When their share of a batch passes
``max_error_rate`` the batch is abandoned with one clear line, instead of training on what is left.

Cost: 256 completions with accuracy (integers) and format take about 14 ms: two workers, warm, on
two CPU cores.
"""

from __future__ import annotations

import json
import os
import pickle
import selectors
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_engine.rewards.process import WorkerProcess
from grpo_engine.rewards.registry import RewardSpec
from grpo_engine.rewards.worker import LENGTH
from grpo_engine.types import UserError

FAILURES = frozenset(("timeout", "error", "worker_death", "invalid_score"))
_UNJUDGED = FAILURES | {"gold_invalid"}
_MAX_SLICE = 64  # scores sent to a worker at a time
_MAX_START_FAILURES = 3


class RewardError(UserError):
    """Too large a share of one batch could not be scored (see ``max_error_rate``)."""


@dataclass
class RewardReport:
    """Scores of one batch. ``scores[name][i]`` belongs to completion ``i``; None = no score."""

    scores: dict[str, list[float | None]]
    outcomes: dict[str, Counter[str]]
    first_errors: dict[str, str]  # by reward; only rewards that failed at least once
    seconds: dict[str, list[float]]  # time of each call, for percentiles
    totals: list[float | None]  # weighted sum; None = nothing applicable, or a reward failed
    outcome_of: dict[str, list[str]] = field(default_factory=dict)  # in the order of ``scores``

    def error_rate(self, name: str) -> float:
        """Share of completions on which reward ``name`` failed."""
        counts = self.outcomes[name]
        return sum(counts[failure] for failure in FAILURES) / max(1, sum(counts.values()))

    def rates(self, name: str) -> dict[str, float]:
        """Share of completions for each outcome of ``name`` that occurred, except ok.

        The outcome ``error`` is called ``raised`` here: "error_rate" is the sum of all failures.
        """
        counts = self.outcomes[name]
        total = max(1, sum(counts.values()))
        return {
            "raised" if outcome == "error" else outcome: count / total
            for outcome, count in sorted(counts.items())
            if count and outcome != "ok"
        }


@dataclass
class _Batch:
    """One ``score`` call: the tasks left, the results so far. A task: (reward, item or None)."""

    items: list[dict[str, Any]]
    tasks: list[tuple[int, int | None]]
    waiting: deque[int] = field(default_factory=deque)
    unfinished: int = 0
    results: dict[tuple[int, int], tuple[float | None, str]] = field(default_factory=dict)
    first_errors: dict[int, str] = field(default_factory=dict)
    failures: Counter[int] = field(default_factory=Counter)
    seconds: dict[int, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.waiting.extend(range(len(self.tasks)))
        self.unfinished = len(self.tasks)

    def finish(self, task: int, scores: Any, outcome: str, message: str, seconds: float) -> None:
        """Record the result of one task; ``scores`` is a list for a batched reward or one value."""
        reward, item = self.tasks[task]
        members = range(len(self.items)) if item is None else [item]
        scores = scores if isinstance(scores, list) else [scores] * len(members)
        for member, score in zip(members, scores, strict=True):
            none = score is None and outcome == "ok"
            self.results[reward, member] = (score, "none" if none else outcome)
        if outcome in FAILURES:
            self.failures[reward] += len(members)
            self.first_errors.setdefault(reward, message)
        self.seconds.setdefault(reward, []).append(seconds)
        self.unfinished -= 1


def _kill_all(workers: list[WorkerProcess], owner_pid: int) -> None:
    if os.getpid() != owner_pid:
        return  # a forked copy of the pool: the workers are not its children
    for worker in workers:
        worker.kill()
    workers.clear()


class RewardPool:
    """Scores completions with several rewards in killable worker processes.

    Parameters: ``timeout_s`` is the wall deadline of each call of a reward; ``startup_timeout_s``
    that of starting a worker and of loading packages; ``max_error_rate`` the share of failed
    scores of one reward within one batch above which ``score`` raises RewardError (1.0 never
    raises); ``memory_limit_mb`` the address space of a worker (None = unlimited, for rewards that
    load a model or use CUDA); a worker is replaced after ``max_scores_per_worker`` scores.

    The constructor waits until the first worker has loaded every reward and raises UserError when
    one cannot be loaded. Thread-safe; concurrent ``score`` calls take turns. Use as a context
    manager or call ``close``; workers never outlive the process.
    """

    def __init__(
        self,
        rewards: Iterable[RewardSpec | str],
        *,
        num_workers: int | None = None,
        timeout_s: float = 5.0,
        startup_timeout_s: float = 120.0,
        max_error_rate: float = 0.5,
        memory_limit_mb: int | None = 8192,
        max_scores_per_worker: int = 50_000,
    ) -> None:
        self.rewards = [
            reward if isinstance(reward, RewardSpec) else RewardSpec.named(reward)
            for reward in rewards
        ]
        self.num_workers = min(4, os.cpu_count() or 1) if num_workers is None else num_workers
        self.timeout_s = timeout_s
        self.startup_timeout_s = startup_timeout_s
        self.max_error_rate = max_error_rate
        self.max_scores_per_worker = max_scores_per_worker
        self.required_columns: list[list[str]] = []
        self._check()
        hello = pickle.dumps({"rewards": self.rewards, "memory_limit_mb": memory_limit_mb})
        self._hello = LENGTH.pack(len(hello)) + hello
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._start_failures = 0
        self._workers: list[WorkerProcess] = []
        self._finalizer = weakref.finalize(self, _kill_all, self._workers, self._pid)
        try:
            self._start_workers()
            while not any(worker.ready for worker in self._workers):
                self._wait(None)
                self._start_workers()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        names = [reward.name for reward in self.rewards]
        if not names:
            raise UserError("rewards: at least one reward is needed")
        if len(set(names)) != len(names):
            raise UserError(f"rewards: names must differ, got {', '.join(names)}")
        if self.num_workers < 1:
            raise UserError(f"num_workers must be >= 1, got {self.num_workers}")
        if not self.timeout_s > 0:
            raise UserError(f"timeout_s must be > 0, got {self.timeout_s}")
        if not 0 <= self.max_error_rate <= 1:
            raise UserError(f"max_error_rate must be in [0, 1], got {self.max_error_rate}")

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill every worker. The pool cannot be used afterwards."""
        with self._lock:
            self._finalizer()

    def belongs_to_this_process(self) -> bool:
        """False in a forked copy and after ``close``."""
        return self._finalizer.alive and self._pid == os.getpid()

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
        completion_ids: Sequence[list[int]] | None = None,
    ) -> RewardReport:
        """One score per completion and reward, in order.

        ``columns[name][i]`` belongs to completion ``i``. Raises UserError for unequal lengths or
        a missing column, RewardError above ``max_error_rate``; a bad completion or reward never
        raises.
        """
        items = self._items(prompts, completions, columns, completion_ids)
        tasks: list[tuple[int, int | None]] = []
        for index, reward in enumerate(self.rewards):
            if reward.batched and items:
                tasks.append((index, None))
        single = [index for index, reward in enumerate(self.rewards) if not reward.batched]
        tasks += [(index, item) for item in range(len(items)) for index in single]
        batch = _Batch(items, tasks)
        with self._lock:
            if not self.belongs_to_this_process():
                raise RuntimeError("this RewardPool is closed or belongs to another process")
            try:
                while batch.unfinished:
                    self._start_workers()
                    self._assign(batch)
                    self._wait(batch)
                    self._check_error_rate(batch)
            finally:
                for worker in list(self._workers):
                    if worker.assigned:  # Ctrl-C or an abandoned batch: its answers are not ours
                        self._remove(worker)
        return self._report(batch)

    def _items(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
        completion_ids: Sequence[list[int]] | None,
    ) -> list[dict[str, Any]]:
        lengths = {"prompts": len(prompts), **{name: len(col) for name, col in columns.items()}}
        if completion_ids is not None:
            lengths["completion_ids"] = len(completion_ids)
        for name, length in lengths.items():
            if length != len(completions):
                raise UserError(
                    f"rewards: {len(completions)} completions but {length} values of {name!r}"
                )
        for reward, required in zip(self.rewards, self.required_columns, strict=True):
            for name in required:
                if name not in columns:
                    raise UserError(
                        f"reward {reward.name!r} needs the column {name!r}; "
                        f"the rows have: {', '.join(sorted(columns)) or 'none'}"
                    )
        names = list(columns)
        rows = zip(*columns.values(), strict=True) if names else ([] for _ in completions)
        ids = completion_ids if completion_ids is not None else [None] * len(completions)
        return [
            {
                "prompt": prompt,
                "completion": completion,
                "completion_ids": one,
                "row": dict(zip(names, row, strict=True)),
            }
            for prompt, completion, one, row in zip(prompts, completions, ids, rows, strict=True)
        ]

    def _start_workers(self) -> None:
        while len(self._workers) < self.num_workers:
            self._workers.append(WorkerProcess(self._hello, self.startup_timeout_s))

    def _remove(self, worker: WorkerProcess) -> None:
        worker.kill()
        self._workers.remove(worker)

    def _assign(self, batch: _Batch) -> None:
        """Give each idle worker its next slice, small enough not to wait long for the slowest."""
        for worker in list(self._workers):
            if worker.busy or not batch.waiting:
                continue
            if worker.scored >= self.max_scores_per_worker:
                self._remove(worker)
                continue
            # Half a fair share: few messages for cheap rewards, no long tail for slow ones.
            size = min(_MAX_SLICE, -(-len(batch.waiting) // (2 * self.num_workers)))
            tasks = [batch.waiting.popleft() for _ in range(size)]
            self._send_slice(worker, batch, tasks)

    def _send_slice(self, worker: WorkerProcess, batch: _Batch, tasks: list[int]) -> None:
        wanted = [batch.tasks[task] for task in tasks]
        if any(item is None for _, item in wanted):
            members = list(range(len(batch.items)))
        else:
            members = sorted({item for _, item in wanted if item is not None})
        place = {member: index for index, member in enumerate(members)}
        body = pickle.dumps(
            {
                "items": [batch.items[member] for member in members],
                "tasks": [
                    (task, reward, None if item is None else place[item])
                    for task, (reward, item) in zip(tasks, wanted, strict=True)
                ],
            },
            protocol=pickle.HIGHEST_PROTOCOL,
        )
        worker.assigned.extend(tasks)
        worker.outgoing += LENGTH.pack(len(body)) + body
        worker.deadline = time.monotonic() + self.timeout_s
        self._flush(worker)

    def _wait(self, batch: _Batch | None) -> None:
        """Sleep until something happens, then deal with everything that has."""
        with selectors.PollSelector() as selector:
            for worker in self._workers:
                events = selectors.EVENT_READ
                if worker.outgoing:
                    events |= selectors.EVENT_WRITE
                selector.register(worker.channel, events, worker)
                if worker.output_open:
                    selector.register(worker.output, selectors.EVENT_READ, worker)
            deadlines = [worker.deadline for worker in self._workers if worker.busy]
            pause = max(0.0, min(deadlines) - time.monotonic()) if deadlines else 0.0
            happened = selector.select(pause)
        dead = []
        for key, events in happened:
            worker = key.data
            if key.fileobj is not worker.channel:
                worker.read_output()
                continue
            if events & selectors.EVENT_WRITE:
                self._flush(worker)
            if events & selectors.EVENT_READ and not self._read(worker, batch):
                dead.append(worker)
        for worker in dead:
            self._bury(worker, batch)
        # Deadlines last: what arrived while this process was busy elsewhere counts as in time.
        now = time.monotonic()
        for worker in list(self._workers):
            if worker.busy and now >= worker.deadline:
                self._expire(worker, batch)

    def _flush(self, worker: WorkerProcess) -> None:
        try:
            sent = worker.channel.send(worker.outgoing)
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            worker.outgoing.clear()  # it is dead: the next read says so
            return
        del worker.outgoing[:sent]

    def _read(self, worker: WorkerProcess, batch: _Batch | None) -> bool:
        """Take in the worker's messages; False when it has closed its end."""
        try:
            piece = worker.channel.recv(1 << 18)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        *lines, worker.incoming = (worker.incoming + piece).split(b"\n")
        for message in json.loads(b"[" + b",".join(lines) + b"]"):  # one call: many short messages
            self._on_message(worker, batch, message)
        return bool(piece)

    def _on_message(self, worker: WorkerProcess, batch: _Batch | None, message: list[Any]) -> None:
        kind, *content = message
        now = time.monotonic()
        if kind == "scored":
            task, scores, outcome, text, seconds = content
            worker.assigned.popleft()
            worker.scored += 1
            worker.deadline = now + self.timeout_s
            if outcome in ("error", "invalid_score"):
                text += worker.last_lines()
            batch.finish(task, scores, outcome, text, seconds)
        elif kind == "loading":
            limit = self.timeout_s if worker.ready and not content[0] else self.startup_timeout_s
            worker.deadline = now + limit
        elif kind == "ready":
            worker.ready = True
            self._start_failures = 0
            self.required_columns = content[0]
        elif kind == "refused":
            raise UserError(content[0])

    def _expire(self, worker: WorkerProcess, batch: _Batch | None) -> None:
        limit = self.timeout_s if worker.ready else self.startup_timeout_s
        self._lose(worker, batch, "timeout", f"no answer after {limit:g} s, killed")

    def _bury(self, worker: WorkerProcess, batch: _Batch | None) -> None:
        worker.kill()
        code = worker.process.returncode
        cause = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        self._lose(worker, batch, "worker_death", f"the worker process {cause}")

    def _lose(
        self, worker: WorkerProcess, batch: _Batch | None, outcome: str, message: str
    ) -> None:
        """Remove a worker; the score it was at is lost, the rest of its slice goes to another."""
        self._remove(worker)
        message += worker.last_lines()
        if not worker.ready:
            self._start_failures += 1
            if self._start_failures >= _MAX_START_FAILURES:
                raise UserError(f"reward workers fail to start: {message}")
        elif worker.assigned and batch is not None:
            batch.finish(worker.assigned.popleft(), None, outcome, message, self.timeout_s)
            batch.waiting.extend(worker.assigned)
            worker.assigned.clear()

    def _check_error_rate(self, batch: _Batch) -> None:
        allowed = self.max_error_rate * len(batch.items)
        for index, failures in batch.failures.items():
            if failures > allowed:
                counts = Counter(
                    outcome
                    for (reward, _), (_, outcome) in batch.results.items()
                    if reward == index and outcome in FAILURES
                )
                kinds = ", ".join(f"{name} {count}" for name, count in counts.most_common())
                first = " ".join(batch.first_errors[index].split())
                raise RewardError(
                    f"reward {self.rewards[index].name!r} failed on {failures} of "
                    f"{len(batch.items)} completions ({kinds}), more than max_error_rate="
                    f"{self.max_error_rate:g} allows; the first failure: {first}"
                )

    def _report(self, batch: _Batch) -> RewardReport:
        scores, outcome_of, outcomes, first_errors, seconds = {}, {}, {}, {}, {}
        for index, reward in enumerate(self.rewards):
            results = [batch.results[index, item] for item in range(len(batch.items))]
            scores[reward.name] = [score for score, _ in results]
            outcome_of[reward.name] = [outcome for _, outcome in results]
            outcomes[reward.name] = Counter(outcome_of[reward.name])
            seconds[reward.name] = batch.seconds.get(index, [])
            if index in batch.first_errors:
                first_errors[reward.name] = batch.first_errors[index]
        totals = [self._total(batch, item) for item in range(len(batch.items))]
        return RewardReport(scores, outcomes, first_errors, seconds, totals, outcome_of)

    def _total(self, batch: _Batch, item: int) -> float | None:
        """The weighted sum over the rewards that apply; None when one failed or none applies.

        Leaving a failed reward out of the sum would count it as 0 and bias the group's baseline.
        """
        total = None
        for index, reward in enumerate(self.rewards):
            score, outcome = batch.results[index, item]
            if outcome in _UNJUDGED:
                return None
            if score is not None:
                total = (total or 0.0) + reward.weight * score
        return total
