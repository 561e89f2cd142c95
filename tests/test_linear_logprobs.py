"""linear_logprobs: accuracy and gradients against fp64 truth, options, memory, GEMM counts."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from head_cases import (
    DTYPES,
    TRITON_DTYPES,
    all_options,
    check_three_ways,
    make_head,
    profile_call,
    run,
)

from grpo_engine.kernels import linear_logprobs, linear_logprobs_ref
from grpo_engine.kernels.linear_logprobs import _linear_logprobs, _linear_logprobs_backward

MODULE = importlib.import_module("grpo_engine.kernels.head_chunks")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 53, 16), (7, 1009, 33), (193, 4999, 64), (3, 151936, 16)])
def test_three_way_accuracy(shape, dtype, device) -> None:
    hidden, weight, bias, token_ids = make_head(*shape, device)
    check_three_ways(hidden, weight, None, token_ids, dtype)
    check_three_ways(hidden, weight, bias, token_ids, dtype, **all_options(shape[0], device))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_three_way_accuracy_triton(dtype, device) -> None:
    hidden, weight, bias, token_ids = make_head(7, 1009, 33, device)
    check_three_ways(hidden, weight, None, token_ids, dtype, temperature=0.9)
    check_three_ways(hidden, weight, bias, token_ids, dtype, **all_options(7, device))


def check_softcap_padding(device) -> None:
    """A block's padding stays out of the sum, though softcap makes its -inf finite."""
    hidden, weight, bias, token_ids = make_head(3, 33, 8, device)
    check_three_ways(hidden, weight, bias, token_ids, torch.float32, logit_softcap=2.0)


def test_softcap_padding(device) -> None:
    check_softcap_padding(device)


@pytest.mark.triton
def test_softcap_padding_triton(device) -> None:
    check_softcap_padding(device)


@pytest.mark.parametrize("option", ["bias", "logit_softcap", "logit_scale", "temperature"])
def test_each_option_alone(option, device) -> None:
    hidden, weight, bias, token_ids = make_head(9, 301, 24, device)
    options = {option: all_options(9, device)[option]} if option != "bias" else {}
    check_three_ways(
        hidden, weight, bias if option == "bias" else None, token_ids, torch.float32, **options
    )


def test_order_of_the_options(device) -> None:
    """Bias, then scale, then softcap, then temperature."""
    hidden, weight, bias, token_ids = make_head(4, 11, 8, device)
    logits = 3.0 * torch.tanh((hidden @ weight.T + bias) * 0.5 / 3.0) / 0.7
    expected = torch.log_softmax(logits, -1).gather(1, token_ids[:, None]).squeeze(1)
    options = {"bias": bias, "logit_scale": 0.5, "logit_softcap": 3.0, "temperature": 0.7}
    for op in (linear_logprobs, linear_logprobs_ref):
        actual = op(hidden, weight, token_ids, **options)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def check_masked_rows(device) -> None:
    hidden, weight, _, token_ids = make_head(10, 57, 8, device)
    mask = torch.arange(10, device=device) % 2 == 0
    token_ids = torch.where(mask, token_ids, -100)
    outputs, grads = run(linear_logprobs, hidden, weight, token_ids, row_mask=mask)
    for output in outputs:
        assert (output[~mask] == 0).all() and (output[mask] != 0).all()
    assert (grads[0][~mask] == 0).all() and (grads[0][mask] != 0).any()
    alone = linear_logprobs(hidden[mask], weight, token_ids[mask])
    torch.testing.assert_close(outputs[0][mask], alone, rtol=0, atol=1e-6)
    nothing = torch.zeros_like(mask)
    outputs, grads = run(linear_logprobs, hidden, weight, token_ids, row_mask=nothing)
    for tensor in (*outputs, *grads):
        assert (tensor == 0).all()


def test_masked_rows(device) -> None:
    check_masked_rows(device)


@pytest.mark.triton
def test_masked_rows_triton(device) -> None:
    check_masked_rows(device)


def check_masked_rows_may_hold_anything(device) -> None:
    hidden, weight, bias, token_ids = make_head(10, 57, 8, device)
    mask = torch.arange(10, device=device) % 2 == 0
    clean = run(linear_logprobs, hidden, weight, token_ids, bias, row_mask=mask)
    hidden[~mask] = torch.nan
    got = run(linear_logprobs, hidden, weight, token_ids, bias, row_mask=mask)
    for expected, tensor in zip((*clean[0], *clean[1]), (*got[0], *got[1]), strict=True):
        assert torch.equal(tensor, expected)


def test_masked_rows_may_hold_anything(device) -> None:
    check_masked_rows_may_hold_anything(device)


@pytest.mark.triton
def test_masked_rows_may_hold_anything_triton(device) -> None:
    check_masked_rows_may_hold_anything(device)


def test_no_rows(device) -> None:
    hidden, weight, _, token_ids = make_head(3, 57, 8, device)
    outputs, grads = run(linear_logprobs, hidden[:0], weight, token_ids[:0])
    assert [len(output) for output in outputs] == [0, 0, 0]
    assert grads[0].shape == (0, 8) and (grads[1] == 0).all()


def test_row_splits_change_nothing(device) -> None:
    """Logprobs and accumulated gradients of the whole, of its halves and of its rows agree."""
    hidden, weight, _, token_ids = make_head(64, 1009, 32, device)

    def accumulate(rows_per_call):
        leaf_hidden, leaf_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        parts = []
        for rows in torch.arange(64).split(rows_per_call):
            part = linear_logprobs(leaf_hidden[rows], leaf_weight, token_ids[rows])
            (part / 64).sum().backward()
            parts.append(part.detach())
        return torch.cat(parts), leaf_hidden.grad, leaf_weight.grad

    whole = accumulate(64)
    for rows_per_call in (32, 5, 1):
        logprobs, grad_hidden, grad_weight = accumulate(rows_per_call)
        torch.testing.assert_close(logprobs, whole[0], rtol=0, atol=4e-6)
        for grad, expected in ((grad_hidden, whole[1]), (grad_weight, whole[2])):
            assert (grad - expected).norm() <= 1e-6 * expected.norm()


def test_chunks_change_nothing(monkeypatch) -> None:
    """Internal chunk sizes are invisible: 193 rows in one chunk, and in chunks of 16."""
    hidden, weight, bias, token_ids = make_head(193, 301, 24, "cpu")
    options = all_options(193, "cpu")
    whole = run(linear_logprobs, hidden, weight, token_ids, bias, **options)
    monkeypatch.setattr(MODULE, "CPU_CHUNK_ROWS", (16, 16))
    chunked = run(linear_logprobs, hidden, weight, token_ids, bias, **options)
    for ours, expected in zip(chunked[0], whole[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)
    for ours, expected in zip(chunked[1], whole[1], strict=True):
        assert (ours - expected).norm() <= 1e-6 * expected.norm()


def forward_backward(op, hidden, weight, token_ids, **options):
    outputs = op(hidden, weight, token_ids, return_entropy=True, return_lse=True, **options)
    sum(output.sum() for output in outputs).backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_never_whole(dtype) -> None:
    hidden, weight, _, token_ids = make_head(3000, 4001, 16, "cpu")
    inputs = (hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), token_ids)
    full = 4 * 3000 * 4001
    largest, _ = profile_call(lambda: forward_backward(linear_logprobs_ref, *inputs))
    assert largest >= full, "the probe sees a materialised [N, V]"
    largest, _ = profile_call(lambda: forward_backward(linear_logprobs, *inputs))
    assert largest <= full / 10


def test_number_of_matrix_products() -> None:
    """One in forward; logits again, d hidden and d weight in backward. A frozen head: two in
    forward, and as entropy and lse get a gradient here, logits again and d hidden in backward."""
    hidden, weight, _, token_ids = make_head(50, 301, 16, "cpu")
    assert profile_call(lambda: linear_logprobs(hidden, weight, token_ids))[1] == 1

    def products(hidden, weight, **options):
        inputs = (hidden, weight, token_ids)
        return profile_call(lambda: forward_backward(linear_logprobs, *inputs, **options))[1]

    with_grad = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    assert products(*with_grad) == 4
    assert products(with_grad[0], weight) == 4 and weight.grad is None
    assert products(hidden, with_grad[1]) == 3
    assert products(*with_grad, row_mask=torch.zeros(50, dtype=torch.bool)) == 0


def test_reference_gradients() -> None:
    hidden, weight, bias, token_ids = make_head(4, 9, 5, "cpu")
    leaves = [tensor.double().requires_grad_() for tensor in (hidden, weight, bias)]
    options = {**all_options(4, "cpu"), "return_entropy": True, "return_lse": True}

    def outputs(hidden, weight, bias):
        return linear_logprobs_ref(hidden, weight, token_ids, bias=bias, **options)

    assert torch.autograd.gradcheck(outputs, leaves)


def bad(**changes):
    """A valid call with some arguments replaced."""
    arguments = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(5, 4),
        "token_ids": torch.tensor([0, 1, 4]),
    } | changes
    head = [arguments.pop(name) for name in ("hidden", "weight", "token_ids")]
    return lambda: linear_logprobs(*head, **arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (bad(token_ids=torch.tensor([0, 5, 1])), r"token_ids must be in \[0, 5\), got 5"),
        (bad(token_ids=torch.tensor([0])), r"token_ids must have shape \[3\]"),
        (bad(hidden=torch.zeros(3)), r"hidden must have shape \[N, D\], got \[3\]"),
        (bad(weight=torch.zeros(4, 5)), r"weight must have shape \[V, 4\]"),
        (bad(weight=torch.zeros(5, 4).bfloat16()), "weight is torch.bfloat16, hidden is"),
        (bad(hidden=torch.zeros(3, 4).long()), "hidden must be float32"),
        (bad(bias=torch.zeros(4)), r"bias must have shape \[5\], got \[4\]"),
        (bad(row_mask=torch.ones(3)), "row_mask must be one of bool, got torch.float32"),
        (bad(logit_softcap=0.0), "logit_softcap must be a finite number > 0 or None, got 0.0"),
        (bad(logit_softcap=math.inf), "logit_softcap must be a finite number > 0 or None, got inf"),
        (bad(logit_scale=-1.0), "logit_scale must be a finite number > 0 or None, got -1.0"),
        (bad(temperature=0.0), "temperature must be finite and > 0, got 0.0"),
        (
            bad(tp_group=object()),
            "tp_group must be a torch.distributed.ProcessGroup or None, got object",
        ),
        (bad(compact_rows=1), "compact_rows must be True, False or None, got 1"),
        (bad(keep_probs=None), "keep_probs must be True or False, got None"),
        (bad(batch_invariant="yes"), "batch_invariant must be True or False, got 'yes'"),
    ],
)
def test_bad_input(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("options", ["none", "all"])
def test_opcheck(options) -> None:
    hidden, weight, bias, token_ids = make_head(4, 37, 8, "cpu")
    per_row, mask, cap = None, None, None
    if options == "all":
        per_row = all_options(4, "cpu")["temperature"]
        mask, cap = all_options(4, "cpu")["row_mask"], 20.0
    else:
        bias = None
    leaves = [t if t is None else t.requires_grad_() for t in (hidden, weight, bias)]
    tensors = (*leaves, token_ids, per_row, mask)
    scalars = (0.9, cap, 0.8, False)
    torch.library.opcheck(_linear_logprobs, (*tensors, *scalars, False, True))
    with torch.no_grad():
        stats = list(_linear_logprobs(*tensors, *scalars, False, True))
        detached = [t if t is None else t.detach() for t in tensors]
        needs = [True, False, bias is not None]
        arguments = (*torch.randn(3, 4).unbind(), *detached, stats, *scalars, needs)
        torch.library.opcheck(_linear_logprobs_backward, arguments)


def test_compiles_whole_and_once() -> None:
    def loss(hidden, weight, token_ids):
        logprobs, entropy = linear_logprobs(
            hidden * 1.5, weight, token_ids, temperature=0.8, return_entropy=True
        )
        return (logprobs - 0.1 * entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_rows in (5, 8, 33):
            hidden, weight, _, token_ids = make_head(num_rows, 101, 8, "cpu")
            mine = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
            eager = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
            compiled(*mine, token_ids).backward()
            loss(*eager, token_ids).backward()
            for ours, expected in zip(mine, eager, strict=True):
                torch.testing.assert_close(ours.grad, expected.grad)
