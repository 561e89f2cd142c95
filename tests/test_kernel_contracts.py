"""What every kernel promises beside its numbers: autocast changes nothing, a gradient that would be
missing is an error, launches go to the device of their tensors, options may be symbolic."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch

from grpo_engine import kernels
from grpo_engine.kernels import (
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logprobs,
    token_logprobs,
)
from grpo_engine.kernels.common import use_triton

CHUNKS = importlib.import_module("grpo_engine.kernels.head_chunks")
N, V, D = 24, 101, 16


# What other trainers call by name; what an op has beyond is its own.
PROMISED = {
    "token_logprobs": "logits token_ids temperature return_entropy return_lse inplace_backward",
    "linear_logprobs": "hidden weight token_ids bias temperature logit_softcap logit_scale "
    "return_entropy return_lse row_mask tp_group",
    "grpo_loss": "logprobs old_logprobs advantages cu_seqlens loss_mask ref_logprobs "
    "sampler_logprobs entropy loss_type importance_level epsilon epsilon_high delta beta "
    "kl_estimator kl_bias_correction is_correction is_clip entropy_coef max_completion_length "
    "denominator",
    "linear_grpo_loss": "hidden weight token_ids old_logprobs advantages bias temperature row_mask",
    "group_advantages": "rewards group_ids scale ddof eps",
    "pack_rollouts": "sequences fields",
    "plan_batches": "lengths max_tokens num_ranks method equal_counts",
}


@pytest.mark.parametrize("op", PROMISED)
def test_promised_arguments(op: str) -> None:
    """Options are keyword-only, so that one more cannot change what a call means."""
    parameters = inspect.signature(getattr(kernels, op)).parameters
    names = PROMISED[op].split()
    assert [name for name in parameters if name in names] == [n for n in names if n in parameters]
    assert set(names) <= set(parameters)
    options = [p for p in parameters.values() if p.default is not p.empty and p.name != "fields"]
    assert all(p.kind is p.KEYWORD_ONLY for p in options)


@pytest.mark.parametrize("name", [n for n in kernels.__all__ if n.endswith("_ref")])
def test_reference_twins_take_what_the_op_takes(name: str) -> None:
    op, ref = (inspect.signature(getattr(kernels, n)).parameters for n in (name[:-4], name))
    takes_more = any(p.kind is p.VAR_KEYWORD for p in ref.values())
    for parameter in op.values():
        if parameter.name in ref:
            twin = ref[parameter.name]
            assert (twin.kind, twin.default) == (parameter.kind, parameter.default)
        else:
            assert takes_more and parameter.kind in (
                parameter.KEYWORD_ONLY,
                parameter.VAR_KEYWORD,
            ), parameter.name
    named = {p.name for p in ref.values() if p.kind is not p.VAR_KEYWORD}
    assert named <= set(op)


def test_a_batch_that_is_all_masked_is_a_zero_with_a_graph(device) -> None:
    for op in (linear_grpo_loss, kernels.linear_grpo_loss_ref):
        made = make_inputs(torch.float32, device)
        head = (made["hidden"], made["weight"], torch.arange(N, device=device))
        fixed = torch.zeros(N, device=device)
        loss, _, _ = op(*head, fixed, fixed, loss_mask=fixed)
        loss.backward()
        assert loss == 0 and (made["hidden"].grad == 0).all() and (made["weight"].grad == 0).all()


def make_inputs(dtype: torch.dtype, device: torch.device) -> dict:
    g = torch.Generator().manual_seed(3)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(device)

    made = {
        "logits": normal(N, V, scale=3.0).to(dtype),
        "hidden": normal(N, D).to(dtype),
        "weight": normal(V, D, scale=0.7).to(dtype),
        "bias": normal(V).to(dtype),
        "logprobs": normal(N).abs().neg(),
        "entropy": normal(N).abs(),
    }
    made = {name: tensor.requires_grad_() for name, tensor in made.items()}
    return made | {
        "token_ids": torch.randint(0, V, (N,), generator=g).to(device),
        "old_logprobs": normal(N).abs().neg(),
        "advantages": normal(N),
        "rewards": normal(N),
        "fields": {
            "ref_logprobs": normal(N).abs().neg(),
            "sampler_logprobs": normal(N).abs().neg(),
            "loss_mask": (torch.arange(N) % 5 != 2).to(device),
            "cu_seqlens": torch.tensor([0, 9, 9, N]).to(device),
        },
    }


LOSS = {"beta": 0.1, "kl_bias_correction": True, "entropy_coef": 0.02}


def _token_logprobs(x):
    outputs = token_logprobs(x["logits"], x["token_ids"], return_entropy=True, return_lse=True)
    return outputs, ("logits",)


def _linear_logprobs(x):
    head = (x["hidden"], x["weight"], x["token_ids"])
    mask = x["fields"]["loss_mask"]
    outputs = linear_logprobs(*head, bias=x["bias"], return_entropy=True, row_mask=mask)
    return outputs, ("hidden", "weight", "bias")


def _grpo_loss(x, **options):
    positional = (x["logprobs"], x["old_logprobs"], x["advantages"])
    loss, metrics = grpo_loss(*positional, **x["fields"], entropy=x["entropy"], **LOSS, **options)
    return (loss, metrics.sums), ("logprobs", "entropy")


def _linear_grpo_loss(x, **options):
    head = (x["hidden"], x["weight"], x["token_ids"], x["old_logprobs"], x["advantages"])
    loss, metrics, logprobs = linear_grpo_loss(
        *head, bias=x["bias"], **x["fields"], **LOSS, **options
    )
    return (loss, metrics.sums, logprobs), ("hidden", "weight", "bias")


OPS = {
    "token_logprobs": _token_logprobs,
    "linear_logprobs": _linear_logprobs,
    "grpo_loss": _grpo_loss,
    "grpo_loss-gspo": lambda x: _grpo_loss(x, loss_type="gspo"),
    "linear_grpo_loss": _linear_grpo_loss,
    "linear_grpo_loss-gspo": lambda x: _linear_grpo_loss(x, loss_type="gspo"),
}


def outputs_and_gradients(op: str, x: dict) -> list[torch.Tensor]:
    outputs, leaves = OPS[op](x)
    active = [output for output in outputs if output.requires_grad]
    ones = [torch.ones_like(output) for output in active]
    grads = torch.autograd.grad(active, [x[name] for name in leaves], ones)
    return [*outputs, *grads]


def check_autocast(op: str, dtype: torch.dtype, device: torch.device) -> None:
    x = make_inputs(dtype, device)
    plain = outputs_and_gradients(op, x)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        under = outputs_and_gradients(op, x)
    for expected, got in zip(plain, under, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_nothing(op: str, dtype: torch.dtype, device) -> None:
    """Forward and backward, bit for bit."""
    if (
        dtype == torch.bfloat16
        and use_triton(torch.ones(1, device=device))
        and device.type == "cpu"
    ):
        pytest.skip("Triton's interpreter has no bfloat16")
    check_autocast(op, dtype, device)


@pytest.mark.triton
@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_nothing_triton(op: str, device) -> None:
    check_autocast(op, torch.float16, device)


@pytest.mark.parametrize("group", [6, "ids"])
def test_autocast_changes_no_advantage(group, device) -> None:
    x = make_inputs(torch.float32, device)
    ids = x["token_ids"] % 4 if group == "ids" else group
    plain = group_advantages(x["rewards"], ids)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        under = group_advantages(x["rewards"], ids)
    assert under.dtype == torch.float32 and torch.equal(plain, under)


@pytest.mark.parametrize("op", OPS)
def test_a_second_derivative_is_an_error(op: str, device) -> None:
    x = make_inputs(torch.float32, device)
    outputs, leaves = OPS[op](x)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(outputs[0].sum(), x[leaves[0]], create_graph=True)


GRADLESS = ("old_logprobs", "ref_logprobs", "sampler_logprobs", "advantages", "loss_mask")


@pytest.mark.parametrize("op", ["grpo_loss", "linear_grpo_loss", "linear_grpo_loss-gspo"])
@pytest.mark.parametrize("name", [*GRADLESS, "denominator"])
def test_an_input_whose_gradient_would_be_missing_is_an_error(name: str, op: str, device) -> None:
    x = make_inputs(torch.float32, device)
    where = x if name in x else x["fields"]
    value = torch.ones((), device=device) if name == "denominator" else where[name].float()
    where[name] = value.requires_grad_()
    with pytest.raises(ValueError, match=rf"{name} requires grad.*{name}\.detach\(\)"):
        OPS[op](x)
    with torch.no_grad():
        OPS[op](x)


@pytest.mark.triton
def test_launches_go_to_the_device_of_their_tensors(monkeypatch, device) -> None:
    """Triton launches on the current device: every launch happens inside torch.cuda.device_of."""
    inside, launched, device_of = [], set(), torch.cuda.device_of

    @contextlib.contextmanager
    def recorded(tensor):
        with device_of(tensor):
            inside.append(tensor.device)
            yield
            inside.pop()

    class Kernel:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            assert inside, f"{self.name} is launched on whatever device is current"
            launched.add(self.name)
            return self.kernel[grid]

    kernels = {
        "grpo_loss_triton": ("_token_kernel", "_sequence_kernel", "_sequence_weights_kernel"),
        "vocab_rows": ("_fold_rows_kernel", "_dlogits_rows_kernel"),
    }
    monkeypatch.setattr(torch.cuda, "device_of", recorded)
    for room, names in kernels.items():
        module = importlib.import_module(f"grpo_engine.kernels.{room}")
        for name in names:
            monkeypatch.setattr(module, name, Kernel(name, getattr(module, name)))
    for op in OPS:
        outputs_and_gradients(op, make_inputs(torch.float32, device))
    assert launched == {name for names in kernels.values() for name in names}


@pytest.mark.parametrize("op", ["grpo_loss", "linear_grpo_loss"])
def test_options_may_be_symbolic(op: str) -> None:
    """Options that reach torch.compile(dynamic=True) in a dict are SymFloats in its graph."""

    def loss(x, options):
        return OPS[op](x, **options)[0][0]

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    for epsilon, denominator in ((0.1, 7.0), (0.2, 8.5), (0.3, 9.5)):
        x = make_inputs(torch.float32, torch.device("cpu"))
        options = {"epsilon": epsilon, "delta": 3.5, "is_clip": (0.5, 1.5)}
        options |= {"denominator": denominator, "is_correction": "token_mask"}
        torch.testing.assert_close(compiled(x, options), loss(x, options))


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("takes_half", [True, False])
def test_d_weight_without_the_newest_addmm(takes_half: bool, monkeypatch) -> None:
    """torch 2.9 refuses addmm of half matrices into fp32: the product is made, then added."""
    calls = []

    def mm(a, b, *, out_dtype):
        calls.append("mm")
        return a.as_subclass(torch.Tensor).to(out_dtype) @ b.as_subclass(torch.Tensor).to(out_dtype)

    def addmm(total, a, b, *, out_dtype, out):
        calls.append("addmm")
        product = a.as_subclass(torch.Tensor).to(out_dtype) @ b.to(out_dtype)
        return out.copy_(total + product)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(CHUNKS, "ADDMM_TAKES_HALF", takes_half)
    a, b = torch.randn(5, 3).half().as_subclass(OnCuda), torch.randn(3, 4).half()
    total = torch.ones(5, 4)
    CHUNKS.add_half_mm(total, a, b)
    torch.testing.assert_close(total, 1 + a.as_subclass(torch.Tensor).float() @ b.float())
    assert calls == (["addmm"] if takes_half else ["mm"])


def test_half_precision_on_an_old_gpu(monkeypatch) -> None:
    monkeypatch.setattr(CHUNKS, "device_arch", lambda index: 75)
    hidden = SimpleNamespace(is_cuda=True, dtype=torch.float16, device=torch.device("cuda:1"))
    with pytest.raises(ValueError, match=r"hidden is torch.float16.*8\.0; cuda:1 has 7\.5"):
        CHUNKS.check_half_gemm(hidden)
    hidden.dtype = torch.float32
    CHUNKS.check_half_gemm(hidden)
