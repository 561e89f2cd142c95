"""What every report page has: the shell that needs nothing but itself, and the parts at its top."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from grpo_engine.report.words import esc

REPORT_FILE = "report.html"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(title: str, sections: Iterable[str], foot: str) -> str:
    """The whole document. ``sections`` and ``foot`` are HTML, ``title`` is text."""
    assets = resources.files("grpo_engine.report") / "assets"
    style = (assets / "report.css").read_text(encoding="utf-8")
    script = (assets / "report.js").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{esc(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
{"".join(sections)}
<footer>{foot}</footer>
</main>
<script>
{script}</script>
</body>
</html>
"""


def footer(manifest: Mapping[str, Any], folder: Path) -> str:
    version = manifest.get("code_version")
    made_by = f"Written by GRPO Engine{f' {version}' if version else ''}"
    return f"""{esc(made_by)} from the files in {esc(folder.resolve().name)}/. Intervals are
95&nbsp;%: Wilson’s where a problem is right or wrong, a bootstrap over problems otherwise."""


def figures(shown: Sequence[tuple[str, str, str]]) -> str:
    """The numbers at the top of a page: (label, value, remark)."""
    cells = "".join(
        f"<div><dt>{esc(label)}</dt>"
        f'<dd class="num">{esc(value)}<small>{esc(below)}</small></dd></div>'
        for label, value, below in shown
    )
    return f'<dl class="figures">{cells}</dl>' if cells else ""


def note(title: str, items: Sequence[str]) -> str:
    """``items`` are HTML; "" without any."""
    if not items:
        return ""
    body = "".join(f"<li>{item}</li>" for item in items)
    return f'<aside class="note"><h2>{title}</h2><ul>{body}</ul></aside>\n'


def warning_items(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line per rule: its latest sentence, how often it spoke and when."""
    by_rule: dict[str, list[tuple[int, str]]] = {}
    for row in rows:
        for sentence in row.get("warnings") or ():
            rule = str(sentence).partition(":")[0]
            by_rule.setdefault(rule, []).append((row["step"], str(sentence)))
    items = []
    for spoken in by_rule.values():
        first, last = spoken[0][0], spoken[-1][0]
        when = f"step {first:,}"
        if last != first:
            when = f"{len(spoken):,} times, steps {first:,} to {last:,}"
        items.append(f"{esc(spoken[-1][1])} <small>({when})</small>")
    return items
