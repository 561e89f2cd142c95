"""Training against a sampler that truncates: every log-prob is over the ids a token was drawn
from."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_model import make_tiny_model

from grpo_engine.cli import main
from grpo_engine.config import build_config
from grpo_engine.generation.hf import HFGenerator
from grpo_engine.grpo import GRPORun
from grpo_engine.kernels import kept_by_sampler
from grpo_engine.policy import Policy
from grpo_engine.rewards import RewardPool, RewardSpec
from grpo_engine.rollouts import Prompt, RolloutArrays
from grpo_engine.support import Support, bit_words, support_entries
from grpo_engine.types import GenerationRequest, SamplingParams, UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "model")
    (folder / "rows.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"{i}+{i}=", "solution": str(2 * i)}) + "\n" for i in range(8)
        )
    )
    (folder / "reward.py").write_text(
        "def odd(prompts, completions, **_):\n    return [float(len(c) % 2) for c in completions]\n"
    )
    return folder


def fields(folder, output_dir, **changes) -> dict:
    return {
        "model": str(folder / "model"),
        "dataset": str(folder / "rows.jsonl"),
        "prompt_template": "none",
        "reward_funcs": [f"{folder / 'reward.py'}:odd"],
        "prompts_per_generation": 4,
        "num_generations": 4,
        "steps_per_generation": 2,
        "max_prompt_length": 8,
        "max_completion_length": 12,
        "max_tokens_per_microbatch": 64,
        "max_steps": 4,
        "ref_model_sync_steps": 2,
        "learning_rate": 1e-3,
        "temperature": 0.7,
        "reward_workers": 1,
        "device": "cpu",
        "output_dir": str(output_dir),
        **changes,
    }


def sampled(folder, **changes):
    """A run and its first rollout, drawn by the real sampler."""
    config = build_config(fields(folder, "unused", **changes))
    policy = Policy.load(config.model, device="cpu")
    pool = RewardPool([RewardSpec.named(config.reward_funcs[0])], num_workers=1)
    prompts = [
        Prompt({"prompt": t}, t, policy.tokenizer(t)["input_ids"]) for t in ("1+1=", "2=", "3", "4")
    ]
    run = GRPORun(config, policy, policy.frozen_copy(), HFGenerator(policy), pool, prompts)
    with pool:
        return run, *run.rollout()


TRUNCATED = [{"top_p": 0.8}, {"top_k": 1}, {"top_k": 5}, {"top_k": 7, "top_p": 0.9}]


@pytest.mark.parametrize("cut", TRUNCATED, ids=str)
def test_the_support_is_what_a_sampler_keeps(model, cut):
    policy = Policy.load(str(model / "model"), device="cpu")
    requests = [
        GenerationRequest(policy.tokenizer(t)["input_ids"], i) for i, t in enumerate("1234")
    ]
    sampling = SamplingParams(10, temperature=0.7, return_support=True, **cut)
    for request, drawn in zip(
        requests, HFGenerator(policy).generate(requests, sampling), strict=True
    ):
        assert len(drawn.support.counts) == len(drawn.completion_ids)
        most = np.minimum(drawn.support.counts, bit_words(policy.text_config.vocab_size))
        assert len(drawn.support.ids) == most.sum()
        ids = torch.tensor([request.prompt_ids + drawn.completion_ids])
        with torch.no_grad():
            logits = policy.model(ids).logits[0, len(request.prompt_ids) - 1 : -1]
        options = {"top_k": cut.get("top_k", 0), "top_p": cut.get("top_p", 1.0)}
        expected = kept_by_sampler(logits, temperature=0.7, **options)
        found = drawn.support.kept(logits.shape[-1], CPU)
        assert as_sets(found, logits.shape[-1]) == as_sets(expected, logits.shape[-1])
    plain = HFGenerator(policy).generate(requests, SamplingParams(3, top_p=0.8))
    assert all(drawn.support is None for drawn in plain)


def as_sets(kept: torch.Tensor, vocab: int) -> list[set[int]]:
    if kept.dtype == torch.uint8:
        bits = np.unpackbits(kept.numpy(), axis=1, count=vocab, bitorder="little")
        return [set(np.flatnonzero(row)) for row in bits]
    return [set(row[row >= 0].tolist()) for row in kept]


@pytest.mark.parametrize("vocab", [40, 4096])
def test_both_forms_of_kept_hold_the_same_ids(vocab):
    sets = [[3], [0, 39, 7], [5, 6]] + [[k % 40] for k in range(2000)]
    support = Support(
        np.array([i for s in sets for i in s], dtype=np.int32),
        np.array([len(s) for s in sets], dtype=np.int32),
    )
    kept = support.kept(vocab, CPU)
    assert kept.dtype == (torch.uint8 if vocab == 40 else torch.int32)
    assert as_sets(kept, vocab) == [set(s) for s in sets]
    some = np.array([1, 1, 0, 1500])
    assert as_sets(support.take(some).kept(vocab, CPU), vocab) == [set(sets[i]) for i in some]


def test_a_part_has_the_form_of_the_whole():
    """One token of a rollout was drawn from many ids: all of its micro-batches get bits."""
    counts = np.array([1, 2, 60, 1], dtype=np.int32)
    ids = np.concatenate([np.arange(n) for n in counts]).astype(np.int32)
    kept = Support(ids, counts).kept(1024, CPU, np.array([3, 1]))
    assert kept.dtype == torch.uint8 and as_sets(kept, 1024) == [{0}, {0, 1}]
    counts[2], ids = 3, np.delete(ids, slice(6, 63))
    kept = Support(ids, counts).kept(1024, CPU, np.array([3, 1]))
    assert kept.tolist() == [[0, -1], [0, 1]]


def drawn_from(sets, vocab) -> torch.Tensor:
    """``support_entries`` of tokens drawn from ``sets``: each first in its row of all ids."""
    rows = [[*s, *(i for i in range(vocab) if i not in s)] for s in map(dict.fromkeys, sets)]
    return support_entries(torch.tensor(rows), torch.tensor([len(s) for s in sets]), vocab)


@pytest.mark.parametrize("vocab", [40, 64, 1001])
def test_many_ids_are_held_as_bits(vocab):
    dice = np.random.default_rng(0)
    sets = [dice.permutation(vocab)[:n].tolist() for n in (1, vocab, 3, vocab - 1, vocab // 2, 2)]
    counts = np.array([len(s) for s in sets], dtype=np.int32)
    listed = Support(np.concatenate(sets).astype(np.int32), counts)
    compact = Support(drawn_from(sets, vocab).numpy(), counts, vocab)
    assert len(compact.ids) == np.minimum(counts, bit_words(vocab)).sum() < len(listed.ids)
    some = np.array([4, 1, 0, 1])
    for support in (compact, Support.concatenate([compact.take(some), compact])):
        again = Support.from_tensors(support.to_tensors("s."), "s.")
        assert again.vocab == vocab
        assert torch.equal(again.kept(vocab, CPU), support.kept(vocab, CPU))
    assert as_sets(compact.kept(vocab, CPU), vocab) == [set(s) for s in sets]
    assert torch.equal(compact.kept(vocab, CPU), listed.kept(vocab, CPU))
    assert torch.equal(compact.kept(vocab, CPU, some), listed.kept(vocab, CPU)[some])
    steps = [(torch.arange(6), torch.tensor(counts), torch.tensor(compact.ids))] * 2
    parts = Support.of_steps(steps, [2] * 6, vocab)
    assert [as_sets(s.kept(vocab, CPU), vocab) for s in parts] == [[set(s)] * 2 for s in sets]


def test_a_nucleus_of_nearly_everything_takes_a_bit_an_id():
    vocab = 152_064  # Qwen2.5's
    ids = torch.arange(vocab).flip(0).repeat(2, 1)
    entries = support_entries(ids, torch.tensor([vocab - 5, 4]), vocab)
    assert entries.dtype == torch.int32 and entries.nbytes == vocab // 8 + 4 * 4
    support = Support(entries.numpy(), np.array([vocab - 5, 4], dtype=np.int32), vocab)
    assert as_sets(support.kept(vocab, CPU), vocab) == [
        set(range(5, vocab)),
        {*range(vocab - 4, vocab)},
    ]


def test_supports_of_other_vocabularies_are_refused():
    one = np.array([0], dtype=np.int32), np.array([1], dtype=np.int32)
    with pytest.raises(ValueError, match=r"differ in vocab: \[40, None\]"):
        Support.concatenate([Support(*one, 40), Support(*one)])
    with pytest.raises(ValueError, match="vocabulary has 40 ids, the head 48"):
        Support(*one, 40).kept(48, CPU)


def test_steps_are_sorted_into_sequences_and_what_lies_behind_an_end_is_dropped():
    steps = [
        (torch.tensor([0, 1, 2]), torch.tensor([1, 2, 1]), torch.tensor([10, 20, 21, 30])),
        (torch.tensor([0, 1, 2]), torch.tensor([2, 1, 1]), torch.tensor([11, 12, 22, 99])),
        (torch.tensor([1, 0]), torch.tensor([1, 2]), torch.tensor([99, 13, 14])),
    ]
    found = Support.of_steps(steps, [3, 2, 1])
    assert [s.ids.tolist() for s in found] == [[10, 11, 12, 13, 14], [20, 21, 22], [30]]
    assert [s.counts.tolist() for s in found] == [[1, 2, 2], [2, 1], [1]]


@pytest.mark.parametrize("cut", TRUNCATED, ids=str)
def test_training_logprobs_equal_the_samplers(model, cut):
    run, _, arrays, rows = sampled(model, **cut)
    assert torch.allclose(arrays.old_logprobs, arrays.sampler_logprobs, atol=2e-5)
    assert torch.equal(arrays.ref_logprobs, arrays.old_logprobs)
    run.begin(arrays, rows)
    row = run.update()
    assert row["clip_ratio/region_mean"] == 0.0 and row["kl"] == pytest.approx(0.0, abs=1e-6)
    assert row["sampling/logp_difference_mean"] < 2e-5
    whole = [x for x, n in zip(arrays.old_logprobs, arrays.support.counts, strict=True) if n == 1]
    assert all(x == 0.0 for x in whole)  # the only choice there was


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.8}], ids=str)
def test_the_reference_keeps_its_own_weights(model, cut):
    run, _, arrays, rows = sampled(model, ref_model_sync_steps=4, **cut)
    run.begin(arrays, rows)
    for _ in range(2):
        run.update()
    with RewardPool([RewardSpec.named(run.config.reward_funcs[0])], num_workers=1) as run.pool:
        _, arrays, _ = run.rollout()
    first = Policy.load(str(model / "model"), device="cpu")
    assert torch.equal(arrays.ref_logprobs, run.logprobs(first, arrays))
    assert (arrays.ref_logprobs - arrays.old_logprobs).abs().max() > 1e-4


def test_a_sampler_that_truncates_and_keeps_its_support_to_itself_is_refused(model):
    run, *_ = sampled(model, top_p=0.8)
    generate = run.generator.generate
    run.generator.generate = lambda requests, sampling, **kwargs: generate(
        requests, replace(sampling, return_support=False), **kwargs
    )
    with (
        RewardPool([RewardSpec.named(run.config.reward_funcs[0])], num_workers=1) as run.pool,
        pytest.raises(ValueError, match="did not return its tokens' support"),
    ):
        run.rollout()


def test_every_micro_batch_of_a_rollout_has_one_form(model):
    _, _, arrays, _ = sampled(model, top_k=1)
    ids, counts, vocab = arrays.support.ids, arrays.support.counts.copy(), arrays.support.vocab
    counts[-1] += bit_words(vocab)  # of the last sequence's last token
    arrays.support = Support(np.append(ids[:-1], np.int32([7, 9])), counts, vocab)
    batches = [arrays.micro_batch([i], vocab).kept for i in range(len(arrays.lengths))]
    assert {kept.dtype for kept in batches} == {torch.uint8}
    every = torch.cat(batches)
    assert as_sets(every[:-1], vocab) == [{i} for i in ids[:-1]]
    assert len(counts) == len(every) and as_sets(every[-1:], vocab) == [{0, 1, 2, 32, 35}]


def test_a_rollout_of_another_version_is_refused(model):
    _, _, arrays, _ = sampled(model, top_p=0.8)
    tensors = arrays.to_tensors()
    tensors["kept"] = tensors.pop("unmasked")
    with pytest.raises(UserError, match="no 'unmasked': another version"):
        RolloutArrays.from_tensors(tensors, CPU)


def test_without_the_support_they_would_not(model):
    run, _, arrays, _ = sampled(model, top_p=0.8)
    bare = RolloutArrays.from_tensors(
        {k: v for k, v in arrays.to_tensors().items() if not k.startswith("support")}, CPU
    )
    off = run.logprobs(run.policy, bare) - arrays.sampler_logprobs
    assert off.max() <= 2e-5 and off.mean() < -0.1  # the mass cut off sits in every ratio


def test_the_gradient_is_that_of_the_truncated_distribution(model):
    """One on-policy step without KL: plain autograd over the sampler's warped logits."""
    changes = {"beta": 0.0, "steps_per_generation": 1, "loss_type": "dapo", "top_p": 0.8}
    run, rollouts, arrays, _ = sampled(model, **changes)
    run._gradients(arrays, np.arange(len(rollouts)))
    found = {n: p.grad.clone() for n, p in run.policy.model.named_parameters()}
    run.policy.model.zero_grad()
    total = sum(len(r.completion_ids) for r in rollouts)
    loss = 0.0
    for r in rollouts:
        ids = torch.tensor([r.prompt_ids + r.completion_ids])
        logits = run.policy.model(ids).logits[0, len(r.prompt_ids) - 1 : -1] / 0.7
        outside = torch.ones_like(logits, dtype=torch.bool)
        for place, kept in enumerate(
            as_sets(r.support.kept(logits.shape[-1], CPU), logits.shape[-1])
        ):
            outside[place, sorted(kept)] = False
        logprobs = logits.masked_fill(outside, -torch.inf).log_softmax(-1)
        chosen = logprobs.gather(-1, torch.tensor(r.completion_ids)[:, None])
        loss = loss - r.advantage * (chosen - chosen.detach()).exp().sum() / total
    loss.backward()
    for name, parameter in run.policy.model.named_parameters():
        scale = parameter.grad.abs().max().clamp_min(1e-8)
        assert (parameter.grad - found[name]).abs().max() / scale < 2e-5, name


def test_a_run_may_take_the_samplers_logprobs_and_resumes_bit_for_bit(model, tmp_path):
    argv = ["--save_steps", "1", "--old_logprobs", "sampler", "--top_p", "0.9"]

    def command(folder, **changes):
        values = fields(model, folder, **changes)
        words = [w for name, value in values.items() for w in (f"--{name}", json.dumps(value))]
        return ["grpo", *[w.strip('"') for w in words], *argv, "--save_total_limit", "9"]

    assert main(command(tmp_path / "whole")) == 0
    assert main(command(tmp_path / "cut")) == 0
    for step in (2, 3, 4):  # as if stopped in the middle of the first rollout
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{step}")
    assert main(["grpo", "--resume", str(tmp_path / "cut")]) == 0
    one, other = (
        (tmp_path / name / "checkpoint-4" / "model.safetensors").read_bytes()
        for name in ("whole", "cut")
    )
    assert one == other


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sparse_delta": 2.0}, ["sparse_delta", "2.0"]),
        ({"sparse_delta": 0.01, "entropy_coef": 0.1}, ["sparse_delta", "entropy_coef 0.1"]),
        ({"sparse_delta": 0.01, "loss_type": "gspo"}, ["sparse_delta", "sequences"]),
        ({"sparse_delta": 0.01, "top_p": 0.9}, ["sparse_delta", "top_p 0.9"]),
        ({"sparse_delta": 0.01, "top_k": 3}, ["sparse_delta", "top_k 3"]),
        ({"sparse_delta": 0.01, "sparse_max_entries": 500}, ["sparse_max_entries", "500"]),
        ({"sparse_max_entries": 8}, ["sparse_max_entries", "8"]),
    ],
)
def test_contradictions_of_the_sparse_backward_are_refused(model, tmp_path, capsys, changes, words):
    values = fields(model, tmp_path / "run", **changes)
    argv = [w for n, v in values.items() for w in (f"--{n}", json.dumps(v).strip('"'))]
    assert main(["grpo", *argv]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


def test_the_sparse_backward_keeps_its_promise_in_the_loop(model):
    changes = {"beta": 0.0, "steps_per_generation": 1, "temperature": 0.05}
    exact, _, arrays, _ = sampled(model, **changes)
    sparse, *_ = sampled(model, **changes, sparse_delta=1e-3, sparse_max_entries=32)
    narrow, *_ = sampled(model, **changes, sparse_delta=1e-3, sparse_max_entries=1)
    everything = np.arange(len(arrays.lengths))
    arrays.live[:] = True  # so sure a policy gives equal answers, and these no advantage
    arrays.advantages = torch.linspace(-1, 1, len(everything))
    _, plain = exact._gradients(arrays, everything)
    _, metrics = sparse._gradients(arrays, everything)
    assert narrow._gradients(arrays, everything)[1]["sparse/rows"] < metrics["sparse/rows"]
    assert "sparse/rows" not in plain
    assert 0 < metrics["sparse/rows"] <= 1 and 0 < metrics["sparse/dropped_mass"] <= 1e-3
    one, other = (
        torch.cat([p.grad.flatten() for p in run.policy.model.parameters()])
        for run in (exact, sparse)
    )
    assert 0 < (one - other).norm() < 0.02 * one.norm()
