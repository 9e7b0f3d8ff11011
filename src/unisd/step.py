"""From the scores of a whole optimizer step to what its loss is made of: coefficients and micro-batches.

Normalisers, weights and quantiles belong to the *step* (all micro-batches, all ranks), so that cutting it differently changes nothing.

Shapes: B rows, T longest completion, K contexts, N loss tokens of a micro-batch, H hidden size.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from unisd.backbone import Batch, lay_out
from unisd.config import UniSDConfig
from unisd.data import Row
from unisd.errors import UserError
from unisd.mechanisms import StepScores, WeightFunction, step_coefficients, term_coefficients, weight_stats
from unisd.scoring import ScoringRow, TeacherStates


def needed_views(args: UniSDConfig, weights: Sequence[WeightFunction]) -> frozenset[str]:
    """What this run's mechanisms look at; nothing else is scored."""
    needs = frozenset(need for weight in weights for need in weight.needs)
    if args.contrastive_weight:
        needs |= {"negative"}
    if args.token_clip_quantile is not None:
        needs |= {"divergence"}
    return needs


def check_data_serves(needs: frozenset[str], rows: Sequence[Row]) -> None:
    """Raise `UserError` if an active mechanism finds nothing in the data to work with."""
    if "auxiliary" in needs and not any(len(row.get("auxiliary_contexts") or []) >= 2 for row in rows):
        raise UserError(
            "agreement needs auxiliary contexts, but no row has two of them: add a column auxiliary_contexts (a list of solved "
            "examples of other problems), or set agreement=none."
        )
    if "negative" in needs and not any(row.get("negative_context") for row in rows):
        raise UserError(
            "contrast needs wrong references, but no row has one: add a column negative_context, or set contrastive_weight=0."
        )


def budgeted(views: list[list[int]], budget: int | None, seed: int, step: int, row: int) -> list[list[int]]:
    """Agreement's budget of contexts: `budget` of a row's views in their order, drawn by (seed, optimizer step, row) alone.

    A draw per step, so that over the epochs all of them are used; the same for all generations of a prompt.
    """
    if budget is None or budget >= len(views):
        return views
    return [views[k] for k in sorted(random.Random(f"agreement {seed} {step} {row}").sample(range(len(views)), budget))]


def most_uncertain(entropy_B: Tensor, share: float, accelerator: Accelerator) -> Tensor:
    """Agreement's budget of rows: `[B]` bool, the ceil(share * rows) of the whole step with the largest mean teacher entropy.

    All ranks together; of equal rows the first. What the teacher is sure of needs no second opinion: such rows count as rows
    without contexts, whose weight is 1.
    """
    gathered = [entropy_B.tolist()] if accelerator.num_processes == 1 else gather_object([entropy_B.tolist()])
    first = sum(len(part) for part in gathered[: accelerator.process_index])
    everywhere = [value for part in gathered for value in part]
    order = sorted(range(len(everywhere)), key=lambda i: (-everywhere[i], i))[: math.ceil(share * len(everywhere))]
    chosen = torch.zeros(len(everywhere), dtype=torch.bool)
    chosen[order] = True
    return chosen[first : first + len(entropy_B)]


def idle_agreement(metrics: dict[str, float], args: UniSDConfig) -> str | None:
    """What to tell the user if all agreement weights of a step are within 1 % of 1: forward passes that buy nothing."""
    if "agreement/min" not in metrics or metrics["agreement/min"] < 0.99 or metrics["agreement/max"] > 1.01:
        return None
    return (
        f"agreement weights are all within 1 % of 1 (from {metrics['agreement/min']:.4f}): their forward passes buy nothing; raise "
        f"agreement_gamma={args.agreement_gamma}, or set agreement=none."
    )


def gather_scores(accelerator: Accelerator, scores: StepScores) -> tuple[slice, StepScores]:
    """The scores of all ranks, and which rows of them are this rank's."""
    count = len(scores.mask)
    if accelerator.num_processes == 1:
        return slice(0, count), scores
    parts: list[StepScores] = gather_object([scores])
    first = sum(len(part.mask) for part in parts[: accelerator.process_index])
    return slice(first, first + count), concatenate(parts)


def concatenate(parts: Sequence[StepScores]) -> StepScores:
    """Stack rows; completions and contexts are padded to the longest and to the most."""
    T = max(part.mask.shape[1] for part in parts)
    K = max((len(part.auxiliary_logp) for part in parts if part.auxiliary_logp is not None), default=0)

    def stacked(name: str) -> Tensor | None:
        values: list[Tensor | None] = [getattr(part, name) for part in parts]
        padded = []
        for value in values:
            if value is None:
                return None
            grow = [0, T - value.shape[-1]] if not name.endswith("_present") else [0, 0]
            if name.startswith("auxiliary"):
                grow += [0] * 2 * (value.dim() - 2) + [0, K - len(value)]
            padded.append(torch.nn.functional.pad(value, grow))
        return torch.cat(padded, dim=1 if name.startswith("auxiliary") else 0)

    return StepScores(**{item.name: stacked(item.name) for item in fields(StepScores)})  # type: ignore[arg-type]


def loss_coefficients(
    args: UniSDConfig, weights: Sequence[WeightFunction], scores: StepScores
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What each token's divergence, contrast and feature term is multiplied by in the step's loss (method: "Aggregation").

    Returns:
        `[B,T]` each under "divergence" and, where active, "contrast" and "features"; and the weights' metrics.
    """
    B, T = scores.mask.shape
    token_BT, sequence_B = torch.ones(B, T), torch.ones(B)
    normalizer = "weights"
    metrics: dict[str, float] = {}
    for weight in weights:
        value = weight(scores)
        if weight.level == "sequence":
            sequence_B = sequence_B * value
        else:
            token_BT = token_BT * value
            normalizer = weight.normalizer
        prefix = "agreement" if weight.name.startswith("agreement_") else f"weight/{weight.name}"
        spread_BT = value if weight.level == "token" else value[:, None].expand(B, T)
        metrics |= {f"{prefix}/{key}": float(number) for key, number in weight_stats(spread_BT, scores.mask).items()}
    if scores.auxiliary_present is not None:
        metrics["agreement/contexts"] = float(scores.auxiliary_present.sum()) / max(B, 1)
        metrics["agreement/scored_rows"] = float((scores.auxiliary_present.sum(0) > 0).float().mean()) if B else 0.0
    divergence_BT = step_coefficients(
        scores.mask, token_BT, sequence_B, args.loss_aggregation, args.weight_normalizer or normalizer
    )
    coefficients = {"divergence": torch.zeros(B, T) if args.feature_only else divergence_BT}
    if args.contrastive_weight and scores.negative_present is not None:
        unit_BT = term_coefficients(scores.mask, scores.negative_present, args.loss_aggregation)
        coefficients["contrast"] = args.contrastive_weight * unit_BT
    if args.feature_weight:
        unit_BT = term_coefficients(scores.mask, torch.ones(B, dtype=torch.bool), args.loss_aggregation)
        coefficients["features"] = args.feature_weight * unit_BT
    return coefficients, metrics


def micro_batch(
    part: Sequence[int],
    rows: Sequence[ScoringRow],
    scores: StepScores,
    states: TeacherStates,
    coefficients: dict[str, Tensor],
    *,
    packed: bool,
    pad_id: int,
    hidden_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """Rows `part` of this rank laid out for the student, with everything the loss needs at their N loss tokens.

    `scores` and `coefficients` are this rank's.
    """
    batch: Batch = lay_out([rows[i].student + rows[i].completion for i in part], packed, pad_id, device)
    chosen = torch.tensor(part)
    mask_BT = scores.mask[chosen]
    positions = [
        start + len(rows[i].student) - 1 + t
        for start, i in zip(batch.starts, part, strict=True)
        for t, carries_loss in enumerate(rows[i].loss_mask)
        if carries_loss
    ]

    def at_loss_tokens(value_BT: Tensor) -> Tensor:
        return value_BT[chosen][mask_BT].to(device)

    def states_at_loss_tokens(states_of_rows: Sequence[Tensor]) -> Tensor:
        kept = [states_of_rows[i][torch.tensor(rows[i].loss_mask, device=device)] for i in part if any(rows[i].loss_mask)]
        return torch.cat(kept) if kept else torch.zeros(0, hidden_size, device=device)

    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": batch.attention_mask,
        "positions_N": torch.tensor(positions, dtype=torch.long, device=device),
        "targets_N": at_loss_tokens(scores.tokens),
        "teacher_NH": states_at_loss_tokens(states.final),
        "teacher_layers_NH": {layer: states_at_loss_tokens(of_rows) for layer, of_rows in states.layers.items()},
    }
    for name, value_BT in coefficients.items():
        inputs[f"{name}_coefficient_N"] = at_loss_tokens(value_BT)
    if "contrast" in coefficients and scores.negative_logp is not None:
        inputs["teacher_logp_N"] = at_loss_tokens(scores.teacher_logp)
        inputs["negative_logp_N"] = at_loss_tokens(scores.negative_logp)
    return inputs
