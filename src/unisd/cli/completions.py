"""Files of completions: which row each line answers, and in which order its options stood."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unisd.data.reading import load_file
from unisd.errors import UserError
from unisd.files import write_lines
from unisd.tasks.base import Row, Task

KEYS = ("prompt_id", "id", "task_id", "question_id")
"""Fields that name the row that a line answers; the first whose values are rows is taken."""
OURS = "unisd"
"""The order of options in our prompts, as lines name it; "data" is the data set's own."""


@dataclass
class Matched:
    """The rows that a file answers, their answers, and what is to be said of the file.

    asked: for each answer the row as it was asked, with its options in the order in which that
        system saw them.
    rows: the first of these. answers: one or several a row.
    """

    rows: list[Row]
    answers: list[list[str]]
    asked: list[list[Row]]
    notes: list[str]
    counts: dict[str, int]


def match_completions(task: Task, rows: list[Row], path: str, in_order: bool = False) -> Matched:
    """Match the lines of a file with rows: by their ids, or in order where that is asked for.

    Without any ids they are taken in order too, if there are as many as rows.

    Raises:
        UserError: lines without a completion, ids that are not among the rows, an id that several
            rows have, or more or fewer lines than rows where only their order is known.
    """
    written = load_file(path)
    # lines that `unisd eval` writes where a server gave no answer: neither right nor wrong
    records = [record for record in written if not (record.get("failed") and "completion" in record)]
    for place, record in enumerate(records):
        if not isinstance(record.get("completion"), str):
            raise UserError(
                f'{path}, row {place} has no text in "completion": each line is {{"id": ..., "completion":'
                ' "..."}.'
            )
    if not records:
        holds = "holds failed answers alone" if written else "is empty"
        raise UserError(f"{path} {holds}: give one completion per line.")
    notes: list[str] = []
    if lost := len(written) - len(records):
        notes.append(f"{path}: {lost} of {len(written)} lines hold no answer because it failed: not counted.")
    places = _in_order(records, rows, path, in_order, notes)
    if places is None:
        places = _by_id(records, rows, path)
    by_place: dict[int, list[int]] = {}
    for line, place in enumerate(places):
        by_place.setdefault(place, []).append(line)
    answered = sorted(by_place)
    found = Matched([], [], [], notes, {})
    for place in answered:
        lines = by_place[place]
        where = [f"{path}, row {line}" for line in lines]
        seen = [_asked(task, rows[place], records[line], at) for line, at in zip(lines, where, strict=True)]
        found.rows.append(seen[0])
        found.asked.append(seen)
        found.answers.append([records[line]["completion"] for line in lines])
    _count(found, rows, records, path)
    _say_order(task, records, notes)
    return found


def _in_order(
    records: Sequence[Row], rows: Sequence[Row], path: str, asked: bool, notes: list[str]
) -> list[int] | None:
    """Places of rows for lines that are taken in order; None where their ids say it."""
    keyed = [next((key for key in KEYS if record.get(key) is not None), None) for record in records]
    if not asked and any(keyed):
        return None
    if len(records) != len(rows):
        without = "" if any(keyed) else " without id"
        raise UserError(
            f"{path} has {len(records)} completions{without} for {len(rows)} rows: give one per row, or ids."
        )
    how = "--in_order" if asked else f"no line has {', '.join(KEYS[:-1])} or {KEYS[-1]}"
    notes.append(f"{path}: its {len(records)} lines are taken in the order of the rows ({how}).")
    return list(range(len(rows)))


def _by_id(records: Sequence[Row], rows: Sequence[Row], path: str) -> list[int]:
    """Places of rows for lines with ids."""
    known: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        known.setdefault(str(row["id"]), []).append(place)
    held = [key for key in KEYS if any(record.get(key) is not None for record in records)]
    key = max(held, key=lambda one: sum(str(record.get(one)) in known for record in records))
    places = []
    for line, record in enumerate(records):
        name = None if record.get(key) is None else str(record[key])
        found = known.get(name, []) if name is not None else []
        if not found:
            raise UserError(
                f"{path}, row {line}: {key} {name!r} is not among the {len(rows)} rows (ids like"
                f" {str(rows[0]['id'])!r}); --in_order takes lines in the order of the rows."
            )
        if len(found) > 1:
            raise UserError(
                f"{path}, row {line}: {len(found)} rows of the data have the id {name!r} (rows {found[0]} and"
                f" {found[1]}): give each row its own, or --in_order with one line per row."
            )
        places.append(found[0])
    return places


def _count(found: Matched, rows: Sequence[Row], records: Sequence[Row], path: str) -> None:
    """Account for all rows and lines."""
    found.counts = {"rows": len(rows), "answered": len(found.rows), "answers": len(records)}
    if len(found.rows) < len(rows):
        found.notes.append(
            f"{path}: answers for {len(found.rows)} of {len(rows)} rows; the figures are for these."
        )
    numbers = Counter(len(texts) for texts in found.answers)
    if len(numbers) > 1:
        found.notes.append(
            f"{path}: rows have {min(numbers)} to {max(numbers)} answers; each row counts once, by its share."
        )


def _asked(task: Task, row: Row, record: Row, where: str) -> Row:
    """The row with its options in the order in which a line's system saw them."""
    arrange = getattr(task, "arranged", None)
    if arrange is None:
        return row
    order: Any = record.get("option_order", record.get("order"))
    if order is None and record.get("prompt_id") is not None:
        order = OURS
    if order in (None, "data"):
        return dict(arrange(row, None))
    if order == OURS:
        return row
    count = len(row["published_options"])
    listed = order if isinstance(order, list) else []
    if not listed or not all(type(one) is int and 0 <= one < count for one in listed):
        raise UserError(
            f'{where}: the order {order!r:.60} of options must be "{OURS}" (that of our prompts),'
            f' "data" (the data set\'s own) or a list of their positions there, from 0 to {count - 1}.'
        )
    return dict(arrange(row, order))


def _say_order(task: Task, records: Sequence[Row], notes: list[str]) -> None:
    """Say in which order letters were read, where there are options and lines do not say."""
    silent = sum(
        not any(key in record for key in ("order", "option_order", "prompt_id")) for record in records
    )
    if hasattr(task, "arranged") and silent:
        notes.append(
            f"{silent} answers do not say in which order they saw the options: their letters are read in"
            " the data set's own. Answers to the prompts of --write_prompts keep its field order."
        )


def write_prompts(rows: Sequence[Row], path: Path) -> None:
    """Write what a system is to be asked, one line a row."""
    lines = []
    for row in rows:
        line = {"id": row["id"], "prompt": row["prompt"]}
        if "published_options" in row:
            line |= {
                "order": OURS,
                "option_order": [row["published_options"].index(one) for one in row["options"]],
            }
        lines.append(line)
    write_lines(path, lines)
