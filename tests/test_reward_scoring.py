"""Scoring answers with a saved reward model: what it reads of them, on which scale it answers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_model import make_tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from grpo_engine.reward_network import RewardNetwork
from grpo_engine.rewards.model import (
    CARD_FILE,
    ScalarModel,
    ScoreCard,
    judged_part,
    network_scores,
)
from grpo_engine.types import UserError

HELPFUL = ScoreCard("helpful", "summary", lowest=-7.0)
SAFETY = ScoreCard("safety", "response")
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return RewardNetwork.from_model(make_tiny_model(tmp_path_factory.mktemp("model")), device="cpu")


def model_of(network, card, **options):
    return ScalarModel(network, card, **options)


# -- scope -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "summary"),
    [
        ("<think>so</think>\n\nit is 7 \n", "it is 7"),
        ("so</think>it is 7", "it is 7"),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("<think>so</think>", ""),
        ("<think>it is 7", ""),
        ("hello there", "hello there"),
        ("", ""),
    ],
)
def test_the_summary_follows_the_last_think_tag(completion, summary):
    assert judged_part(completion, "summary") == summary
    assert judged_part(completion, "response") == completion


CHAINS = ["<think>3+4 is 7</think>it is 7", "<think>go away</think>it is 7"]


def test_the_reasoning_does_not_change_a_helpful_score(network):
    model = model_of(network, HELPFUL)
    one, other = model.score(["3+4?"] * 2, CHAINS)
    assert one == pytest.approx(other, abs=1e-6)
    alone = [model.score(["3+4?"], [chain]) for chain in CHAINS]
    assert alone[0] == alone[1]
    changed = model.score(["3+4?"], ["<think>3+4 is 7</think>it is 8"])
    assert abs(changed[0] - one) > 1e-3


def test_the_reasoning_changes_a_safety_score(network):
    one, other = model_of(network, SAFETY).score(["3+4?"] * 2, CHAINS)
    assert abs(one - other) > 1e-3


def test_an_answer_without_summary_gets_the_lowest_training_score(network):
    unfinished = ["<think>3+4", "<think>3+4</think>  "]
    assert model_of(network, HELPFUL).score(["3+4?"] * 2, unfinished) == [-7.0, -7.0]
    empty = model_of(network, replace(HELPFUL, empty_summary="scored"))
    scores = empty.score(["3+4?"] * 3, [*unfinished, ""])
    assert scores == pytest.approx([scores[2]] * 3, abs=1e-6) and scores[0] != -7.0


def test_reasoning_opened_by_the_prompt(network):
    """A policy whose prompt ends in <think> answers from inside the reasoning."""
    helpful, safety = model_of(network, HELPFUL), model_of(network, SAFETY)
    inside = ["3+4 is 7</think>it is 7", "3+4 is"]
    expected = helpful.score(["3+4?"] * 2, ["<think>" + text for text in inside])
    assert helpful.score(["3+4?"] * 2, inside, thinking_prefilled=True) == expected
    assert expected[1] == -7.0
    whole = safety.score(["3+4?"], ["<think>" + inside[0]])
    assert safety.score(["3+4?"], inside[:1], thinking_prefilled=True) == whole


# -- the text --------------------------------------------------------------------------------------


def test_templates_and_messages(network):
    tokenizer = AutoTokenizer.from_pretrained(network.tokenizer.name_or_path)
    tokenizer.chat_template = CHAT
    card = replace(HELPFUL, prompt_template="chat", system_prompt="be kind", prompt_suffix="now")
    prompt = [{"role": "user", "content": "3+4?"}]
    text = card.text(prompt, CHAINS[0], tokenizer)
    # The template opens the think tag for a policy; a summary follows no reasoning.
    assert text == "<|system|>be kind<|user|>3+4?\nnow<|assistant|>it is 7"
    assert card.text("3+4?", CHAINS[0], tokenizer) == text
    whole = replace(card, scope="response").text(prompt, CHAINS[0], tokenizer)
    assert whole.endswith("<|assistant|>" + CHAINS[0])
    assert HELPFUL.text("3+4?", CHAINS[0], tokenizer) == "3+4?it is 7"


def test_a_chat_card_needs_a_chat_template(network):
    with pytest.raises(UserError, match="chat template"):
        model_of(network, replace(HELPFUL, prompt_template="chat"))


def test_the_score_is_that_of_the_hugging_face_model(network, tmp_path):
    network.save_pretrained(tmp_path)
    HELPFUL.write(tmp_path)
    ours = ScalarModel.load(tmp_path, device="cpu").score(["3+4?", "a"], [CHAINS[0], "b c"])
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer(
        ["3+4?it is 7" + tokenizer.eos_token, "ab c" + tokenizer.eos_token],
        padding=True,
        return_tensors="pt",
    )
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    logits = theirs(**inputs).logits[:, 0]
    torch.testing.assert_close(torch.tensor(ours), logits, rtol=0, atol=1e-5)


# -- batches ---------------------------------------------------------------------------------------


def test_scores_do_not_depend_on_the_batch(network):
    prompts = [f"{i}+{i}?" for i in range(12)]
    answers = ["so " * i + "it is" for i in range(12)]
    whole = model_of(network, SAFETY).score(prompts, answers)
    again = model_of(network, SAFETY).score(prompts, answers)
    assert whole == again
    # the longest answer is longer than a micro-batch, and goes alone
    cut = model_of(network, SAFETY, max_tokens_per_microbatch=20).score(prompts, answers)
    assert cut == pytest.approx(whole, abs=1e-5)
    assert len(set(whole)) == 12


def test_no_answer_and_lists_of_different_lengths(network):
    model = model_of(network, SAFETY)
    assert model.score([], []) == []
    assert network_scores(network, [], 10).shape == (0,)
    with pytest.raises(ValueError, match="2 prompts for 1 completions"):
        model.score(["a", "b"], ["c"])


# -- scale -----------------------------------------------------------------------------------------


def test_scales(network):
    answers = (["3+4?"] * 2, ["it is 7", "go away"])
    raw = np.array(model_of(network, replace(SAFETY, mean=2.0, std=0.5)).score(*answers))
    standardised = model_of(
        network, replace(SAFETY, mean=2.0, std=0.5, score_scale="standardised")
    ).score(*answers)
    assert standardised == pytest.approx((raw - 2.0) / 0.5)
    probable = model_of(network, replace(SAFETY, score_scale="probability")).score(*answers)
    assert probable == pytest.approx(1 / (1 + np.exp(-raw)))


def test_the_scale_can_be_replaced_on_loading(network, tmp_path):
    network.save_pretrained(tmp_path)
    replace(SAFETY, score_scale="probability", mean=1.0, std=2.0).write(tmp_path)
    answers = (["3+4?"], ["it is 7"])
    assert 0 < ScalarModel.load(tmp_path, device="cpu").score(*answers)[0] < 1
    raw = ScalarModel.load(tmp_path, device="cpu", score_scale="raw").score(*answers)[0]
    other = ScalarModel.load(tmp_path, device="cpu", score_scale="standardised").score(*answers)[0]
    assert other == pytest.approx((raw - 1.0) / 2.0)
    with pytest.raises(UserError, match="score_scale.*'loud'"):
        ScalarModel.load(tmp_path, device="cpu", score_scale="loud")


# -- folders ---------------------------------------------------------------------------------------


def test_the_card_is_read_back(tmp_path):
    card = replace(SAFETY, system_prompt="ü", mean=0.1, accuracy=0.75, step=12)
    card.write(tmp_path)
    assert ScoreCard.read(tmp_path) == card


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["there is no", CARD_FILE]),
        ("{", ["cannot be read"]),
        ("[]", ["must hold kind"]),
        ('{"kind": "helpful"}', ["must hold kind"]),
        ('{"kind": "helpful", "scope": "summary", "more": 1}', ["must hold kind"]),
        ('{"kind": "kind", "scope": "summary"}', ["kind", "'kind'"]),
        ('{"kind": "helpful", "scope": "all"}', ["scope", "'all'"]),
        ('{"kind": "helpful", "scope": "summary", "std": 0.0}', ["std"]),
        ('{"kind": "helpful", "scope": "summary", "score_scale": "log"}', ["score_scale", "'log'"]),
    ],
)
def test_a_folder_without_a_usable_card(tmp_path, text, words):
    if text is not None:
        (tmp_path / CARD_FILE).write_text(text)
    with pytest.raises(UserError) as refusal:
        ScalarModel.load(tmp_path, device="cpu")
    assert str(tmp_path) in str(refusal.value)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_a_language_model_with_a_card_is_refused(tmp_path):
    make_tiny_model(tmp_path)
    HELPFUL.write(tmp_path)
    with pytest.raises(UserError, match="sequence-classification"):
        ScalarModel.load(tmp_path, device="cpu")


def test_absent_folder(tmp_path):
    with pytest.raises(UserError, match="absent"):
        ScalarModel.load(tmp_path / "absent")


def test_a_card_is_plain_json(tmp_path):
    HELPFUL.write(tmp_path)
    values = json.loads((tmp_path / CARD_FILE).read_text())
    assert values["kind"] == "helpful" and values["scope"] == "summary"
