"""A stand-in for a vLLM server: its protocol, made-up answers that depend on the request alone, and faults on demand."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from safetensors.torch import load_file

END = 2


class StandIn(ThreadingHTTPServer):
    """`faults`: what goes wrong in the next requests for completions, in their order; `broken`: in all of them."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.faults: list[str] = []
        self.broken: str | None = None
        self.lacking: set[str] = set()  # paths that it does not know
        self.key: str | None = None  # without which it refuses
        self.raw_logprobs = False
        self.requests: list[dict[str, Any]] = []  # for completions, in the order of their arrival
        self.calls: Counter[str] = Counter()
        self.headers: list[Any] = []
        self.reply: Callable[[list[dict[str, Any]]], str] = lambda messages: ""  # of a chat
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

    def answer(self, content: Any, status: int = 200, promised: int | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
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
        if server.key is not None and path.startswith("/v1") and self.headers["Authorization"] != f"Bearer {server.key}":
            return self.refuse(401, "Unauthorized")
        if path in server.lacking:
            return self.refuse(404, "Not Found")
        if path == "/v1/completions":
            return self.complete(body)
        if path == "/v1/chat/completions":
            server.requests.append(body)
            return self.send({"choices": [{"message": {"content": server.reply(body["messages"])}}]})
        if path == "/v1/models":
            return self.answer({"data": [{"id": "base", "max_model_len": 512}]})
        if path == "/weight_info":
            return self.answer({"weight_version": server.version})
        if path == "/start_weight_update":
            if server.updating:
                return self.refuse(500, "start_weight_update called while a weight update is already active")
            server.updating = True
        elif path == "/update_weights":
            server.weights = load_file(body["update_info"]["path"])
        elif path == "/finish_weight_update":
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
        return self.answer(data)


@contextmanager
def serving(port: int = 0) -> Iterator[StandIn]:
    """A stand-in that answers until the end."""
    server = StandIn(port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
