"""Builds the page of one run.

Gains and losses, curves, alarms, where time and memory went, answers side by side, the supervision
view.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unisd.console import number
from unisd.errors import UserError
from unisd.evaluation import judge
from unisd.files import ANSWERS, METRICS, RESULTS, SAMPLES, is_evaluation, read_lines
from unisd.monitoring.alarms import Watch
from unisd.report import plots
from unisd.report.health import health
from unisd.report.html import render
from unisd.report.supervision import supervision
from unisd.report.verdict import Tile, sentence, tiles_of
from unisd.run import grafting
from unisd.run.answers import by_change
from unisd.run.changes import HEAD, change_lines, side_of

MAX_EXAMPLES = 24
MAX_POINTS = 1000
MAX_WEIGHTS = 12
MAIN: plots.Wanted = (
    ("Loss", "", {"loss": "loss"}),
    ("Divergence of teacher and student", "nats per token", {"divergence": "teacher/divergence"}),
    (
        "Verdicts on the answers",
        "share",
        {"passed": "outcome/passed", "mean score": "outcome/score", "no verdict": "outcome/no_verdict"},
    ),
    (
        "Length of completions",
        "tokens",
        {"mean": "completions/mean_length", "longest": "completions/max_length"},
    ),
    ("Student's entropy", "nats per token", {"entropy": "student/entropy"}),
)
"""What most runs are judged by; the others are folded."""
MORE: plots.Wanted = (
    ("Contrast", "nats per token", {"hinge": "contrastive/loss"}),
    ("Tokens with an active contrast", "share", {"active": "contrastive/active_share"}),
    ("Distance of features", "mean square", {"distance": "features/distance"}),
    (
        "Agreement weight",
        "",
        {"mean": "agreement/mean", "least": "agreement/min", "largest": "agreement/max"},
    ),
    ("Clipped tokens", "share", {"clipped": "clip/share"}),
    ("Clip threshold", "nats", {"threshold": "clip/threshold"}),
    ("Distance of the teacher's weights", "share of norm", {"distance": "teacher/weight_distance"}),
    ("Cut completions", "share", {"cut": "completions/truncated_share"}),
    (
        "Groups of which answers passed",
        "share",
        {"all": "outcome/groups_all", "some": "outcome/groups_some", "none": "outcome/groups_none"},
    ),
    (
        "Log-probability of the completion",
        "nats per token",
        {"student": "student/logp", "teacher": "teacher/logp"},
    ),
    (
        "Time of a step",
        "s",
        {name: f"step_time/{name}" for name in ("rollout", "verdict", "score", "student")},
    ),
    ("Learning rate", "", {"rate": "learning_rate"}),
)
Figures = dict[str, Any]
PARTS = {"task": "task", "retention": "retention"}
"""Names of the parts of `answers.json`; each further retention set has its own."""
DEFAULT_WINDOW = 5  # `alarm_window` of a run that has not written down its options


def build(folder: Path) -> str:
    """The page of the run in `folder`; of one that has not finished what there is.

    Raises:
        UserError: its results cannot be read.
    """
    if not (folder / RESULTS).exists():
        return _unfinished(folder)
    results = read_json(folder / RESULTS)
    metrics = read_metrics(folder / METRICS)
    facts = [
        ("recipe", results["recipe"]),
        ("model", Path(str(results["model"])).name),
        ("task", results["task"]),
        ("seed", results["seed"]),
        ("steps", results.get("steps", max((line["step"] for line in metrics), default=0))),
        ("time", f"{results['wall_s']:.0f} s"),
    ]
    shown, bars = tiles_of(results), _accuracy_rows(results)
    retained = bool(results["retention"])
    return render(
        "run.html",
        title=title_of(results),
        verdict=sentence(shown),
        shown=shown,
        facts=facts,
        changes=[[*HEAD], *change_lines(results)],
        bars=plots.before_after(bars).inline(wide=True) if bars else "",
        answers=_answers(read_answers(folder)),
        judged=[
            {"judge": found["judge"], "rows": [judge.head(found), *judge.lines(found)], "note": judge.NOTE}
            for found in judge.read(folder)
        ],
        grafted=[_grafted(points) for points in grafting.read(folder)],
        cost=_cost(results),
        settings=json.dumps(results["config"], indent=1, default=str),
        unfinished="",
        health=health(
            results.get("alarms"), metrics, results["config"].get("alarm_window", DEFAULT_WINDOW), retained
        ),
        **_drawn(folder, metrics),
    )


def title_of(results: Figures) -> str:
    return f"{results['recipe']} on {results['task']}"


def read_answers(folder: Path) -> Figures:
    return read_json(folder / ANSWERS) if (folder / ANSWERS).exists() else {}


def _drawn(folder: Path, metrics: Sequence[Figures]) -> Figures:
    """Curves and supervision, which a run has from its first steps on."""
    return {
        "curves": plots.curves((*evaluations(metrics), *MAIN), metrics),
        "more_curves": plots.curves((*MORE, *_by_weight(metrics)), metrics),
        "supervision": supervision(read_lines(folder / SAMPLES)),
    }


def _grafted(points: Sequence[grafting.Point]) -> Figures:
    """What parts of the change gain and keep: a plot of each task that has both, and the table."""
    drawn = []
    for task in dict.fromkeys(point["task"] for point in points):
        of_task = [point for point in points if point["task"] == task]
        base = next(point for point in of_task if point["scale"] == grafting.NONE)
        names = ("task_accuracy", "retention_accuracy")
        if all(point[name] is not None for point in of_task for name in names):
            gains = [
                [100 * (point[name]["value"] - base[name]["value"]) for name in names] for point in of_task
            ]
            labelled = [(f"{point['scale']:g}", *gain) for point, gain in zip(of_task, gains, strict=True)]
            drawn.append(plots.grafting(labelled).inline(wide=True))
    return {"drawn": drawn, "rows": [list(grafting.HEAD), *grafting.lines(points)]}


def _unfinished(folder: Path) -> str:
    """The page of a run without results, from its metrics and samples.

    An alarm, a crash or a person has ended it, or it goes on still.
    """
    metrics = read_metrics(folder / METRICS)
    lines = [line for line in read_lines(folder / METRICS) if not is_evaluation(line)]
    watch = Watch(DEFAULT_WINDOW)
    for line in lines:
        watch.update(line["step"], line)
    said = (
        "There is no results.json: an alarm (alarms=stop), an error or a person ended this run, or it"
        " is still running. Its answers were not measured after training. Alarms are judged again from"
        f" its metrics, with the default alarm_window of {DEFAULT_WINDOW}."
    )
    steps = str(lines[-1]["step"]) if lines else "0"
    count = len(watch.alarms)
    return render(
        "run.html",
        title=f"{folder.resolve().name}: unfinished",
        verdict="",
        shown=[Tile("state", "unfinished"), Tile("steps", steps), Tile("alarms", str(count))],
        facts=[],
        unfinished=said,
        health=health([asdict(alarm) for alarm in watch.alarms], metrics, DEFAULT_WINDOW),
        **dict.fromkeys(("changes", "answers", "judged", "grafted"), ()),
        **dict.fromkeys(("bars", "cost", "settings"), ""),
        **_drawn(folder, metrics),
    )


def _by_weight(metrics: Sequence[Figures]) -> plots.Wanted:
    """A figure of each reliability weight but agreement, which has its own."""
    names = sorted({key.split("/")[1] for line in metrics for key in line if key.startswith("weight/")})[
        :MAX_WEIGHTS
    ]
    kinds = {"mean": "mean", "least": "min", "largest": "max"}
    return [
        (
            f"Reliability weight {name[:24]}",
            "",
            {label: f"weight/{name}/{kind}" for label, kind in kinds.items()},
        )
        for name in names
    ]


def read_json(path: Path) -> Figures:
    try:
        content: Figures = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): give the folder of a finished run.") from None
    return content


def read_metrics(path: Path) -> list[Figures]:
    """Lines of `metrics.jsonl`: all evaluations, and so many steps as a plot can show.

    With those that hold what is measured now and then (a probe).
    """
    lines = read_lines(path)
    steps = [line for line in lines if not is_evaluation(line)]
    every = max(1, -(-len(steps) // MAX_POINTS))
    counts = Counter(name for line in steps for name in line)
    rare = {name for name, count in counts.items() if 2 * count < len(steps)}
    now_and_then = [place for place, line in enumerate(steps) if not rare.isdisjoint(line)]
    kept = {*range(0, len(steps), every), *now_and_then[:: max(1, -(-len(now_and_then) // MAX_POINTS))]}
    return [steps[place] for place in sorted(kept)] + [line for line in lines if is_evaluation(line)]


def evaluations(metrics: Sequence[Figures]) -> plots.Wanted:
    """A figure of each measure of the evaluations during training; one line each set of rows."""
    names = sorted({name for line in metrics for name in line if name.startswith("eval_")})
    kinds = (("loss", "nats per token"), ("accuracy", "share"))
    return [
        (f"Evaluations: {kind}", unit, {name.removeprefix("eval_"): name for name in found})
        for kind, unit in kinds
        if (found := [name for name in names if name.endswith(f"_{kind}")])
    ]


def _accuracy_rows(results: Figures) -> list[tuple[str, Figures, Figures]]:
    """The accuracies of the plot, by name, before and after."""
    before, after = results["before"], results["after"]
    old, new = (side_of(side, "task_accuracy", "skills") for side in (before, after))
    names = [one["name"] for one in results["retention"]]
    pairs = [("task", old, new)]
    pairs += [(name, before["retention"][name], after["retention"][name]) for name in names]
    rows = []
    for name, old, new in pairs:
        if new["accuracy"] is not None:
            rows.append((name, old["accuracy"], new["accuracy"]))
            rows += [
                (f"  {name}: {skill}", old["skills"][skill], value)
                for skill, value in (new["skills"] or {}).items()
            ]
    return rows


def _cost(results: Figures) -> Figures:
    phases = {name: seconds for name, seconds in results["phases_s"].items() if seconds >= 0.05}
    bars = plots.bars("Seconds by phase", phases, "s").inline(wide=True) if phases else ""
    cost = results.get("cost")
    if cost is None:
        return {"bars": bars, "lines": [], "mechanisms": []}
    tokens, energy, flops = cost["tokens"], cost["energy"], cost["flops_estimated"]
    whole = cost.get("steps") in (None, results["steps"])
    lines = [
        ["cost of training" if whole else f"cost of the last {cost['steps']} steps, since a resume", ""],
        ["tokens generated", f"{tokens['generated']:,}"],
        ["tokens scored without gradient", f"{tokens['scored']:,}"],
        *[[f"  of the {view} view", f"{count:,}"] for view, count in tokens["scored_by_view"].items()],
        ["tokens trained on (prompt and completion)", f"{tokens['trained']:,}"],
        ["million trained tokens per device-hour", number(cost["million_tokens_per_device_hour"], ".2f")],
        [f"peak memory of {cost['peak_memory_of']}", f"{cost['peak_memory_bytes'] / (1 << 20):,.0f} MiB"],
        ["operations, estimated (10^12)", f"{flops['total'] / 1e12:,.2f}"],
        ["kWh", number(energy["kwh"], ".3g")],
        ["kWh per million trained tokens", number(energy["kwh_per_million_tokens"], ".3g")],
        ["energy by", energy["method"]],
    ]
    mechanisms = [
        [
            name,
            f"{part['tokens_scored']:,}",
            f"{100 * part['share_of_flops']:.1f} %",
            f"{part['seconds_estimated']:.1f}",
        ]
        for name, part in cost["by_mechanism"].items()
    ]
    header = ["mechanism", "tokens scored for it", "share of operations", "seconds (estimated)"]
    return {"bars": bars, "lines": lines, "mechanisms": [header, *mechanisms] if mechanisms else []}


def _answers(parts: Figures) -> list[Figures]:
    """Some answers of both states side by side: first what changed."""
    found = []
    for part, content in parts.items():
        examples = content["examples"]
        graded = any(example["after"]["correct"] is not None for example in examples)
        most = MAX_EXAMPLES // 4 if graded else MAX_EXAMPLES  # all kinds are shown, whichever is rarer
        chosen = [example for kind in by_change(examples) for example in kind[:most]][:MAX_EXAMPLES]
        shown = [
            {**example, "sides": [{"name": when, **example[when]} for when in ("before", "after")]}
            for example in chosen
        ]
        if shown:
            found.append({"name": PARTS.get(part, part), "shown": shown, "kept": len(examples)})
    return found
