"""Published weights and targets against oracles written from their formulas in float64, and the
identities that tie them together.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.losses import problem, run
from tests.helpers.steps import assert_same
from unisd import UniSDConfig
from unisd import testing as tiny
from unisd.data.privilege import final_answer, first_half, hints, reference_at
from unisd.data.prompts import PromptBuilder
from unisd.errors import UserError
from unisd.losses.chunked import chunked_loss
from unisd.losses.head import Head
from unisd.losses.plain import plain_loss
from unisd.losses.terms import TargetStates
from unisd.methods.aggregation import step_coefficients
from unisd.methods.divergence import DivergenceSpec, divergence
from unisd.methods.registry import parse_weight
from unisd.methods.scores import StepScores, TargetInputs
from unisd.methods.targets import NEGATIVE, STUDENT, Target, parse_target, register_target
from unisd.methods.weights import confidence_gate, contrast_weight, dash, entropy_trust, position
from unisd.testing import gradients, trainer
from unisd.training.plan import Plan, needed_scores

F64 = torch.float64
quick = settings(max_examples=30, deadline=None)
shapes = st.tuples(st.integers(1, 4), st.integers(1, 6))
seeds = st.integers(0, 10**6)


def step(seed: int, shape: tuple[int, int], size: float = 1.0) -> StepScores:
    """Everything that the weights look at; NaN where nothing may look."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=g) < 0.75

    def values() -> Tensor:
        return torch.where(mask, size * torch.rand(shape, generator=g, dtype=F64), math.nan)

    return StepScores(
        mask,
        torch.zeros(shape).long(),
        -values(),
        negative_present=torch.rand(shape[0], generator=g) < 0.6,
        negative_divergence=values(),
        student_logp=-0.05 * values(),
        teacher_entropy=values(),
        divergence=values(),
    )


# ------------------------------------------------------------------------------------------ weights


@given(seed=seeds, shape=shapes, kappa=st.floats(0, 20), size=st.sampled_from([0.1, 1.0, 1e4]))
@quick
def test_dash_is_the_backward_recursion(seed: int, shape: tuple[int, int], kappa: float, size: float) -> None:
    """L = mean_t A_t with A_t = D_t + lambda_t A_{t+1} over the row's loss tokens."""
    s = step(seed, shape, size)
    weights = dash(s, kappa=kappa)
    for i in range(shape[0]):
        D = s.divergence[i][s.mask[i]].numpy()
        with np.errstate(over="ignore"):
            trust = 1 / (1 + np.exp(kappa * (D - D.mean()))) if len(D) else D
        following, total = 0.0, 0.0
        for t in reversed(range(len(D))):
            following = D[t] + trust[t] * following
            total += following
        found = float((weights[i][s.mask[i]] * s.divergence[i][s.mask[i]]).sum())
        assert found == pytest.approx(total, rel=1e-9, abs=1e-12)
    assert (weights[s.mask] >= 1).all()


def test_dash_by_hand() -> None:
    """D = (0, 1), kappa 2, mean 1/2: lambda_1 = sigmoid(1), so the second token weighs 1 +
    sigmoid(1).
    """
    s = replace(
        step(0, (1, 2)), mask=torch.ones(1, 2).bool(), divergence=torch.tensor([[0.0, 1.0]], dtype=F64)
    )
    assert dash(s, kappa=2.0).tolist() == [[1.0, pytest.approx(1 + 1 / (1 + math.exp(-1)))]]


@given(seed=seeds, shape=shapes)
@quick
def test_other_weights_are_their_formulas(seed: int, shape: tuple[int, int]) -> None:
    s = step(seed, shape)
    found = {f.__name__: f(s).double() for f in (position, confidence_gate, entropy_trust, contrast_weight)}
    sharp = confidence_gate(s, threshold=0.97)
    for i in range(shape[0]):
        places = np.flatnonzero(s.mask[i].numpy())
        for number, t in enumerate(places):
            u = (number + 0.5) / len(places)
            assert found["position"][i, t] == pytest.approx(
                0.25 + 0.75 / (1 + math.exp(-(u - 0.3) / 0.1)), rel=1e-6
            )
            assert found["confidence_gate"][i, t] == float(math.exp(s.student_logp[i, t]) <= 0.99)
            assert sharp[i, t] == float(math.exp(s.student_logp[i, t]) <= 0.97)
            assert found["entropy_trust"][i, t] == pytest.approx(math.exp(-s.teacher_entropy[i, t]))
            kl = s.negative_divergence[i, t].item()
            assert found["contrast_weight"][i, t] == pytest.approx(
                kl / (kl + 1) if s.negative_present[i] else 1.0
            )


@given(seed=seeds, shape=shapes)
@quick
def test_mean1_is_a_mean_of_one_per_answer(seed: int, shape: tuple[int, int]) -> None:
    s, ones = step(seed, shape), torch.ones(shape[0], dtype=F64)
    weights = dash(s)
    scaled = weights.clone()
    for i in range(shape[0]):
        scaled[i] /= weights[i][s.mask[i]].mean()
    for aggregation in ("sequence", "token"):
        found = step_coefficients(s.mask, weights, ones, aggregation, "mean1")
        torch.testing.assert_close(found, step_coefficients(s.mask, scaled, ones, aggregation, "tokens"))
        assert found.sum() == pytest.approx(float(s.mask.any()))
    same = step_coefficients(s.mask, weights, ones, "sequence", "weights")
    torch.testing.assert_close(step_coefficients(s.mask, weights, ones, "sequence", "mean1"), same)


def test_published_normalizers() -> None:
    published = {
        name: parse_weight(name).normalizer
        for name in ("dash", "position", "contrast_weight", "confidence_gate")
    }
    assert published == {
        "dash": "tokens",
        "position": "tokens",
        "contrast_weight": "tokens",
        "confidence_gate": "weights",
    }
    with pytest.raises(UserError, match="'dash' needs 'divergence'"):
        dash(replace(step(0, (1, 1)), divergence=None))


# ------------------------------------------------------------------------------------------ targets


def random_logp(
    seed: int, count: int, tokens: int = 4, vocabulary: int = 5, size: float = 2.0
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        (size * torch.randn(tokens, vocabulary, generator=g, dtype=F64)).log_softmax(-1) for _ in range(count)
    ]


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def consensus_oracle(l: list[np.ndarray], student: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # noqa: E741
    """(A, l*) entry by entry."""
    K = len(l)
    A = sum(x - student for x in l) / K
    highest = np.max(l, axis=0)
    J = np.log(sum(np.exp(x - highest) for x in l) / K) + highest - sum(l) / K
    lam = np.abs(A) / (sum(np.abs(x - student) for x in l) / K + 1e-8) * np.abs(A) / (np.abs(A) + J + 1e-8)
    return A, sum(l) / K + lam * J


@given(seed=seeds, K=st.integers(1, 4), size=st.sampled_from([0.1, 3.0, 1e4]))
@quick
def test_view_consensus(seed: int, K: int, size: float) -> None:
    """The formula on realised tokens and on the vocabulary; the sign of A is never turned; one view
    is its own consensus.
    """
    student, teacher, *views = random_logp(seed, K + 2, size=size)
    target = parse_target("view_consensus:views=" + "+".join(["full", "half", "answer", "hints"][:K]))
    assert len(target.sources) == K
    sources = dict(zip(map(str, target.sources), views, strict=True))
    A, expected = consensus_oracle([v.numpy() for v in views], student.numpy())
    realised = target(
        TargetInputs(student[:, 0], teacher[:, 0], {name: v[:, 0] for name, v in sources.items()})
    )
    np.testing.assert_allclose(realised.numpy(), expected[:, 0], rtol=1e-7, atol=1e-7)
    moved = realised.numpy() - student[:, 0].numpy()
    assert (moved * A[:, 0] >= -1e-9 * np.abs(A[:, 0]).max() ** 2).all()
    whole = target(TargetInputs(student, teacher, sources))
    np.testing.assert_allclose(whole.exp().numpy(), softmax(expected), rtol=1e-6, atol=1e-9)
    if K == 1:
        torch.testing.assert_close(realised, views[0][:, 0])
        return
    # the first token's row lacks the last view: there it is the consensus of the others
    has = {name: torch.ones(len(student), dtype=torch.bool) for name in sources}
    has[list(has)[-1]][0] = False
    found = target(
        TargetInputs(student[:, 0], teacher[:, 0], {n: v[:, 0] for n, v in sources.items()}, 0.0, has)
    )
    expected[0] = consensus_oracle([v.numpy() for v in views[:-1]], student.numpy())[1][0]
    np.testing.assert_allclose(found.numpy(), expected[:, 0], rtol=1e-7, atol=1e-7)


@given(seed=seeds, a=st.floats(0, 1), size=st.sampled_from([0.1, 3.0, 1e4]))
@quick
def test_contrast_geometric_and_pmi(seed: int, a: float, size: float) -> None:
    p, q, b, c = random_logp(seed, 4, size=size)
    P, Q, B, C = (x.numpy() for x in (p, q, b, c))

    def found(text: str, *values: Tensor, progress: float = 0.0) -> np.ndarray:
        target = parse_target(text)
        sources = dict(zip(map(str, target.sources), values, strict=True))
        result = target(TargetInputs(p, q, sources, progress))
        assert result.isfinite().all()
        return result.exp().numpy()

    close: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-9}
    np.testing.assert_allclose(
        found(f"contrast:a={a}", b), softmax((1 + a) * Q - a * np.maximum(B, -5)), **close
    )
    np.testing.assert_allclose(found(f"geometric:a={a}", b), softmax((1 - a) * Q + a * B), **close)
    scheduled = found(f"geometric:a={a},a_end=0.5,source=base/plain", b, progress=0.25)
    now = a + 0.25 * (0.5 - a)
    np.testing.assert_allclose(scheduled, softmax((1 - now) * Q + now * B), **close)
    M = np.log(np.maximum((np.exp(Q) + np.exp(B)) / 2, 1e-300))
    jsd = 0.5 * (np.exp(Q) * (Q - M) + np.exp(B) * (B - M)).sum(-1, keepdims=True)
    share = 2 * 0.15 * (1 / (1 + np.exp(-25 * jsd)) - 0.5)
    np.testing.assert_allclose(
        found("geometric:mixing=disagreement,beta=25", b), softmax((1 - share) * Q + share * B), **close
    )
    delta = np.maximum(Q, -1e4) - np.maximum(B, -1e4)
    delta = delta - delta.mean(-1, keepdims=True)
    np.testing.assert_allclose(found("pmi:beta=2", b, c), softmax(C + 10 * np.tanh(delta / 10) / 2), **close)
    assert P.shape == Q.shape


TARGETS = [
    "contrast", "geometric:a=0.3", "geometric:mixing=disagreement", "geometric:a=0.3,source=student/plain",
    "pmi", "view_consensus", "view_consensus:residual=False",
]  # fmt: skip
SPECS = [
    *[DivergenceSpec(alpha=alpha, temperature=0.7) for alpha in (0.0, 0.5, 1.0)],
    DivergenceSpec(alpha=0.0, entry_clip=0.05),
    DivergenceSpec(alpha=0.5, mode="topk", topk=5),
    DivergenceSpec(alpha=1.0, mode="sampled"),
]


def states_of(text: str, x: Any, seed: int = 1) -> TargetStates:
    """Sources as hidden states of the teacher's width; another quarter of the tokens lacks each."""
    g = torch.Generator().manual_seed(seed)
    target, count = parse_target(text), len(x.targets)
    names = [source for source in target.sources if source != STUDENT]
    states = {name: torch.randn(count, 24, generator=g, dtype=F64) for name in names}
    present = {name: torch.arange(count) % 4 != number for number, name in enumerate(names)}
    return TargetStates(target, states, dict.fromkeys(names, x.teacher), present)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.mode}-{s.alpha}-{s.entry_clip}")
@pytest.mark.parametrize("text", TARGETS)
def test_a_target_is_a_constant_other_teacher(text: str, spec: DivergenceSpec) -> None:
    """Values and gradients: the loss from a table of log q', computed beforehand, under a head that
    passes it on.
    """
    x = problem(F64)
    states = states_of(text, x)
    q = (x.teacher.logits(x.teacher_hidden) / spec.temperature).log_softmax(-1)
    p = (Head(x.weight, x.bias).logits(x.hidden) / spec.temperature).log_softmax(-1).detach()
    sources = {
        str(source): (
            (x.teacher.logits(states.states[source]) / spec.temperature).log_softmax(-1)
            if source in states.states
            else p
        )
        for source in states.target.sources
    }
    present = {str(name): has for name, has in states.present.items()}
    if spec.mode == "sampled" and states.target.realised:
        at = x.targets[:, None]
        log_q = q.clone()
        one = states.target(
            TargetInputs(
                p.gather(1, at)[:, 0],
                q.gather(1, at)[:, 0],
                {n: v.gather(1, at)[:, 0] for n, v in sources.items()},
                present=present,
            )
        )
        log_q.scatter_(1, at, one[:, None])
    else:
        log_q = states.target(TargetInputs(p, q, sources, present=present))
    if present:
        served = torch.stack([*present.values()])
        served = served.any(0) if text.startswith("view_consensus") else served.all(0)
        log_q = torch.where(served[:, None], log_q, q)
    D = divergence(
        Head(x.weight, x.bias).logits(x.hidden), log_q * spec.temperature, x.targets, replace(spec)
    )
    if spec.mode == "sampled" and states.target.realised:  # the table is not normalised, and need not be
        at = x.targets[:, None]
        live = (
            (Head(x.weight, x.bias).logits(x.hidden) / spec.temperature).log_softmax(-1).gather(1, at)[:, 0]
        )
        ratio = (live - log_q.gather(1, at)[:, 0]).detach()
        D = ratio + ratio * (live - live.detach())
    expected = torch.autograd.grad(1.7 * (x.coefficient * D).sum(), (x.hidden, x.weight, x.bias))
    for function, more in ((plain_loss, {}), (chunked_loss, {"chunk_tokens": 5})):
        out, found = run(function, x, spec, target=states, **more)
        torch.testing.assert_close(out.divergence_N, D.detach())
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_geometric_target_of_oneself_has_the_gradient_of_a_weight() -> None:
    """b = sg(p), reverse KL: the gradient is 1 - a times the plain one.

    The value is not: it lacks a log-normaliser.
    """
    x, spec = problem(F64), DivergenceSpec(alpha=1.0)
    plain, plain_grads = run(chunked_loss, x, spec)
    mixed, mixed_grads = run(
        chunked_loss,
        x,
        spec,
        target=states_of("geometric:a=0.3,source=student/plain", x),
    )
    for a, b in zip(mixed_grads, plain_grads, strict=True):
        torch.testing.assert_close(a, 0.7 * b)
    assert mixed.loss.item() != pytest.approx(0.7 * plain.loss.item(), rel=1e-3)


def test_entry_clip_pushes_the_favourite_down() -> None:
    """q = (.9, .07, .03), p = (.1, .6, .3), clip .05: a negative loss, and a gradient of the wrong
    sign on the top token.
    """
    log_q, log_p = (torch.tensor([row], dtype=F64).log() for row in ((0.9, 0.07, 0.03), (0.1, 0.6, 0.3)))
    log_p.requires_grad_()
    for clip, loss, top in ((0.05, -0.169, 0.010), (None, None, -0.800)):
        D = divergence(log_p, log_q, torch.tensor([0]), DivergenceSpec(alpha=0.0, entry_clip=clip))
        (gradient,) = torch.autograd.grad(D.sum(), log_p)
        assert round(gradient[0, 0].item(), 3) == top
        assert loss is None or round(D.item(), 3) == loss


def test_targets_refuse() -> None:
    for text, message in (
        ("geometrik", "Did you mean 'geometric'"),
        ("geometric:source=student/full", "unknown source 'student/full'"),
        ("geometric:source=nobody/plain", "unknown source"),
        ("view_consensus:views=full+quarter", "unknown source"),
        ("contrast:b=1", "no option 'b'"),
        ("geometric:mixing=some", "mixing must be constant or disagreement, got 'some'"),
    ):
        with pytest.raises(UserError, match=message):
            parse_target(text)
    with pytest.raises(UserError, match=r"already registered by unisd\.methods\.targets"):
        register_target("pmi", sources=())(lambda inputs: inputs.teacher_logp)
    with pytest.raises(UserError, match="nll trains without a teacher: unset target"):
        UniSDConfig(distillation_mode="nll", target="contrast")


# --------------------------------------------------------------------------- weights that wait for
# the forward pass


@pytest.mark.parametrize("trained", [(True, False, False), (True, True, True)])
@pytest.mark.parametrize("with_contrast", [False, True])
def test_reweighing_in_the_pass_is_weighing_before_it(
    trained: tuple[bool, bool, bool], with_contrast: bool
) -> None:
    x, spec = problem(F64), DivergenceSpec(alpha=0.5)
    for leaf, flag in zip((x.hidden, x.weight, x.bias), trained, strict=True):
        leaf.requires_grad_(flag)
    terms = (x.contrast,) if with_contrast else ()

    def factor(D: Tensor, logp: Tensor, entropy: Tensor) -> Tensor:
        return D.sqrt() - 0.1 * logp + entropy

    found = run(plain_loss, x, spec)[0]
    weighed = replace_coefficient(
        x, x.coefficient * factor(found.divergence_N, found.student_logp_N, found.student_entropy_N)
    )
    expected, expected_grads = run(plain_loss, weighed, spec, terms=terms, token_clip=0.2)
    for function, more in ((plain_loss, {}), (chunked_loss, {"chunk_tokens": 5})):
        out, grads = run(function, x, spec, terms=terms, token_clip=0.2, deferred=factor, **more)
        torch.testing.assert_close(out.loss, expected.loss)
        for a, b in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(a, b)


def replace_coefficient(x: Any, coefficient: Tensor) -> Any:
    return type(x)(**{**vars(x), "coefficient": coefficient})


STUDENT_WEIGHTS = {"token_weights": ["dash", "confidence_gate:threshold=0.005"], "entry_clip": 0.5}


@pytest.mark.parametrize(
    "normalizer", [*(pytest.param(name, marks=pytest.mark.long) for name in ("tokens", "mean1")), "weights"]
)
def test_in_forward_weights_equal_a_pass_of_their_own(tmp_path: Any, normalizer: str) -> None:
    """The same step, scored by a student pass beforehand."""
    free = trainer(tmp_path, weight_normalizer=normalizer, **STUDENT_WEIGHTS)
    assert [weight.name for weight in free.plan.deferred] == ["dash"] and not free.plan.needs & {
        "student",
        "divergence",
    }
    paid = trainer(tmp_path, weight_normalizer=normalizer, **STUDENT_WEIGHTS)
    paid.plan = replace(paid.plan, deferred=())
    paid.scorer.needs = frozenset({"student", "divergence"})
    ours = gradients(free)
    assert_same(ours, gradients(paid))
    free.observer.after_last_loss()
    logged = free.metrics.values
    assert logged["weight/dash/mean"] == pytest.approx(paid.metrics.values["weight/dash/mean"], rel=1e-5)
    assert logged["weight/confidence_gate/min"] == 0.0 and logged["weight/dash/max"] > 1
    for options in (
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        {"loss_implementation": "plain"},
    ):
        assert_same(
            ours, gradients(trainer(tmp_path, weight_normalizer=normalizer, **STUDENT_WEIGHTS, **options))
        )


def test_where_the_student_is_scored_beforehand(tmp_path: Any) -> None:
    for options in (
        {"token_clip_quantile": 0.9},
        {"loss_aggregation": "token", "weight_normalizer": "weights"},
    ):
        built = trainer(tmp_path, **STUDENT_WEIGHTS, **options)
        assert built.plan.deferred == () and "divergence" in built.plan.needs
        gradients(built)


def test_a_row_that_is_shut_out_does_not_count(tmp_path: Any) -> None:
    """Answers of one token, and a threshold between the fourth and the fifth: four rows are left,
    each with a fourth of the loss.
    """
    drawn = trainer(tmp_path, max_completion_length=1, token_weights=["confidence_gate"])._rollout(
        [(i, 0) for i in range(8)]
    )
    p = sorted(math.exp(logp) for completion in drawn for logp in completion.logps or ())
    gate = f"confidence_gate:threshold={(p[3] + p[4]) / 2}"
    for paid in ({}, {"min_p": 1e-9}):  # the rollout tells p only where it draws from all tokens
        built = trainer(tmp_path, max_completion_length=1, token_weights=[gate], **paid)
        assert ("student" in built.plan.needs) == bool(paid)
        batches, _ = built.get_batch_samples(iter(built.get_train_dataloader()), 4, torch.device("cpu"))
        shares_N = torch.cat([batch["micro_batch"].coefficient_N for batch in batches])
        torch.testing.assert_close(shares_N.sort().values, torch.tensor([0.0] * 4 + [0.25] * 4))


def test_contexts_that_repeat_the_reference_bear_the_teacher_out(tmp_path: Any) -> None:
    """At a temperature that is not 1: both are asked at the same one."""
    rows = [{**row, "auxiliary_contexts": [row["privileged_context"]] * 2} for row in tiny.rows(8)]
    templates = {
        "teacher_prompt_template": "{privileged_context} {prompt}",
        "auxiliary_prompt_template": "{context} {prompt}",
    }
    built = trainer(
        tmp_path, train_dataset=rows, temperature=0.7, token_weights=["corroboration"], **templates
    )
    assert "teacher" not in built.plan.needs
    gradients(built)
    assert built.metrics.values["weight/corroboration/min"] == pytest.approx(1.0, abs=1e-5)


def test_the_teachers_scores_are_there_for_weights_that_declare_them(tmp_path: Any) -> None:
    args = UniSDConfig(output_dir=str(tmp_path), use_cpu=True)
    own = parse_weight("agreement_token")
    asking = replace(own, needs=own.needs | {"teacher"})
    plan = Plan.of(args)
    assert "teacher" not in needed_scores(args, replace(plan, weights=(own,)))
    assert "teacher" in needed_scores(args, replace(plan, weights=(own, asking)))
    for asked in (False, True):
        built = trainer(tmp_path, token_weights=["entropy_trust"])
        built.scorer.needs |= {"teacher"} if asked else set()
        requests = built._requests([(0, 0)], built._rollout([(0, 0)]))
        scores = built.scorer.score(requests, "cpu")[0]
        assert (scores.teacher_logp is not None) is asked
        assert not asked or bool((scores.teacher_logp[scores.mask] < 0).all())


def passes(built: Any) -> tuple[Counter[str], Any]:
    """Sequences per view that a step's scoring runs through the model; and the step's loss and
    gradients.
    """
    seen: Counter[str] = Counter()
    original = built.scorer.passes.hidden_states

    def watched(jobs: Any, device: Any) -> Any:
        seen.update(job.view for job in jobs)
        return original(jobs, device)

    built.scorer.passes.hidden_states = watched
    found = gradients(built)
    return seen, found


@pytest.mark.parametrize(
    "weight", ["dash", "position", "confidence_gate", "entropy_trust", "contrast_weight"]
)
def test_weights_add_no_pass(tmp_path: Any, weight: str) -> None:
    """8 rows: the teacher, and for `contrast_weight` the negative view that it is about;
    nothing else.
    """
    negative = {"negative": 8} if weight == "contrast_weight" else {}
    assert passes(trainer(tmp_path, token_weights=[weight]))[0] == {"teacher": 8, **negative}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target": "contrast", "token_weights": ["contrast_weight"]}, {"negative": 8}),
        ({"target": "geometric", "teacher_model_kind": "ema"}, {"teacher/plain": 8}),
        ({"target": "geometric:source=base/plain", "teacher_model_kind": "ema"}, {"base/plain": 8}),
        (
            {
                "target": "geometric:source=step/full",
                "target_reference_steps": 2,
                "teacher_model_kind": "live",
            },
            {"step/full": 8},
        ),
        (
            {
                "target": "geometric:source=step/same,a=0.3",
                "target_reference_steps": 2,
                "teacher_context": "half",
                "teacher_model_kind": "live",
            },
            {"step/same": 8},
        ),
        ({"target": "geometric:source=student/plain"}, {}),
        ({"target": "pmi"}, {"teacher/unconditioned": 8, "base/plain": 8}),
        (
            {"target": "view_consensus", "distillation_mode": "sampled", "distillation_alpha": 1.0},
            {"teacher/half": 8, "teacher/answer": 8},
        ),
    ],
    ids=lambda value: str(value.get("target", "")) if isinstance(value, dict) else "",
)
def test_targets_score_what_they_declare(
    tmp_path: Any, options: dict[str, Any], expected: dict[str, int]
) -> None:
    """And the whole step is the same chunked, plain, and in other micro-batches."""
    seen, ours = passes(trainer(tmp_path, **options))
    assert seen == {"teacher": 8, **expected}
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert_same(ours, gradients(trainer(tmp_path, loss_implementation="plain", **cut, **options)))
    plain = {
        name: value for name, value in options.items() if name not in ("target", "target_reference_steps")
    }
    assert ours[0] != pytest.approx(gradients(trainer(tmp_path, **plain))[0], rel=1e-6)


def test_sources_that_rows_cannot_serve(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """None can: refused. Some: told at the start, and a consensus is that of the other views."""
    sampled: dict[str, Any] = {"distillation_mode": "sampled", "distillation_alpha": 1.0}
    rows = [{**row, "hints": "Count them."} for row in tiny.rows(8)]
    views = {"target": "view_consensus:views=half+hints", **sampled}
    for i, row in enumerate(rows):
        row["privileged_context"] = f"It is {i}."  # one sentence: no hints but those of the column
    alone = views | {"target": "view_consensus:views=half"}
    expected = gradients(trainer(tmp_path, train_dataset=rows, **alone))
    for row in rows[1:]:
        del row["hints"]
    few = trainer(tmp_path, train_dataset=rows, **views)
    assert "7 of 8 rows have nothing for the target's source teacher/hints" in caplog.text
    requests = few._requests([(i, 0) for i in range(8)], few._rollout([(i, 0) for i in range(8)]))
    assert [len(request.sources) for request in requests] == [2] + [1] * 7
    del rows[0]["hints"]
    assert_same(gradients(trainer(tmp_path, train_dataset=rows, **views)), expected)
    views["target"] = "view_consensus:views=hints"
    with pytest.raises(UserError, match="reads teacher/hints, but no row of the training data has anything"):
        trainer(tmp_path, train_dataset=rows, **views)
    assert_same(gradients(trainer(tmp_path, train_dataset=rows, **alone)), expected)


def test_a_source_that_is_too_long_is_counted(tmp_path: Any) -> None:
    built = trainer(tmp_path, target="geometric:source=teacher/full", teacher_context="half")
    row, completion = built.rows[0], built._rollout([(0, 0)])[0]
    assert built.request_builder.of(row, 0, completion, True, 0)[1] == 0
    built.request_builder.teacher_room = len(built.prompts.teacher(row)) - 1
    request, overlong = built.request_builder.of(row, 0, completion, True, 0)
    assert (overlong, request.sources) == (1, {})


@pytest.mark.parametrize("source", ["teacher/full", "teacher/same"])
def test_a_mixture_of_the_teacher_with_itself_is_refused(tmp_path: Any, source: str) -> None:
    with pytest.raises(UserError, match=f"mixes the teacher with itself: {source} is what the teacher sees"):
        trainer(tmp_path, target=f"geometric:source={source}")


@pytest.mark.long
def test_neutral_targets_change_nothing(tmp_path: Any) -> None:
    off = gradients(trainer(tmp_path))
    assert_same(off, gradients(trainer(tmp_path, target="geometric:a=0.0")))
    assert_same(off, gradients(trainer(tmp_path, target="contrast:a=0.0")))
    sampled: dict[str, Any] = {"distillation_mode": "sampled", "distillation_alpha": 1.0}
    one = gradients(trainer(tmp_path, target="view_consensus:views=full", **sampled))
    assert_same(gradients(trainer(tmp_path, **sampled)), one)
    rows = [
        {**row, "negative_context": None if i else row["negative_context"]}
        for i, row in enumerate(tiny.rows(8))
    ]
    # Rows without a wrong reference keep the teacher's own distribution: only the first row
    # differs.
    few = trainer(tmp_path, train_dataset=rows, target="contrast:a=3.0", token_clip_quantile=0.9999)
    none = trainer(tmp_path, train_dataset=rows, token_clip_quantile=0.9999)
    numbers = [(i, 0) for i in range(8)]
    D = [b.scorer.score(b._requests(numbers, b._rollout(numbers)), "cpu")[0].divergence for b in (few, none)]
    torch.testing.assert_close(D[0][1:], D[1][1:])


@pytest.mark.long
def test_other_teachers_survive_a_checkpoint(tmp_path: Any) -> None:
    options: dict[str, Any] = {
        "target": "geometric:source=step/full",
        "target_reference_steps": 2,
        "num_train_epochs": 9,
    }
    built = trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=3, **options)
    built.train()
    again = trainer(tmp_path, max_steps=3, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, value in built.other_teachers["step"].state.items():
        assert torch.equal(value, again.other_teachers["step"].state[name])
        assert not torch.equal(value, built.teacher.state[name]) or not value.any() or "norm" in name
    with pytest.raises(UserError, match="target_reference_steps"):
        trainer(tmp_path, target="geometric:source=step/full")


# -----------------------------------------------------------------------------------------------
# levels of privilege


def test_levels() -> None:
    text = "One kutu is 6. 3*6=18. 12+18 = 30. Answer: 30"
    assert first_half(text) == "One kutu is 6. 3*6=18."
    assert hints(text) == "One kutu is 6.\n3*6=?.\n12+18 = ?."
    assert final_answer(text) == "30"
    assert final_answer(r"so \boxed{\frac{1}{2}} holds. #### 7") == r"\frac{1}{2}"
    assert final_answer("long\n#### 1,200") == "1,200" and final_answer("word " * 9) is None
    row = {"privileged_context": text, "answer": "31", "hints": "count"}
    assert [reference_at(row, level) for level in ("full", "hints", "answer", "plain")] == [
        text,
        "count",
        "Answer: 31",
        None,
    ]
    assert hints("one sentence") is None and first_half("one") == "one"
    program = "```python\ndef f(x):\n    return x + 1\n```"
    assert final_answer(program) is None and hints(program) is None
    assert hints(f"Add 1 + 1 = 2. Then return.\n{program}") == "Add 1 + 1 = ?.\nThen return."
    assert hints(f"Add one.\n{program}\nAnswer: 2") == "Add one."


@pytest.mark.parametrize(
    "prompt", ["What?", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]]
)
def test_prompts_at_levels(prompt: Any) -> None:
    builder = PromptBuilder(tiny.tokenizer(), teacher_template="{prompt} Ref: {privileged_context}")
    row = {"prompt": prompt, "privileged_context": "It is so. It is 4."}
    decode = builder.tokenizer.decode
    unconditioned = decode(builder.at_level(row, "unconditioned"))
    assert "What?" not in unconditioned and "Ref: It is so. It is 4." in unconditioned
    assert ("Be brief." in unconditioned) == isinstance(prompt, list)
    assert builder.at_level(row, "plain") == builder.student(row) and builder.at_level(
        row, "full"
    ) == builder.teacher(row)
    assert "Ref: It is so." in decode(builder.at_level(row, "half")) and "4" not in decode(
        builder.at_level(row, "half")
    )
    assert replace(builder, level="half").teacher(row) == builder.at_level(row, "half")


def test_teacher_context_changes_the_teacher_and_refuses_empty_rows(tmp_path: Any) -> None:
    full = gradients(trainer(tmp_path))[0]
    assert gradients(trainer(tmp_path, teacher_context="half"))[0] != pytest.approx(full, rel=1e-6)
    assert gradients(trainer(tmp_path, teacher_context="plain"), perturb=0.0)[0] == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="row 0 of the training data has nothing for teacher_context=hints"):
        trainer(tmp_path, teacher_context="hints")


@pytest.mark.parametrize("top", [0, 5])
def test_contrast_scores_are_those_of_the_distributions(tmp_path: Any, top: int) -> None:
    """KL(q||q-) and l- against plain forward passes, row by row: of the whole vocabulary, or of q's
    largest entries and one for the rest.
    """
    rows = [
        {**row, "negative_context": row["negative_context"] if i else None}
        for i, row in enumerate(tiny.rows(8))
    ]
    mode = {"distillation_mode": "topk", "distillation_topk": top, "entry_clip": 0.05} if top else {}
    built = trainer(tmp_path, train_dataset=rows, token_weights=["contrast_weight"], temperature=0.8, **mode)
    numbers = [(i, 0) for i in range(8)]
    scored = built._requests(numbers, built._rollout(numbers))
    found, _ = built.scorer.score(scored, "cpu")
    assert found.negative_divergence is not None and found.negative_logp is not None
    assert (found.negative_divergence[0] == 0).all() and contrast_weight(found)[0].eq(1).all()
    for i, row in enumerate(scored[1:], start=1):
        logp = []
        for prompt in (row.teacher, row.negative):
            with torch.no_grad():
                logits = built.model(torch.tensor([prompt + row.completion])).logits[0, len(prompt) - 1 : -1]
            logp.append((logits.double() / 0.8).log_softmax(-1))
        expected = logp[1].gather(1, torch.tensor(row.completion)[:, None])[:, 0]
        if top:
            largest = logp[0].topk(top).indices
            kept = [x.exp().gather(1, largest) for x in logp]
            logp = [torch.cat([x, 1 - x.sum(1, keepdim=True)], 1).log() for x in kept]
        kl = (logp[0].exp() * (logp[0] - logp[1])).sum(-1)
        length = len(row.completion)
        torch.testing.assert_close(found.negative_divergence[i, :length].double(), kl, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.negative_logp[i, :length].double(), expected, rtol=1e-4, atol=1e-4)


def test_a_realised_source_under_a_wrong_reference_is_there_for_weights_too(tmp_path: Any) -> None:
    """`contrast_weight` compares whole distributions; the target's l- is what that finds."""
    built = trainer(
        tmp_path, token_weights=["contrast_weight"], distillation_mode="sampled", distillation_alpha=1.0
    )
    built.scorer.target = Target(
        "away", lambda inputs: inputs.teacher_logp, lambda _: ("teacher/negative",), True
    )
    built.scorer.sources = built.scorer.target.sources
    numbers = [(0, 0), (1, 0)]
    scores, states = built.scorer.score(built._requests(numbers, built._rollout(numbers)), "cpu")
    assert scores.negative_logp is not None and (scores.negative_logp[scores.mask] < 0).all()
    assert torch.equal(states.source_logp[NEGATIVE], scores.negative_logp)
