"""`unisd train --dry_run`."""

from __future__ import annotations

import tempfile

from rich.console import Console

from unisd import memory
from unisd.cli.parsing import HEADINGS, group_of, train_parser
from unisd.config import UniSDConfig
from unisd.console import make_console, show_table
from unisd.run import outputs
from unisd.run.inputs import load_data
from unisd.run.launch import shards_of
from unisd.run.options import RunOptions
from unisd.run.train import _introduce, longest_prompt, set_up


def dry_run(options: RunOptions, config: UniSDConfig) -> None:
    """Check everything that `train` would, and print the resolved options, an example and sizes.

    Writes nothing.

    Raises:
        UserError: as `train`.
    """
    console, shards = make_console(), shards_of(options)
    data = load_data(options, config.seed)
    folder, _ = outputs.choose_output_dir(options, config, data.name, reserve=False)
    push, config.push_to_hub = config.push_to_hub, False
    with tempfile.TemporaryDirectory() as nowhere:  # the Trainer makes its folder at construction
        config.output_dir = nowhere
        setting = set_up(options, config, data, console)
        config.output_dir, config.push_to_hub = str(folder), push
        _show_options(console, options, config)
        _introduce(console, options, config, setting)
    sizes = memory.estimate(
        memory.ModelSize.of(setting.trainer.model), config, longest_prompt(setting.trainer), shards=shards
    )
    lines = [[name.replace("_", " "), memory.readable(size)] for name, size in sizes.items()]
    show_table(console, ("memory of one device", "estimate"), lines)
    console.print("dry run: nothing was trained, nothing was written", markup=False)


def _show_options(console: Console, options: RunOptions, config: UniSDConfig) -> None:
    """All options but those that only transformers knows, with a star where they are not the
    default.
    """
    values = outputs.resolved(options, config)
    lines = []
    fields = train_parser().fields
    for heading in HEADINGS[:-1]:
        for name, item in fields.items():
            if group_of(name, item) == heading:
                changed = "*" if values[name] != item.default and values[name] not in (None, [], ()) else ""
                lines.append([name, heading, str(values[name]).replace("\n", "\\n"), changed])
    show_table(console, ("option", "group", "value", "set"), lines)
