"""The step of UniSD*, and when two steps are the same."""

from __future__ import annotations

import pytest
import torch

STAR = {
    "teacher_model_kind": "ema",
    "agreement": "token",
    "agreement_gamma": 1.0,
    "contrastive_weight": 0.1,
    "feature_weight": 0.1,
    # between two tokens for any count below 1,000: on one of them rounding would decide who is
    # clipped
    "token_clip_quantile": 0.813,
}


def assert_same(
    a: tuple[float, dict[str, torch.Tensor]],
    b: tuple[float, dict[str, torch.Tensor]],
    tolerance: float = 2e-5,
) -> None:
    assert a[0] == pytest.approx(b[0], rel=tolerance, abs=1e-7)
    assert a[1].keys() == b[1].keys()
    largest = max(float(g.abs().max()) for g in a[1].values())
    assert largest > 0
    for name, gradient in a[1].items():
        torch.testing.assert_close(gradient, b[1][name], rtol=tolerance, atol=tolerance * largest, msg=name)
