"""`unisd grade`: completions that any system wrote in, figures out.

How answers are graded is in `evaluation/grading.py`, which row they answer in `cli/completions.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from unisd.cli.completions import match_completions, write_prompts
from unisd.cli.parser import DATA, MEASURED, OUTPUT, CommandParser, output_file
from unisd.cli.sources import one_task
from unisd.console import loading_libraries, make_console, show_progress, show_table
from unisd.errors import UserError
from unisd.evaluation import audit
from unisd.evaluation.explain import as_record, explained, wrapped
from unisd.evaluation.grading import grade_many, row_results, summarize, unsettled
from unisd.files import write_lines, write_text
from unisd.run.resolve import shared_names, shared_options
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
    with loading_libraries():
        name, task = one_task(options)
    verdicts = audit.read_verdicts(str(options.audit)) if options.audit else None
    every = task.load(options.split or ("test" if options.eval_file else "all"))
    if options.write_prompts:
        write_prompts(every, options.write_prompts)
        print(f"{len(every)} prompts written to {options.write_prompts}")
        return 0
    if not task.graded:
        raise UserError(f"{name} has no grader: give --grader (exact, number, ...).")
    matched = match_completions(task, every, options.completions, options.in_order)
    rows, answers = matched.rows, matched.answers
    grades = grade_answers(task, rows, answers, matched.asked)
    graded = audit.answers(rows, answers, grades)
    if options.explain:
        for one in graded:
            print("\n".join([*wrapped(f"{one.name}: {one.grade.outcome}"), *explained(one.grade), ""]))
    summary = {"schema_version": SCHEMA_VERSION, "task": name, **summarize(rows, grades)}
    summary["matched"] = matched.counts
    for note in matched.notes:
        print(f"note: {note}")
    show_table(make_console(), (name, "value", "answers"), summary_lines(summary))
    if options.audit:
        _audit(str(options.audit), verdicts, graded)
    if options.rows:
        results = row_results(rows, grades)
        if options.explain:
            results = [
                {**result, "passed_over": as_record(one.grade)}
                for result, one in zip(results, graded, strict=True)
            ]
        write_lines(options.rows, results)
    if options.json:
        write_text(options.json, json.dumps(summary, indent=2) + "\n")
    return 0


def _parser() -> CommandParser:
    parser = CommandParser("grade", "Grade completions that any system wrote.", shared_options("grade"))
    parser.set_defaults(**dict.fromkeys(shared_names("grade")))
    parser.under(DATA).add_argument(
        "--split",
        help="rows that the completions answer (default: --eval_file, else all, in the order of the files)",
    )
    measured, output = parser.under(MEASURED), parser.under(OUTPUT)
    measured.add_argument(
        "--completions", metavar="C.jsonl", help='one line per completion: {"id": ..., "completion": ...}'
    )
    measured.add_argument(
        "--in_order",
        action="store_true",
        help="match completions to rows by their order and ignore the ids",
    )
    measured.add_argument(
        "--explain",
        action="store_true",
        help="show what was extracted from each answer, how, and what was passed over",
    )
    output.add_argument(
        "--write_prompts",
        type=output_file,
        metavar="P.jsonl",
        help="write the prompts for a system, and the order of options, instead of grading",
    )
    output.add_argument(
        "--rows",
        type=output_file,
        metavar="R.jsonl",
        help="write one object per answer to this file",
    )
    output.add_argument("--json", type=output_file, metavar="FILE", help="write the figures to this file")
    output.add_argument(
        "--audit",
        type=output_file,
        metavar="F.csv",
        help="write 50 answers to this file for a person to judge; if its column person is filled,"
        " report the agreement",
    )
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


def summary_lines(summary: Figures, name: str = "accuracy") -> list[list[str]]:
    """Name, value with interval, and number of answers, one line a figure; the accuracy is called
    `name`.
    """
    from unisd.evaluation.grading import percent

    shown = {name: summary["accuracy"]}
    shown |= {f"  {skill}": value for skill, value in summary["by_skill"].items()}
    shown |= {f"  pass@{k}": value for k, value in summary.get("pass_at_k", {}).items()}
    shown |= {f"  {detail.replace('_', ' ')}": value for detail, value in summary["details"].items()}
    shown["  answer found"] = summary["extraction_rate"]
    lines = [[label, percent(value), str(value["n"])] for label, value in shown.items()]
    if open_answers := unsettled(summary["outcomes"]):
        lines.append(["  undecided answers", open_answers, str(sum(summary["outcomes"].values()))])
    return lines
