"""`unisd grade`: completions that any system wrote in, figures out.

How answers are graded is in `evaluation/grading.py`, which row they answer in `cli/completions.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from unisd import tasks
from unisd.cli.completions import match_completions, write_prompts
from unisd.cli.parser import CommandParser, output_file
from unisd.console import make_console, quiet_libraries, show_progress, show_table
from unisd.errors import UserError
from unisd.evaluation import audit
from unisd.evaluation.explain import as_record, explained, wrapped
from unisd.evaluation.grading import grade_many, row_results, summarize, unsettled
from unisd.files import write_text
from unisd.tasks import sandbox
from unisd.tasks.base import Grade, Row, Task

SCHEMA_VERSION = 1
Figures = dict[str, Any]


def grade_command(arguments: Sequence[str]) -> int:
    """Grade completions without any model; returns the exit code.

    Raises:
        UserError: unknown task, unreadable files, completions that fit no row, an output that is
            an input, a machine that cannot run code safely.
    """
    options = _parser().parse(arguments)
    if options is None:
        return 0
    if (options.completions is None) == (options.write_prompts is None):
        raise UserError("give either --completions C.jsonl, to grade them, or --write_prompts P.jsonl.")
    quiet_libraries()
    verdicts = audit.read_verdicts(str(options.audit)) if options.audit else None
    task = task_of(options.task, options.data_files, options)
    every = task.load(options.split)
    if options.write_prompts:
        write_prompts(every, options.write_prompts)
        print(f"{len(every)} prompts written to {options.write_prompts}")
        return 0
    matched = match_completions(task, every, options.completions, options.in_order)
    rows, answers = matched.rows, matched.answers
    grades = grade_answers(task, rows, answers, matched.asked)
    graded = audit.answers(rows, answers, grades)
    if options.explain:
        for one in graded:
            print("\n".join([*wrapped(f"{one.name}: {one.grade.outcome}"), *explained(one.grade), ""]))
    summary = {"schema_version": SCHEMA_VERSION, "task": options.task, **summarize(rows, grades)}
    summary["matched"] = matched.counts
    for note in matched.notes:
        print(f"note: {note}")
    show_table(make_console(), (options.task, "value", "answers"), summary_lines(summary))
    if options.audit:
        _audit(str(options.audit), verdicts, graded)
    if options.out:
        results = row_results(rows, grades)
        if options.explain:
            results = [
                {**result, "passed_over": as_record(one.grade)}
                for result, one in zip(results, graded, strict=True)
            ]
        write_text(options.out, "".join(json.dumps(result) + "\n" for result in results))
    if options.json:
        write_text(options.json, json.dumps(summary, indent=2) + "\n")
    return 0


def _parser() -> CommandParser:
    parser = CommandParser("grade", "Grade completions that any system wrote.")
    parser.add_argument("task", metavar="TASK", help=f"one of {', '.join(tasks.names())}")
    parser.add_argument(
        "--data_files", nargs="+", help="files that the task reads (default: its dataset on the Hub)"
    )
    parser.add_argument(
        "--completions", metavar="C.jsonl", help='a line each: {"id": ..., "completion": ...}'
    )
    parser.add_argument(
        "--in_order",
        action="store_true",
        help="the lines answer the rows one after another, whatever their ids",
    )
    parser.add_argument(
        "--write_prompts",
        type=output_file,
        metavar="P.jsonl",
        help="write what to ask a system, and the order of options, instead of grading",
    )
    parser.add_argument(
        "--split", default="all", help="rows that the completions answer (default: all, in the files' order)"
    )
    parser.add_argument("--out", type=output_file, metavar="R.jsonl", help="write one object an answer there")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--explain", action="store_true", help="say of each answer what was taken, how, and what was not"
    )
    parser.add_argument(
        "--audit",
        type=output_file,
        metavar="F.csv",
        help="write 50 answers there for a person to judge; with the column person filled: the agreement",
    )
    add_task_flags(parser)
    return parser


def _audit(path: str, verdicts: dict[str, dict[str, str]] | None, graded: list[audit.Answer]) -> None:
    """Write a sample for a person, or compare with what the person wrote."""
    if verdicts:
        found = audit.agreement(path, verdicts, graded)
        print("\n".join(audit.verdict_lines(found, next(iter(verdicts.values()))["of"])))
        return
    chosen = audit.sample(graded)
    audit.write_sample(path, chosen)
    print(
        f"{path}: {len(chosen)} of {len(graded)} answers. Write right or wrong into its column person, and"
        "\nrun the same command again."
    )


def grade_answers(
    task: Task,
    rows: Sequence[Row],
    answers: Sequence[Sequence[str]],
    asked: Sequence[Sequence[Row]] | None = None,
) -> list[list[Grade]]:
    """Grades of one or several answers a row; `asked`: for each answer the row as it was asked."""
    each = asked or [[row] * len(texts) for row, texts in zip(rows, answers, strict=True)]
    flat = [pair for seen, texts in zip(each, answers, strict=True) for pair in zip(seen, texts, strict=True)]
    with show_progress("grading", len(flat)) as advance:
        graded = iter(grade_many(task.grade, [row for row, _ in flat], [text for _, text in flat], advance))
    return [[next(graded) for _ in texts] for texts in answers]


def add_task_flags(parser: CommandParser) -> None:
    """Add the flags that say how a task reads and grades."""
    parser.add_argument("--task_options", nargs="+", metavar="NAME=VALUE", help="further options of the task")
    parser.add_argument(
        "--grader", help="task jsonl: exact, contains, number, math, choice, call, code or similarity"
    )
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
    from unisd.run.changes import percent

    shown = {name: summary["accuracy"]}
    shown |= {f"  {skill}": value for skill, value in summary["by_skill"].items()}
    shown |= {f"  pass@{k}": value for k, value in summary.get("pass_at_k", {}).items()}
    shown |= {f"  {detail.replace('_', ' ')}": value for detail, value in summary["details"].items()}
    shown["  answer found"] = summary["extraction_rate"]
    lines = [[label, percent(value), str(value["n"])] for label, value in shown.items()]
    if open_answers := unsettled(summary["outcomes"]):
        lines.append(["  answers that settle nothing", open_answers, str(sum(summary["outcomes"].values()))])
    return lines
