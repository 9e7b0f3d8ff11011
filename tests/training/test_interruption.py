"""What a signal, an alarm and the end of a training leave of checkpoints and evaluations."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from unisd import UniSDTrainer
from unisd import testing as tiny
from unisd.errors import UserError
from unisd.files import is_evaluation, read_lines
from unisd.training.guards import Interruption

WATCHED: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,  # four steps an epoch
    "max_completion_length": 4,
    "metric_for_best_model": "loss",
    "load_best_model_at_end": True,
    "eval_dataset": tiny.rows(2),
}


class Asked(Interruption):
    """A signal at a step, or while an evaluation takes place."""

    def __init__(self, step: int, where: str = "step") -> None:
        super().__init__()
        self.step, self.where = step, where

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.where == "step" and state.global_step == self.step - 1:
            self.asked = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.where == "evaluation" and state.global_step == self.step:
            self.asked = True
        super().on_evaluate(args, state, control, **kwargs)


def worse_each_time(trainer: UniSDTrainer) -> None:
    """Make each evaluation worse than the one before it."""
    measure, losses = trainer.evaluate, itertools.count(1)

    def evaluate(*args: Any, **kwargs: Any) -> dict[str, float]:
        return {**measure(*args, **kwargs), "eval_loss": float(next(losses))}

    trainer.evaluate = evaluate  # type: ignore[method-assign]


def stopped(folder: Path, asked: Asked | None, **options: Any) -> UniSDTrainer:
    built = tiny.trainer(folder, callbacks=[asked] if asked else [], **{**WATCHED, **options})
    worse_each_time(built)
    built.train()
    return built


def evaluated(folder: Path) -> list[int]:
    return [line["step"] for line in read_lines(folder / "metrics.jsonl") if is_evaluation(line)]


def saved(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*")}


EVERY_EPOCH = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 3, "max_steps": -1}
EVERY_TWO = {
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "max_steps": 8,
}


def test_a_broken_epoch_is_not_evaluated_as_a_whole_one(tmp_path: Path) -> None:
    trainer = stopped(tmp_path, Asked(6), **EVERY_EPOCH, early_stopping_patience=1)
    assert trainer.state.global_step == 6 and evaluated(tmp_path) == [4] and trainer.stopped_early is None
    assert saved(tmp_path) == {"checkpoint-4", "checkpoint-6"}


def test_a_resumed_run_knows_where_it_began(tmp_path: Path) -> None:
    assert stopped(tmp_path, Asked(2), **EVERY_TWO).began_at == 0
    built = tiny.trainer(tmp_path, **{**WATCHED, **EVERY_TWO})
    built.train(resume_from_checkpoint=True)
    assert built.began_at == 2 and built.state.global_step == 8


@pytest.mark.parametrize("asked", [6, None])
def test_the_newest_checkpoint_stays_beside_the_best(tmp_path: Path, asked: int | None) -> None:
    trainer = stopped(tmp_path, asked and Asked(asked), **EVERY_TWO, save_total_limit=1)
    assert trainer.state.best_global_step == 2 and trainer.args.save_total_limit == 1
    assert saved(tmp_path) == {"checkpoint-2", f"checkpoint-{asked or 8}"}


def test_a_signal_during_an_evaluation_stops_after_it(tmp_path: Path) -> None:
    trainer = stopped(tmp_path, Asked(4, "evaluation"), **EVERY_TWO)
    assert trainer.state.global_step == 4 and saved(tmp_path) == {"checkpoint-2", "checkpoint-4"}


def test_what_stopped_a_run_is_saved_where_the_best_alone_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**EVERY_TWO, "save_strategy": "best"}
    built = tiny.trainer(tmp_path, **{**WATCHED, **options})
    worse_each_time(built)
    monkeypatch.setattr(
        type(built.finite), "too_many", property(lambda _: "bad" if built.state.global_step > 3 else None)
    )
    with pytest.raises(UserError, match="bad"):
        built.train()
    assert saved(tmp_path) == {"checkpoint-2", "checkpoint-4"} and evaluated(tmp_path) == [2]
