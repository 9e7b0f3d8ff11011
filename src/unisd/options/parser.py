"""From flags and mappings to the values of declared options.

transformers' own options beside ours are known by name from its source; transformers itself is
imported only where one of them is used.
"""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from unisd.errors import UserError, by_caller, nearest
from unisd.files import parsed
from unisd.options.option import declared

Values = dict[str, Any]
UNSET: Any = object()
SHORT = {"model_name_or_path": "--model"}
"""Shorter names of options on the command line."""
_TRUTH = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}


@cache
def inherited_names() -> frozenset[str]:
    """The options of transformers' `TrainingArguments`, read from its source."""
    package = importlib.util.find_spec("transformers")
    assert package is not None and package.submodule_search_locations is not None
    source = Path(package.submodule_search_locations[0], "training_args.py").read_text(encoding="utf-8")
    kinds = {item.name: item for item in ast.parse(source).body if isinstance(item, ast.ClassDef)}
    return frozenset(
        item.target.id
        for item in kinds["TrainingArguments"].body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    )


class OptionParser(argparse.ArgumentParser):
    """Flags of declared options; reports only what was given, and errors as `UserError`.

    Args:
        kinds: dataclasses whose options are taken.
        only: the options to take; None: all, and transformers' other ones.
    """

    def __init__(self, *kinds: type, prog: str = "unisd train", only: Collection[str] | None = None) -> None:
        super().__init__(prog=prog, add_help=False, allow_abbrev=False)
        self.fields: dict[str, dataclasses.Field[Any]] = {}
        self._inherits = only is None
        self.also: set[str] = set()  # names of other flags of the command, for hints
        for kind in kinds:
            hints = get_type_hints(kind)
            for item in declared(kind):
                if only is None or item.name in only:
                    self._add(item, hints[item.name], _add_flag)

    def _add(self, item: dataclasses.Field[Any], hint: Any, add: Callable[..., None]) -> None:
        self.fields[item.name] = item
        known = len(self._actions)
        add(self, item, hint)
        for action in self._actions[known:]:
            action.default = argparse.SUPPRESS
            action.required = False
            # shown by commands that share the option
            action.help = str(item.metadata.get("help") or "").replace("%", "%%")
            if NoneType in get_args(hint) and action.type in (int, float):
                action.type = _or_none(action.type)
            if item.name == "resume_from_checkpoint":  # alone it means: the newest checkpoint
                action.nargs, action.const = "?", "true"

    def add_inherited(self) -> None:
        """Take all of transformers' options, by its own conversion; imports it, and says so."""
        from unisd.console import loading

        known = "transformers.training_args" in sys.modules
        with nullcontext() if known else loading("the options of transformers"):
            from transformers import HfArgumentParser, TrainingArguments

        def add(parser: argparse.ArgumentParser, item: dataclasses.Field[Any], hint: Any) -> None:
            described = copy.copy(item)
            described.type = hint
            described.metadata = {}  # type: ignore[assignment]  # it would go to argparse
            HfArgumentParser._parse_dataclass_field(parser, described)

        hints = get_type_hints(TrainingArguments)
        for item in dataclasses.fields(TrainingArguments):
            if item.init and item.name not in self.fields:
                self._add(item, hints[item.name], add)

    def _inherited(self, flag: str) -> bool:
        """Whether `flag` is one of transformers' that was not added yet."""
        name = flag.lstrip("-").partition("=")[0].replace("-", "_")
        names = {name, name.removeprefix("no_")}
        return self._inherits and names.isdisjoint(self.fields) and not names.isdisjoint(inherited_names())

    def error(self, message: str) -> Any:
        flag, colon, reason = message.removeprefix("argument ").partition(": ")
        raise UserError(
            f"{flag.split('/')[0]}{colon}{reason.replace('_or_none', 'number')} (see {self.prog} --help)."
        )

    def given(self, arguments: Sequence[str]) -> Values:
        """The values given in `arguments`, by name.

        Raises:
            UserError: unknown flag, with the nearest one; value of the wrong type.
        """
        refuse_repeats(self, arguments)
        namespace, unknown = self.parse_known_args(list(arguments))
        flags = [word for word in unknown if word.startswith("--")]
        strangers = [flag for flag in flags if not self._inherited(flag)]
        if flags and not strangers:
            self.add_inherited()
            refuse_repeats(self, arguments)
            namespace, unknown = self.parse_known_args(list(arguments))
        if unknown:
            self._refuse(strangers[0] if strangers and unknown[0].startswith("--") else unknown[0])
        return {name: unset(value) for name, value in vars(namespace).items()}

    def _refuse(self, word: str) -> None:
        if not word.startswith("-"):
            raise UserError(
                f"{word!r} belongs to no flag: options are given as --name value (see {self.prog} --help)."
            )
        flag = word.partition("=")[0]
        raise UserError(f"unknown flag {flag}: {self._hint(flag.lstrip('-').replace('-', '_'), '--')}")

    def from_dict(self, values: Mapping[str, Any], where: str) -> Values:
        """The same for a mapping (of a YAML file), with the flags' type conversion: PyYAML reads
        1e-3 as a string.

        Raises:
            UserError: unknown key, with the nearest one; value of the wrong type; both name
                `where`.
        """
        result: Values = {}
        for name, value in values.items():
            if name not in self.fields and not (self._inherits and name in inherited_names()):
                hint = "a file does not name another." if name == "config" else self._hint(str(name))
                raise UserError(f"{where}: unknown key {name!r}: {hint}")
            if value is None or value == []:
                result[name] = UNSET if value is None else []
                continue
            try:
                result |= self.given(_as_flag(name, value))
            except UserError as error:  # of a flag, which a file has not
                text = str(error).removeprefix("--").replace(f" (see {self.prog} --help)", "")
                raise UserError(f"{where}: {text}") from None
        return result

    def _hint(self, name: str, prefix: str = "") -> str:
        known = {*self.fields, *(inherited_names() if self._inherits else ())}
        if prefix:
            known.add("config")  # a file does not name another
        close = nearest(name, known | self.also)
        lists = by_caller("unisd train --help_all", "help(UniSDConfig)")
        return f"did you mean {prefix}{close}?" if close else f"{lists} lists them all."


def refuse_repeats(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Raise `UserError` for a flag that is given twice, in any spelling: argparse would drop the
    first.
    """
    seen: dict[str, str] = {}
    for word in arguments:
        flag = word.partition("=")[0]
        action = parser._option_string_actions.get(flag)
        if action is None or not flag.startswith("--") or isinstance(action, argparse._AppendAction):
            continue
        if action.dest in seen:
            earlier = seen[action.dest]
            what = (
                f"{flag} is given twice" if earlier == flag else f"{earlier} and {flag} set the same option"
            )
            several = f" ({flag} A B gives several values)" if action.nargs in ("+", "*") else ""
            raise UserError(f"{what}: give one of them{several}.")
        seen[action.dest] = flag


def _add_flag(parser: argparse.ArgumentParser, item: dataclasses.Field[Any], hint: Any) -> None:
    """Add the flag of a declared option; one that is on by default gets `--no_NAME` too."""
    flags = [f"--{item.name}"]
    if "_" in item.name:
        flags.append(f"--{item.name.replace('_', '-')}")
    if item.name in SHORT:
        flags.append(SHORT[item.name])
    kinds = (
        [kind for kind in get_args(hint) if kind is not NoneType] if isinstance(hint, UnionType) else [hint]
    )
    kind = str if str in kinds else kinds[0]
    if kind is bool:
        parser.add_argument(*flags, type=_truth, nargs="?", const=True)
        if item.default is True:
            off = [f"--no_{item.name}", f"--no-{item.name.replace('_', '-')}"]
            parser.add_argument(*off, action="store_false", dest=item.name)
    elif get_origin(kind) is Literal:
        parser.add_argument(*flags, choices=get_args(kind))
    elif lists := [kind for kind in kinds if get_origin(kind) is list]:
        parser.add_argument(*flags, type=get_args(lists[0])[0], nargs="+")
    elif get_origin(kind) is dict:
        parser.add_argument(*flags, type=json_mapping)
    else:
        parser.add_argument(*flags, type=kind)


def json_mapping(text: str) -> dict[str, Any]:
    """The value of a flag that takes several named values at once."""
    found = parsed(text)
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object such as {{"name": false}}')
    return found


def _truth(text: str) -> bool:
    try:
        return _TRUTH[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false") from None


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """`kind`, or `none` to take a recipe's value back."""

    def number_or_none(text: str) -> Any:
        return UNSET if text.lower() in ("none", "null") else kind(text)

    # argparse puts the name into its errors
    number_or_none.__name__ = f"{getattr(kind, '__name__', 'value')}_or_none"
    return number_or_none


def unset(value: Any) -> Any:
    """`value`, or `UNSET` for a list that holds nothing else."""
    return UNSET if isinstance(value, list) and value == [UNSET] else value


def _as_flag(name: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        if name == "columns":
            quoted = {ours: f'"{theirs}"' if "," in str(theirs) else theirs for ours, theirs in value.items()}
            return [f"--columns={','.join(f'{ours}={theirs}' for ours, theirs in quoted.items())}"]
        return [f"--{name}={json.dumps(value)}"]
    if value is False:  # what YAML makes of `no`, which some options have among their choices
        value = "no"
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value}"]
