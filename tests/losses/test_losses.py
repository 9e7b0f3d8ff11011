"""The chunked loss against the plain one and against finite differences: values, gradients, dtypes,
memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.helpers.losses import problem, run
from unisd.errors import UserError
from unisd.losses import chunked as losses
from unisd.losses import closed_form
from unisd.losses.chunked import chunked_loss, default_chunk_tokens, token_logprobs, token_scores
from unisd.losses.head import Head
from unisd.losses.plain import plain_loss
from unisd.losses.terms import LossInputs, LossOutput, LossTerm
from unisd.methods.divergence import DivergenceSpec, divergence
from unisd.methods.registry import Term, parse_term, register_term
from unisd.methods.scores import TermInputs

ALPHAS = [0.0, 0.3, 0.5, 1.0]
F64 = torch.float64


# --------------------------------------------------------------------------------- chunked == plain


def assert_same(
    x: SimpleNamespace,
    spec: DivergenceSpec,
    tolerance: float,
    chunk_tokens: int | None = None,
    **options: object,
) -> None:
    plain, plain_grads = run(plain_loss, x, spec, **options)
    chunked, chunked_grads = run(chunked_loss, x, spec, chunk_tokens=chunk_tokens, **options)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(chunked.loss, plain.loss, **close)
    for name in ("divergence_N", "student_logp_N", "student_entropy_N"):
        torch.testing.assert_close(getattr(chunked, name), getattr(plain, name), **close)
        assert not getattr(chunked, name).requires_grad
    torch.testing.assert_close(chunked.clipped_N, plain.clipped_N)
    assert chunked.terms.keys() == plain.terms.keys()
    for name, term in plain.terms.items():
        torch.testing.assert_close(chunked.terms[name].values_N, term.values_N, **close)
        torch.testing.assert_close(chunked.terms[name].active_N, term.active_N)
        assert not chunked.terms[name].values_N.requires_grad
    for found, expected in zip(chunked_grads, plain_grads, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, **close)


SPECS = [
    *[DivergenceSpec(alpha=alpha, temperature=0.7) for alpha in ALPHAS],
    *[DivergenceSpec(alpha=alpha, entry_clip=0.02) for alpha in ALPHAS],
    *[DivergenceSpec(alpha=alpha, mode="topk", topk=5, temperature=1.3) for alpha in ALPHAS],
    DivergenceSpec(alpha=0.5, mode="topk", topk=5, add_tail=False, topk_support="student", entry_clip=0.05),
    DivergenceSpec(alpha=1.0, mode="sampled", temperature=0.7),
    DivergenceSpec(alpha=1.0, mode="topk", topk=5, topk_estimator="residual", temperature=0.7),
]
ENDS = (4, 11, 30)
HEADS = [
    {}, {"scale": 0.25}, {"softcap": 5.0}, {"scale": 2.0, "softcap": 3.0}, {"ends": ENDS, "scale": 0.25},
    {"ends": ENDS, "softcap": 5.0},
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.mode}-{s.alpha}-{s.entry_clip}-{s.topk_estimator}")
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-10)])
def test_chunked_equals_plain(spec: DivergenceSpec, head: dict, dtype: torch.dtype, tolerance: float) -> None:
    x = problem(dtype, **head)
    clip = None if spec.mode == "sampled" else run(plain_loss, x, spec)[0].divergence_N.quantile(0.55).item()
    assert_same(x, spec, tolerance, chunk_tokens=5, token_clip=clip, terms=(x.contrast,))


# --------------------------------------------------------------------- several tokens mean stop


def of_one_end(logits_NV: Tensor, temperature: float) -> Tensor:
    """Logits with one column for all ends, the last; by hand."""
    rest = [token for token in range(logits_NV.shape[-1]) if token not in ENDS]
    logits_NV = logits_NV / temperature
    return torch.cat([logits_NV[:, rest], logits_NV[:, ENDS].exp().sum(-1, keepdim=True).log()], -1)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.mode}-{s.alpha}-{s.entry_clip}-{s.topk_estimator}")
@pytest.mark.parametrize("head", [{}, {"scale": 2.0, "softcap": 3.0}], ids=str)
@pytest.mark.parametrize("function", [plain_loss, chunked_loss])
def test_ends_are_one_outcome(spec: DivergenceSpec, head: dict, function: Callable[..., LossOutput]) -> None:
    """As if the vocabulary had one token that means stop, of all their probability."""
    x = problem(F64, ends=ENDS, **head)
    x.targets[:4] = torch.tensor([4, 11, 30, 5])
    out, gradients = run(function, x, spec, scale=1.0, terms=(x.contrast,))
    logits = of_one_end(Head(x.weight, x.bias, **head).logits(x.hidden), spec.temperature)
    teacher = of_one_end(x.teacher.logits(x.teacher_hidden), spec.temperature)
    targets = torch.tensor(
        [34 if t in ENDS else t - sum(end < t for end in ENDS) for t in x.targets.tolist()]
    )
    D_N = divergence(logits, teacher, targets, replace(spec, temperature=1.0))
    l_N, teacher_l_N = (z.log_softmax(-1).gather(-1, targets[:, None])[:, 0] for z in (logits, teacher))
    torch.testing.assert_close(out.divergence_N, D_N.detach())
    torch.testing.assert_close(out.student_logp_N, l_N.detach())
    torch.testing.assert_close(out.teacher_logp_N, teacher_l_N)
    p = logits.detach().softmax(-1)
    torch.testing.assert_close(out.student_entropy_N, -(p * p.log()).sum(-1))
    values = (D_N, l_N, out.student_entropy_N, teacher_l_N)
    loss = (x.coefficient * D_N).sum() + (x.contrast.coefficient_N * x.contrast.values(values)).sum()
    torch.testing.assert_close(out.loss, loss)
    for found, expected in zip(
        gradients, torch.autograd.grad(loss, (x.hidden, x.weight, x.bias)), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_a_teacher_that_ends_otherwise_does_not_disagree() -> None:
    """All else alike, with its mass on another end: no divergence and no gradient, but where ends
    are told apart; then the student is taught which one.
    """
    x = problem(F64)
    x.teacher_hidden = x.hidden.detach().clone()
    swapped = x.weight.detach().clone(), x.bias.detach().clone()
    for part in swapped:
        part[[4, 11]] = part[[11, 4]]
    for ends, agree in ((ENDS, True), ((), False)):
        x.head, x.teacher = {"ends": ends}, Head(*swapped, ends=ends)
        for function in (plain_loss, chunked_loss):
            out, (gradient, *_) = run(function, x, DivergenceSpec())
            assert bool(out.divergence_N.abs().max() < 1e-12) is agree
            assert bool(gradient.abs().max() < 1e-12) is agree


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_of_ends_are_those_of_all(temperature: float) -> None:
    x = problem(F64)
    x.targets[:3] = torch.tensor([30, 4, 11])
    head = Head(x.weight, x.bias, ends=ENDS)
    logp_NV = of_one_end(Head(x.weight, x.bias).logits(x.hidden), temperature).log_softmax(-1).detach()
    found_N, entropy_N = token_scores(x.hidden, head, x.targets, temperature, chunk_tokens=5)
    torch.testing.assert_close(found_N[:3], logp_NV[:3, -1])
    torch.testing.assert_close(entropy_N, -(logp_NV.exp() * logp_NV).sum(-1))
    assert torch.equal(token_logprobs(x.hidden, head, x.targets, temperature, chunk_tokens=5), found_N)


@pytest.mark.parametrize("function", [plain_loss, chunked_loss])
@pytest.mark.parametrize("deferred", [None, lambda D_N, *_: torch.full_like(D_N, 2.0)])
def test_what_the_scoring_pass_saw_decides_who_is_clipped(
    function: Callable[..., LossOutput], deferred: Callable[..., Tensor] | None
) -> None:
    """Also where this pass, with its rounding or dropout, finds another divergence."""
    x, spec = problem(F64), DivergenceSpec()
    x.coefficient[:] = 0.01
    D_N = run(plain_loss, x, spec)[0].divergence_N
    clip = float(D_N.median())
    above_N = D_N.gt(clip)
    clipped_N = above_N ^ (torch.arange(13) % 4 == 0)
    assert (above_N & ~clipped_N).any() and (clipped_N & ~above_N).any()
    out, (gradient_NH, *_) = run(function, x, spec, token_clip=clip, clipped_N=clipped_N, deferred=deferred)
    expected = torch.where(clipped_N, clip, D_N).sum() * (0.01 if deferred is None else 0.02)
    torch.testing.assert_close(out.loss.detach(), expected)
    torch.testing.assert_close(out.clipped_N, clipped_N)
    assert torch.equal((gradient_NH == 0).all(-1), clipped_N)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 12, 13, 100, None])
@pytest.mark.parametrize("with_contrast", [True, False])
def test_any_chunk_size(chunk_tokens: int | None, with_contrast: bool) -> None:
    x = problem(F64)
    for spec in (DivergenceSpec(), SPECS[8]):
        assert_same(x, spec, 1e-10, chunk_tokens, terms=(x.contrast,) if with_contrast else ())


@pytest.mark.parametrize(("tokens", "most", "sizes"), [
    (512, 193, [192, 192, 128]), (300, 193, [192, 108]), (200, 193, [100, 100]), (100, 193, [100]),
    (100, 40, [34, 34, 32]), (0, 9, []),
])  # fmt: skip
def test_chunks_are_fast_and_none_is_small(tokens: int, most: int, sizes: list[int]) -> None:
    chunk = losses._chunk(tokens, most)
    assert [min(chunk, tokens - start) for start in range(0, tokens, chunk)] == sizes


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_one_head_is_read_once_for_student_and_teacher(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frozen head of an adapter: one product for both, the same loss and gradients."""
    x = problem(dtype)
    x.teacher_hidden = torch.flip(x.hidden.detach(), [0])
    frozen = Head(x.weight.detach(), x.bias.detach())
    read: list[int] = []
    project = closed_form.project_into
    monkeypatch.setattr(
        closed_form, "project_into", lambda head, h, room: read.append(len(h)) or project(head, h, room)
    )
    arguments = (x.targets, DivergenceSpec(alpha=0.5), x.coefficient, None, (x.contrast,))

    def loss_and_gradient(function: Callable[..., LossOutput], teacher: Head) -> tuple[Tensor, Tensor]:
        x.hidden.grad = None
        loss = function(LossInputs(x.hidden, frozen, x.teacher_hidden, teacher, *arguments)).loss
        loss.backward()
        return loss.detach(), x.hidden.grad

    found = loss_and_gradient(chunked_loss, frozen)
    assert read == [2 * len(x.hidden)]
    apart = loss_and_gradient(chunked_loss, Head(frozen.weight.clone(), frozen.bias))
    for other in (apart, loss_and_gradient(plain_loss, frozen)):
        for a, b in zip(found, other, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_row_blocks_within_a_chunk(alpha: float, head: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unisd.losses.closed_form.BLOCK_BYTES", 2 * 37 * 8)  # two rows of 37 in float64
    x = problem(F64, **head)
    for entry_clip in (None, 0.02):
        spec = DivergenceSpec(alpha=alpha, temperature=0.7, entry_clip=entry_clip)
        assert_same(
            x, spec, 1e-10, chunk_tokens=5, token_clip=0.6 if alpha == 0.5 else 2.0, terms=(x.contrast,)
        )
    expected = torch.distributions.Categorical(
        logits=Head(x.weight, x.bias, **head).logits(x.hidden).detach()
    ).log_prob(x.targets)
    torch.testing.assert_close(
        token_logprobs(x.hidden, Head(x.weight, x.bias, **head), x.targets, 1.0, 5), expected
    )


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[8]], ids=lambda s: s.mode)
def test_the_teachers_log_probability_comes_from_its_own_logits(spec: DivergenceSpec) -> None:
    """The contrast is that with the l+ that the teacher's head gives, by value and gradient."""
    x = problem(F64)
    logits = x.teacher.logits(x.teacher_hidden) / spec.temperature
    expected = torch.distributions.Categorical(logits=logits).log_prob(x.targets)
    for function in (plain_loss, chunked_loss):
        found, gradient = run(function, x, spec, terms=(x.contrast,))
        without, gradient_without = run(function, x, spec)
        torch.testing.assert_close(found.teacher_logp_N, expected)
        student = Head(x.weight, x.bias).logits(x.hidden) / spec.temperature
        logp = student.log_softmax(-1).gather(-1, x.targets[:, None])[:, 0]
        negative = x.contrast.negative_logp_N.nan_to_num()
        hinge = torch.relu(0.5 + (logp - expected).abs() - (logp - negative).abs())
        given = (x.contrast.coefficient_N * hinge).sum()
        torch.testing.assert_close(found.loss, without.loss + given)
        leaves = (x.hidden, x.weight, x.bias)
        for both, one, other in zip(
            gradient, gradient_without, torch.autograd.grad(1.7 * given, leaves), strict=True
        ):
            torch.testing.assert_close(both, one + other)
        assert found.terms["contrast"].active_N.any()


def test_the_cases_above_reach_every_branch() -> None:
    x = problem(F64)
    clip = run(plain_loss, x, DivergenceSpec(alpha=0.5))[0].divergence_N.quantile(0.55).item()
    out, _ = run(plain_loss, x, DivergenceSpec(alpha=0.5), token_clip=clip, terms=(x.contrast,))
    for flags in (out.clipped_N, out.terms["contrast"].active_N):
        assert flags.any() and not flags.all()
    assert (
        torch.isfinite(out.loss)
        and (out.terms["contrast"].values_N[x.contrast.coefficient_N == 0] == 0).all()
    )


@pytest.mark.parametrize("alpha", ALPHAS)
def test_chunked_gradient_by_finite_differences(alpha: float) -> None:
    """Independent of the plain form: gradcheck through the custom backward, softcap, scale and
    contrast included.
    """
    x = problem(F64, tokens=4, vocabulary=6, softcap=4.0, scale=1.5)
    spec = DivergenceSpec(alpha=alpha, temperature=0.8)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = Head(weight, bias, **x.head)
        inputs = LossInputs(
            hidden,
            head,
            x.teacher_hidden,
            x.teacher,
            x.targets,
            spec,
            x.coefficient,
            terms=(x.contrast,),
        )
        return chunked_loss(inputs, chunk_tokens=3).loss

    assert torch.autograd.gradcheck(loss, (x.hidden, x.weight, x.bias), fast_mode=True)


def test_loss_is_the_weighted_sum_and_a_clamped_token_has_no_gradient() -> None:
    x = problem(F64)
    spec = DivergenceSpec(alpha=0.0)
    for function in (plain_loss, chunked_loss):
        out, (gradient, *_) = run(function, x, spec, scale=1.0, token_clip=1.0)
        expected = sum(
            c * min(d, 1.0) for c, d in zip(x.coefficient.tolist(), out.divergence_N.tolist(), strict=True)
        )
        assert out.loss.item() == pytest.approx(expected, rel=1e-12)
        still = out.clipped_N | (x.coefficient == 0)
        assert out.clipped_N.any() and (gradient[still] == 0).all() and (gradient[~still] != 0).any(-1).all()
        student, teacher = Head(x.weight, x.bias).logits(x.hidden), x.teacher.logits(x.teacher_hidden)
        torch.testing.assert_close(out.divergence_N, divergence(student, teacher, x.targets, spec).detach())
        logp = student.detach().log_softmax(-1)
        torch.testing.assert_close(out.student_logp_N, logp[torch.arange(13), x.targets])
        torch.testing.assert_close(
            out.student_entropy_N, torch.distributions.Categorical(logits=logp).entropy()
        )


@pytest.mark.parametrize(
    "trainable", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
def test_frozen_parts(trainable: tuple[bool, bool, bool]) -> None:
    x = problem(F64)
    for leaf, flag in zip((x.hidden, x.weight, x.bias), trainable, strict=True):
        leaf.requires_grad_(flag)
    assert_same(x, DivergenceSpec(alpha=0.5), 1e-10, chunk_tokens=4, terms=(x.contrast,))


def test_no_bias_and_head_shared_with_the_teacher() -> None:
    """A live teacher projects with the student's own trainable head: no gradient may reach it from
    the teacher's side.
    """
    x = problem(F64)
    x.bias, x.teacher_hidden = None, torch.randn(13, 16, dtype=F64)
    x.teacher = Head(x.weight)
    for spec in (DivergenceSpec(alpha=0.3), SPECS[8]):
        assert_same(x, spec, 1e-10, chunk_tokens=4)


def test_tied_head_accumulates_both_gradients() -> None:
    embedding = torch.nn.Parameter(problem(F64).weight.detach())
    tokens, x = torch.arange(13), problem(F64)
    gradients = []
    for function in (plain_loss, chunked_loss):
        embedding.grad = None
        hidden = torch.tanh(embedding[tokens])
        out = function(
            LossInputs(
                hidden,
                Head(embedding),
                x.teacher_hidden,
                x.teacher,
                x.targets,
                DivergenceSpec(),
                x.coefficient,
            )
        )
        out.loss.backward()
        gradients.append(embedding.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "spec",
    [SPECS[0], SPECS[2], SPECS[3], SPECS[8], SPECS[12], SPECS[13]],
    ids=lambda s: f"{s.mode}-{s.alpha}",
)
def test_no_tokens(spec: DivergenceSpec) -> None:
    x = problem(tokens=0)
    for function in (plain_loss, chunked_loss):
        out, gradients = run(function, x, spec, terms=(x.contrast,))
        assert out.loss.item() == 0.0 and out.divergence_N.shape == (0,)
        assert all((gradient == 0).all() for gradient in gradients)
    assert token_logprobs(x.hidden, x.teacher, x.targets).shape == (0,)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("entry_clip", [None, 0.05])
def test_extremes_stay_finite_and_equal(alpha: float, entry_clip: float | None) -> None:
    """Logits of +-1e4 and -inf, probabilities that underflow on one side or on both."""
    logits = torch.tensor(
        [[0.0, -1e4, 5.0, -1e4], [1e4, 0.0, -1e4, -200.0], [3.0, 3.0, 3.0, 3.0], [0.0, 90.0, -90.0, -90.0]]
    )
    x = problem(tokens=4, vocabulary=4)
    x.hidden, x.teacher_hidden = logits.clone().requires_grad_(), logits.roll(1, 0)
    x.weight, x.bias = torch.eye(4), torch.tensor([0.0, 0.0, 0.0, -math.inf])
    x.teacher = Head(torch.eye(4), x.bias)
    spec = DivergenceSpec(alpha=alpha, entry_clip=entry_clip)
    out, (gradient,) = run(chunked_loss, x, spec, chunk_tokens=3)
    assert (
        torch.isfinite(out.loss) and torch.isfinite(out.divergence_N).all() and torch.isfinite(gradient).all()
    )
    assert torch.isfinite(out.student_entropy_N).all() and torch.isfinite(out.student_logp_N).all()
    assert_same(x, spec, 1e-5, chunk_tokens=3)


def test_identical_sides_give_zero() -> None:
    x = problem(F64)
    x.teacher, x.teacher_hidden = Head(x.weight.detach(), x.bias.detach()), x.hidden.detach()
    for alpha in ALPHAS:
        out, (gradient, *_) = run(chunked_loss, x, DivergenceSpec(alpha=alpha))
        assert out.divergence_N.abs().max() < 1e-12 and gradient.abs().max() < 1e-12


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(
    alpha: float, hidden_dtype: torch.dtype, weight_dtype: torch.dtype, autocast: bool
) -> None:
    """Dtypes may differ between hidden states and head; gradients come back in the leaf's own
    dtype.
    """
    x, exact = problem(), problem(F64)
    x.hidden = x.hidden.detach().to(hidden_dtype).requires_grad_()
    x.weight = x.weight.detach().to(weight_dtype).requires_grad_()
    spec = DivergenceSpec(alpha=alpha, temperature=0.7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain, plain_grads = run(plain_loss, x, spec)
        chunked, chunked_grads = run(chunked_loss, x, spec, chunk_tokens=5)
        scored = token_logprobs(x.hidden, Head(x.weight, x.bias), x.targets, 0.7, chunk_tokens=5)
    assert chunked.loss.dtype == torch.float32
    torch.testing.assert_close(chunked.loss, plain.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scored, chunked.student_logp_N)
    _, exact_grads = run(plain_loss, exact, spec)
    for found, rounded, reference in zip(chunked_grads, plain_grads, exact_grads, strict=True):
        assert found.dtype == rounded.dtype
        error, size = (found.double() - reference).norm(), reference.norm()
        assert error < 0.02 * size
        assert error < 1.5 * (rounded.double() - reference).norm() + 1e-5 * size


def test_float16_keeps_small_coefficients() -> None:
    """With 1 / (a million tokens) the logits' gradient would round to zero in float16 before the
    loss scale arrives.
    """
    x, exact = problem(torch.float16), problem(F64)
    for y in (x, exact):
        y.coefficient = torch.full((13,), 1e-6, dtype=F64).to(torch.float32 if y is x else F64)
    _, found = run(chunked_loss, x, DivergenceSpec(), scale=2.0**20, chunk_tokens=5)
    _, expected = run(plain_loss, exact, DivergenceSpec(), scale=2.0**20)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float16 and (a.double() - b).norm() < 0.01 * b.norm()


def test_without_grad_only_values() -> None:
    x = problem(F64)
    with torch.no_grad():
        arguments = (x.hidden, Head(x.weight, x.bias), x.teacher_hidden, x.teacher, x.targets)
        for spec in (DivergenceSpec(), SPECS[8]):
            inputs = LossInputs(*arguments, spec, x.coefficient)
            out = chunked_loss(inputs)
            assert not out.loss.requires_grad
            torch.testing.assert_close(out.divergence_N, plain_loss(inputs).divergence_N)


def test_backward_twice_and_accumulated() -> None:
    x = problem(F64)
    head = Head(x.weight, x.bias)
    out = chunked_loss(
        LossInputs(x.hidden, head, x.teacher_hidden, x.teacher, x.targets, DivergenceSpec(), x.coefficient)
    )
    out.loss.backward(retain_graph=True)
    once = x.hidden.grad.clone()
    (3 * out.loss).backward()
    torch.testing.assert_close(x.hidden.grad, 4 * once)


def test_sum_over_micro_batches_is_the_whole() -> None:
    x = problem(F64)
    whole, whole_grads = run(chunked_loss, x, DivergenceSpec(alpha=0.5), terms=(x.contrast,))
    head, total = Head(x.weight, x.bias), 0.0
    for rows in (slice(0, 4), slice(4, 4), slice(4, 13)):
        inputs = LossInputs(
            x.hidden[rows], head, x.teacher_hidden[rows], x.teacher, x.targets[rows],
            DivergenceSpec(alpha=0.5), x.coefficient[rows], terms=(x.contrast.rows(rows),),
        )  # fmt: skip
        total = total + chunked_loss(inputs).loss
    torch.testing.assert_close(total, whole.loss)
    for found, expected in zip(
        torch.autograd.grad(total * 1.7, (x.hidden, x.weight, x.bias)), whole_grads, strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("head", HEADS[:4], ids=str)
def test_token_scores(head: dict) -> None:
    x = problem(F64, **head)
    student = Head(x.weight, x.bias, **head)
    logits = x.hidden @ x.weight.T + x.bias
    logits = logits * head.get("scale", 1.0)
    if "softcap" in head:
        logits = head["softcap"] * torch.tanh(logits / head["softcap"])
    reference = torch.distributions.Categorical(logits=logits.detach() / 0.7)
    logp, entropy = token_scores(x.hidden, student, x.targets, 0.7, chunk_tokens=4)
    torch.testing.assert_close(logp, reference.log_prob(x.targets))
    torch.testing.assert_close(entropy, reference.entropy())
    torch.testing.assert_close(token_logprobs(x.hidden, student, x.targets, 0.7), logp)
    assert not logp.requires_grad


def test_no_tensor_of_tokens_by_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation's result, watched: none in forward or backward is larger than a chunk (or the
    head).
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple | list) else (result,):
                if isinstance(value, Tensor):
                    Watch.largest = max(Watch.largest, value.numel())
            return result

    x = problem(tokens=300, vocabulary=64)
    for spec in SPECS[::3]:
        with Watch():
            run(chunked_loss, x, spec, chunk_tokens=20)
            token_scores(x.teacher_hidden, x.teacher, x.targets, chunk_tokens=20)
    assert Watch.largest <= max(300 * 24, 20 * 64)
    assert (
        80 * 2**20 < default_chunk_tokens(151_936) * 151_936 * 4 <= 112 * 2**20
        and default_chunk_tokens(10**9) == 1
    )


def test_contrast_slice_and_replace_keep_meaning() -> None:
    x = problem(F64)
    part = x.contrast.rows(slice(2, 5))
    assert part.term.options == {"margin": 0.5} and len(part.coefficient_N) == len(part.negative_logp_N) == 3
    assert replace(DivergenceSpec(), alpha=1.0).alpha == 1.0


@register_term("pull")
def pull(inputs: TermInputs, *, power: float = 2.0) -> Tensor:
    """Looks at all values that need no further pass."""
    return (
        inputs.divergence
        * inputs.student_entropy
        * (inputs.student_logp - inputs.teacher_logp).abs() ** power
    )


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[2], SPECS[8]], ids=lambda s: f"{s.mode}-{s.alpha}")
def test_terms_stand_side_by_side(spec: DivergenceSpec) -> None:
    """A term of one's own beside the contrast: both in the loss, and chunked as plain."""
    x = problem(F64, softcap=4.0)
    own = LossTerm(parse_term("pull:coefficient=0.5,power=1.5"), torch.full((13,), 0.02, dtype=F64))
    assert own.term.coefficient == 0.5
    assert_same(x, spec, 1e-10, chunk_tokens=4, terms=(x.contrast, own))
    both, one, neither = (
        run(chunked_loss, x, spec, terms=terms)[0].loss for terms in ((x.contrast, own), (own,), ())
    )
    alone = run(chunked_loss, x, spec, terms=(x.contrast,))[0].loss
    assert one != neither
    torch.testing.assert_close(both - alone, one - neither)


def test_a_derivative_that_is_given_is_that_of_autograd() -> None:
    g = torch.Generator().manual_seed(0)
    divergence, logp, entropy, right, wrong = torch.randn(5, 200, generator=g)
    coefficient = torch.rand(200, generator=g) * (torch.arange(200) % 5 > 0)
    wrong[coefficient == 0] = math.nan  # a row without a wrong reference
    logp[:3] = right[:3]
    term = LossTerm(parse_term("contrast:margin=0.3"), coefficient, wrong)
    assert term.term.derivative is not None
    by_autograd = replace(term, term=replace(term.term, derivative=None))
    values = (divergence, logp, entropy, right)
    slope = term.slope(values)
    assert torch.equal(slope, by_autograd.slope(values)) and 20 < int((slope != 0).sum()) < 180


def test_a_term_without_gradient_counts_in_the_loss_alone() -> None:
    x = problem(F64)
    constant = Term("constant", lambda inputs: torch.ones_like(inputs.student_logp), frozenset())
    term = LossTerm(constant, x.coefficient)
    for function in (plain_loss, chunked_loss):
        without, gradient_without = run(function, x, DivergenceSpec())
        found, gradient = run(function, x, DivergenceSpec(), terms=(term,))
        torch.testing.assert_close(found.loss, without.loss + x.coefficient.sum())
        torch.testing.assert_close(gradient, gradient_without)
        assert not found.terms["constant"].active_N.any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("contrast:coefficient=0", "coefficient must be a number above 0, got 0"),
        ("contrast:coefficient=much", "coefficient must be a number above 0, got 'much'"),
        ("contrast:margins=1", "loss term 'contrast' has no option 'margins'"),
        ("contrasts", "unknown loss term 'contrasts'. Did you mean 'contrast'"),
    ],
)
def test_wrong_terms_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_term(text)


def test_what_a_term_may_need_and_must_return() -> None:
    with pytest.raises(UserError, match="needs 'student', which is not offered"):
        register_term("wrong", needs=frozenset({"student"}))
    x = problem()
    scalar = LossTerm(Term("scalar", lambda inputs: inputs.student_logp.sum(), frozenset()), x.coefficient)
    with pytest.raises(UserError, match="loss term 'scalar' must return shape"):
        run(chunked_loss, x, DivergenceSpec(), terms=(scalar,))
