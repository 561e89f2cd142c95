"""The reward pool: whatever a reward does, one outcome per completion, and nothing left over."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from grpo_engine.rewards import RewardError, RewardPool, RewardSpec
from grpo_engine.types import UserError

# One reward that does to the worker whatever the completion says.
MISBEHAVE = textwrap.dedent(
    """
    import itertools, os, signal, subprocess, sys, time

    def reward(prompts, completions, **columns):
        text = completions[0]
        if text == "loop in C":
            all(itertools.repeat(True))  # holds the interpreter lock: no signal handler ever runs
        elif text == "sleep":
            time.sleep(1000)
        elif text == "exit":
            os._exit(3)
        elif text == "sys.exit":
            sys.exit("bye")
        elif text == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif text == "raise":
            raise ValueError("why\\nnot")
        elif text == "memory":
            return [float(len(bytearray(1 << 40)))]
        elif text == "child":
            child = subprocess.Popen(["sleep", "1000"])
            open(columns["note"][0], "w").write(str(child.pid))
            time.sleep(1000)
        elif text == "print":
            print("x" * 5_000_000)
            print("the last line")
            print("on stderr", file=sys.stderr)
            raise RuntimeError("after printing")
        elif text == "print and score":
            print("{not json}" * 100_000)
        return {
            "two": [1.0, 2.0], "empty": [], "nan": [float("nan")], "inf": [float("inf")],
            "text": ["1.0"], "nothing": None, "number": 1.0, "none": [None], "true": [True],
        }.get(text, [float(text) if text.replace(".", "").isdigit() else 0.5])

    def longest(completions, **columns):
        best = max(map(len, completions))
        if best > 100:
            return [1.0]
        return [float(len(c) == best) for c in completions]

    def slow(completions, **columns):
        time.sleep(0.05)
        return [1.0]
    """
)


@pytest.fixture(scope="module")
def rewards_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "misbehave.py"
    path.write_text(MISBEHAVE)
    return path


@pytest.fixture(scope="module")
def pool(rewards_file):
    """One pool for the whole file: it has to survive everything below anyway."""
    with RewardPool(
        [f"{rewards_file}:reward"], num_workers=2, timeout_s=0.6, max_error_rate=1.0
    ) as pool:
        yield pool


def score(pool, completions, **columns):
    return pool.score(["q"] * len(completions), completions, columns)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children():
    """Our child processes, zombies included."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                parent = stat.read().rsplit(")", 1)[1].split()[1]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == os.getpid():
            found.add(int(pid))
    return found


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


BEHAVIOUR = [
    ("0.25", 0.25, "ok"),
    ("true", 1.0, "ok"),
    ("print and score", 0.5, "ok"),
    ("none", None, "none"),
    ("loop in C", None, "timeout"),
    ("sleep", None, "timeout"),
    ("exit", None, "worker_death"),
    ("crash", None, "worker_death"),
    ("sys.exit", None, "error"),
    ("raise", None, "error"),
    ("memory", None, "error"),
    ("print", None, "error"),
    ("two", None, "invalid_score"),
    ("empty", None, "invalid_score"),
    ("nan", None, "invalid_score"),
    ("inf", None, "invalid_score"),
    ("text", None, "invalid_score"),
    ("nothing", None, "invalid_score"),
    ("number", None, "invalid_score"),
]


@pytest.mark.parametrize(("completion", "wanted", "outcome"), BEHAVIOUR)
def test_every_behaviour_has_its_outcome_and_spares_the_neighbours(
    pool, completion, wanted, outcome
):
    # First of twenty, so that it takes the rest of a slice down with it.
    report = score(pool, [completion, *map(str, range(1, 20))])
    assert report.scores["reward"] == [wanted, *map(float, range(1, 20))]
    assert report.totals == report.scores["reward"]
    counts = dict(report.outcomes["reward"])
    assert counts == ({"ok": 20} if outcome == "ok" else {"ok": 19, outcome: 1})
    failed = outcome not in ("ok", "none")
    assert report.error_rate("reward") == (0.05 if failed else 0.0)
    name = "raised" if outcome == "error" else outcome  # error_rate is the sum of all failures
    assert report.rates("reward") == ({} if outcome == "ok" else {name: 0.05})
    assert set(report.first_errors) == ({"reward"} if failed else set())


def test_everything_at_once_keeps_the_order(pool):
    completions = []
    for index, (behaviour, _, _) in enumerate(BEHAVIOUR):
        completions += [behaviour, str(index)]
    report = score(pool, completions)
    wanted = []
    for index, (_, value, _) in enumerate(BEHAVIOUR):
        wanted += [value, float(index)]
    assert report.scores["reward"] == wanted
    assert sum(report.outcomes["reward"].values()) == len(completions)


def test_error_messages_say_what_happened(pool):
    def first(completion):
        return score(pool, [completion]).first_errors["reward"]

    assert first("raise").startswith("ValueError: why not (misbehave.py:")
    assert "exited with code 3" in first("exit")
    assert "signal 11" in first("crash")
    assert "no answer after 0.6 s" in first("sleep")
    assert "returned 2 scores for 1 completion" in first("two")
    assert "returned nan" in first("nan")
    printed = first("print")
    assert "after printing" in printed and "the last line | on stderr" in printed
    assert len(printed) < 3000


def test_the_deadline_holds_in_a_c_loop(pool):
    start = time.monotonic()
    score(pool, ["loop in C"])
    assert 0.6 <= time.monotonic() - start < 3


def test_rewards_do_not_write_to_our_output(pool, capfd):
    score(pool, ["print and score", "print"])
    assert capfd.readouterr() == ("", "")


def test_no_zombie_and_no_grandchild_is_left(pool, tmp_path):
    note = tmp_path / "pid"
    before = children()
    report = score(pool, ["child"], note=[str(note)])
    assert report.outcomes["reward"] == {"timeout": 1}
    wait_until(lambda: not alive(int(note.read_text())))
    workers = {worker.process.pid for worker in pool._workers}
    assert children() - workers <= before


def test_threads_get_the_same_scores(pool):
    wanted = [float(index) for index in range(40)]
    results = {}

    def work(name):
        results[name] = score(pool, [str(index) for index in range(40)]).scores["reward"]

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), wanted)


def test_the_callers_alarm_is_left_alone(pool):
    rang = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rang.append(time.monotonic()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        assert score(pool, ["sleep", "1"]).scores["reward"] == [None, 1.0]
        assert len(rang) == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def test_an_interrupted_batch_leaves_a_usable_pool(pool):
    def interrupt(*_):
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            score(pool, ["sleep"] * 20)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert score(pool, ["1", "2"]).scores["reward"] == [1.0, 2.0]


def test_an_empty_batch_is_an_empty_report(pool):
    report = score(pool, [])
    assert report.scores == {"reward": []} and report.totals == []


def test_too_many_failures_stop_with_one_line(rewards_file):
    function = f"{rewards_file}:reward"
    with RewardPool([function], num_workers=1, timeout_s=5, max_error_rate=0.5) as pool:
        assert score(pool, ["raise", "nan", "1", "2"]).scores["reward"] == [None, None, 1.0, 2.0]
        with pytest.raises(RewardError) as caught:
            score(pool, ["raise", "nan", "raise", "2"])
        message = str(caught.value)
        assert "reward 'reward' failed on 3 of 4 completions (error 2, invalid_score 1)" in message
        assert "max_error_rate=0.5" in message and "ValueError: why not" in message
        assert isinstance(caught.value, UserError) and "\n" not in message
        assert score(pool, ["3"]).scores["reward"] == [3.0]


def test_a_hopeless_batch_is_given_up_early(rewards_file):
    with RewardPool(
        [f"{rewards_file}:reward"], num_workers=2, timeout_s=0.3, max_error_rate=0.05
    ) as pool:
        start = time.monotonic()
        with pytest.raises(RewardError, match="timeout"):
            score(pool, ["sleep"] * 60)  # 9 s if every one were waited for
        assert time.monotonic() - start < 5


def test_slow_rewards_are_spread_over_the_workers(rewards_file):
    with RewardPool([f"{rewards_file}:slow"], num_workers=4) as pool:
        wait_until(lambda: (score(pool, ["a"] * 4), all(w.ready for w in pool._workers))[1])
        start = time.monotonic()
        score(pool, ["a"] * 40)
        assert time.monotonic() - start < 0.05 * 40 * 0.5


def test_batched_rewards_see_all_completions(rewards_file):
    specs = [
        RewardSpec("longest", f"{rewards_file}:longest", batched=True),
        RewardSpec("each", f"{rewards_file}:reward"),
    ]
    with RewardPool(specs, num_workers=2, max_error_rate=1.0) as pool:
        report = score(pool, ["1", "22", "3", "44"])
        assert report.scores == {"longest": [0.0, 1.0, 0.0, 1.0], "each": [1.0, 22.0, 3.0, 44.0]}
        report = score(pool, ["5" * 101, "6"])
        assert report.scores["longest"] == [None, None]
        assert report.outcomes["longest"] == {"invalid_score": 2}


def test_weights_and_failures_in_the_total(rewards_file):
    specs = [
        RewardSpec("a", f"{rewards_file}:reward", weight=2.0),
        RewardSpec("b", f"{rewards_file}:longest", weight=0.5),
    ]
    with RewardPool(specs, num_workers=1, max_error_rate=1.0) as pool:
        report = score(pool, ["3", "none", "raise"])
    assert report.scores["a"] == [3.0, None, None]
    assert report.scores["b"] == [1.0, 1.0, 1.0]
    # None by choice leaves the other reward standing; a failure makes the total unknown.
    assert report.totals == [6.5, 0.5, None]


def test_built_ins_in_the_pool_count_their_own_outcomes():
    pytest.importorskip("math_verify")
    completions = [
        "<think>a</think> <answer>2\\sqrt{2}</answer>",
        "<think>a</think> <answer>3</answer>",
        "<think>a</think> 3",
        "<think>a</think> <answer>1</answer>",
    ]
    solution = [r"\sqrt8", "3", "3", r"\frac{1"]
    with RewardPool(["accuracy", "format"], num_workers=1) as pool:
        report = score(pool, completions, solution=solution)
    assert report.scores["accuracy"] == [1.0, 1.0, 0.0, None]
    assert report.scores["format"] == [1.0, 1.0, 0.0, 1.0]
    assert report.outcomes["accuracy"] == {"ok": 2, "no_answer": 1, "gold_invalid": 1}
    assert report.totals == [2.0, 2.0, 0.0, None]


def test_reasoning_gym_rows_in_the_pool():
    pytest.importorskip("reasoning_gym")
    from grpo_engine.data import columns_of, load_rows

    rows = load_rows("reasoning_gym:chain_sum", args={"size": 6})
    completions = [f"<answer>{row['solution']}</answer>" for row in rows]
    completions[2] = "<answer>no</answer>"
    with RewardPool(["reasoning_gym"], num_workers=1) as pool:
        report = pool.score([row["prompt"] for row in rows], completions, columns_of(rows))
    assert report.scores["reasoning_gym"] == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]


def test_the_first_error_is_that_of_the_first_completion_not_of_the_fastest_worker(tmp_path):
    (tmp_path / "late.py").write_text(
        "import time\n"
        "def reward(completions, **columns):\n"
        "    time.sleep(float(completions[0]))\n"
        "    raise ValueError(completions[0])\n"
    )
    rewards = [f"{tmp_path / 'late.py'}:reward"]
    with RewardPool(rewards, num_workers=2, max_error_rate=1.0) as pool:
        report = pool.score(["q"] * 2, ["0.4", "0.0"], {})
    assert report.first_errors["reward"].startswith("ValueError: 0.4")


def test_a_row_of_another_kind_gets_no_score_and_keeps_its_sum():
    pytest.importorskip("math_verify")
    columns = {
        "solution": ["4", None, "B", None],
        "num_choices": [None, None, 4, None],
        "task": [None, "chain_sum", None, None],
        "entry": [None, {"answer": "4", "question": "2 + 2"}, None, None],
    }
    answer = "<think>a</think> <answer>4</answer>"
    choice = "<think>a</think> <answer>B</answer>"
    with RewardPool(["choice", "reasoning_gym", "format"], num_workers=1) as pool:
        report = score(pool, [answer, answer, choice, "no answer"], **columns)
    assert report.scores["choice"] == [None, None, 1.0, None]
    assert report.scores["reasoning_gym"] == [None, 1.0, None, None]
    assert report.outcomes["reasoning_gym"] == {"ok": 1, "none": 3}
    assert report.totals == [1.0, 2.0, 2.0, 0.0]


def test_missing_columns_and_unequal_lengths_are_named(pool):
    wanted = "'accuracy' needs the column 'solution'; the rows have: answer, level"
    with RewardPool(["accuracy"], num_workers=1) as accuracy, pytest.raises(UserError) as caught:
        score(accuracy, ["1"], answer=["1"], level=[2])
    assert wanted in str(caught.value)
    with pytest.raises(UserError, match="2 completions but 1 values of 'solution'"):
        score(pool, ["1", "2"], solution=["1"])


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        ([], {}, "at least one reward"),
        (["format", "format"], {}, "names must differ"),
        (["no_such_module_here:fn"], {}, "cannot import 'no_such_module_here'"),
        (["json:dumps"], {}, "wanted TRL's"),
        ([RewardSpec("format", "format", args={"prefill": 1})], {}, "no argument 'prefill'"),
        ([RewardSpec("accuracy", "accuracy", batched=True)], {}, "batched needs the TRL signature"),
        (["format"], {"num_workers": 0}, "num_workers must be >= 1, got 0"),
        (["format"], {"timeout_s": 0}, "timeout_s must be > 0, got 0"),
        (["format"], {"max_error_rate": 2}, "max_error_rate must be in"),
    ],
)
def test_a_bad_configuration_is_named_at_the_start(rewards, options, message):
    with pytest.raises(UserError) as caught:
        RewardPool(rewards, **{"num_workers": 1, **options})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_worker_that_cannot_start_is_not_retried_for_ever(tmp_path):
    path = tmp_path / "dies.py"
    path.write_text("import os\nprint('half way', flush=True)\nos._exit(9)\n")
    with pytest.raises(UserError, match="fail to start: .*exited with code 9.*half way"):
        RewardPool([f"{path}:reward"], num_workers=1)


def test_workers_are_replaced_after_their_share_of_work(rewards_file):
    with RewardPool([f"{rewards_file}:reward"], num_workers=1, max_scores_per_worker=10) as pool:
        before = pool._workers[0].process.pid
        assert score(pool, ["1"] * 30).scores["reward"] == [1.0] * 30
        assert pool._workers[0].process.pid != before


def test_close_leaves_nothing_and_is_final(rewards_file):
    pool = RewardPool([f"{rewards_file}:reward"], num_workers=2)
    pids = [worker.process.pid for worker in pool._workers]
    descriptors = len(os.listdir("/proc/self/fd"))
    pool.close()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert len(os.listdir("/proc/self/fd")) == descriptors - 3 * 2
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        score(pool, ["1"])


def test_a_dropped_pool_is_cleaned_up(rewards_file):
    pool = RewardPool([f"{rewards_file}:reward"], num_workers=1)
    pid = pool._workers[0].process.pid
    del pool
    assert not os.path.exists(f"/proc/{pid}")


@pytest.mark.parametrize("completion", ["sleep", "loop in C", None])
def test_workers_die_with_a_killed_parent(rewards_file, completion):
    script = textwrap.dedent(
        f"""
        from grpo_engine.rewards import RewardPool
        pool = RewardPool([{str(rewards_file) + ":reward"!r}], num_workers=2, timeout_s=1000)
        print(*[worker.process.pid for worker in pool._workers], flush=True)
        import time
        completion = {completion!r}
        pool.score(["q"] * 20, [completion] * 20, {{}}) if completion else time.sleep(1000)
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        time.sleep(0.5)  # let the work begin
        assert len(pids) == 2 and all(alive(pid) for pid in pids)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    wait_until(lambda: not any(alive(pid) for pid in pids))


def test_cheap_rewards_stay_cheap():
    completions = [
        f"<think>{'a' * 200}</think> <answer>{index % 7}</answer>" for index in range(256)
    ]
    solution = [str(index % 5) for index in range(256)]
    with RewardPool(["accuracy", "format"], num_workers=2) as pool:
        score(pool, completions, solution=solution)
        times = []
        for _ in range(10):
            start = time.perf_counter()
            report = score(pool, completions, solution=solution)
            times.append(time.perf_counter() - start)
    assert report.outcomes["format"] == {"ok": 256}
    # About 12 ms on two idle cores; the bound leaves room for a loaded machine.
    assert min(times) < 0.1
