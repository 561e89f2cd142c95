"""grpo-engine bench, the verb: flags, exit codes, what it writes."""

import json
import subprocess
import sys
import time

import pytest
import torch
from bench_parts import CPU, exact, provider

from grpo_engine.bench import command, measure, options
from grpo_engine.bench.cases import Case
from grpo_engine.bench.machine import hardware, slug
from grpo_engine.bench.targets import main_case, target_cases
from grpo_engine.cli import main

# -- the verb ------------------------------------------------------------------------------------


@pytest.fixture
def quick_copy(monkeypatch):
    """The bandwidth measurement takes half a gigabyte; here a few kilobytes do."""
    monkeypatch.setattr("grpo_engine.bench.floors.COPY_BYTES_CPU", 2**12)


def bench(*words):
    return main(["bench", *map(str, words)])


SMALL = ("--case", "small grpo_loss", "--provider", "ours", "--provider", "torch", "--quick")


def test_bench_from_end_to_end(tmp_path, capsys, quick_copy):
    flags = (*SMALL, "--device", "cpu", "--rounds", "2", "--out", tmp_path / "a")
    assert bench(*flags) == 0
    stem = slug(hardware(CPU))
    result = json.loads((tmp_path / "a" / f"{stem}.json").read_text())
    assert result["device"] == "cpu" and not result["interrupted"]
    assert result["command"].startswith("grpo-engine bench --case 'small grpo_loss'")
    assert [row["provider"] for row in result["rows"]] == ["ours", "torch"]
    for row in result["rows"]:
        assert row["hardware"] == hardware(CPU) and "torch" in row["versions"]
        assert row["code"] and row["date"] and row["status"] == "ok" and row["rounds"] == 2
        assert set(row["errors"]) == {"loss", "d_logprobs"} and row["percent_of_floor"] > 0
        assert row["ms"]["q1"] <= row["ms"]["median"] <= row["ms"]["q3"]
        assert 0 < row["peak_mib"] < 1 and row["wall_ms"] is None
    page = (tmp_path / "a" / f"{stem}.md").read_text()
    shown = capsys.readouterr().out
    for text in (page, shown):
        assert "small grpo_loss" in text and "CPU" in text and "nothing about a GPU" in text

    base = tmp_path / "a" / f"{stem}.json"
    for row in result["rows"]:  # what this machine does today is not the test's subject
        row["ms"] = dict.fromkeys(row["ms"], 1000000.0)
    base.write_text(json.dumps(result))
    assert bench(*flags[:-1], tmp_path / "b", "--compare", tmp_path / "a") == 0
    assert "1 rows: none worse than the baseline" in capsys.readouterr().out
    for row in result["rows"]:
        row["ms"] = dict.fromkeys(row["ms"], 1e-09)
    base.write_text(json.dumps(result))
    assert bench(*flags[:-1], tmp_path / "b", "--compare", base) == 1
    (line,) = [w for w in capsys.readouterr().out.splitlines() if w.startswith("WORSE")]
    assert "small grpo_loss, forward+backward, ours" in line
    capsys.readouterr()
    other = (*SMALL[2:], "--case", "small group_advantages", "--device", "cpu")
    assert bench(*other, "--out", tmp_path / "b", "--compare", base) == 2
    shown, error = capsys.readouterr()
    assert shown == "" and "none of its rows is of a case and provider chosen here" in error
    result["hardware"] = "CPU, another"
    base.write_text(json.dumps(result))
    assert bench(*flags[:-1], tmp_path / "b", "--compare", base) == 2
    assert "measured on 'CPU, another'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--job", "logprobs"), ["--job logprobs", "token_logprobs"]),
        (("--case", "nothing like it"), ["--case nothing like it", "--list"]),
        (("--case", "small pack", "--job", "grpo_loss"), ["--case small pack", "job grpo_loss"]),
        (("--provider", "mine"), ["--provider mine", "'ours'"]),
        (("--dtype", "fp8"), ["--dtype fp8", "bf16"]),
        (("--rounds", "0"), ["--rounds 0"]),
        (("--rounds", "many"), ["--rounds many"]),
        (("--seconds", "-1"), ["--seconds -1"]),
        (("--device", "tpu"), ["--device tpu", "cuda"]),
        (("--device", "meta"), ["--device meta"]),
        (("--out", "{}/file/under"), ["--out", "file/under", "not writable"]),
        (("--compare", "{}/absent.json"), ["--compare", "absent.json", "No such file"]),
        (("--compare", "{}"), ["--compare", "for this machine"]),
        (("--compare", "{}/file"), ["--compare", "file", "not JSON"]),
        (("--recipe", "r1-zero"), ["--recipe r1-zero", "no such flag"]),
        (("--shape", "3"), ["--shape 3", "no such flag"]),
        (("--dtype", "bf16", "--dtype", "fp16"), ["--dtype bf16", "--dtype fp16"]),
        (("--truth", "--case", "small pack"), ["--case", "--truth"]),
        (("--quick=1",), ["--quick=1", "no value"]),
        (("--out=",), ["--out", "needs a path"]),
        (("--list", "--compare", "{}"), ["--compare", "--list measures nothing"]),
        (("--list", "--profile"), ["--profile", "--list"]),
        (("small",), ["small"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_flag_is_one_line(tmp_path, capsys, flags, words):
    (tmp_path / "file").write_text("text")
    flags = [flag.format(tmp_path) for flag in flags]
    if not {"--case", "--truth"} & set(flags):
        flags += ["--case", "small grpo_loss"]
    out = [] if {"--out", "--out=", "--list"} & set(flags) else ["--out", tmp_path / "out"]
    assert bench(*flags, *out) == 2
    shown, error = capsys.readouterr()
    assert shown == "" and len(error.strip().splitlines()) == 1 and "Traceback" not in error
    assert error.startswith("grpo-engine: error: ")
    for word in words:
        assert word in error
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(capsys):
    assert bench("--device", "cuda") == 2
    assert "--device cuda: no CUDA device here" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_measured(tmp_path, capsys, quick_copy, monkeypatch):
    measured = measure.measure_case

    def stop_at_the_second(case, *rest):
        if case.job == "group_advantages":
            raise KeyboardInterrupt
        measured(case, *rest)

    monkeypatch.setattr(command, "measure_case", stop_at_the_second)
    code = bench(*SMALL, "--case", "small group_advantages", "--device", "cpu", "--out", tmp_path)
    assert code == 130
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["interrupted"] and {row["case"] for row in result["rows"]} == {"small grpo_loss"}
    assert "**Interrupted" in path.with_suffix(".md").read_text()


def test_nothing_measured_replaces_nothing(tmp_path, capsys, quick_copy, monkeypatch):
    flags = (*SMALL, "--device", "cpu", "--rounds", "2", "--out", tmp_path)
    assert bench(*flags) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure_case", stop)
    assert bench(*flags) == 130
    assert "nothing was measured or written" in capsys.readouterr().out
    assert bench(*flags, "--compare", tmp_path) == 130
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_trouble_after_the_measurements_loses_none(tmp_path, capsys, quick_copy, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    flags = (*SMALL, "--device", "cpu", "--rounds", "2")
    monkeypatch.setattr(command, "write_roofline", broken)
    assert bench(*flags, "--out", tmp_path / "a") == 0
    assert "no roofline: RuntimeError: out of memory" in capsys.readouterr().out
    monkeypatch.setattr(command, "extras", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        bench(*flags, "--out", tmp_path / "b")
    for folder in ("a", "b"):
        (path,) = (tmp_path / folder).glob("*.json")
        result = json.loads(path.read_text())
        assert [row["provider"] for row in result["rows"]] == ["ours", "torch"]
        assert result["interrupted"] == (folder == "b")


def test_a_reader_that_goes_loses_nothing(tmp_path, quick_copy, monkeypatch):
    measured = measure.measure_case

    def first_alone(case, *rest):
        if case.job == "group_advantages":
            monkeypatch.setattr(command, "say", gone)
            gone()
        measured(case, *rest)

    def gone(*_):
        raise BrokenPipeError

    monkeypatch.setattr(command, "measure_case", first_alone)
    flags = (*SMALL, "--case", "small group_advantages", "--device", "cpu", "--out", tmp_path)
    assert bench(*flags) == 141
    (path,) = tmp_path.glob("*.json")
    assert {r["case"] for r in json.loads(path.read_text())["rows"]} == {"small grpo_loss"}


def test_cases_that_the_seconds_do_not_allow_are_named(tmp_path, capsys, quick_copy, monkeypatch):
    monkeypatch.setattr(command, "measure_case", lambda *_: time.sleep(1.1))
    flags = ("--case", "small pack", "--case", "small grpo_loss", "--seconds", 1, "--quick")
    assert bench(*flags, "--device", "cpu", "--out", tmp_path) == 0
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert list(result["case_s"]) == ["small pack"]
    assert "not measured, 1 s were up: small grpo_loss" in result["notes"]


def test_our_own_wrong_result_fails_the_run(tmp_path, capsys, quick_copy, monkeypatch):
    def doubled(inputs, backward):
        return {"advantages": 2 * exact(inputs, backward)["advantages"]}

    ours = provider("ours", doubled, [])
    monkeypatch.setattr(options, "PROVIDERS", (ours, provider("torch", exact, [])))
    flags = ("--case", "small group_advantages", "--device", "cpu", "--quick", "--out", tmp_path)
    assert bench(*flags) == 1
    assert "WRONG: small group_advantages, forward, ours" in capsys.readouterr().out


def test_list_names_cases_and_providers(capsys):
    assert bench("--list", "--job", "pack", "--device", "cpu") == 0
    shown = capsys.readouterr().out
    assert "pack S=64" in shown and "provider  ours" in shown and "grpo_loss" not in shown


def test_a_reader_that_has_enough_ends_the_list():
    code = "import sys; from grpo_engine.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, "bench", "--list", "--device", "cpu"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_help_names_every_flag(capsys):
    assert bench("--help") == 0
    shown = capsys.readouterr().out
    for flag in ("job", "case", "provider", "device", "dtype", "rounds", "out", "quick", "truth"):
        assert f"--{flag} " in shown


def test_dtype_changes_the_heads_and_says_so():
    chosen = options.read_options([("device", "cpu"), ("dtype", "bf16")], set()).cases
    heads = [case for case in chosen if "V" in case.sizes]
    assert heads and all(case.dtype == torch.bfloat16 for case in heads)
    assert all("bfloat16" in case.name for case in heads)
    assert {c.dtype for c in chosen if "V" not in c.sizes} == {torch.float32}


def test_quick_takes_one_case_of_each_job_on_a_cpu():
    cases = options.read_options([("device", "cpu")], {"quick"}).cases
    assert sorted(case.job for case in cases) == sorted(options.JOBS)


def test_quick_waits_for_no_compiler_unless_told_to():
    def names(pairs, switches):
        chosen = options.read_options(
            [("device", "cpu"), ("job", "linear_logprobs"), *pairs], switches
        )
        return {provider.name for provider in chosen.providers}

    assert "torch.compile" in names([], set())
    assert "torch.compile" not in names([], {"quick"}) and "torch" in names([], {"quick"})
    assert names([("provider", "torch.compile")], {"quick"}) == {"torch.compile"}


def test_quick_waits_for_compilers_in_the_main_case_of_the_targets(monkeypatch):
    monkeypatch.setattr(options, "known_cases", lambda device: target_cases())
    flags = [
        ("device", "cpu"),
        ("job", "linear_grpo_loss"),
    ]
    flags += [("case", "linear_grpo_loss Qwen3-8B N=16384 bfloat16")]
    chosen = options.read_options(flags, {"quick"})
    compiling = {"torch.compile", "Liger FusedLinearGRPOLoss"}
    assert main_case() in chosen.cases and len(chosen.cases) > 1
    for case in chosen.cases:
        found = {provider.name for provider in chosen.providers_for(case)}
        assert compiling & found == (compiling if case == main_case() else set()), case.name
    chosen = options.read_options([*flags, ("provider", "torch")], {"quick"})
    assert [p.name for p in chosen.providers_for(main_case())] == ["torch"]


def test_profile_writes_a_trace_and_a_table(tmp_path, capsys, quick_copy):
    assert bench(*SMALL, "--device", "cpu", "--profile", "--out", tmp_path) == 0
    traces = list(tmp_path.glob("trace-small-grpo_loss*ours.json"))
    assert len(traces) == 1 and json.loads(traces[0].read_text())["traceEvents"]
    (path,) = tmp_path.glob("*.md")
    page = path.read_text()
    assert "Profile: small grpo_loss, forward+backward, ours" in page and "ncu" in page


def test_a_case_that_has_no_room_is_noted_and_the_next_is_profiled(
    tmp_path, quick_copy, monkeypatch
):
    made = Case.make

    def make(case, device, *rest):
        if profiling_now and case.job == "group_advantages":
            raise MemoryError("no room")
        return made(case, device, *rest)

    profiling_now, profiled = [], command.profile_rows

    def profile(*args):
        profiling_now.append(True)
        return profiled(*args)

    monkeypatch.setattr(Case, "make", make)
    monkeypatch.setattr(command, "profile_rows", profile)
    flags = ("--case", "small group_advantages", *SMALL, "--device", "cpu", "--profile")
    assert bench(*flags, "--out", tmp_path) == 0
    (path,) = tmp_path.glob("cpu*.json")
    result = json.loads(path.read_text())
    noted = [note for note in result["notes"] if note.startswith("not profiled: small group_adv")]
    assert noted and all("MemoryError: no room" in note for note in noted)
    assert any("small grpo_loss" in title for title in result["sections"])


def test_the_ahead_of_time_table(monkeypatch):
    pytest.importorskip("triton")
    from grpo_engine.bench import ahead_of_time

    if ahead_of_time.interpreting():
        assert "TRITON_INTERPRET" in ahead_of_time.resource_table()
        return
    first = ahead_of_time.aot_cases()[:1]
    monkeypatch.setattr(ahead_of_time, "aot_cases", lambda: first)
    (row,) = ahead_of_time.resource_table()["rows"]
    assert row[0] == first[0].kernel_name and int(row[1]) > 0
