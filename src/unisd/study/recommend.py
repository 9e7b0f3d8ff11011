"""A study's figures in plain words: verdicts, tables, and a configuration that keeps what has paid.

A mechanism is kept only if its gain (or the forgetting it prevents) is beyond chance after adjustment for everything asked at once;
"not worth it" needs an interval that rules out effects above the margin; everything else is undecided, and says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from unisd.artefacts import write_json
from unisd.pages import markdown_table
from unisd.study.design import Study
from unisd.study.estimate import Estimate

ALPHA = 0.05
Figures = dict[str, Any]


def shown(estimate: Estimate | Figures | None, unit: str = "") -> str:
    """`+3.1 [1.2, 5.0]`."""
    if estimate is None:
        return "-"
    value, low, high = (
        (estimate.value, estimate.low, estimate.high)
        if isinstance(estimate, Estimate)
        else (estimate["value"], estimate["low"], estimate["high"])
    )
    interval = "" if low is None or high is None else f" [{_plain(low)}, {_plain(high)}]"
    return f"{round(value, 1) + 0.0:+.1f}{unit}{interval}"


def _plain(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}"  # never -0.0


def verdict(
    task: Estimate | None,
    p_task: float | None,
    retention: Estimate | None,
    p_retention: float | None,
    margin: float,
    cost_percent: float | None,
) -> tuple[str, str]:
    """`keep`, `drop`, `trade`, `no effect` or `undecided`, and why in one line. Effects in points, p-values adjusted."""

    def sign(estimate: Estimate | None, p: float | None) -> int:
        if estimate is None or p is None or p >= ALPHA:
            return 0
        return 1 if estimate.value > 0 else -1

    on_task, on_retention = sign(task, p_task), sign(retention, p_retention)
    known = [estimate for estimate in (task, retention) if estimate is not None]
    small = all(e.low is not None and e.high is not None and -margin <= e.low and e.high <= margin for e in known)
    time = "" if cost_percent is None else f"{round(cost_percent):+d} % time"
    if on_task * on_retention < 0:
        decision, why = "trade", "gains on the task, forgets more" if on_task > 0 else "forgets less, loses on the task"
    elif on_task + on_retention > 0:
        decision, why = "keep", "keep" if on_task > 0 else "keep: forgets less"
    elif on_task + on_retention < 0:
        decision, why = "drop", "drop: " + ("loses on the task" if on_task < 0 else "forgets more")
    elif known and small:
        worth = f"not worth {cost_percent:.0f} % time" if cost_percent is not None and cost_percent >= 1 else "no gain"
        decision, why = "no effect", f"{worth} (effects above {margin:g} points are ruled out)"
    else:
        decision, why = "undecided", "undecided: more seeds or problems are needed"
    figures = (
        [f"task {shown(task)}"] + ([f"retention {shown(retention)}"] if retention is not None else []) + ([time] if time else [])
    )
    return decision, f"{', '.join(figures)}: {why}"


def recommended(study: Study, found: Figures, task: str) -> Figures:
    """Options for `unisd train --config`: the study's base with every mechanism off that was not kept, every option at its best level."""
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
            for level in list(factor.levels)[1:]
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
        lines = [f"# From a study of {found['tasks'][task]['runs']} runs on {task}; run it with: unisd train --config {name}"]
        lines += [f"# {line['text']}" for line in found["tasks"][task]["verdicts"]]
        body = yaml.safe_dump(recommended(study, found, task), sort_keys=False)
        (folder / name).write_text("\n".join(lines) + "\n" + ("" if body == "{}\n" else body), encoding="utf-8")


def console_lines(found: Figures) -> list[str]:
    lines = []
    for task, figures in found["tasks"].items():
        failed = f", {figures['failed']} failed" if figures["failed"] else ""
        lines.append(f"{task}: {figures['runs']} of {figures['planned']} runs{failed}")
        lines += [f"  {line['text']}" for line in figures["verdicts"]]
    return lines


OUTCOMES = {
    "task_accuracy": "task (points)",
    "retention_accuracy": "retention (points)",
    "train_s": "training time (%)",
    "flops": "operations (%)",
    "reference_ppl": "perplexity of references (%)",
    "retention_ppl": "retention perplexity (%)",
}
TITLES = {
    "main": "Main effects",
    "one-in": "Added alone to the reference",
    "leave-one-out": "All, less all without it",
    "interaction": "Two-way interactions",
    "shapley": "Shapley shares of the difference between all and none",
}


def effect_table(figures: Figures, kind: str) -> list[list[str]]:
    """Header and lines: one effect a line, its estimate for each outcome in a column."""
    chosen = [line for line in figures["effects"] if line["kind"] == kind]
    outcomes = [name for name in OUTCOMES if any(line["outcome"] == name for line in chosen)]
    with_p = kind == "main"
    header = ["effect", *(OUTCOMES[name] for name in outcomes)] + (["p task / retention (Holm)"] if with_p else [])
    table = [header]
    for name in dict.fromkeys(line["name"] for line in chosen):
        by_outcome = {line["outcome"]: line for line in chosen if line["name"] == name}
        cells = [name, *(shown(by_outcome.get(outcome)) for outcome in outcomes)]
        if with_p:
            ps = [by_outcome.get(outcome, {}).get("p_holm") for outcome in ("task_accuracy", "retention_accuracy")]
            cells.append(" / ".join("-" if p is None else f"{p:.3f}" for p in ps))
        table.append(cells)
    return table


def number(value: float | None, form: str = ".1f", by: float = 1.0) -> str:
    return "-" if value is None else format(value * by, form)


def cost_table(figures: Figures) -> list[list[str]]:
    """One cell a line: what it reached and what it cost, means over its runs (memory: the most)."""
    header = [
        "cell", "runs", "task %", "gain", "retention change", "train s", "tokens generated", "tokens scored", "M tokens / device-hour",
        "GFLOP", "peak MiB", "kWh / M tokens",
    ]  # fmt: skip
    return [header] + [
        [
            cell["name"],
            str(len(cell["runs"])),
            number(cell["task_accuracy"], ".1f", 100),
            number(cell["gain"], "+.1f"),
            number(cell["retention_change"], "+.1f"),
            number(cell["train_s"]),
            number(cell["tokens_generated"], ",.0f"),
            number(cell["tokens_scored"], ",.0f"),
            number(cell["million_tokens_per_device_hour"], ".2f"),
            number(cell["flops"], ",.0f", 1e-9),
            number(cell["peak_memory_bytes"], ",.0f", 1 / (1 << 20)),
            number(cell["kwh_per_million_tokens"], ".3g"),
        ]
        for cell in figures["cells"]
    ]


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
        parts += [f"- **{line['verdict']}** {line['text']}" for line in figures["verdicts"]]
        for kind, title in TITLES.items():
            table = effect_table(figures, kind)
            if len(table) > 1:
                parts += ["", f"### {title}", "", *markdown_table(table[0], table[1:])]
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
