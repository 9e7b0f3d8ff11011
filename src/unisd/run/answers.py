"""Writes every greedy answer of a run's evaluations, before and after, to `answers.json`.

Paired statistics and reports need single answers.

`{part: {"ids", "skills", "before", "after", "examples"}}` for the parts `task` and `retention`;
`before` and `after` hold one verdict a row, and null where there is no grader. Of the first rows
(see `kept`) the texts are kept too, and the messages where a prompt is a chat; without a grader no
other row is answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size

from unisd.data.text import MAX_TEXT, record_of, reference_of
from unisd.data.thoughts import answer_of
from unisd.tasks.base import Row

MAX_EXAMPLES, UNGRADED = 64, 24
"""Rows of which texts are kept by default: with a grader; without one, where they cost answers."""
SHOWN, COLUMNS = 3, 80
"""Answers that are shown at the end of a run, and how wide."""
MAX_ANSWER = 100_000
"""Most characters of an answer."""


def kept(asked: int | None, graded: bool) -> int:
    """Of how many rows the texts are kept; `asked`: the option `answers_kept`."""
    return asked if asked is not None else MAX_EXAMPLES if graded else UNGRADED


def ungraded(texts: Sequence[str]) -> dict[str, Any]:
    """One state's answers that nobody grades; of as many rows as there are texts."""
    return {
        "correct": None,
        "outcomes": None,
        "texts": [text[:MAX_ANSWER] for text in texts],
        "reasons": [""] * len(texts),
    }


def verdicts(found: dict[str, Any], most: int = MAX_EXAMPLES) -> dict[str, Any]:
    """One state's answers, from what `evaluation.accuracy` returned; at most so many texts."""
    return {
        "token_ids": found["completion_ids"],
        "correct": [bool(verdict) for verdict in found["grades"]],
        "outcomes": found["outcomes"],
        "details": found["details"],
        "texts": [text[:MAX_ANSWER] for text in found["completions"][:most]],
        "reasons": [verdict.reason[:500] for verdict in found["grades"][:most]],
    }


def paired(rows: Sequence[Row], before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Both states' answers to the same rows, side by side."""
    examples = [
        {
            "id": str(row.get("id", number)),
            **record_of(row["prompt"]),
            "reference": reference_of(row)[:MAX_TEXT],
            **{
                when: {
                    "text": side["texts"][number],
                    "correct": side["correct"] and side["correct"][number],
                    "reason": side["reasons"][number],
                }
                for when, side in (("before", before), ("after", after))
            },
        }
        for number, row in enumerate(rows[: len(before["texts"])])
    ]
    return {
        "ids": [str(row.get("id", number)) for number, row in enumerate(rows)],
        "skills": [None if row.get("skill") is None else str(row["skill"]) for row in rows],
        "before": before["correct"],
        "after": after["correct"],
        "examples": examples,
    }


def change(example: dict[str, Any]) -> str:
    """How an answer has changed: by its verdicts, without a grader by its text."""
    sides = example["before"], example["after"]
    if None in (marks := tuple(side["correct"] for side in sides)):
        return "same text" if sides[0]["text"] == sides[1]["text"] else "other text"
    return {(True, False): "lost", (False, True): "gained", (True, True): "right"}.get(marks, "wrong")


CHANGES = ("lost", "gained", "other text", "wrong", "right", "same text")
"""In the order in which they are shown."""


def by_change(examples: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Answers that changed alike, in the order of `CHANGES`."""
    kinds = [[one for one in examples if change(one) == name] for name in CHANGES]
    return [kind for kind in kinds if kind]


def shown(part: dict[str, Any]) -> list[str]:
    """Some answers before and after in short lines, one of each kind of change first."""
    examples = part["examples"]
    kinds = by_change(examples)
    chosen = [kind[place] for place in range(SHOWN) for kind in kinds if place < len(kind)][:SHOWN]
    if not chosen:
        return []
    others = sum(one["before"]["text"] != one["after"]["text"] for one in examples)
    lines = [f"answers before and after training ({len(chosen)} of {len(examples)} kept; {others} changed):"]
    for one in chosen:
        lines.append(_line("  ", one["prompt"]))
        for when in ("before", "after"):
            mark = {True: ", right", False: ", wrong", None: ""}[one[when]["correct"]]
            lines.append(_line(f"    {f'{when}{mark}:':<15}", answer_of(one[when]["text"]) or "(no answer)"))
    return lines


def _line(head: str, text: str) -> str:
    """A text on one line of a terminal, without what moves its cursor."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text[: 8 * COLUMNS]).split())
    room = COLUMNS - len(head)
    return head + (plain if cell_len(plain) <= room else f"{set_cell_size(plain, room - 3)}...")
