"""What a loss is made of, token by token: the same for the plain and the chunked form of :mod:`unisd.losses`.

Shapes: N loss tokens of a micro-batch or C tokens of a chunk, V vocabulary, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unisd.divergences import Contrast, DivergenceSpec, Head, contrast_hinge
from unisd.targets import TargetStates

# From (D, l, H(p)) [N] of all tokens, without gradient, to a factor [N] of their coefficients: weights that look at the student
Reweigh = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LossOutput:
    """Loss of a micro-batch and, detached, its per-token quantities at the distillation temperature."""

    loss: Tensor  # [] differentiable; a sum, normalised by the coefficients
    divergence_N: Tensor  # D after the entry clip, before the token clip
    student_logp_N: Tensor  # l
    student_entropy_N: Tensor  # H(p)
    teacher_logp_N: Tensor  # l+
    clipped_N: Tensor  # bool: D exceeds the token clip, gradient zero
    contrast_active_N: Tensor | None  # bool: the hinge has a gradient (l between l- and l+); None without contrast
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

    def output(self, loss: Tensor, divergence_N: Tensor, logp_N: Tensor, entropy_N: Tensor, teacher_logp_N: Tensor) -> LossOutput:
        active_N = None if self.slope_logp_N is None else self.slope_logp_N != 0
        hinge_N = None if self.hinge_N is None else self.hinge_N.detach()
        values = (divergence_N.detach(), logp_N.detach(), entropy_N.detach(), teacher_logp_N)
        return LossOutput(loss, *values, self.clipped_N, active_N, hinge_N)


def token_terms(inputs: LossInputs, divergence_N: Tensor, logp_N: Tensor, teacher_logp_N: Tensor) -> TokenTerms:
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
    slope_logp_N = torch.where(hinge_N.detach() > 0, contrast.coefficient_N * direction_N, 0.0).to(logp_N.dtype)
    return TokenTerms(loss, clipped_N, hinge_N, slope_divergence_N, slope_logp_N)


# A chunk's (D, l, H(p), l+), each [C], and the gradient [C,V] of its loss in the student's projected hidden states
ChunkResult = tuple[tuple[Tensor, ...], Tensor | None]
