"""Write the page of the evidence on a real model, from its lines.

`python -m experiments.smollm2_page [--folder docs/results]`.

Writes the tables into `smollm2.md` between its markers. Intervals are 95 %, by bootstrap over
questions, the seeds of a question together.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.grid import Cell, read
from experiments.pages import update
from experiments.pocket_page import Marks, percent
from experiments.smollm2 import (
    METHODS,
    MODEL,
    PILOT_STEPS,
    PILOTS,
    RAW,
    ROWS,
    STEPS,
    TOTAL,
    Setting,
    best_pilot,
    is_of,
    score,
    share,
)
from unisd.console import markdown_table

TITLES = {"new_facts": "New facts", "scienceqa": "ScienceQA, short answers"}


def marks(points: Sequence[Cell], name: str) -> Marks:
    """`[seeds, questions]` of 0 and 1."""
    return np.array([[int(mark) for mark in point[name]] for point in points], dtype=float)


def groups(cells: list[Cell], task: str) -> dict[str, list[Cell]]:
    """Finished cells of the table by method, seeds in order."""
    found: dict[str, list[Cell]] = {}
    for method in (RAW, *METHODS):
        runs = [
            cell for cell in cells if cell["task"] == task and cell["method"] == method and not cell["pilot"]
        ]
        if runs:
            found[method] = sorted(runs, key=lambda cell: cell["seed"])
    return found


def at_equal_steps(cells: list[Cell], task: str) -> list[str]:
    """Markdown lines: every method after its last step."""
    head = [
        "method",
        "seeds",
        "steps",
        "answers right, %",
        "form right, %",
        "knowledge, %",
        "general, %",
        "PPL_fit",
    ]
    head += ["PPL_ret forward", "PPL_ret reverse", "train, s", "MB"]
    lines = []
    for method, runs in groups(cells, task).items():
        last = [cell["curve"][-1] for cell in runs]
        columns = [method, str(len(runs)), str(last[0]["step"])]
        columns += [
            percent(marks(last, name))
            for name in ("task_correct", "form_right", "knowledge_correct", "general_correct")
        ]
        columns += [
            _mean(last, "fit_ppl"),
            _mean(runs, "retention_ppl_forward"),
            _mean(last, "retention_ppl_reverse"),
        ]
        columns += [_mean(last, "train_cpu_s", 0), _mean(runs, "peak_mb", 0)]
        lines.append(columns)
    return markdown_table(head, lines)


def at_equal_gain(cells: list[Cell], task: str) -> list[str]:
    """Compare methods at equal gain, as Markdown lines.

    Shown is the first point of each method's mean curve that is as good as what all methods reach
    that gain anything.

    Methods with fewer seeds than others wait.
    """
    found = groups(cells, task)
    most = max((len(runs) for runs in found.values()), default=0)
    curves = {
        method: _mean_curve(runs) for method, runs in found.items() if method == RAW or len(runs) == most
    }
    untouched = max((point["task"] for point in curves.pop(RAW, [])), default=0.0)
    best = {method: max(point["task"] for point in curve) for method, curve in curves.items()}
    best = {method: reached for method, reached in best.items() if reached > untouched}
    if len(best) < 2:
        return []
    target = min(best.values())
    head = ["method", "step", "answers right, %", "general, %", "PPL_ret reverse", "train, s"]
    lines = []
    for method in best:
        point = next(point for point in curves[method] if point["task"] >= target)
        values = [f"{point['step']:.0f}", f"{100 * point['task']:.1f}", f"{100 * point['general']:.1f}"]
        seconds = "-" if math.isnan(point["train_cpu_s"]) else f"{point['train_cpu_s']:.0f}"
        lines.append([method, *values, f"{point['reverse']:.3f}", seconds])
    said = (
        f"The best that all of these reach is {100 * target:.1f} %; each at the first evaluation where it is"
        " that good:"
    )
    return [said, "", *markdown_table(head, lines)]


def pilots(cells: list[Cell], task: str) -> list[str]:
    """Markdown lines: what each pilot saw, the chosen one in bold."""
    lines = []
    for method in PILOTS:
        chosen = best_pilot(cells, task, method)
        runs = [cell for cell in cells if cell["pilot"] and cell["task"] == task and cell["method"] == method]
        for cell in sorted(runs, key=score, reverse=True):
            name = f"**{method}**" if (cell["alpha"], cell["learning_rate"]) == chosen else method
            divergence = "likelihood" if method == "sft" else ("forward KL" if cell["alpha"] == 0 else "JSD")
            point = cell["curve"][-1]
            right = [f"{100 * share(point[part]):.1f}" for part in ("task_correct", "general_correct")]
            lines.append([name, divergence, f"{cell['learning_rate']:g}", *right])
    return markdown_table(("pilot", "divergence", "rate", "answers right, %", "general, %"), lines)


def costs_of_one_device(cells: list[Cell]) -> list[Cell]:
    """Keep time and memory of those cells only that ran where most did.

    Of two kinds of device no mean is taken.
    """
    counts = Counter(cell["device"] for cell in cells if "device" in cell)
    usual = max(counts, key=counts.__getitem__, default=None)
    kept = []
    for cell in cells:
        if cell.get("device", usual) != usual:
            curve = [
                {name: value for name, value in point.items() if name != "train_cpu_s"}
                for point in cell["curve"]
            ]
            cell = {name: value for name, value in cell.items() if name != "peak_mb"} | {"curve": curve}
        kept.append(cell)
    return kept


def settings(cells: list[Cell]) -> list[tuple[str, Setting]]:
    """Tasks with the settings that cells have run in, the published one of each first."""
    found = []
    for task in TITLES:
        published = (MODEL, STEPS[task], ROWS)
        others = {
            (c["model"], c["steps"], c["rows"]) for c in cells if c["task"] == task and not c["pilot"]
        } - {published}
        found += [(task, setting) for setting in (published, *sorted(others))]
    return found


def page(cells: list[Cell]) -> str:
    """Everything between the markers."""
    parts = []
    for task, setting in settings(cells):
        model, steps, rows = setting
        of_setting = costs_of_one_device([cell for cell in cells if is_of(cell, task, setting)])
        other = "" if setting == (MODEL, STEPS[task], ROWS) else f": {model}, {steps} steps, {rows} rows"
        parts += [
            f"## {TITLES[task]}{other}",
            (
                f"{len(of_setting)} of {TOTAL} cells have run ({model}, {steps} steps of 16 rows, at most"
                f" {rows} test rows; pilots {min(PILOT_STEPS, steps)} steps)."
            ),
        ]
        if groups(of_setting, task):
            parts += ["\n".join(at_equal_steps(of_setting, task)), "\n".join(at_equal_gain(of_setting, task))]
        if any(cell["pilot"] for cell in of_setting):
            parts.append("\n".join(pilots(of_setting, task)))
    return "\n\n".join(part for part in parts if part)


def write(folder: Path, cells: list[Cell]) -> None:
    """Put the tables into `smollm2.md`."""
    update(folder / "smollm2.md", "A real model: SmolLM2-135M", page(cells))


def _mean_curve(runs: list[Cell]) -> list[dict[str, float]]:
    """Means over seeds at the steps that all seeds have."""
    steps = set.intersection(*({point["step"] for point in cell["curve"]} for cell in runs))
    curve = []
    for step in sorted(steps):
        points = [point for cell in runs for point in cell["curve"] if point["step"] == step]
        curve.append(
            {
                "step": float(step),
                "task": float(np.mean([share(point["task_correct"]) for point in points])),
                "general": float(np.mean([share(point["general_correct"]) for point in points])),
                "reverse": float(np.mean([point["retention_ppl_reverse"] for point in points])),
                "train_cpu_s": float(
                    np.mean([point["train_cpu_s"] for point in points if "train_cpu_s" in point] or math.nan)
                ),
            }
        )
    return curve


def _mean(records: Sequence[Cell], name: str, digits: int = 3) -> str:
    values = [record[name] for record in records if name in record]
    return f"{np.mean(values):.{digits}f}" if values else "-"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("docs/results"))
    folder = parser.parse_args().folder
    write(folder, read(folder / "smollm2.jsonl"))
    sys.exit(0)
