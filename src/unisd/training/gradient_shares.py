"""Measure how much of a step's gradient each mechanism makes: with it, and without.

share = |g - g_without| / |g|, over all trained parameters. One step tells how strong a mechanism
is, not whether it helps: for that compare runs (`unisd study`). Each costs one more pass with
gradient over the step. An EMA teacher is not among them: it would have to be scored again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unisd.files import GRADIENT
from unisd.kernels.lora import fast_maps, fused_lora
from unisd.methods.scores import StepScores
from unisd.training.coefficients import AGREEMENT, DeferredWeights, loss_coefficients
from unisd.training.plan import without_weight
from unisd.training.step import Step


def gradient_shares(trainer: Any, step: Step, scores: StepScores) -> dict[str, float]:
    """The share of each mechanism of the step, by `gradient/NAME`; nothing where the gradient is 0.

    Leaves no gradient behind. What the passes add to the trainer's sums is for the caller to take
    back.

    Args:
        trainer: a `UniSDTrainer`.
        scores: those that the step's coefficients were made of.
    """
    trainer.model.train()
    whole = _gradient(trainer, step)
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in whole))
    shares = {}
    for name, less in _without_each(trainer, step, scores) if norm > 0 else ():
        apart = zip(_gradient(trainer, less), whole, strict=True)
        distance = sum(float((a.double() - b.double()).square().sum()) for a, b in apart)
        shares[GRADIENT + name] = math.sqrt(distance) / norm
    return shares


def _without_each(trainer: Any, step: Step, scores: StepScores) -> Iterator[tuple[str, Step]]:
    """The step without each of its mechanisms, by name."""
    args, plan = trainer.args, trainer.plan
    for weight in plan.weights:
        less = without_weight(args, plan, weight)
        found = loss_coefficients(args, less, scores).of_rows(slice(None), scores.mask.shape[1])
        deferred = DeferredWeights.of(less, scores, found.divergence_BT)
        name = "agreement" if weight.name in AGREEMENT else weight.name
        yield name, replace(step, coefficient_BT=found.divergence_BT, deferred=deferred)
    for term, _ in step.terms:
        yield term.name, replace(step, terms=[pair for pair in step.terms if pair[0] is not term])
    if step.token_clip is not None:
        yield "clip", replace(step, token_clip=None, clipped_BT=None)
    if step.target is not None:
        yield step.target.target.name, replace(step, target=None)


def _gradient(trainer: Any, step: Step) -> list[Tensor]:
    """The gradient of the step's loss by each trained parameter."""
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    size = trainer.most_rows or trainer.args.per_device_train_batch_size
    with torch.random.fork_rng(), fast_maps(trainer.model), fused_lora(trainer.model):
        for start in range(0, len(step.rows), size):
            part = list(range(start, min(start + size, len(step.rows))))
            trainer.compute_loss(trainer.model, step.micro_batch(part).inputs).backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained]
    trainer.model.zero_grad(set_to_none=True)
    return found
