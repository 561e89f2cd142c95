"""Line charts as inline SVG, drawn without a plotting library so that a report is one file with no
requests.

Colours are CSS classes (``tone-1`` .. ``tone-4``) that the page defines for light, dark and print.
Every chart carries a <title> and a <desc> that say in words what the picture shows, and its points
as JSON in ``data-chart`` for the page's hover script; without the script the chart is complete.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

THIN = "\u202f"  # narrow no-break space between a number and its %
Number = Callable[[float], str]

WIDE, NARROW = (500, 260), (370, 220)  # a chart drawn large, one of many drawn small
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 34  # margins that hold the tick labels
SMOOTH_FROM = 40  # points from which a moving mean is drawn over the raw line
TONES = 6  # colours of lines
MAX_POINTS = 320  # points drawn per line; more are averaged in buckets


@dataclass(frozen=True)
class Line:
    """One series. ``points`` are (step, value) by step; a value of None (a NaN in the run) breaks
    the line.

    ``intervals`` (low, high), one per point, are drawn as bars; ``dots`` marks each point and never
    smooths."""

    label: str
    points: Sequence[tuple[float, float | None]]
    tone: int = 1
    dots: bool = False
    intervals: Sequence[tuple[float, float] | None] | None = None

    def values(self) -> list[float]:
        return [y for _, y in self.points if y is not None]


def percent(value: float) -> str:
    digits = 1 if abs(value) < 0.9995 else 0
    return f"{100 * value:.{digits}f}{THIN}%"


def plain_number(value: float) -> str:
    """Three significant figures, thousands separated, no trailing zeros: 1,234 · 0.043 ·
    1.2e-05."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 100:
        return f"{value:,.0f}"
    if size < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3g}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) that cover [low, high]."""
    if not high > low:
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def step_ticks(low: float, high: float) -> list[float]:
    """Integer ticks inside [low, high]."""
    if high <= low:
        return [low]
    inside = [t for t in ticks(low, high, 5) if low <= t <= high and float(t).is_integer()]
    return inside or [low, high]


def moving_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """Centred mean over ``window`` points (fewer at the ends); None stays None and is not
    averaged."""
    half = window // 2
    means: list[float | None] = []
    for i, value in enumerate(values):
        near = [v for v in values[max(0, i - half) : i + half + 1] if v is not None]
        means.append(sum(near) / len(near) if value is not None else None)
    return means


def thin(
    points: Sequence[tuple[float, float | None]], most: int
) -> list[tuple[float, float | None]]:
    """At most ``most`` points: consecutive ones averaged in equal buckets. The last point's step is
    kept."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    thinned = []
    for i in range(0, len(points), size):
        bucket = points[i : i + size]
        known = [y for _, y in bucket if y is not None]
        thinned.append((bucket[-1][0], sum(known) / len(known) if known else None))
    return thinned


def smoothing_window(count: int) -> int:
    return max(3, count // 15) | 1


class _Frame:
    """Maps steps and values to the drawing's coordinates."""

    def __init__(
        self,
        lines: Sequence[Line],
        size: tuple[int, int],
        floor: float | None,
        ceiling: float | None,
        span: tuple[float, float] | None,
    ) -> None:
        self.width, self.height = size
        steps = [x for line in lines for x, y in line.points if y is not None]
        steps += span or ()
        values = [y for line in lines for y in line.values()]
        for line in lines:
            values += [edge for pair in line.intervals or () if pair for edge in pair]
        low, high = min(values), max(values)
        low = floor if floor is not None else low
        high = max(ceiling if ceiling is not None else high, low)
        if floor is not None and high <= floor:
            high = floor + 1.0  # all values sit on the floor: do not draw below it
        self.ticks = ticks(low, high)
        if ceiling is not None:
            self.ticks = [t for t in self.ticks if t <= ceiling + 1e-9]
        self.x0, self.x1 = min(steps), max(steps)
        self.y0, self.y1 = self.ticks[0], self.ticks[-1]
        if self.y1 <= self.y0:
            self.y1 = self.y0 + 1.0

    def x(self, step: float) -> float:
        span = self.x1 - self.x0
        share = (step - self.x0) / span if span else 0.5
        return round(LEFT + share * (self.width - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y0) / (self.y1 - self.y0)
        return round(self.height - BOTTOM - share * (self.height - TOP - BOTTOM), 1)

    def path(self, points: Sequence[tuple[float, float | None]]) -> str:
        parts, pen_down = [], False
        for step, value in points:
            if value is None:
                pen_down = False
                continue
            parts.append(f"{'L' if pen_down else 'M'}{self.x(step)} {self.y(value)}")
            pen_down = True
        return "".join(parts)


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    number: Number = plain_number,
    floor: float | None = None,
    ceiling: float | None = None,
    size: tuple[int, int] = WIDE,
    span: tuple[float, float] | None = None,
) -> str:
    """An <svg> of ``lines`` over training steps. Lines without a finite value are left out;
    ValueError if none is left. ``floor`` and ``ceiling`` fix the ends of the value axis (a
    fraction's are 0 and 1). ``span``: steps that the axis must hold in any case."""
    lines = [line for line in lines if line.values()]
    if not lines:
        raise ValueError(f"chart {title!r} has no finite value to draw")
    frame = _Frame(lines, size, floor, ceiling, span)
    hover = []
    body = _axes(frame, number)
    for position, line in enumerate(lines):
        drawn = list(line.points) if line.dots else thin(line.points, MAX_POINTS)
        body += _series(frame, line, position, drawn)
        known = [(x, y) for x, y in drawn if y is not None]
        hover.append(
            {
                "label": line.label,
                "tone": line.tone,
                "step": [x for x, _ in known],
                "x": [frame.x(x) for x, _ in known],
                "y": [frame.y(y) for _, y in known],
                "text": [number(y) for _, y in known],
            }
        )
    attributes = f'viewBox="0 0 {size[0]} {size[1]}" role="img" class="chart"'
    words = f"<title>{escape(title)}</title><desc>{escape(describe(lines, number))}</desc>"
    points = escape(json.dumps(hover, ensure_ascii=False, separators=(",", ":")), quote=True)
    return f'<svg {attributes} data-chart="{points}">{words}{"".join(body)}</svg>'


def describe(lines: Sequence[Line], number: Number) -> str:
    """The chart in words, for those who cannot see it."""
    sentences = []
    for line in lines:
        known = [(x, y) for x, y in line.points if y is not None]
        (x0, first), (x1, last) = known[0], known[-1]
        low, high = min(y for _, y in known), max(y for _, y in known)
        sentences.append(
            f"{line.label}: {number(first)} at step {x0:g}, {number(last)} at step {x1:g}, "
            f"lowest {number(low)}, highest {number(high)}."
        )
    return " ".join(sentences)


def _axes(frame: _Frame, number: Number) -> list[str]:
    marks = []
    for value in frame.ticks:
        y, label = frame.y(value), _tick(value, number)
        kind = "axis" if value == frame.ticks[0] else "grid"
        marks.append(
            f'<line class="{kind}" x1="{LEFT}" x2="{frame.width - RIGHT}" y1="{y}" y2="{y}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{label}</text>'
        )
    under = frame.height - BOTTOM + 19
    marks.append(f'<text class="tick" x="0" y="{under}">step</text>')
    for step in step_ticks(frame.x0, frame.x1):
        x, base = frame.x(step), frame.height - BOTTOM
        anchor = "end" if x > frame.width - RIGHT - 12 else "middle"
        marks.append(
            f'<line class="axis" x1="{x}" x2="{x}" y1="{base}" y2="{base + 4}"/>'
            f'<text class="tick" x="{x}" y="{base + 19}" text-anchor="{anchor}">{step:,.0f}</text>'
        )
    return marks


def _tick(value: float, number: Number) -> str:
    if number is percent:
        return f"{100 * value:.3g}{THIN}%"
    return plain_number(value)


def classes(line: Line, position: int) -> list[str]:
    """CSS classes of a line and of its legend mark. The third of a chart is dashed, so that three
    lines can be told apart without their colours; from the seventh on, where the colours begin
    again, they are dotted."""
    names = [f"tone-{line.tone}"]
    if line.dots:
        names.append("dots")
    if position >= TONES:
        names.append("again")
    return [*names, "third"] if position == 2 else names


def _series(
    frame: _Frame, line: Line, position: int, drawn: Sequence[tuple[float, float | None]]
) -> list[str]:
    tone = " ".join(classes(line, position))
    smooth = not line.dots and len(drawn) >= SMOOTH_FROM
    marks = [f'<path class="line {tone}{" faint" if smooth else ""}" d="{frame.path(drawn)}"/>']
    if smooth:
        means = moving_mean([y for _, y in drawn], smoothing_window(len(drawn)))
        smoothed = [(x, mean) for (x, _), mean in zip(drawn, means, strict=True)]
        marks.append(f'<path class="line {tone}" d="{frame.path(smoothed)}"/>')
    alone = sum(y is not None for _, y in drawn) == 1  # a path of one point draws nothing
    for i, (step, value) in enumerate(drawn if line.dots or alone else ()):
        if value is None:
            continue
        x = frame.x(step)
        if line.intervals and line.intervals[i]:
            low, high = (frame.y(edge) for edge in line.intervals[i])
            marks.append(f'<line class="bar {tone}" x1="{x}" x2="{x}" y1="{low}" y2="{high}"/>')
        marks.append(f'<circle class="dot {tone}" cx="{x}" cy="{frame.y(value)}" r="3.6"/>')
    return marks
