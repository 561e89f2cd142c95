"""Rewards by rule while sampling goes on: the same scores, the same budget, and no thread left."""

import signal
import textwrap
import threading
import time

import pytest

from grpo_engine.rewards import RewardError, RewardPool, RewardSpec
from grpo_engine.rewards.background import BackgroundScoring
from grpo_engine.types import UserError

REWARDS = textwrap.dedent(
    """
    import time

    def length(prompts, completions, level, **columns):
        if completions[0] == "raise":
            raise ValueError("why not")
        if completions[0] == "sleep":
            time.sleep(1000)
        return [float(len(completions[0]) + level[0])]

    def longest(completions, **columns):
        best = max(map(len, completions))
        return [float(len(c) == best) for c in completions]
    """
)


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "functions.py"
    path.write_text(REWARDS)
    return path


def specs(functions, **changes):
    return [
        RewardSpec("length", f"{functions}:length", **changes),
        RewardSpec("longest", f"{functions}:longest", weight=10.0, batched=True),
    ]


COMPLETIONS = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff"]
COLUMNS = {"level": [1, 2, 3, 4, 5, 6]}
PROMPTS = ["q"] * 6


def in_pieces(pool, pieces, completions=COMPLETIONS, columns=COLUMNS, prompts=PROMPTS):
    with BackgroundScoring(pool, prompts, columns) as scoring:
        for members in pieces:
            scoring.add(members, [completions[m] for m in members], [[m] for m in members])
        return scoring.result()


@pytest.mark.parametrize("pieces", [[[0, 1, 2, 3, 4, 5]], [[4, 1], [5], [0, 3, 2]]])
def test_the_report_is_that_of_one_score_call(functions, pieces):
    with RewardPool(specs(functions), num_workers=2) as pool:
        expected = pool.score(PROMPTS, COMPLETIONS, COLUMNS, [[m] for m in range(6)])
        found = in_pieces(pool, pieces)
    assert expected.scores["length"] == [2, 4, 6, 8, 10, 12]
    for part in ("scores", "outcomes", "totals", "outcome_of", "weights", "first_errors"):
        assert getattr(found, part) == getattr(expected, part), part


def test_a_domain_limits_a_reward_in_both(functions):
    columns = COLUMNS | {"domain": ["math", "chat"] * 3}
    limited = [
        RewardSpec("length", f"{functions}:length", domains=("math",)),
        RewardSpec("longest", f"{functions}:longest", batched=True, domains=("chat",)),
    ]
    with RewardPool(limited, num_workers=1) as pool:
        whole = pool.score(PROMPTS, COMPLETIONS, columns)
        found = in_pieces(pool, [[3, 5, 1], [0, 2, 4]], columns=columns)
        assert pool.score(["q"], ["a"], {"domain": ["other"]}).totals == [None]
    assert whole.scores == {
        "length": [2, None, 6, None, 10, None],
        "longest": [None, 0, None, 0, None, 1],
    }
    assert whole.outcomes == {"length": {"ok": 3}, "longest": {"ok": 3}}
    assert whole.totals == [2, 0, 6, 0, 10, 1]
    assert (found.scores, found.totals) == (whole.scores, whole.totals)


def test_scoring_goes_on_while_the_caller_does_something_else(functions):
    with (
        RewardPool(specs(functions), num_workers=1) as pool,
        BackgroundScoring(pool, PROMPTS, COLUMNS) as scoring,
    ):
        scoring.add([0], ["a"], [[0]])
        end = time.monotonic() + 20
        while (0, 0) not in scoring._batch.results:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_the_budget_is_that_of_the_whole_batch_not_of_a_piece(functions):
    """Half may fail. The last piece fails whole, which is a third of all; with two more that
    failed earlier it is too much."""
    with RewardPool(specs(functions), num_workers=1, max_error_rate=0.5) as pool:
        few = [*COMPLETIONS[:4], "raise", "raise"]
        report = in_pieces(pool, [[0, 1, 2, 3], [4, 5]], few)
        assert report.outcomes["length"] == {"ok": 4, "error": 2}
        many = ["raise", "raise", *COMPLETIONS[2:4], "raise", "raise"]
        with pytest.raises(RewardError, match="failed on 4 of 6 completions .*why not"):
            in_pieces(pool, [[0, 1, 2, 3], [4], [5]], many)
        assert pool.score(["q"], ["a"], {"level": [1]}).scores["length"] == [2]


def test_the_budget_of_a_reward_is_that_of_the_rows_it_applies_to(functions):
    limited = [RewardSpec("length", f"{functions}:length", domains=("math",))]
    columns = COLUMNS | {"domain": ["math", "math", *["chat"] * 4]}
    with (
        RewardPool(limited, num_workers=1, max_error_rate=0.4) as pool,
        pytest.raises(RewardError, match="failed on 1 of 2 completions"),
    ):
        in_pieces(pool, [range(6)], ["raise", *COMPLETIONS[1:]], columns)


def test_sampling_is_stopped_once_the_budget_is_spent(functions):
    with (
        RewardPool(specs(functions), num_workers=1, max_error_rate=0.0) as pool,
        BackgroundScoring(pool, PROMPTS, COLUMNS) as scoring,
    ):
        scoring.add([0], ["raise"], [[0]])
        end = time.monotonic() + 20
        with pytest.raises(RewardError, match="1 of 6"):
            while time.monotonic() < end:
                scoring.add([1], ["a"], [[1]])
                time.sleep(0.01)


def test_leaving_early_ends_the_thread_and_what_it_waits_for(functions):
    with RewardPool(specs(functions), num_workers=1, timeout_s=600) as pool:
        start = time.monotonic()
        with (
            pytest.raises(KeyboardInterrupt),
            BackgroundScoring(pool, PROMPTS, COLUMNS) as scoring,
        ):
            scoring.add([0, 1], ["sleep", "a"], [[0], [1]])
            time.sleep(0.3)
            raise KeyboardInterrupt
        assert time.monotonic() - start < 30
        assert not [t for t in threading.enumerate() if t.name.startswith("rewards")]
        assert pool.score(["q"], ["a"], {"level": [1]}).scores["length"] == [2]


def test_a_signal_ends_the_wait_for_a_result(functions):
    def interrupt(*_):
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    start = time.monotonic()
    with RewardPool(specs(functions), num_workers=1, timeout_s=600) as pool:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            with pytest.raises(KeyboardInterrupt):
                in_pieces(pool, [range(6)], ["sleep", *COMPLETIONS[1:]])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
        assert time.monotonic() - start < 30
        assert pool.score(["q"], ["a"], {"level": [1]}).scores["length"] == [2]


def test_what_is_missing_is_named_at_once(functions):
    with RewardPool(specs(functions), num_workers=1) as pool:
        with pytest.raises(UserError, match="needs the column 'level'"):
            BackgroundScoring(pool, ["q"], {"domain": ["math"]})
        with pytest.raises(UserError, match="6 completions but 1 values of 'level'"):
            BackgroundScoring(pool, PROMPTS, {"level": [1]})
        with BackgroundScoring(pool, PROMPTS, COLUMNS) as scoring:
            scoring.add([2], ["a"], [[1]])
            with pytest.raises(ValueError, match="5 of 6 completions were not added"):
                scoring.result()
