from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

import grpo_engine.kernels as kernels
from grpo_engine import doctor, self_check
from grpo_engine.doctor import covers, run_doctor
from grpo_engine.self_check import check_kernels, relative_error

OPS = (
    "token_logprobs",
    "linear_logprobs",
    "grpo_loss",
    "linear_grpo_loss",
    "group_advantages",
    "pack_rollouts",
    "varlen_attention",
    "plan_batches",
)


def outcomes():
    return {check.kernel: check for check in check_kernels() if check.device == "cpu"}


def run(**options):
    stream = io.StringIO()
    console = Console(file=stream, width=140, force_terminal=options.pop("terminal", False))
    return run_doctor(console=console, **options), stream.getvalue()


def test_every_kernel_passes_and_the_exit_code_is_0():
    code, text = run()
    assert code == 0, text
    lines = [line.split() for line in text.splitlines() if line.startswith(("PASS", "FAIL"))]
    on_cpu = [words for words in lines if words[2] == "cpu"]
    assert sorted(words[1] for words in on_cpu) == sorted(OPS)
    assert {words[0] for words in lines} == {"PASS"}
    assert "error" in text and "allowed 2e-05" in text
    assert f"versions: torch  {torch.__version__}" in text
    if not torch.cuda.is_available():
        assert "devices: no CUDA device" in text
    assert "\x1b[" not in text


def broken_by(kernel, monkeypatch):
    """Make ``kernel`` wrong in a way its users would not notice by looking."""
    op = getattr(kernels, kernel)

    def slightly_off(value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value * 1.001
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return tuple(slightly_off(item) for item in value)
        return value

    def wrong(*args, **options):
        result = op(*args, **options)
        if kernel == "plan_batches":
            result[0][0] = result[0][0][1:]  # one sequence lost
            return result
        if kernel == "pack_rollouts":
            result.token_ids[0] += 1
            return result
        return slightly_off(result)

    monkeypatch.setattr(kernels, kernel, wrong)


@pytest.mark.parametrize("kernel", OPS)
def test_a_wrong_kernel_fails_alone(kernel, monkeypatch):
    broken_by(kernel, monkeypatch)
    checks = outcomes()
    assert not checks[kernel].passed
    assert "is above" in checks[kernel].reason
    assert [name for name, check in checks.items() if not check.passed] == [kernel]


def test_a_wrong_gradient_fails(monkeypatch):
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 2

    op = kernels.token_logprobs
    monkeypatch.setattr(
        kernels,
        "token_logprobs",
        lambda logits, ids, **options: op(Halved.apply(logits), ids, **options),
    )
    check = outcomes()["token_logprobs"]
    assert not check.passed and 0.1 < check.error < 1.0


def test_a_raising_kernel_fails_with_one_line_and_exit_code_1(monkeypatch):
    def explode(*args, **options):
        raise RuntimeError("no such\n  instruction")

    monkeypatch.setattr(kernels, "grpo_loss", explode)
    code, text = run()
    assert code == 1
    (line,) = [line for line in text.splitlines() if line.startswith("FAIL") and "cpu" in line]
    assert "grpo_loss" in line and "RuntimeError: no such instruction" in line
    assert "Traceback" not in text and "FAILED" in text


def test_a_missing_kernel_fails(monkeypatch):
    monkeypatch.delattr(kernels, "varlen_attention")
    check = outcomes()["varlen_attention"]
    assert not check.passed and check.error is None and "AttributeError" in check.reason


def test_nothing_checked_is_no_success(monkeypatch):
    monkeypatch.setattr(doctor, "check_kernels", list)
    assert run()[0] == 1


def test_json_is_one_object_with_everything():
    code, text = run(as_json=True)
    report = json.loads(text)
    assert code == 0 and report["passed"] is True
    assert {check["kernel"] for check in report["checks"]} == set(OPS)
    assert all(check["error"] <= check["tolerance"] for check in report["checks"])
    assert report["versions"]["torch"] == torch.__version__
    assert report["packages"]["vllm"].keys() == {"version", "enables"}
    assert report["hosts"].keys() >= {"trl", "verl", "openrlhf"}
    assert report["hosts"]["slime"] == {
        "version": "-",
        "state": "not installed: github.com/THUDM/slime",
    }
    assert "grpo_engine._C" in report["extension"]


def test_a_missing_extension_is_reported(monkeypatch):
    def refuse(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(doctor.importlib, "import_module", refuse)
    assert doctor.extension() == {
        "grpo_engine._C": "MISSING (ImportError: No module named 'grpo_engine._C')"
    }


def test_terminal_shows_tables(monkeypatch):
    passing = self_check.Check("grpo_loss", "cpu", "float32", "portable", True, 1e-7, 2e-5)
    monkeypatch.setattr(doctor, "check_kernels", lambda: [passing])
    code, text = run(terminal=True)
    assert code == 0 and "\x1b[" in text and "max error" in text and "1.0e-07" in text


def test_relative_error_sees_nan_shape_and_scale():
    one = torch.ones(3)
    assert relative_error([one], [one.double()]) == 0.0
    assert relative_error([one * 200], [one.double() * 100]) == 1.0
    assert relative_error([torch.full((3,), torch.nan)], [one]) == float("inf")
    assert relative_error([torch.ones(2)], [one]) == float("inf")
    assert relative_error([one * 1e-3], [torch.zeros(3)]) > 1.0


@pytest.mark.parametrize(
    ("architectures", "device", "covered"),
    [([80, 90], (9, 0), True), ([80], (8, 6), True), ([90], (8, 0), False), ([86], (8, 0), False)],
)
def test_architecture_cover(architectures, device, covered):
    assert covers(architectures, *device) is covered
