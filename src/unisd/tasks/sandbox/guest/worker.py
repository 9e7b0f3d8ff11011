"""Runs the code and answers calls to what it defined. Nothing of the tests is known here."""

from __future__ import annotations
import __future__

import ast
import builtins
import contextlib
import io
import json
import sys
import time
import types
from typing import Any

from .confine import confine
from .protocols import OPERATIONS
from .values import Channel, ChannelClosed, dump, load

MAX_PRINTED = 1 << 20  # characters between two answers
AHEAD_S = 0.01  # the longest time for which items are taken that may not be asked for
FUTURE = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})
EXAMPLES = (
    *(ast.Expr, ast.Assert, ast.If, ast.For, ast.While, ast.With, ast.Try),
    *(ast.Assign, ast.AnnAssign, ast.AugAssign),
)


class Worker:
    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.held: list[Any] = []  # what the judge knows by number
        self.numbers: dict[int, int] = {}
        self.failed: dict[int, BaseException] = {}  # iterators that raised after items not yet sent
        self.printed = sys.stdout = Printed()
        self.loop: Any = None

    def number(self, value: Any) -> int:
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.held)
            self.held.append(value)
        return self.numbers[id(value)]

    def hold(self, value: Any) -> list[Any]:
        if isinstance(value, JudgeFunction):
            return ["g", value.number]
        if isinstance(value, type) and issubclass(value, BaseException):
            bases = [self.class_of(base) for base in value.__bases__ if issubclass(base, BaseException)]
            return ["x", self.number(value), str(value.__name__), bases]
        if isinstance(value, BaseException):
            return ["X", self.exception(value)]
        return [_TAGS.get(type(value), "h"), self.number(value)]

    def class_of(self, kind: type[BaseException]) -> Any:
        """Return its path where an exception's class is Python's own, else its number and bases."""
        if getattr(builtins, kind.__name__, None) is kind:
            return kind.__name__
        module = sys.modules.get(kind.__module__)
        if kind.__module__ != "solution" and getattr(module, kind.__name__, None) is kind:
            return f"{kind.__module__}.{kind.__name__}"
        return self.hold(kind)

    def exception(self, error: BaseException) -> dict[str, Any]:
        try:
            text = str(error)[:500]
        except BaseException:
            text = ""
        found = {"class": self.class_of(type(error)), "text": text, "on": self.number(error), "args": None}
        with contextlib.suppress(Exception):
            found["args"] = self.dump(tuple(error.args))
        return found

    def wrap(self, value: Any, data: Any) -> Any:
        return ["w", self.number(value), data]

    def dump(self, value: Any) -> Any:
        return dump(value, self.hold, self.wrap)

    def find(self, data: list[Any]) -> Any:
        return self.held[data[1]] if data[0] == "h" else JudgeFunction(self, *data[1:])

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Reply to one request: a value and what became of the arguments, or an exception.

        What was printed meanwhile goes along.
        """
        try:
            arguments = load(message.get("args", ["l", []]), self.find)
            named = load(message.get("kwargs", ["d", []]), self.find)
            target = self.held[message["on"]]
            value = self.perform(message["op"], target, arguments, named)
            made = isinstance(target, type) and type(value) is target and message["op"] == "call"
            data = self.hold(value) if made and target.__module__ == "solution" else self.dump(value)
            reply = {"value": data, "args": self.dump(arguments)}
        except ChannelClosed:
            raise
        except BaseException as error:  # whatever the code raises is its answer
            reply = {"raise": self.exception(error)}
        return reply | ({"out": text} if (text := self.printed.take()) else {})

    def perform(self, op: str, target: Any, arguments: list[Any], named: dict[str, Any]) -> Any:
        if op in ("take", "send", "throw", "anext"):
            return getattr(self, op)(target, *arguments)
        if op == "await":
            return self.run(target)
        if op in ("exit", "aexit"):
            error = self.told(*arguments) if arguments else None
            arguments = [error and type(error), error, None]
        if op in ("aenter", "aexit"):
            return self.run(OPERATIONS[op](target, *arguments))
        if op == "close":
            return target.close()
        return OPERATIONS[op](target, *arguments, **named)

    def take(self, iterator: Any, count: int) -> list[Any]:
        """The next items, at most `count`; whether they are the last; what a generator returned."""
        if id(iterator) in self.failed:
            raise self.failed.pop(id(iterator))
        items: list[Any] = []
        until = time.monotonic() + AHEAD_S
        while len(items) < count and (not items or time.monotonic() < until):
            try:
                items.append(next(iterator))
            except StopIteration as stop:
                return [items, True, stop.value]
            except BaseException as error:
                if not items:
                    raise
                self.failed[id(iterator)] = error
                break
        return [items, False, None]

    def send(self, generator: Any, value: Any) -> list[Any]:
        try:
            return [[generator.send(value)], False, None]
        except StopIteration as stop:
            return [[], True, stop.value]

    def throw(self, generator: Any, *error: Any) -> list[Any]:
        try:
            return [[generator.throw(self.told(*error))], False, None]
        except StopIteration as stop:
            return [[], True, stop.value]

    def told(self, name: str, text: str, number: int | None) -> Any:
        """An exception of the tests'."""
        return _built_in(name, text) if number is None else self.held[number]

    def anext(self, iterator: Any) -> list[Any]:
        try:
            return [self.run(anext(iterator))]
        except StopAsyncIteration:
            return []

    def run(self, awaitable: Any) -> Any:
        import asyncio

        async def result() -> Any:
            return await awaitable

        self.loop = self.loop or asyncio.new_event_loop()
        return self.loop.run_until_complete(result())

    def serve(self) -> None:
        while True:
            self.channel.send(self.answer(self.channel.receive()))


_TAGS = {
    types.GeneratorType: "n",
    types.CoroutineType: "a",
    types.AsyncGeneratorType: "A",
}


class Printed(io.TextIOBase):
    """Keeps what is printed until it is taken, up to a limit."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.room = MAX_PRINTED

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.room > 0:
            self.parts.append(str(text)[: self.room])
            self.room -= len(self.parts[-1])
        return len(text)

    def take(self) -> str:
        text = "".join(self.parts)
        self.parts, self.room = [], MAX_PRINTED
        return text


class JudgeFunction:
    """A function or an object of the tests that was passed as an argument: it stays over there."""

    def __init__(self, worker: Worker, number: int, *about: Any) -> None:
        name, doc, has_attributes = about
        self.worker, self.number = worker, number
        if name is not None:
            self.__name__ = self.__qualname__ = name
        self.__doc__ = doc
        self._has_attributes = has_attributes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        worker = self.worker
        return self.back({"args": dump(list(args), worker.hold), "kwargs": dump(kwargs, worker.hold)})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not self.__dict__.get("_has_attributes"):
            raise AttributeError(name)
        return self.back({"name": name, "args": ["l", []]})

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or not self.__dict__.get("_has_attributes"):
            object.__setattr__(self, name, value)
        else:
            self.back({"name": name, "args": dump([value], self.worker.hold)})

    def __eq__(self, other: object) -> bool:
        return type(other) is JudgeFunction and other.number == self.number

    def __hash__(self) -> int:
        return hash(self.number)

    def __await__(self) -> Any:
        return self.back({"await": True})
        yield

    def back(self, request: dict[str, Any]) -> Any:
        worker = self.worker
        worker.channel.send({"back": self.number, "out": worker.printed.take(), **request})
        while True:
            message = worker.channel.receive()
            if "op" not in message:
                break
            worker.channel.send(worker.answer(message))
        if "raise" in message:
            raise worker.told(*message["raise"])
        return load(message["value"], worker.find)


def _built_in(name: str, text: str) -> BaseException:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        with contextlib.suppress(Exception):
            return kind(text)
    return RuntimeError(f"{name}: {text}")


def execute(code: str, namespace: dict[str, Any]) -> Exception | None:
    """Run the code, past examples of its own that fail; returns the first of their exceptions.

    An example is a statement at the top level that defines or imports nothing: a call, an
    assertion, a loop, what reads standard input. What was defined stands.
    """
    whole = compile(code, "solution", "exec")
    left: ast.Module | None = None
    first: Exception | None = None
    while True:
        try:
            exec(whole, namespace)
            return first
        except Exception as error:
            if isinstance(error, MemoryError) or error.__traceback__ is None:
                raise
            trace = error.__traceback__.tb_next
            if trace is None:
                raise
            left = left or ast.parse(code)
            at = trace.tb_lineno
            rest = [node for node in left.body if node.lineno > at]
            failed = [node for node in left.body if node.lineno <= at <= (node.end_lineno or at)]
            if not failed or not all(isinstance(node, EXAMPLES) for node in failed):
                raise
            first = first or error
            left.body = rest
            whole = compile(left, "solution", "exec", flags=whole.co_flags & FUTURE, dont_inherit=True)


def main() -> None:
    setting = json.load(sys.stdin)
    confine(setting["limits"])
    worker = Worker(Channel(*setting["fds"]))
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    if "pytest" in setting["code"]:  # for tests that the model adds
        from . import pytest_stand_in

        sys.modules["pytest"] = pytest_stand_in
    failure: BaseException | None
    try:
        failure = execute(setting["code"], module.__dict__)
    except BaseException as error:
        worker.channel.send({"failed": [type(error).__name__, worker.exception(error)["text"]]})
        return
    wanted = worker.channel.receive()["want"]
    given = {name: module.__dict__[name] for name in wanted if name in module.__dict__}
    if failure is not None and not given:
        worker.channel.send({"failed": [type(failure).__name__, worker.exception(failure)["text"]]})
        return
    worker.printed.take()
    worker.channel.send({"names": {name: worker.dump(value) for name, value in given.items()}})
    with contextlib.suppress(ChannelClosed):
        worker.serve()
