"""What is said of a step's weights."""

from __future__ import annotations

import pytest
import torch

from unisd.config import UniSDConfig
from unisd.methods.aggregation import weight_stats
from unisd.training.coefficients import idle_agreement, weight_metrics


@pytest.mark.parametrize(("apart", "idle"), [(5, True), (30, False)])
def test_a_few_tokens_that_stand_out_do_not_hide_idle_agreement(apart: int, idle: bool) -> None:
    """Half a percent of the tokens at .909, the rest at .998: nothing is bought. Three percent are
    something.
    """
    weights = torch.full((10, 100), 0.998)
    weights.view(-1)[:apart] = 0.909
    metrics = weight_metrics("agreement_token", weight_stats(weights, torch.ones(10, 100).bool()))
    said = idle_agreement(metrics, UniSDConfig(agreement="token", agreement_gamma=0.1))
    assert (said is not None) == idle and idle_agreement({}, UniSDConfig()) is None
    if said is not None:
        assert said == (
            "agreement weights differ by less than 1 % (range between their 1 % and 99 % quantiles: 0.0000;"
            " mean 0.9976, least 0.9090): their forward passes have no effect; raise agreement_gamma=0.1, or"
            " set agreement=none."
        )
