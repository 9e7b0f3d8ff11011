"""From the command line and a YAML file to `RunOptions` and `UniSDConfig`.

Sources, later ones win: defaults < recipe < recipe's pocket overlay (model `pocket`) < task's
templates < `--config` < flags. `null` in a YAML file, or `none` for a number on the command line,
takes a recipe's value back.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from transformers import HfArgumentParser

from unisd import recipes
from unisd.config import GROUPS, UniSDConfig
from unisd.data import contexts, negatives
from unisd.errors import UserError
from unisd.files import read_yaml
from unisd.methods.divergence import divergence_bound
from unisd.run.options import RUN_GROUPS, RunOptions

Values = dict[str, Any]
UNSET: Any = object()
BOUNDED_QUANTILE = 0.99  # clips a bounded divergence, in place of a recipe's static clip
# Of transformers' options, those that `--help` shows without being asked for all of them.
COMMON = (
    "output_dir", "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "bf16", "seed", "logging_steps",
    "eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint", "report_to",
    "push_to_hub", "hub_model_id",
)  # fmt: skip


class OptionParser(HfArgumentParser):  # type: ignore[misc]
    """Flags of dataclasses, by transformers' own conversion; reports only what was given, and
    errors as `UserError`.

    Args:
        only: the options to take; None: all.
    """

    def __init__(self, *kinds: type, prog: str = "unisd train", only: Collection[str] | None = None) -> None:
        super().__init__(prog=prog, add_help=False, allow_abbrev=False)
        self.fields: dict[str, dataclasses.Field[Any]] = {}
        for kind in kinds:
            hints = get_type_hints(kind)
            for item in dataclasses.fields(kind):
                if item.init and (only is None or item.name in only):
                    self._add(item, hints[item.name])

    def _add(self, item: dataclasses.Field[Any], hint: Any) -> None:
        self.fields[item.name] = item
        described = copy.copy(item)
        described.type = hint
        # argparse gets no metadata: our groups are not its business, and help is printed by
        # `help_text`.
        described.metadata = {}  # type: ignore[assignment]
        known = len(self._actions)
        self._parse_dataclass_field(self, described)
        for action in self._actions[known:]:
            action.default = argparse.SUPPRESS
            action.required = False
            # shown by commands that share the option
            action.help = str(item.metadata.get("help") or "").replace("%", "%%")
            if type(None) in get_args(hint) and action.type in (int, float):
                action.type = _or_none(action.type)
            if item.name == "resume_from_checkpoint":  # alone it means: the newest checkpoint
                action.nargs, action.const = "?", "true"

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
        namespace, unknown = self.parse_known_args(list(arguments))
        if unknown:
            flag = unknown[0]
            name = flag.lstrip("-").partition("=")[0].replace("-", "_")
            if not flag.startswith("-"):
                raise UserError(
                    f"{flag!r} belongs to no flag: options are given as --name value (see {self.prog}"
                    " --help)."
                )
            raise UserError(f"unknown flag {flag.partition('=')[0]}: {self._nearest(name, '--')}")
        return {name: _unset(value) for name, value in vars(namespace).items()}

    def from_dict(self, values: Values, where: str) -> Values:
        """The same for a mapping (of a YAML file), with the flags' type conversion: PyYAML reads
        1e-3 as a string.

        Raises:
            UserError: unknown key, with the nearest one; value of the wrong type; both name
                `where`.
        """
        result: Values = {}
        for name, value in values.items():
            if name not in self.fields:
                hint = "a file does not name another." if name == "config" else self._nearest(str(name))
                raise UserError(f"{where}: unknown key {name!r}: {hint}")
            if value is None or value == []:
                result[name] = UNSET if value is None else []
                continue
            try:
                result |= self.given(_as_flag(name, value))
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        return result

    def _nearest(self, name: str, prefix: str = "") -> str:
        known = [*self.fields, "config"] if prefix else self.fields  # a file does not name another
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        return f"did you mean {prefix}{close[0]}?" if close else f"{self.prog} --help_all lists them all."


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """`kind`, or `none` to take a recipe's value back."""

    def number_or_none(text: str) -> Any:
        return UNSET if text.lower() in ("none", "null") else kind(text)

    # argparse puts the name into its errors
    number_or_none.__name__ = f"{getattr(kind, '__name__', 'value')}_or_none"
    return number_or_none


def _unset(value: Any) -> Any:
    return UNSET if isinstance(value, list) and value == [UNSET] else value


def _as_flag(name: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        if name == "columns":
            return [f"--columns={','.join(f'{ours}={theirs}' for ours, theirs in value.items())}"]
        return [f"--{name}={json.dumps(value)}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value}"]


def train_parser(prog: str = "unisd train") -> OptionParser:
    """The parser of all options of a run, `--config`, `--help` and `--help_all`."""
    parser = OptionParser(RunOptions, UniSDConfig, prog=prog)
    parser.add_argument("--config", default=argparse.SUPPRESS)
    parser.add_argument("-h", "--help", action="store_true", default=argparse.SUPPRESS)
    parser.add_argument("--help_all", "--help-all", action="store_true", default=argparse.SUPPRESS)
    return parser


def parse(arguments: Sequence[str], prog: str = "unisd train") -> tuple[RunOptions, UniSDConfig]:
    """Resolve all sources.

    Raises:
        UserError: unknown key or flag, value out of range, contradictory options, unknown recipe or
            task.
    """
    parser = train_parser(prog)
    flags = parser.given(arguments)
    file: Values = {}
    if "config" in flags:
        path = Path(flags.pop("config"))
        file = parser.from_dict(read_yaml(path), str(path))
    given = {**file, **flags}
    return resolve(parser, given, arguments)


def shared_options(names: Collection[str]) -> OptionParser:
    """Some options of `unisd train`, as a parent of another command's parser; `resolve_shared`
    reads what was given of them.
    """
    return OptionParser(RunOptions, UniSDConfig, only=names)


def resolve_shared(
    own: argparse.Namespace, names: Collection[str], prog: str
) -> tuple[RunOptions, UniSDConfig]:
    """As `parse`, of the shared options among a command's own arguments."""
    return resolve(
        train_parser(prog), {name: _unset(value) for name, value in vars(own).items() if name in names}
    )


def resolve(
    parser: OptionParser, given: Values, arguments: Sequence[str] = ()
) -> tuple[RunOptions, UniSDConfig]:
    """Layer what was `given` over the recipe's and the task's values (see the module's
    docstring).
    """
    named = _without_unset(given)
    model = named.get("model_name_or_path", "pocket")
    recipe = recipes.load(named.get("recipe", recipes.DEFAULT))
    values = parser.from_dict(recipe.options, str(recipe.file))
    if model == "pocket":
        values |= parser.from_dict(recipe.pocket, str(recipe.file))
    own = {item.name for item in dataclasses.fields(RunOptions)}
    options = RunOptions(**{name: value for name, value in named.items() if name in own})
    _check_sources(options)
    values |= _task_values(options)
    _drop_excluded(values, given)
    values = _without_unset({**values, **given})
    options = RunOptions(**{name: value for name, value in values.items() if name in own})
    options.explicit = frozenset(named)
    if not options.use_peft and (lora := sorted(name for name in named if name.startswith("lora_"))):
        raise UserError(f"{lora[0]} belongs to an adapter: add --use_peft, or unset it.")
    options.command = tuple(arguments)
    try:
        config = UniSDConfig(**{"disable_tqdm": True, **{n: v for n, v in values.items() if n not in own}})
    except UserError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from None
    return options, config


def _without_unset(values: Values) -> Values:
    return {name: value for name, value in values.items() if value is not UNSET}


def _check_sources(options: RunOptions) -> None:
    sources = [name for name in ("task", "train_file", "dataset_name") if getattr(options, name) is not None]
    if len(sources) > 1:
        raise UserError(f"{' and '.join(sources)} exclude each other: give one source of training rows.")
    if not sources:
        options.task = "pocket"
    if options.task is None:
        for name in ("noise", "reference_style", "data_files", "task_options"):
            if getattr(options, name) is not None:
                raise UserError(f"{name} belongs to a task: unset it, or give --task.")
    else:
        for name in ("columns", "grader", "eval_file", "dataset_config"):
            if getattr(options, name) is not None and (name, options.task) != ("grader", "jsonl"):
                raise UserError(
                    f"{name} belongs to your own rows: unset it, or give --train_file instead of a task."
                )
    for name, kinds in (("agreement_contexts", contexts.KINDS), ("negatives", negatives.KINDS)):
        if getattr(options, name) not in kinds:
            raise UserError(f"{name}={getattr(options, name)!r} is not one of: {', '.join(kinds)}.")
    if options.num_processes is not None and options.accelerate_config is None:
        raise UserError(
            "num_processes belongs to accelerate_config: unset it, or give --accelerate_config ddp."
        )
    if options.load_in_4bit and not options.use_peft:
        raise UserError("load_in_4bit needs use_peft: 4-bit weights cannot be trained themselves.")
    for name in ("max_train_rows", "max_eval_rows", "lora_r", "lora_alpha", "num_processes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be 1 or more.")
    if not 0 <= options.lora_dropout < 1:
        raise UserError(f"lora_dropout={options.lora_dropout} must be 0 or more and below 1.")


def _task_values(options: RunOptions) -> Values:
    """What the task sets by default: its prompts and the cap of its answers."""
    if options.task is None:
        return {}
    from unisd.run.inputs import get_task

    task = get_task(options)
    values: Values = {"task": options.task, "eval_max_new_tokens": task.max_new_tokens}
    for name in ("teacher_prompt_template", "auxiliary_prompt_template"):
        template = getattr(task, name)
        if template is not None:
            values[name] = template
    return values


def _drop_excluded(values: Values, given: Values) -> None:
    """What the user asks for wins over what the recipe set in its place; both given stay, and are
    refused.
    """
    for one, other in (("token_clip", "token_clip_quantile"), ("token_clip_quantile", "token_clip")):
        if given.get(one, UNSET) is not UNSET and other not in given:
            values.pop(other, None)
    alpha: Any = given.get("distillation_alpha")
    clip: Any = values.get("token_clip")
    both = isinstance(alpha, float) and isinstance(clip, float) and "token_clip" not in given
    if both and 0 < alpha < 1 and clip >= divergence_bound(alpha):
        del values["token_clip"]  # it could never bind
        values["token_clip_quantile"] = BOUNDED_QUANTILE


def group_of(name: str, item: dataclasses.Field[Any]) -> str:
    """The heading under which help shows an option."""
    return str(item.metadata.get("group") or ("training" if name in COMMON else "inherited"))


HEADINGS = (*RUN_GROUPS, *GROUPS, "training", "inherited")
