"""The probe's figures and advice."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from unisd import testing as tiny
from unisd.cli.main import main
from unisd.data.prompts import PromptBuilder
from unisd.evaluation.teacher_probe import SIDE_ROWS, Limits, Probe, advice, gain
from unisd.run.recommended import RATES, STEP_ROWS, Recommendation, recommend
from unisd.run.recommended import _rate as rate_of
from unisd.run.recommended import _size as adapter_size
from unisd.run.resolve import parse


@pytest.mark.long
def test_pocket_probe_finds_the_headroom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = ["--json", str(tmp_path / "p.json"), "--write_config", str(tmp_path / "run.yaml")]
    assert main(["probe", "--max_train_rows", "24", *written]) == 0
    report = json.loads((tmp_path / "p.json").read_text())
    assert {"model", "task", "n", "student", "teacher", "wrong_reference", "advice"} <= report.keys()
    assert report["teacher"]["append"]["accuracy"]["value"] >= 0.9 > report["student"]["accuracy"]["value"]
    # Accuracy under a wrong reference shows that the teacher reads it.
    assert report["wrong_reference"]["accuracy"]["value"] <= 0.1
    assert report["wrong_reference"]["n"] == SIDE_ROWS
    assert report["auxiliary"]["accuracy"]["value"] >= 0.8
    shown = " ".join(capsys.readouterr().out.split())
    assert "headroom" in report["advice"] and report["advice"] in shown
    assert "Settings for" in shown and report["recommended"]["recipe"] == "sdft"
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--dry_run"]) == 0
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


def _report(student: float, teacher: float, n: int = 60, **changes: Any) -> dict[str, Any]:
    """The teacher is right where the student is, as far as it can be, and then in the last rows."""

    def figures(value: float, other_way: bool = False) -> dict[str, Any]:
        marks = [int(row < value * n) for row in range(n)]
        accuracy = {"value": sum(marks) / n, "low": value - 0.1, "high": value + 0.1}
        marks = marks[::-1] if other_way else marks
        return {"accuracy": accuracy, "correct": marks, "truncated": 0, "divergence": 0.4}

    crossed = changes.pop("crossed", False)
    base = {"n": n, "layout": "turn", "student": figures(student)}
    base["teacher"] = {"turn": figures(teacher, crossed)}
    return {**base, "wrong_reference": None, "auxiliary": None, **changes}


def test_advice_in_plain_words() -> None:
    assert "cannot help" in advice(_report(0.7, 0.7))
    assert "teacher_prompt_layout=turn" in advice(_report(0.2, 0.8)) and "60 points" in advice(
        _report(0.2, 0.8)
    )
    assert "not certain" in advice(_report(0.5, 0.6, crossed=True))
    assert "not certain" not in advice(_report(0.5, 0.6))
    assert "agreement cannot run" in advice(_report(0.2, 0.8))
    assert "nothing to work with" in advice(_report(0.2, 0.8, auxiliary={"spread": 0.001}))


def test_few_rows_show_no_headroom_and_rule_none_out() -> None:
    said = advice(_report(0.5, 0.5, n=8))
    assert (
        "No headroom is shown" in said
        and "probe more rows (--max_train_rows)" in said
        and "cannot help" not in said
    )
    assert "cannot help" in advice(_report(0.7, 0.4))


def test_answers_that_were_cut_decide_nothing() -> None:
    report = _report(0.0, 0.0)
    report["student"]["truncated"], report["teacher"]["turn"]["truncated"] = 30, 40
    said = advice(report)
    assert said.startswith("Nothing can be said yet: 70 of 120 answers reached the limit: raise --eval_max")
    learns = _report(0.0, 0.8)
    learns["student"]["truncated"] = 30
    assert "headroom of 80 points" in advice(learns) and advice(learns).endswith("--eval_max_new_tokens.")


@pytest.mark.parametrize(
    ("right", "words"),
    [(0, "matters."), (12, "it matters little"), (9, "not certain")],
)
def test_the_price_of_a_wrong_reference_is_that_of_the_same_rows(right: int, words: str) -> None:
    rows = list(range(12)) if right < 12 else list(range(40))
    marks = [int(number < right) for number in range(12)] if right < 12 else [1] * 40
    wrong = {"accuracy": {"value": sum(marks) / len(rows)}, "correct": marks, "rows": rows}
    said = advice(_report(0.0, 0.8, wrong_reference=wrong))  # the teacher is right in all of them
    assert f"costs the teacher {100 - 100 * sum(marks) / len(rows):.0f} points on {len(rows)} rows" in said
    assert words in said


def test_a_gain_has_an_interval_over_rows() -> None:
    """Against draws of pairs with a known difference."""
    rng, covered = random.Random(0), 0
    for _ in range(400):
        pairs = rng.choices([(0, 0), (0, 1), (1, 0), (1, 1)], weights=[3, 3, 1, 3], k=40)
        found = gain(*zip(*pairs, strict=True))
        covered += found["low"] <= 0.2 <= found["high"]
    assert 0.92 <= covered / 400 <= 0.98


# -- what to set -----------------------------------------------------------------------------------


def measured(student: float, teacher: float, **changes: Any) -> dict[str, Any]:
    """What a probe of four rows reports, as far as a recommendation reads it."""
    report = _report(student, teacher, max_new_tokens=48, score_tokens_per_s=100.0)
    report["student"] |= {"lengths": [10, 20, 30, 40], "mean_length": 25.0, "tokens_per_s": 50.0}
    report["teacher"]["turn"] |= {"lengths": [12, 12, 12, 12]}
    return {**report, **changes}


def recommended(report: dict[str, Any], *flags: str, rows: int = 40) -> Recommendation:
    options, _ = parse(["--model_name_or_path", "some/model", "--train_file", "rows.jsonl", *flags])
    model, tokenizer = tiny.model(), tiny.tokenizer()
    given = [{"prompt": "a", "privileged_context": "b" * (5 + number)} for number in range(rows)]
    return recommend(options, report, model, tokenizer, given, prompts=[20, 40])


def test_what_is_recommended_follows_from_what_was_measured(tmp_path: Path) -> None:
    found = recommended(measured(0.2, 0.8), "--device_tdp", "100", "--grader", "number")
    assert (found.values["recipe"], found.values["teacher_prompt_layout"]) == ("sdft", "turn")
    # 95 % of the references have 43 tokens or fewer (bytes and an end), of the answers 40.
    assert found.values["max_completion_length"] == 64 and "95 %" in found.reasons["max_completion_length"]
    assert "use_peft" not in found.values  # a small model
    rows_of_a_step = found.values["per_device_train_batch_size"] * found.values["gradient_accumulation_steps"]
    assert rows_of_a_step == STEP_ROWS and found.predicted["steps"] == 3
    # 16 answers of 25 tokens, and 4 passes (one of the teacher, 3 of the student) over 55 each
    assert found.predicted["s_per_step"] == pytest.approx(16 * (25 / 50 + 4 * 55 / 100))
    hours = found.predicted["seconds"] / 3600
    assert found.predicted["kwh"] == pytest.approx(hours * 0.1 * 0.7 * 1.2)
    file = tmp_path / "run.yaml"
    found.write(file, "the verdict")
    options, config = parse(["--config", str(file)])
    assert (options.recipe, options.grader, options.train_file) == ("sdft", "number", ["rows.jsonl"])
    assert config.learning_rate == found.values["learning_rate"] == RATES[0][1]
    text = file.read_text()
    assert "# the verdict" in text and all(
        f"# {why}\n{name}: " in text for name, why in found.reasons.items()
    )


def test_without_a_better_teacher_the_references_are_trained_on() -> None:
    found = recommended(measured(0.7, 0.7))
    assert found.values["recipe"] == "sft" and "teacher_prompt_layout" not in found.values
    assert found.values["max_completion_length"] == 64  # all of the references: the longest has 45
    assert "all of the references" in found.reasons["max_completion_length"]
    assert found.predicted["s_per_step"] == pytest.approx(16 * 3 * 55 / 100)
    assert found.predicted["kwh"] is None


def test_a_length_is_never_below_what_was_cut() -> None:
    report = measured(0.2, 0.8)
    report["student"]["truncated"] = 1
    report["max_new_tokens"] = 200
    found = recommended(report)
    assert (
        found.values["max_completion_length"] == 224
        and "cut at 200" in found.reasons["max_completion_length"]
    )


def test_micro_batches_shrink_to_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    from unisd import memory

    found = []
    for free in (1 << 40, 40 << 20, 1 << 20):
        monkeypatch.setattr(memory, "available", lambda device, free=free: free)
        values = recommended(measured(0.2, 0.8)).values
        found.append((values["per_device_train_batch_size"], values.get("gradient_checkpointing", False)))
    assert found[0] == (8, False) and found[2] == (1, True) and found[1][0] <= 8


def test_an_adapter_is_counted_by_its_rank_and_rates_by_size() -> None:
    model = tiny.model()
    small, large = adapter_size(model, 4), adapter_size(model, 8)
    assert (
        large.trained == 2 * small.trained > 0 and small.parameters == model.num_parameters() + small.trained
    )
    assert [rate_of(size, True)[0] for size in (1e8, 1e9, 7e9)] == [5e-4, 5e-5, 2e-5]
    assert all(line[0] < next_line[0] for line, next_line in pairwise(RATES))


def test_a_file_that_is_there_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("seed: 1\n")
    assert main(["probe", "--write_config", str(tmp_path / "run.yaml")]) == 2
    assert "the file exists: remove it, or give another name" in capsys.readouterr().err
    assert (tmp_path / "run.yaml").read_text() == "seed: 1\n"
