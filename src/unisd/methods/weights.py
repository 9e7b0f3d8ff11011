"""Published token weights that need no further forward pass (for `contrast_weight`: none but the
negative view's).

Each is one pure function of :class:`unisd.methods.scores.StepScores`; evidence and costs are in
`docs/field.md`. Those with `in_forward` look at the student, whose scores come out of the training
pass itself: they are called once per micro-batch, with its rows only.

Shapes: B rows, T completion length. Values in nats. H entropy, D divergence, p student, q teacher,
q- teacher under the wrong reference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unisd.errors import UserError
from unisd.methods.registry import register_weight
from unisd.methods.scores import StepScores


@register_weight("dash", needs=frozenset({"divergence"}), normalizer="tokens", in_forward=True)
def dash(scores: StepScores, *, kappa: float = 5.0) -> Tensor:
    """w_1 = 1, w_t = 1 + lambda_{t-1} w_{t-1}, lambda_t = sigmoid(-kappa (D_t - mean_t D)) (DASH,
    arXiv 2608.06243).

    The loss mean_t w_t D_t is mean_t A_t of the backward recursion A_t = D_t + lambda_t A_{t+1}: a
    token answers for the divergence of what follows, as long as the divergence in between is small.
    D is the run's own, after the entry clip (published: forward KL with entry_clip 0.05). t counts
    loss tokens; the weights are at least 1, so that `mean1` matters more than for others.
    """
    D_BT = _present(scores.divergence, "dash", "divergence")
    count_B1 = scores.mask.sum(-1, keepdim=True).clamp(min=1)
    mean_B1 = torch.where(scores.mask, D_BT, 0.0).sum(-1, keepdim=True) / count_B1
    lambda_BT = torch.sigmoid(-kappa * (D_BT - mean_B1))
    weights_BT = torch.ones_like(D_BT)
    carried_B = torch.zeros_like(D_BT[:, 0]) if D_BT.shape[1] else D_BT.new_zeros(len(D_BT))
    for t in range(D_BT.shape[1]):
        weights_BT[:, t] = 1.0 + carried_B
        carried_B = torch.where(scores.mask[:, t], lambda_BT[:, t] * weights_BT[:, t], carried_B)
    return weights_BT


@register_weight("position", normalizer="tokens")
def position(scores: StepScores, *, w_min: float = 0.25, tau: float = 0.30, s: float = 0.10) -> Tensor:
    """w_t = w_min + (1 - w_min) sigmoid((u - tau) / s), u = (t - 0.5) / T: late tokens count more
    (arXiv 2605.21606).

    t counts the row's loss tokens from 1, T is their number.
    """
    number_BT = scores.mask.cumsum(-1)
    u_BT = (number_BT - 0.5) / number_BT[:, -1:].clamp(min=1)
    return w_min + (1.0 - w_min) * torch.sigmoid((u_BT - tau) / s)


@register_weight("confidence_gate", needs=frozenset({"student"}), normalizer="weights")
def confidence_gate(scores: StepScores, *, threshold: float = 0.99) -> Tensor:
    """g = 1[p(y_t) <= threshold], divided by its own sum: tokens that the student is sure of are
    left out (arXiv 2609.39687).

    p is taken at the distillation temperature. A row that is gated out altogether counts as one
    without loss tokens. Where the student itself writes, without top_p, top_k and min_p, the
    rollout tells p; elsewhere it costs a student pass without gradient.
    """
    logp_BT = _present(scores.student_logp, "confidence_gate", "student")
    return (logp_BT <= math.log(threshold)).to(logp_BT.dtype)


@register_weight("entropy_trust", needs=frozenset({"entropy"}), normalizer="mean1")
def entropy_trust(scores: StepScores, *, beta: float = 1.0) -> Tensor:
    """w = exp(-beta H(q)), divided by its mean: tokens on which the teacher is sure count more
    (arXiv 2604.02288).
    """
    return torch.exp(-beta * _present(scores.teacher_entropy, "entropy_trust", "entropy"))


@register_weight("contrast_weight", needs=frozenset({"negative", "contrast"}), normalizer="tokens")
def contrast_weight(scores: StepScores) -> Tensor:
    """w = KL(q||q-) / (KL(q||q-) + 1): a token matters where right and wrong reference part (arXiv
    2606.11709).

    Rows without a wrong reference have weight 1. Costs one more projection of the teacher's states
    to the vocabulary.
    """
    kl_BT = _present(scores.negative_divergence, "contrast_weight", "contrast").clamp(min=0)
    present_B = _present(scores.negative_present, "contrast_weight", "negative")
    return torch.where(present_B[:, None], kl_BT / (kl_BT + 1.0), 1.0)


def _present(value: Tensor | None, weight: str, need: str) -> Tensor:
    if value is None:
        raise UserError(f"token weight {weight!r} needs {need!r}, but this step was not scored for it.")
    return value
