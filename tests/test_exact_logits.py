"""The logits that decide a log-probability, found and computed again: exact_logits.py."""

from __future__ import annotations

import pytest
import torch
from head_cases import all_options, make_head

from grpo_engine.kernels import (
    linear_grpo_loss,
    linear_logprobs,
    linear_logprobs_ref,
    token_logprobs,
)
from grpo_engine.kernels.common import use_triton
from grpo_engine.kernels.exact_logits import exact_stats
from grpo_engine.kernels.top_logits import LEAST, SPAN, TOP, TopLogits, entries_above, span_maxima
from grpo_engine.kernels.vocab_rows import LogitOptions, fold_rows


def large_head(num_rows: int, vocab: int, width: int, device, largest: float = 60.0):
    """hidden, weight, token_ids: logits up to ``largest``, and some tokens that are the largest."""
    hidden, weight, _, token_ids = make_head(num_rows, vocab, width, device)
    logits = hidden @ weight.T
    token_ids = torch.where(
        torch.arange(num_rows, device=device) % 2 == 0, token_ids, logits.argmax(1)
    )
    return hidden * (largest / logits.abs().max()), weight, token_ids


def truth(hidden, weight, token_ids, **options):
    """fp64: (logprobs, entropy, lse)."""
    wide = {n: o.double() if torch.is_tensor(o) else o for n, o in options.items() if n != "kept"}
    if "kept" in options:
        wide["kept"] = options["kept"]
    arguments = (hidden.double(), weight.double(), token_ids)
    return linear_logprobs_ref(*arguments, **wide, return_entropy=True, return_lse=True)


def check_bound(hidden, weight, token_ids, **options) -> None:
    """1e-5 of fp64 where the GEMM alone is further off (the test would show nothing else)."""
    arguments = (hidden, weight, token_ids)
    true, _, true_lse = truth(hidden, weight, token_ids, **options)
    logprobs, lse = linear_logprobs(*arguments, return_lse=True, **options)
    assert (logprobs.double() - true).abs().max() <= 1e-5
    assert (lse.double() - true_lse).abs().max() <= 1e-5


HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"logit_softcap": 80.0, "logit_scale": 0.9},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_large_logits_keep_the_bound(head, dtype, device) -> None:
    hidden, weight, token_ids = large_head(48, 20_011, 256, device, 40.0)
    check_bound(hidden.to(dtype), weight.to(dtype), token_ids, **HEADS[head])


@pytest.mark.triton
@pytest.mark.parametrize("head", HEADS)
def test_large_logits_keep_the_bound_triton(head, device) -> None:
    check_bound(*large_head(9, 517, 96, device, 40.0), **HEADS[head])


def test_every_way_to_a_log_probability_keeps_it(device) -> None:
    """A frozen head, kept probabilities, kept ids and masks, batch invariance, the loss."""
    hidden, weight, token_ids = large_head(40, 5003, 256, device)
    weight.requires_grad_(False)
    true = truth(hidden, weight, token_ids)[0]
    frozen = hidden.clone().requires_grad_()
    found = {
        "frozen": linear_logprobs(frozen, weight, token_ids),
        "probabilities": linear_logprobs(frozen, weight, token_ids, keep_probs=True),
        "invariant": linear_logprobs(hidden, weight, token_ids, batch_invariant=True),
        "loss": linear_grpo_loss(hidden, weight, token_ids, None, true.float())[2],
        "a prior far off": linear_grpo_loss(
            frozen, weight, token_ids, true.float() - 1, true.float()
        )[2],
    }
    for name, logprobs in found.items():
        assert (logprobs.detach().double() - true).abs().max() <= 1e-5, name
    kept = torch.cat([token_ids[:, None], (hidden @ weight.T).topk(50).indices], 1)
    again = kept[:, 1:] == token_ids[:, None]
    kept[:, 1:] = torch.where(again, -1, kept[:, 1:])
    true = truth(hidden, weight, token_ids, kept=kept)[0]
    mask = torch.zeros(40, 5004, dtype=torch.bool, device=device)
    mask = mask.scatter_(1, kept.where(kept >= 0, 5003), True)[:, :5003]
    for form in (kept, mask):
        logprobs = linear_logprobs(hidden, weight, token_ids, kept=form)
        assert (logprobs.double() - true).abs().max() <= 1e-5


def test_only_the_exact_logits_count_of_those_that_matter(device) -> None:
    if use_triton(torch.empty(0, device=device)):
        pytest.skip("the portable path's own test")
    hidden, weight, token_ids = large_head(64, 4001, 48, device, 20.0)
    options = LogitOptions()
    exact = hidden.double() @ weight.double().T
    p = exact.softmax(1)
    matters = (p > LEAST).scatter_(1, token_ids[:, None], True)
    wrong = (exact + torch.where(matters, 3e-3, 0.0)).float()
    top = TopLogits()
    stats = fold_rows(wrong, torch.empty_like(wrong), token_ids, options, False, None, top)
    true = exact.log_softmax(1).gather(1, token_ids[:, None])[:, 0]
    assert (stats.logprobs - true).abs().max() > 1e-3
    fixed = exact_stats(stats, top, hidden, weight, options).logprobs
    torch.testing.assert_close(fixed.double(), true, rtol=0, atol=1e-5)


@pytest.mark.triton
def test_the_largest_logits_are_found_triton(device) -> None:
    """All of them where one block holds the row, in more blocks as many as do not hide another."""
    generator = torch.Generator(device).manual_seed(1)
    for vocab in (7, 130, 9001):
        logits = 30 * torch.randn(5, vocab, generator=generator, device=device)
        logits[1] -= 200
        token_ids = torch.tensor([0, 3, vocab, -1, 5], device=device)
        token_ids[4] = logits[4].argmax()
        top = TopLogits()
        fold_rows(logits.clone(), logits, token_ids, LogitOptions(), False, None, top)
        assert top.ids[:, 0].tolist() == [0, 3, -1, -1, int(token_ids[4])]
        for n in range(5):
            others = logits[n].clone()
            if 0 <= token_ids[n] < vocab:
                others[token_ids[n]] = -torch.inf
            values, ids = others.topk(min(TOP, vocab))
            found = dict(zip(top.ids[n, 1:].tolist(), top.values[n, 1:].tolist(), strict=True))
            finite = {i: v for i, v in found.items() if v > -torch.inf}
            expected = dict(zip(ids.tolist(), values.tolist(), strict=True))
            expected = {i: v for i, v in expected.items() if v > -torch.inf}
            if vocab <= 130:
                assert finite == expected
            else:
                assert len(finite) == TOP and all(others[i] == v for i, v in finite.items())
                assert len(finite.keys() & expected.keys()) >= TOP - 1


@pytest.mark.parametrize("vocab", [1, 5, SPAN - 1, SPAN, SPAN + 1, 3 * SPAN + 17])
def test_entries_above_are_those_of_a_plain_comparison(vocab) -> None:
    matrix = torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab))
    matrix[1] = -torch.inf
    least = torch.tensor([0.5, -torch.inf, -3.0, 9.0, 0.0, 1.0])
    maxima = span_maxima(matrix)
    assert torch.equal(maxima.amax(1), matrix.amax(1))
    rows, columns, values = entries_above(matrix, maxima, least)
    expected = (matrix > least[:, None]).nonzero()
    assert torch.equal(torch.stack([rows, columns], 1), expected)
    assert torch.equal(values, matrix[rows, columns])


def test_a_row_without_a_distribution_stays_what_it_was(device) -> None:
    """Banned tokens, a banned row's token, NaN and infinite hidden states."""
    hidden, weight, bias, token_ids = make_head(5, 301, 16, device)
    bias = bias.clone()
    bias[token_ids[0]], bias[10:20] = -torch.inf, -torch.inf
    hidden[2], hidden[3, 0] = torch.nan, torch.inf
    logprobs, lse = linear_logprobs(hidden, weight, token_ids, bias=bias, return_lse=True)
    assert logprobs[0] == -torch.inf and lse[0].isfinite()
    assert logprobs[2].isnan() and logprobs[3].isnan()
    true = truth(hidden[[1, 4]], weight, token_ids[[1, 4]], bias=bias)[0]
    torch.testing.assert_close(logprobs[[1, 4]].double(), true, rtol=0, atol=1e-5)


def test_a_sure_token_keeps_its_precision(device) -> None:
    """log p of -1e-9 to some digits: the correction must not add rounding of its own."""
    hidden, weight, _, token_ids = make_head(24, 997, 32, device)
    weight = torch.nn.functional.normalize(weight, dim=1)
    lift = torch.linspace(14.0, 60.0, 24, device=device)[:, None]
    hidden = 0.3 * hidden + lift * weight[token_ids]
    true = truth(hidden, weight, token_ids)[0]
    found = linear_logprobs(hidden, weight, token_ids).double()
    assert true.max() > -1e-9 and (found <= 0).all()
    # fp64 itself is 1e-15 off beside logits of 60
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-15)


def test_logits_that_are_given_are_not_corrected(device) -> None:
    logits = 20 * torch.randn(7, 301, generator=torch.Generator().manual_seed(0)).to(device)
    token_ids = torch.arange(7, device=device)
    found = token_logprobs(logits, token_ids)
    true = logits.double().log_softmax(1)[torch.arange(7), token_ids]
    torch.testing.assert_close(found.double(), true, rtol=0, atol=1e-5)


def test_the_ratio_is_one_on_the_policy_that_made_the_prior(device) -> None:
    hidden, weight, token_ids = large_head(64, 3001, 64, device, 20.0)
    hidden.requires_grad_()
    options = {k: v for k, v in all_options(64, device).items() if k == "temperature"}
    old = linear_logprobs(hidden.detach(), weight, token_ids, **options)
    ones = torch.ones(64, device=device)
    logprobs = linear_grpo_loss(hidden, weight, token_ids, old, ones, **options)[2]
    assert torch.equal(logprobs, old)


def test_many_equal_candidates_are_beyond_it(device) -> None:
    """What the docstring admits: 200 equal rows of the head, none of which is large alone."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4000, 576, generator=generator) / 24
    weight[100:300] = weight[100].clone()
    hidden = torch.randn(16, 576, generator=generator)
    direction = weight[100] / weight[100].square().sum()
    hidden = hidden + (60 - hidden @ weight[100])[:, None] * direction
    token_ids = torch.randint(100, 300, (16,), generator=generator)
    arguments = (hidden.to(device), weight.to(device), token_ids.to(device))
    true, _, _ = truth(*arguments)
    assert (linear_logprobs(*arguments).double() - true).abs().max() <= 5e-5
