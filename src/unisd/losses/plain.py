"""The loss in plain sight: every `[N,V]` tensor exists, autograd does the rest.

The oracle of the tests.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from unisd.losses.terms import LossInputs, LossOutput, output, total
from unisd.methods.divergence import divergence_of_logp, entropy, pick


def plain_loss(inputs: LossInputs) -> LossOutput:
    """`sum_N coefficient * min(D, token_clip)` and the terms, its gradient by autograd.

    N = 0 gives exactly zero, still attached to the graph.
    """
    inputs = inputs.with_outcomes()
    targets_N, spec = inputs.targets_N, inputs.spec
    student_logp_NV = inputs.student_head.log_probs(inputs.student_hidden_NH, spec.temperature)
    own_NV, teacher_logp_NV = teacher_logp(inputs, student_logp_NV)
    own_N = pick(own_NV, targets_N)
    divergence_N = divergence_of_logp(student_logp_NV, teacher_logp_NV, targets_N, spec)
    logp_N, entropy_N = pick(student_logp_NV, targets_N), entropy(student_logp_NV.detach())
    if inputs.deferred is not None:
        factor_N = inputs.deferred(divergence_N.detach(), logp_N.detach(), entropy_N)
        inputs = replace(inputs, coefficient_N=inputs.coefficient_N * factor_N)
    values = (divergence_N, logp_N, entropy_N, own_N)
    return output(inputs, total(inputs, values), values)


@torch.no_grad()
def teacher_logp(part: LossInputs, student_logp_CV: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's own log-probabilities, and the target's where there is one; the student's where
    no teacher is asked.
    """
    if part.spec.mode == "nll":
        return student_logp_CV.detach(), student_logp_CV.detach()
    own_CV = part.teacher_head.log_probs(part.teacher_hidden_NH, part.spec.temperature)
    return own_CV, (
        own_CV
        if part.target is None
        else part.target.logp(student_logp_CV, own_CV, part.targets_N, part.spec)
    )
