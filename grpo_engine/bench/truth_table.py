"""The truth table: errors of every provider against fp64, over vocabularies, values and options.

Each case is made in each dtype; every provider that runs on the device is given the same rounded
inputs. The table answers two questions: does this package keep its own bounds (``truth.misses``),
and what do the others reach on the same inputs?
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from grpo_engine.bench.cases import HEADS, Case
from grpo_engine.bench.machine import provenance
from grpo_engine.bench.provider import Provider
from grpo_engine.bench.providers import PROVIDERS
from grpo_engine.bench.timing import reason, release
from grpo_engine.bench.truth import (
    BOUNDS,
    GRADIENT_BOUND,
    GRADIENT_FACTOR,
    errors,
    misses,
    truth,
    wrong,
)
from grpo_engine.kernels.common import interpreting
from grpo_engine.metrics import write_atomically
from grpo_engine.types import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Vocabularies of Llama 2, Llama 3, DeepSeek-V3, Qwen2.5, Gemma 3; and odd ones.
VOCABULARIES = (32_000, 128_256, 129_280, 151_936, 262_144, 50_257, 131_071)
OPTIONS = ("temperature", "temperature_vector", "bias", "row_mask", "frozen_head")
PLAIN = "torch"
COMPILED = 4  # first cases, one vocabulary: compilers take seconds a shape, and round alike in all
OK, MISSES, WRONG, FAILED, ABSENT, CANNOT = "ok", "misses", "WRONG", "FAILED", "not here", "cannot"
COLUMNS = ("logprobs", "entropy", "lse", "loss", "d_logits", "d_hidden", "d_weight", "d_bias")


@dataclass
class TruthRow:
    """One provider on one case in one dtype; ``reasons`` says what it misses, does wrong or
    lacks."""

    case: str
    job: str
    dtype: str
    provider: str
    ours: bool
    status: str
    reasons: list[str]
    errors: dict[str, float]
    plain: dict[str, float]  # what plain torch has on the same inputs
    approximate: bool = False  # leaves part of the gradient out by design


# ---- Cases ---------------------------------------------------------------------------------------


def truth_cases(device: torch.device, quick: bool = False) -> list[Case]:
    """Small enough for a CPU's minutes; on CUDA the same vocabularies, wider and with more rows;
    under Triton's interpreter, which is thousands of times slower, small vocabularies."""
    if _interpreted(device):
        return [
            *_vocabulary_cases((517,), 32, 7),
            *_value_cases(517, 32, 8),
            *_option_cases(517, 32, 9),
        ]
    if quick:
        width = 1024 if device.type == "cuda" else 128  # on CUDA also what tensor cores cut off
        return [
            *_vocabulary_cases((32_000, 50_257), 128, 7),
            *_value_cases(50_257 if device.type == "cuda" else 1031, width, 28),
            *_option_cases(1031, 128, 21),
        ]
    wide = device.type == "cuda"
    width, rows = (1024, 256) if wide else (64, 7)
    return [
        *_vocabulary_cases(VOCABULARIES, width, rows),
        *_row_count_cases(width, 4096 if wide else 193),
        *_value_cases(50_257, width, 4 * rows),
        *_option_cases(32_000, width, 3 * rows),
        *_real_cases(1024 if wide else 32),
    ]


def _interpreted(device: torch.device) -> bool:
    return device.type == "cpu" and interpreting()


def _case(job: str, words: str, sizes: dict[str, int], *features: str, **rest) -> Case:
    axes = " ".join(f"{axis}={sizes[axis]}" for axis in "NDV" if axis in sizes)
    features = frozenset(features) | {"weighted"}
    return Case(f"{job} {axes} {words}".strip(), job, sizes, features=features, **rest)


def _vocabulary_cases(vocabularies: Iterable[int], width: int, rows: int) -> list[Case]:
    cases = []
    for vocab in vocabularies:
        head = {"N": rows, "D": width, "V": vocab}
        cases += [
            _case("token_logprobs", "", {"N": rows, "V": vocab}, "entropy_grad", "lse"),
            _case("linear_logprobs", "", head, "entropy_grad"),
            _case("linear_logprobs", "log-probabilities only", head),
            _case("linear_grpo_loss", "", head),
        ]
    return cases


def _row_count_cases(width: int, many: int) -> list[Case]:
    """One row, an odd number of rows, and more rows than fit 16 bits of a vocabulary of 131."""
    return [
        _case("linear_logprobs", "", {"N": 1, "D": width, "V": 32_000}),
        _case("linear_logprobs", "", {"N": many, "D": width, "V": 32_000}, "entropy_grad"),
        _case("linear_grpo_loss", "", {"N": many, "D": width, "V": 32_000}),
        _case("token_logprobs", "", {"N": 1, "V": 32_000}, "entropy"),
        _case("token_logprobs", "", {"N": 65_537, "V": 131}, "entropy"),
        _case("token_logprobs", "", {"N": 131_072, "V": 131}, "entropy"),
    ]


def _value_cases(vocab: int, width: int, rows: int) -> list[Case]:
    cases = []
    for values in ("peaked", "all_negative", "large", "certain"):
        rest = dict(values=values)
        head, words = {"N": rows, "D": width, "V": vocab}, values.replace("_", " ")
        cases += [
            _case("token_logprobs", words, {"N": rows, "V": vocab}, "entropy", **rest),
            _case("linear_logprobs", words, head, "entropy", **rest),
            _case("linear_logprobs", f"{words}, log-probabilities only", head, **rest),
            _case("linear_grpo_loss", words, head, **rest),
        ]
    return cases


def _option_cases(vocab: int, width: int, rows: int) -> list[Case]:
    head = {"N": rows, "D": width, "V": vocab, "S": 3}
    cases = []
    for option in OPTIONS:
        words = option.replace("_", " ")
        cases += [
            _case("linear_logprobs", words, head, option),
            _case("linear_grpo_loss", words, head, option),
        ]
    logits = {"N": rows, "V": vocab}
    cases += [
        _case("token_logprobs", "log-probabilities only", logits),
        _case("token_logprobs", "temperature", logits, "temperature", "entropy"),
        _case("token_logprobs", "temperature vector", logits, "temperature_vector", "entropy"),
        _case("linear_logprobs", "lse", head, "lse"),
        _case("linear_grpo_loss", "kl", head, "kl"),
        _case("linear_grpo_loss", "half of the advantages zero", head, "half_dead"),
    ]
    one_for_all = Case(f"linear_logprobs N={rows} D={width} V={vocab} sum", "linear_logprobs", head)
    return [*cases, one_for_all]


def _real_cases(rows: int) -> list[Case]:
    width, vocab = HEADS["SmolLM2-135M"]
    sizes, cases = {"N": rows, "D": width, "V": vocab}, []
    for values, words in (("diffuse", "temperature 1"), ("peaked", "temperature 0.6")):
        rest = dict(source="hidden_states", values=values)
        words = f"real hidden states, {words}"
        cases += [
            _case("linear_logprobs", words, sizes, "entropy", **rest),
            _case("linear_logprobs", f"{words}, log-probabilities only", sizes, **rest),
            _case("linear_grpo_loss", words, sizes, **rest),
        ]
    return cases


# ---- Running -------------------------------------------------------------------------------------


def truth_table(
    cases: Iterable[Case],
    providers: Iterable[Provider] = PROVIDERS,
    dtypes: Iterable[torch.dtype] = DTYPES,
    device: torch.device | str = "cpu",
    compile_for: Callable[[Case], bool] = lambda case: True,
) -> Iterator[TruthRow]:
    """A row for every case, dtype and provider of the case's job; providers that compile for every
    shape only where ``compile_for`` agrees. What a provider raises becomes its row."""
    device, providers = torch.device(device), list(providers)
    for case in cases:
        job = [p for p in providers if p.job == case.job]
        job = [p for p in job if not p.compiles or compile_for(case)]
        for dtype in dtypes:
            yield from _case_rows(replace(case, dtype=dtype), job, device)


def _case_rows(case: Case, providers: list[Provider], device: torch.device) -> list[TruthRow]:
    def row(provider: Provider, status: str, *reasons: str) -> TruthRow:
        dtype, ours = _name(case.dtype), _is_ours(provider)
        found = (case.name, case.job, dtype, provider.name, ours, status, list(reasons))
        return TruthRow(*found, errors={}, plain=plain, approximate=bool(provider.approximate))

    plain: dict[str, float] = {}
    try:
        inputs = case.make(device)
        true, rows = truth(case, inputs), []
    except UserError as error:  # the model that the rows come from is not installed
        return [row(provider, ABSENT, str(error)) for provider in providers]
    except Exception as error:  # out of memory: one case does not cost the table
        release(device)
        words = f"no inputs or truth: {reason(error)}"
        return [row(provider, FAILED, words) for provider in providers]
    for provider in sorted(providers, key=lambda p: p.name != PLAIN):
        backward = "backward" not in provider.cannot
        absent, cannot = provider.missing(device), provider.unsuited(case, backward)
        if absent or cannot:
            lines = [absent] if absent else cannot.split("; ")
            rows.append(row(provider, ABSENT if absent else CANNOT, *lines))
            continue
        try:
            found = errors(provider.run(provider.prepared(inputs), backward), true)
        except Exception as error:  # the reason is what the table shows
            rows.append(row(provider, FAILED, reason(error)))
            release(device)
            continue
        if provider.name == PLAIN:
            plain |= found
        rows.append(row(provider, OK))
        rows[-1].errors = found
        broken = wrong(provider, found, plain, case, backward=True)
        if provider.approximate:  # its gradient is held to no bound but the gate's
            found = {name: error for name, error in found.items() if not name.startswith("d_")}
        missed = misses(found, plain, case)
        if broken or missed:
            rows[-1].status = WRONG if broken else MISSES
            rows[-1].reasons = [broken] if broken else missed
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_ours(provider: Provider) -> bool:
    return provider.name == "ours" or provider.name.startswith("ours,")


# ---- Writing -------------------------------------------------------------------------------------


def run_truth_table(
    out_dir: Path,
    device: torch.device | str,
    quick: bool = False,
    say: Callable[[str], None] = print,
    command: str | None = None,
) -> int:
    """Write truth_table_<device>.json and .md under ``out_dir``. Returns 0 if this package keeps
    all its bounds on every case that ran, else 1; 130 when interrupted, with the rows so far.
    ``command`` is what was asked, for who wants the table again."""
    device, start = torch.device(device), time.perf_counter()
    cases, rows, interrupted = truth_cases(device, quick), [], False
    compiled = [] if quick or _interpreted(device) else cases[:COMPILED]
    table = truth_table(
        cases,
        # the interpreter has no correct bf16
        dtypes=[t for t in DTYPES if t != torch.bfloat16 or not _interpreted(device)],
        device=device,
        compile_for=lambda case: case in compiled,
    )
    try:
        for row in table:
            if not rows or (row.case, row.dtype) != (rows[-1].case, rows[-1].dtype):
                say(f"{time.perf_counter() - start:6.1f} s  {row.case} {row.dtype}")
            rows.append(row)
    except KeyboardInterrupt:
        interrupted = True
        words = "writing the rows so far" if rows else "nothing was measured or written"
        say(f"interrupted: {words}")
        if not rows:
            return 130
    packages = sorted({p.package for p in PROVIDERS if p.package})
    before = "TRITON_INTERPRET=1 " * _interpreted(device)
    asked = command or f"grpo-engine bench --truth{' --quick' * quick} --device {device}"
    result = provenance(device, packages) | {
        "command": before + asked,
        "interpreted": _interpreted(device),
        "quick": quick,
        "interrupted": interrupted,
        "seconds": round(time.perf_counter() - start),
    }
    where = "interpreter" if _interpreted(device) else device.type
    path = Path(out_dir) / f"truth_table_{where}{'_quick' if quick else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _json_text(result, rows))
    write_atomically(path.with_suffix(".md"), markdown(result, rows))
    ours = [row for row in rows if row.ours and row.status in (MISSES, WRONG, FAILED)]
    for row in ours:
        say(f"{row.provider}, {row.case} {row.dtype}: {row.status}: {'; '.join(row.reasons)}")
    say(f"-> {path}, {path.with_suffix('.md').name}")
    return 130 if interrupted else 1 if ours else 0


def _json_text(result: dict, rows: list[TruthRow]) -> str:
    """JSON with one case in one dtype a line, so that a diff reads well; infinities as strings.
    Who has no errors there has a reason in the Markdown's last section."""
    cases: dict[tuple[str, str], dict] = {}
    for row in rows:
        found = {"case": row.case, "job": row.job, "dtype": row.dtype, "providers": {}}
        case = cases.setdefault((row.case, row.dtype), found)
        if row.status in (ABSENT, CANNOT):
            continue
        case["providers"][row.provider] = {"status": row.status, **_rounded(row.errors)}
        if row.reasons:
            case["providers"][row.provider]["reasons"] = row.reasons
    text = json.dumps(result, indent=1)[:-2]
    lines = ",\n".join("  " + json.dumps(case) for case in cases.values())
    return f'{text},\n "cases": [\n{lines}\n ]\n}}\n'


def _rounded(found: dict[str, float]) -> dict[str, float | str]:
    return {
        name: float(f"{error:.2e}") if math.isfinite(error) else str(error)
        for name, error in found.items()
    }


def markdown(result: dict, rows: list[TruthRow]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts = [
        "# Errors against fp64",
        f"{result['hardware']}{', Triton interpreted' * result['interpreted']}; "
        f"{result['date'][:10]}; code {result['code']}; {versions}.",
        f"Made by `{result['command']}` in {result['seconds']} s"
        f"{', INTERRUPTED' * result['interrupted']}. Every provider is given the same inputs, "
        "already rounded to the dtype; the truth is computed from them in fp64.",
        "Worst error over the cases: largest absolute error of log-probabilities, entropy, "
        "log-sum-exp and loss; gradients by the norm of the difference over that of the truth, in "
        "brackets the worst ratio to plain torch's own error. Bounds that this package sets "
        f"itself: {BOUNDS['logprobs']:g} (entropy {BOUNDS['entropy']:g}); gradients "
        f"{GRADIENT_BOUND:g} in fp32, {GRADIENT_FACTOR} times plain torch's in half precision. "
        "*WRONG*: beyond what rounding explains (grpo_engine/bench/truth.py).",
        *_job_tables(rows),
        "## Bounds that this package misses",
        _list(rows, lambda r: r.ours and r.status in (MISSES, WRONG, FAILED)),
        "## Providers that are wrong or failed",
        _list(rows, lambda r: not r.ours and r.status in (WRONG, FAILED)),
        "## Not measured",
        _absences(rows),
    ]
    return "\n\n".join(parts) + "\n"


def _job_tables(rows: list[TruthRow]) -> list[str]:
    parts = []
    for job in dict.fromkeys(row.job for row in rows):
        for dtype in dict.fromkeys(row.dtype for row in rows):
            chosen = [r for r in rows if (r.job, r.dtype) == (job, dtype) and r.errors]
            names = [n for n in COLUMNS if any(n in r.errors for r in chosen)]
            lines = [f"## {job}, {dtype}", ""]
            lines.append("| provider | cases | " + " | ".join(names) + " | within the bounds |")
            lines.append("|---" * (len(names) + 3) + "|")
            for provider in dict.fromkeys(r.provider for r in chosen):
                lines.append(_summary([r for r in chosen if r.provider == provider], names))
            parts.append("\n".join(lines))
    return parts


def _summary(rows: list[TruthRow], names: list[str]) -> str:
    cells = [rows[0].provider, str(len(rows))]
    for name in names:
        having = [r for r in rows if name in r.errors]
        if not having:
            cells.append("-")
            continue
        cell = f"{max(r.errors[name] for r in having):.1e}"
        ratios = [r.errors[name] / r.plain[name] for r in having if r.plain.get(name)]
        if name.startswith("d_") and ratios:
            cell += f" ({max(ratios):.2f})"
        cells.append(cell)
    good, broken = (sum(r.status == status for r in rows) for status in (OK, WRONG))
    cells.append(f"{good} of {len(rows)}" + (f", **WRONG in {broken}**" if broken else ""))
    if any(r.approximate for r in rows):
        cells[-1] += ", no bound on its gradients"
    return "| " + " | ".join(cells) + " |"


def _list(rows: list[TruthRow], chosen: Callable[[TruthRow], bool]) -> str:
    """A line for each case and reason, with the providers of which it is true."""
    who: dict[str, list[str]] = {}
    for row in filter(chosen, rows):
        words = f"{row.case}, {row.dtype}: {row.status}: {'; '.join(row.reasons)}"
        who.setdefault(words, []).append(row.provider)
    return "\n".join(f"- {words} ({'; '.join(names)})" for words, names in who.items()) or "None."


def _absences(rows: list[TruthRow]) -> str:
    """Each reason once, with the providers that it keeps away."""
    kept_away: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.status in (ABSENT, CANNOT):
            for words in row.reasons:
                kept_away.setdefault(words, {})[row.provider] = None
    return (
        "\n".join(f"- {words}: {', '.join(who)}" for words, who in kept_away.items()) or "Nothing."
    )
