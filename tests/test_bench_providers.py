"""Every provider that runs here gives the right answer on a small case; the seams that the
benchmark builds on hold."""

from dataclasses import replace

import pytest
import torch

from grpo_engine.bench import hidden_states
from grpo_engine.bench.cases import (
    FEATURES,
    HEADS,
    JOBS,
    VALUES,
    Case,
    cpu_cases,
    gpu_cases,
    small_cases,
    tensors,
)
from grpo_engine.bench.inputs import LARGEST
from grpo_engine.bench.peers import verl
from grpo_engine.bench.provider import Provider
from grpo_engine.bench.providers import PROVIDERS, providers_of
from grpo_engine.bench.truth import errors, expected, truth, wrong
from grpo_engine.types import UserError

SMALL = {case.job: case for case in small_cases()}
TRITON_JOBS = ("token_logprobs", "linear_logprobs", "linear_grpo_loss", "grpo_loss")
RIVALS = [p for p in PROVIDERS if p.package]


def case_for(provider: Provider) -> Case:
    """The small case of its job, less what the provider cannot do."""
    case = SMALL[provider.job]
    return replace(case, features=case.features - set(provider.cannot))


def run_small(provider: Provider, device: torch.device) -> tuple[Case, dict, dict[str, float]]:
    case, backward = case_for(provider), "backward" not in provider.cannot
    if reason := provider.missing(device):
        pytest.skip(reason)
    inputs = case.make(device)
    outputs = dict(provider.run(provider.prepared(inputs), backward))
    true = truth(case, inputs)
    assert expected(case, backward) - set(outputs) <= {"logprobs"}
    return case, outputs, errors(outputs, true), backward


def provider_marks(provider: Provider) -> list:
    return [pytest.mark.slow] if provider.compiles or "torch_compile" in provider.name else []


EVERYONE = [pytest.param(p, id=f"{p.job}-{p.name}", marks=provider_marks(p)) for p in PROVIDERS]


@pytest.mark.parametrize("provider", EVERYONE)
def test_every_provider_is_right_on_a_small_case(provider, device):
    case, outputs, found, backward = run_small(provider, device)
    assert wrong(provider, found, {}, case, backward) is None, found
    assert all(not value.requires_grad for value in outputs.values())


@pytest.mark.triton
@pytest.mark.parametrize(
    "provider",
    [
        pytest.param(p, id=f"{p.job}-{p.name}")
        for p in PROVIDERS
        if p.job in TRITON_JOBS and not p.compiles
        if p.name.startswith("ours") or p.package in ("trl", "liger-kernel")
    ],
)
def test_every_triton_provider_is_right_on_a_small_case(provider, device):
    case, _, found, backward = run_small(provider, device)
    assert wrong(provider, found, {}, case, backward) is None, found


@pytest.mark.parametrize("provider", RIVALS, ids=lambda p: p.name)
def test_who_is_absent_says_so_in_one_line(provider, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reason = provider.missing(torch.device("cpu"))
    assert reason == f"{provider.package} is not installed"
    assert provider.version() is None or provider.version()[0].isdigit()


def test_a_changed_signature_is_a_failure_not_an_absence(monkeypatch):
    trl = pytest.importorskip("trl.kernels.chunked_logprob")
    monkeypatch.delattr(trl, "ChunkedLogProbFunction")
    provider = next(p for p in PROVIDERS if p.name == "TRL ChunkedLogProb")
    assert provider.missing(torch.device("cpu")) is None
    with pytest.raises(ImportError, match="ChunkedLogProbFunction"):
        provider.run(SMALL["linear_logprobs"].make("cpu"), True)


def test_verl_is_loaded_without_its_package(device):
    """Its __init__ starts with Ray; and a later `import verl` must find the real one."""
    import sys

    if reason := verl._missing(device):
        pytest.skip(reason)
    if "verl" in sys.modules:
        pytest.skip("verl is imported already")
    module = verl.load("utils.experimental.torch_functional")
    assert module.__file__.endswith("verl/utils/experimental/torch_functional.py")
    assert "verl" not in sys.modules and "ray" not in sys.modules


def test_names_are_unique_within_a_job_and_ours_come_first():
    for job in JOBS:
        names = [p.name for p in providers_of(job)]
        assert len(set(names)) == len(names)
        assert names[0].startswith("ours")
    with pytest.raises(ValueError, match="job must be one of .*'attention'"):
        providers_of("attention")


def test_what_a_provider_lacks_is_said_for_the_case_that_asks():
    case = Case("c", "linear_logprobs", {}, features=frozenset({"bias", "entropy", "weighted"}))
    cce = next(p for p in PROVIDERS if p.name == "CCE, filtered" and p.job == case.job)
    assert cce.unsuited(case) == "takes no bias; gives no entropy"
    assert cce.unsuited(SMALL["linear_logprobs"]) is None
    assert {f for p in PROVIDERS for f in p.cannot} <= set(FEATURES)


def test_an_overwriting_provider_leaves_the_inputs(device):
    provider = next(p for p in PROVIDERS if p.name == "ours, gradient over the logits")
    inputs = SMALL["token_logprobs"].make(device)
    before = inputs["logits"].detach().clone()
    provider.run(provider.prepared(inputs), True)
    assert torch.equal(inputs["logits"], before)


# ---- Cases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", small_cases(), ids=lambda c: c.job)
def test_the_same_seed_makes_the_same_inputs(case):
    first, again, other = (tensors(case.make("cpu", seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not first or any(not torch.equal(first[name], other[name]) for name in first)


def test_a_case_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="job must be one of .*'logprob'"):
        Case("c", "logprob", {})
    with pytest.raises(ValueError, match="features: colour unknown"):
        Case("c", "grpo_loss", {}, features=frozenset({"colour"}))
    with pytest.raises(ValueError, match="S must divide N: 5 does not divide 12"):
        replace(SMALL["linear_grpo_loss"], sizes={"N": 12, "D": 8, "V": 9, "S": 5}).make("cpu")


def test_the_listed_cases_have_the_sizes_of_models():
    for case in [*cpu_cases(), *gpu_cases()]:
        if {"D", "V"} <= set(case.sizes):
            assert (case.sizes["D"], case.sizes["V"]) in HEADS.values()
        if "S" in case.sizes and "N" in case.sizes:
            assert case.sizes["N"] % case.sizes["S"] == 0
    for cases in (cpu_cases(), gpu_cases()):
        assert len({case.name for case in cases}) == len(cases)


def logits_of(values: str) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = {"N": 64, "D": 512, "V": 20_000}
    inputs = Case("c", "linear_logprobs", sizes, values=values).make("cpu")
    hidden, weight = inputs["hidden"].detach(), inputs["weight"].detach()
    return hidden @ weight.T, inputs["token_ids"]


def entropy_of(logits: torch.Tensor) -> float:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean().item()


def test_values_are_what_their_names_say():
    found = {values: logits_of(values) for values in VALUES}
    logits = {values: pair[0] for values, pair in found.items()}
    assert 1.4 < entropy_of(logits["diffuse"]) < 3.0
    assert 0.3 < entropy_of(logits["peaked"]) < 0.8
    assert logits["all_negative"].max() < 0
    assert logits["large"].abs().max() == pytest.approx(LARGEST, rel=1e-4)
    sure, ids = found["certain"]
    chosen = sure.softmax(-1).gather(1, ids[:, None])[:, 0]
    assert (chosen[::2] > 1 - 1e-6).all() and (chosen[1::2] < 0.999).any()


def test_real_hidden_states_are_cached_and_belong_to_their_tokens(tmp_path, monkeypatch):
    """Each row is the state that predicted its token: under the head the sampled tokens are likely,
    and as surprising as the entropy says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(hidden_states, "QUESTIONS", hidden_states.QUESTIONS[:2])
    monkeypatch.setattr(hidden_states, "MAX_TOKENS", 24)
    hidden_states._rows.cache_clear()
    width, vocab = HEADS["miniature"]
    case = Case("c", "linear_logprobs", {"N": 900, "D": width, "V": vocab}, source="hidden_states")
    inputs = case.make("cpu")
    log_p = (inputs["hidden"].detach() @ inputs["weight"].detach().T).log_softmax(-1)
    rows = len(hidden_states._rows("miniature", 1.0)["token_ids"])
    assert 24 < rows <= 2 * hidden_states.SAMPLES * 24
    surprise = -log_p.gather(1, inputs["token_ids"][:, None])[:rows].mean().item()
    entropy = -(log_p.exp() * log_p).sum(-1)[:rows].mean().item()
    assert surprise == pytest.approx(entropy, rel=0.25)
    assert torch.equal(inputs["hidden"][:100], inputs["hidden"][rows : rows + 100])  # repeated

    (file,) = (tmp_path / "grpo-engine" / "hidden_states").iterdir()
    hidden_states._rows.cache_clear()
    monkeypatch.setattr(hidden_states, "_sample", None)  # a second sampling would fail
    assert torch.equal(case.make("cpu")["hidden"], inputs["hidden"])
    hidden_states._rows.cache_clear()


def test_hidden_states_of_a_model_that_is_not_there_are_an_error():
    case = Case("c", "linear_logprobs", {"N": 3, "D": 5, "V": 7}, source="hidden_states")
    with pytest.raises(UserError, match="no model here has D = 5, V = 7"):
        case.make("cpu")
