"""Symbolic equality by Math-Verify (optional extra ``rewards``). Runs inside reward workers only.

Sympy can loop in C for ever and no signal stops it, so nothing here has a time limit of its own:
the worker that runs it is killed from outside. Two guards narrow what Math-Verify accepts:
constants must agree to 40 digits (it rounds to 6), and both sides must parse to more than a bare
string.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache
from typing import Any

from grpo_engine.rewards.clock import loading, verdict_if_killed
from grpo_engine.types import UserError

_CONSTANT_DIGITS = 40


class MathVerify:
    """The symbolic comparison the accuracy reward falls back on when exact reading fails."""

    def parses(self, gold: str) -> bool:
        """Whether ``gold`` is an expression that equals itself."""
        return _gold_is_valid(gold)

    def equal(self, gold: str, answer: str) -> bool:
        """Whether ``answer`` is mathematically equal to ``gold`` (LaTeX, without the box), which
        parses: an answer that takes longer than the deadline (``(10^7)!``) is wrong."""
        require_math_verify()
        verdict_if_killed(0.0, "time_limit")
        return _equal(gold, answer)


def math_verify_installed() -> bool:
    """Whether the optional package is there, without importing it."""
    return importlib.util.find_spec("math_verify") is not None


def require_math_verify() -> None:
    """UserError naming the extra when Math-Verify is missing."""
    if not math_verify_installed():
        raise UserError(
            "accuracy reward: this solution needs symbolic comparison and math-verify is not "
            "installed: pip install 'grpo-engine[rewards]'"
        )


@lru_cache(maxsize=1)
def _math_verify() -> Any:
    require_math_verify()
    with loading():
        import math_verify
    # It warns on every call without its own timeout; ours is outside the process.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify


@lru_cache(maxsize=4096)
def _parse(text: str) -> tuple[Any, ...]:
    package = _math_verify()
    config = package.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    parsed = package.parse(
        r"\boxed{" + text + "}",
        extraction_config=[config],
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    # Without an expression only the raw string is left, and that would be compared as text.
    return tuple(parsed) if any(not isinstance(part, str) for part in parsed) else ()


def _verify(gold: tuple[Any, ...], answer: tuple[Any, ...]) -> bool:
    if not gold or not answer:
        return False
    # Whichever of the two is the interval: (-oo, 3) is x < 3, and x < 3 is (-oo, 3).
    options = {"timeout_seconds": None, "allow_set_relation_comp": True}
    return bool(_math_verify().verify(list(gold), list(answer), **options))


@lru_cache(maxsize=4096)
def _gold_is_valid(gold: str) -> bool:
    parsed = _parse(gold)
    return _verify(parsed, parsed)


@lru_cache(maxsize=4096)
def _equal(gold: str, answer: str) -> bool:
    parsed_gold, parsed_answer = _parse(gold), _parse(answer)
    return _verify(parsed_gold, parsed_answer) and not _constants_differ(
        parsed_gold[0], parsed_answer[0]
    )


def _constants_differ(one: Any, other: Any) -> bool:
    """Whether both are constants whose difference is real at 40 digits (12 if one is a decimal).

    The difference of equal constants may come back as noise of relative size 1e-40 instead of 0.
    """
    if not all(getattr(side, "is_number", False) for side in (one, other)):
        return False
    import sympy  # already loaded by math_verify

    decimal = any(side.has(sympy.Float) for side in (one, other))
    size = max(abs(one.evalf(_CONSTANT_DIGITS)), abs(other.evalf(_CONSTANT_DIGITS)))
    gap = abs((one - other).evalf(_CONSTANT_DIGITS))
    if not (gap.is_finite and size.is_finite):  # 5/0 on one side, or on both
        return True
    return bool(gap > size * sympy.Rational(1, 10) ** (12 if decimal else 20))
