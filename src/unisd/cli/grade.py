"""`unisd grade`: completions that any system wrote in, figures out.

How answers are graded is in `evaluation/grading.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from unisd import tasks
from unisd.cli.parser import CommandParser, output_file
from unisd.console import make_console, quiet_libraries, show_progress, show_table
from unisd.data.reading import load_file
from unisd.errors import UserError
from unisd.evaluation.grading import grade_many, row_results, summarize
from unisd.files import write_text
from unisd.tasks import sandbox
from unisd.tasks.base import Grade, Row, Task

SCHEMA_VERSION = 1
Figures = dict[str, Any]


def grade_command(arguments: Sequence[str]) -> int:
    """Grade completions without any model; returns the exit code.

    Raises:
        UserError: unknown task, unreadable files, completions that fit no row, a machine that
            cannot run code safely.
    """
    parser = CommandParser("grade", "Grade completions that any system wrote.")
    parser.add_argument("task", metavar="TASK", help=f"one of {', '.join(tasks.names())}")
    parser.add_argument(
        "--data_files", nargs="+", help="files that the task reads (default: its dataset on the Hub)"
    )
    parser.add_argument(
        "--completions", required=True, metavar="C.jsonl", help='a line each: {"id": ..., "completion": ...}'
    )
    parser.add_argument(
        "--split", default="all", help="rows that the completions answer (default: all, in the files' order)"
    )
    parser.add_argument("--out", type=output_file, metavar="R.jsonl", help="write one object an answer there")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures there")
    add_task_flags(parser)
    options = parser.parse(arguments)
    if options is None:
        return 0
    quiet_libraries()
    task = task_of(options.task, options.data_files, options)
    rows, answers = match_completions(task.load(options.split), options.completions)
    grades = grade_answers(task, rows, answers)
    summary = {"schema_version": SCHEMA_VERSION, "task": options.task, **summarize(rows, grades)}
    show_table(make_console(), (options.task, "value", "answers"), summary_lines(summary))
    if options.out:
        write_text(options.out, "".join(json.dumps(result) + "\n" for result in row_results(rows, grades)))
    if options.json:
        write_text(options.json, json.dumps(summary, indent=2) + "\n")
    return 0


def match_completions(rows: list[Row], path: str) -> tuple[list[Row], list[list[str]]]:
    """Rows that a file of completions answers, and their answers: by `id` where the lines have one,
    else in order.
    """
    given: list[tuple[str | None, str]] = []
    for place, record in enumerate(load_file(path)):
        if not isinstance(record.get("completion"), str):
            raise UserError(
                f'{path}, row {place} has no text in "completion": each line is {{"id": ..., "completion":'
                ' "..."}.'
            )
        given.append((None if record.get("id") is None else str(record["id"]), record["completion"]))
    if not given:
        raise UserError(f"{path} is empty: give one completion a line.")
    if all(key is None for key, _ in given):
        if len(given) != len(rows):
            raise UserError(
                f"{path} has {len(given)} completions without id for {len(rows)} rows: give one a row, or"
                " ids."
            )
        return rows, [[text] for _, text in given]
    by_id: dict[str, list[str]] = {}
    known = {str(row["id"]) for row in rows}
    for place, (key, text) in enumerate(given):
        if key is None or key not in known:
            raise UserError(
                f"{path}, row {place}: id {key!r} is not among the {len(rows)} rows (ids like"
                f" {str(rows[0]['id'])!r})."
            )
        by_id.setdefault(key, []).append(text)
    answered = [row for row in rows if str(row["id"]) in by_id]
    return answered, [by_id[str(row["id"])] for row in answered]


def grade_answers(task: Task, rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[list[Grade]]:
    """Grades of one or several answers a row."""
    flat = [(row, text) for row, texts in zip(rows, answers, strict=True) for text in texts]
    with show_progress("grading", len(flat)) as advance:
        graded = iter(grade_many(task.grade, [row for row, _ in flat], [text for _, text in flat], advance))
    return [[next(graded) for _ in texts] for texts in answers]


def add_task_flags(parser: CommandParser) -> None:
    """Add the flags that say how a task reads and grades."""
    parser.add_argument("--task_options", nargs="+", metavar="NAME=VALUE", help="further options of the task")
    parser.add_argument("--grader", help="task jsonl: exact, choice, number, contains, call or code")
    parser.add_argument(
        "--allow_unsafe_code_execution",
        action="store_true",
        help="run model-written code with your rights where nothing isolates it",
    )


def task_of(name: str, files: Sequence[str] | None, options: Any) -> Task:
    """The task of that name, allowed to run code where the user lets it."""
    unsafe = options.allow_unsafe_code_execution
    task = tasks.from_flags(name, files, options.task_options, options.grader if name == "jsonl" else None)
    if task.runs_code:
        sandbox.require(unsafe)
        sandbox.allow_unsafe(unsafe)
    return task


def summary_lines(summary: Figures, name: str = "accuracy") -> list[list[str]]:
    """Name, value with interval, and number of answers, one line a figure; the accuracy is called
    `name`.
    """
    from unisd.run.measure import percent

    shown = {name: summary["accuracy"]}
    shown |= {f"  {skill}": value for skill, value in summary["by_skill"].items()}
    shown |= {f"  pass@{k}": value for k, value in summary.get("pass_at_k", {}).items()}
    shown |= {f"  {detail.replace('_', ' ')}": value for detail, value in summary["details"].items()}
    shown["  answer found"] = summary["extraction_rate"]
    return [[label, percent(value), str(value["n"])] for label, value in shown.items()]
