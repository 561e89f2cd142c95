"""The language consistency reward of R1: the share of target-language words in the reasoning.

    Reward_language = Num(words of the target language) / Num(words)          (v2 eq. 7)

The paper does not say how words are found nor what tells their language. Here:

* Between scripts (English and Chinese, say) the script decides: exact, fast, and it sees single
  stray characters, which whole-text detectors do not. Words: see ``words.py``; Chinese, Japanese
  and Thai count by character.
* Between languages of one script (English and French) a detector decides, sentence by sentence:
  the optional package lingua. It is asked only where it must be: when one of ``alternatives``, the
  languages a model may slip into, is written like the target. English is the default alternative,
  so French needs it, and Chinese or English do not.

Not counted: the Latin letters of mathematics and code (other letters in them do count, or ``$``
would be a place to hide), LaTeX commands, bare tags, addresses, names like ``x_1``, single Latin
and Greek letters, labels of two to four capitals that stand alone (``AB = 5``), units of measure
(``cm``), and text quoted from the prompt. Where the prompt is written in the target's script, its
foreign words (names, terms) are not counted either.

A share near 1 hides a leak of a few characters, so ``off_script_characters`` counts those; training
logs its mean, of the reasoning and of the answer apart.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_engine.rewards.answers import completion_text
from grpo_engine.rewards.clock import loading, measured
from grpo_engine.rewards.words import words_by_script
from grpo_engine.types import UserError

_LANGUAGES = {
    ("Latin",): "af az bs ca cs cy da de en eo es et eu fi fr ga gl hr hu id is it la lt lv mi ms "
    "nb nl nn no pl pt ro sk sl sn so sq st sv sw tl tn tr ts vi xh yo zu",
    ("Cyrillic",): "be bg kk mk mn ru sr uk",
    ("Han",): "zh",
    ("Han", "Kana"): "ja",
    ("Hangul",): "ko",
    ("Arabic",): "ar fa ur",
    ("Greek",): "el",
    ("Hebrew",): "he",
    ("Devanagari",): "hi mr",
    ("Bengali",): "bn",
    ("Tamil",): "ta",
    ("Telugu",): "te",
    ("Thai",): "th",
    ("Armenian",): "hy",
    ("Georgian",): "ka",
}
_SCRIPTS_OF = {code: scripts for scripts, codes in _LANGUAGES.items() for code in codes.split()}
# The language taken for a prompt in this script when the row does not say.
_USUAL = {"Latin": "en", "Cyrillic": "ru", "Arabic": "ar", "Devanagari": "hi"} | {
    scripts[-1]: codes for scripts, codes in _LANGUAGES.items() if " " not in codes
}
_SPANS = [("```", "```"), ("`", "`"), (r"\[", r"\]"), (r"\(", r"\)"), ("$$", "$$"), ("$", "$")]
_QUOTES = [("“", "”"), ("«", "»"), ("「", "」"), ("『", "』"), ("„", "“"), ('"', '"')]
_MAX_INLINE_MATHS = 300  # "$5 ... $6" of two prices is not mathematics
_ASCII_LETTERS = re.compile("[A-Za-z]+")
# Bare tags that are in use: any others, and attributes, would be a place to write in.
_TAGS = (
    "think|answer|summary|step|solution|reasoning|code|pre|math|table|thead|tbody|tr|td|th|ul|ol|li"
    "|p|br|hr|b|i|u|em|strong|sub|sup|span|div|h[1-6]"
)
_MARKUP = re.compile(rf"\\[A-Za-z]{{1,20}}|</?(?:{_TAGS}) ?/?>|https?://[!-~]+")
# x1, f_n, 3x are no words; their longer parts (total_cost) are. The look-behind keeps a long one
# from being scanned once a letter.
_IDENTIFIER = re.compile(
    r"(?<![A-Za-z0-9_])(?=[A-Za-z]*[0-9_])(?:[A-Za-z]{0,2}[0-9_])+[A-Za-z]{0,2}(?![A-Za-z0-9_])"
)
# ABCD, but not where words stand beside it: text in capitals is text.
_LABEL = re.compile(r"(?<![A-Za-z])(?<![A-Za-z] )[A-Z]{2,4}(?![A-Za-z]| [A-Za-z])")
_MATHS_WORDS = set(
    re.findall(
        "[a-z]+",
        "sin cos tan log ln exp lim max min mod gcd lcm det arg km cm mm kg mg ml hz rad deg",
    )
)
_SENTENCE = re.compile(r"[^.!?\n。！？]+")
_SHORTEST_SENTENCE = 5  # words; the detector guesses below that


@dataclass(frozen=True)
class LanguageUse:
    """Words of one text: how many, how many in the target language, and letters of no script of
    the target."""

    words: int
    target_words: int
    off_script_characters: int

    @property
    def share(self) -> float | None:
        """Target words / words; None when there are no words."""
        return self.target_words / self.words if self.words else None


def scripts_of(language: str) -> tuple[str, ...]:
    """Scripts of a language code such as ``en`` or ``zh-CN``. Raises UserError if unknown."""
    code = re.split("[-_]", language.lower())[0] if isinstance(language, str) else language
    if code not in _SCRIPTS_OF:
        raise UserError(
            f"language reward: unknown language {language!r}; wanted an ISO 639-1 code, one of "
            f"{' '.join(sorted(_SCRIPTS_OF))}"
        )
    return _SCRIPTS_OF[code]


def prompt_language(prompt: str) -> str | None:
    """The language of a prompt by its most used script; None without words.

    Latin letters mean English here, and kana Japanese: name the language in the rows otherwise.
    """
    counts = Counter(script for script, _, _ in _counted_words(_cleaned(prompt)))
    counts.pop("Other", None)
    if not counts:
        return None
    if counts["Kana"]:
        counts["Kana"] += counts.pop("Han", 0)
    return _USUAL[max(counts, key=counts.__getitem__)]


def measure_language(
    text: str, language: str, *, prompt: str = "", alternatives: Sequence[str] = ("en",)
) -> LanguageUse:
    """Count the words of ``text`` that are, and are not, of ``language``.

    Raises UserError for an unknown language, or when telling ``language`` from one of
    ``alternatives`` needs lingua and it is not installed.
    """
    scripts = scripts_of(language)
    excused: set[str] = set()
    if prompt:
        text = _without_quotes(text, prompt)
        prompt_words = list(words_by_script(prompt))
        own = sum(script in scripts for script, _, _ in prompt_words)
        if 2 * own >= len(prompt_words):
            excused = {word.lower() for script, word, _ in prompt_words if script not in scripts}
    text = _cleaned(text)
    words = [
        (script in scripts, word, position)
        for script, word, position in _counted_words(text)
        if word.lower() not in excused
    ]
    on_script = [position for right, _, position in words if right]
    off = sum(map(str.isalpha, "".join(word for right, word, _ in words if not right)))
    foreign = _words_of_other_languages(text, on_script, language, alternatives)
    return LanguageUse(len(words), len(on_script) - foreign, off)


def off_script_characters(text: str, language: str, *, prompt: str = "") -> int:
    """Letters of ``text`` that no word of ``language`` is written with, mathematics and so on
    apart. Sees the leak of three characters in a long text that leaves the share near 1."""
    return measure_language(text, language, prompt=prompt, alternatives=()).off_script_characters


def split_thinking(text: str) -> tuple[str, str]:
    """(reasoning, answer). What stands before ``<think>`` is reasoning as well, or it would be a
    place to write unseen. Without any think tag all is reasoning; an open block never ends."""
    head, closed, tail = text.rpartition("</think>")
    before, opened, inside = (head if closed else text).partition("<think>")
    reasoning = before + inside if before.strip() else inside
    return (reasoning if opened else before), tail if closed else ""


def _text_between(text: str, opening: str, closing: str) -> list[tuple[str, bool]]:
    """Pieces of ``text``, and whether each stood between the marks. Linear: the search for a
    closing mark that fails once is not repeated."""
    pieces, position = [], 0
    while (start := text.find(opening, position)) >= 0:
        inside = start + len(opening)
        end = text.find(closing, inside)
        if end < 0:
            break
        content = text[inside:end]
        if opening == "$" and ("\n" in content or len(content) > _MAX_INLINE_MATHS):
            pieces.append((text[position:inside], False))
            position = inside
            continue
        pieces += [(text[position:start], False), (content, True)]
        position = end + len(closing)
    return [*pieces, (text[position:], False)]


def _cleaned(text: str) -> str:
    """``text`` without what is written alike in every language."""
    for opening, closing in _SPANS:
        pieces = _text_between(text, opening, closing)
        text = " ".join(
            _ASCII_LETTERS.sub(" ", part) if inside else part for part, inside in pieces
        )
    return _LABEL.sub(" ", _IDENTIFIER.sub(" ", _MARKUP.sub(" ", text)))


def _without_quotes(text: str, prompt: str) -> str:
    for opening, closing in _QUOTES:
        pieces = _text_between(text, opening, closing)
        text = " ".join(
            part if not inside or part.strip() not in prompt else " " for part, inside in pieces
        )
    return text


def _counted_words(text: str) -> list[tuple[str, str, int]]:
    return [
        (script, word, position)
        for script, word, position in words_by_script(text)
        if script not in ("Latin", "Greek") or (len(word) > 1 and word.lower() not in _MATHS_WORDS)
    ]


def _words_of_other_languages(
    text: str, positions: list[int], language: str, alternatives: Sequence[str]
) -> int:
    """How many of the words at ``positions`` stand in sentences of another language."""
    code = re.split("[-_]", language.lower())[0]
    rivals = {
        other
        for other in alternatives
        if set(scripts_of(other)) & set(scripts_of(language)) and other != code
    }
    if not rivals or not positions:
        return 0
    detector = _detector(frozenset({code, *rivals}))
    foreign, waiting, index, start = 0, 0, 0, 0
    sentences = list(_SENTENCE.finditer(text))
    for number, sentence in enumerate(sentences):
        while index < len(positions) and positions[index] < sentence.end():
            index, waiting = index + 1, waiting + 1
        if waiting >= _SHORTEST_SENTENCE or number == len(sentences) - 1:
            found = detector.detect_language_of(text[start : sentence.end()])
            if found is not None and found.iso_code_639_1.name.lower() != code:
                foreign += waiting
            start, waiting = sentence.end(), 0
    return foreign


@functools.lru_cache(maxsize=8)
def _detector(codes: frozenset[str]) -> Any:
    if importlib.util.find_spec("lingua") is None:
        raise UserError(
            f"language reward: telling {' and '.join(sorted(codes))} apart needs lingua: "
            "pip install 'grpo-engine[language]'"
        )
    with loading():
        import lingua

        try:
            names = [lingua.IsoCode639_1.from_str(code.upper()) for code in sorted(codes)]
        except ValueError as error:
            raise UserError(f"language reward: lingua: {error}") from error
        return lingua.LanguageDetectorBuilder.from_iso_codes_639_1(*names).build()


def _text_of(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt if message["role"] == "user")


def _score(
    completion: Any, prompt: Any, language: str | None, alternatives: Sequence[str]
) -> float | None:
    question = "" if prompt is None else _text_of(prompt)
    language = language or prompt_language(question)
    if language is None:
        return None
    thinking, answer = split_thinking(completion_text(completion))
    use = measure_language(thinking, language, prompt=question, alternatives=alternatives)
    measured("language/off_script_characters/thinking", use.off_script_characters)
    leaked = off_script_characters(answer, language, prompt=question)
    measured("language/off_script_characters/answer", leaked)
    return use.share


def language_consistency_reward(
    completions: Sequence[Any],
    prompts: Sequence[Any] | None = None,
    language: Sequence[str | None] | None = None,
    *,
    alternatives: Sequence[str] = ("en",),
    **_: Any,
) -> list[float | None]:
    """Share of target-language words in the reasoning, in [0, 1] (TRL signature; v2 eq. 7).

    ``language``: ISO 639-1 code of each row; where it is missing or None, that of the prompt (by
    its script). The reasoning is what stands before ``</think>``, else the whole completion.
    None where there is nothing to judge: no words, or no language. Raises UserError for
    an unknown language and where lingua is needed and not installed.
    """
    if prompts is None and language is None:
        raise UserError("language reward: needs the column 'language', or prompts to take it from")
    blank = [None] * len(completions)
    rows = zip(completions, prompts or blank, language or blank, strict=True)
    return [_score(completion, prompt, code, alternatives) for completion, prompt, code in rows]


def _judge(
    completion: Any, row: Mapping[str, Any], *, alternatives: Sequence[str] = ("en",)
) -> tuple[float | None, str]:
    # The row's own prompt: the one the model saw has an English template around it.
    score = _score(completion, row.get("prompt"), row.get("language"), alternatives)
    return score, "ok" if score is not None else "none"


language_consistency_reward.judge = _judge
language_consistency_reward.required_columns = ()
