"""Prompt templates: the paper's, word for word; the tokenizer's own; none."""

from types import SimpleNamespace

import pytest

from grpo_engine.templates import BOXED_SUFFIX, render_prompt
from grpo_engine.types import UserError

# DeepSeek-R1 (arXiv 2501.12948v1), Table 1, with the question put in.
GOLDEN = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant "
    "solves it. The assistant first thinks about the reasoning process in the mind and then "
    "provides the user with the answer. The reasoning process and answer are enclosed within "
    "<think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process "
    "here </think> <answer> answer here </answer>. User: What is 1 + 1?. Assistant:"
)


class ChatTokenizer:
    """Renders messages visibly; stands in for a tokenizer that has a chat template."""

    name_or_path = "chatty"
    chat_template = "{{ messages }}"

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        assert tokenize is False and add_generation_prompt is True
        return "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]"


def test_r1_zero_is_the_printed_template():
    assert render_prompt({"prompt": "What is 1 + 1?"}, "r1-zero") == GOLDEN


def test_braces_in_the_question_survive():
    question = r"Solve {x} in \boxed{prompt} and {prompt}"
    assert f"User: {question}. Assistant:" in render_prompt({"prompt": question}, "r1-zero")


def test_none_passes_the_prompt_through():
    assert render_prompt({"q": "1+1="}, "none", prompt_column="q") == "1+1="
    messages = [{"role": "user", "content": "1+1="}]
    assert render_prompt({"prompt": messages}, "none") == "1+1="


def test_chat_adds_system_prompt_and_suffix():
    text = render_prompt(
        {"prompt": "1+1?"}, "chat", ChatTokenizer(), system_prompt="Be exact.", suffix=BOXED_SUFFIX
    )
    assert text == (
        "[system]Be exact.[user]1+1?\nPlease reason step by step, and put your final answer within "
        r"\boxed{}.[assistant]"
    )


def test_chat_keeps_the_rows_own_messages_and_leaves_the_row_alone():
    row = {
        "prompt": [
            {"role": "system", "content": "own"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
    }
    text = render_prompt(row, "chat", ChatTokenizer(), system_prompt="ignored", suffix="S")
    assert text == "[system]own[user]a[assistant]b[user]c\nS[assistant]"
    assert row["prompt"][3]["content"] == "c"


@pytest.mark.parametrize(
    ("row", "template", "tokenizer", "options", "message"),
    [
        ({"prompt": "q"}, "r1", None, {}, "one of r1-zero, chat, none, got 'r1'"),
        ({"prompt": "q"}, "chat", SimpleNamespace(chat_template=None), {}, "no chat template"),
        ({"question": "q"}, "none", None, {}, "'prompt' is not in the row; columns: question"),
        ({"prompt": "q"}, "none", None, {"system_prompt": "s"}, "system_prompt needs template"),
        (
            {"prompt": [{"role": "user", "content": "a"}] * 2},
            "r1-zero",
            None,
            {},
            "got 2 messages",
        ),
    ],
)
def test_mistakes_are_named(row, template, tokenizer, options, message):
    with pytest.raises(UserError, match=message) as caught:
        render_prompt(row, template, tokenizer, **options)
    assert "\n" not in str(caught.value)


class EchoTokenizer:
    """A chat template that shows roles and contents."""

    chat_template = "echo"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]"


def test_few_shot_turns_stand_between_system_and_question_and_the_prefix_comes_last():
    text = render_prompt(
        {"prompt": "q"},
        "chat",
        EchoTokenizer(),
        system_prompt="s",
        few_shot=[{"prompt": "p1", "completion": "c1"}],
        response_prefix="<think>",
    )
    assert text == "[system]s[user]p1[assistant]c1[user]q[assistant]<think>"
    assert render_prompt({"prompt": "q"}, "none", response_prefix="<think>") == "q<think>"


@pytest.mark.parametrize("template", ["none", "r1-zero"])
def test_few_shot_needs_the_chat_template(template):
    with pytest.raises(UserError, match="few_shot needs template 'chat'"):
        render_prompt({"prompt": "q"}, template, few_shot=[{"prompt": "p", "completion": "c"}])


def test_a_broken_example_is_named():
    with pytest.raises(
        UserError, match="few_shot example 1 must have prompt and completion, got answer"
    ):
        render_prompt({"prompt": "q"}, "chat", EchoTokenizer(), few_shot=[{"answer": "c"}])
