"""`unisd eval` and `unisd grade`: arguments in, tables and files out.

What is measured is in `evaluation.py` and `grading.py`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from unisd import tasks
from unisd.cli.merge import load_any
from unisd.cli.parser import CommandParser, add_trust, at_least_one, output_file
from unisd.console import make_console, number, quiet_libraries, show_progress, show_table
from unisd.errors import UserError
from unisd.evaluation.grading import grade_many, row_results, summarize
from unisd.files import write_text
from unisd.run.chat_server import ChatServer
from unisd.run.measure import percent
from unisd.tasks import sandbox
from unisd.tasks.base import Grade, Row, Task

logger = logging.getLogger(__name__)
SCHEMA_VERSION = 1
Figures = dict[str, Any]


def _add_task_flags(parser: CommandParser) -> None:
    parser.add_argument("--task_options", nargs="+", metavar="NAME=VALUE", help="further options of the task")
    parser.add_argument("--grader", help="task jsonl: exact, choice, number, contains, call or code")
    parser.add_argument(
        "--allow_unsafe_code_execution",
        action="store_true",
        help="run model-written code with your rights where nothing isolates it",
    )


def _task(name: str, files: Sequence[str] | None, options: Any) -> Task:
    unsafe = options.allow_unsafe_code_execution
    task = tasks.from_flags(name, files, options.task_options, options.grader if name == "jsonl" else None)
    if task.runs_code:
        sandbox.require(unsafe)
        sandbox.allow_unsafe(unsafe)
    return task


def _lines(summary: Figures, name: str = "accuracy") -> list[list[str]]:
    """Name, value with interval, and number of answers, one line a figure; the accuracy is called
    `name`.
    """
    shown = {name: summary["accuracy"]}
    shown |= {f"  {skill}": value for skill, value in summary["by_skill"].items()}
    shown |= {f"  pass@{k}": value for k, value in summary.get("pass_at_k", {}).items()}
    shown |= {f"  {detail.replace('_', ' ')}": value for detail, value in summary["details"].items()}
    shown["  answer found"] = summary["extraction_rate"]
    return [[label, percent(value), str(value["n"])] for label, value in shown.items()]


# ---------------------------------------------------------------- unisd grade


def grade(arguments: Sequence[str]) -> int:
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
    _add_task_flags(parser)
    options = parser.parse(arguments)
    if options is None:
        return 0
    quiet_libraries()
    task = _task(options.task, options.data_files, options)
    rows, answers = match_completions(task.load(options.split), options.completions)
    grades = grade_answers(task, rows, answers)
    summary = {"schema_version": SCHEMA_VERSION, "task": options.task, **summarize(rows, grades)}
    show_table(make_console(), (options.task, "value", "answers"), _lines(summary))
    if options.out:
        write_text(options.out, "".join(json.dumps(result) + "\n" for result in row_results(rows, grades)))
    if options.json:
        write_text(options.json, json.dumps(summary, indent=2) + "\n")
    return 0


def match_completions(rows: list[Row], path: str) -> tuple[list[Row], list[list[str]]]:
    """Rows that a file of completions answers, and their answers: by `id` where the lines have one,
    else in order.
    """
    from unisd.data.rows import load_file

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


# ---------------------------------------------------------------- unisd eval


def evaluate(arguments: Sequence[str]) -> int:
    """Accuracy on tasks, retention skills, and with a base the retention perplexities of a saved
    model.
    """
    parser = CommandParser(
        "eval", "Accuracy on tasks, retention skills and, with --base, retention perplexities."
    )
    parser.add_argument(
        "--model_name_or_path", "--model", default="pocket", help="a folder (model or adapter) or a name"
    )
    parser.add_argument("--base", help="the model that it was adapted from, for retention perplexities")
    parser.add_argument(
        "--task", nargs="+", default=["pocket"], help=f"one or several of {', '.join(tasks.names())}"
    )
    parser.add_argument("--data_files", nargs="+", help="files of the task; with several tasks TASK=FILE")
    parser.add_argument("--split", help="rows to answer (default: test; of task jsonl all)")
    parser.add_argument("--n", type=int, default=500, help="most rows of each evaluation (default: 500)")
    parser.add_argument(
        "--num_samples", type=int, default=1, help="answers a row; several give pass@k (needs a temperature)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--max_new_tokens", type=int, help="cap on each answer (default: the task's)")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    add_trust(parser)
    parser.add_argument(
        "--server_url", metavar="URL", help="let an OpenAI-compatible server answer; no perplexities then"
    )
    parser.add_argument(
        "--server_model", metavar="NAME", help="the model's name there (default: the first that it serves)"
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--rows",
        type=output_file,
        metavar="FILE.jsonl",
        help="write one object an answer there, with its text",
    )
    parser.add_argument("--markdown", type=output_file, metavar="FILE.md", help="write the table there")
    _add_task_flags(parser)
    options = parser.parse(arguments)
    if options is None:
        return 0
    at_least_one(
        **{name: getattr(options, name) for name in ("n", "num_samples", "max_new_tokens", "batch_size")}
    )
    if options.temperature < 0 or not 0 < options.top_p <= 1:
        raise UserError(
            f"--temperature {options.temperature}, --top_p {options.top_p}: 0 or more, and above 0 up to 1,"
            " are needed."
        )
    if options.num_samples > 1 and options.temperature <= 0:
        raise UserError("--num_samples: greedy answers are all alike; give a --temperature.")
    if options.server_url and options.base:
        raise UserError(
            "--base needs the model itself, for perplexities, not a server: drop --base or --server_url."
        )
    quiet_libraries()
    files = _files_by_task(options.task, options.data_files)
    chosen = {name: _task(name, files[name], options) for name in options.task}
    sets = {name: _sets(name, task, options) for name, task in chosen.items()}
    evaluation = _Evaluation(options)
    for name, task in chosen.items():
        evaluation.add(name, task, sets[name])
    figures = {"schema_version": SCHEMA_VERSION, "model": evaluation.name, "tasks": evaluation.figures}
    # One task: its figures stand at the top as well, under the names of results.json.
    if len(chosen) == 1:
        figures |= {"task": options.task[0], **evaluation.figures[options.task[0]]}
    header = (evaluation.name, "value", "rows")
    show_table(make_console(), header, evaluation.lines)
    if options.json:
        write_text(options.json, json.dumps(figures, indent=2) + "\n")
    if options.rows:
        write_text(options.rows, "".join(json.dumps(record) + "\n" for record in evaluation.records))
    if options.markdown:
        rule = ["---"] * len(header)
        cells = [
            [cell.strip().replace("|", "\\|") for cell in line] for line in (header, rule, *evaluation.lines)
        ]
        write_text(options.markdown, "".join(f"| {' | '.join(line)} |\n" for line in cells))
    return 0


def _files_by_task(names: Sequence[str], files: Sequence[str] | None) -> dict[str, list[str] | None]:
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


def _sets(name: str, task: Task, options: Any) -> dict[str, list[Row]]:
    """The rows of a task to answer, by part."""
    split = options.split or task.evaluation_split
    sets = {"task": task.load(split, limit=options.n), "retention": task.retention_rows(limit=options.n)}
    if task.rows_in_files is not None and len(sets["task"]) < task.rows_in_files:
        logger.warning("%s: %d of %d rows (split %s).", name, len(sets["task"]), task.rows_in_files, split)
    if "test_hard" in task.splits and split == "test":
        sets["test_hard"] = task.load("test_hard", limit=options.n)
    return sets


class _Evaluation:
    """One model on several tasks: figures, table lines and records of all answers."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.server = ChatServer(options.server_url, options.server_model) if options.server_url else None
        self.name = options.model_name_or_path
        if self.server is not None:
            self.name = self.server.model
        else:
            self.model, self.tokenizer = load_any(
                options.model_name_or_path, options.dtype, options.trust_remote_code
            )
        self.base = None
        if options.base:
            self.base, tokenizer = load_any(options.base, options.dtype, options.trust_remote_code)
            if tokenizer.get_vocab() != self.tokenizer.get_vocab():
                raise UserError(
                    f"--base {options.base} has another vocabulary than {self.name}: give the model that it"
                    " was adapted from."
                )
        self.figures: dict[str, Figures] = {}
        self.lines: list[list[str]] = []
        self.records: list[dict[str, Any]] = []

    def add(self, name: str, task: Task, sets: dict[str, list[Row]]) -> None:
        from unisd.evaluation.likelihood import gold_ppl
        from unisd.run import measure

        options = self.options
        found: Figures = {}
        prefix = f"{name}, " if len(options.task) > 1 else ""
        for part, rows in sets.items():
            if not rows:
                found |= {f"{part}_accuracy": None, f"{part}_skills": None}
                continue
            answers = self.answers(rows, options.max_new_tokens or task.max_new_tokens, f"{name}, {part}")
            grades = grade_answers(task, rows, answers)
            summary = summarize(rows, grades)
            found |= {
                f"{part}_accuracy": summary["accuracy"],
                f"{part}_skills": summary["by_skill"] or None,
                f"{part}_summary": summary,
            }
            self.lines += _lines(summary, prefix + part)
            texts = [text for row_answers in answers for text in row_answers]
            for record, text in zip(row_results(rows, grades), texts, strict=True):
                self.records.append({"task": name, "part": part, **record, "completion": text})
        found["gold_ppl"] = None
        if self.server is None:
            found["gold_ppl"] = gold_ppl(self.model, self.tokenizer, sets["task"])
            self.lines.append(
                [f"{prefix}perplexity of the references", number(found["gold_ppl"]), str(len(sets["task"]))]
            )
        if self.base is not None:
            rows = sets["retention"] or sets["task"]
            cap = options.max_new_tokens or task.max_new_tokens
            found |= measure.drift(self.model, self.base, self.tokenizer, rows, cap, options.batch_size)
            for way, value in found["retention_ppl"].items():
                self.lines.append([f"{prefix}retention perplexity, {way}", number(value, 4), str(len(rows))])
                detail = found["retention_detail"][way]
                self.lines.append([f"{prefix}JSD along it (nats)", number(detail["jsd"], 5), str(len(rows))])
        self.figures[name] = found

    def answers(self, rows: Sequence[Row], cap: int, what: str) -> list[list[str]]:
        """One or several answers a row."""
        from unisd.data.prompts import encode_prompt
        from unisd.models.load import eos_ids
        from unisd.rollout.engine import Sampling, seed_of
        from unisd.rollout.transformers_engine import generate

        options = self.options
        keys = [
            (options.seed, 0, i, sample) for i in range(len(rows)) for sample in range(options.num_samples)
        ]
        if self.server is not None:
            asked = [row["prompt"] for row in rows for _ in range(options.num_samples)]
            drawn: dict[str, Any] = {"temperature": options.temperature, "top_p": options.top_p}
            drawn["seeds"] = [seed_of(key) for key in keys]
            with show_progress(f"answering {what}", len(asked)) as advance:
                told = iter(self.server.answers(asked, max_tokens=cap, on_rows=advance, **drawn))
            return [[next(told) for _ in range(options.num_samples)] for _ in rows]
        ends = eos_ids(self.model, self.tokenizer)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else ends[0]
        prompts = [
            encode_prompt(self.tokenizer, row["prompt"]) for row in rows for _ in range(options.num_samples)
        ]
        sampling = Sampling(cap, options.temperature or 1.0, options.top_p)
        with show_progress(f"answering {what}", len(prompts)) as advance:
            written = generate(
                self.model,
                prompts,
                sampling,
                eos_ids=ends,
                pad_id=pad,
                keys=keys if options.temperature > 0 else None,
                batch_size=options.batch_size,
                on_rows=advance,
            )
        texts = iter(
            [self.tokenizer.decode(completion.ids, skip_special_tokens=True) for completion in written]
        )
        return [[next(texts) for _ in range(options.num_samples)] for _ in rows]
