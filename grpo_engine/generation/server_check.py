"""What a `vllm serve` must have been started with to be trained against, found out at the start.

vLLM says how it was started (GET /server_info, in its development mode), so that every missing
option is named at once, with the command line that has them all.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from grpo_engine.endpoints import api_key, checked_url
from grpo_engine.generation.engine import fp32_products
from grpo_engine.generation.server_http import Lost, Refused, Service
from grpo_engine.generation.vllm_transfer import BACKEND
from grpo_engine.policy import Policy
from grpo_engine.types import UserError

FIELD = "vllm_server_base_url"
API_KEY_ENV = "VLLM_API_KEY"  # the variable that vllm serve reads its own key from
GENERATE = "/inference/v1/generate"
MIN_VERSION = (0, 32)  # says of each completion which weights drew it
CALL_SECONDS = 30.0
INFO_SECONDS = 120.0  # /server_info looks at the whole machine


@dataclass(frozen=True)
class ServerOptions:
    """Of the user's own server. Raises UserError for an address that is none.

    Attributes:
        base_url: where it listens, such as http://localhost:8000.
        timeout_s: seconds without any sign of life after which it counts as dead.
        start_timeout_s: seconds that its first answer may take.
        max_model_len: tokens of the longest prompt and completion that the run will ask for.
        lora_rank: of the adapter that is trained; 0 = none.
        enable_sleep: whether its device memory is wanted while the policy is trained.
    """

    base_url: str
    timeout_s: float = 600.0
    start_timeout_s: float = 240.0
    max_model_len: int | None = None
    lora_rank: int = 0
    enable_sleep: bool = False

    def __post_init__(self) -> None:
        checked_url(FIELD, self.base_url, example="http://localhost:8000")

    @property
    def url(self) -> str:
        """Without the /v1 that OpenAI's clients are given: most of vLLM's routes lie beside it."""
        return self.base_url.rstrip("/").removesuffix("/v1")


@dataclass(frozen=True)
class ServerFacts:
    """What the server says of itself."""

    vllm_version: str
    dtype: torch.dtype
    fp32_products: torch.dtype  # see ``Engine``
    max_model_len: int
    seats: int  # sequences that it samples at once
    max_logprobs: int  # of one token; -1 = the vocabulary
    can_sleep: bool


def serve_command(policy: Policy, options: ServerOptions, max_logprobs: int = 0) -> str:
    """The command line of a server that can be trained against. The user's own options (GPUs,
    memory, parallelism) come besides."""
    parts = ["VLLM_SERVER_DEV_MODE=1"]
    if options.lora_rank:
        parts.append("VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")
    # `vllm serve` by its module: the command that vLLM's builds for CPUs come with does not start
    parts += ["python", "-m", "vllm.entrypoints.openai.api_server"]
    parts += ["--model", shlex.quote(str(policy.model.config.name_or_path))]
    port = urllib.parse.urlsplit(options.url).port
    if port:
        parts += ["--port", str(port)]
    parts += ["--enable-scale-out", "--logprobs-mode", "processed_logprobs"]
    parts += ["--weight-transfer-config", shlex.quote(json.dumps({"backend": BACKEND}))]
    if max_logprobs:
        parts += ["--max-logprobs", str(max_logprobs)]
    if options.max_model_len is not None:
        parts += ["--max-model-len", str(options.max_model_len)]
    if options.lora_rank:
        parts += ["--enable-lora", "--max-lora-rank", str(options.lora_rank)]
    if options.enable_sleep:
        parts.append("--enable-sleep-mode")
    return " ".join(parts)


def check_server(service: Service, policy: Policy, options: ServerOptions) -> ServerFacts:
    """Wait until the server answers, and see that it can be trained against. Raises UserError."""
    _wait_until_up(service, options.start_timeout_s)
    with _asking(service):
        version = _checked_version(service)
        config, environment = _stated(service, policy, options)
        missing = list(_missing(service, config, environment, options))
        if missing:
            command = serve_command(policy, options)
            raise UserError(
                f"{FIELD} {service.url!r}: {'; '.join(missing)}; start it with: {command}"
            )
        if service.call("/is_sleeping", seconds=CALL_SECONDS)["is_sleeping"]:
            # A trainer that was killed left it so.
            service.call("/wake_up", {}, seconds=options.timeout_s)
        if not config["model_config"]["skip_tokenizer_init"]:
            # Without a tokenizer vLLM checks no ids, and dies of one that it does not have.
            _require_vocabulary(service, policy)
        return _facts(version, config, environment)


def version_of(url: str, wait_s: float) -> str:
    """The version of the vLLM behind ``url``, which may take ``wait_s`` to answer. Raises
    UserError."""
    service = service_of(ServerOptions(url))
    _wait_until_up(service, wait_s)
    with _asking(service):
        return _checked_version(service)


def service_of(options: ServerOptions) -> Service:
    return Service(options.url, api_key(FIELD, None, API_KEY_ENV))


@contextmanager
def _asking(service: Service) -> Iterator[None]:
    """Answers that are none, or of something else, are UserErrors in here."""
    where = f"{FIELD} {service.url!r}"
    try:
        yield
    except (Refused, Lost) as error:
        raise UserError(f"{where}: {error}; is it vLLM?") from None
    except (KeyError, TypeError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise UserError(f"{where}: what it says of itself is not understood ({said})") from None


def _wait_until_up(service: Service, seconds: float) -> None:
    """Until GET /health answers. A server that is still loading does not listen yet."""
    deadline, told = time.monotonic() + seconds, False
    while True:
        try:
            service.call("/health", seconds=min(seconds, CALL_SECONDS))
            return
        except Refused as error:
            raise UserError(
                f"{FIELD} {service.url!r}: GET /health answers {error}; is it a healthy vLLM?"
            ) from None
        except Lost as error:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"{FIELD} {service.url!r}: no answer within vllm_server_timeout={seconds:g} s "
                    f"({error}); is the server running there?"
                ) from None
        if not told:
            words = f"waiting for the vLLM server at {service.url}, {seconds:g} s at most"
            print(f"grpo-engine: {words}", file=sys.stderr)
            told = True
        time.sleep(0.5)


def _checked_version(service: Service) -> str:
    version = service.call("/version", seconds=CALL_SECONDS)["version"]
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < MIN_VERSION:
        wanted = ".".join(map(str, MIN_VERSION))
        raise UserError(
            f"{FIELD} {service.url!r}: runs vLLM {version}, and training against a server needs "
            f">= {wanted}"
        )
    return version


def _stated(
    service: Service, policy: Policy, options: ServerOptions
) -> tuple[dict[str, Any], dict[str, Any]]:
    """vLLM's configuration and environment, as its development mode tells them."""
    try:
        stated = service.call("/server_info?config_format=json", seconds=INFO_SECONDS)
    except Refused as error:
        if error.status != 404:
            raise
        raise UserError(
            f"{FIELD} {service.url!r}: its development mode is off, which the weight updates need; "
            f"start it with: {serve_command(policy, options)}"
        ) from None
    return stated["vllm_config"], stated["vllm_env"]


def _missing(
    service: Service, config: dict[str, Any], environment: dict[str, Any], options: ServerOptions
) -> Iterator[str]:
    """What the server was started without, one after the other."""
    model = config["model_config"]
    if model["logprobs_mode"] != "processed_logprobs":
        yield f"its log-probs are {model['logprobs_mode']}, those before temperature and top-p"
    transfer = config["weight_transfer_config"] or {}
    if transfer.get("backend") != BACKEND:
        yield f"its weight transfer is {transfer.get('backend')!r} and not {BACKEND!r}"
    try:
        service.call(GENERATE, {}, seconds=CALL_SECONDS)
    except Refused as error:  # 400 is the right answer to an empty request
        if error.status in (403, 404):
            yield f"its route for token ids is closed ({error})"
        elif error.status == 401:
            raise UserError(
                f"{FIELD} {service.url!r}: {error}; the server was started with an API key: put it "
                f"into the environment variable {API_KEY_ENV}"
            ) from None
    wanted = options.max_model_len
    if wanted is not None and model["max_model_len"] < wanted:
        yield f"its sequences end at {model['max_model_len']} tokens, and the run needs {wanted}"
    if options.lora_rank:
        lora = config["lora_config"]
        if lora is None or not environment.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            yield "it takes no LoRA adapters while it runs"
        elif lora["max_lora_rank"] < options.lora_rank:
            yield f"its adapters end at rank {lora['max_lora_rank']}, not {options.lora_rank}"
    if options.enable_sleep and not model["enable_sleep_mode"]:
        yield "its sleep mode is off (vllm_enable_sleep_mode)"


def _facts(version: str, config: dict[str, Any], environment: dict[str, Any]) -> ServerFacts:
    model, scheduler = config["model_config"], config["scheduler_config"]
    on_cpu = config["device_config"]["device"] == "cpu"
    return ServerFacts(
        vllm_version=version,
        dtype=getattr(torch, model["dtype"].removeprefix("torch.")),
        fp32_products=fp32_products(environment["VLLM_FLOAT32_MATMUL_PRECISION"], on_cpu=on_cpu),
        max_model_len=model["max_model_len"],
        seats=scheduler["max_num_seqs"] * config["parallel_config"]["data_parallel_size"],
        max_logprobs=model["max_logprobs"],
        can_sleep=not on_cpu,
    )


def _require_vocabulary(service: Service, policy: Policy) -> None:
    """It takes the last id of the policy's vocabulary. Whatever else tells another model from ours
    shows when the weights come."""
    if service.call("/is_paused", seconds=CALL_SECONDS)["is_paused"]:
        return  # an update was broken off; the next one ends the pause
    last = policy.text_config.vocab_size - 1
    fields = {"token_ids": [last], "sampling_params": {"max_tokens": 1, "detokenize": False}}
    try:
        service.call(GENERATE, fields, seconds=CALL_SECONDS)
    except Refused as error:
        if error.status != 400:
            raise
        raise UserError(
            f"{FIELD} {service.url!r}: serves another model: token id {last} of the policy's "
            f"vocabulary is refused ({error})"
        ) from None
