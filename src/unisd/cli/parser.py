"""What the commands' parsers share."""

from __future__ import annotations

import argparse
import copy
import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from unisd.errors import UserError, nearest
from unisd.files import REPORT, why_unwritable, written_in
from unisd.options.parser import OptionParser, json_mapping, refuse_repeats
from unisd.run.resolve import check_names

MODEL, DATA, MEASURED, OUTPUT = "model", "data", "what is measured", "output"
"""Headings of help, in this order."""


class _Help(argparse.HelpFormatter):
    """One line an option: its first name, and one short word for its value."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [name for name in action.option_strings if name.startswith("--")][:1]
        if action.const is True:  # it needs no value
            shown.nargs = 0
        return super()._format_action_invocation(shown)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return action.dest.rpartition("_")[2].upper()


class CommandParser(argparse.ArgumentParser):
    """argparse, with mistakes as `UserError`, and with help that has a line an option.

    An option may have older names: they come after the first, and work without being shown.

    Args:
        shared: options of `unisd train` that the command takes too (`resolve.shared_options`).
        heading: where help shows those that are neither of the model nor of the data.
    """

    def __init__(
        self, command: str, description: str, shared: OptionParser | None = None, heading: str = MEASURED
    ) -> None:
        super().__init__(
            prog=f"unisd {command}", description=description, allow_abbrev=False, formatter_class=_Help
        )
        for title in (MODEL, DATA, heading, OUTPUT):
            self.under(title)
        if shared is not None:
            for action in shared._actions:
                group = str(shared.fields[action.dest].metadata["group"])
                self.under(group if group in (MODEL, DATA) else heading)._add_action(action)

    def under(self, title: str) -> argparse._ArgumentGroup:
        """The part of help with this heading, to add options to."""
        known = (group for group in self._action_groups if group.title == title)
        return next(known, None) or self.add_argument_group(title)

    def format_help(self) -> str:
        """The help page; its usage names what has no flag, and not all flags."""
        shown = [action for action in self._get_positional_actions() if action.help != argparse.SUPPRESS]
        places = [f"[{action.metavar}]" if action.nargs == "?" else str(action.metavar) for action in shown]
        self.usage = " ".join([self.prog, *places, "[--OPTION VALUE ...]"])
        return super().format_help()

    def error(self, message: str) -> Any:
        names, colon, reason = message.partition(": ")
        if names.startswith("argument "):  # one name of the option is enough
            message = f"{names.split('/')[0]}{colon}{reason}"
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
            shown = {name for action in self._actions for name in action.option_strings[:1]} | {"--help"}
            known = [name.removeprefix("--") for name in shown if name.startswith("--")]
            close = nearest(flag.removeprefix("--").replace("-", "_"), known)
            hint = f"did you mean --{close}?" if close else f"{self.prog} --help lists them all."
            raise UserError(f"unknown flag {flag}: {hint}")
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        given = vars(found)
        check_names(given)
        outputs = {
            action.dest: given.get(action.dest) for action in self._actions if action.type is output_file
        }
        inputs = {name: value for name, value in given.items() if name not in outputs}
        refuse_inputs({f"--{name}": path for name, path in outputs.items()}, inputs.values())
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


def refuse_inputs(outputs: Mapping[str, object], inputs: Iterable[object]) -> None:
    """Refuse to write over what is read, before any of it is lost.

    Args:
        outputs: the files that will be written, by their flags; None: none.
        inputs: values of other flags and options, whatever they are: files, folders, patterns of
            files, `TASK=FILE`, lists of these. Of a folder what a run has written there is read.

    Raises:
        UserError: an output is one of them, or two outputs are one file.
    """
    if all(path is None for path in outputs.values()):
        return  # what is read need not be looked for
    read = {place: name for value in inputs for name in _texts(value) for place in _files(name)}
    written: dict[Path, str] = {}
    for flag, path in outputs.items():
        if path is None:
            continue
        place = Path(str(path)).expanduser().resolve()
        if place in read:
            raise UserError(f"{flag} {path} is a file that is read ({read[place]}): choose another name.")
        if place in written and (place.is_file() or not place.exists()):  # no device
            raise UserError(f"{flag} {path} is written by {written[place]} too: choose another name.")
        written[place] = flag


def _texts(value: object) -> list[str]:
    """The texts that an option's value holds."""
    if isinstance(value, (list, tuple)):
        return [text for one in value for text in _texts(one)]
    if isinstance(value, (str, Path)) and str(value) and "\0" not in str(value):
        return [str(value), *str(value).split("=", 1)[1:]]
    return []


def _files(name: str) -> Iterator[Path]:
    """The files that a name stands for."""
    path = Path(name).expanduser()
    with suppress(OSError, ValueError):
        if path.is_dir():
            from unisd.study.store import ATTEMPTS, RUNS

            kept = (*written_in(path), path / RUNS, path / ATTEMPTS)
            yield from (one.resolve() for one in kept if one.name != REPORT)
        elif path.is_file():
            yield path.resolve()
        elif glob.has_magic(name):
            yield from (Path(one).resolve() for one in glob.glob(str(path)))  # noqa: PTH207 (absolute ones)


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
