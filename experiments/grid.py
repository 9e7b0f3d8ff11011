"""Carry out the cells of a comparison: one JSON object a line, appended as each ends.

So a comparison goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from unisd.console import quiet_libraries, show_progress
from unisd.errors import UserError
from unisd.files import append_line, read_lines
from unisd.processes import lock

Cell = dict[str, Any]


def read(file: Path) -> list[Cell]:
    """The finished cells; none where there is no file.

    A line cut short (a full disk, a kill) is no cell.
    """
    return read_lines(file)


def append(file: Path, cell: Cell) -> None:
    """Add a finished cell; it is on the disk when this returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    append_line(file, cell)


def carry_out(
    file: Path,
    plans: Callable[[list[Cell]], Iterable[Any]],
    run: Callable[[Any], Cell],
    total: int,
    most: int | None,
    jobs: int = 1,
) -> list[Cell]:
    """Run what `plans` asks for, each apart and written as it ends; returns all cells.

    Args:
        plans: of the finished cells, what may be run now, in the order to run it; asked again after
            every cell, so that a plan that depends on other cells is left out until they are there.
        total: cells of the whole comparison, for the bar.
        most: stop after so many.
        jobs: how many run at once, each with its share of the cores.

    Raises:
        UserError: a cell failed (those that ran beside it are finished and written first), or
            another process adds to this file.
    """
    busy = f"another process runs the cells of {file}: wait for it, or choose another --folder."
    running: dict[Future[Cell], Any] = {}
    failed: list[BaseException] = []
    started, threads = 0, max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
    with lock(file, busy), show_progress("cells", total) as advance, ThreadPoolExecutor(jobs) as pool:
        cells = read(file)
        advance(len(cells))
        while True:
            while len(running) < jobs and not failed and (most is None or started < most):
                plan = next((plan for plan in plans(cells) if plan not in running.values()), None)
                if plan is None:
                    break
                running[pool.submit(run_apart, run, plan, threads)] = plan
                started += 1
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                if (error := future.exception()) is not None:
                    failed.append(error)
                    continue
                cells.append(future.result())
                append(file, cells[-1])
                advance(1)
    if failed:
        raise failed[0]
    return cells


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """`--most` and `--jobs`, as every comparison has them."""
    parser.add_argument("--most", type=int, help="stop after so many cells")
    parser.add_argument(
        "--jobs", type=int, default=1, help="cells that run at once (default: 1, with all cores)"
    )


def run_apart(run: Callable[[Any], Cell], plan: Any, threads: int | None = None) -> Cell:
    """`run(plan)` in a process of its own: its peak memory is its own, and nothing is left behind.

    Both must be picklable.

    threads: that torch computes with there; None: as many as it wants.

    Raises:
        UserError: the process ended without a result.
    """
    # A fork of a process whose threads have computed would hang; a server that has only imported
    # may be forked.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["unisd.trainer"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, run, plan, threads))
    process.start()
    sender.close()
    try:
        cell: Cell = receiver.recv()
    except EOFError:
        process.join()
        raise UserError(
            f"cell {plan} ended with exit code {process.exitcode}: nothing was written for it."
        ) from None
    process.join()
    return cell


def _end_with_parent() -> None:
    """End this process when its parent ends.

    A restarted comparison runs unfinished cells again: one that is still at work must not go on
    beside it. What forked this process is a server, so no signal tells of the parent's death.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _send(sender: Connection, run: Callable[[Any], Cell], plan: Any, threads: int | None) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    quiet_libraries()
    if threads is not None:
        torch.set_num_threads(threads)
    sender.send(run(plan))
