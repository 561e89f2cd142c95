"""Log-probabilities over a kept set (kernels/truncated.py): every form of it against fp64 truth,
gradients, options, masked rows."""

from __future__ import annotations

import pytest
import torch
from head_cases import DTYPES, TRITON_DTYPES, all_options, make_head, run
from truncated_cases import FORMS, check_three_ways, in_form, make_kept

from grpo_engine.kernels import linear_logprobs, linear_logprobs_ref
from grpo_engine.kernels.truncated_mask import kept_bits, kept_mask


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 53, 16, 3), (7, 1009, 33, 5), (193, 4999, 64, 50)])
def test_three_way_accuracy(shape, dtype, form, device) -> None:
    *sizes, num_kept = shape
    hidden, weight, bias, token_ids = make_head(*sizes, device)
    kept = in_form(make_kept(token_ids, sizes[1], num_kept), sizes[1], form)
    check_three_ways(hidden, weight, None, token_ids, dtype, kept=kept)
    options = all_options(sizes[0], device)
    check_three_ways(hidden, weight, bias, token_ids, dtype, kept=kept, **options)


@pytest.mark.triton
@pytest.mark.parametrize("form", ("ids", "bits"))
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_three_way_accuracy_triton(dtype, form, device) -> None:
    hidden, weight, bias, token_ids = make_head(7, 201, 33, device)
    kept = in_form(make_kept(token_ids, 201, 19), 201, form)
    check_three_ways(hidden, weight, None, token_ids, dtype, kept=kept, temperature=0.9)
    check_three_ways(hidden, weight, bias, token_ids, dtype, kept=kept, **all_options(7, device))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("option", ["bias", "logit_softcap", "logit_scale", "temperature"])
def test_each_option_alone(option, form, device) -> None:
    hidden, weight, bias, token_ids = make_head(9, 301, 24, device)
    kept = in_form(make_kept(token_ids, 301, 8), 301, form)
    options = {option: all_options(9, device)[option]} if option != "bias" else {}
    bias = bias if option == "bias" else None
    check_three_ways(hidden, weight, bias, token_ids, torch.float32, kept=kept, **options)


def check_small_softcap(form, device) -> None:
    """A softcap makes every -inf finite: what is not kept stays out all the same."""
    hidden, weight, bias, token_ids = make_head(3, 33, 8, device)
    kept = in_form(make_kept(token_ids, 33, 4), 33, form)
    options = {"kept": kept, "logit_softcap": 0.5}
    check_three_ways(hidden, weight, bias, token_ids, torch.float32, **options)


@pytest.mark.parametrize("form", FORMS)
def test_small_softcap(form, device) -> None:
    check_small_softcap(form, device)


@pytest.mark.triton
@pytest.mark.parametrize("form", ("ids", "bits"))
def test_small_softcap_triton(form, device) -> None:
    check_small_softcap(form, device)


def check_one_kept_id(form, device) -> None:
    """A sampler that kept one id had no choice: probability 1, and nothing to learn."""
    hidden, weight, bias, token_ids = make_head(5, 40, 8, device)
    kept = in_form(token_ids[:, None].int(), 40, form)
    (logprobs, entropy, lse), _ = run(linear_logprobs, hidden, weight, token_ids, bias, kept=kept)
    assert (logprobs == 0).all() and (entropy == 0).all()
    expected = (hidden * weight[token_ids]).sum(1) + bias[token_ids]
    torch.testing.assert_close(lse, expected, rtol=0, atol=1e-5)
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    outputs = linear_logprobs(
        *leaves[:2], token_ids, bias=leaves[2], kept=kept, return_entropy=True
    )
    for grad in torch.autograd.grad(sum(output.sum() for output in outputs), leaves):
        assert (grad == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_one_kept_id(form, device) -> None:
    check_one_kept_id(form, device)


@pytest.mark.triton
@pytest.mark.parametrize("form", ("ids", "bits"))
def test_one_kept_id_triton(form, device) -> None:
    check_one_kept_id(form, device)


@pytest.mark.parametrize("form", FORMS)
def test_everything_kept_is_untruncated(form, device) -> None:
    hidden, weight, bias, token_ids = make_head(9, 101, 16, device)
    options = all_options(9, device)
    g = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(101, generator=g) for _ in range(9)]).int().to(device)
    whole = run(linear_logprobs, hidden, weight, token_ids, bias, **options)
    kept = in_form(ids, 101, form)
    got = run(linear_logprobs, hidden, weight, token_ids, bias, kept=kept, **options)
    for ours, expected in zip((*got[0], *got[1]), (*whole[0], *whole[1]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-6, atol=4e-6)


def test_the_forms_agree(device) -> None:
    hidden, weight, bias, token_ids = make_head(33, 205, 24, device)
    ids = make_kept(token_ids, 205, 17)
    options = all_options(33, device)
    results = []
    for form in FORMS:
        outputs, grads = run(
            linear_logprobs,
            hidden,
            weight,
            token_ids,
            bias,
            kept=in_form(ids, 205, form),
            **options,
        )
        results.append([*outputs, *grads])
    by_ids, by_ids64, by_mask, by_bits = results
    for first, second in ((by_ids, by_ids64), (by_mask, by_bits)):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for ours, expected in zip(by_ids, by_mask, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-6, atol=4e-6)


def test_a_kept_set_is_only_a_set(device) -> None:
    """The order of its ids and where the padding stands change nothing but rounding."""
    hidden, weight, bias, token_ids = make_head(12, 205, 24, device)
    ids = make_kept(token_ids, 205, 9)
    first = run(linear_logprobs, hidden, weight, token_ids, bias, kept=ids)
    padded = torch.nn.functional.pad(ids.sort(1).values, (0, 4), value=-7)
    second = run(linear_logprobs, hidden, weight, token_ids, bias, kept=padded)
    for ours, expected in zip((*second[0], *second[1]), (*first[0], *first[1]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-6, atol=4e-6)


def test_bits() -> None:
    """Id v is bit v % 8 of byte v // 8, as np.packbits(bitorder="little") has it."""
    np = pytest.importorskip("numpy")
    for vocab in (1, 7, 8, 9, 203):
        mask = torch.rand(5, vocab) < 0.5
        packed = np.packbits(mask.numpy(), axis=1, bitorder="little")
        assert torch.equal(kept_bits(mask), torch.from_numpy(packed))
        assert torch.equal(kept_mask(kept_bits(mask), vocab), mask)


def check_masked_rows_may_hold_anything(form, device) -> None:
    hidden, weight, bias, token_ids = make_head(10, 57, 8, device)
    mask = torch.arange(10, device=device) % 2 == 0
    ids = make_kept(token_ids, 57, 6)
    options = {"row_mask": mask, "logit_softcap": 5.0}
    clean = run(
        linear_logprobs, hidden, weight, token_ids, bias, kept=in_form(ids, 57, form), **options
    )
    for output in clean[0]:
        assert (output[~mask] == 0).all() and (output[mask] != 0).any()
    assert (clean[1][0][~mask] == 0).all()
    hidden[~mask] = torch.nan
    token_ids[~mask] = -100
    ids[~mask] = 2**30 if form.startswith("ids") else -1
    got = run(
        linear_logprobs, hidden, weight, token_ids, bias, kept=in_form(ids, 57, form), **options
    )
    for expected, tensor in zip((*clean[0], *clean[1]), (*got[0], *got[1]), strict=True):
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("form", FORMS)
def test_masked_rows_may_hold_anything(form, device) -> None:
    check_masked_rows_may_hold_anything(form, device)


@pytest.mark.triton
@pytest.mark.parametrize("form", ("ids", "bits"))
def test_masked_rows_may_hold_anything_triton(form, device) -> None:
    check_masked_rows_may_hold_anything(form, device)


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_masks_rows_too(form, device) -> None:
    """Rows that keep nothing, where a softmax over them would be NaN, and ids that do not exist."""
    hidden, weight, bias, token_ids = make_head(10, 57, 8, device)
    mask = torch.arange(10, device=device) % 2 == 0
    ids = make_kept(token_ids, 57, 6)
    results = []
    for filler in (ids[~mask], 2**30):
        ids[~mask] = filler
        kept = in_form(ids, 57, form)
        inputs = (hidden, weight, token_ids, bias)
        results.append(run(linear_logprobs_ref, *inputs, kept=kept, row_mask=mask))
    for ours, expected in zip(*([*outputs, *grads] for outputs, grads in results), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("form", FORMS)
def test_no_rows(form, device) -> None:
    hidden, weight, _, token_ids = make_head(3, 57, 8, device)
    kept = in_form(make_kept(token_ids, 57, 6), 57, form)
    nothing = torch.zeros(3, dtype=torch.bool, device=device)
    outputs, grads = run(linear_logprobs, hidden, weight, token_ids, kept=kept, row_mask=nothing)
    assert all((tensor == 0).all() for tensor in (*outputs, *grads))
    outputs, grads = run(linear_logprobs, hidden[:0], weight, token_ids[:0], kept=kept[:0])
    assert [len(output) for output in outputs] == [0, 0, 0]
    assert grads[0].shape == (0, 8) and (grads[1] == 0).all()


@pytest.mark.parametrize("form", ("ids", "bits"))
def test_a_gradient_that_is_not_needed_is_not_made(form, device) -> None:
    hidden, weight, _, token_ids = make_head(9, 301, 24, device)
    kept = in_form(make_kept(token_ids, 301, 8), 301, form)
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    linear_logprobs(*leaves, token_ids, kept=kept).sum().backward()
    for i in range(2):
        alone = [tensor.clone() for tensor in (hidden, weight)]
        alone[i].requires_grad_()
        linear_logprobs(*alone, token_ids, kept=kept).sum().backward()
        torch.testing.assert_close(alone[i].grad, leaves[i].grad, rtol=0, atol=1e-6)
        assert alone[1 - i].grad is None


@pytest.mark.parametrize("form", FORMS)
def test_repeatable(form, device) -> None:
    hidden, weight, bias, token_ids = make_head(50, 301, 24, device)
    kept = in_form(make_kept(token_ids, 301, 30), 301, form)
    options = {"kept": kept, **all_options(50, device)}
    first = run(linear_logprobs, hidden, weight, token_ids, bias, **options)
    second = run(linear_logprobs, hidden, weight, token_ids, bias, **options)
    for ours, expected in zip((*second[0], *second[1]), (*first[0], *first[1]), strict=True):
        assert torch.equal(ours, expected)


def test_reference_gradients() -> None:
    hidden, weight, bias, token_ids = make_head(4, 9, 5, "cpu")
    leaves = [tensor.double().requires_grad_() for tensor in (hidden, weight, bias)]
    options = {**all_options(4, "cpu"), "return_entropy": True, "return_lse": True}
    kept = make_kept(token_ids, 9, 4)

    def outputs(hidden, weight, bias):
        return linear_logprobs_ref(hidden, weight, token_ids, bias=bias, kept=kept, **options)

    assert torch.autograd.gradcheck(outputs, leaves)


def test_reference_renormalises() -> None:
    """By hand: p of the token over the mass of the kept set."""
    hidden, weight, _, token_ids = make_head(6, 30, 8, "cpu")
    kept = make_kept(token_ids, 30, 7)
    p = torch.softmax(hidden @ weight.T / 0.7, -1)
    mass = torch.stack([p[n, row[row >= 0].long()].sum() for n, row in enumerate(kept)])
    expected = (p[torch.arange(6), token_ids] / mass).log()
    for op in (linear_logprobs, linear_logprobs_ref):
        got = op(hidden, weight, token_ids, kept=kept, temperature=0.7)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
