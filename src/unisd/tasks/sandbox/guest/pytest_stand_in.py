"""Stands in for pytest, which is not in the sandbox: `raises`, `approx`, parameters, fixtures."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any


class Raised:
    """What `raises` caught."""

    value: Any = None
    type: Any = None


@contextlib.contextmanager
def _raising(kinds: Any, match: str | None) -> Iterator[Raised]:
    found = Raised()
    try:
        yield found
    except kinds as error:
        if match is not None and not re.search(match, str(error)):
            raise AssertionError(f"{str(error)!r} does not match {match!r}") from None
        found.value, found.type = error, type(error)
    else:
        raise AssertionError(f"did not raise {kinds}")


def raises(kinds: Any, *call: Any, match: str | None = None, **kwargs: Any) -> Any:
    """As a context, or with a function and its arguments."""
    context = _raising(kinds, match)
    if not call:
        return context
    with context as found:
        call[0](*call[1:], **kwargs)
    return found


class approx:
    """Equal within a tolerance: numbers, and lists, tuples and dicts of them."""

    def __init__(self, expected: Any, rel: float = 1e-6, abs: float = 1e-12) -> None:
        self.expected, self.rel, self.abs = expected, rel, abs

    def __eq__(self, actual: object) -> bool:
        return self._near(actual, self.expected)

    def _near(self, actual: Any, expected: Any) -> bool:
        if isinstance(expected, dict):
            return (
                isinstance(actual, dict)
                and actual.keys() == expected.keys()
                and all(self._near(actual[key], expected[key]) for key in expected)
            )
        if isinstance(expected, (list, tuple)):
            return (
                isinstance(actual, (list, tuple))
                and len(actual) == len(expected)
                and all(map(self._near, actual, expected))
            )
        if not isinstance(actual, (int, float, complex)):
            return bool(actual == expected)
        return actual == expected or bool(abs(actual - expected) <= max(self.rel * abs(expected), self.abs))

    __hash__ = None  # type: ignore[assignment]


def fail(reason: str = "", **_: Any) -> None:
    raise AssertionError(reason)


def main(*_: Any, **__: Any) -> int:
    """The tests are run anyway."""
    return 0


def param(*values: Any, **_: Any) -> Any:
    return values if len(values) > 1 else values[0]


class _Mark:
    def __getattr__(self, name: str) -> Any:
        def mark(*args: Any, **_: Any) -> Any:
            return args[0] if len(args) == 1 and inspect.isfunction(args[0]) else lambda function: function

        return mark

    def parametrize(self, names: Any, values: Any, **_: Any) -> Any:
        listed = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        cases = [dict(zip(listed, [each] if len(listed) == 1 else each, strict=True)) for each in values]

        def decorate(function: Any) -> Any:
            function.parameters = [*getattr(function, "parameters", []), cases]
            return function

        return decorate


mark = _Mark()


def fixture(*args: Any, **_: Any) -> Any:
    def decorate(function: Any) -> Any:
        function.is_fixture = True
        return function

    return decorate(args[0]) if args and callable(args[0]) else decorate


def required(function: Callable[..., Any]) -> list[str]:
    """Parameters of a function or class that must be given."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    positional = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [each.name for each in parameters if each.kind in positional and each.default is each.empty]


def cases(function: Any, namespace: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Arguments of each call of a test: every combination of its parameters, with its fixtures."""
    for combination in itertools.product(*getattr(function, "parameters", [])):
        arguments = {name: value for part in combination for name, value in part.items()}
        for name in required(function):
            made: Any = namespace.get(name)
            if name not in arguments and getattr(made, "is_fixture", False):
                value = made()
                arguments[name] = next(value) if inspect.isgenerator(value) else value
        yield arguments
