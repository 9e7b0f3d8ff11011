"""Recipes of the axis of outcomes, and controls, as the command runs them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.run.test_contexts_asked_for import contexts
from unisd import UniSDConfig, UserError
from unisd import testing as tiny
from unisd.cli.main import main
from unisd.data.privilege import BUILT, what_gives
from unisd.data.prompts import PromptBuilder
from unisd.monitoring.diagnostics import probe_contexts
from unisd.run.inputs import fit_mechanisms, load_data
from unisd.run.prepare import prepare
from unisd.run.resolve import parse
from unisd.scoring.requests import _length_over
from unisd.testing import trainer

SMALL = ["--max_steps", "1", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "cache"))


def write(path: Path, *columns: str, count: int = 8) -> str:
    row = {
        "privileged_context": "It is {0}.",
        "completion": "{0}",
        "answer": "{0}",
        "negative_context": "No, 7.",
    }
    rows = [
        {"prompt": f"What is {i} + {i}?", **{name: row[name].format(2 * i) for name in columns}}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_feedback_of_a_task_reaches_the_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    flags = [*SMALL, "--max_eval_rows", "2", "--record_samples", "8", "--output_dir", str(out)]
    assert main(["train", "--recipe", "sdpo", "--rollout_contexts", "feedback", *flags]) == 0
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    told = [sample["feedback"] for sample in samples if not sample["correct"]]
    assert told and all(told)


@pytest.mark.parametrize(("recipe", "kind"), [("op2sd", "retrieval"), ("other-solution", "random")])
def test_other_problems_are_of_the_kind_that_the_recipe_says(recipe: str, kind: str, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", "privileged_context", count=12)
    options, config = parse(["--recipe", recipe, "--model_name_or_path", "some/model", "--train_file", file])
    data = load_data(options, config.seed)
    rows = prepare(data, options, config, lambda: (None, None))
    assert all(contexts(rows)) and data.contexts.startswith(f"auxiliary contexts: {kind}")


@pytest.mark.parametrize("level", BUILT)
def test_rows_that_cannot_serve_a_level_are_told_what_to_do(level: str, tmp_path: Path) -> None:
    rows = [{"prompt": "1 + 1?", "privileged_context": "2"}, {"prompt": "2 + 2?", "privileged_context": "4"}]
    with pytest.raises(UserError) as error:
        trainer(tmp_path, train_dataset=rows, teacher_context=level)
    assert f"nothing for teacher_context={level}" in str(error.value) and what_gives(level) in str(
        error.value
    )
    assert "{" not in str(error.value)


@pytest.mark.parametrize("column", [{"auxiliary_contexts": ["w " * 900]}, {"negative_context": "w " * 900}])
def test_long_contexts_are_measured(column: dict[str, Any]) -> None:
    row = {"prompt": "?", "privileged_context": "2", **column}
    assert _length_over(700, lambda row: [0] * 900, row) == 900


def test_a_reference_free_run_without_a_contrast_is_refused(tmp_path: Path, caplog: Any) -> None:
    file = write(tmp_path / "rows.jsonl", "privileged_context")
    options, config = parse(
        ["--recipe", "reference-free", "--model_name_or_path", "some/m", "--train_file", file]
    )
    rows = load_data(options, config.seed).train
    assert fit_mechanisms(config, options, rows).contrastive_weight > 0  # the trainer refuses it, then
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path / "out", teacher_context="plain")
    assert "so that nothing is learned" in caplog.text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"teacher_context": "wrong", "contrastive_weight": 0.1}, "what contrast and nsd lead away from"),
        ({"teacher_context": "wrong", "terms": ["nsd:kl=0.1"]}, "what contrast and nsd lead away from"),
        (
            {"distillation_weight": 0.0, "terms": ["nsd"], "token_weights": ["dash"]},
            "unset agreement and token_w",
        ),
        ({"distillation_weight": 0.0, "terms": ["nsd"], "target": "pmi"}, "unset target"),
        ({"distillation_weight": 0.0, "terms": ["nsd"], "num_iterations": 2}, "unset num_iterations"),
        ({"distillation_weight": 0.0}, "leaves no loss"),
    ],
)
def test_what_would_be_ignored_is_refused(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        UniSDConfig(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    ("recipe", "columns"),
    [
        pytest.param("ssd", (), marks=pytest.mark.long),
        pytest.param("rejection-sft", ("answer",), marks=pytest.mark.long),
        ("sdpo", ("answer",)),
        pytest.param("oasis", ("answer",), marks=pytest.mark.long),
        pytest.param("nsd", ("negative_context",), marks=pytest.mark.long),
    ],
)
def test_rows_need_what_the_map_says(
    recipe: str, columns: tuple[str, ...], tmp_path: Path, capsys: Any
) -> None:
    file = write(tmp_path / "rows.jsonl", *columns)
    grader = ["--grader", "number"] if "answer" in columns else []
    arguments = ["train", "--recipe", recipe, "--train_file", file, *grader, *SMALL, "--dry_run"]
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("level", ["wrong", "other"])
def test_probes_do_not_compare_a_teacher_with_itself(level: str) -> None:
    row = tiny.rows(1)[0]
    prompts = PromptBuilder(tiny.tokenizer(), level=level)
    request: Any = SimpleNamespace(student=prompts.student(row), teacher=prompts.teacher(row))
    probed = probe_contexts(prompts, row, request)
    assert "negative" not in probed
    assert len({tuple(ids) for name, ids in probed.items() if name != "base"}) == len(probed) - 1
