"""Write the page of the pocket comparison from its lines.

`python -m experiments.pocket_page [--folder docs/results]`.

Writes `pocket.md`, `field.md` for the recipes of later papers and `controls.md` for those that
judge answers and for the controls, between their markers (what a person wrote around them stays),
and a figure for each. All pages are of the same cells, with the same splits, seeds, steps and rows.
Intervals are 95 %, by bootstrap over problems only: the marks of all seeds on one problem are drawn
together, and methods are compared on the same problems and seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments import pocket_methods as compare
from experiments.grid import Cell, read
from experiments.pages import update
from unisd.console import markdown_table
from unisd.pocket.task import PocketTask

Marks = NDArray[np.float64]

DRAWS = 2000
# recipes of later papers, and what judges answers with the controls, on pages of their own
FIELD = ("dash", "pw-opsd", "avsd", "opsd-ectr", "demopsd", "purified-opsd")
OUTCOMES = ("sdpo", "oasis", "nsd", "op2sd", "semi-opd")
CONTROLS = ("reference-free", "wrong-reference", "other-solution", "rejection-sft", compare.GRAFT)
CAVEAT = (
    "Intervals resample problems, and keep the seeds fixed: they hold for other problems of this kind, not"
    " for other seeds. Intervals of differences are not adjusted for their number: of 20 methods without any"
    " difference, one would look different."
)
# what they stand beside there; some add to OPSD
BESIDE_FIELD = ("opsd", "sdft", "unisd-star", compare.REFERENCE)
PAGES = {
    "pocket": "Methods on the pocket task",
    "field": "Recipes of later papers on the pocket task",
    "controls": "Judged answers and controls on the pocket task",
}
"""Titles by the name of the page's file."""


def marks(cells: list[Cell], name: str, kind: str = "known") -> Marks:
    """Return `[seeds, problems]` of 0 and 1.

    Right in any wording (`known`), or also in the task's form (`correct`).
    """
    return np.array([[int(mark) for mark in cell[f"{name}_{kind}"]] for cell in cells], dtype=float)


def interval(values_SN: Marks, seed: int = 0) -> tuple[float, float, float]:
    """Mean over seeds and problems, and its interval over problems (the columns)."""
    rng = np.random.default_rng(seed)
    per_problem = values_SN.mean(0)
    drawn = per_problem[rng.integers(0, len(per_problem), (DRAWS, len(per_problem)))].mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(per_problem.mean()), float(low), float(high)


def finished(cells: list[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """The table's cells by method and condition, seeds in order; pilots are not the table's."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        if not cell["pilot"]:
            groups.setdefault((cell["method"], cell["condition"]), []).append(cell)
    return groups


def table(cells: list[Cell], condition: str) -> list[str]:
    """Markdown lines: one row per method, most accurate first.

    PPL_ret is forward / reverse; PPL_ref that of the references.
    """
    groups = finished(cells)
    raw = groups.get((compare.RAW, "clean"), [])
    rows = {
        method: group
        for (method, state), group in groups.items()
        if state == condition and method != compare.RAW
    }
    head = [
        "method",
        "rate",
        "seeds",
        "task, %",
        "spread",
        "also in form, %",
        "hard, %",
        "prior skills, %",
        "PPL_ret",
        "PPL_ref",
        "train, CPU s",
        "MB",
    ]
    lines = []
    order = sorted(rows, key=lambda method: -marks(rows[method], "task").mean())
    for method in ([compare.RAW] if raw else []) + order:
        group = rows.get(method, raw)
        per_seed = 100 * marks(group, "task").mean(1)
        mean = _mean_of(group)
        cost = "-" if method == compare.RAW else f"{mean('train_cpu_s'):.0f}"
        drift = f"{mean('retention_ppl_forward'):.3f} / {mean('retention_ppl_reverse'):.3f}"
        lines.append(
            [
                method,
                f"{group[0]['learning_rate']:g}",
                str(len(group)),
                percent(marks(group, "task")),
                f"{per_seed.min():.1f}-{per_seed.max():.1f}",
                f"{100 * marks(group, 'task', 'correct').mean():.1f}",
                f"{100 * marks(group, 'hard').mean():.1f}",
                percent(marks(group, "retention")),
                drift,
                f"{mean('gold_ppl'):.2f}",
                cost,
                f"{mean('peak_mb'):.0f}",
            ]
        )
    return markdown_table(head, lines)


def differences(cells: list[Cell], condition: str, reference: str) -> list[str]:
    """Markdown lines: every method less `reference`, on the same seeds and problems, in points."""
    groups = finished(cells)
    base = {cell["seed"]: cell for cell in groups.get((reference, condition), [])}
    lines = []
    for (method, state), group in groups.items():
        pairs = [(cell, base[cell["seed"]]) for cell in group if cell["seed"] in base]
        if state != condition or method in (reference, compare.RAW) or not pairs:
            continue
        shown = []
        for name in ("task", "retention"):
            gap = marks([ours for ours, _ in pairs], name) - marks([theirs for _, theirs in pairs], name)
            value, low, high = interval(100 * gap)
            shown.append(f"{value:+.1f} [{low:+.1f}, {high:+.1f}]")
        lines.append([method, *shown])
    return markdown_table((f"less {reference}", "task", "prior skills"), lines)


def by_skill(cells: list[Cell], condition: str) -> list[str]:
    """Markdown lines: accuracy on the task's test problems of each skill, one row per method."""
    groups = finished(cells)
    count = min((len(group[0]["task_known"]) for group in groups.values()), default=0)
    skills = np.array([row["skill"] for row in PocketTask().load("test", limit=count)])
    names = sorted(set(skills))
    lines = [
        [method, *(percent(marks(group, "task")[:, :count][:, skills == name]) for name in names)]
        for (method, state), group in groups.items()
        if state == condition or method == compare.RAW
    ]
    return markdown_table(("task, %", *names), lines)


def pilots(cells: list[Cell]) -> list[str]:
    """Markdown lines: what the pilots saw, the chosen rate in bold."""
    lines = []
    for method in compare.methods():
        runs = sorted(
            (c for c in cells if c["pilot"] and c["method"] == method), key=lambda cell: cell["learning_rate"]
        )
        chosen, shown = compare.chosen_rate(cells, method), []
        for run in runs:
            text = (
                f"{run['learning_rate']:g}: {100 * run['task_accuracy']:.1f} /"
                f" {100 * run['retention_accuracy']:.1f}"
            )
            shown.append(f"**{text}**" if run["learning_rate"] == chosen else text)
        if runs:
            lines.append([method, *shown])
    columns = max(map(len, lines), default=2)
    header = ["method", "rate: task / prior skills on validation, %", *[""] * (columns - 2)]
    return markdown_table(header, [[*line, *[""] * (columns - len(line))] for line in lines])


def own_methods(page: str) -> list[str]:
    """The methods that no other page shows as its own."""
    apart = {"field": FIELD, "controls": OUTCOMES + CONTROLS}
    if page in apart:
        return [name for name in compare.methods() if name in apart[page]]
    return [name for name in compare.methods() if name not in FIELD + OUTCOMES + CONTROLS]


def of_page(page: str) -> list[str]:
    """All methods of a page of `PAGES`, those among them that its own stand beside."""
    beside = {"field": BESIDE_FIELD, "controls": ("sft", *BESIDE_FIELD[1:])}.get(page, ())
    return [name for name in compare.methods() if name in (*own_methods(page), *beside)]


def page(cells: list[Cell], figure: str, methods: list[str]) -> str:
    """Everything between the markers, of these methods and the untouched base."""
    cells = [cell for cell in cells if cell["method"] in (compare.RAW, *methods)]
    done = sum(not cell["pilot"] for cell in cells)
    parts = [
        f"{len(cells)} of {compare.total(methods)} cells have run ({done} besides the pilots). ![gain against"
        f" forgetting]({figure})"
    ]
    for condition, title in (("clean", "Right references"), ("noisy", "30 % wrong references")):
        if any(state == condition and method != compare.RAW for method, state in finished(cells)):
            parts += [f"## {title}", "\n".join(table(cells, condition)), CAVEAT]
            parts += [
                "\n".join(differences(cells, condition, other))
                for other in (compare.REFERENCE, *(["sft"] if "sft" in methods else ["opsd", "unisd-star"]))
                if (other, condition) in finished(cells)
            ]
            if set(OUTCOMES) & set(methods):  # each skill has a grader, and feedback, of its own
                parts += ["\n".join(by_skill(cells, condition))]
    parts += ["## Pilots", "\n".join(pilots(cells))]
    return "\n\n".join(parts)


FAR = 40.0  # points of prior skills


def draw(cells: list[Cell], file: Path) -> None:
    """Draw task accuracy gained against prior skills lost, one mark per method.

    Filled: right references, hollow: 30 % wrong.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    groups = finished(cells)
    raw = groups.get((compare.RAW, "clean"))
    if raw is None:
        return
    start = {name: 100 * marks(raw, name).mean() for name in ("task", "retention")}
    with pyplot.rc_context({"svg.hashsalt": "pocket", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(9, 5.5))
        outside = []
        names = [name for name in compare.methods() if any(method == name for method, _ in groups)]
        colours = dict(zip(names, pyplot.get_cmap("tab20").colors, strict=False))
        for (method, condition), group in groups.items():
            if method == compare.RAW:
                continue
            gain = 100 * marks(group, "task").mean() - start["task"]
            lost = start["retention"] - 100 * marks(group, "retention").mean()
            if lost > FAR:  # drawn to scale, it would press all others into a corner
                outside.append(f"{method}, {condition}: {gain:+.0f} gained, {lost:.0f} forgotten")
                continue
            clean = condition == "clean"
            face = colours[method] if clean else "none"
            label = method if clean else None
            axes.scatter(
                lost, gain, s=60, edgecolors=[colours[method]], facecolors=[face], zorder=3, label=label
            )
        axes.set_xlabel("prior skills forgotten, points")
        axes.set_ylabel("task accuracy gained, points")
        axes.set_title("Gain against forgetting (hollow: 30 % wrong references)", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
        if outside:
            axes.text(
                0.98,
                0.02,
                "\n".join(["outside:", *outside]),
                transform=axes.transAxes,
                ha="right",
                va="bottom",
                fontsize=8,
            )
        figure.tight_layout()
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)


def write(folder: Path, cells: list[Cell]) -> None:
    """Put the tables into each page that has cells of its own, and draw its figure."""
    for name, title in PAGES.items():
        methods = of_page(name)
        if not any(cell["method"] in own_methods(name) for cell in cells):
            continue
        draw([cell for cell in cells if cell["method"] in (compare.RAW, *methods)], folder / f"{name}.svg")
        update(folder / f"{name}.md", title, page(cells, f"{name}.svg", methods))


def _mean_of(group: list[Cell]) -> Callable[[str], float]:
    return lambda name: float(np.mean([cell[name] for cell in group]))


def percent(values_SN: Marks) -> str:
    """Mean in percent, with its interval."""
    value, low, high = (100 * part for part in interval(values_SN))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("docs/results"))
    folder = parser.parse_args().folder
    write(folder, read(folder / "pocket.jsonl"))
    sys.exit(0)
