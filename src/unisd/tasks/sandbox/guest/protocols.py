"""What the judge may ask of an object of the code's: one operation of Python each, by name."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from typing import Any

ARITHMETIC = (
    *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"),
    *("lshift", "rshift", "and_", "or_", "xor"),
)
COMPARISONS = ("lt", "le", "gt", "ge")
CONVERSIONS: dict[str, tuple[Callable[..., Any], type | None]] = {
    "len": (len, int),
    "bool": (bool, bool),
    "str": (str, str),
    "repr": (repr, str),
    "format": (format, str),
    "bytes": (bytes, bytes),
    "hash": (hash, int),
    "int": (int, int),
    "float": (float, float),
    "complex": (complex, complex),
    "index": (operator.index, int),
    "abs": (abs, None),
    "neg": (operator.neg, None),
    "pos": (operator.pos, None),
    "invert": (operator.invert, None),
    "round": (round, None),
    "trunc": (math.trunc, None),
    "floor": (math.floor, None),
    "ceil": (math.ceil, None),
    "copy": (copy.copy, None),
}
"""Operations on one object, which Python reaches by `__name__`, and the exact type that is due."""


def _reflected(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda target, other: function(other, target)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda target, *args, **kwargs: target(*args, **kwargs),
    "get": getattr,
    "set": setattr,
    "del": delattr,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
    "contains": operator.contains,
    "iter": iter,
    "reversed": lambda target: iter(reversed(target)),
    "enter": lambda target: type(target).__enter__(target),
    "exit": lambda target, *error: type(target).__exit__(target, *error),
    "aenter": lambda target: type(target).__aenter__(target),
    "aexit": lambda target, *error: type(target).__aexit__(target, *error),
    "aiter": aiter,
    "type": type,
    "isinstance": lambda kind, value: isinstance(value, kind),
    "issubclass": lambda kind, value: issubclass(value, kind),
    "eq": operator.eq,
    "deepcopy": copy.deepcopy,
    **{name: function for name, (function, _) in CONVERSIONS.items()},
    **{name: getattr(operator, name) for name in COMPARISONS},
    **{name.rstrip("_"): getattr(operator, name) for name in ARITHMETIC},
    **{f"r{name.rstrip('_')}": _reflected(getattr(operator, name)) for name in ARITHMETIC},
    **{f"i{name.rstrip('_')}": getattr(operator, f"i{name.rstrip('_')}") for name in ARITHMETIC},
}
"""All operations: functions of the object and their further arguments."""
