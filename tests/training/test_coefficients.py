"""What is said of a step's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unisd.config import UniSDConfig
from unisd.methods.aggregation import weight_stats
from unisd.testing import trainer
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


def test_contexts_that_agree_to_rounding_are_not_blamed_on_gamma() -> None:
    same = weight_metrics("agreement_token", weight_stats(torch.ones(2, 5), torch.ones(2, 5).bool()))
    said = idle_agreement(same, UniSDConfig(agreement="token"))
    assert said is not None and "the contexts give the same scores" in said and "gamma" not in said


def test_weights_that_leave_nothing_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"token_weights": ["confidence_gate:threshold=0.0001"], "max_steps": 2}
    trained = trainer(tmp_path, **options)
    trained.train()
    told = "step 1: the weights of all tokens are 0, so that nothing is learned: look at confidence_gate"
    assert caplog.text.count(told) == 1 and caplog.text.count("nothing is learned") == 1
