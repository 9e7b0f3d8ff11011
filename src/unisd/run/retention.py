"""Loads what a run must not lose: sets of rows that are asked before and after the training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from unisd import tasks
from unisd.data.rows import Row, load_rows
from unisd.errors import UserError
from unisd.files import RESULTS
from unisd.tasks.base import Grade, Task

GENERAL, NONE, POCKET = "general", "none", "pocket"
GRADED, FREE = 120, 30
"""Rows of the general set, where nobody says how many: graded ones, and prompts without a grade."""
GradeFunction = Callable[[Row, str], Grade]


@dataclass
class RetentionSet:
    """Rows that a model is asked before and after its training.

    `rows` are graded by `grade` (None: nobody can tell a right answer); `free` are prompts without
    a grade, on which drift is measured (none: on `rows`). `cap`: most tokens of an answer, None as
    the run's evaluation has it.
    """

    name: str
    rows: list[Row]
    grade: GradeFunction | None = None
    free: list[Row] = field(default_factory=list)
    cap: int | None = None

    @property
    def probed(self) -> list[Row]:
        """The rows on which drift is measured."""
        return self.free or self.rows

    def __str__(self) -> str:
        graded = f"{len(self.rows)} rows" if self.grade else f"{len(self.rows)} rows without a grader"
        return f"{self.name} ({graded}" + (f", {len(self.free)} free prompts)" if self.free else ")")


def load_sets(
    asked: Sequence[str] | None,
    rows: int | None,
    most: int,
    task: Task | None,
    model: str,
    grader: str | None = None,
    others: bool = False,
) -> list[RetentionSet]:
    """The sets that were asked for; by default the task's own, and `general` for a real model.

    The embedded model knows nothing of the world: without a task that has rows for it, it keeps
    the skills of its own.

    Args:
        asked: `none`, `general`, names of tasks or files of rows.
        rows: most rows of each.
        most: the same where `rows` is None; of general no more than `GRADED`.
        task: that of the run, if it has one.
        grader: of the run's own rows, which grades those of files too.
        others: of a task's own other rows than those that are reported, to choose on.

    Raises:
        UserError: `none` beside others, an unknown name, a file that cannot be read.
    """
    if asked is not None and NONE in asked:
        if len(asked) > 1:
            raise UserError(f"retention: {NONE} stands alone: leave it out, or the others.")
        return []
    if asked is not None and (twice := [name for name in asked if list(asked).count(name) > 1]):
        raise UserError(f"retention: {twice[0]} is given twice.")
    own = _own(task, rows or most, others) if task is not None else None
    if asked is not None:
        return [_named(name, rows, most, own, grader) for name in asked]
    found = [own] if own is not None and own.rows else []
    if not is_of_the_pocket(model):
        return [*found, _general(rows, most)]
    return found or [_own(tasks.get(POCKET), rows or most)]


def is_of_the_pocket(model: str) -> bool:
    """Whether a model is the embedded one, or was trained from it."""
    if model == POCKET:
        return True
    with suppress(OSError, ValueError, KeyError, TypeError):  # no folder, or not of a run of ours
        results = json.loads((Path(model) / RESULTS).read_text(encoding="utf-8"))
        return bool(results["config"]["model_name_or_path"] == POCKET)
    return False


def _named(
    name: str, rows: int | None, most: int, own: RetentionSet | None, grader: str | None
) -> RetentionSet:
    if name == GENERAL:
        return _general(rows, most)
    if own is not None and name == own.name:
        if not own.rows:
            raise UserError(f"retention: task {name} has no retention rows: leave it out, or give {GENERAL}.")
        return own
    if name in tasks.names():
        other = tasks.get(name)
        found = other.retention_rows(limit=rows or most) or other.load("test", limit=rows or most)
        return RetentionSet(name, found, other.grade, cap=other.max_new_tokens)
    if Path(name).suffix and Path(name).exists():
        return _of_file(name, rows or most, grader)
    raise UserError(
        f"retention: {name!r} is neither {NONE}, {GENERAL}, a task ({', '.join(tasks.names())}) nor a file."
    )


def _own(task: Task, limit: int, others: bool = False) -> RetentionSet:
    rows = task.retention_rows()[-limit:] if others else task.retention_rows(limit=limit)
    return RetentionSet(task.name, rows, task.grade)


def _general(rows: int | None, most: int) -> RetentionSet:
    task, graded = tasks.get(GENERAL), rows or min(GRADED, most)
    free = math.ceil(graded * FREE / GRADED)
    loaded = task.load("test", limit=graded), task.load("chat", limit=free)
    return RetentionSet(GENERAL, loaded[0], task.grade, loaded[1], task.max_new_tokens)


def _of_file(name: str, limit: int, grader: str | None) -> RetentionSet:
    found = load_rows(name, needs_reference=False)[:limit]
    if grader is None or grader == "code":
        return RetentionSet(Path(name).stem, found)
    from unisd.tasks.graders import check_gold, get_grader

    judge = get_grader(grader)
    for number, row in enumerate(found):
        gold = row.get("answer", row.get("completion"))
        if gold is None:
            return RetentionSet(Path(name).stem, found)
        check_gold(judge, row, gold, f"{name}, row {number}")
    return RetentionSet(
        Path(name).stem, found, lambda row, text: judge(text, row.get("answer", row.get("completion")))
    )
