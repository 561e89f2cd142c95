"""linear_grpo_loss reads the logits once, by the log-probability it is given: it must not show."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from linear_grpo_cases import (
    TOKEN_LEVEL,
    TRITON_DTYPES,
    VARIANTS,
    eager_linear_grpo,
    make_batch,
    run,
)

from grpo_engine.kernels import linear_grpo_loss, linear_grpo_loss_ref, linear_logprobs
from grpo_engine.kernels.common import use_triton
from grpo_engine.kernels.exp_rows import EXP_RANGE
from grpo_engine.kernels.testing import assert_accurate

CHUNKS = importlib.import_module("grpo_engine.kernels.linear_grpo_chunks")
HEAD = importlib.import_module("grpo_engine.kernels.head_chunks")
PASS = importlib.import_module("grpo_engine.kernels.head_pass")
ONE_READ = [name for name in TOKEN_LEVEL if name != "entropy"]
# Nats that an old log-probability is off by, row after row.
OFF = (0.0, 0.05, 1.0, -5.0, 100.0, -100.0, -math.inf)
HEADS = {
    "plain": {},
    "all": {"temperature": "row", "bias": True, "logit_softcap": 20.0, "logit_scale": 0.8},
}


def with_wrong_priors(positional, fields):
    off = torch.tensor(OFF, device=positional[3].device).repeat(1000)[: len(positional[3])]
    old = torch.where(off == -math.inf, -math.inf, positional[3] + off)
    return [*positional[:3], old, positional[4]], fields


def head_options(name: str, num_rows: int, vocab: int, device) -> dict:
    options = dict(HEADS[name])
    if options.get("temperature") == "row":
        options["temperature"] = torch.linspace(0.7, 1.4, num_rows, device=device)
    if "bias" in options:
        options["bias"] = torch.linspace(-1, 1, vocab, device=device)
    return options


@pytest.fixture
def redone(monkeypatch) -> list[int]:
    """How many rows of each chunk the guard redid; empty where no chunk was read by a prior."""
    counts: list[int] = []

    def counted(*arguments, **keywords):
        rows = exp_rows(*arguments, **keywords)
        counts.append(int(rows.safe.sum()))
        return rows

    exp_rows = CHUNKS.exp_rows
    monkeypatch.setattr(CHUNKS, "exp_rows", counted)
    return counts


def check_against_truth(positional, fields, dtype, **options) -> torch.Tensor:
    """Loss, log-probabilities, metrics and gradients against fp64, beside torch at dtype; the true
    log-probabilities."""
    frozen = {name: options.pop(name) for name in ("bias",) if name in options}

    def call(op):
        return lambda *args, bias=None, **keywords: op(*args, **keywords, **frozen)

    ours = run(call(linear_grpo_loss), positional, fields, **options)
    wide = {n: t.double() for n, t in frozen.items()}
    truth = run(
        lambda *args, bias=None, **keywords: linear_grpo_loss_ref(*args, **keywords, **wide),
        positional,
        fields,
        dtype=torch.float64,
        **options,
    )
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1].double(), truth[1], rtol=0, atol=1e-5)
    for name, value in ours[2].items():
        assert value == pytest.approx(truth[2][name], rel=2e-5, abs=1e-5), name
    floor = 1e-5 if dtype == torch.float32 else 1e-6
    for name, mine, true in zip(("hidden", "weight"), ours[3], truth[3], strict=True):
        if options or frozen:  # no plain torch that has them
            limit = 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
            assert (mine.double() - true).norm() <= limit * true.norm(), name
        else:
            plain = run(eager_linear_grpo, positional, fields)[3][name == "weight"]
            assert_accurate(name, mine, plain, true, dtype=dtype, floor=floor)
    return truth[1]


def check_wrong_old_logprobs(variant, head, dtype, device, redone, shape=(70, 301, 24)) -> None:
    positional, fields = with_wrong_priors(*make_batch(*shape, device, dtype))
    options = {**VARIANTS[variant], **head_options(head, *shape[:2], device)}
    logprobs = check_against_truth(positional, fields, dtype, **options)
    limit = EXP_RANGE[dtype if use_triton(positional[0]) else torch.float32][0]
    beyond = ~((positional[3] - logprobs).abs() < limit) & fields["loss_mask"]
    assert 0 < sum(redone) == int(beyond.sum()) < int(fields["loss_mask"].sum())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("variant", ONE_READ)
def test_wrong_old_logprobs(variant, head, redone) -> None:
    device = torch.device("cpu")
    check_wrong_old_logprobs(variant, head, torch.float32, device, redone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wrong_old_logprobs_at_half(dtype, redone) -> None:
    check_wrong_old_logprobs("grpo", "plain", dtype, torch.device("cpu"), redone)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("variant", ["grpo", "cispo", "luspo"])
def test_wrong_old_logprobs_triton(variant, dtype, device, redone) -> None:
    check_wrong_old_logprobs(variant, "all", dtype, device, redone, shape=(15, 133, 16))


def check_sampler_as_prior(dtype, device, redone, shape) -> None:
    """Without old log-probabilities the sampler's are the prior; NaN where it gave none."""
    positional, fields = make_batch(*shape, device, dtype)
    positional[3] = None
    fields["sampler_logprobs"][::6] = math.nan
    check_against_truth(positional, fields, dtype, is_correction="token_truncate")
    assert sum(redone) == int((fields["sampler_logprobs"].isnan() & fields["loss_mask"]).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampler_as_prior(dtype, redone) -> None:
    check_sampler_as_prior(dtype, torch.device("cpu"), redone, (70, 301, 24))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_sampler_as_prior_triton(dtype, device, redone) -> None:
    check_sampler_as_prior(dtype, device, redone, (15, 133, 16))


def test_an_old_logprob_that_is_nan_spoils_nothing_else(redone) -> None:
    """The loss is NaN, as it must be; log-probabilities and the other rows' gradients are not."""
    positional, fields = make_batch(40, 101, 16, torch.device("cpu"))
    clean = run(linear_grpo_loss, positional, fields)
    positional[3][8] = math.nan
    loss, logprobs, _, (grad_hidden, _) = run(linear_grpo_loss, positional, fields)
    assert loss.isnan() and redone == [0, 1]
    torch.testing.assert_close(logprobs, clean[1], rtol=0, atol=2e-6)
    rest = torch.arange(40) != 8
    torch.testing.assert_close(grad_hidden[rest], clean[3][0][rest])


def test_when_the_logits_are_read_once(redone) -> None:
    """With a prior and a gradient that one factor a row can make; never otherwise."""
    positional, fields = make_batch(40, 101, 16, torch.device("cpu"))

    def reads(positional=positional, fields=fields, **options) -> int:
        redone.clear()
        run(linear_grpo_loss, positional, fields, **options)
        return len(redone)

    no_old = [*positional[:3], None, positional[4]]
    no_prior = {name: field for name, field in fields.items() if name != "sampler_logprobs"}
    assert reads() == 1 and reads(positional=no_old) == 1
    assert reads(positional=no_old, fields=no_prior) == 0
    assert reads(entropy_coef=0.1) == 0 and reads(batch_invariant=True) == 0
    assert reads(bias=torch.zeros(101)) == 0
    redone.clear()
    linear_grpo_loss(*positional, **fields)
    assert not redone


def check_batch_invariant(device, num_tokens: int, vocab: int, monkeypatch) -> None:
    """Old log-probabilities in one packing, the loss in others: the ratio is 1 to the bit."""
    positional, fields = make_batch(num_tokens, vocab, 16, device)
    hidden, weight, token_ids, _, advantages = positional
    old = linear_logprobs(hidden, weight, token_ids, batch_invariant=True)
    order = torch.randperm(num_tokens).to(device)
    for rows in (order, order[: num_tokens // 3], order[:1]):
        cut = [hidden[rows], weight, token_ids[rows], old[rows], advantages[rows]]
        loss, logprobs, metrics, grads = run(linear_grpo_loss, cut, {}, batch_invariant=True)
        assert torch.equal(logprobs, old[rows]) and metrics["ratio_mean"] == 1.0
        expected = run(linear_grpo_loss, cut, {})
        torch.testing.assert_close(loss, expected[0])
        for mine, other in zip(grads, expected[3], strict=True):
            assert (mine - other).norm() <= 1e-5 * other.norm()
    monkeypatch.setattr(HEAD, "CPU_CHUNK_ROWS", (16, 16))
    assert torch.equal(run(linear_grpo_loss, cut, {}, batch_invariant=True)[1], old[rows])


def test_batch_invariant(monkeypatch) -> None:
    check_batch_invariant(torch.device("cpu"), 193, 301, monkeypatch)


@pytest.mark.triton
def test_batch_invariant_triton(device, monkeypatch) -> None:
    check_batch_invariant(device, 19, 67, monkeypatch)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_batch_invariant_in_two_phases(batch_invariant) -> None:
    positional, fields = make_batch(96, 301, 16, torch.device("cpu"))
    options = {"loss_type": "gspo", "batch_invariant": batch_invariant}
    old = linear_logprobs(*positional[:3], batch_invariant=True)
    _, logprobs, _, _ = run(linear_grpo_loss, [*positional[:3], old, positional[4]], {}, **options)
    assert torch.equal(logprobs, old) or not batch_invariant


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("variant", ["grpo", "entropy", "gspo"])
def test_compact_rows_triton(variant, dtype, device) -> None:
    """Rows left out of the GEMMs: the same result, whatever they hold."""
    positional, fields = make_batch(23, 57, 16, device, dtype)
    whole = run(linear_grpo_loss, positional, fields, compact_rows=False, **VARIANTS[variant])
    positional[0][~fields["loss_mask"]] = math.nan
    positional[3][~fields["loss_mask"]] = math.nan
    ours = run(linear_grpo_loss, positional, fields, compact_rows=True, **VARIANTS[variant])
    torch.testing.assert_close(ours[0], whole[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours[1], whole[1], rtol=0, atol=4e-6)
    assert ours[2] == pytest.approx(whole[2], rel=1e-5, abs=1e-6)
    limit = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for mine, other in zip(ours[3], whole[3], strict=True):
        assert (mine - other).float().norm() <= limit * other.float().norm()


@pytest.mark.triton
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_rows_without_a_gradient_take_part_in_the_first_gemm_alone(
    dtype, masked, device, monkeypatch
) -> None:
    positional, fields = make_batch(23, 57, 16, device, dtype)
    positional[4][::3] = 0.0
    mask = fields["loss_mask"]
    if not masked:
        mask = torch.ones_like(fields.pop("loss_mask"))
    options = {"epsilon": 10.0}  # nothing is clipped
    whole = run(linear_grpo_loss, positional, fields, compact_rows=False, **options)
    counts = []
    for module in (PASS, HEAD):
        for name in ("live_logits", "live_grad_hidden", "live_add_grad_weight"):
            call = getattr(module, name, None)

            def counted(*arguments, call=call, name=name, **keywords):
                live = next(a for a in arguments if isinstance(a, PASS.LiveRows))
                counts.append((name, int(live.count)))
                return call(*arguments, **keywords)

            if call is not None:
                monkeypatch.setattr(module, name, counted)
    ours = run(linear_grpo_loss, positional, fields, compact_rows=True, **options)
    live = int((mask & (positional[4] != 0)).sum())
    assert 0 < live < int(mask.sum())
    assert set(counts) == {
        ("live_logits", int(mask.sum())),
        ("live_grad_hidden", live),
        ("live_add_grad_weight", live),
    }
    torch.testing.assert_close(ours[0], whole[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours[1], whole[1], rtol=0, atol=4e-6)
    assert (ours[3][0][positional[4] == 0] == 0).all()
    limit = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for mine, other in zip(ours[3], whole[3], strict=True):
        assert (mine - other).float().norm() <= limit * other.float().norm()


@pytest.mark.triton
def test_strided_fields_triton(device) -> None:
    positional, fields = make_batch(15, 133, 16, device)
    expected = run(linear_grpo_loss, positional, fields)
    hidden, weight, token_ids, old, advantages = positional
    strided = torch.stack([old, old + 1.0], 1)[:, 0]
    wide = torch.cat([hidden, hidden], 1)[:, :16]
    got = run(linear_grpo_loss, [wide, weight, token_ids, strided, advantages], fields)
    assert not strided.is_contiguous() and not wide.is_contiguous()
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def check_twice_the_same_bits(device, dtype, shape) -> None:
    positional, fields = with_wrong_priors(*make_batch(*shape, device, dtype))
    first, again = (run(linear_grpo_loss, positional, fields) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert first[2] == again[2]
    assert all(torch.equal(a, b) for a, b in zip(first[3], again[3], strict=True))


def test_twice_the_same_bits() -> None:
    check_twice_the_same_bits(torch.device("cpu"), torch.float32, (193, 1009, 32))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_twice_the_same_bits_triton(dtype, device) -> None:
    check_twice_the_same_bits(device, dtype, (13, 133, 16))


@pytest.mark.parametrize("chunk", [(7, 7), (16, 16)])
def test_chunks_change_nothing_whatever_the_prior(chunk, monkeypatch) -> None:
    positional, fields = with_wrong_priors(*make_batch(193, 301, 24, torch.device("cpu")))
    whole = run(linear_grpo_loss, positional, fields)
    monkeypatch.setattr(HEAD, "CPU_CHUNK_ROWS", chunk)
    chunked = run(linear_grpo_loss, positional, fields)
    torch.testing.assert_close(chunked[0], whole[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(chunked[1], whole[1], rtol=0, atol=2e-6)
    for mine, other in zip(chunked[3], whole[3], strict=True):
        assert (mine - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compact_rows": 1}, "compact_rows must be True, False or None, got 1"),
        ({"batch_invariant": None}, "batch_invariant must be True or False, got None"),
    ],
)
def test_bad_flags(changes, message) -> None:
    positional, fields = make_batch(12, 31, 8, "cpu")
    with pytest.raises(ValueError, match=message):
        linear_grpo_loss(*positional, **fields, **changes)
