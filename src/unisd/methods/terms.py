"""C. contrast (Eq. 4-5), D. features (Eq. 6) and E. clipping: what stands beside the divergence in
the loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Contrast:
    """What the token-level contrast (Eq. 4-5) needs besides the student's l, at the distillation
    temperature.
    """

    # l+; None: taken from the teacher's own logits, which the divergence projects anyway
    teacher_logp_N: Tensor | None
    negative_logp_N: Tensor  # l-; any value where the coefficient is 0
    coefficient_N: Tensor  # lambda and the normaliser; 0 where the row has no negative
    margin: float

    def rows(self, rows: slice) -> Contrast:
        """The same for a slice of the tokens."""
        teacher_logp_N = None if self.teacher_logp_N is None else self.teacher_logp_N[rows]
        return Contrast(teacher_logp_N, self.negative_logp_N[rows], self.coefficient_N[rows], self.margin)

    def against(self, teacher_logp_N: Tensor) -> Contrast:
        """The same with l+ filled in, where it was left open."""
        return self if self.teacher_logp_N is not None else replace(self, teacher_logp_N=teacher_logp_N)


def contrast_hinge(student_logp_N: Tensor, contrast: Contrast) -> Tensor:
    """h = relu(margin + |l - l+| - |l - l-|) (Eq. 4-5), 0 where the row has no negative.

    Its gradient is zero unless l lies strictly between l- and l+ (elsewhere the two distances move
    together).
    """
    assert contrast.teacher_logp_N is not None
    present_N = contrast.coefficient_N != 0
    negative_N = torch.where(present_N, contrast.negative_logp_N, 0.0)  # an absent negative may be NaN
    distance_N = (student_logp_N - contrast.teacher_logp_N).abs() - (student_logp_N - negative_N).abs()
    return torch.where(present_N, torch.relu(contrast.margin + distance_N), 0.0)


# ----------------------------------------------------------------------------------- clipping (E)
# and features (D)


def quantile_clip(divergence: Tensor, mask: Tensor, q: float) -> float | None:
    """The token clip kappa as the q-quantile of D [B,T] over the step's loss tokens; None when
    there are none.
    """
    return _quantile(divergence[mask], q)


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
