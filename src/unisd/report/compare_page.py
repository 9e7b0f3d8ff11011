"""Builds the page of several runs side by side.

Results, tests on the same rows, what was set otherwise, answers to the same prompts, curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from unisd.errors import UserError
from unisd.evaluation.grading import percent
from unisd.files import METRICS, RESULTS
from unisd.report import plots
from unisd.report.html import render
from unisd.report.run_page import MAIN, MORE, PARTS, evaluations, read_answers, read_json, read_metrics
from unisd.report.verdict import tiles_of
from unisd.run.changes import items

MAX_RUNS = 8
"""As many as eight kinds of lines can tell apart."""
MAX_PROMPTS = 24
MAX_VALUE = 200  # characters of an option
PLACES = {"output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "overwrite_output_dir"}
"""Options that say where a run is, not what it does."""
Figures = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a finished run wrote."""

    name: str
    results: Figures
    answers: Figures
    metrics: Sequence[Figures]


def build(folders: Sequence[Path]) -> str:
    """The page of the runs in `folders`.

    Raises:
        UserError: too many, one twice, or one that is not a finished run.
    """
    runs = read(folders)
    tested, untested = paired(runs)
    metrics = {run.name: run.metrics for run in runs}
    every = [line for run in runs for line in run.metrics]
    return render(
        "compare.html",
        title=f"{len(runs)} runs side by side",
        verdict="",
        runs=_table(runs),
        paired=tested,
        unpaired=untested,
        options=_options(runs),
        answers=_answers(runs),
        curves=plots.overlaid((*evaluations(every), *MAIN), metrics),
        more_curves=plots.overlaid(MORE, metrics),
    )


def read(folders: Sequence[Path]) -> list[Run]:
    """What the runs wrote; raises as `build` does."""
    if len(folders) > MAX_RUNS:
        raise UserError(f"{len(folders)} runs are too many for one page: give at most {MAX_RUNS}.")
    whole = [folder.resolve() for folder in folders]
    if len(set(whole)) < len(whole):
        twice = next(folder for folder in whole if whole.count(folder) > 1)
        raise UserError(f"{twice} is given twice: give every run once.")
    for folder in folders:
        if not (folder / RESULTS).is_file():
            raise UserError(
                f"{folder} holds no {RESULTS}: only finished runs can be compared; unisd report"
                f" {folder} shows this one."
            )
    names = _names(whole)
    return [
        Run(name, read_json(folder / RESULTS), read_answers(folder), read_metrics(folder / METRICS))
        for name, folder in zip(names, folders, strict=True)
    ]


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths by which all can be told apart."""
    length = 1
    while len({folder.parts[-length:] for folder in folders}) < len(folders):
        length += 1
    return ["/".join(folder.parts[-length:]) for folder in folders]


def _table(runs: Sequence[Run]) -> list[list[str]]:
    """A line for each run: verdicts with their figures, and what it cost."""
    names = list(dict.fromkeys(tile.name for run in runs for tile in tiles_of(run.results)))
    lines = [["run", "recipe", "task after", *names, "time", "tokens trained", "peak memory"]]
    for run in runs:
        results, cost = run.results, run.results.get("cost")
        steps = None if cost is None else cost.get("steps")
        since = "" if steps in (None, results["steps"]) else f" (last {steps} steps)"  # of a resumed run
        said = {tile.name: ", ".join(filter(None, (tile.value, tile.word))) for tile in tiles_of(results)}
        lines.append(
            [
                run.name,
                str(results["recipe"]),
                percent(results["after"]["task_accuracy"]),
                *(said.get(name, "-") for name in names),
                f"{results['wall_s']:.0f}\u00a0s{since}",
                "-" if cost is None else f"{cost['tokens']['trained']:,}{since}",
                "-" if cost is None else f"{cost['peak_memory_bytes'] / (1 << 20):,.0f} MiB",
            ]
        )
    return lines


def paired(runs: Sequence[Run]) -> tuple[list[Figures], str]:
    """Each two runs on the rows that both answered; and which could not be compared."""
    found, missing = [], set()
    for part in dict.fromkeys(part for run in runs for part in run.answers):
        rows = []
        for one, other in combinations(runs, 2):
            sides = [run.answers.get(part) for run in (one, other)]
            if not _same_rows(sides):
                missing.add(f"{one.name} and {other.name} ({PARTS.get(part, part)})")
                continue
            counts = items(*(side["after"] for side in sides if side is not None))
            difference = 100 * (counts["gained"] - counts["lost"]) / max(sum(_counts(counts)), 1)
            rows.append(
                [
                    f"{one.name} / {other.name}",
                    *(str(count) for count in _counts(counts)),
                    f"{difference:+.1f}",
                    f"{counts['p']:.2g}",
                ]
            )
        head = ["first / second", "both right", "first only", "second only", "neither"]
        if rows:
            found.append(
                {"name": PARTS.get(part, part), "rows": [[*head, "second's points more", "p"], *rows]}
            )
    said = "; ".join(sorted(missing))
    return found, f"Not the same graded rows, so not tested: {said}." if missing else ""


def _counts(found: Figures) -> list[int]:
    return [found[name] for name in ("kept", "lost", "gained", "neither")]


def _same_rows(sides: Sequence[Figures | None]) -> bool:
    """Whether both have verdicts on the same rows: by their ids, and the prompts that are kept."""
    one, other = sides
    if one is None or other is None or one["after"] is None or other["after"] is None:
        return False
    kept = zip(one["examples"], other["examples"], strict=False)
    return one["ids"] == other["ids"] and all(a["prompt"] == b["prompt"] for a, b in kept)


def _options(runs: Sequence[Run]) -> list[list[str]]:
    """The options that differ, a line each."""
    configs = [run.results["config"] for run in runs]
    lines = [["option", *(run.name for run in runs)]]
    for name in dict.fromkeys(name for config in configs for name in config):
        values = [str(config.get(name, "-")) for config in configs]
        if name not in PLACES and len(set(values)) > 1:
            lines.append([name, *(value[:MAX_VALUE] for value in values)])
    return lines


def _answers(runs: Sequence[Run]) -> list[Figures]:
    """What all runs answered to the same prompts: first where their verdicts, then texts differ."""
    found = []
    for part in runs[0].answers:
        kept = [_by_prompt(run.answers.get(part)) for run in runs]
        common = [key for key in kept[0] if all(key in others for others in kept[1:])]
        cards = [_card(runs, [examples[key] for examples in kept]) for key in common]
        cards.sort(key=lambda card: _sameness(card["sides"]))
        if cards:
            found.append({"name": PARTS.get(part, part), "shown": cards[:MAX_PROMPTS], "kept": len(cards)})
    return found


def _by_prompt(part: Figures | None) -> dict[tuple[str, str], Figures]:
    return {(one["id"], one["prompt"]): one for one in part["examples"]} if part else {}


def _card(runs: Sequence[Run], examples: Sequence[Figures]) -> Figures:
    before = [example["before"] for example in examples]
    sides = [{"name": run.name, **one["after"]} for run, one in zip(runs, examples, strict=True)]
    if all(side["text"] == before[0]["text"] for side in before):  # one base: its answer too
        sides.insert(0, {"name": "before", **before[0]})
    return {**examples[0], "sides": sides}


def _sameness(sides: Sequence[Mapping[str, Any]]) -> int:
    """0 where verdicts differ, 1 where only texts do, 2 where nothing does, but for `before`."""
    after = [side for side in sides if side["name"] != "before"]
    if len({side["correct"] for side in after}) > 1:
        return 0
    return 1 if len({side["text"] for side in after}) > 1 else 2
