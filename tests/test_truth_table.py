"""This package keeps its own bounds against fp64, and the verdicts catch who does not."""

import json
import math
from dataclasses import replace

import pytest
import torch

from grpo_engine.bench import truth_table as table
from grpo_engine.bench.cases import Case, small_cases
from grpo_engine.bench.provider import Provider
from grpo_engine.bench.providers import PROVIDERS, providers_of
from grpo_engine.bench.truth import errors, misses, truth, wrong
from grpo_engine.bench.truth_table import truth_cases
from grpo_engine.bench.truth_table import truth_table as rows_of
from grpo_engine.kernels import linear_logprobs_ref, token_logprobs_ref

CPU = torch.device("cpu")
OURS = [p for p in PROVIDERS if p.name.startswith("ours")]
PLAIN = [p for p in PROVIDERS if p.name == "torch"]
WEIGHTED = frozenset({"weighted"})
HEAD = {"N": 24, "D": 32, "V": 517, "S": 3}
# Of every kind of value and option one, small enough for every run of the tests.
QUICK = [
    *(
        Case(f"{values} {job}", job, HEAD, values=values, features=WEIGHTED | features)
        for values in ("diffuse", "peaked", "all_negative", "large", "certain")
        for job, features in (
            ("token_logprobs", {"entropy_grad"}),
            ("linear_logprobs", {"entropy_grad", "lse"}),
            ("linear_logprobs", set()),
            ("linear_grpo_loss", set()),
        )
    ),
    *(
        Case(f"{option} {job}", job, HEAD, features=WEIGHTED | {option})
        for option in table.OPTIONS
        for job in ("linear_logprobs", "linear_grpo_loss")
    ),
    Case("kl", "linear_grpo_loss", HEAD, features=WEIGHTED | {"kl"}),
    Case("one row", "linear_logprobs", HEAD | {"N": 1}, features=WEIGHTED),
    Case("many rows", "token_logprobs", {"N": 65_537, "V": 7}, features=WEIGHTED | {"entropy"}),
]


def complaints(cases: list[Case], dtypes: tuple[torch.dtype, ...], device: torch.device) -> list:
    rows = rows_of(cases, [*OURS, *PLAIN], dtypes, device)
    kept_away = (table.CANNOT, table.ABSENT)
    found = [row for row in rows if row.ours and row.status not in kept_away]
    assert len(found) >= 2 * len(cases) * len(dtypes) - 6  # every job has two or more of ours
    return [
        f"{row.provider}, {row.case}, {row.dtype}: {row.status} {row.reasons}"
        for row in found
        if row.status != table.OK
    ]


@pytest.mark.parametrize("dtype", table.DTYPES, ids=str)
def test_our_bounds_hold(dtype, device):
    assert complaints(QUICK, (dtype,), device) == []


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # no bf16 interpreted
def test_our_bounds_hold_on_triton(dtype, device):
    sizes = {"N": 9, "D": 16, "V": 131, "S": 3}
    cases = [replace(c, sizes=sizes) for c in QUICK if c.name != "many rows"]
    assert complaints(cases[::3], (dtype,), device) == []


@pytest.mark.slow
def test_our_bounds_hold_on_the_vocabularies_of_models(device):
    cases = [c for c in truth_cases(device) if c.source == "random"]
    assert complaints(cases, table.DTYPES, device) == []


@pytest.mark.parametrize("threads", [2, 3])
def test_the_largest_vocabulary_with_several_threads(threads):
    """Shared out between threads, rows do not fill a BLAS's tiles: it adds up differently there."""
    words = "linear_logprobs N=7 D=64 V=262144 log-probabilities only"
    cases = [c for c in truth_cases(CPU) if c.name == words]
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert complaints(cases, (torch.float32,), CPU) == []
    finally:
        torch.set_num_threads(usual)


def test_the_cases_cover_what_they_must():
    cases = truth_cases(CPU)
    vocabularies = {case.sizes["V"] for case in cases}
    assert {32_000, 128_256, 129_280, 151_936, 262_144, 50_257, 131_071} <= vocabularies
    assert {1, 7, 193, 65_537, 131_072} <= {case.sizes["N"] for case in cases}
    assert {"all_negative", "large", "certain", "peaked"} <= {case.values for case in cases}
    asked = frozenset().union(*(case.features for case in cases))
    assert set(table.OPTIONS) | {"entropy_grad", "lse", "kl", "half_dead"} <= asked
    assert {"random", "hidden_states"} == {case.source for case in cases}
    assert len({case.name for case in cases}) == len(cases)


# ---- The truth itself ----------------------------------------------------------------------------


def test_the_truth_agrees_with_the_fp64_specification(monkeypatch):
    """Two ways of writing it, and some rows at a time as well as all at once."""
    monkeypatch.setattr("grpo_engine.bench.truth.ELEMENTS_AT_ONCE", {"cpu": 5 * HEAD["V"]})
    features = WEIGHTED | {"entropy_grad", "lse", "bias", "temperature_vector", "row_mask"}
    case = Case("c", "linear_logprobs", HEAD, torch.bfloat16, features=features)
    inputs = case.make(CPU)
    leaves = [inputs[n].detach().double().requires_grad_() for n in ("hidden", "weight", "bias")]
    hidden, weight, bias = leaves
    outputs = linear_logprobs_ref(
        hidden,
        weight,
        inputs["token_ids"],
        bias=bias,
        temperature=inputs["temperature"].double(),
        return_entropy=True,
        return_lse=True,
        row_mask=inputs["row_mask"],
    )
    incoming = [inputs["grad_logprobs"].double(), inputs["grad_entropy"].double()]
    grads = torch.autograd.grad(outputs[:2], leaves, incoming)
    names = ("logprobs", "entropy", "lse", "d_hidden", "d_weight", "d_bias")
    found = dict(zip(names, (*outputs, *grads), strict=True))
    assert max(errors(found, truth(case, inputs)).values()) < 1e-12

    case = Case("c", "token_logprobs", HEAD, torch.float16, features=WEIGHTED | {"entropy"})
    inputs = case.make(CPU)
    logits = inputs["logits"].detach().double().requires_grad_()
    logprobs, entropy = token_logprobs_ref(logits, inputs["token_ids"], return_entropy=True)
    (grad,) = torch.autograd.grad(logprobs, logits, inputs["grad_logprobs"].double())
    found = {"logprobs": logprobs, "entropy": entropy, "d_logits": grad}
    assert max(errors(found, truth(case, inputs)).values()) < 1e-12


def test_a_plan_that_drops_or_overfills_is_wrong():
    case = next(c for c in small_cases() if c.job == "plan_batches")
    inputs = case.make(CPU)
    provider, true = providers_of("plan_batches")[0], truth(case, inputs)
    good = dict(provider.run(inputs, False))
    assert wrong(provider, errors(good, true), {}, case, False) is None
    for bad in ({"planned": good["planned"][1:]}, {"over": good["over"] + 1}):
        assert wrong(provider, errors(good | bad, true), {}, case, False) is not None


# ---- The verdicts --------------------------------------------------------------------------------


def spoilt(provider: Provider, change) -> Provider:
    """The provider with ``change`` applied to its outputs."""
    return replace(provider, name="spoilt", run=lambda *args: change(dict(provider.run(*args))))


def with_one_off(name: str, amount: float, place: int = -1):
    def change(outputs: dict) -> dict:
        value = outputs[name].clone()
        value.view(-1)[place] += amount
        return outputs | {name: value}

    return change


CHANGES = {
    "a log-probability off by 1": ("linear_logprobs", with_one_off("logprobs", 1.0)),
    "a positive log-probability": ("linear_logprobs", with_one_off("logprobs", 123.0)),
    "an entropy off by 1": ("linear_logprobs", with_one_off("entropy", 1.0)),
    "NaN in one gradient entry": ("linear_logprobs", with_one_off("d_weight", math.nan)),
    "a gradient of the wrong sign": (
        "linear_logprobs",
        lambda outputs: outputs | {"d_hidden": -outputs["d_hidden"]},
    ),
    "no gradient of the weight": (
        "linear_logprobs",
        lambda outputs: {n: v for n, v in outputs.items() if n != "d_weight"},
    ),
    "no gradient at all": (
        "linear_logprobs",
        lambda outputs: {n: v for n, v in outputs.items() if not n.startswith("d_")},
    ),
    "no entropy": (
        "linear_logprobs",
        lambda outputs: {n: v for n, v in outputs.items() if n != "entropy"},
    ),
    "one row too few": (
        "linear_logprobs",
        lambda outputs: outputs | {"logprobs": outputs["logprobs"][:-1]},
    ),
    "another normaliser": (
        "linear_grpo_loss",
        lambda outputs: {name: value * 1.5 for name, value in outputs.items()},
    ),
}


@pytest.mark.parametrize("dtype", table.DTYPES, ids=str)
@pytest.mark.parametrize("what", CHANGES)
def test_a_wrong_provider_is_shown_as_wrong(what, dtype):
    job, change = CHANGES[what]
    features = WEIGHTED | ({"entropy"} if job == "linear_logprobs" else set())
    case = Case("c", job, HEAD, features=features)
    provider = providers_of(job)[0]
    rows = list(rows_of([case], [spoilt(provider, change), provider, *PLAIN], (dtype,)))
    status = {row.provider: row.status for row in rows}
    assert status["ours"] == table.OK
    assert status["spoilt"] == table.WRONG, [row.reasons for row in rows]


def test_a_case_that_cannot_be_made_does_not_cost_the_table(monkeypatch):
    def truth_or_not(case, inputs):
        if case.name == "bad":
            raise torch.OutOfMemoryError("17 GiB")
        return truth(case, inputs)

    monkeypatch.setattr(table, "truth", truth_or_not)
    good = Case("good", "linear_logprobs", HEAD, features=WEIGHTED)
    rows = list(rows_of([replace(good, name="bad"), good], PLAIN, (torch.float32,)))
    assert [row.status for row in rows] == [table.FAILED, table.OK]
    assert rows[0].reasons == ["no inputs or truth: OutOfMemoryError: 17 GiB"]


def test_a_small_error_misses_the_bound_without_being_wrong():
    case = Case("c", "linear_logprobs", HEAD, features=WEIGHTED)
    provider = providers_of(case.job)[0]
    off = spoilt(provider, with_one_off("logprobs", 2.5e-5))
    (row,) = rows_of([case], [off], (torch.float32,))
    assert row.status == table.MISSES
    assert row.reasons[0].startswith("logprobs 2.") and row.reasons[0].endswith("> 1.00e-05")


def test_half_precision_gradients_are_held_against_torchs_own():
    case = Case("c", "linear_logprobs", HEAD, torch.bfloat16, features=WEIGHTED)
    assert misses({"d_weight": 2.3e-3}, {"d_weight": 2e-3}, case) == []
    assert misses({"d_weight": 2.5e-3}, {"d_weight": 2e-3}, case) == [
        "d_weight 2.50e-03 > 2.40e-03 (torch 2.00e-03)"
    ]
    fp32 = replace(case, dtype=torch.float32)
    assert misses({"d_weight": 9e-6}, {"d_weight": 1e-7}, fp32) == []
    assert misses({"d_weight": 2e-5}, {"d_weight": 2e-5}, fp32) != []
    assert misses({"logprobs": math.nan}, {}, case) != []


def test_an_approximation_by_design_may_be_coarse_but_not_arbitrary():
    case = Case("c", "linear_logprobs", HEAD, features=WEIGHTED)
    found = {"logprobs": 1e-6, "d_hidden": 0.04, "d_weight": 0.04}
    exact = providers_of(case.job)[0]
    filtered = replace(exact, approximate="drops small entries")
    assert wrong(exact, found, {}, case, True) is not None
    assert wrong(filtered, found, {}, case, True) is None
    assert wrong(filtered, found | {"d_weight": 0.5}, {}, case, True) is not None
    assert wrong(filtered, found | {"logprobs": 0.04}, {}, case, True) is not None


# ---- The table -----------------------------------------------------------------------------------


def test_the_table_says_who_failed_and_who_is_absent(tmp_path, monkeypatch):
    case = Case("a case", "linear_logprobs", HEAD, features=WEIGHTED | {"bias"})
    provider = providers_of(case.job)[0]

    def broken(inputs, backward):
        raise TypeError("forward() got an unexpected keyword\nand more lines")

    others = (
        replace(provider, name="drifted", package="drifted", run=broken),
        replace(provider, name="absent", package="absent", missing=lambda _: "not installed"),
        replace(provider, name="lacking", cannot={"bias": "takes no bias"}),
        spoilt(provider, with_one_off("logprobs", 1.0)),
    )
    monkeypatch.setattr(table, "PROVIDERS", (provider, *PLAIN, *others))
    rows = list(rows_of([case], (provider, *PLAIN, *others), (torch.float32,)))
    monkeypatch.setattr(table, "truth_table", lambda *a, **k: iter(rows))
    said = []
    assert table.run_truth_table(tmp_path, "cpu", say=said.append) == 0
    text = (tmp_path / "truth_table_cpu.md").read_text()
    assert "- a case, float32: FAILED: TypeError: forward() got an unexpected" in text
    assert "- a case, float32: WRONG: logprobs: error 1.00e+00" in text
    assert "(drifted)" in text and "(spoilt)" in text
    assert "- not installed: absent" in text and "- takes no bias: lacking" in text
    result = json.loads((tmp_path / "truth_table_cpu.json").read_text())
    (found,) = result["cases"]
    assert set(found["providers"]) == {"ours", "torch", "drifted", "spoilt"}
    assert found["providers"]["spoilt"]["status"] == "WRONG"
    assert found["providers"]["ours"]["d_weight"] < 1e-5
    assert result["code"] and result["versions"]["torch"] == torch.__version__

    rows[0].ours, rows[0].status, rows[0].reasons = True, table.MISSES, ["logprobs 1e-4 > 1e-5"]
    assert table.run_truth_table(tmp_path, "cpu", say=said.append) == 1


def test_an_interrupted_table_keeps_its_rows(tmp_path, monkeypatch):
    case = Case("a case", "linear_logprobs", HEAD, features=WEIGHTED)
    rows = list(rows_of([case], OURS, (torch.float32,)))

    def interrupted(*args, **options):
        yield from rows
        raise KeyboardInterrupt

    monkeypatch.setattr(table, "truth_table", interrupted)
    asked = "grpo-engine bench --truth --device cpu --out here"
    assert table.run_truth_table(tmp_path, "cpu", say=lambda line: None, command=asked) == 130
    result = json.loads((tmp_path / "truth_table_cpu.json").read_text())
    assert result["interrupted"] is True and len(result["cases"]) == 1
    assert result["command"].endswith(asked)
    page = (tmp_path / "truth_table_cpu.md").read_text()
    assert "INTERRUPTED" in page and f"{asked}` in" in page

    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    rows.clear()
    assert table.run_truth_table(tmp_path, "cpu", say=lambda line: None) == 130
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
