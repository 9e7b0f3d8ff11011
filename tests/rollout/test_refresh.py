"""Answers of the initial student, written once, or of the student of every N-th step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from unisd import UniSDConfig, UserError
from unisd import testing as tiny
from unisd.testing import trainer

SEMI = {
    "completion_source": "initial",
    "num_train_epochs": 3,
    "learning_rate": 3e-2,
    "warmup_steps": 0,
    "max_completion_length": 8,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
}


def written(built: Any, **rest: Any) -> dict[int, dict[int, list[int]]]:
    """The answers of a run, by step and row."""
    found: dict[int, dict[int, list[int]]] = {}
    complete = built.completions.complete

    def watched(numbers: Any, step: int) -> Any:
        completions = complete(numbers, step)
        found.setdefault(step, {}).update(
            {row: c.ids for (row, _), c in zip(numbers, completions, strict=True)}
        )
        return completions

    built.completions.complete = watched
    built.train(**rest)
    return found


def by_row(found: dict[int, dict[int, list[int]]]) -> dict[int, list[tuple[int, list[int]]]]:
    rows: dict[int, list[tuple[int, list[int]]]] = {}
    for step, answers in sorted(found.items()):
        for row, ids in answers.items():
            rows.setdefault(row, []).append((step, ids))
    return rows


@pytest.mark.long
def test_without_a_refresh_each_row_keeps_its_answer(tmp_path: Path) -> None:
    found = by_row(written(trainer(tmp_path, train_dataset=tiny.rows(4), **SEMI)))
    assert all(len({tuple(ids) for _, ids in answers}) == 1 for answers in found.values())
    assert {len(answers) for answers in found.values()} == {3}


def test_answers_are_those_of_the_student_at_the_last_refresh(tmp_path: Path) -> None:
    """Two steps an epoch, a refresh every four: the first two epochs share their answers."""
    built = trainer(tmp_path, train_dataset=tiny.rows(4), refresh_rollouts_every=4, **SEMI)
    weights: dict[int, Any] = {0: {n: p.detach().clone() for n, p in built.model.named_parameters()}}

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            weights[state.global_step] = {n: p.detach().clone() for n, p in built.model.named_parameters()}

    built.add_callback(Keep())
    found = by_row(written(built))
    for answers in found.values():
        (_, first), (_, second), (step, _) = answers
        assert first == second and step >= 4
    assert any(answers[2][1] != answers[0][1] for answers in found.values())
    author = built.other_teachers["rollout"]
    assert all(torch.equal(author.state[name], weights[4][name]) for name in author.state)


@pytest.mark.long
def test_a_resumed_run_meets_the_same_answers(tmp_path: Path) -> None:
    options = {**SEMI, "refresh_rollouts_every": 2, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path / "whole", train_dataset=tiny.rows(4), **options)
    expected = written(whole)
    again = trainer(tmp_path / "again", train_dataset=tiny.rows(4), **options)
    found = written(again, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert found and found == {step: expected[step] for step in found} and min(found) == 3
    for (name, ours), theirs in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_it_belongs_to_answers_written_ahead(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="set completion_source=initial"):
        UniSDConfig(output_dir=str(tmp_path), refresh_rollouts_every=4)
