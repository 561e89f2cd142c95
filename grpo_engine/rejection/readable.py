"""The readable format of the cold start, ``<think>{reasoning}</think>{summary}`` (v1 2.3.1: the
reasoning between special tokens, then a summary), and the two ways to bring an answer into it.

By rule: the reasoning tidied, the summary a template with the verified answer filled in. By a chat
model: it refines the reasoning in the language of the question, then writes the summary from it
(v2 B.3.2; the facts of Listing 1 in our words). Either way the result is verified again by whoever
asked for it: a rewriter may change the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from grpo_engine.data import Row
from grpo_engine.rejection.config import SampleConfig
from grpo_engine.rewards.answers import marked_answers, text_after_thinking
from grpo_engine.rewards.judge import question_text
from grpo_engine.rewards.language import prompt_language, split_thinking
from grpo_engine.types import UserError

REASONING_TASK = (
    "Below are a question and the thought process of somebody who answered it. Make the thought "
    "process pleasant to read, in the first person, as if thinking aloud. Keep every step, number "
    "and change of mind in its order, and the result; add nothing that is not there. "
    "Translate the thinking process to the same language as the question. "
    "Reply with the thought process alone."
)
SUMMARY_TASK = (
    "Below are a question and the thought process that led to its answer. Write the solution that "
    "a reader is shown: clear, easy to follow, well laid out, in the language of the question.\n"
    "- Stay faithful to the thought process: no new steps, no conclusion that it does not reach.\n"
    "- Show the key steps that lead to the result, formulas in LaTeX.\n"
    "- {ending}\n"
    "- Be brief, without colloquial words, and do not mention that there was a thought process."
)
BOXED_ENDING = "Put the final answer in \\boxed{}."
CODE_ENDING = "End with the final program in one ```python block."
MATERIALS = "## Question\n{question}\n\n## Thought process\n{thought_process}"
_TAGS = re.compile(r"</?(?:think|answer)>")
_TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Rewritten:
    """A new answer, or why there is none."""

    completion: str | None
    failure: str | None = None


class Rewriter(Protocol):
    def rewrite(self, rows: Sequence[Row], completions: Sequence[str]) -> list[Rewritten]:
        """Each completion of its row in the readable format."""
        ...


def fill(template: str, values: Mapping[str, str]) -> str:
    """``template`` with ``{name}`` replaced for each of ``values``, in one pass: braces in the
    values, or others in the template, stay as they are."""
    return _SLOT.sub(lambda slot: values.get(slot[1], slot[0]), template)


def tidied(text: str) -> str:
    """Without tags, blanks at line ends, and more than one empty line in a row."""
    lines = _TAGS.sub("", text.replace("\r\n", "\n"))
    return _BLANK_LINES.sub("\n\n", _TRAILING.sub("", lines)).strip()


def language_of(row: Row) -> str | None:
    """The code of the row's language: its own, else that of its question."""
    return row.get("language") or prompt_language(question_text(row["prompt"]))


class TemplateRewriter:
    """Tidies the reasoning and writes the summary from ``summary_template``. An answer that marks
    nothing (a program, prose) keeps its own summary."""

    def __init__(self, config: SampleConfig, rows: Sequence[Row]) -> None:
        self.config = config
        self.templates = config.summary_template
        for row in rows:
            code = self._language(row)
            if code not in self.templates:
                raise UserError(
                    f"--summary_template: has none for {code!r}, the language of row {row['row']}; "
                    f"it has {', '.join(sorted(self.templates))}"
                )

    def _language(self, row: Row) -> str:
        """A question without words takes the first template."""
        return str(language_of(row) or next(iter(self.templates))).lower().split("-")[0]

    def rewrite(self, rows: Sequence[Row], completions: Sequence[str]) -> list[Rewritten]:
        return [self._one(*pair) for pair in zip(rows, completions, strict=True)]

    def _one(self, row: Row, completion: str) -> Rewritten:
        reasoning, tail = tidied(split_thinking(completion)[0]), text_after_thinking(completion)
        answers = marked_answers(tail) if tail is not None and row.get("tests") is None else None
        if answers:
            template = self.templates[self._language(row)]
            question = question_text(row["prompt"])
            summary = fill(template, {"answer": answers[-1], "question": question})
        else:
            summary = tidied(split_thinking(completion)[1])
        if not reasoning or not summary:
            missing = "reasoning" if not reasoning else "summary"
            return Rewritten(None, f"the answer has no {missing}")
        parts = {"reasoning": reasoning, "summary": summary}
        return Rewritten(fill(self.config.readable_format, parts))


class ChatRewriter:
    """A chat model refines the reasoning (``rewrite_reasoning``) and writes the summary."""

    def __init__(self, config: SampleConfig, chat_model: Any) -> None:
        self.config, self.chat_model = config, chat_model

    def rewrite(self, rows: Sequence[Row], completions: Sequence[str]) -> list[Rewritten]:
        questions = [question_text(row["prompt"]) for row in rows]
        thoughts: list[str | None] = [tidied(split_thinking(text)[0]) for text in completions]
        if self.config.rewrite_reasoning:
            tasks = [REASONING_TASK for _ in rows]
            thoughts = self._ask("reasoning", tasks, questions, thoughts)
        tasks = [summary_task(row) for row in rows]
        summaries = self._ask("summary", tasks, questions, thoughts)
        return [
            self._laid_out(thought, summary)
            for thought, summary in zip(thoughts, summaries, strict=True)
        ]

    def _ask(
        self,
        part: str,
        tasks: Sequence[str],
        questions: Sequence[str],
        thoughts: Sequence[str | None],
    ) -> list[str | None]:
        """The model's text for each thought; None where there is no thought or no reply."""
        asked = [place for place, thought in enumerate(thoughts) if thought]
        replies = self.chat_model.complete(
            [
                conversation(part, tasks[place], questions[place], thoughts[place], self.config)
                for place in asked
            ],
            seed=self.config.seed,
            temperature=self.config.rewrite_temperature,
            max_tokens=self.config.rewrite_max_tokens,
            whole=True,  # half a chain of thought would be learned as if it were one
        )
        texts: list[str | None] = [None] * len(thoughts)
        for place, reply in zip(asked, replies, strict=True):
            # A model that reasons first does so in a think block of its own.
            said = None if reply is None else text_after_thinking(reply)
            texts[place] = (tidied(said) if said else None) or None
        return texts

    def _laid_out(self, thought: str | None, summary: str | None) -> Rewritten:
        if not thought or not summary:
            why = self.chat_model.first_failure or "an empty or unfinished reply"
            return Rewritten(None, f"no {'summary' if thought else 'reasoning'}: {why}")
        parts = {"reasoning": thought, "summary": summary}
        return Rewritten(fill(self.config.readable_format, parts))


def summary_task(row: Row) -> str:
    ending = BOXED_ENDING if row.get("tests") is None else CODE_ENDING
    return SUMMARY_TASK.replace("{ending}", ending)


def conversation(
    part: str, task: str, question: str, thought: str, config: SampleConfig
) -> list[dict[str, str]]:
    """One request: the task, the examples that show this ``part``, and the material."""
    turns = []
    for example in config.rewrite_examples:
        if part in example:
            turns.append({"role": "user", "content": f"{task}\n\n{fill(MATERIALS, example)}"})
            turns.append({"role": "assistant", "content": example[part]})
    material = fill(MATERIALS, {"question": question, "thought_process": thought})
    return [*turns, {"role": "user", "content": f"{task}\n\n{material}"}]
