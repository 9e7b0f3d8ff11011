"""`unisd eval`: a saved model in, its figures on tasks out.

How answers are graded and models compared is in `evaluation/`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from unisd import tasks
from unisd.cli.completions import OURS
from unisd.cli.grade import SCHEMA_VERSION, Figures, add_task_flags, grade_answers, summary_lines, task_of
from unisd.cli.parser import CommandParser, add_template_options, add_trust, at_least_one, output_file
from unisd.console import make_console, number, quiet_libraries, show_progress, show_table
from unisd.data import rendering
from unisd.data.prompts import encode_prompt, overlong
from unisd.data.thoughts import completion_text
from unisd.errors import UserError
from unisd.evaluation.grading import row_results, summarize
from unisd.files import write_text
from unisd.models.inference import load_any
from unisd.run.chat_server import ChatServer
from unisd.tasks.base import Row, Task

logger = logging.getLogger(__name__)


def eval_command(arguments: Sequence[str]) -> int:
    """Accuracy on tasks, retention skills, and with a base the retention perplexities of a saved
    model; returns the exit code.

    Raises:
        UserError: unknown task, unreadable files, flags that contradict each other.
    """
    options = _parser().parse(arguments)
    if options is None:
        return 0
    _check(options)
    quiet_libraries()
    files = _files_by_task(options.task, options.data_files)
    chosen = {name: task_of(name, files[name], options) for name in options.task}
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
    _write(options, figures, evaluation.records, [header, *evaluation.lines])
    return 0


def _parser() -> CommandParser:
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
    add_template_options(parser)
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
    add_task_flags(parser)
    return parser


def _check(options: Any) -> None:
    """Refuse values out of range and flags that contradict each other."""
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
    if options.server_url and options.chat_template_kwargs is not None:
        raise UserError(
            "--chat_template_kwargs: a server renders by itself; give it the options when it is started."
        )
    if options.server_url and options.base:
        raise UserError(
            "--base needs the model itself, for perplexities, not a server: drop --base or --server_url."
        )


def _write(
    options: Any, figures: Figures, records: Sequence[Figures], table: Sequence[Sequence[str]]
) -> None:
    """Write the files that were asked for."""
    if options.json:
        write_text(options.json, json.dumps(figures, indent=2) + "\n")
    if options.rows:
        write_text(options.rows, "".join(json.dumps(record) + "\n" for record in records))
    if options.markdown:
        rule = ["---"] * len(table[0])
        cells = [[cell.strip().replace("|", "\\|") for cell in line] for line in (table[0], rule, *table[1:])]
        write_text(options.markdown, "".join(f"| {' | '.join(line)} |\n" for line in cells))


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
            rendering.set_options(self.tokenizer, options.chat_template_kwargs)
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
            found[f"{part}_overlong"] = len(rows)
            rows = sets[part] = self._fitting(rows, f"{name}, {part}")
            found[f"{part}_overlong"] -= len(rows)
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
            self.lines += summary_lines(summary, prefix + part)
            texts = [
                {"completion": text} | ({"order": OURS} if "published_options" in row else {})
                for row, row_answers in zip(rows, answers, strict=True)
                for text in row_answers
            ]
            for record, text in zip(row_results(rows, grades), texts, strict=True):
                self.records.append({"task": name, "part": part, **record, **text})
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

    def _fitting(self, rows: list[Row], what: str) -> list[Row]:
        """Rows whose prompts leave room for an answer; what does not is said, not counted."""
        if self.server is not None:
            return rows
        from unisd.models.load import context_length

        rendering.check_rows(self.tokenizer, rows, what)
        context = context_length(self.model)
        if not (too_long := overlong(self.tokenizer, rows, context)):
            return rows
        number, length = next(iter(too_long.items()))
        said = (
            f"{what}: row {number} has a prompt of {length} tokens, and the model's context is {context};"
            f" {len(too_long)} such row(s) of {len(rows)}"
        )
        if len(too_long) == len(rows):
            raise UserError(f"{said}: none is left to answer; give a model with a longer context.")
        logger.warning("%s are left out and not counted.", said)
        return [row for place, row in enumerate(rows) if place not in too_long]

    def answers(self, rows: Sequence[Row], cap: int, what: str) -> list[list[str]]:
        """One or several answers a row."""
        from unisd.models.tokens import eos_ids, pad_id
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
        prompts = [
            encode_prompt(self.tokenizer, row["prompt"]) for row in rows for _ in range(options.num_samples)
        ]
        sampling = Sampling(cap, options.temperature or 1.0, options.top_p)
        with show_progress(f"answering {what}", len(prompts)) as advance:
            written = generate(
                self.model,
                prompts,
                sampling,
                eos_ids=eos_ids(self.model, self.tokenizer),
                pad_id=pad_id(self.model, self.tokenizer),
                keys=keys if options.temperature > 0 else None,
                batch_size=options.batch_size,
                on_rows=advance,
            )
        texts = iter([completion_text(self.tokenizer, completion.ids) for completion in written])
        return [[next(texts) for _ in range(options.num_samples)] for _ in rows]
