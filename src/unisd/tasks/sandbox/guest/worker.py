"""Runs the code and answers calls to what it defined. Nothing of the tests is known here."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

from .confine import confine
from .values import Channel, ChannelClosed, dump, load


class Worker:
    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.held: list[Any] = []  # what the judge knows by number

    def hold(self, value: Any) -> list[Any]:
        if isinstance(value, JudgeFunction):
            return ["g", value.number]
        for number, known in enumerate(self.held):
            if known is value:
                return ["h", number]
        self.held.append(value)
        return ["h", len(self.held) - 1]

    def find(self, data: list[Any]) -> Any:
        return self.held[data[1]] if data[0] == "h" else JudgeFunction(self, data[1])

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Reply to one request: a value (and what became of the arguments), or an exception.

        Of an exception the name and the text go over.
        """
        try:
            arguments = load(message.get("args", ["l", []]), self.find)
            named = load(message.get("kwargs", ["d", []]), self.find)
            value = self.perform(message["op"], self.find(["h", message["on"]]), arguments, named)
            return {"value": dump(value, self.hold), "args": dump(arguments, self.hold)}
        except ChannelClosed:
            raise
        except BaseException as error:  # whatever the code raises is its answer
            return {"raise": [type(error).__name__, str(error)[:500]]}

    def perform(self, op: str, target: Any, arguments: list[Any], named: dict[str, Any]) -> Any:
        if op == "call":
            return target(*arguments, **named)
        if op == "get":
            return getattr(target, arguments[0])
        if op == "set":
            return setattr(target, arguments[0], arguments[1])
        if op == "item":
            return target[arguments[0]]
        if op == "list":
            return list(target)
        functions: dict[str, Any] = {"len": len, "bool": bool, "str": str, "repr": repr}
        return functions[op](target)

    def serve(self) -> None:
        while True:
            self.channel.send(self.answer(self.channel.receive()))


class JudgeFunction:
    """A function of the tests that was passed as an argument: called over there."""

    def __init__(self, worker: Worker, number: int) -> None:
        self.worker, self.number = worker, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        worker = self.worker
        worker.channel.send(
            {"back": self.number, "args": dump(list(args), worker.hold), "kwargs": dump(kwargs, worker.hold)}
        )
        while True:
            message = worker.channel.receive()
            if "op" not in message:
                break
            worker.channel.send(worker.answer(message))
        if "raise" in message:
            raise RuntimeError(": ".join(message["raise"]))
        return load(message["value"], worker.find)


def main() -> None:
    setting = json.load(sys.stdin)
    confine(setting["limits"])
    worker = Worker(Channel(*setting["fds"]))
    namespace: dict[str, Any] = {"__name__": "solution"}
    try:
        exec(compile(setting["code"], "solution", "exec"), namespace)
    except BaseException as error:
        worker.channel.send({"failed": [type(error).__name__, str(error)[:500]]})
        return
    wanted = worker.channel.receive()["want"]
    given = {name: namespace[name] for name in wanted if name in namespace}
    worker.channel.send({"names": {name: dump(value, worker.hold) for name, value in given.items()}})
    with contextlib.suppress(ChannelClosed):
        worker.serve()
