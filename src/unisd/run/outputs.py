"""Chooses the output folder of a run without losing anything, and writes its model card."""

from __future__ import annotations

import logging
import re
import shlex
import shutil
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from unisd import __version__
from unisd.config import UniSDConfig
from unisd.console import markdown_table
from unisd.errors import UserError
from unisd.files import (
    CONFIG,
    METRICS,
    OF_A_RUN,
    RESULTS,
    check_not_the_model,
    check_writable,
    write_whole,
    written_in,
)
from unisd.models.load import POCKET, SMOLLM2
from unisd.monitoring.alarms import silence
from unisd.options.option import declared
from unisd.options.parser import UNSET, Values
from unisd.options.table import GROUPS, UniSDOptions
from unisd.run.changes import HEAD
from unisd.run.citations import papers
from unisd.run.options import RUN_GROUPS, RunOptions
from unisd.training.checkpoints import (
    clear_staging,
    last_complete_checkpoint,
    require_optimizer,
    require_whole,
)

logger = logging.getLogger(__name__)
SCHEMA_VERSION = 2
DEFAULT_ROOT = "unisd-output"
RESUME = "--resume_from_checkpoint"
OVERWRITE = "--overwrite_output_dir"


def choose_output_dir(
    options: RunOptions, config: UniSDConfig, data_name: str, reserve: bool = True
) -> tuple[Path, str | bool | None]:
    """Choose the output folder, and the checkpoint to resume from.

    True is its newest whole checkpoint, None starts anew. A named folder without any checkpoint is
    started anew also when it was to be resumed: a scheduler gives the same command again, however
    far the run had come.

    Without `output_dir`, a run gets the first unused of `unisd-output/<recipe>-<model>-<data>`,
    `...-2`, `...-3`.

    Args:
        reserve: make that folder, so that no other run takes it; else nothing is made.

    Raises:
        UserError: a folder that holds another run, other files or the model itself, one that cannot
            be written, or nothing to resume from.
    """
    resume = str(config.resume_from_checkpoint or "")
    if resume.lower() in ("", "false", "none"):
        resume = ""
    newest = resume.lower() == "true"
    if resume and not newest and not Path(resume).is_dir():
        raise UserError(
            f"resume_from_checkpoint: {resume} is not a folder: give a checkpoint-N folder, or the flag"
            " without a value."
        )
    if "output_dir" in options.explicit:
        folder = Path(str(config.output_dir))
        _check_named(folder, options, resume)
    elif options.overwrite_output_dir:
        raise UserError("overwrite_output_dir needs a folder that you name: add --output_dir, or unset it.")
    elif newest:
        folder = _newest_interrupted(_candidates(options, data_name))
    elif resume:
        folder = Path(resume).parent
    else:
        check_writable(Path(DEFAULT_ROOT))
        candidates = _candidates(options, data_name)
        folder = next(path for path in candidates if (_made(path) if reserve else not path.exists()))
    _keep_foreign_config(folder)
    check_writable(folder)
    if newest:
        return folder, _has_checkpoint(folder) or None
    if resume:
        require_whole(resume, contents=False)
        require_optimizer(resume)
    return folder, resume or None


def _check_named(folder: Path, options: RunOptions, resume: str) -> None:
    """Refuse an output folder of the user's choice where something would be lost or mixed."""
    if options.model_name_or_path not in (POCKET, SMOLLM2):
        check_not_the_model(folder, options.model_name_or_path)
    goes_on = resume.lower() == "true" or (resume and Path(resume).resolve().parent == folder.resolve())
    if options.overwrite_output_dir:
        if goes_on:
            raise UserError(
                "overwrite_output_dir removes the checkpoint that resume_from_checkpoint continues"
                " from: give one of them."
            )
        _refuse_foreign(folder)
    elif not goes_on:
        _refuse_used(folder)


def _newest_interrupted(candidates: list[Path]) -> Path:
    found = [path for path in candidates if last_complete_checkpoint(path) and not (path / RESULTS).exists()]
    if not found:
        raise UserError(f"no interrupted run in {candidates[0].parent}: name its folder with --output_dir.")
    return found[-1]


def _has_checkpoint(folder: Path) -> bool:
    """Whether the run in a folder can be resumed from its newest checkpoint, or has to start anew.

    Raises:
        UserError: there is no run, or only checkpoints that are not complete.
    """
    if not any(folder.glob("checkpoint-*")):
        if (folder / RESULTS).exists() or not (folder / METRICS).exists():
            _refuse_used(folder)
        logger.warning("%s holds no checkpoint to resume from: the run starts from its first step.", folder)
        return False
    newest = last_complete_checkpoint(folder)
    if newest is None:
        raise UserError(
            f"{folder} holds no complete checkpoint to resume from: start without --resume_from_checkpoint."
        )
    require_optimizer(newest)
    return True


def resume_command(options: RunOptions, folder: str | Path) -> str:
    """The command that goes on with a run from its newest checkpoint.

    As it was given, with that checkpoint in place of an older one, and without a token.
    """
    words = list(options.command)
    for place in reversed(range(len(words))):
        flag = words[place].partition("=")[0].replace("-", "_")
        value = place + 1 < len(words) and "=" not in words[place] and not words[place + 1].startswith("--")
        if flag in (RESUME.replace("-", "_"), OVERWRITE.replace("-", "_")):
            del words[place : place + 1 + value]
        elif flag.startswith("__") and flag.endswith("_token"):
            words[place : place + 1 + value] = [f"{words[place].partition('=')[0]}=TOKEN"]
    if "output_dir" not in options.explicit:
        words += ["--output_dir", str(folder)]
    return f"unisd train {shlex.join([*words, RESUME])}"


def _candidates(options: RunOptions, data_name: str) -> list[Path]:
    parts = (Path(options.recipe).stem, Path(options.model_name_or_path).name or "model", data_name)
    name = "-".join(re.sub(r"[^\w.-]+", "_", part).strip("_") for part in parts)
    return [Path(DEFAULT_ROOT) / (name if number == 1 else f"{name}-{number}") for number in range(1, 10_000)]


def _refuse_used(folder: Path) -> None:
    if (folder / RESULTS).exists():
        raise UserError(
            f"{folder} holds the results of another run: choose another --output_dir, or"
            " --overwrite_output_dir."
        )
    if (folder / METRICS).exists() or any(folder.glob("checkpoint-*")):
        raise UserError(
            f"{folder} holds an unfinished run: continue with --resume_from_checkpoint, start over with"
            " --overwrite_output_dir, or choose another --output_dir."
        )
    # A run that was killed before its first step has left its options alone.
    if folder.is_dir() and any(path.name != CONFIG or not _is_of_a_run(path) for path in folder.iterdir()):
        raise UserError(
            f"{folder} holds other files, which a run might replace: choose another --output_dir."
        )


def _keep_foreign_config(folder: Path) -> None:
    path = folder / CONFIG
    if path.exists() and not _is_of_a_run(path):
        raise UserError(
            f"{path} was not written by a run, and a run writes its options there: give it another name, or"
            " choose another --output_dir."
        )


def _is_of_a_run(config: Path) -> bool:
    try:
        return config.read_bytes().startswith(CONFIG_HEAD.encode())
    except OSError:
        return False


def _refuse_foreign(folder: Path) -> None:
    """Overwriting replaces a run; what else has files of these names is not ours to remove."""
    is_run = any((folder / name).exists() for name in OF_A_RUN) or any(folder.glob("checkpoint-*"))
    is_run = is_run or _is_of_a_run(folder / CONFIG)
    if not is_run and (files := written_in(folder)):
        raise UserError(
            f"{folder} is not the folder of a run, but holds {files[0].name}, which a run would replace:"
            " choose another --output_dir."
        )


def _made(folder: Path) -> bool:
    """Whether this call has made the folder: of two runs, one only."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def clear_earlier_run(folder: Path) -> None:
    """Remove what a run writes, also one of another kind, and nothing else.

    A checkpoint of the old run must not be resumed by the new one, nor an adapter be opened with
    the new model.
    """
    for path in written_in(folder):
        path.unlink(missing_ok=True)
    clear_staging(folder)
    for path in folder.glob("checkpoint-*"):
        if path.is_dir() and (path / "trainer_state.json").exists():
            shutil.rmtree(path)


def resolved(options: RunOptions, config: UniSDConfig) -> dict[str, Any]:
    """Every option with its value in this run."""
    own = {item.name: getattr(options, item.name) for item in declared(options)}
    inherited: dict[str, Any] = config.to_dict()  # tokens are masked in it
    return {name: without_password(value) for name, value in {**own, **inherited}.items()}


def option_lines(options: RunOptions, config: UniSDConfig) -> list[list[str]]:
    """Name, group and value of all options but those that only transformers knows, by group.

    A star stands where the value is not the default.
    """
    values, lines = resolved(options, config), []
    items = [item for kind in (RunOptions, UniSDOptions) for item in declared(kind)]
    for group in (*RUN_GROUPS, *GROUPS[:-1]):  # without those inherited
        for item in (item for item in items if item.metadata["group"] == group):
            value = values[item.name]
            changed = "*" if value != item.default and value not in (None, [], ()) else ""
            lines.append([item.name, group, str(value).replace("\n", "\\n"), changed])
    return lines


def without_password(value: Any) -> Any:
    """An address without the user's name and password in it, also among others."""
    if isinstance(value, (list, tuple)):
        return [without_password(one) for one in value]
    if isinstance(value, dict):
        return {name: without_password(one) for name, one in value.items()}
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", value) if isinstance(value, str) else value


CONFIG_HEAD = "# A run of unisd"
"""How the `config.yaml` of a run begins: one that begins otherwise is the user's own."""
NOT_IN_CONFIG = {
    *("recipe", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run", "verbose")
}
"""Of a run's options, what its `config.yaml` leaves out: where it is, and whether it goes on."""
WHERE_ROWS_HAVE_NONE = "agreement_contexts"
"""An option that a recipe means for rows without contexts, and a user for all rows."""


def write_config(folder: Path, options: RunOptions, config: UniSDConfig) -> None:
    """Write `config.yaml`: what the user gave and the recipe sets, for the same run again.

    Without tokens and passwords. What the run took back of its recipe is written as it was.
    """
    taken_back = {change.name: change.after for change in config.changes}
    values: Values = {"recipe": options.recipe}
    head = [
        f"{CONFIG_HEAD} {__version__}. The same again: unisd train --config"
        f" {shlex.quote(str(folder / CONFIG))} --output_dir OTHER_FOLDER"
    ]
    for name, value in options.values.items():
        if name in NOT_IN_CONFIG:
            continue
        if name.endswith("_token"):
            head.append(f"# {name} was given, and is not written down")
        elif name == WHERE_ROWS_HAVE_NONE and name not in options.explicit:
            head.append(f"# {name} is the recipe's: {value}")
        else:
            values[name] = None if value is UNSET else _plain(taken_back.get(name, value))
    folder.mkdir(parents=True, exist_ok=True)
    body = yaml.safe_dump(without_password(values), sort_keys=False, allow_unicode=True)
    write_whole(folder / CONFIG, "\n".join([*head, body]))  # a file of nothing would be no run's


def _plain(value: Any) -> Any:
    """As YAML holds it; transformers' choices are enumerations."""
    return value.value if isinstance(value, Enum) else value


def _silence(results: dict[str, Any]) -> str:
    config = results["config"]
    return silence(
        results["steps"],
        config["alarm_window"],
        config["diagnostics"],
        config["diagnostics_probe_steps"] is not None,
        bool(results["retention"]),
    )


def model_card(
    results: dict[str, Any], options: RunOptions, config: UniSDConfig, lines: list[list[str]]
) -> str:
    """The README.md of the output folder."""
    hub_id = (
        options.model_name_or_path if re.fullmatch(r"[\w.-]+/[\w.-]+", options.model_name_or_path) else None
    )
    front = [
        "library_name: " + ("peft" if options.trains_adapter else "transformers"),
        "tags: [unisd, self-distillation]",
    ]
    if hub_id is not None and not Path(hub_id).exists():
        front.append(f"base_model: {hub_id}")
    load = (
        'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "THIS_FOLDER")'
        if options.trains_adapter
        else 'AutoModelForCausalLM.from_pretrained("THIS_FOLDER")'
    )
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "",
            f"# {results['model']} adapted to {results['task']} by self-distillation",
            "",
            (
                f"Recipe `{results['recipe']}`, seed {results['seed']}, trained with unisd {__version__}."
                " Every option is in `results.json`, every step in `metrics.jsonl`."
            ),
            "",
            *markdown_table(HEAD, lines),
            "",
            *(
                f"- alarm at step {alarm['step']}, {alarm['name']}: {alarm['text']}"
                for alarm in results["alarms"] or ()
            ),
            *([_silence(results)] if results["alarms"] == [] else []),
            "",
            (
                "Accuracies: greedy answers, 95 % Wilson intervals in brackets. Perplexities: corpus level."
                " One seed: differences within the intervals mean nothing."
            ),
            "",
            f"Load with transformers{' and peft' if options.trains_adapter else ''}: `{load}`",
            "",
            "Limits: measured on this task only; the model keeps its base's licence, knowledge and faults.",
            "",
            "Please cite what was used:",
            "",
            *(
                f"- {what}: [arXiv {paper}](https://arxiv.org/abs/{paper})"
                for paper, what in papers(results["recipe"], config).items()
            ),
            "",
        ]
    )
