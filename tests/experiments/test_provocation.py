"""Alarms proved by provocation on the pocket model: runs made to go wrong raise theirs in time,
healthy ones raise none.

Each run takes minutes, so these are left to `pytest -m slow
tests/experiments/test_provocation.py`; `python -m experiments.pocket_alarms` runs the same cells,
and writes them down.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import pocket_alarms as provoke


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the base that doubts is trained, once."""
    return tmp_path_factory.mktemp("hedging")


@pytest.mark.slow
@pytest.mark.parametrize("plan", list(provoke.plans([])), ids=lambda plan: f"{plan.name}-{plan.seed}")
def test_a_cell_does_what_its_provocation_says(base: Path, plan: provoke.Plan) -> None:
    cell = provoke.run_cell(plan, base)
    assert provoke.passed(cell), provoke.page([cell])


def cell(
    name: str, *alarms: tuple[str, int], task: tuple[float, ...] = (0.4, 0.5, 0.6), seed: int = 0
) -> provoke.Cell:
    return {
        "name": name,
        "seed": seed,
        "alarms": [{"name": alarm, "step": step, "text": "because."} for alarm, step in alarms],
        "curve": [{"step": 5 * place, "task": value, "retention": 1.0} for place, value in enumerate(task)],
        "watched": {"words/all": [9.0, 3.0]},
        "shared_pull": {"as in the run": 0.25, "all": -0.1},
    }


def test_what_passes() -> None:
    assert provoke.passed(cell("healthy")) and not provoke.passed(cell("healthy", ("drift", 5)))
    assert not provoke.passed(cell("collapse", ("drift", 5)))  # another alarm will not do
    assert provoke.passed(cell("collapse", ("collapse", 10)))
    ruined = (0.4, 0.35, 0.15)  # lost at step 10
    assert provoke.passed(cell("collapse", ("collapse", 10), ("collapse", 20), task=ruined))
    assert not provoke.passed(cell("collapse", ("collapse", 11), task=ruined))
    assert not provoke.passed(cell("collapse", ("forgetting", 9), ("collapse", 11), task=ruined))


def test_old_skills_have_an_alarm_of_their_own() -> None:
    def forgot(*alarms: tuple[str, int]) -> provoke.Cell:
        made = cell("leak", *alarms)
        return {
            **made,
            "curve": [{**point, "retention": 0.4 if point["step"] == 10 else 1.0} for point in made["curve"]],
        }

    assert provoke.passed(forgot(("blind teacher", 20), ("forgetting", 10)))
    assert not provoke.passed(forgot(("blind teacher", 5), ("forgetting", 11))) and not provoke.passed(
        forgot(("blind teacher", 5))
    )
    assert not provoke.passed(forgot(("forgetting", 5)))


def test_the_page_and_what_is_left_to_run() -> None:
    cells = [cell("healthy", seed=1), cell("collapse", ("collapse", 10), ("drift", 12), task=(0.4, 0.1))]
    text = provoke.page(cells)
    assert (
        text.startswith("1 of 2 cells succeeded: ") and f"There are {provoke.total()} cells in total." in text
    )
    assert (
        "| collapse | 0 | collapse (10), drift (12) | 10 | 5 | - | 40.0, 10.0 | 100.0, 100.0 | 9.0, 3.0 |"
        " 0.25, -0.10 | **no** |" in text
    )
    assert (
        "| healthy | 1 | none | - | - | - | 40.0, 60.0 | 100.0, 100.0 | 9.0, 3.0 | 0.25, -0.10 | yes |"
        in text
    )
    assert "- `collapse`, step 10, collapse: because." in text
    left = list(provoke.plans(cells))
    assert len(left) == provoke.total() - 2 and provoke.Plan("healthy", 1) not in left
    assert {plan.name for plan in provoke.plans(cells, only=["leak"])} == {"leak"}


def test_curve_and_watched_metrics_are_read_from_the_log() -> None:
    history = [
        {"eval_task_accuracy": 0.4, "step": 0},
        {"loss": 1.0, "step": 1},
        {"eval_retention_accuracy": 1.0, "step": 0},
    ]
    assert provoke.curve(history) == [{"step": 0, "task": 0.4, "retention": 1.0}]
    lines = [
        {"step": step, "words/all": float(step), **({"retained/nll": 0.5} if step == 1 else {})}
        for step in range(1, 8)
    ]
    found = provoke.watched(lines)
    assert found["words/all"] == [3.0, 6.5] and found["retained/nll"] == [0.5, None]
    pull = {"leak/pull_both": 1.0, "leak/pull_right": 2.0, "leak/pull_wrong": 2.0}
    assert (
        provoke.shared_pull([*lines, pull, pull]) == {"as in the run": 0.5}
        and provoke.shared_pull(lines) == {}
    )
