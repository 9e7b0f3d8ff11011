"""Compare the number that a completion settles on."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from unisd.tasks.base import Grade
from unisd.tasks.graders.base import TAIL, as_text

CUES = 50  # of the places that announce an answer, the last so many are looked at

# Digits with optional thousands separators; each character can be read in one way only, so matching
# is linear.
_NUMBER = (
    r"[-+\u2212\u2013]?\s{0,2}[$\u20ac\u00a3\u00a5]?\s{0,2}[-\u2212]?"
    r"(?:\d[\d,_]{0,400}(?:\.\d{0,400})?|\.\d{1,400})"
)
_PLAIN_NUMBER = re.compile(_NUMBER + r"(?:\s{0,2}/\s{0,2}\d{1,100})?(?:[eE][-+]?\d{1,3}(?!\w))?")
_HASHES = re.compile(r"#{3,6}\s{0,5}")
_BOXED = re.compile(r"\\boxed\s{0,3}\{([^{}]{0,200})")
_SAID = re.compile(
    r"answer(?:\s{1,3}to\s[^.:=\n]{0,80})?(?:\s{0,3}(?:is|was|=|:)){1,2}\s{0,3}(?:\*\*\s{0,2})?",
    re.IGNORECASE,
)


def _parse(text: str) -> Decimal | None:
    """The value of one matched number, None where the text is none."""
    cleaned = (
        re.sub(r"[\s,_$\u20ac\u00a3\u00a5+]", "", text)
        .replace("\u2212", "-")
        .replace("\u2013", "-")
        .rstrip(".")
    )
    try:
        if "/" in cleaned:
            top, _, bottom = cleaned.partition("/")
            value = Decimal(top) / Decimal(bottom)
        else:
            value = Decimal(cleaned)
    except (InvalidOperation, ArithmeticError, ValueError):
        return None
    return value if value.is_finite() else None


def _first_number(text: str) -> str | None:
    match = _PLAIN_NUMBER.search(text)
    return match[0].strip() if match else None


def _number_span(text: str, start: int) -> re.Match[str] | None:
    """Find the first number on the line that starts at `start`.

    It must lie within what a unit or a currency may take up before it.
    """
    end = text.find("\n", start)
    return _PLAIN_NUMBER.search(text, start, min(len(text) if end < 0 else end, start + 120))


def extract_number(completion: str) -> str | None:
    """Extract the number that a completion settles on, as written; None where there is none.

    It is looked for after the last `####`, else in the last `\boxed{}`, else after the last "the
    answer is" / "answer:", else it is the last number of the text.
    """
    text = as_text(completion)[-TAIL:]
    for pattern in (_HASHES, _BOXED, _SAID):
        for match in reversed(list(pattern.finditer(text))[-CUES:]):
            found = _first_number(match[1]) if pattern is _BOXED else None
            if pattern is not _BOXED and (span := _number_span(text, match.end())):
                found = span[0].strip()
            if found is not None:
                return found
    last: re.Match[str] | None = None
    for last in _PLAIN_NUMBER.finditer(text):  # noqa: B007 (the last one is wanted)
        pass
    if last is None:
        return None
    # "5-3" ends in 3, not in -3: a sign that follows a digit or a letter is an operator.
    found = last[0]
    before = text[: last.start()].rstrip(" ")[-1:]
    if found[0] in "-+\u2212\u2013" and (before.isalnum() or before in {")", "%"}):
        found = found[1:]
    return found.strip()


def number(completion: str, gold: str) -> Grade:
    """Compare numbers, to 1e-6 relative.

    Commas, currency, units, percent signs and a full stop don't matter.
    """
    found = extract_number(completion)
    wanted = extract_number(gold)
    if found is None or wanted is None:
        return Grade(False, found)
    have, want = _parse(found), _parse(wanted)
    if have is None or want is None:
        return Grade(False, found)
    try:
        equal = abs(have - want) <= Decimal("1e-6") * max(abs(want), Decimal(1))
    except ArithmeticError:
        equal = False
    return Grade(bool(equal), found)
