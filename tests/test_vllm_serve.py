"""The user's own `vllm serve`, the real one, trained against over HTTP."""

import re
import threading
import time
from contextlib import suppress

import pytest
import torch
from real_vllm_server import serve

from grpo_engine.generation.engine import WeightUpdate
from grpo_engine.generation.hf import HFGenerator
from grpo_engine.generation.server_check import GENERATE
from grpo_engine.generation.server_http import Lost
from grpo_engine.generation.shared_weights import PublishedWeights
from grpo_engine.generation.vllm_server import ServerOptions, connect_server
from grpo_engine.generation.weight_sync import WeightSync, checkpoint_weights
from grpo_engine.policy import Policy
from grpo_engine.types import GenerationRequest, GeneratorError, SamplingParams, UserError

pytestmark = pytest.mark.vllm

GREEDY = SamplingParams(24, top_k=1)
SHORT = {"max_tokens": 4, "ignore_eos": True, "detokenize": False}
PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44], [100], [7, 250, 9, 12], [21] * 150]


@pytest.fixture(scope="module")
def policy():
    return Policy.load("miniature", device="cpu")


@pytest.fixture(scope="module")
def served(policy, tmp_path_factory):
    with serve(policy, tmp_path_factory.mktemp("serve"), max_model_len=512) as (server, options):
        yield server, options


@pytest.fixture(scope="module")
def server(served):
    return served[0]


@pytest.fixture(scope="module")
def engine(served, policy):
    server, options = served
    engine = server.connect(policy, options)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def sync(policy):
    return WeightSync(policy)


def requests(seed=0):
    return [GenerationRequest(ids, seed + i) for i, ids in enumerate(PROMPTS)]


def move(policy, scale):
    """Other weights, as an optimiser step would leave them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.weights().values():
            weight += scale * weight.std() * torch.randn(weight.shape, generator=generator)


def test_greedy_tokens_are_those_of_transformers_before_and_after_an_update(engine, policy, sync):
    sync.sync(engine, 0)
    drawn = engine.generate(requests(), GREEDY)
    expected = HFGenerator(policy).generate(requests(), GREEDY)
    assert [d.completion_ids for d in drawn] == [e.completion_ids for e in expected]
    assert [d.finish_reason for d in drawn] == [e.finish_reason for e in expected]

    move(policy, 0.2)
    metrics = sync.sync(engine, 1)
    after = engine.generate(requests(), GREEDY)
    expected = HFGenerator(policy).generate(requests(), GREEDY)
    assert [d.completion_ids for d in after] == [e.completion_ids for e in expected]
    assert [d.completion_ids for d in after] != [d.completion_ids for d in drawn]
    assert metrics["sync/logp_difference_mean"] < 1e-4


def test_logprobs_are_those_of_a_forward_pass_and_of_the_scaled_distribution(engine, policy):
    sampling = SamplingParams(24, temperature=0.7)
    for request, one in zip(requests(), engine.generate(requests(), sampling), strict=True):
        ids = torch.tensor([request.prompt_ids + one.completion_ids])
        with torch.no_grad():
            logits = policy.model(ids).logits[0, len(request.prompt_ids) - 1 : -1] / 0.7
        chosen = torch.tensor(one.completion_ids)[:, None]
        expected = logits.log_softmax(-1).gather(1, chosen)[:, 0]
        torch.testing.assert_close(torch.tensor(one.sampler_logprobs), expected, atol=2e-4, rtol=0)


def test_the_support_is_what_each_token_was_drawn_from(engine, policy):
    sampling = SamplingParams(24, temperature=1.2, top_k=2, return_support=True)
    for request, one in zip(requests(), engine.generate(requests(), sampling), strict=True):
        ids = torch.tensor([request.prompt_ids + one.completion_ids])
        with torch.no_grad():
            logits = policy.model(ids).logits[0, len(request.prompt_ids) - 1 : -1]
        kept = logits.topk(2).indices.sort().values
        assert one.support.counts.tolist() == [2] * len(one.completion_ids)
        listed = torch.as_tensor(one.support.ids).view(-1, 2).sort().values
        torch.testing.assert_close(listed.long(), kept)


def test_a_seed_gives_the_same_tokens_whatever_else_is_asked_for(engine):
    sampling = SamplingParams(16)
    together = engine.generate(requests(seed=2**62), sampling)
    alone = [engine.generate([request], sampling)[0] for request in requests(seed=2**62)]
    other = engine.generate(requests(seed=3), sampling)
    assert [t.completion_ids for t in together] == [a.completion_ids for a in alone]
    assert [t.completion_ids for t in together] != [o.completion_ids for o in other]


def test_a_completion_ends_at_the_policys_end_token_and_keeps_it(engine, policy):
    many = [GenerationRequest([21, 12], seed) for seed in range(12)]
    drawn = engine.generate(many, SamplingParams(40, temperature=1.5))
    ended = [d for d in drawn if d.finish_reason == "stop"]
    assert ended and all(d.completion_ids[-1] in policy.eos_ids for d in ended)
    assert all(len(d.completion_ids) == 40 for d in drawn if d.finish_reason == "length")
    for d in drawn:
        assert not set(d.completion_ids[:-1]) & set(policy.eos_ids)


def test_an_update_that_was_broken_off_is_ended_by_the_next(server, engine, policy, sync):
    """What a trainer leaves that was killed while its weights were being loaded."""
    server.post("/pause?mode=wait")
    server.post("/start_weight_update")
    move(policy, 0.05)
    sync.sync(engine, 2)
    drawn = engine.generate(requests(), GREEDY)
    expected = HFGenerator(policy).generate(requests(), GREEDY)
    assert [d.completion_ids for d in drawn] == [e.completion_ids for e in expected]


def others_draw(engine):
    """What the server calls the weights that a request draws from which is none of ours."""
    assert engine._service.call("/is_paused", seconds=60) == {"is_paused": False}
    fields = {"token_ids": [5, 6, 7], "sampling_params": SHORT}
    (drawn,) = engine._service.call(GENERATE, fields, seconds=60)["choices"]
    assert len(drawn["token_ids"]) == 4
    return engine._service.call("/weight_info", seconds=60)["weight_version"]


class Stop(BaseException):
    pass


@pytest.mark.parametrize(
    "path", ["/pause?mode=wait", "/start_weight_update", "/update_weights", "/finish_weight_update"]
)
def test_ctrl_c_in_an_update_leaves_a_server_that_draws(engine, policy, sync, monkeypatch, path):
    """The server goes on with the call that its client has left."""
    plain = engine._call

    def left(called, fields=None, **options):
        if called == path:
            with suppress(Lost):
                engine._service.call(called, fields, seconds=0.01)
            raise Stop
        return plain(called, fields, **options)

    monkeypatch.setattr(engine, "_call", left)
    with pytest.raises(Stop):
        sync.sync(engine, 2)
    monkeypatch.undo()
    assert others_draw(engine).startswith("broken-off.")
    move(policy, 0.05)
    sync.sync(engine, 2)
    drawn = engine.generate(requests(), GREEDY)
    expected = HFGenerator(policy).generate(requests(), GREEDY)
    assert [d.completion_ids for d in drawn] == [e.completion_ids for e in expected]


@pytest.mark.parametrize(("version", "rows"), [(3, 0), (5, 120)])
def test_weights_that_do_not_fit_are_refused_in_the_servers_words(
    engine, policy, sync, version, rows
):
    """A tensor that is missing, or has the shape of another model's; the next update is whole."""
    weights = checkpoint_weights(policy)
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    cut = weights.pop(name)[:rows].contiguous()
    published = PublishedWeights(weights | ({name: cut} if rows else {}), version)
    words = f"of version {version}: HTTP 500.*" + ("does not fit" if rows else "has nothing for")
    try:
        with pytest.raises(GeneratorError, match=words):
            engine.update_weights(WeightUpdate(version, published.path))
    finally:
        published.close()
    assert others_draw(engine).startswith("broken-off.")
    with pytest.raises(GeneratorError, match="no weights of this run have arrived whole"):
        engine.generate(requests(), GREEDY)
    sync.sync(engine, version + 1)
    drawn = engine.generate(requests(), GREEDY)
    expected = HFGenerator(policy).generate(requests(), GREEDY)
    assert [d.completion_ids for d in drawn] == [e.completion_ids for e in expected]


def test_what_the_server_was_started_without_is_said(server, policy, engine):
    for options, flag in (
        ({"max_model_len": 600}, "--max-model-len 600"),
        ({"lora_rank": 8}, "--enable-lora --max-lora-rank 8"),
        ({"enable_sleep": True}, "--enable-sleep-mode"),
    ):
        with pytest.raises(UserError, match=flag):
            connect_server(policy, ServerOptions(server.url, **options))


def test_requests_that_are_taken_back_are_aborted_by_the_server(server, engine):
    class Enough(Exception):
        pass

    def enough(indices, generations):
        assert server.running() >= 1
        raise Enough

    long = [GenerationRequest([5 + i], i) for i in range(3)]
    sampling = SamplingParams(480, temperature=0.05)
    with pytest.raises(Enough):
        engine.generate(long, sampling, on_batch=enough)
    deadline = time.monotonic() + 20
    while server.running() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.running() == 0


def test_a_server_that_is_killed_while_it_samples_ends_the_run(server, engine):
    """The last test: there is no server after it."""
    raised = []

    def run():
        try:
            engine.generate([GenerationRequest([5], i) for i in range(40)], SamplingParams(500))
        except GeneratorError as error:
            raised.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.running() and time.monotonic() < deadline:
        time.sleep(0.02)
    server.kill()
    thread.join(30)
    assert not thread.is_alive()
    assert re.search(r"failed after \d+ of 40 completions: .*does not answer either", raised[0])
