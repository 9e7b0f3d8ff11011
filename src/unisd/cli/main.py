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
from typing import NamedTuple

from unisd import __version__
from unisd.errors import UserError, worded_for_command
from unisd.options.option import nearest


class Command(NamedTuple):
    """A command: the function that carries it out, and its line in the overview."""

    usage: str
    help: str
    module: str
    function: str


COMMANDS = {
    "train": Command(
        "",
        "train and measure (the pocket model: about 3 minutes)",
        "unisd.cli.train",
        "train_command",
    ),
    "probe": Command(
        "",
        "test whether the teacher is worth learning from",
        "unisd.cli.probe",
        "probe_command",
    ),
    "prepare": Command(
        "",
        "build auxiliary contexts and wrong references",
        "unisd.cli.prepare",
        "prepare_command",
    ),
    "eval": Command(
        "",
        "measure accuracy, retention and drift of a model",
        "unisd.cli.evaluate",
        "eval_command",
    ),
    "grade": Command("", "grade completions that any system wrote", "unisd.cli.grade", "grade_command"),
    "judge": Command(
        "DIR",
        "let a model compare the answers before and after",
        "unisd.cli.judge",
        "judge_command",
    ),
    "contamination": Command(
        "",
        "find evaluation problems in the training rows",
        "unisd.cli.contamination",
        "contamination_command",
    ),
    "study": Command(
        "",
        "find which mechanisms matter for a task",
        "unisd.cli.study",
        "study_command",
    ),
    "report": Command(
        "DIR ...",
        "show a run, several runs or a study as an HTML page",
        "unisd.cli.report",
        "report_command",
    ),
    "recipes": Command(
        "[NAME]", "list published methods, or print one as a file", "unisd.cli.recipes", "recipes_command"
    ),
    "merge": Command("DIR", "merge an adapter into a full model", "unisd.cli.merge", "merge_command"),
    "chat": Command("DIR", "talk with a model, with its base beside it", "unisd.cli.chat", "chat_command"),
    "completion": Command(
        "SHELL",
        "print a script for completion in a shell",
        "unisd.cli.completion",
        "completion_command",
    ),
}


def overview() -> str:
    """What there is, a line a command; what is longer than the terminal goes on below itself."""
    lines = [(f"{name} {command.usage}".rstrip(), command.help) for name, command in COMMANDS.items()]
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
        close = nearest(name, COMMANDS)
        hint = f"did you mean {close!r}?" if close else f"there are: {', '.join(COMMANDS)}."
        raise UserError(f"unknown command {name!r}: {hint}")
    if os.name != "posix":
        raise UserError("unisd runs on POSIX systems only: on Windows, use WSL.")
    command = COMMANDS[name]
    return int(getattr(import_module(command.module), command.function)(rest))


if __name__ == "__main__":
    sys.exit(main())
