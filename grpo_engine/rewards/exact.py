"""Exact reading of numbers: LaTeX or plain arithmetic to a ``Fraction``, or None.

Most reference answers are integers, fractions or decimals. Comparing them exactly takes
microseconds, needs no symbolic package, and never calls 1/2004! and 1/2006! equal because both
round to zero. Anything this module does not understand completely is None, never a guess.

Understood: integers, decimals (also 1e-7 and ``0.1\\overline{6}``), ``1,234``, ``\\frac{a}{b}``,
``a/b``, ``a:b``, mixed numbers (``3\\frac{1}{2}``, ``3 1/2``), + - * / ^ ! with parentheses,
``|a|``, and square roots of perfect squares.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from functools import lru_cache

_MAX_BITS = 200_000  # size of a number that is still worth computing exactly
_MAX_FACTORIAL = 5_000
_MAX_DEPTH = 40

_THOUSANDS = re.compile(r"-?\d{1,3}(?:([, ])\d{3})(?:\1\d{3})*(?:\.\d+)?")
_MIXED_PLAIN = re.compile(r"(-?)(\d+) (\d+)/(\d+)")
_MIXED_LATEX = re.compile(r"(-?)(\d+) ?\\frac\{(\d+)\}\{(\d+)\}")
_REPEATING = re.compile(r"(-?)(\d*)\.(\d*)\\(?:overline|bar)\{(\d{1,200})\}")
_RATIO = re.compile(r"\d+(?:\.\d+)?:\d+(?:\.\d+)?")
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4})?)"
    r"|(?P<command>\\(?:frac|sqrt|cdot|times|div))|(?P<symbol>\*\*|[-+*/^!(){}|]))"
)
_CLOSING = {"(": ")", "{": "}", "|": "|"}


class _NotExactError(Exception):
    """The text is not an exact rational expression that this module reads."""


@lru_cache(maxsize=8192)
def exact_value(text: str) -> Fraction | None:
    """The rational number that normalised ``text`` denotes, or None if it is anything else."""
    text = text.strip()
    if _THOUSANDS.fullmatch(text):
        return Fraction(text.replace(",", "").replace(" ", ""))
    if repeating := _REPEATING.fullmatch(text):
        return _repeating(*repeating.groups())
    if _RATIO.fullmatch(text):
        text = text.replace(":", "/")
    if mixed := _MIXED_PLAIN.fullmatch(text) or _MIXED_LATEX.fullmatch(text):
        sign, whole, numerator, denominator = mixed.groups()
        if int(denominator) == 0 or int(numerator) >= int(denominator):
            return None
        value = int(whole) + Fraction(int(numerator), int(denominator))
        return -value if sign else value
    try:
        return _Reader(text).read()
    except _NotExactError:
        return None


def _repeating(sign: str, whole: str, fixed: str, again: str) -> Fraction:
    """``0.1\\overline{6}``: what repeats is divided by nines."""
    head = Fraction(int(whole + fixed or "0"), 10 ** len(fixed))
    tail = Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(fixed))
    return -(head + tail) if sign else head + tail


class _Reader:
    """Recursive descent over sum > product > sign > power > factorial > atom."""

    def __init__(self, text: str) -> None:
        self.tokens = _tokens(text)
        self.position = 0
        self.depth = 0

    def read(self) -> Fraction:
        value = self.sum()
        if self.position != len(self.tokens):
            raise _NotExactError
        return value

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        """The next token if it is one of ``wanted``, consumed; else the empty string."""
        token = self.peek()
        if token not in wanted:
            return ""
        self.position += 1
        return token

    def sum(self) -> Fraction:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _NotExactError
        value = self.product()
        while operator := self.take("+", "-"):
            term = self.product()
            value = _sized(value + term if operator == "+" else value - term)
        self.depth -= 1
        return value

    def product(self) -> Fraction:
        value = self.signed()
        while operator := self.take("*", "/", r"\cdot", r"\times", r"\div"):
            factor = self.signed()
            divides = operator in ("/", r"\div")
            value = _divide(value, factor) if divides else _sized(value * factor)
        return value

    def signed(self) -> Fraction:
        sign = 1
        while operator := self.take("-", "+"):
            sign = -sign if operator == "-" else sign
        return sign * self.power()

    def power(self) -> Fraction:
        base = self.factorial()
        if not self.take("^", "**"):
            return base
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _NotExactError
        sign = -1 if self.take("-") else 1
        value = _power(base, sign * self.power())  # a^b^c is a^(b^c)
        self.depth -= 1
        return value

    def factorial(self) -> Fraction:
        value = self.atom()
        if self.take("!"):
            if self.peek() == "!" or value.denominator != 1 or not 0 <= value <= _MAX_FACTORIAL:
                raise _NotExactError
            return Fraction(math.factorial(int(value)))
        return value

    def atom(self) -> Fraction:
        token = self.peek()
        self.position += 1
        if token in _CLOSING:
            value = self.sum()
            if not self.take(_CLOSING[token]):
                raise _NotExactError
            return abs(value) if token == "|" else value
        if token == r"\frac":
            return _divide(self.group(), self.group())
        if token == r"\sqrt":
            return _square_root(self.group())
        if token[:1].isdigit() or token[:1] == ".":
            return Fraction(token)
        raise _NotExactError

    def group(self) -> Fraction:
        if self.peek() != "{":
            raise _NotExactError
        return self.atom()


def _tokens(text: str) -> list[str]:
    tokens = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or not text.isascii():
            raise _NotExactError
        tokens.append(match.group(match.lastgroup))
        position = match.end()
    return tokens


def _sized(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > _MAX_BITS:
        raise _NotExactError
    return value


def _divide(value: Fraction, divisor: Fraction) -> Fraction:
    if divisor == 0:
        raise _NotExactError
    return _sized(value / divisor)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if base == 0 and exponent <= 0:
        raise _NotExactError
    if exponent.denominator == 2:
        base, exponent = _square_root(base), 2 * exponent
    if exponent.denominator != 1:
        raise _NotExactError
    bits = base.numerator.bit_length() + base.denominator.bit_length()
    if abs(exponent) * bits > _MAX_BITS:
        raise _NotExactError
    return base ** int(exponent)


def _square_root(value: Fraction) -> Fraction:
    if value < 0:
        raise _NotExactError
    numerator, denominator = math.isqrt(value.numerator), math.isqrt(value.denominator)
    if numerator**2 != value.numerator or denominator**2 != value.denominator:
        raise _NotExactError
    return Fraction(numerator, denominator)
