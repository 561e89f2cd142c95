"""linear_logprobs where it does less work: frozen head, kept probabilities, compacted rows."""

from __future__ import annotations

import importlib

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
from grpo_engine.kernels.common import interpreting, use_triton
from grpo_engine.kernels.linear_logprobs_unit import _frozen, _keep, _keep_backward_op, unit_grads
from grpo_engine.kernels.vocab_rows import LogitOptions

CHUNKS = importlib.import_module("grpo_engine.kernels.head_chunks")
PASS = importlib.import_module("grpo_engine.kernels.head_pass")

# The ways to a gradient of the log-probabilities alone
PATHS = {
    "recompute": {"needs": "hidden weight bias"},
    "frozen": {"needs": "hidden"},
    "keep": {"needs": "hidden weight bias", "keep_probs": True},
    "keep-frozen": {"needs": "hidden", "keep_probs": True},
    "keep-head": {"needs": "weight bias", "keep_probs": True},
}
COMPACT = {"masked": None, "always": True, "never": False}


def some_rows(num_rows, device):
    """Rows with a gradient: neither all, nor a block of them."""
    return torch.arange(num_rows, device=device) % 4 != 2


# ---- Accuracy ------------------------------------------------------------------------------------


def check_path(path, shape, dtype, device, **options) -> None:
    hidden, weight, bias, token_ids = make_head(*shape, device)
    options = {**PATHS[path], "returns": "logprobs", **options}
    check_three_ways(hidden, weight, None, token_ids, dtype, **options)
    live = some_rows(shape[0], device) if shape[0] > 1 else None
    everything = {**options, **all_options(shape[0], device), "live": live}
    _, grads = check_three_ways(hidden, weight, bias, token_ids, dtype, **everything)
    if "hidden" in PATHS[path]["needs"] and live is not None:
        assert (grads[0][~(live & everything["row_mask"])] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 53, 16), (7, 1009, 33), (150, 4999, 24)])
@pytest.mark.parametrize("path", PATHS)
def test_three_way_accuracy(path, shape, dtype, device) -> None:
    check_path(path, shape, dtype, device)


@pytest.mark.parametrize("path", ["frozen", "keep"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_real_vocabulary(path, dtype, device) -> None:
    check_path(path, (3, 131071, 16), dtype, device)


@pytest.mark.triton
@pytest.mark.parametrize("compact", COMPACT)
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_three_way_accuracy_triton(path, dtype, compact, device) -> None:
    check_path(path, (7, 301, 24), dtype, device, compact_rows=COMPACT[compact])


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("compact", COMPACT)
def test_entropy_and_lse_triton(compact, dtype, device) -> None:
    hidden, weight, bias, token_ids = make_head(9, 301, 24, device)
    options = {**all_options(9, device), "live": some_rows(9, device)}
    check_three_ways(
        hidden, weight, bias, token_ids, dtype, compact_rows=COMPACT[compact], **options
    )


def check_confident_tokens(path, dtype, device) -> None:
    """Tokens with 1 - p from 1e-2 down to 1e-7 keep their gradient's direction, row by row; in fp16
    too, whose smallest number is 6e-8."""
    hidden, weight, _, token_ids = make_head(6, 301, 32, device, spread=1.0)
    token_ids = torch.arange(6, device=device) * 7
    hidden[:, :6], weight[:, :6] = 0.0, 0.0
    hidden[range(6), range(6)] = torch.linspace(10.0, 22.0, 6, device=device) / 4
    weight[token_ids, torch.arange(6, device=device)] = 4.0
    hidden, weight, keep = hidden.to(dtype), weight.to(dtype), path == "keep-frozen"

    def gradient(op, dtype, **options):
        leaf = hidden.to(dtype).requires_grad_()
        logprobs = op(leaf, weight.to(dtype), token_ids, **options)
        weights = -1.0 / torch.expm1(logprobs.detach())  # or fp16 could not hold d hidden
        return logprobs.detach(), torch.autograd.grad((weights * logprobs).sum(), leaf)[0]

    logprobs, grad = gradient(linear_logprobs, dtype, keep_probs=keep)
    _, truth = gradient(linear_logprobs_ref, torch.float64)
    assert -2e-7 < logprobs.max() < 0 and logprobs.min() < -5e-3
    error = (grad.double() - truth).norm(dim=1) / truth.norm(dim=1)
    assert error.max() <= max(torch.finfo(dtype).eps, 1e-5), error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["frozen", "keep-frozen"])
def test_confident_tokens(path, dtype, device) -> None:
    check_confident_tokens(path, dtype, device)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("path", ["frozen", "keep-frozen"])
def test_confident_tokens_triton(path, dtype, device) -> None:
    check_confident_tokens(path, dtype, device)


def test_unit_grads_use_the_range_of_fp16() -> None:
    logprobs = torch.tensor([-1e-30, -1e-6, -0.7, -30.0, 0.0, torch.nan, -torch.inf])
    options = LogitOptions(row_temperature=torch.tensor([1.0, 0.5, 1.0, 2.0, 1.0, 1.0, 0.01]))
    unit = unit_grads(logprobs, options, torch.float16)
    largest = unit * -torch.expm1(logprobs) / options.row_temperature
    assert ((largest[[0, 1, 2, 3, 6]] > 0.5) & (largest[[0, 1, 2, 3, 6]] <= 1.0)).all()
    assert unit[4] == 1 and unit[5] == 0 and (unit.log2()[:5] % 1 == 0).all()
    assert unit_grads(logprobs, options, torch.bfloat16).tolist() == [1, 1, 1, 1, 1, 0, 1]


# ---- Against the path that makes the logits again ------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_is_as_exact_as_recomputing(dtype, device) -> None:
    """The error of d hidden against fp64, on the same inputs. Asking for the entropy too makes the
    op recompute."""
    hidden, weight, _, token_ids = make_head(96, 4999, 64, device)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    errors = {}
    inputs = {"needs": "hidden", "returns": "logprobs"}
    _, (truth,) = run(linear_logprobs_ref, hidden, weight, token_ids, dtype=torch.float64, **inputs)
    for name, needs in (("frozen", "hidden"), ("recompute", "hidden weight")):
        _, grads = run(linear_logprobs, hidden, weight, token_ids, **{**inputs, "needs": needs})
        errors[name] = (grads[0].double() - truth).norm() / truth.norm()
    assert errors["frozen"] <= 1.02 * errors["recompute"], errors


# ---- Rows without gradient -----------------------------------------------------------------------


def check_dead_rows_may_hold_anything(path, compact, device) -> None:
    """Rows whose gradient is 0, or masked, with NaN and inf in them: nothing of it anywhere."""
    hidden, weight, bias, token_ids = make_head(10, 57, 8, device)
    live = some_rows(10, device)
    mask = torch.arange(10, device=device) != 5
    options = {**PATHS[path], "returns": "logprobs", "live": live, "row_mask": mask}
    options["compact_rows"] = compact
    clean_outputs, clean = run(linear_logprobs, hidden, weight, token_ids, bias, **options)
    dead = ~(live & mask)
    hidden[dead] = torch.nan
    hidden[2, 3], hidden[5, 0] = torch.inf, -torch.inf
    outputs, grads = run(linear_logprobs, hidden, weight, token_ids, bias, **options)
    assert torch.equal(outputs[0][~dead], clean_outputs[0][~dead])
    assert (outputs[0][~mask] == 0).all() and outputs[0][live.logical_not() & mask].isnan().all()
    for got, expected in zip(grads, clean, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("path", PATHS)
def test_dead_rows_may_hold_anything(path, device) -> None:
    if device.type == "cuda" and path == "recompute":
        pytest.skip("on CUDA with compaction: the next test")
    check_dead_rows_may_hold_anything(path, None, device)


@pytest.mark.triton
@pytest.mark.parametrize("compact", COMPACT)
@pytest.mark.parametrize("path", PATHS)
def test_dead_rows_may_hold_anything_triton(path, compact, device) -> None:
    if path == "recompute" and compact == "never":
        pytest.skip("every row enters the GEMMs: 0 * NaN, as in torch")
    check_dead_rows_may_hold_anything(path, COMPACT[compact], device)


def check_a_live_nan_stays_a_nan(path, compact, device) -> None:
    """A row that is NaN and has a gradient: NaN in its d hidden and all of d weight, not 0."""
    hidden, weight, _, token_ids = make_head(6, 57, 8, device)
    hidden[2] = torch.nan
    options = {**PATHS[path], "returns": "logprobs", "compact_rows": compact}
    outputs, grads = run(linear_logprobs, hidden, weight, token_ids, **options)
    assert outputs[0].isnan().tolist() == [False, False, True, False, False, False]
    grads = dict(zip(PATHS[path]["needs"].split(), grads, strict=False))
    if "hidden" in grads:
        assert grads["hidden"].isnan().all(1).tolist() == outputs[0].isnan().tolist()
    if "weight" in grads:
        assert grads["weight"].isnan().all()


@pytest.mark.parametrize("path", PATHS)
def test_a_live_nan_stays_a_nan(path, device) -> None:
    check_a_live_nan_stays_a_nan(path, None, device)


@pytest.mark.triton
@pytest.mark.parametrize("compact", ["always", "never"])
@pytest.mark.parametrize("path", PATHS)
def test_a_live_nan_stays_a_nan_triton(path, compact, device) -> None:
    check_a_live_nan_stays_a_nan(path, COMPACT[compact], device)


def check_nothing_to_do(path, rows, device) -> None:
    hidden, weight, bias, token_ids = make_head(0 if rows == "none" else 5, 57, 8, device)
    none = torch.zeros(len(hidden), dtype=torch.bool, device=device)
    options = {"all masked": {"row_mask": none}, "no gradient": {"live": none}}.get(rows, {})
    options |= {**PATHS[path], "returns": "logprobs"}
    outputs, grads = run(linear_logprobs, hidden, weight, token_ids, bias, **options)
    assert outputs[0].isfinite().all() and (rows == "no gradient" or (outputs[0] == 0).all())
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows", ["none", "all masked", "no gradient"])
def test_nothing_to_do(path, rows, device) -> None:
    check_nothing_to_do(path, rows, device)


@pytest.mark.triton
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows", ["none", "all masked", "no gradient"])
def test_nothing_to_do_triton(path, rows, device) -> None:
    check_nothing_to_do(path, rows, device)


# ---- Chunks, work and memory ---------------------------------------------------------------------


@pytest.mark.triton
@pytest.mark.parametrize("compact", COMPACT)
@pytest.mark.parametrize("path", PATHS)
def test_chunks_change_nothing_triton(path, compact, device, monkeypatch) -> None:
    """21 rows at once, and 4 at a time: the live rows of one chunk end up in several."""
    hidden, weight, bias, token_ids = make_head(21, 57, 16, device)
    options = {**PATHS[path], **all_options(21, device), "live": some_rows(21, device)}
    options |= {"returns": "logprobs", "compact_rows": COMPACT[compact]}
    monkeypatch.setattr(CHUNKS, "chunk_rows", lambda hidden, vocab: 21)
    whole = run(linear_logprobs, hidden, weight, token_ids, bias, **options)
    monkeypatch.setattr(CHUNKS, "chunk_rows", lambda hidden, vocab: 4)
    unit = importlib.import_module("grpo_engine.kernels.linear_logprobs_unit")
    monkeypatch.setattr(unit, "chunk_rows", lambda hidden, vocab: 4)
    parts = run(linear_logprobs, hidden, weight, token_ids, bias, **options)
    torch.testing.assert_close(parts[0][0], whole[0][0], rtol=0, atol=2e-6)
    for ours, expected in zip(parts[1], whole[1], strict=True):
        assert (ours - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.triton
def test_work_of_the_live_rows_alone(device, monkeypatch) -> None:
    """Every GEMM is told of the live rows, and only of them: their count on the device."""
    counts = {}
    for module, names in (
        (PASS, ("live_logits",)),
        (CHUNKS, ("live_grad_hidden", "live_add_grad_weight")),
    ):
        for name in names:
            call = getattr(module, name)

            def counted(*arguments, call=call, name=name, **keywords):
                live = next(a for a in arguments if isinstance(a, PASS.LiveRows))
                counts.setdefault(name, []).append((int(live.count), live.index.tolist()))
                return call(*arguments, **keywords)

            monkeypatch.setattr(module, name, counted)
        monkeypatch.setattr(module, "raw_logits", None)
    monkeypatch.setattr(CHUNKS, "wide_mm", None)
    monkeypatch.setattr(CHUNKS, "add_wide_mm", None)
    hidden, weight, _, token_ids = make_head(9, 57, 16, device)
    mask, live = torch.arange(9, device=device) != 4, some_rows(9, device)
    options = {"returns": "logprobs", "row_mask": mask, "live": live}
    run(linear_logprobs, hidden, weight, token_ids, **options, needs="hidden weight")
    forward, backward = (8, [0, 1, 2, 3, 5, 6, 7, 8, 0]), (6, [0, 1, 3, 5, 7, 8, 0, 0, 0])
    assert counts == {
        "live_logits": [forward, backward],
        "live_grad_hidden": [backward],
        "live_add_grad_weight": [backward],
    }
    counts.clear()
    run(linear_logprobs, hidden, weight, token_ids, **options, **PATHS["keep"])
    assert counts == {
        "live_logits": [forward],
        "live_grad_hidden": [backward],
        "live_add_grad_weight": [backward],
    }
    counts.clear()
    run(linear_logprobs, hidden, weight, token_ids, **options, needs="hidden")
    assert counts == {"live_logits": [forward], "live_grad_hidden": [forward]}


@pytest.mark.skipif(interpreting(), reason="counts the products of the portable path")
def test_number_of_matrix_products() -> None:
    """Frozen head: two, both in forward. Kept probabilities: three, one of them in forward."""
    hidden, weight, _, token_ids = make_head(50, 301, 16, "cpu")

    def products(path, live=None, **more):
        options = {**PATHS[path], "returns": "logprobs", "live": live, **more}
        return profile_call(lambda: run(linear_logprobs, hidden, weight, token_ids, **options))[1]

    none = torch.zeros(50, dtype=torch.bool)
    assert products("recompute") == 4 and products("recompute", live=none) == 1
    assert products("frozen") == 2 and products("frozen", live=none) == 2
    assert products("keep") == 3 and products("keep", live=none) == 1
    assert products("keep-frozen") == 2 and products("keep-head") == 2
    # entropy and lse of a frozen head: no product more, unless a gradient arrives for one of them
    assert products("frozen", returns="logprobs entropy lse") == 4
    hidden.requires_grad_()

    def with_metrics():
        logprobs, entropy, lse = linear_logprobs(
            hidden, weight, token_ids, return_entropy=True, return_lse=True
        )
        return torch.autograd.grad(logprobs.sum() + (entropy + lse).detach().sum(), hidden)

    assert profile_call(with_metrics)[1] == 2
    hidden.requires_grad_(False)
    for path in PATHS:
        assert products(path, row_mask=none) == 0
    with torch.no_grad():
        call = lambda: linear_logprobs(hidden.requires_grad_(), weight, token_ids)  # noqa: E731
        assert profile_call(call)[1] == 1
        call = lambda: linear_logprobs(  # noqa: E731
            hidden.requires_grad_(), weight, token_ids, keep_probs=True, return_entropy=True
        )
        assert profile_call(call)[1] == 1


@pytest.mark.skipif(interpreting(), reason="the interpreter is too slow for this")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_memory(dtype) -> None:
    """A frozen head never holds [N, V]; kept probabilities are one [N, V], on a CPU in fp32."""
    hidden, weight, _, token_ids = make_head(2600, 4001, 8, "cpu")
    inputs = (hidden.to(dtype), weight.to(dtype), token_ids)
    kept = 4 * 2600 * 4001

    def largest(path):
        options = {**PATHS[path], "returns": "logprobs"}
        return profile_call(lambda: run(linear_logprobs, *inputs, **options))[0]

    assert largest("keep") == kept, "the probe sees [N, V]"
    assert largest("frozen") <= kept / 10


# ---- Contracts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", ["return_entropy", "return_lse"])
def test_keep_probs_refuses_other_gradients(extra, device) -> None:
    hidden, weight, _, token_ids = make_head(3, 11, 4, device)
    with pytest.raises(ValueError, match="keep_probs keeps what the gradient of logprobs needs"):
        linear_logprobs(
            hidden.requires_grad_(), weight, token_ids, keep_probs=True, **{extra: True}
        )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_nothing(path, dtype, device) -> None:
    if dtype == torch.bfloat16 and interpreting():
        pytest.skip("Triton's interpreter has no bfloat16")
    hidden, weight, bias, token_ids = make_head(9, 57, 16, device)
    inputs = (hidden.to(dtype), weight.to(dtype), token_ids, bias)
    options = {**PATHS[path], **all_options(9, device), "returns": "logprobs"}
    outputs, grads = run(linear_logprobs, *inputs, **options)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        again, under = run(linear_logprobs, *inputs, **options)
    for expected, got in zip((*outputs, *grads), (*again, *under), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)


def check_two_runs_are_the_same_bits(path, dtype, num_rows, device) -> None:
    hidden, weight, bias, token_ids = make_head(num_rows, 301, 16, device)
    inputs = (hidden.to(dtype), weight.to(dtype), token_ids, bias)
    options = {**PATHS[path], **all_options(num_rows, device), "returns": "logprobs"}
    first, second = (run(linear_logprobs, *inputs, **options) for _ in range(2))
    for expected, got in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_the_same_bits(path, dtype, device) -> None:
    if dtype == torch.bfloat16 and interpreting():
        pytest.skip("Triton's interpreter has no bfloat16")
    check_two_runs_are_the_same_bits(path, dtype, 150, device)


@pytest.mark.triton
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_two_runs_are_the_same_bits_triton(path, dtype, device) -> None:
    check_two_runs_are_the_same_bits(path, dtype, 9, device)


@pytest.mark.parametrize("path", ["frozen", "keep"])
def test_backward_twice_and_in_parts(path, device) -> None:
    """What is kept is not used up: other gradients of the same forward pass come out right."""
    hidden, weight, _, token_ids = make_head(9, 57, 16, device)
    hidden.requires_grad_()
    weight.requires_grad_(path == "keep")
    leaves = (hidden, weight) if path == "keep" else (hidden,)
    logprobs = linear_logprobs(hidden, weight, token_ids, keep_probs=path == "keep")
    whole = torch.autograd.grad(logprobs.sum(), leaves, retain_graph=True)
    even = torch.arange(9, device=device) % 2 == 0
    first = torch.autograd.grad(logprobs[even].sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(logprobs[~even].sum(), leaves)
    for total, a, b in zip(whole, first, second, strict=True):
        torch.testing.assert_close(a + b, total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", ["frozen", "keep"])
def test_a_second_derivative_is_an_error(path, device) -> None:
    hidden, weight, _, token_ids = make_head(3, 11, 4, device)
    logprobs = linear_logprobs(
        hidden.requires_grad_(), weight, token_ids, keep_probs=path == "keep"
    )
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(logprobs.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("options", ["none", "all"])
@pytest.mark.parametrize("compact", [False, True])
def test_opcheck(options, compact, device) -> None:
    hidden, weight, bias, token_ids = make_head(4, 37, 8, device)
    per_row, mask, cap = None, None, None
    if options == "all":
        per_row = all_options(4, device)["temperature"]
        mask, cap = all_options(4, device)["row_mask"], 20.0
        if compact and use_triton(hidden):  # A of rows left out is memory that nobody wrote
            mask = torch.ones_like(mask)
    else:
        bias = None
    scalars = (0.9, cap, 0.8, compact, False)
    tensors = (hidden.requires_grad_(), weight, bias, token_ids, per_row, mask)
    for want_entropy, want_lse in ((False, False), (True, True)):
        torch.library.opcheck(_frozen, (*tensors, *scalars, want_entropy, want_lse))
    weight.requires_grad_()
    torch.library.opcheck(_keep, (*tensors, *scalars))
    with torch.no_grad():
        kept = _keep(*tensors, *scalars)
        detached = [t if t is None else t.detach() for t in tensors]
        grad = torch.randn(4, device=device)
        needs = [True, False, bias is not None]
        arguments = (grad, *detached, *kept, 0.9, 0.8, compact, needs)
        torch.library.opcheck(_keep_backward_op, arguments)


@pytest.mark.parametrize("path", ["frozen", "keep"])
def test_compiles_whole_and_once(path) -> None:
    keep = path == "keep"

    def loss(hidden, weight, token_ids, mask):
        options = {"temperature": 0.8, "row_mask": mask, "keep_probs": keep}
        return linear_logprobs(hidden * 1.5, weight, token_ids, **options).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_rows in (5, 8, 33):
            hidden, weight, _, token_ids = make_head(num_rows, 101, 8, "cpu")
            mask = torch.arange(num_rows) % 3 != 0
            mine, eager = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
            heads = [weight.clone().requires_grad_(keep) for _ in range(2)]
            compiled(mine, heads[0], token_ids, mask).backward()
            loss(eager, heads[1], token_ids, mask).backward()
            torch.testing.assert_close(mine.grad, eager.grad)
            if keep:
                torch.testing.assert_close(heads[0].grad, heads[1].grad)
