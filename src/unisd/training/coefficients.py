"""From the scores of a whole optimizer step to the coefficients that its loss is made of.

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
from unisd.methods.terms import above_clip, quantile_clip
from unisd.rollout.engine import Completion
from unisd.rollout.replay import RolloutStore, behaviour_logp, with_logps
from unisd.training.plan import Plan

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


def once(choose: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function, asked once: later calls give what the first one gave."""
    chosen: list[Tensor] = []

    def first(values: Tensor) -> Tensor:
        if not chosen:
            chosen.append(choose(values))
        return chosen[0]

    return first


def with_rollout(
    scores: StepScores,
    plan: Plan,
    store: RolloutStore,
    numbers: Sequence[tuple[int, int]],
    completions: Sequence[Completion],
) -> StepScores:
    """The scores with what is known of the rollout: the verdicts, and for the importance ratio and
    some weights the log-probabilities that its tokens were sampled with.
    """
    width = scores.mask.shape[1]
    if plan.off_policy and scores.student_logp is not None:
        completions = with_logps(completions, scores.student_logp)
        store.keep(numbers, completions, store.step)
        scores = replace(scores, behaviour_logp=behaviour_logp(completions, width))
    if plan.rollout_logps and scores.student_logp is None:
        scores = replace(scores, student_logp=behaviour_logp(completions, width))
    if plan.judged:
        verdicts = [completion.verdict for completion in completions]
        scores = replace(
            scores,
            score=torch.tensor([math.nan if v is None else v.score for v in verdicts]),
            passed=torch.tensor([v is not None and v.passed for v in verdicts]),
            group=torch.tensor([row for row, _ in numbers]),
        )
    return scores


def idle_agreement(metrics: dict[str, float], args: UniSDConfig) -> str | None:
    """What to tell the user if the agreement weights of a step hardly differ: forward passes that
    buy nothing.

    Few tokens may stand out: the range is that between the 1 % and the 99 % quantile.
    """
    if not metrics.get("agreement/below_1pct"):
        return None
    if metrics["agreement/min"] == 1:
        return (
            "agreement weights are all 1: the contexts give the same scores, up to rounding, so their forward"
            " passes have no effect; give other contexts, or set agreement=none."
        )
    return (
        "agreement weights differ by less than 1 % (range between their 1 % and 99 % quantiles:"
        f" {metrics['agreement/range']:.4f}; mean {metrics['agreement/mean']:.4f}, least"
        f" {metrics['agreement/min']:.4f}): their forward passes have no effect; raise"
        f" agreement_gamma={args.agreement_gamma}, or set agreement=none."
    )


def reliability(plan: Plan, scores: StepScores) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The product of all weights by level, `[B,T]` and `[B]`, and their metrics.

    Deferred ones are left to :class:`DeferredWeights`.
    """
    B, T = scores.mask.shape
    token_BT, sequence_B = torch.ones(B, T, dtype=torch.float32), torch.ones(B, dtype=torch.float32)
    metrics: dict[str, float] = {}
    for weight in plan.weights:
        if weight in plan.deferred:
            continue
        value = weight(scores)
        if weight.level == "sequence":
            sequence_B = sequence_B * value
        else:
            token_BT = token_BT * value
        spread_BT = value if weight.level == "token" else value[:, None].expand(B, T)
        metrics |= weight_metrics(weight.name, weight_stats(spread_BT, scores.mask))
    return token_BT, sequence_B, metrics


@dataclass(frozen=True, eq=False)
class Coefficients:
    """What each token's divergence, and each term, is multiplied by in the step's loss."""

    divergence_BT: Tensor
    terms: dict[str, Tensor]  # [B,T] by name
    weights_BT: Tensor  # the reliability weights in them
    token_clip: float | None  # of the divergence, in nats
    clipped_BT: Tensor | None  # bool: the tokens above it, where a scoring pass has told
    metrics: dict[str, float]

    def of_rows(self, rows: slice, width: int) -> Coefficients:
        """Those of some rows, as wide as their longest completion."""
        clipped_BT = None if self.clipped_BT is None else self.clipped_BT[rows, :width]
        return replace(
            self,
            divergence_BT=self.divergence_BT[rows, :width],
            terms={name: value_BT[rows, :width] for name, value_BT in self.terms.items()},
            weights_BT=self.weights_BT[rows, :width],
            clipped_BT=clipped_BT,
        )


def loss_coefficients(args: UniSDConfig, plan: Plan, scores: StepScores) -> Coefficients:
    """From the scores of all ranks to the coefficients of the loss (method: "Aggregation").

    Deferred weights are left to :class:`DeferredWeights`.
    """
    B = len(scores.mask)
    token_BT, sequence_B, metrics = reliability(plan, scores)
    if scores.auxiliary_present is not None:
        metrics["agreement/contexts"] = float(scores.auxiliary_present.sum()) / max(B, 1)
        metrics["agreement/scored_rows"] = (
            float((scores.auxiliary_present.sum(0) > 0).float().mean()) if B else 0.0
        )
    divergence_BT = step_coefficients(
        scores.mask, token_BT, sequence_B, args.loss_aggregation, plan.normalizer
    )
    if (
        args.importance_cap is not None
        and scores.behaviour_logp is not None
        and scores.student_logp is not None
    ):
        policies = (scores.student_logp, scores.behaviour_logp, scores.mask, args.importance_cap)
        divergence_BT = divergence_BT * importance_ratio(*policies)
        metrics |= importance_stats(*policies)
    divergence_BT = args.distillation_weight * divergence_BT
    terms: dict[str, Tensor] = {}
    for term in plan.terms:
        present_B = scores.negative_present if "negative" in term.needs else None
        present_B = torch.ones(B, dtype=torch.bool) if present_B is None else present_B
        unit_BT = term_coefficients(scores.mask, present_B, args.loss_aggregation)
        terms[term.name] = term.coefficient * unit_BT
    clip, clipped_BT = args.token_clip, None
    if args.token_clip_quantile is not None and scores.divergence is not None:
        clip = quantile_clip(scores.divergence, scores.mask, args.token_clip_quantile)
        clipped_BT = None if clip is None else above_clip(scores.divergence, clip)
    weights_BT = token_BT * sequence_B[:, None]
    return Coefficients(divergence_BT, terms, weights_BT, clip, clipped_BT, metrics)


def idle_weights(found: Coefficients, scores: StepScores, args: UniSDConfig) -> str | None:
    """What to tell the user of weights that leave nothing to learn, or hardly differ."""
    if scores.mask.any() and not any(c.any() for c in (found.divergence_BT, *found.terms.values())):
        named = ", ".join(args.token_weights) or "agreement"
        return f"the weights of all tokens are 0, so that nothing is learned: look at {named}."
    return idle_agreement(found.metrics, args)


def weight_metrics(name: str, stats: Mapping[str, float]) -> dict[str, float]:
    prefix = "agreement" if name in AGREEMENT else f"weight/{name}"
    return {f"{prefix}/{key}": float(number) for key, number in stats.items()}


@dataclass(frozen=True, eq=False)
class DeferredWeights:
    """The weights of a step that wait for the student's training pass: a further factor of the
    coefficients of each micro-batch, from what its own pass found.

    With the normalizers `weights` and `mean1` the divisor is a row's own sum: the factors keep the
    sum of each row's coefficients, which the step fixed before. A row without any weight left has
    no loss, but was counted as a row.
    """

    weights: Sequence[WeightFunction]
    scores: StepScores  # of this rank's rows
    coefficients_BT: Tensor  # of the divergence, without these weights
    normalizer: str
    # by weight [B,T], for the log; rows that are done again take the place of what they left
    found: dict[str, Tensor]

    @classmethod
    def of(cls, plan: Plan, scores: StepScores, coefficients_BT: Tensor) -> DeferredWeights | None:
        """None where no weight waits."""
        if not plan.deferred:
            return None
        found = {weight.name: torch.zeros(scores.mask.shape, dtype=torch.float32) for weight in plan.deferred}
        return cls(plan.deferred, scores, coefficients_BT, plan.normalizer, found)

    def factor(self, rows: Tensor, divergence_N: Tensor, logp_N: Tensor, entropy_N: Tensor) -> Tensor:
        """The factor [N] of the micro-batch made of `rows`, as `losses.terms.LossInputs.deferred`
        gives it.
        """
        scores, coefficients_BT = select(self.scores, rows), self.coefficients_BT[rows]
        mask_BT = scores.mask
        student_BT, divergence_BT = torch.zeros(2, *mask_BT.shape, dtype=divergence_N.dtype)
        student_BT[mask_BT], divergence_BT[mask_BT] = logp_N.detach().cpu(), divergence_N.detach().cpu()
        scores = replace(scores, student_logp=student_BT, divergence=divergence_BT)
        factor_BT = torch.ones(mask_BT.shape, dtype=divergence_N.dtype)
        for weight in self.weights:
            value_BT = weight(scores)
            self.found[weight.name][rows] = value_BT.float()
            factor_BT = factor_BT * value_BT
        if self.normalizer != "tokens":
            before_B1 = torch.where(mask_BT, coefficients_BT, 0.0).sum(-1, keepdim=True)
            after_B1 = torch.where(mask_BT, coefficients_BT * factor_BT, 0.0).sum(-1, keepdim=True)
            factor_BT = factor_BT * torch.where(
                after_B1 == 0, 0.0, before_B1 / torch.where(after_B1 == 0, 1.0, after_B1)
            )
        return factor_BT[mask_BT].to(divergence_N)

    def metrics(self, accelerator: Accelerator) -> dict[str, float]:
        """Mean and range of each weight over the step's loss tokens, on all ranks."""
        metrics: dict[str, float] = {}
        for weight in self.weights:
            values_N = self.found[weight.name][self.scores.mask]
            if accelerator.num_processes > 1:
                values_N = torch.cat(gather_object([values_N]))
            metrics |= weight_metrics(
                weight.name, weight_stats(values_N[None], torch.ones(1, len(values_N), dtype=torch.bool))
            )
        return metrics
