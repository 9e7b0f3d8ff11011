"""`unisd train`: options in, a run or a dry run out."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from unisd.cli.help import help_text
from unisd.console import loading_libraries, make_console, show_table
from unisd.run.options import RunOptions
from unisd.run.resolve import check_own_rows, given_by, resolve, train_parser

if TYPE_CHECKING:  # heavy: imported where the work begins, so that help and mistakes answer at once
    from unisd.config import UniSDConfig

HELP, HELP_ALL = {"-h", "--help"}, {"--help_all", "--help-all"}


def train_command(arguments: Sequence[str]) -> int:
    """Train, or with --dry_run tell what would be; returns the exit code.

    Raises:
        UserError: as `run.train.train`.
    """
    parser = train_parser()
    if (HELP | HELP_ALL) & set(arguments):
        print(help_text(parser, everything=bool(HELP_ALL & set(arguments))), end="")
        return 0
    given = given_by(parser, arguments)  # misspelt names are told before anything heavy is imported
    check_own_rows(parser, given)
    with loading_libraries():
        options, config = resolve(parser, given, arguments)
        from unisd.run import launch
        from unisd.run.train import train

    if options.accelerate_config is not None and not options.dry_run and not launch.is_launched():
        return launch.launch(options, str(config.output_dir))
    if options.dry_run:
        dry_run(options, config)
        return 0
    ended = train(options, config) is not None
    launch.leave()
    return 0 if ended else 130


def dry_run(options: RunOptions, config: UniSDConfig) -> None:
    """Check everything that `train` would, and print what would run, an example and the memory.

    Writes nothing.

    Raises:
        UserError: as `train`.
    """
    from unisd import memory
    from unisd.run import outputs
    from unisd.run.inputs import load_data
    from unisd.run.launch import shards_of
    from unisd.run.train import OPTION_HEAD, _introduce, changes_since, longest_prompt, set_up
    from unisd.training.checkpoints import last_complete_checkpoint
    from unisd.training.preflight import check_hub

    console, shards = make_console(), shards_of(options)
    data = load_data(options, config.seed, needs_reference=config.uses_reference)
    folder, checkpoint = outputs.choose_output_dir(options, config, data.name, reserve=False)
    with tempfile.TemporaryDirectory() as nowhere:  # the Trainer makes its folder at construction
        newest = last_complete_checkpoint(folder) if checkpoint is True else checkpoint
        dry = config.changed(
            "dry run: nothing is written",
            output_dir=nowhere,
            push_to_hub=False,
            resume_from_checkpoint=None if newest is None else str(newest),
        )
        check_hub(config)
        setting = set_up(options, dry, data, console)
        config = setting.config.changed(
            "what a run would have", output_dir=str(folder), push_to_hub=config.push_to_hub
        )
        if options.verbose:
            show_table(console, OPTION_HEAD, outputs.option_lines(options, config))
        _introduce(console, options, config, setting, whole=options.verbose)
        say = partial(console.print, markup=False, highlight=False)
        for line in changes_since(setting, folder, checkpoint):
            say(f"resuming: {line}")
    sizes = memory.estimate(
        memory.ModelSize.of(setting.trainer.model), config, longest_prompt(setting.trainer), shards=shards
    )
    readable = {name.replace("_", " "): memory.readable(size) for name, size in sizes.items()}
    if options.verbose:
        show_table(console, ("memory of one device", "estimate"), [[*item] for item in readable.items()])
    else:
        given = {
            k: v for k, v in outputs.resolved(options, config).items() if k in options.explicit - {"dry_run"}
        }
        say("given: " + (", ".join(f"{name}={value}" for name, value in given.items()) or "no option"))
        say(f"memory of one device: about {readable['total']}")
    say(f"output folder: {folder}")
    further = (
        "" if options.verbose else "; --verbose shows all options, the whole example, parts of the memory"
    )
    say(f"dry run: nothing was trained, nothing was written{further}")
