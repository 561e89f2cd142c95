"""grpo-engine bench: the gate, the clock, the floors, profiles."""

import contextlib
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_parts import ADVANTAGES, CPU, exact, provider

from grpo_engine.bench import measure, ncu, options
from grpo_engine.bench.cases import Case, gpu_cases, small_cases
from grpo_engine.bench.floors import copy_floor, floor_of, least_work
from grpo_engine.bench.peers.plain_torch import SHAPES, many_shapes
from grpo_engine.bench.profiling import kernels_by_time
from grpo_engine.bench.rows import ABSENT, BOTH, FAILED, FORWARD, OK, WRONG
from grpo_engine.bench.timing import Clock, Runner, Spread, interleave, peak_mib
from grpo_engine.types import UserError

# -- the gate ------------------------------------------------------------------------------------


def test_only_what_is_right_is_timed():
    calls = []

    def twice(inputs, backward):
        return {"advantages": 2 * exact(inputs, backward)["advantages"]}

    def raising(inputs, backward):
        raise ValueError("shape must be (3,)\nand a second line")

    def overwriting(inputs, backward):
        outputs = exact(inputs, backward)
        inputs["rewards"].add_(1)
        return outputs

    providers = [
        provider("overwrites", overwriting, calls),
        provider("twice", twice, calls),
        provider("raises", raising, calls),
        provider("absent", exact, calls, missing=lambda device: "needs a GPU"),
        provider("ours", exact, calls),
        provider("torch", exact, calls),
    ]
    rows = []
    measure.measure_case(ADVANTAGES, providers, Clock(CPU), 3, rows)
    found = {row.provider: row for row in rows}
    assert [row.provider for row in rows] == [p.name for p in providers]
    assert found["overwrites"].status == FAILED and "overwrote" in found["overwrites"].reason
    assert found["twice"].status == WRONG and found["twice"].errors["advantages"] > 0.1
    assert found["raises"].reason == "ValueError: shape must be (3,)"
    assert found["absent"].status == ABSENT and found["absent"].reason == "needs a GPU"
    assert calls.count("twice") == calls.count("raises") == calls.count("overwrites") == 1
    assert "absent" not in calls
    for name in ("ours", "torch"):
        assert found[name].status == OK and found[name].rounds == 3
        assert found[name].floor_ms.median > 0 and found[name].peak_mib > 0
    for name in ("twice", "raises", "absent", "overwrites"):
        assert found[name].ms is None and found[name].peak_mib is None


def test_a_row_says_what_a_forward_pass_alone_and_both_passes_cost():
    case = next(case for case in small_cases() if case.job == "token_logprobs")
    rows = []
    ours = [p for p in options.PROVIDERS if p.job == case.job and p.name == "ours"]
    measure.measure_case(case, ours, Clock(CPU), 2, rows)
    assert [row.passes for row in rows] == [FORWARD, BOTH]
    assert "d_logits" in rows[1].errors and "d_logits" not in rows[0].errors
    assert rows[1].bytes == 3 * rows[0].bytes == 3 * 4 * 12 * 131


def test_the_compilers_limits_are_lifted_around_the_clock_not_under_it():
    asked = []

    def run(inputs, backward):
        asked.append((torch._dynamo.config.recompile_limit, type(many_shapes())))
        return exact(inputs, backward)

    before = torch._dynamo.config.recompile_limit
    measure.measure_case(ADVANTAGES, [provider("compiled", run, [])], Clock(CPU), 1, [])
    assert set(asked) == {(SHAPES, contextlib.nullcontext)}
    assert torch._dynamo.config.recompile_limit == before < SHAPES


def test_fields_in_a_table_are_inputs_too():
    inputs = {"lengths": torch.ones(2), "fields": {"rewards": torch.ones(3)}, "S": 2}
    before = measure.checksums(inputs)
    inputs["fields"]["rewards"][1] = 2
    assert measure.checksums(inputs) != before


def test_inputs_that_cannot_be_made_are_reported(monkeypatch):
    def make(self, device, seed=0):
        raise self.error

    monkeypatch.setattr(Case, "make", make)
    for error, status in ((UserError("no weights here"), ABSENT), (MemoryError("17 GiB"), FAILED)):
        monkeypatch.setattr(Case, "error", error, raising=False)
        rows = []
        measure.measure_case(ADVANTAGES, [provider("ours", exact, [])], Clock(CPU), 1, rows)
        assert [row.status for row in rows] == [status] and str(error) in rows[0].reason


# -- the clock -----------------------------------------------------------------------------------


class Ticks(Clock):
    """A clock for which a call takes as many ms as ``cost`` says."""

    def __init__(self, cost):
        super().__init__(CPU)
        self.cost, self.repeated = cost, []

    def sample(self, runner, repeats=1):
        self.repeated.append(repeats)
        runner()
        return self.cost, None


def test_rounds_interleave_and_a_failure_stops_only_its_own():
    calls = []

    def failing(_):
        calls.append("b")
        if calls.count("b") > 2:
            raise RuntimeError("no more")

    runners = {
        "a": Runner(lambda _: calls.append("a")),
        "b": Runner(failing),
        "c": Runner(lambda _: calls.append("c")),
    }
    samples = interleave(runners, Ticks(5.0), 3)
    assert calls == list("abcabcbcaca")  # warm-up, and each round begins with the next
    assert [len(samples[name].times) for name in "abc"] == [3, 1, 3]
    assert samples["b"].failure == "RuntimeError: no more" and samples["a"].failure is None


def test_short_calls_are_repeated_and_destroyed_inputs_are_not_shared():
    given = []
    clock = Ticks(0.01)
    runners = {"short": Runner(lambda _: None), "fresh": Runner(given.append, lambda: object())}
    interleave(runners, clock, 2)
    assert clock.repeated == [1, 1, 200, 1, 1, 200]
    assert len(set(map(id, given))) == len(given) == 3


def test_a_slow_runner_keeps_one_round():
    clock = Clock(CPU)
    runners = {"slow": Runner(lambda _: None), "other": Runner(lambda _: None)}
    samples = interleave(runners, clock, 4, budget_s=-1.0)
    assert [len(s.times) for s in samples.values()] == [1, 1]


def test_what_was_taken_before_an_interrupt_is_kept():
    calls, samples = [], {}

    def stop(_):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave({"a": Runner(stop)}, Ticks(5.0), 9, samples=samples)
    assert samples["a"].times == [5.0, 5.0]


def test_spread_of_times():
    found = Spread.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.median, found.q1, found.q3, found.least, found.most) == (3, 2, 4, 1, 100)
    assert Spread.of([2.0]).q3 == 2.0
    with pytest.raises(ValueError, match="no times"):
        Spread.of([])


def test_peak_counts_what_is_held_at_once():
    def run(_):
        first = torch.zeros(2**20)  # 4 MiB
        second = first + 1
        del first
        return second * 2

    assert peak_mib(Runner(run), CPU) == pytest.approx(8, abs=0.1)


def test_the_cpu_clock_measures_time():
    took, wall = Clock(CPU).sample(Runner(lambda _: sum(range(200_000))))
    assert 0.1 < took < 5_000 and wall is None


def test_on_cuda_the_cache_is_flushed_before_each_clock(monkeypatch):
    """The order of events, with a device that only notes what it is told."""
    told = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            told.append("event")

        def synchronize(self):
            told.append("wait")

        def elapsed_time(self, end):
            return took

    class Flush:
        def zero_(self):
            told.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: told.append("idle"))
    clock = Clock(CPU)
    clock._flush = Flush()
    runner = Runner(lambda _: told.append("run"), lambda: told.append("prepare"))
    took = 1.0
    device_ms, wall_ms = clock.sample(runner)
    assert device_ms == 1.0 and wall_ms >= 0 and clock.repeats(runner, 0.001) == 1
    first = ["prepare", "flush", "event", "run", "event", "wait"]
    assert told == [*first, "prepare", "flush", "idle", "run", "idle"]
    took = 100.0
    told.clear()
    assert clock.sample(runner) == (100.0, None) and told == first


def test_the_kernels_of_a_gpu_are_listed_by_time():
    kernel = SimpleNamespace(device_type=torch.autograd.DeviceType.CUDA, count=2)
    gemm = SimpleNamespace(
        key="void gemm<float, 8>(int)", self_device_time_total=3e3, **vars(kernel)
    )
    fold = SimpleNamespace(key="fold", self_device_time_total=1e3, **vars(kernel))
    host = SimpleNamespace(device_type=torch.autograd.DeviceType.CPU, key="aten::mm")
    table = kernels_by_time([fold, host, gemm], torch.device("cuda"))
    assert table["columns"][0] == "kernel"
    assert table["rows"] == [
        ["gemm<...>(int)", "2", "3.000", "75.0"],
        ["fold", "2", "1.000", "25.0"],
    ]


# -- floors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "backward", "label", "gemms"),
    [
        (set(), False, "1 bare GEMM", 1),
        (set(), True, "3 bare GEMMs", 3),
        ({"frozen_head"}, True, "2 bare GEMMs", 2),
    ],
)
def test_the_floor_of_a_head_is_its_matrix_products(features, backward, label, gemms):
    sizes = {"N": 8, "D": 16, "V": 50, "S": 2}
    case = Case("head", "linear_logprobs", sizes, features=frozenset(features))
    inputs = case.make(CPU)
    work = least_work(case, inputs, {}, backward)
    floor = floor_of(case, inputs, work, backward)
    assert floor.label == label and work.flops == gemms * 2 * 8 * 16 * 50
    floor.run()


def test_rows_without_a_gradient_need_no_backward():
    sizes = {"N": 64, "D": 8, "V": 20, "S": 1}
    case = Case("dead", "linear_logprobs", sizes, features=frozenset({"half_dead"}))
    inputs = case.make(CPU)
    live = int((inputs["grad_logprobs"] != 0).sum())
    assert 0 < live < 64
    floor = floor_of(case, inputs, least_work(case, inputs, {}, True), True)
    assert floor.label == f"3 bare GEMMs, backward on {live} rows"
    assert least_work(case, inputs, {}, True).flops == 2 * 8 * 20 * (64 + 2 * live)
    floor.run()


def test_memory_jobs_have_a_copy_as_their_floor_and_planning_none():
    case = next(case for case in small_cases() if case.job == "pack")
    inputs = case.make(CPU)
    total = len(inputs["token_ids"])
    outputs = {"token_ids": torch.empty(total, dtype=torch.int64, device="meta")}
    work = least_work(case, inputs, outputs, False)
    assert work.bytes == 8 * total + 3 * 4 * total + 8 * total
    assert "copy moving" in floor_of(case, inputs, work, False).label
    assert copy_floor(2**21, CPU).run().numel() == 2**20
    plan = next(case for case in small_cases() if case.job == "plan_batches")
    assert floor_of(plan, plan.make(CPU), work, False) is None


# -- ncu -----------------------------------------------------------------------------------------

HEAD = '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream",'
HEAD += '"Block Size","Grid Size","Device","CC","Section Name","Metric Name","Metric Unit",'
HEAD += '"Metric Value"'


def launch(number_of, kernel, *values):
    about = (
        f'"{number_of}","7","python","host","{kernel}","1","7","(128, 1, 1)","(8, 1, 1)","0","9.0"'
    )
    return [
        f'{about},"Command line profiler metrics","{metric}","unit","{value}"'
        for metric, value in zip(ncu.METRICS, values, strict=True)
    ]


def ncu_text(*launches):
    head = ["==PROF== Connected to process 7 (/usr/bin/python)", "printed by the program", HEAD]
    return "\n".join([*head, *sum(launches, []), "==PROF== Disconnected from process 7"])


def test_ncu_csv_is_summed_by_kernel():
    text = ncu_text(
        launch(0, "gemm(float, int)", "2,000,000", "4,294,967,296", "1,073,741,824", "50", "168"),
        launch(1, "fold", "500000", "1048576", "0", "90.5", "32"),
        launch(2, "gemm(float, int)", "1000000", "1073741824", "0", "80", "168"),
    )
    table = ncu.table(ncu.parse(text))
    assert table["columns"][0] == "kernel"
    gemm, fold = table["rows"]
    # bytes over ns are GB/s; occupancy is weighted by time: (50 x 2 + 80 x 1) / 3
    assert gemm == ["gemm(float, int)", "2", "3.000", "5120.0", "1024.0", "2147", "60.0", "168"]
    assert fold == ["fold", "1", "0.500", "1.0", "0.0", "2", "90.5", "32"]


def test_ncu_without_a_counter_says_na_and_without_a_table_fails():
    found = ncu.table(ncu.parse(ncu_text(launch(0, "k", "1000", "n/a", "5", "n/a", "8"))))
    assert found["rows"] == [["k", "1", "0.001", "n/a", "0.0", "n/a", "n/a", "8"]]
    with pytest.raises(ValueError, match="no table"):
        ncu.parse("==ERROR== ERR_NVGPUCTRPERM")
    with pytest.raises(ValueError, match="launch 0 of k has no launch__registers_per_thread"):
        ncu.parse(ncu_text(launch(0, "k", *["1"] * 5)[:-1]))


def test_ncu_is_run_and_its_own_error_shown(tmp_path, monkeypatch):
    """A stand-in on PATH, which prints what it was given to print."""
    (tmp_path / "ncu").write_text('#!/bin/sh\ncat "$(dirname "$0")/out"\nexit "$(cat "$0.code")"\n')
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "out").write_text(ncu_text(launch(0, "fold", "1000", "5", "5", "50", "8")))
    (tmp_path / "ncu.code").write_text("0")
    cuda = torch.device("cuda")
    table = ncu.measure(ADVANTAGES, FORWARD, "ours", cuda)
    assert table["rows"][0][:3] == ["fold", "1", "0.001"] and ncu.absent(cuda) is None
    (tmp_path / "out").write_text(
        "==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - no permission\n"
    )
    (tmp_path / "ncu.code").write_text("9")
    with pytest.raises(RuntimeError, match="ncu: ==ERROR== ERR_NVGPUCTRPERM"):
        ncu.measure(ADVANTAGES, FORWARD, "ours", cuda)


def test_ncu_that_takes_too_long_goes_with_what_it_started(tmp_path, monkeypatch):
    (tmp_path / "ncu").write_text(f"#!/bin/sh\nsleep 60 & echo $! > {tmp_path}/child\nwait\n")
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(ncu, "TIMEOUT_S", 1)
    with pytest.raises(subprocess.TimeoutExpired):
        ncu.measure(ADVANTAGES, FORWARD, "ours", torch.device("cuda"))
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    deadline = time.monotonic() + 5
    while child.exists() and ") Z " not in child.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists() or ") Z " in child.read_text()


def test_ncu_gets_the_very_case():
    for case in [*small_cases(torch.bfloat16), *gpu_cases()]:
        assert ncu.unpacked(ncu.packed(case)) == case


def test_without_a_gpu_there_is_no_ncu():
    assert "need a GPU" in ncu.absent(CPU)
