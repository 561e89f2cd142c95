"""From a row's prompt to the text the model sees. A leaf: imports only ``types``.

``r1-zero`` is the template of DeepSeek-R1 (version 1, Table 1), word for word; it ends at
"Assistant:" and does not open the think tag. ``chat`` is the tokenizer's own chat template, with an
optional system prompt and an optional suffix to the question. ``none`` passes the prompt through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grpo_engine.types import UserError

R1_ZERO_TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. The reasoning process and answer are enclosed within <think> </think> "
    "and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
    "<answer> answer here </answer>. User: {prompt}. Assistant:"
)
BOXED_SUFFIX = r"Please reason step by step, and put your final answer within \boxed{}."
TEMPLATES = ("r1-zero", "chat", "none")


def render_prompt(
    row: Mapping[str, Any],
    template: str,
    tokenizer: Any = None,
    prompt_column: str = "prompt",
    *,
    system_prompt: str | None = None,
    suffix: str | None = None,
    few_shot: Sequence[Mapping[str, str]] = (),
    response_prefix: str | None = None,
) -> str:
    """The text of one prompt.

    ``row[prompt_column]`` is a string or a list of ``{"role", "content"}`` messages; ``r1-zero``
    and ``none`` take messages only if there is a single one, from the user. ``suffix`` is
    appended to the last user message after a newline. ``system_prompt`` belongs to ``chat`` and
    goes before messages that have none of their own; ``few_shot`` examples ({"prompt",
    "completion"}) become turns before the row's own. ``response_prefix`` ends the prompt: the
    answer continues it. Raises UserError naming the field and the value.
    """
    require_template(template, tokenizer)
    messages = _messages(row, prompt_column)
    if suffix:
        messages = _with_suffix(messages, suffix)
    if template == "chat":
        if system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system_prompt}, *messages]
        messages = _with_examples(messages, few_shot)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text + (response_prefix or "")
    for name, value in (("system_prompt", system_prompt), ("few_shot", few_shot)):
        if value:
            raise UserError(f"{name} needs template 'chat', got template {template!r}")
    if len(messages) != 1:
        raise UserError(
            f"template {template!r} needs one user message in {prompt_column!r}, "
            f"got {len(messages)} messages; use template 'chat'"
        )
    text = messages[0]["content"]
    if template == "r1-zero":  # str.format would trip over braces in the question
        text = R1_ZERO_TEMPLATE.replace("{prompt}", text)
    return text + (response_prefix or "")


def require_template(template: str, tokenizer: Any) -> None:
    """UserError for an unknown template name, or for ``chat`` without a chat template."""
    if template not in TEMPLATES:
        raise UserError(f"template must be one of {', '.join(TEMPLATES)}, got {template!r}")
    if template == "chat" and not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or "of this model"
        raise UserError(
            f"template 'chat': the tokenizer {name} has no chat template; "
            "use template 'r1-zero' or 'none'"
        )


def _messages(row: Mapping[str, Any], prompt_column: str) -> list[dict[str, str]]:
    if prompt_column not in row:
        raise UserError(
            f"prompt_column {prompt_column!r} is not in the row; columns: {', '.join(sorted(row))}"
        )
    prompt = row[prompt_column]
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [dict(message) for message in prompt]


def _with_examples(
    messages: list[dict[str, str]], few_shot: Sequence[Mapping[str, str]]
) -> list[dict[str, str]]:
    turns = []
    for number, example in enumerate(few_shot, start=1):
        if set(example) != {"prompt", "completion"}:
            raise UserError(
                f"few_shot example {number} must have prompt and completion, got "
                f"{', '.join(sorted(example)) or 'nothing'}"
            )
        turns.append({"role": "user", "content": example["prompt"]})
        turns.append({"role": "assistant", "content": example["completion"]})
    split = 1 if messages[0]["role"] == "system" else 0
    return [*messages[:split], *turns, *messages[split:]]


def _with_suffix(messages: list[dict[str, str]], suffix: str) -> list[dict[str, str]]:
    last = max(
        (index for index, message in enumerate(messages) if message["role"] == "user"), default=None
    )
    if last is None:
        raise UserError("suffix: the prompt has no user message to append to")
    changed = {**messages[last], "content": f"{messages[last]['content']}\n{suffix}"}
    return [*messages[:last], changed, *messages[last + 1 :]]
