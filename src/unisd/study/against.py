"""Whether a study's method beats its controls (see :mod:`unisd.study.controls`).

The method is the cell with every factor at its last level, or the reference where the design lacks
that one. Fine-tuning is compared at each of its rates, and all must be beaten: in its favour, as
they are not chosen on other rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from unisd.study.controls import PREFIX
from unisd.study.design import Cell
from unisd.study.estimate import ONE_RUN, Estimate
from unisd.study.recommend import RETENTION, TASK, name_of, shown


def compare(
    method: str,
    controls: Sequence[Cell],
    less: Callable[[Cell, str], Estimate | None],
    kept: Sequence[str],
    margin: float,
) -> dict[str, Any]:
    """The method less each control, in points, and what follows.

    Args:
        less: the method less a control in an accuracy.
        kept: the accuracies of what must not be lost, all of which were measured.
        margin: smallest effect that matters, in points.

    Returns:
        `method`, `pays`, a line `text`, and `lines`: of each control `name`, `task`, `retention`
        and `further` retention sets by name (estimates or None), `beaten`.
    """
    lines = []
    for control in controls:
        task, sides = less(control, "task_accuracy"), {name_of(one): less(control, one) for one in kept}
        beaten = _above(task, 0.0) and all(_above(found, -margin) for found in sides.values())
        first = sides.pop(RETENTION, None)
        name = control.name.removeprefix(PREFIX)
        lines.append({"name": name, "task": task, "retention": first, "further": sides, "beaten": beaten})
    pays = bool(lines) and all(line["beaten"] for line in lines)
    return {"method": method, "pays": pays, "lines": lines, "text": _text(method, lines, pays)}


def _above(estimate: Estimate | None, least: float) -> bool:
    """Whether an interval lies above a value; one run a cell is not enough for that."""
    if estimate is None or estimate.low is None or ONE_RUN in estimate.note:
        return False
    return estimate.low > least


def _least(line: dict[str, Any]) -> float:
    """What the method has over a control at the least, on the task or in what is kept."""
    known = [found.value for _, found in _sides(line) if found is not None]
    return round(min(known, default=math.inf), 9)  # equal ones are found in different fits


def _sides(line: dict[str, Any]) -> list[tuple[str, Estimate | None]]:
    return [(TASK, line["task"]), (RETENTION, line["retention"]), *line["further"].items()]


def _text(method: str, lines: Sequence[dict[str, Any]], pays: bool) -> str:
    if pays:
        return (
            f"self-distillation is worthwhile here: {method} beats all {len(lines)} controls at equal"
            " forgetting"
        )
    open_ones = [line for line in lines if not line["beaten"]]
    worst = min(open_ones, key=_least)
    against = ", ".join(f"{name} {shown(found)}" for name, found in _sides(worst))
    lost = worst["task"] is not None and worst["task"].high is not None and worst["task"].high < 0
    won = "wins" if lost and ONE_RUN not in worst["task"].note else "is not beaten"
    others = f"; {len(open_ones)} of {len(lines)} controls are not beaten" if len(open_ones) > 1 else ""
    return (
        f"self-distillation is not shown to be worthwhile here: control {worst['name']} {won}"
        f" ({method} against it: {against}){others}"
    )
