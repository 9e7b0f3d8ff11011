"""Finds what a design can be asked: every effect is a contrast, one weight per cell.

A design either allows it or not.

An effect of a factor's level against its baseline is the mean difference over all *matched pairs*
of cells, which differ in nothing else. Of a full factorial that is the main effect as usual; of
one-in and leave-one-out together it is the mean of both. Where a design has no such pairs (a
fraction), the effect is the coefficient of a linear model of main effects (and two-way
interactions, where they can be told apart).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unisd.study.design import OFF, ON, Cell, Factor, Levels

Weights = NDArray[np.float64]


@dataclass(frozen=True)
class Effect:
    """A question: `kind` of effect of `name`, as weights over the cells (they sum to 0)."""

    kind: str
    name: str
    weights: Weights
    note: str = ""


def effects_of(cells: Sequence[Cell], factors: Sequence[Factor]) -> list[Effect]:
    """All effects that a design allows, by kind."""
    place = {_key(cell.levels, factors): number for number, cell in enumerate(cells)}
    found: list[Effect] = []
    levels = [(factor, level) for factor in factors for level in factor.others]
    for factor, level in levels:
        found += _main(cells, factors, place, factor, level)
    for factor, level in levels:
        base = {other.name: other.baseline for other in factors}
        found += _pair("one-in", place, factors, {**base, factor.name: level}, base, factor, level)
    if len(factors) > 1:
        top = {factor.name: factor.top for factor in factors}
        for factor in factors:
            without = {**top, factor.name: factor.baseline}
            found += _pair("leave-one-out", place, factors, top, without, factor, factor.top)
        found += _interactions(cells, factors, place)
    found += _shapley(cells, factors, place)
    return found


def _key(levels: Levels, factors: Sequence[Factor]) -> tuple[str, ...]:
    return tuple(levels[factor.name] for factor in factors)


def effect_name(factor: Factor, level: str) -> str:
    return factor.name if set(factor.levels) == {ON, OFF} else f"{factor.name}={level}"


def _pair(
    kind: str,
    place: dict[Any, int],
    factors: Sequence[Factor],
    plus: Levels,
    minus: Levels,
    factor: Factor,
    level: str,
) -> list[Effect]:
    """One cell less another, if both are in the design."""
    ends = [_key(plus, factors), _key(minus, factors)]
    if any(end not in place for end in ends):
        return []
    weights = np.zeros(len(place))
    weights[place[ends[0]]], weights[place[ends[1]]] = 1.0, -1.0
    return [Effect(kind, effect_name(factor, level), weights)]


def _main(
    cells: Sequence[Cell], factors: Sequence[Factor], place: dict[Any, int], factor: Factor, level: str
) -> list[Effect]:
    weights, pairs = np.zeros(len(cells)), 0
    for cell in cells:
        partner = _key({**cell.levels, factor.name: factor.baseline}, factors)
        if cell.levels[factor.name] == level and partner in place:
            weights[place[_key(cell.levels, factors)]] += 1
            weights[place[partner]] -= 1
            pairs += 1
    name = effect_name(factor, level)
    if pairs:
        return [Effect("main", name, weights / pairs, f"mean of {pairs} matched pairs")]
    for order, note in (
        (2, "linear model with two-way interactions"),
        (1, "linear model: aliased with interactions"),
    ):
        found = _coefficient(cells, factors, order, ((factor.name, level),))
        if found is not None:
            return [Effect("main", name, found, note)]
    return []


def _interactions(cells: Sequence[Cell], factors: Sequence[Factor], place: dict[Any, int]) -> list[Effect]:
    """What two levels do together beyond what each does alone.

    Over all quadruples of cells that differ in nothing else.
    """
    found = []
    for one, two in itertools.combinations(factors, 2):
        for level_one, level_two in itertools.product(one.others, two.others):
            weights, quads = np.zeros(len(cells)), 0
            for cell in cells:
                if (cell.levels[one.name], cell.levels[two.name]) != (level_one, level_two):
                    continue
                changes: list[Levels] = [{}, {one.name: one.baseline}, {two.name: two.baseline}]
                changes.append({one.name: one.baseline, two.name: two.baseline})
                corners = [_key({**cell.levels, **change}, factors) for change in changes]
                if all(corner in place for corner in corners):
                    for corner, sign in zip(corners, (1, -1, -1, 1), strict=True):
                        weights[place[corner]] += sign
                    quads += 1
            name = f"{effect_name(one, level_one)} x {effect_name(two, level_two)}"
            if quads:
                found.append(
                    Effect("interaction", name, weights / quads, f"mean of {quads} matched quadruples")
                )
                continue
            fitted = _coefficient(cells, factors, 2, ((one.name, level_one), (two.name, level_two)))
            if fitted is not None:
                found.append(Effect("interaction", name, fitted, "linear model with two-way interactions"))
    return found


def _coefficient(
    cells: Sequence[Cell], factors: Sequence[Factor], order: int, wanted: tuple[tuple[str, str], ...]
) -> Weights | None:
    """Least-squares weights of a term in the model of all terms up to `order`.

    None if the design cannot tell it from others.

    Columns are centred, so that a main effect is the mean over the other factors' levels (as with
    matched pairs).
    """
    columns: dict[tuple[tuple[str, str], ...], Weights] = {}
    single = [(factor.name, level) for factor in factors for level in factor.others]
    centred = {}
    for name, level in single:
        indicator = np.array([float(cell.levels[name] == level) for cell in cells])
        centred[name, level] = indicator - indicator.mean()
        columns[((name, level),)] = centred[name, level]
    if order > 1:
        for one, two in itertools.combinations(single, 2):
            if one[0] != two[0]:
                columns[one, two] = centred[one] * centred[two]
    names = list(columns)
    X = np.column_stack([np.ones(len(cells)), *columns.values()])
    target = np.zeros(X.shape[1])
    target[1 + names.index(wanted)] = 1.0
    inverse = np.linalg.pinv(X)
    if not np.allclose(target @ inverse @ X, target, atol=1e-8):  # not estimable
        return None
    weights: Weights = target @ inverse
    return weights


def _shapley(cells: Sequence[Cell], factors: Sequence[Factor], place: dict[Any, int]) -> list[Effect]:
    """Each two-level factor's share of the difference between all and none.

    Averaged over all orders of switching them on.
    """
    if (
        any(len(factor.levels) != 2 for factor in factors)
        or len(cells) != 2 ** len(factors)
        or len(factors) < 2
    ):
        return []
    count = len(factors)
    found = []
    for factor in factors:
        weights = np.zeros(len(cells))
        for cell in cells:
            if cell.levels[factor.name] == factor.baseline:
                continue
            others = sum(cell.levels[other.name] != other.baseline for other in factors) - 1
            share = math.factorial(others) * math.factorial(count - others - 1) / math.factorial(count)
            weights[place[_key(cell.levels, factors)]] += share
            weights[place[_key({**cell.levels, factor.name: factor.baseline}, factors)]] -= share
        found.append(Effect("shapley", effect_name(factor, list(factor.levels)[1]), weights))
    return found
