from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from grpo_engine.progress import Progress, sparkline
from grpo_engine.types import Rollout

SUMMARY = {"recipe": "r1-zero-miniature", "model": "miniature", "device": "cpu"}


class Clock:
    seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.fixture(autouse=True)
def neutral_environment(monkeypatch):
    for name in ("NO_COLOR", "CI", "TERM"):
        monkeypatch.delenv(name, raising=False)


def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=110, height=50, _environ={})


def make_row(step, **more):
    row = {
        "step": step,
        "reward": 0.5 + step / 10,
        "rewards/accuracy/mean": step / 10,
        "completions/mean_length": 48.0 + step,
        "completions/clipped_ratio": 0.125,
        "kl": 0.01 * step,
        "entropy": 0.5,
        "clip_ratio/region_mean": 0.01,
        "tokens_per_second": 7321.4,
        "time/generate": 3.0,
        "time/update": 1.0,
        "time/step": 4.5,
    }
    return {**row, **more}


def make_sample(completion):
    return Rollout(
        row={},
        prompt="3+4=?",
        prompt_ids=[1],
        completion=completion,
        completion_ids=[2],
        sampler_logprobs=[-0.1],
        finish_reason="stop",
        group=0,
        reward=2.0,
    )


def rendered(progress):
    sheet = Console(file=io.StringIO(), width=110, record=True, _environ={})
    sheet.print(progress.screen())
    return sheet.export_text()


def test_screen_shows_header_figures_time_sample_and_warnings():
    console, now = terminal(), Clock()
    progress = Progress(SUMMARY, 20, console=console, now=now)
    with progress:
        for step in range(1, 6):
            now.seconds += 10
            progress.update(
                make_row(step, warnings=[f"truncation: {step} % cut"]),
                make_sample("<think> 三 3+4=7 [/bold] </think>"),
            )
        text = rendered(progress)
    assert "r1-zero-miniature" in text and "miniature" in text and "cpu" in text
    assert "step 5/20" in text and "elapsed 0:50" in text and "left 2:30" in text
    assert "▁▃▅▆█" in text  # the reward's curve
    assert "7,321" in text and "12.5 %" in text and "from 0.6" in text
    assert "generate 75 %" in text and "update 25 %" in text and "step 100 %" not in text
    assert "[/bold] </think>" in text and "三" in text and "reward 2.00" in text
    assert text.count("truncation:") == 1 and "5 % cut" in text  # latest sentence of a rule, once


def test_plain_lines_without_a_terminal(monkeypatch):
    now = Clock()
    for forced in (False, True):
        stream = io.StringIO()
        if forced:
            monkeypatch.setenv("NO_COLOR", "1")
        console = Console(file=stream, force_terminal=forced, width=80, no_color=True)
        with Progress(SUMMARY, 3, console=console, now=now) as progress:
            progress.update(make_row(1, warnings=["kl: high [1]"]), make_sample("x"))
            progress.update(make_row(2, warnings=["kl: higher"]))
            progress.message("checkpoint-2 saved")
        lines = stream.getvalue().splitlines()
        assert len(lines) == 5, lines
        assert lines[0] == "recipe r1-zero-miniature  model miniature  device cpu  steps 3"
        assert lines[1].startswith("step 1/3  accuracy reward 0.1  reward 0.6  answer length 49")
        assert lines[2] == "  warning  kl: high [1]"  # a lasting condition is announced once
        assert lines[3].startswith("step 2/3")
        assert lines[4] == "checkpoint-2 saved"
        assert "\x1b[" not in stream.getvalue()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_terminal_is_restored_and_the_error_passes_through(error):
    console = terminal()
    before = set(threading.enumerate())
    progress = Progress(SUMMARY, 3, console=console)
    with pytest.raises(error), progress:
        progress.update(make_row(1))
        raise error
    output = console.file.getvalue()
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")  # cursor shown last
    assert "\x1b[?1049" not in output  # never the alternate screen
    for thread in set(threading.enumerate()) - before:  # the refreshing thread ends by itself
        thread.join(timeout=5)
        assert not thread.is_alive()
    progress.message("after")
    assert console.file.getvalue().rstrip().endswith("after")


def test_missing_and_nonfinite_values():
    console = terminal()
    progress = Progress({}, 0, console=console, now=Clock())
    rendered(progress)  # before the first row
    progress.update({"step": 0, "eval/accuracy": 0.43})
    progress.update({"step": 1, "kl": None, "grad_norm": float("nan"), "time/update": None})
    text = rendered(progress)
    assert "43.0 %" in text and "n/a" in text


def test_escape_codes_of_a_sample_do_not_reach_the_terminal():
    console = terminal()
    progress = Progress(SUMMARY, 3, console=console, now=Clock())
    progress.update(make_row(1), make_sample("a\x1b]0;owned\x07b\x1b[2J"))
    with console.capture() as capture:
        console.print(progress.screen())
    assert "\x1b]0;" not in capture.get() and "\x1b[2J" not in capture.get()


def test_change_is_told_from_the_first_row_of_the_run():
    progress = Progress(SUMMARY, 100, console=terminal(), now=Clock())
    for step in range(1, 101):
        progress.update({"step": step, "reward": step / 100})
    assert "from 0.01" in rendered(progress)


def test_time_left_of_a_resumed_run_is_judged_by_its_own_steps():
    now = Clock()
    progress = Progress(SUMMARY, 100, first_step=90, console=terminal(), now=now)
    assert progress.remaining() is None
    now.seconds = 20
    progress.update(make_row(92))
    assert progress.remaining() == 80.0


def test_sparkline():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([2.0, 2.0]) == "▄▄"
    assert sparkline([1.0, None, 2.0]) == "▁ █"
    assert sparkline([None]) == ""
    assert len(sparkline(list(range(100)), width=10)) == 10
