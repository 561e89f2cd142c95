"""tp_group: the merge of a row's shards, and 2 and 4 gloo processes against the unsharded ops."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import vocab_parallel_cases as cases
from hypothesis import given, settings
from hypothesis import strategies as st
from vocab_parallel_wrong import NAMES_IN_ERRORS, WRONG_HEAD, WRONG_LOSS

from grpo_engine.kernels import linear_logprobs
from grpo_engine.kernels.testing import assert_accurate
from grpo_engine.kernels.vocab_parallel import fold_shard, merge_parts
from grpo_engine.kernels.vocab_rows import LogitOptions, RowGrads, dlogits_rows

# A suite may be slow on a busy machine, but a rank that reports no new case for this long hangs.
MOST_SECONDS_PER_CASE = 50.0
WORLDS = (2, 4)


# ---- One process: the maths of the merge ---------------------------------------------------------


def merged(logits, token_ids, cuts, options, grads=None):
    """RowStats as each rank sees them, and the gradients of the shards' logits, side by side."""
    edges = [0, *cuts, logits.shape[1]]
    shards = [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    known = (token_ids >= 0) & (token_ids < logits.shape[1])
    buffers = [(logits[:, s].clone(), logits[:, s].clone()) for s in shards]
    parts = torch.stack(
        [
            fold_shard(*pair, token_ids - s.start, options, want_entropy=True)
            for pair, s in zip(buffers, shards, strict=True)
        ]
    )
    stats = [merge_parts(parts, r, known, options, want_entropy=True) for r in range(len(shards))]
    if grads is None:
        return stats, None
    dlogits = [
        dlogits_rows(scratch, shifted, token_ids - s.start, options, stats[r], grads)
        for r, ((shifted, scratch), s) in enumerate(zip(buffers, shards, strict=True))
    ]
    return stats, torch.cat(dlogits, dim=1)


def truth_of(logits, token_ids, temperature, factors, softcap=None):
    """fp64: (logprobs, entropy, lse) and the gradient of the logits."""
    leaf = logits.double().requires_grad_()
    capped = leaf if softcap is None else softcap * torch.tanh(leaf / softcap)
    scaled = capped / (temperature[:, None] if torch.is_tensor(temperature) else temperature)
    log_p = scaled.log_softmax(1)
    logprobs = log_p.gather(1, token_ids[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(1)
    outputs = (logprobs, entropy, scaled.logsumexp(1))
    total = sum((f.double() * o).sum() for f, o in zip(factors, outputs, strict=True))
    return [o.detach() for o in outputs], torch.autograd.grad(total, leaf)[0]


MERGES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**20),
        "spread": st.sampled_from([0.1, 3.0, 20.0]),
        "vocab": st.integers(2, 90),
        "cuts": st.sets(st.integers(1, 89), max_size=5),
        "shift": st.sampled_from([0.0, -200.0, 150.0]),
        "by_row": st.booleans(),
        "softcap": st.sampled_from([None, 300.0]),
    }
)


def check_merge(seed, spread, vocab, cuts, shift, by_row, softcap) -> None:
    """The merged shards are the whole row, in its outputs and in the gradient of its logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, vocab, generator=generator) * spread + shift
    token_ids = torch.randint(0, vocab, (7,), generator=generator)
    logits[0, token_ids[0]] += 40.0  # confident
    temperature = torch.linspace(0.5, 2.0, 7) if by_row else 0.7
    options = LogitOptions(
        1.0 if by_row else 0.7, temperature if by_row else None, logit_softcap=softcap
    )
    factors = torch.randn(3, 7, generator=generator)
    cuts = sorted(cut for cut in cuts if cut < vocab)
    stats, dlogits = merged(logits, token_ids, cuts, options, RowGrads(*factors))
    outputs, grads = truth_of(logits, token_ids, temperature, factors, softcap)
    # the inputs are exact, so what is left is the rounding of logits as large as |shift|
    scale = 1e-6 * max(1.0, abs(shift), spread * 5)
    for actual, expected in zip(stats[0], outputs, strict=False):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=4 * scale)
    torch.testing.assert_close(dlogits.double(), grads, rtol=1e-5, atol=20 * scale)
    for other in stats[1:]:
        for name in ("logprobs", "entropy", "lse"):
            assert torch.equal(getattr(other, name), getattr(stats[0], name)), name


@settings(max_examples=60, deadline=None)
@given(MERGES)
def test_merge_is_the_whole_row(merge) -> None:
    check_merge(**merge)


@pytest.mark.triton
@settings(max_examples=12, deadline=None)
@given(MERGES)
def test_merge_is_the_whole_row_triton(merge) -> None:
    check_merge(**merge)


def check_confident_token() -> None:
    """-log p of 1e-15 comes out to 1e-6 of itself, whichever shard holds the token."""
    for place in (0, 5, 11):
        logits = torch.zeros(1, 12)
        logits[0, place] = 36.0
        ids = torch.tensor([place])
        stats, _ = merged(logits, ids, [3, 4, 9], LogitOptions())
        exact = -torch.log1p(11 * torch.exp(torch.tensor(-36.0, dtype=torch.float64)))
        torch.testing.assert_close(stats[0].logprobs[0].double(), exact, rtol=1e-6, atol=0)


def test_confident_token_keeps_its_relative_precision() -> None:
    check_confident_token()


@pytest.mark.triton
def test_confident_token_keeps_its_relative_precision_triton() -> None:
    check_confident_token()


def check_banned_tokens() -> None:
    """A shard whose logits are all -inf adds nothing, and its gradient is zero."""
    logits = torch.randn(3, 10)
    logits[:, :4] = -torch.inf
    logits[:, 6] = -torch.inf
    ids = torch.tensor([4, 5, 9])
    factors = torch.randn(3, 3)
    stats, dlogits = merged(logits, ids, [2, 4, 7], LogitOptions(), RowGrads(*factors))
    outputs, grads = truth_of(logits, ids, 1.0, factors)
    for actual, expected in zip(stats[0], outputs, strict=False):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dlogits.double(), grads.nan_to_num(0.0), rtol=1e-5, atol=1e-6)
    assert (dlogits[:, :4] == 0).all()


def test_shards_of_banned_tokens() -> None:
    check_banned_tokens()


@pytest.mark.triton
def test_shards_of_banned_tokens_triton() -> None:
    check_banned_tokens()


def test_a_banned_token_has_logprob_minus_infinity() -> None:
    logits = torch.randn(2, 6)
    logits[:, 1] = -torch.inf
    stats, _ = merged(logits, torch.tensor([1, 1]), [3], LogitOptions())
    assert (stats[0].logprobs == -torch.inf).all() and torch.isfinite(stats[0].entropy).all()


def test_unknown_ids_give_nan() -> None:
    """As on CUDA without shards: no shard holds the id, and nothing can raise there."""
    stats, _ = merged(torch.randn(3, 6), torch.tensor([-1, 6, 2]), [3], LogitOptions())
    assert stats[0].logprobs.isnan().tolist() == [True, True, False]
    assert torch.isfinite(stats[0].entropy).all() and torch.isfinite(stats[0].lse).all()


def test_nan_logits_reach_every_output() -> None:
    logits = torch.randn(2, 6)
    logits[0, 4] = torch.nan
    stats, _ = merged(logits, torch.tensor([1, 1]), [3], LogitOptions())
    for field in stats[0][:3]:
        assert field.isnan().tolist() == [True, False]


# ---- Several processes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group_results(tmp_path_factory):
    """(world, suite) -> the results of every rank; each group of processes runs once."""

    @lru_cache
    def results(world: int, suite: str = "cpu") -> list[dict]:
        return run_group(world, suite, tmp_path_factory.mktemp(f"world{world}"))

    return results


def run_group(world: int, suite: str, folder: Path) -> list[dict]:
    command = [sys.executable, cases.__file__]
    # under PYTHONSAFEPATH a script does not find its neighbours
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    if sys.platform == "linux":  # a machine's own name need not resolve
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    logs = [(folder / f"{rank}.log").open("wb") for rank in range(world)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder), suite],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        while any(process.poll() is None for process in ranks):
            newest = max(os.stat(log.name).st_mtime for log in logs)
            if time.time() - newest > MOST_SECONDS_PER_CASE:
                break
            time.sleep(0.05)
    finally:
        for process, log in zip(ranks, logs, strict=True):
            process.kill()  # does nothing to one that has ended
            process.wait()
            log.close()
    for rank, process in enumerate(ranks):
        if process.returncode or not (folder / f"{rank}.pt").exists():
            pytest.fail(
                f"rank {rank}: {process.returncode}\n{(folder / f'{rank}.log').read_text()}"
            )
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def of_case(results: list[dict], name: str) -> list[dict]:
    """Every rank's result of one case; the test fails with the traceback of a rank that failed."""
    found = [rank.get(name, "did not come to this case") for rank in results]
    for rank, result in enumerate(found):
        if isinstance(result, str):
            pytest.fail(f"{name}, rank {rank}: {result}")
    return found


def whole(ranks: list[dict]) -> dict[str, torch.Tensor]:
    """Results as of the unsharded op: rows of the head side by side, the rest from rank 0, where it
    must be bitwise what it is on the others."""
    made = {}
    for name, value in ranks[0].items():
        parts = [rank[name] for rank in ranks]
        if name in ("grad_weight", "grad_bias"):
            made[name] = torch.cat(parts)
            continue
        made[name] = value
        for rank, part in enumerate(parts):
            assert torch.equal(part, value), f"{name} differs between rank 0 and rank {rank}"
    return made


def check_case(case: cases.Case, ranks: list[dict]) -> None:
    """Against the unsharded op, and against fp64 beside plain torch at the same dtype."""
    ours, unsharded, truth = whole(ranks), cases.run_case(case), cases.run_case(case, mode="truth")
    assert ours.keys() == unsharded.keys()
    for name, value in ours.items():
        expected = unsharded[name]
        assert value.dtype == expected.dtype and value.shape == expected.shape, name
        if name.startswith("grad_"):
            half = case.dtype != torch.float32
            most = torch.finfo(case.dtype).eps if half else 2e-6
            apart = (value.double() - expected.double()).norm() <= most * expected.double().norm()
            assert apart, name
            assert_accurate(
                name, value, expected, truth[name], dtype=case.dtype, floor=1e-6 if half else 1e-5
            )
        elif value.numel():
            error = (value.double() - expected.double()).abs().max()
            assert error <= 1e-6 * max(4.0, expected.abs().max().item()), name
            atol = 1e-4 if name == "entropy" or name.startswith("metric") else 1e-5
            torch.testing.assert_close(value.double(), truth[name].double(), rtol=1e-6, atol=atol)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", cases.LOGPROB_CASES)
def test_linear_logprobs(name, world, group_results) -> None:
    check_case(cases.LOGPROB_CASES[name], of_case(group_results(world), name))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", cases.LOSS_CASES)
def test_linear_grpo_loss(name, world, group_results) -> None:
    check_case(cases.LOSS_CASES[name], of_case(group_results(world), name))


@pytest.mark.triton
@pytest.mark.parametrize("name", cases.TRITON_CASES)
def test_triton_kernels(name, group_results) -> None:
    check_case(cases.TRITON_CASES[name], of_case(group_results(2, "triton"), name))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", cases.REF_CASES)
def test_reference_twins(name, world, group_results) -> None:
    """The sharded reference is the unsharded one: the head is gathered, not folded."""
    case = cases.REF_CASES[name]
    ours, unsharded = whole(of_case(group_results(world), name)), cases.run_case(case, mode="ref")
    for key, value in unsharded.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("world", WORLDS)
def test_bitwise_repeatable(world, group_results) -> None:
    results = group_results(world)
    pairs = zip(of_case(results, "everything"), of_case(results, "again"), strict=True)
    for first, second in pairs:
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("world", WORLDS)
def test_bad_input_on_one_rank_raises_on_all(world, group_results) -> None:
    messages = of_case(group_results(world), "bad input")
    assert len(messages[0]) == 2 * len(WRONG_HEAD) + len(WRONG_LOSS) + 1
    for name, message in ((name, rank[name]) for rank in messages for name in rank):
        assert NAMES_IN_ERRORS[name.split(",")[0]] in message, (name, message)
    for told in messages[:-1]:
        assert all(message.startswith("ValueError: ") for message in told.values())
        last = f"rank {world - 1} of tp_group refused its input: token_ids must have shape [6]"
        assert last in told["shape, linear_logprobs"]
    # and the group still works
    check_case(cases.Case(), of_case(group_results(world), "after bad input"))


@pytest.mark.parametrize("world", WORLDS)
def test_a_group_without_a_cpu_backend_agrees_on_every_call(world, group_results) -> None:
    """There, too, the shards of one head say nothing about the next, and an error is told."""
    ranks = of_case(group_results(world), "without a CPU backend")
    errors = [rank.pop("error") for rank in ranks]
    assert errors[-1] == "ValueError: token_ids must have shape [6], got [5]"
    for error in errors[:-1]:
        assert f"rank {world - 1} of tp_group refused its input: token_ids must" in error
    made = whole(ranks)
    for name, vocab in (("even", 8 * world), ("uneven", 8 * world - 1), ("after", 8 * world - 1)):
        head = cases.make_case(cases.Case(num_rows=6, vocab=vocab, width=8))
        expected = linear_logprobs(head["hidden"], head["weight"], head["token_ids"])
        torch.testing.assert_close(made[name], expected, rtol=1e-6, atol=4e-6)


def test_what_is_wrong_on_every_rank_raises_on_every_rank(group_results) -> None:
    for rank in of_case(group_results(2), "wrong everywhere"):
        assert all(message.startswith("ValueError: ") for message in rank.values())
        for name in ("token id", "token id, loss"):
            assert "token_ids must be in [0, 20), got " in rank[name]
        assert "tp_group=" in rank["kept"] and "does not go with kept" in rank["kept"]
        assert rank["sparse"].endswith("sparse_delta=0.001 does not go with tp_group")


def test_under_torch_compile(group_results) -> None:
    for rank in of_case(group_results(2), "compiled"):
        assert rank and all(rank.values()), rank


def test_on_a_group_that_is_not_the_world(group_results) -> None:
    first, second, *members = of_case(group_results(4), "subgroup")
    assert not first and not second
    check_case(cases.Case(), members)


def test_a_hang_is_cut_off(tmp_path, monkeypatch) -> None:
    """The limit above ends a suite whose processes wait for one another for ever."""
    monkeypatch.setattr(sys.modules[__name__], "MOST_SECONDS_PER_CASE", 0.1)
    with pytest.raises(pytest.fail.Exception, match="rank 0: -9"):
        run_group(2, "cpu", tmp_path)
