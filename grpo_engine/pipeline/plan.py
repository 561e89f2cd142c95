"""``--dry-run``: what would be made from what, what it would cost, and what stands in its way; of
a stage on its own, what it would cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from grpo_engine.pipeline.budget import Budget, Budgets
from grpo_engine.pipeline.config import PipelineConfig, leaves, place_of
from grpo_engine.pipeline.freshness import Freshness, Verdict, missing_files
from grpo_engine.pipeline.memory import SAMPLING, STATIC, UPDATE, on_gpu
from grpo_engine.pipeline.outcome import WIDE
from grpo_engine.pipeline.stages import STAGES, Stage
from grpo_engine.progress import counted
from grpo_engine.settings import Settings


def print_plan(
    config: PipelineConfig, stages: list[Stage], chosen: list[Stage], freshness: Freshness
) -> None:
    """Everything was checked before; nothing is written."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    budgets = Budgets(stages).found
    names = {stage.name for stage in chosen}
    verdicts = freshness.verdicts(names)
    print(f"{counted(len(stages), 'stage')} in {config.output_dir}")
    console.print(_stage_table(stages, names, budgets, verdicts))
    if any(budget.memory is not None for budget in budgets.values()):
        console.print(_memory_table(stages, budgets))
    print(_tokens_text([budgets[stage.name] for stage in chosen]))
    for words in _notes(stages, chosen, budgets):
        print(words)


def _tokens_text(budgets: list[Budget]) -> str:
    """The sum is a bound only where every stage's is known."""
    counted_on = [b for b in budgets if b.samples or b.trains]
    unknown = [
        b
        for b in counted_on
        if (b.samples and b.generated is None) or (b.trains and b.trained is None)
    ]
    generated = sum(b.generated or 0 for b in counted_on)
    trained = sum(b.trained or 0 for b in counted_on)
    words = f"{count(generated)} generated, {count(trained)} trained on"
    if not unknown:
        return f"tokens, at most: {words}"
    return (
        f"tokens, known stages only: at most {words}; {len(unknown)} of {len(counted_on)} stages "
        "unknown, see ? above"
    )


def _stage_table(
    stages: list[Stage],
    chosen: set[str],
    budgets: dict[str, Budget],
    verdicts: dict[str, Verdict],
) -> Table:
    table = Table(title="Stages", title_justify="left")
    for heading in ("", "stage", "verb", "from", "weights"):
        table.add_column(heading, overflow="fold")
    for heading in ("steps", "generated", "trained", "memory"):
        table.add_column(heading, justify="right")
    table.add_column("will")
    for number, stage in enumerate(stages, start=1):
        budget = budgets[stage.name]
        peak = None if budget.memory is None else budget.memory.peak
        table.add_row(
            str(number),
            stage.name,
            stage.kind_name,
            sources_text(stage),
            "?" if budget.shape is None else count(budget.shape.parameters),
            "" if budget.steps is None else f"{budget.steps:,}",
            count(budget.generated) if budget.samples else "",
            count(budget.trained) if budget.trains else "",
            "?" if peak is None else size(peak),
            _will(stage, chosen, verdicts[stage.name]),
        )
    return table


def sources_text(stage: Stage) -> str:
    """``{r1-zero}, train.jsonl``: the model and data, and what else refers to other stages."""
    main = [getattr(stage.config, name, None) for name in ("model", "dataset", "data")]
    shown = [value for value in main if isinstance(value, str)]
    shown += [str(r) for r in stage.references.values() if str(r) not in shown]
    return ", ".join(shown)


def _will(stage: Stage, chosen: set[str], verdict: Verdict) -> str:
    if stage.name not in chosen:
        return "stay"
    if verdict.action == "keep":
        return "stay: unchanged" + (f", {verdict.note}" if verdict.note else "")
    words = {"run": "run", "resume": "go on", "wait": "run"}[verdict.action]
    return words if verdict.reason == "new" else f"{words}: {verdict.reason}"


def _memory_table(stages: list[Stage], budgets: dict[str, Budget]) -> Table:
    """Its formulas are in ``memory``'s docstring."""
    names = list(
        dict.fromkeys(n for b in budgets.values() if b.memory is not None for n in b.memory.terms)
    )
    table = Table(title="Memory, estimated", title_justify="left")
    table.add_column("stage", overflow="fold")
    for heading in (*names, "peak"):
        table.add_column(heading, justify="right")
    for stage in stages:
        memory = budgets[stage.name].memory
        if memory is not None:
            cells = [size(memory.terms[n]) if n in memory.terms else "" for n in names]
            table.add_row(stage.name, *cells, size(memory.peak))
    return table


def _notes(stages: list[Stage], chosen: list[Stage], budgets: dict[str, Budget]) -> list[str]:
    notes = []
    for unknown in dict.fromkeys(b.unknown for b in budgets.values() if b.unknown):
        notes.append(f"size and memory unknown: {unknown}")
    needed: dict[str, list[str]] = {}
    for stage, files in missing_files(chosen).items():
        for _, text in files:
            needed.setdefault(text, []).append(stage)
    for text, names in needed.items():
        notes.append(f"not there yet: {text} (for {', '.join(dict.fromkeys(names))})")
    notes += _on_top(chosen, budgets) + _needed_beside(chosen)
    if any(b.memory is not None for b in budgets.values()):
        where = (
            "GPU" if any(on_gpu(s.config) for s in stages if hasattr(s.config, "device")) else "CPU"
        )
        notes.append(
            f"memory: peak = weights, bf16 copies, optimiser, reference, reward models, and the "
            f"larger of sampling and update; for a {where}"
        )
    return notes


def _on_top(chosen: list[Stage], budgets: dict[str, Budget]) -> list[str]:
    """What the tokens leave out."""
    more = []
    if any(budgets[stage.name].held_out is None for stage in chosen):
        more.append("held-out answers")
    if any(_chat_models(stage) for stage in chosen):
        more.append("what judges and rewriters read and write")
    return [f"tokens that come on top: {' and '.join(more)}"] if more else []


def _needed_beside(chosen: list[Stage]) -> list[str]:
    """Endpoints, models that are not the stage's own, and people."""
    endpoints: dict[str, list[str]] = {}
    models: dict[str, list[str]] = {}
    notes = []
    for stage in chosen:
        for path, value in leaves(stage.config.model_dump(mode="json")):
            if not isinstance(value, str) or path in stage.references:
                continue
            if value.startswith(("http://", "https://")):
                endpoints.setdefault(value, []).append(stage.name)
            elif _is_other_model(path, value):
                models.setdefault(value, []).append(stage.name)
        for name in stage.kind.written:
            edits = getattr(stage.config, name, None)
            if edits and not Path(edits).expanduser().exists():
                notes.append(
                    f"stops at {stage.name} until a person has edited {edits}, which it writes"
                )
    for what, found in (("endpoints", endpoints), ("more models", models)):
        for value, names in found.items():
            notes.append(f"{what}: {value} (for {', '.join(dict.fromkeys(names))})")
    return notes


def _is_other_model(path: str, value: str) -> bool:
    """Of a generator, or one that judges or rewrites; not a function that does."""
    if path.startswith("generators."):
        return place_of(path) == "model"
    chat = path in ("judge", "rewrite") or path.endswith(".chat_model")
    return chat and value != "template" and ":" not in value


def _chat_models(stage: Stage) -> list[str]:
    """The judge and the rewriter of a stage, and the chat models of its rewards."""
    given = leaves(stage.content())
    return [
        value
        for path, value in given
        if path in ("judge", "rewrite") or path.endswith(".chat_model")
        if value is not None and value != "template"
    ]


def print_estimate(verb: str, config: Settings) -> None:
    """Tokens and memory of a stage on its own, before anything of it is loaded: from its settings,
    the number of its rows and the model's config."""
    stage = Stage("", verb, STAGES[verb], config, Path(config.output_dir))
    budget = Budgets([stage]).found[""]
    print(f"{'budget':<10} {_budget_text(config, budget)}")
    print(f"{'memory':<10} {_memory_text(config, budget)}", flush=True)


def _budget_text(config: Any, budget: Budget) -> str:
    tokens = {}
    if budget.samples:
        tokens["generated"] = budget.generated
    if budget.trains:
        tokens["trained on"] = budget.trained
    if not tokens:
        return "no tokens: the answers are given"
    if None in tokens.values():
        source = config.dataset if hasattr(config, "dataset") else config.data
        return f"unknown until the rows of {source} are loaded"
    words = {what: f"{count(number)} tokens {what}" for what, number in tokens.items()}
    if budget.held_out:
        words["generated"] += f" ({count(budget.held_out)} of them held-out answers)"
    steps = "" if budget.steps is None else f", in {counted(budget.steps, 'step')}"
    on_top = "; held-out answers come on top" if budget.held_out is None else ""
    return f"at most {' and '.join(words.values())}{steps}{on_top}"


def _memory_text(config: Any, budget: Budget) -> str:
    if not (budget.samples or budget.trains):
        return "no model answers"
    if budget.memory is None:
        return f"unknown: {budget.unknown}"
    terms = budget.memory.terms

    def listed(names: tuple[str, ...]) -> str:
        return ", ".join(f"{name} {size(terms[name])}" for name in names if name in terms)

    phases = {"sampling": listed(SAMPLING), "update": listed(UPDATE)}
    found = [f"{name} ({words})" for name, words in phases.items() if words]
    larger = ", and " + ("the larger of " if len(found) > 1 else "") if found else ""
    judge, without = getattr(config, "judge", None), []
    if hasattr(config, "resolved_judge"):
        judge = config.resolved_judge[0]
    if budget.samples and getattr(config, "generator", "hf") == "vllm":
        without.append("the vLLM engine")
    if judge and not judge.startswith("http"):
        without.append("the judge")
    beside = f"; without {' and '.join(without)}" if without else ""
    return (
        f"about {size(budget.memory.peak)} on a {'GPU' if on_gpu(config) else 'CPU'}, of "
        f"{count(budget.shape.parameters)} weights: {listed(STATIC)}{larger}"
        f"{' and '.join(found)}{beside}"
    )


def count(number: int | None) -> str:
    """``632 k``, ``1.4 M``, ``671 B``, ``3.2 T``; "?" for None."""
    if number is None:
        return "?"
    for unit, scale in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return str(number)


def size(bytes_: int) -> str:
    """``1.4 GB`` (10^9)."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if bytes_ >= scale:
            return f"{bytes_ / scale:.3g} {unit}"
    return f"{bytes_} B"
