"""Controls of a study: which runs they are, and when the method counts as better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.helpers.studies import FakeExecutor, carried_out, study
from unisd import UserError
from unisd.cli.main import main
from unisd.cli.study import _study_of, study_parser
from unisd.study import recommend, runner
from unisd.study.against import compare
from unisd.study.analysis import analyse
from unisd.study.controls import NAMES
from unisd.study.design import Cell, cells_of, runs_of
from unisd.study.estimate import Estimate, Fit


def test_controls_are_runs_beside_the_design() -> None:
    spec = study(controls=True, base={"max_steps": 3, "learning_rate": 1e-3, "agreement_gamma": 0.5})
    runs = {run.cell.name: run for run in runs_of(spec) if run.seed == 1}
    named = [name for name in runs if name.startswith("control ")]
    assert len(cells_of(spec)) == 4 and len(runs) == 4 + len(named)
    of_runs = [*NAMES[:3], "sft", "sft", "sft", "rejection-sft"]  # sft-graft is none
    assert [name.split()[1] for name in named] == of_runs
    wrong = runs["control wrong-reference"].options
    assert wrong == {**runs["+ema+clip"].options, "teacher_context": "wrong", "contrastive_weight": 0.0}
    rates = [runs[name].options["learning_rate"] for name in named if " sft " in f"{name} "]
    assert rates == [1e-4, 3e-4, 9e-4]  # a third, all and three times of the recipe's
    plain = runs["control sft 0.0003"].options
    parts = {"graft_scales": [0.25, 0.5, 0.75]}
    assert plain == {"max_steps": 3, "recipe": "sft", "learning_rate": 3e-4, "seed": 1, **parts}
    runner.check_runs(runs_of(spec), spec)  # as `unisd train` resolves them
    assert len({run.id for run in runs_of(spec)}) == 2 * len(runs)


def test_without_a_cell_of_all_mechanisms_the_reference_is_the_method() -> None:
    spec = study(controls=["other-solution"], design="list", cells=[{"ema": "off", "clip": "off"}])
    found = {run.cell.name: run.options for run in runs_of(spec)}
    others = {"teacher_context": "other", "agreement_contexts": "random"}
    assert found["control other-solution"] == {**found["reference"], **others}


def test_options_of_a_control_win() -> None:
    given = {"sft": {"learning_rate": [1e-5, 2e-5], "num_train_epochs": 2}, "rejection-sft": {}}
    found = {run.cell.name: run.options for run in runs_of(study(controls=given, seeds=[1]))}
    assert found["control sft 1e-05"]["num_train_epochs"] == 2 and "control sft 2e-05" in found
    assert found["control rejection-sft"]["recipe"] == "rejection-sft"


@pytest.mark.parametrize(
    ("base", "of_sft", "of_rejection"),
    [
        ({}, {}, {}),  # eight answers, as the recipes have them on the pocket
        ({"per_device_train_batch_size": 6}, {}, {"num_generations": 2, "per_device_train_batch_size": 3}),
        ({"recipe": "sdpo"}, {}, {}),  # one prompt of eight answers
        ({"model_name_or_path": "a/b"}, {}, {"per_device_train_batch_size": 1}),
        (
            {"per_device_train_batch_size": 2, "num_generations": 8, "recipe": "sdpo"},
            {"per_device_train_batch_size": 16},
            {"per_device_train_batch_size": 4},
        ),
    ],
)
def test_recipes_without_a_teacher_see_as_many_answers(
    base: dict[str, Any], of_sft: dict[str, Any], of_rejection: dict[str, Any]
) -> None:
    spec = study(
        controls=["sft", "rejection-sft"], base=base, factors={"seed_x": {"a": {}, "b": {}}}, mechanisms=[]
    )
    found = {run.cell.name: run.options for run in runs_of(spec)}
    names = ("per_device_train_batch_size", "num_generations")
    for name, changed in (("sft", of_sft), ("rejection-sft", of_rejection)):
        options = next(value for key, value in found.items() if key.startswith(f"control {name}"))
        given = {key: value for key, value in base.items() if key == "per_device_train_batch_size"}
        assert {key: options[key] for key in names if key in options} == given | changed


def test_parts_of_fine_tuning_are_cells_of_its_runs(tmp_path: Path) -> None:
    spec = study(controls={"sft-graft": {"graft_scales": [0.5]}})
    named = {run.cell.name for run in runs_of(spec) if run.cell.name.startswith("control ")}
    assert named == {"control sft 0.0001", "control sft 0.0003", "control sft 0.0009"}
    _, store = carried_out(tmp_path, spec, FakeExecutor())
    found = analyse(spec, store)
    assert found is not None
    [figures] = found["tasks"].values()
    assert figures["runs"] == figures["planned"] == len(runs_of(spec))
    cells = {cell["name"]: cell for cell in figures["cells"]}
    whole, part = cells["control sft 0.0003"], cells["control sft-graft 0.5 of 0.0003"]
    assert part["task_accuracy"] == 1.0 > whole["task_accuracy"]
    assert (part["runs"], part["train_s"]) == (whole["runs"], whole["train_s"])
    assert part["retention_ppl"] is None  # of a part nobody measured it
    assert len(figures["controls"]["lines"]) == 6
    assert "control sft-graft 0.5 of 0.0001 wins" in figures["controls"]["text"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"sft-graft": {"learning_rate": 1}},
            "sft-graft takes only graft_scales.*give learning_rate to that",
        ),
        ({"sft-graft": {"graft_scales": "half"}}, "must be numbers, not 'half'"),
        (["sdft"], "unknown control 'sdft': there are reference-free"),
        ({"sft": 3}, "control sft must be a mapping"),
    ],
)
def test_mistakes_are_told(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        study(controls=given)


def test_the_flag_asks_for_all_or_for_some() -> None:
    asked = study_parser().parse(["--controls"])
    assert tuple(_study_of(asked, []).controls) == NAMES
    asked = study_parser().parse(["--controls", "sft"])
    assert tuple(_study_of(asked, []).controls) == ("sft",)


def test_parts_of_fine_tuning_are_no_runs_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have a part of their run's noise, and would make the noise of all runs look smaller."""
    trained = {"sft": {"learning_rate": [1e-4, 3e-4]}, "rejection-sft": {}}
    spec = study(controls={**trained, "sft-graft": {"graft_scales": [0.25, 0.5, 0.75]}})
    _, store = carried_out(tmp_path, spec, FakeExecutor())

    def intervals() -> dict[str, dict[str, float]]:
        found = analyse(spec, store)
        assert found is not None
        return {line["name"]: line["task"] for line in found["tasks"]["pocket"]["controls"]["lines"]}

    beside = intervals()
    monkeypatch.setattr("unisd.study.analysis.parts_of", lambda name, options: {})
    alone = intervals()
    assert len(beside) == 3 + 2 * 3 and {name: beside[name] for name in alone} == alone


def test_all_retention_sets_count(tmp_path: Path) -> None:
    spec = study(controls=["other-solution"], seeds=list(range(1, 9)))
    _, store = carried_out(tmp_path, spec, FakeExecutor())
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    for line in lines:
        ids = [f"general-{i}" for i in range(40)]
        has_ema = "ema" in line["cell"] or line["cell"] == "reference"
        right = [int(i % 10 > 7 or not has_ema) for i in range(40)]
        line["answers"]["retention general"] = {"ids": ids, "before": [1] * 40, "after": right}
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = analyse(spec, store)
    assert found is not None
    [ema] = [line for line in found["tasks"]["pocket"]["verdicts"] if line["name"] == "ema"]
    assert ema["verdict"] == "trade" and "forgets more of general" in ema["text"]
    [line] = found["tasks"]["pocket"]["controls"]["lines"]
    assert set(line["further"]) == {"general"}
    text = recommend.markdown(found)
    assert "| general (points) |" in text and "p task / retention / general (Holm)" in text


def fit(*shares: float, seeds: int = 4, problems: int = 200) -> Fit:
    """Cells that answer each problem right with these chances."""
    rng = np.random.default_rng(0)
    answers_CSP = (rng.random((len(shares), seeds, problems)) < np.array(shares)[:, None, None]).astype(float)
    return Fit(answers_CSP.mean(axis=2), answers_CSP)


CELLS = [Cell(name, {}) for name in ("all", "control sft", "control reference-free")]


@pytest.mark.parametrize(
    ("task", "retention", "seeds", "text"),
    [
        (
            (0.9, 0.5, 0.6),
            (0.8, 0.8, 0.8),
            12,
            "self-distillation is worthwhile here: all beats all 2 controls at equal forgetting",
        ),
        (
            (0.9, 0.5, 0.6),
            (0.5, 0.8, 0.6),
            12,
            "is not shown to be worthwhile here: control sft is not beaten",
        ),
        ((0.6, 0.9, 0.5), (0.8, 0.8, 0.8), 12, "is not shown to be worthwhile here: control sft wins"),
        (
            (0.6, 0.6, 0.2),
            (0.8, 0.8, 0.8),
            12,
            "is not shown to be worthwhile here: control sft is not beaten",
        ),
        (
            (0.9, 0.5, 0.6),
            (0.8, 0.8, 0.8),
            1,
            "is not shown to be worthwhile here",
        ),  # training noise is not known
    ],
)
def test_the_verdict_names_the_control_that_is_not_beaten(
    task: tuple[float, ...], retention: tuple[float, ...], seeds: int, text: str
) -> None:
    fits = {
        "task_accuracy": fit(*task, seeds=seeds, problems=800),
        "retention_accuracy": fit(*retention, seeds=seeds, problems=800),
    }
    places = {cell.name: place for place, cell in enumerate(CELLS)}

    def less(control: Cell, outcome: str) -> Estimate | None:
        weights = np.zeros(len(CELLS))
        weights[0], weights[places[control.name]] = 100, -100
        return fits[outcome].contrast(weights)

    found = compare("all", CELLS[1:], less, ["retention_accuracy"], margin=2.0)
    assert text in found["text"] and found["pays"] == ("is worthwhile here" in text)


def test_a_study_says_whether_it_pays(tmp_path: Path) -> None:
    spec = study(controls=True)
    complete, store = carried_out(tmp_path, spec, FakeExecutor())
    found = analyse(spec, store)
    assert complete and found is not None
    [figures] = found["tasks"].values()
    assert figures["runs"] == figures["planned"] == len(runs_of(spec))
    assert len(figures["controls"]["lines"]) == len(figures["cells"]) - len(cells_of(spec))
    without = analyse(study(), store)
    assert without is not None and without["tasks"]["pocket"]["effects"] == figures["effects"]
    recommend.write(tmp_path, spec, found)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(spec.source))
    assert main(["report", str(tmp_path), "--no_run_pages"]) == 0
    assert "is not shown to be worthwhile here" in (tmp_path / "report.html").read_text()
    text = recommend.markdown(found)
    assert (
        "### Controls\n\nSelf-distillation is not shown to be worthwhile here" in text
        and "(+ema+clip itself)" in text
    )
    assert any("is not shown to be worthwhile here" in line for line in recommend.console_lines(found))


def test_rows_need_references_where_a_run_does(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Add {n} to x.", "tests": f"assert f(1) == {n + 1}"} for n in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = {"train_file": str(file), "grader": "code", "max_steps": 1, "allow_unsafe_code_execution": True}
    levels = {"rate": {"low": {"learning_rate": 1e-5}, "high": {"learning_rate": 1e-4}}}
    spec = study(base={**base, "recipe": "sdpo"}, factors=levels, mechanisms=[])
    runner.check_runs(runs_of(spec), spec)
    spec = study(base={**base, "recipe": "sdft"}, factors=levels, mechanisms=[])
    with pytest.raises(UserError, match=r"cell reference: .*privileged_context"):
        runner.check_runs(runs_of(spec), spec)


@pytest.mark.parametrize("given", [0.5, "5e-1", [0.5]])
def test_parts_are_numbers_however_a_file_writes_them(given: Any) -> None:
    found = {
        run.cell.name: run.options for run in runs_of(study(controls={"sft-graft": {"graft_scales": given}}))
    }
    assert found["control sft 0.0003"]["graft_scales"] == [0.5]


def test_where_parts_cannot_be_measured_all_others_are_meant() -> None:
    several = {"accelerate_config": "ddp"}
    assert "sft-graft" not in study(controls=True, base=several).controls
    with pytest.raises(UserError, match="control sft-graft needs one process"):
        study(controls=["sft-graft"], base=several)


def test_answers_a_step_count_the_micro_batches_too() -> None:
    spec = study(
        controls={"rejection-sft": {"num_generations": 8}},
        base={"per_device_train_batch_size": 8},
        factors={"gradient_accumulation_steps": [4, 2]},
        mechanisms=[],
    )
    options = next(run.options for run in runs_of(spec) if run.cell.name == "control rejection-sft")
    names = ("per_device_train_batch_size", "num_generations", "gradient_accumulation_steps")
    assert [options[name] for name in names] == [1, 8, 2]
    with pytest.raises(UserError, match="draws 4 answers per prompt, and the method has 3"):
        runs_of(study(controls=["rejection-sft"], base={"per_device_train_batch_size": 3}))
