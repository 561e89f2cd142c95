"""Words and the script they are written in.

No word segmenter: in Chinese, Japanese and Thai, which do not put spaces between words, each
character counts as a word. A word of another script is a run of its letters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# Ranges of code points as in a regular expression's character class.
_SCRIPTS = {
    "Latin": "A-Za-zªºÀ-ÖØ-öø-ʯᴀ-ᶿḀ-ỿＡ-Ｚａ-ｚ\u0300-\u036f",
    "Greek": "Ͱ-Ͽἀ-῿",
    "Cyrillic": "Ѐ-ԯᲀ-\u1c8fⷠ-ⷿꙀ-ꚟ",
    "Armenian": "\u0531-\u058f",
    "Hebrew": "\u0590-\u05ff",
    "Arabic": "\u0600-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufefc",
    "Devanagari": "\u0900-\u097f",
    "Bengali": "\u0980-\u09ff",
    "Tamil": "\u0b80-\u0bff",
    "Telugu": "\u0c00-\u0c7f",
    "Thai": "\u0e00-\u0e7f",
    "Georgian": "\u10a0-\u10ff\u1c90-\u1cbf",
    "Hangul": "\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff",
    "Kana": "\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f",
    "Han": "\u2e80-\u2fdf\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af",
}
UNSPACED = ("Thai", "Kana", "Han")
_WORD = re.compile(
    "|".join(
        f"(?P<{name}>[{ranges}])"
        if name in UNSPACED
        else f"(?P<{name}>[{ranges}]+(?:['’][{ranges}]+)*)"
        for name, ranges in _SCRIPTS.items()
    )
    + r"|(?P<Other>[^\W\d_])"
)
_UNSPACED = "".join(_SCRIPTS[name] for name in UNSPACED)
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_LONGEST_TOKEN = 40


def words_by_script(text: str) -> Iterator[tuple[str, str, int]]:
    """(script, word, position) of each word of ``text``. Digits and punctuation are no words."""
    for found in _WORD.finditer(text):
        word = found.group()
        if any(map(str.isalpha, word)):  # the blocks hold signs and digits as well
            yield found.lastgroup, word, found.start()


def repetition_tokens(text: str) -> list[str]:
    """Lower-cased pieces between blanks, and single characters of scripts without blanks.

    A piece of more than 40 characters counts as that many characters: a loop may well forget its
    blanks.
    """
    tokens: list[str] = []
    for token in _TOKEN.findall(text.lower()):
        tokens.extend(token if len(token) > _LONGEST_TOKEN else [token])
    return tokens
