"""A provider: one way of doing a job, ours or another's, behind one call."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata

import torch
from torch import Tensor

from grpo_engine.bench.cases import Case, Inputs

Outputs = dict[str, Tensor]


def here(device: torch.device) -> str | None:
    """``missing`` of what runs everywhere."""
    return None


@dataclass(frozen=True)
class Provider:
    """``run(inputs, backward)`` gives the outputs that ``inputs["wants"]`` names and, with
    ``backward``, gradients as ``d_<input>``. It raises what its package raises: a changed signature
    is a failure to show, not an absence.

    ``missing(device)`` is one line on why it cannot run there at all, or None. ``cannot`` maps
    features of a case (cases.FEATURES) to why this provider has none of it. ``overwrites`` names
    the inputs that a run destroys; ``prepared`` copies them. ``approximate``: what it leaves out of
    the gradient by design, None for who means to be exact. ``compiles``: seconds go by before the
    first run of every new shape. ``multiples`` of sizes that it needs, such as {"D": 128}.
    """

    name: str
    job: str
    package: str | None  # distribution on PyPI; None: ours or torch's own
    run: Callable[[Inputs, bool], Outputs]
    missing: Callable[[torch.device], str | None] = here
    cannot: Mapping[str, str] = field(default_factory=dict)
    overwrites: tuple[str, ...] = ()
    approximate: str | None = None
    compiles: bool = False
    multiples: Mapping[str, int] = field(default_factory=dict)

    def prepared(self, inputs: Inputs) -> Inputs:
        """Inputs for one run: the same tensors, copies of those that it overwrites."""
        copies = {name: inputs[name].detach().clone() for name in self.overwrites}
        return inputs | {n: t.requires_grad_(inputs[n].requires_grad) for n, t in copies.items()}

    def unsuited(self, case: Case, backward: bool = True) -> str | None:
        """Why this provider cannot do ``case``, in one line, or None."""
        asked = set(case.features) | ({"backward"} if backward else set())
        reasons = [self.cannot[feature] for feature in sorted(asked & set(self.cannot))]
        for axis, multiple in self.multiples.items():
            if case.sizes[axis] % multiple:
                reasons.append(f"needs {axis} in multiples of {multiple}")
        return "; ".join(dict.fromkeys(reasons)) or None

    def version(self) -> str | None:
        try:
            return None if self.package is None else metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None


class Later(Mapping):
    """Outputs worked out when first looked at, so that a clock around the run does not see it."""

    def __init__(self, make: Callable[[], Outputs]) -> None:
        self._make, self._made = make, None

    def _outputs(self) -> Outputs:
        if self._made is None:
            self._made = self._make()
        return self._made

    def __getitem__(self, name: str) -> Tensor:
        return self._outputs()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._outputs())

    def __len__(self) -> int:
        return len(self._outputs())


def installed(module: str, package: str) -> str | None:
    """``missing``'s line where ``module`` cannot be found; nothing is imported."""
    if importlib.util.find_spec(module) is None:
        return f"{package} is not installed"
    return None


def triton_missing(device: torch.device) -> str | None:
    """``missing``'s line of a Triton kernel: no GPU, and not interpreted either."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a CUDA GPU (or TRITON_INTERPRET=1, on tiny shapes)"
    return None


def gradients(outputs: Outputs, inputs: Inputs, names: tuple[str, ...]) -> Outputs:
    """``d_<name>`` for those of ``names`` that are there and require grad: the loss's gradient, or
    of the log-probabilities (and entropy) with the case's incoming gradients."""
    wrt = {n: inputs[n] for n in names if n in inputs and inputs[n].requires_grad}
    if "loss" in outputs:
        roots, incoming = [outputs["loss"]], [None]
    else:
        roots, incoming = [outputs["logprobs"]], [inputs["grad_logprobs"]]
        if "grad_entropy" in inputs:
            roots.append(outputs["entropy"])
            incoming.append(inputs["grad_entropy"])
        incoming = [g.to(root.dtype) for g, root in zip(incoming, roots, strict=True)]
    grads = torch.autograd.grad(roots, list(wrt.values()), incoming)
    return {f"d_{name}": grad for name, grad in zip(wrt, grads, strict=True)}


def finish(
    outputs: Outputs,
    inputs: Inputs,
    backward: bool,
    names: tuple[str, ...],
    rename: Mapping[str, str] | None = None,
) -> Outputs:
    """The outputs without their graph, and with ``backward`` the gradients of ``names``."""
    grads = gradients(outputs, inputs, names) if backward else {}
    rename = rename or {}
    return {rename.get(name, name): value.detach() for name, value in outputs.items()} | grads


def finish_attention(out: Tensor, inputs: Inputs, backward: bool) -> Outputs:
    """``finish`` for the output of an attention."""
    grads: tuple[Tensor, ...] = ()
    if backward:
        grads = torch.autograd.grad(out, [inputs[name] for name in "qkv"], inputs["grad_out"])
    return {"out": out.detach(), **dict(zip(("d_q", "d_k", "d_v"), grads, strict=False))}


HEAD = ("hidden", "weight", "bias")
