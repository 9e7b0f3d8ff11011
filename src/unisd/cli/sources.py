"""The rows that `unisd eval`, `grade` and `contamination` read: of tasks, or the user's own.

The flags are those of `unisd train`, and so are the readers.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unisd import tasks
from unisd.data.text import problem_mark
from unisd.errors import UserError
from unisd.files import RESULTS, TRAINED_ON, left_by_run
from unisd.options.option import declared
from unisd.options.table import UniSDOptions
from unisd.run.options import RunOptions, as_list, number_of
from unisd.run.own_rows import named
from unisd.tasks import sandbox
from unisd.tasks.base import Grade, Row, Task

if TYPE_CHECKING:  # it imports torch, which the check of names does without
    from unisd.run.inputs import RunData

logger = logging.getLogger(__name__)

OWN = ("train_file", "dataset_name", "eval_file")
"""Options that name the user's own rows."""
HELD_OUT = ("eval_file", "eval_split")
"""Options that say which of them are reported on."""


class OwnRows(Task):
    """The user's own rows as a task.

    Its splits are `train`, `test` (what a run reports on: `eval_file`, or what it holds out) and
    `all`. `eval_file` alone is all that there is.
    """

    splits = ("train", "test", "all")

    def __init__(self, options: RunOptions, seed: int, most: int, cap: int | None = None) -> None:
        self.alone = options.train_file is None and options.dataset_name is None
        if self.alone:
            options = replace(options, train_file=options.eval_file, eval_file=None)
        # What is held out is what a run holds out; rows that are given are all answered.
        given = options.eval_file is not None or number_of(options.eval_split) is not None
        self.options = replace(options, max_train_rows=None, max_eval_rows=sys.maxsize if given else most)
        self.seed, self.max_new_tokens = seed, cap or Task.max_new_tokens
        files = as_list(options.train_file)
        self.name = named(files or as_list(options.dataset_name), bool(files))
        self.graded = options.grader is not None
        self._data: RunData | None = None
        self._read = cache(self._load_data)  # a file that holds rows of several splits is read once

    def _load_data(self, whole: bool) -> RunData:
        from unisd.run.inputs import load_data

        return load_data(self.options, self.seed, training=False, whole=whole, needs_reference=False)

    def load(self, split: str, *, limit: int | None = None, seed: int = 0, **options: Any) -> list[Row]:
        if split not in self.splits:
            raise UserError(f"{self.name}: no split {split!r}; there are {', '.join(self.splits)}.")
        if self.alone and split == "train":
            raise UserError("--eval_file has no training rows: give --train_file or --dataset_name, too.")
        data = self._data = self._read(self.alone or split == "all")
        if self.alone or split == "all":
            rows = [*data.train, *data.evaluation]
        else:
            rows = data.train if split == "train" else data.evaluation
        by_name = self.options.eval_split is not None and number_of(self.options.eval_split) is None
        if split == "test" and not self.alone and self.options.eval_file is None and not by_name:
            logger.warning(
                "%s: the %d of %d rows that `unisd train` holds out with seed %d (--split all: all of them).",
                self.name,
                len(rows),
                len(data.train) + len(rows),
                self.seed,
            )
        self.rows_in_files = len(rows)
        return rows[:limit]

    def grade(self, row: Row, completion: str) -> Grade:
        assert self._data is not None and self._data.grade is not None
        return self._data.grade(row, completion)


def tasks_of(own: argparse.Namespace, names: Sequence[str], runs_code: bool = True) -> dict[str, Task]:
    """The tasks of these names, or the user's own rows as one, as a command's flags say.

    Args:
        names: none: the user's own rows, or task pocket where there are none.
        runs_code: whether answers are graded, which may run them.

    Raises:
        UserError: no source of rows or two of them, an option of another kind of source.
    """
    of_run = {item.name for item in declared(RunOptions)}
    given = {name: value for name, value in vars(own).items() if name in of_run and value is not None}
    given.pop("task", None)
    if not names and all(given.get(name) is None for name in OWN):
        names = ["pocket"]
    if not names:
        run = _run_of(own)
        if _files(given) == _files(run) and not any(given.get(name) for name in HELD_OUT):
            given |= {name: run.get(name) for name in HELD_OUT}
        options = RunOptions(**given)
        options.check()
        seed = own.seed if own.seed is not None else run.get("seed", UniSDOptions.seed)
        most = run.get("max_eval_rows", RunOptions.max_eval_rows)
        cap = run.get("eval_max_new_tokens") or run.get("max_completion_length")
        rows = OwnRows(options, int(seed), int(most), cap)
        return {rows.name: rows}
    if given.get("eval_split") is not None:
        raise UserError("--eval_split is for your own rows: for a task, name the split with --split.")
    # a grader belongs to the task jsonl, the others have their own
    RunOptions(**given, task="jsonl" if "jsonl" in names else names[0]).check()
    files = _files_by_task(names, given.get("data_files"))
    grader = given.get("grader")
    found = {}
    for name in names:
        task = tasks.from_flags(name, files[name], own.task_options, grader if name == "jsonl" else None)
        if runs_code and task.runs_code:
            sandbox.require_with(own.allow_unsafe_code_execution)
        found[name] = task
    return found


def one_task(own: argparse.Namespace, runs_code: bool = True) -> tuple[str, Task]:
    """As `tasks_of`, for commands that read a single task: its name, and the task.

    Raises:
        UserError: as `tasks_of`.
    """
    [found] = tasks_of(own, [own.task] if own.task else (), runs_code).items()
    return found


def say_what_was_trained_on(model: str | None, name: str, rows: Sequence[Row]) -> None:
    """Warn of rows that the run which left the model was trained on."""
    known = set(left_by_run(model, TRAINED_ON).get("problems", ()))
    repeated = sum(problem_mark(row["prompt"]) in known for row in rows) if known else 0
    if repeated:
        logger.warning(
            "%s: %d of %d rows are problems that %s was trained on: their results do not show what it"
            " does on new ones. Give the rows that it held out, or others.",
            name,
            repeated,
            len(rows),
            model,
        )


def _run_of(own: argparse.Namespace) -> dict[str, Any]:
    """The configuration of the run that left the model: it says which rows were held out, and how
    long answers may be. Empty for any other model.
    """
    results = left_by_run(getattr(own, "model_name_or_path", None), RESULTS)
    with suppress(ValueError, KeyError, TypeError):  # another's file of this name
        return {"seed": int(results["seed"]), **results.get("config", {})}
    return {}


def _files(given: Mapping[str, Any]) -> list[str]:
    """Where the rows to train on are; a file under one name, however it was typed."""
    files = [str(Path(file).resolve()) for file in as_list(given.get("train_file"))]
    return [*files, *as_list(given.get("dataset_name"))]


def _files_by_task(names: Sequence[str], files: Sequence[str] | None) -> Mapping[str, list[str] | None]:
    """`--data_files` sorted to the tasks."""
    found: dict[str, list[str] | None] = {name: None for name in names}
    for file in files or []:
        name, equals, path = file.partition("=")
        if equals and name in found:
            found[name] = [*(found[name] or []), path]
        elif len(names) == 1:
            found[names[0]] = [*(found[names[0]] or []), file]
        else:
            raise UserError(f"--data_files {file}: with several tasks say which one reads it, TASK=FILE.")
    return found
