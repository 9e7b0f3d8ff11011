"""C. contrast (Eq. 4-5), D. features (Eq. 6) and E. clipping: what stands beside the divergence in
the loss.

A *term* of the loss is one pure function `(TermInputs, **options) -> values [N]`, registered by
name with :func:`unisd.methods.registry.register_term`, or by another package under the entry point
group `unisd.terms`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unisd.methods.registry import register_term
from unisd.methods.scores import TermInputs


def _contrast_derivative(inputs: TermInputs, *, margin: float = 0.5) -> Tensor:
    assert inputs.negative_logp is not None
    right, wrong = inputs.student_logp - inputs.teacher_logp, inputs.student_logp - inputs.negative_logp
    return (right.sign() - wrong.sign()) * (margin + (right.abs() - wrong.abs()) > 0)


@register_term("contrast", needs=frozenset({"negative"}), derivative=_contrast_derivative)
def contrast(inputs: TermInputs, *, margin: float = 0.5) -> Tensor:
    """h = relu(margin + |l - l+| - |l - l-|) (Eq. 4-5): towards the reference, away from a wrong
    one.

    Its gradient is zero unless l lies strictly between l- and l+ (elsewhere the two distances move
    together).
    """
    assert inputs.negative_logp is not None
    right, wrong = inputs.student_logp - inputs.teacher_logp, inputs.student_logp - inputs.negative_logp
    return torch.relu(margin + (right.abs() - wrong.abs()))


@register_term("features", needs=frozenset({"hidden"}))
def features(inputs: TermInputs) -> Tensor:
    """Squared distance of student and teacher features (Eq. 6), the mean over layers and hidden
    size.
    """
    return torch.stack([feature_distance(student, teacher) for student, teacher in inputs.hidden]).mean(0)


@register_term("nsd", needs=frozenset({"negative"}))
def nsd(inputs: TermInputs, *, kl: float = 0.01) -> Tensor:
    """NSD (arXiv 2609.11699): G / (2 - p) + kl p_ref log(p_ref / p), away from a bad self.

    Of the realised token: p the student's probability, p_ref the teacher's, p_neg that under a
    wrong reference, G = max(0, p_neg - p_ref). As published with a fixed teacher that is told
    nothing (`teacher_model_kind=base`, `teacher_context=plain`) and without the divergence
    (`distillation_weight=0`).
    """
    assert inputs.negative_logp is not None
    reference_N = inputs.teacher_logp.exp()
    excess_N = torch.relu(inputs.negative_logp.exp() - reference_N)
    pull_N = reference_N * (inputs.teacher_logp - inputs.student_logp)
    return excess_N / (2 - inputs.student_logp.exp()) + kl * pull_N


# ---------------------------------------------------------------------------------- clipping (E)


def quantile_clip(divergence: Tensor, mask: Tensor, q: float) -> float | None:
    """The token clip kappa as the q-quantile of D [B,T] over the step's loss tokens; None when
    there are none. (Published code takes at least 1e-6.)
    """
    return _quantile(divergence[mask], q)


def above_clip(divergence: Tensor, clip: float) -> Tensor:
    """Say which tokens a clip kappa cuts: those above it by more than rounding.

    Answers that begin alike have tokens of one divergence, often right at the quantile. Rounding
    parts them by some 1e-7 nats, and by up to 2.6e-6 of large values (measured over layouts, in
    float32), which the tolerance is four times of; it must not decide which one loses its gradient.
    """
    return divergence.detach() > clip + 1e-5 * max(clip, 0.1)


def _quantile(values: Tensor, q: float) -> float | None:
    """Quantile of a flat tensor with linear interpolation, of any size (`torch.quantile` stops at
    16M elements).
    """
    if values.numel() == 0:
        return None
    position = q * (values.numel() - 1)
    low = math.floor(position)
    below = values.kthvalue(low + 1).values.item()
    if position == low:
        return below
    above = values.kthvalue(low + 2).values.item()
    return below + (above - below) * (position - low)


def feature_distance(student_NH: Tensor, teacher_NH: Tensor) -> Tensor:
    """Eq. 6: squared distance of student and teacher features [N], as a mean over the hidden size.

    A mean, so that one weight means the same for every model. In float32 (float64 stays); no
    gradient to the teacher.
    """
    dtype = torch.promote_types(student_NH.dtype, torch.float32)
    return (student_NH.to(dtype) - teacher_NH.detach().to(dtype)).square().mean(-1)
