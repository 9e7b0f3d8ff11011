"""The equations of the divergence and the token-level contrast (UniSD, arXiv 2605.06597, Eq. 4-5
and 7-8).

Small functions of log-probabilities, differentiable by autograd; :mod:`unisd.losses` makes the loss
of them.

Shapes: N loss tokens of a micro-batch, V vocabulary, K entries of a top-k support, H hidden size.
Notation: p student, q teacher, M their mixture; l log-probability of the realised token; logs are
natural, values in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unisd.errors import UserError

# stands in for -inf (a vocabulary entry ruled out), so that 0 * (log q - log p) is 0 and not NaN
LOWEST_LOGIT = -1e30


def at_least_float32(x: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def log_probs(logits_NV: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature)."""
    return F.log_softmax(logits_NV if temperature == 1.0 else logits_NV / temperature, dim=-1)


def pick(logp_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Each row's entry at its realised token."""
    return logp_NV.gather(-1, targets_N[:, None]).squeeze(-1)


def entropy(logp_NV: Tensor) -> Tensor:
    """H = -sum_v p log p."""
    return -(logp_NV.exp() * logp_NV).sum(-1)


@dataclass(frozen=True)
class DivergenceSpec:
    """Which divergence D of student p from teacher q is taken (Eq. 7-8).

    alpha: 0 is the forward KL(q||p), 1 the reverse KL(p||q); between, with
        M = (1-alpha) p + alpha q, `alpha KL(q||M) + (1-alpha) KL(p||M)`. As published this is *not*
        continuous at its ends: value and gradient vanish like alpha and 1-alpha, so that 0.001 is
        no forward KL but almost no training at all. Values within 0.01 of an end are refused.
    mode: `full` vocabulary; `topk` entries of one side; `sampled`, the realised token only (reverse
        KL as a score function: value l - l+, gradient sg(l - l+) * grad l); `nll`, no teacher at
        all: D = -l (SFT, SSD).
    topk, add_tail, topk_support: size of the support, whether one bucket holds the mass outside it
        (else both sides are renormalised on the support), and whose largest entries make the
        support (`teacher` or `student`).
    topk_estimator: `support`, the divergence of the support alone; `residual` (reverse KL),
        corrected by the realised token where it lies outside, so that value and gradient are those
        of the whole vocabulary on average over the student's samples (ResOPD, arXiv 2610.04882).
    entry_clip: cap on every vocabulary entry's summand of D, in nats (OPSD: 0.05). It is one-sided:
        D can become negative, and a clipped entry's logit gets gradient
        `p_v * (sum of the unclipped q)`, which pushes the teacher's favourite token slightly *down*
        where the two disagree most. The cap on a token's whole sum is another object, the losses'
        `token_clip`.
    temperature: divides both sides' logits.
    """

    alpha: float = 0.0
    mode: str = "full"
    topk: int = 100
    add_tail: bool = True
    topk_support: str = "teacher"
    topk_estimator: str = "support"
    entry_clip: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise UserError(
                f"distillation_alpha must lie in [0, 1] (0 forward KL, 1 reverse KL), got {self.alpha}."
            )
        if 0.0 < self.alpha < 0.01 or 0.99 < self.alpha < 1.0:
            end = "0 (forward KL)" if self.alpha < 0.5 else "1 (reverse KL)"
            raise UserError(
                f"distillation_alpha={self.alpha} is within 0.01 of an end, where the mixture divergence and"
                f" its gradient vanish: use {end} itself, or a value in [0.01, 0.99]."
            )
        if self.mode not in ("full", "topk", "sampled", "nll"):
            raise UserError(f"distillation_mode must be full, topk, sampled or nll, got {self.mode!r}.")
        if self.topk_support not in ("teacher", "student"):
            raise UserError(
                f"distillation_topk_support must be teacher or student, got {self.topk_support!r}."
            )
        if self.topk_estimator not in ("support", "residual"):
            raise UserError(f"topk_estimator must be support or residual, got {self.topk_estimator!r}.")
        if self.topk_estimator == "residual":
            self._check_residual()
        if self.topk < 1:
            raise UserError(f"distillation_topk must be at least 1, got {self.topk}.")
        if self.entry_clip is not None and not self.entry_clip > 0.0:
            raise UserError(
                f"entry_clip must be positive (unset it to switch it off), got {self.entry_clip}."
            )
        if not self.temperature > 0.0:
            raise UserError(f"temperature must be positive for distillation, got {self.temperature}.")
        if self.mode == "sampled" and self.alpha != 1.0:
            raise UserError(
                "distillation_mode=sampled estimates the reverse KL only: set distillation_alpha=1, got"
                f" {self.alpha}."
            )
        if self.mode == "sampled" and self.entry_clip is not None:
            raise UserError("distillation_mode=sampled has no vocabulary entries to clip: unset entry_clip.")

    def _check_residual(self) -> None:
        if self.mode != "topk" or self.alpha != 1.0 or not self.add_tail:
            raise UserError(
                "topk_estimator=residual estimates the reverse KL from a support with a tail: set"
                " distillation_mode=topk, distillation_alpha=1 and distillation_add_tail."
            )
        if self.entry_clip is not None:
            raise UserError("topk_estimator=residual has a sampled part: unset entry_clip.")


def divergence_bound(alpha: float) -> float:
    """Largest D: H_b(alpha) = -alpha log alpha - (1-alpha) log(1-alpha) for the mixture, infinite
    for either KL.
    """
    if alpha in (0.0, 1.0):
        return math.inf
    return -alpha * math.log(alpha) - (1.0 - alpha) * math.log1p(-alpha)


def check_token_clip(spec: DivergenceSpec, token_clip: float | None) -> None:
    """Refuse a static token clip that can never bind, or that has no meaning."""
    if token_clip is None:
        return
    if not token_clip > 0.0:
        raise UserError(f"token_clip must be positive (unset it to switch it off), got {token_clip}.")
    if spec.mode == "sampled":
        raise UserError(
            "distillation_mode=sampled cannot be clipped (its value is one signed log-ratio): unset"
            " token_clip."
        )
    if spec.topk_estimator == "residual":
        raise UserError("topk_estimator=residual cannot be clipped (it is an estimate): unset token_clip.")
    bound = divergence_bound(spec.alpha)
    if token_clip >= bound and bound < math.inf:
        raise UserError(
            f"token_clip={token_clip} can never bind: for distillation_alpha={spec.alpha} the divergence is"
            f" at most {bound:.3f} nats. Use a smaller value or token_clip_quantile=0.99."
        )


def divergence(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, targets_N: Tensor, spec: DivergenceSpec
) -> Tensor:
    """D [N] after the entry clip, differentiable in the student's logits; the temperature divides
    both sides.
    """
    student_logp_NV = log_probs(at_least_float32(student_logits_NV).clamp(min=LOWEST_LOGIT), spec.temperature)
    teacher_logp_NV = log_probs(
        at_least_float32(teacher_logits_NV).detach().clamp(min=LOWEST_LOGIT), spec.temperature
    )
    return divergence_of_logp(student_logp_NV, teacher_logp_NV, targets_N, spec)


def divergence_of_logp(
    student_logp_NV: Tensor, teacher_logp_NV: Tensor, targets_N: Tensor, spec: DivergenceSpec
) -> Tensor:
    """The same from log-probabilities at the distillation temperature."""
    if spec.mode == "nll":
        return -pick(student_logp_NV, targets_N)
    if spec.mode == "sampled":
        l_N, teacher_l_N = pick(student_logp_NV, targets_N), pick(teacher_logp_NV, targets_N)
        return _score_function(l_N - teacher_l_N, l_N)
    residual_N = None
    if spec.mode == "topk":
        owner_NV = teacher_logp_NV if spec.topk_support == "teacher" else student_logp_NV.detach()
        support_NK = owner_NV.topk(min(spec.topk, owner_NV.shape[-1]), dim=-1).indices
        if spec.topk_estimator == "residual":
            residual_N = _residual(student_logp_NV, teacher_logp_NV, support_NK, targets_N)
        student_logp_NV = _on_support(student_logp_NV, support_NK, spec.add_tail)
        teacher_logp_NV = _on_support(teacher_logp_NV, support_NK, spec.add_tail)
    summand_NV = _summands(student_logp_NV, teacher_logp_NV, spec.alpha)
    if spec.entry_clip is not None:
        summand_NV = summand_NV.clamp(max=spec.entry_clip)
    total_N = summand_NV.sum(-1)
    return total_N if residual_N is None else total_N + residual_N


def _score_function(ratio: Tensor, logp: Tensor) -> Tensor:
    """Value r, gradient sg(r) * grad log p."""
    ratio = ratio.detach()
    return ratio + ratio * (logp - logp.detach())


def _residual(logp_NV: Tensor, logq_NV: Tensor, support_NK: Tensor, targets_N: Tensor) -> Tensor:
    """What the support's tail, taken as one outcome, says wrong of a realised token A outside of
    it: `1[A not in S] (r_A s_A - mu)`, r = log p/q, s = grad log p, and mu the same of the tail.

    On average over A ~ p it turns the divergence on the support into that of the whole vocabulary.
    """
    if support_NK.shape[-1] == logp_NV.shape[-1]:
        return torch.zeros_like(logp_NV[:, 0])
    outside_N = (support_NK != targets_N[:, None]).all(-1)
    tail_N, teacher_tail_N = (
        logp.scatter(-1, support_NK, -math.inf).logsumexp(-1) for logp in (logp_NV, logq_NV)
    )
    l_N = pick(logp_NV, targets_N)
    own_N = _score_function(l_N - pick(logq_NV, targets_N), l_N)
    return torch.where(outside_N, own_N - _score_function(tail_N - teacher_tail_N, tail_N), 0.0)


def _summands(logp_NV: Tensor, logq_NV: Tensor, alpha: float) -> Tensor:
    """Every vocabulary entry's contribution to D."""
    if alpha == 0.0:
        return logq_NV.exp() * (logq_NV - logp_NV)
    if alpha == 1.0:
        return logp_NV.exp() * (logp_NV - logq_NV)
    logm_NV = torch.logaddexp(logp_NV + math.log1p(-alpha), logq_NV + math.log(alpha))
    return alpha * logq_NV.exp() * (logq_NV - logm_NV) + (1.0 - alpha) * logp_NV.exp() * (logp_NV - logm_NV)


def _on_support(logp_NV: Tensor, support_NK: Tensor, add_tail: bool) -> Tensor:
    """Log-probabilities on a support of K entries: renormalised, or with one more bucket for
    everything else.

    The bucket is summed from its own entries, not taken as log(1 - sum): exact however little mass
    it holds.
    """
    on_support_NK = logp_NV.gather(-1, support_NK)
    if not add_tail:
        return on_support_NK - on_support_NK.logsumexp(-1, keepdim=True)
    if support_NK.shape[-1] == logp_NV.shape[-1]:
        return on_support_NK  # the whole vocabulary: no tail
    tail_N1 = logp_NV.scatter(-1, support_NK, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([on_support_NK, tail_N1], dim=-1)
