"""The certified sparse backward: which entries of a row stay, and what the certificate says."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from head_cases import TRITON_DTYPES

from grpo_engine.kernels.certified import (
    ROUNDING_SHARE,
    Entries,
    error_bounds,
    num_candidates,
    select_entries,
    select_entries_ref,
)
from grpo_engine.kernels.exp_rows import ExpRows, exp_rows
from grpo_engine.kernels.vocab_rows import LogitOptions

MODULE = importlib.import_module("grpo_engine.kernels.certified")


def rows_of(probabilities, token_ids, dtype, total=1.0, unit=1.0) -> ExpRows:
    """ExpRows of given probabilities [C, V]; that of the token is what the others leave."""
    p = probabilities.double().clone()
    ids = token_ids[:, None]
    p.scatter_(1, ids, 0.0)
    exps = (p * total * unit).to(dtype)
    others = exps.double().sum(1)
    at_token = (-others).float()
    exps.scatter_(1, ids, at_token.to(dtype)[:, None])
    nothing = torch.zeros(len(p), device=p.device)
    return ExpRows(
        exps,
        nothing,
        nothing,
        torch.full_like(nothing, total),
        (others / unit).float(),
        at_token,
        nothing.bool(),
        token_ids,
        LogitOptions(),
        unit,
    )


def select(rows, scale, delta, max_entries) -> Entries:
    into = Entries.empty(len(scale), max_entries, scale.device)
    select_entries(rows, scale, delta=delta, into=into)
    return into


def as_matrix(entries: Entries, vocab: int) -> torch.Tensor:
    """[C, V] fp64 with each kept coefficient at its place."""
    ids, coef, counts = entries.ids, entries.coef, entries.counts
    there = torch.arange(ids.shape[1], device=ids.device) < counts[:, None]
    matrix = torch.zeros(len(ids), vocab, dtype=torch.float64, device=ids.device)
    row = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)[there]
    assert len(torch.unique(row * vocab + ids[there])) == len(row), "an entry twice"
    return matrix.index_put_((row, ids[there].long()), coef[there].double())


def peaked(num_rows, vocab, temperature, device):
    """Probabilities of normal logits at a temperature, and tokens drawn from them."""
    logits = torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    p = torch.softmax(logits.double() / temperature, 1)
    token_ids = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(1))[:, 0]
    return p.to(device), token_ids.to(device)


def check_selection(vocab, temperature, delta, max_entries, dtype, device) -> Entries:
    """Entry for entry what the specification keeps, and what a certificate must be."""
    p, token_ids = peaked(23, vocab, temperature, device)
    rows = rows_of(p, token_ids, dtype, unit=512.0 if dtype == torch.float16 else 1.0)
    scale = torch.linspace(-1, 1, 23, device=device)
    scale[11] = 0.0
    got = select(rows, scale, delta, max_entries)
    expected = select_entries_ref(rows, scale, delta=delta, max_entries=max_entries)
    assert torch.equal(got.dense, expected.dense)
    assert torch.equal(got.counts, expected.counts)
    matrix = as_matrix(got, vocab)
    torch.testing.assert_close(matrix, as_matrix(expected, vocab), rtol=1e-6, atol=0)
    torch.testing.assert_close(got.dropped, expected.dropped, rtol=1e-5, atol=1e-9)
    check_certificate(rows, scale, got, delta)
    assert got.counts[11] == 0 and not got.dense[11] and got.dropped[11] == 0
    # dense only where more than max_entries are needed at 6/7 of delta
    exps = rows.exps.double().scatter(1, token_ids[:, None], 0.0)
    tails = exps.sort(1)[0].cumsum(1) / (rows.unit * rows.total.double())[:, None]
    needed = vocab + 1 - (tails <= delta * 6 / 7).sum(1)
    assert (needed[got.dense] > max_entries).all()
    return got


def check_certificate(rows, scale, entries, delta) -> None:
    """``dropped`` is the fp64 sum of what was left out and at most delta; the token is kept."""
    vocab = rows.exps.shape[1]
    sparse = (entries.counts > 0) & ~entries.dense
    exps = rows.exps.double().scatter(1, rows.token_ids[:, None], 0.0)
    kept = as_matrix(entries, vocab) != 0
    mass = rows.unit * rows.total.double()
    left_out = torch.where(kept, 0.0, exps).sum(1) / mass
    assert (left_out[sparse] <= delta).all()
    torch.testing.assert_close(
        entries.dropped[sparse].double(), left_out[sparse], rtol=1e-5, atol=1e-12
    )
    assert (entries.dropped[~sparse] == 0).all()
    at_token = as_matrix(entries, vocab).gather(1, rows.token_ids[:, None])[:, 0]
    expected = (scale * rows.at_token).double()
    torch.testing.assert_close(at_token[sparse], expected[sparse], rtol=1e-6, atol=0)


SELECTIONS = [  # V, temperature, delta, max_entries, the kinds of rows that come out
    (50, 0.5, 1e-2, 16, {"sparse"}),
    (1009, 0.6, 1e-3, 64, {"sparse", "dense"}),
    (1009, 0.6, 0.3, 1, {"sparse", "dense"}),
    (1009, 1.0, 1e-1, 64, {"sparse", "dense"}),
    (5003, 0.4, 1e-2, 16, {"sparse", "dense"}),
    (5003, 5.0, 1e-2, 64, {"dense"}),
]


def kinds_of(entries: Entries) -> set[str]:
    found = {"sparse": (entries.counts > 0).any(), "dense": entries.dense.any()}
    return {kind for kind, there in found.items() if there}


@pytest.mark.parametrize(("vocab", "temperature", "delta", "max_entries", "kinds"), SELECTIONS)
def test_selection(vocab, temperature, delta, max_entries, kinds) -> None:
    device = torch.device("cpu")
    got = check_selection(vocab, temperature, delta, max_entries, torch.float32, device)
    assert kinds_of(got) == kinds


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize(("vocab", "temperature", "delta", "max_entries", "kinds"), SELECTIONS)
def test_selection_triton(vocab, temperature, delta, max_entries, kinds, dtype, device) -> None:
    got = check_selection(vocab, temperature, delta, max_entries, dtype, device)
    assert kinds_of(got) == kinds


@pytest.mark.triton
def test_a_row_of_many_spans_triton(device, monkeypatch) -> None:
    """Rows that are read to the end, and diffuse ones that are left early."""
    monkeypatch.setattr(MODULE, "CANDIDATE_BLOCKS", {80: (128, 1)})
    got = check_selection(5003, 0.4, 1e-2, 16, torch.float32, device)
    assert kinds_of(got) == {"sparse", "dense"}


def adversarial(device):
    """Rows [C, V] of which each tries to break the certificate; V = 4,000, delta = 1e-2, at most 8
    entries. Returns (probabilities, token_ids, which of them must be dense)."""
    vocab, delta = 4000, 1e-2
    least = delta * (1 - ROUNDING_SHARE) / (num_candidates(8) - 8)
    rows, dense = [], []

    def add(values, is_dense):
        row = torch.zeros(vocab, dtype=torch.float64)
        row[1 : 1 + len(values)] = torch.as_tensor(values, dtype=torch.float64)
        row[0] = 1 - row.sum()  # the token
        rows.append(row)
        dense.append(is_dense)

    add([], False)  # certain: only the token
    add([0.009], False)  # under the budget: only the token
    add([0.011], False)  # above it: two entries
    add([0.1] * 7, False)  # exactly 8 entries
    add([0.1] * 8, True)  # one more
    add([0.004] * 3, False)  # equal entries of which two could go: all stay
    add([0.4] + [delta * 0.9 / 3998] * 3998, False)  # a long thin tail under the budget
    add([0.4] + [delta * 1.1 / 3998] * 3998, True)  # and above it
    add([0.5 / 3999] * 3999, True)  # flat
    add([least * 1.001] * 240, False)  # as many candidates as may be dropped
    add([least * 1.001] * 300, True)  # more candidates than places
    add([0.03] * 6 + [least * 0.999] * 100 + [1e-30] * 50, False)
    add([0.0] * 3999, False)
    return torch.stack(rows).to(device), torch.zeros(len(rows), dtype=torch.long), dense


def check_adversarial(total, unit, dtype, device) -> None:
    p, token_ids, dense = adversarial(device)
    rows = rows_of(p, token_ids.to(device), dtype, total=total, unit=unit)
    scale = torch.full((len(p),), -0.3, device=device)
    got = select(rows, scale, 1e-2, 8)
    check_certificate(rows, scale, got, 1e-2)
    if dtype == torch.float32:  # in half the sums of the thin tails round away from their case
        assert got.dense.tolist() == dense
        assert got.counts.tolist()[:6] == [1, 1, 2, 8, 0, 4]


@pytest.mark.parametrize("total", [1.0, math.exp(-7), math.exp(7)])
def test_adversarial_rows(total) -> None:
    check_adversarial(total, 1.0, torch.float32, torch.device("cpu"))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_adversarial_rows_triton(dtype, device) -> None:
    check_adversarial(1.0, 512.0 if dtype == torch.float16 else 1.0, dtype, device)


def check_not_finite(device) -> None:
    """A NaN is not small: such a row is dense, where it reaches the gradient."""
    p, token_ids = peaked(4, 300, 0.5, device)
    rows = rows_of(p, token_ids, torch.float32)
    rows.exps[1, 7] = math.nan
    rows.total[2] = math.nan
    rows.exps[3, 9] = math.inf
    got = select(rows, torch.ones(4, device=device), 1e-2, 64)
    assert got.dense.tolist()[1:3] == [True, True]
    assert got.counts[0] > 0
    kept = as_matrix(got, 300)[3]
    assert bool(got.dense[3]) or bool(kept[9].isinf())


def test_not_finite() -> None:
    check_not_finite(torch.device("cpu"))


@pytest.mark.triton
def test_not_finite_triton(device) -> None:
    check_not_finite(device)


@pytest.mark.parametrize("prior", [True, False])
def test_certificate_through_exp_rows(prior) -> None:
    """The probabilities that exp_rows makes, with a prior that is off by a nat and without one."""
    logits = torch.randn(20, 501) * 6
    token_ids = torch.softmax(logits, 1).multinomial(1)[:, 0]
    exact = torch.log_softmax(logits.double(), 1)
    old = (exact.gather(1, token_ids[:, None])[:, 0] + 1.0).float() if prior else None
    out = torch.empty_like(logits)
    rows = exp_rows(out, logits.clone(), token_ids, LogitOptions(), old, False)
    scale = rows.row_scale(torch.linspace(0.1, 1, 20))
    entries = select(rows, scale, 1e-2, 64)
    kept = as_matrix(entries, 501) != 0
    lost = torch.where(kept, 0.0, exact.exp()).sum(1)
    sparse = entries.counts > 0
    assert sparse.all()
    assert (lost <= 1e-2 * (1 + 1e-6)).all() and lost.max() > 0
    torch.testing.assert_close(entries.dropped.double(), lost, rtol=1e-4, atol=1e-9)


# ---- The certificate as a bound on the gradient --------------------------------------------------


def check_bounds(p, token_ids, weight, hidden, delta, max_entries, dtype, device):
    """The errors of dX and dW beside their bounds: (largest ratio of a row, ratio of dW)."""
    rows = rows_of(p, token_ids, dtype)
    grads = torch.randn(len(p), generator=torch.Generator().manual_seed(3)).to(device)
    scale = rows.row_scale(grads)
    entries = select(rows, scale, delta, max_entries)
    exact = rows.exps.double().scatter(1, token_ids[:, None], rows.at_token.double()[:, None])
    error = scale.double()[:, None] * exact - as_matrix(entries, p.shape[1])
    error[entries.dense] = 0.0
    row_bound, weight_bound = error_bounds(entries, grads.abs(), hidden, weight)
    row_error = (error @ weight.double()).norm(dim=1)
    weight_error = (error.t() @ hidden.double()).norm()
    slack = 1 + 1e-5  # coefficients are fp32
    floor = 1e-6 * (exact * scale.double()[:, None]).norm(dim=1) * weight.double().norm(dim=1).max()
    assert (row_error <= slack * row_bound + floor).all()
    assert weight_error <= slack * weight_bound + 1e-6 * hidden.double().norm()
    lossy = row_bound > 0
    assert lossy.any()
    return (row_error / row_bound)[lossy].max().item(), (weight_error / weight_bound).item()


@pytest.mark.parametrize(
    ("temperature", "delta"),
    [(0.3, 1e-1), (0.3, 1e-2), (0.3, 1e-3), (0.6, 1e-1), (0.6, 1e-2), (1.0, 1e-1)],
)
def test_bounds_on_random_rows(temperature, delta) -> None:
    p, token_ids = peaked(40, 3000, temperature, "cpu")
    weight, hidden = torch.randn(3000, 32), torch.randn(40, 32)
    check_bounds(p, token_ids, weight, hidden, delta, 128, torch.float32, "cpu")


def test_bounds_are_reached() -> None:
    """Where every column of the head and every hidden state points one way, nothing cancels: the
    errors are the bounds."""
    p, token_ids = peaked(40, 3000, 0.6, "cpu")
    p = p.index_select(0, torch.arange(40) * 0)  # one row, many times
    token_ids = token_ids[:1].expand(40).contiguous()
    weight = torch.ones(3000, 32)
    by_row, _ = check_bounds(
        p, token_ids, weight, torch.ones(40, 32), 1e-2, 128, torch.float32, "cpu"
    )
    assert by_row == pytest.approx(1.0, rel=1e-3)
    one = torch.zeros(1, 3000, dtype=torch.float64)
    one[0, 5], one[0, 0] = 0.009, 0.991  # a single entry is dropped
    token = torch.zeros(1, dtype=torch.long)
    _, of_weight = check_bounds(
        one, token, weight, torch.ones(1, 32), 1e-2, 8, torch.float32, "cpu"
    )
    assert of_weight == pytest.approx(1.0, rel=1e-3)
