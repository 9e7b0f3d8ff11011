"""Say of a grade what was taken for the answer, how it was found, and what was passed over."""

from __future__ import annotations

import textwrap
from typing import Any

from unisd.tasks.base import Grade

WIDTH = 80  # columns
SHOWN = 8  # candidates


def wrapped(text: str, indent: str = "") -> list[str]:
    """A text in lines of at most `WIDTH` columns."""
    line = " ".join(text.split())
    return textwrap.wrap(line, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ") or [indent]


def explained(grade: Grade) -> list[str]:
    """The lines below an answer's name and outcome."""
    if grade.extracted is None:
        lines = wrapped(f"taken: nothing ({grade.reason or 'no answer found'})", "  ")
    else:
        found = f" ({grade.how})" if grade.how else ""
        why = f"; {grade.reason}" if grade.reason and grade.reason != "wrong" else ""
        lines = wrapped(f"taken: {_cut(grade.extracted)}{found}{why}", "  ")
    for text, how, why in grade.passed_over[:SHOWN]:
        lines += wrapped(f"passed over: {_cut(text)} ({how}): {why}", "  ")
    more = len(grade.passed_over) - SHOWN
    return lines + ([f"  and {more} more"] if more > 0 else [])


def as_record(grade: Grade) -> list[dict[str, Any]]:
    """The candidates that were passed over, for a file."""
    return [{"text": text, "how": how, "why": why} for text, how, why in grade.passed_over]


def _cut(text: str) -> str:
    line = " ".join(text[:400].split())
    return line if len(line) <= 100 else line[:97] + "..."
