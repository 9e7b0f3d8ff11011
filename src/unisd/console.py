"""Shows a person progress, an example and tables; plain and uncut where stdout is no terminal."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partialmethod
from html import escape
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

logger = logging.getLogger(__name__)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; a `|` in a cell is escaped."""
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


SILENT_S = 3.0  # seconds before a progress bar appears
LINE_S = 10.0
"""Seconds between two lines of progress where there is no terminal."""
SLOW_S = 3600.0
"""Seconds that a bar looks back for its time left: two slow steps are to lie in it."""
NARROW = 80
"""Columns below which a bar is left out."""
NAME_WIDTH = 16
"""Columns that a table leaves to the names of its rows before it folds figures."""
PROSE = 40  # a column with a longer cell is text, which starts at the left
BETTER, WORSE, NOISE = "green", "red", "dim"
"""How a table shows a change: for the better, for the worse, within noise."""
FRAME_S = 1.0  # least seconds between two frames in a notebook


def make_console() -> Console:
    """A console on stdout: as wide as the terminal, or as any line where there is none."""
    if is_terminal(sys.stdout):
        return Console()
    return Console(width=100_000, no_color=True, highlight=False, force_terminal=False, force_jupyter=False)


def is_terminal(stream: Any) -> bool:
    """Whether what is written over is gone: a notebook that starts a command keeps every frame."""
    return bool(stream.isatty()) and "JPY_PARENT_PID" not in os.environ


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, by rich's own test."""
    return Console().is_jupyter


class NotebookDisplay:
    """The one display of the running cell, which shows and stores its last frame alone."""

    _cell: Any = None
    _handle: Any = None
    _shown = -FRAME_S

    @classmethod
    def show(cls, text: str, last: bool = False, stays: bool = False) -> None:
        """Show a frame, unless the one before it is a moment old.

        Args:
            last: show it in any case.
            stays: nothing takes its place; what comes next has a display of its own.
        """
        if not (last or stays) and time.monotonic() - cls._shown < FRAME_S:
            return
        from IPython import get_ipython
        from IPython.display import display

        cls._shown = time.monotonic()
        frame = {"text/plain": text, "text/html": f"<pre>{escape(text)}</pre>"}
        cell = get_ipython().execution_count
        if cls._handle is None or cls._cell != cell:
            cls._cell, cls._handle = cell, display(frame, raw=True, display_id=True)
        else:
            cls._handle.update(frame, raw=True)
        if stays:
            cls._handle = None


@cache
def live_console() -> Console:
    """The console of all that moves, on stderr: rich stacks what is live on one console."""
    return Console(stderr=True)


def _speaks() -> bool:
    """Whether this process is the one of a run's processes that tells what they do."""
    return sys.stderr is not None and os.environ.get("RANK", "0") == "0"


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Say at once what is being loaded: a spinner on a terminal, else a line on stderr."""
    if not _speaks():
        yield
    elif not is_terminal(sys.stderr):
        print(f"note: loading {what}", file=sys.stderr, flush=True)
        yield
    else:
        spinner = Spinner("dots", Text(f"loading {what}"))
        # Only what goes to the same terminal may go through the spinner's console.
        with Live(
            spinner, console=live_console(), transient=True, redirect_stdout=is_terminal(sys.stdout),
            refresh_per_second=10,
        ):  # fmt: skip
            yield


@contextmanager
def loading_libraries() -> Iterator[None]:
    """Say that the libraries are loaded while they are; from then on they are quiet."""
    with loading("libraries"):
        quiet_libraries()
        yield


class _Handler(logging.StreamHandler[Any]):
    """To whatever `sys.stderr` is at the time: a live progress bar redirects it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


@cache
def _disable_other_bars() -> None:
    """Switch off the bars of tqdm that have no switch of their own, as of a GGUF file's tensors."""
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def quiet_libraries() -> None:
    """Silence the chatter of the foundations; our own notes and warnings go to stderr, one line
    each.
    """
    import datasets
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    disable_progress_bars()
    _disable_other_bars()
    logging.getLogger("DeepSpeed").addFilter(_is_error)  # its import sets the level that it likes
    for name in ("accelerate", "peft", "huggingface_hub", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", module=r"(torch|transformers|peft|accelerate|datasets|huggingface_hub)(\.|$)"
    )
    ours = logging.getLogger("unisd")
    if not ours.handlers:
        handler = _Handler()
        handler.setFormatter(logging.Formatter("note: %(message)s"))
        ours.addHandler(handler)
        ours.propagate = False


class _Notes(logging.Handler):
    """Makes a note of a library's warning, in its first line."""

    def emit(self, record: logging.LogRecord) -> None:
        text = re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage())
        if "LOAD REPORT" not in text:  # weights that are missing or left over, whoever loads says itself
            logger.warning("transformers: %s", next(iter(text.strip().splitlines()), ""))


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """While active, what transformers warns of is told although it is silenced otherwise.

    It is what it says of a model that it opens: of chatter while it computes there is too much.
    """
    log = logging.getLogger("transformers")
    level, handlers = log.level, list(log.handlers)
    if level < logging.ERROR:
        yield
        return
    log.handlers[:] = [_Notes()]
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.handlers[:] = handlers
        log.setLevel(level)


def make_progress(console: Console, metrics: bool = False, transient: bool = False) -> Progress:
    """A bar whose counter and time left stay whole on a narrow terminal.

    Its description and the metrics are cut instead, and below `NARROW` there is no bar.

    metrics: show the field of that name of each task behind the time left.
    """
    cut = Column(no_wrap=True, overflow="ellipsis", max_width=max(10, console.width // 3))
    name = TextColumn("{task.description}", markup=False, table_column=cut)
    bar = [BarColumn(None, table_column=Column(ratio=1))] if console.width >= NARROW else []
    counter = MofNCompleteColumn(table_column=Column(no_wrap=True))
    left = TimeRemainingColumn(table_column=Column(no_wrap=True))
    further = Column(no_wrap=True, overflow="ellipsis", ratio=2)
    values = [TextColumn("{task.fields[metrics]}", markup=False, table_column=further)] if metrics else []
    return Progress(
        name, *bar, counter, left, *values, console=console, expand=bool(bar or metrics),
        transient=transient, speed_estimate_period=SLOW_S, redirect_stdout=is_terminal(sys.stdout),
    )  # fmt: skip


@contextmanager
def show_progress(description: str, total: int, shown: bool | None = None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, and the function that moves it on; in a notebook a line.

    `shown=None`: where stderr is a terminal or in a notebook, after a few seconds; else a line with
    counter and time left every `LINE_S`.
    """
    notebook = shown is not False and in_notebook()
    wanted = not notebook and _speaks() and (is_terminal(sys.stderr) if shown is None else shown)
    bar: Progress | None = None
    start, done = time.monotonic(), 0
    told = start

    def advance(count: int) -> None:
        nonlocal bar, done, told
        done += count
        now = time.monotonic()
        if notebook and (shown or now - start > SILENT_S):
            NotebookDisplay.show(f"{description}: {done} of {total}", last=done >= total)
        if bar is None and wanted and (shown or now - start > SILENT_S):
            bar = make_progress(live_console(), transient=is_terminal(sys.stderr))
            bar.add_task(description, total=total, completed=done)
            bar.start()
        if bar is not None:
            bar.update(bar.task_ids[0], completed=done)
        elif not (wanted or notebook) and shown is None and _speaks() and now - told >= LINE_S and done:
            told, left = now, (total - done) * (now - start) / done
            print(f"{description}: {done}/{total}, {left:.0f} s left", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table as plain text."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (header, *rows)
    ]


def _left_to_names(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Columns for the first column of a table in which nothing else is folded."""
    others = zip(*(row[1:] for row in (header, *rows)), strict=True)
    widths = (max(cell_len(line) for cell in column for line in cell.split("\n")) for column in others)
    return console.width - sum(widths) - 3 * len(header) - 1


def show_table(
    console: Console,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str = "",
    styles: Sequence[str] = (),
) -> None:
    """A table on a terminal; else aligned lines that begin with the name, uncut.

    On a narrow terminal names are folded first, then intervals get a line of their own.

    styles: of the last cell of each row, for a terminal; see `BETTER`.
    """
    if console.is_terminal:
        table = Table(title=title or None, title_justify="left", header_style="bold")
        names = max(cell_len(row[0]) for row in (header, *rows))
        if _left_to_names(console, header, rows) < min(names, NAME_WIDTH):
            rows = [[cell.replace(" % [", " %\n[") for cell in row] for row in rows]
        whole = _left_to_names(console, header, rows) >= min(names, NAME_WIDTH // 2)
        for number, name in enumerate(header):
            prose = any(cell_len(row[number]) > PROSE for row in rows)
            left = number == 0 or prose
            table.add_column(
                name, justify="left" if left else "right", overflow="fold", no_wrap=whole and not left
            )
        for row, style in zip(rows, [*styles, *[""] * (len(rows) - len(styles))], strict=True):
            table.add_row(*map(Text, row[:-1]), Text(row[-1], style=style))
        console.print(table)
        if any(styles):
            legend = (("better", BETTER), ", ", ("worse", WORSE), ", ", ("within noise", NOISE))
            console.print(Text.assemble(*legend))
        return
    print("\n".join([*([title] if title else []), *aligned(header, rows)]))


def one_line(text: str, width: int, around: str = "") -> str:
    """The text on one line, without its middle where it is too long; or what is around a part."""
    text = " ".join(text.split())
    if len(text) <= width:
        return text
    place = text.find(" ".join(around.split())[: width // 4]) if around.strip() else -1
    if place < 0:
        part = (width - 5) // 2
        return f"{text[:part]} ... {text[-part:]}"
    room = width - 8  # for the dots of both ends
    start = min(max(0, place - room // 3), len(text) - room)
    return f"... {text[start : start + room]} ..."


def show_example(
    console: Console, student: str, teacher: str | None, completion: str, reference: str | None = None
) -> None:
    """What the student sees, what the teacher sees, and an answer sampled from the student.

    teacher: None where there is none. reference: shows each on one line, the teacher's around this.
    """
    parts = [("student sees", student, "cyan"), ("student answers", completion, "green")]
    if teacher is not None:
        parts.insert(1, ("teacher sees", teacher, "magenta"))
    if reference is not None:
        for name, text, colour in parts:
            room = min(console.width, 110) - len(name) - 2
            line = one_line(text, room, reference if text is teacher else "")
            console.print(Text.assemble((f"{name}: ", colour), line))
        return
    if console.is_terminal:
        console.print(
            Group(
                *(
                    Panel(Text(text, style=colour), title=name, title_align="left")
                    for name, text, colour in parts
                )
            )
        )
        return
    _print_parts([(name, text) for name, text, _ in parts])


def _print_parts(parts: Sequence[tuple[str, str]]) -> None:
    """Print texts one below the other, each under its name."""
    for name, text in parts:
        print(f"{name}:")
        print("\n".join(f"  {line}" for line in text.splitlines()))


def number(value: float | None, form: str = ".3f", by: float = 1.0) -> str:
    """A figure of a table, times `by`; what was not measured is a dash."""
    return "-" if value is None else format(value * by, form)


def show_answers(console: Console, answers: Sequence[tuple[str, str]]) -> None:
    """Answers of two models to the same prompt, side by side on a terminal."""
    if console.is_terminal:
        table = Table(*(name for name, _ in answers), expand=True)
        table.add_row(*(Text(text) for _, text in answers))
        console.print(table)
    else:
        _print_parts(answers)
