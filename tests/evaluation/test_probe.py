"""The probe's figures and advice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unisd import testing as tiny
from unisd.cli.main import main
from unisd.data.prompts import PromptBuilder
from unisd.evaluation.teacher_probe import SIDE_ROWS, Limits, Probe, advice


@pytest.mark.long
def test_pocket_probe_finds_the_headroom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--n", "24", "--json", str(tmp_path / "p.json")]) == 0
    report = json.loads((tmp_path / "p.json").read_text())
    assert {"model", "task", "n", "student", "teacher", "wrong_reference", "advice"} <= report.keys()
    assert report["teacher"]["append"]["accuracy"]["value"] >= 0.9 > report["student"]["accuracy"]["value"]
    # Accuracy under a wrong reference shows that the teacher reads it.
    assert report["wrong_reference"]["accuracy"]["value"] <= 0.1
    assert report["wrong_reference"]["n"] == SIDE_ROWS
    assert report["auxiliary"]["accuracy"]["value"] >= 0.8
    assert "headroom" in report["advice"] and report["advice"] in " ".join(capsys.readouterr().out.split())
    assert report["predicted"]["s_per_step"] > 0 and report["predicted"]["memory_bytes"] > 1e6


def test_without_a_grader_copying_never_drives_the_advice() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    report = Probe(
        model, tokenizer, tiny.rows(3), None, PromptBuilder(tokenizer), limits=Limits(max_new_tokens=6)
    ).run()
    assert "accuracy" not in report["student"] and report["student"]["nll"] > 0
    before = report["advice"]
    for figures in report["teacher"].values():
        figures["copying_nll"] = 0.0
    assert advice(report) == before
    assert "--grader" in before or "hardly" in before


def _report(student: float, teacher: float, **changes: Any) -> dict[str, Any]:
    def figures(value: float) -> dict[str, Any]:
        return {
            "accuracy": {"value": value, "low": value - 0.1, "high": value + 0.1},
            "truncated": 0,
            "divergence": 0.4,
        }

    base = {"n": 64, "layout": "turn", "student": figures(student), "teacher": {"turn": figures(teacher)}}
    return {**base, "wrong_reference": None, "auxiliary": None, **changes}


def test_advice_in_plain_words() -> None:
    assert "cannot help" in advice(_report(0.7, 0.7))
    assert "teacher_prompt_layout=turn" in advice(_report(0.2, 0.8)) and "60 points" in advice(
        _report(0.2, 0.8)
    )
    assert "not certain" in advice(_report(0.5, 0.6))
    assert "agreement cannot run" in advice(_report(0.2, 0.8))
    assert "nothing to work with" in advice(_report(0.2, 0.8, auxiliary={"spread": 0.001}))
