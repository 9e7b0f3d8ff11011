"""The one exception type for mistakes that the user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """A user mistake: one line that says what is wrong and how to mend it.

    The command prints it and exits with code 2.
    """


class RolloutError(UserError):
    """No completions are to be had, say because a server is gone: the run ends, with its last
    finished step in a checkpoint.
    """


class OutOfMemory(UserError):
    """A step that fits in no size. The weights are those of the last finished step."""


def one_line(error: BaseException) -> str:
    """What an error of a library says, within a sentence of ours."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
