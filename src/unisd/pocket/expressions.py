"""Evaluate one-line arithmetic expressions that a model wrote.

This is a walk over the syntax tree, never `eval`.

Only what is listed below exists: numbers, given variables, arithmetic, comparisons, `a if b else c`
and a few functions. There are no attributes, subscripts, strings, containers or assignments, and
every size is bounded, so that no input can take more than a moment.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

MAX_SOURCE = 200  # characters
MAX_NODES = 80
MAX_DEPTH = 24
MAX_VALUE = 10**12
MAX_EXPONENT = 16

Number = int | float


class ExpressionError(ValueError):
    """The text is not an expression of the allowed kind, or has no value."""


def power(base: Number, exponent: Number) -> Number:
    if not isinstance(exponent, int) or not 0 <= exponent <= MAX_EXPONENT:
        raise ExpressionError("exponent out of range")
    return base**exponent  # bounded: |base| <= MAX_VALUE was checked when it was computed


BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: power,
}
UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
FUNCTIONS: dict[str, tuple[Callable[..., Any], int, int]] = {  # function, least and most arguments
    "abs": (abs, 1, 1),
    "max": (max, 2, 8),
    "min": (min, 2, 8),
    "int": (int, 1, 1),
    "round": (round, 1, 1),
}


def evaluate(source: str, variables: Mapping[str, Number]) -> Number:
    """Value of `source`, or `ExpressionError`; no other exception."""
    if len(source) > MAX_SOURCE:
        raise ExpressionError("too long")
    try:
        tree = ast.parse(source.strip(), mode="eval")
        if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
            raise ExpressionError("too many parts")
        return _value(tree.body, variables, 0)
    except ExpressionError:
        raise
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError, TypeError) as error:
        raise ExpressionError(str(error)) from None


def mistake(source: str, expected: str, variable: str) -> str:
    """Where an expression differs from the one that is right, in words; "" where it nowhere does.

    Tried on a range of inputs. What the right one gives is not said.
    """
    for x in (*range(-12, 25), 100, 997, -340):
        try:
            value = evaluate(source, {variable: x})
        except ExpressionError as error:
            return f"The expression has no value for {variable} = {x}: {error}."
        if value != evaluate(expected, {variable: x}):
            return f"For {variable} = {x} the expression gives {value}, which is wrong."
    return ""


def _value(node: ast.expr, variables: Mapping[str, Number], depth: int) -> Number:
    if depth > MAX_DEPTH:
        raise ExpressionError("too deep")
    value = _compute(node, variables, depth + 1)
    if not isinstance(value, (int, float)) or not abs(value) <= MAX_VALUE:  # NaN fails the comparison, too
        raise ExpressionError("value out of range")
    return value


def _compute(node: ast.expr, variables: Mapping[str, Number], depth: int) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return value
        case ast.Name(id=name) if name in variables:
            return variables[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            return BINARY[type(op)](_value(left, variables, depth), _value(right, variables, depth))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in UNARY:
            return UNARY[type(op)](_value(operand, variables, depth))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARE:
            return COMPARE[type(op)](_value(left, variables, depth), _value(right, variables, depth))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _value(body if _value(test, variables, depth) else orelse, variables, depth)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            function, least, most = FUNCTIONS[name]
            if not least <= len(args) <= most:
                raise ExpressionError(f"{name} takes {least} to {most} arguments")
            return function(*[_value(arg, variables, depth) for arg in args])
    raise ExpressionError(f"{type(node).__name__} is not allowed")
