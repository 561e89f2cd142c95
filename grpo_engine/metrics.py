"""What a run writes while it trains: metrics.jsonl, the sampled completions, the time split, and
warnings.

metrics.jsonl holds one JSON object per step and is appended to line by line, so that a killed run
loses at most its last line. It is strict JSON: a NaN or infinity is written as null and its key is
listed under "nonfinite", because a bare ``NaN`` token makes the whole file unreadable to anything
but Python.

``health_warnings`` turns numbers into sentences. Its first rule is the trap that motivated it: a
completion cap that cuts the long, correct answers teaches the policy that short, well-formatted,
wrong answers pay better. Every curve looks smooth while that happens; only the truncated fraction
tells.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any

from grpo_engine.history import BEST, START, WINDOW, History, accuracy_keys, finite_number
from grpo_engine.types import Rollout, UserError

METRICS_FILE = "metrics.jsonl"
COMPLETIONS_DIR = "completions"

_COMPLETIONS_NAME = re.compile(r"^(step|eval)-(\d+)\.jsonl$")

# Thresholds of health_warnings, in the units of the metric they judge.
TRUNCATED_HIGH = 0.10  # fraction of completions that hit max_completion_length
TRUNCATED_RISE = 0.02  # rise of that fraction between two windows that counts as rising
REWARD_FALL = 0.02  # fall of the mean reward between two windows that counts as falling
ACCURACY_FALL = 0.10  # fall of an accuracy reward from its best window
LENGTH_FALL = 0.60  # mean length below this fraction of its best window
REWARD_ERRORS_HIGH = 0.02  # fraction of completions whose reward function failed
KL_HIGH = 1.0  # nats per token, mean
KL_JUMP, KL_JUMP_FLOOR = 10.0, 0.1  # times the recent median; not below the floor
ENTROPY_LOW = 0.05  # fraction of the entropy at the start of the run
LOGPROB_GAP_HIGH = 0.05  # nats per token between sampler and trainer
IS_RATIO_LOW, IS_RATIO_HIGH = 0.9, 1.1
MISMATCH_KL_HIGH = 0.02  # nats per token, sampler to trainer
MISMATCH_KL_JUMP, MISMATCH_KL_FLOOR = 10.0, 1e-3  # times the recent median; not below the floor
ESS_LOW = 0.9  # effective share of the tokens under importance weights


def strict_json(row: Mapping[str, Any]) -> str:
    """One line of strict JSON. NaN and infinities become null and are listed under "nonfinite".

    Raises TypeError naming the key when a value is not a host number, string, list or mapping (a
    tensor here would hide a device synchronisation)."""
    nonfinite: list[str] = []
    plain = {key: _plain(value, str(key), nonfinite) for key, value in row.items()}
    if nonfinite:
        plain["nonfinite"] = sorted({*plain.get("nonfinite", []), *nonfinite})
    return json.dumps(plain, ensure_ascii=False, allow_nan=False)


def _plain(value: Any, key: str, nonfinite: list[str]) -> Any:
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{key}.{k}", nonfinite) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{key}[{i}]", nonfinite) for i, v in enumerate(value)]
    if isinstance(value, float) or type(value).__module__ == "numpy":
        number = value.item() if hasattr(value, "item") else value
        if isinstance(number, float) and not math.isfinite(number):
            nonfinite.append(key)
            return None
        return number
    raise TypeError(
        f"metric {key!r}: cannot write a {type(value).__name__}, expected a host number"
    )


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file. A last line without its newline that does not parse is what a killed
    process leaves and is dropped; any other line that is not a JSON object raises UserError with
    its number."""
    lines = Path(path).read_bytes().split(b"\n")  # only \n ends a row: JSON strings may hold U+2028
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is not a JSON object but {type(row).__name__}")
        rows.append(row)
    return rows


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl in file order; each has an integer "step". Raises UserError
    otherwise."""
    path = Path(path)
    if path.is_dir():
        path = path / METRICS_FILE
    if not path.is_file():
        raise UserError(f"metrics: no file {path}")
    rows = read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("step"), int):
            raise UserError(f"{path}: row {number} has no integer step, got {row.get('step')!r}")
    return rows


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` in one step: a reader sees the old file or the new one, never a part."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


class MetricsLog(AbstractContextManager):
    """Appends one row per step to ``output_dir/metrics.jsonl``.

    ``resume_step=k`` keeps the rows up to and including step k and drops the later ones, which the
    resumed run will write again. ``resume_step=None`` starts a run and refuses (UserError) to write
    onto an old one. ``history`` covers the whole run, what came before the resume included."""

    def __init__(self, output_dir: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(output_dir) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_metrics(self.path) if self.path.exists() else []
        if resume_step is not None:
            rows = [row for row in rows if row["step"] <= resume_step]
            write_atomically(self.path, "".join(strict_json(row) + "\n" for row in rows))
        elif rows:
            raise UserError(
                f"output_dir: {output_dir} already holds metrics up to step {rows[-1]['step']}; "
                "resume that run or name another folder"
            )
        self.history = History(rows)
        self._last_step = rows[-1]["step"] if rows else None
        # A killed run may have left a torn line and nothing before it: "w" clears that, "a" keeps
        # the rows.
        mode = "a" if rows else "w"
        self._file = open(self.path, mode, encoding="utf-8", errors="replace", buffering=1)  # noqa: SIM115

    def write(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Append ``row`` and return it as written. Raises ValueError unless steps grow."""
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise TypeError(f"step must be an integer, got {step!r}")
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(
                f"step must be above the last one written, {self._last_step}; got {step}"
            )
        line = strict_json(row)
        self._file.write(line + "\n")
        self._last_step = step
        written = json.loads(line)
        self.history.append(written)
        return written

    def close(self) -> None:
        self._file.close()

    def __exit__(self, *exc: object) -> None:
        self.close()


class CompletionsLog:
    """Writes sampled answers to ``output_dir/completions``: step-000010.jsonl from training
    rollouts and eval-000010.jsonl from held-out problems. Each file is written whole or not at all.

    On resume the files of steps after ``resume_step`` are removed, as their rows in metrics.jsonl
    are."""

    def __init__(self, output_dir: str | Path, resume_step: int | None = None) -> None:
        self.folder = Path(output_dir) / COMPLETIONS_DIR
        if resume_step is not None:
            for kind in ("step", "eval"):
                for step, path in list_completions(output_dir, kind):
                    if step > resume_step:
                        path.unlink()

    def write_rollouts(self, step: int, rollouts: Iterable[Rollout]) -> Path:
        return self._write("step", step, (rollout_row(step, rollout) for rollout in rollouts))

    def write_eval(self, step: int, rows: Iterable[Mapping[str, Any]]) -> Path:
        """``rows`` carry index, prompt, completion, correct (0/1 or None), finish_reason, length,
        solution."""
        return self._write("eval", step, ({"step": step, **row} for row in rows))

    def _write(self, kind: str, step: int, rows: Iterable[Mapping[str, Any]]) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{kind}-{step:06d}.jsonl"
        write_atomically(path, "".join(strict_json(row) + "\n" for row in rows))
        return path


def rollout_row(step: int, rollout: Rollout) -> dict[str, Any]:
    row = {
        "step": step,
        "group": rollout.group,
        "prompt": rollout.prompt,
        "completion": rollout.completion,
        "rewards": rollout.rewards,
        "reward": rollout.reward,
        "advantage": rollout.advantage,
        "finish_reason": rollout.finish_reason,
        "length": len(rollout.completion_ids),
    }
    if "solution" in rollout.row:
        solution = rollout.row["solution"]
        row["solution"] = solution if isinstance(solution, (str, int, float)) else str(solution)
    return row


def list_completions(output_dir: str | Path, kind: str) -> list[tuple[int, Path]]:
    """(step, path) of the "step" or "eval" files, by step."""
    folder = Path(output_dir) / COMPLETIONS_DIR
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _COMPLETIONS_NAME.match(path.name)
        if match and match.group(1) == kind:
            found.append((int(match.group(2)), path))
    return sorted(found)


class Stopwatch:
    """Splits the time of a step over named phases.

    A phase inside another pauses the outer one, so the phases never count a second twice and their
    sum is at most time/step. ``synchronize`` (say torch.cuda.synchronize) is called at the edges of
    a phase: without it a queue of kernels is billed to whichever phase happens to wait for it."""

    def __init__(
        self,
        synchronize: Callable[[], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._synchronize = synchronize or (lambda: None)
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._mark = self._lap_start = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._bill()
        self._open.append(name)
        try:
            yield
        finally:
            self._bill()
            self._open.pop()

    def _bill(self) -> None:
        self._synchronize()
        now = self._clock()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now

    def lap(self) -> dict[str, float]:
        """{"time/<phase>": seconds, ..., "time/step": seconds since the last lap}; starts the next
        lap."""
        self._bill()
        row = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        row["time/step"] = self._mark - self._lap_start
        self._seconds = {}
        self._lap_start = self._mark
        return row


# -- health ----------------------------------------------------------------------------------------


def health_warnings(row: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences about what looks wrong at this step, each "<rule>: <what, with the numbers>".

    ``history`` is the earlier rows, oldest first, without ``row``, or a ``History``. The rule
    name before the colon is stable: displays use it to show a lasting condition once."""
    past = list(history)
    found: list[str] = []
    for rule in (
        _nonfinite,
        _truncation,
        _collapse,
        _reward_errors,
        _dead_groups,
        _kl,
        _entropy,
        _gap,
        _mismatch,
    ):
        found.extend(rule(row, past))
    return found


def _series(rows: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    return [value for row in rows if (value := finite_number(row, key)) is not None]


def _nonfinite(row: Mapping[str, Any], past: list) -> Iterator[str]:
    bad = set(row.get("nonfinite", ()))
    bad |= {k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    if bad:
        names = ", ".join(sorted(bad))
        yield f"non-finite: {names} is NaN or infinite at step {row.get('step')}"


def _truncation(row: Mapping[str, Any], past: list) -> Iterator[str]:
    cut = finite_number(row, "completions/clipped_ratio")
    if cut is None:
        return
    longest = finite_number(row, "completions/max_length")
    cap = f" (longest {longest:.0f} tokens)" if longest is not None else ""
    if cut >= TRUNCATED_HIGH:
        yield (
            f"truncation: {cut:.1%} of completions hit the length cap{cap}, above "
            f"{TRUNCATED_HIGH:.0%}; those cut before their answer was complete score as wrong, "
            "which teaches short answers: raise max_completion_length"
        )
    rows = [r for r in [*past, row] if finite_number(r, "completions/clipped_ratio") is not None]
    if len(rows) < 2 * WINDOW:
        return
    before, now = rows[-2 * WINDOW : -WINDOW], rows[-WINDOW:]
    rewards_before, rewards_now = _series(before, "reward"), _series(now, "reward")
    if not (rewards_before and rewards_now):
        return
    cut_before = fmean(_series(before, "completions/clipped_ratio"))
    cut_now = fmean(_series(now, "completions/clipped_ratio"))
    fall = fmean(rewards_before) - fmean(rewards_now)
    if cut_now - cut_before >= TRUNCATED_RISE and fall >= REWARD_FALL:
        yield (
            f"truncation-rising: truncated completions went {cut_before:.1%} -> {cut_now:.1%} over "
            f"the last {WINDOW} batches while reward fell {fmean(rewards_before):.3f} -> "
            f"{fmean(rewards_now):.3f}"
        )


def _best_window(rows: list, key: str) -> float:
    """The highest mean of WINDOW values in a row, forgotten rows included."""
    values = _series(rows, key)
    seen = [fmean(values[i : i + WINDOW]) for i in range(len(values) - WINDOW + 1)]
    return max(seen + _series(rows[:1], BEST + key))


def _collapse(row: Mapping[str, Any], past: list) -> Iterator[str]:
    """Answers got much shorter and less often right: the end state of the truncation trap."""
    rows = [*past, row]
    lengths = _series(rows, "completions/mean_length")
    if finite_number(row, "completions/mean_length") is None or len(lengths) < 2 * WINDOW:
        return
    length_now = fmean(lengths[-WINDOW:])
    length_best = _best_window(rows, "completions/mean_length")
    if length_now >= LENGTH_FALL * length_best:
        return
    for key in accuracy_keys(row):
        values = _series(rows, key)
        if len(values) < 2 * WINDOW:
            continue
        now, best = fmean(values[-WINDOW:]), _best_window(rows, key)
        if best - now >= ACCURACY_FALL:
            yield (
                f"collapse: mean length {length_now:.0f} tokens is down from {length_best:.0f} and "
                f"{key} {now:.2f} down from {best:.2f}: answers are getting shorter and wrong"
            )


def _reward_errors(row: Mapping[str, Any], past: list) -> Iterator[str]:
    for key in row:
        if key.startswith("rewards/") and key.endswith("/error_rate"):
            rate = finite_number(row, key)
            if rate is not None and rate >= REWARD_ERRORS_HIGH:
                name = key[len("rewards/") : -len("/error_rate")]
                first = row.get(f"rewards/{name}/first_error")
                cause = f" (the first: {' '.join(str(first).split())[:200]})" if first else ""
                yield (
                    f"reward-errors: reward {name!r} failed on {rate:.1%} of completions{cause}; "
                    "those are left out of the update, not scored 0"
                )


def _dead_groups(row: Mapping[str, Any], past: list) -> Iterator[str]:
    dead = finite_number(row, "frac_reward_zero_std")
    if dead is None or dead < 1.0:
        return
    if "reward" not in row:
        yield (
            "unscored: no completion of this batch could be scored, so no group has an advantage "
            "to learn from; a reward function fails or the references are unusable"
        )
        return
    reward = finite_number(row, "reward")
    shown = f" (mean reward {reward:.3f})" if reward is not None else ""
    yield (
        f"dead-groups: all answers of every group got the same reward{shown}, so no group has an "
        "advantage to learn from; the problems are all too easy or all too hard"
    )


def _kl(row: Mapping[str, Any], past: list) -> Iterator[str]:
    kl = finite_number(row, "kl")
    if kl is None:
        return
    recent = _series(past[-20:], "kl")
    typical = median(recent) if len(recent) >= WINDOW else None
    if kl >= KL_HIGH:
        yield (
            f"kl: {kl:.3g} nats per token from the reference, above {KL_HIGH:g}; the policy has "
            "left it (lower learning_rate, raise beta or refresh the reference)"
        )
    elif typical is not None and kl >= KL_JUMP_FLOOR and kl >= KL_JUMP * typical:
        times = kl / max(typical, 1e-12)
        yield f"kl: jumped to {kl:.3g} nats per token, {times:.0f} times its recent median"


def _entropy(row: Mapping[str, Any], past: list) -> Iterator[str]:
    entropy = finite_number(row, "entropy")
    start = _series(past, "entropy")[:WINDOW]
    if entropy is None or len(start) < WINDOW:
        return
    first = (_series(past[:1], START + "entropy") or [fmean(start)])[0]
    if first > 0 and entropy < ENTROPY_LOW * first:
        yield (
            f"entropy: {entropy:.3g} nats per token, down from {first:.3g}; the samples of a group "
            "are nearly equal and exploration has stopped"
        )


def _gap(row: Mapping[str, Any], past: list) -> Iterator[str]:
    gap = finite_number(row, "sampling/logp_difference_mean")
    if gap is not None and abs(gap) >= LOGPROB_GAP_HIGH:
        yield (
            f"sampler-mismatch: sampler and trainer disagree by {abs(gap):.3g} nats per token, "
            f"above {LOGPROB_GAP_HIGH:g}: check weight sync, dtype, temperature and top_p"
        )
    ratio = finite_number(row, "sampling/importance_sampling_ratio_mean")
    if ratio is not None and not IS_RATIO_LOW <= ratio <= IS_RATIO_HIGH:
        yield (
            f"sampler-mismatch: mean importance ratio trainer/sampler is {ratio:.3g}, outside "
            f"[{IS_RATIO_LOW:g}, {IS_RATIO_HIGH:g}]"
        )


def _mismatch(row: Mapping[str, Any], past: list) -> Iterator[str]:
    kl, share = finite_number(row, "sampling/kl"), finite_number(row, "sampling/ess_token")
    age = finite_number(row, "sampling/staleness")
    drawn = f" (drawn by weights {age:.0f} updates old)" if age else ""
    recent = _series(past, "sampling/kl")[-20:]
    typical = median(recent) if len(recent) >= WINDOW else math.inf
    if kl is not None and kl >= MISMATCH_KL_HIGH:
        yield (
            f"sampler-kl: {kl:.3g} nats per token from sampler to trainer{drawn}, above "
            f"{MISMATCH_KL_HIGH:g}: check weight sync, dtype and sampling options"
        )
    elif kl is not None and kl >= max(MISMATCH_KL_FLOOR, MISMATCH_KL_JUMP * typical):
        times = kl / max(typical, 1e-12)
        yield (
            f"sampler-kl: jumped to {kl:.3g} nats per token from sampler to trainer{drawn}, "
            f"{times:.0f} times its recent median: was a weight update lost?"
        )
    if share is not None and share < ESS_LOW:
        yield (
            f"sampler-ess: importance weights would leave {share:.1%} of the tokens{drawn}, below "
            f"{ESS_LOW:.0%}: what was sampled says little about the policy"
        )
