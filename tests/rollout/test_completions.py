"""Where completions come from (student, reference, initial model, mixture), and the likelihood
loss, against transformers' own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.steps import assert_same
from unisd import recipes
from unisd import testing as tiny
from unisd.config import UniSDConfig
from unisd.errors import UserError
from unisd.testing import gradients, trainer

NLL = {"distillation_mode": "nll", "teacher_model_kind": "live"}


@pytest.mark.parametrize("implementation", ["plain", "chunked"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "cohere"])
def test_sft_is_the_loss_of_transformers(tmp_path: Any, family: str, implementation: str) -> None:
    """Token aggregation of -log p on the references is a causal LM's own loss on the same labels,
    gradient included.
    """
    built = trainer(
        tmp_path, family, completion_source="reference", loss_aggregation="token", temperature=0.7,
        max_completion_length=64, loss_implementation=implementation, **NLL,
    )  # fmt: skip
    ours = gradients(built, perturb=0.0)
    built.model.zero_grad()
    sequences = [
        (built.prompts.student(row), built.completions._reference(i).ids) for i, row in enumerate(built.rows)
    ]
    longest = max(len(p) + len(c) for p, c in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, (prompt, completion) in enumerate(sequences):
        ids[i, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        mask[i, : len(prompt) + len(completion)] = 1
        labels[i, len(prompt) : len(prompt) + len(completion)] = torch.tensor(completion)
    loss = built.model(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    theirs = {name: p.grad.clone() for name, p in built.model.named_parameters() if p.grad is not None}
    assert_same(ours, (float(loss.detach()), theirs))


def sampled(built: Any, step: int) -> list[list[int]]:
    return [
        completion.ids
        for completion in built.completions.complete([(i, 0) for i in range(len(built.rows))], step)
    ]


@pytest.mark.long
def test_the_ends_of_a_mixture_are_its_sources(tmp_path: Any) -> None:
    options = {"max_completion_length": 64}
    student = sampled(trainer(tmp_path, **options), 4)
    reference = sampled(trainer(tmp_path, completion_source="reference", **options), 4)
    built = trainer(tmp_path, completion_source="mixture", on_policy_share=1.0, **options)
    assert sampled(built, 4) == student != reference
    assert (
        sampled(trainer(tmp_path, completion_source="mixture", on_policy_share=0.0, **options), 4)
        == reference
    )
    half = trainer(
        tmp_path, train_dataset=tiny.rows(8) * 25, completion_source="mixture", on_policy_share=0.5, **options
    )
    share = sum(half.completions._source(i, 0, 0) == "student" for i in range(200)) / 200
    assert 0.35 < share < 0.65
    assert [half.completions._source(i, 0, 0) for i in range(50)] != [
        half.completions._source(i, 0, 1) for i in range(50)
    ]


def test_the_initial_model_writes_once_whatever_the_student_has_become(tmp_path: Any) -> None:
    built = trainer(tmp_path, completion_source="initial", distillation_mode="nll")
    first = sampled(built, 0)
    with torch.no_grad():
        for parameter in built.model.parameters():
            parameter.mul_(1.5)
    assert sampled(built, 7) == first
    assert sampled(trainer(tmp_path), 0) == first  # the same draw as the untrained student's


def test_empty_answers_of_the_initial_model_carry_no_loss(tmp_path: Any) -> None:
    from unisd.rollout.engine import Completion

    built = trainer(tmp_path, completion_source="initial", distillation_mode="nll")
    found = [Completion([2], False), Completion([40, 2], False)]
    assert built.completions.carry_loss([(0, 0), (1, 0)], found) == [False, True]
    assert trainer(tmp_path).completions.carry_loss([(0, 0), (1, 0)], found) == [True, True]


@pytest.mark.parametrize("masked", [True, False])
def test_cut_answers_are_left_out_of_the_loss_when_asked(tmp_path: Any, masked: bool) -> None:
    built = trainer(tmp_path, mask_truncated_completions=masked)
    numbers = [(i, 0) for i in range(8)]
    completions = built._rollout(numbers)
    rows = built._requests(numbers, completions)
    assert any(completion.truncated for completion in completions)
    assert [any(row.loss_mask) for row in rows] == [
        not (masked and completion.truncated) for completion in completions
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"completion_source": "initial", "teacher_model_kind": "ema"}, "needs the initial weights"),
        (
            {"distillation_mode": "nll", "agreement": "token", "contrastive_weight": 0.1},
            "unset agreement and contrastive_weight",
        ),
        ({"distillation_mode": "nll", "entry_clip": 0.05}, "unset entry_clip"),
        ({"completion_source": "teacher"}, "is not one of"),
    ],
)
def test_contradictions_are_refused(tmp_path: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        UniSDConfig(output_dir=str(tmp_path), **options)


def test_a_reference_over_the_limit_is_named(tmp_path: Any) -> None:
    rows = tiny.rows(3)
    rows[1]["privileged_context"] = "It is " + "very " * 20 + "long."
    with pytest.raises(UserError, match="row 1 of the training data: the completion has"):
        trainer(tmp_path, train_dataset=rows, completion_source="reference", max_completion_length=40)


@pytest.mark.parametrize("name", recipes.names())
@pytest.mark.long
def test_each_recipe_trains_for_three_steps(tmp_path: Any, name: str) -> None:
    recipe = recipes.load(name)
    # flags of `unisd train`: some are no field of the configuration
    merged = {**recipe.options, **recipe.pocket}
    settings = {k: v for k, v in merged.items() if v is not None and k in UniSDConfig.__dataclass_fields__}
    settings |= {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 24,
    }
    settings |= {"learning_rate": 1e-3, "warmup_steps": 0}
    built = trainer(tmp_path, grader=lambda row, text: len(text) % 2 == 0, **settings)
    before = [parameter.detach().clone() for parameter in built.model.parameters()]
    built.train()
    losses = [entry["loss"] for entry in built.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(torch.isfinite(torch.tensor(loss)) for loss in losses)
    assert any(not torch.equal(a, b) for a, b in zip(before, built.model.parameters(), strict=True))
