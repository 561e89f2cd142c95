"""What test_vocab_parallel.py runs in every process of a gloo group, and once more unsharded.

A case is data; ``run_case`` runs it on the whole head, on this rank's shard of it, or as a
reference. ``python vocab_parallel_cases.py RANK WORLD FOLDER SUITE`` is one process of the group:
it runs the suite's cases in order, prints each one's name, and leaves the results in
FOLDER/RANK.pt.
"""

from __future__ import annotations

import dataclasses
import sys
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from vocab_parallel_wrong import WRONG_HEAD, WRONG_LOSS

from grpo_engine.kernels import (
    head_chunks,
    linear_grpo_loss,
    linear_grpo_loss_ref,
    linear_logprobs,
    linear_logprobs_ref,
    token_logprobs_ref,
    vocab_parallel,
)

# Longer than any case takes, so that a rank that nobody answers fails instead of waiting for ever.
COLLECTIVE_TIMEOUT = timedelta(seconds=25)


@dataclass(frozen=True)
class Case:
    """One call of an op and of its backward."""

    num_rows: int = 41
    vocab: int = 1009
    width: int = 24
    dtype: torch.dtype = torch.float32
    kind: str = "random"  # of the logits: random | last | confident | negative | banned
    cut: str = "even"  # of the vocabulary: even | tiny
    bias: bool = False
    masked: bool = False
    temperature: str = "one"  # one | float | rows
    frozen: tuple[str, ...] = ()  # of hidden, weight, bias: those that need no gradient
    loss: dict | None = None  # options of linear_grpo_loss; None: the op is linear_logprobs
    micro_batches: int = 1  # calls whose gradients add up
    options: dict = field(default_factory=dict)


def make_case(case: Case) -> dict[str, torch.Tensor | None]:
    """The whole tensors of a case."""
    generator = torch.Generator().manual_seed(case.num_rows * 1000 + case.vocab)
    n, v, d = case.num_rows, case.vocab, case.width
    hidden = torch.randn(n, d, generator=generator)
    weight = torch.randn(v, d, generator=generator) * 3 / d**0.5
    bias = torch.randn(v, generator=generator)
    token_ids = torch.randint(0, v, (n,), generator=generator)
    if case.kind == "last":
        token_ids[:] = v - 1
    if case.kind == "confident":  # the token's logit up to 40 above all others
        lift = torch.linspace(10.0, 40.0, n)[:, None]
        hidden += lift * torch.nn.functional.normalize(weight[token_ids], dim=1) / 3
    if case.kind == "negative":
        hidden = hidden.abs()
        weight = -weight.abs() - 0.5
    if case.kind == "banned":  # a whole shard of the vocabulary, and single tokens of the others
        banned = (torch.arange(v) < v // 4) | (torch.arange(v) % 7 == 3)
        bias = bias.masked_fill(banned, -torch.inf)
        token_ids = torch.arange(v)[~banned][torch.arange(n) * 5 % int((~banned).sum())]
    mask = torch.arange(n) % 3 != 1 if case.masked else None
    if mask is not None:
        token_ids = torch.where(mask, token_ids, -100)
    near = torch.randn(3, n, generator=generator) * 0.3
    return {
        "hidden": hidden.to(case.dtype),
        "weight": weight.to(case.dtype),
        "bias": bias.to(case.dtype) if case.bias else None,
        "token_ids": token_ids,
        "row_mask": mask,
        "row_temperature": torch.linspace(0.6, 1.5, n) if case.temperature == "rows" else None,
        "advantages": torch.randn(n, generator=generator),
        "near": near,
    }


def shard_sizes(case: Case, world: int) -> list[int]:
    """Rows of the head on each rank: even with a remainder, or one row and the rest."""
    small = 1 if case.cut == "tiny" else case.vocab // world
    return [small] * (world - 1) + [case.vocab - small * (world - 1)]


def my_rows(case: Case, group) -> slice:
    if group is None:
        return slice(0, case.vocab)
    sizes = shard_sizes(case, group.size())
    first = sum(sizes[: group.rank()])
    return slice(first, first + sizes[group.rank()])


def eager_linear_logprobs(
    hidden, weight, token_ids, *, bias, temperature, return_entropy, row_mask, tp_group, **options
):
    """What a trainer writes without kernels: the head's GEMM at its dtype, then fp32."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    logits = logits * options.get("logit_scale", 1.0)
    cap = options.get("logit_softcap")
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    ids = token_ids if row_mask is None else token_ids.where(row_mask, 0)
    outputs = token_logprobs_ref(
        logits, ids, temperature=temperature, return_entropy=True, return_lse=True
    )
    if row_mask is not None:
        outputs = tuple(torch.where(row_mask, output, 0.0) for output in outputs)
    return outputs


def run_case(case: Case, group=None, mode: str = "op") -> dict[str, torch.Tensor]:
    """Outputs and gradients; ``mode``: op | ref | truth (the reference in fp64) | eager.

    On a group, weight and bias and their gradients are this rank's rows.
    """
    made = make_case(case)
    wide = torch.float64 if mode == "truth" else None
    leaves = {}
    for name in ("hidden", "weight", "bias"):
        tensor = made[name]
        if tensor is None:
            continue
        rows = slice(None) if name == "hidden" else my_rows(case, group)
        leaf = tensor[rows].to(wide or tensor.dtype).clone()
        leaves[name] = leaf.requires_grad_(name not in case.frozen)
    results: dict[str, torch.Tensor] = {}
    call = _logprobs_call if case.loss is None else _loss_call
    for index in torch.arange(case.num_rows).tensor_split(case.micro_batches):
        outputs, loss = call(case, made, leaves, index, group, mode)
        for name, output in outputs.items():
            results.setdefault(name, []).append(output.detach())
        if loss.requires_grad:
            loss.backward()
    results = {
        name: torch.cat([part.reshape(-1) for part in parts]) for name, parts in results.items()
    }
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            # over no rows the references do not depend on them
            empty = mode != "op" and leaf.grad is None
            results["grad_" + name] = torch.zeros_like(leaf) if empty else leaf.grad
    return results


def _rows(tensor, index, wide=None):
    return None if tensor is None else tensor[index].to(wide or tensor.dtype)


def _logprobs_call(case, made, leaves, index, group, mode):
    ops = {"op": linear_logprobs, "eager": eager_linear_logprobs}
    wide = torch.float64 if mode == "truth" else None
    outputs = ops.get(mode, linear_logprobs_ref)(
        leaves["hidden"][index],
        leaves["weight"],
        made["token_ids"][index],
        bias=leaves.get("bias"),
        temperature=_temperature(case, made, index, wide),
        row_mask=_rows(made["row_mask"], index),
        tp_group=group,
        **{"return_entropy": True, "return_lse": True, **case.options},
    )
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # a third of the upstream gradients is zero
    weights = made["advantages"][index] * (index % 3 != 2)
    loss = sum(
        factor * (weights.roll(shift).to(output) * output).sum()
        for shift, (output, factor) in enumerate(zip(outputs, (1.0, 0.3, 0.2), strict=False))
    )
    names = ["logprobs", "entropy", "lse"]
    return dict(zip(names, outputs, strict=False)), loss


def _temperature(case, made, index, wide=None):
    if case.temperature == "rows":
        return _rows(made["row_temperature"], index, wide)
    return 0.8 if case.temperature == "float" else 1.0


def _loss_call(case, made, leaves, index, group, mode):
    """One micro-batch of two sequences; its old log-probs lie near the whole head's own."""
    op = linear_grpo_loss if mode == "op" else linear_grpo_loss_ref
    wide = torch.float64 if mode == "truth" else None
    with torch.no_grad():
        current = linear_logprobs_ref(
            made["hidden"][index],
            made["weight"],
            made["token_ids"][index],
            bias=made["bias"],
            temperature=_temperature(case, made, index),
            row_mask=_rows(made["row_mask"], index),
        ).float()
    old, ref, sampler = (current + near for near in made["near"][:, index])
    mask = _rows(made["row_mask"], index)
    fields = {"ref_logprobs": ref, "sampler_logprobs": sampler}
    if case.loss.get("on_policy"):
        old = None
    loss, metrics, logprobs = op(
        leaves["hidden"][index],
        leaves["weight"],
        made["token_ids"][index],
        _rows(old, slice(None), wide),
        _rows(made["advantages"], index, wide),
        bias=leaves.get("bias"),
        temperature=_temperature(case, made, index, wide),
        loss_mask=mask,
        cu_seqlens=torch.tensor([0, len(index) // 3, len(index)]),
        tp_group=group,
        **{name: _rows(value, slice(None), wide) for name, value in fields.items()},
        **{name: value for name, value in case.loss.items() if name != "on_policy"},
        **case.options,
    )
    outputs = {"loss": loss, "logprobs": logprobs}
    outputs |= {"metric " + name: torch.tensor(value) for name, value in metrics.to_dict().items()}
    return outputs, loss


# ---- Suites --------------------------------------------------------------------------------------

EVERYTHING = Case(
    bias=True,
    masked=True,
    temperature="rows",
    options={"logit_softcap": 20.0, "logit_scale": 0.8},
)
LOGPROB_CASES = {
    "plain": Case(),
    "only logprobs": Case(options={"return_entropy": False, "return_lse": False}),
    "everything": EVERYTHING,
    "everything, tiny shards": dataclasses.replace(EVERYTHING, cut="tiny"),
    "tiny vocabulary": Case(vocab=5, num_rows=9),
    "token in the last shard": Case(kind="last", temperature="float"),
    "token in the last tiny shards": Case(kind="last", vocab=7, cut="tiny"),
    "confident": Case(kind="confident"),
    "confident, tiny shards": Case(kind="confident", cut="tiny", temperature="rows"),
    "negative": Case(kind="negative"),
    "banned": Case(kind="banned", bias=True),
    "several chunks": Case(num_rows=700, vocab=4999, bias=True, masked=True),
    "several chunks, tiny shards": Case(num_rows=300, vocab=4999, cut="tiny", temperature="float"),
    "no rows": Case(num_rows=0),
    "one row": Case(num_rows=1, temperature="rows"),
    "frozen head": Case(frozen=("weight",)),
    "frozen head, logprobs alone": Case(
        frozen=("weight",), masked=True, options={"return_entropy": False, "return_lse": False}
    ),
    "kept probabilities": Case(
        masked=True,
        bias=True,
        temperature="rows",
        options={"keep_probs": True, "return_entropy": False, "return_lse": False},
    ),
    "kept probabilities, fp16": Case(
        dtype=torch.float16,
        cut="tiny",
        options={"keep_probs": True, "return_entropy": False, "return_lse": False},
    ),
    "batch-invariant": Case(masked=True, bias=True, options={"batch_invariant": True}),
    "frozen hidden": Case(frozen=("hidden",), bias=True),
    "frozen all but the bias": Case(frozen=("hidden", "weight"), bias=True),
    "nothing needs a gradient": Case(frozen=("hidden", "weight")),
    "micro-batches": Case(micro_batches=3, masked=True),
    "bf16": Case(dtype=torch.bfloat16, bias=True),
    "fp16": dataclasses.replace(EVERYTHING, dtype=torch.float16),
}
LOSS_CASES = {
    "grpo": Case(loss={}, temperature="float"),
    "on policy": Case(loss={"on_policy": True}),
    "paper": Case(loss={"epsilon": 10.0, "beta": 0.04}, cut="tiny"),
    "dapo": Case(loss={"loss_type": "dapo", "epsilon_high": 0.28, "delta": 3.0}, masked=True),
    "dr_grpo": Case(loss={"loss_type": "dr_grpo", "max_completion_length": 50}, bias=True),
    "bnpo": Case(loss={"loss_type": "bnpo", "beta": 0.1, "kl_estimator": "k2"}),
    "cispo": Case(loss={"loss_type": "cispo", "is_correction": "token_truncate"}),
    "sapo": Case(loss={"loss_type": "sapo", "beta": 0.1, "kl_bias_correction": True}),
    "entropy": dataclasses.replace(
        EVERYTHING, loss={"entropy_coef": 0.05, "is_correction": "token_mask"}
    ),
    "gspo": Case(loss={"loss_type": "gspo", "epsilon": 3e-3, "entropy_coef": 0.01}, masked=True),
    "sequence_mask": Case(loss={"is_correction": "sequence_mask", "beta": 0.1}),
    "confident loss": Case(loss={}, kind="confident", frozen=("weight",)),
    "loss of several chunks": Case(
        num_rows=700, vocab=4999, loss={"loss_type": "dapo"}, masked=True, micro_batches=2
    ),
    "loss of no rows": Case(num_rows=0, loss={"denominator": 3.0}),
    "batch-invariant loss": Case(
        loss={"beta": 0.04}, masked=True, options={"batch_invariant": True}
    ),
    "loss, bf16": Case(loss={"beta": 0.04}, dtype=torch.bfloat16),
    "loss, fp16": Case(loss={}, dtype=torch.float16, masked=True),
    "loss without gradients": Case(loss={}, frozen=("hidden", "weight")),
}
REF_CASES = {
    "ref everything": EVERYTHING,
    "ref loss": LOSS_CASES["entropy"],
}
# For Triton's interpreter, which takes minutes for anything larger and has no bf16.
TINY = dict(num_rows=5, vocab=67, width=16)
TRITON_CASES = {
    "everything": dataclasses.replace(EVERYTHING, **TINY),
    "banned": Case(kind="banned", bias=True, **TINY),
    "fp16 confident": Case(kind="confident", dtype=torch.float16, **TINY),
    "entropy": dataclasses.replace(LOSS_CASES["entropy"], **TINY),
    "grpo": Case(loss={}, cut="tiny", **TINY),
    "frozen head": Case(
        frozen=("weight",),
        masked=True,
        options={"return_entropy": False, "return_lse": False},
        **TINY,
    ),
    "kept probabilities": Case(
        dtype=torch.float16,
        options={"keep_probs": True, "return_entropy": False, "return_lse": False},
        **TINY,
    ),
}


def bad_input_calls(group) -> dict[str, str]:
    """name -> the error of a call that is wrong on the last rank alone."""
    case = Case(num_rows=6, vocab=20, width=8)
    made = make_case(case)
    good = {
        "hidden": made["hidden"],
        "weight": made["weight"][my_rows(case, group)],
        "token_ids": made["token_ids"],
        "old_logprobs": torch.zeros(6),
        "advantages": torch.ones(6),
    }
    calls = [(name, op, change, {}) for name, change in WRONG_HEAD.items()
             for op in (linear_logprobs, linear_grpo_loss)]  # fmt: skip
    calls += [(name, linear_grpo_loss, *options) for name, options in WRONG_LOSS.items()]
    messages = {}
    for name, op, wrong, common in calls:
        arguments = good | common
        if group.rank() == group.size() - 1:
            arguments |= wrong
        if op is linear_logprobs:
            del arguments["old_logprobs"], arguments["advantages"]
        positional = [arguments.pop(key) for key in good if key in arguments]
        messages[f"{name}, {op.__name__}"] = error_of(
            lambda op=op, rows=positional, rest=arguments: op(*rows, **rest, tp_group=group)
        )
    messages["backward, "] = error_of(lambda: backward_with_other_needs(good, group))
    return messages


def calls_wrong_everywhere(group) -> dict[str, str]:
    """The same mistake on every rank: a token id that no rank holds, options that do not go with
    tp_group."""
    case = Case(num_rows=6, vocab=20, width=8)
    made = make_case(case)
    head = (made["hidden"], made["weight"][my_rows(case, group)])
    ids, loss = made["token_ids"], (torch.zeros(6), torch.ones(6))
    calls = {
        "token id": lambda: linear_logprobs(*head, ids + 20, tp_group=group),
        "token id, loss": lambda: linear_grpo_loss(*head, ids + 20, *loss, tp_group=group),
        "kept": lambda: linear_logprobs(*head, ids, kept=ids[:, None], tp_group=group),
        "sparse": lambda: linear_grpo_loss(*head, ids, *loss, sparse_delta=1e-3, tp_group=group),
    }
    return {name: error_of(call) for name, call in calls.items()}


def backward_with_other_needs(good: dict, group) -> None:
    """The last rank wants d hidden, the others do not; with keep_probs that comes up in backward,
    where all of them meet."""
    hidden = good["hidden"].clone().requires_grad_(group.rank() == group.size() - 1)
    weight = good["weight"].clone().requires_grad_()
    logprobs = linear_logprobs(hidden, weight, good["token_ids"], keep_probs=True, tp_group=group)
    logprobs.sum().backward()


def without_cpu_backend(group) -> dict[str, torch.Tensor | str]:
    """Two heads after one another, as on a group of NCCL alone: of the second the last rank alone
    holds another number of rows, so that what the other ranks hold of it says nothing of it. Then
    a call that is wrong on the last rank alone, and one more."""
    real, inside = (vocab_parallel._exchange, vocab_parallel._on_cpu), []

    def exchange(group, note):
        inside.append(note)
        try:
            return real[0](group, note)  # the notes themselves do go over the host here
        finally:
            inside.pop()

    vocab_parallel._exchange, vocab_parallel._on_cpu = exchange, lambda group: bool(inside)
    world, is_last = group.size(), group.rank() == group.size() - 1
    try:
        made = {}
        for name, vocab in (("even", 8 * world), ("uneven", 8 * world - 1)):
            case = Case(num_rows=6, vocab=vocab, width=8)
            whole, mine = make_case(case), slice(8 * group.rank(), 8 * group.rank() + 8)
            head = (whole["hidden"], whole["weight"][mine], whole["token_ids"])
            made[name] = linear_logprobs(*head, tp_group=group)
        ids = head[2][:5] if is_last else head[2]
        made["error"] = error_of(lambda: linear_logprobs(*head[:2], ids, tp_group=group))
        made["after"] = linear_logprobs(*head, tp_group=group)
    finally:
        vocab_parallel._exchange, vocab_parallel._on_cpu = real
    return made


def error_of(call) -> str:
    try:
        call()
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def compiled_calls(group) -> dict[str, bool]:
    """Under torch.compile(fullgraph=True) the ops give what they give in eager mode."""
    case = Case(num_rows=6, vocab=20, width=8)
    made = make_case(case)
    mine = my_rows(case, group)

    def both(hidden, weight, token_ids, advantages):
        logprobs = linear_logprobs(hidden, weight, token_ids, tp_group=group)
        loss, _, _ = linear_grpo_loss(hidden, weight, token_ids, None, advantages, tp_group=group)
        return logprobs, loss, (logprobs * advantages).sum() + loss

    results = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        leaves = [made["hidden"].clone().requires_grad_(), made["weight"][mine].clone()]
        leaves[1].requires_grad_()
        logprobs, loss, total = function(*leaves, made["token_ids"], made["advantages"])
        total.backward()
        results.append([logprobs.detach(), loss.detach(), *(leaf.grad for leaf in leaves)])
    names = ["logprobs", "loss", "grad_hidden", "grad_weight"]
    return {n: torch.equal(a, b) for n, a, b in zip(names, *results, strict=True)}


def subgroup_case(group) -> dict[str, torch.Tensor]:
    """The same head on a group that is not the world: its last two ranks."""
    members = [group.size() - 2, group.size() - 1]
    part = dist.new_group(members)
    return run_case(Case(), part) if group.rank() in members else {}


def suite(name: str, world: int) -> dict[str, object]:
    """name -> function of the group."""

    def of(cases, mode="op"):
        return {
            key: lambda group, case=case: run_case(case, group, mode) for key, case in cases.items()
        }

    if name == "triton":
        return of(TRITON_CASES)
    made = {
        **of(LOGPROB_CASES),
        **of(LOSS_CASES),
        **of(REF_CASES, "ref"),
        "again": lambda group: run_case(EVERYTHING, group),
        "wrong everywhere": calls_wrong_everywhere,
        "bad input": bad_input_calls,
        "after bad input": lambda group: run_case(Case(), group),
        "without a CPU backend": without_cpu_backend,
    }
    return made | ({"compiled": compiled_calls} if world == 2 else {"subgroup": subgroup_case})


def main(rank: int, world: int, folder: Path, suite_name: str) -> None:
    torch.set_num_threads(1)
    head_chunks.CPU_CHUNK_ROWS = (64, 4096)  # the cases of several chunks count on it
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=COLLECTIVE_TIMEOUT,
    )
    results = {}
    for name, case in suite(suite_name, world).items():
        print(name, flush=True)
        try:
            results[name] = case(dist.group.WORLD)
        except Exception:
            # the others fail or time out in the same case; the tests show the traceback
            results[name] = traceback.format_exc()
            break
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
