"""Builds the page of a study.

Verdicts, effects with intervals, interactions, task gain against forgetting, cost, and a link to
each run.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from unisd.console import number
from unisd.report import plots
from unisd.report.html import render
from unisd.report.verdict import Tile
from unisd.study.analysis import pareto
from unisd.study.recommend import (
    TITLES,
    control_table,
    cost_table,
    effect_table,
    judged_of,
    notes_of,
    title_of,
)
from unisd.study.store import FOLDERS

Figures = dict[str, Any]


def build(folder: Path, found: Figures, place: Path) -> str:
    """The page of the study in `folder`, whose analysis is `found`, for the folder `place`."""
    runs = Path(os.path.relpath(folder / FOLDERS, place))
    return render(
        "study.html",
        title=f"Study: which of {len(found['factors'])} components matter",
        verdict="",
        tasks=[_task(folder, runs, task, figures, found) for task, figures in found["tasks"].items()],
        margin=f"{found['margin']:g}",
        notes=found["notes"],
    )


def _task(folder: Path, links: Path, task: str, figures: Figures, found: Figures) -> Figures:
    """What the template shows of a task."""
    drawn = figures_of(figures, found["margin"])
    pictures = (
        ("interaction", "Interactions of mechanisms", "Ring: the interval excludes 0."),
        ("trade-off", "Gain against forgetting", "Means over seeds of each cell."),
    )
    method = next((cell["energy_method"] for cell in figures["cells"] if cell["energy_method"]), "")
    lines, targets = _runs(folder, links, figures)
    controls = figures.get("controls")
    return {
        "prefix": f"{task}: " if len(found["tasks"]) > 1 else "",
        "tiles": [
            Tile("task", task),
            Tile("runs", f"{figures['runs']} of {figures['planned']}"),
            Tile("failed", str(figures["failed"])),
            Tile("seeds", ", ".join(map(str, figures["seeds"]))),
            Tile("design", ", ".join(found["design"])),
        ],
        "verdicts": figures["verdicts"],
        "controls": {"text": controls["text"], "rows": control_table(figures)} if controls else None,
        "effects": _effects(figures, found["margin"]),
        "tables": _effect_tables(figures),
        "figures": [
            {"title": title, "note": note, "drawn": drawn[name].inline(wide=True)}
            for name, title, note in pictures
            if name in drawn
        ],
        "cost": cost_table(figures),
        "cost_note": f"Means over runs; memory: the most. Energy: {method}." if method else "",
        "runs": lines,
        "links": targets,
    }


def _effects(figures: Figures, margin: float) -> list[Figures]:
    """The pictures of each kind of effect that the study has."""
    found = []
    for kind in ("main", "one-in", "leave-one-out", "shapley"):
        pictures = [plots.forest([panel], margin).inline() for panel in panels_of(figures, kind)]
        if pictures:
            found.append({"title": TITLES[kind], "drawn": pictures})
    return found


def _effect_tables(figures: Figures) -> list[Figures]:
    """All effects in figures, to be unfolded."""
    return [
        {"title": title, "opened": kind == "main", "rows": rows, "notes": notes_of(figures, kind)}
        for kind, title in TITLES.items()
        if len(rows := effect_table(figures, kind)) > 1
    ]


def _runs(folder: Path, place: Path, figures: Figures) -> tuple[list[list[str]], dict[str, str]]:
    """All runs, those that failed with the reason; and links to their pages, from `place`."""
    lines = [
        ["run", "cell", "seed", "gain", "retention change", *(["failed"] if figures["failures"] else [])]
    ]
    for cell in figures["cells"]:
        for run, seed, gain, kept in zip(
            cell["runs"], cell["seeds"], cell["gains"], cell["retention_changes"], strict=True
        ):
            lines.append([run, cell["name"], str(seed), number(gain, "+.1f"), number(kept, "+.1f")])
    for failure in figures["failures"]:
        lines.append([failure["run"], failure["cell"], str(failure["seed"]), "-", "-", failure["reason"]])
    links = {}
    for run, *_ in lines[1:]:
        for name in ("report.html", "results.json"):
            if (folder / FOLDERS / run / name).exists():
                links[run] = (place / run / name).as_posix()
                break
    return lines, links


def panels_of(figures: Figures, kind: str) -> list[plots.Panel]:
    """One panel an outcome, all with the same effects in the same order."""
    chosen = [line for line in figures["effects"] if line["kind"] == kind]
    names = list(dict.fromkeys(line["name"] for line in chosen))
    nothing = {"value": float("nan"), "low": None, "high": None}
    panels: list[plots.Panel] = []
    for outcome in (*judged_of(chosen), "train_s"):
        by_name = {line["name"]: line for line in chosen if line["outcome"] == outcome}
        if by_name:
            lines = [by_name.get(name, nothing) for name in names]
            panels.append(
                (
                    title_of(outcome),
                    [(n, x["value"], x["low"], x["high"]) for n, x in zip(names, lines, strict=True)],
                )
            )
    return panels


def _factors(interaction: str, names: Collection[str]) -> tuple[str, str]:
    """The two of an interaction, whose own names may hold the sign between them."""
    parts = interaction.split(" x ")
    halves = [(" x ".join(parts[:i]), " x ".join(parts[i:])) for i in range(1, len(parts))]
    return next((pair for pair in halves if {*pair} <= {*names}), halves[0])


def figures_of(figures: Figures, margin: float) -> dict[str, plots.Plot]:
    """Every figure of a task by name: kinds of effects, `interaction`, `trade-off`."""
    drawn = {}
    for kind in ("main", "one-in", "leave-one-out", "shapley"):
        panels = panels_of(figures, kind)
        if panels:
            drawn[kind] = plots.forest(panels, margin)
    alone = {line["name"] for line in figures["effects"] if line["kind"] != "interaction"}
    pairs = {
        _factors(line["name"], alone): (
            line["value"],
            line["low"] is not None and not line["low"] <= 0 <= line["high"],
        )
        for line in figures["effects"]
        if line["kind"] == "interaction" and line["outcome"] == "task_accuracy"
    }
    if pairs:
        names = list(dict.fromkeys(name for pair in pairs for name in pair))
        drawn["interaction"] = plots.interaction_map(
            names, {(a, b): value for (a, b), value in pairs.items()}
        )
    cells = figures["cells"]
    known = [
        (c["name"], c["gain"], c["retention_change"])
        for c in cells
        if c["gain"] is not None and c["retention_change"] is not None
    ]
    if known:
        drawn["trade-off"] = plots.trade_off(known, pareto(cells))
    return drawn
