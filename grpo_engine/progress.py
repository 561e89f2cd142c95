"""The live screen of a training run, and its one-line-a-step form where there is no terminal.

    with Progress({"recipe": ..., "model": ..., "device": ...}, total_steps) as progress:
        progress.update(row, sample)  # a metrics row, and maybe a Rollout to show
        progress.message("checkpoint-10 saved")

The screen is drawn below the scrollback, never on the alternate screen, and the cursor stays
visible, so that a kill at any moment leaves an ordinary terminal behind.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from grpo_engine.types import Rollout

SPARK_WIDTH = 32  # characters of a sparkline
SPARKS = "▁▂▃▄▅▆▇█"
SAMPLE_CHARACTERS = 600
SHOWN_WARNINGS = 4
PHASE_COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red")
PERCENT, NUMBER = "percent", "number"

Figure = tuple[str, tuple[str, ...], str]  # label, metric keys in order of preference, unit

FIGURES: tuple[Figure, ...] = (
    ("held-out accuracy", ("eval/accuracy",), PERCENT),
    ("accuracy reward", ("rewards/accuracy/mean", "rewards/accuracy_reward/mean"), NUMBER),
    ("reward", ("reward",), NUMBER),
    ("answer length", ("completions/mean_length",), NUMBER),
    ("cut by length cap", ("completions/clipped_ratio",), PERCENT),
    ("KL", ("kl",), NUMBER),
    ("entropy", ("entropy",), NUMBER),
    ("clipped tokens", ("clip_ratio/region_mean",), PERCENT),
    ("gradient norm", ("grad_norm",), NUMBER),
    ("tokens/s", ("tokens_per_second",), NUMBER),
)


def counted(number: int, noun: str) -> str:
    """``1 step``, ``1,700 steps``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def sparkline(values: Sequence[float | None], width: int = SPARK_WIDTH) -> str:
    """The last ``width`` values as bars between their own minimum and maximum; a None is a gap."""
    recent = list(values)[-width:]
    known = [v for v in recent if v is not None]
    if not known:
        return ""
    low, spread = min(known), max(known) - min(known)
    top = len(SPARKS) - 1
    level = {True: lambda v: round(top * (v - low) / spread), False: lambda v: top // 2}[spread > 0]
    return "".join(" " if v is None else SPARKS[level(v)] for v in recent)


def clock(seconds: float) -> str:
    """1:05 or 2:03:04."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def figure(value: float | None, unit: str) -> str:
    if value is None:
        return "n/a"
    if unit == PERCENT:
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _finite(value: Any) -> float | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def say(words: str) -> None:
    """One line on stderr, outside any screen."""
    print(f"grpo-engine: {words}", file=sys.stderr)


def wants_screen(console: Console) -> bool:
    """A live screen needs a terminal that moves its cursor, and nobody who asked for plain
    output.
    """
    plain = os.environ.get("NO_COLOR") or os.environ.get("CI")
    return console.is_terminal and not console.is_dumb_terminal and not plain


class Progress(AbstractContextManager):
    """Shows a run of ``total_steps`` steps. ``summary`` is the header: {"recipe": ..., "model":
    ..., ...}.

    ``first_step`` is the step a resumed run starts from, ``figures`` what is shown of a row.
    ``console`` and ``now`` are there for tests.
    """

    def __init__(
        self,
        summary: Mapping[str, Any],
        total_steps: int,
        *,
        first_step: int = 0,
        figures: Sequence[Figure] = FIGURES,
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.summary, self.total_steps = dict(summary), total_steps
        self.first_step = self.step = first_step
        self.figures = figures
        self.console = console or Console()
        self.now = now
        self.started = now()
        self.curves: dict[str, deque[float | None]] = {
            label: deque(maxlen=SPARK_WIDTH) for label, _, _ in figures
        }
        self.first_values: dict[str, float] = {}
        self.phases: dict[str, float] = {}
        self.warnings: dict[str, str] = {}  # rule -> its latest sentence, oldest rule first
        self.sample: Rollout | None = None
        self._lock = threading.Lock()  # update() runs beside the thread that refreshes the screen
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        self.started = self.now()
        if wants_screen(self.console):
            self._live = Live(
                get_renderable=self.screen,
                console=self.console,
                refresh_per_second=4,
                vertical_overflow="crop",
            )
            self._live.start(refresh=True)
            self.console.show_cursor(True)
        else:
            header = "  ".join(f"{key} {value}" for key, value in self.summary.items())
            self._line(f"{header}  steps {self.total_steps}".strip())
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            self.console.show_cursor(True)

    def update(self, row: Mapping[str, Any], sample: Rollout | None = None) -> None:
        """Show a metrics row, and a sampled answer if one is given."""
        with self._lock:
            self.step = int(row.get("step", self.step))
            for label, keys, _ in self.figures:
                key = next((key for key in keys if key in row), None)
                if key is not None:
                    value = _finite(row[key])
                    self.curves[label].append(value)
                    if value is not None:
                        self.first_values.setdefault(label, value)
            for key, value in row.items():
                seconds = _finite(value)
                if key.startswith("time/") and key != "time/step" and seconds is not None:
                    name = key[len("time/") :]
                    self.phases[name] = self.phases.get(name, 0.0) + seconds
            news = self._note_warnings(row.get("warnings") or ())
            self.sample = sample or self.sample
        if self._live is not None:
            self._live.refresh()
            return
        self._line(self.line(row))
        for sentence in news:
            self._line(f"  warning  {sentence}")

    def message(self, words: str) -> None:
        """One line that stays in the scrollback, above the live screen."""
        self._line(words)

    def _note_warnings(self, sentences: Sequence[str]) -> list[str]:
        """Keep the latest sentence of each rule; return those whose rule has not spoken before."""
        news = []
        for sentence in sentences:
            rule = sentence.partition(":")[0]
            if rule not in self.warnings:
                news.append(sentence)
            self.warnings[rule] = sentence
        return news

    def _line(self, words: str) -> None:
        # soft_wrap: a log line stays one line; Text: brackets in a sample or a path are not markup
        self.console.print(Text(words), soft_wrap=True)

    # -- the two renderings
    # --------------------------------------------------------------------------

    def line(self, row: Mapping[str, Any]) -> str:
        """A step as one line of plain text."""
        parts = [f"step {self.step}/{self.total_steps}"]
        for label, keys, unit in self.figures:
            key = next((key for key in keys if key in row), None)
            if key is not None:
                parts.append(f"{label} {figure(_finite(row[key]), unit)}")
        parts.append(f"elapsed {clock(self.now() - self.started)}")
        if (left := self.remaining()) is not None:
            parts.append(f"left {clock(left)}")
        return "  ".join(parts)

    def remaining(self) -> float | None:
        """Seconds to go at the mean pace of this session's steps; None before the first."""
        done = self.step - self.first_step
        if done < 1 or self.step >= self.total_steps:
            return None
        return (self.now() - self.started) / done * (self.total_steps - self.step)

    def screen(self) -> RenderableType:
        """The live screen."""
        with self._lock:
            parts: list[RenderableType] = [self._header(), self._figures()]
            if self.phases:
                parts.append(self._time_bar())
            if self.sample:
                parts.append(self._sample_panel(self.sample))
            for sentence in list(self.warnings.values())[-SHOWN_WARNINGS:]:
                parts.append(Text(f"! {sentence}", style="yellow"))
            return Group(*parts)

    def _header(self) -> RenderableType:
        words = Text()
        for key, value in self.summary.items():
            words.append(f"{key} ", style="dim")
            words.append(f"{value}  ", style="bold")
        share = min(1.0, self.step / self.total_steps) if self.total_steps else 0.0
        done = round(share * 40)
        bar = Text()
        bar.append("━" * done, style="cyan")
        bar.append("━" * (40 - done), style="bright_black")
        bar.append(f"  step {self.step}/{self.total_steps}")
        bar.append(f"  elapsed {clock(self.now() - self.started)}", style="dim")
        if (left := self.remaining()) is not None:
            bar.append(f"  left {clock(left)}", style="dim")
        return Group(words, bar, "")

    def _figures(self) -> RenderableType:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(style="dim")
        table.add_column(justify="right", style="bold")
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(style="dim")
        for label, _, unit in self.figures:
            values = self.curves[label]
            if not values:
                continue
            since = f"from {figure(self.first_values.get(label), unit)}" if len(values) > 1 else ""
            table.add_row(label, figure(values[-1], unit), sparkline(values), since)
        return table

    def _time_bar(self) -> RenderableType:
        total = sum(self.phases.values()) or 1.0
        ordered = sorted(self.phases.items(), key=lambda item: -item[1])
        bar, legend = Text(), Text()
        for i, (name, seconds) in enumerate(ordered):
            colour = PHASE_COLOURS[i % len(PHASE_COLOURS)]
            bar.append("█" * round(40 * seconds / total), style=colour)
            legend.append("■ ", style=colour)
            legend.append(f"{name} {100 * seconds / total:.0f} %  ", style="dim")
        return Group("", bar, legend)

    def _sample_panel(self, sample: Rollout) -> RenderableType:
        completion = sample.completion
        if len(completion) > SAMPLE_CHARACTERS:
            half = SAMPLE_CHARACTERS // 2
            completion = f"{completion[:half]} […] {completion[-half:]}"
        question = sample.prompt[-160:].strip()
        reward = sample.reward
        title = "latest answer" if reward is None else f"latest answer, reward {reward:.2f}"
        body = Text(_printable(question), style="dim") + Text("\n") + Text(_printable(completion))
        return Panel(body, title=title, title_align="left", border_style="bright_black")


def _printable(words: str) -> str:
    """A model may emit escape codes: none reaches the terminal."""
    return "".join(c if c == "\n" or c.isprintable() else "\ufffd" for c in words)
