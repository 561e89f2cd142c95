"""What a run reports of its data: the paper's Table 5 (samples, average tokens and rounds by
domain), and what became of every sample that was drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grpo_engine.evaluation.samples import Cell
from grpo_engine.rejection.draw import Draw
from grpo_engine.rejection.select import REASONS

KEPT = "kept"
POLICIES = {
    "tokens": "of all assistant text of a row, by the tokenizer of the first generator's model",
    "rounds": "assistant turns of a row, the completion included",
    "rejected": "each sample counts once, under the first reason in this order",
    "solve_rate": "of a prompt: its answers that are verified right / all its answers; one cut by "
    "the cap or not verifiable is not right",
}


def assistant_texts(row: Mapping[str, Any]) -> list[str]:
    """What the assistant says in an SFT row: ``messages``, or ``prompt`` and ``completion``."""
    if row.get("messages") is not None:
        return [one["content"] for one in row["messages"] if one["role"] == "assistant"]
    prompt = row["prompt"]
    earlier = [] if isinstance(prompt, str) else prompt
    texts = [one["content"] for one in earlier if one["role"] == "assistant"]
    return [*texts, row["completion"]]


def domain_table(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, Any]:
    """Table 5: of each domain, in the order of their appearance, and of all."""
    tokens: dict[str, list[int]] = {}
    rounds: dict[str, list[int]] = {}
    for row in rows:
        texts = assistant_texts(row)
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        tokens.setdefault(row["domain"], []).append(sum(map(len, ids)))
        rounds.setdefault(row["domain"], []).append(len(texts))
    lines = [_line(name, tokens[name], rounds[name]) for name in tokens]
    every = [[one for of_each in counts.values() for one in of_each] for counts in (tokens, rounds)]
    return {"domains": lines, "total": _line("total", *every)}


def _line(name: str, tokens: Sequence[int], rounds: Sequence[int]) -> dict[str, Any]:
    count = len(tokens)
    return {
        "domain": name,
        "samples": count,
        "average_tokens": sum(tokens) / count if count else None,
        "average_rounds": sum(rounds) / count if count else None,
        "tokens": sum(tokens),
    }


def acceptance(
    draws: Sequence[tuple[Mapping[str, Any], Draw]], reasons: Mapping[Cell, str]
) -> dict[str, Any]:
    """What became of all samples, and of those of each domain and generator."""

    def counts(some: Iterable[Draw]) -> dict[str, Any]:
        found = Counter(reasons.get(draw.cell, KEPT) for draw in some)
        return {
            "samples": found.total(),
            KEPT: found[KEPT],
            "rejected": {reason: found[reason] for reason in REASONS if found[reason]},
        }

    groups: dict[str, dict[str, list[Draw]]] = {"by_domain": {}, "by_generator": {}}
    for row, draw in draws:
        groups["by_domain"].setdefault(row["domain"], []).append(draw)
        groups["by_generator"].setdefault(draw.generator, []).append(draw)
    return {
        **counts(draw for _, draw in draws),
        **{
            group: {name: counts(some) for name, some in members.items()}
            for group, members in groups.items()
        },
    }


def solve_rates(right: Mapping[int, Sequence[bool]]) -> dict[str, Any]:
    """How many prompts have how large a share of right answers; ``right``: by row."""
    edges = ("0", "(0, 0.25)", "[0.25, 0.5)", "[0.5, 0.75)", "[0.75, 1)", "1")
    found = Counter()
    for answers in right.values():
        share = sum(answers) / len(answers)
        found[0 if share == 0 else 5 if share == 1 else 1 + int(4 * share)] += 1
    rates = [sum(answers) / len(answers) for answers in right.values()]
    return {
        "prompts": len(rates),
        "mean": sum(rates) / len(rates) if rates else None,
        "histogram": [{"solve_rate": edge, "prompts": found[n]} for n, edge in enumerate(edges)],
    }


# -- as Markdown -----------------------------------------------------------------------------------


def markdown(found: Mapping[str, Any]) -> str:
    """The statistics as a page."""
    table, accepted = found["table"], found["acceptance"]
    parts = ["# Data", "", _domain_rows(table), "", "## Samples", "", _acceptance_rows(accepted)]
    parts += ["", "## Prompts by their share of right answers", ""]
    rates = found["solve_rate"]
    parts.append(
        _table(("solve rate", "prompts"), [tuple(one.values()) for one in rates["histogram"]])
    )
    parts += ["", *(f"- {name}: {_plain(value)}" for name, value in _notes(found))]
    return "\n".join(parts) + "\n"


def _domain_rows(table: Mapping[str, Any]) -> str:
    lines = [
        (
            f"**{one['domain']}**" if one is table["total"] else one["domain"],
            f"{one['samples']:,}",
            _decimal(one["average_tokens"]),
            _decimal(one["average_rounds"]),
        )
        for one in (*table["domains"], table["total"])
    ]
    return _table(("domain", "samples", "average tokens", "average rounds"), lines)


def _acceptance_rows(accepted: Mapping[str, Any]) -> str:
    generators = accepted["by_generator"]
    columns = {"all": accepted, **(generators if len(generators) > 1 else {})}

    def line(name: str, count: Any) -> tuple[str, ...]:
        numbers = [count(column) for column in columns.values()]
        share = numbers[0] / accepted["samples"] if accepted["samples"] else 0.0
        return (name, *(f"{number:,}" for number in numbers), f"{100 * share:.1f} %")

    lines = [
        line(reason.replace("_", " "), lambda one, reason=reason: one["rejected"].get(reason, 0))
        for reason in accepted["rejected"]
    ]
    lines.append(line("**kept**", lambda one: one[KEPT]))
    lines.append(line("**samples**", lambda one: one["samples"]))
    return _table(("", *columns, "share of all"), lines)


def _notes(found: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    yield "prompts", found["prompts"]
    yield "tokens", found["tokens"]
    for name in ("general", "rewrite", "edits"):
        if found[name] is not None:
            yield name, found[name]


def _plain(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in values.items() if value is not None
    )


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    def joined(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(map(str, cells)) + " |"

    rule = "|".join("---" if place == 0 else "---:" for place in range(len(head)))
    return "\n".join([joined(head), f"|{rule}|", *map(joined, lines)])
