"""Plain data on a pipe: one JSON line a message, every value with its exact type.

`dump` turns a value into JSON: None, bool and str as they are, all else as `[tag, ...]`. Subclasses
of built-in types are sent as what they hold, so that no method of theirs survives. Anything else is
*held*: it stays with its owner, and a number goes over.
"""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Callable
from os import _exit, getpid
from typing import Any

MAX_MESSAGE = 32 * 2**20  # bytes

Hold = Callable[[Any], list[Any]]
Find = Callable[[list[Any]], Any]


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


def dump(value: Any, hold: Hold) -> Any:
    """`value` as JSON; `hold` gives the `[tag, number]` of what is no plain data."""
    if value is None or value is True or value is False:
        return value
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
            return [tag, [dump(item, hold) for item in kind.__iter__(value)]]
    if isinstance(value, dict):
        return ["d", [[dump(key, hold), dump(item, hold)] for key, item in dict.items(value)]]
    return hold(value)


def load(data: Any, find: Find) -> Any:
    """The value of `data`; `find` gives what `[tag, number]` stands for.

    Raises `ValueError` on what `dump` never makes.
    """
    if data is None or isinstance(data, (bool, str)):
        return data
    if not isinstance(data, list) or not data:
        raise ValueError("no value")
    tag, rest = data[0], data[1:]
    if tag in ("h", "g"):
        return find(data)
    try:
        if tag == "d":
            return {load(key, find): load(item, find) for key, item in rest[0]}
        if tag in _KINDS:
            return _KINDS[tag](load(item, find) for item in rest[0])
        return _SCALARS[tag](*rest)
    except (KeyError, TypeError, IndexError):
        raise ValueError("no value") from None


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
