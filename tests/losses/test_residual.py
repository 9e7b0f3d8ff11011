"""ResOPD (arXiv 2610.04882): the reverse KL from a support of k tokens and the realised one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unisd import UniSDConfig, UserError
from unisd.methods.divergence import DivergenceSpec, divergence
from unisd.testing import trainer
from unisd.training.plan import Plan

V, K = 40, 5
RESIDUAL = DivergenceSpec(alpha=1.0, mode="topk", topk=K, topk_estimator="residual", temperature=0.7)


def changed(spec: DivergenceSpec = RESIDUAL, **options: Any) -> DivergenceSpec:
    return replace(spec, **options)


def logits(seed: int) -> tuple[Tensor, Tensor]:
    """Of a student and a teacher that differ, over one position."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, 1, V, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), student.detach() / 2 + teacher


def estimates(student: Tensor, teacher: Tensor, spec: DivergenceSpec) -> tuple[Tensor, Tensor]:
    """Value [V] and gradient [V,V] by the realised token, each token once."""
    found = []
    for token in range(V):
        value = divergence(student, teacher, torch.tensor([token]), spec)
        found.append((value.detach(), torch.autograd.grad(value.sum(), student)[0][0]))
    return torch.cat([value for value, _ in found]), torch.stack([gradient for _, gradient in found])


@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("seed", range(3))
def test_on_average_it_is_the_whole_vocabulary(seed: int, support: str) -> None:
    """Exactly: the mean over all tokens, each as often as the student writes it."""
    student, teacher = logits(seed)
    p_V = (student.detach()[0] / 0.7).softmax(-1)
    r_V = p_V.log() - (teacher[0] / 0.7).log_softmax(-1)
    slope_V = (p_V * (r_V - (p_V * r_V).sum())) / 0.7  # of sum p log(p/q), written from the formula
    spec = changed(topk_support=support)
    value_V, gradient_VV = estimates(student, teacher, spec)
    torch.testing.assert_close((p_V * value_V).sum(), (p_V * r_V).sum())
    torch.testing.assert_close(p_V @ gradient_VV, slope_V)
    biased_V, biased_VV = estimates(student, teacher, changed(spec, topk_estimator="support"))
    assert ((p_V @ biased_VV) - slope_V).norm() > 1e-3 * slope_V.norm()  # what it corrects
    assert (p_V * biased_V).sum() < (p_V * r_V).sum()


def test_a_mean_of_many_draws_and_its_variance() -> None:
    """The student's own support holds most of what it draws."""
    student, teacher = logits(0)
    p_V = (student.detach()[0] / 0.7).softmax(-1)
    drawn = torch.multinomial(p_V, 20_000, replacement=True, generator=torch.Generator().manual_seed(1))
    whole = divergence(student, teacher, drawn[:1], DivergenceSpec(alpha=1.0, temperature=0.7))
    exact_V = torch.autograd.grad(whole.sum(), student)[0][0]
    spread = {}
    for spec in (changed(topk_support="student"), DivergenceSpec(alpha=1.0, mode="sampled", temperature=0.7)):
        gradient_NV = estimates(student, teacher, spec)[1][drawn]
        spread[spec.mode] = float(gradient_NV.var(0).sum())
        error = (gradient_NV.mean(0) - exact_V).norm()
        assert error < 4 * (spread[spec.mode] / len(drawn)) ** 0.5
    assert spread["topk"] < 0.3 * spread["sampled"]


def test_on_the_support_nothing_is_corrected_and_the_whole_vocabulary_is_exact() -> None:
    student, teacher = logits(0)
    top = teacher[0].topk(K).indices[:1]
    of = [divergence(student, teacher, top, spec) for spec in (RESIDUAL, changed(topk_estimator="support"))]
    torch.testing.assert_close(*of)
    exact = divergence(student, teacher, top, DivergenceSpec(alpha=1.0, temperature=0.7))
    torch.testing.assert_close(divergence(student, teacher, top, changed(topk=V)), exact)


def test_what_it_needs_is_asked(tmp_path: Path) -> None:
    for wrong in ({"alpha": 0.0}, {"mode": "full"}, {"add_tail": False}, {"entry_clip": 0.1}):
        with pytest.raises(UserError, match="topk_estimator=residual"):
            changed(**wrong)
    usual = {"distillation_mode": "topk", "distillation_alpha": 1.0, "topk_estimator": "residual"}
    asked = (
        {"top_p": 0.9},
        {"token_clip": 1.0},
        {"token_clip_quantile": 0.99},
        {"completion_source": "reference"},
        {"num_iterations": 2},
        {"mask_truncated_completions": True},
        {"rollout_keep": "passed"},
        {"rollout_contexts": ["feedback", "none"]},
    )
    for wrong in asked:
        with pytest.raises(UserError, match="residual"):
            UniSDConfig(output_dir=str(tmp_path), **{**usual, **wrong})
    for weight in ("confidence_gate", "agreement_token"):
        with pytest.raises(UserError, match=f"do not depend on the token that was drawn: unset {weight}"):
            Plan.of(UniSDConfig(output_dir=str(tmp_path), token_weights=[weight], **usual))
    assert UniSDConfig(output_dir=str(tmp_path), **usual).divergence_spec.topk_estimator == "residual"


def test_contrast_compares_the_teachers_whatever_estimates_the_loss(tmp_path: Path) -> None:
    options = {"distillation_mode": "topk", "distillation_alpha": 1.0, "topk_estimator": "residual"}
    trained = trainer(tmp_path, **options, token_weights=["contrast_weight"], max_steps=1)
    assert trained.train().training_loss != 0
