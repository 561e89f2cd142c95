"""The text filters of cold start and rejection sampling."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_engine.filters import (
    ChainFilters,
    Decontamination,
    longest_paragraph,
    without_duplicates,
)
from grpo_engine.types import UserError

PROMPT = "What is the sum of the numbers two and three?"
CLEAN = "<think>First I add two and three, which makes five.</think>\nThe sum is 5."


def fault(completion, **options):
    prompt = options.pop("prompt", PROMPT)
    language = options.pop("language", None)
    return ChainFilters(**options).first_fault(completion, prompt=prompt, language=language)


def test_a_readable_chain_passes():
    assert fault(CLEAN) is None


def test_mixed_languages_in_the_reasoning():
    mixed = "<think>First 我们把二和三加起来 and then 得到五 so yes.</think>\nThe sum is 5."
    assert fault(mixed) == "mixed_language"
    assert fault(mixed, min_language_share=None) is None
    assert fault(mixed, min_language_share=0.1) is None


def test_a_leak_of_a_few_characters_in_a_long_answer():
    leaked = CLEAN.replace("makes", "makes " + "I see that it is so. " * 500 + "因此 now")
    assert fault(leaked, max_repeated_share=None, max_paragraph_words=None) is None
    limits = {"max_repeated_share": None, "max_paragraph_words": None}
    assert fault(leaked, **limits, max_off_script_characters=1) == "mixed_language"
    assert fault(leaked, **limits, max_off_script_characters=2) is None
    assert fault(CLEAN + " 三", max_off_script_characters=0) == "mixed_language"  # in the summary
    assert fault(CLEAN + " 三", max_off_script_characters=0, prompt="2+3=") is None
    assert fault(CLEAN, max_off_script_characters=0) is None


def test_the_language_is_the_rows_before_the_prompts():
    chinese = "<think>二加三等于五。</think>\n五"
    assert fault(chinese) == "mixed_language"
    assert fault(chinese, language="zh") is None
    assert fault(chinese, prompt="二加三等于几？") is None


def test_no_language_to_judge_by():
    assert fault("<think>二加三 makes five</think>", prompt="2+3=") is None


def test_only_the_reasoning_must_be_free_of_code_blocks():
    inside = "<think>I try\n```python\nprint(2 + 3)\n```\nand get five.</think>\n5"
    outside = "<think>I write a program.</think>\n```python\nprint(2 + 3)\n```"
    assert fault(inside) == "code_block"
    assert fault(inside, code_blocks=True) is None
    assert fault(outside) is None
    assert fault("<think>the mark ``` inside a line is no block</think>") is None


def test_long_paragraphs():
    words = " ".join(f"word{i}" for i in range(60))
    one = f"<think>{words} {words.upper()}x</think>"
    two = f"<think>{words}\n \n{words.upper()}x</think>"
    assert longest_paragraph(f"a b\n\n{words}") == 60
    limits = {"max_paragraph_words": 100, "min_language_share": None}
    assert fault(one, **limits) == "long_paragraph"
    assert fault(two, **limits) is None


def test_repetition_counts_the_whole_answer():
    loop = CLEAN + " I check the sum once more and again it is 5." * 20
    assert fault(loop) == "repetition"
    assert fault(loop, max_repeated_share=None) is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"min_language_share": 1.5}, "min_language_share"),
        ({"max_off_script_characters": -1}, "max_off_script_characters must be >= 0, got -1"),
        ({"max_repeated_share": -0.1}, "max_repeated_share"),
        ({"max_paragraph_words": 0}, "max_paragraph_words"),
        ({"ngram_size": 0}, "ngram_size"),
    ],
)
def test_limits_out_of_range(options, named):
    with pytest.raises(UserError, match=named):
        ChainFilters(**options)


def test_duplicates_ignore_case_blanks_and_punctuation():
    texts = ["Two plus three.", "two  plus\nthree", "two plus four", "TWO plus three!"]
    assert without_duplicates(texts) == [0, 2]


def test_near_duplicates():
    base = [f"w{i}" for i in range(50)]
    changed = [*base[:25], "other", *base[26:]]
    texts = [" ".join(base), " ".join(changed), "something else altogether and not like it"]
    assert without_duplicates(texts) == [0, 1, 2]
    assert without_duplicates(texts, max_overlap=0.7) == [0, 2]
    with pytest.raises(UserError, match="max_overlap"):
        without_duplicates(texts, max_overlap=0)


@given(st.lists(st.text(alphabet="ab ", max_size=6), max_size=8))
def test_what_is_kept_repeats_nothing_and_covers_everything(texts):
    kept = without_duplicates(texts)
    words = [tuple(text.split()) for text in texts]
    assert kept == sorted(kept)
    assert len({words[i] for i in kept}) == len(kept)
    assert {words[i] for i in kept} == set(words)


def test_decontamination_finds_ten_words_in_a_row():
    test = "Alice has three apples and gives two of them to her brother Bob on Monday"
    guard = Decontamination([test])
    inside = "Noise before. alice has THREE apples, and gives two of them to nobody."
    outside = "Alice has three apples and gives one of them to her brother Bob."
    assert guard.matches(inside)
    assert not guard.matches(outside)
    assert not guard.matches("")


def test_decontamination_matches_short_tests_whole():
    guard = Decontamination(["add two and three quickly", "2 + 2"])
    assert guard.matches("please add two and three quickly, will you")
    assert not guard.matches("please add two and three slowly")
    assert not guard.matches("2 + 2 = 4"), "below the least number of words"


def test_decontamination_sizes():
    with pytest.raises(UserError, match="least"):
        Decontamination([], size=3, least=4)
