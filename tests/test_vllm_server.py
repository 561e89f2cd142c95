"""The user's own vLLM server as an engine, against a server that misbehaves as told: what is asked
of it, what ends a run and in which words, and that nothing waits for ever. How it is connected to:
test_vllm_server_check.py; a real one: test_vllm_serve.py."""

import os
import signal
import threading
import time

import pytest
import torch
from fake_vllm_server import GENERATE, completion, connected, load, ready, requests, vllm_server

from grpo_engine.generation.server_http import Lost, Streams, as_finished
from grpo_engine.types import GeneratorError, SamplingParams, UserError

EOS = 1
NO_LOGPROB = {"content": [{"token_id": 7, "logprob": -9999.0}]}
UPDATE = [
    "/pause?mode=wait",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/reset_prefix_cache",
    "/resume",
    "/weight_info",
]


SAMPLING = SamplingParams(5, temperature=0.7, top_p=0.9, top_k=8)


class Stop(BaseException):
    pass


@pytest.fixture
def ctrl_c():
    """``after(seconds)``: the handler raises in the main thread, as ``Interrupt.abortable`` has
    it."""

    def stop(*_):
        raise Stop

    before = signal.signal(signal.SIGALRM, stop)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


# -- drawing -------------------------------------------------------------------------------------


def test_a_completion_is_what_the_server_streamed_and_is_asked_for_as_sampling_says():
    with vllm_server() as fake:
        drawn = ready(fake).generate(requests(2), SAMPLING)
    body = fake.bodies(GENERATE)[-2:][0]
    ids = [(3 + 4 + 2**62 + i) % 40 + 3 for i in range(5)]
    assert drawn[0].completion_ids == ids and drawn[0].finish_reason == "length"
    assert drawn[0].sampler_logprobs == [-0.5 - i / 100 for i in ids]
    assert body["token_ids"] in ([3, 4], [3, 5]) and body["stream"] is True
    sent = body["sampling_params"]
    asked = {"temperature": 0.7, "top_p": 0.9, "top_k": 8, "max_tokens": 5, "logprobs": 0}
    assert asked.items() <= sent.items()
    assert sent["stop_token_ids"] == [EOS] and sent["ignore_eos"] is True
    assert {b["sampling_params"]["seed"] for b in fake.bodies(GENERATE)[-2:]} == {2**62, 2**62 + 1}


def test_a_completion_that_ends_itself_keeps_its_end_token():
    def draw(fake, body):
        return completion(fake, body, ids=[7, EOS], reason="stop")

    with vllm_server(draw=draw) as fake:
        drawn = ready(fake).generate(requests(1), SAMPLING)
    assert drawn[0].completion_ids == [7, EOS] and drawn[0].finish_reason == "stop"


def test_finished_completions_arrive_while_others_are_still_sampled():
    arrived, first_may_go = [], threading.Event()

    def draw(fake, body):
        if body["token_ids"] == [3, 4]:
            assert first_may_go.wait(20)
        yield from completion(fake, body)

    def on_batch(indices, generations):
        arrived.extend(indices)
        assert len(indices) == len(generations) == 1
        if len(arrived) == 9:
            first_may_go.set()

    with vllm_server(draw=draw) as fake:
        drawn = ready(fake).generate(requests(10), SAMPLING, on_batch=on_batch)
    assert arrived[-1] == 0 and sorted(arrived) == list(range(10))
    for i, generation in enumerate(drawn):
        assert generation.completion_ids[0] == (7 + i + 2**62 + i) % 40 + 3


def test_as_many_requests_are_under_way_as_the_server_has_seats():
    full = threading.Barrier(4, timeout=20)

    def draw(fake, body):
        full.wait()  # passes only with four of them inside
        return completion(fake, body)

    config = {"scheduler_config": {"max_num_seqs": 2}, "parallel_config": {"data_parallel_size": 2}}
    with vllm_server(draw=draw, config=config) as fake:
        ready(fake).generate(requests(12), SAMPLING)
    assert fake.most_at_once == 4


def listing(fake, body, **first):
    """A completion with the ids that each token was drawn from: itself and 3, half each."""
    for event in completion(fake, body):
        for position in event["choices"][0]["logprobs"]["content"]:
            half = {"logprob": -0.6931472}
            likeliest = [(position["token_id"], half), (2, half), (40, {"logprob": -9999.0})]
            position["top_logprobs"] = [{"token_id": i, **x, **first} for i, x in likeliest]
        yield event


def test_the_ids_that_a_token_was_drawn_from_come_with_it_where_they_are_asked_for():
    sampling = SamplingParams(5, top_k=2, return_support=True)
    with vllm_server(draw=listing) as fake:
        engine = ready(fake)
        (drawn,) = engine.generate(requests(1), sampling)
        assert fake.bodies(GENERATE)[-1]["sampling_params"]["logprobs"] == 20  # 2 top_k + 16
        assert drawn.support.counts.tolist() == [2] * 5
        pairs = drawn.support.ids.reshape(5, 2).tolist()
        assert pairs == [[i, 2] for i in drawn.completion_ids]
        (plain,) = engine.generate(requests(1), SAMPLING)
        assert plain.support is None
        with pytest.raises(UserError, match="24 largest.*lists 20.*--max-logprobs 24"):
            engine.generate(requests(1), SamplingParams(5, top_k=4, return_support=True))


def test_a_support_that_is_not_all_there_ends_the_run():
    with vllm_server(draw=lambda fake, body: listing(fake, body, logprob=-2.0)) as fake:
        engine = ready(fake)
        with pytest.raises(GeneratorError, match="3 ids hold 0.4060 of the mass"):
            engine.generate(requests(1), SamplingParams(5, top_k=2, return_support=True))


# -- answers that cannot be used -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ids": [7, 8], "reason": "stop"}, r"stopped after \[8\]"),
        ({"ids": [7, 8]}, "cut at 2 of 5"),
        ({"reason": "abort"}, "ended with 'abort' after 5 tokens"),
        ({"ids": [7, 8, 9, 10, 48]}, "token id 48, and the vocabulary has 48"),
        ({"label": "default"}, r"drawn with default and not with 0\.\w+: was the server restarted"),
        ({"weight_versions": None}, "drawn with weights it does not name"),
        ({"logprobs": None}, "log-probs are of other tokens"),
        ({"logprobs": {"content": [{"token_id": 7, "logprob": -0.5}]}}, "of other tokens"),
        ({"ids": [7] * 5, "logprobs": NO_LOGPROB}, "without log-probability: are its logits NaN"),
        ({"ids": [7] * 5, "logprobs": {"content": [{"token_id": 7}]}}, "in no form of vLLM's"),
        ({"logprobs": 3}, "an event that is none of vLLM's"),
        ({"token_ids": None}, "cut at 4 of 5"),
    ],
)
def test_a_completion_that_was_not_drawn_as_asked_ends_the_run(changes, words):
    def draw(fake, body):
        return completion(fake, body, **changes)

    with vllm_server(draw=draw) as fake:
        engine = ready(fake)
        with pytest.raises(GeneratorError, match=words) as caught:
            engine.generate(requests(1), SAMPLING)
    assert fake.url in str(caught.value) and "request 0" in str(caught.value)


@pytest.mark.parametrize("fault", [(400, "prompt is too odd"), (500, "EngineCore is unhappy")])
def test_a_refusal_is_told_in_the_servers_words(fault):
    with vllm_server() as fake:
        engine = ready(fake)
        fake.faults[GENERATE] = [fault]
        with pytest.raises(GeneratorError, match=f"HTTP {fault[0]}: {fault[1]}"):
            engine.generate(requests(3), SAMPLING)


def test_an_error_in_the_middle_of_a_stream_is_told_in_the_servers_words():
    def draw(fake, body):
        yield next(completion(fake, body))
        yield {"error": {"message": "KV cache load failed", "code": 500}}

    with vllm_server(draw=draw) as fake:
        engine = ready(fake)
        with pytest.raises(GeneratorError, match="stopped in the middle: KV cache load failed"):
            engine.generate(requests(1), SAMPLING)


def test_a_server_that_dies_in_the_middle_is_noticed_at_once():
    def draw(fake, body):
        yield from completion(fake, {**body, "sampling_params": {"seed": 0, "max_tokens": 2}})
        fake.faults["/health"] = ["drop"]
        yield "drop"

    started = time.monotonic()
    with vllm_server(draw=draw) as fake:
        engine = ready(fake, timeout_s=60)
        with pytest.raises(GeneratorError, match="after 0 of 6 completions.*does not answer"):
            engine.generate(requests(6), SAMPLING)
    assert time.monotonic() - started < 10


def test_a_server_that_hangs_is_given_up_after_the_timeout_and_the_rest_is_taken_back():
    def draw(fake, body):
        if body["token_ids"] == [3, 4]:
            yield "hang"
        yield from completion(fake, body)

    with vllm_server(draw=draw) as fake:
        engine = ready(fake, timeout_s=0.8)
        started = time.monotonic()
        with pytest.raises(GeneratorError, match=r"after 5 of 6.*no sign of life for 0\.8 s.*runs"):
            engine.generate(requests(6), SAMPLING)
        assert 0.7 < time.monotonic() - started < 5
        fake.paused = True
        with pytest.raises(GeneratorError, match="is paused"):
            engine.generate(requests(6), SAMPLING)


def test_slow_is_not_dead():
    """Each event is a sign of life, whatever the whole takes."""

    def draw(fake, body):
        for event in completion(fake, body):
            time.sleep(0.4)
            yield event

    with vllm_server(draw=draw) as fake:
        drawn = ready(fake, timeout_s=0.7).generate(requests(2), SAMPLING)
    assert [len(generation.completion_ids) for generation in drawn] == [5, 5]


def test_an_exception_of_on_batch_takes_the_other_requests_back():
    begun, broken_off = threading.Event(), threading.Event()

    def draw(fake, body):
        if body["token_ids"] == [3, 4]:
            assert begun.wait(10)
        else:
            begun.set()
            try:
                while not fake.stopping.wait(0.05):
                    yield next(completion(fake, body))
            finally:  # nobody reads it any more
                broken_off.set()
        yield from completion(fake, body)

    def on_batch(indices, generations):
        raise RuntimeError("the reward is broken")

    with vllm_server(draw=draw) as fake:
        engine = ready(fake)
        with pytest.raises(RuntimeError, match="the reward is broken"):
            engine.generate(requests(2), SAMPLING, on_batch=on_batch)
        assert broken_off.wait(10), "the server goes on for nobody"


def test_a_signal_leaves_a_hanging_server_at_once(ctrl_c):
    def draw(fake, body):
        yield "hang"

    with vllm_server(draw=draw) as fake:
        engine = ready(fake, timeout_s=60)
        started = time.monotonic()
        ctrl_c(0.3)
        with pytest.raises(Stop):
            engine.generate(requests(2), SAMPLING)
        assert time.monotonic() - started < 5


def test_close_ends_a_generation_in_another_thread():
    def draw(fake, body):
        yield "hang"

    with vllm_server(draw=draw) as fake:
        engine = ready(fake, timeout_s=60)
        raised = []

        def run():
            try:
                engine.generate(requests(2), SAMPLING)
            except GeneratorError as error:
                raised.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        while fake.at_once < 2:
            time.sleep(0.01)
        engine.close()
        thread.join(10)
        assert not thread.is_alive() and "closed while it was sampling" in raised[0]
        for call in (lambda: engine.generate(requests(1), SAMPLING), lambda: load(engine, 1)):
            with pytest.raises(GeneratorError, match="close"):
                call()


def test_a_close_between_two_requests_ends_the_generation_too():
    streams = Streams()

    def work(index):
        streams.close()  # the thread takes no further request, and has nothing to say
        return index

    drawn = as_finished(work, 3, 1, streams, 60.0)
    assert next(drawn) == (0, 0)
    with pytest.raises(Lost, match="closed meanwhile"):
        next(drawn)


# -- weights ---------------------------------------------------------------------------------------


def test_an_update_goes_through_vllms_own_calls_and_says_what_the_server_then_has():
    with vllm_server() as fake:
        engine = connected(fake)
        fake.calls.clear()
        loaded, replies = load(engine, version=7, tensors={"a": torch.ones(3), "b": torch.zeros(2)})
        assert loaded.version == 7 and loaded.method == "native" and loaded.replied
        assert [reply.version for reply in replies] == [7]
        assert sorted(replies[0].checksums) == ["a", "b"]
        assert fake.paths() == UPDATE
        info = fake.bodies("/update_weights")[0]["update_info"]
        assert info["version"] == 7 and info["adapter"] is False
        assert not fake.paused
        generations = engine.generate(requests(1), SAMPLING)
        assert len(generations[0].completion_ids) == 5


def test_nothing_is_drawn_before_weights_have_arrived_whole():
    with vllm_server() as fake:
        engine = connected(fake)
        with pytest.raises(GeneratorError, match="no weights of this run"):
            engine.generate(requests(1), SAMPLING)


@pytest.mark.parametrize("path", [path.partition("?")[0] for path in UPDATE])
@pytest.mark.parametrize("fault", [(500, "shape mismatch in lm_head"), "drop", "hang"])
def test_an_update_that_fails_anywhere_leaves_an_engine_that_draws_nothing(path, fault):
    with vllm_server() as fake:
        engine = ready(fake, timeout_s=0.5)
        fake.faults[path] = [fault]
        with pytest.raises(GeneratorError, match="did not take the weights of version 1") as caught:
            load(engine, version=1)
        if isinstance(fault, tuple):
            assert "HTTP 500: shape mismatch in lm_head" in str(caught.value)
        # other people's requests go on, and are told what draws them
        assert "It runs" in str(caught.value) and not fake.paused and not fake.active
        assert fake.label.partition(".")[0] == ("1" if path == "/weight_info" else "broken-off")
        with pytest.raises(GeneratorError, match="no weights of this run"):
            engine.generate(requests(1), SAMPLING)
        load(engine, version=2)  # the next one is whole again
        engine.generate(requests(1), SAMPLING)
        assert not fake.paused


@pytest.mark.parametrize("path", ["/pause", "/start_weight_update", "/update_weights", "/resume"])
def test_ctrl_c_in_an_update_leaves_a_server_that_goes_on(ctrl_c, path):
    with vllm_server() as fake:
        engine = ready(fake, timeout_s=60)
        fake.faults[path] = ["hang"]
        started = time.monotonic()
        ctrl_c(0.3)
        with pytest.raises(Stop):
            load(engine, version=1)
        assert time.monotonic() - started < 10
        assert not fake.paused and not fake.active and fake.label.startswith("broken-off.")
        load(engine, version=2)
        engine.generate(requests(1), SAMPLING)


def test_nothing_overtakes_a_load_that_a_server_does_not_answer_for(ctrl_c, monkeypatch):
    """It would draw from layers that have no weights yet."""
    monkeypatch.setattr("grpo_engine.generation.vllm_server.ORDER_SECONDS", 0.5)
    with vllm_server() as fake:
        engine = ready(fake, timeout_s=60)
        fake.faults = {"/update_weights": ["hang"], "/finish_weight_update": ["hang"]}
        started = time.monotonic()
        ctrl_c(0.3)
        with pytest.raises(Stop):
            load(engine, version=1)
        assert time.monotonic() - started < 5
        assert fake.paths()[-1] == "/finish_weight_update" and fake.paused


@pytest.mark.parametrize(
    ("path", "answer", "words"),
    [
        ("/reset_prefix_cache", {"success": False}, "keeps the prefix cache"),
        ("/weight_info", {"weight_version": "default"}, "its weights are 'default', not '1"),
        ("/weight_info", {}, "its weights are None"),
    ],
)
def test_a_server_that_says_it_has_something_else_is_not_believed(path, answer, words):
    with vllm_server() as fake:
        engine = ready(fake)
        fake.answers[path] = answer
        with pytest.raises(GeneratorError, match=words):
            load(engine, version=1)
        with pytest.raises(GeneratorError, match="no weights of this run"):
            engine.generate(requests(1), SAMPLING)


def test_an_update_that_a_killed_trainer_left_open_does_not_lock_the_server():
    with vllm_server() as fake:
        fake.active = True
        engine = connected(fake)
        loaded, replies = load(engine, version=3)
        assert loaded.version == 3 and len(replies) == 1
        assert not fake.active


def test_weights_that_another_trainer_sent_are_noticed_at_the_next_completion():
    with vllm_server() as fake:
        ours, theirs = ready(fake), connected(fake)
        load(theirs)  # the same version, from somebody else
        with pytest.raises(GeneratorError, match="sent other weights"):
            ours.generate(requests(1), SAMPLING)


def test_an_adapter_is_loaded_under_a_new_name_each_time():
    config = {"lora_config": {"max_lora_rank": 8}}
    with vllm_server(config=config) as fake:
        engine = ready(fake, lora_rank=8)
        names = []
        for version in (1, 2):
            tensors = {"lora_A": torch.full((2, 2), float(version))}
            loaded, _ = load(engine, version, tensors, adapter_config='{"r": 8}')
            assert (loaded.version, loaded.method, loaded.replied) == (version, "lora", False)
            names += list(fake.adapters)
            engine.generate(requests(1), SAMPLING)
            assert fake.bodies(GENERATE)[-1]["model"] == names[-1]
        assert len(names) == len(set(names)) == 2
        assert torch.full((4,), 2.0).numpy().tobytes() in fake.adapters[names[1]]
        engine.close()
        assert fake.adapters == {}
        engine.close()
        assert fake.paths().count("/v1/unload_lora_adapter") == 2


@pytest.mark.parametrize("fault", [(500, "no room"), "drop"])
def test_an_adapter_that_did_not_arrive_is_not_left_there(fault):
    config = {"lora_config": {"max_lora_rank": 8}}
    sent = {"tensors": {"lora_A": torch.ones(2, 2)}, "adapter_config": '{"r": 8}'}
    with vllm_server(config=config) as fake:
        engine = ready(fake, lora_rank=8)
        fake.faults["/v1/load_lora_adapter"] = [fault]
        with pytest.raises(GeneratorError, match="did not take the weights of version 1"):
            load(engine, 1, **sent)
        tried = fake.bodies("/v1/load_lora_adapter")[-1]
        assert fake.bodies("/v1/unload_lora_adapter") == [{"lora_name": tried["lora_name"]}]
        assert not os.path.exists(tried["lora_path"])
        load(engine, 2, **sent)
        assert len(fake.adapters) == 1


def test_the_end_does_not_wait_for_a_server_that_hangs_or_is_gone(monkeypatch):
    monkeypatch.setattr("grpo_engine.generation.vllm_server.ORDER_SECONDS", 0.5)
    config = {"lora_config": {"max_lora_rank": 8}}
    for fault in ("hang", "drop"):
        with vllm_server(config=config) as fake:
            engine = ready(fake, lora_rank=8)
            load(engine, 1, {"lora_A": torch.ones(2, 2)}, adapter_config='{"r": 8}')
            folder = fake.bodies("/v1/load_lora_adapter")[-1]["lora_path"]
            fake.faults["/v1/unload_lora_adapter"] = [fault]
            started = time.monotonic()
            engine.close()
            assert time.monotonic() - started < 3 and not os.path.exists(folder)


def test_sleep_and_wake_are_asked_for_only_where_they_were_wanted():
    with vllm_server(config={"model_config.enable_sleep_mode": True}) as fake:
        engine = ready(fake)
        engine.sleep()
        engine.wake()
        assert "/wake_up" not in fake.paths() and engine.notes == []
        engine = ready(fake, enable_sleep=True)
        engine.sleep()
        engine.wake()
        assert fake.paths()[-2:] == ["/sleep?level=1&mode=wait", "/wake_up"]
        engine.sleep()
        engine.close()
        assert not fake.asleep, "other people's requests would wait for ever"
        engine = ready(fake, enable_sleep=True)
        engine.sleep()
        fake.faults["/wake_up"] = [(500, "out of memory")]
        with pytest.raises(GeneratorError, match="/wake_up: HTTP 500: out of memory"):
            engine.wake()
    config = {"model_config.enable_sleep_mode": True, "device_config": {"device": "cpu"}}
    with vllm_server(config=config) as fake:
        engine = ready(fake, enable_sleep=True)
        engine.sleep()
        assert "/sleep?level=1&mode=wait" not in fake.paths() and "cannot sleep" in engine.notes[0]
