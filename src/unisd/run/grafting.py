"""Measures the grafting curve: base + L x what training changed, for several L.

A part is what `unisd merge --scale L` makes, opened again. So it holds for adapters of all kinds
and for full models, and costs a merge and an evaluation each; no part is kept.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from unisd.console import show_progress
from unisd.errors import UserError
from unisd.evaluation.grading import percent
from unisd.files import GRAFTING, config_of_run, write_json
from unisd.models.adapters import is_adapter

NONE, ALL = 0.0, 1.0
PREFIX = ".unisd-graft-"
Measured = TypeVar("Measured")
Point = dict[str, Any]
"""`scale`, `task`, and the figures of that part as `results.json` names them."""


def base_of(folder: str, base: str | None) -> str | None:
    """The model that a full model was trained from, as said or as its run says; None of an adapter.

    Raises:
        UserError: nobody says it, or the change is not that of one training.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder: parts of a change are those of a run's folder.")
    said = config_of_run(folder).get("model_name_or_path")
    if is_adapter(folder):
        if base is not None:
            raise UserError(f"{folder} is an adapter, which names its base: leave --base out.")
        if said is not None and is_adapter(said):
            raise UserError(
                f"{folder} was trained from the adapter {said}: parts of it would be parts of both trainings."
            )
        return None
    if base is None and said is not None and os.sep in said and not Path(said).exists():
        raise UserError(f"{said}, which {folder} was trained from, is not there: give --base.")
    if base is None and said is None:
        raise UserError(f"{folder} does not say what it was trained from: give --base.")
    return base or said


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


@contextmanager
def part(folder: str, scale: float, base: str | None, **options: Any) -> Iterator[str]:
    """A folder with base + `scale` x the change in float32, as long as it is needed.

    Args:
        options: `trust_remote_code` and `load_in_4bit`, as of `run.merge.Merge`.
    """
    from unisd.run.merge import Merge, merge

    place = folder if os.access(folder, os.W_OK) else None
    for left in Path(folder).glob(f"{PREFIX}*"):  # by a process that was killed
        if not _is_alive(int(left.name.removeprefix(PREFIX).split("-")[0])):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-", dir=place) as aside:
        made = Path(aside) / "part"
        merge(Merge(folder, str(made), [scale], base, "float32", **options), lambda done: None)
        yield str(made)


def curve(
    folder: str,
    base: str | None,
    scales: Sequence[float],
    measured: Callable[[str, float], Measured],
    **options: Any,
) -> dict[float, Measured]:
    """What `measured` says of each part, given its folder (see `part`) and scale."""
    found = {}
    with show_progress("parts of the change", len(scales)) as advance:
        for scale in scales:
            with part(folder, scale, base, **options) as place:
                found[scale] = measured(place, scale)
            advance(1)
    return found


def point(task: str, scale: float, figures: Mapping[str, Any], answers: Mapping[str, Any]) -> Point:
    """A point of the curve, of what `run.measure.measure` gives: accuracies, and a mark for every
    answer.
    """
    names = ("task_accuracy", "retention_accuracy", "gold_ppl")
    marks = {part: found["correct"] for part, found in answers.items() if found and found.get("correct")}
    return {"scale": scale, "task": task, **{name: figures[name] for name in names}, "correct": marks}


def add(folder: Path, points: Sequence[Point]) -> Path:
    """Keep a curve with its run, after those that are there, where `unisd report` draws it."""
    write_json(folder / GRAFTING, {"curves": [*read(folder), points]})
    return folder / GRAFTING


def read(folder: Path) -> list[list[Point]]:
    """The curves of a run, oldest first; none where it has none."""
    path = folder / GRAFTING
    if not path.is_file():
        return []
    curves: list[list[Point]] = json.loads(path.read_text(encoding="utf-8"))["curves"]
    return curves


HEAD = ("part of the change", "task", "retention")


def lines(points: Sequence[Point]) -> list[list[str]]:
    """One line a point: scale (of several tasks with its name), and both accuracies."""
    several = len({point["task"] for point in points}) > 1
    return [
        [
            f"{point['task']}, {point['scale']:g}" if several else f"{point['scale']:g}",
            percent(point["task_accuracy"]),
            percent(point["retention_accuracy"]),
        ]
        for point in sorted(points, key=lambda point: (point["task"], point["scale"]))
    ]
