"""What surrounds the vLLM engine, without vLLM: when the weights count as known, what is refused,
and how its answers are read."""

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from tiny_model import make_tiny_model

from grpo_engine.config import build_config
from grpo_engine.generation import build, vllm, vllm_worker
from grpo_engine.generation.engine import ALL_LOGPROBS_VOCAB, support_width
from grpo_engine.generation.vllm import VLLMGenerator, VLLMOptions, start_colocated
from grpo_engine.policy import Policy
from grpo_engine.types import (
    Generation,
    GenerationRequest,
    GeneratorError,
    SamplingParams,
    UserError,
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return Policy.load(str(make_tiny_model(tmp_path_factory.mktemp("model"))), device="cpu")


class FakeEngine:
    dtype, max_model_len, notes = torch.float32, 64, ("it cannot sleep",)

    def __init__(self):
        self.done = []

    def generate(self, requests, sampling, *, on_batch=None):
        self.done.append("generate")
        return [Generation([1], [0.0], "stop") for _ in requests]

    def wake(self):
        self.done.append("wake")

    def sleep(self):
        self.done.append("sleep")

    def close(self):
        self.done.append("close")


class FakeSync:
    notes = ["the server cannot say"]

    def __init__(self):
        self.error, self.closed = None, False

    def sync(self, engine, version):
        engine.done.append(f"sync {version}")
        if self.error:
            raise self.error
        return {"sync/seconds": 0.5}

    def close(self):
        self.closed = True


@pytest.fixture
def made(policy):
    engine, sync = FakeEngine(), FakeSync()
    return VLLMGenerator(policy, lambda: engine, sync), engine, sync


ONE, SAMPLING = [GenerationRequest([5, 6], 0)], SamplingParams(8)


def test_the_first_sync_starts_the_engine_and_a_known_version_is_not_sent_again(made):
    generator, engine, _ = made
    assert generator.engine is None and generator.notes == []
    assert generator.sync_weights(3) == {"sync/seconds": 0.5}
    assert generator.sync_weights(3) == {}
    generator.generate(ONE, SAMPLING)
    generator.sync_weights(4)
    assert engine.done == ["wake", "sync 3", "wake", "generate", "sleep", "wake", "sync 4"]
    assert generator.notes == ["it cannot sleep", "the server cannot say"]
    with pytest.raises(ValueError, match="version must not fall: 2 after 4"):
        generator.sync_weights(2)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [GeneratorError("other weights"), Stop()])
def test_nothing_is_drawn_after_a_sync_that_did_not_go_through(made, error):
    generator, engine, sync = made
    with pytest.raises(RuntimeError, match="without a sync_weights"):
        generator.generate(ONE, SAMPLING)
    generator.sync_weights(1)
    sync.error = error
    with pytest.raises(type(error)):
        generator.sync_weights(2)
    with pytest.raises(RuntimeError, match="without a sync_weights"):
        generator.generate(ONE, SAMPLING)
    sync.error = None
    generator.sync_weights(2)  # the same version, and yet sent
    assert engine.done[-1] == "sync 2" and engine.done.count("sync 2") == 2
    assert len(generator.generate(ONE, SAMPLING)) == 1


def test_close_ends_engine_and_sync_and_is_final(made):
    generator, engine, sync = made
    generator.sync_weights(0)
    generator.close()
    generator.close()
    assert engine.done[-1] == "close" and engine.done.count("close") == 1 and sync.closed
    for call in (lambda: generator.generate(ONE, SAMPLING), lambda: generator.sync_weights(1)):
        with pytest.raises(RuntimeError, match="after close"):
            call()


def test_requests_are_checked_against_the_smaller_limit(made):
    generator, engine, _ = made
    generator.sync_weights(0)
    with pytest.raises(UserError, match="request 0 passes the engine's 64 positions"):
        generator.generate([GenerationRequest([5] * 57, 0)], SAMPLING)
    engine.max_model_len = 4096
    with pytest.raises(UserError, match="request 0 passes the model's 512 positions"):
        generator.generate([GenerationRequest([5] * 505, 0)], SAMPLING)
    assert generator.generate([], SAMPLING) == []
    assert "generate" not in engine.done


def test_missing_vllm_is_one_line_that_names_the_extra(policy, monkeypatch):
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; pip install 'grpo-engine\[vllm\]'"):
        start_colocated(policy, VLLMOptions())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("gpu_memory_utilization", 0.0, "vllm_gpu_memory_utilization must be in"),
        ("gpu_memory_utilization", 1.5, "vllm_gpu_memory_utilization must be in"),
        ("tensor_parallel_size", 0, "tensor_parallel_size must be >= 1, got 0"),
        ("max_num_seqs", 0, "max_num_seqs must be >= 1, got 0"),
        ("timeout_s", math.nan, "timeout_s must be > 0, got nan"),
        ("start_timeout_s", 0, "start_timeout_s must be > 0, got 0"),
    ],
)
def test_bad_options_are_named(field, value, message):
    with pytest.raises(UserError, match=message):
        VLLMOptions(**{field: value})


SERVER = {"vllm_mode": "server", "vllm_server_base_url": "http://localhost:8000"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vllm_start_timeout": 0}, "--vllm_start_timeout 0: .*greater than 0"),
        (SERVER, "vllm_start_timeout=7.0: has no meaning without vllm_mode 'colocate'"),
        ({"generator": "hf"}, "vllm_start_timeout=7.0: has no meaning without generator 'vllm'"),
    ],
)
def test_a_time_to_start_that_cannot_be_is_named(changes, words):
    with pytest.raises(UserError, match=words):
        build_config({"generator": "vllm", "vllm_start_timeout": 7, **changes})


def test_the_time_to_start_reaches_the_engine(policy):
    given = {"generator": "vllm", "vllm_start_timeout": 7, "generation_timeout": 70}
    options = build._start(build_config(given), policy).args[1]
    assert (options.start_timeout_s, options.timeout_s) == (7, 70)
    assert build._start(build_config({"generator": "vllm"}), policy).args[1] == VLLMOptions(
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        log_path=options.log_path,
    )


def test_the_engine_gets_config_json_and_nothing_else(policy, tmp_path):
    vllm._write_config(policy, str(tmp_path))
    assert os.listdir(tmp_path) == ["config.json"]
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen2ForCausalLM"]


def test_the_cache_of_a_cpu_engine_is_no_larger_than_it_can_fill(policy):
    options = VLLMOptions(max_model_len=256, max_num_seqs=4)
    # 2 layers, 2 key-value heads of 8, keys and values, fp32, 4 requests of 256 + 256 tokens
    assert vllm._cache_bytes(policy, options) == 2 * 2 * 2 * 8 * 4 * 4 * 512
    huge = VLLMOptions(max_model_len=2**40, gpu_memory_utilization=0.5)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert vllm._cache_bytes(policy, huge) == memory // 2


@pytest.mark.parametrize(
    ("device", "visible", "ranks", "expected"),
    [
        ("cpu", None, 1, None),
        ("cuda:2", None, 1, "2"),
        ("cuda:1", "4,6,7", 1, "6"),
        ("cuda:1", "4,6,7", 2, None),
    ],
)
def test_the_engine_is_on_the_gpu_of_the_policy(monkeypatch, device, visible, ranks, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    policy = SimpleNamespace(device=torch.device(device))
    values = vllm._environment(policy, VLLMOptions(tensor_parallel_size=ranks))
    assert values.get("CUDA_VISIBLE_DEVICES") == expected
    assert values["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_how_many_log_probs_a_support_takes():
    def width(vocab, **cut):
        return support_width(SamplingParams(4, return_support=True, **cut), vocab)

    assert width(50_000) == 0
    assert support_width(SamplingParams(4, top_k=5, top_p=0.5), 50_000) == 0
    assert width(50_000, top_k=5) == width(50_000, top_k=5, top_p=0.5) == 26
    assert width(20, top_k=5) == 20
    assert width(ALL_LOGPROBS_VOCAB, top_p=0.9) == ALL_LOGPROBS_VOCAB
    with pytest.raises(UserError, match="^top_p: 0.9 without top_k: .* 50000; set top_k too"):
        width(50_000, top_p=0.9)


def flat(*positions):
    """vLLM's ``FlatLogprobs``: of each position, (id, log-prob) of the token drawn, then of the
    likeliest."""
    ends = [sum(map(len, positions[: i + 1])) for i in range(len(positions))]
    entries = [entry for position in positions for entry in position]
    return SimpleNamespace(
        start_indices=[0, *ends[:-1]],
        end_indices=ends,
        token_ids=[i for i, _ in entries],
        logprobs=[x for _, x in entries],
    )


HALF, CUT = math.log(0.5), -math.inf


def output(ids, logprobs, reason="stop"):
    return SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason=reason)


def test_an_answer_of_vllm_becomes_a_generation():
    both = flat([(4, HALF), (9, HALF), (4, HALF), (2, CUT)], [(7, 0.0), (7, 0.0), (2, CUT)])
    one = vllm_worker.generation_of(output([4, 7], both), with_support=True)
    assert (one.completion_ids, one.sampler_logprobs) == ([4, 7], [HALF, 0.0])
    assert one.finish_reason == "stop"
    assert one.support.ids.tolist() == [9, 4, 7] and one.support.counts.tolist() == [2, 1]
    assert vllm_worker.generation_of(output([4, 7], both), with_support=False).support is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (output([4], flat([(4, HALF)]), "abort"), "ended a request with 'abort'"),
        (output([4], flat([(5, HALF)])), "log-probs are of other tokens"),
        (output([4, 4], flat([(4, HALF)])), "log-probs are of other tokens"),
        (output([4], flat([(4, math.nan)])), "is not finite"),
        (output([4], flat([(4, HALF), (4, HALF)])), "more ids tie with its last one"),
    ],
)
def test_an_answer_that_cannot_be_right_is_refused(answer, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        vllm_worker.generation_of(answer, with_support=True)


def test_only_tokens_are_progress(monkeypatch):
    """An engine that steps and makes none is left to the caller's time-out."""
    monkeypatch.setattr(vllm_worker, "PROGRESS_S", -1.0)
    monkeypatch.setattr(vllm_worker, "sampling_params", lambda *arguments: None)
    partly = SimpleNamespace(request_id="3-0", finished=False, outputs=[output([4], None, None)])
    whole = output([4], flat([(4, HALF)]))
    done = SimpleNamespace(request_id="3-0", finished=True, outputs=[whole])
    steps, sent = [[], [], [partly], [], [done]], []

    def step():
        now = steps.pop(0)
        sent.append("step")
        return now

    engine = SimpleNamespace(
        add_request=lambda *arguments, **options: None,
        has_unfinished_requests=lambda: bool(steps),
        step=step,
    )
    worker = vllm_worker.VLLMWorker()
    worker.llm, worker.loader = SimpleNamespace(llm_engine=engine), SimpleNamespace(lora_request=0)
    worker.eos_ids, worker.vocab_size = [2], 10
    worker.generate(SimpleNamespace(number=3, cancelled=False, send=sent.append), (ONE, SAMPLING))
    last = [(0, Generation([4], [HALF], "stop"))]
    assert sent == ["step", "step", "step", [], "step", "step", last]


def test_a_table_of_errors_becomes_its_first_message():
    table = ValueError("1 validation error\n  ...")
    table.errors = lambda: [{"loc": (), "msg": "Value error, max_model_len is\n  too large"}]
    assert vllm_worker._in_one_line(table) == "Value error, max_model_len is too large"
    table.errors = lambda: [{"loc": ("max_lora_rank",), "msg": "should be 1 or 8"}]
    assert vllm_worker._in_one_line(table) == "max_lora_rank: should be 1 or 8"
    assert vllm_worker._in_one_line(ValueError("a\n  b")) == "a b"
