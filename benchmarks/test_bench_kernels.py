"""The cases of ``grpo-engine bench`` as pytest-benchmark tests, to track them over commits:

    pytest benchmarks --benchmark-autosave
    pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:15%
    pytest benchmarks -k "pack and ours"

Inputs, providers and the gate are those of ``grpo-engine bench``; so are the tables to quote, since
here nothing is interleaved and no floor is measured. `make test` does not collect this folder.
"""

from functools import lru_cache

import pytest
import torch

from grpo_engine.bench.measure import PLAIN, is_ours, passes_of, runner_of
from grpo_engine.bench.options import read_options
from grpo_engine.bench.rows import BOTH
from grpo_engine.bench.truth import errors, truth, wrong

OPTIONS = read_options([], {"quick"})
BACKWARD = {case.job for case in OPTIONS.cases if BOTH in passes_of(case.job)}
ROUNDS = 5
PAIRS = [(case, p) for case in OPTIONS.cases for p in OPTIONS.providers_of(case.job)]


@lru_cache(maxsize=1)  # the tests of a case are neighbours
def prepared(name):
    """(inputs, truth, plain torch's errors) of a case."""
    case = next(case for case in OPTIONS.cases if case.name == name)
    inputs = case.make(OPTIONS.device)
    true, plain = truth(case, inputs), {}
    for provider in OPTIONS.providers_of(case.job):
        if provider.name == PLAIN:
            plain = errors(provider.run(inputs, case.job in BACKWARD), true)
    return inputs, true, plain


@pytest.mark.parametrize(
    ("case", "provider"), PAIRS, ids=[f"{case.name}-{p.name}" for case, p in PAIRS]
)
def test_speed(case, provider, benchmark):
    absent = provider.missing(OPTIONS.device) or provider.unsuited(case, case.job in BACKWARD)
    if absent:
        pytest.skip(absent)
    inputs, true, plain = prepared(case.name)
    runner = runner_of(provider, inputs, case.job in BACKWARD)
    found = errors(runner(), true)
    verdict = wrong(provider, found, plain, case, case.job in BACKWARD)
    if verdict and not is_ours(provider):
        pytest.skip(f"wrong: {verdict}")
    assert verdict is None

    def run(given):
        runner.call(given)
        if OPTIONS.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(errors=found)
    benchmark.pedantic(
        run, setup=lambda: ((runner.ready(),), {}), rounds=ROUNDS, warmup_rounds=1, iterations=1
    )
