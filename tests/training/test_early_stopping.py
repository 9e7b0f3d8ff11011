"""Evaluations during training: where they are written and shown, and when they end a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerCallback

from unisd import UniSDConfig, UniSDTrainer
from unisd import testing as tiny
from unisd.errors import UserError
from unisd.files import is_evaluation, read_lines
from unisd.monitoring.progress import ProgressDisplay
from unisd.report.run_page import evaluations, read_metrics
from unisd.run import choice

OFTEN: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "metric_for_best_model": "loss",
    "gradient_accumulation_steps": 1,
    "max_completion_length": 4,
    "eval_dataset": tiny.rows(2, 0),
}


def told(trainer: UniSDTrainer, losses: list[float]) -> UniSDTrainer:
    """The trainer with these losses in its evaluations, one after the other."""
    coming = iter(losses)
    measure = trainer.evaluate

    def evaluate(*args: Any, **kwargs: Any) -> dict[str, float]:
        trainer.callback_handler, real = Silent(trainer.callback_handler), trainer.callback_handler
        metrics = {**measure(*args, **kwargs), "eval_loss": next(coming)}
        trainer.callback_handler = real
        trainer.control = real.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    trainer.evaluate = evaluate  # type: ignore[method-assign]
    return trainer


class Silent:
    """A handler of callbacks that leaves the end of an evaluation to another."""

    def __init__(self, handler: Any) -> None:
        self.handler = handler

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handler, name)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any) -> Any:
        return control


def build(folder: Path, **options: Any) -> UniSDTrainer:
    return tiny.trainer(folder, **{**OFTEN, "early_stopping_patience": 2, "max_steps": 6, **options})


def test_a_run_stops_when_evaluations_get_no_better(tmp_path: Path) -> None:
    trainer = told(build(tmp_path), [3.0, 2.0, 2.5, 2.0])
    trainer.train()
    assert trainer.state.global_step == trainer.stopped_early == 4  # as good is no better
    found = choice.stopped(trainer)
    assert found is not None and (found["step"], found["of"], found["best"]) == (4, 6, 2.0)
    [line] = choice.lines({"stopped": found, "chosen": None})
    assert line.startswith("stopped at step 4 of 6: eval_loss was no better than 2 in 2 evaluations in a row")


@pytest.mark.long
def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 3}
    cut = told(build(tmp_path, max_steps=3, **saved), [3.0, 2.0, 2.5])
    cut.train()
    assert cut.stopped_early is None and choice.stopped(cut) is None
    saved = {"save_strategy": "steps", "save_steps": 4}
    # what is evaluated at its start was counted before
    resumed = told(build(tmp_path, eval_on_start=True, **saved), [2.5, 2.1, 1.0])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == resumed.stopped_early == 4
    over = build(tmp_path, **saved)
    over.train(resume_from_checkpoint=True)
    assert over.state.global_step == over.stopped_early == 4, "no step after the end"
    patient = told(build(tmp_path, early_stopping_patience=3), [1.0, 0.9])
    patient.train(resume_from_checkpoint=True)
    assert patient.state.global_step == 6 and patient.stopped_early is None


@pytest.mark.long
def test_a_resumed_run_may_begin_to_stop_early(tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 1}
    told(build(tmp_path, early_stopping_patience=None, max_steps=1, **saved), [3.0]).train()
    resumed = told(build(tmp_path, early_stopping_patience=1, **saved), [4.0])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.stopped_early == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "early_stopping_patience needs evaluations during training: set eval_strategy"),
        ({"eval_strategy": "epoch"}, "needs a metric to compare evaluations by: set metric_for_best_model"),
        ({"eval_strategy": "epoch", "early_stopping_patience": 0}, "early_stopping_patience=0 is outside"),
    ],
)
def test_what_early_stopping_lacks_is_said(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        UniSDConfig(str(tmp_path), use_cpu=True, **{"early_stopping_patience": 2, **options})


class Log(TrainerCallback):
    """What a tracker is given."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.lines.append((state.global_step, dict(logs)))


def test_evaluations_are_written_printed_drawn_and_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log()
    display = ProgressDisplay(Console(width=200, force_terminal=False))
    trainer = build(
        tmp_path,
        max_steps=2,
        callbacks=[log, display],
        grader=lambda row, text: True,
    )
    trainer.train()
    trainer.evaluate()  # after training: no line of it
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], is_evaluation(line)) for line in lines] == [
        (1, False), (1, True), (2, False), (2, True),
    ]  # fmt: skip
    assert lines[1]["eval_loss"] > 0 and lines[1]["eval_accuracy"] == 1.0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluation")]
    assert shown[0].startswith(f"evaluation at step 1/2  loss {lines[1]['eval_loss']:.4f}  accuracy 100.0 %")
    assert [step for step, logs in log.lines if logs.get("eval_accuracy") == 1.0] == [1, 2, 2]
    assert [unit for _, unit, _ in evaluations(read_metrics(tmp_path / "metrics.jsonl"))] == [
        "nats per token",
        "share",
    ]
    # A run that goes on watches its steps, and keeps the evaluation of its last one.
    assert [line["step"] for line in trainer.metrics.forget_after(1)] == [1]
    assert [is_evaluation(line) for line in read_lines(tmp_path / "metrics.jsonl")] == [False, True]


def test_a_long_run_shows_all_evaluations(tmp_path: Path) -> None:
    steps = [{"step": step, "loss": 1.0} for step in range(1, 3001)]
    found = [{"step": step, "eval_loss": 1.0} for step in (1000, 2000)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*steps, *found]))
    kept = read_metrics(tmp_path / "metrics.jsonl")
    assert len(kept) == 1002 and kept[-2:] == found
    for line in steps[49::50]:
        line["probe"] = 1.0
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    assert sum("probe" in line for line in read_metrics(tmp_path / "metrics.jsonl")) == 60
