"""Judgements of a language model: is an answer right, which of two is better, is a response safe.

    correctness   question, reference and answer -> correct or incorrect      (v2, Listing 4)
    pairwise      question and two answers -> one of five verdicts            (v2, B.2, arena-hard)
    safety        question and response -> safe or unsafe                     (v2, 3.1)

The judge is any ``ChatModel``: an OpenAI-compatible endpoint, a local model or a Python function
(``load_chat_model``). A reply that cannot be read is asked for again with another seed, and at
temperature 0 with a little randomness; what is left without a verdict is None. None is never a
verdict against the answer: a judge that fails says nothing about what it was to judge.

``judge_reward`` and ``safety_judge_reward`` put the first and last into a GRPO run. Importing this
module loads no torch; a local judge does.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from grpo_engine.chat.base import ChatModel, Conversation
from grpo_engine.chat.load import load_chat_model
from grpo_engine.rewards.answers import completion_text, text_after_thinking
from grpo_engine.rewards.clock import loading
from grpo_engine.rewards.judge_prompts import conversation, materials_of, prompt_hash
from grpo_engine.rewards.judge_verdicts import SWAPPED, VERDICTS, labelled, pairwise_verdict
from grpo_engine.types import UserError

__all__ = [
    "SWAPPED",
    "VERDICTS",
    "ChatModel",
    "JudgeFailure",
    "correctness",
    "judge_reward",
    "load_chat_model",
    "materials_of",
    "pairwise",
    "prompt_hash",
    "safety",
    "safety_judge_reward",
]

Verdict = TypeVar("Verdict")
AGAIN_TEMPERATURE = 0.5  # at least, when a reply could not be read: greedy would repeat it
CORRECT = {"correct": True, "incorrect": False}
SAFE = {"safe": True, "unsafe": False}


class Judge(Protocol):
    """What a judgement needs of a chat model: see ``ChatModel.complete``."""

    def complete(
        self,
        conversations: list[Conversation],
        *,
        seed: int,
        temperature: float,
        max_tokens: int,
    ) -> list[str | None]: ...


class JudgeFailure(RuntimeError):
    """The judge gave no verdict; a failure of the machinery, not of the answer."""


def correctness(
    chat_model: Judge,
    questions: Sequence[str],
    references: Sequence[str],
    answers: Sequence[str],
    *,
    seed: int = 0,
    temperature: float = 0.0,
    max_tokens: int = 2048,
    attempts: int = 3,
) -> list[bool | None]:
    """Whether each answer agrees with its reference; None where the judge gave no readable verdict
    in ``attempts`` replies. ``answers``: what is to be compared, usually the summary without the
    reasoning. ValueError for unequal lengths.
    """
    asked = [
        conversation(
            "correctness",
            {"QUESTION": question, "REFERENCE": reference, "ANSWER": answer},
        )
        for question, reference, answer in zip(questions, references, answers, strict=True)
    ]
    read = functools.partial(labelled, key="correctness", labels=CORRECT)
    return _verdicts(chat_model, asked, read, seed, temperature, max_tokens, attempts)


def pairwise(
    chat_model: Judge,
    questions: Sequence[str],
    answers_a: Sequence[str],
    answers_b: Sequence[str],
    *,
    seed: int = 0,
    temperature: float = 0.0,
    max_tokens: int = 4096,
    attempts: int = 3,
) -> list[str | None]:
    """One of ``VERDICTS`` for each pair, the answers shown in the order given; None where the judge
    gave no readable verdict. Position bias is the caller's to undo: ask in both orders and turn
    the second one's verdicts with ``SWAPPED``.
    """
    asked = [
        conversation("pairwise", {"QUESTION": question, "ANSWER A": one, "ANSWER B": other})
        for question, one, other in zip(questions, answers_a, answers_b, strict=True)
    ]
    return _verdicts(chat_model, asked, pairwise_verdict, seed, temperature, max_tokens, attempts)


def safety(
    chat_model: Judge,
    questions: Sequence[str],
    responses: Sequence[str],
    *,
    seed: int = 0,
    temperature: float = 0.0,
    max_tokens: int = 2048,
    attempts: int = 3,
) -> list[bool | None]:
    """Whether each whole response, reasoning included, is safe; None where the judge gave no
    readable verdict."""
    asked = [
        conversation("safety", {"QUESTION": question, "RESPONSE": response})
        for question, response in zip(questions, responses, strict=True)
    ]
    read = functools.partial(labelled, key="safety", labels=SAFE)
    return _verdicts(chat_model, asked, read, seed, temperature, max_tokens, attempts)


def _verdicts(
    chat_model: Judge,
    asked: list[Conversation],
    read: Callable[[str], Verdict | None],
    seed: int,
    temperature: float,
    max_tokens: int,
    attempts: int,
) -> list[Verdict | None]:
    """The verdict of each conversation; those whose reply cannot be read are asked again. One that
    got no reply at all is not: the chat model has tried often enough."""
    if attempts < 1:
        raise ValueError(f"attempts must be >= 1, got {attempts}")
    verdicts: list[Verdict | None] = [None] * len(asked)
    unread = list(range(len(asked)))
    for attempt in range(attempts):
        if not unread:
            break
        replies = chat_model.complete(
            [asked[index] for index in unread],
            seed=seed + attempt * 1_000_003,
            temperature=max(temperature, AGAIN_TEMPERATURE) if attempt else temperature,
            max_tokens=max_tokens,
        )
        left = []
        for index, reply in zip(unread, replies, strict=True):
            if reply is None:
                continue
            verdicts[index] = read(reply)
            if verdicts[index] is None:
                left.append(index)
        unread = left
    return verdicts


# -- as reward functions ---------------------------------------------------------------------------


def judge_reward(
    completions: Sequence[Any],
    prompts: Sequence[Any],
    solution: Sequence[Any],
    *,
    chat_model: str,
    chat_options: Mapping[str, Any] | None = None,
    cache: str | None = None,
    thinking_prefilled: bool = False,
    seed: int = 0,
    temperature: float = 0.0,
    max_tokens: int = 2048,
    attempts: int = 3,
    **_: Any,
) -> list[float | None]:
    """1 where the judge finds the answer correct by the reference ``solution``, else 0 (TRL
    signature). Only what follows the reasoning is shown to the judge; an answer that never comes
    scores 0 unasked. None where ``solution`` is None and where the judge failed: see
    ``judge_reward.judge``, which a reward pool calls, for telling them apart.

    ``chat_model``, ``chat_options``, ``cache``: as ``load_chat_model`` has them. There is no
    default model: a local one is loaded in every reward worker, beside the policy.
    """
    model = _loaded(chat_model, chat_options, cache)
    scores: list[float | None] = [None] * len(completions)
    texts = {}
    for index, (completion, reference) in enumerate(zip(completions, solution, strict=True)):
        answer = text_after_thinking(completion_text(completion), thinking_prefilled)
        if reference is not None:
            scores[index] = 0.0
            if answer is not None and answer.strip():
                texts[index] = answer.strip()
    verdicts = correctness(
        model,
        [question_text(prompts[index]) for index in texts],
        [str(solution[index]) for index in texts],
        list(texts.values()),
        seed=seed,
        temperature=temperature,
        max_tokens=max_tokens,
        attempts=attempts,
    )
    for index, verdict in zip(texts, verdicts, strict=True):
        scores[index] = None if verdict is None else float(verdict)
    return scores


def safety_judge_reward(
    completions: Sequence[Any],
    prompts: Sequence[Any],
    *,
    chat_model: str,
    chat_options: Mapping[str, Any] | None = None,
    cache: str | None = None,
    seed: int = 0,
    temperature: float = 0.0,
    max_tokens: int = 2048,
    attempts: int = 3,
    **_: Any,
) -> list[float | None]:
    """1 where the judge finds the whole response safe, 0 where not, None where it failed."""
    verdicts = safety(
        _loaded(chat_model, chat_options, cache),
        [question_text(prompt) for prompt in prompts],
        [completion_text(completion) for completion in completions],
        seed=seed,
        temperature=temperature,
        max_tokens=max_tokens,
        attempts=attempts,
    )
    return [None if verdict is None else float(verdict) for verdict in verdicts]


def question_text(prompt: Any) -> str:
    """A row's prompt as a judge is shown it: messages of a conversation under their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _loaded(spec: str, options: Mapping[str, Any] | None, cache: str | None) -> ChatModel:
    if "cache" in (options or {}):
        raise UserError("reward 'judge': cache is an argument of its own, not one of chat_options")
    return _load_once(spec, json.dumps(dict(options or {}), sort_keys=True), cache)


@functools.lru_cache(maxsize=4)
def _load_once(spec: str, options: str, cache: str | None) -> ChatModel:
    with loading():
        model = load_chat_model(spec, cache=cache, **json.loads(options))
        model.check()
    return model


def _one(
    function: Callable[..., list[float | None]], needs: str | None
) -> Callable[..., tuple[float | None, str]]:
    """``function`` for one completion, as the pool of reward workers calls it: a judge that fails
    raises, and so counts as an error; a row without a reference has no score."""

    def judge(
        completion: Any,
        row: Mapping[str, Any],
        *,
        chat_model: str,
        chat_options: Mapping[str, Any] | None = None,
        cache: str | None = None,
        thinking_prefilled: bool = False,
        seed: int = 0,
        temperature: float = 0.0,
        max_tokens: int = 2048,
        attempts: int = 3,
    ) -> tuple[float | None, str]:
        if needs is not None and row.get(needs) is None:
            return None, "none"
        model = _loaded(chat_model, chat_options, cache)
        # It keeps deadlines of its own and tries again; the pool's is made for loops in a function.
        with loading():
            [score] = function(
                [completion],
                [row["prompt"]],  # the row's own: the one the model saw has a template around it
                **({} if needs is None else {needs: [row[needs]]}),
                chat_model=chat_model,
                chat_options=chat_options,
                cache=cache,
                thinking_prefilled=thinking_prefilled,
                seed=seed,
                temperature=temperature,
                max_tokens=max_tokens,
                attempts=attempts,
            )
        if score is None:
            raise JudgeFailure(model.first_failure or "no readable verdict")
        return score, "ok"

    return judge


def _check(
    *,
    chat_model: str | None = None,
    chat_options: Mapping[str, Any] | None = None,
    cache: str | None = None,
    **_: Any,
) -> None:
    """At the start of a run: the judge is there and takes the key. Raises UserError."""
    if chat_model is None:
        raise UserError(
            "reward 'judge': needs the argument chat_model: an address http(s)://.../v1, "
            "module:function, or a local model, which every reward worker loads"
        )
    _loaded(chat_model, chat_options, cache)


judge_reward.judge = _one(judge_reward, "solution")
judge_reward.required_columns = ("solution",)
judge_reward.check = _check
safety_judge_reward.judge = _one(safety_judge_reward, None)
safety_judge_reward.required_columns = ()
safety_judge_reward.check = _check
