"""Tool calls in what a model wrote, found and parsed (compared: `graders.call_grading`).

Forms that are read, the first of which any is found:

| form | example |
|---|---|
| ReAct | `Action: name`, then `Action Input: {...}` |
| tags | `<tool_call>...</tool_call>`, `<function=f>{...}</function>`, `<invoke name=...>` |
| messages | OpenAI's `tool_calls` (arguments as JSON text), Anthropic's `tool_use` |
| code | `name(city="Paris")`, alone or in a list |
| by name | `{"name": {...}}` |
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

TAIL = 20_000  # characters of a completion that are looked at, the last ones
MOST_CALLS = 100
DEEPEST = 100  # levels of an object
EFFORT = 4  # times the length of a text that may be read again in search of an object
NAMES = ("name", "tool", "api", "function", "tool_name", "recipient_name", "action", "function_name")
ARGUMENTS = (
    *("arguments", "parameters", "args", "input", "kwargs", "params", "action_input", "tool_input"),
    *("tool_arguments", "tool_args"),
)
_ACTION = re.compile(
    r"^[ \t>*]{0,8}(?:ASSISTANT )?Action:[ \t*]{0,8}([^\n]{1,200})$", re.MULTILINE | re.IGNORECASE
)
_INPUT = re.compile(r"(?:ASSISTANT )?Action[ _]Input:", re.IGNORECASE)
_AFTER_INPUT = re.compile(r"\n[ \t]{0,8}(?:Observation|Thought|Final Answer)\b", re.IGNORECASE)
_BARE_PLACEHOLDER = re.compile(r'(?<!["\w])\$\{[^{}\n"]{0,200}\}(?!["\w])')
_TAGGED = re.compile(r"<(tool_calls?|function_calls?|tool_code)>(.{0,20000}?)(?:</\1>|\Z)", re.DOTALL)
_FUNCTION = re.compile(
    r"<(?:function=|(?:invoke|function)\s{1,3}name=)[\"']?([\w.:-]{1,200})[\"']?\s{0,3}>(.{0,20000}?)"
    r"(?:</(?:function|invoke)>|\Z)",
    re.DOTALL,
)
_PARAMETER = re.compile(
    r"<parameter(?:=|\s{1,3}name=)[\"']?([\w.-]{1,200})[\"']?[^<>]{0,60}>\n?(.{0,20000}?)\n?</parameter>",
    re.DOTALL,
)
_ARGUMENT_PAIR = re.compile(
    r"<arg_key>(.{0,200}?)</arg_key>\s{0,9}<arg_value>(.{0,20000}?)</arg_value>", re.DOTALL
)
_NAMED_OBJECT = re.compile(
    r"(?:\[TOOL_CALLS\] ?|function<\uff5ctool\u2581sep\uff5c>|<\|tool_call_begin\|>)\s{0,3}"
    r"(?:functions\.)?([\w.-]{1,200})"
    r"(?::\d{1,4})?(?:\[ARGS\]|<\|tool_call_argument_begin\|>|\s{0,3}```json\s{0,3})?\s{0,3}(?=\{)"
)
_IDENTIFIER = re.compile(r"[A-Za-z_][\w.-]{0,199}")
_QUOTE_OR_BRACKET = re.compile(r"""[\\"'{}\[\]]""")
_OBJECT = re.compile(r"""\{\s{0,80}["']|\[\s{0,80}[{\[]""")
_CALL_LINE = re.compile(
    r"^[ \t>*`-]{0,8}(\[?[ \t]{0,3}[A-Za-z_][\w.]{0,199}\(.{0,4000}\)[ \t]{0,3}\]?)[ \t`;,.]{0,8}$",
    re.MULTILINE,
)
_PYTHON = {"true": True, "false": False, "null": None, "nan": Decimal("nan")}


@dataclass(frozen=True)
class ToolStep:
    """One call: the function's name, and its arguments as they were written.

    value: the arguments as an object, where they were written as a part of one.
    """

    name: str
    arguments: str
    value: dict[str, Any] | None = field(default=None, compare=False, repr=False)

    def parsed(self) -> dict[str, Any] | None:
        """The arguments as an object; None where they are none.

        A bare placeholder counts as a string.
        """
        if self.value is not None:
            return self.value
        value = _decode(self.arguments)
        if value is None:
            value = _decode(_BARE_PLACEHOLDER.sub(lambda match: json.dumps(match[0]), self.arguments))
        return value if isinstance(value, dict) else None


def _whole(text: str) -> int | Decimal:
    return int(text) if len(text) < 4000 else Decimal(text)  # Python reads no longer ones


_decoder = json.JSONDecoder(
    strict=False, parse_int=_whole, parse_float=Decimal, parse_constant=lambda text: Decimal(text.lower())
)


def _decode(text: str) -> Any:
    """The value at the first brace, whatever follows it; None where there is none."""
    start = text.find("{")
    if start < 0:
        return {} if not text.strip() or text.strip() == "null" else None
    found = _value_at(text, start)
    return None if found is None else found[0]


def _value_at(text: str, start: int) -> tuple[Any, int] | None:
    """The JSON or Python value that begins at a bracket, and where it ends."""
    try:
        return _decoder.raw_decode(text, start)
    except (ValueError, RecursionError, ArithmeticError):
        end = _closing(text, start)
        if end is None:
            return None
        try:
            return _python(ast.parse(text[start:end], mode="eval").body), end
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, ArithmeticError):
            return None


def _closing(text: str, start: int) -> int | None:
    """Where the bracket at `start` is closed, strings passed over; None where it is not."""
    depth, quote, skip = 0, "", -1
    for match in _QUOTE_OR_BRACKET.finditer(text, start):
        mark = match[0]
        if match.start() == skip:
            continue
        if mark == "\\":
            skip = match.start() + 1
        elif quote:
            quote = "" if mark == quote else quote
        elif mark in "\"'":
            quote = mark
        else:
            depth += 1 if mark in "{[" else -1
            if depth == 0:
                return match.end()
            if depth > DEEPEST:
                return None
    return None


def _python(node: ast.expr) -> Any:
    """The value of a literal, with JSON's names for true, false and null too.

    Raises:
        ValueError: it is none.
    """
    if isinstance(node, ast.Constant):
        value = node.value
        if isinstance(value, bool) or value is None or isinstance(value, str):
            return value
        if isinstance(value, (int, float)):
            return value if isinstance(value, int) else Decimal(repr(value))
    elif isinstance(node, ast.Name) and node.id.lower() in _PYTHON:
        return _PYTHON[node.id.lower()]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        inner = _python(node.operand)
        if isinstance(inner, (int, Decimal)) and not isinstance(inner, bool):
            return -inner if isinstance(node.op, ast.USub) else inner
    elif isinstance(node, (ast.List, ast.Tuple)):
        return [_python(one) for one in node.elts]
    elif isinstance(node, ast.Dict) and all(key is not None for key in node.keys):
        return {
            str(_python(key)): _python(one) for key, one in zip(node.keys, node.values, strict=True) if key
        }
    raise ValueError("no literal")


def extract_calls(completion: str) -> list[ToolStep]:
    """The calls of a completion's last part, in order; empty where there are none."""
    return find_calls(completion)[0]


def find_calls(completion: str, tail: int = TAIL) -> tuple[list[ToolStep], str]:
    """The calls of a completion's last part, in order, and the form that they are written in."""
    text = completion[-tail:]
    for form, read in (
        ("react", _react_calls),
        ("tags", _tagged_calls),
        ("json", _json_calls),
        ("code", _code_calls),
        ("by name", _named_calls),
    ):
        found = read(text)[:MOST_CALLS]
        if found:
            return found, form
    return [], ""


def calls_in(value: Any) -> list[ToolStep]:
    """The calls that an object holds: a call, a message with calls, or a list of them."""
    found = list(_calls_of(value))
    return found or list(_by_name(value))


def _react_calls(text: str) -> list[ToolStep]:
    actions = list(_ACTION.finditer(text))[:MOST_CALLS]
    steps = []
    for number, action in enumerate(actions):
        end = actions[number + 1].start() if number + 1 < len(actions) else len(text)
        written = _INPUT.search(text, action.end(), end)
        name = action[1].strip().strip("`*").strip()
        if written is None:
            steps += _code(name)[:1] or [ToolStep(name, "")]
            continue
        arguments = _AFTER_INPUT.split(text[written.end() : end], maxsplit=1)[0].strip()
        steps.append(ToolStep(name, _unfenced(arguments)))
    return steps


def _unfenced(text: str) -> str:
    """A text without the fence around it."""
    if not text.startswith("```"):
        return text.strip("`") if text.startswith("`") else text
    return text.partition("\n")[2].rpartition("```")[0].strip() or text


def _tagged_calls(text: str) -> list[ToolStep]:
    """Calls between tags, in the forms of open models."""
    steps = []
    for match in _FUNCTION.finditer(text):
        pairs = _PARAMETER.findall(_until(match[2], "</parameter>"))
        value = {key: _loose(given) for key, given in pairs} if pairs else None
        steps.append(_step(match[1], value if pairs else match[2].strip()))
    if steps:
        return steps
    for match in _NAMED_OBJECT.finditer(text):
        if (found := _value_at(text, match.end())) and isinstance(found[0], dict):
            steps.append(_step(match[1], found[0]))
    if steps:
        return steps
    for match in _TAGGED.finditer(text):
        inner = match[2]
        if pairs := _ARGUMENT_PAIR.findall(_until(inner, "</arg_value>")):
            steps.append(
                _step(inner.partition("<")[0].strip(), {key.strip(): _loose(one) for key, one in pairs})
            )
        else:
            steps += _json_calls(inner, bare=True) or _code_calls(inner) or _named_calls(inner)
    return steps


def _until(text: str, last: str) -> str:
    """A text up to its last closing tag: so that no opening one is searched for in vain."""
    end = text.rfind(last)
    return text[: end + len(last)] if end >= 0 else ""


def _loose(text: str) -> Any:
    """A value that stands as text between tags: JSON where it is some, else the text."""
    stripped = text.strip()
    if stripped[:1] in ("{", "["):
        found = _value_at(stripped, 0)
        if found is not None and found[1] == len(stripped):
            return found[0]
    return (
        _PYTHON.get(stripped.lower(), stripped) if stripped.lower() in ("true", "false", "null") else stripped
    )


def _json_calls(text: str, bare: bool = False) -> list[ToolStep]:
    """Calls of all JSON (or Python) objects and lists of a text.

    bare: whether an object with a name alone is a call.
    """
    values = list(_objects(text))
    found = [step for value in values for step in _calls_of(value)]
    if "${" in text:  # placeholders without quotes are no JSON
        quoted = _BARE_PLACEHOLDER.sub(lambda match: json.dumps(match[0]), text)
        others = [step for value in _objects(quoted) for step in _calls_of(value)]
        found = others if len(others) > len(found) else found
    if found or not (bare or text.strip().strip("`").removeprefix("json").strip()[:1] in ("{", "[")):
        return found
    return [
        ToolStep(value["name"], "{}", {})
        for value in values
        if isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and value.keys() <= {"name", "id", "type"}
    ]


def _objects(text: str) -> Iterator[Any]:
    """The values at all outermost brackets of a text that hold one."""
    place, effort = 0, EFFORT * len(text)
    while effort > 0 and (start := _OBJECT.search(text, place)):
        found = _value_at(text, start.start())
        if found is None:
            effort -= len(text) - start.start()
            place = start.start() + 1
        else:
            place = found[1]
            yield found[0]


def _calls_of(value: Any) -> Iterator[ToolStep]:
    """Calls in an object or a list, however deep; what is inside a call is not looked at."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += reversed(one[: 10 * MOST_CALLS])
        elif isinstance(one, dict):
            if step := _call(one):
                yield step
            else:
                waiting += reversed(list(one.values())[: 10 * MOST_CALLS])


def _call(value: dict[str, Any]) -> ToolStep | None:
    """The call that an object is; None where it is none."""
    inner = value.get("function")
    if isinstance(inner, dict):
        value = inner
    name = next((value[key] for key in NAMES if isinstance(value.get(key), str)), None)
    key = next((key for key in ARGUMENTS if key in value), None)
    if name is None or key is None:
        known = value.get("type") in ("function", "tool_use", "function_call") or isinstance(inner, dict)
        return ToolStep(name, "{}", {}) if name is not None and known else None
    return _step(name, value[key])


def _step(name: str, arguments: Any) -> ToolStep:
    """A call with its arguments as an object, or as text that holds one."""
    name = name.strip().removeprefix("functions.")
    if isinstance(arguments, dict):
        return ToolStep(name, json.dumps(arguments, default=float, ensure_ascii=False), arguments)
    if arguments is None or arguments == []:
        return ToolStep(name, "{}", {})
    return ToolStep(name, arguments if isinstance(arguments, str) else json.dumps(arguments, default=float))


def _code_calls(text: str) -> list[ToolStep]:
    """Calls written as code: the whole text, or else lines of their own."""
    steps = _code(_unfenced(text.strip()).strip().strip("`"))
    for match in () if steps else _CALL_LINE.finditer(text):
        steps += _code(match[1])
    return steps


def _code(text: str) -> list[ToolStep]:
    """The calls that a text is, with arguments by name; none where it is anything else."""
    if "(" not in text or len(text) > TAIL:
        return []
    try:
        body = ast.parse(text.strip()).body
        found: list[ast.expr] = []
        for statement in body:
            if not isinstance(statement, ast.Expr):
                return []
            inner = statement.value
            found += inner.elts if isinstance(inner, (ast.List, ast.Tuple)) else [inner]
        return [_code_step(one) for one in found]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, ArithmeticError):
        return []


def _code_step(node: ast.expr) -> ToolStep:
    """Raises ValueError where the expression is no call with literals."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, (ast.Name, ast.Attribute)):
        raise ValueError("no call")
    if len(node.args) == 1 and not node.keywords and isinstance(node.args[0], ast.Dict):
        return _step(ast.unparse(node.func), _python(node.args[0]))
    if node.args or any(one.arg is None for one in node.keywords):
        raise ValueError("arguments without names")
    return _step(ast.unparse(node.func), {str(one.arg): _python(one.value) for one in node.keywords})


def _named_calls(text: str) -> list[ToolStep]:
    """`{"name": {...}}`, where the text is nothing else."""
    text = _unfenced(text.strip())
    found = _value_at(text, 0) if text[:1] in ("{", "[") and text else None
    return list(_by_name(found[0])) if found is not None else []


def _by_name(value: Any) -> Iterator[ToolStep]:
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, dict) and len(one) == 1:
            name, arguments = next(iter(one.items()))
            if isinstance(arguments, dict) and _IDENTIFIER.fullmatch(name):
                yield _step(name, arguments)
