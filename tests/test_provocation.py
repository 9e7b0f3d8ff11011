"""Diagnostics proved by provocation on the pocket model: a run made to collapse raises its alarms, healthy ones raise none.

Each run takes about a minute, so these are left to `pytest -m slow tests/test_provocation.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unisd.cli import main

pytestmark = pytest.mark.slow


def alarms(folder: Path, *flags: str) -> dict[str, int]:
    """Name of each alarm -> the step at which it was raised."""
    assert main(["train", "--recipe", "sdft", "--max_eval_rows", "40", "--output_dir", str(folder), *flags]) == 0
    return {alarm["name"]: alarm["step"] for alarm in json.loads((folder / "results.json").read_text())["alarms"]}


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_raises_no_alarm(tmp_path: Path, seed: int) -> None:
    assert alarms(tmp_path, "--seed", str(seed), "--diagnostics_probe_steps", "5") == {}


def test_a_collapse_is_noticed(tmp_path: Path) -> None:
    """A live teacher and a rate ten times too high."""
    found = alarms(tmp_path, "--teacher_model_kind", "live", "--learning_rate", "1e-2", "--diagnostics_probe_steps", "5")
    assert found["collapse"] <= 15 and found["forgetting"] <= 15
