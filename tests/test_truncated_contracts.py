"""What log-probabilities over a kept set promise beside their numbers: memory, work, the loss on
top, what is refused, operators that compile."""

from __future__ import annotations

import importlib

import pytest
import torch
from head_cases import all_options, make_head, profile_call, run
from truncated_cases import FORMS, in_form, make_kept

from grpo_engine.kernels import (
    grpo_loss,
    linear_grpo_loss,
    linear_grpo_loss_ref,
    linear_logprobs,
    linear_logprobs_ref,
)
from grpo_engine.kernels.truncated import _truncated_logprobs, _truncated_logprobs_backward
from grpo_engine.kernels.truncated_mask import kept_bits, kept_mask

CHUNKS = importlib.import_module("grpo_engine.kernels.head_chunks")


def test_chunks_of_a_mask_change_nothing(monkeypatch) -> None:
    hidden, weight, bias, token_ids = make_head(193, 301, 24, "cpu")
    options = {"kept": kept_mask(make_kept(token_ids, 301, 20), 301), **all_options(193, "cpu")}
    whole = run(linear_logprobs, hidden, weight, token_ids, bias, **options)
    monkeypatch.setattr(CHUNKS, "CPU_CHUNK_ROWS", (16, 16))
    chunked = run(linear_logprobs, hidden, weight, token_ids, bias, **options)
    for ours, expected in zip((*chunked[0], *chunked[1]), (*whole[0], *whole[1]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("form", ("ids", "bits"))
def test_logits_are_never_whole(form) -> None:
    hidden, weight, _, token_ids = make_head(2000, 4001, 16, "cpu")
    kept = in_form(make_kept(token_ids, 4001, 20), 4001, form)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())

    def call(op):
        outputs = op(*leaves, token_ids, kept=kept, return_entropy=True, return_lse=True)
        sum(output.sum() for output in outputs).backward()

    full = 4 * 2000 * 4001
    assert profile_call(lambda: call(linear_logprobs_ref))[0] >= full
    assert profile_call(lambda: call(linear_logprobs))[0] <= full / 7


def test_kept_ids_take_no_product_of_the_whole_head() -> None:
    hidden, weight, _, token_ids = make_head(50, 301, 16, "cpu")
    kept = make_kept(token_ids, 301, 4)
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.profiler.profile() as profile:
        linear_logprobs(hidden, weight, token_ids, kept=kept).sum().backward()
    names = {event.name for event in profile.events()}
    assert "aten::bmm" in names, "the probe sees products"
    assert not names & {"aten::mm", "aten::addmm", "aten::addmm_"}


# ---- linear_grpo_loss ----------------------------------------------------------------------------


def loss_inputs(logprobs):
    num_rows, device = len(logprobs), logprobs.device
    g = torch.Generator().manual_seed(2)

    def normal():
        return torch.randn(num_rows, generator=g).to(device)

    return {
        "old_logprobs": logprobs + 0.2 * normal(),
        "ref_logprobs": logprobs + 0.2 * normal(),
        "advantages": normal(),
        "loss_mask": torch.arange(num_rows, device=device) % 5 != 2,
        "cu_seqlens": torch.tensor([0, 4, 4, num_rows], device=device),
        "beta": 0.1,
        "entropy_coef": 0.02,
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "gspo"])
def test_grpo_loss(loss_type, form, device) -> None:
    """linear_logprobs over the kept set, then grpo_loss; and the reference's."""
    hidden, weight, bias, token_ids = make_head(12, 101, 16, device)
    kept = in_form(make_kept(token_ids, 101, 9), 101, form)
    head = {"bias": bias, "temperature": 0.8, "kept": kept}
    loss_options = loss_inputs(linear_logprobs(hidden, weight, token_ids, **head))
    loss_options["loss_type"] = loss_type

    def grads_of(call):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        loss, metrics, logprobs = call(*leaves)
        return loss.detach(), metrics, logprobs, *torch.autograd.grad(loss, leaves)

    def by_hand(hidden, weight):
        mask = loss_options["loss_mask"]
        logprobs, entropy = linear_logprobs(
            hidden, weight, token_ids, return_entropy=True, row_mask=mask, **head
        )
        loss, metrics = grpo_loss(logprobs, entropy=entropy, **loss_options)
        return loss, metrics, logprobs.detach()

    ours = grads_of(lambda h, w: linear_grpo_loss(h, w, token_ids, **head, **loss_options))
    ref = grads_of(lambda h, w: linear_grpo_loss_ref(h, w, token_ids, **head, **loss_options))
    for (loss, metrics, *tensors), exactly in ((grads_of(by_hand), True), (ref, False)):
        atol = 0.0 if exactly else 1e-5
        torch.testing.assert_close(ours[0], loss, rtol=0, atol=atol)
        assert ours[1].to_dict() == pytest.approx(metrics.to_dict(), abs=1e-4)
        for mine, expected in zip(ours[2:], tensors, strict=True):
            torch.testing.assert_close(mine, expected, rtol=0, atol=atol)


def test_the_samplers_own_logprobs_give_ratio_one(device) -> None:
    """What this is for: with the sampler's kept sets the ratio of unchanged weights is 1, over the
    whole vocabulary it is the kept mass."""
    hidden, weight, _, token_ids = make_head(40, 101, 16, device)
    ids = make_kept(token_ids, 101, 9)
    p = torch.softmax(hidden @ weight.T, -1)
    mass = (p * kept_mask(ids, 101)).sum(-1)
    sampler = (p.gather(1, token_ids[:, None])[:, 0] / mass).log()
    over_kept = linear_logprobs(hidden, weight, token_ids, kept=ids)
    over_all = linear_logprobs(hidden, weight, token_ids)
    torch.testing.assert_close(
        (over_kept - sampler).exp(), torch.ones_like(mass), rtol=0, atol=1e-5
    )
    torch.testing.assert_close((over_all - sampler).exp(), mass, rtol=1e-4, atol=1e-6)
    assert (mass < 0.9).any()


# ---- Refusals ------------------------------------------------------------------------------------

HEAD = {
    "hidden": torch.zeros(3, 4),
    "weight": torch.zeros(9, 4),
    "token_ids": torch.tensor([0, 1, 4]),
}
KEPT = torch.tensor([[0, -1], [2, 1], [4, 3]])


def with_row(row, values):
    kept = KEPT.clone()
    kept[row] = torch.tensor(values)
    return kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kept": [[0], [1], [4]]}, "kept must be a tensor, got list"),
        ({"kept": KEPT.float()}, r"kept must be ids \[N, K\] int32 or int64, .* got torch.float32"),
        ({"kept": KEPT[:2]}, r"must have shape \[3, K\] with K > 0, got \[2, 2\]"),
        ({"kept": KEPT[:, :0]}, r"must have shape \[3, K\] with K > 0, got \[3, 0\]"),
        ({"kept": KEPT[0]}, r"must have shape \[3, K\] with K > 0, got \[2\]"),
        ({"kept": torch.ones(3, 8).bool()}, r"torch.bool must have shape \[3, 9\]"),
        ({"kept": torch.ones(3, 9).byte()}, r"torch.uint8 must have shape \[3, 2\]"),
        ({"kept": KEPT.to("meta")}, "kept is on meta, expected cpu"),
        (
            {"kept": with_row(1, [2, 3])},
            r"kept\[1\] is without .* entry: \[2, 3\], token 1",
        ),
        ({"kept": with_row(1, [-1, -1])}, r"kept\[1\] is without the row's token_ids entry"),
        ({"kept": with_row(2, [4, 9])}, r"kept\[2\] has an id out of \[0, 9\): \[4, 9\]"),
        ({"kept": with_row(2, [4, 2**40])}, r"kept\[2\] has an id out of \[0, 9\)"),
        ({"kept": with_row(2, [4, 4])}, r"kept\[2\] has an id twice: \[4, 4\]"),
        ({"kept": kept_mask(with_row(1, [2, 3]), 9)}, r"kept\[1\] is without .* entry, 1"),
        ({"kept": kept_bits(kept_mask(with_row(2, [2, 3]), 9))}, r"kept\[2\] is without .*, 4"),
        ({"kept": KEPT, "token_ids": torch.tensor([0, 1, 9])}, r"token_ids must be in \[0, 9\)"),
        ({"kept": KEPT, "temperature": torch.tensor([1.0, 0.0, 1.0])}, "temperature must be > 0"),
        ({"kept": KEPT, "keep_probs": True}, "keep_probs"),
        ({"kept": KEPT, "compact_rows": True}, "compact_rows"),
        ({"kept": KEPT, "batch_invariant": True}, "batch_invariant"),
        ({"kept": KEPT, "tp_group": object()}, "tp_group"),
    ],
)
def test_bad_input(options, message) -> None:
    arguments = HEAD | options
    head = [arguments.pop(name) for name in ("hidden", "weight", "token_ids")]
    for tensor in head[:2]:
        tensor.requires_grad_()
    with pytest.raises(ValueError, match=message):
        linear_logprobs(*head, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_token_outside_its_kept_set_is_nan_on_cuda(form) -> None:
    hidden, weight, _, token_ids = make_head(5, 40, 8, "cuda")
    kept = in_form(make_kept(token_ids, 40, 6), 40, form)
    token_ids[2] = next(v for v in range(40) if not kept_mask(kept, 40)[2, v])
    token_ids[3], token_ids[4] = -1, 40
    logprobs = linear_logprobs(hidden, weight, token_ids, kept=kept)
    assert logprobs.isnan().tolist() == [False, False, True, True, True]


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_no_host_sync(form) -> None:
    hidden, weight, bias, token_ids = make_head(40, 101, 16, "cuda")
    kept = in_form(make_kept(token_ids, 101, 9), 101, form)
    options = {"kept": kept, **all_options(40, "cuda")}

    def call():
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        outputs = linear_logprobs(
            *leaves[:2], token_ids, bias=leaves[2], return_entropy=True, **options
        )
        torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])

    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- Operators -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ("ids", "mask", "bits"))
@pytest.mark.parametrize("options", ["none", "all"])
def test_opcheck(options, form) -> None:
    hidden, weight, bias, token_ids = make_head(4, 37, 8, "cpu")
    kept = in_form(make_kept(token_ids, 37, 5), 37, form)
    per_row, mask, cap = None, None, None
    if options == "all":
        per_row = all_options(4, "cpu")["temperature"]
        mask, cap = all_options(4, "cpu")["row_mask"], 20.0
    else:
        bias = None
    leaves = [t if t is None else t.requires_grad_() for t in (hidden, weight, bias)]
    tensors = (*leaves, token_ids, kept, per_row, mask)
    torch.library.opcheck(_truncated_logprobs, (*tensors, 0.9, cap, 0.8, True))
    with torch.no_grad():
        *stats, logits = _truncated_logprobs(*tensors, 0.9, cap, 0.8, True)
        detached = [t if t is None else t.detach() for t in tensors]
        needs = [True, False, bias is not None]
        grads = torch.randn(3, 4).unbind()
        arguments = (*grads, *detached, stats, logits, 0.9, cap, 0.8, needs)
        torch.library.opcheck(_truncated_logprobs_backward, arguments)


@pytest.mark.parametrize("form", ("ids", "bits"))
def test_compiles_whole_and_once(form) -> None:
    def loss(hidden, weight, token_ids, kept):
        logprobs, entropy = linear_logprobs(
            hidden * 1.5, weight, token_ids, temperature=0.8, return_entropy=True, kept=kept
        )
        return (logprobs - 0.1 * entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_rows, num_kept in ((5, 3), (8, 9), (33, 4)):
            hidden, weight, _, token_ids = make_head(num_rows, 101, 8, "cpu")
            kept = in_form(make_kept(token_ids, 101, num_kept), 101, form)
            mine = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
            eagerly = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
            compiled(*mine, token_ids, kept).backward()
            loss(*eagerly, token_ids, kept).backward()
            for ours, expected in zip(mine, eagerly, strict=True):
                torch.testing.assert_close(ours.grad, expected.grad)


def check_autocast(form, device) -> None:
    hidden, weight, bias, token_ids = make_head(9, 101, 16, device)
    kept = in_form(make_kept(token_ids, 101, 9), 101, form)
    plain = run(linear_logprobs, hidden, weight, token_ids, bias, kept=kept)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        under = run(linear_logprobs, hidden, weight, token_ids, bias, kept=kept)
    for ours, expected in zip((*under[0], *under[1]), (*plain[0], *plain[1]), strict=True):
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)


@pytest.mark.parametrize("form", ("ids", "bits"))
def test_autocast_changes_nothing(form, device) -> None:
    check_autocast(form, device)


def test_a_second_derivative_is_an_error(device) -> None:
    hidden, weight, _, token_ids = make_head(5, 40, 8, device)
    hidden.requires_grad_()
    logprobs = linear_logprobs(hidden, weight, token_ids, kept=make_kept(token_ids, 40, 6))
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(logprobs.sum(), hidden, create_graph=True)
