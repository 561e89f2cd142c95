"""How the code reward reads completions and plain data, and when two values are the same."""

import json
import time

import pytest

from grpo_engine.rewards import code as module
from grpo_engine.rewards.code import extract_code, judge_code, matches, prelude_for
from grpo_engine.rewards.sandbox_boot import NotPlainError, decode, encode


def answer(code):
    return f"<think>so ```python\nx\n```</think>\n```python\n{code}\n```\nThat is it."


def judge(code, tests, **options):
    return judge_code(answer(code), tests, **{"timeout_s": 20.0, **options})


ADD = {
    "type": "stdio",
    "cases": [{"input": "1 2\n", "output": "3\n"}, {"input": "20 22\n", "output": "42\n"}],
}


@pytest.mark.parametrize(
    "text, code",
    [
        ("```python\nx\n```", "x\n"),
        ("```py\nx\n```\n```python3\ny\n```", "y\n"),
        ("```python\nx\n```\n```\noutput\n```", "x\n"),
        ("```\nx\n```", "x\n"),
        ("```Python\nx\n```", "x\n"),
        ("~~~python\nx\n~~~", "x\n"),
        ("````python\n'```'\n```\nx\n````", "'```'\n```\nx\n"),
        ("1. Item\n   ```python\n   def f():\n       pass\n   ```", "def f():\n    pass\n"),
        ("<think>```python\nx\n```</think>\n```python\ny\n```", "y\n"),
        ("<think>a</think><answer>\nprint(1)\n</answer>", "print(1)"),
        ("<answer>```python\nx\n```</answer>", None),  # a fence stands on a line of its own
        ("<answer>\n```python\nx\n```\n</answer>", "x\n"),
        ("<think>```python\nx\n```</think> so", None),
        ("<think>```python\nx\n```", None),
        ("```python\nx", None),
        ("```python\nx\n```\n```python\ny", None),  # cut off: the first was not meant
        ("```bash\nls\n```", None),
        ("x", None),
        ("", None),
    ],
)
def test_the_program_is_the_last_python_block(text, code):
    assert extract_code(text) == code


def test_prefilled_thinking():
    assert extract_code("```python\nx\n```", thinking_prefilled=True) is None
    assert extract_code("a</think>\n```python\nx\n```", thinking_prefilled=True) == "x\n"


def test_no_code_and_too_much_code_are_wrong_answers():
    assert judge_code("no code", ADD) == (0.0, "no_answer")
    assert judge("#" * 200_000, ADD) == (0.0, "too_long")


def test_hostile_completions_are_read_in_linear_time():
    start = time.perf_counter()
    for piece in ("```\n", "`" * 10, "```python\n", "~~~", "<answer>", "\t", "```a "):
        extract_code(piece * 50_000)
    assert time.perf_counter() - start < 4


# Plain data


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, -1, 2**63, -(2**300), 0.5, -0.0, float("inf"), "", "a\ud800\n", b"",
        b"\xff", 1 + 2j, [], [1, [2]], (), (1,), {}, {1: (2,), "1": {3}}, {(1, 2): [None]}, set(),
        {1, "a"}, frozenset({(1,)}), {"tuple": [1]}, {"int": "x"},
    ],
)  # fmt: skip
def test_plain_data_survives_the_journey(value):
    arrived = decode(json.loads(json.dumps(encode(value))))
    assert arrived == value
    assert type(arrived) is type(value)
    assert repr(arrived) == repr(value) or isinstance(value, (set, frozenset))


@pytest.mark.parametrize(
    "plain",
    [
        {}, {"a": 1}, {"tuple": 1}, {"tuple": [], "set": []}, {"int": 5}, {"int": "zz"},
        {"float": "1e5"}, {"float": []}, {"set": [[]]}, {"dict": [[1]]}, {"dict": [[[], 1]]},
        {"complex": [1]}, {"complex": [[], 1]}, {"bytes": "x"}, {"bytes": 3}, {"eval": "1"},
    ],
)  # fmt: skip
def test_what_encode_cannot_have_written_is_refused(plain):
    with pytest.raises(NotPlainError):
        decode(plain)


def test_values_without_a_plain_form_are_refused():
    deep = []
    for _ in range(200):
        deep = [deep]
    for value in (object(), lambda: 0, int, iter([]), deep, 1 << (1 << 20)):
        with pytest.raises(NotPlainError):
            encode(value)


@pytest.mark.parametrize(
    "value, expected, same",
    [
        (1, 1, True), (1, True, False), (True, 1, False), (1, 1.0, False), (1.0, 1, False),
        (0.1 + 0.2, 0.3, True), (0.3001, 0.3, False), (float("nan"), float("nan"), False),
        (1e-13, 0.0, True), (2**100, 2**100, True), (None, None, True), (None, 0, False),
        (0, None, False), ("1", 1, False), ((1, 2), [1, 2], True), ([(1,)], [[1]], True),
        ({1, 2}, [1, 2], False), ([1], [1, 2], False), ({"a": 1}, {"a": 1}, True),
        ({"a": 1, "b": 2}, {"a": 1}, False), ({1: 1}, {"1": 1}, False), ([], {}, False),
        ({}, [], False), (b"a", "a", False), ("tuple", "tuple", True), (1j, 1, False),
        ({"int": "5"}, 5, False), ([True], [1], False), ("", None, False), ([], None, False),
        ({}, None, False), ([], False, False),
    ],
)  # fmt: skip
def test_types_count_in_a_comparison(value, expected, same):
    assert matches(json.loads(json.dumps(encode(value))), expected) is same


def test_the_prelude_imports_what_is_named_and_nothing_else():
    assert prelude_for("def f(x): return x") == ""
    lines = prelude_for("def f(x: List[int]) -> Dict: return heapq.nsmallest(2, deque(x))")
    assert set(lines.split("\n")) == {
        "import heapq",
        "from typing import Dict",
        "from typing import List",
        "from collections import deque",
        "from heapq import nsmallest",
    }
    for name in module._HOMES:
        exec(prelude_for(name), {})
