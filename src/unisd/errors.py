"""The one exception type for mistakes that the user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_of_command = False


@contextmanager
def worded_for_command() -> Iterator[None]:
    """While active, errors name options as the command line takes them, else as Python does."""
    global _of_command
    earlier, _of_command = _of_command, True
    try:
        yield
    finally:
        _of_command = earlier


def by_caller(command: str, python: str) -> str:
    """Choose of two wordings the one for whom it may concern."""
    return command if _of_command else python


def flag(name: str, value: str | None = None) -> str:
    """Word an option as it is given: `--name value` to a command, `name="value"` in Python."""
    if value is None:
        return by_caller(f"--{name}", f"{name}=")
    return by_caller(f"--{name} {value}", f'{name}="{value}"')


class UserError(ValueError):
    """A user mistake: one line that says what is wrong and how to fix it.

    The command prints it and exits with code 2.
    """


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name that `name` was probably meant to be."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def unknown(kind: str, name: str, known: Iterable[str], cutoff: float = 0.4) -> UserError:
    """Say that there is no such name: with the nearest one, or all."""
    known = list(known)
    close = nearest(name, known, cutoff)
    hint = f"did you mean {close!r}?" if close else f"there are: {', '.join(known)}."
    return UserError(f"unknown {kind} {name!r}: {hint}")


class RolloutError(UserError):
    """No completions are to be had, say because a server is gone: the run ends, with its last
    finished step in a checkpoint.
    """


class OutOfMemory(UserError):
    """A step that fits in no size. The weights are those of the last finished step."""


def first_line(error: BaseException) -> str:
    """The first line of what an error of a library says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """What an error of a library says, within a sentence of ours."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
