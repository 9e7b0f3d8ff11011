"""`unisd judge`: a model behind a server compares answers, before with after, or of two files.

How it is asked and what its verdicts count is in `evaluation/judge.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unisd.cli.completions import match_completions
from unisd.cli.parser import MEASURED, OUTPUT, CommandParser, at_least_one, output_file
from unisd.cli.sources import OWN, one_task
from unisd.console import loading_libraries, make_console, show_progress, show_table
from unisd.data.text import MAX_TEXT, as_text, reference_of
from unisd.data.thoughts import answer_of
from unisd.errors import UserError
from unisd.evaluation import judge
from unisd.evaluation.judge import Pair, Reply
from unisd.files import ANSWERS, JUDGE, write_text
from unisd.http_client import check_server
from unisd.run.chat_server import ChatServer
from unisd.run.resolve import shared_names, shared_options


def judge_command(arguments: Sequence[str]) -> int:
    """Let a server's model judge pairs of answers; returns the exit code.

    Raises:
        UserError: no run with answers, files that do not fit, a server that does not answer.
    """
    options = _parser().parse(arguments)
    if options is None:
        return 0
    _check(options)
    with loading_libraries():
        pairs, notes = _of_run(Path(options.run)) if options.run else _of_files(options)
    for note in notes:
        print(f"note: {note}")
    kept = judge.read(Path(options.run)) if options.run else []  # unreadable: before anything is asked
    server = ChatServer(options.judge_url, options.judge_model, at_once=options.batch_size)
    if any(one["judge"] == server.model for one in kept):
        print(f"note: {options.run}/{JUDGE} has a judgement by {server.model}, which is replaced.")
    chosen = pairs[: options.n]
    print(f"{len(chosen)} of {len(pairs)} pairs, each in both orders, are judged by {server.model}.")
    found = judge.judged(chosen, lambda questions: _asked(server, questions, options))
    of = ["before", "after"] if options.run else options.completions
    found = {"judge": server.model, "server": server.client.url, "of": of, "rows": len(chosen), **found}
    for one in found["failed"]:
        print(f"row {one['id']} has no verdict: {one['reason']}")
    show_table(make_console(), judge.head(found), judge.lines(found))
    if options.run:
        print(f"written to {judge.keep(Path(options.run), found)}; see it: unisd report {options.run}")
    if options.json:
        write_text(options.json, json.dumps(found, indent=2) + "\n")
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        "judge",
        "Let a model on any OpenAI-compatible server compare a run's answers before and after, or the"
        " answers in two files. Each pair is judged twice, in both orders.",
        shared_options("judge"),
    )
    parser.set_defaults(**dict.fromkeys(shared_names("judge")))
    parser.add_argument("run", metavar="RUN_DIR", nargs="?", help="a folder that `unisd train` has written")
    measured, output = parser.under(MEASURED), parser.under(OUTPUT)
    measured.add_argument("--judge_url", metavar="URL", required=True, help="the judge's server")
    measured.add_argument(
        "--judge_model",
        metavar="NAME",
        help="name of the judge on the server (default: the first that it lists)",
    )
    measured.add_argument(
        "--max_eval_rows",
        dest="n",
        type=int,
        help="maximum pairs (default: all whose answers are kept)",
    )
    measured.add_argument(
        "--eval_max_new_tokens",
        dest="max_tokens",
        type=int,
        default=1024,
        help="maximum tokens per reply (default: 1024)",
    )
    measured.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="temperature of the judge (default: 0; some servers require 1)",
    )
    measured.add_argument(
        "--rollout_batch_size",
        dest="batch_size",
        type=int,
        default=16,
        help="requests at once (default: 16)",
    )
    measured.add_argument(
        "--completions",
        nargs=2,
        metavar=("A.jsonl", "B.jsonl"),
        help="instead of a run: two files with answers to the rows of --task or --eval_file; B is"
        " compared with A",
    )
    measured.add_argument("--split", default="all", help="rows that the files answer (default: all)")
    output.add_argument("--json", type=output_file, metavar="FILE", help="write the judgement to this file")
    return parser


def _check(options: Any) -> None:
    """Refuse what is missing, out of range or contradicts, before anything is loaded."""
    at_least_one(
        max_eval_rows=options.n,
        eval_max_new_tokens=options.max_tokens,
        rollout_batch_size=options.batch_size,
    )
    if options.temperature < 0:
        raise UserError(f"--temperature {options.temperature}: 0 or more is needed.")
    check_server("--judge_url", options.judge_url)
    if (options.run is None) == (options.completions is None):
        raise UserError(
            "give either the folder of a run, or --completions A.jsonl B.jsonl with their --task."
        )
    if options.completions and all(getattr(options, name) is None for name in ("task", *OWN)):
        raise UserError("--completions answers rows: name their --task, or your own rows by --eval_file.")
    if options.run:
        for name in shared_names("judge"):
            if getattr(options, name):
                raise UserError(f"--{name} belongs to --completions: a run has its rows with its answers.")


def _of_run(folder: Path) -> tuple[list[Pair], list[str]]:
    """The answers before and after to a run's evaluation rows, as far as their texts are kept."""
    path = folder / ANSWERS
    try:
        part = json.loads(path.read_text(encoding="utf-8")).get("task", {"ids": [], "examples": []})
        ids, examples = part["ids"], part["examples"]
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {ANSWERS}: give the folder of a finished run.") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give the folder of a finished run.") from None
    if not examples:
        raise UserError(f"{path} holds no texts of answers: train with --answers_kept 24.")
    notes = []
    if len(examples) < len(ids):
        kept = f"{len(examples)} of {len(ids)}"
        notes.append(f"the texts of {kept} rows are kept (unisd train --answers_kept).")
    pairs = []
    for one in examples:
        prompt = as_text(one["messages"]) if "messages" in one else one["prompt"]  # messages are never cut
        if max(len(one["reference"]), 0 if "messages" in one else len(prompt)) < MAX_TEXT:
            answers = (answer_of(one[side]["text"]) for side in ("before", "after"))
            pairs.append(Pair(one["id"], prompt, one["reference"], *answers))
    if left_out := len(examples) - len(pairs):
        notes.append(
            f"{left_out} rows are left out: of texts over {MAX_TEXT:,} characters only the beginning is kept."
        )
    if not pairs:
        raise UserError(f"{path}: {notes[-1]} Judge answers that you have in files (--completions).")
    return pairs, notes


def _of_files(options: Any) -> tuple[list[Pair], list[str]]:
    """The answers of two files to the rows that both answer."""
    _, task = one_task(options)
    every = task.load(options.split)
    sides, notes = [], []
    for path in options.completions:
        matched = match_completions(task, every, path)
        several = next(
            (row["id"] for row, texts in zip(matched.rows, matched.answers, strict=True) if texts[1:]), None
        )
        if several is not None:
            raise UserError(f"{path}: row {several} has several answers: give one per row to compare.")
        sides.append(
            {str(row["id"]): texts[0] for row, texts in zip(matched.rows, matched.answers, strict=True)}
        )
        notes += matched.notes
    old, new = sides
    pairs = [
        Pair(name, as_text(row["prompt"]), reference_of(row), answer_of(old[name]), answer_of(new[name]))
        for row in every
        if (name := str(row["id"])) in old and name in new
    ]
    if not pairs:
        raise UserError("no row is answered in both files: give answers to the same rows.")
    return pairs, notes


def _asked(server: ChatServer, questions: list[str], options: Any) -> list[Reply]:
    with show_progress("judging", len(questions)) as advance:
        told = server.answers(
            questions, max_tokens=options.max_tokens, on_rows=advance, temperature=options.temperature
        )
    cut = f"the reply was cut off after {options.max_tokens} tokens"
    return [
        Reply(one.text, str(one.failed) if one.failed is not None else cut if one.cut_off else "")
        for one in told
    ]
