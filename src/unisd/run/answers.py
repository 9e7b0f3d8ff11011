"""Writes every greedy answer of a run's evaluations, before and after, to `answers.json`.

Paired statistics and reports need single answers.

`{part: {"ids", "skills", "before", "after", "examples"}}` for the parts `task` and `retention`;
`before` and `after` hold one verdict a row. Of the first `MAX_EXAMPLES` rows the texts are kept
too, and the messages where a prompt is a chat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unisd.data.text import MAX_TEXT, record_of
from unisd.tasks.base import Row

MAX_EXAMPLES = 64
MAX_ANSWER = 100_000
"""Most characters of an answer."""


def verdicts(found: dict[str, Any]) -> dict[str, Any]:
    """One state's answers, from what `evaluation.accuracy` returned."""
    return {
        "token_ids": found["completion_ids"],
        "correct": [bool(verdict) for verdict in found["grades"]],
        "outcomes": found["outcomes"],
        "texts": [text[:MAX_ANSWER] for text in found["completions"][:MAX_EXAMPLES]],
        "reasons": [verdict.reason[:500] for verdict in found["grades"][:MAX_EXAMPLES]],
    }


def paired(rows: Sequence[Row], before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Both states' answers to the same rows, side by side."""
    examples = [
        {
            "id": str(row.get("id", number)),
            **record_of(row["prompt"]),
            "reference": str(row.get("privileged_context") or row.get("completion") or "")[:MAX_TEXT],
            **{
                when: {
                    "text": side["texts"][number],
                    "correct": side["correct"][number],
                    "reason": side["reasons"][number],
                }
                for when, side in (("before", before), ("after", after))
            },
        }
        for number, row in enumerate(rows[:MAX_EXAMPLES])
    ]
    return {
        "ids": [str(row.get("id", number)) for number, row in enumerate(rows)],
        "skills": [None if row.get("skill") is None else str(row["skill"]) for row in rows],
        "before": before["correct"],
        "after": after["correct"],
        "examples": examples,
    }
