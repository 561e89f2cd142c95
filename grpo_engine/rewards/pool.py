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
* or a name the reward itself gives (accuracy: ``no_answer``, ``too_long``, ``gold_invalid``); it
  may do so beforehand, for the case that the deadline passes (``time_limit``: see ``clock.py``).

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from grpo_engine.child import framed
from grpo_engine.rewards.process import WorkerProcess
from grpo_engine.rewards.registry import RewardSpec
from grpo_engine.rewards.scores import (
    FAILURES,
    RewardReport,
    check_error_rate,
    weighted_totals,
)
from grpo_engine.types import UserError

_MAX_SLICE = 64  # scores sent to a worker at a time
_MAX_START_FAILURES = 3
_LOOK_UP_S = 0.2  # longest sleep of the supervisor: so late it may see that a batch was cancelled
NOT_ASKED = (None, "none")  # the result where a reward does not apply to the row


@dataclass
class Batch:
    """The completions of one report: the tasks left, the results so far.

    A task is (reward, item), or (reward, None) for a batched reward, which scores all at once.
    """

    items: list[dict[str, Any]]
    members: list[list[int]]  # of each reward: the items it applies to
    tasks: list[tuple[int, int | None]] = field(default_factory=list)
    waiting: deque[int] = field(default_factory=deque)
    unfinished: int = 0
    cancelled: bool = False  # set by another thread: its scores are no longer wanted
    results: dict[tuple[int, int], tuple[float | None, str]] = field(default_factory=dict)
    first_errors: dict[int, tuple[int, str]] = field(default_factory=dict)  # (item, message)
    failures: dict[int, Counter[str]] = field(default_factory=dict)
    seconds: dict[int, list[float]] = field(default_factory=dict)
    measures: dict[str, list[float]] = field(default_factory=dict)  # by name, in any order

    def put(self, item: int, completion: Any, completion_ids: list[int] | None) -> None:
        self.items[item] |= {"completion": completion, "completion_ids": completion_ids}

    def ask(self, tasks: Iterable[tuple[int, int | None]]) -> None:
        """Queue tasks; the completions they are about have been put."""
        for task in tasks:
            self.waiting.append(len(self.tasks))
            self.tasks.append(task)
            self.unfinished += 1

    def finish(self, task: int, scores: Any, outcome: str, message: str, seconds: float) -> None:
        """Record the result of one task; ``scores`` is a list for a batched reward or one value."""
        reward, item = self.tasks[task]
        members = self.members[reward] if item is None else [item]
        scores = scores if isinstance(scores, list) else [scores] * len(members)
        for member, score in zip(members, scores, strict=True):
            none = score is None and outcome == "ok"
            self.results[reward, member] = (score, "none" if none else outcome)
        if outcome in FAILURES:
            self.failures.setdefault(reward, Counter())[outcome] += len(members)
            # First by item, not by which worker was the faster: two runs write the same row.
            found = (members[0], message)
            self.first_errors[reward] = min(found, self.first_errors.get(reward, found))
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
        self._hello = framed(hello)
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
        lengths = {"prompts": len(prompts)}
        if completion_ids is not None:
            lengths["completion_ids"] = len(completion_ids)
        for name, length in lengths.items():
            if length != len(completions):
                raise UserError(
                    f"rewards: {len(completions)} completions but {length} values of {name!r}"
                )
        batch = self.begin(prompts, columns)
        ids = completion_ids if completion_ids is not None else [None] * len(completions)
        for item, (completion, one) in enumerate(zip(completions, ids, strict=True)):
            batch.put(item, completion, one)
        batch.ask([*self.whole_tasks(batch), *self.single_tasks(batch, range(len(completions)))])
        self.work_off(batch)
        return self.report(batch)

    def begin(self, prompts: Sequence[Any], columns: Mapping[str, Sequence[Any]]) -> Batch:
        """A batch for completions that are yet to come, one for each of ``prompts``. ``score`` and
        ``BackgroundScoring`` put them, ask for tasks, work those off and report."""
        for name, column in columns.items():
            if len(column) != len(prompts):
                raise UserError(
                    f"rewards: {len(prompts)} completions but {len(column)} values of {name!r}"
                )
        names = list(columns)
        rows = zip(*columns.values(), strict=True) if names else ([] for _ in prompts)
        items = [
            {"prompt": prompt, "row": dict(zip(names, row, strict=True))}
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        members = [
            [i for i, item in enumerate(items) if reward.applies(item["row"])]
            for reward in self.rewards
        ]
        for reward, required, rows_of in zip(
            self.rewards, self.required_columns, members, strict=True
        ):
            for name in required:
                if name not in columns and (rows_of or not items):
                    raise UserError(
                        f"reward {reward.name!r} needs the column {name!r}; "
                        f"the rows have: {', '.join(sorted(columns)) or 'none'}"
                    )
        return Batch(items, members)

    def single_tasks(self, batch: Batch, items: Iterable[int]) -> Iterator[tuple[int, int]]:
        """One task for each of ``items`` and each reward, batched ones aside, that applies."""
        rewards = [
            (index, set(batch.members[index]))
            for index, reward in enumerate(self.rewards)
            if not reward.batched
        ]
        return ((index, item) for item in items for index, members in rewards if item in members)

    def whole_tasks(self, batch: Batch) -> Iterator[tuple[int, None]]:
        """One task for each batched reward that applies to anything."""
        return (
            (index, None)
            for index, reward in enumerate(self.rewards)
            if reward.batched and batch.members[index]
        )

    def work_off(self, batch: Batch) -> None:
        """Score what ``batch`` asks for. Returns early, with tasks left, once it is cancelled."""
        with self._lock:
            if not self.belongs_to_this_process():
                raise RuntimeError("this RewardPool is closed or belongs to another process")
            try:
                while batch.unfinished and not batch.cancelled:
                    self._start_workers()
                    self._assign(batch)
                    self._wait(batch)
                    self._check_error_rate(batch)
            finally:
                for worker in list(self._workers):
                    if worker.assigned:  # Ctrl-C or an abandoned batch: its answers are not ours
                        self._remove(worker)

    def _start_workers(self) -> None:
        while len(self._workers) < self.num_workers:
            self._workers.append(WorkerProcess(self._hello, self.startup_timeout_s))

    def _remove(self, worker: WorkerProcess) -> None:
        worker.kill()
        self._workers.remove(worker)

    def _assign(self, batch: Batch) -> None:
        """Give each idle worker its next slice, small enough not to wait long for the slowest."""
        for worker in list(self._workers):
            if worker.busy or not batch.waiting:
                continue
            if worker.scored >= self.max_scores_per_worker:
                self._remove(worker)
                continue
            # Half a fair share: few messages for cheap rewards, no long tail for slow ones.
            size = min(_MAX_SLICE, -(-len(batch.waiting) // (2 * self.num_workers)))
            whole = [batch.tasks[task][1] is None for task in islice(batch.waiting, size)]
            if any(whole):  # a batched reward goes alone: its items are another set
                size = max(1, whole.index(True))
            tasks = [batch.waiting.popleft() for _ in range(size)]
            self._send_slice(worker, batch, tasks)

    def _send_slice(self, worker: WorkerProcess, batch: Batch, tasks: list[int]) -> None:
        wanted = [batch.tasks[task] for task in tasks]
        if wanted[0][1] is None:
            members = batch.members[wanted[0][0]]
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
        worker.outgoing += framed(body)
        worker.deadline = time.monotonic() + self.timeout_s
        self._flush(worker)

    def _wait(self, batch: Batch | None) -> None:
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
            pause = min(pause, _LOOK_UP_S)
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

    def _read(self, worker: WorkerProcess, batch: Batch | None) -> bool:
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

    def _on_message(self, worker: WorkerProcess, batch: Batch | None, message: list[Any]) -> None:
        kind, *content = message
        now = time.monotonic()
        if kind == "scored":
            task, scores, outcome, text, seconds = content
            worker.assigned.popleft()
            worker.scored += 1
            worker.if_killed = None
            worker.deadline = now + self.timeout_s
            if outcome in ("error", "invalid_score"):
                text += worker.last_lines()
            batch.finish(task, scores, outcome, text, seconds)
        elif kind == "loading":
            limit = self.timeout_s if worker.ready and not content[0] else self.startup_timeout_s
            worker.deadline = now + limit
        elif kind == "measured":
            name, value = content
            batch.measures.setdefault(name, []).append(value)
        elif kind == "if_killed":
            worker.if_killed = tuple(content)
        elif kind == "ready":
            worker.ready = True
            self._start_failures = 0
            self.required_columns = content[0]
        elif kind == "refused":
            raise UserError(content[0])

    def _expire(self, worker: WorkerProcess, batch: Batch | None) -> None:
        limit = self.timeout_s if worker.ready else self.startup_timeout_s
        self._lose(worker, batch, "timeout", f"no answer after {limit:g} s, killed")

    def _bury(self, worker: WorkerProcess, batch: Batch | None) -> None:
        worker.kill()
        code = worker.process.returncode
        cause = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        self._lose(worker, batch, "worker_death", f"the worker process {cause}")

    def _lose(self, worker: WorkerProcess, batch: Batch | None, outcome: str, message: str) -> None:
        """Remove a worker; the score it was at is lost, the rest of its slice goes to another."""
        self._remove(worker)
        message += worker.last_lines()
        if not worker.ready:
            self._start_failures += 1
            if self._start_failures >= _MAX_START_FAILURES:
                raise UserError(f"reward workers fail to start: {message}")
        elif worker.assigned and batch is not None:
            score, outcome = (outcome == "timeout" and worker.if_killed) or (None, outcome)
            batch.finish(worker.assigned.popleft(), score, outcome, message, self.timeout_s)
            batch.waiting.extend(worker.assigned)
            worker.assigned.clear()

    def _check_error_rate(self, batch: Batch) -> None:
        for index, failed in batch.failures.items():
            check_error_rate(
                self.rewards[index].name,
                failed,
                len(batch.members[index]),
                self.max_error_rate,
                batch.first_errors[index][1],
            )

    def report(self, batch: Batch) -> RewardReport:
        """The scores of a batch whose tasks have all been worked off."""
        scores, outcome_of, outcomes, first_errors, seconds = {}, {}, {}, {}, {}
        for index, reward in enumerate(self.rewards):
            name, members = reward.name, batch.members[index]
            results = [batch.results.get((index, i), NOT_ASKED) for i in range(len(batch.items))]
            scores[name] = [score for score, _ in results]
            outcome_of[name] = [outcome for _, outcome in results]
            outcomes[name] = Counter(outcome_of[name][member] for member in members)
            seconds[name] = batch.seconds.get(index, [])
            if index in batch.first_errors:
                first_errors[name] = batch.first_errors[index][1]
        weights = {reward.name: reward.weight for reward in self.rewards}
        totals = weighted_totals(weights, scores, outcome_of)
        # Sorted, not by which worker was the faster: two runs add up the same mean.
        measures = {name: sorted(values) for name, values in sorted(batch.measures.items())}
        return RewardReport(
            scores, outcomes, first_errors, seconds, totals, outcome_of, weights, measures
        )
