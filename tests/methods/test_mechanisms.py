"""Reliability weights, coefficients and clips against loops written from the method's text."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unisd.errors import UserError
from unisd.methods import registry as plugins
from unisd.methods.aggregation import step_coefficients, term_coefficients, weight_stats
from unisd.methods.agreement import agreement_sequence, agreement_token
from unisd.methods.registry import get_weight, parse_weight, register_weight
from unisd.methods.scores import StepScores
from unisd.methods.terms import feature_distance, quantile_clip

F64 = torch.float64
quick = settings(max_examples=40, deadline=None)


def random_scores(
    seed: int = 0, contexts: int = 3, rows: int = 5, length: int = 7, all_present: bool = False
) -> StepScores:
    """Masks with gaps and an empty row, contexts missing here and there, NaN wherever nothing may
    look.
    """
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=g) < 0.7
    mask[1] = False
    present = (
        torch.ones(contexts, rows, dtype=torch.bool)
        if all_present
        else torch.rand(contexts, rows, generator=g) < 0.8
    )
    auxiliary = -3 * torch.rand(contexts, rows, length, generator=g, dtype=F64)
    auxiliary[~(present[:, :, None] & mask)] = math.nan
    teacher = -torch.rand(rows, length, generator=g, dtype=F64)
    return StepScores(
        mask, torch.zeros(rows, length).long(), teacher, auxiliary_logp=auxiliary, auxiliary_present=present
    )


def loop_token(s: StepScores, gamma: float, stat: str, quantile: float, cap: float) -> np.ndarray:
    spread = np.full(tuple(s.mask.shape), np.nan)
    for i, t in np.argwhere(s.mask.numpy()):
        seen = s.auxiliary_logp[:, i, t][s.auxiliary_present[:, i]].numpy()
        if len(seen) >= 2:
            spread[i, t] = np.var(seen, ddof=1) if stat == "var" else seen.max() - seen.min()
    weights = np.ones_like(spread)
    scored = ~np.isnan(spread)
    if scored.any() and np.quantile(spread[scored], quantile) >= 1e-6:
        scale = np.quantile(spread[scored], quantile)
        weights[scored] = np.maximum(0.01, 1 / (1 + gamma * np.minimum(spread[scored] / scale, cap)))
    return weights


def loop_sequence(s: StepScores, gamma: float, stat: str) -> np.ndarray:
    weights = np.ones(len(s.mask))
    for i, row in enumerate(s.mask):
        seen = [
            s.auxiliary_logp[k, i, row].mean().item()
            for k in range(len(s.auxiliary_logp))
            if s.auxiliary_present[k, i]
        ]
        if row.any() and len(seen) >= 2:
            spread = np.var(seen) if stat == "var" else max(seen) - min(seen)
            weights[i] = max(1e-6, math.exp(-gamma * spread))
    return weights


# ---------------------------------------------------------------------------------------- agreement


@given(
    seed=st.integers(0, 10**6),
    contexts=st.integers(0, 5),
    stat=st.sampled_from(["var", "range"]),
    gamma=st.floats(0, 30),
)
@quick
def test_agreement_is_the_text(seed: int, contexts: int, stat: str, gamma: float) -> None:
    s = random_scores(seed, contexts)
    token = agreement_token(s, gamma=gamma, stat=stat, quantile=0.8, cap=1.5)
    np.testing.assert_allclose(token.numpy(), loop_token(s, gamma, stat, 0.8, 1.5), rtol=1e-9)
    np.testing.assert_allclose(
        agreement_sequence(s, gamma=gamma, stat=stat).numpy(), loop_sequence(s, gamma, stat), rtol=1e-9
    )


def test_agreement_by_hand() -> None:
    """Two contexts: l = (-1, -3) has unbiased variance 2, (-1, -2) has 0.5; the largest is the
    scale at quantile 1.
    """
    auxiliary = torch.tensor([[[-1.0, -1.0]], [[-3.0, -2.0]]], dtype=F64)
    s = StepScores(
        torch.ones(1, 2).bool(),
        torch.zeros(1, 2).long(),
        torch.zeros(1, 2),
        auxiliary,
        torch.ones(2, 1).bool(),
    )
    assert agreement_token(s, gamma=0.5, quantile=1.0)[0].tolist() == pytest.approx([1 / 1.5, 1 / 1.125])
    # means -1, -2.5; biased
    assert agreement_sequence(s, gamma=0.5).tolist() == pytest.approx([math.exp(-0.5 * 0.75**2)])
    assert agreement_sequence(s, gamma=0.5, stat="range").tolist() == pytest.approx([math.exp(-0.5 * 1.5)])
    assert agreement_sequence(s, gamma=1e9).item() == 1e-6
    assert agreement_token(s, gamma=1e9, quantile=1.0).min().item() == pytest.approx(0.01)


def test_default_weight_at_the_quantile_and_below_the_cap() -> None:
    s = random_scores(3, contexts=4, rows=50, length=20, all_present=True)
    weights = agreement_token(s)[s.mask]
    # the weight at the 0.95 quantile is 1 / (1 + gamma)
    assert ((weights >= 1 / 1.01).float().mean() - 0.95).abs() < 0.01
    s.auxiliary_logp[:, 0, :] = torch.tensor([0.0, 0.0, 0.0, -1e3], dtype=F64)[:, None]
    assert agreement_token(s)[s.mask].min().item() == pytest.approx(1 / 1.1)  # capped at 10 scales
    assert agreement_token(s, cap=1e9)[s.mask].min().item() == pytest.approx(0.01)


@pytest.mark.parametrize("contexts", [0, 1])
def test_one_context_or_none_has_weight_one(contexts: int) -> None:
    for stat in ("var", "range"):
        s = random_scores(1, contexts)
        assert (agreement_token(s, gamma=5.0, stat=stat) == 1).all()
        assert (agreement_sequence(s, gamma=5.0, stat=stat) == 1).all()


def test_contexts_that_agree_to_rounding_get_weight_one() -> None:
    s = random_scores(2, all_present=True)
    noise = torch.randn(s.auxiliary_logp.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    quiet = replace(s, auxiliary_logp=-1.0 + 1e-5 * noise)
    assert (agreement_token(quiet, gamma=1.0) == 1).all()
    assert agreement_token(replace(s, auxiliary_logp=-1.0 + 1e-2 * noise), gamma=1.0)[s.mask].min() < 0.6


@given(seed=st.integers(0, 10**6), order=st.permutations(range(4)))
@quick
def test_order_of_contexts_and_rows_does_not_matter(seed: int, order: list[int]) -> None:
    s = random_scores(seed, contexts=4, rows=4)
    shuffled = replace(
        s, auxiliary_logp=s.auxiliary_logp[order], auxiliary_present=s.auxiliary_present[order]
    )
    rows = StepScores(
        s.mask[order],
        s.tokens,
        s.teacher_logp,
        auxiliary_logp=s.auxiliary_logp[:, order],
        auxiliary_present=s.auxiliary_present[:, order],
    )
    for function in (agreement_token, agreement_sequence):
        torch.testing.assert_close(function(shuffled, gamma=1.0), function(s, gamma=1.0))
        torch.testing.assert_close(function(rows, gamma=1.0), function(s, gamma=1.0)[order])


@given(seed=st.integers(0, 10**6), junk=st.sampled_from([0.0, -1e6, 1e30, math.nan, -math.inf]))
@quick
def test_what_is_masked_or_absent_has_no_influence(seed: int, junk: float) -> None:
    s = random_scores(seed)
    outside = ~(s.auxiliary_present[:, :, None] & s.mask)
    other = replace(s, auxiliary_logp=s.auxiliary_logp.masked_fill(outside, junk))
    for function in (agreement_token, agreement_sequence):
        for stat in ("var", "range"):
            assert torch.equal(function(other, gamma=1.0, stat=stat), function(s, gamma=1.0, stat=stat))


@given(seed=st.integers(0, 10**6), gamma=st.floats(0, 1e6))
@quick
def test_weights_stay_in_their_bounds(seed: int, gamma: float) -> None:
    s = random_scores(seed)
    token, sequence = agreement_token(s, gamma=gamma), agreement_sequence(s, gamma=gamma)
    assert token.min() >= max(0.01, 1 / (1 + 10 * gamma)) - 1e-12 and token.max() <= 1
    assert sequence.min() >= 1e-6 and sequence.max() <= 1
    if gamma == 0:
        assert (token == 1).all() and (sequence == 1).all()


@pytest.mark.parametrize("seed", range(4))
def test_corroboration_is_the_text(seed: int) -> None:
    scores = random_scores(seed)
    scores = replace(
        scores, untempered_logp=scores.teacher_logp, teacher_logp=torch.zeros_like(scores.teacher_logp)
    )
    K, B, T = scores.auxiliary_logp.shape
    found = parse_weight("corroboration:gamma=2")(scores)
    for b in range(B):
        for t in range(T):
            p_k = [
                math.exp(scores.auxiliary_logp[k, b, t]) for k in range(K) if scores.auxiliary_present[k, b]
            ]
            expected = 1.0
            if scores.mask[b, t] and p_k:
                expected = max(
                    0.01, (1 - abs(math.exp(scores.untempered_logp[b, t]) - float(np.median(p_k)))) ** 2
                )
            assert float(found[b, t]) == pytest.approx(expected, abs=1e-6)


def test_corroboration_of_empty_answers_is_empty() -> None:
    empty = torch.zeros(2, 0)
    scores = StepScores(
        mask=empty.bool(),
        tokens=empty.long(),
        teacher_logp=empty,
        untempered_logp=empty,
        auxiliary_logp=torch.zeros(3, 2, 0),
        auxiliary_present=torch.ones(3, 2, dtype=torch.bool),
    )
    assert parse_weight("corroboration")(scores).shape == (2, 0)


def test_corroboration_tells_wrong_from_right_where_agreement_cannot() -> None:
    """Three contexts rule a token out, each to another degree; one teacher does too, the other is
    sure of it.
    """
    logp = torch.tensor([[[-7.0, -7.0]], [[-9.0, -9.0]], [[-14.0, -14.0]]])
    scores = StepScores(
        mask=torch.ones(1, 2, dtype=torch.bool),
        tokens=torch.zeros(1, 2, dtype=torch.long),
        teacher_logp=torch.zeros(1, 2),
        untempered_logp=torch.tensor([[-8.0, -0.01]]),
        auxiliary_logp=logp,
        auxiliary_present=torch.ones(3, 1, dtype=torch.bool),
    )
    right, wrong = parse_weight("corroboration")(scores)[0].tolist()
    assert right > 0.99 and wrong < 0.05
    same = parse_weight("agreement_token:gamma=1")(scores)[0].tolist()
    assert same[0] == same[1] < 0.6


def test_agreement_refuses() -> None:
    s = random_scores()
    with pytest.raises(UserError, match="auxiliary"):
        agreement_token(replace(s, auxiliary_logp=None))
    with pytest.raises(UserError, match="var or range"):
        agreement_sequence(s, stat="mad")


# ------------------------------------------------------------------------------------- coefficients


def loop_loss(d: Tensor, m: Tensor, b: Tensor, a: Tensor, aggregation: str, normalizer: str) -> float:
    """method.md, Aggregation, token by token."""
    rows = [i for i in range(len(m)) if sum(b[i, t].item() for t in range(m.shape[1]) if m[i, t]) != 0]
    sums, divisors, scales = [], [], []
    for i in rows:
        inside = [t for t in range(m.shape[1]) if m[i, t]]
        sums.append(sum((b[i, t] * d[i, t]).item() for t in inside))
        divisors.append(sum(b[i, t].item() for t in inside) if normalizer == "weights" else len(inside))
        scales.append(a[i].item())
    if not rows or sum(scales) == 0:
        return 0.0
    if aggregation == "sequence":
        return sum(s * x / n for s, x, n in zip(scales, sums, divisors, strict=True)) / sum(scales)
    return sum(s * x for s, x in zip(scales, sums, strict=True)) / sum(
        s * n for s, n in zip(scales, divisors, strict=True)
    )


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
@pytest.mark.parametrize("normalizer", ["weights", "tokens"])
@given(seed=st.integers(0, 10**6))
@quick
def test_coefficients_are_the_text(aggregation: str, normalizer: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    d, b = torch.rand(2, 5, 6, generator=g, dtype=F64)
    a = torch.rand(5, generator=g, dtype=F64)
    m = torch.rand(5, 6, generator=g) < 0.6
    m[0], b[2] = False, 0.0  # a row without loss tokens, and one whose weights are all 0
    b[~m], d[~m] = math.nan, 1e9
    coefficient = step_coefficients(m, b, a, aggregation, normalizer)
    assert (coefficient[~m] == 0).all() and (coefficient[2] == 0).all()
    assert (coefficient * d).sum().item() == pytest.approx(
        loop_loss(d, m, b, a, aggregation, normalizer), rel=1e-10
    )
    if normalizer == "weights" and coefficient.any():
        assert coefficient.sum().item() == pytest.approx(1.0)
    # rows get the same coefficients in whatever order
    order = torch.randperm(5, generator=g)
    torch.testing.assert_close(
        step_coefficients(m[order], b[order], a[order], aggregation, normalizer), coefficient[order]
    )


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
@pytest.mark.parametrize("normalizer", ["weights", "tokens"])
def test_weights_of_one_change_nothing_and_empty_steps_give_zero(aggregation: str, normalizer: str) -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    expected = (
        [0.25, 0.25, 0, 0] + [0.125] * 4 + [0] * 4
        if aggregation == "sequence"
        else [1 / 6] * 2 + [0, 0] + [1 / 6] * 4 + [0] * 4
    )
    one = step_coefficients(mask, torch.ones(3, 4), torch.ones(3), aggregation, normalizer)
    assert one.flatten().tolist() == pytest.approx(expected)
    torch.testing.assert_close(term_coefficients(mask, torch.ones(3).bool(), aggregation), one)
    constant = step_coefficients(
        mask, torch.full((3, 4), 0.3), torch.full((3,), 7.0), aggregation, normalizer
    )
    torch.testing.assert_close(constant, one if normalizer == "weights" else 0.3 * one)
    for empty in (
        step_coefficients(torch.zeros(3, 4).bool(), torch.ones(3, 4), torch.ones(3), aggregation, normalizer),
        step_coefficients(mask, torch.zeros(3, 4), torch.ones(3), aggregation, normalizer),
        step_coefficients(mask, torch.ones(3, 4), torch.zeros(3), aggregation, normalizer),
        step_coefficients(mask[:0], torch.ones(0, 4), torch.ones(0), aggregation, normalizer),
        term_coefficients(mask, torch.tensor([False, False, True]), aggregation),
    ):
        assert (empty == 0).all()


def test_published_normalizer_matters_and_sequence_weights_do_not_cancel() -> None:
    mask, b = torch.ones(2, 2).bool(), torch.tensor([[1.0, 3.0], [1.0, 1.0]])
    ones = torch.ones(2)
    assert step_coefficients(mask, b, ones, "sequence", "weights").tolist() == [[0.125, 0.375], [0.25, 0.25]]
    assert step_coefficients(mask, b, ones, "sequence", "tokens").tolist() == [[0.25, 0.75], [0.25, 0.25]]
    a = torch.tensor([3.0, 1.0])
    assert step_coefficients(mask, torch.ones(2, 2), a, "sequence", "weights").tolist() == [
        [0.375, 0.375],
        [0.125, 0.125],
    ]


def test_term_coefficients_leave_out_rows_without_the_term() -> None:
    mask, has = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool(), torch.tensor([True, False, True])
    assert term_coefficients(mask, has, "sequence").tolist() == [[0.25, 0.25, 0], [0, 0, 0], [0.5, 0, 0]]
    torch.testing.assert_close(term_coefficients(mask, has, "token").sum(-1), torch.tensor([2 / 3, 0, 1 / 3]))


def test_coefficients_refuse_unknown_switches() -> None:
    mask = torch.ones(1, 1).bool()
    with pytest.raises(UserError, match="loss_aggregation"):
        step_coefficients(mask, torch.ones(1, 1), torch.ones(1), "mean", "weights")
    with pytest.raises(UserError, match="weight_normalizer"):
        step_coefficients(mask, torch.ones(1, 1), torch.ones(1), "token", "sum")


# ----------------------------------------------------------------------------------------- the rest


@given(seed=st.integers(0, 10**6), q=st.floats(0, 1), size=st.integers(1, 40))
@quick
def test_quantile_is_numpys(seed: int, q: float, size: int) -> None:
    values = torch.rand(1, size, generator=torch.Generator().manual_seed(seed), dtype=F64)
    assert quantile_clip(values, torch.ones(1, size).bool(), q) == pytest.approx(
        np.quantile(values.numpy(), q), abs=1e-12
    )


def test_quantile_sees_loss_tokens_only_at_any_size() -> None:
    values = torch.tensor([[1.0, 2.0, 1e9], [math.nan, 3.0, 0.0]])
    mask = torch.tensor([[True, True, False], [False, True, False]])
    assert quantile_clip(values, mask, 0.5) == 2.0 and quantile_clip(values, mask, 1.0) == 3.0
    assert quantile_clip(values, mask & False, 0.99) is None
    many = torch.arange(2**24 + 9, dtype=torch.float32)[None]  # torch.quantile refuses this size
    assert quantile_clip(many, torch.ones(1, 1).bool().expand_as(many), 0.5) == pytest.approx(
        2**23 + 4, rel=1e-6
    )


def test_feature_distance() -> None:
    student, teacher = (
        torch.tensor([[1.0, 2.0]], requires_grad=True),
        torch.tensor([[0.0, 4.0]], requires_grad=True),
    )
    distance = feature_distance(student, teacher)
    assert distance.tolist() == [2.5]  # (1 + 4) / 2
    distance.sum().backward()
    assert student.grad.tolist() == [[1.0, -2.0]] and teacher.grad is None
    assert feature_distance(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32
    assert feature_distance(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


def test_weight_stats() -> None:
    mask = torch.tensor([[True, True, False], [False, False, False]])
    weights = torch.tensor([[0.5, 1.0, math.nan], [9.0, 9.0, 9.0]])
    stats = weight_stats(weights, mask)
    assert (stats["min"], stats["max"], stats["mean"], stats["below_1pct"]) == (0.5, 1.0, 0.75, 0.0)
    assert stats["range"] == pytest.approx(0.49)  # 99th - 1st percentile
    # [B]: the second row is not live
    assert weight_stats(torch.tensor([0.7, 5.0]), mask)["max"] == pytest.approx(0.7)
    assert weight_stats(weights, mask & False) == {}
    published = agreement_token(random_scores(3, rows=40, all_present=True), gamma=0.001)
    assert weight_stats(published, torch.ones(40, 7).bool())["below_1pct"] == 1.0


# ----------------------------------------------------------------------------------------- registry


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict:
    get_weight("dash")  # the published ones register on first use: not into the copy
    known = dict(plugins._REGISTRY)
    monkeypatch.setattr(plugins, "_REGISTRY", known)
    return known


def declare_position(name: str = "late"):  # type: ignore[no-untyped-def]
    @register_weight(name, level="token", needs=frozenset({"student"}), normalizer="tokens")
    def position(scores: StepScores, floor: float = 0.5, *, kind: str = "late", power: int = 1) -> Tensor:
        steps = torch.arange(scores.mask.shape[1]) + 1.0
        weights = floor + steps**power if kind == "late" else steps.flip(0)
        return weights.expand(scores.mask.shape)

    return position


def test_a_weight_of_another_package(registry: dict) -> None:
    position = declare_position()
    weight = get_weight("late")
    assert (weight.name, weight.level, weight.needs, weight.normalizer) == (
        "late",
        "token",
        {"student"},
        "tokens",
    )
    # the decorator leaves it callable
    assert weight.function is position and position(random_scores()).shape == (5, 7)
    s = random_scores()
    assert weight(s)[0, 0] == 1.5
    bound = parse_weight("late:floor=2,kind=early")
    assert bound.options == {"floor": 2, "kind": "early"} and bound(s)[0, 0] == 7.0
    assert get_weight("late").options == {}  # binding does not leak into the registry
    assert parse_weight(" late : floor = 1e-3 , power = 2 ").options == {"floor": 1e-3, "power": 2}
    assert parse_weight("late").options == {}


def test_builtin_weights() -> None:
    assert (
        get_weight("agreement_token").level == "token"
        and get_weight("agreement_sequence").level == "sequence"
    )
    s = random_scores()
    weight = parse_weight("agreement_token:gamma=1.5,stat=range,quantile=0.9,cap=3")
    torch.testing.assert_close(weight(s), agreement_token(s, gamma=1.5, stat="range", quantile=0.9, cap=3.0))
    assert (
        get_weight("agreement_token").needs == {"auxiliary"}
        and get_weight("agreement_token").normalizer == "weights"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("agrement_token", "Did you mean 'agreement_token'"),
        ("agreement_token:gama=1", r"no option 'gama' \(accepted: gamma, stat, quantile, cap\)"),
        ("agreement_token:gamma", "expected option=value"),
        ("agreement_token:=3", "expected option=value"),
        ("needy", "needs a value for its option 'beta'"),
    ],
)
def test_mistakes_are_named(registry: dict, text: str, message: str) -> None:
    @register_weight("needy")
    def needy(scores: StepScores, beta: float) -> Tensor:
        return beta * torch.ones(scores.mask.shape)

    assert parse_weight("needy:beta=3")(random_scores()).max() == 3
    assert parse_weight("needy:beta=[1,2]").options == {"beta": [1, 2]}
    with pytest.raises(UserError, match=message):
        parse_weight(text)


def test_registration_mistakes(registry: dict) -> None:
    for options, message in (
        ({"level": "row"}, "level"),
        ({"normalizer": "sum"}, "normalizer"),
        ({"needs": {"logits"}}, "'logits'"),
    ):
        with pytest.raises(UserError, match=message):
            register_weight("bad", **options)(lambda scores: scores.mask)
    with pytest.raises(UserError, match=r"already registered by unisd\.methods\.[a-z]+"):
        declare_position("agreement_token")
    register_weight("short", level="token")(lambda scores: torch.ones(len(scores.mask)))
    with pytest.raises(UserError, match=r"must return shape \(5, 7\)"):
        get_weight("short")(random_scores())


def test_entry_points(registry: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(name: str, load: object) -> SimpleNamespace:
        return SimpleNamespace(name=name, value=f"package:{name}", load=load)

    def broken() -> None:
        raise ImportError("no module named wheel_of_fortune")

    loaded: list[str] = []
    offered = [
        entry("broken", broken),
        entry("plugin", lambda: loaded.append("plugin") or declare_position("late")),
        entry("early", lambda: loaded.append("early") or declare_position("early")),
        entry("silent", lambda: None),
    ]
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: offered if group == "unisd.token_weights" else []
    )
    assert get_weight("early")(random_scores()).shape == (5, 7)
    assert loaded == ["early"]  # only what was asked for is imported
    assert get_weight("late").normalizer == "tokens"  # registered under another name than its entry point's
    with pytest.raises(UserError, match="wheel_of_fortune"):
        get_weight("broken")
    with pytest.raises(UserError, match="registers no token weight"):
        get_weight("silent")
    with pytest.raises(UserError, match="Did you mean 'plugin'"):
        get_weight("plugins")
