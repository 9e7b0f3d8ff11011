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
from html import escape
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

logger = logging.getLogger(__name__)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; a `|` in a cell is escaped."""
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


SILENT_S = 3.0  # seconds before a progress bar appears
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


class _Handler(logging.StreamHandler[Any]):
    """To whatever `sys.stderr` is at the time: a live progress bar redirects it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


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


@contextmanager
def show_progress(description: str, total: int, shown: bool | None = None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, and the function that moves it on; in a notebook a line.

    `shown=None`: where stderr is a terminal or in a notebook, after a few seconds.
    """
    notebook = shown is not False and in_notebook()
    wanted = not notebook and (is_terminal(sys.stderr) if shown is None else shown)
    bar: Progress | None = None
    start, done = time.monotonic(), 0

    def advance(count: int) -> None:
        nonlocal bar, done
        done += count
        if notebook and (shown or time.monotonic() - start > SILENT_S):
            NotebookDisplay.show(f"{description}: {done} of {total}", last=done >= total)
        if bar is None and wanted and (shown or time.monotonic() - start > SILENT_S):
            bar = Progress(console=Console(stderr=True), transient=is_terminal(sys.stderr))
            bar.add_task(description, total=total)
            bar.start()
        if bar is not None:
            bar.update(bar.task_ids[0], completed=done)

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


def show_table(
    console: Console, header: Sequence[str], rows: Sequence[Sequence[str]], title: str = ""
) -> None:
    """A table on a terminal; else aligned lines that begin with the name, uncut."""
    if console.is_terminal:
        table = Table(title=title or None, title_justify="left", header_style="bold")
        for number, name in enumerate(header):
            table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        return
    print("\n".join([*([title] if title else []), *aligned(header, rows)]))


def show_example(console: Console, student: str, teacher: str, completion: str) -> None:
    """What the student sees, what the teacher sees, and an answer sampled from the student."""
    parts = (
        ("student sees", student, "cyan"),
        ("teacher sees", teacher, "magenta"),
        ("student answers", completion, "green"),
    )
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
    for name, text, _ in parts:
        print(f"{name}:")
        print("\n".join(f"  {line}" for line in text.splitlines()))


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def show_answers(console: Console, answers: Sequence[tuple[str, str]]) -> None:
    """Answers of one or two models to the same prompt, side by side on a terminal."""
    if len(answers) == 1:
        print(answers[0][1])
    elif console.is_terminal:
        table = Table(*(name for name, _ in answers), expand=True)
        table.add_row(*(Text(text) for _, text in answers))
        console.print(table)
    else:
        for name, text in answers:
            print(f"{name}:")
            print("\n".join(f"  {line}" for line in text.splitlines()))
