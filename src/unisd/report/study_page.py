"""Builds the page of a study.

Verdicts, effects with intervals, interactions, task gain against forgetting, cost, and a link to
each run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from unisd.report import plots
from unisd.report.html import escape, page, section, table, tiles
from unisd.study.analysis import pareto
from unisd.study.recommend import OUTCOMES, TITLES, control_table, cost_table, effect_table, notes_of, number
from unisd.study.store import FOLDERS

Figures = dict[str, Any]


def build(folder: Path, found: Figures, place: Path) -> str:
    """The page of the study in `folder`, whose analysis is `found`, for the folder `place`."""
    runs = Path(os.path.relpath(folder / FOLDERS, place))
    body = ""
    for task, figures in found["tasks"].items():
        body += _task(folder, runs, task, figures, found, several=len(found["tasks"]) > 1)
    body += section("How to read this", "".join(f"<p>{escape(note)}</p>" for note in found["notes"]))
    return page(f"Study: which of {len(found['factors'])} components matter", body)


def _task(folder: Path, links: Path, task: str, figures: Figures, found: Figures, several: bool) -> str:
    prefix = f"{task}: " if several else ""
    body = tiles(
        [
            ("task", task),
            ("runs", f"{figures['runs']} of {figures['planned']}"),
            ("failed", str(figures["failed"])),
            ("seeds", ", ".join(map(str, figures["seeds"]))),
            ("design", ", ".join(found["design"])),
        ]
    )
    body += section(f"{prefix}What to use", _verdicts(figures))
    if figures.get("controls"):
        body += section(
            f"{prefix}Controls",
            f"<p>{escape(figures['controls']['text'])}</p>",
            table(control_table(figures)),
            note="Points that the method has over each control, with 95 % intervals. Beaten: more on the"
            f" task, and not over {found['margin']:g} points less kept.",
        )
    body += section(
        f"{prefix}Effects",
        *_effects(figures, found["margin"]),
        _effect_tables(figures),
        note="Points of accuracy (time: percent) with 95 % intervals. Shaded: effects below"
        f" {found['margin']:g} points, which do not matter.",
    )
    drawn = figures_of(figures, found["margin"])
    for name, title, note in (
        ("interaction", "What mechanisms do together", "Ring: the interval excludes 0."),
        ("trade-off", "Gain against forgetting", "Means over seeds of each cell."),
    ):
        if name in drawn:
            body += section(f"{prefix}{title}", drawn[name].inline(wide=True), note=note)
    method = next((cell["energy_method"] for cell in figures["cells"] if cell["energy_method"]), "")
    body += section(
        f"{prefix}Cost",
        table(cost_table(figures)),
        note=f"Means over runs; memory: the most. Energy: {method}." if method else "",
    )
    return body + section(f"{prefix}Runs", _runs(folder, links, figures))


def _verdicts(figures: Figures) -> str:
    items = "".join(
        '<li><span class="tag'
        f' {escape(line["verdict"].split()[0])}">{escape(line["verdict"])}</span>{escape(line["text"])}</li>'
        for line in figures["verdicts"]
    )
    return f'<ul class="verdicts">{items}</ul>'


def _effects(figures: Figures, margin: float) -> list[str]:
    """A heading and the pictures of each kind of effect that the study has."""
    found = []
    for kind in ("main", "one-in", "leave-one-out", "shapley"):
        pictures = [plots.forest([panel], margin).inline() for panel in panels_of(figures, kind)]
        if pictures:
            found += [f"<h3>{escape(TITLES[kind])}</h3>", f'<div class="plots">{"".join(pictures)}</div>']
    return found


def _effect_tables(figures: Figures) -> str:
    """All effects in figures, to be unfolded."""
    tables = ""
    for kind, title in TITLES.items():
        lines = effect_table(figures, kind)
        if len(lines) > 1:
            opened = " open" if kind == "main" else ""
            said = "".join(f'<p class="soft">{escape(note)}</p>' for note in notes_of(figures, kind))
            tables += (
                f"<details{opened}><summary>{escape(title)}: all"
                f" figures</summary>{table(lines)}{said}</details>"
            )
    return tables


def _runs(folder: Path, place: Path, figures: Figures) -> str:
    """All runs with links to their pages, from `place`; those that failed with the reason."""
    lines = [
        ["run", "cell", "seed", "gain", "retention change", *(["failed"] if figures["failures"] else [])]
    ]
    links = {}
    for cell in figures["cells"]:
        for run, seed, gain, kept in zip(
            cell["runs"], cell["seeds"], cell["gains"], cell["retention_changes"], strict=True
        ):
            lines.append([run, cell["name"], str(seed), number(gain, "+.1f"), number(kept, "+.1f")])
    for failure in figures["failures"]:
        lines.append([failure["run"], failure["cell"], str(failure["seed"]), "-", "-", failure["reason"]])
    for run, *_ in lines[1:]:
        for name in ("report.html", "results.json"):
            if (folder / FOLDERS / run / name).exists():
                links[run] = (place / run / name).as_posix()
                break
    return table(lines, links)


def panels_of(figures: Figures, kind: str) -> list[plots.Panel]:
    """One panel an outcome, all with the same effects in the same order."""
    chosen = [line for line in figures["effects"] if line["kind"] == kind]
    names = list(dict.fromkeys(line["name"] for line in chosen))
    nothing = {"value": float("nan"), "low": None, "high": None}
    panels: list[plots.Panel] = []
    for outcome in ("task_accuracy", "retention_accuracy", "train_s"):
        by_name = {line["name"]: line for line in chosen if line["outcome"] == outcome}
        if by_name:
            lines = [by_name.get(name, nothing) for name in names]
            panels.append(
                (
                    OUTCOMES[outcome],
                    [(n, x["value"], x["low"], x["high"]) for n, x in zip(names, lines, strict=True)],
                )
            )
    return panels


def figures_of(figures: Figures, margin: float) -> dict[str, plots.Plot]:
    """Every figure of a task by name: kinds of effects, `interaction`, `trade-off`."""
    drawn = {}
    for kind in ("main", "one-in", "leave-one-out", "shapley"):
        panels = panels_of(figures, kind)
        if panels:
            drawn[kind] = plots.forest(panels, margin)
    pairs = {
        tuple(line["name"].split(" x ")): (
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
