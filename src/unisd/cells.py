"""Finished cells of a comparison: one JSON object a line, appended as each ends, so that a comparison goes on where it was stopped."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterable
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from unisd.artefacts import append_line, read_lines
from unisd.console import show_progress
from unisd.errors import UserError

Cell = dict[str, Any]


def read(file: Path) -> list[Cell]:
    """The finished cells; none where there is no file. A line cut short (a full disk, a kill) is no cell."""
    return read_lines(file)


def append(file: Path, cell: Cell) -> None:
    """Add a finished cell; it is on the disk when this returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    append_line(file, cell)


def carry_out(
    file: Path, plans: Callable[[list[Cell]], Iterable[Any]], run: Callable[[Any], Cell], total: int, most: int | None
) -> list[Cell]:
    """Run what `plans` (of the finished cells, which grow meanwhile) asks for, each apart and written as it ends; returns all cells.

    total: cells of the whole comparison, for the bar. most: stop after so many.
    """
    disable_progress_bar()  # one bar for all cells, instead of three of loading weights in each
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    cells = read(file)
    with show_progress("cells", total) as advance:
        advance(len(cells))
        for plan in islice(plans(cells), most):
            cells.append(run_apart(run, plan))
            append(file, cells[-1])
            advance(1)
    return cells


def run_apart(run: Callable[[Any], Cell], plan: Any) -> Cell:
    """`run(plan)` in a process of its own: its peak memory is its own, and nothing is left behind. Both must be picklable.

    Raises:
        UserError: the process ended without a result.
    """
    # A fork of a process whose threads have computed would hang; a server that has only imported may be forked.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["unisd.trainer"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, run, plan))
    process.start()
    sender.close()
    try:
        cell: Cell = receiver.recv()
    except EOFError:
        process.join()
        raise UserError(f"cell {plan} ended with exit code {process.exitcode}: nothing was written for it.") from None
    process.join()
    return cell


def _send(sender: Connection, run: Callable[[Any], Cell], plan: Any) -> None:
    sender.send(run(plan))
