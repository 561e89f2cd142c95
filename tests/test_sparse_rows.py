"""Sparse rows of a head: accuracy against fp64, padding, hot ids, repeatability; see
kernels/sparse_rows.py."""

from __future__ import annotations

import importlib

import pytest
import torch
from head_cases import DTYPES, TRITON_DTYPES

from grpo_engine.kernels.sparse_rows import (
    add_sparse_grad_weight,
    gather_grad_hidden,
    gather_logits,
)
from grpo_engine.kernels.sparse_rows_triton import SEGMENT_PIECE
from grpo_engine.kernels.testing import assert_accurate

MODULE = importlib.import_module("grpo_engine.kernels.sparse_rows")
SHAPES = [(1, 1, 53, 16), (7, 5, 11, 33), (193, 20, 2999, 257), (5, 3, 151936, 16)]
TRITON_SHAPES = [(1, 1, 53, 16), (7, 5, 11, 33), (33, 19, 40, 300)]


def make_rows(num_rows, num_entries, vocab, width, device, dtype=torch.float32):
    """hidden [N, D], weight [V, D], coef [N, K], ids [N, K] and counts [N]: repeated ids, negative
    ones in between, empty rows; what lies beyond a row's count is out of every range."""
    g = torch.Generator().manual_seed(num_rows * 1000 + vocab)
    hidden = torch.randn(num_rows, width, generator=g)
    weight = torch.randn(vocab, width, generator=g) / width**0.5
    coef = torch.randn(num_rows, num_entries, generator=g)
    ids = torch.randint(0, vocab, (num_rows, num_entries), generator=g, dtype=torch.int32)
    ids[:, 0] = vocab - 1  # in every row
    ids[::4, num_entries // 2] = -1
    ids[1::4, -1] = ids[1::4, 0]
    counts = torch.randint(0, num_entries + 1, (num_rows,), generator=g, dtype=torch.int32)
    counts[-1:] = num_entries
    ids[torch.arange(num_entries) >= counts[:, None]] = 2**30
    tensors = (hidden.to(dtype), weight.to(dtype), coef, ids, counts)
    return [tensor.to(device) for tensor in tensors]


def live_mask(ids, counts):
    return (torch.arange(ids.shape[1], device=ids.device) < counts[:, None]) & (ids >= 0)


def dense_coefs(coef, ids, counts, vocab, dtype=torch.float64):
    """[N, V] with each entry added at its id."""
    live = live_mask(ids, counts)
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)[live]
    dense = torch.zeros(len(ids), vocab, dtype=dtype, device=ids.device)
    return dense.index_put_((rows, ids[live].long()), coef[live].to(dtype), accumulate=True)


def check_logits(shape, dtype, device) -> None:
    hidden, weight, _, ids, counts = make_rows(*shape, device, dtype)
    ours = gather_logits(hidden, weight, ids, counts)
    assert ours.dtype == torch.float32 and ours.shape == ids.shape
    live = live_mask(ids, counts)
    assert (ours[~live] == -torch.inf).all()
    chosen = torch.where(live, ids, 0).long()
    truth = (hidden.double() @ weight.double().T).gather(1, chosen)
    eager = (hidden.float() @ weight.float().T).gather(1, chosen)
    # held to fp32 whatever the inputs: the products are summed in fp32 and never rounded to half
    report = ours[live], eager[live], truth[live]
    assert_accurate("logits", *report, dtype=torch.float32, floor=3e-6)


def check_grad_hidden(shape, dtype, out_dtype, device) -> None:
    _, weight, coef, ids, counts = make_rows(*shape, device, dtype)
    dense = dense_coefs(coef, ids, counts, len(weight))
    truth = dense @ weight.double()
    eager = (dense.float() @ weight.float()).to(out_dtype)
    out = torch.empty(truth.shape, dtype=out_dtype, device=device)
    gather_grad_hidden(coef, ids, counts, weight, out)
    assert_accurate("d hidden", out, eager, truth, dtype=out_dtype, floor=3e-6)
    assert (out[~live_mask(ids, counts).any(1)] == 0).all()


def check_grad_weight(shape, dtype, device) -> None:
    hidden, weight, coef, ids, counts = make_rows(*shape, device, dtype)
    dense = dense_coefs(coef, ids, counts, len(weight))
    before = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(device)
    truth = before.double() + dense.T @ hidden.double()
    eager = before + dense.float().T @ hidden.float()
    total = before.clone()
    add_sparse_grad_weight(total, coef, ids, counts, hidden)
    assert_accurate("d weight", total, eager, truth, dtype=torch.float32, floor=3e-6)
    absent = torch.ones(len(weight), dtype=torch.bool, device=device)
    absent[ids[live_mask(ids, counts)].long()] = False
    assert torch.equal(total[absent], before[absent])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_three_way_accuracy(shape, dtype, device) -> None:
    check_logits(shape, dtype, device)
    check_grad_hidden(shape, dtype, torch.float32, device)
    check_grad_hidden(shape, dtype, dtype, device)
    check_grad_weight(shape, dtype, device)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("shape", TRITON_SHAPES)
def test_three_way_accuracy_triton(shape, dtype, device) -> None:
    check_logits(shape, dtype, device)
    check_grad_hidden(shape, dtype, torch.float32, device)
    check_grad_hidden(shape, dtype, dtype, device)
    check_grad_weight(shape, dtype, device)


def check_hot_ids(num_rows, device) -> None:
    """Ids that fill several pieces of the sorted entries, and ones that end where a piece does."""
    hidden, weight, _, _, _ = make_rows(num_rows, 2, 9, 24, device)
    sizes = [SEGMENT_PIECE, 1, SEGMENT_PIECE - 2, 3 * SEGMENT_PIECE + 5]
    spread = [v for v, size in enumerate(sizes) for _ in range(size)]
    spread += [7] * (2 * num_rows - len(spread))
    g = torch.Generator().manual_seed(5)
    ids = torch.tensor(spread, dtype=torch.int32)[torch.randperm(len(spread), generator=g)]
    ids = ids.view(num_rows, 2).to(device)
    coef = torch.randn(num_rows, 2, generator=g).to(device)
    counts = torch.full((num_rows,), 2, dtype=torch.int32, device=device)
    dense = dense_coefs(coef, ids, counts, 9)
    truth, eager = dense.T @ hidden.double(), dense.float().T @ hidden
    total = torch.zeros_like(weight)
    add_sparse_grad_weight(total, coef, ids, counts, hidden)
    assert_accurate("d weight", total, eager, truth, dtype=torch.float32, floor=2e-6)
    again = torch.zeros_like(weight)
    add_sparse_grad_weight(again, coef, ids, counts, hidden)
    assert torch.equal(total, again)


def test_hot_ids(device, monkeypatch) -> None:
    check_hot_ids(1000, device)
    monkeypatch.setattr(MODULE, "CPU_GATHER_ELEMENTS", 24 * SEGMENT_PIECE)
    check_hot_ids(1000, device)


@pytest.mark.triton
def test_hot_ids_triton(device) -> None:
    check_hot_ids(450, device)


def run_all(hidden, weight, coef, ids, counts):
    logits = gather_logits(hidden, weight, ids, counts)
    grad_hidden = torch.empty_like(hidden)
    gather_grad_hidden(coef, ids, counts, weight, grad_hidden)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    add_sparse_grad_weight(grad_weight, coef, ids, counts, hidden)
    return logits, grad_hidden, grad_weight


def check_repeatable(shape, device) -> None:
    """Bit for bit, twice in a row, and with more padding behind each row."""
    hidden, weight, coef, ids, counts = make_rows(*shape, device)
    first = run_all(hidden, weight, coef, ids, counts)
    for ours, expected in zip(run_all(hidden, weight, coef, ids, counts), first, strict=True):
        assert torch.equal(ours, expected)
    wider_ids = torch.nn.functional.pad(ids, (0, 3), value=-1)
    wider_coef = torch.nn.functional.pad(coef, (0, 3), value=torch.nan)
    _, _, grad_weight = run_all(hidden, weight, wider_coef, wider_ids, counts)
    assert torch.equal(grad_weight, first[2])


def test_repeatable(device) -> None:
    check_repeatable((193, 20, 301, 64), device)


@pytest.mark.triton
def test_repeatable_triton(device) -> None:
    check_repeatable((20, 9, 30, 40), device)


def test_threads_change_nothing() -> None:
    """The order of a sum does not depend on how many threads share the work (CPU)."""
    inputs = make_rows(193, 20, 301, 64, "cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(run_all(*inputs)[2])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def check_empty(device) -> None:
    hidden, weight, coef, ids, counts = make_rows(6, 4, 12, 8, device)
    for n, k in ((0, 4), (6, 0), (0, 0)):
        logits, grad_hidden, grad_weight = run_all(
            hidden[:n], weight, coef[:n, :k], ids[:n, :k], counts[:n]
        )
        assert logits.shape == (n, k) and grad_hidden.shape == (n, 8)
        assert (grad_hidden == 0).all() and (grad_weight == 0).all()
    nothing = torch.zeros_like(counts)
    all_negative = torch.full_like(ids, -1)
    for some_ids, some_counts in ((ids, nothing), (all_negative, counts)):
        logits, grad_hidden, grad_weight = run_all(hidden, weight, coef, some_ids, some_counts)
        assert (logits == -torch.inf).all()
        assert (grad_hidden == 0).all() and (grad_weight == 0).all()


def test_empty(device) -> None:
    check_empty(device)


@pytest.mark.triton
def test_empty_triton(device) -> None:
    check_empty(device)


def check_what_is_not_named_is_not_read(device) -> None:
    """NaN in a row without entries, in a weight no row names, in the padding of coef."""
    hidden, weight, coef, ids, counts = make_rows(9, 4, 50, 8, device)
    counts[2] = 0
    live = live_mask(ids, counts)
    clean = run_all(hidden, weight, torch.where(live, coef, 0.0), ids, counts)
    named = torch.zeros(50, dtype=torch.bool, device=device)
    named[ids[live].long()] = True
    assert not named.all()
    dirty = run_all(
        torch.where(live.any(1)[:, None], hidden, torch.nan),
        torch.where(named[:, None], weight, torch.nan),
        torch.where(live, coef, torch.nan),
        ids,
        counts,
    )
    for ours, expected in zip(dirty, clean, strict=True):
        assert torch.equal(ours, expected)


def test_what_is_not_named_is_not_read(device) -> None:
    check_what_is_not_named_is_not_read(device)


@pytest.mark.triton
def test_what_is_not_named_is_not_read_triton(device) -> None:
    check_what_is_not_named_is_not_read(device)


def check_rows(device) -> None:
    """d hidden goes where ``rows`` says; a negative row is left alone, an empty one is zeroed."""
    _, weight, coef, ids, counts = make_rows(6, 4, 50, 8, device)
    counts[:2] = torch.tensor([0, 4], dtype=torch.int32)
    plain = torch.empty(6, 8, device=device)
    gather_grad_hidden(coef, ids, counts, weight, plain)
    for dtype in (torch.int32, torch.int64):
        rows = torch.tensor([7, 3, -1, 0, -1, 5], dtype=dtype, device=device)
        out = torch.full((9, 8), 4.0, device=device)
        gather_grad_hidden(coef, ids, counts, weight, out, rows)
        expected = torch.full((9, 8), 4.0, device=device)
        expected[[7, 3, 0, 5]] = plain[[0, 1, 3, 5]]
        assert torch.equal(out, expected)


def test_rows(device) -> None:
    check_rows(device)


@pytest.mark.triton
def test_rows_triton(device) -> None:
    check_rows(device)


def check_id_beyond_the_vocabulary(device) -> None:
    hidden, weight, coef, ids, counts = make_rows(5, 3, 40, 8, device)
    counts.fill_(3)
    ids[:] = torch.tensor([0, 1, 2], device=device)
    expected = run_all(hidden, weight, coef[:, :2], ids[:, :2], counts - 1)
    for beyond in (40, 2**30):  # the latter is far outside the weight's memory
        ids[:, 2] = beyond
        logits, grad_hidden, grad_weight = run_all(hidden, weight, coef, ids, counts)
        assert logits[:, 2].isnan().all() and torch.equal(logits[:, :2], expected[0])
        assert torch.equal(grad_hidden, expected[1]) and torch.equal(grad_weight, expected[2])


def test_id_beyond_the_vocabulary(device) -> None:
    check_id_beyond_the_vocabulary(device)


@pytest.mark.triton
def test_id_beyond_the_vocabulary_triton(device) -> None:
    check_id_beyond_the_vocabulary(device)


def test_strided_inputs(device) -> None:
    """Rows may be apart; the last dimension is contiguous."""
    hidden, weight, coef, ids, counts = make_rows(7, 5, 11, 33, device)
    expected = run_all(hidden, weight, coef, ids, counts)

    def apart(tensor):
        return torch.cat([tensor, torch.full_like(tensor, 0)], 1)[:, : tensor.shape[1]]

    got = run_all(*(apart(tensor) for tensor in (hidden, weight, coef, ids)), counts)
    for ours, wanted in zip(got, expected, strict=True):
        assert torch.equal(ours, wanted)
