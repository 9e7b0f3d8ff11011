"""Agreement (mechanism A; arXiv 2605.06597, Eq. 1-2): tokens count on which the model agrees with
itself under several contexts.

Shapes: B rows of the step, T completion length, K auxiliary contexts. Values in nats.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from unisd.errors import UserError
from unisd.methods.registry import register_weight
from unisd.methods.scores import StepScores
from unisd.methods.terms import _quantile

logger = logging.getLogger(__name__)

SCALE_FLOOR = 1e-6  # nats^2 (var) or nats (range): contexts that agree to rounding
MIN_TOKEN_WEIGHT = 0.01
MIN_SEQUENCE_WEIGHT = 1e-6


@register_weight("agreement_token", level="token", needs=frozenset({"auxiliary"}), normalizer="weights")
def agreement_token(
    scores: StepScores, *, gamma: float = 0.01, stat: str = "var", quantile: float = 0.95, cap: float = 10.0
) -> Tensor:
    """w_it = max(0.01, 1 / (1 + gamma * min(d_it / s, cap))), d_it = stat_k(l^k_it), s = quantile
    of d over loss tokens.

    stat: `var` (unbiased) or `range`. The weight at the quantile is 1 / (1 + gamma). Tokens scored
    under fewer than two contexts have no variability: weight 1, and they do not enter the quantile.
    Where the quantile is below 1e-6 the contexts agree to rounding, and all weights are 1: noise
    must not get the full penalty.
    """
    auxiliary_KBT, present_KB = _auxiliary(scores)
    spread_BT = _spread(auxiliary_KBT, (present_KB[:, :, None] & scores.mask), stat, unbiased=True)
    scored_BT = scores.mask & (present_KB.sum(0) >= 2)[:, None]
    scale = _quantile(spread_BT[scored_BT], quantile)
    if scale is None or scale < SCALE_FLOOR:
        logger.info(
            "agreement: the auxiliary contexts agree to rounding (scale %s); all weights are 1", scale
        )
        return torch.ones_like(spread_BT)
    weights_BT = (1.0 / (1.0 + gamma * (spread_BT / scale).clamp(max=cap))).clamp(min=MIN_TOKEN_WEIGHT)
    return torch.where(scored_BT, weights_BT, 1.0)


@register_weight("agreement_sequence", level="sequence", needs=frozenset({"auxiliary"}), normalizer="weights")
def agreement_sequence(scores: StepScores, *, gamma: float = 0.01, stat: str = "var") -> Tensor:
    """w_i = max(1e-6, exp(-gamma * d_i)), d_i = stat_k(L^k_i), L^k_i the mean of l^k over the row's
    loss tokens.

    stat: `var` (biased) or `range`. Rows with fewer than two contexts, or without loss tokens, have
    weight 1.
    """
    auxiliary_KBT, present_KB = _auxiliary(scores)
    tokens_B = scores.mask.sum(-1)
    mean_KB = torch.where(scores.mask, auxiliary_KBT, 0.0).sum(-1) / tokens_B.clamp(min=1)
    spread_B = _spread(mean_KB, present_KB & (tokens_B > 0), stat, unbiased=False)
    return torch.exp(-gamma * spread_B).clamp(min=MIN_SEQUENCE_WEIGHT)


@register_weight(
    "corroboration", level="token", needs=frozenset({"auxiliary", "untempered"}), normalizer="weights"
)
def corroboration(scores: StepScores, *, gamma: float = 1.0) -> Tensor:
    """w_it = max(0.01, (1 - |p+_it - median_k p^k_it|)^gamma), p = exp(l) at temperature 1: do
    contexts bear the teacher out?

    Ours, not the paper's. Agreement asks whether the contexts agree among themselves, in
    log-probability: three contexts that all rule a token out, by 7, 9 and 14 nats, count as in
    disagreement, and so the tokens that carry a new fact are silenced. Here the question is whether
    the contexts (their median) and the teacher give the realised token the same probability. Where
    the reference is wrong and the contexts are not, they part, and the token counts little. Tokens
    without contexts have weight 1.
    """
    auxiliary_KBT, present_KB = _auxiliary(scores)
    scored_BT = scores.mask & present_KB.any(0)[:, None]
    chosen_KBT = (present_KB[:, :, None] & scores.mask).expand_as(auxiliary_KBT)
    known_KBT = torch.where(chosen_KBT, auxiliary_KBT, math.nan).exp()
    # Not torch's nanmedian: that is the lower of the two middle values, and so not the same under
    # 1 - p.
    middle_BT = known_KBT.nanquantile(0.5, dim=0) if known_KBT.numel() else torch.zeros(scores.mask.shape)
    if scores.untempered_logp is None:
        raise UserError("corroboration needs the teacher's scores at temperature 1, but this step has none.")
    apart_BT = (
        torch.where(scores.mask, scores.untempered_logp, 0.0).exp() - torch.where(scored_BT, middle_BT, 0.0)
    ).abs()
    return torch.where(scored_BT, (1 - apart_BT).clamp(min=0).pow(gamma).clamp(min=MIN_TOKEN_WEIGHT), 1.0)


def _auxiliary(scores: StepScores) -> tuple[Tensor, Tensor]:
    if scores.auxiliary_logp is None or scores.auxiliary_present is None:
        raise UserError("agreement needs auxiliary contexts, but this step has no auxiliary scores.")
    return scores.auxiliary_logp, scores.auxiliary_present


def _spread(values: Tensor, present: Tensor, stat: str, unbiased: bool) -> Tensor:
    """Variance or range over the first dimension (contexts), of present values only; 0 where fewer
    than two are.
    """
    if stat not in ("var", "range"):
        raise UserError(f"agreement_stat must be var or range, got {stat!r}.")
    count = present.sum(0)
    if len(values) < 2:
        return torch.zeros_like(count, dtype=values.dtype)
    if stat == "range":
        spread = values.masked_fill(~present, -math.inf).amax(0) - values.masked_fill(
            ~present, math.inf
        ).amin(0)
    else:
        mean = torch.where(present, values, 0.0).sum(0) / count.clamp(min=1)
        squares = torch.where(present, (values - mean).square(), 0.0).sum(0)
        spread = squares / (count - int(unbiased)).clamp(min=1)
    return torch.where(count >= 2, spread, 0.0)
