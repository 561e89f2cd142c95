"""linear_grpo_loss: against its reference, against the unfused composition, memory, GEMM counts."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from linear_grpo_cases import (
    TOKEN_LEVEL,
    TRITON_DTYPES,
    VARIANTS,
    check_against_reference,
    make_batch,
    profile_call,
    run,
)

from grpo_engine.kernels import (
    grpo_loss,
    linear_grpo_loss,
    linear_grpo_loss_ref,
    linear_logprobs,
)
from grpo_engine.kernels.linear_grpo import _linear_grpo
from grpo_engine.kernels.loss_options import make_loss_options

HEAD_MODULE = importlib.import_module("grpo_engine.kernels.head_chunks")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_reference(variant, dtype, device) -> None:
    check_against_reference((193, 1009, 32), dtype, device, **VARIANTS[variant])


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("variant", ["paper", "entropy", "gspo"])
def test_against_reference_triton(variant, dtype, device) -> None:
    check_against_reference((13, 257, 16), dtype, device, **VARIANTS[variant])


@pytest.mark.triton
@pytest.mark.parametrize("compact", [True, False, None])
@pytest.mark.parametrize("way", ["prior", "no prior", "batch_invariant", "entropy", "sparse"])
def test_rows_without_a_gradient_beside_masked_rows(way, compact, device) -> None:
    """Advantages of 0 and clipped tokens inside a compacted pass, whose buffers hold NaN at first:
    such a row must add nothing, whatever stood in its place before."""
    hidden, weight = torch.randn(24, 16, device=device), torch.randn(67, 16, device=device)
    token_ids = torch.randint(0, 67, (24,), device=device)
    advantages = torch.randn(24, device=device)
    advantages[::3] = 0.0
    old = None
    if way != "no prior":  # half of the rest are clipped
        old = linear_logprobs(hidden, weight, token_ids)
        old = old - 2.0 * advantages.sign() * (torch.arange(24, device=device) % 2)
    row_mask = torch.arange(24, device=device) % 5 != 2
    options = {
        "batch_invariant": {"batch_invariant": True},
        "entropy": {"entropy_coef": 0.01, "loss_type": "dapo"},
        "sparse": {"sparse_delta": 0.3, "sparse_max_entries": 16},
    }.get(way, {})

    def gradients(op, **keywords):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = op(*leaves, token_ids, old, advantages, row_mask=row_mask, **keywords)[0]
        return torch.autograd.grad(loss, leaves)

    ours = gradients(linear_grpo_loss, compact_rows=compact, **options)
    if way == "sparse":  # not exact: held against the pass that is not compacted
        expected = gradients(linear_grpo_loss, compact_rows=False, **options)
    else:
        options.pop("batch_invariant", None)
        expected = gradients(linear_grpo_loss_ref, **options)
    for mine, right in zip(ours, expected, strict=True):
        assert (mine - right).norm() <= 1e-5 * right.norm()


def test_large_vocabulary(device) -> None:
    check_against_reference((3, 151936, 16), torch.bfloat16, device, loss_type="dapo")


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_two_kernels_it_fuses(variant, device) -> None:
    """Every option of the head, every loss: linear_logprobs then grpo_loss gives the same."""
    positional, fields = make_batch(64, 301, 24, device)
    bias = torch.randn(301, device=device)
    head = {
        "temperature": torch.linspace(0.6, 1.5, 64, device=device),
        "logit_softcap": 20.0,
        "logit_scale": 0.8,
    }
    options = VARIANTS[variant]

    def unfused(hidden, weight, token_ids, old_logprobs, advantages, *, bias, **keywords):
        for name in head:
            keywords.pop(name)
        logprobs, entropy = linear_logprobs(
            hidden, weight, token_ids, bias=bias, return_entropy=True, **head
        )
        loss, metrics = grpo_loss(logprobs, old_logprobs, advantages, entropy=entropy, **keywords)
        return loss, metrics, logprobs.detach()

    ours = run(
        linear_grpo_loss, positional, fields, bias=bias, return_entropy=True, **head, **options
    )
    theirs = run(unfused, positional, fields, bias=bias, **head, **options)
    mask = fields["loss_mask"]
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours[1][mask], theirs[1][mask], rtol=0, atol=4e-6)
    assert (ours[1][~mask] == 0).all()
    assert ours[2] == pytest.approx(theirs[2], rel=1e-5, abs=1e-6)
    for mine, expected in zip(ours[3], theirs[3], strict=True):
        assert (mine - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("variant", TOKEN_LEVEL)
def test_micro_batches_add_up(variant, device) -> None:
    """With a global denominator, gradients, losses and metrics of any cut of the sequences sum to
    those of the batch."""
    positional, fields = make_batch(96, 301, 24, device)
    options = {**VARIANTS[variant], "denominator": torch.tensor(37.0, device=device)}
    whole = run(linear_grpo_loss, positional, fields, **options)
    bounds = fields["cu_seqlens"].tolist()
    total_loss, total_grad, tokens = 0.0, 0.0, 0.0
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        hidden, weight, *rest = positional
        cut_positional = [hidden[start:end], weight, *(field[start:end] for field in rest)]
        cut_fields = {n: f[start:end] for n, f in fields.items() if n != "cu_seqlens"}
        part = run(linear_grpo_loss, cut_positional, cut_fields, **options)
        total_loss, total_grad = total_loss + part[0], total_grad + part[3][1]
        tokens += part[2]["tokens"]
    torch.testing.assert_close(total_loss, whole[0], rtol=1e-5, atol=1e-7)
    assert (total_grad - whole[3][1]).norm() <= 1e-6 * whole[3][1].norm()
    assert tokens == whole[2]["tokens"]


def test_chunks_change_nothing(monkeypatch) -> None:
    positional, fields = make_batch(193, 301, 24, "cpu")
    options = VARIANTS["entropy"]
    whole = run(linear_grpo_loss, positional, fields, **options)
    monkeypatch.setattr(HEAD_MODULE, "CPU_CHUNK_ROWS", (16, 16))
    chunked = run(linear_grpo_loss, positional, fields, **options)
    torch.testing.assert_close(chunked[0], whole[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(chunked[1], whole[1], rtol=0, atol=2e-6)
    assert chunked[2] == pytest.approx(whole[2], rel=1e-5, abs=1e-6)
    for ours, expected in zip(chunked[3], whole[3], strict=True):
        assert (ours - expected).norm() <= 1e-6 * expected.norm()


def test_on_policy_without_old_logprobs(device) -> None:
    """old_logprobs=None is ratio 1 with its gradient, as the current logprobs, detached, are."""
    positional, fields = make_batch(40, 301, 24, device)
    hidden, weight, token_ids, _, advantages = positional
    current = linear_logprobs(hidden, weight, token_ids)
    none = run(linear_grpo_loss, [hidden, weight, token_ids, None, advantages], fields)
    same = run(linear_grpo_loss, [hidden, weight, token_ids, current, advantages], fields)
    assert torch.equal(same[1][fields["loss_mask"]], current[fields["loss_mask"]])
    torch.testing.assert_close(none[0], same[0])
    assert none[2]["ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    for ours, expected in zip(none[3], same[3], strict=True):
        assert (ours - expected).norm() <= 1e-5 * expected.norm() and expected.norm() > 0


@pytest.mark.parametrize("what", ["advantages", "loss_mask", "row_mask"])
def test_nothing_to_learn_gives_zero_gradients(what, device) -> None:
    positional, fields = make_batch(40, 301, 24, device)
    if what == "advantages":
        positional[4] = torch.zeros(40, device=device)
    else:
        fields[what] = torch.zeros(40, dtype=torch.bool, device=device)
    loss, _, metrics, grads = run(linear_grpo_loss, positional, fields)
    assert loss == 0 and all((grad == 0).all() for grad in grads)
    assert metrics["tokens"] == (32 if what == "advantages" else 0)


def test_row_mask_is_a_loss_mask(device) -> None:
    positional, fields = make_batch(40, 301, 24, device)
    row_mask = torch.arange(40, device=device) % 3 != 0
    both = {**fields, "loss_mask": fields["loss_mask"] & row_mask}
    ours = run(linear_grpo_loss, positional, {**fields, "row_mask": row_mask})
    expected = run(linear_grpo_loss, positional, both)
    assert torch.equal(ours[0], expected[0]) and ours[2] == expected[2]
    assert torch.equal(ours[3][1], expected[3][1])


def check_masked_rows_may_hold_anything(variant, device) -> None:
    positional, fields = make_batch(13, 57, 8, device)
    clean = run(linear_grpo_loss, positional, fields, **VARIANTS[variant])
    positional[0][~fields["loss_mask"]] = torch.nan
    got = run(linear_grpo_loss, positional, fields, **VARIANTS[variant])
    assert torch.equal(got[0], clean[0]) and got[2] == clean[2]
    for tensor, expected in zip(got[3], clean[3], strict=True):
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("variant", ["grpo", "gspo"])
def test_masked_rows_may_hold_anything(variant, device) -> None:
    check_masked_rows_may_hold_anything(variant, device)


@pytest.mark.triton
@pytest.mark.parametrize("variant", ["grpo", "gspo"])
def test_masked_rows_may_hold_anything_triton(variant, device) -> None:
    check_masked_rows_may_hold_anything(variant, device)


def check_incoming_gradient(dtype, device) -> None:
    """The loss's gradient is made before the scale of a loss scaler is known: an fp16 gradient of
    1e-9 must not have been flushed by then. Backward may run twice."""
    positional, fields = make_batch(24, 101, 16, device, dtype)
    hidden, weight = (tensor.requires_grad_() for tensor in positional[:2])
    plain = run(linear_grpo_loss, positional, fields, denominator=1.0)[3]
    loss, _, _ = linear_grpo_loss(hidden, weight, *positional[2:], **fields, denominator=1e9)
    for _ in range(2):
        scaled = torch.autograd.grad(loss * 1e9, (hidden, weight), retain_graph=True)
        for ours, expected in zip(scaled, plain, strict=True):
            tolerance = max(torch.finfo(dtype).eps, 1e-6)
            assert (ours - expected).float().norm() <= tolerance * expected.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_incoming_gradient(dtype, device) -> None:
    check_incoming_gradient(dtype, device)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_incoming_gradient_triton(dtype, device) -> None:
    check_incoming_gradient(dtype, device)


def test_number_of_matrix_products() -> None:
    """Three with a trainable head, all in the forward; two with a frozen one; one without grad."""
    positional, fields = make_batch(50, 301, 16, "cpu")
    hidden, weight, *rest = positional
    hidden.requires_grad_()

    def loss(weight):
        return linear_grpo_loss(hidden, weight, *rest, **fields)[0]

    assert profile_call(lambda: loss(weight))[1] == 2
    leaf = weight.clone().requires_grad_()
    made = []
    assert profile_call(lambda: made.append(loss(leaf)))[1] == 3
    assert profile_call(lambda: made[0].backward())[1] == 0
    with torch.no_grad():
        assert profile_call(lambda: loss(leaf))[1] == 1


@pytest.mark.parametrize("variant", ["entropy", "gspo"])
def test_logits_are_never_whole(variant) -> None:
    positional, fields = make_batch(3000, 4001, 16, "cpu")
    for leaf in positional[:2]:
        leaf.requires_grad_()
    full = 4 * 3000 * 4001

    def step(op):
        op(*positional, **fields, **VARIANTS[variant])[0].backward()

    assert profile_call(lambda: step(linear_grpo_loss_ref))[0] >= full
    assert profile_call(lambda: step(linear_grpo_loss))[0] <= full / 10


def test_no_gradient_buffers_without_grad() -> None:
    positional, fields = make_batch(4, 20011, 64, "cpu")
    buffer = 4 * 20011 * 64
    assert profile_call(lambda: linear_grpo_loss(*positional, **fields))[0] < buffer
    positional[1].requires_grad_()
    assert profile_call(lambda: linear_grpo_loss(*positional, **fields))[0] >= buffer
    with torch.no_grad():
        assert profile_call(lambda: linear_grpo_loss(*positional, **fields))[0] < buffer


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"loss_type": "ppo"}, ValueError, "loss_type must be one of .*got 'ppo'"),
        ({"beta": 0.1, "ref_logprobs": None}, ValueError, "beta=0.1 needs ref_logprobs"),
        ({"loss_mask": torch.ones(3)}, ValueError, r"loss_mask must have shape \[12\]"),
        ({"row_mask": torch.ones(12)}, ValueError, "row_mask must be one of bool"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens must rise from 0"),
        ({"temperature": 0}, ValueError, "temperature must be finite and > 0, got 0"),
        (
            {"tp_group": object()},
            ValueError,
            "tp_group must be a torch.distributed.ProcessGroup or None, got object",
        ),
        (
            {"temperature": torch.tensor([1.0] * 11 + [math.inf])},
            ValueError,
            "temperature .*got inf",
        ),
        (
            {"cliprange": 0.2},
            TypeError,
            r"^linear_grpo_loss\(\) got an unexpected keyword argument 'cliprange'$",
        ),
    ],
)
def test_bad_input(changes, error, message) -> None:
    positional, fields = make_batch(12, 31, 8, "cpu")
    with pytest.raises(error, match=message):
        linear_grpo_loss(*positional, **{**fields, **changes})


def test_bad_token_id() -> None:
    positional, fields = make_batch(12, 31, 8, "cpu")
    positional[2][0] = 31
    with pytest.raises(ValueError, match=r"token_ids must be in \[0, 31\), got 31"):
        linear_grpo_loss(*positional, **fields)
    fields["loss_mask"][0] = False
    linear_grpo_loss(*positional, **fields)


def test_opcheck() -> None:
    positional, fields = make_batch(12, 31, 8, "cpu")
    hidden, weight, token_ids, old_logprobs, advantages = positional
    loss_options = make_loss_options(beta=0.1, entropy_coef=0.01).op_arguments()
    arguments = (
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.randn(31).requires_grad_(),
        token_ids,
        torch.linspace(0.5, 1.5, 12),
        fields["loss_mask"],
        old_logprobs,
        advantages,
        torch.full((12,), 0.1),
        fields["ref_logprobs"],
        None,
        1.0,
        20.0,
        0.8,
        True,
        False,
        False,
        *loss_options,
        [True, True, True],
    )
    torch.library.opcheck(_linear_grpo, arguments)


@pytest.mark.parametrize("variant", ["paper", "gspo"])
def test_compiles_whole_and_once(variant) -> None:
    def loss(hidden, weight, *rest, **fields):
        return linear_grpo_loss(hidden * 1.5, weight, *rest, **fields, **VARIANTS[variant])[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_tokens in (9, 16, 31):
            positional, fields = make_batch(num_tokens, 101, 8, "cpu")
            hidden, weight, *rest = positional
            for tensor in (*rest, *(f for name, f in fields.items() if name != "cu_seqlens")):
                torch._dynamo.mark_dynamic(tensor, 0)
            mine = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
            eager = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
            torch._dynamo.mark_dynamic(mine[0], 0)
            compiled(*mine, *rest, **fields).backward()
            loss(*eager, *rest, **fields).backward()
            for ours, expected in zip(mine, eager, strict=True):
                torch.testing.assert_close(ours.grad, expected.grad)
