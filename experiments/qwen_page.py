"""Write the page of `experiments.qwen` from its lines.

`python -m experiments.qwen_page [--folder docs/results]`.

Writes the tables into `qwen.md` between its markers: what was learnt, what was kept and how far
free answers drifted, each apart. Intervals are 95 %, by bootstrap over questions, the seeds of a
question together; differences are from the untouched model on the same questions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from experiments.grid import Cell, read
from experiments.pages import update
from experiments.pocket_page import CAVEAT, Marks, interval, percent
from experiments.qwen_plan import (
    DRIFT,
    FIRST,
    GRAFT,
    KEPT,
    PILOTS,
    RAW,
    SCALES,
    SECOND,
    STEPS,
    TASK,
    TRAINING,
    chosen_rate,
    outline,
    pilot_score,
    share,
)
from unisd.console import markdown_table, number

TITLE = "A model of the paper's family: Qwen2.5-Coder-0.5B-Instruct"
TITLES = {"mbpp": "MBPP, sanitized", "cos_e": "CommonsenseQA with CoS-E"}
Named = tuple[str, list[Cell]]


def named(cells: list[Cell], task: str, part: str) -> list[Named]:
    """The finished cells of a part by the method's name; methods as planned, seeds in order."""
    methods = [(name, 1.0) for name in (RAW, *FIRST, *SECOND) if name != GRAFT]
    methods[2:2] = [(GRAFT, scale) for scale in SCALES]
    found = []
    for method, scale in methods:
        alike = [
            cell
            for cell in cells
            if (cell["task"], cell["part"], cell["method"], cell["pilot"]) == (task, part, method, False)
            and cell["scale"] == scale
        ]
        if alike:
            name = f"{method} {scale:g}" if method == GRAFT else method
            found.append((name, sorted(alike, key=lambda cell: cell["seed"])))
    return found


def marks(group: list[Cell], name: str) -> Marks:
    """`[seeds, questions]` of 0 and 1."""
    return np.array([[int(mark) for mark in cell["correct"][name]] for cell in group], dtype=float)


def all_marks(group: list[Cell]) -> Marks:
    """Those of all sets of a cell, one after the other."""
    return np.concatenate([marks(group, name) for name in group[0]["correct"]], axis=1)


def against(ours: Marks, raw: Marks) -> list[str]:
    """The difference in points, and the mean number of questions gained and lost."""
    value, low, high = interval(100 * (ours - raw))
    gained, lost = ((ours > raw).sum(1).mean(), (ours < raw).sum(1).mean())
    return [f"{value:+.1f} [{low:+.1f}, {high:+.1f}]", f"{gained:.0f} / {lost:.0f}"]


def acquisition(cells: list[Cell], task: str) -> list[str]:
    """Markdown lines: what was learnt of the task, and at what cost."""
    costs = {
        (cell["method"], cell["seed"]): cell for _, group in named(cells, task, TRAINING) for cell in group
    }
    raw = dict(named(cells, task, TASK)).get(RAW)
    lines = []
    for name, group in named(cells, task, TASK):
        spent = [cost for cell in group if (cost := costs.get((cell["method"], cell["seed"])))]
        change = ["-", "-"] if raw is None or name == RAW else against(marks(group, TASK), marks(raw, TASK))
        line = [name, f"{group[0]['learning_rate']:g}", str(len(group)), percent(marks(group, TASK)), *change]
        line += [_mean(group, lambda cell: cell["gold_ppl"], 3)]
        line += [_mean(spent, lambda cell: cell["times_s"]["step_time"], 0)]
        lines.append([*line, _mean(spent, lambda cell: cell["answer_tokens"], 0)])
    head = ["method", "rate", "seeds", "right, %", "less raw, points", "gained / lost", "PPL_ref"]
    return markdown_table([*head, "training, s", "tokens trained"], lines)


def kept(cells: list[Cell], task: str) -> list[str]:
    """Markdown lines: what must not be lost, set by set, and all of it against the raw model."""
    groups = named(cells, task, KEPT)
    raw = dict(groups).get(RAW)
    sets = list(groups[0][1][0]["correct"]) if groups else []
    lines = []
    for name, group in groups:
        change = ["-", "-"] if raw is None or name == RAW else against(all_marks(group), all_marks(raw))
        lines.append([name, str(len(group)), *(percent(marks(group, one)) for one in sets), *change])
    # the first set of a measurement is called `retention` alone
    heads = [one.removeprefix("retention").strip() or "general" for one in sets]
    head = ["method", "seeds", *(f"{one}, %" for one in heads), "all less raw, points", "gained / lost"]
    return markdown_table(head, lines)


def drifted(cells: list[Cell], task: str) -> list[str]:
    """Markdown lines: how far free answers have moved; in brackets what no change would give."""
    lines = []
    for name, group in named(cells, task, DRIFT):

        def of(way: str, side: str, group: list[Cell] = group) -> str:
            return _mean(group, lambda cell: cell["drift"][way][side], 3)

        ways = [f"{of(way, 'after')} ({of(way, 'before')})" for way in ("reverse", "forward")]
        nats = _mean(group, lambda cell: cell["detail"]["reverse"]["delta"]["value"], 3)
        lines.append([name, str(len(group)), *ways, of("kl", "after"), nats])
    head = ["method", "seeds", "PPL of the base's answers", "PPL of answers under the base"]
    return markdown_table([*head, "KL, nats per token", "nats lost a token"], lines)


def pilots(cells: list[Cell]) -> list[str]:
    """Markdown lines: what each pilot saw, on rows that are not reported; the chosen in bold.

    The untouched model's line is first: where all pilots lie below it, a lower rate may be right.
    """
    lines = []
    for method, rates in {RAW: (0.0,), **PILOTS}.items():
        chosen = chosen_rate(cells, method) if method in PILOTS else None
        for rate in rates:
            if pilot_score(cells, method, rate) is None:
                continue
            found = {
                cell["part"]: cell
                for cell in cells
                if cell["pilot"] and (cell["method"], cell["learning_rate"]) == (method, rate)
            }
            shown = [f"{100 * share(found[part]['correct']):.1f}" for part in (TASK, KEPT)]
            lines.append([f"**{method}**" if rate == chosen else method, f"{rate:g}", *shown])
    return markdown_table(("pilot", "rate", "right on validation, %", "kept, %"), lines) if lines else []


def page(cells: list[Cell]) -> str:
    """Everything between the markers."""
    parts = []
    for task, title in TITLES.items():
        of_task = [cell for cell in cells if cell["task"] == task]
        total = len(outline(task, cells))
        parts += [
            f"## {title}",
            f"{len(of_task)} of {total} cells have run ({STEPS[task]} steps of 16 answers).",
        ]
        tables = {
            "Learnt": acquisition(cells, task),
            "Kept": kept(cells, task),
            "Drifted": drifted(cells, task),
            "Pilots": pilots(cells) if task == "mbpp" else [],
        }
        for name, lines in tables.items():
            if len(lines) > 2:
                parts += [f"### {name}", "\n".join(lines)]
    return "\n\n".join([*parts, CAVEAT])


def write(folder: Path, cells: list[Cell]) -> None:
    """Put the tables into `qwen.md`."""
    update(folder / "qwen.md", TITLE, page(cells))


def _mean(group: Sequence[Cell], value: Callable[[Cell], float], digits: int) -> str:
    values = [value(cell) for cell in group]
    return number(float(np.mean(values)), f".{digits}f") if values else "-"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("docs/results"))
    folder = parser.parse_args().folder
    write(folder, read(folder / "qwen.jsonl"))
    sys.exit(0)
