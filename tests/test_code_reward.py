"""The code reward: honest programs pass, wrong and dishonest ones do not, whatever they try.

What depends on the walls runs in both tiers that are a boundary, where they exist."""

import json
import time

import pytest

from grpo_engine.rewards import RewardPool, RewardSpec, code_reward
from grpo_engine.rewards import code as module
from grpo_engine.rewards import sandbox as sandboxes
from grpo_engine.rewards.code import checked_tests, judge_code
from grpo_engine.rewards.sandbox import BUBBLEWRAP, NAMESPACES
from grpo_engine.rewards.sandbox_run import SandboxError
from grpo_engine.types import UserError


def use(tiers, monkeypatch):
    probes = {tier: sandboxes._probe(tier) for tier in tiers}
    found = next((found for found, _ in probes.values() if found is not None), None)
    if found is None:
        pytest.skip("; ".join(f"{tier}: {reason}" for tier, (_, reason) in probes.items()))
    monkeypatch.setattr(module, "find_sandbox", lambda **_: found)
    return found


@pytest.fixture(params=[BUBBLEWRAP, NAMESPACES])
def each_sandbox(request, monkeypatch):
    return use([request.param], monkeypatch)


@pytest.fixture
def sandbox(monkeypatch):
    """The best there is, for what does not depend on the tier."""
    return use([BUBBLEWRAP, NAMESPACES], monkeypatch)


def answer(code):
    return f"<think>so ```python\nx\n```</think>\n```python\n{code}\n```\nThat is it."


def judge(code, tests, **options):
    return judge_code(answer(code), tests, **{"timeout_s": 20.0, **options})


ADD = {
    "type": "stdio",
    "cases": [{"input": "1 2\n", "output": "3\n"}, {"input": "20 22\n", "output": "42\n"}],
}
PAIR = {
    "type": "call",
    "entry_point": "f",
    "cases": [{"args": [3, 4], "expected": [7, 12]}, {"args": [1, 2], "expected": [3, 2]}],
}
CHECK = {
    "type": "check",
    "entry_point": "f",
    "code": (
        "def check(candidate):\n"
        "    assert candidate([1, 2], 3) == {3: (1, 2)}\n"
        "    assert candidate(set(), b'x') == {b'x': ()}\n"
        "    try: candidate(None, 0)\n"
        "    except ValueError: return\n"
        "    assert False\n"
    ),
}
CHECK_RIGHT = "def f(a, b):\n    if a is None: raise ValueError('no')\n    return {b: tuple(a)}"


# Honest programs


@pytest.mark.parametrize(
    "code, tests",
    [
        ("a, b = map(int, input().split())\nprint(a + b)", ADD),
        (
            "import sys\na, b = map(int, sys.stdin.read().split())\n"
            "print(a + b, '  \\n\\n')\nexit(0)",
            ADD,
        ),
        ("print(sum(map(int, open(0).read().split())), end='')", ADD),
        ("def f(a, b): return [a + b, a * b]", PAIR),
        ("def f(a, b): return a + b, a * b", PAIR),
        ("def f(a, b):\n    print('debugging')\n    return [a + b, a * b]", PAIR),
        (
            "class Solution:\n    def f(self, a: int, b: int) -> List[int]: return [a + b, a * b]",
            PAIR,
        ),
        ("f = lambda a, b: [a + b, math.prod(deque([a, b]))]", PAIR),
        (CHECK_RIGHT, CHECK),
    ],
)
def test_a_right_program_passes(each_sandbox, code, tests):
    assert judge(code, tests) == (1.0, "ok")


@pytest.mark.parametrize(
    "arguments, code, expected",
    [
        ({"args": [], "kwargs": {"b": 2}}, "def f(*, b): return {'b': b}", {"b": 2}),
        ({"args": [[1.5, None, True]]}, "def f(x): return x[::-1]", [True, None, 1.5]),
        ({}, "def f(): return 0.1 + 0.2", 0.3),
        ({}, "def f(): return 2 ** 200", 2**200),
        ({"args": [{"a": [1, {"b": ""}]}]}, "def f(x): return x", {"a": [1, {"b": ""}]}),
        ({}, "from collections import Counter\ndef f(): return Counter('aab')", {"a": 2, "b": 1}),
        ({}, "from enum import IntEnum\nclass E(IntEnum): A = 1\ndef f(): return E.A", 1),
        ({}, "def f(): return '\\ud800é'", "\ud800é"),
        ({}, "def f(): return float('inf')", float("inf")),
    ],
)
def test_plain_values_go_in_and_come_out(sandbox, arguments, code, expected):
    case = {**arguments, "expected": expected}
    assert judge(code, {"type": "call", "entry_point": "f", "cases": [case]}) == (1.0, "ok")


def test_tests_may_be_json_text(sandbox):
    assert judge("print(sum(map(int, input().split())))", json.dumps(ADD)) == (1.0, "ok")


def test_each_stdio_case_has_a_process_of_its_own(each_sandbox):
    code = (
        "import os\nprint(len(os.listdir('/work')), len(os.listdir('/tmp')))\nopen('/work/x', 'w')"
    )
    cases = [{"input": "", "output": "0 0"}] * 2
    assert judge(code, {"type": "stdio", "cases": cases}) == (1.0, "ok")


# Wrong programs


@pytest.mark.parametrize(
    "code, tests",
    [
        ("print(4)", ADD),
        ("print(3)", ADD),  # right once
        ("print('3\\n4')", {"type": "stdio", "cases": [{"input": "", "output": "3"}]}),
        ("print('3')", {"type": "stdio", "cases": [{"input": "", "output": "3\n4"}]}),  # a prefix
        ("print(' 3')", {"type": "stdio", "cases": [{"input": "", "output": "3"}]}),
        ("print('3\\n\\n4')", {"type": "stdio", "cases": [{"input": "", "output": "3\n4"}]}),
        ("print(sum(map(int, input().split())))\nexit(1)", ADD),
        ("print(sum(map(int, input().split())))\n1/0", ADD),
        ("def f(a, b: return", PAIR),
        ("def g(a, b): return [a + b, a * b]", PAIR),
        ("def f(a, b): return [a + b, a * b, 0]", PAIR),
        ("def f(a, b): return [float(a + b), a * b]", PAIR),
        ("def f(a, b): return {a + b, a * b}", PAIR),
        ("def f(a, b): return [str(a + b), str(a * b)]", PAIR),
        ("def f(a, b): raise ValueError", PAIR),
        ("def f(a, b): return object()", PAIR),
        ("def f(a, b): return (x for x in [a + b, a * b])", PAIR),
        ("def f(a, b): return {b: tuple(a)}", CHECK),
        ("def f(a, b): return {b: list(a)}", CHECK),
        ("f = 3", CHECK),
        ("", CHECK),
    ],
)
def test_a_wrong_program_fails(sandbox, code, tests):
    score, outcome = judge(code, tests)
    assert (score, outcome) == (0.0, "ok") if code else (0.0, "no_answer")


# Programs that cheat


# The descriptor of the channel is not known to the program, so it writes to all of them.
FORGE = """
import os
def forge(message):
    for fd in range(3, 100):
        rest = message
        try:
            while rest: rest = rest[os.write(fd, rest):]
        except OSError: pass
"""
LIES = """
class Lie{base}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __len__(self): return 2
    def __iter__(self): return iter([self, self])
    def __getitem__(self, i): return self
    def __bool__(self): return True
    def __instancecheck__(self, other): return True
    __class__ = {claim}
def f(*a): return {value}
"""


@pytest.mark.parametrize("tests", [PAIR, CHECK], ids=["call", "check"])
@pytest.mark.parametrize(
    "code",
    [
        LIES.format(base="", claim="list", value="Lie()"),
        LIES.format(base="(int)", claim="int", value="Lie(7)"),
        LIES.format(base="(list)", claim="list", value="Lie([0, 0])"),
        LIES.format(base="(dict)", claim="dict", value="Lie()"),
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "def f(*a):\n    import os; os._exit(0)",
        "def f(*a): raise SystemExit(0)",
        "def f(*a): raise StopIteration",
        "import atexit, os\natexit.register(os._exit, 0)\n1/0",
        "import builtins, json\njson.dumps = lambda *a, **k: '{}'\n"
        "builtins.AssertionError = type('A', (Exception,), {})\ndef f(*a): return None",
        # Forged messages of the protocol, on every descriptor there is.
        "import os\nfor fd in range(64):\n"
        '    try: os.write(fd, b\'{"done": {"failure": null, "unusable": null}}\\n\' * 9)\n'
        "    except OSError: pass\ndef f(*a): return None",
        "import os\nfor fd in range(64):\n"
        '    try: os.write(fd, b\'{"value": null}\\n{"value": [7, 12]}\\npassed\\n"ready"\\n\')\n'
        "    except OSError: pass\nos._exit(0)",
        # Looking for expected values in frames, in the garbage collector, in files.
        "import sys, gc\ndef f(a, *b):\n    frame = sys._getframe()\n    seen = []\n"
        "    while frame:\n        seen += [*frame.f_locals.values(), *frame.f_globals.values()]\n"
        "        frame = frame.f_back\n"
        "    seen += gc.get_objects()\n"
        "    for v in seen:\n"
        "        if isinstance(v, dict) and 'expected' in v: return v['expected']",
        "import pickle, os\nclass P:\n    def __reduce__(self): return os._exit, (0,)\n"
        "def f(*a): return P()",
        "def f(*a):\n    x = []\n    x.append(x)\n    return x",
        "def f(*a):\n    x = []\n    for i in range(10**5): x = [x]\n    return x",
        "def f(*a): return float('nan')",
        "def f(*a): return 1 << (1 << 26)",
        "def f(*a): return list(range(10**6))",
        "def f(*a): return {i * (2**61 - 1) for i in range(20_000)}",  # all of one hash
        FORGE + "def f(*a):\n"  # the same, built where it is read
        "    items = ', '.join('{\"int\": \"%#x\"}' % (i * (2**61 - 1)) for i in range(26_000))\n"
        "    forge(b'{\"value\": {\"set\": [' + items.encode() + b']}}\\n')",
        FORGE + "def f(*a): forge(b'[' * 900_000 + b'\\n')",
        FORGE + "def f(*a): forge(b'{\"value\": ' + b'[' * 400 + b']' * 400 + b'}\\n')",
        FORGE + 'def f(*a): forge(b\'{"value": {"set": [{"int": [1]}, {}, NaN]}}\\n\')',
        FORGE + "def f(*a): forge(b'x' * (1 << 21))",
        "import os\ndef f(*a):\n    for i in range(1, 9):\n"
        "        try: os.kill(-1 if i == 8 else i, 9)\n        except OSError: pass",
        "f = type('F', (), {'__call__': lambda *a: f, '__eq__': lambda *a: True})()",
    ],
)
def test_a_cheating_function_fails(sandbox, code, tests):
    start = time.monotonic()
    score, outcome = judge(code, tests, timeout_s=2)
    assert score == 0.0, outcome
    assert time.monotonic() - start < 6


@pytest.mark.parametrize(
    "code",
    [
        "import os\nfor p in ('.', '/', '/tmp', '/proc/self', '/proc/1'):\n"
        "    for n in os.listdir(p):\n"
        "        try: t = open(os.path.join(p, n)).read()\n"
        "        except (OSError, ValueError): continue\n"
        "        if 'output' in t and '\"42' in t: print(42)",
        "import sys; t = sys.stdin.read(); print(t[t.find('output') + 10:])",
        "print('{\"passed\": true}'); print('OK'); raise SystemExit(0)",
        "import os, sys; os.write(2, b'3'); os._exit(0)",
        "open('sitecustomize.py', 'w').write('print(3)'); open('conftest.py', 'w').write('1')",
        "import os\nos.kill(os.getppid(), 9); os.kill(1, 9); os.kill(-1, 15)",
    ],
)
def test_a_cheating_program_fails(each_sandbox, code):
    assert judge(code, ADD, timeout_s=2)[0] == 0.0


def test_a_test_that_a_lying_exception_could_end_early_is_not_fooled(sandbox):
    tests = {
        "type": "check",
        "entry_point": "f",
        "code": "def check(candidate):\n"
        "    for got, want in zip(map(candidate, [1, 2]), [1, 2]): assert got == want",
    }
    assert judge("def f(x): return x", tests) == (1.0, "ok")
    for name in ("StopIteration", "GeneratorExit", "StopAsyncIteration", "Exception"):
        assert judge(f"def f(x): raise {name}", tests)[0] == 0.0
    # The exception's name comes from the sandbox: only those of Python's own exceptions count.
    forged = "class StopIteration(Exception): pass\ndef f(x): raise StopIteration"
    assert judge(forged, tests)[0] == 0.0


@pytest.mark.parametrize(
    "reply",
    [
        '{"value": ' + "[" * 400 + "]" * 400 + "}",
        '{"value": 1, "raised": "ValueError"}',
        '{"raised": "ValueError"}',
        '{"raised": 1, "message": ""}',
        '{"value": 1',
        "[1]",
        "null",
        "9" * 5000,
    ],
)
def test_a_reply_that_our_driver_cannot_have_written_fails_even_a_forgiving_test(sandbox, reply):
    tests = {
        "type": "check",
        "entry_point": "f",
        "code": "def check(candidate):\n    try: candidate()\n    except Exception: pass",
    }
    forger = FORGE + f"def f(): forge({reply.encode() + bytes([10])!r})"
    assert judge("def f(): raise ValueError", tests) == (1.0, "ok")
    assert judge(forger, tests)[0] == 0.0


# Limits


@pytest.mark.parametrize("tests", [ADD, PAIR, CHECK], ids=["stdio", "call", "check"])
def test_a_slow_program_fails_in_time(each_sandbox, tests):
    start = time.monotonic()
    slow = "import itertools\nall(itertools.repeat(1))"
    assert judge(slow, tests, timeout_s=0.3) == (0.0, "time_limit")
    assert judge(f"def f(*a):\n    {slow.split()[-1]}", tests, timeout_s=0.3)[0] == 0.0
    assert time.monotonic() - start < 5


def test_all_cases_together_have_a_limit_too(sandbox):
    code = "import time\ntime.sleep(0.2)\nprint(sum(map(int, input().split())))"
    assert judge(code, {"type": "stdio", "cases": ADD["cases"] * 20}, total_timeout_s=1) == (
        0.0,
        "time_limit",
    )


def test_other_limits_have_a_name(each_sandbox):
    assert judge("while True: print('x' * 9999)", ADD) == (0.0, "resource_limit")
    bomb = (
        "import os, time\n"
        "for i in range(9): os.fork() or (bytearray(b'x') * (90 << 20), time.sleep(9))\n"
        "time.sleep(9)"
    )
    assert judge(bomb, ADD, memory_mb=300, timeout_s=10) == (0.0, "resource_limit")


def test_the_first_failure_ends_the_trial(sandbox):
    cases = [{"input": "", "output": "no"}] + [{"input": "", "output": "x"}] * 500
    start = time.monotonic()
    assert judge("print('yes')", {"type": "stdio", "cases": cases}) == (0.0, "ok")
    assert time.monotonic() - start < 5


# Tests that cannot be run


def nested(depth):
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize(
    "tests",
    [
        None,
        3,
        "not json",
        {},
        {"type": "pytest"},
        {"type": "stdio", "cases": []},
        {"type": "stdio"},
        {"type": "stdio", "cases": [{"input": "1"}]},
        {"type": "stdio", "cases": [{"input": 1, "output": "1"}]},
        {"type": "call", "cases": [{"args": [], "expected": 1}]},
        {"type": "call", "entry_point": "f", "cases": [{"args": []}]},
        {"type": "call", "entry_point": "f", "cases": ["x"]},
        {"type": "call", "entry_point": "f", "cases": [{"args": 3, "expected": 1}]},
        {"type": "call", "entry_point": "f", "cases": [{"args": "[3]", "expected": 1}]},
        {"type": "call", "entry_point": "f", "cases": [{"args": {"a": 3}, "expected": 1}]},
        {"type": "call", "entry_point": "f", "cases": [{"kwargs": [3], "expected": 1}]},
        # No program's answer equals these.
        {"type": "call", "entry_point": "f", "cases": [{"expected": [float("nan")]}]},
        {"type": "call", "entry_point": "f", "cases": [{"expected": nested(200)}]},
        {"type": "call", "entry_point": "f", "cases": [{"expected": {1: 2}}]},
        {"type": "call", "entry_point": "f", "cases": [{"expected": object()}]},
        {"type": "check", "entry_point": "f"},
    ],
)
def test_malformed_tests_score_none_and_never_1(tests):
    assert judge("print(1)", tests) == (None, "gold_invalid")
    assert code_reward([answer("print(1)")], [tests]) == [None]


@pytest.mark.parametrize(
    "code",
    [
        "def check(candidate: return",
        "import no_such_module\ndef check(candidate): pass",
        "def test(candidate): pass",
        "def check(candidate): assert candidate(lambda x: x) == 1",
        "def check(candidate):\n    try: candidate(object())\n    except Exception: pass",
        "while True: pass",
    ],
)
def test_a_broken_check_is_not_the_program_s_fault(sandbox, code):
    tests = {"type": "check", "entry_point": "f", "code": code}
    assert judge("def f(x): return 1", tests, timeout_s=0.5) == (None, "gold_invalid")


def test_a_broken_check_is_found_before_the_program_runs(sandbox, monkeypatch):
    """A program that takes the whole machine must not make the test look broken."""
    kinds = []
    start = sandboxes.Sandbox.start

    def noted(self, job, **options):
        kinds.append(job["kind"])
        return start(self, job, **options)

    monkeypatch.setattr(sandboxes.Sandbox, "start", noted)
    tests = {"type": "check", "entry_point": "f", "code": "while True: pass"}
    assert judge("def f(x): return 1", tests, timeout_s=0.5) == (None, "gold_invalid")
    assert kinds == ["check"]


def test_checked_tests_says_what_is_wrong():
    with pytest.raises(ValueError, match="case 1 needs the strings"):
        checked_tests({"type": "stdio", "cases": [{"input": "", "output": ""}, {}]})
    assert checked_tests(ADD) == ADD


# Infrastructure


def test_without_a_sandbox_the_score_is_none(monkeypatch, caplog):
    def refuse(**_):
        raise SandboxError("no sandbox for foreign code: bwrap is not installed")

    monkeypatch.setattr(module, "find_sandbox", refuse)
    assert code_reward([answer("print(3)")], [ADD]) == [None]
    assert "bwrap is not installed" in caplog.text
    with pytest.raises(SandboxError):
        judge("print(3)", ADD)


def test_one_score_per_completion_in_order(each_sandbox):
    codes = [
        "print(sum(map(int, input().split())))",
        "print(3)",
        "def",
        "import os; os._exit(0)",
    ] * 2
    completions = [*map(answer, codes), "no code"]
    expected = [1.0, 0.0, 0.0, 0.0] * 2 + [0.0]
    assert code_reward(completions, [ADD] * 9, prompts=["q"] * 9) == expected
    with pytest.raises(UserError, match="1 completions but 2 tests"):
        code_reward(["x"], [ADD, ADD])


def test_in_a_pool_a_slow_program_is_wrong_and_not_a_failure():
    best = next((t for t in (BUBBLEWRAP, NAMESPACES) if sandboxes._probe(t)[0]), None)
    if best is None:
        pytest.skip("no sandbox on this machine")
    spec = RewardSpec("code", "code", args={"timeout_s": 1.5})
    with RewardPool([spec], num_workers=1, timeout_s=0.5, max_error_rate=1.0) as pool:
        codes = ["while True: pass", "print(sum(map(int, input().split())))"]
        report = pool.score(["q"] * 2, [answer(c) for c in codes], {"tests": [ADD] * 2})
    assert report.scores["code"] == [0.0, 1.0]
    assert report.outcomes["code"] == {"time_limit": 1, "ok": 1}
