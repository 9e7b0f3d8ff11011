"""Checks of instructions about an answer's form, each by reading the text alone.

`CHECKS[name](text, argument)` says whether the text does what it was asked; :func:`unmet` names the
checks of a row that fail. No check raises, whatever the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from unisd.files import parsed

_FENCE = re.compile(r"\A```[a-z]{0,10}\n(.*?)\n?```\Z", re.DOTALL)
_PUNCTUATION = ".!?\"')*_ \n"


def words(text: str) -> list[str]:
    """What stands between white space, if it has a letter or a digit."""
    return [word for word in text.split() if any(map(str.isalnum, word))]


def lines(text: str) -> list[str]:
    """Lines that are not blank, without white space around them."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def occurrences(text: str, word: str) -> int:
    """How often a word (or a group of words) stands in a text as a whole, in either case."""
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def _cased(text: str) -> bool:
    return text.upper() != text.lower()


def _numbered(text: str, count: int) -> bool:
    found = [match[1] for line in lines(text) if (match := re.match(r"(\d{1,3})[.)]\s+\S", line))]
    return found == [str(number) for number in range(1, count + 1)]


def _ends(text: str, ending: str) -> bool:
    if any(map(str.isalnum, ending)):  # the full stop behind it does no harm
        text = text.rstrip(_PUNCTUATION)
        return bool(re.search(rf"(?<!\w){re.escape(ending)}\Z", text, re.IGNORECASE))
    return text.endswith(ending)


def _json(text: str) -> Any:
    match = _FENCE.match(text)
    return parsed(match[1] if match else text)


def _json_list(text: str, count: int) -> bool:
    found = _json(text)
    if not isinstance(found, list) or len(found) != count:
        return False
    return all(isinstance(one, str) and one.strip() for one in found) and len(set(found)) == count


def _sentences(text: str, count: int) -> bool:
    ends = re.findall(r"[.!?]{1,3}[\"')]?(?=\s|\Z)", text)
    return len(ends) == count and bool(re.search(r"[.!?][\"')]?\Z", text))


def _quoted(text: str, _: object) -> bool:
    return len(text) > 2 and text[0] in '"\u201c' and text[-1] in '"\u201d'


def _separated(text: str, argument: tuple[str, int]) -> bool:
    mark, count = argument
    parts = [part.strip(_PUNCTUATION) for part in text.split(mark)]
    return len(parts) == count and all(parts)


def _divided(text: str, argument: tuple[str, int]) -> bool:
    mark, count = argument
    parts = re.split(rf"^\s*{re.escape(mark)}\s*$", text, flags=re.MULTILINE)
    return len(parts) == count and all(map(words, parts))


def _wrapped(text: str, argument: tuple[str, str]) -> bool:
    before, after = argument
    inner = text.removeprefix(before).removesuffix(after)
    return text == before + inner + after and bool(words(inner)) and before not in inner


CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "capitals": lambda text, _: _cased(text) and text == text.upper(),
    "lower_case": lambda text, _: _cased(text) and text == text.lower(),
    "words": lambda text, count: len(words(text)) == count,
    "words_at_most": lambda text, count: len(words(text)) <= count,
    "words_at_least": lambda text, count: len(words(text)) >= count,
    "words_by_line": lambda text, counts: [len(words(line)) for line in lines(text)] == counts,
    "lines": lambda text, count: len(lines(text)) == count,
    "sorted_lines": lambda text, _: lines(text.casefold()) == sorted(lines(text.casefold())),
    "sentences": _sentences,
    "bullets": lambda text, count: sum(bool(re.match(r"-\s+\S", line)) for line in lines(text)) == count,
    "numbered": _numbered,
    "starts_with": lambda text, start: bool(re.match(rf"{re.escape(start)}(?!\w)", text)),
    "ends_with": _ends,
    "json": lambda text, value: _json(text) == value,
    "json_list": _json_list,
    "one_of": lambda text, options: text.rstrip(".") in options,
    "quoted": _quoted,
    "separated": _separated,
    "divided": _divided,
    "wrapped": _wrapped,
    "count": lambda text, argument: occurrences(text, argument[0]) == argument[1],
    "mentions": lambda text, options: any(occurrences(text, one) for one in options),
    "contains_all": lambda text, parts: all(part in text for part in parts),
    "excludes": lambda text, unwanted: not any(occurrences(text, one) for one in unwanted),
    "without": lambda text, unwanted: not any(one in text.casefold() for one in unwanted),
}
"""By name: what is asked of a text, and whether it holds for a text and the check's argument."""


def unmet(text: str, checks: Mapping[str, Any]) -> list[str]:
    """Name the checks (name to argument) that a text without surrounding space does not pass."""
    text = text.strip()
    return [name for name, argument in checks.items() if not CHECKS[name](text, argument)]
