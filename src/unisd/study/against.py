"""Whether a study's method beats its controls (see :mod:`unisd.study.controls`).

The method is the cell with every factor at its last level, or the reference where the design lacks
that one. Fine-tuning is compared at each of its rates, and all must be beaten: in its favour, as
they are not chosen on other rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unisd.study.controls import PREFIX
from unisd.study.design import Cell
from unisd.study.estimate import ONE_RUN, Estimate, Fit


def compare(
    method: Cell, controls: Sequence[Cell], fits: Mapping[str, Fit | None], margin: float
) -> dict[str, Any]:
    """The method less each control, in points, and what follows.

    Args:
        fits: by outcome, of the method and the controls in this order.
        margin: smallest effect that matters, in points.

    Returns:
        `method`, `pays`, a line `text`, and `lines`: of each control `name`, `task` and `retention`
        (estimates or None), `beaten`.
    """
    lines = []
    for place, control in enumerate(controls, 1):
        weights_C = np.zeros(1 + len(controls))
        weights_C[0], weights_C[place] = 1.0, -1.0
        task, retention = (
            None if (fit := fits.get(outcome)) is None else _points(fit.contrast(weights_C))
            for outcome in ("task_accuracy", "retention_accuracy")
        )
        beaten = _above(task, 0.0) and (fits.get("retention_accuracy") is None or _above(retention, -margin))
        name = control.name.removeprefix(PREFIX)
        lines.append({"name": name, "task": task, "retention": retention, "beaten": beaten})
    pays = bool(lines) and all(line["beaten"] for line in lines)
    return {"method": method.name, "pays": pays, "lines": lines, "text": _text(method.name, lines, pays)}


def _points(estimate: Estimate | None) -> Estimate | None:
    return None if estimate is None else estimate.scaled(100)


def _above(estimate: Estimate | None, least: float) -> bool:
    """Whether an interval lies above a value; one run a cell is not enough for that."""
    if estimate is None or estimate.low is None or ONE_RUN in estimate.note:
        return False
    return estimate.low > least


def _least(line: dict[str, Any]) -> float:
    """What the method has over a control at the least, on the task or in what is kept."""
    known = [line[side].value for side in ("task", "retention") if line[side] is not None]
    return min(known, default=np.inf)


def _text(method: str, lines: Sequence[dict[str, Any]], pays: bool) -> str:
    from unisd.study.recommend import shown

    if pays:
        return f"self-distillation is worthwhile here: {method} beats all {len(lines)} controls at"
        " equal forgetting"
    open_ones = [line for line in lines if not line["beaten"]]
    worst = min(open_ones, key=_least)
    against = f"task {shown(worst['task'])}, retention {shown(worst['retention'])}"
    lost = worst["task"] is not None and worst["task"].high is not None and worst["task"].high < 0
    won = "wins" if lost and ONE_RUN not in worst["task"].note else "is not beaten"
    others = f"; {len(open_ones)} of {len(lines)} controls are not beaten" if len(open_ones) > 1 else ""
    return (
        f"self-distillation is not shown to be worthwhile here: control {worst['name']} {won}"
        f" ({method} against it: {against}){others}"
    )
