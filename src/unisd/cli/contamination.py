"""`unisd contamination`: do problems of the evaluation rows occur in the training rows?

Exact: the same words in the same order, whatever case, punctuation and spacing. Near: the Jaccard
similarity of their sets of word triples is at least 0.8. What a task writes around each problem
(instructions, option letters) counts for little in long prompts and for much in short ones, so
problems are compared without lines that most prompts share.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from unisd.cli.parser import CommandParser
from unisd.cli.sources import one_task
from unisd.console import loading_libraries, make_console, show_table
from unisd.data.text import NEAR_DUPLICATE_THRESHOLD, prompt_text, shingles, words
from unisd.errors import UserError
from unisd.run.resolve import shared_names, shared_options
from unisd.tasks.base import Row

COMMON_LINE = 0.5  # a line in more than this share of the prompts is the task's own wording


@dataclass(frozen=True)
class Report:
    """Test rows that occur in the training rows: pairs of (test id, train id)."""

    test: int
    exact: list[tuple[str, str]]
    near: list[tuple[str, str]]


def contamination(train: Sequence[Row], test: Sequence[Row]) -> Report:
    """Each test row at most once, exact before near."""
    common = _common_lines([*train, *test])
    known = [_words(row, common) for row in train]
    place_of = {found: place for place, found in enumerate(known)}
    parts_at = [shingles(found) for found in known]  # by place: several rows may have one id
    posting: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for place, parts in enumerate(parts_at):
        for part in parts:
            posting[part].append(place)
    exact, near = [], []
    for row in test:
        found = _words(row, common)
        if found in place_of:
            exact.append((str(row["id"]), str(train[place_of[found]]["id"])))
            continue
        mine = shingles(found)
        shared = Counter(place for part in mine for place in posting.get(part, ()))
        for place, count in shared.most_common(20):
            if count / (len(mine) + len(parts_at[place]) - count) >= NEAR_DUPLICATE_THRESHOLD:
                near.append((str(row["id"]), str(train[place]["id"])))
                break
    return Report(len(test), exact, near)


def _common_lines(rows: Sequence[Row]) -> set[str]:
    counts = Counter(line for row in rows for line in set(prompt_text(row["prompt"]).splitlines()))
    return {line for line, count in counts.items() if count > max(1, COMMON_LINE * len(rows))}


def _words(row: Row, common: set[str]) -> tuple[str, ...]:
    return words("\n".join(line for line in prompt_text(row["prompt"]).splitlines() if line not in common))


def contamination_command(arguments: Sequence[str]) -> int:
    """Count and show them; returns the exit code.

    Raises:
        UserError: unknown task, unreadable files, no training rows.
    """
    parser = CommandParser(
        "contamination",
        "Check whether problems of the evaluation rows occur in the training rows, for a task or your"
        " own rows.",
        shared_options("contamination"),
    )
    parser.set_defaults(**dict.fromkeys(shared_names("contamination")))
    options = parser.parse(arguments)
    if options is None:
        return 0
    with loading_libraries():
        name, task = one_task(options, runs_code=False)
    if task.evaluation_only:
        raise UserError(f"task {name} has no training rows: it is for evaluation only.")
    task.prepare_training()
    report = contamination(task.load("train"), task.load("test"))
    lines = [
        [kind, str(len(pairs)), f"{len(pairs) / report.test:.2%}"]
        for kind, pairs in (("exact", report.exact), ("near", report.near))
    ]
    show_table(make_console(), (f"{name}: test rows in train", "rows", f"of {report.test}"), lines)
    for kind, pairs in (("exact", report.exact), ("near", report.near)):
        for test_id, train_id in pairs[:5]:
            print(f"{kind}: test {test_id} = train {train_id}")
    return 0
