"""From the scores of a whole optimizer step to what its loss is made of: coefficients and micro-batches.

Normalisers, weights and quantiles belong to the *step* (all micro-batches, all ranks), so that cutting it differently changes nothing.

Shapes: B rows, T longest completion, K contexts, N loss tokens of a micro-batch, H hidden size.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
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
from unisd.reuse import importance_ratio, importance_stats
from unisd.scoring import NEGATIVE, ScoringRow, TeacherStates
from unisd.targets import STUDENT, Target

STUDENT_NEEDS = frozenset({"student", "divergence"})
AGREEMENT = ("agreement_token", "agreement_sequence")


def normalizer_of(args: UniSDConfig, weights: Sequence[WeightFunction]) -> str:
    """What the token weights are divided by: the user's choice, or as published for the last of them."""
    published = [weight.normalizer for weight in weights if weight.level == "token"]
    return args.weight_normalizer or (published[-1] if published else "weights")


def drawn_scores(args: UniSDConfig, weights: Sequence[WeightFunction]) -> frozenset[str]:
    """What the student's own rollout tells the weights of it: l, where tokens were drawn from the very distribution of the loss."""
    wanted = any("student" in weight.needs and not weight.in_forward for weight in weights)
    whole = args.top_p == 1 and args.top_k == 0 and args.min_p == 0 and args.temperature == args.divergence_spec.temperature
    fresh = args.completion_source == "student" and args.num_iterations == 1
    return frozenset({"student"} if wanted and whole and fresh else ())


def in_forward_weights(
    args: UniSDConfig, weights: Sequence[WeightFunction], drawn: frozenset[str] = frozenset(), off_policy: bool = False
) -> list[WeightFunction]:
    """The weights that wait for the student's training pass, and so cost none of their own.

    Not where the student is scored beforehand anyway (for another weight, a clip quantile or the importance ratio, which must not enter
    the divisor), nor where the divisor is the sum of all weights of the step, which must be known before the first gradient
    (`loss_aggregation=token` with normalizer `weights`).
    """
    scored = any((w.needs - drawn) & STUDENT_NEEDS and not w.in_forward for w in weights)
    scored = scored or off_policy or args.token_clip_quantile is not None
    if scored or (args.loss_aggregation == "token" and normalizer_of(args, weights) == "weights"):
        return []
    return [weight for weight in weights if weight.in_forward]


def scored_sources(args: UniSDConfig, target: Target | None) -> list[str]:
    """The target's sources that need a pass: neither the student's own distribution nor the primary teacher's."""
    if target is None:
        return []
    sources = [name for name in target.sources if name not in (STUDENT, f"teacher/{args.teacher_context}")]
    if any(name.startswith("step/") for name in sources) and args.target_reference_steps is None:
        raise UserError(f"target {target.name!r} looks at earlier weights of the student: set target_reference_steps.")
    return sources


def needed_views(
    args: UniSDConfig,
    weights: Sequence[WeightFunction],
    in_forward: Sequence[WeightFunction] = (),
    sources: Sequence[str] = (),
    drawn: frozenset[str] = frozenset(),
    off_policy: bool = False,
) -> frozenset[str]:
    """What this run's mechanisms look at; nothing else is scored. The student's part of `in_forward` weights comes for free.

    drawn: what the rollout tells (:func:`drawn_scores`). off_policy: the answers are those of other weights, or another engine's, and
    the importance ratio corrects for that.
    """
    needs = frozenset(need for weight in weights for need in weight.needs - (STUDENT_NEEDS if weight in in_forward else drawn))
    if args.agreement_uncertain_share < 1:
        needs |= {"entropy"}
    if args.contrastive_weight or NEGATIVE in sources:
        needs |= {"negative"}
    if args.token_clip_quantile is not None:
        needs |= {"divergence"}
    if off_policy:
        needs |= {"student"}
    return needs


def check_data_serves(needs: frozenset[str], rows: Sequence[Row]) -> None:
    """Raise `UserError` if an active mechanism finds nothing in the data to work with."""
    if "auxiliary" in needs and not any(len(row.get("auxiliary_contexts") or []) >= 2 for row in rows):
        raise UserError(
            "agreement needs auxiliary contexts, but no row has two of them: add a column auxiliary_contexts (a list of solved "
            "examples of other problems), build them with --agreement_contexts retrieval, or set agreement=none."
        )
    if "negative" in needs and not any(row.get("negative_context") for row in rows):
        raise UserError(
            "contrast needs wrong references, but no row has one: add a column negative_context, build them with --negatives corrupt, or "
            "unset what needs them (contrastive_weight, contrast_weight, the target contrast)."
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


def rows_to_fill(rows: int, batch: int, rank: int, ranks: int) -> int:
    """How many rows at the end of a rank's last micro-batch of an epoch only fill it: accelerate repeats the epoch's first ones."""
    left = rows % (batch * ranks)
    return 0 if ranks == 1 or left == 0 else batch - min(max(left - rank * batch, 0), batch)


def gather_scores(accelerator: Accelerator, scores: StepScores) -> tuple[slice, StepScores]:
    """The scores of all ranks, and which rows of them are this rank's."""
    count = len(scores.mask)
    if accelerator.num_processes == 1:
        return slice(0, count), scores
    parts: list[StepScores] = gather_object([scores])
    first = sum(len(part.mask) for part in parts[: accelerator.process_index])
    return slice(first, first + count), concatenate(parts)


def select(scores: StepScores, rows: Tensor) -> StepScores:
    """The scores of some rows."""
    chosen: dict[str, Tensor] = {}
    for item in fields(StepScores):
        value = getattr(scores, item.name)
        if value is not None:
            chosen[item.name] = value[:, rows] if item.name.startswith("auxiliary") else value[rows]
    return replace(scores, **chosen)


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


def reliability(
    weights: Sequence[WeightFunction], scores: StepScores, in_forward: Sequence[WeightFunction] = ()
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The product of all weights by level, `[B,T]` and `[B]`, and their metrics. Those `in_forward` are left to :class:`InForward`."""
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
    args: UniSDConfig, weights: Sequence[WeightFunction], scores: StepScores, in_forward: Sequence[WeightFunction] = ()
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What each token's divergence, contrast and feature term is multiplied by in the step's loss (method: "Aggregation").

    Weights that are `in_forward` are left to :class:`InForward`.

    Returns:
        `[B,T]` each under "divergence" and, where active, "contrast" and "features"; and the weights' metrics.
    """
    B, T = scores.mask.shape
    token_BT, sequence_B, metrics = reliability(weights, scores, in_forward)
    if scores.auxiliary_present is not None:
        metrics["agreement/contexts"] = float(scores.auxiliary_present.sum()) / max(B, 1)
        metrics["agreement/scored_rows"] = float((scores.auxiliary_present.sum(0) > 0).float().mean()) if B else 0.0
    divergence_BT = step_coefficients(scores.mask, token_BT, sequence_B, args.loss_aggregation, normalizer_of(args, weights))
    if args.importance_cap is not None and scores.behaviour_logp is not None and scores.student_logp is not None:
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
    """Weights that look at the student, for one micro-batch: called by the loss with what its own pass found (`losses.Reweigh`).

    With the normalizers `weights` and `mean1` the divisor is a row's own sum: the factors keep the sum of each row's coefficients, which
    the step fixed before. A row without any weight left has no loss, but was counted as a row.
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
            factor_BT = factor_BT * torch.where(after_B1 == 0, 0.0, before_B1 / torch.where(after_B1 == 0, 1.0, after_B1))
        return factor_BT[mask_BT].to(divergence_N)


class InForward:
    """The weights of a run that wait for the student's pass: makes each micro-batch's `Reweigh`, and keeps what it found for the log."""

    def __init__(
        self, args: UniSDConfig, weights: Sequence[WeightFunction], drawn: frozenset[str] = frozenset(), off_policy: bool = False
    ) -> None:
        self.weights = in_forward_weights(args, weights, drawn, off_policy)
        self._normalizer = normalizer_of(args, weights)
        self._step: tuple[StepScores, Tensor] | None = None
        self._found: dict[str, Tensor] = {}  # by weight [B,T]; rows that are done again take the place of what they left

    def begin(self, scores: StepScores, coefficients_BT: Tensor) -> None:
        """A new optimizer step: this rank's scores and the coefficients of the divergence without these weights."""
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
            found |= weight_metrics(weight.name, weight_stats(values_N[None], torch.ones(1, len(values_N), dtype=torch.bool)))
        return found


def alike(rows: Sequence[ScoringRow], sizes: Sequence[int]) -> list[list[int]]:
    """Micro-batches of the given sizes, rows of like length together: the step's loss does not depend on how it is cut."""
    order = iter(sorted(range(len(rows)), key=lambda i: len(rows[i].student) + len(rows[i].completion)))
    return [list(islice(order, size)) for size in sizes]


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
        # By number, not by mask: a mask would wait for the device.
        kept = []
        for i in part:
            chosen_of_row = [t for t, carries_loss in enumerate(rows[i].loss_mask) if carries_loss]
            if len(chosen_of_row) == len(states_of_rows[i]):
                kept.append(states_of_rows[i])
            elif chosen_of_row:
                kept.append(states_of_rows[i][torch.tensor(chosen_of_row, device=device)])
        return torch.cat(kept) if kept else torch.zeros(0, hidden_size, device=device)

    inputs: dict[str, Any] = {
        "part": list(part),
        "row_N": torch.tensor(
            [rows[i].number for i in part for kept in rows[i].loss_mask if kept], dtype=torch.long, device=device
        ),
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": batch.attention_mask,
        "starts": batch.starts,
        "bounds": batch.bounds,
        "positions_N": torch.tensor(positions, dtype=torch.long, device=device),
        "targets_N": at_loss_tokens(scores.tokens),
        "teacher_NH": states_at_loss_tokens(states.final),
        "teacher_layers_NH": {layer: states_at_loss_tokens(of_rows) for layer, of_rows in states.layers.items()},
    }
    if states.source_present:
        inputs["target_states"], inputs["target_present_N"] = states.of_target(
            states_at_loss_tokens, at_loss_tokens, scores.mask.shape[1]
        )
    for name, value_BT in coefficients.items():
        inputs[f"{name}_coefficient_N"] = at_loss_tokens(value_BT)
    if "contrast" in coefficients and scores.negative_logp is not None:
        inputs["negative_logp_N"] = at_loss_tokens(scores.negative_logp)
    return inputs
