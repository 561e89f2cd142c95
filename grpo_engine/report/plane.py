"""A drawing of two continuous axes, for what is no curve over training steps."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from grpo_engine.report.charts import (
    BOTTOM,
    LEFT,
    NARROW,
    RIGHT,
    THIN,
    TOP,
    Line,
    classes,
    percent,
    plain_number,
)
from grpo_engine.report.words import esc


class Plane:
    """A drawing of two continuous axes, ``x`` (low, high) and ``y`` (bottom, top)."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], size: tuple[int, int] = NARROW
    ) -> None:
        self.low, self.high = x
        self.bottom, self.top = y
        self.width, self.height = size

    def place(self, point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - self.low) / ((self.high - self.low) or 1.0)
        up = (point[1] - self.bottom) / ((self.top - self.bottom) or 1.0)
        return (
            round(LEFT + across * (self.width - LEFT - RIGHT), 1),
            round(self.height - BOTTOM - up * (self.height - TOP - BOTTOM), 1),
        )

    def axes(
        self,
        x_ticks: Sequence[float],
        y_ticks: Sequence[float],
        number: Any = plain_number,
        x_names: Sequence[str] | None = None,
    ) -> str:
        """``number`` words the ticks of both axes; ``x_names`` stand in for those of ``x``."""
        marks = []
        for value in y_ticks:
            if not self.bottom <= value <= self.top:
                continue
            (x0, y), (x1, _) = self.place((self.low, value)), self.place((self.high, value))
            kind = "axis" if value == self.bottom else "grid"
            marks.append(
                f'<line class="{kind}" x1="{x0}" x2="{x1}" y1="{y}" y2="{y}"/>'
                f'<text class="tick" x="{x0 - 8}" y="{y + 4}" text-anchor="end">'
                f"{_tick(value, number)}</text>"
            )
        names = x_names or [_tick(value, number) for value in x_ticks]
        for value, name in zip(x_ticks, names, strict=True):
            if not self.low <= value <= self.high:
                continue
            x, y = self.place((value, self.bottom))
            anchor = "end" if x > self.width - RIGHT - 12 else "middle"
            marks.append(
                f'<line class="axis" x1="{x}" x2="{x}" y1="{y}" y2="{y + 4}"/>'
                f'<text class="tick" x="{x}" y="{y + 19}" text-anchor="{anchor}">{name}</text>'
            )
        return "".join(marks)

    def segment(self, start: tuple[float, float], end: tuple[float, float], kind: str) -> str:
        (x1, y1), (x2, y2) = self.place(start), self.place(end)
        return f'<line class="{kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'

    def circle(self, centre: tuple[float, float], radius: float, kind: str) -> str:
        x, y = self.place(centre)
        return f'<circle class="{kind}" cx="{x}" cy="{y}" r="{radius:.1f}"/>'

    def path(self, points: Sequence[tuple[float, float]], kind: str) -> str:
        drawn = "L".join(f"{x} {y}" for x, y in map(self.place, points))
        return f'<path class="{kind}" d="M{drawn}"/>'


def _tick(value: float, number: Any) -> str:
    return f"{100 * value:.3g}{THIN}%" if number is percent else plain_number(value)


def figure(
    title: str,
    unit: str,
    plane: Plane,
    body: str,
    description: str,
    caption: str,
    legend: Sequence[Line] = (),
) -> str:
    """``body`` framed, titled and described in words; a legend if it tells two lines apart."""
    names = "".join(
        f'<li><i class="{" ".join(classes(line, i))}"></i>{esc(line.label)}</li>'
        for i, line in enumerate(legend)
    )
    listed = f'<ul class="legend">{names}</ul>' if len(legend) > 1 else ""
    words = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    box = f'viewBox="0 0 {plane.width} {plane.height}" role="img" class="chart"'
    return f"""<figure><header><h3>{esc(title)} <small>{esc(unit)}</small></h3></header>
{listed}<svg {box}>{words}{body}</svg>
<figcaption>{esc(caption)}</figcaption></figure>
"""
