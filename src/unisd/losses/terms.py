"""What a loss is made of, token by token: the same for the plain and the chunked form of
:mod:`unisd.losses`.

Shapes: N loss tokens of a micro-batch or C tokens of a chunk, V vocabulary, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unisd.losses.head import Head
from unisd.methods.divergence import DivergenceSpec, log_probs, pick
from unisd.methods.scores import TargetInputs
from unisd.methods.targets import STUDENT, Source, Target
from unisd.methods.terms import Contrast, contrast_hinge

# ---------------------------------------------------------------------------------- inside the loss


@dataclass(frozen=True, eq=False)
class TargetStates:
    """A target and what it needs of N tokens: per source final hidden states `[N,H]` and their
    head, or realised log-probs `[N]`.
    """

    target: Target
    states: Mapping[Source, Tensor]
    heads: Mapping[Source, Head]
    present_N: Tensor  # bool; where a row lacks a source, the target is the teacher's own distribution
    progress: float = 0.0

    def rows(self, rows: slice) -> TargetStates:
        """The same for a slice of the tokens."""
        return replace(
            self,
            states={name: value[rows] for name, value in self.states.items()},
            present_N=self.present_N[rows],
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
        changed = self.target(TargetInputs(student, teacher, sources, self.progress)).to(teacher.dtype)
        present = self.present_N if realised else self.present_N[:, None]
        changed = torch.where(present, changed, teacher)
        return teacher_logp_NV.scatter(-1, targets_N[:, None], changed[:, None]) if realised else changed

    def _source(self, source: Source, targets_N: Tensor, spec: DivergenceSpec, realised: bool) -> Tensor:
        value = self.states[source]
        if value.dim() == 1:
            return value
        logp_NV = log_probs(self.heads[source].logits(value), spec.temperature)
        return pick(logp_NV, targets_N) if realised else logp_NV


# From (D, l, H(p)) [N] of all tokens, without gradient, to a factor [N] of their coefficients:
# weights that look at the student
Reweigh = Callable[[Tensor, Tensor, Tensor], Tensor]


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
    # bool: the hinge has a gradient (l between l- and l+); None without contrast
    contrast_active_N: Tensor | None
    contrast_N: Tensor | None  # h


@dataclass(frozen=True, eq=False)
class LossInputs:
    """Everything a loss is made of, for N tokens or for the C tokens of a chunk."""

    student_hidden_NH: Tensor
    student_head: Head
    teacher_hidden_NH: Tensor
    teacher_head: Head
    targets_N: Tensor
    spec: DivergenceSpec
    coefficient_N: Tensor
    token_clip: float | None
    contrast: Contrast | None
    target: TargetStates | None = None
    reweigh: Reweigh | None = None

    def rows(self, rows: slice) -> LossInputs:
        return replace(
            self,
            student_hidden_NH=self.student_hidden_NH[rows],
            teacher_hidden_NH=self.teacher_hidden_NH[rows],
            targets_N=self.targets_N[rows],
            coefficient_N=self.coefficient_N[rows],
            contrast=None if self.contrast is None else self.contrast.rows(rows),
            target=None if self.target is None else self.target.rows(rows),
        )

    def divided_by(self, unit: Tensor) -> LossInputs:
        contrast = self.contrast
        if contrast is not None:
            contrast = replace(contrast, coefficient_N=contrast.coefficient_N / unit)
        return replace(self, coefficient_N=self.coefficient_N / unit, contrast=contrast)


@dataclass(frozen=True, eq=False)
class TokenTerms:
    """What follows from D and l of each token, the same for the plain and the chunked form."""

    loss: Tensor
    clipped_N: Tensor
    hinge_N: Tensor | None
    slope_divergence_N: Tensor  # d loss / d D
    slope_logp_N: Tensor | None  # d loss / d l, from the contrast

    def output(
        self, loss: Tensor, divergence_N: Tensor, logp_N: Tensor, entropy_N: Tensor, teacher_logp_N: Tensor
    ) -> LossOutput:
        active_N = None if self.slope_logp_N is None else self.slope_logp_N != 0
        hinge_N = None if self.hinge_N is None else self.hinge_N.detach()
        values = (divergence_N.detach(), logp_N.detach(), entropy_N.detach(), teacher_logp_N)
        return LossOutput(loss, *values, self.clipped_N, active_N, hinge_N)


def token_terms(
    inputs: LossInputs, divergence_N: Tensor, logp_N: Tensor, teacher_logp_N: Tensor
) -> TokenTerms:
    """`sum_N coefficient * min(D, token_clip) + sum_N contrast.coefficient * h`, and its slopes."""
    cap = math.inf if inputs.token_clip is None else inputs.token_clip
    clipped_N = divergence_N.detach() > cap
    loss = (inputs.coefficient_N * divergence_N.clamp(max=cap)).sum()
    slope_divergence_N = torch.where(clipped_N, 0.0, inputs.coefficient_N).to(divergence_N.dtype)
    contrast = inputs.contrast
    if contrast is None:
        return TokenTerms(loss, clipped_N, None, slope_divergence_N, None)
    contrast = contrast.against(teacher_logp_N)
    assert contrast.teacher_logp_N is not None
    hinge_N = contrast_hinge(logp_N, contrast)
    loss = loss + (contrast.coefficient_N * hinge_N).sum()
    l_N = logp_N.detach()
    direction_N = (l_N - contrast.teacher_logp_N).sign() - (l_N - contrast.negative_logp_N).sign()
    slope_logp_N = torch.where(hinge_N.detach() > 0, contrast.coefficient_N * direction_N, 0.0).to(
        logp_N.dtype
    )
    return TokenTerms(loss, clipped_N, hinge_N, slope_divergence_N, slope_logp_N)


# A chunk's (D, l, H(p), l+), each [C], and the gradient [C,V] of its loss in the student's
# projected hidden states
ChunkResult = tuple[tuple[Tensor, ...], Tensor | None]
