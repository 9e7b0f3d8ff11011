"""Answers with the verdict of a careful reader, for the graders number, exact and contains.

A table is `{"grader": ..., "rows": [[gold, completion, whether it is right, note], ...]}`.
"""

import json
from pathlib import Path

import pytest

from unisd.tasks.graders import GRADERS

TABLES = Path(__file__).parent / "tables"
NAMES = (
    "numbers-written",
    "numbers-after-cues",
    "numbers-tolerance",
    "numbers-european",
    "numbers-further",
    "reasoning-numbers",
    "gold-lists-of-numbers",
    "gold-lists-of-texts",
    "contains-scripts",
    "contains-further",
    "exact-unicode",
    "exact-further",
)


@pytest.mark.parametrize("name", NAMES)
def test_every_row_gets_the_verdict_of_a_careful_reader(name):
    table = json.loads((TABLES / f"{name}.json").read_text(encoding="utf-8"))
    grader, wrong = GRADERS[table["grader"]], []
    for gold, completion, right, note in table["rows"]:
        grade = grader(completion, gold)
        if grade.correct != right:
            wrong.append((gold, completion, right, note, grade))
        assert grade.outcome in (("right",) if grade.correct else ("wrong", "unanswered", "ambiguous"))
    assert not wrong
