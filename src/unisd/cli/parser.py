"""What the commands' parsers share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unisd.errors import UserError
from unisd.files import why_unwritable
from unisd.options.option import nearest
from unisd.options.parser import json_mapping, refuse_repeats


class CommandParser(argparse.ArgumentParser):
    """argparse, with mistakes as `UserError`.

    Args:
        shared: options of `unisd train` that the command takes too (`resolve.shared_options`).
    """

    def __init__(self, command: str, description: str, shared: argparse.ArgumentParser | None = None) -> None:
        parents = [] if shared is None else [shared]
        super().__init__(
            prog=f"unisd {command}", description=description, allow_abbrev=False, parents=parents
        )

    def error(self, message: str) -> Any:
        raise UserError(f"{message} (see {self.prog} --help).")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace | None:
        """The values of all arguments; None after `--help`.

        Raises:
            UserError: unknown flag, with the nearest one; value of the wrong type.
        """
        refuse_repeats(self, arguments)
        try:
            found, unknown = self.parse_known_args(list(arguments))
        except SystemExit:
            return None
        flag = next((word.partition("=")[0] for word in unknown if word.startswith("--")), None)
        if flag is not None:
            known = [known.removeprefix("--") for known in self._option_string_actions]
            close = nearest(flag.removeprefix("--").replace("-", "_"), known)
            hint = f"did you mean --{close}?" if close else f"{self.prog} --help lists them all."
            raise UserError(f"unknown flag {flag}: {hint}")
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found


def at_least_one(**values: int | None) -> None:
    """Refuse a number below 1, by its flag."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: at least 1 is needed.")


def add_trust(parser: CommandParser) -> None:
    """The flag of commands that load a model without `unisd train`'s options."""
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")


def add_template_options(parser: CommandParser) -> None:
    """The flag of commands that render prompts without `unisd train`'s options."""
    parser.add_argument(
        "--chat_template_kwargs",
        type=json_mapping,
        metavar="JSON",
        help="options of the chat template (default: those kept with the tokenizer)",
    )


def output_file(text: str) -> Path:
    """Type of a flag that names a file to write: refused before any work if it cannot be
    written.
    """
    path = Path(text)
    if path.is_dir():
        reason: str | None = "it is a folder"
    elif path.exists():  # a device too
        reason = None if os.access(path, os.W_OK) else "permission denied"
    else:
        reason = why_unwritable(path.parent)
    if reason is not None:
        raise argparse.ArgumentTypeError(f"{path} cannot be written ({reason})")
    return path
