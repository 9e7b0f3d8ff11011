"""Functions known by name: from here, or from other packages by entry point; their options bound from text.

What is registered (token weights, targets) is a frozen object with the fields `name`, `function` and `options`.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import logging
import re
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from unisd.errors import UserError

logger = logging.getLogger(__name__)

Plugin = TypeVar("Plugin")


def find(kind: str, name: str, registry: Mapping[str, Plugin], group: str) -> Plugin:
    """The plug-in registered as `name`, here or by an installed package under the entry point group.

    Raises:
        UserError: an unknown name, with the nearest known one; a package that cannot be loaded or registers nothing.
    """
    offered = [] if name in registry else list(entry_points(group=group))
    for entry in sorted(offered, key=lambda entry: entry.name != name):  # a package may register under another name
        if name in registry:
            break
        try:
            entry.load()
        except Exception as error:  # whatever another package's import raises
            if entry.name == name:
                raise UserError(f"{kind} {name!r}: loading {entry.value} failed: {error!r}") from error
            logger.warning("%s %r could not be loaded from %s: %r", kind, entry.name, entry.value, error)
    if name in registry:
        return registry[name]
    for entry in offered:
        if entry.name == name:
            raise UserError(f"{kind} {name!r}: {entry.value} was loaded but registers no {kind} of that name.")
    names = sorted(registry.keys() | {entry.name for entry in offered})
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise UserError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")


def bound_options(kind: str, name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, after unknown and missing ones are refused: here, not in the first step. The first parameter is no option."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    accepted = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = [] if any(p.kind == p.VAR_KEYWORD for p in parameters) else sorted(set(options) - set(accepted))
    if unknown:
        listed = ", ".join(accepted) or "none"
        raise UserError(f"{kind} {name!r} has no option {unknown[0]!r} (accepted: {listed}).")
    missing = [p.name for p in parameters if p.name in accepted and p.default is p.empty and p.name not in options]
    if missing:
        raise UserError(f"{kind} {name!r} needs a value for its option {missing[0]!r}.")
    return dict(options)


def all_options(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the function's defaults for those that are not bound."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not p.empty} | dict(options)


def parse(kind: str, text: str) -> tuple[str, dict[str, Any]]:
    """`name` or `name:option=value,option=value`; values are Python literals, or else strings."""
    name, _, tail = text.partition(":")
    options: dict[str, Any] = {}
    for part in re.split(r",(?=\s*\w+\s*=)", tail) if tail.strip() else []:  # a comma inside a list is not a separator
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier():
            raise UserError(f"{kind} {text!r}: expected option=value, got {part!r}.")
        try:
            options[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            options[key.strip()] = value.strip()
    return name.strip(), options
