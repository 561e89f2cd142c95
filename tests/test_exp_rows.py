"""exp_rows: log-probabilities and exponentials of a chunk of rows, whatever the prior says."""

from __future__ import annotations

import math

import pytest
import torch

from grpo_engine.kernels import linear_grpo_loss, linear_logprobs
from grpo_engine.kernels.common import use_triton
from grpo_engine.kernels.exp_rows import AGREE, EXP_RANGE, exp_chunk_backward, exp_rows
from grpo_engine.kernels.head_chunks import HeadGrads, Workspace, head_chunk_backward
from grpo_engine.kernels.testing import assert_accurate
from grpo_engine.kernels.vocab_rows import LogitOptions, RowGrads, fold_rows

NAN, INF = math.nan, math.inf
# What the prior is off by, in nats; the last three are not numbers that a log-probability can be.
WRONG = {
    "exact": 0.0,
    "old": 0.05,
    "stale": -1.0,
    "far": 5.0,
    "far below": -5.0,
    "absurd": 100.0,
    "absurd below": -100.0,
    "nan": NAN,
    "-inf": -INF,
    "inf": INF,
}
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
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "all": {"row_temperature": 0.6, "bias": True, "logit_scale": 0.5, "logit_softcap": 15.0},
}


def make_logits(num_rows: int, vocab: int, device, spread: float = 4.0):
    logits = torch.randn(num_rows, vocab) * spread
    token_ids = torch.softmax(logits, 1).multinomial(1).squeeze(1)
    token_ids[0], token_ids[-1] = 0, vocab - 1
    return logits.to(device), token_ids.to(device)


def make_options(name: str, num_rows: int, vocab: int, device) -> LogitOptions:
    given = dict(OPTIONS[name])
    if "row_temperature" in given:
        given["row_temperature"] = torch.linspace(0.6, 1.6, num_rows, device=device)
    if "bias" in given:
        given["bias"] = torch.linspace(-1, 1, vocab, device=device)
    return LogitOptions(**given)


def truth(logits, token_ids, options: LogitOptions):
    """fp64: (logprobs, entropy, d logprob / d logits [N, V])."""
    raw = logits.double().requires_grad_()
    z = raw if options.bias is None else raw + options.bias.double()
    z = z * options.logit_scale
    if options.logit_softcap is not None:
        z = options.logit_softcap * torch.tanh(z / options.logit_softcap)
    row_temperature = options.row_temperature
    z = z / (options.temperature if row_temperature is None else row_temperature.double()[:, None])
    log_p = torch.log_softmax(z, 1)
    logprobs = log_p.gather(1, token_ids[:, None]).squeeze(1)
    (grad,) = torch.autograd.grad(logprobs.sum(), raw)
    p = log_p.exp()
    return logprobs.detach(), -torch.where(p > 0, p * log_p, 0.0).sum(1).detach(), grad


def run(logits, token_ids, options, prior, dtype, want_entropy=True, row_mask=None, **keywords):
    out = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    return exp_rows(
        out, logits.clone(), token_ids, options, prior, want_entropy, row_mask, **keywords
    )


def check(logits, token_ids, options, prior, dtype) -> torch.Tensor:
    """Everything that exp_rows gives, against fp64; the rows redone."""
    logprobs, entropy, grad = truth(logits, token_ids, options)
    rows = run(logits, token_ids, options, prior, dtype)
    torch.testing.assert_close(rows.logprobs.double(), logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(rows.entropy.double(), entropy, rtol=0, atol=1e-4)
    grads = torch.linspace(-1, 1, len(logits), device=logits.device)
    ours = rows.exps.double() * rows.row_scale(grads).double()[:, None]
    expected = grads.double()[:, None] * grad
    rounding = torch.finfo(dtype).eps / 2 + 2e-6
    for row, true in zip(ours, expected, strict=True):
        assert (row - true).norm() <= rounding * true.norm()
    at_token = (rows.at_token * rows.row_scale(grads)).double()
    true = expected.gather(1, token_ids[:, None]).squeeze(1)
    precise = 1e-5 if prior is not None else rounding
    torch.testing.assert_close(at_token, true, rtol=precise, atol=0)
    return rows.safe


def check_any_prior(wrong: str, options: str, dtype: torch.dtype, device) -> None:
    logits, token_ids = make_logits(7, 301, device)
    chosen = make_options(options, 7, 301, device)
    prior = (truth(logits, token_ids, chosen)[0] + WRONG[wrong]).float()
    safe = check(logits, token_ids, chosen, prior, dtype)
    beyond = not abs(WRONG[wrong]) <= EXP_RANGE[dtype][0]
    assert (safe == beyond).all()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("wrong", WRONG)
def test_any_prior_gives_the_same_result(wrong: str, options: str) -> None:
    check_any_prior(wrong, options, torch.float32, torch.device("cpu"))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("wrong", WRONG)
def test_any_prior_gives_the_same_result_triton(wrong, options, dtype, device) -> None:
    check_any_prior(wrong, options, dtype, device)


def check_rows_are_redone_one_by_one(dtype: torch.dtype, device) -> None:
    """Good and bad priors side by side: the bad ones are redone, their neighbours are not."""
    logits, token_ids = make_logits(9, 1100, device)
    off = torch.tensor([0.0, NAN, 0.05, 100.0, -1.0, -INF, 0.0, -100.0, 3.0], device=device)
    prior = truth(logits, token_ids, LogitOptions())[0].float() + off
    safe = check(logits, token_ids, LogitOptions(), prior, dtype)
    assert safe.tolist() == [not abs(x) < 4 for x in off.tolist()]


def test_rows_are_redone_one_by_one() -> None:
    check_rows_are_redone_one_by_one(torch.float32, torch.device("cpu"))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_rows_are_redone_one_by_one_triton(dtype, device) -> None:
    check_rows_are_redone_one_by_one(dtype, device)


def check_no_prior(dtype: torch.dtype, device) -> None:
    """Without a prior: the bits of the fold."""
    logits, token_ids = make_logits(5, 301, device)
    for name in OPTIONS:
        options = make_options(name, 5, 301, device)
        assert not check(logits, token_ids, options, None, dtype).any()
        scratch = torch.empty_like(logits)
        fold = fold_rows(logits.clone(), scratch, token_ids, options, want_entropy=True)
        rows = run(logits, token_ids, options, None, dtype)
        assert torch.equal(rows.logprobs, fold.logprobs) and torch.equal(rows.entropy, fold.entropy)


def test_no_prior() -> None:
    check_no_prior(torch.float32, torch.device("cpu"))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_no_prior_triton(dtype, device) -> None:
    check_no_prior(dtype, device)


def check_hard_logits(dtype: torch.dtype, device) -> None:
    """Logits of +-60, all far below 0, one far above the rest, -inf in the row, one column."""
    token_ids = torch.tensor([3, 0, 64, 5], device=device)
    spread = torch.linspace(-60, 60, 65, device=device).repeat(4, 1)
    for logits in (spread, spread - 500, spread * 1e-3):
        for off in (0.0, 0.3, NAN):
            prior = truth(logits, token_ids, LogitOptions())[0].float() + off
            check(logits, token_ids, LogitOptions(), prior, dtype)
    holes = spread.clone()
    holes[:, 60:64] = -INF
    prior = torch.log_softmax(holes, 1).gather(1, token_ids[:, None]).squeeze(1) - 0.1
    rows = run(holes, token_ids, LogitOptions(), prior, dtype)
    expected = torch.log_softmax(holes.double(), 1)
    picked = expected.gather(1, token_ids[:, None]).squeeze(1)
    torch.testing.assert_close(rows.logprobs.double(), picked, rtol=0, atol=1e-5)
    assert (rows.exps[:, 60:64] == 0).all() and torch.isfinite(rows.exps).all()
    assert torch.isfinite(rows.entropy).all()
    one = run(spread[:, :1], token_ids * 0, LogitOptions(), torch.zeros(4, device=device), dtype)
    assert (one.logprobs == 0).all() and (one.exps == 0).all() and (one.entropy == 0).all()


def test_hard_logits() -> None:
    check_hard_logits(torch.float32, torch.device("cpu"))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_hard_logits_triton(dtype, device) -> None:
    check_hard_logits(dtype, device)


def check_sure_policy(dtype: torch.dtype, device) -> None:
    """p_y = 1 - 1e-3 ... 1 - 1e-12: 1 - p_y keeps its digits, which 1 minus p_y would have lost."""
    gaps = torch.tensor([7.0, 14.0, 21.0, 27.0], device=device)
    logits = torch.zeros(4, 33, device=device) - gaps[:, None]
    logits[:, 4] = 0.0
    token_ids = torch.full((4,), 4, device=device)
    rest = 32 * torch.exp(-gaps.double())
    expected = rest / (1 + rest)
    for off in (0.0, -0.05, NAN):
        prior = torch.log1p(-expected).float() + off
        rows = run(logits, token_ids, LogitOptions(), prior, dtype)
        missing, logprobs = (rows.others / rows.total).double(), rows.logprobs.double()
        torch.testing.assert_close(missing, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(logprobs, torch.log1p(-expected), rtol=1e-5, atol=0)


def test_sure_policy() -> None:
    check_sure_policy(torch.float32, torch.device("cpu"))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_sure_policy_triton(dtype, device) -> None:
    check_sure_policy(dtype, device)


@pytest.mark.triton
@pytest.mark.parametrize("off", [-3.9, 0.0, 3.9, 100.0])
def test_fp16_keeps_probabilities_of_1e_5(off: float, device) -> None:
    """A unit of 512, and a guard of 4 nats: nothing overflows, and p = 7e-6 keeps its bits."""
    logits = torch.zeros(2, 2049, device=device)
    logits[:, 7] = 12.0 - math.log(9)  # p = 0.9 for it, 5e-5 for each of the others
    logits[1, 9:] -= 2.0
    token_ids = torch.tensor([3, 7], device=device)
    logprobs, _, grad = truth(logits, token_ids, LogitOptions())
    rows = run(logits, token_ids, LogitOptions(), logprobs.float() + off, torch.float16)
    scale = rows.row_scale(torch.ones(2, device=device)).double()
    ours = rows.exps.double() * scale[:, None]
    torch.testing.assert_close(ours, grad, rtol=2**-11 + 1e-5, atol=0)


def check_agreement(device) -> None:
    """A prior within rounding of the result is the result; one that is further off is not."""
    logits, token_ids = make_logits(64, 997, device)
    options = LogitOptions()
    scratch = torch.empty_like(logits)
    fold = fold_rows(logits.clone(), scratch, token_ids, options, want_entropy=False).logprobs
    again = run(logits, token_ids, options, fold, torch.float32, want_entropy=False).logprobs
    assert torch.equal(again, fold)
    base, slope, most = AGREE
    for sign in (-1, 1):
        prior = fold + sign * 3 * (base + slope * fold.abs()).clamp(max=most)
        other = run(logits, token_ids, options, prior, torch.float32).logprobs
        assert (other != prior).all()
        torch.testing.assert_close(other, fold, rtol=0, atol=most)


def test_agreement() -> None:
    check_agreement(torch.device("cpu"))


@pytest.mark.triton
def test_agreement_triton(device) -> None:
    check_agreement(device)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_rows_outside_the_mask_triton(dtype, device) -> None:
    """Zeros whatever they hold, or left alone with skip_masked; their neighbours stay."""
    logits, token_ids = make_logits(6, 133, device)
    prior = truth(logits, token_ids, LogitOptions())[0].float()
    alone = run(logits, token_ids, LogitOptions(), prior, dtype)
    mask = torch.tensor([True, False, True, False, False, True], device=device)
    logits[~mask], token_ids[~mask], prior[~mask] = NAN, 10**9, NAN
    rows = run(logits, token_ids, LogitOptions(), prior, dtype, row_mask=mask)
    left = run(logits, token_ids, LogitOptions(), prior, dtype, row_mask=mask, skip_masked=True)
    assert (rows.exps[~mask] == 0).all() and left.exps[~mask].isnan().all()
    for made in (rows, left):
        assert torch.equal(made.exps[mask], alone.exps[mask])
        for name in ("logprobs", "entropy", "total", "others", "at_token"):
            field, expected = getattr(made, name), getattr(alone, name)
            assert torch.equal(field[mask], expected[mask])
            assert (field[~mask] == (1 if name == "total" else 0)).all()
        assert (made.row_scale(mask.float())[~mask] == 0).all() and not made.safe.any()


@pytest.mark.triton
def test_token_id_out_of_range_triton(device) -> None:
    logits, token_ids = make_logits(3, 133, device)
    token_ids[1] = 133
    rows = run(
        logits, token_ids, LogitOptions(), torch.full((3,), -2.0, device=device), torch.float32
    )
    assert rows.logprobs.isnan().tolist() == [False, True, False]


def test_not_a_number_in_the_logits_shows() -> None:
    logits, token_ids = make_logits(3, 57, "cpu")
    logits[1, 5] = NAN
    rows = run(logits, token_ids, LogitOptions(), torch.full((3,), -2.0), torch.float32)
    assert rows.logprobs.isnan().tolist() == [False, True, False]
    assert rows.safe.tolist()[1]
    assert rows.row_scale(torch.ones(3)).isnan().tolist() == [False, True, False]
    assert (rows.row_scale(torch.zeros(3)) == 0).all()


# ---- The gradients that continue from it ---------------------------------------------------------


def head_grads(way: str, hidden, weight, token_ids, grads, prior):
    """(d hidden, d weight) of a chunk in fp32, by E or by the gradient of the logits."""
    device, dtype = hidden.device, hidden.dtype
    logits = hidden.float() @ weight.float().T
    work_dtype = dtype if use_triton(hidden) else torch.float32
    out = torch.empty(logits.shape, dtype=work_dtype, device=device)
    into = HeadGrads.make(hidden, weight, (True, True, False), torch.float32)
    options = LogitOptions()
    if way == "E":
        rows = exp_rows(out, logits, token_ids, options, prior, False)
        exp_chunk_backward(slice(0, len(hidden)), rows, grads, hidden, weight, into)
    else:
        work = Workspace(logits, out)
        stats = fold_rows(logits, out, token_ids, options, False)
        index = slice(0, len(hidden))
        head_chunk_backward(
            index, work, hidden, weight, token_ids, options, stats, RowGrads(grads), None, into
        )
    return into.hidden, into.weight


def check_gradients(dtype: torch.dtype, device) -> None:
    """Beside torch's own at dtype; and no worse than by the gradient of the logits but by chance.
    d weight in half by the Triton path is better: the token's entry is not rounded."""
    hidden = torch.randn(200, 24).to(dtype)
    weight = (torch.randn(211, 24) / 2).to(dtype)
    token_ids = torch.softmax(hidden.float() @ weight.float().T, 1).multinomial(1).squeeze(1)
    grads = torch.randn(200) * 1e-3
    grads[::7] = 0.0
    hidden, weight, token_ids, grads = (t.to(device) for t in (hidden, weight, token_ids, grads))

    def plain(high: torch.dtype | None = None):
        leaves = [t.detach().to(high or dtype).requires_grad_() for t in (hidden, weight)]
        logits = (leaves[0] @ leaves[1].T).to(high or torch.float32)
        logprobs = torch.log_softmax(logits, 1).gather(1, token_ids[:, None]).squeeze(1)
        return logprobs.detach(), torch.autograd.grad((logprobs * grads).sum(), leaves)

    logprobs, true = plain(torch.float64)
    _, eager = plain()
    prior = logprobs.float() + 0.05 * torch.randn(200).to(device)
    by_exps = head_grads("E", hidden, weight, token_ids, grads, prior)
    by_dlogits = head_grads("G", hidden, weight, token_ids, grads, prior)
    floor = 1e-5 if dtype == torch.float32 else 0.0
    for i, name in enumerate(("hidden", "weight")):
        assert_accurate(name, by_exps[i], eager[i], true[i], dtype=dtype, floor=floor)
        ours, other = ((made[i].double() - true[i]).norm() for made in (by_exps, by_dlogits))
        exact_token = name == "weight" and dtype != torch.float32 and use_triton(hidden)
        allowed = 0.7 if exact_token else 1.15
        assert ours <= allowed * other + 1e-6 * true[i].norm()
    assert (by_exps[0][::7] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients(dtype: torch.dtype) -> None:
    check_gradients(dtype, torch.device("cpu"))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_gradients_triton(dtype: torch.dtype, device) -> None:
    check_gradients(dtype, device)


def test_rows_without_gradient_are_left_out_of_the_products() -> None:
    """On a CPU: as many rows in the GEMMs as have a gradient, where most have not."""
    hidden, weight = torch.randn(40, 16), torch.randn(101, 16)
    token_ids = torch.randint(0, 101, (40,))
    grads = torch.where(torch.arange(40) % 4 == 0, 1.0, 0.0)
    prior = torch.full((40,), -3.0)
    expected = head_grads("G", hidden, weight, token_ids, grads, prior)
    with torch.profiler.profile(record_shapes=True) as profile:
        ours = head_grads("E", hidden, weight, token_ids, grads, prior)
    shapes = [e.input_shapes for e in profile.events() if e.name in ("aten::mm", "aten::addmm_")]
    assert [40, 16] in shapes[0] and [10, 101] in shapes[1] and [101, 10] in shapes[2]
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


# ---- On a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compact", [False, True])
def test_no_host_sync_whatever_the_prior(compact: bool, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    hidden, weight = torch.randn(300, 64, device=device), torch.randn(1009, 64, device=device) / 3
    hidden, weight = (t.to(dtype).requires_grad_() for t in (hidden, weight))
    token_ids = torch.randint(0, 1009, (300,), device=device)
    old = linear_logprobs(hidden, weight, token_ids).detach()
    old[::3] -= 100.0
    old[1::3] = -INF
    advantages = torch.randn(300, device=device)
    row_mask = torch.arange(300, device=device) % 5 != 2

    def step():
        loss, _, _ = linear_grpo_loss(
            hidden, weight, token_ids, old, advantages, row_mask=row_mask, compact_rows=compact
        )
        return torch.autograd.grad(loss, (hidden, weight))

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        grads = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(grad).all() for grad in grads)
