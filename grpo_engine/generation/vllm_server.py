"""The user's own `vllm serve` as an engine: token ids over HTTP, weights through vLLM's own routes.

Each request is one stream of POST /inference/v1/generate, vLLM's route for token ids. As many are
under way as the server has seats, so finished completions arrive while others are still sampled.
The server names with each completion the weights that drew it: one that was restarted, or was sent
other weights, is noticed at the next completion.

The server is the user's: it is neither started nor stopped here, and what weights it holds when a
run begins does not matter. It goes on with those of the last update. One that breaks off, by an
error or by Ctrl-C, is ended in order, so that other people's requests go on: with the old weights,
the new ones, or, where the load itself failed, some of each; the server then calls them
"broken-off". Only a trainer that is killed leaves it paused, until the next one comes.
"""

from __future__ import annotations

import math
import secrets
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from grpo_engine.generation.base import OnBatch
from grpo_engine.generation.engine import (
    LoadedWeights,
    WeightUpdate,
    support_of,
    support_width,
)
from grpo_engine.generation.server_check import (
    CALL_SECONDS,
    FIELD,
    GENERATE,
    ServerFacts,
    ServerOptions,
    check_server,
    serve_command,
    service_of,
)
from grpo_engine.generation.server_http import Lost, Refused, Service, Streams, as_finished
from grpo_engine.generation.shared_weights import ReceivedWeights, write_adapter
from grpo_engine.policy import Policy
from grpo_engine.support import Support
from grpo_engine.types import (
    Generation,
    GenerationRequest,
    GeneratorError,
    SamplingParams,
    UserError,
)

STREAM_INTERVAL = 128  # tokens of one event: a sign of life now and then, not at every token
MAX_THREADS = 1024
ORDER_SECONDS = 20.0  # to put a server in order that may be dead or hang
NO_LOGPROB = -9999.0  # what vLLM says where it has none
NO_SLEEP = "vllm_enable_sleep_mode: vLLM on the CPU cannot sleep; it keeps its memory"


def connect_server(policy: Policy, options: ServerOptions) -> VLLMServer:
    """The running server at ``options.base_url``, before its first weights.

    Raises UserError: no server there, one that was started without what training needs (the message
    has the whole command line), or one with another model.
    """
    service = service_of(options)
    facts = check_server(service, policy, options)
    try:
        service.call("/init_weight_transfer_engine", {"init_info": {}}, seconds=options.timeout_s)
    except (Refused, Lost) as error:
        raise UserError(f"{FIELD} {service.url!r}: refuses the weight transfer: {error}") from None
    return VLLMServer(service, policy, options, facts)


class VLLMServer:
    """An ``Engine`` (see ``generation.engine``) behind ``service``; made by ``connect_server``."""

    def __init__(
        self,
        service: Service,
        policy: Policy,
        options: ServerOptions,
        facts: ServerFacts,
    ) -> None:
        self.dtype, self.fp32_products = facts.dtype, facts.fp32_products
        self.max_model_len = facts.max_model_len
        self.version = facts.vllm_version
        self._sleeps, self._asleep = options.enable_sleep and facts.can_sleep, False
        self.notes = [] if self._sleeps or not options.enable_sleep else [NO_SLEEP]
        self._service, self._options, self._facts = service, options, facts
        self._eos_ids, self._vocab_size = policy.eos_ids, policy.text_config.vocab_size
        self._command = partial(serve_command, policy, options)
        self._name = f"the vLLM server at {service.url}"
        self._mark = secrets.token_hex(4)  # another trainer's version 3 is not ours
        self._label: str | None = None  # that the server gave to the weights it was last sent
        self._adapter: tuple[str, tempfile.TemporaryDirectory] | None = None
        self._streams = Streams()
        self._closed = False

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParams,
        *,
        on_batch: OnBatch | None = None,
    ) -> list[Generation]:
        """See ``Engine.generate``. ``on_batch`` is called in the caller's thread, with one
        completion at a time."""
        if self._label is None:
            raise GeneratorError(f"{self._name}: no weights of this run have arrived whole")
        self._streams = streams = Streams()
        if self._closed:  # looked at after the line above, so that close() reaches one or the other
            streams.close()
        results: list[Generation | None] = [None] * len(requests)
        shared = self._request_fields(sampling)
        drawn = as_finished(
            lambda index: self._draw(index, requests[index], shared, sampling, streams),
            len(requests),
            min(self._facts.seats, MAX_THREADS),
            streams,
            self._options.timeout_s,
        )
        done = 0
        with closing(drawn):
            try:
                for index, generation in drawn:
                    results[index] = generation
                    done += 1
                    if on_batch is not None:
                        on_batch([index], [generation])
            except Lost as error:
                raise self._lost(error, done, len(requests)) from None
        return [generation for generation in results if generation is not None]

    def update_weights(self, update: WeightUpdate) -> LoadedWeights:
        """See ``Engine.update_weights``. Other people's requests are waited for, and wait."""
        held, self._label = self._label, None  # nothing is drawn from weights that came by half
        try:
            if update.adapter:
                loaded, label = self._load_adapter(update), held
            else:
                loaded, label = self._load(update)
        except (Refused, Lost) as error:
            raise GeneratorError(
                f"{self._name} did not take the weights of version {update.version}: {error}. "
                f"{self._state()}"
            ) from None
        self._label = label
        return loaded

    def sleep(self) -> None:
        if self._sleeps and not self._asleep:
            self._do("/sleep?level=1&mode=wait")
            self._asleep = True

    def wake(self) -> None:
        if self._asleep:
            self._do("/wake_up")
            self._asleep = False

    def close(self) -> None:
        """The server goes on, awake, with the weights that it has and without our adapter."""
        self._closed = True
        self._streams.close()
        calls = [("/wake_up", {})] if self._asleep else []
        adapter, self._adapter, self._asleep = self._adapter, None, False
        if adapter is not None:
            calls.append(("/v1/unload_lora_adapter", {"lora_name": adapter[0]}))
        self._put_in_order(*calls)
        if adapter is not None:
            adapter[1].cleanup()

    def _do(self, path: str) -> None:
        try:
            self._call(path, {})
        except (Refused, Lost) as error:
            raise GeneratorError(f"{self._name}, {path}: {error}. {self._state()}") from None

    def _put_in_order(self, *calls: tuple[str, dict[str, Any]]) -> None:
        """Make ``calls``, whatever becomes of them: an error is on its way already, or the end. One
        without an answer is the last, for what comes after it must not come before it."""
        end = time.monotonic() + ORDER_SECONDS
        with suppress(Lost):
            for path, fields in calls:
                seconds = max(0.1, end - time.monotonic())
                with suppress(Refused):
                    self._service.call(path, fields, seconds=seconds, answers_json=False)

    # -- drawing -----------------------------------------------------------------------------------

    def _request_fields(self, sampling: SamplingParams) -> dict[str, Any]:
        """vLLM's SamplingParams, less the seed. With ignore_eos the ids that end a completion are
        ours, whatever the model folder of the server says. Raises UserError where the server does
        not list as many log-probs as the supports need."""
        width, most = support_width(sampling, self._vocab_size), self._facts.max_logprobs
        if width > most >= 0:
            raise UserError(
                f"{FIELD} {self._service.url!r}: with top_k or top_p the run needs the {width} "
                f"largest log-probs of each token, the server lists {most}; start it with: "
                f"{self._command(max_logprobs=width)}"
            )
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": sampling.max_completion_length,
            "stop_token_ids": list(self._eos_ids),
            "ignore_eos": True,
            "logprobs": width,
            "detokenize": False,
            "stream_interval": STREAM_INTERVAL,
        }

    def _draw(
        self,
        index: int,
        request: GenerationRequest,
        shared: dict[str, Any],
        sampling: SamplingParams,
        streams: Streams,
    ) -> Generation:
        """One completion. Raises Lost, and GeneratorError for an answer that cannot be used."""
        fields = {
            "token_ids": request.prompt_ids,
            "sampling_params": {**shared, "seed": request.seed},
            "stream": True,
        }
        if self._adapter is not None:
            fields["model"] = self._adapter[0]
        completion = Completion(with_support=shared["logprobs"] > 0)
        try:
            for event in self._service.events(GENERATE, fields, streams):
                completion.add(event)
            return completion.generation(sampling, self._eos_ids, self._vocab_size, self._label)
        except (Refused, Unusable) as error:
            raise GeneratorError(f"{self._name}, request {index}: {error}") from None

    def _lost(self, error: Lost, done: int, count: int) -> GeneratorError:
        if self._closed:
            return GeneratorError(f"{self._name}: closed while it was sampling")
        return GeneratorError(
            f"{self._name} failed after {done} of {count} completions: {error}. {self._state()}"
        )

    def _state(self) -> str:
        """What the server says of itself now, for a message about its failure."""
        try:
            self._service.call("/health", seconds=CALL_SECONDS)
            paused = self._service.call("/is_paused", seconds=CALL_SECONDS)
        except (Refused, Lost) as error:
            return f"Asked about its health it does not answer either ({error}); see its own log"
        if isinstance(paused, dict) and paused.get("is_paused"):
            return "It runs, but is paused (POST /resume lets it go on)"
        return "It runs; see its own log"

    # -- weights -----------------------------------------------------------------------------------

    def _load(self, update: WeightUpdate) -> tuple[LoadedWeights, str]:
        """vLLM's own update, from the pause before it to the label after it."""
        label = f"{update.version}.{self._mark}"
        try:
            self._call("/pause?mode=wait", {})
            self._start_update()
            self._call("/update_weights", {"update_info": asdict(update)})
            self._call("/finish_weight_update", {"weight_version": label})
            answer = self._call("/reset_prefix_cache", {})
            if answer != {"success": True}:
                raise Lost(f"it keeps the prefix cache of its old weights ({answer})")
            self._call("/resume", {})
        except BaseException:  # Ctrl-C too
            self._put_in_order(
                ("/finish_weight_update", {}),  # waits for a load that still goes on
                ("/update_weight_version", {"new_version": f"broken-off.{self._mark}"}),
                ("/reset_prefix_cache", {}),
                ("/resume", {}),
            )
            raise
        reported = (self._call("/weight_info") or {}).get("weight_version")
        if reported != label:
            raise Lost(f"after the update it says that its weights are {reported!r}, not {label!r}")
        return LoadedWeights(update.version), label

    def _start_update(self) -> None:
        try:
            self._call("/start_weight_update", {})
        except Refused as error:
            if "already active" not in error.words:
                raise
            # A trainer that was killed during an update left it open; one that fails closes it.
            with suppress(Refused):
                self._call("/update_weights", {"update_info": {}})
            self._call("/start_weight_update", {})

    def _load_adapter(self, update: WeightUpdate) -> LoadedWeights:
        """Under a name of its own, so that nothing cached under the last adapter is read."""
        name = f"grpo-engine-{update.version}-{self._mark}"
        folder = tempfile.TemporaryDirectory(prefix="grpo-engine-adapter-")
        received = ReceivedWeights(update.memory, update.version)
        try:
            write_adapter(received, Path(folder.name))
        finally:
            received.close()
        fields = {"lora_name": name, "lora_path": folder.name}
        try:
            self._call("/v1/load_lora_adapter", fields, answers_json=False)
        except BaseException:  # Ctrl-C too; it may have arrived
            self._put_in_order(("/v1/unload_lora_adapter", {"lora_name": name}))
            folder.cleanup()
            raise
        last, self._adapter = self._adapter, (name, folder)
        if last is not None:
            self._call("/v1/unload_lora_adapter", {"lora_name": last[0]}, answers_json=False)
            last[1].cleanup()
        return LoadedWeights(update.version, method="lora", replied=False)

    def _call(
        self, path: str, fields: dict[str, Any] | None = None, *, answers_json: bool = True
    ) -> Any:
        if self._closed:
            raise GeneratorError(f"{self._name}: {path} after close()")
        seconds = self._options.timeout_s
        return self._service.call(path, fields, seconds=seconds, answers_json=answers_json)


class Unusable(Exception):
    """An answer of the server that is no completion of ours; says why."""


class Completion:
    """One completion, put together from the events of its stream."""

    def __init__(self, with_support: bool = False) -> None:
        self._with_support = with_support
        self._ids: list[int] = []
        self._positions: list[dict[str, Any]] = []  # a token's log-prob, and the likeliest ids'
        self._finish_reason: str | None = None
        self._spans: list[dict[str, Any]] | None = None

    def add(self, event: dict[str, Any]) -> None:
        """The next event. Raises Unusable."""
        try:
            for choice in event["choices"]:
                self._ids += choice["token_ids"] or ()
                self._positions += (choice["logprobs"] or {}).get("content") or ()
                self._finish_reason = choice["finish_reason"] or self._finish_reason
                self._spans = choice.get("weight_versions") or self._spans
        except (KeyError, TypeError, ValueError, AttributeError):
            raise Unusable(f"an event that is none of vLLM's: {event!r:.200}") from None

    def generation(
        self, sampling: SamplingParams, eos_ids: Sequence[int], vocab_size: int, label: str | None
    ) -> Generation:
        """The whole. Raises Unusable where it was not drawn as asked, or not from ``label``."""
        ids, reason = self._ids, self._finish_reason
        if reason not in ("stop", "length"):
            raise Unusable(f"it ended with {reason!r} after {len(ids)} tokens")
        if reason == "stop" and (not ids or ids[-1] not in eos_ids):
            raise Unusable(f"it stopped after {ids[-1:]}, which ends no completion of this model")
        if reason == "length" and len(ids) != sampling.max_completion_length:
            raise Unusable(f"it was cut at {len(ids)} of {sampling.max_completion_length} tokens")
        if max(ids) >= vocab_size:
            raise Unusable(f"token id {max(ids)}, and the vocabulary has {vocab_size}")
        drawn_by = {span.get("version") for span in self._spans or ()}
        if drawn_by != {label}:
            names = ", ".join(sorted(map(str, drawn_by))) or "weights it does not name"
            raise Unusable(
                f"drawn with {names} and not with {label}: was the server restarted, or sent other "
                "weights?"
            )
        try:
            return Generation(ids, self._logprobs(), reason, self._support())
        except (KeyError, TypeError, AttributeError):
            raise Unusable("its log-probs are in no form of vLLM's") from None

    def _logprobs(self) -> list[float]:
        if [position["token_id"] for position in self._positions] != self._ids:
            raise Unusable("its log-probs are of other tokens than it has")
        logprobs = [position["logprob"] for position in self._positions]
        if min(logprobs) <= NO_LOGPROB:
            raise Unusable("a token without log-probability: are its logits NaN?")
        return logprobs

    def _support(self) -> Support | None:
        if not self._with_support:
            return None
        rows = [
            [(entry["token_id"], _unclamped(entry["logprob"])) for entry in token["top_logprobs"]]
            for token in self._positions
        ]
        try:
            return support_of(rows)
        except ValueError as error:
            raise Unusable(str(error)) from None


def _unclamped(logprob: float) -> float:
    """JSON has no -inf."""
    return -math.inf if logprob <= NO_LOGPROB else logprob
