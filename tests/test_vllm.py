"""The colocated vLLM itself: its tokens and log-probs are those of the policy, and neither a signal
nor a crash leaves anything behind. The parts that need no vLLM are in test_vllm_parts.py."""

import os
import re
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    Qwen2Config,
    Qwen2ForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from grpo_engine.generation import HFGenerator
from grpo_engine.generation.vllm import VLLMGenerator, VLLMOptions, start_colocated
from grpo_engine.generation.vllm_worker import lora_rank_of
from grpo_engine.generation.weight_sync import WeightSync
from grpo_engine.lora import LoraOptions
from grpo_engine.policy import Policy
from grpo_engine.types import GenerationRequest, GeneratorError, SamplingParams, UserError

pytestmark = pytest.mark.vllm

VOCAB, POSITIONS, EOS = 120, 512, 7


def make_policy(lora: LoraOptions | None = None) -> Policy:
    """Weights so large that the likeliest token is clear and some completions end by themselves.
    Its config.json names another end id than its generation config, which is the one that counts,
    and the latter asks for what no sampler of ours may do."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        initializer_range=0.15,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = EOS
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.top_k = 2
    return Policy(model, lora=lora)


def make_generator(policy: Policy, log: Path, **options) -> VLLMGenerator:
    chosen = VLLMOptions(**{"max_num_seqs": 32, "log_path": log, **options})
    return VLLMGenerator(policy, partial(start_colocated, policy, chosen), WeightSync(policy))


def members(session: int) -> list[int]:
    """Processes of a session that are not merely waiting to be reaped."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def none_left(session: int, within_s: float = 20.0) -> bool:
    stop_at = time.monotonic() + within_s
    while members(session) and time.monotonic() < stop_at:
        time.sleep(0.1)
    return not members(session)


@pytest.fixture(scope="module")
def policy():
    return make_policy()


@pytest.fixture(scope="module")
def generator(policy, tmp_path_factory):
    made = make_generator(policy, tmp_path_factory.mktemp("vllm") / "vllm.log")
    with pytest.raises(RuntimeError, match="without a sync_weights"):
        made.generate(requests_of(1), SamplingParams(4))
    measured = made.sync_weights(1)
    assert measured["sync/logp_difference_max"] < 1e-4
    session = made.engine.worker.pid
    assert members(session)
    yield made
    made.close()
    assert none_left(session)


def requests_of(count: int, first_seed: int = 0) -> list[GenerationRequest]:
    """Prompts of 1 to ~60 tokens; the third of each four is a prompt that came before."""
    drawn = torch.Generator().manual_seed(3)
    prompts = []
    for i in range(count):
        length = 1 + (7 * i) % 60
        ids = torch.randint(10, VOCAB, (length,), generator=drawn).tolist()
        prompts.append(prompts[i // 2] if i % 4 == 2 else ids)
    return [GenerationRequest(ids, first_seed + i) for i, ids in enumerate(prompts)]


def logits_of(policy: Policy, request: GenerationRequest, ids: list[int]) -> torch.Tensor:
    """[T, V] fp32, of the positions that each completion token was drawn at."""
    whole = torch.tensor([request.prompt_ids + ids])
    with torch.no_grad(), policy.active():
        logits = policy.model(input_ids=whole, use_cache=False).logits[0].float()
    return logits[len(request.prompt_ids) - 1 : -1]


def processed(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Log-probs [T, V] of the sampler's distribution, by transformers' own processors."""
    steps = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    return steps(None, logits).log_softmax(-1)


def test_greedy_tokens_are_those_of_transformers(policy, generator):
    requests, sampling = requests_of(24), SamplingParams(48, top_k=1)
    expected = HFGenerator(policy).generate(requests, sampling)
    drawn = generator.generate(requests, sampling)
    assert [one.completion_ids for one in drawn] == [one.completion_ids for one in expected]
    assert [one.finish_reason for one in drawn] == [one.finish_reason for one in expected]
    assert {one.finish_reason for one in drawn} == {"stop", "length"}  # or it shows too little


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_policy(policy, generator, temperature):
    requests = requests_of(24, first_seed=100)
    sampling = SamplingParams(40, temperature=temperature)
    for request, one in zip(requests, generator.generate(requests, sampling), strict=True):
        expected = processed(logits_of(policy, request, one.completion_ids), sampling)
        taken = expected[range(len(one.completion_ids)), one.completion_ids]
        torch.testing.assert_close(torch.tensor(one.sampler_logprobs), taken, atol=1e-4, rtol=0)


def test_a_completion_ends_with_the_end_id_of_the_policy_alone(generator):
    drawn = generator.generate(requests_of(32, first_seed=7), SamplingParams(60, temperature=1.3))
    stopped = [one for one in drawn if one.finish_reason == "stop"]
    assert stopped and len(stopped) < len(drawn)
    for one in drawn:
        assert EOS not in one.completion_ids[:-1]
        assert (one.completion_ids[-1] == EOS) == (one.finish_reason == "stop")
        assert one.finish_reason == "stop" or len(one.completion_ids) == 60
    assert any(1 in one.completion_ids[:-1] for one in drawn)  # config.json's end id ends nothing


def test_tokens_come_from_the_requests_own_seed(generator):
    requests, sampling = requests_of(16), SamplingParams(32)
    drawn = [one.completion_ids for one in generator.generate(requests, sampling)]
    again = [one.completion_ids for one in generator.generate(requests, sampling)]
    assert again == drawn
    some = [11, 2, 5]
    alone = generator.generate([requests[i] for i in some], sampling)
    assert [one.completion_ids for one in alone] == [drawn[i] for i in some]
    other = [GenerationRequest(one.prompt_ids, one.seed + 10**18) for one in requests]
    assert [one.completion_ids for one in generator.generate(other, sampling)] != drawn


def test_finished_ones_are_handed_over_while_others_are_drawn(generator):
    told = []
    requests = requests_of(32, first_seed=7)
    drawn = generator.generate(
        requests,
        SamplingParams(60, temperature=1.3),
        on_batch=lambda members, batch: told.append((list(members), list(batch))),
    )
    assert sorted(i for members, _ in told for i in members) == list(range(len(requests)))
    handed = [pair for ids, batch in told for pair in zip(ids, batch, strict=True)]
    assert all(drawn[i] is one for i, one in handed)
    assert len(told) > 2
    lengths = [len(one.completion_ids) for _, batch in told for one in batch]
    assert lengths[0] < lengths[-1]


def test_tokens_are_progress_while_nothing_finishes(policy, generator):
    """In a call that takes several times as long as the worker may be silent."""
    sampling = SamplingParams(440, temperature=2.0, top_p=0.99, return_support=True)  # slow
    requests = requests_of(200)
    drawn = generator.generate(requests, sampling)
    long = [r for r, one in zip(requests, drawn, strict=True) if one.finish_reason == "length"]
    seen, started, work = [], time.monotonic(), (long[:1] * 64, sampling)
    generator.engine.worker.call("generate", work, timeout_s=60, on_message=seen.append)
    assert time.monotonic() - started > 2, "too fast to show anything: draw more"
    assert [] in seen and sum(map(len, seen)) == 64


@pytest.mark.parametrize(
    "cut", [dict(top_k=5), dict(top_k=20, top_p=0.6), dict(top_p=0.7), dict(top_k=1)]
)
def test_the_support_is_what_each_token_was_drawn_from(policy, generator, cut):
    requests = requests_of(12)
    sampling = SamplingParams(24, temperature=1.2, return_support=True, **cut)
    for request, one in zip(requests, generator.generate(requests, sampling), strict=True):
        expected = processed(logits_of(policy, request, one.completion_ids), sampling)
        assert len(one.support.counts) == len(one.completion_ids)
        taken = expected[range(len(one.completion_ids)), one.completion_ids]
        torch.testing.assert_close(torch.tensor(one.sampler_logprobs), taken, atol=1e-4, rtol=0)
        ends = one.support.counts.cumsum().tolist()
        for t, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
            kept = set(expected[t].isfinite().nonzero()[:, 0].tolist())
            assert set(one.support.ids[first:last].tolist()) == kept


def test_what_it_cannot_serve_is_refused_and_the_next_is_drawn(generator):
    sampling = SamplingParams(16)
    too_long = GenerationRequest([9] * (POSITIONS - 15), 0)
    with pytest.raises(UserError, match="max_completion_length: 16 after the 497 prompt tokens"):
        generator.generate([*requests_of(2), too_long], sampling)
    with pytest.raises(UserError, match=f"request 0 has token id {VOCAB}"):
        generator.generate([GenerationRequest([VOCAB], 0)], sampling)
    just_fits = GenerationRequest([9] * (POSITIONS - 16), 0)
    assert 1 <= len(generator.generate([just_fits], sampling)[0].completion_ids) <= 16


class Stop(BaseException):
    pass


def test_ctrl_c_takes_the_requests_back(generator):
    """The handler raises in the main thread, as ``Interrupt.abortable`` has it."""

    def stop(signum, frame):
        raise Stop

    requests, sampling = requests_of(8), SamplingParams(16)
    before = [one.completion_ids for one in generator.generate(requests, sampling)]
    previous = signal.signal(signal.SIGUSR2, stop)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR2))
    long = [GenerationRequest([10 + i], i) for i in range(96)]
    try:
        timer.start()
        with pytest.raises(Stop):
            while True:
                generator.generate(long, SamplingParams(400))
    finally:
        timer.join()
        signal.signal(signal.SIGUSR2, previous)
    told = []
    again = generator.generate(requests, sampling, on_batch=lambda i, _: told.extend(i))
    assert [one.completion_ids for one in again] == before
    assert sorted(told) == list(range(8))


def test_new_weights_are_what_it_samples_from(policy, generator):
    """Last of those that share the engine: it changes the weights."""
    requests, sampling = requests_of(8), SamplingParams(24, top_k=1)
    old = generator.generate(requests, sampling)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    assert generator.sync_weights(2)["sync/logp_difference_max"] < 1e-4
    assert generator.sync_weights(2) == {}
    new = generator.generate(requests, sampling)
    expected = HFGenerator(policy).generate(requests, sampling)
    assert [one.completion_ids for one in new] == [one.completion_ids for one in expected]
    assert [one.completion_ids for one in new] != [one.completion_ids for one in old]


@pytest.mark.slow
def test_an_adapter_is_sampled_from_unmerged_and_sleep_degrades_with_a_note(tmp_path):
    policy = make_policy(LoraOptions(r=4))
    generator = make_generator(policy, tmp_path / "log", lora_rank=4, enable_sleep=True)
    requests, sampling = requests_of(8), SamplingParams(24, top_k=1)
    try:
        generator.sync_weights(0)
        assert "no sleep mode on this platform" in generator.notes[0]
        for version in (1, 2):
            with torch.no_grad():
                for parameter in policy.weights().values():
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
            generator.sync_weights(version)
            drawn = generator.generate(requests, sampling)
            expected = HFGenerator(policy).generate(requests, sampling)
            assert [x.completion_ids for x in drawn] == [x.completion_ids for x in expected]
    finally:
        generator.close()


@pytest.mark.slow
def test_a_killed_engine_is_reported_with_its_log_and_leaves_nothing(policy, tmp_path):
    generator = make_generator(policy, tmp_path / "vllm.log")
    generator.sync_weights(0)
    session = generator.engine.worker.pid
    timer = threading.Timer(0.3, os.kill, (session, signal.SIGKILL))
    long = [GenerationRequest([10 + i], i) for i in range(96)]
    timer.start()
    with pytest.raises(GeneratorError) as caught:
        while True:
            generator.generate(long, SamplingParams(400))
    text = str(caught.value)
    assert text.startswith("the vLLM engine died during generate: signal 9 (SIGKILL)")
    assert str(tmp_path / "vllm.log") in text and "INFO" in text
    with pytest.raises(GeneratorError, match="the vLLM engine is gone: it died during generate"):
        generator.generate(long, SamplingParams(4))
    generator.close()
    assert none_left(session)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["close", "kill"])
def test_two_ranks_leave_nothing_in_shared_memory(policy, tmp_path, monkeypatch, end):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|0")
    generator = make_generator(policy, tmp_path / "vllm.log", tensor_parallel_size=2)
    generator.sync_weights(0)
    session = generator.engine.worker.pid
    maps = [Path(f"/proc/{pid}/maps").read_text(encoding="utf-8") for pid in members(session)]
    shared = {Path(path) for text in maps for path in re.findall(r" (/dev/shm/\S+)$", text, re.M)}
    kinds = {path.name[:4] for path in shared if path.exists()}
    if end == "kill":
        os.kill(session, signal.SIGKILL)
        with pytest.raises(GeneratorError, match="SIGKILL"):
            generator.generate(requests_of(2), SamplingParams(4))
    generator.close()
    assert kinds == {"psm_", "vllm"}  # queues, the ranks' own channel
    assert not [path for path in shared if path.exists()]
    assert none_left(session)


@pytest.mark.slow
def test_an_engine_without_progress_shows_where_it_stands(policy, tmp_path):
    generator = make_generator(policy, tmp_path / "vllm.log")
    generator.sync_weights(0)
    session = generator.engine.worker.pid
    generator.engine._timeout_s = 0.05
    with pytest.raises(GeneratorError) as caught:
        for _ in range(100):
            generator.generate(
                [GenerationRequest([10 + i % 90], i) for i in range(500)], SamplingParams(500)
            )
    text = str(caught.value)
    assert text.startswith(
        "the vLLM engine made no progress for 0.05 s (generation_timeout) in generate"
    )
    assert "/vllm" in text.partition("where it stood")[2].partition("the end of its log")[0]
    whole = (tmp_path / "vllm.log").read_text(encoding="utf-8")
    assert "vllm_worker.py" in whole.partition("Current thread")[2]
    generator.close()
    assert none_left(session)


def test_the_rank_of_an_adapter_is_rounded_up_to_what_vllm_has():
    assert [lora_rank_of(rank) for rank in (1, 4, 8, 9, 512)] == [1, 8, 8, 16, 512]
    with pytest.raises(UserError, match="lora_r: .* rank 512 at most, got 513"):
        lora_rank_of(513)


@pytest.mark.slow
def test_a_refused_option_is_the_users(policy, tmp_path):
    generator = make_generator(policy, tmp_path / "vllm.log", max_model_len=10 * POSITIONS)
    with pytest.raises(UserError, match="^generator 'vllm': vLLM .* refuses .* max_model_len"):
        generator.sync_weights(0)
    generator.close()
