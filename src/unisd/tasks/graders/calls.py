"""Compare the tool calls of a completion with gold's (forms: :mod:`unisd.tasks.tool_calls`)."""

from __future__ import annotations

from unisd.tasks.base import Grade
from unisd.tasks.graders.base import as_text


def call(completion: str, gold: str) -> Grade:
    """The tool calls are those of gold."""
    from unisd.tasks.tool_calls import extract_calls, grade_calls

    return grade_calls(extract_calls(as_text(completion)), extract_calls(as_text(gold)))
