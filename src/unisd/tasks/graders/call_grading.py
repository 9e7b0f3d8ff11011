"""Compare tool calls with gold's, step by step.

Values are compared by their types: numbers as exact numbers, so that ids of any length count whole
and 3 is 3.0, true is not 1, and NaN is itself; texts as texts ("1.10" is not "1.1"). A text is a
number where it is the way to write it: "3" is 3, but "007" is not 7, nor "1.10" 1.1, for zip codes
and versions would be lost. Letter case is ignored in words, not in keys ("aB3xY"), paths and
addresses. Key order, spacing and Unicode's composed forms don't matter, and an empty value is a
missing one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from unisd.tasks.base import Grade
from unisd.tasks.graders.base import shortened
from unisd.tasks.tool_calls import ToolStep

TOLD = 5  # mistakes that feedback names
_PLACEHOLDER = re.compile(r"\$\{[^{}\n]{0,200}\}")
_WRITTEN_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,400})(?:\.\d{0,400}[1-9])?")
_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")


def grade_calls(found: Sequence[ToolStep], gold: Sequence[ToolStep], placeholders: bool = True) -> Grade:
    """Correct when all steps are gold's, in order and no more.

    placeholders: whether a `${...}` in gold stands for any value (ToolAlpaca's).

    Details: `name_accuracy` and `argument_accuracy`, shares of gold's steps with the right name,
    and with the right name and arguments, at their place.
    """
    names = [f.name == g.name for f, g in zip(found, gold, strict=False)]
    whole = [ok and same_arguments(f, g, placeholders) for ok, f, g in zip(names, found, gold, strict=False)]
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
    feedback = "" if correct or not found else _feedback(found, gold, placeholders)
    return Grade(correct, extracted, reason, details, feedback=feedback)


def _feedback(found: Sequence[ToolStep], gold: Sequence[ToolStep], placeholders: bool) -> str:
    """Say where calls go wrong, but no name and no value that gold has."""
    wrong = []
    for place, (ours, theirs) in enumerate(zip(found, gold, strict=False), 1):
        if ours.name != theirs.name:
            wrong.append(f"call {place}: {shortened(ours.name)} is the wrong function")
        elif not same_arguments(ours, theirs, placeholders):
            which = _wrong_arguments(ours, theirs, placeholders)
            wrong.append(f"call {place}, {shortened(ours.name)}: {which}")
    right = min(len(found), len(gold)) - len(wrong)
    if len(found) != len(gold):
        wrong.append("calls are missing" if len(found) < len(gold) else "there are more calls than needed")
    return "; ".join([f"{right} of {len(found)} calls right", *wrong[:TOLD]]) + "."


def _wrong_arguments(found: ToolStep, gold: ToolStep, placeholders: bool) -> str:
    ours, theirs = found.parsed(), gold.parsed()
    if ours is None or theirs is None:
        return "its arguments are not a JSON object" if ours is None else "its arguments are wrong"
    ours, theirs = _given(ours), _given(theirs)
    wrong = [
        f"argument {shortened(name)} is {'wrong' if name in theirs else 'not wanted'}"
        for name in ours
        if name not in theirs or not _same(ours[name], theirs[name], placeholders)
    ]
    missing = ["an argument is missing"] if theirs.keys() - ours.keys() else []
    return ", ".join([*wrong[:TOLD], *missing]) or "its arguments are wrong"


def same_arguments(found: ToolStep, gold: ToolStep, placeholders: bool = True) -> bool:
    """Whether two calls have the same arguments."""
    ours, theirs = found.parsed(), gold.parsed()
    if theirs is None or ours is None:  # gold that is no JSON can only be compared as text
        return theirs is ours and _folded(found.arguments) == _folded(gold.arguments)
    try:
        return _same(ours, theirs, placeholders)
    except RecursionError:
        return False


def _same(found: Any, gold: Any, placeholders: bool) -> bool:
    if placeholders and isinstance(gold, str) and _PLACEHOLDER.search(gold):
        return found not in (None, "")
    if isinstance(gold, dict) and isinstance(found, dict):
        given, wanted = _given(found), _given(gold)
        return given.keys() == wanted.keys() and all(
            _same(given[key], wanted[key], placeholders) for key in wanted
        )
    if isinstance(gold, list) and isinstance(found, list):
        return len(found) == len(gold) and all(
            _same(ours, theirs, placeholders) for ours, theirs in zip(found, gold, strict=True)
        )
    if isinstance(gold, (dict, list)) or isinstance(found, (dict, list)):
        return False
    return _same_scalar(found, gold)


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """Without those that are empty, which are missing ones."""
    return {name: value for name, value in arguments.items() if value not in (None, "")}


def _same_scalar(found: Any, gold: Any) -> bool:
    if isinstance(found, str) and isinstance(gold, str):
        return _folded(found) == _folded(gold)
    if isinstance(found, str) or isinstance(gold, str):
        text, value = (found, gold) if isinstance(found, str) else (gold, found)
        if isinstance(value, bool):
            return text.strip().lower() == str(value).lower()
        written = _WRITTEN_NUMBER.fullmatch(text.strip())
        return bool(written) and _is_number(value) and Decimal(text.strip()) == value
    if isinstance(found, bool) or isinstance(gold, bool) or found is None or gold is None:
        return found is gold
    if found != found or gold != gold:  # NaN
        return bool(found != found and gold != gold)
    return bool(_exact(found) == _exact(gold))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and value == value


def _exact(value: Any) -> Any:
    """A number as it is written: 0.1 is a tenth (gold may come as Python's own numbers)."""
    return Decimal(repr(value)) if isinstance(value, float) else value


def _folded(text: str) -> list[tuple[str, ...]]:
    """The lines of a text as they are compared: words, with their case where it says something."""
    text = unicodedata.normalize("NFC", text).translate(_QUOTES)
    lines = [line for line in text.splitlines() if line.strip()]
    folded = []
    for line in lines:
        words = tuple(word if _is_key(word) else word.casefold() for word in line.split())
        indent = line[: len(line) - len(line.lstrip())] if len(lines) > 1 else ""
        folded.append((indent, *words))
    return folded


def _is_key(word: str) -> bool:
    """Whether the case of a word's letters matters: keys, paths, addresses."""
    mixed = any(c.isdigit() for c in word) and word.lower() != word and word.upper() != word
    return mixed or word.startswith(("/", "./", "~/")) or "://" in word or "\\" in word
