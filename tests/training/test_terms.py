"""Terms of the loss in the trainer: by name as by their options, whole steps as cut ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.steps import assert_same
from unisd import UserError
from unisd.methods.registry import register_term
from unisd.methods.scores import TermInputs
from unisd.testing import gradients, trainer

OWN = "unlike:coefficient=0.3,power=1.5"


@register_term("unlike", needs=frozenset({"hidden", "negative"}))
def unlike(inputs: TermInputs, *, power: float) -> Tensor:
    """Looks at states, and at the values of the loss as constants."""
    assert inputs.negative_logp is not None and not inputs.student_logp.requires_grad
    weight_N = (inputs.student_logp - inputs.negative_logp).abs() ** power + inputs.student_entropy
    return sum((weight_N * (s - t).abs().mean(-1) for s, t in inputs.hidden), torch.zeros(()))


def test_terms_by_name_are_those_of_the_options(tmp_path: Any) -> None:
    options = trainer(tmp_path, contrastive_weight=0.1, contrastive_margin=0.4, feature_weight=0.2)
    named = trainer(tmp_path, terms=["contrast:coefficient=0.1,margin=0.4", "features:coefficient=0.2"])
    assert named.plan.needs == options.plan.needs >= {"negative"}
    (loss, found), (expected_loss, expected) = gradients(named), gradients(options)
    assert loss == expected_loss and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layers", [None, [0, 1]])
def test_a_term_of_ones_own_does_not_depend_on_the_cut(tmp_path: Any, layers: list[int] | None) -> None:
    options: dict[str, Any] = {"terms": [OWN], "contrastive_weight": 0.1, "feature_layers": layers}
    whole = gradients(trainer(tmp_path, **options))
    assert whole[0] != pytest.approx(gradients(trainer(tmp_path, contrastive_weight=0.1))[0], rel=1e-3)
    cut = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    assert_same(whole, gradients(trainer(tmp_path, **options, **cut)))
    assert_same(whole, gradients(trainer(tmp_path, **options, loss_implementation="plain")))


def test_a_term_is_given_once_and_with_a_teacher(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="loss term 'features' is given twice"):
        trainer(tmp_path, feature_weight=0.1, terms=["features"])
    with pytest.raises(UserError, match="distillation_mode=nll trains without a teacher: unset terms"):
        trainer(tmp_path, distillation_mode="nll", terms=["features"])
