"""token_logprobs: accuracy and gradients against fp64 truth, hard values, memory, torch.compile."""

from __future__ import annotations

import pytest
import torch

from grpo_engine.kernels import token_logprobs, token_logprobs_ref
from grpo_engine.kernels.logprobs import (
    CPU_SCRATCH_ELEMENTS,
    _token_logprobs,
    _token_logprobs_backward,
    _token_logprobs_backward_inplace,
)
from grpo_engine.kernels.testing import assert_accurate

NAMES = ("logprobs", "entropy", "lse", "dlogits")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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


def run(op, logits, token_ids, *, dtype=None, used=(1.0, 0.3, 0.2), **options):
    """(logprobs, entropy, lse, dlogits) of ``op`` under a fixed random loss; ``used`` weighs the
    three outputs in it."""
    leaf = logits.detach().to(dtype or logits.dtype).requires_grad_()
    outputs = op(leaf, token_ids, return_entropy=True, return_lse=True, **options)
    generator = torch.Generator().manual_seed(1)
    loss = 0.0
    for output, factor in zip(outputs, used, strict=True):
        weights = torch.randn(len(output), generator=generator).to(output)
        loss = loss + factor * (weights * output).sum()
    (grad,) = torch.autograd.grad(loss, leaf)
    return (*(output.detach() for output in outputs), grad)


def check_three_ways(logits, token_ids, dtype, used=(1.0, 0.3, 0.2), **options):
    """logprobs within 1e-5 of the truth, entropy within 1e-4, lse to two ulps beyond 1e-5 (it has
    the size of the logits); the gradient as good as torch's at ``dtype``."""
    logits = logits.to(dtype)
    ours = run(token_logprobs, logits, token_ids, used=used, **options)
    truth = run(token_logprobs_ref, logits, token_ids, dtype=torch.float64, used=used, **options)
    eager = run(token_logprobs_ref, logits, token_ids, used=used, **options)
    tolerances = ((0.0, 1e-5), (0.0, 1e-4), (2.0**-23, 1e-5))
    for value, true, (rtol, atol) in zip(ours[:3], truth[:3], tolerances, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), true, rtol=rtol, atol=atol)
    assert ours[3].dtype == dtype
    assert_accurate("dlogits", ours[3], eager[3], truth[3], dtype=dtype, floor=1e-6)


def make_case(num_rows, vocab, device, spread=4.0):
    generator = torch.Generator().manual_seed(num_rows * 1000 + vocab)
    logits = torch.randn(num_rows, vocab, generator=generator) * spread
    token_ids = torch.randint(0, vocab, (num_rows,), generator=generator)
    token_ids[0] = vocab - 1  # the last column of a ragged vocabulary
    return logits.to(device), token_ids.to(device)


def temperatures(num_rows, device):
    return torch.linspace(0.5, 1.5, num_rows, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 53), (7, 1009), (193, 4099), (7, 50257), (3, 151936)])
def test_three_way_accuracy(shape, dtype, device) -> None:
    logits, token_ids = make_case(*shape, device)
    check_three_ways(logits, token_ids, dtype)
    check_three_ways(logits, token_ids, dtype, temperature=temperatures(shape[0], device))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("shape", [(1, 53), (5, 4099)])
def test_three_way_accuracy_triton(shape, dtype, device) -> None:
    logits, token_ids = make_case(*shape, device)
    check_three_ways(logits, token_ids, dtype)
    check_three_ways(logits, token_ids, dtype, temperature=temperatures(shape[0], device))
    check_three_ways(logits, token_ids, dtype, used=(1.0, 0.0, 0.0), temperature=0.7)


def hard_rows(device):
    """Rows that break naive kernels: [7, 301] and their tokens."""
    logits, token_ids = make_case(7, 301, device)
    logits[0] -= 1000.0  # all negative: a running maximum that starts at 0 underflows
    logits[1] *= 60.0 / logits[1].abs().max()
    logits[2, 5], token_ids[2] = 45.0, 5  # p -> 1
    logits[3, ::2] = -torch.inf  # masked vocabulary
    token_ids[3] = 1
    logits[4] = -torch.inf  # one token allowed, and it is the token
    logits[4, 9], token_ids[4] = -3.0, 9
    logits[5] = 2.0  # uniform
    logits[6, :200] = -torch.inf  # leading blocks with nothing in them
    token_ids[6] = 250
    return logits, token_ids


def check_hard_rows(device) -> None:
    logits, token_ids = hard_rows(device)
    check_three_ways(logits, token_ids, torch.float32)
    check_three_ways(logits, token_ids, torch.float32, temperature=temperatures(7, device))


def test_hard_rows(device) -> None:
    check_hard_rows(device)


@pytest.mark.triton
def test_hard_rows_triton(device) -> None:
    check_hard_rows(device)


def check_confident(device) -> None:
    """Where p -> 1 the logprob and its gradient keep their relative accuracy, far below 1e-7."""
    margins = torch.tensor([5.0, 12.0, 20.0, 30.0, 60.0], device=device)
    logits = torch.zeros(5, 17, device=device)
    logits[:, 3] = margins
    token_ids = torch.full((5,), 3, device=device)
    ours = run(token_logprobs, logits, token_ids, used=(1.0, 0.0, 0.0))
    truth = run(token_logprobs_ref, logits, token_ids, dtype=torch.float64, used=(1.0, 0.0, 0.0))
    exact = -torch.log1p(16 * torch.exp(-margins.double()))
    torch.testing.assert_close(ours[0].double(), exact, rtol=1e-5, atol=0)
    weights = truth[3][:, 0] / -(
        torch.exp(-margins.double()) / (1 + 16 * (-margins.double()).exp())
    )
    exact_grad = weights * -torch.expm1(exact)
    torch.testing.assert_close(ours[3][:, 3].double(), exact_grad, rtol=1e-5, atol=0)


def test_confident_tokens_are_exact(device) -> None:
    check_confident(device)


@pytest.mark.triton
def test_confident_tokens_are_exact_triton(device) -> None:
    check_confident(device)


def test_token_outside_the_masked_vocabulary(device) -> None:
    logits = torch.zeros(1, 4, device=device)
    logits[0, 2] = -torch.inf
    token_ids = torch.tensor([2], device=device)
    leaf = logits.requires_grad_()
    logprobs = token_logprobs(leaf, token_ids)
    assert logprobs.item() == -torch.inf
    logprobs.sum().backward()
    expected = torch.tensor([[-1 / 3, -1 / 3, 1.0, -1 / 3]], device=device)
    torch.testing.assert_close(leaf.grad, expected)


def check_dead_rows(device) -> None:
    """A row without incoming gradient is not read again in backward."""
    logits, token_ids = make_case(6, 333, device)
    logits.requires_grad_()
    logprobs, entropy = token_logprobs(logits, token_ids, return_entropy=True)
    dead = torch.tensor([True, False, True, False, False, True], device=device)
    logits.data[dead] = torch.nan
    live = (~dead).float()
    ((logprobs + entropy) * live).sum().backward()
    assert (logits.grad[dead] == 0).all()
    assert torch.isfinite(logits.grad).all() and (logits.grad[~dead] != 0).any()


def test_dead_rows_are_not_read(device) -> None:
    check_dead_rows(device)


@pytest.mark.triton
def test_dead_rows_are_not_read_triton(device) -> None:
    check_dead_rows(device)


def check_strided_rows(device) -> None:
    wide = torch.randn(5, 120, device=device)
    logits, token_ids = wide[::2, 3:100], torch.tensor([0, 96, 40], device=device)
    contiguous = run(token_logprobs, logits.contiguous(), token_ids)
    leaf = wide.clone().requires_grad_()
    logprobs = token_logprobs(leaf[::2, 3:100], token_ids)
    assert torch.equal(logprobs, contiguous[0])
    logprobs.sum().backward()
    expected = torch.zeros_like(wide)
    rows = logits.clone().requires_grad_()
    token_logprobs_ref(rows, token_ids).sum().backward()
    expected[::2, 3:100] = rows.grad
    torch.testing.assert_close(leaf.grad, expected)


def test_strided_rows(device) -> None:
    check_strided_rows(device)


@pytest.mark.triton
def test_strided_rows_triton(device) -> None:
    check_strided_rows(device)


def check_inplace_backward(device) -> None:
    logits, token_ids = make_case(5, 211, device)
    _, _, _, expected = run(token_logprobs, logits, token_ids, used=(1.0, 0.0, 0.0))
    leaf = logits.clone().requires_grad_()
    hidden = leaf * 1.0  # a tensor that the graph made, as a head's logits are
    logprobs = token_logprobs(hidden, token_ids, inplace_backward=True)
    weights = torch.randn(5, generator=torch.Generator().manual_seed(1)).to(device)
    loss = (logprobs * weights).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, expected)
    assert torch.equal(hidden, expected), "the gradient is where the logits were"
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_backward(device) -> None:
    check_inplace_backward(device)


@pytest.mark.triton
def test_inplace_backward_triton(device) -> None:
    check_inplace_backward(device)


def test_outputs_asked_for(device) -> None:
    logits, token_ids = make_case(4, 31, device)
    logprobs, entropy, lse = token_logprobs(logits, token_ids, return_entropy=True, return_lse=True)
    assert torch.equal(token_logprobs(logits, token_ids), logprobs)
    assert torch.equal(token_logprobs(logits, token_ids.int(), return_lse=True)[1], lse)
    assert torch.equal(token_logprobs(logits, token_ids, return_entropy=True)[1], entropy)
    assert token_logprobs(logits[:0], token_ids[:0]).shape == (0,)


def test_rows_do_not_depend_on_their_company(device) -> None:
    logits, token_ids = make_case(193, 1009, device)
    whole = run(token_logprobs, logits, token_ids, used=(1.0, 1.0, 1.0))
    parts = [token_logprobs(logits[i : i + 7], token_ids[i : i + 7]) for i in range(0, 193, 7)]
    assert torch.equal(torch.cat(parts), whole[0])


def test_reference_gradients() -> None:
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    token_ids = torch.tensor([0, 8, 3, 3])

    def outputs(logits):
        return token_logprobs_ref(
            logits, token_ids, temperature=0.7, return_entropy=True, return_lse=True
        )

    assert torch.autograd.gradcheck(outputs, logits)


def largest_allocation(call) -> int:
    """Bytes of the largest single allocation that any operation inside ``call`` made."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_forward_scratch_is_bounded() -> None:
    logits, token_ids = make_case(2000, 1009, "cpu")
    logits = logits.bfloat16()
    full = 4 * logits.numel()
    assert largest_allocation(lambda: token_logprobs_ref(logits, token_ids)) >= full
    ours = largest_allocation(lambda: token_logprobs(logits, token_ids, return_entropy=True))
    assert ours <= 2 * 4 * CPU_SCRATCH_ELEMENTS < full / 2


def bad(**changes):
    """A valid call with some arguments replaced."""
    arguments = {"logits": torch.zeros(3, 5), "token_ids": torch.tensor([0, 1, 4])} | changes
    logits, token_ids = arguments.pop("logits"), arguments.pop("token_ids")
    return lambda: token_logprobs(logits, token_ids, **arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (bad(token_ids=torch.tensor([0, 5, 1])), r"token_ids must be in \[0, 5\), got 5"),
        (bad(token_ids=torch.tensor([0, -100, 1])), r"token_ids must be in \[0, 5\), got -100"),
        (bad(token_ids=torch.tensor([0, 1])), r"token_ids must have shape \[3\], got \[2\]"),
        (bad(token_ids=torch.zeros(3)), "token_ids must be one of int32, int64, got torch.float32"),
        (bad(logits=torch.zeros(3)), r"logits must have shape \[N, V\]"),
        (bad(logits=torch.zeros(3, 0)), "V > 0"),
        (bad(logits=torch.zeros(3, 5).double()), "logits must be float32, bfloat16 or float16"),
        (bad(logits=torch.zeros(5, 3).t()), "logits must be contiguous along V"),
        (bad(logits=torch.zeros(1, 5).expand(3, 5), inplace_backward=True), "inplace_backward"),
        (bad(temperature=0.0), "temperature must be finite and > 0, got 0.0"),
        (bad(temperature=-1), "temperature must be finite and > 0, got -1"),
        (bad(temperature=float("nan")), "temperature must be finite and > 0, got nan"),
        (bad(temperature="hot"), "temperature must be a float or a tensor"),
        (bad(temperature=torch.ones(2)), r"temperature must have shape \[3\]"),
        (bad(temperature=torch.tensor([1.0, 0.0, 1.0])), "temperature must be > 0 .* got 0.0"),
        (bad(temperature=torch.tensor([1.0, 2.0, torch.inf])), "temperature .* finite, got inf"),
        (bad(temperature=torch.ones(3, requires_grad=True)), "temperature requires grad"),
    ],
)
def test_bad_input(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
def test_bad_token_gives_nan_on_cuda() -> None:
    token_ids = torch.tensor([0, 5, 1], device="cuda")
    logprobs = token_logprobs(torch.zeros(3, 5, device="cuda"), token_ids)
    assert logprobs.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("rows", [False, True])
def test_opcheck(rows) -> None:
    logits, token_ids = make_case(4, 37, "cpu")
    per_row = temperatures(4, "cpu") if rows else None
    leaf = logits.requires_grad_()
    torch.library.opcheck(_token_logprobs, (leaf, token_ids, 0.7, per_row, True, False))
    with torch.no_grad():
        stats = list(_token_logprobs(logits, token_ids, 0.7, per_row, True, False))
        grads = torch.randn(3, 4).unbind()
        arguments = (*grads, logits.detach(), token_ids, per_row, stats, 0.7)
        torch.library.opcheck(_token_logprobs_backward, arguments)
        torch.library.opcheck(_token_logprobs_backward_inplace, arguments)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_whole_and_once(inplace) -> None:
    def loss(logits, token_ids):
        logprobs, entropy = token_logprobs(
            logits * 2.0,
            token_ids,
            temperature=0.8,
            return_entropy=True,
            inplace_backward=inplace,
        )
        return (logprobs - 0.1 * entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_rows in (5, 8, 33):
            logits, token_ids = make_case(num_rows, 101, "cpu")
            mine, eager = logits.clone().requires_grad_(), logits.clone().requires_grad_()
            compiled(mine, token_ids).backward()
            loss(eager, token_ids).backward()
            torch.testing.assert_close(mine.grad, eager.grad)
