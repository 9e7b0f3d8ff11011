"""Aggregation: the coefficients with which the tokens' terms add up to the loss of a step.

All inputs cover the whole optimizer step (all micro-batches, all ranks) and carry no gradient, so
that weights and normalisers do not depend on how the step is cut.

Shapes: B rows of the step, T completion length. Values in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unisd.errors import UserError
from unisd.methods.scores import NORMALIZERS
from unisd.methods.terms import _quantile


def importance_ratio(student_logp: Tensor, behaviour_logp: Tensor, mask: Tensor, cap: float) -> Tensor:
    """rho [B,T] at the tokens of `mask`, 1 elsewhere and where `behaviour_logp` is NaN (tokens that
    nobody sampled). Token by token; published code takes a row's mean.

    student_logp, behaviour_logp: nats [B,T], at the temperature of the divergence.
    """
    apart_BT = torch.where(mask, student_logp - behaviour_logp, 0.0).nan_to_num(nan=0.0)
    return apart_BT.clamp(max=math.log(cap)).exp()  # clamped before exp: never infinite


def importance_stats(
    student_logp: Tensor, behaviour_logp: Tensor, mask: Tensor, cap: float
) -> dict[str, float]:
    """Mean and greatest ratio, share of capped tokens, and mean of l' - l (how far the policies are
    apart), at sampled tokens.
    """
    sampled = mask & ~behaviour_logp.isnan()
    if not sampled.any():
        return {}
    ratio = importance_ratio(student_logp, behaviour_logp, mask, cap)[sampled]
    apart = (behaviour_logp - student_logp)[sampled]
    return {
        "importance/mean": float(ratio.mean()),
        "importance/max": float(ratio.max()),
        "importance/capped_share": float((-apart > math.log(cap)).float().mean()),
        "importance/gap": float(apart.mean()),
    }


def step_coefficients(
    mask: Tensor, token_weights: Tensor, sequence_weights: Tensor, aggregation: str, normalizer: str
) -> Tensor:
    """Coefficients [B,T] with which `sum(coefficient * D)` is the loss of the whole optimizer step.

    With row weights a_i, token weights b_it, mask m_it, and the divisor b' = b (normalizer
    `weights`) or 1 (`tokens`, and `mean1`, for which b is first scaled to mean 1 over each row's
    loss tokens): aggregation `sequence`: sum_i a_i [sum_t b m D / sum_t b' m]_i / sum_i a_i;
    aggregation `token`: sum_it a b m D / sum_it a b' m.
    Rows whose sum of b m is 0 are left out, also of the divisor; a step without loss tokens gives
    zeros.
    """
    # selected, not multiplied: outside the mask it may be NaN
    weights_BT = torch.where(mask, token_weights, 0.0)
    live_B = weights_BT.sum(-1) != 0
    rows_B = torch.where(live_B, sequence_weights, 0.0)
    if normalizer not in NORMALIZERS:
        raise UserError(f"weight_normalizer must be one of {', '.join(NORMALIZERS)}, got {normalizer!r}.")
    if normalizer == "mean1":
        weights_BT = weights_BT * _ratio(mask.sum(-1), weights_BT.sum(-1))[:, None]
    divisor_B = (weights_BT if normalizer == "weights" else mask).sum(-1)
    if _choice("loss_aggregation", aggregation, "sequence", "token"):
        per_row_B = _ratio(rows_B, divisor_B) / _nonzero(rows_B.sum())
    else:
        per_row_B = rows_B / _nonzero((rows_B * divisor_B).sum())
    return per_row_B[:, None] * weights_BT


def term_coefficients(mask: Tensor, row_has_term: Tensor, aggregation: str) -> Tensor:
    """Coefficients [B,T] of a term that only some rows have (contrast, features).

    The masked mean per sequence, then over the sequences that have the term; or, for `token`, over
    their tokens.
    """
    ones_BT = torch.ones(mask.shape, device=mask.device)
    return step_coefficients(
        mask & row_has_term[:, None], ones_BT, ones_BT[:, :1].sum(-1), aggregation, "tokens"
    )


def _choice(option: str, value: str, first: str, second: str) -> bool:
    if value not in (first, second):
        raise UserError(f"{option} must be {first} or {second}, got {value!r}.")
    return value == first


def _nonzero(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, 1.0, divisor)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator == 0, 0.0, numerator / _nonzero(denominator))


def weight_stats(weights: Tensor, mask: Tensor) -> dict[str, float]:
    """Minimum, maximum, mean and effective range (99th - 1st percentile) of weights [B,T] or [B]
    over loss tokens or live rows.

    `below_1pct` is 1.0 where that range is under 1 % of the mean: such weights change nothing, and
    their forward passes are paid for nothing. Empty when the step has no loss tokens.
    """
    chosen = weights[mask if weights.dim() == 2 else mask.any(-1)].float()
    high, low = _quantile(chosen, 0.99), _quantile(chosen, 0.01)
    if high is None or low is None:
        return {}
    mean = chosen.mean().item()
    return {
        "min": chosen.min().item(),
        "max": chosen.max().item(),
        "mean": mean,
        "range": high - low,
        "below_1pct": float(high - low < 0.01 * abs(mean)),
    }
