"""The code reward: 1 when the program in a completion passes all of its tests, else 0.

The program is the last Python block of the completion (``extract_code``). It runs in a sandbox
(``sandbox.py``) that gets code and inputs only; every comparison happens here, outside, on plain
data, so there is nothing inside to be forged. ``tests`` is one object a row (or its JSON text):

* ``{"type": "stdio", "cases": [{"input": str, "output": str}]}``: a fresh process per case. The
  exit code must be 0 and the whole output equal, after trailing blanks of lines and trailing empty
  lines are dropped.
* ``{"type": "call", "entry_point": str, "cases": [{"args": [...], "kwargs": {...}, "expected": any
  JSON}]}``: one process, one call after another. Types count: 1 is neither True nor 1.0. Floats
  agree to 1e-9. A JSON array stands for a list or a tuple, an object for a dict with string keys.
  The entry point may be a method of a class ``Solution``.
* ``{"type": "check", "entry_point": str, "code": "def check(candidate): ..."}``: the test runs in
  a sandbox of its own and reaches the candidate through plain data only: numbers, strings, bytes,
  lists, tuples, sets, dicts. Arguments changed in place are not seen, and an exception arrives as
  the built-in one of its name.

The first failure ends the trial. Names such as ``List`` or ``math`` that LeetCode-style solutions
use without importing are imported for ``call`` and ``check`` (``_PRELUDE``).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import textwrap
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import NoneType
from typing import Any

from grpo_engine.rewards.answers import completion_text, text_after_thinking
from grpo_engine.rewards.clock import loading
from grpo_engine.rewards.sandbox import Sandbox, find_sandbox
from grpo_engine.rewards.sandbox_boot import MAX_DEPTH, NotPlainError, decode, encode
from grpo_engine.rewards.sandbox_run import Limits, SandboxError, SandboxRun
from grpo_engine.types import UserError

MAX_CODE_CHARS = 100_000
FLOAT_TOLERANCE = 1e-9
_FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})[ \t]*([^\s`]*)[^\n`]*$", re.MULTILINE)
_PYTHON = {"python", "python3", "py"}
_IDENTIFIER = re.compile(r"[^\W\d]\w*")
_PRELUDE = {
    "typing": "Any Callable Deque Dict FrozenSet Generator Iterable Iterator List Mapping Optional "
    "Sequence Set Tuple Type Union",
    "collections": "ChainMap Counter OrderedDict defaultdict deque namedtuple",
    "functools": "cache cmp_to_key lru_cache partial reduce",
    "itertools": "accumulate chain combinations count cycle groupby permutations product",
    "heapq": "heapify heappop heappush heappushpop nlargest nsmallest",
    "bisect": "bisect_left bisect_right insort",
    "math": "ceil comb factorial floor gcd inf isqrt lcm sqrt",
    "string": "ascii_lowercase ascii_uppercase",
}
_MODULES = "bisect collections functools heapq itertools json math operator random re string sys"
_HOMES = {name: module for module, names in _PRELUDE.items() for name in names.split()}
_ARGUMENTS = (("args", []), ("kwargs", {}))
_MAX_REPLY_DEPTH = 3 * MAX_DEPTH + 3  # what encode can nest, in JSON brackets
_log = logging.getLogger(__name__)


class _UnusableTestsError(Exception):
    """The tests of a row cannot be run, whatever the program."""


def extract_code(text: str, *, thinking_prefilled: bool = False) -> str | None:
    """The program in a completion: after the thinking, the last fenced block tagged as Python, else
    the last untagged block, else the content of ``<answer>``. None when there is none, or when the
    last fence is never closed."""
    tail = text_after_thinking(text, thinking_prefilled)
    if tail is None:
        return None
    blocks: list[tuple[str, str]] = []
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(tail):
        if opened is None:
            opened = fence
        elif fence[2].startswith(opened[2]) and not fence[3]:
            content = tail[opened.end() + 1 : fence.start()]
            if opened[1]:
                content = textwrap.dedent(content)
            blocks.append((opened[3].lower(), content))
            opened = None
    if opened is not None:
        return None
    for wanted in (_PYTHON, {""}):
        found = [content for language, content in blocks if language in wanted]
        if found:
            return found[-1]
    before, tag, answer = tail.rpartition("<answer>")
    answer, closed, _ = answer.partition("</answer>")
    return answer.strip("\n") or None if tag and closed and not blocks else None


@dataclasses.dataclass
class _Trial:
    """One program against the tests of its row."""

    sandbox: Sandbox
    code: str
    limits: Limits
    deadline: float  # time.monotonic() at which the whole trial is lost
    reached: str | None = None  # the limit that ended it

    def passes(self, tests: Mapping[str, Any]) -> bool:
        kind = tests["type"]
        if kind == "stdio":
            return all(self._passes_stdio(case) for case in tests["cases"])
        return self._passes_calls(tests) if kind == "call" else self._passes_check(tests)

    def _left(self) -> Limits:
        left = max(0.001, self.deadline - time.monotonic())
        return dataclasses.replace(self.limits, wall_s=min(self.limits.wall_s, left))

    def _note(self, run: SandboxRun) -> None:
        if run.end not in (None, "exited", "closed"):
            self.reached = run.end

    def _passes_stdio(self, case: Mapping[str, Any]) -> bool:
        job = {"kind": "program", "code": self.code}
        stdin = case["input"].encode("utf-8", "surrogatepass")
        with self.sandbox.start(job, stdin=stdin, limits=self._left()) as run:
            run.wait()
            self._note(run)
        if run.end != "exited" or run.exit_code != 0:
            return False
        return _lines(run.stdout.decode("utf-8", "replace")) == _lines(case["output"])

    def _candidate(self, tests: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "kind": "candidate",
            "code": self.code,
            "prelude": prelude_for(self.code),
            "entry_point": tests["entry_point"],
        }

    def _start(self, job: dict[str, Any]) -> Any:
        lifetime = max(1.0, self.deadline - time.monotonic())
        return self.sandbox.start(job, limits=self._left(), lifetime_s=lifetime)

    def _ask(self, run: SandboxRun, message: Any) -> Any:
        run.limits = self._left()
        reply = run.exchange(message)
        self._note(run)
        return reply

    def _passes_calls(self, tests: Mapping[str, Any]) -> bool:
        with self._start(self._candidate(tests)) as run:
            for case in tests["cases"]:
                try:
                    call = {name: encode(case.get(name) or empty) for name, empty in _ARGUMENTS}
                except NotPlainError as error:
                    raise _UnusableTestsError(f"an argument is {error}") from error
                reply = self._ask(run, call)
                if not _is_value(reply) or not matches(reply["value"], case["expected"]):
                    return False
        return True

    def _passes_check(self, tests: Mapping[str, Any]) -> bool:
        job = {"kind": "check", "code": tests["code"], "entry_point": tests["entry_point"]}
        with self._start(job) as test:
            test.limits = self._left()
            message = test.receive()  # before any foreign code runs: a failure is the test's own
            if message is None:
                raise _UnusableTestsError(f"the test ended by {test.end} before its first call")
            with self._start(self._candidate(tests)) as candidate:
                while isinstance(message, dict) and "args" in message:
                    reply = self._ask(candidate, message)
                    plain = _is_value(reply) and _depth(reply) <= _MAX_REPLY_DEPTH
                    if not plain and not _is_exception(reply):
                        return False
                    message = self._ask(test, reply)
        if message is None:
            return False
        if message["done"]["unusable"]:
            raise _UnusableTestsError(message["done"]["unusable"])
        return message["done"]["failure"] is None


def _is_value(reply: Any) -> bool:
    return isinstance(reply, dict) and set(reply) == {"value"}


def _is_exception(reply: Any) -> bool:
    wanted = {"raised", "message"}
    return (
        isinstance(reply, dict)
        and set(reply) == wanted
        and all(isinstance(reply[name], str) for name in wanted)
    )


def _depth(plain: Any) -> int:
    """Levels of nesting, found without recursion: the sandbox may have nested up to our limit."""
    depth, level = 0, [plain]
    while level := [item for item in level if isinstance(item, (list, dict))]:
        depth += 1
        level = [i for one in level for i in (one.values() if isinstance(one, dict) else one)]
    return depth


def _lines(output: str) -> list[str]:
    lines = [line.rstrip() for line in output.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def matches(plain: Any, expected: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether ``plain``, a value as ``sandbox_boot.encode`` writes it, is the JSON value
    ``expected``, types included. ``plain`` comes from the sandbox and may be anything."""
    if depth == 0:
        return False
    if isinstance(expected, list):
        if isinstance(plain, dict) and set(plain) == {"tuple"}:
            plain = plain["tuple"]
        return (
            isinstance(plain, list)
            and len(plain) == len(expected)
            and all(map(lambda one, two: matches(one, two, depth - 1), plain, expected))
        )
    if isinstance(expected, dict):
        pairs = plain.get("dict") if isinstance(plain, dict) and len(plain) == 1 else None
        if not isinstance(pairs, list) or not all(_is_named(pair) for pair in pairs):
            return False
        found = dict(pairs)
        return set(found) == set(expected) and all(
            matches(found[name], value, depth - 1) for name, value in expected.items()
        )
    if isinstance(plain, list) or (isinstance(plain, dict) and not {"int", "float"} & set(plain)):
        return False
    try:
        value = decode(plain)
    except NotPlainError:
        return False
    if type(value) is not type(expected):
        return False
    if isinstance(expected, float):
        return math.isclose(value, expected, rel_tol=FLOAT_TOLERANCE, abs_tol=1e-12)
    return value == expected


def _is_named(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)


def prelude_for(code: str) -> str:
    """Imports of the common names in ``code``; its own definitions come later and win."""
    names = set(_IDENTIFIER.findall(code))
    lines = [f"import {module}" for module in _MODULES.split() if module in names]
    lines += [f"from {home} import {name}" for name, home in _HOMES.items() if name in names]
    return "\n".join(lines)


def checked_tests(tests: Any) -> dict[str, Any]:
    """``tests`` of a row, decoded if it is JSON text. Raises ValueError saying what is wrong."""
    if isinstance(tests, str):
        tests = json.loads(tests)
    if not isinstance(tests, Mapping) or tests.get("type") not in ("stdio", "call", "check"):
        raise ValueError("tests must be an object with the type stdio, call or check")
    kind, cases = tests["type"], tests.get("cases")
    if kind != "stdio" and not isinstance(tests.get("entry_point"), str):
        raise ValueError("tests: entry_point is missing")
    if kind == "check":
        if not isinstance(tests.get("code"), str):
            raise ValueError("tests: code is missing")
        return dict(tests)
    if not isinstance(cases, Sequence) or isinstance(cases, str) or not cases:
        raise ValueError("tests: no cases")
    for index, case in enumerate(cases):
        if not isinstance(case, Mapping):
            raise ValueError(f"tests: case {index} is not an object")
        if kind == "stdio" and not all(isinstance(case.get(k), str) for k in ("input", "output")):
            raise ValueError(f"tests: case {index} needs the strings input and output")
        if kind == "call":
            _check_call(case, f"tests: case {index}")
    return dict(tests)


def _check_call(case: Mapping[str, Any], where: str) -> None:
    """ValueError for a call that no program could answer rightly."""
    if not isinstance(case.get("args"), (list, tuple, NoneType)):
        raise ValueError(f"{where}: args must be a list")
    if not isinstance(case.get("kwargs"), (Mapping, NoneType)):
        raise ValueError(f"{where}: kwargs must be an object")
    if "expected" not in case:
        raise ValueError(f"{where} has no expected value")
    try:
        passable = matches(encode(case["expected"]), case["expected"])
    except NotPlainError:
        passable = False
    if not passable:  # not a number, nested too deeply, no JSON value
        raise ValueError(f"{where}: the expected value does not equal itself")


def judge_code(
    text: str,
    tests: Any,
    *,
    timeout_s: float = 4.0,
    total_timeout_s: float = 30.0,
    memory_mb: int = 1024,
    allow_rlimits_only: bool = False,
    thinking_prefilled: bool = False,
) -> tuple[float | None, str]:
    """(score, outcome) of one completion.

    Outcomes: ``ok`` (judged, right or wrong), ``no_answer``, ``too_long``, ``time_limit`` and
    ``resource_limit`` (all 0.0), ``gold_invalid`` (None: the row's tests cannot be run).
    Raises SandboxError when there is no sandbox: that is not the program's fault.
    """
    try:
        tests = checked_tests(tests)
    except ValueError:
        return None, "gold_invalid"
    code = extract_code(text, thinking_prefilled=thinking_prefilled)
    if code is None or not code.strip():
        return 0.0, "no_answer"
    if len(code) > MAX_CODE_CHARS:
        return 0.0, "too_long"
    # The sandbox keeps its own deadlines; the pool's, made for loops in C, would turn a slow
    # program's 0 into a None.
    with loading():
        sandbox = find_sandbox(allow_rlimits_only=allow_rlimits_only)
        limits = Limits(wall_s=timeout_s, memory_mb=memory_mb)
        trial = _Trial(sandbox, code, limits, time.monotonic() + total_timeout_s)
        try:
            passed = trial.passes(tests)
        except _UnusableTestsError as error:
            _log.warning("code reward: a row's tests cannot be run: %s", error)
            return None, "gold_invalid"
    if passed or trial.reached is None:
        return float(passed), "ok"
    return 0.0, "time_limit" if trial.reached == "time" else "resource_limit"


def code_reward(
    completions: Sequence[Any],
    tests: Sequence[Any],
    *,
    timeout_s: float = 4.0,
    total_timeout_s: float = 30.0,
    memory_mb: int = 1024,
    allow_rlimits_only: bool = False,
    thinking_prefilled: bool = False,
    **_: Any,
) -> list[float | None]:
    """1.0 / 0.0 for a program that passes / fails its tests; None where it could not be judged.

    TRL signature, usable alone and from any thread. ``timeout_s`` is the wall time of one case (one
    call), ``total_timeout_s`` of all of them, ``memory_mb`` the memory of the sandbox. Without a
    sandbox, and for tests that cannot be run, the score is None and a warning says why. Raises
    UserError for unequal lengths.
    """
    if len(completions) != len(tests):
        raise UserError(f"code reward: {len(completions)} completions but {len(tests)} tests")

    def score(completion: Any, row_tests: Any) -> float | None:
        try:
            return judge_code(
                completion_text(completion),
                row_tests,
                timeout_s=timeout_s,
                total_timeout_s=total_timeout_s,
                memory_mb=memory_mb,
                allow_rlimits_only=allow_rlimits_only,
                thinking_prefilled=thinking_prefilled,
            )[0]
        except SandboxError as error:
            _log.warning("code reward: %s", error)
            return None

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(score, completions, tests))


def _judge(
    completion: Any,
    row: Mapping[str, Any],
    *,
    timeout_s: float = 4.0,
    total_timeout_s: float = 30.0,
    memory_mb: int = 1024,
    allow_rlimits_only: bool = False,
    thinking_prefilled: bool = False,
) -> tuple[float | None, str]:
    return judge_code(
        completion_text(completion),
        row["tests"],
        timeout_s=timeout_s,
        total_timeout_s=total_timeout_s,
        memory_mb=memory_mb,
        allow_rlimits_only=allow_rlimits_only,
        thinking_prefilled=thinking_prefilled,
    )


code_reward.judge = _judge
code_reward.required_columns = ("tests",)
