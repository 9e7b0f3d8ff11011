"""What the student is moved towards, where that is not the teacher's distribution itself: q' = g(q,
further distributions).

A *target* is one pure function `(TargetInputs, **options) -> log q'`, registered by name with
:func:`register_target`, or by another package under the entry point group `unisd.targets`.
It runs inside the loss, chunk by chunk, and carries no gradient. It declares its *sources*, further
distributions over the same tokens; only those are scored, each at the cost of one forward pass:

    weights/context
    weights: teacher (the run's own), base (initial model), step (the student of some steps ago),
        student
    context: full, half, hints, answer, unconditioned, plain (see :mod:`unisd.data.privilege`),
        negative; or same: what the teacher itself is shown, also of the step's answers

`student/plain` is the student's own distribution and costs nothing. All are taken at the
distillation temperature.

Shapes: C tokens of a chunk, V vocabulary, K sources. Values in nats. p student, q teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from unisd.data.privilege import LEVELS
from unisd.errors import UserError
from unisd.methods.divergence import at_least_float32
from unisd.methods.registry import all_options, bound_options, check_name, enter, find, parse
from unisd.methods.scores import TargetInputs

KIND = "target"
ENTRY_POINT_GROUP = "unisd.targets"
WEIGHTS = ("teacher", "base", "step", "student")
SAME = "same"
CONTEXTS = (*LEVELS, "negative", SAME)
NORMALISED_WITHIN = 0.05  # nats: far above rounding, far below a missing log
LOWEST_LOGP = -1e4  # stands in for anything less likely where log-probabilities are subtracted


@dataclass(frozen=True)
class Source:
    """Names a distribution: whose weights read the answer, and in which context."""

    weights: str
    context: str

    @classmethod
    def parse(cls, text: str) -> Source:
        """Read `weights/context`; raise `UserError` for one that nobody offers."""
        weights, _, context = text.partition("/")
        source = cls(weights, context)
        if weights not in WEIGHTS or context not in CONTEXTS or (weights == "student" and source != STUDENT):
            raise UserError(
                f"unknown source {text!r}: use weights/context with weights {', '.join(WEIGHTS)} and context"
                f" {', '.join(CONTEXTS)} (of the student: plain only)."
            )
        return source

    def __str__(self) -> str:
        return f"{self.weights}/{self.context}"


STUDENT = Source("student", "plain")
NEGATIVE = Source("teacher", "negative")


Function = TypeVar("Function", bound=Callable[..., Tensor])
Sources = Callable[[Mapping[str, Any]], Sequence[str]]


@dataclass(frozen=True)
class Target:
    """A registered target and its options."""

    name: str
    function: Callable[..., Tensor]
    declared: Sources  # from the options (with their defaults) to the sources
    # can do with the realised tokens: `distillation_mode=sampled` then keeps one number per token
    # and source
    realised: bool
    # does with the sources that a row has; else the target of one that lacks some is the teacher's
    partial: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    _seen: list[bool] = field(default_factory=list, compare=False, repr=False)

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(map(Source.parse, self.declared(all_options(self.function, self.options))))

    def __call__(self, inputs: TargetInputs) -> Tensor:
        target: Tensor = self.function(inputs, **self.options)
        if not isinstance(target, Tensor) or target.shape != inputs.teacher_logp.shape:
            raise UserError(
                f"target {self.name!r} must return shape {tuple(inputs.teacher_logp.shape)}, but returned"
                f" {tuple(getattr(target, 'shape', ()))}."
            )
        if target.dim() == 2:
            # what cannot occur is so unlikely: a share of 0 times an infinity is no number
            target = target.clamp(min=LOWEST_LOGP)
            if not self._seen:
                self._check_normalised(target)
                self._seen.append(True)
        return target

    def _check_normalised(self, target_CV: Tensor) -> None:
        """Look at the first tokens of a run: their shares must add up to 1."""
        off = float(target_CV.float().logsumexp(-1).abs().max()) if len(target_CV) else 0.0
        if not off < NORMALISED_WITHIN:
            raise UserError(
                f"target {self.name!r} must return log-probabilities, whose shares add up to 1: they are off"
                f" by a factor of e^{off:.2g}; end it with .log_softmax(-1)."
            )

    def with_options(self, **options: Any) -> Target:
        """The same with options bound; unknown ones, and sources that nobody offers, are refused
        here.
        """
        options = bound_options(KIND, self.name, self.function, {**self.options, **options})
        bound = replace(self, options=options, _seen=[])
        try:
            _ = bound.sources
        except UserError as error:
            raise UserError(f"target {self.name!r}: {error}") from None
        return bound


_REGISTRY: dict[str, Target] = {}


def register_target(
    name: str, *, sources: Sequence[str] | Sources, realised: bool = False, partial: bool = False
) -> Callable[[Function], Function]:
    """Decorator: make a function `(inputs, **options) -> log q'` known as the target `name`.

    sources: what it needs, or a function of its options that says so. realised: the function works
    entry by entry, so that it may be called with the realised tokens' log-probabilities `[C]`
    alone. partial: it does with some of its sources (`inputs.present`); unset, the target of a row
    that lacks one is the teacher's distribution.
    """

    check_name(KIND, name)

    def register(function: Function) -> Function:
        named = (sources,) if isinstance(sources, str) else sources
        declared: Sources = named if callable(named) else lambda options: named
        enter(KIND, Target(name, function, declared, realised, partial), _REGISTRY)
        return function

    return register


def parse_target(text: str) -> Target:
    """`name` or `name:option=value,option=value`, as for token weights."""
    name, options = parse(KIND, text)
    return find(KIND, name, _REGISTRY, ENTRY_POINT_GROUP).with_options(**options)


# -------------------------------------------------------------------------------- published targets


def _views(options: Mapping[str, Any]) -> Sequence[str]:
    return tuple(f"teacher/{view}" for view in str(options["views"]).split("+"))


@register_target("view_consensus", sources=_views, realised=True, partial=True)
def view_consensus(
    inputs: TargetInputs, *, views: str = "full+half+answer", eps: float = 1e-8, residual: bool = True
) -> Tensor:
    """l* = mean_k l^k + lambda J over K contexts (`views`, joined by +) of the row's *own*
    reference (AVSD, arXiv 2605.20643).

    delta^k = l^k - l, A = mean_k delta^k, J = logmeanexp_k l^k - mean_k l^k >= 0,
    lambda = |A| / (mean_k |delta^k| + eps) * |A| / (|A| + J + eps). Since lambda J < |A|, l* - l
    has the sign of A: the views' consensus is never turned round. K = 1 gives l* = l^1. A view that
    the row cannot serve is left out.

    Published on the realised tokens (`distillation_mode=sampled`, whose gradient -sg(l* - l) grad l
    is this loss's). In mode `full` the same holds for every vocabulary entry, and l* is normalised.
    residual: False leaves lambda J out (reported to lose).
    """
    l_K = torch.stack([at_least_float32(logp) for logp in inputs.sources.values()])
    everywhere_C = torch.ones(l_K.shape[1], dtype=torch.bool, device=l_K.device)
    has_K = torch.stack([inputs.present.get(name, everywhere_C) for name in inputs.sources])
    has_K = has_K if l_K.dim() == 2 else has_K[..., None]
    count = has_K.sum(0)

    def mean_of(value_K: Tensor) -> Tensor:
        return value_K.masked_fill(~has_K, 0.0).sum(0) / count

    delta_K = l_K - inputs.student_logp
    A, mean = mean_of(delta_K), mean_of(l_K)
    J = (l_K.masked_fill(~has_K, -math.inf).logsumexp(0) - count.log() - mean).clamp(min=0)
    consensus = A.abs() / (mean_of(delta_K.abs()) + eps)
    target = mean + consensus * A.abs() / (A.abs() + J + eps) * J if residual else mean
    return target if target.dim() == 1 else target.log_softmax(-1)


@register_target("contrast", sources=("teacher/negative",))
def contrast(inputs: TargetInputs, *, a: float = 0.5, floor: float = -5.0) -> Tensor:
    """q' = softmax((1 + a) log q - a max(log q-, floor)): away from what a wrong reference would
    say (arXiv 2606.11709).

    The floor keeps tokens that are unlikely under both references from being raised. Published
    together with `contrast_weight`.
    """
    (negative_CV,) = inputs.sources.values()
    return ((1.0 + a) * inputs.teacher_logp - a * negative_CV.clamp(min=floor)).log_softmax(-1)


MIXINGS = ("constant", "disagreement")


def _mixed(options: Mapping[str, Any]) -> Sequence[str]:
    if options["mixing"] not in MIXINGS:
        raise UserError(f"mixing must be {' or '.join(MIXINGS)}, got {options['mixing']!r}.")
    return (options["source"],)


@register_target("geometric", sources=_mixed)
def geometric(
    inputs: TargetInputs,
    *,
    source: str = "teacher/plain",
    a: float = 0.05,
    a_end: float | None = None,
    mixing: str = "constant",
    a_max: float = 0.15,
    beta: float = 50.0,
) -> Tensor:
    """q' = softmax((1 - a) log q + a log b), b a second source.

    mixing: `constant` a, or going linearly from a to `a_end` over the run; or `disagreement`, per
    token a = 2 a_max (sigmoid(beta d) - 1/2) with d = JSD(q, b) in nats. Published: b =
    `teacher/plain` of an EMA teacher, per token (DemoPSD, arXiv 2607.02502; its beta is set per
    domain: 25, 50, 70, 100); b = `step/same`, a 0.05 (trust region of SDPO); b = `base/plain`
    (beta-OPSD). With b = `student/plain` and reverse KL the gradient is that of the weight 1 - a.
    """
    (b_CV,) = inputs.sources.values()
    q_CV = inputs.teacher_logp
    if mixing == "disagreement":
        share: Tensor | float = (2.0 * a_max * (torch.sigmoid(beta * jensen_shannon(q_CV, b_CV)) - 0.5))[
            :, None
        ]
    else:
        share = a if a_end is None else a + (a_end - a) * inputs.progress
    return ((1.0 - share) * q_CV + share * b_CV).log_softmax(-1)


@register_target("pmi", sources=("teacher/unconditioned", "base/plain"))
def pmi(inputs: TargetInputs, *, c: float = 10.0, beta: float = 1.0) -> Tensor:
    """q' ~ p_0 exp(c tanh(delta / c) / beta), delta = log q - log q_ref centred over v.

    Experimental (arXiv 2607.02234).

    q_ref: the teacher that sees the reference *without the question*; p_0: the initial model on the
    plain prompt. What the reference says by itself is taken out of the signal. Two further passes.
    Written from notes on the paper, not from its code.
    """
    reference_CV, prior_CV = inputs.sources.values()
    delta_CV = inputs.teacher_logp.clamp(min=LOWEST_LOGP) - reference_CV.clamp(min=LOWEST_LOGP)
    delta_CV = delta_CV - delta_CV.mean(-1, keepdim=True)
    return (prior_CV + c * torch.tanh(delta_CV / c) / beta).log_softmax(-1)


def jensen_shannon(a_CV: Tensor, b_CV: Tensor) -> Tensor:
    """JSD [C] of two distributions given as log-probabilities, in nats: from 0 to log 2."""
    m_CV = torch.logaddexp(a_CV, b_CV) - math.log(2.0)
    halves = [(x.exp() * (x - m_CV)).sum(-1) for x in (a_CV, b_CV)]
    return (0.5 * (halves[0] + halves[1])).clamp(min=0)
