"""Plain data on a pipe: one JSON line a message, every value with its exact type.

`dump` turns a value into JSON: None, bool and str as they are, all else as `[tag, ...]`. Subclasses
of built-in types are sent as what they hold: no method of theirs takes part in a comparison.
Values of the standard library that are plain data (`Decimal`, `date`, `deque`, ...: `RECORDS`) and
arrays of numpy are taken apart and put together again. Anything else is *held*: it stays with its
owner, and a number goes over.
"""

from __future__ import annotations

import builtins
import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from os import _exit, getpid
from typing import Any

MAX_MESSAGE = 32 * 2**20  # bytes

Hold = Callable[[Any], list[Any]]
Find = Callable[[list[Any]], Any]
Wrap = Callable[[Any, Any], Any]


class ChannelClosed(Exception):
    """The other side has ended, or sent what is no message."""


class Channel:
    """Exchanges messages over two file descriptors of the process that made it.

    A fork of the program must not answer beside it.
    """

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd, self._write_fd = read_fd, write_fd
        self._buffer = bytearray()
        self.closed: ChannelClosed | None = None
        self._process = getpid()

    def _end_if_forked(self) -> None:
        if getpid() != self._process:
            _exit(1)

    def send(self, message: dict[str, Any]) -> None:
        self._end_if_forked()
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        if len(line) > MAX_MESSAGE:
            raise ValueError("a value is too large to be sent")
        view = memoryview(line)
        try:
            while view:
                view = view[os.write(self._write_fd, view) :]
        except OSError as error:
            raise self._close(str(error)) from None

    def receive(self) -> dict[str, Any]:
        self._end_if_forked()
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > MAX_MESSAGE:
                raise self._close("a message is too long")
            part = os.read(self._read_fd, 1 << 20)
            if not part:
                raise self._close("the program ended")
            self._buffer += part
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            raise self._close("a message is no JSON") from None
        if not isinstance(message, dict):
            raise self._close("a message is no object")
        return message

    def _close(self, why: str) -> ChannelClosed:
        self.closed = ChannelClosed(why)
        return self.closed


def dump(value: Any, hold: Hold, wrap: Wrap = lambda value, data: data) -> Any:
    """`value` as JSON; `hold` gives the `[tag, number, ...]` of what is no plain data.

    Where the value is of a subclass of a built-in type, `wrap` may add who owns it.
    """
    if value is None or value is True or value is False:
        return value
    kind = type(value)
    if kind is str:
        return value
    path = f"{kind.__module__}.{kind.__qualname__}"
    if path in RECORDS and _standard_type(path) is kind:
        return ["v", path, [dump(part, hold, wrap) for part in RECORDS[path](value)]]
    if str(kind.__module__) == "numpy" and (array := _array(value)) is not None:
        return array
    data = _data(value, hold, wrap)
    if data is None:
        return hold(value)
    exact = _BUILT_IN_TYPES.get(kind.__name__) is kind or isinstance(value, type)
    return data if exact or kind.__module__ == "numpy" else wrap(value, data)


def _data(value: Any, hold: Hold, wrap: Wrap) -> Any:
    """What a value of a built-in type, or of a subclass, holds; None for other values."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return ["i", format(int.__index__(value), "x")]
    if isinstance(value, float):
        return ["f", float.hex(value)]
    if isinstance(value, complex):
        return ["c", float.hex(value.real), float.hex(value.imag)]
    if isinstance(value, (bytes, bytearray)):
        return ["b" if isinstance(value, bytes) else "B", bytes(value).hex()]
    if isinstance(value, type) and _BUILT_IN_TYPES.get(value.__name__) is value:
        return ["y", value.__name__]
    if type(value) is range:
        return ["r", *(format(x, "x") for x in (value.start, value.stop, value.step))]
    for tag, kind in _CONTAINERS:
        if isinstance(value, kind):
            return [tag, [dump(item, hold, wrap) for item in kind.__iter__(value)]]
    if isinstance(value, dict):
        pairs = dict.items(value)
        return ["d", [[dump(key, hold, wrap), dump(item, hold, wrap)] for key, item in pairs]]
    return None


def _standard_type(path: str) -> Any:
    """The type of that path, where its module has been imported."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _array(value: Any) -> list[Any] | None:
    """An array or a scalar of numpy as type, shape (None for a scalar) and bytes."""
    numpy = sys.modules.get("numpy")
    if isinstance(value, (float, complex)) or not isinstance(value, (numpy.ndarray, numpy.generic)):  # type: ignore[union-attr]
        return None
    if not _DTYPE.fullmatch(value.dtype.str):
        return None
    shape = list(value.shape) if isinstance(value, numpy.ndarray) else None  # type: ignore[union-attr]
    return ["N", value.dtype.str, shape, value.tobytes().hex()]


def _load_array(dtype: str, shape: list[int] | None, data: str) -> Any:
    if not _DTYPE.fullmatch(dtype):
        raise ValueError("no value")
    numpy = importlib.import_module("numpy")
    flat = numpy.frombuffer(bytes.fromhex(data), dtype=dtype)
    return flat[0] if shape is None else flat.reshape(shape).copy()


def load(data: Any, find: Find) -> Any:
    """The value of `data`; `find` gives what `[tag, number]` stands for.

    Raises `ValueError` on what `dump` never makes.
    """
    if data is None or isinstance(data, (bool, str)):
        return data
    if not isinstance(data, list) or not data:
        raise ValueError("no value")
    tag, rest = data[0], data[1:]
    if tag in HELD:
        return find(data)
    try:
        if tag == "w":
            return find([tag, rest[0], load(rest[1], find)])
        if tag == "v":
            return _load_record(rest[0], [load(part, find) for part in rest[1]])
        if tag == "N":
            return _load_array(*rest)
        if tag == "d":
            return {load(key, find): load(item, find) for key, item in rest[0]}
        if tag in _KINDS:
            return _KINDS[tag](load(item, find) for item in rest[0])
        return _SCALARS[tag](*rest)
    except (KeyError, TypeError, IndexError, ArithmeticError, ImportError):
        raise ValueError("no value") from None


def _load_record(path: str, parts: list[Any]) -> Any:
    if path not in RECORDS:
        raise ValueError("no value")
    importlib.import_module(path.rpartition(".")[0])
    return _standard_type(path)(*parts)


# What is held: an object, a function of the judge's, an exception and its class, a generator, a
# coroutine, an asynchronous generator.
HELD = ("h", "g", "X", "x", "n", "a", "A")
_DTYPE = re.compile(r"[<>|=][biufcSUmM]\d+(\[\w+\])?")
RECORDS: dict[str, Callable[[Any], list[Any]]] = {
    "decimal.Decimal": lambda x: [str(x)],
    "fractions.Fraction": lambda x: [x.numerator, x.denominator],
    "datetime.date": lambda x: [x.year, x.month, x.day],
    "datetime.time": lambda x: [x.hour, x.minute, x.second, x.microsecond, x.tzinfo],
    "datetime.datetime": lambda x: [
        *(x.year, x.month, x.day, x.hour, x.minute, x.second, x.microsecond, x.tzinfo)
    ],
    "datetime.timedelta": lambda x: [x.days, x.seconds, x.microseconds],
    "datetime.timezone": lambda x: [x.utcoffset(None)],
    "uuid.UUID": lambda x: [x.hex],
    "pathlib.PosixPath": lambda x: [str(x)],
    "pathlib.PurePosixPath": lambda x: [str(x)],
    "collections.deque": lambda x: [list(x), x.maxlen],
    "collections.Counter": lambda x: [dict(x)],
    "collections.OrderedDict": lambda x: [list(x.items())],
    "collections.defaultdict": lambda x: [x.default_factory, dict(x)],
    "builtins.slice": lambda x: [x.start, x.stop, x.step],
}
"""Types of plain data by path, with what their constructor takes to make an equal value."""


_CONTAINERS: tuple[tuple[str, Any], ...] = (("l", list), ("t", tuple), ("s", set), ("z", frozenset))
_KINDS: dict[str, Callable[..., Any]] = dict(_CONTAINERS)
_BUILT_IN_TYPES = {name: value for name, value in vars(builtins).items() if isinstance(value, type)}
_SCALARS: dict[str, Callable[..., Any]] = {
    "i": lambda text: int(text, 16),
    "f": float.fromhex,
    "c": lambda real, imag: complex(float.fromhex(real), float.fromhex(imag)),
    "b": bytes.fromhex,
    "B": bytearray.fromhex,
    "y": lambda name: _BUILT_IN_TYPES[name],
    "r": lambda *parts: range(*(int(part, 16) for part in parts)),
}
