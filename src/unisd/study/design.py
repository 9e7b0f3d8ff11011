"""Reads which runs a study is made of from one YAML file.

Factors with levels, designs over them, tasks and seeds.

A *cell* gives every factor a level; a *run* is a cell with a task and a seed. The first level of a
factor is its baseline, and the cell of all baselines is the reference.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unisd.errors import UserError
from unisd.files import read_yaml
from unisd.run.options import as_list
from unisd.run.own_rows import named
from unisd.study import controls

Levels = dict[str, str]
Options = dict[str, Any]

MECHANISMS: dict[str, Options] = {
    "agreement": {"agreement": "none"},
    "ema": {"teacher_model_kind": "base"},
    "contrast": {"contrastive_weight": 0.0},
    "features": {"feature_weight": 0.0},
    "clip": {"token_clip": None, "token_clip_quantile": None},
}
"""What switches each mechanism of a recipe off."""

LONGEST_NAME = 150  # bytes, of what can be read in the name of a run's folder
DESIGNS = ("one-in", "leave-one-out", "full", "fractional", "list")
ON, OFF = "on", "off"


@dataclass(frozen=True)
class Factor:
    """`levels` maps labels to the options that make them; the first is the baseline."""

    name: str
    levels: dict[str, Options]
    is_mechanism: bool = False

    @property
    def baseline(self) -> str:
        return next(iter(self.levels))

    @property
    def others(self) -> list[str]:
        """The levels beside the baseline."""
        return list(self.levels)[1:]

    @property
    def top(self) -> str:
        return list(self.levels)[-1]


@dataclass(frozen=True)
class Cell:
    """A level for each factor."""

    name: str
    levels: Levels


@dataclass(frozen=True)
class Run:
    """One `unisd train`: `options` are those of its configuration file, without folders."""

    id: str
    cell: Cell
    task: str
    seed: int
    options: Options


@dataclass
class Study:
    """A study as its file describes it (see `docs/study.md`)."""

    base: Options
    factors: list[Factor]
    design: list[str]
    cells: list[Levels]
    tasks: dict[str, Options]
    seeds: list[int]
    resolution: int = 4
    budget_minutes: float | None = None
    run_s: float | None = None
    retries: int = 1
    keep_models: bool = False
    controls: dict[str, Options] = field(default_factory=dict)
    source: Options = field(default_factory=dict)


KEYS = {
    "base": dict,
    "mechanisms": list,
    "factors": dict,
    "design": (str, list),
    "cells": list,
    "tasks": list,
    "seeds": list,
    "resolution": int,
    "budget_minutes": (int, float),
    "run_s": (int, float),
    "retries": int,
    "keep_models": bool,
    "controls": (bool, list, dict),
}
RESERVED = {
    "graft_scales",
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "seed",
    "before_cache",
    "dry_run",
    "verbose",
}


def load(path: Path, overrides: Options | None = None) -> Study:
    """The study in a YAML file; `overrides` (of the command line) win.

    Raises:
        UserError: unknown key, value of the wrong kind, unknown mechanism or design, a factor
            without two levels.
    """
    return from_dict({**read_yaml(path), **(overrides or {})}, str(path))


def from_dict(values: Options, where: str = "study") -> Study:
    if "'hub_token'" in repr(values):
        raise UserError(
            f"{where}: hub_token would be written into the files of the study: leave it out, and set"
            " HF_TOKEN, which"
            " its runs inherit."
        )
    for key, value in values.items():
        if key not in KEYS:
            raise UserError(f"{where}: unknown key {key!r}: there are {', '.join(KEYS)}.")
        if value is not None and not isinstance(value, KEYS[key]):  # type: ignore[arg-type]
            raise UserError(f"{where}: {key} must be {_kind(KEYS[key])}, not {value!r}.")
    given = {key: value for key, value in values.items() if value is not None}
    base = dict(given.get("base", {}))
    if reserved := sorted(RESERVED & base.keys()):
        raise UserError(f"{where}: base must not set {reserved[0]}: the study does.")
    names = given.get("mechanisms", [] if "factors" in given else list(MECHANISMS))
    if unknown := [name for name in names if name not in MECHANISMS]:
        raise UserError(f"{where}: unknown mechanism {unknown[0]!r}: there are {', '.join(MECHANISMS)}.")
    factors = [Factor(name, {OFF: MECHANISMS[name], ON: {}}, is_mechanism=True) for name in names]
    factors += [_factor(str(name), levels, where) for name, levels in given.get("factors", {}).items()]
    if not factors:
        raise UserError(f"{where}: no factors: list mechanisms, or factors with their levels.")
    if len({factor.name for factor in factors}) < len(factors):
        raise UserError(f"{where}: two factors have the same name.")
    design = given.get("design", ["one-in", "leave-one-out"])
    design = [design] if isinstance(design, str) else design
    if unknown := [name for name in design if name not in DESIGNS]:
        raise UserError(f"{where}: unknown design {unknown[0]!r}: there are {', '.join(DESIGNS)}.")
    seeds = given.get("seeds", [1, 2, 3])
    if not seeds or not all(isinstance(seed, int) for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"{where}: seeds must be different whole numbers, not {seeds}.")
    return Study(
        base=base,
        factors=factors,
        design=design,
        cells=[_levels(cell, factors, where) for cell in given.get("cells", [])],
        tasks=_tasks(given.get("tasks"), base, where),
        seeds=seeds,
        resolution=given.get("resolution", 4),
        budget_minutes=given.get("budget_minutes"),
        run_s=given.get("run_s"),
        retries=given.get("retries", 1),
        keep_models=given.get("keep_models", False),
        controls=controls.read(given.get("controls"), where, base),
        source=given,
    )


def _kind(kind: Any) -> str:
    names = {
        dict: "a mapping",
        list: "a list",
        str: "a name",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
    }
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(dict.fromkeys(names[one] for one in kinds))


def _factor(name: str, levels: Any, where: str) -> Factor:
    """Read a factor: values of an option, or named sets of options.

    `[a, b]` are values of the option called `name`; the sets are `{label: {option: value}}`.
    """
    if isinstance(levels, list):
        found = {_label(value): {name: value} for value in levels}
    elif isinstance(levels, dict) and all(isinstance(options, dict) for options in levels.values()):
        found = {str(label): dict(options) for label, options in levels.items()}
    else:
        raise UserError(f"{where}: factor {name} must be a list of values, or labels with their options.")
    if len(found) < 2:
        raise UserError(f"{where}: factor {name} needs two levels or more.")
    return Factor(name, found)


def _label(value: Any) -> str:
    return (
        {True: "true", False: "false", None: "none"}.get(value, str(value))
        if isinstance(value, bool | None)
        else str(value)
    )


def _levels(cell: Any, factors: Sequence[Factor], where: str) -> Levels:
    """A cell of an explicit list: factors that it does not name are at their baseline."""
    if not isinstance(cell, dict):
        raise UserError(f"{where}: each of cells must give factors their levels, not {cell!r}.")
    by_name = {factor.name: factor for factor in factors}
    levels = {factor.name: factor.baseline for factor in factors}
    for name, value in cell.items():
        label = {True: ON, False: OFF}.get(value, str(value)) if isinstance(value, bool) else _label(value)
        if name not in by_name or label not in by_name[name].levels:
            raise UserError(f"{where}: cells: {name}={label} is not a level of a factor of this study.")
        levels[name] = label
    return levels


def _tasks(given: list[Any] | None, base: Options, where: str) -> dict[str, Options]:
    """Label of each task, and the options that choose it; nothing given: what `base` says."""
    found: dict[str, Options] = {}
    for item in given or [{}]:
        options = {"task": item} if isinstance(item, str) else item
        if not isinstance(options, dict):
            raise UserError(f"{where}: each of tasks is a name or a mapping of options, not {item!r}.")
        chosen = {**base, **options}
        label = chosen.get("task") or named(
            as_list(chosen.get("train_file") or chosen.get("dataset_name") or "pocket"), True
        )
        if label in found:
            raise UserError(f"{where}: two tasks are called {label}.")
        found[label] = options
    return found


# ---------------------------------------------------------------- designs


def cells_of(study: Study) -> list[Cell]:
    """The cells of all designs of a study, each once, the reference first.

    Raises:
        UserError: a fractional design of factors with more than two levels, or a resolution that it
            cannot have.
    """
    factors = study.factors
    reference = {factor.name: factor.baseline for factor in factors}
    top = {factor.name: factor.top for factor in factors}
    found: list[Levels] = []
    for design in study.design:
        if design == "one-in":
            found.append(reference)
            found += [{**reference, factor.name: label} for factor in factors for label in factor.others]
        elif design == "leave-one-out":
            found.append(top)
            found += [{**top, factor.name: factor.baseline} for factor in factors]
        elif design == "full":
            labels = itertools.product(*(factor.levels for factor in factors))
            found += [dict(zip(reference, chosen, strict=True)) for chosen in labels]
        elif design == "fractional":
            found += _fraction(factors, study.resolution)
        else:
            found += study.cells
    unique = {tuple(levels.items()): levels for levels in found}
    if not unique:
        raise UserError("the study has no cells: give a design, or cells with design: list.")
    ordered = sorted(unique.values(), key=lambda levels: levels != reference)
    return [Cell(cell_name(levels, factors), levels) for levels in ordered]


def check_installed() -> None:
    """Raise `UserError` where no study could be analysed: before its runs, not after them."""
    if importlib.util.find_spec("statsmodels") is None:
        raise UserError('a study\'s analysis needs statsmodels: pip install "unisd[study]".')


def _fraction(factors: Sequence[Factor], resolution: int) -> list[Levels]:
    if any(len(factor.levels) != 2 for factor in factors):
        raise UserError("a fractional design takes factors of two levels: use full or list.")
    try:
        from pydoe import fracfact_by_res
    except ImportError:
        raise UserError('fractional designs need pydoe: pip install "unisd[study]".') from None
    try:
        signs = fracfact_by_res(len(factors), resolution)
    except ValueError as error:
        raise UserError(
            f"no fraction of resolution {resolution} for {len(factors)} factors: {error}"
        ) from None
    return [
        {factor.name: list(factor.levels)[int(sign > 0)] for factor, sign in zip(factors, line, strict=True)}
        for line in signs
    ]


def cell_name(levels: Levels, factors: Sequence[Factor]) -> str:
    """`reference`, `all`, `+agreement` (alone), `-agreement` (all others), or levels.

    Those off the baseline, joined by `+`.
    """
    changed = [factor for factor in factors if levels[factor.name] != factor.baseline]

    def label(factor: Factor) -> str:
        level = levels[factor.name]
        return factor.name if factor.is_mechanism else f"{factor.name}={level}"

    if not changed:
        return "reference"
    if len(factors) > 2 and all(levels[factor.name] == factor.top for factor in changed):
        if len(changed) == len(factors):
            return "all"
        if len(changed) == len(factors) - 1:
            return "-" + next(factor.name for factor in factors if factor not in changed)
    return "+" + "+".join(map(label, changed))


def runs_of(study: Study) -> list[Run]:
    """All runs, seed by seed, so that a study cut short has whole blocks."""
    runs = []
    cells = cells_of(study)
    for seed in study.seeds:
        for task, chosen in study.tasks.items():
            of_cells = [(cell, _options(study, chosen, cell.levels)) for cell in cells]
            runs += [
                Run(_id(cell.name, task, seed, options), cell, task, seed, {**options, "seed": seed})
                for cell, options in [*of_cells, *controls_of(study, cells, chosen)]
            ]
    return runs


def _options(study: Study, chosen: Options, levels: Levels) -> Options:
    """The options of a cell's runs on one task (`chosen`), without their seed."""
    options = {**study.base, **chosen}
    for factor in study.factors:
        options |= factor.levels[levels[factor.name]]
    return options


def method_levels(study: Study, cells: Sequence[Cell]) -> Levels:
    """The levels of the cell that controls are made of and compared with."""
    top = {factor.name: factor.top for factor in study.factors}
    return top if any(cell.levels == top for cell in cells) else cells[0].levels


def controls_of(study: Study, cells: Sequence[Cell], chosen: Options) -> list[tuple[Cell, Options]]:
    """The controls of a study on one task (`chosen`), with the options of their runs."""
    method = _options(study, chosen, method_levels(study, cells))
    found = controls.expanded(study.controls, {**study.base, **chosen}, method)
    return [(Cell(name, {}), options) for name, options in found]


def _id(cell: str, task: str, seed: int, options: Options) -> str:
    """A readable name with a hash of everything that defines the run."""
    digest = hashlib.sha256(json.dumps([options, seed], sort_keys=True, default=str).encode()).hexdigest()[:8]
    words = (
        cell.replace("+", " with ", 1).replace("+", " ")
        if cell.startswith("+")
        else cell.replace("-", "without ", 1)
    )
    readable = re.sub(r"[^\w.=]+", "-", f"{task} {words.strip()}").strip("-")
    readable = readable.encode()[:LONGEST_NAME].decode(errors="ignore")
    return f"{readable}-s{seed}-{digest}"
