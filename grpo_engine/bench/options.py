"""The flags of ``grpo-engine bench``, checked before anything is measured."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from grpo_engine.bench.cases import JOBS, Case, cpu_cases, gpu_cases, small_cases
from grpo_engine.bench.floors import HEAD_JOBS
from grpo_engine.bench.machine import resolve_device
from grpo_engine.bench.provider import Provider
from grpo_engine.bench.providers import PROVIDERS
from grpo_engine.bench.targets import main_case, target_cases
from grpo_engine.types import UserError

USAGE = """\
grpo-engine bench [--flag value ...]

  Every kernel beside plain torch and every rival that is installed: same inputs, correct first,
  timed in turn, as a share of the floor measured in the same process.

  --job NAME          one job, again for more:
                      {jobs}
  --case NAME         one case, again for more: its name, a part of it, or a pattern with *
  --provider NAME     one provider, again for more: its name or a pattern with *
  --device NAME       cpu, cuda or cuda:1 (default: cuda where there is one)
  --dtype NAME        of heads and logits: fp32, bf16 or fp16 (default: the case's own)
  --rounds N          rounds that are kept (default: {rounds}; with --quick {quick})
  --seconds N         start no further case after N seconds; what is left out is named
  --out DIR           results as JSON, Markdown and roofline (default: {out}); they take the place
                      of this device's last ones, also where only some cases were chosen
  --quick             fewer cases (on a GPU those of the targets) and rounds; whoever compiles for
                      every shape takes part only in the first of those, or named by --provider
  --truth             the table of errors against fp64 instead of times
  --compare FILE|DIR  exit 1 where something got worse than in this baseline of this machine
  --profile           traces and kernels by time of every provider; on a GPU with ncu also bytes,
                      occupancy and bandwidth of every kernel
  --list              jobs, cases and providers, and why one cannot run here
"""

ROUNDS, QUICK_ROUNDS = 10, 5
OUT = "runs/bench"
DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class BenchOptions:
    device: torch.device
    cases: list[Case]
    providers: list[Provider]
    rounds: int
    seconds: int | None
    out: Path
    compare: Path | None
    quick: bool = False
    truth: bool = False
    profile: bool = False
    list: bool = False
    compiling: tuple[Provider, ...] = ()  # left out by --quick, but for the targets' main case

    def providers_of(self, job: str) -> list[Provider]:
        return [provider for provider in self.providers if provider.job == job]

    def providers_for(self, case: Case) -> list[Provider]:
        everyone = [*self.providers, *(self.compiling if case == main_case() else ())]
        return [p for p in PROVIDERS if p in everyone and p.job == case.job]


def usage() -> str:
    return USAGE.format(jobs=", ".join(JOBS), rounds=ROUNDS, quick=QUICK_ROUNDS, out=OUT)


def read_options(pairs: list[tuple[str, str]], switches: set[str]) -> BenchOptions:
    """Raises UserError naming flag and value."""
    lists: dict[str, list[str]] = {"job": [], "case": [], "provider": []}
    single: dict[str, str] = {}
    for name, value in pairs:
        if name in lists:
            lists[name].append(value)
        elif name in ("device", "dtype", "rounds", "seconds", "out", "compare"):
            if name in single:
                raise UserError(f"--{name} {single[name]} and --{name} {value}: give one of them")
            single[name] = value
        else:
            raise UserError(f"--{name} {value}: bench has no such flag")
    if "truth" in switches:
        odd = [name for name, value in pairs if name not in ("device", "out")]
        odd += [name for name in ("profile", "list") if name in switches]
        if odd:
            raise UserError(f"--{odd[0]}: --truth takes only --device, --out and --quick beside it")
    if "list" in switches:
        odd = [name for name in ("rounds", "seconds", "out", "compare") if name in single]
        odd += [name for name in ("profile",) if name in switches]
        if odd:
            raise UserError(f"--{odd[0]}: --list measures nothing")
    for name in ("out", "compare"):
        if single.get(name) == "":
            raise UserError(f"--{name}: needs a path, got ''")
    device = resolve_device(single.get("device"))
    quick = "quick" in switches
    cases = choose_cases(lists["job"], lists["case"], device, quick)
    jobs = {case.job for case in cases}
    providers = choose_providers(lists["provider"], jobs, quick)
    every = [] if lists["provider"] else choose_providers([], jobs, False)
    return BenchOptions(
        device=device,
        cases=with_dtype(cases, single.get("dtype")),
        providers=providers,
        rounds=read_count("rounds", single.get("rounds"), QUICK_ROUNDS if quick else ROUNDS),
        seconds=read_count("seconds", single.get("seconds"), None),
        out=Path(single.get("out", OUT)),
        compare=Path(single["compare"]) if "compare" in single else None,
        quick=quick,
        truth="truth" in switches,
        profile="profile" in switches,
        list="list" in switches,
        compiling=tuple(p for p in every if p not in providers),
    )


def read_count(name: str, text: str | None, default: int | None) -> int | None:
    if text is None:
        return default
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise UserError(f"--{name} {text}: must be a whole number from 1 to 100000")
    return int(text)


def known_cases(device: torch.device) -> list[Case]:
    """The cases a device runs unasked; ``small_cases`` run only when named."""
    return gpu_cases() if device.type == "cuda" else cpu_cases()


def choose_cases(
    jobs: list[str], names: list[str], device: torch.device, quick: bool
) -> list[Case]:
    for job in jobs:
        if job not in JOBS:
            raise UserError(f"--job {job}: no such job; there are {', '.join(JOBS)}")
    usual = known_cases(device)
    if not names:
        if quick and device.type == "cuda":
            usual = target_cases()
        found = [case for case in usual if not jobs or case.job in jobs]
        if not quick or device.type == "cuda":
            return found
        first = {case.job: case for case in reversed(found)}
        return [case for case in found if first[case.job] is case]
    everywhere = {case.name: case for case in [*usual, *small_cases(), *gpu_cases(), *cpu_cases()]}
    found = []
    for name in names:
        if not name:
            raise UserError("--case '': names no case; see grpo-engine bench --list")
        matched = [c for c in everywhere.values() if fits(name, c.name, anywhere=True)]
        matched = [c for c in matched if c.name == name] or matched
        matched = [c for c in matched if not jobs or c.job in jobs]
        if not matched:
            of = f" of job {', '.join(jobs)}" if jobs else ""
            raise UserError(f"--case {name}: no such case{of}; see grpo-engine bench --list")
        here = [case for case in matched if case in usual]  # a part of a name means those first
        found += [case for case in here or matched if case not in found]
    return found


def choose_providers(names: list[str], jobs: set[str], quick: bool) -> list[Provider]:
    of_jobs = [provider for provider in PROVIDERS if provider.job in jobs]
    if not names:
        return [provider for provider in of_jobs if not (quick and provider.compiles)]
    found = []
    for name in names:
        matched = [p for p in of_jobs if fits(name, p.name)]
        if not matched:
            known = ", ".join(dict.fromkeys(f"'{p.name}'" for p in of_jobs))
            raise UserError(f"--provider {name}: no such provider; there are {known}")
        found += [provider for provider in matched if provider not in found]
    return [provider for provider in of_jobs if provider in found]


def fits(wanted: str, name: str, anywhere: bool = False) -> bool:
    wanted, name = wanted.lower(), name.lower()
    return wanted == name or fnmatchcase(name, wanted) or (anywhere and wanted in name)


def with_dtype(cases: list[Case], name: str | None) -> list[Case]:
    """The cases with heads and logits in another dtype; the name of a case says its dtype."""
    if name is None:
        return cases
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: must be one of {', '.join(DTYPES)}")
    dtype, changed = DTYPES[name], []
    for case in cases:
        if case.job in HEAD_JOBS or case.job == "token_logprobs":
            was, now = (str(d).removeprefix("torch.") for d in (case.dtype, dtype))
            label = case.name.replace(was, now) if was in case.name else f"{case.name} {now}"
            case = replace(case, dtype=dtype, name=case.name if was == now else label)
        changed.append(case)
    return changed


def writable(folder: Path) -> Path:
    """The folder, made; UserError where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".bench-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {folder}: not writable ({error.strerror or error})") from error
    return folder
