"""Analyses a study's store: outcomes of runs, effects of factors, verdicts.

Effects have 95 % intervals.

Accuracies are in points (percent of problems); times, operations and perplexities are compared as
ratios, in percent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import numpy as np

from unisd.study.against import compare
from unisd.study.contrasts import Effect, effects_of
from unisd.study.controls import parts_of
from unisd.study.design import Cell, Options, Study, cells_of, controls_of, method_levels, runs_of
from unisd.study.estimate import NO_ANSWERS, ONE_RUN, Estimate, Fit, Values, holm
from unisd.study.recommend import RETENTION, TASK, name_of, verdict
from unisd.study.store import DONE, FAILED, Record, Store, with_a_part

SCHEMA_VERSION = 1
POINTS = {"task_accuracy": TASK, "retention_accuracy": RETENTION}
"""Accuracies, and the part of the answers that each is of.

Further retention sets are outcomes by the name of their part, `retention NAME`.
"""
RATIOS = ("train_s", "flops", "reference_ppl", "retention_ppl", "base_ppl")
Figures = dict[str, Any]


def analyse(study: Study, store: Store, margin: float = 1.0) -> Figures | None:
    """Compute all that the reports show, as `analysis.json` holds it.

    None while no run has finished.

    Args:
        margin: smallest effect that matters, in points.
    """
    records = of_study(study, store.runs())
    cells = cells_of(study)
    tasks = {}
    for task in study.tasks:
        chosen = [record for record in records.values() if record["task"] == task]
        if any(record["status"] == DONE for record in chosen):
            tasks[task] = _of_task(study, task, cells, chosen, margin)
    if not tasks:
        return None
    others = len(store.runs()) - len(records)
    left_out = f"{others} runs of the store have other settings than study.yaml, and are left out."
    return {
        "schema_version": SCHEMA_VERSION,
        "margin": margin,
        "design": study.design,
        "factors": {factor.name: list(factor.levels) for factor in study.factors},
        "tasks": tasks,
        "notes": [
            (
                "Effects in points are differences of accuracies on the same problems with the same seeds."
                f" {_reach(tasks)}"
            ),
            (
                "p (Holm) is adjusted for all main effects on task and retention of one task together;"
                " intervals are not adjusted."
            ),
            (
                "Times were measured beside other work of the machine; operations are an estimate, and the"
                " same on any machine."
            ),
            *([left_out] if others else []),
        ],
    }


def of_study(study: Study, records: dict[str, Record]) -> dict[str, Record]:
    """Choose the records of runs that the study, as it now is, is made of.

    An id holds every option and the seed.
    """
    ids = {run.id for run in runs_of(study)}
    return {run_id: record for run_id, record in records.items() if run_id in ids}


def _reach(tasks: dict[str, Figures]) -> str:
    """What the intervals of accuracies hold for."""
    notes = {
        line["note"] for task in tasks.values() for line in task["effects"] if line["outcome"] not in RATIOS
    }
    if any(ONE_RUN in note for note in notes):
        return (
            "Their 95 % intervals do not include training noise, which needs two seeds or more: no"
            " verdict follows from them."
        )
    problems = (
        "on these problems"
        if any(NO_ANSWERS in note for note in notes)
        else "and other problems of the same kind"
    )
    return (
        f"Their 95 % intervals hold for other seeds {problems}, and assume that training noise is equal"
        " in all cells."
    )


def _of_task(
    study: Study, task: str, cells: Sequence[Cell], records: Sequence[Record], margin: float
) -> Figures:
    table = {(record["cell"], record["seed"]): record for record in records if record["status"] == DONE}
    effects = effects_of(cells, study.factors)
    found: list[Figures] = []
    accuracies = accuracies_of(list(table.values()))
    for outcome in (*accuracies, *RATIOS):
        fit, notes = _fit(outcome, cells, study.seeds, table)
        for effect in effects if fit is not None else ():
            if outcome in RATIOS and effect.kind in ("shapley", "interaction"):
                continue
            estimate = fit.contrast(effect.weights) if fit is not None else None
            if estimate is not None:
                found.append(_line(effect, outcome, estimate, notes))
    asked = [
        line
        for line in found
        if line["kind"] == "main" and line["outcome"] in accuracies and line["p"] is not None
    ]
    for line, p in zip(asked, holm([line["p"] for line in asked]), strict=True):
        line["p_holm"] = p

    verdicts = _verdicts(effects, found, accuracies, margin)
    runs = controls_of(study, cells, study.tasks[task])
    controls = [cell for cell, _ in runs]
    count, planned = len(table), (len(cells) + len(controls)) * len(study.seeds)
    table, parts = _with_parts(runs, table)
    return {
        "runs": count,
        "controls": _against(study, cells, controls, parts, table, margin) if controls else None,
        "failed": sum(record["status"] == FAILED for record in records),
        "failures": [
            {name: record[name] for name in ("run", "cell", "seed", "reason")}
            for record in records
            if record["status"] == FAILED
        ],
        "planned": planned,
        "seeds": sorted({seed for _, seed in table}),
        "cells": [
            _cell(cell, study, table)
            for cell in [*cells, *controls, *(Cell(name, {}) for name in parts)]
            if any(name == cell.name for name, _ in table)
        ],
        "effects": found,
        "verdicts": verdicts,
    }


def accuracies_of(records: Sequence[Record]) -> list[str]:
    """The outcomes of runs that are accuracies: of the task, and of each graded retention set."""
    parts = dict.fromkeys(part for record in records for part in record["answers"])
    return [*POINTS, *(part for part in parts if part not in POINTS.values())]


def _with_parts(
    runs: Sequence[tuple[Cell, Options]], table: dict[tuple[str, int], Record]
) -> tuple[dict[tuple[str, int], Record], dict[str, str]]:
    """The table with what the runs of controls bring beside their own cells.

    And the names of these cells, each with the name of the one whose runs they are parts of.
    """
    table, parts = dict(table), {}
    for cell, options in runs:
        of_cell = {seed: record for (name, seed), record in table.items() if name == cell.name}
        for scale, name in parts_of(cell.name, options).items():
            found = {seed: with_a_part(record, scale) for seed, record in of_cell.items()}
            table |= {(name, seed): part for seed, part in found.items() if part is not None}
            parts[name] = cell.name
    return table, parts


def _verdicts(
    effects: Sequence[Effect], found: Sequence[Figures], accuracies: Sequence[str], margin: float
) -> list[Figures]:
    """What to make of each main effect, in words."""

    def main(name: str, outcome: str) -> Figures | None:
        return next(
            (x for x in found if (x["kind"], x["name"], x["outcome"]) == ("main", name, outcome)), None
        )

    verdicts = []
    for name in dict.fromkeys(effect.name for effect in effects if effect.kind == "main"):
        lines = {outcome: main(name, outcome) for outcome in accuracies}
        time, operations = (_estimate(main(name, outcome)) for outcome in ("train_s", "flops"))
        # Operations are the same on any machine: they tell what a time that scatters cannot.
        unclear = time is None or (time.covers_zero and operations is not None)
        decision, text = verdict(
            {name_of(outcome): (_estimate(line), _p(line)) for outcome, line in lines.items()},
            margin,
            operations if unclear else time,
            "operations" if unclear else "time",
        )
        verdicts.append({"name": name, "verdict": decision, "text": f"{name}: {text}"})
    return verdicts


def _against(
    study: Study,
    cells: Sequence[Cell],
    controls: Sequence[Cell],
    parts: Mapping[str, str],
    table: dict[tuple[str, int], Record],
    margin: float,
) -> Figures:
    """The method's cell against the study's controls.

    Training noise is told from cells that were trained: a part of a change has a part of its run's
    noise, and takes that run's place where it is compared.
    """
    levels = method_levels(study, cells)
    method = next(cell for cell in cells if cell.levels == levels)

    @cache
    def fitted(part: str | None, outcome: str) -> tuple[list[Cell], Fit | None]:
        """Of all trained cells, a part of one in its place."""
        whole = None if part is None else parts[part]
        chosen = [method, *(Cell(str(part), {}) if cell.name == whole else cell for cell in controls)]
        return chosen, _fit(outcome, chosen, study.seeds, table)[0]

    def less(control: Cell, outcome: str) -> Estimate | None:
        chosen, fit = fitted(control.name if control.name in parts else None, outcome)
        weights_C = np.array([float(cell == method) - float(cell == control) for cell in chosen])
        return None if fit is None or (found := fit.contrast(weights_C)) is None else found.scaled(100)

    kept = [outcome for outcome in accuracies_of(list(table.values())) if outcome not in POINTS]
    first = "retention_accuracy"
    kept = [first, *kept] if any(record[first] is not None for record in table.values()) else kept
    found = compare(method.name, [*controls, *(Cell(name, {}) for name in parts)], less, kept, margin)
    for line in found["lines"]:
        for name in ("task", "retention"):
            line[name] = None if line[name] is None else asdict(line[name])
        line["further"] = {name: one and asdict(one) for name, one in line["further"].items()}
    return found


def _line(effect: Effect, outcome: str, estimate: Estimate, note: str) -> Figures:
    if outcome not in RATIOS:
        estimate, unit = estimate.scaled(100), "points"
    else:
        unit = "percent"

        def percent(log: float | None) -> float | None:
            return None if log is None else 100 * math.expm1(log)

        value = percent(estimate.value)
        assert value is not None
        estimate = replace(
            estimate, value=value, low=percent(estimate.low), high=percent(estimate.high), se=None
        )
    notes = "; ".join(part for part in (effect.note, estimate.note, note) if part)
    numbers = asdict(estimate) | {"note": notes}
    return {
        "kind": effect.kind,
        "name": effect.name,
        "outcome": outcome,
        "unit": unit,
        **numbers,
        "p_holm": None,
    }


def _estimate(line: Figures | None) -> Estimate | None:
    names = ("value", "low", "high", "p", "se", "df", "note")
    return None if line is None else Estimate(**{name: line[name] for name in names})


def _p(line: Figures | None) -> float | None:
    return None if line is None else line["p_holm"]


# ---------------------------------------------------------------- outcomes


def _fit(
    outcome: str, cells: Sequence[Cell], seeds: Sequence[int], table: dict[tuple[str, int], Record]
) -> tuple[Fit | None, str]:
    """The runs' values of an outcome `[C,S]`, and a note on what is missing.

    Accuracies come with their single answers.
    """
    runs_CS = np.full((len(cells), len(seeds)), np.nan)
    for c, cell in enumerate(cells):
        for s, seed in enumerate(seeds):
            record = table.get((cell.name, seed))
            value = None if record is None else outcome_of(record, outcome)
            if value is not None:
                runs_CS[c, s] = value
    if np.isnan(runs_CS).all():
        return None, ""
    answers_CSP, note = None, ""
    if outcome not in RATIOS:
        answers_CSP, note = _answers(POINTS.get(outcome, outcome), cells, seeds, table)
        if answers_CSP is not None:
            runs_CS = answers_CSP.mean(axis=2)
    return Fit(runs_CS, answers_CSP), note


def outcome_of(record: Record, outcome: str) -> float | None:
    """One number of a run; logarithms of what is compared as a ratio.

    Times of a resumed run are left out where they are partial.
    """
    after = record["results"]["after"]
    if outcome in POINTS:
        return None if after[outcome] is None else float(after[outcome]["value"])
    if outcome not in RATIOS:
        marks = record["answers"].get(outcome, {}).get("after")
        return sum(marks) / len(marks) if marks else None
    value = {
        "train_s": record["train_s"],
        "flops": None if record["resumed"] else record["results"]["cost"]["flops_estimated"]["total"],
        "reference_ppl": after["gold_ppl"],
        "retention_ppl": (after["retention_ppl"] or {}).get("forward"),
        "base_ppl": (after["retention_ppl"] or {}).get("reverse"),
    }[outcome]
    return math.log(value) if value else None


def _answers(
    part: str, cells: Sequence[Cell], seeds: Sequence[int], table: dict[tuple[str, int], Record]
) -> tuple[Values | None, str]:
    """Single verdicts `[C,S,P]`, if all runs answered the same problems."""
    answered = {key: record["answers"][part] for key, record in table.items() if part in record["answers"]}
    if len({tuple(found["ids"]) for found in answered.values()}) != 1:
        return None, "runs were evaluated on different rows: give eval_file" if answered else ""
    count = len(next(iter(answered.values()))["ids"])
    values = np.full((len(cells), len(seeds), count), np.nan)
    for c, cell in enumerate(cells):
        for s, seed in enumerate(seeds):
            if (cell.name, seed) in answered:
                values[c, s] = answered[cell.name, seed]["after"]
    return values, ""


def _cell(cell: Cell, study: Study, table: dict[tuple[str, int], Record]) -> Figures:
    """A cell's means over its runs: accuracies, gain, forgetting, cost.

    With the runs that they come from.
    """
    records = [table[cell.name, seed] for seed in study.seeds if (cell.name, seed) in table]
    costs = [record["results"]["cost"] for record in records if not record["resumed"]]

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    def change(record: Record, name: str) -> float | None:
        before, after = record["results"]["before"][name], record["results"]["after"][name]
        return None if before is None or after is None else 100 * (after["value"] - before["value"])

    return {
        "name": cell.name,
        "levels": cell.levels,
        "runs": [record["run"] for record in records],
        "seeds": [record["seed"] for record in records],
        "task_accuracy": mean([record["task_accuracy"] for record in records]),
        "retention_accuracy": mean([record["retention_accuracy"] for record in records]),
        "gain": mean([change(record, "task_accuracy") for record in records]),
        "gains": [change(record, "task_accuracy") for record in records],
        "retention_change": mean([change(record, "retention_accuracy") for record in records]),
        "retention_changes": [change(record, "retention_accuracy") for record in records],
        "retention_ppl": mean(
            [(record["results"]["after"]["retention_ppl"] or {}).get("forward") for record in records]
        ),
        "train_s": mean([record["train_s"] for record in records]),
        "tokens_generated": mean([cost["tokens"]["generated"] for cost in costs]),
        "tokens_scored": mean([cost["tokens"]["scored"] for cost in costs]),
        "tokens_trained": mean([cost["tokens"]["trained"] for cost in costs]),
        "million_tokens_per_device_hour": mean([cost["million_tokens_per_device_hour"] for cost in costs]),
        "flops": mean([cost["flops_estimated"]["total"] for cost in costs]),
        "kwh_per_million_tokens": mean([cost["energy"]["kwh_per_million_tokens"] for cost in costs]),
        "energy_method": costs[0]["energy"]["method"] if costs else None,
        "peak_memory_bytes": max((cost["peak_memory_bytes"] for cost in costs), default=None),
    }


def pareto(cells: Sequence[Figures]) -> list[str]:
    """Names of the cells that no other cell beats in both gain and retention.

    Equal in one and better in the other counts.
    """
    known = [cell for cell in cells if cell["gain"] is not None and cell["retention_change"] is not None]

    def beaten(cell: Figures) -> bool:
        mine = (cell["gain"], cell["retention_change"])
        return any(
            other["gain"] >= mine[0]
            and other["retention_change"] >= mine[1]
            and (other["gain"], other["retention_change"]) != mine
            for other in known
        )

    return [cell["name"] for cell in known if not beaten(cell)]
