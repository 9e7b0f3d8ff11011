"""From the command line and a YAML file to `RunOptions` and `UniSDConfig`.

Sources, later ones win: defaults < recipe < recipe's pocket overlay (model `pocket`) < task's
templates < `--config` < flags. `null` in a YAML file, or `none` for a number on the command line,
takes a recipe's value back.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unisd import recipes, tasks
from unisd.errors import UserError
from unisd.files import read_yaml
from unisd.options.option import declared
from unisd.options.parser import UNSET, OptionParser, Values, unset
from unisd.options.table import UniSDOptions
from unisd.run.options import RunOptions
from unisd.run.own_rows import check_columns

if TYPE_CHECKING:  # it imports torch, which help and the check of names do without
    from unisd.config import UniSDConfig


def train_parser(prog: str = "unisd train") -> OptionParser:
    """The parser of all options of a run, `--config`, `--help` and `--help_all`."""
    parser = OptionParser(RunOptions, UniSDOptions, prog=prog)
    parser.add_argument("--config", default=argparse.SUPPRESS)
    parser.add_argument("-h", "--help", action="store_true", default=argparse.SUPPRESS)
    parser.add_argument("--help_all", "--help-all", action="store_true", default=argparse.SUPPRESS)
    return parser


def parse(arguments: Sequence[str]) -> tuple[RunOptions, UniSDConfig]:
    """Resolve all sources.

    Raises:
        UserError: unknown key or flag, value out of range, contradictory options, unknown recipe or
            task.
    """
    parser = train_parser()
    return resolve(parser, given_by(parser, arguments), arguments)


def given_by(parser: OptionParser, arguments: Sequence[str]) -> Values:
    """What flags and the file of `--config` say; flags win.

    Raises:
        UserError: unknown key, flag or name, value of the wrong type.
    """
    given = parser.given(arguments)
    if "config" in given:
        path = Path(given.pop("config"))
        given = {**parser.from_dict(read_yaml(path), str(path)), **given}
    check_names(given)
    return given


def check_names(values: Mapping[str, Any]) -> None:
    """Check that the recipe, the tasks and the grader are there, and import nothing heavy.

    Raises:
        UserError: the first that is not, with the nearest name.
    """
    from unisd.tasks.graders import get_grader

    def named(option: str) -> list[str]:
        value = values.get(option)
        return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]

    for option, check in (("recipe", recipes.load), ("task", tasks.check_name), ("grader", get_grader)):
        for name in named(option):
            check(name)


def shared_names(command: str) -> list[str]:
    """The options of `unisd train` that another command takes too."""
    return [
        item.name
        for kind in (RunOptions, UniSDOptions)
        for item in declared(kind)
        if command in item.metadata["shared"]
    ]


def shared_options(command: str) -> OptionParser:
    """These options, as a parent of the command's parser; `resolve_shared` reads what was given."""
    return OptionParser(RunOptions, UniSDOptions, only=shared_names(command))


def resolve_shared(own: argparse.Namespace, command: str) -> tuple[RunOptions, UniSDConfig]:
    """As `parse`, of the shared options among a command's own arguments."""
    names = shared_names(command)
    return resolve(
        train_parser(f"unisd {command}"),
        {name: unset(value) for name, value in vars(own).items() if name in names},
    )


def check_own_rows(parser: OptionParser, given: Values) -> None:
    """Look at the columns of the user's own files, before anything heavy is imported.

    Raises:
        UserError: unknown recipe, contradictory options, or all that is wrong with the columns of a
            file.
    """
    named = _without_unset(given)
    if "train_file" not in named:
        return
    recipe = recipes.load(named.get("recipe", recipes.DEFAULT))
    known = {name: value for name, value in recipe.options.items() if name in parser.fields}
    values = _without_unset({**parser.from_dict(known, str(recipe.files[0])), **given})
    of_run, of_training = (
        {item.name: values[item.name] for item in declared(kind) if item.name in values}
        for kind in (RunOptions, UniSDOptions)
    )
    options = RunOptions(**of_run)
    options.check()
    check_columns(options, UniSDOptions(**of_training).uses_reference)


def resolve(
    parser: OptionParser, given: Values, arguments: Sequence[str] = ()
) -> tuple[RunOptions, UniSDConfig]:
    """Layer what was `given` over the recipe's and the task's values (see the module's
    docstring).
    """
    named = _without_unset(given)
    if not any(name in named for name in ("task", "train_file", "dataset_name")):
        given = {**given, "task": "pocket"}
    recipe = recipes.load(named.get("recipe", recipes.DEFAULT))
    values = parser.from_dict(recipe.options, str(recipe.files[0]))
    if named.get("model_name_or_path", "pocket") == "pocket":
        values |= parser.from_dict(recipe.pocket, str(recipe.files[0]))
    if "num_train_epochs" in named and "max_steps" not in named:  # which would win over it
        values.pop("max_steps", None)
    of_run = {item.name for item in declared(RunOptions)}
    explicit = frozenset(named)

    def run_options(values: Values) -> RunOptions:
        own = {name: value for name, value in _without_unset(values).items() if name in of_run}
        return RunOptions(**own, explicit=explicit, command=tuple(arguments), values=values)

    options = run_options(given)
    options.check()
    values |= _task_values(options)

    from unisd.config import UniSDConfig, layered

    values = layered(values, given)
    options = run_options(values)
    if not options.use_peft and (lora := sorted(name for name in named if name.startswith("lora_"))):
        raise UserError(f"{lora[0]} belongs to an adapter: add --use_peft, or unset it.")
    chosen = {name: value for name, value in values.items() if name not in of_run}
    try:
        return options, UniSDConfig(**{"disable_tqdm": True, **_without_unset(chosen)})
    except UserError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from None


def _without_unset(values: Values) -> Values:
    return {name: value for name, value in values.items() if value is not UNSET}


def _task_values(options: RunOptions) -> Values:
    """What the task sets by default: its prompts and the cap of its answers."""
    if options.task is None:
        return {}
    from unisd.run.inputs import get_task

    task = get_task(options)
    values: Values = {"eval_max_new_tokens": task.max_new_tokens}
    for name in ("teacher_prompt_template", "auxiliary_prompt_template"):
        template = getattr(task, name)
        if template is not None:
            values[name] = template
    return values
