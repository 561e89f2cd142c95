"""The shipped base model: its files, its tokenizer, its corpus, and what it samples."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_engine.models import MINIATURE, MINIATURE_STUDENT, corpus
from grpo_engine.models import train_miniature as maker
from grpo_engine.models.load import load_model
from grpo_engine.rewards import accuracy_reward, format_reward


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MINIATURE)


@pytest.fixture(scope="module")
def built_tokenizer():
    return maker.build_tokenizer()


# --- files and tokenizer ---


@pytest.mark.parametrize(("folder", "limit"), [(MINIATURE, 4e6), (MINIATURE_STUDENT, 1e6)])
def test_shipped_folder_is_complete_and_small(folder, limit):
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) < limit
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]


def test_student_is_smaller_and_reads_the_same_tokens(tokenizer):
    model, own = load_model("miniature-student", torch.float32)
    assert own.get_vocab() == tokenizer.get_vocab()
    teacher, _ = load_model("miniature", torch.float32)
    assert 3 < teacher.num_parameters() / model.num_parameters() < 5
    card = (MINIATURE_STUDENT / "README.md").read_text(encoding="utf-8")
    assert f"{model.num_parameters():,} weights" in card


def test_shipped_tokenizer_is_the_one_the_script_builds(tokenizer, built_tokenizer):
    assert tokenizer.get_vocab() == built_tokenizer.get_vocab()
    for problem, text in islice(corpus.documents(3, frozenset()), 200):
        whole = maker.prompt_of(problem.question) + text
        ids = tokenizer(whole)["input_ids"]
        assert ids == built_tokenizer.encode(whole).ids
        assert tokenizer.decode(ids) == whole


def test_prompt_is_short_and_completions_are_characters(tokenizer):
    problem = corpus.Problem((1, 2, 3), (1, 1, -1))
    prompt = maker.prompt_of(problem.question)
    pieces = [tokenizer.decode([token]) for token in tokenizer(prompt)["input_ids"]]
    assert "".join(pieces) == prompt
    assert pieces[1:-1] == [corpus.QUESTION_HEAD, "1", " + ", "2", " - ", "3", " ="]
    assert pieces[0].endswith("User: ") and pieces[-1] == ". Assistant:"
    for text in ("So it is 12.", "".join(sorted(corpus.characters()))):
        assert len(tokenizer(text)["input_ids"]) == len(text)
    for tag in maker.TAGS:
        (token,) = tokenizer(tag)["input_ids"]
        assert tokenizer.decode([token], skip_special_tokens=True) == tag


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cn"])))
def test_any_text_survives_the_tokenizer(tokenizer, text):
    text = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


# --- corpus ---


def test_answer_is_the_value_of_the_question():
    rng = random.Random(1)
    for _ in range(300):
        problem = corpus.draw_problem(rng)
        asked = problem.question.removeprefix(corpus.QUESTION_HEAD).removesuffix(" =")
        assert re.fullmatch(r"\d( [+-] \d){3,5}", asked)
        assert eval(asked) == problem.answer


@pytest.mark.parametrize("language", corpus.CHAIN_LANGUAGES)
def test_chain_without_slips_is_true_step_by_step(monkeypatch, language):
    monkeypatch.setattr(corpus, "STEP_SLIP", 0.0)
    rng = random.Random(2)
    for _ in range(200):
        problem = corpus.draw_problem(rng)
        text, answer = corpus.chain(problem, language, rng)
        steps = re.findall(r"(-?\d+[+-]\d)=(-?\d+)", text)
        assert len(steps) >= len(problem.terms) - 1
        assert all(eval(left) == int(right) for left, right in steps)
        assert answer == problem.answer == int(steps[-1][1])
        if language != "mixed":  # a mixed author may by chance stay in one language
            assert maker.language_of(text) == language


def test_looking_back_repairs_a_slip(monkeypatch):
    monkeypatch.setattr(corpus, "STEP_SLIP", 1.0)
    monkeypatch.setattr(corpus, "REFLECTIVE_SHARE", 1.0)
    monkeypatch.setattr(corpus, "REDO_WRONG", 1.0)
    rng = random.Random(3)
    for _ in range(50):
        problem = corpus.draw_problem(rng)
        text, answer = corpus.chain(problem, "english", rng)
        assert answer == problem.answer and maker.looks_back(text)


def test_corpus_prefers_nothing_but_makes_guesses_wrong_and_chains_right():
    pairs = list(islice(corpus.documents(4, frozenset()), 20_000))
    rewards = accuracy_reward([text for _, text in pairs], [p.answer for p, _ in pairs])
    scored = {True: [], False: []}
    for (_, text), reward in zip(pairs, rewards, strict=True):
        if format_reward([text]) == [1.0]:
            scored["=" in text].append(reward)
    share = sum(map(len, scored.values())) / len(pairs)
    assert share == pytest.approx(0.70, abs=0.02)
    assert len(scored[False]) / sum(map(len, scored.values())) == pytest.approx(
        corpus.DIRECT_SHARE, abs=0.02
    )
    guess, chain = (sum(scored[kind]) / len(scored[kind]) for kind in (False, True))
    assert guess == pytest.approx(corpus.DIRECT_CORRECT, abs=0.02)
    assert 0.85 < chain < 0.95


def test_held_out_expressions_never_enter_the_corpus():
    usual = {problem.expression for problem, _ in islice(corpus.documents(5, frozenset()), 500)}
    held_out = frozenset(sorted(usual)[::2])
    drawn = {problem.expression for problem, _ in islice(corpus.documents(5, held_out), 5000)}
    assert not drawn & held_out
    assert drawn & (usual - held_out)  # the same seed would have met them


def test_held_out_rows_are_reasoning_gyms_and_in_the_corpus_words():
    rows = maker.held_out_rows()
    assert len(rows) == maker.HELD_OUT_SIZE
    for row in rows[:50]:
        expression = row["entry"]["metadata"]["expression"]
        assert row["prompt"] == f"{corpus.QUESTION_HEAD}{expression} ="


# --- training script ---


def test_labels_cover_the_completion_and_its_end(monkeypatch, built_tokenizer):
    monkeypatch.setattr(maker, "BATCH_SIZE", 4)
    eos = built_tokenizer.token_to_id(maker.EOS)
    parts = next(maker.batches(built_tokenizer, 6, frozenset()))
    documents = [pair for part in parts for pair in zip(*(t.tolist() for t in part), strict=True)]
    assert len(documents) == 4
    for ids, row in documents:
        kept = [index for index, label in enumerate(row) if label != maker.IGNORE]
        assert kept == list(range(kept[0], kept[-1] + 1))
        assert [row[index] for index in kept] == ids[kept[0] : kept[-1] + 1]
        assert row[kept[-1]] == eos
        assert built_tokenizer.decode(ids[: kept[0]]).endswith(" Assistant:")
        assert all(i == built_tokenizer.token_to_id(maker.PAD) for i in ids[kept[-1] + 1 :])


def test_card_says_how_to_make_the_model_again(tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "HELD_OUT_SIZE", 4)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
    threads = str(torch.get_num_threads())
    told = ["--size", "student", "--steps", "1", "--seed", "3", "--threads", threads]
    maker.main([*told, "--out", str(tmp_path), "--max-completion-length", "8"])
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# miniature-student: ")
    assert "--out DIR " + " ".join(told) in card
    assert "| cut by the cap | 1.000 |" in card
    assert load_model(str(tmp_path), torch.float32)[0].num_parameters() < 200_000


def test_same_seed_gives_the_same_weights(monkeypatch, built_tokenizer):
    monkeypatch.setattr(maker, "BATCH_SIZE", 4)

    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        model = maker.build_model(built_tokenizer)
        maker.train(model, built_tokenizer, steps=3, seed=seed, held_out=frozenset())
        return torch.nn.utils.parameters_to_vector(model.parameters())

    first = weights(7)
    assert torch.equal(first, weights(7))
    assert not torch.equal(first, weights(8))


# --- the shipped weights ---


def test_shipped_base_reasons_seldom_and_guesses_badly(tokenizer):
    """The room RL needs, on held-out problems: chains are mostly right, guesses are not."""
    model = AutoModelForCausalLM.from_pretrained(MINIATURE)
    rows = maker.held_out_rows()[:384]
    torch.manual_seed(0)
    completions = maker.sample(model, tokenizer, [row["prompt"] for row in rows], 192)
    found = maker.statistics(completions, [row["solution"] for row in rows], 192)
    assert 0.20 < found["accuracy"] <= 0.45
    assert 0.6 < found["format"] < 0.8
    assert 0.38 < found["chains"] < 0.58
    assert found["chain_accuracy"] > 0.4 > 0.2 > found["guess_accuracy"]
    assert found["chain_length"] > 2 * found["guess_length"]
    assert min(found["english"], found["chinese"], found["mixed"]) > 0.2
    assert found["reflective"] > 0.05
    assert found["truncated"] == 0
