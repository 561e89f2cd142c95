"""Everything loaded and checked before anything is written, what the data will come from, and the
plan of a dry run."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from grpo_engine.checkpoint import file_sha256
from grpo_engine.data import Row
from grpo_engine.filters import Decontamination
from grpo_engine.manifest import rows_sha256
from grpo_engine.rejection.config import SampleConfig
from grpo_engine.rejection.draw import Drawing, Shelf
from grpo_engine.rejection.generators import load_questions, make_generator, test_questions
from grpo_engine.rejection.mix import General
from grpo_engine.rejection.readable import ChatRewriter, Rewriter, TemplateRewriter
from grpo_engine.rejection.select import Rules
from grpo_engine.rejection.verify import Verifier
from grpo_engine.rejection.work import Work
from grpo_engine.rewards.judge import ChatModel, load_chat_model
from grpo_engine.rewards.language import measure_language
from grpo_engine.sampling.samples import fingerprint
from grpo_engine.types import UserError


def prepare(config: SampleConfig, stack: ExitStack) -> Work:
    """Load rows, models, rewards and judge; everything the user can have wrong is found here."""
    rows = load_questions(config)
    _check_languages(config, rows)
    tests, tests_sha = None, None
    if config.decontaminate is not None:
        questions = list(test_questions(config))
        tests = Decontamination(questions, size=config.decontaminate_words)
        tests_sha = fingerprint(questions)
    rules = Rules(config, tests)
    general = General(config, tests) if config.general_dataset is not None else None
    contaminated = {row["row"] for row in rows if rules.is_test_question(row)}
    if len(contaminated) == len(rows):
        raise UserError(
            f"--decontaminate {config.decontaminate}: every row of {config.dataset} shares "
            f"{config.decontaminate_words} words in a row with it"
        )
    models = _ChatModels(stack)
    judge = models.get(config.judge, config.judge_options)
    rewriter = make_rewriter(config, rows, models)
    verifier = Verifier(config, rows, judge, stack)
    shelf = Shelf(config)
    stack.callback(shelf.close)
    generators, tokenizer = [], None
    for one, settings in config.resolved_generators():
        model = shelf.model_of(settings.model)
        tokenizer = tokenizer or model.policy.tokenizer
        generators.append(make_generator(one, settings, model, rows, contaminated))
        del model  # or it would still be there while the next is loaded
    return Work(
        config=config,
        rows={row["row"]: row for row in rows},
        generators=generators,
        contaminated=contaminated,
        drawing=Drawing(config, generators, verifier, shelf),
        rules=rules,
        rewriter=rewriter,
        general=general,
        chat_models=list(models.loaded.values()),
        tokenizer=tokenizer,
        tests_sha256=tests_sha,
    )


class _ChatModels:
    """Loaded once each: the judge and the rewriter may be the same model."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack, self.loaded = stack, {}

    def get(self, spec: str | None, options: dict[str, Any]) -> ChatModel | None:
        if spec is None:
            return None
        key = fingerprint(spec, options)
        if key not in self.loaded:
            model = load_chat_model(spec, **options)
            self.stack.callback(model.close)
            model.check()
            self.loaded[key] = model
        return self.loaded[key]


def make_rewriter(config: SampleConfig, rows: list[Row], models: _ChatModels) -> Rewriter | None:
    if config.rewrite is None:
        return None
    if config.rewrite == "template":
        return TemplateRewriter(config, rows)
    return ChatRewriter(config, models.get(config.rewrite, config.rewrite_options))


def _check_languages(config: SampleConfig, rows: list[Row]) -> None:
    """A language that the filter does not know, or cannot tell from English, is found now."""
    if config.min_language_share is None and config.max_off_script_characters is None:
        return
    for code in dict.fromkeys(row.get("language") for row in rows):
        if code is not None:
            measure_language("word", code)


def inputs_of_samples(work: Work) -> dict[str, dict[str, Any]]:
    """What samples and verdicts come from, by content: another is another run."""
    rows = list(work.rows.values())
    inputs = {
        "dataset": {
            "source": work.config.dataset,
            "rows": len(rows),
            "sha256": rows_sha256(rows),
        },
        "verifier": work.drawing.verifier.identity(),
    }
    for one in work.generators:
        shown = {"prompts_sha256": one.prompts_sha256(), **one.inputs()}
        inputs[f"generator {one.name}"] = {**one.model, **shown}
    return inputs


def inputs_of(work: Work) -> dict[str, dict[str, Any]]:
    """All that the data come from."""
    config, found = work.config, inputs_of_samples(work)
    if work.general is not None:
        rows = work.general.rows
        sha = rows_sha256(rows)
        found["general_dataset"] = {
            "source": config.general_dataset,
            "rows": len(rows),
            "sha256": sha,
        }
    if config.decontaminate is not None:
        found["decontamination"] = {
            "source": config.decontaminate,
            "words": config.decontaminate_words,
            "sha256": work.tests_sha256,
        }
    if isinstance(work.rewriter, ChatRewriter):
        found["rewriter"] = {"identity": work.rewriter.chat_model.identity}
    edits = Path(config.edit_file).expanduser() if config.edit_file else None
    if edits is not None and edits.is_file():
        found["edit_file"] = {"source": str(config.edit_file), "sha256": file_sha256(edits)}
    return found


def plan(work: Work) -> list[tuple[str, str]]:
    """The plan of a dry run, with the most tokens that it may draw."""
    config = work.config
    count = len(work.rows) - len(work.contaminated)
    lines = [("prompts", f"{count} of {len(work.rows)} rows of {config.dataset}")]
    budget = 0
    for one in work.generators:
        drawn = one.config
        prompts = sum(row not in work.contaminated for row in one.of_row)
        total = prompts * drawn.num_samples
        budget += total * drawn.max_completion_length
        lines.append(
            (
                one.name,
                f"{drawn.model}: {prompts} x {drawn.num_samples} = {total:,} samples of at "
                f"most {drawn.max_completion_length:,} tokens, temperature "
                f"{drawn.temperature:g}, top_p {drawn.top_p:g}",
            )
        )
    judges = [*config.reward_funcs, *([f"judge {config.judge}"] if config.judge else [])]
    cap = f", {config.max_per_prompt} a prompt" if config.max_per_prompt else ""
    lines += [
        ("tokens", f"at most {budget:,} drawn"),
        ("right", f"by {', '.join(judges)}"),
        ("kept", config.keep + cap),
    ]
    if config.rewrite is not None:
        lines.append(("rewritten", f"by {config.rewrite}, verified again"))
    if config.edit_file is not None:
        lines.append(("edited", f"in {config.edit_file}, verified again"))
    if work.general is not None:
        share = "all" if config.general_share is None else f"{config.general_share:g} of the mix"
        rows = len(work.general.rows)
        lines.append(("mixed in", f"{share} ({rows} rows of {config.general_dataset})"))
    prompt = json.dumps(work.generators[0].prompts[0].text, ensure_ascii=False)
    lines.append(("prompt", prompt))
    return lines
