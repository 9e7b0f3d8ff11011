"""Reliability weights, normalisers and clips of UniSD (arXiv 2605.06597): pure functions of tensors.

A *reliability weight* is one function `(StepScores, **options) -> weights`, registered by name with
:func:`register_weight`, or by another package under the entry point group `unisd.token_weights`. It declares what it
needs of the scoring phase, and only that is computed. All scores cover the whole optimizer step (all micro-batches, all
ranks) and carry no gradient, so weights, quantiles and normalisers do not depend on how the step is cut.

Shapes: B rows of the step, T completion length, K auxiliary contexts, N loss tokens, H hidden size. Values in nats.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from unisd.errors import UserError
from unisd.plugins import bound_options, find, parse

logger = logging.getLogger(__name__)

KIND = "token weight"
ENTRY_POINT_GROUP = "unisd.token_weights"
NEEDS = frozenset({"teacher", "auxiliary", "untempered", "negative", "contrast", "student", "entropy", "divergence"})
NORMALIZERS = ("weights", "tokens", "mean1")
SCALE_FLOOR = 1e-6  # nats^2 (var) or nats (range): contexts that agree to rounding
LEAST_TOKEN_WEIGHT = 0.01
LEAST_SEQUENCE_WEIGHT = 1e-6


@dataclass(frozen=True, eq=False)
class StepScores:
    """Everything a reliability weight may look at: one optimizer step, all ranks, no gradient.

    Values at positions outside `mask`, and of contexts that are not present, are arbitrary (even NaN): select before
    you sum. A field is None unless a registered function in use declares the need in brackets.
    """

    mask: Tensor  # [B,T] bool, tokens that carry loss
    tokens: Tensor  # [B,T] realised token ids
    teacher_logp: Tensor | None = None  # [B,T] l+, primary teacher, distillation temperature (teacher)
    auxiliary_logp: Tensor | None = None  # [K,B,T] l^k at temperature 1 (auxiliary)
    auxiliary_present: Tensor | None = None  # [K,B] bool: a row may have fewer than K contexts (auxiliary)
    negative_logp: Tensor | None = None  # [B,T] l- (negative)
    negative_present: Tensor | None = None  # [B] bool (negative)
    negative_divergence: Tensor | None = None  # [B,T] KL(q||q-), at the distillation temperature (contrast)
    student_logp: Tensor | None = None  # [B,T] l, from a student pass without gradient or the rollout itself (student)
    teacher_entropy: Tensor | None = None  # [B,T] H(q) (entropy)
    divergence: Tensor | None = None  # [B,T] D (divergence)
    behaviour_logp: Tensor | None = None  # [B,T] l' with which the token was drawn, NaN if nobody drew it (importance)
    untempered_logp: Tensor | None = None  # [B,T] l+ at temperature 1, as the auxiliary scores are (untempered)


Weight = TypeVar("Weight", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class WeightFunction:
    """A registered reliability weight and its options; call it with the scores of a step."""

    name: str
    function: Callable[..., Tensor]
    level: str  # "token": weights [B,T]; "sequence": weights [B]
    needs: frozenset[str]  # subset of NEEDS
    normalizer: str  # published divisor: "weights" (sum of b m) or "tokens" (sum of m); "mean1": b scaled to mean 1 per row
    options: Mapping[str, Any] = field(default_factory=dict)
    in_forward: bool = False  # looks at the student and at each row alone: called with a micro-batch, after its forward pass

    def __call__(self, scores: StepScores) -> Tensor:
        weights = self.function(scores, **self.options)
        expected = scores.mask.shape if self.level == "token" else scores.mask.shape[:1]
        if weights.shape != expected:
            raise UserError(
                f"token weight {self.name!r} is of level {self.level} and must return shape {tuple(expected)}, "
                f"but returned {tuple(weights.shape)}."
            )
        return weights

    def with_options(self, **options: Any) -> WeightFunction:
        """The same with options bound; unknown and missing ones are refused here, not in the first step."""
        return replace(self, options=bound_options(KIND, self.name, self.function, {**self.options, **options}))


_REGISTRY: dict[str, WeightFunction] = {}


def register_weight(
    name: str,
    *,
    level: str = "token",
    needs: frozenset[str] = frozenset(),
    normalizer: str = "weights",
    in_forward: bool = False,
) -> Callable[[Weight], Weight]:
    """Decorator: make a function `(scores, **options) -> Tensor` known as the reliability weight `name`.

    in_forward: the needs `student` and `divergence` are then met by the training pass, without a pass of their own. The function
    must look at each row alone, because it sees one micro-batch at a time, and leave each row some weight: rows are counted before.
    """
    if level not in ("token", "sequence"):
        raise UserError(f"token weight {name!r}: level must be token or sequence, got {level!r}.")
    if normalizer not in NORMALIZERS:
        raise UserError(f"token weight {name!r}: normalizer must be one of {', '.join(NORMALIZERS)}, got {normalizer!r}.")
    if in_forward and level != "token":
        raise UserError(f"token weight {name!r}: only weights of level token can be in_forward.")
    if unknown := sorted(frozenset(needs) - NEEDS):
        raise UserError(f"token weight {name!r} needs {unknown[0]!r}, which scoring does not offer: {sorted(NEEDS)}.")

    def register(function: Weight) -> Weight:
        known = _REGISTRY.get(name)
        if known is not None and known.function.__module__ != function.__module__:  # a reload replaces its own
            raise UserError(f"token weight {name!r} is already registered by {known.function.__module__}.")
        _REGISTRY[name] = WeightFunction(name, function, level, frozenset(needs), normalizer, in_forward=in_forward)
        return function

    return register


def get_weight(name: str) -> WeightFunction:
    """The reliability weight registered as `name`, here or by an installed package."""
    import unisd.weights  # noqa: F401 - registers the published ones

    return find(KIND, name, _REGISTRY, ENTRY_POINT_GROUP)


def parse_weight(text: str) -> WeightFunction:
    """`name` or `name:option=value,option=value`; values are Python literals, or else strings."""
    name, options = parse(KIND, text)
    return get_weight(name).with_options(**options)


# ------------------------------------------------------------------------------------------------- agreement (A)


@register_weight("agreement_token", level="token", needs=frozenset({"auxiliary"}), normalizer="weights")
def agreement_token(
    scores: StepScores, *, gamma: float = 0.01, stat: str = "var", quantile: float = 0.95, cap: float = 10.0
) -> Tensor:
    """w_it = max(0.01, 1 / (1 + gamma * min(d_it / s, cap))), d_it = stat_k(l^k_it), s = quantile of d over loss tokens.

    stat: `var` (unbiased) or `range`. The weight at the quantile is 1 / (1 + gamma). Tokens scored under fewer than two
    contexts have no variability: weight 1, and they do not enter the quantile. Where the quantile is below 1e-6 the
    contexts agree to rounding, and all weights are 1: noise must not get the full penalty.
    """
    auxiliary_KBT, present_KB = _auxiliary(scores)
    spread_BT = _spread(auxiliary_KBT, (present_KB[:, :, None] & scores.mask), stat, unbiased=True)
    scored_BT = scores.mask & (present_KB.sum(0) >= 2)[:, None]
    scale = _quantile(spread_BT[scored_BT], quantile)
    if scale is None or scale < SCALE_FLOOR:
        logger.info("agreement: the auxiliary contexts agree to rounding (scale %s); all weights are 1", scale)
        return torch.ones_like(spread_BT)
    weights_BT = (1.0 / (1.0 + gamma * (spread_BT / scale).clamp(max=cap))).clamp(min=LEAST_TOKEN_WEIGHT)
    return torch.where(scored_BT, weights_BT, 1.0)


@register_weight("agreement_sequence", level="sequence", needs=frozenset({"auxiliary"}), normalizer="weights")
def agreement_sequence(scores: StepScores, *, gamma: float = 0.01, stat: str = "var") -> Tensor:
    """w_i = max(1e-6, exp(-gamma * d_i)), d_i = stat_k(L^k_i), L^k_i the mean of l^k over the row's loss tokens.

    stat: `var` (biased) or `range`. Rows with fewer than two contexts, or without loss tokens, have weight 1.
    """
    auxiliary_KBT, present_KB = _auxiliary(scores)
    tokens_B = scores.mask.sum(-1)
    mean_KB = torch.where(scores.mask, auxiliary_KBT, 0.0).sum(-1) / tokens_B.clamp(min=1)
    spread_B = _spread(mean_KB, present_KB & (tokens_B > 0), stat, unbiased=False)
    return torch.exp(-gamma * spread_B).clamp(min=LEAST_SEQUENCE_WEIGHT)


@register_weight("corroboration", level="token", needs=frozenset({"auxiliary", "untempered"}), normalizer="weights")
def corroboration(scores: StepScores, *, gamma: float = 1.0) -> Tensor:
    """w_it = max(0.01, (1 - |p+_it - median_k p^k_it|)^gamma), p = exp(l) at temperature 1: do contexts bear the teacher out?

    Ours, not the paper's. Agreement asks whether the contexts agree among themselves, in log-probability: three contexts that all rule a
    token out, by 7, 9 and 14 nats, count as in disagreement, and so the tokens that carry a new fact are silenced. Here the question is
    whether the contexts (their median) and the teacher give the realised token the same probability. Where the reference is wrong
    and the contexts are not, they part, and the token counts little. Tokens without contexts have weight 1.
    """
    auxiliary_KBT, present_KB = _auxiliary(scores)
    scored_BT = scores.mask & present_KB.any(0)[:, None]
    chosen_KBT = (present_KB[:, :, None] & scores.mask).expand_as(auxiliary_KBT)
    known_KBT = torch.where(chosen_KBT, auxiliary_KBT, math.nan).exp()
    # Not torch's nanmedian: that is the lower of the two middle values, and so not the same under 1 - p.
    middle_BT = known_KBT.nanquantile(0.5, dim=0) if len(known_KBT) else torch.zeros(scores.mask.shape)
    if scores.untempered_logp is None:
        raise UserError("corroboration needs the teacher's scores at temperature 1, but this step has none.")
    apart_BT = (torch.where(scores.mask, scores.untempered_logp, 0.0).exp() - torch.where(scored_BT, middle_BT, 0.0)).abs()
    return torch.where(scored_BT, (1 - apart_BT).clamp(min=0).pow(gamma).clamp(min=LEAST_TOKEN_WEIGHT), 1.0)


def _auxiliary(scores: StepScores) -> tuple[Tensor, Tensor]:
    if scores.auxiliary_logp is None or scores.auxiliary_present is None:
        raise UserError("agreement needs auxiliary contexts, but this step has no auxiliary scores.")
    return scores.auxiliary_logp, scores.auxiliary_present


def _spread(values: Tensor, present: Tensor, stat: str, unbiased: bool) -> Tensor:
    """Variance or range over the first dimension (contexts), of present values only; 0 where fewer than two are."""
    if stat not in ("var", "range"):
        raise UserError(f"agreement_stat must be var or range, got {stat!r}.")
    count = present.sum(0)
    if len(values) < 2:
        return torch.zeros_like(count, dtype=values.dtype)
    if stat == "range":
        spread = values.masked_fill(~present, -math.inf).amax(0) - values.masked_fill(~present, math.inf).amin(0)
    else:
        mean = torch.where(present, values, 0.0).sum(0) / count.clamp(min=1)
        squares = torch.where(present, (values - mean).square(), 0.0).sum(0)
        spread = squares / (count - int(unbiased)).clamp(min=1)
    return torch.where(count >= 2, spread, 0.0)


# ----------------------------------------------------------------------------------- clipping (E) and features (D)


def quantile_clip(divergence: Tensor, mask: Tensor, q: float) -> float | None:
    """The token clip kappa as the q-quantile of D [B,T] over the step's loss tokens; None when there are none."""
    return _quantile(divergence[mask], q)


def _quantile(values: Tensor, q: float) -> float | None:
    """Quantile of a flat tensor with linear interpolation, of any size (`torch.quantile` stops at 16M elements)."""
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

    A mean, so that one weight means the same for every model. In float32 (float64 stays); no gradient to the teacher.
    """
    dtype = torch.promote_types(student_NH.dtype, torch.float32)
    return (student_NH.to(dtype) - teacher_NH.detach().to(dtype)).square().mean(-1)


# -------------------------------------------------------------------------------------------------- aggregation


def step_coefficients(mask: Tensor, token_weights: Tensor, sequence_weights: Tensor, aggregation: str, normalizer: str) -> Tensor:
    """Coefficients [B,T] with which `sum(coefficient * D)` is the loss of the whole optimizer step.

    With row weights a_i, token weights b_it, mask m_it, and the divisor b' = b (normalizer `weights`) or 1 (`tokens`, and `mean1`,
    for which b is first scaled to mean 1 over each row's loss tokens):
    aggregation `sequence`: sum_i a_i [sum_t b m D / sum_t b' m]_i / sum_i a_i;
    aggregation `token`: sum_it a b m D / sum_it a b' m.
    Rows whose sum of b m is 0 are left out, also of the divisor; a step without loss tokens gives zeros.
    """
    weights_BT = torch.where(mask, token_weights, 0.0)  # selected, not multiplied: outside the mask it may be NaN
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

    The masked mean per sequence, then over the sequences that have the term; or, for `token`, over their tokens.
    """
    ones_BT = torch.ones(mask.shape, device=mask.device)
    return step_coefficients(mask & row_has_term[:, None], ones_BT, ones_BT[:, :1].sum(-1), aggregation, "tokens")


def _choice(option: str, value: str, first: str, second: str) -> bool:
    if value not in (first, second):
        raise UserError(f"{option} must be {first} or {second}, got {value!r}.")
    return value == first


def _nonzero(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, 1.0, divisor)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator == 0, 0.0, numerator / _nonzero(denominator))


def weight_stats(weights: Tensor, mask: Tensor) -> dict[str, float]:
    """min, max, mean and effective range (99th - 1st percentile) of weights [B,T] or [B] over loss tokens or live rows.

    `below_1pct` is 1.0 where that range is under 1 % of the mean: such weights change nothing, and their forward passes
    are paid for nothing. Empty when the step has no loss tokens.
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
