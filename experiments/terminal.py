"""Draw what a terminal shows at the end of a run, from the run's folder.

`python -m experiments.terminal RUN [--width 80] [--output docs/images/terminal.svg]`; without an
output it goes to the terminal.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from pathlib import Path

from rich.console import Console

from unisd.files import ANSWERS, RESULTS
from unisd.run.options import RunOptions
from unisd.run.train import _report


def draw(folder: Path, width: int) -> Console:
    """A console of that width, with all that `unisd train` has shown of its results."""
    console = Console(record=True, width=width, force_terminal=True, color_system="truecolor",
                      file=io.StringIO(), _environ={})  # fmt: skip
    results, pairs = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (RESULTS, ANSWERS))
    names = ("recipe", "use_peft", "model_name_or_path")
    options = RunOptions(**{name: results["config"][name] for name in names})
    _report(console, results, folder, options, [], pairs)
    return console


def main(argv: list[str] | None = None) -> int:
    """Write the picture, or the text with its colours."""
    parser = argparse.ArgumentParser(prog="python -m experiments.terminal", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=80)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    console = draw(args.folder, args.width)
    if args.output is None:
        print(console.export_text(styles=True), end="")
        return 0
    args.output.parent.mkdir(parents=True, exist_ok=True)
    picture = console.export_svg(title="unisd train")
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)  # of another server
    args.output.write_text(picture, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
