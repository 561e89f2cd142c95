"""The language consistency reward: the share of target-language words in the reasoning."""

import importlib.util
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_engine.rewards import RewardPool, RewardSpec
from grpo_engine.rewards import language as module
from grpo_engine.rewards.language import (
    language_consistency_reward,
    measure_language,
    off_script_characters,
    prompt_language,
    split_thinking,
)
from grpo_engine.types import UserError


def share(text, language, **options):
    return measure_language(text, language, **options).share


@pytest.mark.parametrize(
    "text, language, value",
    [
        ("The answer is clear.", "en", 1.0),
        ("The answer is 因此 clear.", "en", 4 / 6),
        ("Хорошо, this is done", "en", 3 / 4),
        ("因此答案是三", "zh", 1.0),
        ("因此答案 so", "zh", 4 / 5),
        ("Therefore the answer", "zh", 0.0),
        ("答えは三です", "ja", 1.0),
        ("答えは三です", "zh", 2 / 6),
        ("정답은 삼 입니다 the", "ko", 3 / 4),
        ("Ответ равен семи", "ru", 1.0),
        ("الجواب هو سبعة ok", "ar", 3 / 4),
        ("उत्तर सात है", "hi", 1.0),
        ("We don't know l’eau", "en", 1.0),
        ("因此答案", "zh-CN", 1.0),
        ("Clear", "en_US", 1.0),
        ("ꦲꦤ words", "en", 1 / 3),  # a script nobody listed still counts
    ],
)
def test_the_share_of_target_words(text, language, value):
    assert share(text, language) == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [
        "设 $x = a + \\text{speed}$ 为速度",
        "设 \\(x\\) 和 \\[ velocity \\] 为速度",
        "设 $$velocity = x$$ 为速度",
        "因此 \\frac{x}{y} \\boxed{n}",
        "代码 `for item in range` 如下",
        "代码\n```python\nfor item in range(n): print(item)\n```\n如下",
        "<step>因此</step> https://example.com/path 如下",
        "设 x 为 y 的 sin",
        "x_1 和 a2 以及 3n",
        "四边形 ABCD 中 AB = 5 cm 且 m 为 3 kg",
    ],
)
def test_mathematics_code_and_markup_are_no_words(text):
    assert share(text, "zh") == 1.0


def test_mathematics_is_no_place_to_hide():
    assert share("The answer is $因此答案$ clear", "en") == pytest.approx(4 / 8)
    assert share("The answer is `因此` clear", "en") == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    "text",
    [
        "因此 <b therefore the answer is so>",
        "因此 <therefore><the><answer>",
        '因此 <b title="the answer">',
        "因此 therefore_the_answer_is_three",
        "因此 therefore1the2answer",
        "因此 __therefore__ the_1answer",
        "因此 SO THE SUM OF THEM IS TEN",
    ],
)
def test_tags_and_names_are_no_place_to_hide(text):
    assert share(text, "zh") <= 0.5


def test_addresses_are_no_place_to_hide():
    assert share("so https://因此答案是三", "en") < 0.5


def test_what_is_written_before_the_reasoning_is_reasoning():
    evaded = "因此答案是三" * 20 + "<think>ok fine</think> 3"
    [score] = language_consistency_reward([evaded], prompts=["What is 1 + 2?"])
    assert score == 2 / 122
    [score] = language_consistency_reward([evaded.replace("</think>", "")], ["What is 1 + 2?"])
    assert score < 0.1


def test_two_prices_are_not_mathematics():
    text = "It costs $5 and then\nthe other one costs $6 in all"
    assert measure_language(text, "en").words == measure_language(text.replace("$", ""), "en").words


def test_text_quoted_from_the_prompt_is_not_counted():
    prompt = "Translate the sentence 因此答案是三 into English, and mention Чехов."
    assert share("The phrase “因此答案是三” means so", "en", prompt=prompt) == 1.0
    assert share('The phrase "因此" means so', "en", prompt=prompt) == 1.0
    assert share("Here Чехов is a name", "en", prompt=prompt) == 1.0  # the prompt's own word
    assert share("The phrase “什么” means so", "en", prompt=prompt) < 1
    # In a prompt of another language nothing but quotations is excused.
    assert share("the answer is 三", "zh", prompt="What is the answer") == 1 / 4
    assert share('问 "the answer" 是三', "zh", prompt="What is the answer") == 1.0


@pytest.mark.parametrize(
    "text, thinking, answer",
    [
        ("<think>a</think> b", "a", " b"),
        ("a</think> b", "a", " b"),  # the prompt ended in <think>
        ("<think>a", "a", ""),
        ("a", "a", ""),
        ("x <think>a</think> b </think> c", "x a</think> b ", " c"),
        ("\n<think>a</think> b", "a", " b"),
        ("x <think>a", "x a", ""),
    ],
)
def test_reasoning_and_answer_are_told_apart(text, thinking, answer):
    assert split_thinking(text) == (thinking, answer)


def test_only_the_reasoning_is_scored():
    completion = "<think>Therefore the answer</think> 因此答案"
    assert language_consistency_reward([completion], language=["en"]) == [1.0]
    assert language_consistency_reward([completion], language=["zh"]) == [0.0]
    assert language_consistency_reward(["Therefore 因"], language=["en"]) == [0.5]


@pytest.mark.parametrize(
    "prompt, language",
    [
        ("What is 2 + 2?", "en"),
        ("求方程 $x^2 = 1$ 的根", "zh"),
        ("方程式の根を求めよ", "ja"),
        ("방정식의 근을 구하시오", "ko"),
        ("Найдите корни уравнения", "ru"),
        ("أوجد جذور المعادلة", "ar"),
        ("2 + 2 = ?", None),
    ],
)
def test_the_language_defaults_to_that_of_the_prompt(prompt, language):
    assert prompt_language(prompt) == language
    texts = {
        "zh": "因此",
        "ja": "これは",
        "ko": "정답은",
        "ru": "Ответ",
        "ar": "الجواب",
        "en": "So",
    }
    if language == "ja":
        del texts["zh"]  # written in Han characters alone, it cannot be told from Japanese
    for other, text in texts.items():
        score = language_consistency_reward([text], prompts=[prompt], alternatives=())[0]
        assert (score == 1.0) == (other == language)
        assert (score is None) == (language is None)


def test_a_row_says_more_than_its_prompt():
    scores = language_consistency_reward(
        ["因此", "因此"], prompts=["What is it?", "What is it?"], language=["zh", None]
    )
    assert scores == [1.0, 0.0]


def test_conversations_are_read():
    prompt = [
        {"role": "system", "content": "Answer well and truly"},
        {"role": "user", "content": "几岁"},
    ]
    completion = [{"role": "assistant", "content": "<think>因此</think> so"}]
    assert language_consistency_reward([completion], prompts=[prompt]) == [1.0]


def test_nothing_to_judge_is_none_and_nothing_to_go_by_an_error():
    assert language_consistency_reward(["<think>$1 + 1$</think> two"], language=["en"]) == [None]
    with pytest.raises(UserError, match="'xx'.*one of"):
        language_consistency_reward(["so"], language=["xx"])
    with pytest.raises(UserError, match="column 'language'"):
        language_consistency_reward(["so"])


def test_a_short_leak_in_a_long_text_is_counted():
    text = "The answer is clear. " * 5000 + "因此答案"
    use = measure_language(text, "en")
    assert use.share > 0.999
    assert use.off_script_characters == off_script_characters(text, "en") == 4
    assert off_script_characters("Therefore 因此", "zh") == len("Therefore")
    assert off_script_characters("$velocity$ 因此", "zh") == 0


@given(st.text(max_size=60), st.sampled_from(["en", "zh", "ja", "ru", "ar", "th"]))
def test_any_text_has_a_share_between_0_and_1(text, language):
    use = measure_language(text, language, alternatives=())
    assert 0 <= use.target_words <= use.words
    assert (use.off_script_characters == 0) == (use.words == use.target_words)


@pytest.mark.parametrize(
    "piece",
    [
        *("\\[", "$", "$$", "`", "```", "<", "</", "“", '"', "a", "a1_", "因", "\\", "https://"),
        *("abc1", "ab_", "_", "<b"),
    ],
)
def test_hostile_text_is_read_in_linear_time(piece):
    start = time.perf_counter()
    measure_language(piece * 100_000, "zh", prompt="什么", alternatives=())
    assert time.perf_counter() - start < 4


# Languages of one script


def test_a_language_written_like_english_needs_the_detector(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lingua" else find(name)
    )
    module._detector.cache_clear()
    with pytest.raises(UserError, match=r"en and fr.*lingua.*grpo-engine\[language\]"):
        language_consistency_reward(["La réponse est claire."], language=["fr"])
    for language in ("en", "zh", "ru"):  # not needed
        language_consistency_reward(["La réponse"], language=[language])
    scores = language_consistency_reward(["La réponse"], language=["fr"], alternatives=[])
    assert scores == [1.0]
    module._detector.cache_clear()


def test_sentences_of_another_language_do_not_count(monkeypatch):
    asked = []

    class Detector:
        def detect_language_of(self, sentence):
            asked.append(sentence.strip())
            name = "EN" if " the " in sentence else "FR"
            return SimpleNamespace(iso_code_639_1=SimpleNamespace(name=name))

    monkeypatch.setattr(module, "_detector", lambda codes: Detector())
    text = "La réponse est donc très claire. But now the rest is in English. Oui. Je reviens enfin."
    use = measure_language(text, "fr")
    assert (use.words, use.target_words) == (6 + 7 + 4, 6 + 4)
    assert len(asked) == 3  # "Oui" is too short to be asked alone
    assert measure_language("因此" + text, "fr").target_words == 10


def test_with_the_real_detector():
    pytest.importorskip("lingua")
    module._detector.cache_clear()
    text = "La réponse est donc simple et claire. But now I will switch to English for a while."
    assert share(text, "fr") == pytest.approx(7 / 15)
    assert share(text, "de", alternatives=("en", "fr")) == 0.0


def test_a_leak_is_measured_in_the_reasoning_and_in_the_answer_apart():
    texts = ["<think>" + "So it is clear. " * 500 + "因此</think> 三", "<think>So</think> 3"]
    with RewardPool([RewardSpec("language", "language")], num_workers=2) as pool:
        prompts = ["What is 1 + 2?"] * 2
        report = pool.score(prompts=prompts, completions=texts, columns={"prompt": prompts})
    assert report.scores["language"][0] > 0.99
    assert report.measures == {
        "language/off_script_characters/answer": [0, 1],
        "language/off_script_characters/thinking": [0, 2],
    }


def test_in_a_pool_the_row_s_own_prompt_decides_and_not_the_template_around_it():
    template = (
        "A conversation between User and Assistant. The user asks a question. User: {} Assistant:"
    )
    with RewardPool([RewardSpec("language", "language")], num_workers=1) as pool:
        report = pool.score(
            [template.format("几岁"), template.format("几岁")],
            ["<think>因此</think>", "<think>so it is</think>"],
            {"prompt": ["几岁", "几岁"]},
        )
    assert report.scores["language"] == [1.0, 0.0]
