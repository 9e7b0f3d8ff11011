"""Tool calls in what a model wrote: found, parsed, and compared with gold step by step.

Two forms are read: ReAct (`Action: name` / `Action Input: {...}`) and JSON objects (`{"name": ...,
"arguments": {...}}`, as chat models write them, alone or in a list). Values are compared as JSON,
not as text: key order and spacing don't matter, an empty value is a missing one, "3" is 3, and
letter case of texts is ignored. A placeholder of gold's (`${id from search}`) stands for any value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from unisd.tasks.base import Grade

HEAD = 20_000  # characters of a completion that are looked at
MOST_CALLS = 100
_ACTION = re.compile(
    r"^[ \t]{0,8}(?:ASSISTANT )?Action:[ \t]{0,8}([^\n]{1,200})$", re.MULTILINE | re.IGNORECASE
)
_INPUT = re.compile(r"(?:ASSISTANT )?Action[ _]Input:", re.IGNORECASE)
_BARE_PLACEHOLDER = re.compile(r'(?<!["\w])\$\{[^{}\n"]{0,200}\}(?!["\w])')
_PLACEHOLDER = re.compile(r"\$\{[^{}\n]{0,200}\}")
_decoder = json.JSONDecoder()


@dataclass(frozen=True)
class ToolStep:
    """One call: the function's name, and its arguments as they were written."""

    name: str
    arguments: str

    def parsed(self) -> dict[str, Any] | None:
        """The arguments as an object; None where they are none.

        A bare placeholder counts as a string.
        """
        value = _decode(self.arguments)
        if value is None:
            value = _decode(_BARE_PLACEHOLDER.sub(lambda match: json.dumps(match[0]), self.arguments))
        return value if isinstance(value, dict) else None


def _decode(text: str) -> Any:
    """The JSON value at the first brace, whatever follows it."""
    start = text.find("{")
    if start < 0:
        return {} if not text.strip() else None
    try:
        return _decoder.raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        return None


def extract_calls(completion: str) -> list[ToolStep]:
    """The calls of a completion, in order; empty where there are none."""
    text = completion[:HEAD]
    actions = list(_ACTION.finditer(text))[:MOST_CALLS]
    if not actions:
        return list(_json_calls(text))[:MOST_CALLS]
    steps = []
    for number, action in enumerate(actions):
        end = actions[number + 1].start() if number + 1 < len(actions) else len(text)
        written = _INPUT.search(text, action.end(), end)
        arguments = text[written.end() : end] if written else ""
        steps.append(ToolStep(action[1].strip().strip("`*"), arguments.partition("\nObservation")[0].strip()))
    return steps


def _json_calls(text: str) -> Iterator[ToolStep]:
    place = 0
    for _ in range(MOST_CALLS):
        place = text.find("{", place)
        if place < 0:
            return
        try:
            value, place = _decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            place += 1
            continue
        if isinstance(value, dict):
            inner = value.get("function")
            value = inner if isinstance(inner, dict) else value
            name = value.get("name") or value.get("tool") or value.get("api")
            arguments = value.get("arguments", value.get("parameters", value.get("args", {})))
            if isinstance(name, str):
                yield ToolStep(name, arguments if isinstance(arguments, str) else json.dumps(arguments))


def grade_calls(found: Sequence[ToolStep], gold: Sequence[ToolStep]) -> Grade:
    """Correct when all steps are gold's, in order and no more.

    Details: `name_accuracy` and `argument_accuracy`, shares of gold's steps with the right name,
    and with the right name and arguments, at their place.
    """
    names = [f.name == g.name for f, g in zip(found, gold, strict=False)]
    whole = [ok and same_arguments(f, g) for ok, f, g in zip(names, found, gold, strict=False)]
    steps = max(len(gold), len(found), 1)
    details = {"name_accuracy": sum(names) / steps, "argument_accuracy": sum(whole) / steps}
    correct = bool(gold) and len(found) == len(gold) and all(whole)
    reason = (
        ""
        if correct
        else "no call"
        if not found
        else "wrong arguments"
        if all(names) and len(names) == len(gold)
        else "wrong call"
    )
    extracted = "; ".join(f"{step.name}({' '.join(step.arguments.split())})" for step in found)[:1000] or None
    return Grade(correct, extracted, reason, details)


def same_arguments(found: ToolStep, gold: ToolStep) -> bool:
    ours, theirs = found.parsed(), gold.parsed()
    if theirs is None or ours is None:  # gold that is no JSON can only be compared as text
        return theirs is ours and _fold(found.arguments) == _fold(gold.arguments)
    try:
        return _same(ours, theirs)
    except RecursionError:
        return False


def _same(found: Any, gold: Any) -> bool:
    if isinstance(gold, str) and _PLACEHOLDER.search(gold):
        return found not in (None, "")
    if isinstance(gold, dict) and isinstance(found, dict):
        given, wanted = ({k: v for k, v in side.items() if v not in (None, "")} for side in (found, gold))
        return given.keys() == wanted.keys() and all(_same(given[key], wanted[key]) for key in wanted)
    if isinstance(gold, list) and isinstance(found, list):
        return len(found) == len(gold) and all(map(_same, found, gold))
    if isinstance(gold, (dict, list)) or isinstance(found, (dict, list)):
        return False
    return bool(_scalar(found) == _scalar(gold))


def _scalar(value: Any) -> Any:
    """Numbers and texts that look like one are the same; booleans are not numbers."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, str) and len(value) < 40:
        try:
            return float(value)
        except ValueError:
            pass
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else _fold(str(value))


def _fold(text: str) -> str:
    return " ".join(text.casefold().split())
