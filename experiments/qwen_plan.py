"""What `experiments.qwen` runs, in which order, at which rates, and how long it takes.

A cell is one part of a run: its training, or its measurement on the task, on what must not be lost
(`kept`), or of its drift. So none takes more than about an hour on two cores, and what a kill costs
is small.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from experiments.grid import Cell

RAW, GRAFT = "raw", "sft-graft"
TRAINING, TASK, KEPT, DRIFT = "training", "task", "kept", "drift"
MEASURED = (TASK, KEPT, DRIFT)
SCALES = (0.25, 0.5, 0.75)
"""Parts of the fine-tuned change, measured without further training."""
FIRST = ("sft", GRAFT, "sdft", "unisd-star", "reference-free", "wrong-reference")
SECOND = ("other-solution", "rejection-sft", "unisd-agree-tok", "unisd-ema", "sdpo")
SEEDS = (1, 2, 3)
PILOT_SEED, PILOT_STEPS = 11, 8
STEPS = {"mbpp": 15, "cos_e": 30}
PILOTS = {"sft": (2e-5, 1e-4, 5e-4), "sdft": (1e-4, 3e-4, 1e-3), "unisd-star": (1e-4, 3e-4, 1e-3)}
"""Rates of the pilots, which are of MBPP alone; without some a method has those of `sdft`."""
PILOTED = {GRAFT: "sft"}
STEP_S = {"sft": 60.0, "rejection-sft": 150.0, "sdft": 150.0, "unisd-ema": 150.0, "sdpo": 170.0}
"""Seconds of a step on two AVX2 cores, before any was measured; of all others as below."""
OTHER_STEP_S = 260.0
MEASURE_S = {TASK: 1500.0, KEPT: 900.0, DRIFT: 400.0}
PILOT_S = 400.0


@dataclass(frozen=True)
class Plan:
    """One cell to run. `learning_rate` is None as long as pilots that choose it are missing."""

    task: str
    method: str
    seed: int
    learning_rate: float | None
    part: str
    pilot: bool = False
    scale: float = 1.0
    # Where things are tells no cells apart.
    model: str = field(default="", compare=False)
    data: str = field(default="", compare=False)

    @property
    def record(self) -> Cell:
        """What the cell's line says of it."""
        return {name: value for name, value in asdict(self).items() if name not in ("model", "data")}

    @property
    def trained(self) -> Plan:
        """The training whose adapter this measures."""
        method = "sft" if self.method == GRAFT else self.method
        return Plan(
            self.task, method, self.seed, self.learning_rate, TRAINING, self.pilot, 1.0, self.model, self.data
        )

    @property
    def steps(self) -> int:
        return PILOT_STEPS if self.pilot else STEPS[self.task]


def of(cell: Cell) -> Plan:
    """The plan of a finished cell."""
    return Plan(**{name: cell[name] for name in Plan.__dataclass_fields__ if name in cell})


def outline(task: str, cells: list[Cell], model: str = "", data: str = "") -> list[Plan]:
    """All cells of a task in their order, finished or not.

    The untouched model; pilots, and after those of a method its seed 1, so that the main comparison
    is there early; the rest of the first list, the second list, the other seeds.
    """
    where = {"model": model, "data": data}

    def parts(method: str, seed: int, rate: float | None, pilot: bool = False) -> Iterator[Plan]:
        rest = MEASURED[:2] if pilot or method == RAW else MEASURED
        if method not in (RAW, GRAFT):
            yield Plan(task, method, seed, rate, TRAINING, pilot, **where)
        for scale in SCALES if method == GRAFT else (1.0,):
            yield from (Plan(task, method, seed, rate, part, pilot, scale, **where) for part in rest)

    chosen = {method: chosen_rate(cells, method) for method in PILOTS}
    found = list(parts(RAW, 0, 0.0))
    if task == "mbpp":
        found += parts(RAW, 0, 0.0, pilot=True)
        for piloted, rates in PILOTS.items():
            for rate in rates:
                found += parts(piloted, PILOT_SEED, rate, pilot=True)
            found += parts(piloted, 1, chosen[piloted])
    lists = [(1, FIRST), (1, SECOND), *((seed, FIRST) for seed in SEEDS[1:])] if task == "mbpp" else []
    for seed, methods in lists or [(1, FIRST)]:
        for method in methods:
            found += parts(method, seed, chosen[_piloted(method)])
    return list(dict.fromkeys(found))


def _piloted(method: str) -> str:
    method = PILOTED.get(method, method)
    return method if method in PILOTS else "sdft"


def plans(cells: list[Cell], task: str, model: str = "", data: str = "") -> list[Plan]:
    """The cells that may be run now: rates are chosen, and trained is what is measured."""
    done = {of(cell) for cell in cells}
    return [
        plan
        for plan in outline(task, cells, model, data)
        if plan not in done
        and plan.learning_rate is not None
        and (plan.method == RAW or plan.part == TRAINING or plan.trained in done)
    ]


def chosen_rate(cells: list[Cell], method: str) -> float | None:
    """The rate whose pilot has the most right on validation rows plus the most kept of other tasks.

    None: pilots are missing. Of equal ones the lower rate, which moves the model less.
    """
    scores = {rate: pilot_score(cells, method, rate) for rate in PILOTS[method]}
    if None in scores.values():
        return None
    return max(scores, key=lambda rate: (scores[rate], -rate))


def pilot_score(cells: list[Cell], method: str, rate: float) -> float | None:
    """Share right on the task, plus share right of what must not be lost."""
    found = {
        cell["part"]: cell
        for cell in cells
        if cell["pilot"] and (cell["method"], cell["learning_rate"]) == (method, rate)
    }
    if not {TASK, KEPT} <= found.keys():
        return None
    return share(found[TASK]["correct"]) + share(found[KEPT]["correct"])


def share(correct: dict[str, str]) -> float:
    """The share of right answers over all sets of a cell."""
    marks = "".join(correct.values())
    return marks.count("1") / max(1, len(marks))


def needed(cells: list[Cell], task: str) -> set[Plan]:
    """The trainings whose adapters are to be measured yet."""
    done = {of(cell) for cell in cells}
    return {plan.trained for plan in outline(task, cells) if plan.method != RAW and plan not in done}


def hours(cells: list[Cell], task: str) -> float:
    """What is left of a task, by what alike cells have taken, else by the defaults."""
    done = {of(cell) for cell in cells}
    left = [plan for plan in outline(task, cells) if plan not in done]
    return sum(_seconds(cells, plan) for plan in left) / 3600


def _seconds(cells: list[Cell], plan: Plan) -> float:
    alike = [cell for cell in cells if (cell["task"], cell["part"]) == (plan.task, plan.part)]
    if plan.part == TRAINING:
        a_step = _median([cell["step_s"] for cell in alike if cell["method"] == plan.method])
        return plan.steps * (a_step or STEP_S.get(plan.method, OTHER_STEP_S))
    measured = _median([cell["seconds"] for cell in alike if cell["pilot"] == plan.pilot])
    return measured or (PILOT_S if plan.pilot else MEASURE_S[plan.part])


def _median(values: list[Any]) -> float | None:
    return statistics.median(values) if values else None
