"""live_gemm: GEMMs over live rows counted on the device; results, untouched rows, batch
invariance, determinism."""

from __future__ import annotations

import importlib

import pytest
import torch

from grpo_engine.kernels.live_gemm import (
    LiveRows,
    live_add_grad_weight,
    live_grad_hidden,
    live_logits,
    live_rows,
    live_rows_ref,
)
from grpo_engine.kernels.testing import assert_accurate

MODULE = importlib.import_module("grpo_engine.kernels.live_gemm")
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not torch.cuda.is_available(), reason="Triton's interpreter has no bfloat16"
        ),
    ),
]
SENTINEL = -7.0


def make_inputs(num_rows, width, vocab, dtype, device, keep=0.5):
    """hidden [N, D], weight [V, D], dlogits [N, V], live [N] bool, row_scale [N]."""
    generator = torch.Generator().manual_seed(num_rows * 1000 + vocab)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    live = torch.rand(num_rows, generator=generator) < keep
    return (
        normal(num_rows, width).to(dtype).to(device),
        (normal(vocab, width) / width**0.5).to(dtype).to(device),
        normal(num_rows, vocab).to(dtype).to(device),
        live.to(device),
        normal(num_rows).to(device),
    )


@pytest.mark.parametrize(
    "live",
    [[], [True], [False], [False, True, True, False, True], [False] * 5, [True] * 5],
)
def test_live_rows(live, device) -> None:
    live = torch.tensor(live, dtype=torch.bool, device=device)
    got, expected = live_rows(live), live_rows_ref(live)
    for ours, ref in zip(got, expected, strict=True):
        assert ours.dtype == ref.dtype == torch.int32
        assert ours.device.type == device.type
        assert torch.equal(ours, ref)


def test_live_rows_many(device) -> None:
    live = torch.rand(70_001, device=device) < 0.3
    for ours, ref in zip(live_rows(live), live_rows_ref(live), strict=True):
        assert torch.equal(ours, ref)


def check_products(num_rows, width, vocab, chunk, dtype, device, keep) -> None:
    """All three products over chunks, against fp64 and beside torch at the dtype; rows that are not
    live hold NaN, in which nobody may look, and what is not theirs to write stays."""
    hidden, weight, dlogits, live, scale = make_inputs(num_rows, width, vocab, dtype, device, keep)
    rows, index = live_rows(live), live.nonzero().squeeze(1)
    hidden[~live] = float("nan")
    wide_weight = weight.double()
    places = index.cpu().tolist()
    logits = torch.full((num_rows, vocab), SENTINEL, device=device)
    grad_hidden = torch.full((num_rows, width), SENTINEL, dtype=dtype, device=device)
    grad_weight = torch.ones(vocab, width, device=device)
    compact = torch.full_like(dlogits, float("nan"))
    compact[: len(places)] = dlogits[index]
    compact_scale = torch.full_like(scale, float("nan"))
    compact_scale[: len(places)] = scale[index]
    for start in range(0, num_rows, chunk):
        part = slice(start, start + chunk)
        live_logits(logits[part], hidden, weight, rows, start)
        live_grad_hidden(grad_hidden, compact[part], weight, rows, start, compact_scale[part])
        live_add_grad_weight(grad_weight, compact[part], hidden, rows, start, compact_scale[part])
    count = len(places)
    assert (logits[count:] == SENTINEL).all()
    assert (grad_hidden[~live] == SENTINEL).all()
    if count:
        live_hidden, live_dlogits = hidden[index], dlogits[index]
        truth = live_hidden.double() @ wide_weight.t()
        assert_accurate(
            "logits",
            logits[:count],
            live_hidden.float() @ weight.float().t(),
            truth,
            dtype=torch.float32,
        )
        product = live_dlogits.double() @ wide_weight
        assert_accurate(
            "grad_hidden",
            grad_hidden[index],
            ((live_dlogits.float() @ weight.float()) * scale[index, None]).to(dtype),
            product * scale[index, None].double(),
            dtype=dtype,
        )
    scaled = hidden[index].double() * scale[index, None].double()
    eager = (
        dlogits[index].float().t() @ (hidden[index].float() * scale[index, None]).to(dtype).float()
    )
    assert_accurate(
        "grad_weight", grad_weight, 1 + eager, 1 + dlogits[index].double().t() @ scaled, dtype=dtype
    )


SIZES = [  # N, D, V, chunk, share of live rows
    (1, 16, 17, 1, 1.0),
    (7, 33, 50, 3, 0.6),
    (70, 48, 130, 32, 0.5),
    (70, 48, 130, 70, 1.0),
    (40, 16, 65, 16, 0.0),
    (150, 48, 144, 140, 0.95),  # sizes that 16 divides, two row tiles in a chunk
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "width", "vocab", "chunk", "keep"), SIZES)
def test_products(num_rows, width, vocab, chunk, keep, dtype, device) -> None:
    check_products(num_rows, width, vocab, chunk, dtype, device, keep)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "width", "vocab", "chunk", "keep"), SIZES)
def test_products_triton(num_rows, width, vocab, chunk, keep, dtype, device) -> None:
    check_products(num_rows, width, vocab, chunk, dtype, device, keep)


@pytest.mark.triton
def test_more_tiles_than_a_group_holds_triton(device, monkeypatch) -> None:
    """Three row tiles in groups of two."""
    monkeypatch.setattr(MODULE, "GROUP_TILES", 2)
    check_products(140, 70, 150, 140, torch.float32, device, 1.0)


def test_half_weight_in_tiles(device) -> None:
    """More rows of a half weight than are widened at a time."""
    check_products(5, 16, 9001, 5, torch.float16, device, 0.8)


def check_all_rows(dtype, device) -> None:
    """rows=None is every row in order, and no row_scale is a scale of 1."""
    hidden, weight, dlogits, _, _ = make_inputs(9, 32, 40, dtype, device)
    everyone = live_rows(torch.ones(9, dtype=torch.bool, device=device))
    results = []
    for rows in (None, everyone):
        logits = torch.full((9, 40), SENTINEL, device=device)
        grad_hidden = torch.full((9, 32), SENTINEL, device=device)
        grad_weight = torch.zeros(40, 32, device=device)
        for start, stop in ((0, 4), (4, 9)):
            part = slice(start, stop)
            assert live_logits(logits[part], hidden, weight, rows, start).shape == (
                stop - start,
                40,
            )
            live_grad_hidden(grad_hidden, dlogits[part], weight, rows, start)
            live_add_grad_weight(
                grad_weight,
                dlogits[part],
                hidden,
                rows,
                start,
                torch.ones(stop - start, device=device),
            )
        results.append((logits, grad_hidden, grad_weight))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)
    torch.testing.assert_close(results[0][0], hidden.float() @ weight.float().t())
    torch.testing.assert_close(results[0][1], dlogits.float() @ weight.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_rows(dtype, device) -> None:
    check_all_rows(dtype, device)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_rows_triton(dtype, device) -> None:
    check_all_rows(dtype, device)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "vocab"), [(32, 80), (45, 70)])
def test_a_row_is_the_same_bits_alone_and_among_others(width, vocab, dtype, device) -> None:
    """Batch invariance: M = 1 and M = 200, first, last and gathered from elsewhere."""
    hidden, weight, _, live, _ = make_inputs(200, width, vocab, dtype, device)
    logits = live_logits(torch.empty(200, vocab, device=device), hidden, weight, None, 0)
    for row in (0, 1, 63, 64, 127, 131, 199):
        alone = live_logits(
            torch.empty(1, vocab, device=device),
            hidden[row : row + 1].contiguous(),
            weight,
            None,
            0,
        )
        assert torch.equal(alone[0], logits[row]), row
    turned = live_logits(
        torch.empty(200, vocab, device=device), hidden.roll(77, 0), weight, None, 0
    )
    assert torch.equal(turned.roll(-77, 0), logits)
    rows = live_rows(live)
    count = int(rows.count)
    chosen = live_logits(torch.empty(200, vocab, device=device), hidden, weight, rows, 0)
    assert torch.equal(chosen[:count], logits[live])
    late = live_logits(torch.empty(9, vocab, device=device), hidden, weight, rows, 13)
    assert torch.equal(late, logits[live][13:22])


def check_places(num_rows, width, vocab, dtype, device) -> None:
    """dlogits and row_scale in any order, told by a list: the same bits as in the list's order."""
    hidden, weight, dlogits, live, scale = make_inputs(num_rows, width, vocab, dtype, device)
    rows, index = live_rows(live), live.nonzero().squeeze(1)
    hidden[~live] = float("nan")
    places = torch.randperm(num_rows, device=device).int()
    shuffled, shuffled_scale = (torch.full_like(x, float("nan")) for x in (dlogits, scale))
    shuffled[places[: len(index)].long()] = dlogits[index]
    shuffled_scale[places[: len(index)].long()] = scale[index]
    results = []
    for given in (None, places):
        grad_hidden = torch.full((num_rows, width), SENTINEL, dtype=dtype, device=device)
        grad_weight = torch.ones(vocab, width, device=device)
        for start in (0, 20):
            moved = (dlogits[index][start:], scale[index][start:])
            if given is not None:
                moved = (shuffled, shuffled_scale)
            live_grad_hidden(grad_hidden, moved[0], weight, rows, start, moved[1], places=given)
            live_add_grad_weight(grad_weight, moved[0], hidden, rows, start, moved[1], places=given)
        results.append((grad_hidden, grad_weight))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)
    assert (results[0][0][~live] == SENTINEL).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_places(dtype, device) -> None:
    check_places(70, 48, 130, dtype, device)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "width", "vocab"), [(70, 33, 66), (150, 48, 80)])
def test_places_triton(num_rows, width, vocab, dtype, device) -> None:
    check_places(num_rows, width, vocab, dtype, device)


def check_repeats(device) -> None:
    hidden, weight, dlogits, live, scale = make_inputs(150, 32, 70, torch.float16, device)
    rows = live_rows(live)

    def run():
        grad_hidden = torch.zeros(150, 32, device=device)
        grad_weight = torch.zeros(70, 32, device=device)
        live_grad_hidden(grad_hidden, dlogits, weight, rows, 0, scale)
        live_add_grad_weight(grad_weight, dlogits, hidden, rows, 0, scale)
        return grad_hidden, grad_weight

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_repeats(device) -> None:
    check_repeats(device)


@pytest.mark.triton
def test_repeats_triton(device) -> None:
    check_repeats(device)


@pytest.mark.triton
def test_strided_rows_triton(device) -> None:
    """Rows may lie apart, as in a slice of a wider buffer, at any alignment."""
    hidden, weight, dlogits, live, _ = make_inputs(30, 32, 48, torch.float32, device)
    rows = live_rows(live)
    count = int(rows.count)
    wide = torch.full((30, 80), SENTINEL, device=device)
    live_logits(wide[:, 1:49], hidden, weight, rows, 0)
    expected = live_logits(torch.empty(30, 48, device=device), hidden, weight, rows, 0)
    torch.testing.assert_close(wide[:count, 1:49], expected[:count])
    assert (wide[:, :1] == SENTINEL).all() and (wide[:, 49:] == SENTINEL).all()
    apart = torch.full((30, 51), float("nan"), device=device)
    apart[:, 3:] = dlogits
    got, dense = (torch.zeros(30, 32, device=device) for _ in range(2))
    live_grad_hidden(got, apart[:, 3:], weight, rows, 0)
    live_grad_hidden(dense, dlogits, weight, rows, 0)
    torch.testing.assert_close(got, dense)


@pytest.mark.gpu
def test_tf32_where_torch_allows_it(monkeypatch) -> None:
    hidden, weight, _, _, _ = make_inputs(64, 256, 300, torch.float32, "cuda")
    truth = hidden.double() @ weight.double().t()
    errors = {}
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
        out = live_logits(torch.empty(64, 300, device="cuda"), hidden, weight, None, 0)
        errors[allowed] = (out - truth).abs().max().item()
    assert errors[False] < 1e-5 < errors[True] < 1e-2


@pytest.mark.gpu
def test_no_host_sync() -> None:
    hidden, weight, dlogits, live, scale = make_inputs(300, 64, 1009, torch.bfloat16, "cuda")
    outputs = [torch.zeros(300, 1009, device="cuda"), torch.zeros_like(hidden)]
    outputs.append(torch.zeros(1009, 64, device="cuda"))

    def run():
        rows = live_rows(live)
        live_logits(outputs[0], hidden, weight, rows, 0)
        live_grad_hidden(outputs[1], dlogits, weight, rows, 0, scale)
        live_add_grad_weight(outputs[2], dlogits, hidden, rows, 0, scale)

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


BAD = {
    "out": (lambda x: x | {"out": x["out"][:, :3]}, r"out must have shape \[any, 12\]"),
    "dtype": (lambda x: x | {"out": x["out"].half()}, "out must be one of float32, got"),
    "weight": (lambda x: x | {"weight": x["weight"].half()}, "weight must be one of float32"),
    "width": (lambda x: x | {"hidden": x["hidden"][:, :5]}, r"hidden must have shape \[any, 8\]"),
    "stride": (
        lambda x: x | {"weight": x["weight"].t().contiguous().t()},
        "weight must be contiguous in its last axis",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name) -> None:
    change, message = BAD[name]
    hidden, weight, _, _, _ = make_inputs(4, 8, 12, torch.float32, "cpu")
    inputs = change({"out": torch.zeros(4, 12), "hidden": hidden, "weight": weight})
    with pytest.raises(ValueError, match=message):
        live_logits(**inputs, rows=None, start=0)


def test_bad_rows_and_scale() -> None:
    with pytest.raises(ValueError, match=r"live must be \[N\] bool, got \[3\] torch.int64"):
        live_rows(torch.ones(3, dtype=torch.long))
    hidden, weight, dlogits, live, _ = make_inputs(4, 8, 12, torch.float32, "cpu")
    out, total, rows = torch.zeros(4, 8), torch.zeros(12, 8), live_rows(live)
    assert isinstance(rows, LiveRows)
    for scale in (torch.ones(3), torch.ones(4).double(), torch.ones(8)[::2]):
        with pytest.raises(ValueError, match="row_scale must be"):
            live_grad_hidden(out, dlogits, weight, rows, 0, scale)
        with pytest.raises(ValueError, match="row_scale must be"):
            live_add_grad_weight(total, dlogits, hidden, rows, 0, scale)
    with pytest.raises(ValueError, match=r"total must have shape \[any, 8\]"):
        live_add_grad_weight(total[:, :4], dlogits, hidden, rows, 0)
