"""The user's own rows: from several files or data sets, by weights, and which are held out.

Torch is not imported here: columns that are not there are told at once.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unisd.data import formats
from unisd.data.formats import parse_column_mapping
from unisd.data.origin import place_of
from unisd.data.reading import load_file
from unisd.data.rows import Row, hold_out, load_rows
from unisd.errors import UserError, flag
from unisd.run.options import RunOptions, as_list, number_of
from unisd.tasks.base import Grade

logger = logging.getLogger(__name__)

LOOKED_AT = 50_000_000
"""Bytes of the largest file whose columns are looked at before anything is imported."""


def check_columns(options: RunOptions, needs_reference: bool) -> None:
    """Look at the columns of all files, but for very large ones.

    Raises:
        UserError: a file that cannot be read, or all that is wrong with the columns of one.
    """
    mapping = parse_column_mapping(options.columns)
    needed = references_needed(options, needs_reference)
    for file in [*as_list(options.train_file), *as_list(options.eval_file)]:
        if not Path(file).is_file() or Path(file).stat().st_size <= LOOKED_AT:
            rows = load_file(file, say=False)
            if rows:
                formats.settled(rows, mapping, file, needed, say=False)


def grader_of(
    name: str | None, unsafe: bool, rows: Sequence[Row], where: str
) -> Callable[[Row, str], Grade] | None:
    """The grader of the user's own rows, which compares with their answer, or runs their tests.

    Raises:
        UserError: a row with nothing to compare with, or with what the grader cannot read.
    """
    if name is None:
        return None
    from unisd.tasks import sandbox
    from unisd.tasks.graders import check_gold, get_grader

    grader = get_grader(name)
    code = name == "code"
    columns = ("tests",) if code else ("answer", "completion")
    for number, row in enumerate(rows):
        gold, place = _gold(row, columns), place_of(row, number, where)
        if gold is None:
            needed = "a column tests with Python assertions" if code else "a column answer, or a reference"
            raise UserError(f"{place}: {flag('grader', name)} needs {needed}: add it, or remove the row.")
        check_gold(grader, row, gold, place)
    if code:
        sandbox.require_with(unsafe)
    return lambda row, text: grader(text, grader.gold_of(row, _gold(row, columns)))


def _gold(row: Row, columns: Sequence[str]) -> Any:
    """What the grader compares with: the first of the columns that holds something."""
    values = (row.get(column) for column in columns)
    return next((value for value in values if value is not None and str(value).strip()), None)


def references_needed(options: RunOptions, needs_reference: bool) -> bool:
    """Whether rows need a reference, which contexts and wrong references are built of, too."""
    return needs_reference or {options.negatives, options.agreement_contexts} != {"columns"}


def named(sources: Sequence[str], are_files: bool) -> str:
    """What rows of these sources are called."""
    return "+".join(Path(source).stem if are_files else source for source in sources)


def apart(
    options: RunOptions, sources: Sequence[tuple[str, list[Row]]], seed: int, hold: bool
) -> tuple[list[Row], list[Row]]:
    """Rows to train on and, with `hold`, rows held out to report on.

    Rows of one problem stay together, also across sources. What is held out is there once, what is
    trained on as often as its source's weight says.
    """
    rows = [row for _, found in sources for row in found]
    held: list[Row] = []
    if hold:
        rows, held = _held_out(options, rows, " and ".join(name for name, _ in sources), seed)
    if len(sources) == 1 and options.train_weights is None:
        return rows, held
    kept = {id(row) for row in rows}
    parts = [(name, [row for row in found if id(row) in kept]) for name, found in sources]
    return _mixed(parts, options.train_weights or [1.0] * len(parts), seed), held


def _held_out(options: RunOptions, rows: list[Row], name: str, seed: int) -> tuple[list[Row], list[Row]]:
    asked, total = number_of(options.eval_split), len(rows)
    others = "give more rows, or --eval_file"
    if total == 1:
        raise UserError(f"{name} has a single row, so no row can be held out: {others}.")
    count = min(max(1, round(0.1 * total)), options.max_eval_rows)
    if asked is not None:
        count = max(1, round(asked * total)) if asked < 1 else int(asked)
        if count >= total:
            raise UserError(
                f"eval_split={options.eval_split}: {name} has {total} rows, and no row would be left to"
                f" train on: hold out fewer, {others}."
            )
        if count > options.max_eval_rows:
            raise UserError(
                f"eval_split={options.eval_split} holds {count} rows out, and max_eval_rows="
                f"{options.max_eval_rows} of them would be reported on: set --max_eval_rows {count}, or hold"
                " out fewer."
            )
    rows, held = hold_out(rows, seed=seed, count=count)
    if not held:
        raise UserError(f"all rows of {name} have one prompt, so no row can be held out: give --eval_file.")
    return rows, held


def _mixed(parts: Sequence[tuple[str, list[Row]]], weights: Sequence[float], seed: int) -> list[Row]:
    """The rows of each source as often as its weight says, all in one order drawn by the seed.

    What a weight has beyond a whole number is drawn: 2.5 takes all rows twice, and half of them a
    third time.
    """
    rng = random.Random(seed)
    mixed: list[Row] = []
    said = []
    for (name, rows), weight in zip(parts, weights, strict=True):
        times, share = divmod(weight, 1)
        taken = rows * int(times) + rng.sample(rows, round(share * len(rows)))
        if not taken:
            raise UserError(
                f"train_weights: a weight of {weight:g} takes no row of the {len(rows)} training rows of"
                f" {name}: raise it, or leave {name} out."
            )
        said.append(f"{len(taken)} of {name} ({len(rows)} x {weight:g})")
        mixed += taken
    rng.shuffle(mixed)
    logger.warning("training rows, mixed: %s; %d in all.", ", ".join(said), len(mixed))
    return mixed


def load_own(
    options: RunOptions, sources: Sequence[tuple[str, str | list[Row]]], needs_reference: bool
) -> list[tuple[str, list[Row]]]:
    """The rows of each source, checked; a source is a name with a file or with rows."""
    needed = references_needed(options, needs_reference)
    found = []
    for place, (name, source) in enumerate(sources, 1):
        rows = load_rows(source, options.columns, needs_reference=needed, name=name)
        for number, row in enumerate(rows):
            if len(sources) > 1 and row["id"] == str(number):  # the same in each of them
                row["id"] = f"{place}-{number}"
        found.append((name, rows))
    return found
