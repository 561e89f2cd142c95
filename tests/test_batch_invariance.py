"""linear_logprobs(batch_invariant=True): a row's bits depend on that row alone."""

from __future__ import annotations

import importlib

import pytest
import torch
from head_cases import DTYPES, TRITON_DTYPES, all_options, check_three_ways, make_head, run

from grpo_engine.kernels import linear_logprobs
from grpo_engine.kernels.common import interpreting

CHUNKS = importlib.import_module("grpo_engine.kernels.head_chunks")
PASS = importlib.import_module("grpo_engine.kernels.head_pass")
portable = pytest.mark.skipif(
    interpreting(), reason="about the portable path; too slow in Triton's"
)


def outputs(hidden, weight, token_ids, *, bias=None, rows=slice(None), **options):
    """[3, N]: logprobs, entropy and lse of ``rows``."""
    temperature = options.pop("temperature", 1.0)
    if torch.is_tensor(temperature):
        temperature = temperature[rows]
    made = linear_logprobs(
        hidden[rows],
        weight,
        token_ids[rows],
        bias=bias,
        temperature=temperature,
        return_entropy=True,
        return_lse=True,
        batch_invariant=True,
        **options,
    )
    return torch.stack(made)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def check_rows_alone_and_together(shape, dtype, device, sizes, **options) -> None:
    """Each row in the whole, alone, among ``sizes`` others, in another order, behind a mask, in a
    matrix that lies elsewhere in memory."""
    hidden, weight, bias, token_ids = make_head(*shape, device)
    hidden, weight, num_rows = hidden.to(dtype), weight.to(dtype), shape[0]
    inputs = (hidden, weight, token_ids)
    options = {"bias": bias, **options}
    whole = outputs(*inputs, **options)
    for size in sizes:
        for start in {0, 1, (num_rows - size) // 2, num_rows - size}:
            rows = slice(start, start + size)
            assert torch.equal(outputs(*inputs, rows=rows, **options), whole[:, rows]), rows
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(num_rows, generator=generator).to(device)
    assert torch.equal(outputs(*inputs, rows=order, **options), whole[:, order])
    mask = torch.arange(num_rows, device=device) % 3 != 1
    for compact in (False, True):
        masked = outputs(*inputs, row_mask=mask, compact_rows=compact, **options)
        assert torch.equal(masked, torch.where(mask, whole, 0.0))
    elsewhere = torch.zeros(num_rows, shape[2] + 3, device=device, dtype=dtype)[:, 1:-2]
    elsewhere.copy_(hidden)
    assert torch.equal(outputs(elsewhere, weight, token_ids, **options), whole)


@portable
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("vocab", "width"),
    [(2, 5), (11, 33), (53, 7), (301, 64), (1009, 1), (1023, 35), (4999, 17), (50257, 16)],
)
def test_rows_alone_and_together(vocab, width, dtype, threads, device) -> None:
    num_rows, sizes = 300, (1, 2, 3, 31, 32, 33, 64, 65, 299)
    if vocab > 2000:
        num_rows, sizes = 70, (1, 33, 69)
    check_rows_alone_and_together((num_rows, vocab, width), dtype, device, sizes)


@portable
def test_every_number_of_rows(device, threads) -> None:
    """The first n of 300 rows, for every n; on two threads, whose start costs more, for fewer."""
    hidden, weight, _, token_ids = make_head(300, 101, 19, device)
    whole = outputs(hidden, weight, token_ids)
    for n in range(1, 301) if threads == 1 else (*range(1, 35), *range(35, 301, 19)):
        assert torch.equal(outputs(hidden, weight, token_ids, rows=slice(0, n)), whole[:, :n]), n


@portable
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_option(dtype, device) -> None:
    options = {name: all_options(130, device)[name] for name in ("temperature", "logit_softcap")}
    check_rows_alone_and_together((130, 1009, 33), dtype, device, (1, 5, 64), **options)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize(("vocab", "width"), [(57, 16), (65, 19)])
def test_rows_alone_and_together_triton(vocab, width, dtype, device) -> None:
    temperature = torch.linspace(0.6, 1.5, 9, device=device)
    check_rows_alone_and_together(
        (9, vocab, width), dtype, device, (1, 4), temperature=temperature, logit_softcap=20.0
    )


@pytest.mark.parametrize("chunk_rows", [1, 7, 32, 64])
def test_chunks(chunk_rows, device, monkeypatch) -> None:
    hidden, weight, bias, token_ids = make_head(70, 57, 24, device)
    whole = outputs(hidden, weight, token_ids, bias=bias)
    monkeypatch.setattr(CHUNKS, "chunk_rows", lambda hidden, vocab: chunk_rows)
    assert torch.equal(outputs(hidden, weight, token_ids, bias=bias), whole)


@pytest.mark.parametrize("path", ["recompute", "frozen", "keep"])
def test_with_gradients_and_without(path, device) -> None:
    """The old log-probabilities of a no-grad pass, in another packing, are those of the training
    step: the ratio is exactly 1."""
    hidden, weight, _, token_ids = make_head(37, 301, 24, device)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        parts = [
            linear_logprobs(hidden[rows], weight, token_ids[rows], batch_invariant=True)
            for rows in order.split(10)
        ]
    old = torch.empty(37, device=device).scatter_(0, order, torch.cat(parts))
    needs = "hidden" if path == "frozen" else "hidden weight"
    (now,), _ = run(
        linear_logprobs,
        *(hidden, weight, token_ids),
        needs=needs,
        returns="logprobs",
        keep_probs=path == "keep",
        batch_invariant=True,
    )
    assert torch.equal(now, old)
    assert ((now - old).exp() == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_accurate_as_without(dtype, device) -> None:
    if dtype == torch.bfloat16 and interpreting():
        pytest.skip("Triton's interpreter has no bfloat16")
    hidden, weight, bias, token_ids = make_head(7, 1009, 33, device)
    options = {**all_options(7, device), "batch_invariant": True}
    check_three_ways(hidden, weight, bias, token_ids, dtype, **options)


# ---- The block product of a CPU ------------------------------------------------------------------


@portable
@pytest.mark.parametrize(("vocab", "width"), [(11, 33), (301, 64), (1500, 24)])
def test_a_blas_that_looks_at_the_place(vocab, width, monkeypatch) -> None:
    """Where a BLAS gives a row other bits at another place of a block, rows go one by one."""
    hidden, weight, _, token_ids = make_head(45, vocab, width, "cpu")
    called = []
    row_by_row = PASS._logits_row_by_row
    monkeypatch.setattr(PASS, "block_is_uniform", lambda *shape: False)
    monkeypatch.setattr(
        PASS, "_logits_row_by_row", lambda *a: called.append(len(a[0])) or row_by_row(*a)
    )
    whole = outputs(hidden, weight, token_ids)
    assert called and not any(rows % 32 for rows in called)
    for rows in (slice(0, 1), slice(44, 45), slice(3, 40)):
        assert torch.equal(outputs(hidden, weight, token_ids, rows=rows), whole[:, rows])
    options = {"batch_invariant": True, "row_mask": torch.arange(45) % 3 != 1}
    check_three_ways(hidden, weight, None, token_ids, torch.float32, **options)


@portable
def test_the_place_is_tried(monkeypatch) -> None:
    """``block_is_uniform`` sees a product whose rows differ by their place."""
    matmul = torch.Tensor.__matmul__
    uneven = torch.linspace(0, 1e-6, 32)[:, None]
    PASS.block_is_uniform.cache_clear()
    assert PASS.block_is_uniform(64, 48, torch.get_num_threads())
    PASS.block_is_uniform.cache_clear()
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: matmul(a, b) + uneven)
    assert not PASS.block_is_uniform(64, 48, torch.get_num_threads())
    monkeypatch.undo()
    PASS.block_is_uniform.cache_clear()
