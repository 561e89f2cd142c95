"""Rows to imitate as tokens: what is seen, what is learned, and what is refused."""

import json

import numpy as np
import pytest
import torch
from tiny_model import make_tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_engine import demonstrations
from grpo_engine.demonstrations import Demonstrations, fit, load_demonstrations, tokenize
from grpo_engine.settings import build_config
from grpo_engine.sft_config import SFTConfig
from grpo_engine.types import UserError

# A turn is <role>content, the assistant's ends in the end-of-sequence token, and a full stop stands
# for the line break that real templates write behind it.
TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}<eos>{% endif %}.{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": "4 yes"},
]
EOS = 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("model"))
    return PreTrainedTokenizerFast.from_pretrained(folder)


def config(path, **changes) -> SFTConfig:
    return build_config({"dataset": str(path), "prompt_template": "none"} | changes, SFTConfig)


def written(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tokens(tokenizer, tmp_path, rows, **changes):
    """(token ids, learned) of each row."""
    settings = config(written(tmp_path, rows), **changes)
    loaded = load_demonstrations(settings, settings.dataset, {}, None, None)
    return list(tokenize(settings, tokenizer, [EOS], loaded, "rows.jsonl"))


def with_template(tokenizer, template):
    changed = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token="<eos>", unk_token="<unk>"
    )
    changed.chat_template = template
    return changed


def spoken(tokenizer, ids, learned):
    """The learned stretches, as text."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], learned, [0]])))
    return [tokenizer.decode(ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


# -- what is seen and what is learned --------------------------------------------------------------


def test_a_completion_is_learned_to_its_end_and_its_prompt_is_not(tokenizer, tmp_path):
    rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "what?", "completion": "yes<eos>"}]
    (ids, learned), (longer, answer) = tokens(tokenizer, tmp_path, rows)
    assert ids.tolist() == [*tokenizer("1+1=2")["input_ids"], EOS]
    assert learned.tolist() == [False] * 4 + [True] * 2
    assert longer.tolist() == [*tokenizer("what?yes")["input_ids"], EOS]  # not two of them
    assert answer.tolist() == [False] * 5 + [True] * 4


def test_an_answer_that_ends_in_another_end_gets_no_second(tokenizer, tmp_path):
    rows = [{"prompt": "1+1=", "completion": "2?"}]
    [question_mark] = tokenizer("?")["input_ids"]
    settings = config(written(tmp_path, rows))
    loaded = load_demonstrations(settings, settings.dataset, {}, None, None)
    [(ids, _)] = tokenize(settings, tokenizer, [EOS, question_mark], loaded, "rows.jsonl")
    assert ids.tolist() == tokenizer("1+1=2?")["input_ids"]


def test_the_templates_of_reinforcement_learning_apply(tokenizer, tmp_path):
    rows = [{"prompt": "1+1", "completion": "2"}]
    (ids, learned), = tokens(
        with_template(tokenizer, TURNS), tmp_path, rows,
        prompt_template="chat", system_prompt="be brief", response_prefix="<think>",
    )  # fmt: skip
    assert tokenizer.decode(ids) == "<system>be brief.<user>1+1.<assistant><think>2<eos>"
    assert spoken(tokenizer, ids, learned) == ["2<eos>"]
    ((ids, learned),) = tokens(tokenizer, tmp_path, rows, prompt_template="r1-zero")
    assert tokenizer.decode(ids[~learned]).endswith("<unk>ser<unk> 1+1. <unk>ssistant<unk>")


def test_only_the_assistants_turns_are_learned(tokenizer, tmp_path):
    talk = [*TALK, {"role": "user", "content": "bye"}]  # never answered: nothing to learn from
    chat = with_template(tokenizer, TURNS)
    ((ids, learned),) = tokens(chat, tmp_path, [{"messages": talk}], prompt_template="chat")
    expected = chat.apply_chat_template(TALK, tokenize=False).removesuffix(".")
    assert tokenizer.decode(ids) == expected
    # What the template writes behind the end of a turn is seen, but nobody will generate it.
    assert spoken(tokenizer, ids, learned) == ["2<eos>", "4 yes<eos>"]


def test_a_template_without_an_end_gets_one_behind_the_last_answer(tokenizer, tmp_path):
    chat = with_template(tokenizer, TURNS.replace("<eos>", ""))
    ((ids, learned),) = tokens(chat, tmp_path, [{"messages": TALK}], prompt_template="chat")
    assert spoken(tokenizer, ids, learned) == ["2.", "4 yes.<eos>"]


def test_all_tokens_but_the_first_may_be_learned(tokenizer, tmp_path):
    rows = [{"prompt": "1+1=", "completion": "2"}]
    ((_, learned),) = tokens(tokenizer, tmp_path, rows, completion_only_loss=False)
    assert learned.tolist() == [False] + [True] * 5


def test_blocks_do_not_show(tokenizer, tmp_path, monkeypatch):
    chat = with_template(tokenizer, TURNS)
    rows = [{"prompt": f"{i}+1", "completion": f"{i + 1}"} for i in range(7)]
    rows[3] = {"messages": TALK}
    whole = tokens(chat, tmp_path, rows, prompt_template="chat")
    monkeypatch.setattr(demonstrations, "BLOCK", 2)
    cut = tokens(chat, tmp_path, rows, prompt_template="chat")
    assert len(whole) == 7
    for one, other in zip(whole, cut, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# -- packing ---------------------------------------------------------------------------------------


def test_packed_places_and_tokens_against_a_loop(tokenizer, tmp_path):
    chat = with_template(tokenizer, TURNS)
    rows = [{"prompt": f"{i}" * (i + 1), "completion": "yes" * i + "."} for i in range(6)]
    rows[2] = {"messages": TALK}
    made = tokens(chat, tmp_path, rows, prompt_template="chat")
    flat = Demonstrations.of(*zip(*made, strict=True))
    assert len(flat) == 6 and flat.lengths.tolist() == [len(ids) for ids, _ in made]
    chosen = [4, 2, 5]
    packed, places, targets = flat.micro_batch(chosen, torch.device("cpu"))
    expected = [
        (np.arange(len(ids)) == k, token)
        for ids, learned in (made[row] for row in chosen)
        for k, token in enumerate(ids)
        if learned[k]
    ]
    assert flat.num_learned(np.array(chosen)) == len(expected) == len(places)
    assert targets.tolist() == [int(token) for _, token in expected]
    assert torch.equal(packed.token_ids[places + 1], targets)
    assert packed.token_ids.tolist() == [t for row in chosen for t in made[row][0].tolist()]
    # The predicting row is in the same sequence as its token.
    assert torch.equal(packed.segment_ids[places], packed.segment_ids[places + 1])


# -- rows that are too long ------------------------------------------------------------------------


def fitted(tokenizer, tmp_path, policy):
    rows = [
        {"prompt": "1+1=", "completion": "2"},
        {"prompt": "1+1=", "completion": "2 and so on"},
        {"prompt": "a question longer than the limit", "completion": "no"},
    ]
    settings = config(written(tmp_path, rows), max_length=8, long_rows=policy)
    loaded = load_demonstrations(settings, settings.dataset, {}, None, None)
    made = tokenize(settings, tokenizer, [EOS], loaded, "rows.jsonl")
    return fit(settings, loaded, made, "rows.jsonl")


def test_long_rows_are_an_error_left_out_or_cut(tokenizer, tmp_path):
    with pytest.raises(UserError, match="row 2 has 16 tokens, more than max_length=8"):
        fitted(tokenizer, tmp_path, "error")
    found, kept, counts = fitted(tokenizer, tmp_path, "skip")
    assert len(found) == 1 and [row["row"] for row in kept] == [1]
    assert counts == {"left out": 2, "cut": 0}
    found, kept, counts = fitted(tokenizer, tmp_path, "truncate")
    assert counts == {"left out": 1, "cut": 1}  # nothing of the third row's answer would be left
    assert found.lengths.tolist() == [6, 8] and EOS not in found.token_ids[6:].tolist()
    assert [row["row"] for row in kept] == [1, 2]


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a"}, ["row 1", "'completion'", "columns: prompt"]),
        ({"completion": "a"}, ["row 1", "'prompt'"]),
        ({"question": "a", "answer": "b"}, ["row 1", "answer, question"]),
        ({"prompt": "a", "completion": ""}, ["'completion'", "non-empty", "''"]),
        ({"prompt": " ", "completion": "b"}, ["'prompt'", "non-empty"]),
        ({"prompt": "a", "completion": 3}, ["'completion'", "3"]),
        ({"prompt": 3, "completion": "b"}, ["'prompt'", "3"]),
        ({"prompt": [], "completion": "b"}, ["'prompt'", "list of messages"]),
        ({"messages": "hi"}, ["'messages'", "'hi'"]),
        ({"messages": []}, ["'messages'"]),
        ({"messages": [{"role": "user"}]}, ["'messages'", "content"]),
        ({"messages": TALK[:1]}, ["no assistant turn"]),
        ({"messages": TALK[1:]}, ["begins with the assistant"]),
        ({"messages": [TALK[0], {"role": "assistant", "content": " "}]}, ["role and content"]),
        ({"messages": TALK, "prompt": "a", "completion": "b"}, ["both", "'messages'"]),
    ],
)
def test_rows_that_cannot_be_learned_from(tmp_path, row, words):
    settings = config(written(tmp_path, [row]))
    with pytest.raises(UserError) as caught:
        load_demonstrations(settings, settings.dataset, {}, None, None)
    message = str(caught.value)
    assert "\n" not in message and "rows.jsonl" in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("template", "words"),
    [
        # As DeepSeek-R1's own template does: the reasoning would never be learned.
        (TURNS.replace("m.content", "m.content.split('</think>')[-1]"), "leaves out part"),
        # As several do: an earlier answer is shortened once it is history.
        (
            TURNS.replace(
                "{{ m.content }}",
                "{{ m.content if loop.last else m.content.split('</think>')[-1] }}",
            ),
            "otherwise than when this answer is asked for",
        ),
        # A generation prompt that opens the think tag, which the written turn does not.
        (TURNS.replace("<assistant>{% endif %}", "<assistant><think>?{% endif %}"), "otherwise"),
        ("{{ raise_exception('no such role') }}", "the chat template fails: no such role"),
        (None, "has no chat template"),
    ],
)
def test_chat_templates_that_break_what_is_learned(tokenizer, tmp_path, template, words):
    talk = [dict(message) for message in TALK]
    talk[1]["content"] = talk[3]["content"] = "<think>well</think>2"
    chat = with_template(tokenizer, template)
    with pytest.raises(UserError, match=words):
        tokens(chat, tmp_path, [{"messages": talk}], prompt_template="chat")


def test_options_that_do_not_apply_to_messages(tokenizer, tmp_path):
    chat = with_template(tokenizer, TURNS)
    for name, value in (("prompt_suffix", "be brief"), ("response_prefix", "<think>")):
        with pytest.raises(UserError, match=f"{name}: does not apply to rows with messages"):
            tokens(chat, tmp_path, [{"messages": TALK}], prompt_template="chat", **{name: value})
    with pytest.raises(UserError, match="prompt_template 'none': .* need 'chat'"):
        tokens(chat, tmp_path, [{"messages": TALK}])


def test_a_prefix_must_not_stand_twice(tokenizer, tmp_path):
    rows = [{"prompt": "1+1=", "completion": "<think>2"}]
    with pytest.raises(UserError, match="row 1: the completion begins with response_prefix"):
        tokens(tokenizer, tmp_path, rows, response_prefix="<think>")


OPENING = TURNS.replace("<assistant>{% endif %}", "<assistant><think>\n{% endif %}")


def test_a_think_tag_of_the_users_must_not_stand_twice(tokenizer, tmp_path):
    chat = with_template(tokenizer, TURNS)
    changes = {"prompt_template": "chat", "response_prefix": "<think>\n"}
    rows = [{"prompt": "1+1=", "completion": " <think>well</think>2"}]
    with pytest.raises(UserError, match="row 1: the completion begins with <think>, which"):
        tokens(chat, tmp_path, rows, **changes)
    ((ids, _),) = tokens(chat, tmp_path, [{"prompt": "1+1=", "completion": "2"}], **changes)
    assert tokenizer.decode(ids).count("<think>") == 1


@pytest.mark.parametrize(
    ("completion", "learned"),
    [
        ("<think>well</think>2", "well</think>2<eos>"),  # as grpo-engine sample writes it
        ("<think>\nwell</think>2", "well</think>2<eos>"),  # the template's line break as well
        ("<think> well</think>2", " well</think>2<eos>"),
        (" <think>well</think>2", "well</think>2<eos>"),
        ("well</think>2", "well</think>2<eos>"),
        ("no <think>well</think>2", "no <think>well</think>2<eos>"),
    ],
)
def test_a_think_tag_that_the_template_opens_is_there_once(
    tokenizer, tmp_path, completion, learned
):
    chat = with_template(tokenizer, OPENING)
    rows = [{"prompt": "1+1=", "completion": completion}]
    ((ids, mask),) = tokens(chat, tmp_path, rows, prompt_template="chat")
    assert ids.tolist() == chat(f"<user>1+1=.<assistant><think>\n{learned}")["input_ids"]
    assert spoken(chat, ids, mask) == [learned]
    ((plain, _),) = tokens(with_template(tokenizer, TURNS), tmp_path, rows, prompt_template="chat")
    ends = tokenizer(f"<assistant>{completion}<eos>")["input_ids"]
    assert plain.tolist()[-len(ends) :] == ends, "another template leaves it as it is"


def test_a_tokenizer_that_puts_a_space_before_a_completion(tmp_path):
    vocab = {token: i for i, token in enumerate(["<unk>", "<eos>", "▁", "a", "b"])}
    spaced = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    spaced.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    spaced.decoder = decoders.Metaspace(prepend_scheme="always")
    made = PreTrainedTokenizerFast(tokenizer_object=spaced, eos_token="<eos>")
    with pytest.raises(UserError, match="adds text where a completion begins"):
        tokens(made, tmp_path, [{"prompt": "a", "completion": "b"}])


def test_a_history_that_becomes_other_tokens(tmp_path):
    """The end of one turn and the beginning of the next are one token when they are read at once,
    which is how the model will see them."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<eos>", "a", "b", "ab", "c"])}
    merging = Tokenizer(models.BPE(vocab, [("a", "b")], unk_token="<unk>"))
    merging.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="<eos>")
    made.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    talk = [
        {"role": role, "content": content}
        for role, content in zip(["user", "assistant"] * 2, ["c", "ca", "bc", "c"], strict=True)
    ]
    with pytest.raises(UserError, match="cuts the conversation before an answer otherwise"):
        tokens(made, tmp_path, [{"messages": talk}], prompt_template="chat")
    talk[1]["content"] = "c"
    assert len(tokens(made, tmp_path, [{"messages": talk}], prompt_template="chat")) == 1
