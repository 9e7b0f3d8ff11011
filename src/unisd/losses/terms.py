"""What a loss is made of, token by token: the same for the plain and the chunked form of
:mod:`unisd.losses`.

Shapes: N loss tokens of a micro-batch or C tokens of a chunk, V vocabulary, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unisd.errors import UserError
from unisd.losses.head import Head
from unisd.methods.divergence import DivergenceSpec, pick
from unisd.methods.registry import Term
from unisd.methods.scores import TargetInputs, TermInputs
from unisd.methods.targets import STUDENT, Source, Target
from unisd.methods.terms import above_clip

# ---------------------------------------------------------------------------------- inside the loss


@dataclass(frozen=True, eq=False)
class TargetStates:
    """A target and what it needs of N tokens: per source final hidden states `[N,H]` and their
    head, or realised log-probs `[N]`.
    """

    target: Target
    states: Mapping[Source, Tensor]
    heads: Mapping[Source, Head]
    # [N] bool: which tokens have it; where one is lacking, the target is the teacher's distribution
    present: Mapping[Source, Tensor]
    progress: float = 0.0

    def rows(self, rows: slice) -> TargetStates:
        """The same for a slice of the tokens."""
        return replace(
            self,
            states={name: value[rows] for name, value in self.states.items()},
            present={name: present_N[rows] for name, present_N in self.present.items()},
        )

    def with_heads(self, change: Callable[[Head], Head]) -> TargetStates:
        return replace(self, heads={name: change(head) for name, head in self.heads.items()})

    @torch.no_grad()
    def logp(
        self, student_logp_NV: Tensor, teacher_logp_NV: Tensor, targets_N: Tensor, spec: DivergenceSpec
    ) -> Tensor:
        """log q' [N,V]; where only realised tokens are scored, the teacher's with log q' at
        those.
        """
        realised = self.target.realised and spec.mode == "sampled"
        student, teacher = student_logp_NV.detach(), teacher_logp_NV
        if realised:
            student, teacher = pick(student, targets_N), pick(teacher, targets_N)
        sources: dict[str, Tensor] = {}
        for source in self.target.sources:
            if source == STUDENT:
                sources[str(source)] = student
            elif source in self.states:
                sources[str(source)] = self._source(source, targets_N, spec, realised)
            else:  # the teacher itself
                sources[str(source)] = teacher
        present = {str(source): present_N for source, present_N in self.present.items()}
        inputs = TargetInputs(student, teacher, sources, self.progress, present)
        changed = self.target(inputs).to(teacher.dtype)
        if present:
            of_sources = torch.stack(list(present.values()))
            served_N = of_sources.any(0) if self.target.partial else of_sources.all(0)
            changed = torch.where(served_N if realised else served_N[:, None], changed, teacher)
        return teacher_logp_NV.scatter(-1, targets_N[:, None], changed[:, None]) if realised else changed

    def _source(self, source: Source, targets_N: Tensor, spec: DivergenceSpec, realised: bool) -> Tensor:
        value = self.states[source]
        if value.dim() == 1:
            return value
        logp_NV = self.heads[source].log_probs(value, spec.temperature)
        return pick(logp_NV, targets_N) if realised else logp_NV


# From (D, l, H(p)) [N] of all tokens, without gradient, to a factor [N] of their coefficients:
# weights that look at the student
DeferredFactor = Callable[[Tensor, Tensor, Tensor], Tensor]


TokenValues = tuple[Tensor, Tensor, Tensor, Tensor]
"""(D, l, H(p), l+), each [N], at the distillation temperature."""


@dataclass(frozen=True, eq=False)
class LossTerm:
    """A term of the loss and what it needs of N tokens beside the loss's own values."""

    term: Term
    coefficient_N: Tensor  # the term's own times the normaliser; 0 where the row lacks the term
    negative_logp_N: Tensor | None = None  # l-; any value where the coefficient is 0

    def rows(self, rows: slice) -> LossTerm:
        """The same for a slice of the tokens."""
        negative_N = None if self.negative_logp_N is None else self.negative_logp_N[rows]
        return replace(self, coefficient_N=self.coefficient_N[rows], negative_logp_N=negative_N)

    def values(self, values: TokenValues, hidden: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
        """The term [N]; 0 where the row lacks it."""
        absent_N = self.coefficient_N == 0
        return self.term(self._inputs(values, absent_N, hidden)).masked_fill(absent_N, 0.0)

    def _inputs(
        self, values: TokenValues, absent_N: Tensor, hidden: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> TermInputs:
        divergence_N, logp_N, entropy_N, teacher_logp_N = values
        negative_N = self.negative_logp_N
        if negative_N is not None:  # an absent one may be NaN
            negative_N = negative_N.masked_fill(absent_N, 0.0)
        constant = (teacher_logp_N.detach(), entropy_N.detach(), divergence_N.detach())
        return TermInputs(logp_N, *constant, negative_N, hidden)

    def slope(self, values: TokenValues) -> Tensor:
        """d loss / d l [N]."""
        divergence_N, logp_N, entropy_N, teacher_logp_N = values
        if self.term.derivative is not None:
            slope_N = self.term.derivative(self._inputs(values, self.coefficient_N == 0), **self.term.options)
            if slope_N.shape != logp_N.shape:
                raise UserError(
                    f"the derivative of loss term {self.term.name!r} must return shape {tuple(logp_N.shape)},"
                    f" but returned {tuple(slope_N.shape)}."
                )
            return self.coefficient_N * slope_N
        with torch.enable_grad():
            leaf_N = logp_N.detach().requires_grad_()
            value_N = self.values((divergence_N, leaf_N, entropy_N, teacher_logp_N))
            if not value_N.requires_grad:
                return torch.zeros_like(logp_N)
            (slope_N,) = torch.autograd.grad((self.coefficient_N * value_N).sum(), leaf_N)
        return slope_N


@dataclass(frozen=True, eq=False)
class TermOutput:
    """What a term was at N tokens, without gradient."""

    values_N: Tensor
    coefficient_N: Tensor
    active_N: Tensor | None  # bool: it has a gradient in l; None of a term of hidden states


@dataclass(frozen=True, eq=False)
class LossOutput:
    """Loss of a micro-batch and, detached, its per-token quantities at the distillation
    temperature.
    """

    loss: Tensor  # [] differentiable; a sum, normalised by the coefficients
    divergence_N: Tensor  # D after the entry clip, before the token clip
    student_logp_N: Tensor  # l
    student_entropy_N: Tensor  # H(p)
    teacher_logp_N: Tensor  # l+
    clipped_N: Tensor  # bool: D exceeds the token clip, gradient zero
    terms: Mapping[str, TermOutput]  # by name

    def with_hidden_terms(
        self, terms: Sequence[LossTerm], hidden: Sequence[tuple[Tensor, Tensor]]
    ) -> LossOutput:
        """Add terms that look at pairs of hidden states `[N,H]` of student and teacher."""
        values = (self.divergence_N, self.student_logp_N, self.student_entropy_N, self.teacher_logp_N)
        loss, found = self.loss, dict(self.terms)
        for term in terms:
            values_N = term.values(values, hidden)
            loss = loss + (term.coefficient_N * values_N).sum()
            found[term.term.name] = TermOutput(values_N.detach(), term.coefficient_N, None)
        return replace(self, loss=loss, terms=found)


@dataclass(frozen=True, eq=False)
class LossInputs:
    """Everything a loss is made of, for N tokens or for the C tokens of a chunk."""

    student_hidden_NH: Tensor
    student_head: Head
    teacher_hidden_NH: Tensor  # H may differ from the student's
    teacher_head: Head
    targets_N: Tensor  # the realised tokens
    spec: DivergenceSpec
    # without gradient: mask, reliability weights and the normaliser of the whole optimizer step
    coefficient_N: Tensor
    # cap on a token's D in nats; above it the gradient is zero
    token_clip: float | None = None
    # those whose gradient flows through l
    terms: tuple[LossTerm, ...] = ()
    # takes the place of the teacher's distribution in D
    target: TargetStates | None = None
    # a further factor of each coefficient, from the values of this very pass
    deferred: DeferredFactor | None = None
    # bool: the tokens above the clip, where a scoring pass has told; None: this pass tells
    clipped_N: Tensor | None = None

    def rows(self, rows: slice) -> LossInputs:
        return replace(
            self,
            student_hidden_NH=self.student_hidden_NH[rows],
            teacher_hidden_NH=self.teacher_hidden_NH[rows],
            targets_N=self.targets_N[rows],
            coefficient_N=self.coefficient_N[rows],
            clipped_N=None if self.clipped_N is None else self.clipped_N[rows],
            terms=tuple(term.rows(rows) for term in self.terms),
            target=None if self.target is None else self.target.rows(rows),
        )

    def with_outcomes(self) -> LossInputs:
        """The same with realised outcomes for tokens: all ends of an answer are one."""
        return replace(self, targets_N=self.student_head.outcomes(self.targets_N))

    def divided_by(self, unit: Tensor) -> LossInputs:
        terms = tuple(replace(term, coefficient_N=term.coefficient_N / unit) for term in self.terms)
        return replace(self, coefficient_N=self.coefficient_N / unit, terms=terms)


# ----------------------------- what follows from D and l of each token, for plain and chunked form


def total(inputs: LossInputs, values: TokenValues) -> Tensor:
    """`sum_N coefficient * min(D, token_clip)` and the same sum of each term."""
    divergence_N = values[0]
    if inputs.token_clip is not None:
        divergence_N = divergence_N.masked_fill(_clipped(inputs, divergence_N), inputs.token_clip)
    loss = (inputs.coefficient_N * divergence_N).sum()
    for term in inputs.terms:
        loss = loss + (term.coefficient_N * term.values(values)).sum()
    return loss


def slopes(inputs: LossInputs, values: TokenValues) -> tuple[Tensor, Tensor | None]:
    """d loss / d D [N] and, from the terms, d loss / d l [N]."""
    divergence_N, logp_N = values[0], values[1]
    clipped_N = _clipped(inputs, divergence_N)
    slope_divergence_N = inputs.coefficient_N.masked_fill(clipped_N, 0.0).to(divergence_N.dtype)
    slopes_N = [term.slope(values).to(logp_N.dtype) for term in inputs.terms]
    return slope_divergence_N, sum(slopes_N[1:], slopes_N[0]) if slopes_N else None


def output(inputs: LossInputs, loss: Tensor, values: TokenValues) -> LossOutput:
    """What a loss function returns."""
    detached = tuple(value.detach() for value in values)
    divergence_N, logp_N, entropy_N, teacher_logp_N = detached
    known = (divergence_N, logp_N, entropy_N, teacher_logp_N)
    terms = {
        term.term.name: TermOutput(
            term.values(known).detach(), term.coefficient_N, term.slope(known).to(logp_N.dtype) != 0
        )
        for term in inputs.terms
    }
    return LossOutput(loss, *known, _clipped(inputs, divergence_N), terms)


def _clipped(inputs: LossInputs, divergence_N: Tensor) -> Tensor:
    if inputs.clipped_N is not None:
        return inputs.clipped_N
    return above_clip(divergence_N, math.inf if inputs.token_clip is None else inputs.token_clip)


# A chunk's (D, l, H(p), l+), each [C], and the gradient [C,V] of its loss in the student's
# projected hidden states
ChunkResult = tuple[TokenValues, Tensor | None]
