"""Loads what a run must not lose: sets of rows that are asked before and after the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unisd import tasks
from unisd.data.rows import Row, load_rows
from unisd.errors import UserError, flag
from unisd.files import config_of_run
from unisd.run.options import RunOptions
from unisd.run.own_rows import grader_of
from unisd.tasks import sandbox
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
    options: RunOptions, task: Task | None, others: bool = False, grade: GradeFunction | None = None
) -> list[RetentionSet]:
    """The sets that were asked for; by default the task's own, and `general` for a real model.

    The embedded model knows nothing of the world: without a task that has rows for it, it keeps
    the skills of its own.

    Args:
        task: that of the run, if it has one.
        others: of a task's own other rows than those that are reported, to choose on.
        grade: of files, where no grader is named.

    Raises:
        UserError: `none` beside others, an unknown name, a file that cannot be read, two sets of
            one name, a set of which nothing would be measured.
    """
    asked = options.retention
    if asked is not None and NONE in asked:
        if len(asked) > 1:
            raise UserError(f"retention: {NONE} cannot be combined with others: leave it out, or the others.")
        return []
    limit = options.retention_rows or options.max_eval_rows
    own = _own(task, limit, others) if task is not None else None
    if asked is None:
        found = [own] if own is not None and own.rows else []
        if not is_of_the_pocket(options.model_name_or_path):
            return [*found, _general(options)]
        return found or [_own(tasks.get(POCKET), limit)]
    found = [_named(name, options, own, grade) for name in asked]
    names = [one.name for one in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(
            f"retention: two sets are called {twice}: give one of them another name, or leave it out."
        )
    probed = probed_of(found)
    if unmeasured := next((one for one in found if one.grade is None and one is not probed), None):
        raise UserError(
            f"retention: {unmeasured.name} has no grader, and drift is measured on"
            f" {probed.name if probed else 'nothing'}: give {flag('grader')}, or only {unmeasured.name}."
        )
    return found


def probed_of(sets: Sequence[RetentionSet]) -> RetentionSet | None:
    """The set on whose rows drift is measured: the first with free prompts, else the first."""
    return next((one for one in sets if one.free), next(iter(sets), None))


def is_of_the_pocket(model: str) -> bool:
    """Whether a model is the embedded one, or was trained from it, also by several runs."""
    seen: set[str] = set()
    while model != POCKET and model not in seen:
        seen.add(model)
        model = str(config_of_run(model).get("model_name_or_path", ""))
    return model == POCKET


def _named(
    name: str, options: RunOptions, own: RetentionSet | None, grade: GradeFunction | None
) -> RetentionSet:
    limit = options.retention_rows or options.max_eval_rows
    if name == GENERAL:
        return _general(options)
    if own is not None and name == own.name:
        if not own.rows:
            raise UserError(f"retention: task {name} has no retention rows: leave it out, or give {GENERAL}.")
        return own
    if name in tasks.names():
        try:
            other = tasks.get(name)
        except UserError as error:
            raise UserError(
                f"retention: task {name} cannot be used ({error}): give its rows as a file."
            ) from None
        if other.runs_code:
            sandbox.require_with(options.allow_unsafe_code_execution)
        found = other.retention_rows(limit=limit) or other.load("test", limit=limit)
        return RetentionSet(name, found, other.grade, cap=other.max_new_tokens)
    if Path(name).suffix and Path(name).exists():
        rows = load_rows(name, options.columns, needs_reference=False)[:limit]
        by_name = grader_of(options.grader, options.allow_unsafe_code_execution, rows, name)
        return RetentionSet(Path(name).stem, rows, by_name or grade)
    raise UserError(
        f"retention: {name!r} is neither {NONE}, {GENERAL}, a task ({', '.join(tasks.names())}) nor a file."
    )


def _own(task: Task, limit: int, others: bool = False) -> RetentionSet:
    rows = task.retention_rows()[-limit:] if others else task.retention_rows(limit=limit)
    return RetentionSet(task.name, rows, task.grade)


def _general(options: RunOptions) -> RetentionSet:
    task, graded = tasks.get(GENERAL), options.retention_rows or min(GRADED, options.max_eval_rows)
    free = math.ceil(graded * FREE / GRADED)
    loaded = task.load("test", limit=graded), task.load("chat", limit=free)
    return RetentionSet(GENERAL, loaded[0], task.grade, loaded[1], task.max_new_tokens)
