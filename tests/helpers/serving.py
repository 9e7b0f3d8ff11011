"""A stand-in for a vLLM server: its protocol, made-up answers that depend on the request alone, and
faults on demand.

And a proxy, which puts faults between a real server and its client.
"""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from safetensors.torch import load_file

END = 2


class Refusal(Exception):
    """What `reply` raises: a status, the error's fields and further headers."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None, **more: Any) -> None:
        self.status, self.headers = status, headers or {}
        self.content = {"error": {"message": message, **more}}


class StandIn(ThreadingHTTPServer):
    """`faults`: what goes wrong in the next requests for completions, in their order; `broken`: in
    all of them.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128  # who connects at once, waits

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.faults: list[str] = []
        self.broken: str | None = None
        self.lacking: set[str] = set()  # paths that it does not know
        self.key: str | None = None  # without which it refuses
        self.unreadable = 0  # updates of the weights that fail
        self.raw_logprobs = False
        self.requests: list[dict[str, Any]] = []  # for completions, in the order of their arrival
        self.calls: Counter[str] = Counter()
        self.headers: list[Any] = []
        # of a chat: a text, or the whole choice
        self.reply: Callable[[list[dict[str, Any]]], str | dict[str, Any]] = lambda messages: ""
        self.models = ["base"]
        self.closing = threading.Event()  # ends what hangs
        self.restart()

    def restart(self) -> None:
        """Forget what it was given."""
        self.version, self.updating = "0", False
        self.adapters: dict[str, str] = {}
        self.weights: dict[str, Any] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Any

    def log_message(self, *args: Any) -> None:
        pass

    def answer(
        self,
        content: Any,
        status: int = 200,
        promised: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(promised or len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, text: str) -> None:
        self.answer({"error": {"message": text}}, status)

    def do_GET(self) -> None:
        self.serve({})

    def do_POST(self) -> None:
        self.serve(json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}"))

    def serve(self, body: dict[str, Any]) -> None:
        server, path = self.server, self.path.partition("?")[0]
        server.calls[path] += 1
        server.headers.append(self.headers)
        if (
            server.key is not None
            and path.startswith("/v1")
            and self.headers["Authorization"] != f"Bearer {server.key}"
        ):
            return self.refuse(401, "Unauthorized")
        if path in server.lacking:
            return self.refuse(404, "Not Found")
        if path == "/v1/completions":
            return self.complete(body)
        if path == "/v1/chat/completions":
            server.requests.append(body)
            try:
                told = server.reply(body["messages"])
            except Refusal as refusal:
                return self.answer(refusal.content, refusal.status, headers=refusal.headers)
            choice = (
                told if isinstance(told, dict) else {"message": {"content": told}, "finish_reason": "stop"}
            )
            return self.send({"choices": [choice]})
        if path == "/v1/models":
            return self.answer({"data": [{"id": name, "max_model_len": 512} for name in server.models]})
        if path == "/weight_info":
            return self.answer({"weight_version": server.version})
        if path == "/start_weight_update":
            if server.updating:
                return self.refuse(500, "start_weight_update called while a weight update is already active")
            server.updating = True
        elif path == "/update_weights":
            if not server.updating:
                return self.refuse(500, "start_weight_update must be called before update_weights.")
            if server.unreadable > 0:
                server.unreadable, server.updating = server.unreadable - 1, False
                return self.refuse(500, "No such file or directory")
            server.weights = load_file(body["update_info"]["path"])
        elif path == "/finish_weight_update":
            if not server.updating:
                return self.refuse(500, "finish_weight_update called without a matching start_weight_update.")
            server.updating, server.version = False, body["weight_version"]
        elif path == "/v1/load_lora_adapter":
            if body["lora_name"] in server.adapters:
                return self.refuse(400, "already loaded")
            server.adapters[body["lora_name"]] = body["lora_path"]
            return self.answer(b"Success: the adapter was added.")
        elif path == "/v1/unload_lora_adapter":
            server.adapters.pop(body["lora_name"], None)
        return self.answer({"success": True})

    def complete(self, body: dict[str, Any]) -> None:
        server = self.server
        server.requests.append(body)
        if body["model"] not in ("base", *server.adapters):
            return self.refuse(404, f"The model {body['model']} does not exist.")
        draw = random.Random(repr([body["prompt"], body.get("seed"), body["temperature"]]))
        ids = [draw.randrange(6, 262) for _ in range(draw.randint(1, body["max_tokens"]))]
        if len(ids) < body["max_tokens"]:
            ids[-1] = END
        temperature = 1.0 if server.raw_logprobs else body["temperature"] or 1.0
        logps = [-draw.random() / temperature for _ in ids]
        choice: dict[str, Any] = {"token_ids": ids, "prompt_token_ids": body["prompt"]}
        choice["logprobs"] = {"token_logprobs": logps, "top_logprobs": [{"a": -0.1 / temperature}] * len(ids)}
        choices = [choice]
        fault = self.next_fault() or "none"
        if fault == "too few log-probabilities":
            logps.append(-1.0)
        elif fault == "two answers":
            choices = [choice, choice]
        elif fault == "other vocabulary":
            ids[0] = 100_000
        elif fault == "cut off":
            ids[-1:] = [7]
            del ids[body["max_tokens"] - 1 :], logps[body["max_tokens"] - 1 :]
        elif fault == "other prompt":
            choice["prompt_token_ids"] = [1]
        elif fault == "nothing":
            choice.pop("token_ids")
        elif fault == "positive log-probability":
            logps[0] = 3.0
        return self.send({"choices": choices}, fault)

    def next_fault(self) -> str | None:
        return self.server.broken or (self.server.faults.pop(0) if self.server.faults else None)

    def send(self, content: Any, fault: str | None = None) -> None:
        """An answer, unless something happens to it on its way."""
        fault = fault or self.next_fault()
        data = json.dumps(content).encode()
        if fault == "500":
            return self.refuse(500, "out of order")
        if fault == "hang up":
            return self.connection.close()
        if fault == "half":
            return self.answer(data[: len(data) // 2], promised=len(data))
        if fault == "no json":
            return self.answer(b"<html>busy</html>")
        if fault == "late":
            time.sleep(1.5)
        if fault == "hang":
            self.server.closing.wait(60)
        if fault == "drip":
            self.answer(b"{", promised=10**6)
            while not self.server.closing.wait(0.1):
                self.wfile.write(b" ")
        return self.answer(data)


class Proxy(ThreadingHTTPServer):
    """`faults`: what happens to the next requests for a path, in their order; `late`: seconds that
    an answer is held back for then.
    """

    daemon_threads = True

    def __init__(self, target: str, late: float) -> None:
        super().__init__(("127.0.0.1", 0), PassOn)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.target, self.late = target, late
        self.faults: dict[str, list[str]] = {}
        self.refusals: list[str] = []  # what the real server said with a 5xx

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class PassOn(Handler):
    def serve(self, body: dict[str, Any]) -> None:
        fault = None
        with suppress(KeyError, IndexError):
            fault = self.server.faults[self.path].pop(0)
        if fault == "500":
            return self.refuse(500, "out of order")
        data = json.dumps(body).encode() if self.command == "POST" else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.target + self.path, data, headers, method=self.command)
        try:
            with urllib.request.urlopen(request) as response:
                status, content = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
            if status >= 500:
                self.server.refusals.append(content.decode())
        if fault == "late":
            time.sleep(self.server.late)
        if fault == "lost":
            return self.connection.close()
        if fault == "half":
            return self.answer(content[: len(content) // 2], promised=len(content))
        if fault == "a token too few":
            answer = json.loads(content)
            answer["choices"][0]["token_ids"].pop()
            content = json.dumps(answer).encode()
        return self.answer(content, status)


@contextmanager
def serving(port: int = 0) -> Iterator[StandIn]:
    """A stand-in that answers until the end."""
    with _running(StandIn(port)) as server:
        yield server


@contextmanager
def passing_on(target: str, late: float) -> Iterator[Proxy]:
    """A proxy in front of `target`, until the end."""
    with _running(Proxy(target, late)) as server:
        yield server


@contextmanager
def _running(server: Any) -> Iterator[Any]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        getattr(server, "closing", threading.Event()).set()
        server.shutdown()
        server.server_close()
        thread.join()
