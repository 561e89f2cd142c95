"""The certified sparse backward: which entries stay, what the certificate says, the whole op."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from grpo_engine.kernels import linear_grpo_loss, linear_grpo_loss_ref
from grpo_engine.kernels.certified import (
    ROUNDING_SHARE,
    Entries,
    error_bounds,
    num_candidates,
    select_entries,
    select_entries_ref,
)
from grpo_engine.kernels.exp_rows import ExpRows, exp_rows
from grpo_engine.kernels.linear_grpo import _linear_grpo
from grpo_engine.kernels.loss_options import make_loss_options
from grpo_engine.kernels.vocab_rows import LogitOptions

MODULE = importlib.import_module("grpo_engine.kernels.certified")
TRITON_DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not torch.cuda.is_available(), reason="Triton's interpreter has no bfloat16"
        ),
    ),
]


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


# ---- The whole op --------------------------------------------------------------------------------


def make_batch(num_tokens, vocab, width, device, dtype=torch.float32, spread=8.0):
    """A batch with rows sure of themselves and rows that are not; a fifth is masked."""
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(num_tokens, width, generator=generator)
    hidden[::3] *= 0.1  # diffuse
    weight = torch.randn(vocab, width, generator=generator) * spread / width**0.5
    hidden, weight = hidden.to(dtype).to(device), weight.to(dtype).to(device)
    p = torch.softmax(hidden.float() @ weight.float().t() / 0.8, 1).cpu()
    token_ids = torch.multinomial(p, 1, generator=generator)[:, 0].to(device)
    old = torch.log(p.gather(1, token_ids.cpu()[:, None])[:, 0]).to(device)
    old = old + 0.1 * torch.randn(num_tokens, generator=generator).to(device)
    positional = [hidden, weight, token_ids, old]
    positional.append(torch.randn(num_tokens, generator=generator).to(device))
    mask = torch.arange(num_tokens, device=device) % 5 != 2
    return positional, {"loss_mask": mask, "temperature": 0.8}


def run(op, positional, **options):
    hidden, weight = (tensor.detach().clone().requires_grad_() for tensor in positional[:2])
    loss, metrics, logprobs = op(hidden, weight, *positional[2:], **options)
    loss.backward()
    return loss.detach(), logprobs, metrics, (hidden.grad, weight.grad)


def relative(ours, exact) -> float:
    return ((ours - exact).double().norm() / exact.double().norm()).item()


def check_whole(dtype, device, num_tokens=60, vocab=1009, max_entries=128, **options) -> None:
    """Loss and log-probabilities are those of the exact op; the gradients are within the error
    that the dropped mass allows, and nearer for a hundredth of the delta."""
    positional, fields = make_batch(num_tokens, vocab, 32, device, dtype)
    fields |= options
    exact = run(linear_grpo_loss, positional, **fields)
    errors = {}
    for delta in (1e-1, 1e-3):
        fields |= {"sparse_delta": delta, "sparse_max_entries": max_entries}
        ours = run(linear_grpo_loss, positional, **fields)
        assert torch.equal(ours[0], exact[0]) and torch.equal(ours[1], exact[1])
        values = ours[2].to_dict()
        assert 0 < values.pop("dropped_mass") <= delta
        assert 0.3 < values.pop("sparse_rows") < 1
        assert values == exact[2].to_dict()
        errors[delta] = [relative(a, b) for a, b in zip(ours[3], exact[3], strict=True)]
        masked = ours[3][0][~fields["loss_mask"]]
        assert (masked == 0).all()
    rounding = torch.finfo(dtype).eps + 1e-5
    for coarse, fine in zip(errors[1e-1], errors[1e-3], strict=True):
        assert 1e-4 < coarse < 0.2
        assert fine < 2e-3 + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole(dtype) -> None:
    check_whole(dtype, "cpu")


def test_whole_without_a_prior() -> None:
    """No old log-probabilities: E comes out of the fold."""
    positional, fields = make_batch(60, 1009, 32, "cpu")
    positional[3] = None
    exact = run(linear_grpo_loss, positional, **fields)
    ours = run(linear_grpo_loss, positional, **fields, sparse_delta=1e-4)
    assert torch.equal(ours[0], exact[0]) and torch.equal(ours[1], exact[1])
    for mine, expected in zip(ours[3], exact[3], strict=True):
        assert 0 < relative(mine, expected) < 1e-3


def test_whole_batch_invariant() -> None:
    positional, fields = make_batch(60, 1009, 32, "cpu")
    exact = run(linear_grpo_loss, positional, **fields, batch_invariant=True)
    ours = run(linear_grpo_loss, positional, **fields, batch_invariant=True, sparse_delta=1e-4)
    assert torch.equal(ours[1], exact[1])
    for mine, expected in zip(ours[3], exact[3], strict=True):
        assert 0 < relative(mine, expected) < 1e-3


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_whole_triton(dtype, device) -> None:
    check_whole(dtype, device, num_tokens=25, vocab=301, max_entries=16)


@pytest.mark.triton
def test_whole_compacted_triton(device) -> None:
    check_whole(torch.float16, device, 25, 301, 16, compact_rows=True)


def check_options_of_the_head(device) -> None:
    """Against the fp64 specification, with everything that changes the logits."""
    positional, fields = make_batch(40, 301, 24, device)
    head = {
        "temperature": torch.linspace(0.6, 1.2, 40, device=device),
        "bias": torch.randn(301, generator=torch.Generator().manual_seed(0)).to(device),
        "logit_softcap": 30.0,
        "logit_scale": 0.9,
        "loss_mask": fields["loss_mask"],
    }
    wide = [t.double() if t.is_floating_point() else t for t in positional]
    head_wide = {n: t.double() if n in ("temperature", "bias") else t for n, t in head.items()}
    wide[3], wide[4] = positional[3], positional[4]
    truth = run(linear_grpo_loss_ref, wide, **head_wide)
    ours = run(linear_grpo_loss, positional, **head, sparse_delta=1e-5, sparse_max_entries=128)
    assert ours[2].to_dict()["sparse_rows"] > 0.3
    for mine, true in zip(ours[3], truth[3], strict=True):
        assert relative(mine, true) < 5e-5


def test_options_of_the_head() -> None:
    check_options_of_the_head("cpu")


@pytest.mark.triton
def test_options_of_the_head_triton(device) -> None:
    check_options_of_the_head(device)


def check_only_dense_rows(device) -> None:
    """A policy that is sure of nothing gets the exact gradient."""
    positional, fields = make_batch(40, 1009, 24, device, spread=0.5)
    exact = run(linear_grpo_loss, positional, **fields)
    ours = run(linear_grpo_loss, positional, **fields, sparse_delta=1e-3, sparse_max_entries=16)
    values = ours[2].to_dict()
    assert values["sparse_rows"] == values["dropped_mass"] == 0
    for mine, expected in zip(ours[3], exact[3], strict=True):
        assert relative(mine, expected) < 1e-6


def test_only_dense_rows() -> None:
    check_only_dense_rows("cpu")


@pytest.mark.triton
def test_only_dense_rows_triton(device) -> None:
    check_only_dense_rows(device)


def check_masked_rows_and_repeats(device, **options) -> None:
    """Masked rows may hold anything, and two runs agree bit for bit."""
    positional, fields = make_batch(24, 301, 24, device)
    keywords = {**fields, "sparse_delta": 1e-2, "sparse_max_entries": 16, **options}
    clean = run(linear_grpo_loss, positional, **keywords)
    masked = ~fields["loss_mask"]
    dirty = [tensor.clone() for tensor in positional]
    dirty[0][masked], dirty[3][masked], dirty[4][masked] = math.nan, math.nan, math.nan
    again = run(linear_grpo_loss, dirty, **keywords)
    for ours, expected in zip((*again[:2], *again[3]), (*clean[:2], *clean[3]), strict=True):
        assert torch.equal(ours, expected)
    assert again[2].to_dict() == clean[2].to_dict()


def test_masked_rows_and_repeats() -> None:
    check_masked_rows_and_repeats("cpu")


@pytest.mark.triton
@pytest.mark.parametrize("compact", [False, True])
def test_masked_rows_and_repeats_triton(compact, device) -> None:
    check_masked_rows_and_repeats(device, compact_rows=compact)


def test_frozen_head_and_frozen_hidden() -> None:
    positional, fields = make_batch(60, 301, 24, "cpu")
    both = run(linear_grpo_loss, positional, **fields, sparse_delta=1e-2)[3]
    for trained in (0, 1):
        leaves = [tensor.detach().clone() for tensor in positional[:2]]
        leaves[trained].requires_grad_()
        loss = linear_grpo_loss(*leaves, *positional[2:], **fields, sparse_delta=1e-2)[0]
        loss.backward()
        assert torch.equal(leaves[trained].grad, both[trained])


def test_without_grad_nothing_is_dropped() -> None:
    positional, fields = make_batch(30, 301, 24, "cpu")
    with torch.no_grad():
        metrics = linear_grpo_loss(*positional, **fields, sparse_delta=1e-2)[1].to_dict()
    assert metrics["dropped_mass"] == metrics["sparse_rows"] == 0


def test_micro_batches_add_up() -> None:
    positional, fields = make_batch(60, 301, 24, "cpu")
    keywords = {"sparse_delta": 1e-2, "loss_type": "dapo", "denominator": 60.0, "temperature": 0.8}
    whole = run(linear_grpo_loss, positional, **keywords)
    grad, metrics = 0.0, None
    for part in (slice(0, 25), slice(25, 60)):
        hidden, weight, *rest = positional
        cut = [hidden[part], weight, *(field[part] for field in rest)]
        _, _, more, grads = run(linear_grpo_loss, cut, **keywords)
        metrics, grad = more if metrics is None else metrics + more, grad + grads[1]
    assert relative(grad, whole[3][1]) < 1e-6
    assert metrics.to_dict() == pytest.approx(whole[2].to_dict(), rel=1e-5)
    assert metrics["sparse_rows"].item() == pytest.approx(whole[2]["sparse_rows"].item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparse_delta": 0}, r"sparse_delta must be a number in \(0, 1\) or None, got 0"),
        ({"sparse_delta": 1.0}, r"sparse_delta must be .* got 1.0"),
        ({"sparse_delta": math.nan}, "sparse_delta must be .* got nan"),
        ({"sparse_delta": True}, "sparse_delta must be .* got True"),
        ({"sparse_max_entries": 0}, r"sparse_max_entries must be an int in \[1, 128\], got 0"),
        ({"sparse_max_entries": 129}, "sparse_max_entries must be .* got 129"),
        ({"entropy_coef": 0.1}, "sparse_delta=0.01 does not go with entropy_coef=0.1"),
        ({"loss_type": "gspo"}, "does not go with a sequence-level importance_level"),
        ({"bias": torch.zeros(31, requires_grad=True)}, "does not go with a bias that requires"),
        ({"kept": torch.zeros(12, 2, dtype=torch.int32)}, "does not go with kept"),
    ],
)
def test_bad_input(options, message) -> None:
    positional, _ = make_batch(12, 31, 8, "cpu")
    with pytest.raises(ValueError, match=message):
        linear_grpo_loss(*positional, **{"sparse_delta": 0.01, **options})


def test_a_frozen_bias_is_welcome() -> None:
    positional, fields = make_batch(30, 301, 24, "cpu")
    bias = torch.zeros(301)
    with_bias = run(linear_grpo_loss, positional, **fields, bias=bias, sparse_delta=1e-2)
    without = run(linear_grpo_loss, positional, **fields, sparse_delta=1e-2)
    for ours, expected in zip(with_bias[3], without[3], strict=True):
        assert torch.equal(ours, expected)


def test_opcheck() -> None:
    (hidden, weight, token_ids, old, advantages), fields = make_batch(12, 31, 8, "cpu")
    arguments = (
        hidden.requires_grad_(),
        weight.requires_grad_(),
        None,
        token_ids,
        None,
        fields["loss_mask"],
        old,
        advantages,
        torch.full((12,), 0.1),
        None,
        None,
        0.8,
        None,
        1.0,
        False,
        False,
        False,
        *make_loss_options().op_arguments(),
        [True, True, False],
        None,
        0.05,
        16,
    )
    torch.library.opcheck(_linear_grpo, arguments)


def test_compiles_whole_and_once() -> None:
    def loss(hidden, weight, *rest, **fields):
        return linear_grpo_loss(hidden * 1.5, weight, *rest, **fields, sparse_delta=0.05)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_tokens in (9, 16, 31):
            positional, fields = make_batch(num_tokens, 101, 8, "cpu")
            hidden, weight, *rest = positional
            for tensor in (*rest, fields["loss_mask"]):
                torch._dynamo.mark_dynamic(tensor, 0)
            mine = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
            eager = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
            torch._dynamo.mark_dynamic(mine[0], 0)
            compiled(*mine, *rest, **fields).backward()
            loss(*eager, *rest, **fields).backward()
            for ours, expected in zip(mine, eager, strict=True):
                torch.testing.assert_close(ours.grad, expected.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("compact", [False, True])
def test_no_host_sync(compact) -> None:
    positional, fields = make_batch(300, 1009, 64, "cuda", torch.bfloat16)
    for leaf in positional[:2]:
        leaf.requires_grad_()
    keywords = {**fields, "sparse_delta": 1e-2, "compact_rows": compact}
    linear_grpo_loss(*positional, **keywords)[0].backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_grpo_loss(*positional, **keywords)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
