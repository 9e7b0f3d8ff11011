"""Draws what a terminal shows of a run: a moment of its training, and its end.

`python -m experiments.terminal RUN` keeps in `docs/images/terminal.json` what is shown of the run
in that folder, and draws `terminal-60.svg` and so on, a picture for each width. Without a folder it
draws the kept run anew, as it has to be after a change to what a terminal shows.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from unisd.console import make_progress
from unisd.files import ANSWERS, METRICS, RESULTS, is_evaluation, read_lines
from unisd.monitoring.progress import metrics_text
from unisd.run.options import RunOptions
from unisd.run.train import _report

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
WIDTHS = (60, 80, 120)
LINE = ("step", "step_time", "loss", "teacher/divergence", "learning_rate")
OPTIONS = ("recipe", "use_peft", "model_name_or_path")
Kept = dict[str, Any]


def keep(folder: Path) -> Kept:
    """What a terminal shows of a run, from the run's folder."""
    results, pairs = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (RESULTS, ANSWERS))
    lines = [line for line in read_lines(folder / METRICS) if not is_evaluation(line)]
    examples = [
        {name: one[name] for name in ("prompt", "before", "after")} for one in pairs["task"]["examples"]
    ]
    return {
        "folder": str(folder),
        "options": {name: results["config"][name] for name in OPTIONS},
        "metrics": [{name: line[name] for name in LINE} for line in lines],
        "results": {name: value for name, value in results.items() if name not in ("config", "cost")},
        "answers": {"task": {"examples": examples}},
    }


class Clock:
    """The time of a run, as its lines tell it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def draw(kept: Kept, width: int) -> Console:
    """A console of that width, with the bar half-way and all that `unisd train` ends with."""
    clock, lines = Clock(), kept["metrics"]
    console = Console(record=True, width=width, force_terminal=True, color_system="truecolor",
                      file=io.StringIO(), get_time=clock, _environ={})  # fmt: skip
    bar = make_progress(console, metrics=True)
    task = bar.add_task("training", total=len(lines), metrics="")
    for line in lines[: len(lines) // 2]:
        clock.now += line["step_time"]
        bar.update(task, completed=line["step"], metrics=metrics_text(line, line["step"] / clock.now))
    console.print(bar.get_renderable())
    options = RunOptions(**kept["options"])
    _report(console, kept["results"], Path(kept["folder"]), options, [], kept["answers"])
    return console


def picture(console: Console) -> str:
    """The console as SVG, in fonts of the reader's machine."""
    drawn = console.export_svg(title="unisd train", unique_id=f"terminal-{console.width}")
    return re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)  # of another server


def main(argv: list[str] | None = None) -> int:
    """Write the pictures."""
    parser = argparse.ArgumentParser(prog="python -m experiments.terminal", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", metavar="RUN")
    args = parser.parse_args(argv)
    store = IMAGES / "terminal.json"
    if args.folder is not None:
        store.write_text(json.dumps(keep(args.folder), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    kept = json.loads(store.read_text(encoding="utf-8"))
    for width in WIDTHS:
        (IMAGES / f"terminal-{width}.svg").write_text(picture(draw(kept, width)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
