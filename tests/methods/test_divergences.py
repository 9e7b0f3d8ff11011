"""The divergences and the contrast hinge against closed forms and hand-computed cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unisd.errors import UserError
from unisd.losses.terms import LossTerm
from unisd.methods.divergence import DivergenceSpec, check_token_clip, divergence, divergence_bound
from unisd.methods.registry import parse_term

ALPHAS = [0.0, 0.3, 0.5, 1.0]
F64 = torch.float64


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=F64).log()


def naive(p: np.ndarray, q: np.ndarray, alpha: float, entry_clip: float = math.inf) -> float:
    """Eq. 7-8, entry by entry."""
    total = 0.0
    for pv, qv in zip(p, q, strict=True):
        m = (1 - alpha) * pv + alpha * qv
        if alpha == 0:
            summand = qv * math.log(qv / pv)
        elif alpha == 1:
            summand = pv * math.log(pv / qv)
        else:
            summand = alpha * qv * math.log(qv / m) + (1 - alpha) * pv * math.log(pv / m)
        total += min(summand, entry_clip)
    return total


# ------------------------------------------------------------------------------------------- values


def test_direction_of_alpha_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): symmetric; q' = (1/2, 1/2 - tiny, tiny) tells the
    directions apart.
    """
    p, q = logits_of(0.5, 0.25, 0.25), logits_of(0.25, 0.25, 0.5)
    target = torch.tensor([0])
    assert divergence(p, q, target, DivergenceSpec(alpha=0.0)).item() == pytest.approx(
        0.25 * math.log(2), rel=1e-12
    )
    q = logits_of(0.5, 0.375, 0.125)
    forward = 0.375 * math.log(1.5) + 0.125 * math.log(0.5)  # KL(q||p)
    reverse = 0.25 * math.log(0.25 / 0.375) + 0.25 * math.log(2)  # KL(p||q)
    assert divergence(p, q, target, DivergenceSpec(alpha=0.0)).item() == pytest.approx(forward, rel=1e-12)
    assert divergence(p, q, target, DivergenceSpec(alpha=1.0)).item() == pytest.approx(reverse, rel=1e-12)
    assert abs(forward - reverse) > 0.005


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("entry_clip", [None, 0.02])
def test_divergence_is_the_published_formula(
    alpha: float, temperature: float, entry_clip: float | None
) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 9, dtype=F64) * 2
    spec = DivergenceSpec(alpha=alpha, temperature=temperature, entry_clip=entry_clip)
    p = (student / temperature).softmax(-1).numpy()
    q = (teacher / temperature).softmax(-1).numpy()
    expected = [
        naive(a, b, alpha, math.inf if entry_clip is None else entry_clip) for a, b in zip(p, q, strict=True)
    ]
    found = divergence(student, teacher, torch.zeros(6, dtype=torch.long), spec)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)
    assert (
        found.dtype == F64
        and divergence(student.float(), teacher.float(), torch.zeros(6).long(), spec).dtype == torch.float32
    )


@pytest.mark.parametrize("add_tail", [True, False])
@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_topk_is_the_formula_on_the_support(add_tail: bool, support: str, alpha: float) -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 4, 12, dtype=F64) * 2
    spec = DivergenceSpec(alpha=alpha, mode="topk", topk=3, add_tail=add_tail, topk_support=support)
    found = divergence(student, teacher, torch.zeros(4).long(), spec)
    for row in range(4):
        p, q = student[row].softmax(-1).numpy(), teacher[row].softmax(-1).numpy()
        kept = np.argsort(-(q if support == "teacher" else p))[:3]
        p_kept, q_kept = p[kept], q[kept]
        if add_tail:
            p_kept, q_kept = np.append(p_kept, 1 - p_kept.sum()), np.append(q_kept, 1 - q_kept.sum())
        else:
            p_kept, q_kept = p_kept / p_kept.sum(), q_kept / q_kept.sum()
        assert found[row].item() == pytest.approx(naive(p_kept, q_kept, alpha), rel=1e-9)


@pytest.mark.parametrize("add_tail", [True, False])
def test_topk_of_the_whole_vocabulary_is_full(add_tail: bool) -> None:
    student, teacher = torch.randn(2, 3, 7, dtype=F64)
    target = torch.zeros(3).long()
    for k in (7, 50):
        spec = DivergenceSpec(alpha=0.5, mode="topk", topk=k, add_tail=add_tail)
        torch.testing.assert_close(
            divergence(student, teacher, target, spec),
            divergence(student, teacher, target, DivergenceSpec(alpha=0.5)),
        )


def test_topk_tail_of_vanishing_mass_is_exact() -> None:
    """1 - sum(p on the support) is 0 in float32 here; the bucket summed from its own entries is
    not.
    """
    student = torch.tensor([[0.0, -40.0, -41.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, -50.0, -50.0]])
    spec = DivergenceSpec(alpha=1.0, mode="topk", topk=1)
    value = divergence(student, teacher, torch.tensor([0]), spec)
    p_tail = math.exp(-40) + math.exp(-41)
    expected = p_tail * math.log(p_tail / (2 * math.exp(-50)))
    assert value.item() == pytest.approx(expected, rel=1e-4)
    assert torch.isfinite(torch.autograd.grad(value.sum(), student)[0]).all()


def test_sampled_value_and_gradient() -> None:
    torch.manual_seed(2)
    student, teacher = torch.randn(5, 8, dtype=F64, requires_grad=True), torch.randn(5, 8, dtype=F64)
    target = torch.tensor([0, 3, 3, 7, 1])
    value = divergence(student, teacher, target, DivergenceSpec(alpha=1.0, mode="sampled"))
    p, q = student.detach().softmax(-1), teacher.softmax(-1)
    ratio = torch.stack([(p[n, v] / q[n, v]).log() for n, v in enumerate(target)])
    torch.testing.assert_close(value.detach(), ratio)
    onehot = torch.nn.functional.one_hot(target, 8).double()
    torch.testing.assert_close(torch.autograd.grad(value.sum(), student)[0], ratio[:, None] * (onehot - p))


def test_sampled_is_the_reverse_kl_in_expectation() -> None:
    """Averaged over y ~ p, its value and gradient are those of KL(p||q)."""
    torch.manual_seed(3)
    student, teacher = torch.randn(1, 6, dtype=F64, requires_grad=True), torch.randn(1, 6, dtype=F64)
    p = student.detach().softmax(-1)[0]
    every = torch.arange(6)
    sampled = divergence(
        student.expand(6, 6), teacher.expand(6, 6), every, DivergenceSpec(alpha=1.0, mode="sampled")
    )
    full = divergence(student, teacher, every[:1], DivergenceSpec(alpha=1.0))
    torch.testing.assert_close((p * sampled).sum(), full.sum())
    gradients = [
        torch.autograd.grad(x, student, retain_graph=True)[0] for x in ((p * sampled).sum(), full.sum())
    ]
    torch.testing.assert_close(*gradients)


def test_entry_clip_worked_example() -> None:
    """q = (.9,.07,.03), p = (.1,.6,.3), kappa .05: negative loss, and the teacher's favourite is
    pushed down.
    """
    student, teacher = logits_of(0.1, 0.6, 0.3).requires_grad_(), logits_of(0.9, 0.07, 0.03)
    for kappa, loss, gradient in (
        (0.05, -0.169, 0.010),
        (None, naive(*map(np.array, ((0.1, 0.6, 0.3), (0.9, 0.07, 0.03))), 0.0), -0.80),
    ):
        value = divergence(student, teacher, torch.tensor([0]), DivergenceSpec(alpha=0.0, entry_clip=kappa))
        assert value.item() == pytest.approx(loss, abs=5e-4)
        assert torch.autograd.grad(value, student)[0][0, 0].item() == pytest.approx(gradient, abs=5e-4)


@given(alpha=st.floats(0.01, 0.99), seed=st.integers(0, 10**6), scale=st.floats(0.1, 200))
@settings(max_examples=60, deadline=None)
def test_divergence_lies_between_zero_and_its_bound(alpha: float, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 8, 5, generator=generator, dtype=F64) * scale
    value = divergence(student, teacher, torch.zeros(8).long(), DivergenceSpec(alpha=alpha))
    assert value.min() >= -1e-12 and value.max() <= divergence_bound(alpha) + 1e-12


def test_bound_is_attained_and_the_clip_is_checked_against_it() -> None:
    disjoint = torch.tensor([[0.0, -1e4]], dtype=F64), torch.tensor([[-1e4, 0.0]], dtype=F64)
    value = divergence(*disjoint, torch.tensor([0]), DivergenceSpec(alpha=0.3))
    assert value.item() == pytest.approx(divergence_bound(0.3), rel=1e-12)
    assert divergence_bound(0.5) == pytest.approx(math.log(2))
    assert divergence_bound(0.0) == divergence_bound(1.0) == math.inf
    for alpha in (0.0, 1.0):
        check_token_clip(DivergenceSpec(alpha=alpha), 10.0)
    check_token_clip(DivergenceSpec(alpha=0.5), 0.69)
    check_token_clip(DivergenceSpec(alpha=1.0, mode="sampled"), None)
    with pytest.raises(UserError, match="never bind"):
        check_token_clip(DivergenceSpec(alpha=0.5), 10.0)
    with pytest.raises(UserError, match="sampled"):
        check_token_clip(DivergenceSpec(alpha=1.0, mode="sampled"), 10.0)
    with pytest.raises(UserError, match="positive"):
        check_token_clip(DivergenceSpec(), 0.0)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": -0.1},
        {"alpha": 1.1},
        {"alpha": math.nan},
        {"alpha": 0.001},
        {"alpha": 0.999},
        {"mode": "half"},
        {"topk": 0},
        {"topk_support": "both"},
        {"entry_clip": 0.0},
        {"temperature": 0.0},
        {"mode": "sampled"},
        {"mode": "sampled", "alpha": 1.0, "entry_clip": 0.1},
    ],
)
def test_spec_refuses(options: dict) -> None:
    with pytest.raises(UserError):
        DivergenceSpec(**options)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_value_is_finite_at_extremes(alpha: float) -> None:
    extremes = torch.tensor(
        [[0.0, -1e4, -math.inf], [1e4, 0.0, -1e4], [0.0, -math.inf, -90.0]], requires_grad=True
    )
    value = divergence(
        extremes, extremes.detach().roll(1, 0), torch.tensor([0, 1, 2]), DivergenceSpec(alpha=alpha)
    )
    gradient = torch.autograd.grad(value.sum(), extremes)[0]
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    "spec", [DivergenceSpec(alpha=a, entry_clip=c) for a in ALPHAS for c in (None, 0.03)]
)
def test_gradcheck(spec: DivergenceSpec) -> None:
    torch.manual_seed(4)
    student, teacher = torch.randn(3, 5, dtype=F64, requires_grad=True), torch.randn(3, 5, dtype=F64)
    target = torch.tensor([0, 1, 4])
    assert torch.autograd.gradcheck(lambda z: divergence(z, teacher, target, spec), student)


# ----------------------------------------------------------------------------------------- contrast


def test_hinge_and_where_it_has_a_gradient() -> None:
    l = torch.tensor([-2.0, -0.5, -4.0, -2.0], dtype=F64, requires_grad=True)  # noqa: E741
    term = LossTerm(
        parse_term("contrast:margin=0.5"),
        coefficient_N=torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=F64),
        negative_logp_N=torch.tensor([-3.0, -3.0, -3.0, math.nan], dtype=F64),
    )
    constant = torch.zeros(4, dtype=F64)
    values = (constant, l, constant, torch.full((4,), -1.0, dtype=F64))
    hinge = term.values(values)
    # 0.5 + |-2+1| - |-2+3|; 0.5 + .5 - 2.5 < 0; 0.5 + 3 - 1 (positive, but both distances move
    # together); no negative
    torch.testing.assert_close(hinge.detach(), torch.tensor([0.5, 0.0, 2.5, 0.0], dtype=F64))
    torch.testing.assert_close(
        torch.autograd.grad(hinge.sum(), l)[0], torch.tensor([-2.0, 0.0, 0.0, 0.0], dtype=F64)
    )
    torch.testing.assert_close(term.slope(values), torch.tensor([-2.0, 0.0, 0.0, 0.0], dtype=F64))
