"""Declare an option in one place, and check values against what is declared."""

from __future__ import annotations

from dataclasses import Field, field, fields
from numbers import Integral, Real
from typing import Any

from unisd.errors import UserError

INF = float("inf")
OUTSIDE = "{name}={value} is outside [{low}, {high}]."


def option(
    group: str,
    help: str,
    default: Any = None,
    *,
    choices: tuple[Any, ...] = (),
    low: float = -INF,
    high: float = INF,
    excludes: str | None = None,
    shared: tuple[str, ...] = (),
) -> Any:
    """Declare a dataclass field as an option.

    Args:
        group: the heading under which help shows it.
        choices: all values that it may have; none: any of its type.
        low, high: bounds of its value, both allowed.
        excludes: an option that cannot be given beside this one.
        shared: other commands that take it too.
    """
    metadata = {
        "group": group,
        "help": help,
        "choices": choices,
        "range": (low, high),
        "excludes": excludes,
        "shared": shared,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def declared(kind: Any) -> list[Field[Any]]:
    """The options of a dataclass, or of an instance of it: its fields declared by `option`."""
    return [item for item in fields(kind) if "group" in item.metadata]


def _check_type(name: str, value: Any, kinds: list[str]) -> None:
    """Refuse one text for a list, and what is no number for a number."""
    if value is None or "str" in kinds:
        return
    if any(kind.startswith("list[") for kind in kinds) and isinstance(value, str):
        raise UserError(f"{name}={value!r} is a single text: give a list, as in [{value!r}].")
    wanted = Integral if "int" in kinds and "float" not in kinds else Real
    if {"int", "float"} & set(kinds) and (isinstance(value, bool) or not isinstance(value, wanted)):
        what = "a whole number" if wanted is Integral else "a number"
        raise UserError(f"{name}={value!r} is no number of its kind: give {what}.")


def exclusions(kind: Any) -> list[tuple[str, str]]:
    """Pairs of options that exclude each other."""
    return [
        (item.name, item.metadata["excludes"])
        for item in declared(kind)
        if item.metadata["excludes"] is not None
    ]


def check_declared(options: Any, outside: str = OUTSIDE) -> None:
    """Check choices, ranges and exclusions.

    Args:
        outside: what to say of a value out of range.

    Raises:
        UserError: for the first option that breaks its declaration.
    """
    for item in declared(options):
        _check_type(item.name, getattr(options, item.name), str(item.type).split(" | "))
    for item in declared(options):
        value, choices = getattr(options, item.name), item.metadata["choices"]
        if choices and value not in choices:
            raise UserError(f"{item.name}={value!r} is not one of: {', '.join(map(str, choices))}.")
    for item in declared(options):
        value, (low, high) = getattr(options, item.name), item.metadata["range"]
        if (low, high) != (-INF, INF) and value is not None and not low <= value <= high:
            raise UserError(outside.format(name=item.name, value=value, low=low, high=high))
    for one, other in exclusions(options):
        if getattr(options, one) is not None and getattr(options, other) is not None:
            raise UserError(f"{one} and {other} exclude each other: unset one of them.")
