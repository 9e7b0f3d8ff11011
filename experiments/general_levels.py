"""Measure models on the task `general`: is any part too easy, or too hard, to show damage?

`python -m experiments.general_levels [MODEL ...] [--folder docs/results]`.

Appends a line for each model to `general.jsonl` and writes the tables into `general.md` between its
markers; without a model it only writes the page. Answers are greedy. Of a model that was measured
several times the last line counts; lines of other items than the task has now do not.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path

from experiments.grid import Cell, append, read
from experiments.pages import update
from unisd.console import markdown_table
from unisd.errors import UserError
from unisd.evaluation.accuracy import accuracy
from unisd.evaluation.grading import wilson
from unisd.models.load import load_model_and_tokenizer
from unisd.tasks import get_task
from unisd.tasks.general import FILE, PARTS

FLOOR, CEILING = 0.1, 0.9
"""Shares of right answers beyond which a part shows hardly any change."""


def version() -> str:
    """Name the items: the first digits of their file's hash."""
    return hashlib.sha256(FILE.read_bytes()).hexdigest()[:8]


def measure(name: str, limit: int | None = None) -> Cell:
    """Let a model answer all items, or the first `limit`; returns how many it got right by part."""
    task = get_task("general")
    rows = task.load("test", limit=limit)
    model, tokenizer, info = load_model_and_tokenizer(name)
    start = time.perf_counter()
    found = accuracy(model, tokenizer, rows, task.grade, max_new_tokens=task.max_new_tokens)
    parts = found["by_skill"].items()
    return {
        "model": Path(name).name,
        "items": version(),
        "parameters": info.parameters,
        "dtype": str(info.dtype).removeprefix("torch."),
        "parts": {part: [round(share["value"] * share["n"]), share["n"]] for part, share in parts},
        "cut": found["truncated"],
        "seconds": round(time.perf_counter() - start, 1),
    }


def shown(right: int, count: int) -> str:
    """A share in percent with its interval, marked where it is at the floor or the ceiling."""
    share = wilson(right, count)
    value, low, high = (100 * share[part] for part in ("value", "low", "high"))
    mark = " ceiling" if right > CEILING * count else " floor" if right < FLOOR * count else ""
    return f"{value:.0f} [{low:.0f}, {high:.0f}]{mark}"


def table(cells: list[Cell]) -> list[str]:
    """Markdown lines, a model a line, small ones first."""
    last = {cell["model"]: cell for cell in cells if cell["items"] == version()}
    lines = []
    for cell in sorted(last.values(), key=lambda cell: (cell["parameters"], cell["model"])):
        counts = [cell["parts"].get(part, (0, 0)) for part in PARTS]
        total = [sum(numbers) for numbers in zip(*counts, strict=True)]
        lines.append(
            [
                cell["model"],
                f"{cell['parameters'] / 1e6:.0f}M",
                *(shown(*count) for count in counts),
                shown(*total),
                f"{100 * cell['cut'] / total[1]:.0f}",
            ]
        )
    head = ["model", "parameters", *(f"{part}, %" for part in PARTS), "all, %", "cut, %"]
    return [f"Items `{version()}`.", "", *markdown_table(head, lines)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folder, .gguf file, hub id or name")
    parser.add_argument("--folder", type=Path, default=Path("docs/results"))
    args = parser.parse_args(argv)
    for name in args.models:
        append(args.folder / "general.jsonl", measure(name))
    lines = table(read(args.folder / "general.jsonl"))
    update(args.folder / "general.md", "Levels of the task general", "\n".join(lines))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
