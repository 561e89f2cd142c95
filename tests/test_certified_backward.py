"""The certified sparse backward in linear_grpo_loss: gradients, metrics, options, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from head_cases import TRITON_DTYPES

from grpo_engine.kernels import linear_grpo_loss, linear_grpo_loss_ref
from grpo_engine.kernels.linear_grpo import _linear_grpo
from grpo_engine.kernels.loss_options import make_loss_options


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
        ({"loss_type": "gspo"}, "does not go with importance_level='sequence' or loss_type='gspo'"),
        ({"loss_type": "vespo"}, "sparse_delta=0.01 does not go with loss_type='vespo'"),
        (
            {"is_correction": "sequence_mask", "sampler_logprobs": torch.zeros(12)},
            "does not go with is_correction='sequence_mask'",
        ),
        (
            {"sparse_delta": None, "sparse_max_entries": 8},
            "sparse_max_entries=8 has no meaning without sparse_delta",
        ),
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
