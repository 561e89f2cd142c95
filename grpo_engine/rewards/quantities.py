"""A numeral with words behind it, taken apart: number, magnitude, unit.

Whatever stands behind a number may change its value ("million", "squared", "plus seven", a
numeral base) or only say what is counted ("km", "apples"). Words of the first sort are multiplied
in where they are pure magnitudes; with any other of them there is no clean number left.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

_NUMERAL = r"(?P<rest>[-+]?(?:\d+ )?[\d.,/:]*\d(?:\.\d*)?)"
_POWER = r"(?:\^\{?(?P<power>[23])\}?)?"
_TEXT_UNIT = re.compile(rf"(?P<rest>.*[^\s\\])\\text\{{(?P<unit>[^{{}}]*)\}}{_POWER}")
_WORD_UNIT = re.compile(rf"{_NUMERAL}\s(?P<unit>[a-zA-Z]{{2,}}\.?(?:[ /][a-zA-Z]+){{0,4}}){_POWER}")
_GLUED_UNIT = re.compile(rf"{_NUMERAL}(?P<unit>[a-zA-Z]+(?:/[a-zA-Z]+)?){_POWER}")
_SIGN_UNIT = re.compile(
    r"(?P<unit>[\u20ac\u00a3\u00a5])(?P<rest>.+)|(?P<rest_>.+)(?P<unit_>[\u20ac\u00a3\u00a5])"
)
_BASE = re.compile(r"(?P<rest>\d+)_\{?(?P<base>\d+)\}?")

_UNIT_NAMES = {
    "km": "kilometer kilometre",
    "m": "meter metre",
    "cm": "centimeter centimetre",
    "mm": "millimeter millimetre",
    "mi": "mile",
    "ft": "foot feet",
    "in": "inch inches",
    "yd": "yard",
    "kg": "kilogram",
    "g": "gram",
    "mg": "milligram",
    "lb": "pound",
    "oz": "ounce",
    "s": "second sec",
    "min": "minute",
    "h": "hour hr",
    "day": "",
    "week": "",
    "month": "",
    "year": "yr",
    "l": "liter litre",
    "ml": "milliliter millilitre",
    "deg": "degree",
    "rad": "radian",
    "dollar": "",
    "cent": "",
}
_UNITS = {
    spelling: unit for unit, others in _UNIT_NAMES.items() for spelling in [unit, *others.split()]
}
_SPEEDS = {"mph": ["mi", "per", "h"], "kmh": ["km", "per", "h"], "kph": ["km", "per", "h"]}
_POWERS = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
_PERCENT = {"percent": 1, "pct": 1, "per cent": 2, "%": 1}
_MAGNITUDES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
# None of these is ever a unit: they make another number of the one before them, or take it back.
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety "
    "half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh "
    "sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths "
    "millionth millionths billionth billionths score gross lakh crore quadrillion quintillion "
    "googol mil mln mio mn bil bln bn tn trn thou grand percentage permille basis repeating "
    "recurring binary ternary octal hex hexadecimal"
)
_OPERATOR_WORDS = (
    "squared cubed factorial plus minus times multiplied divided by to power over under above "
    "below less fewer than mod modulo double doubled twice thrice triple tripled quadruple "
    "quadrupled quintuple quintupled sextuple sextupled septuple octuple root negative positive "
    "inverse reciprocal remainder log ln lg exp sqrt sin cos tan"
)
_WITHDRAWING_WORDS = (
    "is are was isn isnt not no never nor if but except at most least maybe wrong incorrect"
)
_NEVER_UNITS = frozenset(f"{_NUMBER_WORDS} {_OPERATOR_WORDS} {_WITHDRAWING_WORDS}".split(" "))
_SHORT_MAGNITUDES = frozenset(("k", "K", "M", "MM", "B", "G", "T"))  # m and g are units
_NO_WORD = re.compile(r"[\d+*/=^!<>|]")


class Quantity(NamedTuple):
    """``number`` is text, still to be multiplied by ``scale``; ``unit`` in one spelling, or ""."""

    number: str
    unit: str = ""
    scale: int = 1


@lru_cache(maxsize=8192)
def split_unit(text: str, letters: bool = False) -> Quantity:
    """``12\\text{ cm}``, ``72 clips``, ``5 million``, ``50 percent``, ``1010_2`` taken apart.

    Words are a unit behind ``\\text``, or behind a numeral and a blank; without the blank the unit
    must be one known here, and a single letter counts only with ``letters`` or in a rate: ``5m/s``
    has a unit, ``5x`` and ``5m`` are expressions. Where a word is no unit ("5 squared") nothing is
    split off, and the text is no number. The base of a numeral is its unit; base ten goes without
    saying.
    """
    if match := _BASE.fullmatch(text):
        return Quantity(match["rest"], "" if match["base"] == "10" else f"base {match['base']}")
    if match := _SIGN_UNIT.fullmatch(text):
        inner = split_unit(match["rest"] or match["rest_"])
        sign = match["unit"] or match["unit_"]
        return Quantity(text) if inner.unit else inner._replace(unit=sign)
    if match := _TEXT_UNIT.fullmatch(text) or _WORD_UNIT.fullmatch(text):
        return _quantity(match) or Quantity(text)
    match = _GLUED_UNIT.fullmatch(text)
    words = match["unit"].split("/") if match else []
    if words and all(_is_known(word, letters or len(words) > 1) for word in words):
        return _quantity(match) or Quantity(text)
    return Quantity(text)


def _is_known(word: str, letters: bool) -> bool:
    if word in _SHORT_MAGNITUDES:
        return False
    word = _singular(word)
    known = word in _UNITS or word in _MAGNITUDES or word in _SPEEDS
    return known and (letters or len(word) > 1)


def _quantity(match: re.Match[str]) -> Quantity | None:
    """The parts of a match, or None when one of its words is no part of a unit."""
    number, scale = match["rest"], 1
    if not _SHORT_MAGNITUDES.isdisjoint(re.split(r"[\s/.-]+", match["unit"])):
        return None
    unit = match["unit"].lower().replace("/", " per ")
    words = [_singular(word) for word in re.split(r"[\s-]+", unit) if word]
    while words and words[0] in _MAGNITUDES:
        scale *= _MAGNITUDES[words.pop(0)]
    taken = _PERCENT.get(" ".join(words[:2]), 0) or _PERCENT.get(" ".join(words[:1]), 0)
    if taken:
        number, words = number + "%", words[taken:]
    other = _NEVER_UNITS | _MAGNITUDES.keys() | _PERCENT.keys()
    if any(word.removesuffix("fold") in other or _NO_WORD.search(word) for word in words):
        return None
    return Quantity(number, _one_spelling(words, match["power"] or ""), scale)


def _one_spelling(words: list[str], power: str) -> str:
    if words and words[0] in _POWERS:
        power, words = _POWERS[words[0]], words[1:]
    if words in (["unit"], []):
        return ""  # a unit, whichever it is
    spelt = [part for word in words for part in _SPEEDS.get(word, [_UNITS.get(word, word)])]
    return " ".join(spelt) + (f"^{power}" if power else "")


def _singular(word: str) -> str:
    word = word.lower().strip("()[].,;:")
    if word in _UNITS or word in _NEVER_UNITS or len(word) < 3:
        return word
    if word.endswith(("xes", "ches", "shes", "sses")):
        return word[:-2]
    return word.removesuffix("s")


def units_conflict(one: str, other: str) -> bool:
    """Whether two units of ``split_unit`` may not be equated.

    A number without a unit fits any unit but a numeral base. "years" fits "years old": of two
    units one may be the other with more words, unless they make a rate of it.
    """
    if one == other:
        return False
    if "base" in (one[:4], other[:4]):
        return True
    if not one or not other:
        return False
    mine, theirs = set(one.split()), set(other.split())
    return not (mine <= theirs or theirs <= mine) or "per" in mine ^ theirs
