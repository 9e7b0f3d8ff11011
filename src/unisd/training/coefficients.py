"""From the scores of a whole optimizer step to what its loss is made of: coefficients and
micro-batches.

Normalisers, weights and quantiles belong to the *step* (all micro-batches, all ranks), so that
cutting it differently changes nothing.

Shapes: B rows, T longest completion, K contexts, N loss tokens of a micro-batch, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from unisd.config import UniSDConfig
from unisd.methods.aggregation import (
    importance_ratio,
    importance_stats,
    step_coefficients,
    term_coefficients,
    weight_stats,
)
from unisd.methods.registry import WeightFunction
from unisd.methods.scores import StepScores, select
from unisd.training.plan import in_forward_weights, normalizer_of

AGREEMENT = ("agreement_token", "agreement_sequence")


def most_uncertain(entropy_B: Tensor, share: float, accelerator: Accelerator) -> Tensor:
    """Agreement's budget of rows: `[B]` bool, the ceil(share * rows) of the whole step with the
    largest mean teacher entropy.

    All ranks together; of equal rows the first. What the teacher is sure of needs no second
    opinion: such rows count as rows without contexts, whose weight is 1.
    """
    gathered = [entropy_B.tolist()] if accelerator.num_processes == 1 else gather_object([entropy_B.tolist()])
    first = sum(len(part) for part in gathered[: accelerator.process_index])
    everywhere = [value for part in gathered for value in part]
    order = sorted(range(len(everywhere)), key=lambda i: (-everywhere[i], i))[
        : math.ceil(share * len(everywhere))
    ]
    chosen = torch.zeros(len(everywhere), dtype=torch.bool)
    chosen[order] = True
    return chosen[first : first + len(entropy_B)]


def idle_agreement(metrics: dict[str, float], args: UniSDConfig) -> str | None:
    """What to tell the user if all agreement weights of a step are within 1 % of 1: forward passes
    that buy nothing.
    """
    if "agreement/min" not in metrics or metrics["agreement/min"] < 0.99 or metrics["agreement/max"] > 1.01:
        return None
    return (
        f"agreement weights are all within 1 % of 1 (from {metrics['agreement/min']:.4f}): their forward"
        f" passes buy nothing; raise agreement_gamma={args.agreement_gamma}, or set agreement=none."
    )


def reliability(
    weights: Sequence[WeightFunction], scores: StepScores, in_forward: Sequence[WeightFunction] = ()
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The product of all weights by level, `[B,T]` and `[B]`, and their metrics.

    Those `in_forward` are left to :class:`InForward`.
    """
    B, T = scores.mask.shape
    token_BT, sequence_B = torch.ones(B, T), torch.ones(B)
    metrics: dict[str, float] = {}
    for weight in weights:
        if weight in in_forward:
            continue
        value = weight(scores)
        if weight.level == "sequence":
            sequence_B = sequence_B * value
        else:
            token_BT = token_BT * value
        spread_BT = value if weight.level == "token" else value[:, None].expand(B, T)
        metrics |= weight_metrics(weight.name, weight_stats(spread_BT, scores.mask))
    return token_BT, sequence_B, metrics


def loss_coefficients(
    args: UniSDConfig,
    weights: Sequence[WeightFunction],
    scores: StepScores,
    in_forward: Sequence[WeightFunction] = (),
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What each token's divergence, contrast and feature term is multiplied by in the step's loss
    (method: "Aggregation").

    Weights that are `in_forward` are left to :class:`InForward`.

    Returns:
        `[B,T]` each under "divergence" and, where active, "contrast" and "features"; and the
        weights' metrics.
    """
    B, T = scores.mask.shape
    token_BT, sequence_B, metrics = reliability(weights, scores, in_forward)
    if scores.auxiliary_present is not None:
        metrics["agreement/contexts"] = float(scores.auxiliary_present.sum()) / max(B, 1)
        metrics["agreement/scored_rows"] = (
            float((scores.auxiliary_present.sum(0) > 0).float().mean()) if B else 0.0
        )
    divergence_BT = step_coefficients(
        scores.mask, token_BT, sequence_B, args.loss_aggregation, normalizer_of(args, weights)
    )
    if (
        args.importance_cap is not None
        and scores.behaviour_logp is not None
        and scores.student_logp is not None
    ):
        policies = (scores.student_logp, scores.behaviour_logp, scores.mask, args.importance_cap)
        divergence_BT = divergence_BT * importance_ratio(*policies)
        metrics |= importance_stats(*policies)
    coefficients = {"divergence": torch.zeros(B, T) if args.feature_only else divergence_BT}
    if args.contrastive_weight and scores.negative_present is not None:
        unit_BT = term_coefficients(scores.mask, scores.negative_present, args.loss_aggregation)
        coefficients["contrast"] = args.contrastive_weight * unit_BT
    if args.feature_weight:
        unit_BT = term_coefficients(scores.mask, torch.ones(B, dtype=torch.bool), args.loss_aggregation)
        coefficients["features"] = args.feature_weight * unit_BT
    return coefficients, metrics


def weight_metrics(name: str, stats: Mapping[str, float]) -> dict[str, float]:
    prefix = "agreement" if name in AGREEMENT else f"weight/{name}"
    return {f"{prefix}/{key}": float(number) for key, number in stats.items()}


@dataclass
class Reweigh:
    """Weights that look at the student, for one micro-batch: called by the loss with what its own
    pass found (`losses.Reweigh`).

    With the normalizers `weights` and `mean1` the divisor is a row's own sum: the factors keep the
    sum of each row's coefficients, which the step fixed before. A row without any weight left has
    no loss, but was counted as a row.
    """

    weights: Sequence[WeightFunction]
    scores: StepScores  # of the micro-batch's rows
    coefficients_BT: Tensor
    normalizer: str
    keep: Callable[[str, Tensor], None]  # a weight's name and its values, for the log

    def __call__(self, divergence_N: Tensor, logp_N: Tensor, entropy_N: Tensor) -> Tensor:
        mask_BT = self.scores.mask
        student_BT, divergence_BT = torch.zeros(2, *mask_BT.shape, dtype=divergence_N.dtype)
        student_BT[mask_BT], divergence_BT[mask_BT] = logp_N.detach().cpu(), divergence_N.detach().cpu()
        scores = replace(self.scores, student_logp=student_BT, divergence=divergence_BT)
        factor_BT = torch.ones(mask_BT.shape, dtype=divergence_N.dtype)
        for weight in self.weights:
            value_BT = weight(scores)
            self.keep(weight.name, value_BT)
            factor_BT = factor_BT * value_BT
        if self.normalizer != "tokens":
            before_B1 = torch.where(mask_BT, self.coefficients_BT, 0.0).sum(-1, keepdim=True)
            after_B1 = torch.where(mask_BT, self.coefficients_BT * factor_BT, 0.0).sum(-1, keepdim=True)
            factor_BT = factor_BT * torch.where(
                after_B1 == 0, 0.0, before_B1 / torch.where(after_B1 == 0, 1.0, after_B1)
            )
        return factor_BT[mask_BT].to(divergence_N)


class InForward:
    """The weights of a run that wait for the student's pass: makes each micro-batch's `Reweigh`,
    and keeps what it found for the log.
    """

    def __init__(
        self,
        args: UniSDConfig,
        weights: Sequence[WeightFunction],
        drawn: frozenset[str] = frozenset(),
        off_policy: bool = False,
    ) -> None:
        self.weights = in_forward_weights(args, weights, drawn, off_policy)
        self._normalizer = normalizer_of(args, weights)
        self._step: tuple[StepScores, Tensor] | None = None
        # by weight [B,T]; rows that are done again take the place of what they left
        self._found: dict[str, Tensor] = {}

    def begin(self, scores: StepScores, coefficients_BT: Tensor) -> None:
        """A new optimizer step: this rank's scores and the coefficients of the divergence without
        these weights.
        """
        self._step = scores, coefficients_BT
        self._found = {weight.name: torch.zeros(scores.mask.shape) for weight in self.weights}

    def reweigh(self, rows: Tensor) -> Reweigh | None:
        """For the micro-batch of these rows; None where no weight waits."""
        if not self.weights:
            return None
        assert self._step is not None
        scores, coefficients_BT = self._step

        def keep(name: str, value_BT: Tensor) -> None:
            self._found[name][rows] = value_BT.float()

        return Reweigh(self.weights, select(scores, rows), coefficients_BT[rows], self._normalizer, keep)

    def metrics(self, accelerator: Accelerator) -> dict[str, float]:
        """Mean and range of each weight over the step's loss tokens, on all ranks."""
        found: dict[str, float] = {}
        for weight in self.weights:
            assert self._step is not None
            values_N = self._found[weight.name][self._step[0].mask]
            if accelerator.num_processes > 1:
                values_N = torch.cat(gather_object([values_N]))
            found |= weight_metrics(
                weight.name, weight_stats(values_N[None], torch.ones(1, len(values_N), dtype=torch.bool))
            )
        return found
