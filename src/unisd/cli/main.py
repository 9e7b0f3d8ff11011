"""`unisd`: parse, call, print.

Heavy imports happen inside the commands, so that help and the check of flags answer at once.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Sequence
from importlib import import_module
from textwrap import TextWrapper

from unisd import __version__
from unisd.errors import UserError, unknown, worded_for_command

COMMANDS = {
    "train": ("", "train and measure (the pocket model: about 3 minutes)"),
    "probe": ("", "test whether the teacher is worth learning from"),
    "prepare": ("", "build auxiliary contexts and wrong references"),
    "eval": ("", "measure accuracy, retention and drift of a model"),
    "grade": ("", "grade completions that any system wrote"),
    "judge": ("DIR", "let a model compare the answers before and after"),
    "contamination": ("", "find evaluation problems in the training rows"),
    "study": ("", "find which mechanisms matter for a task"),
    "report": ("DIR ...", "show a run, several runs or a study as an HTML page"),
    "recipes": ("[NAME]", "list published methods, or print one as a file"),
    "merge": ("DIR", "merge an adapter into a full model"),
    "chat": ("DIR", "talk with a model, with its base beside it"),
    "completion": ("SHELL", "print a script for completion in a shell"),
}
"""Each command's arguments and its line in the overview."""


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Call the function of a command, in the module of its name; returns the exit code."""
    return int(getattr(import_module(f"unisd.cli.{name}"), f"{name}_command")(arguments))


def overview() -> str:
    """What there is, a line a command; what is longer than the terminal goes on below itself."""
    lines = [(f"{name} {usage}".rstrip(), line) for name, (usage, line) in COMMANDS.items()]
    lines.insert(1, ("train --help", "every option, grouped by mechanism"))
    wrapped = TextWrapper(shutil.get_terminal_size().columns, break_on_hyphens=False)
    head = wrapped.fill(
        "unisd: adapt a causal language model to your task by self-distillation (UniSD, arXiv 2605.06597)."
    )
    wrapped.subsequent_indent = " " * 25
    return "\n".join(
        [
            head,
            "",
            *(wrapped.fill(f"  unisd {left:<16} {right}") for left, right in lines),
            "  unisd --version",
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C or
    SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Imported along with peft, on a CPU with bfloat16 it tells of kernels from a hub that it could
    # not load.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with worded_for_command():
            return _dispatch(arguments)
    except UserError as error:
        print(f"unisd: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("unisd: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `unisd recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        from unisd.training.checkpoints import disk_is_full

        if not disk_is_full(error):
            raise
        print(
            "unisd: error: the disk is full: free some space, then resume from the last checkpoint.",
            file=sys.stderr,
        )
        return 2


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview(), end="")
        return 0
    if arguments[0] in ("--version", "-V"):
        print(f"unisd {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS, cutoff=0.5)
    if os.name != "posix":
        raise UserError("unisd runs on POSIX systems only: on Windows, use WSL.")
    return run_command(name, rest)
