"""What a run reports of its data: the paper's Table 5 (samples, average tokens and rounds by
domain), and what became of every sample that was drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grpo_engine.rejection.select import REASONS, Answers

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


def domain_table(rows: Iterable[Mapping[str, Any]], tokenizer: Any) -> dict[str, Any]:
    """Table 5: of each domain, in the order of their appearance, and of all."""
    found: dict[str, Counter[str]] = {}
    for row in rows:
        texts = assistant_texts(row)
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        counted = found.setdefault(row["domain"], Counter())
        counted.update(samples=1, tokens=sum(map(len, ids)), rounds=len(texts))
    total = sum(found.values(), Counter())
    lines = [_line(name, counted) for name, counted in found.items()]
    return {"domains": lines, "total": _line("total", total)}


def _line(name: str, counted: Mapping[str, int]) -> dict[str, Any]:
    samples = counted["samples"]
    return {
        "domain": name,
        "samples": samples,
        "average_tokens": counted["tokens"] / samples if samples else None,
        "average_rounds": counted["rounds"] / samples if samples else None,
        "tokens": counted["tokens"],
    }


class Tally:
    """What became of all samples, counted row by row.

    Attributes:
        right: of each row, which of its answers were verified right.
        tokens: drawn in all.
        rows_with_kept: how many rows have an answer in the data.
    """

    def __init__(self) -> None:
        self.right: dict[int, list[bool]] = {}
        self.tokens = self.rows_with_kept = 0
        self._ends: Counter[tuple[str, str, str]] = Counter()  # (domain, generator, end)

    def drawn(self, row: int, right: list[bool], tokens: int) -> None:
        self.right[row] = right
        self.tokens += tokens

    def settled(self, answers: Answers) -> None:
        self.rows_with_kept += bool(answers.candidates)
        for cell in answers.cells:
            self._ends[answers.row["domain"], cell[0], answers.reasons.get(cell, KEPT)] += 1

    def acceptance(self) -> dict[str, Any]:
        """What became of all samples, and of those of each domain and generator."""
        every: Counter[str] = Counter()
        groups: dict[str, dict[str, Counter[str]]] = {"by_domain": {}, "by_generator": {}}
        for (domain, generator, end), count in self._ends.items():
            every[end] += count
            groups["by_domain"].setdefault(domain, Counter())[end] += count
            groups["by_generator"].setdefault(generator, Counter())[end] += count
        return {
            **_ends(every),
            **{
                group: {name: _ends(found) for name, found in members.items()}
                for group, members in groups.items()
            },
        }

    def solve_rates(self) -> dict[str, Any]:
        return solve_rates(self.right)


def _ends(found: Counter[str]) -> dict[str, Any]:
    return {
        "samples": found.total(),
        KEPT: found[KEPT],
        "rejected": {reason: found[reason] for reason in REASONS if found[reason]},
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
