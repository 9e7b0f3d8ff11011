"""A study's figures in plain words: verdicts, tables, and a configuration that keeps what has paid.

A mechanism is kept only if its gain (or the forgetting it prevents) is beyond chance after
adjustment for everything asked at once, may reach the margin, and a loss of more than the margin is
ruled out for all else that was measured: the task and each retention set. "Not worth it" needs an
interval that rules out effects above the margin. Everything else is undecided, and says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from unisd.console import markdown_table, number
from unisd.files import write_json
from unisd.study.controls import PREFIX
from unisd.study.design import Study
from unisd.study.estimate import ONE_RUN, Estimate

ALPHA = 0.05
TASK, RETENTION = "task", "retention"
"""Accuracies by what a verdict calls them; further retention sets have their own names."""
Figures = dict[str, Any]
Accuracies = Mapping[str, tuple[Estimate | None, float | None]]


def shown(estimate: Estimate | Figures | None, digits: int = 1) -> str:
    """`+3.1 [1.2, 5.0]`."""
    if estimate is None:
        return "-"
    value, low, high = (
        (estimate.value, estimate.low, estimate.high)
        if isinstance(estimate, Estimate)
        else (estimate["value"], estimate["low"], estimate["high"])
    )
    interval = "" if low is None or high is None else f" [{_plain(low, digits)}, {_plain(high, digits)}]"
    return f"{round(value, digits) + 0.0:+.{digits}f}{interval}"


def _plain(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # never -0.0


def verdict(
    accuracies: Accuracies, margin: float, cost: Estimate | None, cost_of: str = "time"
) -> tuple[str, str]:
    """`keep`, `drop`, `trade`, `no effect` or `undecided`, and why in one line.

    Args:
        accuracies: of the task and of each retention set by its name, the effect in points with its
            adjusted p-value.
        cost: of time or of operations (`cost_of`), in percent.
    """
    known = {name: found for name, (found, _) in accuracies.items() if found is not None}
    signs = {name: _sign(*accuracies[name]) for name in known}
    decision, why = _decide(known, signs, margin)
    if decision == "no effect":
        change = 0 if cost is None or cost.covers_zero else round(cost.value)
        worth = (
            f"not worth {change} % {cost_of}"
            if change > 0
            else "no gain"
            if change == 0
            else f"saves {-change} % {cost_of}"
        )
        why = f"{worth} ({why})"
    figures = [f"{name} {shown(found)}" for name, found in known.items()]
    figures += [] if cost is None else [f"{shown(cost, digits=0)} % {cost_of}"]
    notes = _notes(known)
    return decision, f"{', '.join(figures)}: {why}" + (f" [{'; '.join(notes)}]" if notes else "")


def _notes(known: Mapping[str, Estimate]) -> list[str]:
    """What limits the estimates, each once, with their names where it is not about all."""
    about: dict[str, list[str]] = {}
    for name, estimate in known.items():
        for note in dict.fromkeys(_warnings(estimate.note)):
            if note != ONE_RUN:
                about.setdefault(note, []).append(name)
    return [
        note if len(names) == len(known) else f"{', '.join(names)}: {note}" for note, names in about.items()
    ]


def _warnings(note: str) -> list[str]:
    """The parts of a note that limit what follows.

    Without those that say how an estimate is made.
    """
    return [
        part for part in note.split("; ") if part and not part.startswith(("mean of", "linear model with"))
    ]


def _sign(estimate: Estimate | None, p: float | None) -> int:
    if estimate is None or p is None or p >= ALPHA:
        return 0
    return 1 if estimate.value > 0 else -1


def _decide(known: Mapping[str, Estimate], signs: Mapping[str, int], margin: float) -> tuple[str, str]:
    if any(ONE_RUN in estimate.note for estimate in known.values()):
        return "undecided", "undecided (one seed): training noise is not in the intervals"
    if known and all(_most(estimate, side) <= margin for estimate in known.values() for side in (1, -1)):
        return "no effect", f"effects above {margin:g} points are ruled out"
    clear = {side: [name for name, sign in signs.items() if sign == side] for side in (1, -1)}
    if clear[1] and clear[-1]:
        return "trade", f"{_moves(clear[1], 1)}, {_moves(clear[-1], -1)}"
    side = 1 if clear[1] else -1
    if not clear[side]:
        return "undecided", "undecided: more seeds or problems are needed"
    what = _moves(clear[side], side)
    if max(_most(known[name], side) for name in clear[side]) <= margin:
        return "undecided", f"undecided: {what}, but by no more than {margin:g} points"
    perhaps = [name for name in known if not signs[name] and _most(known[name], -side) > margin]
    if perhaps:
        may = _moves(perhaps, -side)
        return "undecided", f"undecided: {what}, but perhaps {may}; more seeds or problems are needed"
    if side < 0:
        return "drop", f"drop: {what}"
    return "keep", "keep" if TASK in clear[side] else f"keep: {what}"


def _moves(names: Sequence[str], side: int) -> str:
    """`gains on the task and forgets less of general`."""
    said = [("gains" if side > 0 else "loses") + " on the task"] if TASK in names else []
    forgets = "forgets less" if side > 0 else "forgets more"
    said += [forgets] if RETENTION in names else []
    said += [f"{forgets} of {name}" for name in names if name not in (TASK, RETENTION)]
    return " and ".join(said)


def _most(estimate: Estimate, side: int) -> float:
    """How far the interval reaches on one side of 0."""
    end = estimate.high if side > 0 else estimate.low
    return float("inf") if end is None else side * end


def recommended(study: Study, found: Figures, task: str) -> Figures:
    """Write options for `unisd train --config`.

    The study's base with every mechanism off that was not kept, every option at its best level.
    """
    options = {**study.base, **study.tasks.get(task, {})}
    verdicts = {line["name"]: line["verdict"] for line in found["tasks"][task]["verdicts"]}
    effects = {
        line["name"]: line["value"]
        for line in found["tasks"][task]["effects"]
        if line["kind"] == "main" and line["outcome"] == "task_accuracy"
    }
    from unisd.study.contrasts import effect_name

    for factor in study.factors:
        kept = [
            (effects.get(effect_name(factor, level), 0.0), level)
            for level in factor.others
            if verdicts.get(effect_name(factor, level)) == "keep"
        ]
        options |= factor.levels[max(kept)[1] if kept else factor.baseline]
    return options


# ---------------------------------------------------------------- files


def write(folder: Path, study: Study, found: Figures) -> None:
    """`analysis.json`, `analysis.md`, and `recommended.yaml` (several tasks: one each)."""
    write_json(folder / "analysis.json", found)
    (folder / "analysis.md").write_text(markdown(found), encoding="utf-8")
    for task in found["tasks"]:
        name = "recommended.yaml" if len(found["tasks"]) == 1 else f"recommended-{task}.yaml"
        lines = [
            f"# From a study of {found['tasks'][task]['runs']} runs on {task}; run it with: unisd train"
            f" --config {folder / name}"
        ]
        lines += [f"# {line['text']}" for line in found["tasks"][task]["verdicts"]]
        body = yaml.safe_dump(recommended(study, found, task), sort_keys=False)
        (folder / name).write_text(
            "\n".join(lines) + "\n" + ("" if body == "{}\n" else body), encoding="utf-8"
        )


def console_lines(found: Figures) -> list[str]:
    lines = []
    for task, figures in found["tasks"].items():
        failed = f", {figures['failed']} failed" if figures["failed"] else ""
        lines.append(f"{task}: {figures['runs']} of {figures['planned']} runs{failed}")
        lines += [f"  {line['text']}" for line in figures["verdicts"]]
        if figures.get("controls"):
            lines.append(f"  {figures['controls']['text']}")
    return lines


OUTCOMES = {
    "task_accuracy": "task (points)",
    "retention_accuracy": "retention (points)",
    "train_s": "training time (%)",
    "flops": "operations (%)",
    "reference_ppl": "perplexity of references (%)",
    "retention_ppl": "perplexity under the base (%)",
    "base_ppl": "perplexity of the base's answers (%)",
}
OUTCOMES_JUDGED = ("task_accuracy", "retention_accuracy")
"""And those of further retention sets (`judged_of`)."""
TITLES = {
    "main": "Main effects",
    "one-in": "Added alone to the reference",
    "leave-one-out": "All, less all without it",
    "interaction": "Two-way interactions",
    "shapley": "Shapley shares of the difference between all and none",
}


def judged_of(lines: Sequence[Figures]) -> list[str]:
    """The accuracies among the outcomes of effects, the task's first."""
    found = dict.fromkeys(line["outcome"] for line in lines)
    further = [outcome for outcome in found if outcome not in OUTCOMES]
    return [outcome for outcome in OUTCOMES_JUDGED if outcome in found] + further


def title_of(outcome: str) -> str:
    """The head of an outcome's column; that of a further retention set is its name."""
    return OUTCOMES.get(outcome) or f"{name_of(outcome)} (points)"


def name_of(accuracy: str) -> str:
    """What a verdict calls an accuracy."""
    return accuracy.removesuffix("_accuracy").removeprefix(f"{RETENTION} ")


def effect_table(figures: Figures, kind: str) -> list[list[str]]:
    """Header and lines: one effect a line, its estimate for each outcome in a column."""
    chosen = [line for line in figures["effects"] if line["kind"] == kind]
    judged = judged_of(chosen)
    told = {line["outcome"] for line in chosen}
    outcomes = judged + [name for name in OUTCOMES if name in told and name not in judged]
    with_p = kind == "main"
    named = " / ".join(map(name_of, judged))
    header = ["effect", *map(title_of, outcomes)] + ([f"p {named} (Holm)"] if with_p else [])
    table = [header]
    for name in dict.fromkeys(line["name"] for line in chosen):
        by_outcome = {line["outcome"]: line for line in chosen if line["name"] == name}
        cells = [name, *(shown(by_outcome.get(outcome)) for outcome in outcomes)]
        if with_p:
            ps = [by_outcome.get(outcome, {}).get("p_holm") for outcome in judged]
            cells.append(" / ".join("-" if p is None else f"{p:.3f}" for p in ps))
        table.append(cells)
    return table


def notes_of(figures: Figures, kind: str) -> list[str]:
    """What limits a table's effects on accuracies, each warning once.

    With the effects that it is about where it is not about all.
    """
    of_kind = [line for line in figures["effects"] if line["kind"] == kind]
    judged = judged_of(of_kind)
    chosen = [line for line in of_kind if line["outcome"] in judged]
    about: dict[str, dict[str, None]] = {}
    for line in chosen:
        for note in _warnings(line["note"]):
            about.setdefault(note, {})[line["name"]] = None
    count = len({line["name"] for line in chosen})
    return [
        f"{note}." if len(names) == count else f"{note} ({', '.join(names)})."
        for note, names in about.items()
    ]


def cost_table(figures: Figures) -> list[list[str]]:
    """One cell a line: what it reached and what it cost, means over its runs (memory: the most)."""
    header = [
        "cell", "runs", "task %", "gain", "retention change", "train s", "tokens generated",
        "tokens scored", "M tokens / device-hour", "GFLOP", "peak MiB", "kWh / M tokens",
    ]  # fmt: skip
    return [header] + [
        [
            cell["name"],
            str(len(cell["runs"])),
            number(cell["task_accuracy"], ".1f", 100),
            number(cell["gain"], "+.1f"),
            number(cell["retention_change"], "+.1f"),
            number(cell["train_s"], ".1f"),
            number(cell["tokens_generated"], ",.0f"),
            number(cell["tokens_scored"], ",.0f"),
            number(cell["million_tokens_per_device_hour"], ".2f"),
            number(cell["flops"], ",.0f", 1e-9),
            number(cell["peak_memory_bytes"], ",.0f", 1 / (1 << 20)),
            number(cell["kwh_per_million_tokens"], ".3g"),
        ]
        for cell in figures["cells"]
    ]


def control_table(figures: Figures) -> list[list[str]]:
    """Header and lines: what the method has over each control, and both their device seconds."""
    found = figures.get("controls")
    if not found:
        return []
    method, seconds = found["method"], {cell["name"]: cell["train_s"] for cell in figures["cells"]}
    further = list(dict.fromkeys(name for line in found["lines"] for name in line.get("further", {})))
    sides = ["task", "retention", *further]
    head = [f"{method} against", *(f"{name} (points)" for name in sides), "beaten", "train s"]
    lines = [
        [
            line["name"],
            *(shown({**line, **line.get("further", {})}[name]) for name in sides),
            "yes" if line["beaten"] else "no",
            number(seconds.get(f"{PREFIX}{line['name']}"), ".1f"),
        ]
        for line in found["lines"]
    ]
    return [
        head,
        *lines,
        [f"({method} itself)", *[""] * (1 + len(sides)), number(seconds.get(method), ".1f")],
    ]


def control_lines(figures: Figures) -> list[str]:
    """The part of the analysis on controls; none where there are none."""
    table = control_table(figures)
    if not table:
        return []
    text = str(figures["controls"]["text"])
    return ["", "### Controls", "", f"{text[0].upper()}{text[1:]}.", "", *markdown_table(table[0], table[1:])]


def markdown(found: Figures) -> str:
    parts = ["# What the study found", ""]
    for task, figures in found["tasks"].items():
        seeds = ", ".join(map(str, figures["seeds"]))
        parts += [
            f"## {task}",
            "",
            f"{figures['runs']} of {figures['planned']} runs, seeds {seeds}; {figures['failed']} failed.",
            "",
        ]
        parts += [f"- {failure['run']} failed: {failure['reason']}" for failure in figures["failures"]]
        parts += [""] if figures["failures"] else []
        parts += [f"- **{line['verdict']}** {line['text']}" for line in figures["verdicts"]]
        parts += control_lines(figures)
        for kind, title in TITLES.items():
            table = effect_table(figures, kind)
            if len(table) > 1:
                parts += ["", f"### {title}", "", *markdown_table(table[0], table[1:])]
                parts += [line for note in notes_of(figures, kind) for line in ("", note)]
        costs = cost_table(figures)
        parts += ["", "### Cells and their cost", "", *markdown_table(costs[0], costs[1:])]
        method = next((cell["energy_method"] for cell in figures["cells"] if cell["energy_method"]), None)
        if method:
            parts += ["", f"Energy: {method}."]
        parts.append("")
    return "\n".join([*parts, *found["notes"], ""])


def read(folder: Path) -> Figures:
    content: Figures = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
    return content
