"""What is not the value that the tests compare with: asked beside it, it shows who guesses.

An object that is asked whether it equals plain data is told the data that is expected. So it is
asked about others too, in a random order: which of them the tests expect it cannot tell.
"""

from __future__ import annotations

import numbers
import random
import string
from collections.abc import Callable
from typing import Any

COUNT = 9
FAR = 10**7
_chance = random.SystemRandom()  # of the judge: the code cannot foresee it


def stranger() -> None:
    """Equals nothing of the code's."""


def decoys(value: Any) -> list[Any]:
    """What is not `value`: something else altogether, and values that are much like it."""
    if isinstance(value, bool):
        return [stranger, not value]
    if isinstance(value, numbers.Number):
        below = _chance.randint(0, COUNT)  # the value stands anywhere among its neighbours
        step: Any = 1
        if isinstance(value, float):
            step = max(1.0, abs(value) / 1000)
        near = [value + step * (at - below) for at in range(COUNT + 1) if at != below]
        return [stranger, *(each for each in near if each != value)]
    if isinstance(value, str):
        return [stranger, *({_changed(value) for _ in range(COUNT)} if value else {"x"})]
    if type(value) in (list, tuple):
        return [stranger, *(_other(list(value), type(value)) for _ in range(COUNT))]
    if type(value) is dict:
        return [stranger, *(_other(list(value.items()), dict) for _ in range(COUNT if value else 0))]
    return [stranger, value | {"x"}] if type(value) in (set, frozenset) else [stranger]


def _changed(text: str) -> str:
    """A text with another character of the same kind at one place."""
    at = _chance.randrange(len(text))
    kinds = (string.digits, string.ascii_lowercase, string.ascii_uppercase, " .,;:-_!?")
    alike = next((kind for kind in kinds if text[at] in kind), string.ascii_lowercase)
    return text[:at] + _chance.choice(alike.replace(text[at], "")) + text[at + 1 :]


def _other(parts: list[Any], kind: Callable[[list[Any]], Any]) -> Any:
    """A container with another item at one place, or one more."""
    if not parts:
        return kind([_chance.randint(0, COUNT)])
    at = _chance.randrange(len(parts))
    part = parts[at]
    key, value = part if kind is dict else (None, part)
    found = _chance.choice(decoys(value)[1:] or ["x"])
    return kind([*parts[:at], (key, found) if kind is dict else found, *parts[at + 1 :]])


def shuffled(value: Any, others: list[Any]) -> list[tuple[bool, Any]]:
    """All in a random order, each with whether it is the value."""
    asked = [(True, value), *((False, other) for other in others)]
    _chance.shuffle(asked)
    return asked
