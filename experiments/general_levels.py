"""Measure models on the task `general`: is any part too easy, or too hard, to show damage?

`python -m experiments.general_levels [MODEL ...] [--folder docs/results]`.

Appends a line for each part of each model to `general.jsonl` and writes the table into `general.md`
between its markers; without a model it only writes the page. Answers are greedy. Parts that are in
the store are not measured again; lines of other items than the task has now do not count.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path

from experiments.grid import Cell, append, read
from experiments.pages import update
from unisd.console import markdown_table, quiet_libraries
from unisd.errors import UserError
from unisd.evaluation.accuracy import accuracy
from unisd.evaluation.grading import wilson
from unisd.models.load import load_model_and_tokenizer
from unisd.models.tokens import eos_ids
from unisd.tasks import get_task
from unisd.tasks.general import FILE, PARTS

FLOOR, CEILING = 0.1, 0.9
"""Shares of right answers beyond which a part shows hardly any change."""


def version() -> str:
    """Name the items: the first digits of their file's hash."""
    return hashlib.sha256(FILE.read_bytes()).hexdigest()[:8]


def measure(name: str, file: Path) -> None:
    """Let a model answer the parts that are not in the store, and append a line for each."""
    short = Path(name).name
    known = {cell["part"] for cell in read(file) if cell["model"] == short and cell["items"] == version()}
    parts = [part for part in PARTS if part not in known]
    if not parts:
        return
    task = get_task("general")
    rows = task.load("test")
    model, tokenizer, info = load_model_and_tokenizer(name)
    ends = eos_ids(model, tokenizer)
    for part in parts:
        start = time.perf_counter()
        of_part = [row for row in rows if row["skill"] == part]
        found = accuracy(model, tokenizer, of_part, task.grade, max_new_tokens=task.max_new_tokens)
        cell = {
            "model": short,
            "items": version(),
            "part": part,
            "parameters": info.parameters,
            "dtype": str(info.dtype).removeprefix("torch."),
            "right": [row["id"] for row, grade in zip(of_part, found["grades"], strict=True) if grade],
            "count": len(of_part),
            "cut": sum(not ids or ids[-1] not in ends for ids in found["completion_ids"]),
            "seconds": round(time.perf_counter() - start, 1),
        }
        append(file, cell)


def shown(right: int, count: int) -> str:
    """A share in percent with its interval, marked where it is at the floor or the ceiling."""
    share = wilson(right, count)
    value, low, high = (100 * share[part] for part in ("value", "low", "high"))
    mark = " ceiling" if right > CEILING * count else " floor" if right < FLOOR * count else ""
    return f"{value:.0f} [{low:.0f}, {high:.0f}]{mark}"


def table(cells: list[Cell]) -> list[str]:
    """Markdown lines, a model a line, small ones first."""
    models: dict[tuple[int, str], dict[str, Cell]] = {}
    for cell in cells:
        if cell["items"] == version():
            models.setdefault((cell["parameters"], cell["model"]), {})[cell["part"]] = cell
    lines = []
    for (parameters, name), of in sorted(models.items()):
        columns = [shown(len(of[part]["right"]), of[part]["count"]) if part in of else "-" for part in PARTS]
        right, count, cut = (sum(numbers) for numbers in zip(*map(_numbers, of.values()), strict=True))
        whole = shown(right, count) if len(of) == len(PARTS) else "-"
        lines.append([name, f"{parameters / 1e6:.0f}M", *columns, whole, f"{100 * cut / count:.0f}"])
    head = ["model", "parameters", *(f"{part}, %" for part in PARTS), "all, %", "cut, %"]
    return [f"Items `{version()}`.", "", *markdown_table(head, lines)]


def _numbers(cell: Cell) -> tuple[int, int, int]:
    return len(cell["right"]), cell["count"], cell["cut"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folder, .gguf file, hub id or name")
    parser.add_argument("--folder", type=Path, default=Path("docs/results"))
    args = parser.parse_args(argv)
    quiet_libraries()
    for name in args.models:
        measure(name, args.folder / "general.jsonl")
    lines = table(read(args.folder / "general.jsonl"))
    update(args.folder / "general.md", "Levels of the task general", "\n".join(lines))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
