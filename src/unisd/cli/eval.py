"""`unisd eval`: a saved model in, its figures on tasks out.

How answers are graded and models compared is in `evaluation/`.
"""

from __future__ import annotations

import json
import logging
import re
from argparse import Namespace
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

from unisd import tasks
from unisd.cli.completions import OURS
from unisd.cli.grade import SCHEMA_VERSION, Figures, grade_answers, summary_lines
from unisd.cli.parser import DATA, MEASURED, MODEL, OUTPUT, CommandParser, at_least_one, output_file
from unisd.cli.sources import say_what_was_trained_on, tasks_of
from unisd.console import loading_libraries, make_console, markdown_table, number, show_progress, show_table
from unisd.data import rendering
from unisd.data.origin import place_of
from unisd.data.prompts import encode_prompt, overlong
from unisd.data.thoughts import completion_text
from unisd.errors import UserError
from unisd.evaluation.grading import row_results, summarize
from unisd.files import RESULTS, write_lines, write_text
from unisd.http_client import check_server
from unisd.models.inference import load_any
from unisd.options.table import UniSDOptions
from unisd.run import grafting
from unisd.run.changes import DRIFT, drift_of
from unisd.run.chat_server import Answer, ChatServer
from unisd.run.options import RunOptions, check_scales
from unisd.run.resolve import shared_names, shared_options
from unisd.run.retention import POCKET, RetentionSet, is_of_the_pocket, load_sets
from unisd.tasks.base import Grade, Row, Task

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
    with loading_libraries():
        chosen = tasks_of(options, options.task or ())
    sets = {name: _sets(name, task, options) for name, task in chosen.items()}
    for name in chosen if options.split not in ("train", "all") else ():
        say_what_was_trained_on(options.model_name_or_path, name, sets[name]["task"])
    kept = {} if options.scales else _kept(options, chosen)
    options.task, options.seed = list(chosen), UniSDOptions.seed if options.seed is None else options.seed
    _refuse_nothing(options, chosen, sets)
    if options.scales:
        return _grafting(options, chosen, sets)
    evaluation = _Evaluation(options)
    try:
        for name, task in chosen.items():
            evaluation.add(name, task, sets[name])
        for name, one in kept.items():
            evaluation.add(name, one, {"task": one.rows}, one.probed)
    except (UserError, KeyboardInterrupt):
        _write_rows(options, evaluation.records)
        if options.rows and evaluation.records:
            logger.warning("%s holds the %d answers until then.", options.rows, len(evaluation.records))
        raise
    figures = {"schema_version": SCHEMA_VERSION, "model": evaluation.name, "tasks": evaluation.figures}
    # One task: its figures stand at the top as well, under the names of results.json.
    if len(chosen) == 1:
        figures |= {"task": options.task[0], **evaluation.figures[options.task[0]]}
    header = (evaluation.name, "value", "rows")
    show_table(make_console(), header, evaluation.lines)
    _write(options, figures, evaluation.records, [header, *evaluation.lines])
    return 0


def _grafting(options: Any, chosen: dict[str, Task], sets: dict[str, dict[str, list[Row]]]) -> int:
    """Measure the model, its base, and parts of the change between them: the grafting curve."""
    folder = str(options.model_name_or_path)
    base = grafting.base_of(folder, options.base)

    records: list[Figures] = []

    def measured(place: str, scale: float) -> list[Figures]:
        # Each point is a model: none is kept, and drift is not measured of parts.
        evaluation = _Evaluation(Namespace(**{**vars(options), "model_name_or_path": place, "base": None}))
        try:
            for name, task in chosen.items():
                evaluation.add(name, task, dict(sets[name]))
        finally:
            records.extend({"scale": scale, **record} for record in evaluation.records)
        return [{"scale": scale, "task": name, **found} for name, found in evaluation.figures.items()]

    scales = sorted({grafting.NONE, *options.scales})
    try:
        trust = {"trust_remote_code": options.trust_remote_code}
        parts = grafting.curve(folder, base, scales, measured, **trust)
        points = [point for of_part in (*parts.values(), measured(folder, grafting.ALL)) for point in of_part]
    except (UserError, KeyboardInterrupt):
        _write_rows(options, records)
        raise
    points.sort(key=lambda point: point["scale"])
    table = grafting.lines(points)
    show_table(make_console(), grafting.HEAD, table)
    _write(
        options,
        {"schema_version": SCHEMA_VERSION, "model": folder, "base": base, "points": points},
        records,
        [grafting.HEAD, *table],
    )
    if (Path(folder) / RESULTS).is_file():
        print(f"written to {grafting.add(Path(folder), points)}; see it: unisd report {folder}")
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        "eval",
        "Measure accuracy on tasks or your own rows, retention and, with --base, drift.",
        shared_options("eval"),
    )
    parser.set_defaults(**{**dict.fromkeys(shared_names("eval")), "trust_remote_code": False})
    _add_model(parser)
    data, output = parser.under(DATA), parser.under(OUTPUT)
    data.add_argument(
        "--task", nargs="+", help=f"one or more of {', '.join(tasks.names())} (default: pocket)"
    )
    data.add_argument("--data_files", nargs="+", help="files for the task; with several tasks TASK=FILE")
    data.add_argument(
        "--split",
        help="rows to answer: train, test or all (default: test; for task jsonl: all). For your own"
        " rows, test is --eval_file, else what `unisd train` with this --seed holds out",
    )
    data.add_argument(
        "--max_eval_rows", dest="n", type=int, default=500, help="maximum rows per evaluation (500)"
    )
    _add_answers(parser)
    output.add_argument("--json", type=output_file, metavar="FILE", help="write the figures to this file")
    output.add_argument(
        "--rows", type=output_file, metavar="FILE.jsonl", help="write one object per answer to this file"
    )
    output.add_argument(
        "--markdown", type=output_file, metavar="FILE.md", help="write the table to this file"
    )
    return parser


def _add_model(parser: CommandParser) -> None:
    """Add whom to ask, beside the options of `unisd train`."""
    model = parser.under(MODEL)
    model.add_argument("--base", help="the model that it was adapted from, for drift")
    model.add_argument(
        "--scales",
        nargs="+",
        type=float,
        metavar="L",
        help="also measure base + L x (what training changed), for each L",
    )
    model.add_argument("--server_url", help="let an OpenAI-compatible server answer; no perplexities then")
    model.add_argument("--server_model", help="the model's name on the server (default: the first listed)")


def _add_answers(parser: CommandParser) -> None:
    """Add how answers are drawn."""
    measured = parser.under(MEASURED)
    measured.add_argument(
        "--num_samples", type=int, default=1, help="answers per row; pass@k if several (with a temperature)"
    )
    measured.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    measured.add_argument("--top_p", type=float, default=1.0, help="nucleus: probability to sample from (1)")
    measured.add_argument(
        "--eval_max_new_tokens",
        dest="max_new_tokens",
        type=int,
        help="maximum tokens per answer (default: the task's; for your own rows the model's run's, else 256)",
    )
    measured.add_argument("--stop", nargs="+", metavar="TEXT", help="end an answer before any of these texts")
    measured.add_argument(
        "--rollout_batch_size",
        dest="batch_size",
        type=int,
        help="answers at once (default: 64; for a server: 16 requests)",
    )


def _check(options: Any) -> None:
    """Refuse values out of range and flags that contradict each other."""
    at_least_one(
        max_eval_rows=options.n,
        num_samples=options.num_samples,
        eval_max_new_tokens=options.max_new_tokens,
        rollout_batch_size=options.batch_size,
    )
    if options.temperature < 0 or not 0 < options.top_p <= 1:
        raise UserError(
            f"--temperature {options.temperature}, --top_p {options.top_p}: 0 or more, and above 0 up to 1,"
            " are needed."
        )
    if options.num_samples > 1 and options.temperature <= 0:
        raise UserError("--num_samples: greedy answers are all the same; give a --temperature.")
    if "" in (options.stop or ()):
        raise UserError("--stop: an empty text matches everywhere; give another.")
    if options.scales is not None:
        check_scales(options.scales, "--scales")
        if options.retention is not None:
            raise UserError(
                "--retention is not measured for parts: add its task to --task, or drop --scales."
            )
        if options.model_name_or_path is None or options.server_url is not None:
            raise UserError("--scales are parts of what training changed: give its folder as --model.")
    if options.server_url is None:
        if options.server_model is not None:
            raise UserError("--server_model is a name on a server: give its --server_url, too.")
        return
    check_server("--server_url", options.server_url)
    if options.chat_template_kwargs is not None:
        raise UserError(
            "--chat_template_kwargs: a server renders prompts itself; set the options when you start it."
        )
    if options.base:
        raise UserError(
            "--base needs the model itself, for perplexities, not a server: drop --base or --server_url."
        )
    for name in ("model_name_or_path", "dtype", "trust_remote_code"):
        if getattr(options, name):
            raise UserError(
                f"--{name} is for a model that is loaded here, but --server_url lets a server answer:"
                " drop one"
                " of them (--server_model names the server's)."
            )


def _refuse_nothing(options: Any, chosen: dict[str, Task], sets: dict[str, dict[str, list[Row]]]) -> None:
    """Refuse rows of which nothing can be said, before anything is loaded."""
    for name, task in chosen.items():
        references = any(row.get("completion") for row in sets[name]["task"])
        if task.graded or options.base or options.rows or (references and options.server_url is None):
            continue
        why = "a server gives no perplexity" if references else "its rows have no reference"
        raise UserError(
            f"{name}: there is no --grader, and {why}: give one, or --rows FILE to keep the answers."
        )


def _write_rows(options: Any, records: Sequence[Figures]) -> None:
    if options.rows and records:
        write_lines(options.rows, records)


def _write(
    options: Any, figures: Figures, records: Sequence[Figures], table: Sequence[Sequence[str]]
) -> None:
    """Write the files that were asked for."""
    if options.json:
        write_text(options.json, json.dumps(figures, indent=2) + "\n")
    _write_rows(options, records)
    if options.markdown:
        head, *lines = [[cell.strip() for cell in line] for line in table]
        write_text(options.markdown, "\n".join(markdown_table(head, lines)) + "\n")


def _sets(name: str, task: Task, options: Any) -> dict[str, list[Row]]:
    """The rows of a task to answer, by part."""
    split = options.split or task.evaluation_split
    sets = {"task": task.load(split, limit=options.n), "retention": task.retention_rows(limit=options.n)}
    if task.rows_in_files is not None and len(sets["task"]) < task.rows_in_files:
        logger.warning("%s: %d of %d rows (split %s).", name, len(sets["task"]), task.rows_in_files, split)
    if "test_hard" in task.splits and split == "test":
        sets["test_hard"] = task.load("test_hard", limit=options.n)
    return sets


class _Kept(Task):
    """A retention set as a task: what must not be lost, asked of one model."""

    def __init__(self, one: RetentionSet) -> None:
        self.name, self.rows, self.probed, self._grade = one.name, one.rows, one.probed, one.grade
        self.graded, self.max_new_tokens = one.grade is not None, one.cap or Task.max_new_tokens

    def grade(self, row: Row, completion: str) -> Grade:
        assert self._grade is not None
        return self._grade(row, completion)


def _kept(options: Any, chosen: dict[str, Task]) -> dict[str, _Kept]:
    """The retention sets that are asked for, or general of a real model, beside the tasks.

    A task's own retention rows are asked with the task.
    """
    model = options.server_url or options.model_name_or_path or POCKET
    if options.retention is None and (options.server_url or is_of_the_pocket(model)):
        return {}  # a server may cost money: only where it is asked for
    asked = None if options.retention is None else [name for name in options.retention if name not in chosen]
    found = load_sets(
        RunOptions(
            retention=asked,
            retention_rows=options.retention_rows,
            max_eval_rows=options.n,
            model_name_or_path=model,
            grader=options.grader,
            columns=options.columns,
            allow_unsafe_code_execution=bool(options.allow_unsafe_code_execution),
        ),
        None,
    )
    if options.retention is not None and (same := next((one for one in found if one.name in chosen), None)):
        raise UserError(f"--retention: {same.name} is the name of what is evaluated too: rename the file.")
    return {one.name: _Kept(one) for one in found if one.name not in chosen}


class _Evaluation:
    """One model on several tasks: figures, table lines and records of all answers."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.batch_size = options.batch_size or (16 if options.server_url else 64)
        self.server: ChatServer | None = None
        self.base = None
        self.figures: dict[str, Figures] = {}
        self.lines: list[list[str]] = []
        self.records: list[dict[str, Any]] = []
        if options.server_url:
            self.server = ChatServer(options.server_url, options.server_model, at_once=self.batch_size)
            self.name = self.server.model
            return
        self.name = options.model_name_or_path or "pocket"
        dtype = options.dtype or "auto"
        self.model, self.tokenizer = load_any(self.name, dtype, options.trust_remote_code)
        rendering.set_options(self.tokenizer, options.chat_template_kwargs)
        if options.base:
            self.base, tokenizer = load_any(options.base, dtype, options.trust_remote_code)
            if tokenizer.get_vocab() != self.tokenizer.get_vocab():
                raise UserError(
                    f"--base {options.base} has another vocabulary than {self.name}: give the model that it"
                    " was adapted from."
                )

    def add(self, name: str, task: Task, sets: dict[str, list[Row]], probed: list[Row] | None = None) -> None:
        """Ask the model the rows of a task, and measure drift on `probed` (None: of its own)."""
        from unisd.evaluation.likelihood import gold_ppl
        from unisd.run import measure

        options = self.options
        found: Figures = {}
        prefix = f"{name}, " if [name] != options.task else ""
        for part, rows in sets.items():
            found[f"{part}_overlong"] = len(rows)
            rows = sets[part] = self._fitting(rows, f"{name}, {part}")
            found[f"{part}_overlong"] -= len(rows)
            if not rows or not (task.graded or options.rows):  # nobody would look at the answers
                found |= {f"{part}_accuracy": None, f"{part}_skills": None}
                continue
            answers = self.answers(rows, options.max_new_tokens or task.max_new_tokens, f"{name}, {part}")
            if not task.graded:
                self.record(name, part, rows, answers)
                self.lines.append([f"{prefix}{part}, not graded", "-", str(sum(map(len, answers)))])
                found |= {f"{part}_accuracy": None, f"{part}_skills": None}
                continue
            summary = self.graded(name, part, task, rows, answers)
            found |= {
                f"{part}_accuracy": summary["accuracy"],
                f"{part}_skills": summary["by_skill"] or None,
                f"{part}_summary": summary,
            }
            self.lines += summary_lines(summary, prefix + part)
            if self.server is not None:
                count = str(sum(map(len, answers)))
                self.lines += [
                    [f"  {what}", str(summary[what.replace(" ", "_")]), count]
                    for what in ("failed", "cut off")
                ]
        found["gold_ppl"] = None
        if self.server is None and probed is None:
            found["gold_ppl"] = gold_ppl(self.model, self.tokenizer, sets["task"])
            self.lines.append(
                [f"{prefix}perplexity of the references", number(found["gold_ppl"]), str(len(sets["task"]))]
            )
        if self.base is not None:
            rows = probed or sets["retention"] or sets["task"]
            cap = options.max_new_tokens or task.max_new_tokens
            found |= measure.drift(self.model, self.base, self.tokenizer, rows, cap, self.batch_size)
            found["drift"] = moved = drift_of(found["retention_detail"], name)
            assert moved is not None
            for what in ("reverse", "forward", "kl"):
                side = moved[what]
                sides = () if side is None else (side["before"], side["after"])
                value = " to ".join(number(one, ".4f") for one in sides) or "-"
                self.lines.append([f"{prefix}{DRIFT[what]}", value, str(len(rows))])
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
            f"{place_of(rows[number], number, what)} has a prompt of {length} tokens, and the model's context"
            f" is {context}; {len(too_long)} such row(s) of {len(rows)}"
        )
        if len(too_long) == len(rows):
            raise UserError(f"{said}: no row is left to answer; give a model with a longer context.")
        logger.warning("%s are left out and not counted.", said)
        return [row for place, row in enumerate(rows) if place not in too_long]

    def graded(
        self, name: str, part: str, task: Task, rows: Sequence[Row], answers: Sequence[Sequence[Answer]]
    ) -> Figures:
        """The summary, of answers that are there: those that failed are counted, and neither right
        nor wrong.
        """
        there = [[answer.text for answer in of_row if answer.failed is None] for of_row in answers]
        grades = grade_answers(task, rows, there)
        self.record(name, part, rows, answers, grades)
        answered = [(row, of_row) for row, of_row in zip(rows, grades, strict=True) if of_row]
        summary = summarize([row for row, _ in answered], [of_row for _, of_row in answered])
        if self.server is not None:
            every = [answer for of_row in answers for answer in of_row]
            summary["failed"] = sum(answer.failed is not None for answer in every)
            summary["cut_off"] = sum(answer.cut_off for answer in every)
        return summary

    def record(
        self,
        name: str,
        part: str,
        rows: Sequence[Row],
        answers: Sequence[Sequence[Answer]],
        grades: Sequence[Sequence[Grade]] | None = None,
    ) -> None:
        """Keep all answers, with the grades of those that are there, if anybody grades them."""
        for place, (row, of_row) in enumerate(zip(rows, answers, strict=True)):
            order = {"order": OURS} if "published_options" in row else {}
            results = iter(row_results([row], [grades[place]])) if grades else repeat({"id": row["id"]})
            for answer in of_row:
                if answer.failed is None:
                    record = {**next(results), "completion": answer.text}
                else:
                    nothing = dict.fromkeys(("correct", "score", "extracted", "completion"))
                    why = str(answer.failed)
                    record = {"id": row["id"], **nothing, "reason": f"failed: {why}", "failed": why}
                self.records.append({"task": name, "part": part, **record, **order})

    def answers(self, rows: Sequence[Row], cap: int, what: str) -> list[list[Answer]]:
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
            drawn |= {"stop": options.stop} if options.stop else {}
            seeds = [seed_of(key) for key in keys]
            with show_progress(f"answering {what}", len(asked)) as advance:
                told = iter(self.server.answers(asked, max_tokens=cap, seeds=seeds, on_rows=advance, **drawn))
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
                batch_size=self.batch_size,
                on_rows=advance,
            )
        texts = [completion_text(self.tokenizer, completion.ids) for completion in written]
        if options.stop:
            texts = [re.split("|".join(map(re.escape, options.stop)), text, maxsplit=1)[0] for text in texts]
        found = map(Answer, texts)
        return [[next(found) for _ in range(options.num_samples)] for _ in rows]
