"""The routes of a `vllm serve` that training uses, without vLLM; it misbehaves as told."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import torch

from grpo_engine.generation.engine import WeightUpdate
from grpo_engine.generation.shared_weights import PublishedWeights, ReceivedWeights
from grpo_engine.generation.vllm_server import ServerOptions, connect_server
from grpo_engine.generation.vllm_transfer import BACKEND
from grpo_engine.types import GenerationRequest

KEY = "vllm-very-secret-0123456789"
GENERATE = "/inference/v1/generate"


class FakeServer:
    """``faults``: by path (without query) what its next requests meet, one each: an HTTP status, a
    pair (status, text), "drop", "hang", or None for nothing. ``answers`` replaces what a path
    answers, ``config`` what /server_info says ("model_config.logprobs_mode": ...).

    ``draw(body)`` gives the events of a completion, or raises; by default ``completion``.
    """

    def __init__(self, *, faults=(), answers=(), config=(), draw=None, key=None, dev_mode=True):
        self.faults = {path: list(some) for path, some in dict(faults).items()}
        self.answers, self.draw, self.key = dict(answers), draw or completion, key
        self.dev_mode = dev_mode
        self.config = _config(dict(config))
        self.version, self.label, self.paused, self.active = "0.32.0", "default", False, False
        self.asleep, self.received, self.precision = False, None, "highest"
        self.adapters = {}  # by name: the bytes of its file
        self.calls = []  # (path with query, body)
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.url = ""

    def paths(self):
        return [path for path, _ in self.calls]

    def bodies(self, wanted):
        return [body for path, body in self.calls if path == wanted]

    # -- the routes ----------------------------------------------------------------------------

    def answer(self, path, query, body):
        """(status, JSON) of a route, or None where there is no such route."""
        if path in self.answers:
            return 200, self.answers[path]
        name = path.strip("/").replace("/", "_")
        route = getattr(self, f"on_{name}", None)
        public = ("health", "version", "v1_load_lora_adapter", "v1_unload_lora_adapter")
        if route is None or (not self.dev_mode and name not in public):
            return 404, {"detail": "Not Found"}
        return route(query, body)

    def on_health(self, query, body):
        return 200, None

    def on_version(self, query, body):
        return 200, {"version": self.version}

    def on_server_info(self, query, body):
        assert query == {"config_format": ["json"]}
        env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": True}
        env["VLLM_FLOAT32_MATMUL_PRECISION"] = self.precision
        return 200, {"vllm_config": self.config, "vllm_env": env}

    def on_init_weight_transfer_engine(self, query, body):
        return 200, {"message": "Weight transfer initialized"}

    def on_is_paused(self, query, body):
        return 200, {"is_paused": self.paused}

    def on_pause(self, query, body):
        assert query == {"mode": ["wait"]}
        self.paused = True
        return 200, {"status": "paused"}

    def on_resume(self, query, body):
        self.paused = False
        return 200, {"status": "resumed"}

    def on_start_weight_update(self, query, body):
        if self.active:
            return _error(500, "start_weight_update called while ... is already active.")
        self.active = True
        return 200, {"message": "Weight update started"}

    def on_update_weights(self, query, body):
        info = body["update_info"]
        try:
            self.received = ReceivedWeights(info["memory"], info["version"])
        except Exception as error:
            self.active = False
            return _error(500, f"{type(error).__name__}: {error}")
        for _ in self.received:
            pass
        return 200, {"message": "Weights updated"}

    def on_finish_weight_update(self, query, body):
        if not self.active:
            return _error(500, "finish_weight_update called without a matching start")
        self.active = False
        if self.received is not None:  # else nothing was loaded, and the old weights are back
            self.received.reply()
            self.received.close()
            self.received = None
        self.label = body.get("weight_version") or self.label
        return 200, {"message": "Weight update finished"}

    def on_update_weight_version(self, query, body):
        self.label = body["new_version"]
        return 200, {"success": True, "new_version": self.label}

    def on_weight_info(self, query, body):
        return 200, {"weight_version": self.label}

    def on_reset_prefix_cache(self, query, body):
        return 200, {"success": True}

    def on_sleep(self, query, body):
        assert query == {"level": ["1"], "mode": ["wait"]}
        self.asleep = True
        return 200, {"status": "sleeping", "level": 1}

    def on_is_sleeping(self, query, body):
        return 200, {"is_sleeping": self.asleep}

    def on_wake_up(self, query, body):
        self.asleep = False
        return 200, {"status": "awake", "tags": None}

    def on_v1_load_lora_adapter(self, query, body):
        with open(f"{body['lora_path']}/adapter_model.safetensors", "rb") as file:
            self.adapters[body["lora_name"]] = file.read()
        return 200, f"Success: LoRA adapter '{body['lora_name']}' added successfully."

    def on_v1_unload_lora_adapter(self, query, body):
        if self.adapters.pop(body["lora_name"], None) is None:
            return _error(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        return 200, "Success"


def completion(fake, body, *, reason="length", ids=None, label=None, **choice):
    """The events of one completion: two tokens in each, logprobs -0.5 - id / 100."""
    params = body["sampling_params"]
    if ids is None:
        first = sum(body["token_ids"]) + params["seed"]
        ids = [(first + i) % 40 + 3 for i in range(params["max_tokens"])]
    for start in range(0, len(ids), 2):
        part, last = ids[start : start + 2], start + 2 >= len(ids)
        spans = [{"version": label or fake.label, "start": 0, "end": len(ids)}]
        content = [{"token_id": i, "logprob": -0.5 - i / 100, "rank": 1} for i in part]
        one = {
            "index": 0,
            "finish_reason": reason if last else None,
            "token_ids": part,
            "logprobs": {"content": content},
            "weight_versions": spans if last else None,
        }
        yield {"request_id": "generate-tokens-1", "choices": [{**one, **(choice if last else {})}]}


def _config(changes):
    config = {
        "model_config": {
            "dtype": "torch.float32",
            "max_model_len": 64,
            "max_logprobs": 20,
            "logprobs_mode": "processed_logprobs",
            "skip_tokenizer_init": False,
            "enable_sleep_mode": False,
        },
        "weight_transfer_config": {"backend": BACKEND},
        "scheduler_config": {"max_num_seqs": 4},
        "parallel_config": {"data_parallel_size": 1},
        "lora_config": None,
        "device_config": {"device": "cuda"},
    }
    for name, value in changes.items():
        room, _, field = name.partition(".")
        if field:
            config[room][field] = value
        else:
            config[room] = value
    return config


def _error(status, message):
    return status, {"error": {"message": message, "type": "InternalServerError", "code": status}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeServer

    def log_message(self, *_):
        return None

    def do_GET(self):
        self.serve(None)

    def do_POST(self):
        self.serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def serve(self, body):
        fake, parts = self.fake, urlsplit(self.path)
        with fake.lock:
            fake.calls.append((self.path, body))
            fault = fake.faults.get(parts.path, [None])
            fault = fault.pop(0) if fault else None
        try:
            if fault is not None:
                self.misbehave(fault)
            elif parts.path.startswith(("/v1", "/inference")) and self.refused():
                self.send(*_error(401, f"Unauthorized: {self.headers['Authorization']}"))
            elif parts.path == GENERATE:
                self.generate(body)
            else:
                self.send(*fake.answer(parts.path, parse_qs(parts.query), body))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def refused(self):
        return self.fake.key and self.headers["Authorization"] != f"Bearer {self.fake.key}"

    def misbehave(self, fault):
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
        elif fault == "hang":
            self.fake.stopping.wait(30)
            self.close_connection = True
        else:
            status, said = fault if isinstance(fault, tuple) else (fault, f"status {fault}")
            self.send(*_error(status, said))

    def send(self, status, answer):
        text = b"" if answer is None else answer if isinstance(answer, str) else json.dumps(answer)
        body = text.encode() if isinstance(text, str) else text
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def generate(self, body):
        fake = self.fake
        if "token_ids" not in body:
            self.send(*_error(400, "2 validation errors: body.token_ids: Field required"))
            return
        if not body.get("stream"):
            self.send(200, {"choices": []})
            return
        with fake.lock:
            fake.at_once += 1
            fake.most_at_once = max(fake.most_at_once, fake.at_once)
        try:
            events = iter(fake.draw(fake, body))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for event in events:
                if event == "hang":
                    fake.stopping.wait(30)
                if event in ("hang", "drop"):
                    self.close_connection = True
                    self.connection.close()
                    return
                self.chunk(f"data: {json.dumps(event)}\n\n")
            self.chunk("data: [DONE]\n\n")
            self.chunk("")
        finally:
            with fake.lock:
                fake.at_once -= 1

    def chunk(self, text):
        data = text.encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


@contextmanager
def vllm_server(**options):
    """A running ``FakeServer``; ``url`` is its address."""
    fake = FakeServer(**options)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": fake}))
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    fake.stop = lambda: (fake.stopping.set(), server.shutdown(), server.server_close())
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        fake.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()


# -- the engine's side -----------------------------------------------------------------------------


def policy():
    return SimpleNamespace(
        eos_ids=(1,),
        text_config=SimpleNamespace(vocab_size=48),
        model=SimpleNamespace(config=SimpleNamespace(name_or_path="/models/my policy")),
    )


def connected(fake, **options):
    options = {"timeout_s": 5.0, "start_timeout_s": 5.0, **options}
    return connect_server(policy(), ServerOptions(fake.url, **options))


def load(engine, version=0, tensors=None, **options):
    """The weights, as WeightSync sends them; what the server has answered in the memory."""
    published = PublishedWeights(tensors or {"w": torch.arange(6.0)}, version, **options)
    try:
        adapter = "adapter_config" in options
        loaded = engine.update_weights(WeightUpdate(version, published.path, adapter))
        return loaded, published.replies()
    finally:
        published.close()


def ready(fake, **options):
    engine = connected(fake, **options)
    load(engine)
    return engine


def requests(count=3):
    return [GenerationRequest([3, 4 + i], seed=2**62 + i) for i in range(count)]
