"""Generations that begin alike have tokens of one divergence, and the clip's quantile is often
theirs: rounding must not decide which of them loses its gradient.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import unisd.trainer
from tests.helpers.engines import ByKey
from tests.helpers.steps import assert_same
from unisd import reference
from unisd.testing import gradients, trainer


def written(row: int, generation: int) -> list[int]:
    """Two answers to each row that begin alike: nine tokens, or seven of them and then others."""
    tokens = torch.randint(6, 262, (9,), generator=torch.Generator().manual_seed(row)).tolist()
    return tokens[:7] + [20 + row] * (row % 3) if generation else tokens


def with_ties(tmp_path: Path, family: str, **options: Any) -> Any:
    return trainer(
        tmp_path, family, engine=ByKey(lambda key: written(*key[2:])), num_generations=2, **options
    )


CUTS: list[dict[str, Any]] = [
    {"packing": "padded"},
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    {"loss_implementation": "plain"},
    {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    {"token_budget": 1},
    {"loss_chunk_tokens": 7},
]


@pytest.fixture
def at_quantile(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each step, how many tokens are at the clip but for rounding."""
    counts: list[int] = []
    weigh = unisd.trainer.loss_coefficients

    def counted(args: Any, plan: Any, scores: Any) -> Any:
        found = weigh(args, plan, scores)
        D_N, kappa = scores.divergence[scores.mask], found.token_clip
        counts.append(int(((D_N - kappa).abs() < 1e-5 * kappa).sum()))
        return found

    monkeypatch.setattr(unisd.trainer, "loss_coefficients", counted)
    return counts


# which quantiles fall on tied tokens, and which of the cuts then rounded otherwise
@pytest.mark.parametrize(("family", "alpha", "quantile", "cuts"), [
    ("qwen3", 0.0, 0.7, 3),
    pytest.param("qwen3", 0.5, 0.95, 6, marks=pytest.mark.long),
    pytest.param("llama", 1.0, 0.95, 6, marks=pytest.mark.long),
    pytest.param("gemma3", 0.0, 0.8, 6, marks=pytest.mark.long),
    pytest.param("gemma3", 0.5, 0.8, 6, marks=pytest.mark.long),
])  # fmt: skip
def test_ties_at_the_quantile_do_not_depend_on_the_cut(
    tmp_path: Path, family: str, alpha: float, quantile: float, cuts: int, at_quantile: list[int]
) -> None:
    options = {"distillation_alpha": alpha, "token_clip_quantile": quantile}
    built = with_ties(tmp_path, family, **options)
    teacher = reference.initial_teacher(built.model)
    whole = gradients(built)
    for cut in CUTS[:cuts]:
        assert_same(whole, gradients(with_ties(tmp_path, family, **options, **cut)), 1e-5)
    assert len(at_quantile) == 1 + cuts and min(at_quantile) >= 2

    prompts, student = built.prompts, copy.deepcopy(built.model)
    batch = [
        reference.Row(prompts.student(row), prompts.teacher(row), written(i, generation))
        for i, row in enumerate(built.rows)
        for generation in (0, 1)
    ]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    loss = reference.step(student, teacher, optimizer, batch, SimpleNamespace(**vars(built.args)))
    assert_same(whole, (float(loss), {name: p.grad for name, p in student.named_parameters()}))


def test_the_cut_would_tell_without_ties_being_held_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison notices: as soon as each pass looks for itself, gradients differ.

    The second pass rounds otherwise, as those of other shapes do on some processors.
    """
    import unisd.losses.terms
    import unisd.training.coefficients

    options, found = {"distillation_alpha": 0.0, "token_clip_quantile": 0.95}, []
    for rounding, cut in ((1.0, {}), (1 + 1e-6, {"token_budget": 1})):
        for module in (unisd.losses.terms, unisd.training.coefficients):
            monkeypatch.setattr(module, "above_clip", lambda D, clip, r=rounding: D.detach() * r > clip)
        found.append(gradients(with_ties(tmp_path, "qwen3", **options, **cut)))
    whole, row_by_row = found
    with pytest.raises(AssertionError):
        assert_same(whole, row_by_row, 1e-3)
