"""What is asked of the user's own vLLM server before a run: each option that it was started without
is named, with the command line that has them all."""

import re
import time
from types import SimpleNamespace

import pytest
import torch
from fake_vllm_server import GENERATE, KEY, connected, load, policy, ready, requests, vllm_server

from grpo_engine.generation.build import check_generator, generator_inputs
from grpo_engine.generation.vllm_server import ServerOptions, connect_server
from grpo_engine.types import SamplingParams, UserError

SAMPLING = SamplingParams(5)


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def refusal(words, options=(), version="0.32.0", **server):
    """What is said of a server that cannot be used; ``words`` must be in it."""
    with vllm_server(**server) as fake, pytest.raises(UserError, match=words) as caught:
        fake.version = version
        connected(fake, **dict(options))
    assert f"vllm_server_base_url '{fake.url}'" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "options", "words", "flag"),
    [
        (
            {"model_config.logprobs_mode": "raw_logprobs"},
            {},
            "log-probs are raw_logprobs",
            "--logprobs-mode processed_logprobs",
        ),
        (
            {"weight_transfer_config": None},
            {},
            "weight transfer is None",
            """--weight-transfer-config '{"backend": "grpo_engine_shared_memory"}'""",
        ),
        ({"weight_transfer_config": {"backend": "nccl"}}, {}, "transfer is 'nccl'", "--weight-tr"),
        ({}, {"max_model_len": 100}, "end at 64 tokens.* needs 100", "--max-model-len 100"),
        ({}, {"lora_rank": 8}, "no LoRA adapters", "--enable-lora --max-lora-rank 8"),
        ({"lora_config": {"max_lora_rank": 4}}, {"lora_rank": 8}, "at rank 4", "--max-lora-rank 8"),
        ({}, {"enable_sleep": True}, "sleep mode is off", "--enable-sleep-mode"),
    ],
)
def test_an_option_that_the_server_lacks_is_named_with_the_whole_command(
    config, options, words, flag
):
    said = refusal(words, options, config=config)
    assert "start it with: VLLM_SERVER_DEV_MODE=1 python" in said or options.get("lora_rank")
    assert re.search(r"api_server --model '/models/my policy' --port \d+ --enable-scale-out ", said)
    assert flag in said


def test_all_that_is_missing_is_named_at_once():
    config = {"model_config.logprobs_mode": "raw_logprobs", "weight_transfer_config": None}
    closed = {GENERATE: [(403, "Scale-out endpoints are disabled.")]}
    said = refusal("raw_logprobs", config=config, faults=closed)
    assert "weight transfer is None" in said and "Scale-out endpoints are disabled" in said


def test_a_server_outside_development_mode_is_told_how_to_start():
    refusal("development mode is off.*VLLM_SERVER_DEV_MODE=1 python -m vllm", dev_mode=False)


def test_an_older_vllm_and_something_else_are_told_apart():
    refusal(r"runs vLLM 0\.31\.2\+cu129.*>= 0\.32", version="0.31.2+cu129")
    refusal("HTTP 404.*is it vLLM", faults={"/version": [404]})
    stated = {"vllm_config": {}, "vllm_env": {}}
    refusal("not understood.*model_config", answers={"/server_info": stated})
    refusal("GET /health answers HTTP 503", faults={"/health": [503]})


def test_another_vocabulary_is_noticed_before_any_weights_are_sent():
    unknown = {GENERATE: [None, (400, "Token id 47 is out of vocabulary")]}
    refusal("serves another model: token id 47.*out of vocabulary", faults=unknown)
    with vllm_server(config={"model_config.skip_tokenizer_init": True}) as fake:
        connected(fake)
        assert len(fake.bodies(GENERATE)) == 1, "an id it has not would kill such a server"


def test_a_server_that_a_killed_trainer_left_asleep_or_paused_is_taken_as_it_is():
    with vllm_server() as fake:
        fake.asleep = fake.paused = True
        engine = connected(fake)
        assert not fake.asleep
        assert len(fake.bodies(GENERATE)) == 1, "a paused server would let a request wait for ever"
        load(engine)
        assert not fake.paused and len(engine.generate(requests(2), SAMPLING)) == 2


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(monkeypatch):
    with vllm_server(key=KEY) as fake:
        with pytest.raises(UserError, match="HTTP 401.*VLLM_API_KEY"):
            connected(fake)
        monkeypatch.setenv("VLLM_API_KEY", "wrong-one")
        with pytest.raises(UserError, match="HTTP 401") as caught:
            connected(fake)
        assert "wrong-one" not in str(caught.value)
        monkeypatch.setenv("VLLM_API_KEY", KEY)
        assert len(ready(fake).generate(requests(2), SAMPLING)) == 2


def settings(url, **changes):
    """What ``generation.build`` reads of a configuration."""
    given = {"generator": "vllm", "vllm_mode": "server", "vllm_server_base_url": url}
    given |= {"vllm_server_timeout": 5.0, "generation_timeout": 5.0, "temperature": 1.0}
    given |= {"vllm_max_model_length": 64, "vllm_enable_sleep_mode": False}
    return SimpleNamespace(**given | changes)


def test_another_version_of_the_server_makes_other_samples(capsys):
    with vllm_server(faults={"/health": ["drop"]}) as fake:
        config = settings(fake.url)
        check_generator(config, policy())
        before = {"engine": "vllm", "mode": "server", "version": "0.32.0", "source": fake.url}
        assert generator_inputs(config) == before
        assert f"waiting for the vLLM server at {fake.url}, 5 s" in capsys.readouterr().err
        fake.version = "0.33.1"
        assert generator_inputs(config) == before  # of one run
        check_generator(config, policy())  # the next one in this process
        assert generator_inputs(config) == before | {"version": "0.33.1"}
    assert generator_inputs(config)["version"] == "0.33.1"  # it died, the run says what it was


def test_inputs_without_a_server_are_no_inputs():
    with vllm_server() as fake:
        url = fake.url
    config = settings(url, vllm_server_timeout=0.3)
    check_generator(config, policy())
    with pytest.raises(UserError, match=r"no answer within vllm_server_timeout=0\.3 s"):
        generator_inputs(config)
    odd = {"/version": {"detail": "odd"}}
    with vllm_server(answers=odd) as fake, pytest.raises(UserError, match="not understood.*vers"):
        generator_inputs(settings(fake.url))


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [
        ("cpu", "highest", torch.float32),
        ("cpu", "HIGH", torch.float16),
        ("cpu", "medium", torch.bfloat16),
        ("cuda", "highest", torch.float16),  # TF32, in its attention
    ],
)
def test_what_its_fp32_products_are_rounded_to(device, precision, expected):
    with vllm_server(config={"device_config": {"device": device}}) as fake:
        fake.precision = precision
        assert connected(fake).fp32_products == expected


def test_a_server_that_is_not_there_is_waited_for_as_long_as_was_said():
    with vllm_server() as fake:
        url = fake.url
    started = time.monotonic()
    with pytest.raises(UserError, match=r"no answer within vllm_server_timeout=0\.7 s.*refused"):
        connect_server(policy(), ServerOptions(url, start_timeout_s=0.7))
    assert 0.6 < time.monotonic() - started < 5
    with vllm_server(faults={"/health": ["drop", "drop"]}) as fake:
        connected(fake)  # the third answer is a good one
        assert fake.paths().count("/health") == 3
    with vllm_server(faults={"/health": ["hang"]}) as fake, pytest.raises(UserError, match="0.5 s"):
        connected(fake, start_timeout_s=0.5)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host:port"])
def test_an_address_that_is_none_is_refused_before_anything_is_started(url):
    with pytest.raises(UserError, match="vllm_server_base_url .* not an address"):
        ServerOptions(url)


@pytest.mark.parametrize("secret", ["me:secret@host", "secret@host", "host/?key=secret"])
def test_an_address_with_a_secret_in_it_is_refused_and_not_repeated(secret):
    with pytest.raises(UserError, match="must hold no user, password") as caught:
        ServerOptions(f"http://{secret}")
    assert "secret" not in str(caught.value)


def test_an_address_for_openais_clients_will_do():
    with vllm_server() as fake:
        fake.url += "/v1/"
        ready(fake).generate(requests(1), SAMPLING)
    assert {path for path in fake.paths() if path.startswith("/v1")} == set()
