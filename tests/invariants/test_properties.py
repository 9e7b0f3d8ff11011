"""Properties of every mechanism over random shapes, masks and extreme log-probabilities; and
agreement's budget.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.steps import assert_same
from unisd import UniSDConfig
from unisd.errors import UserError
from unisd.losses.chunked import chunked_loss
from unisd.losses.head import Head
from unisd.losses.terms import LossInputs
from unisd.methods.aggregation import step_coefficients
from unisd.methods.agreement import agreement_sequence, agreement_token
from unisd.methods.divergence import DivergenceSpec
from unisd.methods.scores import StepScores, TermInputs
from unisd.methods.terms import contrast, quantile_clip
from unisd.scoring.requests import subsample_contexts
from unisd.testing import gradients, trainer
from unisd.training.coefficients import most_uncertain

F64 = torch.float64
quick = settings(max_examples=30, deadline=None)
AGREEMENT = (agreement_token, agreement_sequence)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 6))
one_process = SimpleNamespace(num_processes=1, process_index=0)


def scores(seed: int, shape: tuple[int, int], contexts: int = 3, low: float = -3.0) -> StepScores:
    """Random scores between `low` and 0; about a fifth of the tokens and contexts are missing."""
    g = torch.Generator().manual_seed(seed)
    mask, present = torch.rand(shape, generator=g) < 0.8, torch.rand(contexts, shape[0], generator=g) < 0.8
    logp = low * torch.rand(contexts, *shape, generator=g, dtype=F64)
    return StepScores(
        mask, torch.zeros(shape).long(), logp.new_zeros(shape), auxiliary_logp=logp, auxiliary_present=present
    )


@given(
    seed=st.integers(0, 10**6), shape=shapes, gamma=st.floats(0, 100), stat=st.sampled_from(["var", "range"])
)
@quick
def test_weights_lie_in_zero_one(seed: int, shape: tuple[int, int], gamma: float, stat: str) -> None:
    for function in AGREEMENT:
        weights = function(scores(seed, shape), gamma=gamma, stat=stat)
        assert (weights > 0).all() and (weights <= 1).all()


@given(
    seed=st.integers(0, 10**6), shape=shapes, stretch=st.floats(1, 5), stat=st.sampled_from(["var", "range"])
)
@quick
def test_more_disagreement_never_weighs_more_at_a_fixed_scale(
    seed: int, shape: tuple[int, int], stretch: float, stat: str
) -> None:
    """Sequence: the spread of all contexts grows.

    Token: that of one token grows, and a token of larger spread fixes the scale.
    """
    s = scores(seed, shape)
    wider = replace(s, auxiliary_logp=stretch * s.auxiliary_logp)
    assert (
        agreement_sequence(wider, stat=stat, gamma=1.0) <= agreement_sequence(s, stat=stat, gamma=1.0) + 1e-12
    ).all()
    length = shape[1] + 1
    logp = torch.cat(
        [
            s.auxiliary_logp,
            torch.tensor([0.0, -100.0, -50.0], dtype=F64)[:, None, None].expand(3, shape[0], 1),
        ],
        -1,
    )
    fixed = StepScores(
        torch.ones(shape[0], length).bool(),
        torch.zeros(shape[0], length).long(),
        logp[0],
        logp,
        torch.ones(3, shape[0]).bool(),
    )
    moved = logp.clone()
    moved[:, 0, 0] *= stretch
    before = agreement_token(fixed, gamma=1.0, quantile=1.0, stat=stat)
    after = agreement_token(replace(fixed, auxiliary_logp=moved), gamma=1.0, quantile=1.0, stat=stat)
    assert after[0, 0] <= before[0, 0] + 1e-12
    torch.testing.assert_close(after.flatten()[1:], before.flatten()[1:])


@given(seed=st.integers(0, 10**6), shape=shapes, order=st.permutations(range(4)))
@quick
def test_the_order_of_contexts_does_not_matter(seed: int, shape: tuple[int, int], order: list[int]) -> None:
    s = scores(seed, shape, contexts=4)
    other = replace(s, auxiliary_logp=s.auxiliary_logp[order], auxiliary_present=s.auxiliary_present[order])
    for function in AGREEMENT:
        torch.testing.assert_close(function(other, gamma=2.0), function(s, gamma=2.0))


@given(seed=st.integers(0, 10**6), shape=shapes, stat=st.sampled_from(["var", "range"]))
@quick
def test_one_context_gives_weight_one(seed: int, shape: tuple[int, int], stat: str) -> None:
    for function in AGREEMENT:
        assert (function(scores(seed, shape, contexts=1), gamma=50.0, stat=stat) == 1).all()


@given(
    seed=st.integers(0, 10**6),
    shape=shapes,
    low=st.sampled_from([-1e4, -1e6, -1e-8]),
    normalizer=st.sampled_from(["weights", "tokens"]),
)
@quick
def test_extreme_scores_stay_finite(seed: int, shape: tuple[int, int], low: float, normalizer: str) -> None:
    s = scores(seed, shape, low=low)
    token, sequence = agreement_token(s, gamma=10.0), agreement_sequence(s, gamma=10.0)
    assert token.isfinite().all() and sequence.isfinite().all()
    for aggregation in ("sequence", "token"):
        coefficients = step_coefficients(s.mask, token, sequence, aggregation, normalizer)
        assert coefficients.isfinite().all() and (coefficients >= 0).all()
        assert coefficients.sum() <= 1 + 1e-9


@given(seed=st.integers(0, 10**6), shape=shapes, junk=st.sampled_from([math.nan, math.inf, -1e30]))
@quick
def test_masked_tokens_have_no_influence(seed: int, shape: tuple[int, int], junk: float) -> None:
    s = scores(seed, shape)
    outside = ~(s.mask & s.auxiliary_present[:, :, None])
    other = replace(s, auxiliary_logp=s.auxiliary_logp.masked_fill(outside, junk))
    for function in AGREEMENT:
        assert torch.equal(function(other, gamma=1.0), function(s, gamma=1.0))
    values = s.auxiliary_logp[0]
    dirty = values.masked_fill(~s.mask, junk)
    assert quantile_clip(dirty, s.mask, 0.7) == quantile_clip(values, s.mask, 0.7)
    weights = torch.where(s.mask, 0.5, junk)
    ones = torch.ones(shape[0])
    clean = step_coefficients(s.mask, torch.full(shape, 0.5), ones, "sequence", "weights")
    assert torch.equal(step_coefficients(s.mask, weights, ones, "sequence", "weights"), clean)


@given(seed=st.integers(0, 10**6), margin=st.floats(0, 2), size=st.sampled_from([1.0, 1e4]))
@quick
def test_contrast_hinge(seed: int, margin: float, size: float) -> None:
    """Never negative, at most margin + |l+ - l-|, and its gradient pulls l towards l+ and away from
    l-, or is zero.
    """
    g = torch.Generator().manual_seed(seed)
    logp, right, wrong = (-size * torch.rand(7, generator=g, dtype=F64) for _ in range(3))
    logp.requires_grad_()
    constant = torch.zeros(7, dtype=F64)
    hinge = contrast(TermInputs(logp, right, constant, constant, wrong), margin=margin)
    (slope,) = torch.autograd.grad(hinge.sum(), logp)
    assert (
        hinge.isfinite().all()
        and (hinge >= 0).all()
        and (hinge <= margin + (right - wrong).abs() + 1e-9).all()
    )
    between = (logp - right) * (logp - wrong) < 0
    assert (slope[~between] == 0).all()
    pulled = between & (hinge > 0)
    assert torch.equal(slope[pulled], -2 * (right - logp)[pulled].sign())


@given(
    seed=st.integers(0, 10**6),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
    cap=st.floats(0.001, 0.5),
    size=st.sampled_from([1.0, 1e4]),
)
@quick
def test_clipping(seed: int, alpha: float, cap: float, size: float) -> None:
    """A clipped token has no gradient, the loss is at most the cap, and logits of 1e4 stay
    finite.
    """
    g = torch.Generator().manual_seed(seed)
    hidden, teacher = (size * torch.randn(5, 4, generator=g, dtype=F64) for _ in range(2))
    hidden.requires_grad_()
    coefficient = torch.full((5,), 0.2, dtype=F64)
    head, tokens = Head(torch.eye(4, dtype=F64)), torch.zeros(5).long()
    out = chunked_loss(
        LossInputs(
            hidden, head, teacher, head, tokens, DivergenceSpec(alpha=alpha), coefficient, token_clip=cap
        )
    )
    (gradient,) = torch.autograd.grad(out.loss, hidden)
    assert gradient.isfinite().all() and -1e-9 <= out.loss <= cap + 1e-9
    assert torch.equal(out.clipped_N, out.divergence_N > cap) and (gradient[out.clipped_N] == 0).all()


# -------------------------------------------------------------------------------------------------
# agreement's budget

TOKEN = {"agreement": "token", "agreement_gamma": 1.0}


@given(count=st.integers(0, 6), budget=st.integers(2, 6), step=st.integers(0, 50), row=st.integers(0, 50))
@quick
def test_budget_of_contexts_is_a_seeded_draw(count: int, budget: int, step: int, row: int) -> None:
    views = [[k] for k in range(count)]
    drawn = subsample_contexts(views, budget, 0, step, row)
    assert (
        len(drawn) == min(budget, count) and drawn == sorted(drawn) and all(view in views for view in drawn)
    )
    assert (
        drawn == subsample_contexts(views, budget, 0, step, row)
        and subsample_contexts(views, None, 0, step, row) == views
    )


def test_budget_of_contexts_reaches_all_of_them() -> None:
    views = [[k] for k in range(5)]
    assert {view[0] for step in range(30) for view in subsample_contexts(views, 2, 0, step, 0)} == set(
        range(5)
    )


@given(entropy=st.lists(st.floats(0, 5), min_size=1, max_size=9), share=st.floats(0.01, 1))
@quick
def test_budget_of_rows_takes_the_most_uncertain(entropy: list[float], share: float) -> None:
    chosen: Tensor = most_uncertain(torch.tensor(entropy, dtype=F64), share, one_process)  # type: ignore[arg-type]
    assert int(chosen.sum()) == math.ceil(share * len(entropy))
    taken, left = (
        [e for e, c in zip(entropy, chosen, strict=True) if c],
        [e for e, c in zip(entropy, chosen, strict=True) if not c],
    )
    assert not left or min(taken) >= max(left)


def test_budget_scores_fewer_views_and_says_so(tmp_path: Any) -> None:
    built = trainer(tmp_path, agreement_budget_contexts=2, agreement_uncertain_share=0.5, **TOKEN)
    asked: list[str] = []
    original = built.scorer.passes.hidden_states

    def watched(jobs: Any, device: Any) -> Any:
        asked.extend(job.view for job in jobs)
        return original(jobs, device)

    built.scorer.passes.hidden_states = watched  # type: ignore[method-assign]
    gradients(built)
    assert (asked.count("teacher"), asked.count("auxiliary")) == (8, 8)  # 4 of 8 rows, 2 of 3 contexts each
    assert (
        built.metrics.values["agreement/contexts"] == 1.0
        and built.metrics.values["agreement/scored_rows"] == 0.5
    )


def test_a_budget_for_everything_changes_nothing(tmp_path: Any) -> None:
    whole = gradients(trainer(tmp_path, **TOKEN))
    assert_same(
        whole,
        gradients(trainer(tmp_path, agreement_budget_contexts=3, agreement_uncertain_share=1.0, **TOKEN)),
    )
    loss, _ = gradients(trainer(tmp_path, agreement_budget_contexts=2, **TOKEN))
    assert loss != pytest.approx(whole[0], rel=1e-6)


def test_budget_refuses_nonsense() -> None:
    for option, message in (
        ({"agreement_budget_contexts": 1}, "agreement_budget_contexts"),
        ({"agreement_uncertain_share": 0}, "agreement=none"),
    ):
        with pytest.raises(UserError, match=message):
            UniSDConfig(**TOKEN, **option)


@pytest.mark.parametrize(("gamma", "warned"), [(1e-4, 1), (1.0, 0)])
def test_weights_that_do_nothing_are_reported_once(
    tmp_path: Any, caplog: Any, gamma: float, warned: int
) -> None:
    built = trainer(tmp_path, agreement="token", agreement_gamma=gamma)
    with caplog.at_level(logging.WARNING, logger="unisd"):
        gradients(built)
        gradients(built)
    assert sum("differ by less than 1 %" in record.message for record in caplog.records) == warned
