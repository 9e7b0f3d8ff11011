"""Draw what a terminal shows of a run, from the run's folder: a moment of its training, and its end.

`python -m experiments.terminal RUN --output docs/images` writes a picture for each width,
`terminal-60.svg` and so on; without an output the text goes to the terminal.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from pathlib import Path

from rich.console import Console

from unisd.console import make_progress
from unisd.files import ANSWERS, METRICS, RESULTS
from unisd.monitoring.progress import metrics_text
from unisd.run.options import RunOptions
from unisd.run.train import _report

WIDTHS = (60, 80, 120)


class Clock:
    """The time of a run, as its lines tell it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def draw_moment(console: Console, lines: list[dict[str, float]], clock: Clock) -> None:
    """The bar of the training, half-way."""
    bar = make_progress(console, metrics=True)
    task = bar.add_task("training", total=len(lines), metrics="")
    for line in lines[: len(lines) // 2]:
        clock.now += line["step_time"]
        bar.update(task, completed=line["step"], metrics=metrics_text(line, line["step"] / clock.now))
    console.print(bar.get_renderable())


def draw(folder: Path, width: int) -> Console:
    """A console of that width, with what `unisd train` has shown while it trained and at its end."""
    clock = Clock()
    console = Console(record=True, width=width, force_terminal=True, color_system="truecolor",
                      file=io.StringIO(), get_time=clock, _environ={})  # fmt: skip
    results, pairs = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (RESULTS, ANSWERS))
    lines = map(json.loads, (folder / METRICS).read_text(encoding="utf-8").splitlines())
    draw_moment(console, [line for line in lines if "loss" in line], clock)
    names = ("recipe", "use_peft", "model_name_or_path")
    options = RunOptions(**{name: results["config"][name] for name in names})
    _report(console, results, folder, options, [], pairs)
    return console


def picture(console: Console) -> str:
    """The console as SVG, in fonts of the reader's machine."""
    drawn = console.export_svg(title="unisd train", unique_id=f"terminal-{console.width}")
    return re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)  # of another server


def main(argv: list[str] | None = None) -> int:
    """Write the pictures, or the text with its colours."""
    parser = argparse.ArgumentParser(prog="python -m experiments.terminal", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--output", type=Path, help="the pictures' folder")
    args = parser.parse_args(argv)
    for width in args.widths:
        console = draw(args.folder, width)
        if args.output is None:
            print(console.export_text(styles=True), end="")
        else:
            args.output.mkdir(parents=True, exist_ok=True)
            (args.output / f"terminal-{width}.svg").write_text(picture(console), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
