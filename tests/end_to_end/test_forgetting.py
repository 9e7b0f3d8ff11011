"""Is forgetting said where it is, and only there? SmolLM2-135M on a small file of one's own.

`pytest -m slow tests/end_to_end/test_forgetting.py`: half an hour on one core.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unisd.cli.main import main

pytestmark = [pytest.mark.real, pytest.mark.slow]

TICKETS = Path(__file__).parents[2] / "examples" / "tickets.jsonl"


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and a place for the measurements of the untouched model: all runs share them."""
    folder = tmp_path_factory.mktemp("before")
    lines = TICKETS.read_text().splitlines(True)
    (folder / "train.jsonl").write_text("".join(lines[:54]))
    (folder / "eval.jsonl").write_text("".join(lines[54:]))
    return folder


def trained(folder: Path, before: Path, recipe: str, rate: str, seed: int = 0) -> dict[str, Any]:
    """The results of twelve steps of two rows with LoRA."""
    flags = {
        "model_name_or_path": "smollm2-135m",
        "train_file": str(before / "train.jsonl"),
        "eval_file": str(before / "eval.jsonl"),
        "retention_rows": "48",
        "grader": "contains",
        "recipe": recipe,
        "learning_rate": rate,
        "max_steps": "12",
        "per_device_train_batch_size": "2",
        "gradient_accumulation_steps": "1",
        "max_completion_length": "24",
        "seed": str(seed),
        "before_cache": str(before),
        "output_dir": str(folder),
    }
    arguments = [text for name, value in flags.items() for text in (f"--{name}", value)]
    assert main(["train", *arguments, "--use_peft"]) == 0
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def alarms(results: dict[str, Any]) -> list[str]:
    return [alarm["text"] for alarm in results["alarms"] if alarm["name"] == "forgetting"]


def test_a_rate_of_zero_changes_nothing(tmp_path: Path, before: Path) -> None:
    found = trained(tmp_path, before, "sdft", "0")
    assert [found["drift"][what]["change"] for what in ("reverse", "forward", "kl")] == [0.0, 0.0, 0.0]
    [kept] = found["retention"]
    assert kept["name"] == "general" and kept["items"]["lost"] == kept["items"]["gained"] == 0
    assert kept["items"]["kept"] > 0 and not alarms(found)


def test_a_ruined_model_is_called_so(
    tmp_path: Path, before: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = trained(tmp_path, before, "sft", "2e-3")
    [said] = alarms(found)
    print(said)
    assert "general" in said and "lower the rate" in said
    assert "lower the rate" in " ".join(capsys.readouterr().out.split())
    assert main(["report", str(tmp_path)]) == 0
    assert "lower the rate" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("recipe", ["sft", "sdft"])
def test_a_healthy_run_raises_no_alarm(tmp_path: Path, before: Path, recipe: str, seed: int) -> None:
    found = trained(tmp_path, before, recipe, "2e-5", seed)
    print(recipe, seed, found["drift"], found["retention"], found["acquisition"])
    assert not alarms(found)
