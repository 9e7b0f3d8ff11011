"""NSD's term (arXiv 2609.11699) against its formula in float64, and in a training step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from unisd.methods.registry import parse_term
from unisd.methods.scores import TermInputs
from unisd.testing import gradients, trainer


def test_the_term_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    p_N, ref_N, neg_N = torch.rand(3, 50, generator=generator, dtype=torch.float64)
    leaf_N = p_N.log().requires_grad_()
    inputs = TermInputs(leaf_N, ref_N.log(), torch.zeros(50), torch.zeros(50), neg_N.log())
    value_N = parse_term("nsd:kl=0.01")(inputs)
    (slope_N,) = torch.autograd.grad(value_N.sum(), leaf_N)
    listed = torch.stack([p_N, ref_N, neg_N, value_N.detach(), slope_N], dim=1).tolist()
    for p, ref, neg, value, slope in listed:
        gap, close = max(0.0, neg - ref), {"rel_tol": 1e-9, "abs_tol": 1e-12}
        assert math.isclose(value, gap / (2 - p) + 0.01 * ref * math.log(ref / p), **close)
        # d/d log p: away from what the bad self likes better, towards the reference model
        assert math.isclose(slope, gap * p / (2 - p) ** 2 - 0.01 * ref, **close)


@pytest.mark.parametrize("options", [{}, {"packing": "padded"}, {"per_device_train_batch_size": 1}])
def test_it_may_be_the_whole_loss(tmp_path: Path, options: dict[str, Any]) -> None:
    """Chunked or plain, packed or padded, however the step is cut."""
    nsd = {
        "distillation_weight": 0.0,
        "terms": ["nsd"],
        "teacher_context": "plain",
        "max_completion_length": 8,
    }
    whole = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "loss_implementation": "plain",
    }
    if "per_device_train_batch_size" in options:
        options = {**options, "gradient_accumulation_steps": 4}
    loss, expected = gradients(trainer(tmp_path / "plain", **nsd, **whole))
    ours, found = gradients(
        trainer(tmp_path / "ours", **{**nsd, **whole, "loss_implementation": "chunked", **options})
    )
    assert loss != 0 and ours == pytest.approx(loss, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
    assert any(gradient.abs().sum() > 0 for gradient in found.values())
