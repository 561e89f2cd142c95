"""An OpenAI-compatible endpoint on this machine that misbehaves as told."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-very-secret-0123456789"


class FakeEndpoint:
    """``reply(body) -> str`` answers; ``faults`` are used up by the first requests, one each: an
    HTTP status, (status, headers), "garbage", "empty", "length" (a reply cut at max_tokens),
    "drop", "cut", "slow" or "drip"."""

    def __init__(self, reply, *, faults=(), models=("judge-1",), key=None):
        self.reply, self.faults, self.models, self.key = reply, list(faults), models, key
        self.bodies = []  # of all chat requests, those that met a fault included
        self.headers = []
        self.times = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.url = ""
        self.stopping = threading.Event()

    def answered(self):
        return len(self.bodies)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeEndpoint

    def log_message(self, *_):
        return None

    def send(self, status, text, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        body = text.encode()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refused(self):
        if self.fake.key is None or self.headers["Authorization"] == f"Bearer {self.fake.key}":
            return False
        said = f"Incorrect API key provided: {self.headers['Authorization']}"
        self.send(401, json.dumps({"error": {"message": said}}))
        return True

    def do_GET(self):
        if self.refused():
            return
        if self.fake.models is None or not self.path.endswith("/models"):
            self.send(404, "not found")
            return
        self.send(200, json.dumps({"data": [{"id": name} for name in self.fake.models]}))

    def do_POST(self):
        fake = self.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with fake.lock:
            fake.bodies.append(body)
            fake.headers.append(dict(self.headers))
            fake.times.append(time.monotonic())
            fake.at_once += 1
            fake.most_at_once = max(fake.most_at_once, fake.at_once)
            fault = fake.faults.pop(0) if fake.faults else None
        try:
            if not self.refused():
                self.answer(body, fault)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with fake.lock:
                fake.at_once -= 1

    def answer(self, body, fault):
        message = {"choices": [{"message": {"role": "assistant", "content": None}}]}
        if fault in (None, "length"):
            message["choices"][0]["message"]["content"] = self.fake.reply(body)
            message["choices"][0]["finish_reason"] = fault or "stop"
            self.send(200, json.dumps(message))
        elif isinstance(fault, int):
            self.send(fault, json.dumps({"error": {"message": f"status {fault}"}}))
        elif isinstance(fault, tuple):
            self.send(fault[0], "wait", fault[1])
        elif fault == "garbage":
            self.send(200, "<html>gateway</html>")
        elif fault == "empty":
            self.send(200, json.dumps(message))
        elif fault == "drop":
            self.close_connection = True
            self.connection.close()
        elif fault == "cut":
            text = json.dumps(message)
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text[:20].encode())
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
        elif fault == "slow":
            self.fake.stopping.wait(20)
            self.close_connection = True
        elif fault == "drip":  # every byte in time, the whole never
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            while not self.fake.stopping.wait(0.05):
                self.wfile.write(b" ")
                self.wfile.flush()
        else:
            raise AssertionError(fault)


@contextmanager
def endpoint(reply, **options):
    """A running ``FakeEndpoint``; ``url`` is its base address."""
    fake = FakeEndpoint(reply, **options)
    handler = type("Handler", (_Handler,), {"fake": fake})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        fake.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()
